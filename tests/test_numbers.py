"""One run whose every number can be computed by hand, and what its steps draw, see and set.

The network is a linear one of a picture's mean colour, and notes what it gets: so each loss, metric
and probability follows from the weights files and the colours that the pictures were made of.
"""

import csv
import json
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tests.helpers import command, history, hooked, launch, make_project, run_of, same, train
from tests.helpers import weights as load
from utils.optimizer import fit_lr, get_lr_scheduler

NETWORK = """
import json, os
import torch
from torch import nn


class Colour(nn.Sequential):
    def forward(self, pictures):
        logits = super().forward(pictures)
        if self.training:
            row = {"inputs": pictures.mean((2, 3)).tolist(), "weights": self[-1].weight.tolist(),
                   "bias": self[-1].bias.tolist(), "drawn": torch.rand(()).item()}
            with open(f"steps{os.environ.get('RANK', 0)}.jsonl", "a") as file:
                file.write(json.dumps(row) + "\\n")
        return logits


def colour(num_classes, input_shape):
    return Colour(NORM, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, num_classes))
"""
NAMES = [f"name{i}" for i in range(7)]
MEAN, STD = [0.1, 0.3, 0.6], [0.2, 0.4, 0.9]
SETTINGS = dict(
    backbone="'colour'",
    mean=MEAN,
    std=STD,
    val_crop=0.5,
    label_smoothing=0.2,
    class_weights="'balanced'",
    Init_lr=0.4,
    Min_lr=0.01,
    momentum=0.5,
    clip_ratio=0.0,
    best_by="'val_loss'",
    save_period=1,
    UnFreeze_Epoch=3,
)


def make_pictures(folder, split, class_ids, broken=()):
    """Pictures of one colour with a wide edge of another, and their list; returns the colours."""
    rng = np.random.default_rng(len(class_ids))
    colours, lines = rng.integers(0, 256, (len(class_ids), 3), dtype=np.uint8), []
    for i, (class_id, colour) in enumerate(zip(class_ids, colours)):
        pixels = np.empty((36, 48, 3), np.uint8)
        pixels[:] = colours[i - 1]
        pixels[8:28, 12:36] = colour
        path = folder / f"model_data/{split}{i}.png"
        Image.fromarray(pixels).save(path)
        if i in broken:
            path.write_bytes(b"")
        lines.append(f"{class_id};model_data/{path.name}\n")
    (folder / f"model_data/cls_{split}.txt").write_text("".join(lines))
    return colours


def make(folder, norm="nn.Identity()", broken=(), **settings):
    """A project with the network and its pictures; returns (train's colours, test's, class ids)."""
    make_project(folder, **{**SETTINGS, **settings})
    (folder / "nets/colour.py").write_text(NETWORK.replace("NORM", norm))
    (folder / "model_data").mkdir()
    (folder / "model_data/cls_classes.txt").write_text("\n".join(NAMES) + "\n")
    train_ids = [i % 7 for i in range(28)] + [0] * 12
    test_ids = [i * 3 % 7 for i in range(21)]
    colours = make_pictures(folder, "train", train_ids)
    return colours, make_pictures(folder, "test", test_ids, broken), np.array(test_ids)


def normalised(colours):
    return (torch.tensor(np.array(colours)) / 255 - torch.tensor(MEAN)) / torch.tensor(STD)


def logits_of(state, colours):
    return F.linear(normalised(colours), state["3.weight"], state["3.bias"])


