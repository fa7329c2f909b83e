"""The forks of utils/README.md, as they stand there.

Alone, under torchrun, through a resume, and in the commands.
"""

import csv
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score

from nets import get_model
from tests.helpers import (
    ROOT,
    SMALL,
    command,
    edit,
    environment,
    history,
    hooked,
    launch,
    make_data,
    originals,
    runs,
    same,
    train,
    weights,
)
from utils.plumbing.errors import UserError

SECTION = (
    (ROOT / "utils/README.md")
    .read_text(encoding="utf-8")
    .partition("\n## Fork it\n")[2]
    .partition("\n## ")[0]
)
FORKS = {}  # name: (a diff, the text of utils/task.py where the fork has its own)
for part in re.split(r"^\*\*(?=[^*\n]+\*\*:)", SECTION, flags=re.M)[1:]:
    own_task = re.search(r"`utils/task.py`:\n\n```python\n(.*?)```", part, re.S)
    change = re.search(r"```diff\n(.*?)```", part, re.S)[1]
    FORKS[part.partition("**")[0]] = change, own_task and own_task[1]
LOSS, TEACHER, METRIC, OPTIMIZER, MUON, CURVE, DATA, BALANCED, SAM, LABELS, REGRESSION = NAMES = [
    "The loss",
    "A loss that needs the pictures or another network",
    "A metric, and which epoch is best",
    "An optimizer",
    "Muon",
    "A learning-rate curve",
    "The data",
    "Class-balanced sampling",
    "SAM, or another step of several passes",
    "Several labels a picture",
    "Regression",
]
TASKS = (LABELS, REGRESSION)  # they change what a label is
WORDS = {
    MUON: ["--optimizer_type", "muon"],  # with all forks at once, the next one wins
    OPTIMIZER: ["--optimizer_type", "rmsprop", "--Init_lr", 1e-3],
    CURVE: ["--lr_decay_type", "one_over"],
    LOSS: ["--focal_gamma", 1.5],
    BALANCED: ["--balanced_sampling", "True"],
    SAM: ["--sam_radius", 0.1],
}


def places(fork):
    """Return (files, places) of a fork."""
    change, own_task = fork
    files = len(re.findall(r"^--- ", change, re.M))
    hunks = len(re.findall(r"^@@ ", change, re.M))
    return (files, hunks) if own_task is None else (files + 1, hunks + 1)


