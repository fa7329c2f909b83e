"""What is saved is finite, whole and one story; what is read is what was saved."""

import json
import os
import random
import signal

import pytest
import torch
import torchvision
from PIL import Image

from nets import get_model, head_layers
from nets._weights import load_weights
from tests.helpers import (
    edit,
    history,
    hooked,
    make_data,
    make_project,
    run_of,
    same,
    train,
    weights,
    write_network,
)
from utils.checkpoint import Checkpoint, Position
from utils.loss_history import LossHistory
from utils.optimizer import get_optimizer
from utils.plumbing.errors import UserError
from utils.plumbing.files import LAST, content_sum
from utils.recipe import EMA
from utils.resume import load_checkpoint


def checkpoint_in(folder, backbone="squeezenet1_1", ema=None, **options):
    model = get_model(backbone, 3, [32, 32])
    optimizer = get_optimizer(model, head_layers(model), "sgd", 0.9, 5e-4)
    averages = EMA(model, ema) if ema else None
    return Checkpoint(folder, model, optimizer, None, averages, LossHistory(folder), **options)


def save(checkpoint, epoch, step=0, loss=None):
    """Save as if so many steps of an epoch were done."""
    checkpoint.position = Position(epoch, step)
    if loss is not None:
        checkpoint.position.sums["loss"] = torch.tensor(loss)
    checkpoint.save()


def test_a_flipped_bit_is_found(tmp_path):
    save(checkpoint_in(tmp_path), 1)
    good, expected = (tmp_path / LAST).read_bytes(), load_checkpoint(tmp_path)["model"]
    found, rng = 0, random.Random(0)
    for _ in range(40):
        data = bytearray(good)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (tmp_path / LAST).write_bytes(data)
        try:
            assert same(load_checkpoint(tmp_path)["model"], expected)  # where the bit means nothing
        except UserError as error:
            found += "start anew with resume = False" in str(error)
    assert found > 35


@pytest.mark.parametrize("content", ["{}", "bare weights", "wrong types", "list", "folder"])
def test_what_is_no_checkpoint(tmp_path, content):
    checkpoint = checkpoint_in(tmp_path)
    save(checkpoint, 1)
    if content == "folder":
        (tmp_path / LAST).unlink()
        (tmp_path / LAST).mkdir()
    else:
        wrong = {
            "{}": {},
            "bare weights": checkpoint.parts["model"].state_dict(),
            "list": [1],
            "wrong types": {**torch.load(tmp_path / LAST, weights_only=True), "epoch": "2"},
        }[content]
        torch.save(wrong, tmp_path / LAST)
    with pytest.raises(UserError, match="last_checkpoint.pth.*start anew with resume = False"):
        load_checkpoint(tmp_path)


def test_nothing_is_saved_that_is_not_finite(tmp_path):
    checkpoint = checkpoint_in(tmp_path)
    save(checkpoint, 1)
    with torch.no_grad():
        next(checkpoint.parts["model"].parameters())[0] = float("nan")
    with pytest.raises(UserError, match="not finite any more after epoch 2.*lower Init_lr"):
        save(checkpoint, 2)
    assert load_checkpoint(tmp_path)["epoch"] == 1


def test_averages_and_sums_must_be_finite(tmp_path):
    checkpoint = checkpoint_in(tmp_path)
    checkpoint.parts["ema"] = EMA(checkpoint.parts["model"], 0.9)
    save(checkpoint, 1, 3, 1.0)
    with pytest.raises(UserError, match="loss is not finite any more after epoch 1, step 4"):
        save(checkpoint, 1, 4, float("nan"))
    with torch.no_grad():
        next(checkpoint.parts["ema"].parameters())[0] = float("inf")
    with pytest.raises(UserError, match="averaged weights are not finite any more"):
        save(checkpoint, 2)
    assert torch.load(tmp_path / LAST, weights_only=True)["step"] == 3