def steps_of(folder, rank=0):
    return [json.loads(line) for line in open(folder / f"steps{rank}.jsonl")]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder, colours of training, colours and class ids of the readable test pictures)."""
    folder = tmp_path_factory.mktemp("numbers")
    colours, test_colours, test_ids = make(folder, broken=[4])
    train(folder)
    readable = np.arange(21) != 4
    return folder, colours, test_colours[readable], test_ids[readable]


def test_validation_by_hand(made):
    """Without smoothing and class weights, in the middle of the pictures, over seven classes."""
    folder, _, colours, ids = made
    run = run_of(folder)
    for row in history(run):
        (path,) = run.glob(f"ep{int(row['epoch']):03d}-*.pth")
        logits, targets = logits_of(load(run, path.name), colours), torch.tensor(ids)
        order = logits.argsort(1, descending=True)
        right = order[:, 0] == targets
        top5 = (order[:, :5] == targets[:, None]).any(1).double().mean().item()
        recalls = [right[targets == i].double().mean().item() for i in range(7)]
        assert row["val_loss"] == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-5)
        assert row["top1"] == pytest.approx(right.double().mean().item())
        assert row["top5"] == pytest.approx(top5) and 0.4 < top5 < 1
        assert row["recall"] == pytest.approx(np.mean(recalls))
        assert row["scored"] == 20 and row["unreadable"] == 1


def test_the_first_batch_is_drawn_as_the_first_step_sees_it(made):
    folder = made[0]
    sheet = np.asarray(Image.open(run_of(folder) / "first_batch.png"))
    seen = np.array(steps_of(folder)[0]["inputs"]) * STD + MEAN
    np.testing.assert_allclose(sheet[74, 74::148] / 255, seen, atol=0.02)


def test_training_by_hand(made):
    """Every input is a training picture's middle, once an epoch; the loss has both recipes."""
    folder, colours, _, _ = made
    inputs, rows = normalised(colours), history(run_of(folder))
    ids = torch.tensor([i % 7 for i in range(28)] + [0] * 12)
    counts = torch.bincount(ids)
    class_weights = len(ids) / (7 * counts)
    orders, losses, hits = [], [], []
    steps = steps_of(folder)
    assert len(steps) == 15
    for step in steps:
        seen = torch.tensor(step["inputs"])
        found = torch.cdist(seen, inputs).min(1)
        assert found.values.max() < 0.02
        orders.append(found.indices.tolist())
    for epoch in range(3):
        assert sorted(sum(orders[5 * epoch : 5 * epoch + 5], [])) == list(range(40))
    assert sum(orders[:5], []) != sum(orders[5:10], []) != sum(orders[10:], [])
    for order, step in zip(orders, steps):
        logits = F.linear(inputs[order], torch.tensor(step["weights"]), torch.tensor(step["bias"]))
        each = F.cross_entropy(logits, ids[order], reduction="none", label_smoothing=0.2)
        losses.append((class_weights[ids[order]] * each).mean().item())
        hits.append((logits.argmax(1) == ids[order]).double().mean().item())
    for epoch, row in enumerate(rows):
        mean = np.mean(losses[5 * epoch : 5 * epoch + 5])
        assert row["train_loss"] == pytest.approx(mean, rel=1e-4)
        assert row["train_top1"] == pytest.approx(np.mean(hits[5 * epoch : 5 * epoch + 5]))


def test_randomness_is_of_epoch_and_step(made):
    folder = made[0]
    drawn = [step["drawn"] for step in steps_of(folder)]
    assert len(set(drawn)) == len(drawn) == 15


def test_the_best_epoch_is_kept_as_it_was(made):
    folder = made[0]
    run = run_of(folder)
    best = min(history(run), key=lambda row: row["val_loss"])
    (path,) = run.glob(f"ep{int(best['epoch']):03d}-*.pth")
    state = torch.load(run / "last_checkpoint.pth", weights_only=True)
    assert same(load(run, path.name), load(run, "best_epoch_weights.pth"))
    assert same(state["best"], load(run, path.name))


def test_commands_by_hand(made):
    folder, _, colours, ids = made
    run = run_of(folder)
    logits = logits_of(load(run, "best_epoch_weights.pth"), colours)
    best = logits.softmax(1).argsort(1, descending=True)[:, :5]
    name = f"logs/{run.name}"
    out, _ = command(folder, "utils.evaluate", name)
    loss = F.cross_entropy(logits, torch.tensor(ids)).item()
    assert float(out.split("loss ")[1].split(",")[0]) == pytest.approx(loss, rel=1e-5)
    with open(run / "predictions.csv", encoding="utf-8") as file:
        rows = list(csv.reader(file))[1:]
    readable = [i for i in range(21) if i != 4]
    for row, place, truth, found, values in zip(rows, readable, ids, best, logits.softmax(1)):
        assert row[0] == f"model_data/test{place}.png" and row[1] == NAMES[truth]
        assert row[2::2] == [NAMES[i] for i in found]
        assert [float(p) for p in row[3::2]] == pytest.approx(values[found].tolist(), abs=2e-6)
    with open(run / "confusion_matrix.csv", encoding="utf-8") as file:
        cells = np.array([[int(cell) for cell in row[1:]] for row in list(csv.reader(file))[1:]])
    counts = np.zeros((7, 7), int)
    np.add.at(counts, (ids, best[:, 0].numpy()), 1)
    assert (cells == counts).all() and (counts != counts.T).any()
    out, _ = command(folder, "utils.predict", name, "model_data/test5.png", "--json")
    top = json.loads(out)["top5"]
    assert [item["class"] for item in top] == [NAMES[i] for i in best[4]]
    expected = logits[4].softmax(0)[best[4]].tolist()
    assert [item["probability"] for item in top] == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("kind", ["cos", "step"])