def apply(folder, fork, program=("git", "apply")):
    """Apply a fork as README says."""
    change, own_task = fork
    (folder / "fork.diff").write_text(change, encoding="utf-8")
    if own_task:
        (folder / "utils/task.py").write_text(own_task, encoding="utf-8")
    result = subprocess.run(
        [*program, "fork.diff"],
        cwd=folder,
        env={**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_loss_of_one_s_own_is_used_without_class_weights(tmp_path):
    """Which is the usual case, and validation's always."""
    shutil.copytree(originals(), tmp_path, dirs_exist_ok=True)
    apply(tmp_path, FORKS[LOSS])
    code = """
import torch
from utils.task import get_criterion
logits, targets = torch.tensor([[2.0, 0.0], [0.5, 0.0]]), torch.tensor([0, 1])
for weights in (None, torch.ones(2)):
    plain, focal = (get_criterion({"focal_gamma": g}, weights)(logits, targets) for g in (0, 2))
    right = torch.tensor([2.0, -0.5]).sigmoid()
    torch.testing.assert_close(plain, -right.log().mean())
    torch.testing.assert_close(focal, -((1 - right) ** 2 * right.log()).mean())
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment(), check=True)


def fashion(folder, train_pictures, test_pictures):
    """Files in the data set's own format.

    Magic number, sizes, bytes. The class shows in the brightness.
    """
    raw = folder / "model_data/FashionMNIST/raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, number in (("train", train_pictures), ("t10k", test_pictures)):
        labels = np.arange(number) % 10
        images = (labels[:, None, None] * 22 + rng.integers(0, 30, (number, 28, 28))).astype(
            np.uint8
        )
        for kind, array, sizes in (
            ("images-idx3", images, (number, 28, 28)),
            ("labels-idx1", labels.astype(np.uint8), (number,)),
        ):
            header = np.array([0x0800 + len(sizes), *sizes], ">i4").tobytes()
            (raw / f"{name}-{kind}-ubyte").write_bytes(header + array.tobytes())


def forked(folder, names):
    """Return a project with the forks `names`, and with data for them."""
    if not set(names) & set(TASKS):
        names = [*names, DATA]
    shutil.copytree(originals(), folder, dirs_exist_ok=True)
    for name, fork in FORKS.items():
        if name in names:
            apply(folder, fork)
    constants = {
        **SMALL,
        "backbone": "'resnet9'",
        "input_shape": [16, 16],
        "Freeze_batch_size": 20,
        "Unfreeze_batch_size": 20,
        "save_minutes": 1 / 6000,
    }
    edit(folder, **constants)
    if set(names) & set(TASKS):
        make_data(folder, train=80)
        for path in (folder / "model_data").glob("cls_t*.txt"):
            labels = ("0 2;", "1;", ";") if LABELS in names else ("0.5;", "-1e-1;", "2;")
            path.write_text(
                "".join(
                    labels[int(line[0])] + line[2:] for line in path.read_text().splitlines(True)
                )
            )
        if REGRESSION in names:
            (folder / "model_data/cls_classes.txt").write_text("age\n")
    else:
        fashion(folder, 400, 50)
        torch.manual_seed(0)
        torch.save(
            get_model("resnet18", 10, [16, 16]).state_dict(), folder / "model_data/teacher.pth"
        )
    return folder


def predictions(run):
    with open(run / "predictions.csv", encoding="utf-8-sig") as file:
        return list(csv.reader(file))[1:]


def check_commands(folder, run, best_by, export=False):
    """evaluate and training agree.

    Predict and export run. Returns what predict says of a picture, as JSON.
    """
    name = best_by.removeprefix("-")
    sign = -1 if best_by.startswith("-") else 1
    best = max(history(run), key=lambda row: (sign * row[name], -row["val_loss"]))
    said, _ = command(folder, "utils.evaluate", run.relative_to(folder))
    for name in best.keys() - {"epoch", "lr", "scored", "unreadable", "images_per_second"}:
        if "train_" not in name:
            words = name.removeprefix("val_").replace("_", " ")
            number, share = re.search(
                {"top1": "top-1", "top5": "top-5"}.get(words, words) + r" ([-\d.e]+)(%?)", said
            ).groups()
            assert float(number) / (100 if share else 1) == pytest.approx(
                best[name], rel=1e-4, abs=1e-6
            ), name
    said, _ = command(
        folder, "utils.predict", run.relative_to(folder), ROOT / "tests/curve.png", "--json"
    )
    answer = json.loads(said)
    if export:
        command(folder, "utils.export", run.relative_to(folder))
        program = torch.export.load(run / "model.pt2").module()
        assert len(program(torch.zeros(3, 3, 16, 16, dtype=torch.uint8))) == 3
    return answer


def check_resume(folder, words):
    """A run that is stopped within an epoch and goes on ends as the first one."""
    first = runs(folder)[0]
    stops = hooked(folder, "before('utils.fit:optimizer_step', send_sigterm, 5)")
    train(folder, *words, script=stops, code=128 + signal.SIGTERM)
    out, _ = train(folder, *words, "--resume", True)
    assert "continuing" in out
    assert same(weights(runs(folder)[1]), weights(first))


def check_labels(run, answer):
    """The figures are those of predictions.csv, computed in another way."""
    names = [f"class{i}" for i in range(3)]
    true = np.array([[name in row[1] for name in names] for row in predictions(run)])
    named = np.array([[name in row[2:] for name in names] for row in predictions(run)])
    hits, both = (true & named).sum(0), true.sum(0) + named.sum(0)
    best = max(history(run), key=lambda row: row["f1_macro"])
    assert {row[1] for row in predictions(run)} == {"class0, class2", "class1", "none"}
    assert best["exact"] == pytest.approx((true == named).all(1).mean())
    assert best["f1_micro"] == pytest.approx(2 * hits.sum() / max(both.sum(), 1))
    assert best["f1_macro"] == pytest.approx(np.mean(2 * hits / np.maximum(both, 1)))
    assert all(0.5 < found["probability"] <= 1 for found in answer["classes"])


def check_regression(run, answer):
    true, value = np.array([(row[1], row[3]) for row in predictions(run)], float).T
    best = min(history(run), key=lambda row: row["mae"])
    assert set(true) == {0.5, -0.1, 2} and best["mae"] == pytest.approx(
        np.abs(true - value).mean(), rel=1e-4
    )
    assert answer.keys() == {"picture", "age"}


def test_the_readme_shows_each_fork_and_it_is_small():
    assert list(FORKS) == NAMES
    most = {BALANCED: (3, 4)}
    assert {
        name: places(fork) for name, fork in FORKS.items() if places(fork) > most.get(name, (2, 3))
    } == {}


@pytest.mark.parametrize("program", [("git", "apply", "--check"), ("patch", "-p1", "-i")])
@pytest.mark.parametrize("name", NAMES)
def test_both_usual_programs_take_each_diff(tmp_path, name, program):
    if not shutil.which(program[0]):
        pytest.skip(f"no {program[0]}")
    shutil.copytree(originals(), tmp_path, dirs_exist_ok=True)
    apply(tmp_path, FORKS[name], program)


def test_all_small_forks_at_once(tmp_path):
    folder = forked(tmp_path / "a", set(NAMES) - set(TASKS))
    words = sum(WORDS.values(), [])
    out, _ = train(folder, *words)
    run = runs(folder)[0]
    rows = history(run)
    assert "best f1" in out.splitlines()[-1] and rows[-1]["train_f1"] > 0
    assert rows[1]["lr"] == pytest.approx(rows[0]["lr"] / 2)
    assert (
        "122 of 122" in out and rows[-1]["train_loss"] > rows[-1]["val_loss"]
    )  # with the distillation
    check_commands(folder, run, "f1")
    true, named = zip(*(row[1:3] for row in predictions(run)))
    best = max(history(run), key=lambda row: (row["f1"], -row["val_loss"]))
    assert best["f1"] == pytest.approx(f1_score(true, named, average="macro"))
    check_resume(folder, words)
    launch(folder, *words, "--save_dir", "both")
    together = history(next((folder / "both").iterdir()))
    assert [row["scored"] for row in together] == [50, 50] and 0 <= together[0]["f1"] <= 1


@pytest.mark.parametrize(
    "name, best_by, check",
    [(LABELS, "f1_macro", check_labels), (REGRESSION, "-mae", check_regression)],
)
def test_another_task(tmp_path, name, best_by, check):
    folder = forked(tmp_path, [name])
    out, _ = train(folder)
    assert f"best {best_by.strip('-').replace('_', ' ')}" in out.splitlines()[-1]
    check(runs(folder)[0], check_commands(folder, runs(folder)[0], best_by))


def changed_module(folder, fork, name):
    """A module of utils with the places of a fork, under another name."""
    shutil.copytree(originals(), folder, dirs_exist_ok=True)
    apply(folder, FORKS[fork])
    spec = importlib.util.spec_from_file_location(f"forked_{name}", folder / f"utils/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_balanced_sampling_shows_each_class_as_often(tmp_path):
    sampler = changed_module(tmp_path, BALANCED, "sampler").EpochSampler(1000, 100)
    sampler.class_ids = np.arange(1000) % 100 // 90  # 900 and 100
    order = sampler.order()
    assert len(order) == 1000 and all(
        400 < number < 600 for number in np.bincount(sampler.class_ids[order])
    )
    sampler.set_epoch(1)
    assert (sampler.order() != order).any()


@pytest.mark.parametrize(
    "fork, good, bad",
    [
        (
            LABELS,
            {"0 2": [1, 0, 1], "": [0, 0, 0], "1": [0, 1, 0]},
            {"0 3": "class id 3 is outside 0 … 2", "a": "'a' is not a whole number"},
        ),
        (
            REGRESSION,
            {"-1.5": -1.5, "3": 3, 0.25: 0.25},
            {"": "the label '' is not a number", "nan": "not a number", "1e99": "not a number"},
        ),
    ],
)
def test_labels_of_another_task(tmp_path, fork, good, bad):
    task = changed_module(tmp_path, fork, "task")
    assert {label: task.read_label(label, 3) for label in good} == good
    for label, words in bad.items():
        with pytest.raises(UserError, match=words):
            task.read_label(label, 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_each_fork_alone(tmp_path, name):
    folder, words = forked(tmp_path, [name]), WORDS.get(name, [])
    train(folder, *words)
    best_by = {METRIC: "f1", LABELS: "f1_macro", REGRESSION: "-mae"}.get(name, "top1")
    check_commands(folder, runs(folder)[0], best_by, export=True)
    check_resume(folder, words)
    launch(folder, *words, "--save_dir", "both")
    (together,) = (folder / "both").iterdir()
    assert [row["scored"] for row in history(together)] == [20 if name in TASKS else 50] * 2
    train(folder, *words, "--UnFreeze_Epoch", 3, "--resume", together)
    assert len(history(together)) == 3


@pytest.mark.slow
def test_sam_without_a_radius_is_no_sam(tmp_path):
    """And with one it is another training."""
    for fork, radius in ((None, None), (SAM, 0), (SAM, 0.1)):
        folder = forked(tmp_path / str(radius), [fork])
        train(folder, *(["--sam_radius", radius] if fork else []))
    plain, none, some = (weights(runs(tmp_path / radius)[0]) for radius in ("None", "0", "0.1"))
    assert same(plain, none) and not same(plain, some)