@pytest.mark.parametrize("number", ["nan", "inf"])
def test_a_validation_loss_that_is_not_finite(tmp_path, number):
    """Nothing of that epoch is kept."""
    make_data(make_project(tmp_path, UnFreeze_Epoch=2), train=24, test=6)
    code = f"""
import utils.task, utils.recipe
criterion = utils.task.get_criterion
def spoilt(settings, weights=None, training=False):
    exact = criterion(settings, weights, training)
    return exact if training else lambda *words: exact(*words) * float("{number}")

utils.task.get_criterion = utils.recipe.get_criterion = spoilt
"""
    _, err = train(tmp_path, script=hooked(tmp_path, code), code=1)
    assert "validation loss of epoch 1 is not finite" in err and "Traceback" not in err
    assert not list(run_of(tmp_path).glob("*.pth"))


def test_a_scaler_comes_back(tmp_path):
    """With its scale and the number of steps without overflow."""

    def scaler():
        return torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=7)

    checkpoint = checkpoint_in(tmp_path)
    checkpoint.parts["scaler"] = scaler()
    checkpoint.parts["scaler"].load_state_dict(
        {**scaler().state_dict(), "scale": 32.0, "_growth_tracker": 5}
    )
    save(checkpoint, 1)
    other = checkpoint_in(tmp_path)
    other.parts["scaler"] = scaler()
    other.load(load_checkpoint(tmp_path), 10, 10)
    assert other.parts["scaler"].state_dict() == checkpoint.parts["scaler"].state_dict()


def test_a_checkpoint_is_due_after_minutes(tmp_path, monkeypatch):
    now = 1000.0
    monkeypatch.setattr("utils.checkpoint.time.monotonic", lambda: now)
    checkpoint = checkpoint_in(tmp_path, save_minutes=2)
    never = checkpoint_in(tmp_path, save_minutes=0)
    for seconds, due in ((0, False), (100, False), (119, False), (121, True)):
        now = 1000.0 + seconds
        assert checkpoint.is_due() == due and not never.is_due()
    save(checkpoint, 1)
    now += 100
    assert not checkpoint.is_due()
    monkeypatch.setenv("RANK", "1")
    now += 100
    assert not checkpoint.is_due()


def test_nohup_stays_in_force(tmp_path):
    """A closed terminal stops a training, unless it was started to live on."""
    make_data(make_project(tmp_path, UnFreeze_Epoch=3), train=24, test=6)
    code = "before('torch.optim:SGD.step', lambda *words: os.kill(os.getpid(), signal.SIGHUP), 1)\n"
    train(tmp_path, script=hooked(tmp_path, code), code=128 + signal.SIGHUP)
    ignored = "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    train(tmp_path, "--resume", True, script=hooked(tmp_path, code + ignored))
    assert len(history(run_of(tmp_path))) == 3


SPAWNED = """
import multiprocessing

if multiprocessing.current_process().name != "MainProcess":  # a worker, while it imports
    os.kill(os.getpid(), signal.SIGINT)
else:
    multiprocessing.set_start_method("spawn")
    before("torch.optim:SGD.step", lambda *words: os.killpg(0, signal.SIGHUP), 2)
"""


def test_signals_to_spawned_workers(tmp_path):
    """The terminal sends them to the whole group; macOS and Windows spawn."""
    make_data(make_project(tmp_path, UnFreeze_Epoch=1, num_workers=1), train=24, test=6)
    script = hooked(tmp_path, SPAWNED)
    out, _ = train(tmp_path, script=script, code=128 + signal.SIGHUP)
    assert "SIGHUP: saved at epoch 1, step 2" in out


def test_resumed_in_validation_by_a_coarse_clock(tmp_path):
    """Windows': no time seems to pass where no step is left, and nothing is divided by it."""
    make_data(make_project(tmp_path, UnFreeze_Epoch=1), train=24, test=6)
    code = "before('utils.fit:validate', lambda *words: os.kill(os.getpid(), signal.SIGTERM), 1)\n"
    train(tmp_path, script=hooked(tmp_path, code), code=128 + signal.SIGTERM)
    still = (
        "import types, utils.fit\nutils.fit.time = types.SimpleNamespace(monotonic=lambda: 0.0)\n"
    )
    train(tmp_path, "--resume", True, script=hooked(tmp_path, still))
    assert history(run_of(tmp_path))[0]["images_per_second"] == 0