def test_each_step_has_its_rate(tmp_path, kind):
    """The curve's, at epoch + step / epoch_step, scaled by the batches that make a step."""
    make(tmp_path, lr_decay_type=f"'{kind}'")
    code = """
def note(optimizer, *rest):
    with open("rates.txt", "a") as file:
        print(optimizer.param_groups[-1]["lr"], file=file)

before("torch.optim:SGD.step", note)
"""
    script = hooked(tmp_path, code)
    train(tmp_path, "--accumulate", 2, "--Min_lr", 0.2, "--UnFreeze_Epoch", 4, script=script)
    rates = [float(line) for line in open(tmp_path / "rates.txt")]
    settings = dict(Init_lr=0.4, Min_lr=0.2, optimizer_type="sgd", accumulate=2)
    assert fit_lr(settings, 8, False) == (0.1, 1e-3)
    curve = get_lr_scheduler(kind, 0.1, 1e-3, 4)
    expected = [curve(epoch + step / 5) for epoch, step in product(range(4), (0, 2, 4))]
    assert rates == pytest.approx(expected, rel=1e-6)
    assert len(set(rates)) == {"cos": 10, "step": 10}[kind]


def test_each_phase_has_the_rates_of_its_batch_and_of_its_network(tmp_path):
    """Those of a transformer for 256 pictures a step, where a network says that it is one."""
    make(tmp_path, Freeze_Train=True, Freeze_Epoch=1, Freeze_batch_size=4, UnFreeze_Epoch=2)
    network = (tmp_path / "nets/colour.py").read_text()
    says = "class Colour(nn.Sequential):\n    is_transformer = True\n"
    (tmp_path / "nets/colour.py").write_text(
        network.replace("class Colour(nn.Sequential):\n", says)
    )
    train(tmp_path, "--lr_decay_type", "cos")
    for epoch, (row, batch_size) in enumerate(zip(history(run_of(tmp_path)), (4, 8), strict=True)):
        settings = dict(Init_lr=0.4, Min_lr=0.01, optimizer_type="sgd")
        curve = get_lr_scheduler("cos", *fit_lr(settings, batch_size, True), 2)
        assert row["lr"] == pytest.approx(curve(epoch), rel=1e-6)


def test_a_rate_of_the_command_line_is_kept_beside_another(tmp_path):
    make(tmp_path)
    make_project(tmp_path, **{**SETTINGS, "Min_lr": "Init_lr * 0.01"})
    train(tmp_path, "--Init_lr", 0.2, "--Min_lr", 1e-3, "--save_dir", "both")
    (run,) = (tmp_path / "both").iterdir()
    settings = json.loads((run / "config.json").read_text())["settings"]
    assert (settings["Init_lr"], settings["Min_lr"]) == (0.2, 1e-3)


def first_step(folder, *words):
    """What the network gets in a training's first step, and its weights then."""
    (folder / "steps0.jsonl").unlink(missing_ok=True)
    train(folder, "--UnFreeze_Epoch", 1, *words)
    return steps_of(folder)[0]


