"""Training and the commands on GPUs: real ones, or a stand-in for them (FAKE_GPUS is set), which
has no speed, cuDNN or inductor.

../shared/cuda-standin/run-python -m pytest tests/test_cuda.py
"""

import contextlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nets import get_model, head_layers
from tests.helpers import (
    ROOT,
    default_settings,
    environment,
    history,
    make_data,
    make_project,
    run_of,
    torchrun,
    train,
    weights,
    write_network,
)
from utils.fit import forward_backward, optimizer_step, seed_step
from utils.optimizer import get_optimizer
from utils.pictures import normalize
from utils.recipe import EMA, Recipe
from utils.task import batch_sums

STAND_IN = "FAKE_GPUS" in os.environ
NETWORK = (
    "nn.Conv2d(3, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, 2), "
    "nn.BatchNorm2d(16), nn.ReLU(), "
    "nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes)"
)


@contextlib.contextmanager
def machine(gpus=1, **fakes):
    """Programs started here find this many GPUs.

    Fakes: what only the stand-in can do; a test of it is skipped without one.
    """
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    if not STAND_IN and (fakes or gpus > torch.cuda.device_count()):
        pytest.skip("needs the stand-in" if fakes else f"needs {gpus} GPUs")
    with pytest.MonkeyPatch.context() as patch:
        if not STAND_IN or not gpus:
            patch.setenv("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus))))
        if STAND_IN and gpus:
            patch.setenv("FAKE_GPUS", str(gpus))
        elif STAND_IN:
            for name in ("FAKE_GPUS", "LD_PRELOAD", "LD_LIBRARY_PATH", "PYTHONPATH"):
                patch.delenv(name)
        for name, value in fakes.items():
            patch.setenv(name, str(value))
        yield


def project(folder, layers=NETWORK, train=48, test=20, **constants):
    """A project that trains a small network on the GPU where there is one, in mixed precision."""
    folder = make_project(
        folder,
        **{
            **dict(backbone="'small'", Cuda="torch.cuda.is_available()", fp16=True, Init_lr=0.05),
            **constants,
        },
    )
    write_network(folder / "nets", "small", layers)
    make_data(folder, train, test)
    return folder


def launcher(processes):
    return torchrun() if processes > 1 else (sys.executable,)


def learned(folder, test=20):
    rows = history(run_of(folder))
    assert max(row["top1"] for row in rows) > 0.6 and all(
        row["scored"] == test and row["scale"] >= 1 for row in rows
    )
    assert all(math.isfinite(value) for row in rows for value in row.values())
    return rows


def checkpoint(run):
    return torch.load(run / "last_checkpoint.pth", weights_only=True)


def one_sentence(err, *words):
    """A mistake of the user's, told without a traceback."""
    said = re.findall(r"^(?:\[rank \d+\] )?error: (.*)", err, re.M)
    assert said and "Traceback" not in err and all(word in said[0] for word in words), err[-1500:]


@pytest.mark.parametrize("own_data", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_unedited_file(tmp_path, own_data):
    """On pictures of one's own at its default paths, or on the 5,000 that it draws itself."""
    for part in ("nets", "utils", "train.py"):
        (shutil.copy if part.endswith("py") else shutil.copytree)(ROOT / part, tmp_path / part)
    if own_data:
        make_data(tmp_path, train=640, test=60, size=(64, 64))
    with machine():
        train(tmp_path, "--UnFreeze_Epoch", 1, timeout=300)
    (row,) = history(run_of(tmp_path))
    assert row["train_loss"] < math.log(3 if own_data else 10)  # what guessing has
    assert all(math.isfinite(value) for value in row.values())
    state = checkpoint(run_of(tmp_path))
    assert all(t.isfinite().all() for t in state["model"].values())
    settings = json.loads((run_of(tmp_path) / "config.json").read_text())["settings"]
    if settings["fp16"] == "float16":
        assert state["scaler"]["scale"] == row["scale"]
    else:
        assert settings["fp16"] == "bfloat16" and state["scaler"] is None and "scale" not in row


def test_two_gpus_by_data_parallel(tmp_path):
    folder = project(tmp_path, num_workers=2)
    with machine(2):
        out, _ = train(folder)
    learned(folder)
    (device,) = [line for line in out.splitlines() if line.strip().startswith("device")]
    assert torch.cuda.get_device_name(0) in device and "2" in device.replace(
        torch.cuda.get_device_name(0), ""
    )
    assert "torchrun" in out
    assert not any(name.startswith("module.") for name in weights(run_of(folder)))


def test_torchrun_with_sync_bn_learns_what_one_gpu_learns(tmp_path):
    """The first step is left out by both, as its gradients overflow."""
    rows = {}
    for number, words in ((1, []), (2, ["--sync_bn", True])):
        folder = project(tmp_path / str(number), Init_lr=0.02)
        with machine(number, **({"FAKE_INF_AT": 1} if STAND_IN else {})):
            out, err = train(folder, *words, launcher=launcher(number))
        assert "stride" not in err and "destroy_process_group" not in err
        rows[number] = history(run_of(folder))
    for one, two in zip(rows[1], rows[2], strict=True):
        assert (
            one["train_loss"] == pytest.approx(two["train_loss"], rel=0.02)
            and one["scale"] == two["scale"]
        )
        assert (
            one["val_loss"] == pytest.approx(two["val_loss"], rel=0.02)
            and one["scored"] == two["scored"] == 20
        )


def test_the_first_process_tries_precisions_alone(tmp_path):
    """Layers that wait for all processes come afterwards."""
    folder = project(tmp_path, fp16="'auto'", sync_bn=True, UnFreeze_Epoch=1)
    with machine(2):
        out, _ = train(folder, launcher=launcher(2), timeout=200)
    assert "images/s)" in out.partition("precision ")[2].partition("\n")[0]
    assert history(run_of(folder))[0]["scored"] == 20


ALL_ON = dict(
    Freeze_Train=True,
    Freeze_Epoch=1,
    UnFreeze_Epoch=3,
    accumulate=2,
    clip_grad_norm=1.0,
    ema_decay=0.5,
    mixup_alpha=0.2,
    cutmix_alpha=1.0,
    class_weights="'balanced'",
    label_smoothing=0.1,
    num_workers=1,
)


@pytest.mark.parametrize("gpus", [1, 2])
def test_every_recipe(tmp_path, gpus):
    """Frozen, then unfrozen; the first step of both overflows."""
    folder = project(tmp_path, train=64, test=20, **ALL_ON)
    with machine(gpus, **({"FAKE_INF_AT": "1,5"} if STAND_IN else {})):
        train(folder, launcher=launcher(gpus))
    rows = learned(folder)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert not STAND_IN or [row["scale"] for row in rows] == [2**15, 2**14, 2**14]


def test_compiled(tmp_path):
    """Over the unfreezing; the stand-in traces, and computes without inductor."""
    folder = project(tmp_path, compile=True, Freeze_Train=True, Freeze_Epoch=1)
    with machine():
        train(folder, timeout=200)
    learned(folder)
    assert list(weights(run_of(folder))) == list(
        checkpoint(run_of(folder))["model"]
    ) and "0.weight" in weights(run_of(folder))


def alike(a, b):
    """Whether two parts of a checkpoint are bit-identical."""
    if isinstance(a, torch.Tensor):
        return a.device == b.device and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
    return all(map(alike, a, b)) and len(a) == len(b) if isinstance(a, (list, tuple)) else a == b


ANY_SHAPE = """
own_sums = batch_sums


def batch_sums(loss, logits, targets, settings):
    sums = own_sums(loss, logits, targets, settings)
    return {**sums, "by_class": logits.detach().double().sum(0)}
"""
WAYS = [("sgd", 1, 1)] + [
    pytest.param(*way, marks=pytest.mark.slow)
    for way in (("adamw", 1, 1), ("sgd", 2, 1), ("sgd", 2, 2), ("adamw", 2, 2))
]


@pytest.mark.parametrize("optimizer, gpus, processes", WAYS)
def test_a_signal_after_an_overflow_changes_no_bit(tmp_path, optimizer, gpus, processes):
    """Steps 2 and 6 overflow, the signal comes in step 4: the end is that of the run that was left
    alone.

    A fork's sum that is no scalar is continued on the GPU as well.
    """
    alone, stopped = (
        project(tmp_path / name, optimizer_type=repr(optimizer), momentum=0.8)
        for name in ("alone", "stopped")
    )
    for folder in (alone, stopped):
        with open(folder / "utils/task.py", "a") as file:
            file.write(ANY_SHAPE)
    with machine(gpus, FAKE_INF_AT="2,6"):
        train(alone, launcher=launcher(processes))
    with machine(gpus, FAKE_INF_AT="2,6", FAKE_SIGTERM_AT=4):
        train(stopped, launcher=launcher(processes), code=143 if processes == 1 else 1)
    state = checkpoint(run_of(stopped))
    assert state["epoch"] == 0 and 4 <= state["step"] < 6 and state["scaler"]["scale"] == 2**15
    with machine(gpus, FAKE_INF_AT=6 - state["step"]):
        train(stopped, "--resume", True, launcher=launcher(processes))
    ours, theirs = checkpoint(run_of(stopped)), checkpoint(run_of(alone))
    for part in ("model", "optimizer", "scaler", "epoch", "step"):
        assert alike(ours[part], theirs[part]), part
    assert ours["scaler"]["scale"] == 2**14


COMMANDS = """
import json, runpy, sys, torch
from pathlib import Path
run, out = sys.argv[1:]
loaded = [torch.load(file) for file in Path(run).glob("*.pth")]  # as README says: nothing but this
picture = "model_data/test0.png"
commands = {"evaluate": [run, "--out", out], "predict": [run, picture, "--json"], "export": [run]}
for module, words in commands.items():
    sys.argv = [module, *words]
    try:
        runpy.run_module(f"utils.{module}", run_name="__main__")
    except SystemExit as end:
        assert not end.code, end
Path(run, "model.pt2").rename(Path(out, "model.pt2"))
tf32 = torch.get_float32_matmul_precision()
print(json.dumps({"files": len(loaded), "cuda": torch.cuda.is_available(), "tf32": tf32}))
"""


@pytest.fixture(scope="module")
def cuda_run(tmp_path_factory):
    """A run of two epochs on the GPU, whose validation wants TF32 as it was in training."""
    folder = project(tmp_path_factory.mktemp("cuda_run"), save_period=1)
    with machine():
        train(folder)
    return folder


def commands(folder, out):
    """(evaluate's figures as printed, predict's answer, what the commands' process was like)."""
    (folder / out).mkdir()
    (folder / "commands.py").write_text(COMMANDS)
    done = subprocess.run(
        [sys.executable, "commands.py", f"logs/{run_of(folder).name}", out],
        cwd=folder,
        capture_output=True,
        text=True,
        env=environment(),
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return done.stdout, answers[0], answers[-1]


def table(path):
    with open(path, encoding="utf-8") as file:
        return [line.split(",") for line in file.read().splitlines()[1:]]


def test_commands_with_and_without_a_gpu(cuda_run):
    """All weight files load anywhere by torch.load alone.

    The answers are equal within float16's rounding.
    """
    with machine():
        said, answer, process = commands(cuda_run, "gpu")
    with machine(gpus=0):
        plain_said, plain_answer, plain_process = commands(cuda_run, "cpu")
    assert (
        process["cuda"]
        and not plain_process["cuda"]
        and process["files"] == plain_process["files"] >= 5
    )
    assert process["tf32"] == "high"  # as in training
    losses = [float(re.search(r"loss (\d+\.\d+)", text)[1]) for text in (said, plain_said)]
    best = max(history(run_of(cuda_run)), key=lambda row: (row["top1"], -row["val_loss"]))
    assert losses == pytest.approx([best["val_loss"]] * 2, rel=1e-3) and losses[0] == pytest.approx(
        best["val_loss"], rel=1e-6
    )
    assert answer.keys() == plain_answer.keys()
    for ours, theirs in zip(
        table(cuda_run / "gpu/predictions.csv"),
        table(cuda_run / "cpu/predictions.csv"),
        strict=True,
    ):
        shares, others = (
            dict(zip(row[2::2], map(float, row[3::2]))) for row in (ours, theirs)
        )  # two equal ones may change places
        assert (
            ours[:2] == theirs[:2]
            and len(shares) == 3
            and shares == pytest.approx(others, abs=5e-3)
        )
    pictures = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    programs = [torch.export.load(cuda_run / out / "model.pt2").module() for out in ("gpu", "cpu")]
    torch.testing.assert_close(programs[0](pictures), programs[1](pictures))


def test_to_a_cpu_and_back(cuda_run, tmp_path):
    folder = shutil.copytree(cuda_run, tmp_path / "moved")
    for epochs, gpus in ((3, 0), (4, 1)):
        with machine(gpus):
            out, _ = train(
                folder, "--UnFreeze_Epoch", epochs, "--resume", f"logs/{run_of(folder).name}"
            )
        assert f"Cuda: {gpus == 0} → {gpus == 1}" in out
    rows = history(run_of(folder))
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4] and rows[-1]["train_loss"] < rows[0][
        "train_loss"
    ]
    assert checkpoint(run_of(folder))["scaler"]["scale"] >= 1


@pytest.mark.parametrize(
    "megabytes, gpus, words",
    [
        (40, 1, []),  # the network itself has 45
        (80, 1, ["--ema_decay", 0.9]),  # its average
        (80, 2, []),  # the buckets of DistributedDataParallel
        (110, 1, []),  # the gradients
        (170, 1, ["--ema_decay", 0.9]),
    ],
)  # the optimizer
def test_out_of_memory(tmp_path, megabytes, gpus, words):
    folder = project(tmp_path, backbone="'resnet18'")
    with machine(gpus, FAKE_MEM_MB=megabytes):
        _, err = train(folder, *words, code=1, launcher=launcher(gpus))
    one_sentence(
        err.split("ChildFailedError")[0].replace("Traceback", "", gpus - 1),
        "memory",
        "Unfreeze_batch_size",
        "input_shape",
    )


def test_compile_wants_one_gpu_a_process(tmp_path):
    folder = project(tmp_path, compile=True)
    with machine(2):
        _, err = train(folder, code=1)
    one_sentence(err, "compile", "torchrun")
    assert not list(folder.glob("logs/*/config.json"))  # it never was a run


def test_one_picture_for_each_gpu(tmp_path):
    """DataParallel splits 3 pictures into 2 and 1, which BatchNorm cannot take."""
    folder = project(
        tmp_path, NETWORK.replace("nn.Flatten(),", "nn.Flatten(), nn.BatchNorm1d(16),")
    )
    with machine(2):
        for batch_size in (2, 3):
            _, err = train(folder, "--Unfreeze_batch_size", batch_size, code=1)
            one_sentence(err, "Unfreeze_batch_size", "GPU")


def test_gradients_that_stay_nan(tmp_path):
    """0 · √0 is 0 and has no gradient.

    The loss is finite, every step is left out, and the scale falls by half each time.
    """
    folder = project(tmp_path, train=160, Unfreeze_batch_size=4)
    path = folder / "nets" / "small.py"
    path.write_text(
        path.read_text()
        + "\n\nclass Root(nn.Module):\n    def forward(self, x):\n        return x + 0 * (0 * "
        "x).sqrt()\n"
    )
    path.write_text(path.read_text().replace("nn.Flatten(),", "nn.Flatten(), Root(),"))
    with machine():
        _, err = train(folder, code=1)
    one_sentence(err, "gradient", "scale")


@pytest.mark.parametrize("fakes", [{}, {"FAKE_SIGTERM_AT": 3}])
def test_the_first_bad_loss_is_named_within_bounds(tmp_path, fakes):
    """A GPU's losses are not looked at in every step.

    A signal before the next look saves nothing that cannot be continued.
    """
    folder = project(tmp_path, NETWORK + ", nn.Threshold(math.inf, math.nan)")
    path = folder / "nets" / "small.py"
    path.write_text("import math\n" + path.read_text())
    with machine(**fakes):
        _, err = train(folder, code=1)
    one_sentence(err, "loss is not finite", "step")
    assert not (run_of(folder) / "last_checkpoint.pth").exists() and ("by epoch 1" in err or fakes)


def test_no_step_waits_for_the_gpu():
    settings = default_settings(mixup_alpha=1, cutmix_alpha=1, ema_decay=0.9)
    with machine():
        model = get_model("resnet18", 10, [64, 64]).cuda()
    optimizer = get_optimizer(
        model,
        head_layers(model),
        settings["optimizer_type"],
        settings["momentum"],
        settings["weight_decay"],
    )
    scaler = torch.amp.GradScaler("cuda", init_scale=128.0)  # whose first step does not overflow
    parts = [
        (
            torch.zeros(8, 3, 64, 64, dtype=torch.uint8).pin_memory(),
            torch.zeros(8, dtype=torch.int64).pin_memory(),
            [],
        )
    ] * 2
    recipe = Recipe(settings, model, 10)
    sums = Counter()
    for mode in ("default", "error", "error", "error"):  # the first step may set things up
        torch.cuda.set_sync_debug_mode(mode)
        try:
            for batch in forward_backward(model, parts, True, True, scaler, recipe):
                sums.update(batch)
            optimizer_step(optimizer, scaler, 1.0, settings["clip_ratio"])
            recipe.ema.update_parameters(model)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert sums["pictures"] == 64


def test_a_batch_that_does_not_count_makes_no_step_wait():
    with machine():
        model = get_model("resnet18", 10, [32, 32]).cuda()
    recipe = Recipe(default_settings(), model, 10)
    scaler = torch.amp.GradScaler("cuda")
    images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8).pin_memory()
    parts = [(images, torch.zeros(4, dtype=torch.int64).pin_memory(), [])] * 2
    factors = iter([torch.tensor(float("inf")), torch.tensor(0.0)] * 2)
    recipe.extra_loss = lambda inputs, logits, targets: next(factors)
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            sums = forward_backward(model, parts, True, True, scaler, recipe)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert [int(batch["pictures"]) for batch in sums] == [0, 4]
        assert [int(batch["hits"].sum(0)[0]) for batch in sums] == [0, 4]


def test_each_gpu_of_a_process_draws_its_own(monkeypatch):
    with machine(2):
        torch.zeros(1).cuda()

    def seeds(**environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        seed_step(3, 1, 2, True)
        return [generator.initial_seed() for generator in torch.cuda.default_generators]

    alone = seeds()
    assert len(set(alone)) == len(alone) == torch.cuda.device_count() and alone == seeds()
    other = seeds(RANK="1", LOCAL_RANK="1")
    assert not {*alone} & {*other}


class Launches(TorchDispatchMode):
    """Counts what a GPU would be given to do: operations that are more than another view."""

    number = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.number += (
            not operation.is_view
            and "empty" not in operation.name()
            and "detach" not in operation.name()
        )
        return operation(*args, **(kwargs or {}))


def launches(work):
    work()  # what is kept from then on is not counted
    with Launches() as counter, torch.no_grad():
        work()
    return counter.number


def test_small_launches():
    """Beside the network's own; a small network has some 500 a step."""
    with machine():
        device = torch.device("cuda", 0)
    pictures = torch.zeros(8, 3, 32, 32, dtype=torch.uint8).pin_memory()
    assert launches(lambda: normalize(pictures, device, {})) <= 4  # a copy, and three
    model = get_model("resnet18", 10, [32, 32]).to(device)
    ema = EMA(model, 0.9)
    assert launches(lambda: ema.update_parameters(model)) <= 6  # however many layers
    scores, targets, loss = (
        torch.zeros(8, 10, device=device),
        torch.zeros(8, dtype=torch.int64, device=device),
        torch.zeros((), device=device),
    )
    assert launches(lambda: batch_sums(loss, scores, targets, {})) <= 14