def test_a_history_that_is_open_in_another_program(tmp_path, monkeypatch, capsys):
    """Windows refuses to replace it: no reason to end a training."""

    def refuse(fresh, path):
        if str(path).endswith("history.csv"):
            raise PermissionError(13, "Permission denied")
        os.replace(fresh, path)

    monkeypatch.setattr("utils.plumbing.files.move", refuse)
    row = {"epoch": 1, "top1": 0.9, "val_loss": 1.0, "train_loss": 1.0, "train_top1": 0.5}
    assert checkpoint_in(tmp_path).commit(row, 10, 3)
    assert "WARNING: " in capsys.readouterr().out and not (tmp_path / "history.csv").exists()
    assert weights(tmp_path, "best_epoch_weights.pth") and weights(tmp_path)


def test_the_best_weights_are_a_copy(tmp_path):
    checkpoint = checkpoint_in(tmp_path)
    model = checkpoint.parts["model"]
    row = {"epoch": 1, "top1": 0.9, "val_loss": 1.0, "train_loss": 1.0, "train_top1": 0.5}
    assert checkpoint.commit(row, 10, 3)
    first = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    assert not checkpoint.commit({**row, "epoch": 2, "top1": 0.1}, 10, 3)
    assert same(load_checkpoint(tmp_path)["best"], first)
    assert same(weights(tmp_path, "best_epoch_weights.pth"), first)
    assert same(weights(tmp_path), model.state_dict())


def test_the_best_weights_load_into_torchvision(tmp_path):
    """MNASNet is the one that loads nothing without the mark of its version."""
    row = {"epoch": 1, "top1": 0.9, "val_loss": 1.0, "train_loss": 1.0, "train_top1": 0.5}
    checkpoint_in(tmp_path, "mnasnet0_5").commit(row, 10, 3)
    state = torch.load(tmp_path / "best_epoch_weights.pth")
    torchvision.models.mnasnet0_5(num_classes=3).load_state_dict(state)


def test_a_folder_at_the_checkpoints_place(tmp_path):
    checkpoint = checkpoint_in(tmp_path)
    (tmp_path / LAST / "inside").mkdir(parents=True)
    with pytest.raises(UserError, match="last_checkpoint.pth could not be written"):
        save(checkpoint, 1)


def test_weights_that_explode_in_the_last_step(tmp_path):
    """The loss of each step was finite.

    The last update made the weights infinite. The epoch before stays whole.
    """
    folder = make_project(tmp_path, UnFreeze_Epoch=3)
    make_data(folder, train=24, test=6)
    code = """
def explode(optimizer, *rest):
    optimizer.param_groups[-1]["params"][0].grad.fill_(float("inf"))

before("torch.optim:SGD.step", explode, 6)
"""
    _, err = train(folder, script=hooked(folder, code), code=1)
    assert "not finite" in err and "Init_lr" in err and "Traceback" not in err
    run = run_of(folder)
    assert [row["epoch"] for row in history(run)] == [1] and load_checkpoint(run)["epoch"] == 1
    assert all(
        torch.isfinite(t).all()
        for name in ("last", "best")
        for t in weights(run, f"{name}_epoch_weights.pth").values()
    )
    train(folder, "--resume", run.name)
    assert [row["epoch"] for row in history(run)] == [1, 2, 3]


def test_changed_options_of_the_optimizer_train(tmp_path):
    folder = make_project(tmp_path, UnFreeze_Epoch=2)
    make_data(folder, train=24, test=6)
    train(folder)
    run = run_of(folder)
    out, _ = train(
        folder,
        "--resume",
        run.name,
        "--UnFreeze_Epoch",
        3,
        "--momentum",
        0.5,
        "--weight_decay",
        0.1,
        "--backbone_lr_scale",
        0.01,
        "--fp16",
        True,
    )
    for said in (
        "momentum: 0.9 → 0.5",
        "weight_decay: 0.0005 → 0.1",
        "backbone_lr_scale: 1.0 → 0.01",
        "fp16: 'float32' → 'bfloat16'",
        "the best epoch is sought anew, changed: fp16\n",
    ):
        assert said in out
    groups = torch.load(run / LAST, weights_only=True)["optimizer"]["param_groups"]
    assert {group["momentum"] for group in groups} == {0.5} and {
        group["weight_decay"] for group in groups
    } == {0.0, 0.1}
    assert [group["lr_scale"] for group in groups] == [0.01, 0.01, 1.0, 1.0]
    _, err = train(
        folder, "--resume", run.name, "--UnFreeze_Epoch", 4, "--optimizer_type", "adam", code=1
    )
    assert "optimizer_type was 'sgd' and is now 'adam'" in err and "Traceback" not in err