def test_the_seed_decides_the_first_weights_and_the_order(tmp_path):
    make(tmp_path)
    one, again, other = (first_step(tmp_path, "--seed", seed) for seed in (1, 1, 2))
    assert one == again
    assert all(one[name] != other[name] for name in ("inputs", "weights", "drawn"))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_make_the_steps_of_one(tmp_path, accumulate):
    make(tmp_path, accumulate=accumulate)
    code = """
import types, utils.fit
ticks = itertools.count()
utils.fit.time = types.SimpleNamespace(
    monotonic=lambda: float(next(ticks)), perf_counter=lambda: float(next(ticks)))
"""
    script = hooked(tmp_path, code)
    train(tmp_path, "--save_dir", "one", script=script)
    launch(tmp_path, "--save_dir", "two", script=script)
    one, two = (next((tmp_path / name).iterdir()) for name in ("one", "two"))
    for name, value in load(one).items():
        torch.testing.assert_close(load(two)[name], value, rtol=1e-4, atol=1e-6)
    for ours, theirs in zip(history(two), history(one), strict=True):
        for name in ("train_loss", "val_loss", "top1", "scored"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4)
        assert ours["images_per_second"] == theirs["images_per_second"]  # by the clock above
    ranks = steps_of(tmp_path)[-15:], steps_of(tmp_path, 1)
    drawn = [step["drawn"] for steps in ranks for step in steps]
    assert len(drawn) == len(set(drawn)) == 30  # each process draws its own


def test_an_epoch_of_two_processes_goes_on(tmp_path):
    make(tmp_path, UnFreeze_Epoch=1)
    train(tmp_path, "--save_dir", "one")
    stops = hooked(tmp_path, "before('torch.optim:SGD.step', send_sigterm, 3)")
    launch(tmp_path, script=stops, code=143)
    launch(tmp_path, "--resume", True)
    [expected], [row] = history(next((tmp_path / "one").iterdir())), history(run_of(tmp_path))
    for name in ("train_loss", "train_top1", "val_loss", "scored"):
        assert row[name] == pytest.approx(expected[name], rel=1e-4)


@pytest.mark.parametrize("ema_decay", [0.0, 0.5])
def test_validation_has_one_batch_norm(tmp_path, ema_decay):
    """Each process trains on other pictures; the score is the saved weights', whoever scores."""
    make(tmp_path, norm="nn.BatchNorm2d(3)", UnFreeze_Epoch=2, ema_decay=ema_decay)
    launch(tmp_path)
    run = run_of(tmp_path)
    last = f"logs/{run.name}/last_epoch_weights.pth"
    out, _ = command(tmp_path, "utils.evaluate", f"logs/{run.name}", "--weights", last)
    loss = float(out.split("loss ")[1].split(",")[0])
    assert history(run)[-1]["val_loss"] == pytest.approx(loss, rel=1e-6)


def test_the_lists_are_checked_together(tmp_path):
    make(tmp_path)
    lists = tmp_path / "model_data"
    both = (lists / "cls_train.txt").read_text() + (lists / "cls_test.txt").read_text()
    (lists / "both.txt").write_text(both)
    out, _ = train(tmp_path, "--train_annotation_path", "model_data/both.txt")
    assert "WARNING: 21 pictures are in both the training and the test list" in out


@pytest.mark.parametrize("split", ["train", "test"])
def test_processes_must_have_the_same_lists(tmp_path, split):
    make(tmp_path)
    code = f"""
if os.environ["RANK"] == "1":
    lines = open("model_data/cls_{split}.txt").readlines()
    open("model_data/other.txt", "w").writelines(lines[::-1])
    sys.argv += ["--{split}_annotation_path", "model_data/other.txt"]
"""
    _, err = launch(tmp_path, script=hooked(tmp_path, code), code=1)
    assert err.count("error: ") == 1 and f"{split}_annotation_path" in err


@pytest.mark.parametrize("missing", ["3.weight", "3.bias"])
def test_a_state_that_lacks_a_name_is_refused(made, missing):
    """Whatever is not in the file would stay random."""
    folder = made[0]
    run = run_of(folder)
    state = load(run, "best_epoch_weights.pth")
    del state[missing]
    torch.save(state, folder / "lacking.pth")
    words = [f"logs/{run.name}", "--weights", "lacking.pth"]
    _, err = command(folder, "utils.evaluate", *words, code=1)
    assert "lacking.pth" in err and "Traceback" not in err
    checkpoint = (run / "last_checkpoint.pth").read_bytes()
    whole = torch.load(run / "last_checkpoint.pth", weights_only=True)
    del whole["model"][missing]
    torch.save(whole, run / "last_checkpoint.pth")
    try:
        _, err = train(folder, "--resume", run.name, "--UnFreeze_Epoch", 4, code=1)
    finally:
        (run / "last_checkpoint.pth").write_bytes(checkpoint)
    assert "cannot be continued" in err and "Traceback" not in err