FILES = (LAST, "history.csv", "best_epoch_weights.pth", "last_epoch_weights.pth", "ep00")
MOMENTS = [(file, number) for file in FILES for number in (1, 2, 3)]
QUICK = (LAST, 2), ("history.csv", 2), ("last_epoch_weights.pth", 2)


def slow_unless_quick(moment):
    marks = [] if moment in QUICK else [pytest.mark.slow]
    return pytest.param(moment, marks=marks, id=f"{moment[0]} {moment[1]}")


@pytest.mark.parametrize("moment", list(map(slow_unless_quick, MOMENTS)))
def test_an_epoch_ends_in_one_commit(tmp_path, moment):
    """Whatever instant it dies at, after resuming history, best and last weights tell the
    checkpoint's story.
    """
    folder = make_project(
        tmp_path, UnFreeze_Epoch=3, Init_lr=5e-3, best_by="'val_loss'", save_period=1
    )
    make_data(folder, train=48, test=12)
    file, number = moment
    code = f"""
times = itertools.count(1)
def die_at(draft, path):
    if os.path.basename(path).startswith("{file}") and next(times) == {number}:
        die()

before("os:replace", die_at)
"""
    train(folder, script=hooked(folder, code), code=-signal.SIGKILL)
    run = run_of(folder)
    if not (run / LAST).exists():
        assert moment == (LAST, 1)  # nothing was committed, and so nothing published
        return
    saved = load_checkpoint(run)
    rows = saved["history"]["rows"]
    assert len(rows) == saved["epoch"] == (number - 1 if file == LAST else number)
    stops = hooked(folder, "before('torch.optim:SGD.step', die, 1)")
    all_trained = saved["epoch"] == 3
    # resumed, and nothing trained yet
    train(folder, "--resume", run.name, script=stops, code=0 if all_trained else -signal.SIGKILL)
    assert [row["val_loss"] for row in history(run)] == pytest.approx(
        [row["val_loss"] for row in rows]
    )
    assert same(weights(run), saved["model"]) and same(
        weights(run, "best_epoch_weights.pth"), saved["best"]
    )
    assert len(list(run.glob("ep00?-*.pth"))) == len(rows)
    if not all_trained:
        train(folder, "--resume", run.name)
    assert [row["epoch"] for row in history(run)] == [1, 2, 3]


def stopped_in_an_epoch(folder):
    """Train until SIGTERM comes in the tenth step; returns the checkpoint."""
    stops = hooked(folder, "before('torch.optim:SGD.step', send_sigterm, 10)")
    train(folder, script=stops, code=128 + signal.SIGTERM)
    return load_checkpoint(run_of(folder))


def test_a_long_epoch_is_saved_inside(tmp_path):
    folder = make_project(tmp_path, save_minutes=1e-6)
    make_data(folder, train=48, test=6)
    train(folder, script=hooked(folder, "before('torch.optim:SGD.step', die, 5)"), code=-9)
    state = load_checkpoint(run_of(folder))
    assert state["epoch"] == 0 and 0 < state["step"] < 5


def test_averages_and_the_scaler_go_on(tmp_path):
    """Stopped inside an epoch, a run ends with the bits of one that was not."""
    folder = make_project(tmp_path, ema_decay=0.9, fp16="'float16'", backbone="'colour'")
    make_data(folder, train=48, test=6)
    layers = "nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, num_classes)"
    write_network(folder / "nets", "colour", layers)
    _, err = train(folder, "--save_dir", "whole")
    assert err == ""
    (whole,) = (folder / "whole").iterdir()
    stops = hooked(folder, "before('torch.optim:SGD.step', send_sigterm, 8)")
    train(folder, script=stops, code=128 + signal.SIGTERM)
    train(folder, "--resume", True)
    expected, found = (load_checkpoint(run) for run in (whole, run_of(folder)))
    assert expected["scaler"]["_growth_tracker"] > 0
    assert found["scaler"] == expected["scaler"]
    for name in ("model", "ema", "best"):
        assert same(found[name], expected[name])
    assert same(weights(run_of(folder)), weights(whole))


def test_the_first_of_equal_epochs_is_the_best(tmp_path):
    history, row = LossHistory(tmp_path), {"top1": 0.5, "val_loss": 1.0}
    assert history.append_loss({"epoch": 1, **row}) and not history.append_loss({"epoch": 2, **row})


def test_a_training_that_begins_while_its_lists_are_written(tmp_path):
    make_data(make_project(tmp_path), train=24, test=6)
    place = "utils.plumbing.lists:get_classes"
    code = f"before('{place}', lambda *words: os.utime('model_data/cls_train.txt'), 1)"
    _, err = train(tmp_path, script=hooked(tmp_path, code), code=1)
    assert "are being written" in err and "Traceback" not in err


def test_lists_that_change_under_a_run(tmp_path):
    folder = make_project(tmp_path, UnFreeze_Epoch=2, save_minutes=1 / 6000, num_workers=1)
    make_data(folder, train=160, test=12)
    state = stopped_in_an_epoch(folder)
    assert state["step"]
    path = folder / "model_data/cls_train.txt"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-8]))
    out, _ = train(folder, "--resume", run_of(folder).name, "--UnFreeze_Epoch", state["epoch"] + 1)
    assert f"epoch {state['epoch'] + 1} begins again, as the training pictures" in out
    test = folder / "model_data/cls_test.txt"
    test.write_text("".join(test.read_text().splitlines(keepends=True)[:-6]))
    out, _ = train(folder, "--resume", run_of(folder).name, "--UnFreeze_Epoch", state["epoch"] + 2)
    assert "the best epoch is sought anew" in out and "begins again" not in out
    rows = history(run_of(folder))
    assert rows[-1]["scored"] == 6 and f"(epoch {state['epoch'] + 2}) in" in out.splitlines()[-1]
    # the list of the first start is the one that evaluate compares with
    assert json.loads((run_of(folder) / "config.json").read_text())["test_list"].startswith("12 ")
    assert same(weights(run_of(folder), "best_epoch_weights.pth"), weights(run_of(folder)))


def test_epochs_that_lie_behind(tmp_path):
    folder = make_project(tmp_path, UnFreeze_Epoch=8, Init_Epoch=5, save_minutes=1 / 6000)
    make_data(folder, train=160, test=6)
    stopped_in_an_epoch(folder)
    edit(folder, Init_Epoch=0)
    _, err = train(folder, "--resume", True, "--UnFreeze_Epoch", 3, code=1)
    assert "raise UnFreeze_Epoch" in err and "Traceback" not in err
    assert '"finished": false' in (run_of(folder) / "config.json").read_text()
    (folder / "logs/foreign").mkdir()
    for content in ("{}", "[]", '{"settings": 3}', "\0", "[" * 100000):
        (folder / "logs/foreign/config.json").write_text(content)
        _, err = train(folder, "--resume", "foreign", code=1)
        assert "foreign" in err and "Traceback" not in err and err.count("error: ") == 1
    out, _ = train(folder, "--resume", True, "--UnFreeze_Epoch", 6)
    assert "continuing" in out and "foreign" not in out


def planted(name, change):
    """A checkpoint's change, named for the test's report."""
    return pytest.param(change, id=name)


def set_to(*path):
    """A change that sets what a path of names and indices leads to."""
    *path, name, value = path

    def change(state):
        for key in path:
            state = state[key]
        state[name] = value

    return change


def without(*path):
    """A change that removes what a path of names and indices leads to."""
    *path, name = path

    def change(state):
        for key in path:
            state = state[key]
        del state[name]

    return change


FIRST = "features.0.weight"
PARTS = "epoch step model optimizer history scaler ema best totals order scored_on".split()
NOT_WHOLE = [
    *(planted(f"no {name}", without(name)) for name in PARTS),
    *(
        planted(f"{name} is a text", set_to(name, "x"))
        for name in PARTS
        if name not in ("scaler", "best", "order")  # of no use here, published as it is, compared
    ),
    *(planted(f"{name} is empty", set_to(name, {})) for name in ("model", "optimizer", "history")),
    planted("scored_on is a number", set_to("scored_on", 3)),
    planted("epoch is negative", set_to("epoch", -1)),
    planted("step is negative", set_to("step", -1)),
    planted("epoch is a flag", set_to("epoch", True)),
    planted("a step without sums", set_to("totals", None)),
    planted("sums without unreadable", without("totals", "unreadable")),
    planted("sums of texts", set_to("totals", "loss", "x")),
    planted("a weight is missing", without("model", FIRST)),
    planted("a weight is a text", set_to("model", FIRST, "x")),
    planted("a weight has another shape", set_to("model", FIRST, torch.zeros(2))),
    planted("a weight more", set_to("model", "more", torch.zeros(2))),
    planted("averages without their network", set_to("ema", {"n_averaged": torch.tensor(1)})),
    planted("rows are a text", set_to("history", "rows", "x")),
    planted("a row is a number", set_to("history", "rows", 0, 3)),
    planted("a row without its epoch", without("history", "rows", 0, "epoch")),
    planted("a figure is a text", set_to("history", "rows", 0, "top1", "x")),
    planted("best_since is a text", set_to("history", "best_since", "x")),
    planted("no groups", without("optimizer", "param_groups")),
    planted("fewer groups", without("optimizer", "param_groups", 0)),
    planted("a group of a text", set_to("optimizer", "param_groups", 0, "x")),
    planted("fewer parameters", without("optimizer", "param_groups", 0, "params", 0)),
    planted("no state", without("optimizer", "state")),
    planted("state is a list", set_to("optimizer", "state", [])),
    planted("a state is a text", set_to("optimizer", "state", 0, "x")),
    planted("a momentum is a text", set_to("optimizer", "state", 0, "momentum_buffer", "x")),
    planted(
        "a momentum of another shape",
        set_to("optimizer", "state", 0, "momentum_buffer", torch.zeros(3)),
    ),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint inside an epoch, of a network that is averaged and has been trained."""
    folder = tmp_path_factory.mktemp("saved")
    checkpoint = checkpoint_in(folder, ema=0.9)
    take_step(checkpoint)
    row = {"epoch": 1, "top1": 0.5, "train_loss": 1.0, "val_loss": 1.0, "images_per_second": 1.0}
    checkpoint.commit(row, 10, 10)
    save(checkpoint, 1, 3, 1.0)
    return folder


def take_step(checkpoint):
    parameters = list(checkpoint.parts["model"].parameters())
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    checkpoint.parts["optimizer"].step()


def test_a_whole_checkpoint_is_loaded(tmp_path, saved):
    checkpoint = checkpoint_in(tmp_path, ema=0.9)
    checkpoint.load(load_checkpoint(saved), 10, 10)
    assert checkpoint.begin(1, "").step == 3
    take_step(checkpoint)


@pytest.mark.parametrize("change", NOT_WHOLE)
def test_a_checkpoint_that_is_not_whole(tmp_path, saved, change):
    """Whatever is planted is a sentence, before anything is trained."""
    state = torch.load(saved / LAST, weights_only=True)
    change(state)
    torch.save(state, tmp_path / LAST)
    with pytest.raises(UserError, match="start anew with resume = False") as caught:
        checkpoint_in(tmp_path, ema=0.9).load(load_checkpoint(tmp_path), 10, 10)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_network_that_was_edited_since(tmp_path, saved):
    with pytest.raises(UserError, match="network has changed since .*Missing key.*conv1.0.weight"):
        checkpoint_in(tmp_path, "shufflenet_v2_x0_5", ema=0.9).load(load_checkpoint(saved), 10, 10)
    checkpoint = checkpoint_in(tmp_path, ema=0.9)
    more = torch.nn.Parameter(torch.zeros(3))
    checkpoint.parts["optimizer"].add_param_group({"params": [more], "lr_scale": 1.0})
    with pytest.raises(UserError, match="different number of parameter groups"):
        checkpoint.load(load_checkpoint(saved), 10, 10)


def test_what_changed_in_the_scores_is_named(tmp_path, saved, capsys):
    """Each leg's settings of a score, the old one's first."""
    before = {"list": "6 pictures", "fp16": "float32", "mean": [0.5]}
    checkpoint = checkpoint_in(tmp_path, ema=0.9, scored_on=before)
    checkpoint.load(load_checkpoint(saved), 10, 10)
    kept = weights(tmp_path, "best_until_ep001.pth")  # what was best is not lost
    assert same(kept, load_checkpoint(saved)["best"])
    save(checkpoint, 1)
    for now, named in (
        (before, None),
        ({**before, "fp16": "bfloat16"}, "fp16"),
        ({**before, "list": "7 pictures", "mean": [0.4]}, "list, mean"),
        ({**before, "more": 1}, "more"),
    ):
        capsys.readouterr()
        checkpoint = checkpoint_in(tmp_path, ema=0.9, scored_on=now)
        checkpoint.load(load_checkpoint(tmp_path), 10, 10)
        out = capsys.readouterr().out
        assert (named is None) == (out == "")
        assert named is None or out.endswith(f"the best epoch is sought anew, changed: {named}\n")
        assert ("WARNING: the test data have changed" in out) == ("list" in (named or ""))


def test_test_pictures_replaced_under_their_names(tmp_path):
    folder = make_project(tmp_path, UnFreeze_Epoch=1)
    make_data(folder, train=24, test=6)
    train(folder)
    run = run_of(folder)
    picture = folder / "model_data/test0.png"
    content = picture.read_bytes()
    os.utime(picture, (0, 0))  # a copied data set is the same one
    out, _ = train(folder, "--resume", run, "--UnFreeze_Epoch", 2)
    assert "sought anew" not in out
    picture.write_bytes((folder / "model_data/train1.png").read_bytes())
    out, _ = train(folder, "--resume", run, "--UnFreeze_Epoch", 3)
    assert "sought anew, changed: test pictures" in out and "(epoch 3)" in out.splitlines()[-1]
    assert content != picture.read_bytes() and "changed since: the training" not in out
    lists = folder / "model_data/cls_train.txt"
    lists.write_text("".join(lists.read_text().splitlines(True)[:-1]))
    out, _ = train(folder, "--resume", run, "--UnFreeze_Epoch", 4)
    assert "changed since: the training data\n" in out and "WARNING" not in out


def test_content_sum_sees_pictures_of_one_size(tmp_path):
    """Formats without compression have the same size whatever is in them."""
    path = tmp_path / "a.bmp"
    Image.new("RGB", (64, 64), "red").save(path)
    size, before = path.stat().st_size, content_sum([path])
    assert content_sum([path, path]) != before
    Image.new("RGB", (64, 64), "blue").save(path)
    assert path.stat().st_size == size and content_sum([path]) != before
    os.mkfifo(tmp_path / "pipe")
    assert content_sum([tmp_path / "pipe", tmp_path / "nothing", tmp_path]) == content_sum([])


def test_a_flipped_bit_in_published_weights(tmp_path):
    """Evaluate, predict, export and model_path all read weights by load_weights."""
    path = tmp_path / "weights.pth"
    torch.save(get_model("squeezenet1_1", 3, [32, 32]).state_dict(), path)
    good = path.read_bytes()
    expected = load_weights(path, "model_path")
    found, rng = 0, random.Random(0)
    for _ in range(40):
        data = bytearray(good)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            assert same(load_weights(path, "model_path"), expected)
        except UserError as error:
            found += "damaged" in str(error)
    assert found > 35
