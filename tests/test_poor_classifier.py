"""What evaluate, predict, explain and export tell of a poor classifier, checked by hand.

A nearly perfect one would hide wrong tables. Its network takes the mean colour of a picture alone,
so that logits can be computed here with numpy.
"""

import csv
import itertools
import json
import re
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn import metrics

import nets
from nets import get_model
from tests.helpers import make_run, write_network
from utils import evaluate as module
from utils import explain, export, predict, task
from utils.evaluate import evaluate
from utils.pictures import MEAN, STD
from utils.plumbing import charts, console
from utils.plumbing.charts import draw_line_chart, draw_matrix
from utils.plumbing.errors import UserError
from utils.recipe import Recipe

NAMES = [f"name {letter}" for letter in "abcdefg"]
NUMBER = 60
BROKEN = (3, 4, 31)
WIDTH, HEIGHT = 48, 40  # wider than the network's pictures: the middle 40 columns are seen


def make_pictures(folder):
    """Noisy pictures with a black frame; return (mean colours of the seen part, float (N, 3))."""
    rng = np.random.default_rng(0)
    colours = []
    for index in range(NUMBER):
        pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        noise = rng.integers(-5, 6, (20, 20, 3))
        pixels[10:30, 14:34] = rng.integers(5, 250, 3) + noise
        Image.fromarray(pixels).save(folder / f"{index}.png")
        colours.append(pixels[:, 4:44].mean((0, 1)) / 255)
    for index in BROKEN:
        (folder / f"{index}.png").write_text("no picture")
    return np.array(colours)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder, logits (N, 7) by hand, int (N,) class ids of the list)."""
    folder = tmp_path_factory.mktemp("poor")
    write_network(
        folder, "colour", "nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, num_classes)"
    )
    colours = make_pictures(folder)
    rng = np.random.default_rng(1)
    inputs = (colours - MEAN) / STD
    weight = rng.normal(size=(7, 3)) * 4
    bias = -weight @ inputs.mean(0)
    logits = inputs @ weight.T + bias
    ids = logits.argmax(1)
    ids = np.where(rng.random(NUMBER) < 0.4, rng.integers(0, 6, NUMBER), ids)  # none of the last
    lines = [f"{class_id};{index}.png\n" for index, class_id in enumerate(ids)]
    (folder / "list.txt").write_text("".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nets, "__path__", [*nets.__path__, str(folder)])
        patch.setattr(nets, "OWN", [*nets.OWN, "colour"])
        run = make_run(
            folder / "run",
            NAMES,
            "colour",
            classes_path="none.txt",
            test_annotation_path="list.txt",
            label_smoothing=0.4,
            class_weights="balanced",
        )
        state = {"2.weight": torch.tensor(weight).float(), "2.bias": torch.tensor(bias).float()}
        torch.save(state, run / "best_epoch_weights.pth")
        patch.chdir(folder)
        yield folder, logits, ids


@pytest.fixture(scope="module")
def evaluated(made):
    """evaluate's metrics; logits, class ids and indices of the pictures that can be read."""
    folder, logits, ids = made
    found = evaluate("run", batch_size=8, num_workers=0)
    readable = np.delete(np.arange(NUMBER), BROKEN)
    return found, logits[readable], ids[readable], readable


def rows_of(name):
    with open(Path("run", name), newline="", encoding="utf-8-sig") as file:
        return list(csv.reader(file))


def probabilities(logits):
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def test_a_slow_evaluation_shows_how_far_it_is(made, tmp_path, capsys, monkeypatch):
    clock = SimpleNamespace(monotonic=itertools.count(step=31).__next__)  # a line each half minute
    monkeypatch.setattr(console, "time", clock)
    evaluate("run", out=tmp_path, batch_size=16, num_workers=0)
    lines = [line for line in capsys.readouterr().out.splitlines() if "images/s" in line]
    assert [line.split()[:2] for line in lines] == [["evaluating", f"{i}/4"] for i in range(1, 5)]
    assert all(re.search(r"top-1 \d.* 1 images/s", line) for line in lines)  # 16 in 31 seconds


def test_it_is_poor_indeed(evaluated):
    found, logits, ids, _ = evaluated
    assert 0.4 < found["top1"] < 0.8 and found["top1"] < found["top5"] < 1
    assert len(set(logits.argmax(1))) >= 4
    top3 = (np.argsort(-logits, 1)[:, :3] == ids[:, None]).any(1).mean()
    assert top3 != pytest.approx(found["top5"]) != pytest.approx(found["recall"])


def test_metrics(evaluated):
    """The loss has neither label smoothing nor class weights, which are training's alone."""
    found, logits, ids, _ = evaluated
    truth = probabilities(logits)[np.arange(len(ids)), ids]
    assert found["scored"] == NUMBER - len(BROKEN)
    assert found["loss"] == pytest.approx(-np.log(truth).mean(), rel=1e-4)
    assert found["top1"] == pytest.approx((logits.argmax(1) == ids).mean())
    best = np.argsort(-logits, 1)[:, :5]
    assert found["top5"] == pytest.approx((best == ids[:, None]).any(1).mean())
    recall = metrics.recall_score(ids, logits.argmax(1), labels=sorted(set(ids)), average="macro")
    assert found["recall"] == pytest.approx(recall)


def test_validation_has_neither_smoothing_nor_weights():
    settings = {"label_smoothing": 0.4, "class_weights": "balanced"}
    recipe = Recipe(settings, torch.nn.Linear(1, 3), 3, torch.tensor([0.2, 1.0, 3.0]))
    logits, targets = torch.randn(5, 3), torch.tensor([0, 1, 2, 2, 0])
    plain = torch.nn.functional.cross_entropy(logits, targets)
    torch.testing.assert_close(recipe.val_criterion(logits, targets), plain)
    assert abs(recipe.criterion(logits, targets) - plain) > 0.01


def test_calibration_error(evaluated):
    """Bin by bin, as the paper writes it."""
    found, logits, ids, _ = evaluated
    confidence, correct = probabilities(logits).max(1), logits.argmax(1) == ids
    total = 0.0
    for low in range(15):
        inside = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        if inside.any():
            gap = abs(correct[inside].mean() - confidence[inside].mean())
            total += gap * inside.sum() / len(ids)
    assert total > 0.05 and found["calibration_error"] == pytest.approx(total, abs=2e-3)
    assert task.calibration_error(np.array([1.0, 1.0]), np.array([True, True])) == 0
    neighbours = np.array([0.62, 0.64])  # of one bin of fifteen, of two of a hundred
    assert task.calibration_error(neighbours, np.array([True, False])) == pytest.approx(0.13)
    apart = np.array([0.65, 0.69])  # of two bins of fifteen, of one of ten
    assert task.calibration_error(apart, np.array([True, False])) == pytest.approx(0.52)


def test_predictions_stand_beside_their_pictures(evaluated):
    """Also after unreadable ones, and with the probabilities that predict gives."""
    _, logits, ids, readable = evaluated
    shares = probabilities(logits)
    header, *rows = rows_of("predictions.csv")
    assert header[:4] == ["path", "true", "class1", "probability1"] and len(rows) == len(readable)
    classify = predict.Classifier("run")
    for row, index, class_id, share in zip(rows, readable, ids, shares):
        best = np.argsort(-share)[:5]
        assert row[:2] == [f"{index}.png", NAMES[class_id]]
        assert row[2::2] == [NAMES[number] for number in best]
        assert [float(cell) for cell in row[3::2]] == pytest.approx(share[best], abs=5e-3)
        if index % 9 == 5:
            assert [name for name, _ in classify(f"{index}.png")] == row[2::2]
    paths = [f"{index}.png" for index in range(NUMBER)]
    for index, (path, prediction) in enumerate(classify.predictions(paths, 7)):
        assert path == paths[index] and isinstance(prediction, str) == (index in BROKEN)
        if index not in BROKEN:
            row = rows[readable.tolist().index(index)]
            assert [name for name, _ in prediction] == row[2::2]


def test_tables(evaluated):
    _, logits, ids, _ = evaluated
    named = logits.argmax(1)
    counts = metrics.confusion_matrix(ids, named, labels=range(7))
    assert (counts != counts.T).any()
    header, *rows = rows_of("confusion_matrix.csv")
    assert header[1:] == NAMES and [row[0] for row in rows] == NAMES
    assert [[int(cell) for cell in row[1:]] for row in rows] == counts.tolist()
    expected = metrics.precision_recall_fscore_support(ids, named, labels=range(7), zero_division=0)
    for row, name, *figures in zip(rows_of("per_class.csv")[1:], NAMES, *expected):
        assert row[0] == name
        assert [float(cell) for cell in row[1:]] == pytest.approx(figures, abs=1e-6)


def test_printed_means(evaluated, tmp_path, capsys):
    """Over the classes that have pictures, and weighted by the number of pictures."""
    _, logits, ids, _ = evaluated
    evaluate("run", out=tmp_path, num_workers=0)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    printed = [line for line in lines if "mean" in line[:2]]
    for line, labels, average in zip(
        printed, (sorted(set(ids)), range(7)), ("macro", "weighted"), strict=True
    ):
        *expected, _ = metrics.precision_recall_fscore_support(
            ids, logits.argmax(1), labels=labels, average=average, zero_division=0
        )
        assert [float(word) for word in line[-4:-1]] == pytest.approx(expected, abs=1e-4)
        assert int(line[-1]) == len(ids)


def test_the_worst_mistakes_come_first(made, evaluated, monkeypatch, tmp_path):
    """Each beside its own picture, with what is true, what is predicted, and the file's name."""
    _, logits, ids, readable = evaluated
    drawn = {}

    def draw(pictures, captions):
        drawn.update(pictures=pictures, captions=captions)
        return charts.draw_contact_sheet(pictures, captions)

    monkeypatch.setattr(module, "draw_contact_sheet", draw)
    evaluate("run", out=tmp_path, num_workers=0)
    shares, named = probabilities(logits), logits.argmax(1)
    wrong = np.flatnonzero(named != ids)
    wrong = wrong[np.argsort(-shares[wrong, named[wrong]], kind="stable")][:32]
    assert len(drawn["pictures"]) == len(wrong) > 10
    for place, picture, caption in zip(wrong, drawn["pictures"], drawn["captions"]):
        true, said, share, file = caption.split("\n")
        assert (true, said) == (f"true: {NAMES[ids[place]]}", f"predicted: {NAMES[named[place]]}")
        assert share == f"{shares[place].max():.0%}" and file == f"{readable[place]}.png"
        with Image.open(file) as image:
            middle = np.array(image)[HEIGHT // 2, WIDTH // 2].astype(int)
        assert abs(picture[16, 16].numpy().astype(int) - middle).max() < 30


@pytest.mark.parametrize("change", [{"val_crop": 0.5}, {"resize": "squeeze"}], ids=str)
def test_crops_are_the_runs(made, tmp_path, change):
    """The frame is black, so that another crop has another mean colour."""
    settings = {"classes_path": "none.txt", "test_annotation_path": "list.txt", **change}
    run = make_run(tmp_path / "run", NAMES, "colour", **settings)
    state = torch.load("run/best_epoch_weights.pth")
    torch.save(state, run / "best_epoch_weights.pth")
    evaluate(run, num_workers=0, batch_size=16)
    with open(run / "predictions.csv", newline="") as file:
        rows = list(csv.reader(file))[1:]
    classify = predict.Classifier(run)
    weight, bias = state["2.weight"].double().numpy(), state["2.bias"].double().numpy()
    for row in rows[::7]:
        with Image.open(row[0]) as image:
            box = (14, 10, 34, 30) if "val_crop" in change else None
            seen = np.array(image.resize((32, 32), Image.Resampling.BILINEAR, box=box))
        colour = (seen.mean((0, 1)) / 255 - MEAN) / STD
        share = probabilities((colour @ weight.T + bias)[None])[0]
        best = np.argsort(-share)[:5]
        assert row[2::2] == [NAMES[number] for number in best]
        assert [float(cell) for cell in row[3::2]] == pytest.approx(share[best], abs=2e-3)
        assert [p for _, p in classify(row[0])] == pytest.approx(share[best], abs=2e-3)


@pytest.mark.parametrize("augmentation", ["flip", "flips"])
def test_mirrored(made, tmp_path, augmentation):
    """The mean of the logits for a picture and its mirror images, in each command.

    Pictures that were trained on upside down as well have three.
    """
    pixels = np.random.default_rng(5).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    pixels[:, : WIDTH // 2] //= 4
    pixels[: HEIGHT // 2] //= 2
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    Image.fromarray(pixels[:, ::-1]).save(tmp_path / "mirrored.png")
    (tmp_path / "list.txt").write_text(f"0;{tmp_path}/picture.png\n")
    Image.fromarray(pixels[::-1]).save(tmp_path / "below.png")
    Image.fromarray(pixels[::-1, ::-1]).save(tmp_path / "turned.png")
    views = ["picture", "mirrored"] + ["below", "turned"] * (augmentation == "flips")
    options = dict(classes_path="none.txt", augmentation=augmentation)
    run = make_run(tmp_path / "run", ["x", "y"], "resnet9", **options)
    plain, both = predict.Classifier(run), predict.Classifier(run, mirrored=True)
    images = [plain.read(tmp_path / f"{name}.png")[0] for name in views]
    with torch.no_grad():
        logits = [plain.model(normalised_by_hand(image)) for image in images]
    expected = (sum(logits) / len(views)).softmax(1)[0]
    assert all(abs(logits[0] - other).max() > 1e-3 for other in logits[1:])
    answer = dict(both(tmp_path / "picture.png"))
    assert [answer["x"], answer["y"]] == pytest.approx(expected.tolist(), abs=1e-5)
    for view in views:
        assert dict(both(tmp_path / f"{view}.png"))["x"] == pytest.approx(answer["x"], abs=1e-5)
    evaluate(run, annotation=tmp_path / "list.txt", num_workers=0, mirrored=True)
    with open(run / "predictions.csv", newline="") as file:
        row = list(csv.reader(file))[1]
    assert dict(zip(row[2::2], map(float, row[3::2]))) == pytest.approx(answer, abs=1e-5)
    if augmentation == "flips":
        program = torch.export.load(export.export(run, mirrored=True)[0]).module()
        assert program(images[0])[0].tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    features = predict.Classifier(run).features(tmp_path / "picture.png")
    assert torch.equal(both.features(tmp_path / "picture.png"), features)


def normalised_by_hand(images):
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return (images / 255 - mean) / std


def test_an_exported_program_tells_its_classes_and_its_input(made, tmp_path):
    """It answers as the run does, also one with another crop and normalisation."""
    run = shutil.copytree("run", tmp_path / "run")
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    config["settings"].update(val_crop=0.5, mean=[0.1, 0.3, 0.6], std=[0.5, 0.4, 0.3])
    (run / "config.json").write_text(json.dumps(config), encoding="utf-8")
    files = {"class_names.json": "", "pictures.json": ""}
    path, *others = export.export(run)
    program = torch.export.load(path, extra_files=files).module()
    assert json.loads(files["class_names.json"]) == NAMES
    found = json.loads(files["pictures.json"])
    assert found["input_shape"] == [32, 32] and "upright" in found["input"]
    assert found["resize"] == "crop" and found["val_crop"] == 0.5
    classify = predict.Classifier(run)
    [answer] = program(classify.read("0.png")[0])
    answers = dict(zip(NAMES, answer.tolist(), strict=True))
    for name, probability in classify("0.png"):
        assert answers[name] == pytest.approx(probability, abs=1e-5)
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    found = program(images)
    assert not found.requires_grad  # nothing is kept for a backward pass
    torch.testing.assert_close(found.sum(1), torch.ones(3))
    for other in others:
        onnx = pytest.importorskip("onnx")
        texts = {entry.key: entry.value for entry in onnx.load(other).metadata_props}
        assert texts == files


def test_features_are_what_the_head_sees(made):
    _, logits, _ = made
    classify = predict.Classifier("run")
    vector = classify.features("0.png")
    assert vector.shape == (3,) and vector.dtype == torch.float32
    found = classify.network.get_submodule("2")(vector.to(classify.network[2].weight.device))
    assert found.tolist() == pytest.approx(logits[0], abs=1e-3)
    assert not classify.network[2]._forward_pre_hooks
    with pytest.raises(ValueError, match="unreadable picture"):
        classify.features(f"{BROKEN[0]}.png")
    run = make_run(Path("maps"), ["x", "y"], "squeezenet1_1")  # its head is a convolution
    classify = predict.Classifier(run)
    classify.settings["input_shape"] = [64, 64]  # a map of more than one place
    images = normalised_by_hand(classify.read("0.png")[0])
    with torch.no_grad():
        expected = classify.network.features(images).mean((0, 2, 3))
    torch.testing.assert_close(classify.features("0.png"), expected, rtol=1e-3, atol=1e-4)


# Pictures that are drawn


def blue(image):
    """How strongly a pixel has the matrix's colour: 0 white to 1, as float (H, W)."""
    pixels = np.asarray(image).astype(float)
    return (pixels[..., 2] - pixels[..., 0]).clip(0) / (180 - 31)


def test_rows_and_shades_of_the_matrix():
    """True classes go down, predicted ones across; a cell's shade is its share of its row."""
    counts = np.array([[0, 0, 40], [5, 15, 0], [0, 0, 7]])
    image = draw_matrix(counts, ["x", "y", "z"])
    shade = blue(image)
    rows, columns = np.nonzero(shade > 0.05)
    top, left = rows.min(), columns.max() + 1 - 3 * 56
    cells = shade[top : top + 3 * 56, left : left + 3 * 56].reshape(3, 56, 3, 56)
    corners = cells[:, 2:8, :, 2:8].mean((1, 3))  # beside the numbers
    expected = counts / counts.sum(1, keepdims=True)
    np.testing.assert_allclose(corners, expected, atol=0.02)


def test_curves_go_up_where_numbers_do():
    rising = [(epoch, epoch / 10) for epoch in range(1, 41)]
    image = np.asarray(draw_line_chart([("x", {"a": rising, "b": []})])).astype(int)
    curve = (image == charts.COLOURS[0]).all(2)[:360]
    heights = [np.flatnonzero(curve[:, column]).mean() for column in (150, 300, 450, 600)]
    assert heights == sorted(heights, reverse=True) and heights[0] - heights[-1] > 150
    column = np.flatnonzero(curve.any(0))
    assert column.max() - column.min() > 500


def test_long_captions_keep_both_ends():
    text = "IMG_" + "0123456789" * 9 + ".jpg"
    short = charts.shorten(text, 144, 13)
    assert charts.font(13).getlength(short) <= 144 < charts.font(13).getlength(text)
    assert short[:4] == text[:4] and short[-4:] == text[-4:] and "…" in short
    assert charts.shorten("short", 144, 13) == "short" and charts.shorten("x" * 10**6, 144, 13)


# explain


def test_explain_marks_the_place(tmp_path, monkeypatch):
    """A network that sums white pixels looks at the white corner."""
    monkeypatch.setattr(nets, "__path__", [*nets.__path__, str(tmp_path)])
    monkeypatch.setattr(nets, "OWN", [*nets.OWN, "white"])
    layers = (
        "nn.Conv2d(3, 2, 1), nn.ReLU(inplace=True), nn.AvgPool2d(4), nn.AdaptiveAvgPool2d(1), "
        "nn.Flatten(), nn.Linear(2, num_classes)"
    )
    write_network(tmp_path, "white", layers)
    run = make_run(tmp_path / "run", ["dark", "white"], "white", resize="squeeze")
    state = get_model("white", 2, [32, 32]).state_dict()
    state["0.weight"][:] = torch.tensor([1.0, -1.0]).view(2, 1, 1, 1)
    state["0.bias"][:] = 0
    state["5.weight"][:] = torch.tensor([[-1.0, 1.0], [1.0, -1.0]])
    state["5.bias"][:] = torch.tensor([0.0, 20.0])
    torch.save(state, run / "best_epoch_weights.pth")
    pixels = np.zeros((64, 96, 3), np.uint8)
    pixels[40:, 60:] = 255
    Image.fromarray(pixels).save(tmp_path / "corner.png")
    classify = predict.Classifier(run)
    classify.network.requires_grad_(False)  # as a network may fix what it does not train
    classify.network.table = torch.nn.Parameter(torch.arange(3), requires_grad=False)
    heat = explain.grad_cam(classify, *classify.read(tmp_path / "corner.png"), class_id=1)
    assert heat.shape == (32, 32) and heat.min() >= 0 and heat.max() == 1
    inside = torch.zeros(32, 32, dtype=torch.bool)
    inside[20:, 20:] = True
    assert heat[24:, 24:].min() > 0.9 and heat[:16, :16].max() < 0.1
    assert heat[inside].mean() > 5 * heat[~inside].mean()
    dark = predict.Classifier(run)
    dark.settings.update(mean=[1.0] * 3, std=[0.02] * 3)  # nothing is above the mean
    heat = explain.grad_cam(dark, *dark.read(tmp_path / "corner.png"), class_id=0)
    assert heat[:16, :16].min() > 0.9 and heat[24:, 24:].max() < 0.1
    prediction, image = explain.explain(classify, tmp_path / "corner.png")
    assert prediction[0][0] == "white" and image.size == (1024, 512)
    left, right = np.split(np.asarray(image).astype(int), 2, axis=1)
    assert (left[..., 0] == left[..., 2]).mean() > 0.9  # the picture as it is
    red, blue_ = right[-80:, -80:].mean((0, 1))[::2]
    assert red > blue_ + 40 and right[:80, :80, 2].mean() > right[:80, :80, 0].mean() + 40


@pytest.mark.parametrize(
    "name", ["resnet18", "resnet9", "densenet121", "squeezenet1_1", "mobilenet_v2", "swin_t"]
)
def test_explain_finds_the_last_layer_with_places(name):
    network = get_model(name, 3, [64, 64]).eval()
    logits, features = explain.last_map(network, torch.randn(1, 3, 64, 64), (1, 3, 64, 64))
    assert logits.shape == (1, 3) and 2 <= features.shape[2] == features.shape[3] <= 4
    [gradient] = torch.autograd.grad(logits.max(), features)
    assert gradient.shape == features.shape and gradient.abs().sum() > 0
    assert not any(module._forward_hooks for module in network.modules())


def test_explain_beside_other_threads():
    """What these compute in the same network is none of its maps."""

    class Beside(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution = torch.nn.Conv2d(3, 2, 1)

        def forward(self, pictures):
            features = self.convolution(pictures)
            other = threading.Thread(target=self.convolution, args=(pictures[:, :, :9],))
            other.start()
            other.join()
            return features.mean((2, 3))

    _, features = explain.last_map(Beside(), torch.randn(1, 3, 16, 16), (1, 3, 16, 16))
    assert features.shape[2:] == (16, 16)


@pytest.mark.parametrize(
    "places, is_map",
    [((7, 7), True), ((2, 4), True), ((2, 768), False), ((768, 4), False)],
    ids=["VGG's, for any input", "usual", "channels last", "channels first"],
)
def test_explain_takes_maps_of_long_pictures(places, is_map):
    assert explain.is_map(torch.zeros(1, 2, *places), (1, 3, 64, 128)) == is_map


@pytest.mark.parametrize("name, size", [("vit_b_32", 64), ("resnet18", 8), ("swin_t", 32)])
def test_explain_says_where_there_is_none(name, size, monkeypatch):
    network = get_model(name, 3, [size, size]).eval()
    if name == "resnet18":  # nothing has places from the first layer on
        network.conv1.stride = (8, 8)
    with pytest.raises(UserError, match="has no feature map before its logits"):
        explain.last_map(network, torch.randn(1, 3, size, size), (1, 3, size, size))


def test_explain_as_a_command(made, tmp_path, monkeypatch, capsys):
    run = make_run(tmp_path / "run", ["x\x1b[2J", "y"], "resnet9", classes_path="none.txt")
    before = (run / "best_epoch_weights.pth").read_bytes()
    with pytest.raises(SystemExit) as ended:
        explain.main([str(run), "0.png", f"{BROKEN[0]}.png", "gone.png", "1.png"])
    out, err = capsys.readouterr()
    assert ended.value.code == 1 and out.count("explained_") == 2 and "\x1b" not in out
    assert f"{BROKEN[0]}.png: unreadable picture" in err and "gone.png: unreadable" in err
    drawn = sorted(path.name for path in run.glob("*.png"))
    assert drawn == ["explained_1.png", "explained_4.png"]
    assert Image.open(run / "explained_1.png").size == (1024, 512)
    assert (run / "best_epoch_weights.pth").read_bytes() == before
    with pytest.raises(SystemExit) as ended:
        explain.main([str(run), "0.png", "--out", str(tmp_path / "out")])
    assert ended.value.code == 0 and (tmp_path / "out/explained_1.png").exists()


# Runs and folders


def test_a_run_is_found_from_any_folder(made, tmp_path, monkeypatch):
    """In the project's logs/ by its name, when the program runs elsewhere."""
    from utils import trained

    make_run(tmp_path / "project/logs/2026_01_01", NAMES, "colour")
    picture = Path("0.png").resolve()
    monkeypatch.setattr(trained, "PROJECT", tmp_path / "project")
    monkeypatch.chdir(tmp_path)
    for name in ("2026_01_01", "logs/2026_01_01", Path("project/logs/2026_01_01")):
        assert len(predict.Classifier(name)(picture)) == 5
    with pytest.raises(UserError, match="'2027' is not a run's folder"):
        predict.Classifier("2027")


@pytest.mark.parametrize("name", module.OUTPUTS)
def test_a_folder_in_the_place_of_an_output(made, tmp_path, monkeypatch, name):
    (tmp_path / name).mkdir()
    monkeypatch.setattr(module, "score", None)
    with pytest.raises(UserError, match=f"{name} is a folder where a file is to be written"):
        evaluate("run", out=tmp_path, num_workers=0)


def test_a_folder_in_the_place_of_a_program(made, tmp_path):
    run = make_run(tmp_path / "run", NAMES, "colour")
    (run / "model.pt2").mkdir()
    with pytest.raises(UserError, match="model.pt2 could not be written .Is a directory"):
        export.export(run)


SECRET = "root:hidden word:0\nroot:hidden word:0\n"


@pytest.mark.parametrize("setting", ["classes_path", "test_annotation_path"])
def test_words_of_a_file_that_only_the_run_names_are_not_shown(made, tmp_path, capsys, setting):
    """A run of somebody else may name any file of this machine."""
    (tmp_path / "secret").write_text(SECRET)
    paths = {"classes_path": "none.txt", "test_annotation_path": "list.txt"}
    for text in (SECRET, "\x00\xff hidden", "hidden word\n", "", "0;hidden word\n"):
        (tmp_path / "secret").write_bytes(text.encode("latin-1"))
        run = make_run(
            tmp_path / "run", NAMES, "colour", **{**paths, setting: str(tmp_path / "secret")}
        )
        with pytest.raises(UserError) as caught:
            evaluate(run, num_workers=0)
        out, err = capsys.readouterr()
        assert "hidden" not in str(caught.value) + out + err
        assert "--annotation" in str(caught.value) and "secret" in str(caught.value)


def test_lists_with_other_line_ends(made, tmp_path):
    """Train reads them, so evaluate does."""
    text = Path("list.txt").read_text()
    for number, end in enumerate(("\r", "\r\n")):
        path = tmp_path / f"{number}.txt"
        path.write_bytes(text.replace("\n", end).encode())
        found = evaluate("run", annotation=path, out=tmp_path, num_workers=0)
        assert found["scored"] == NUMBER - len(BROKEN)


def test_a_class_name_that_no_file_can_hold(made, tmp_path, capsys):
    """A lone surrogate ends nothing after all pictures are scored."""
    names = ["a\ud800", *NAMES[1:]]
    run = make_run(tmp_path / "run", NAMES, "colour", test_annotation_path="list.txt")
    config = json.loads((run / "config.json").read_text())
    config["class_names"] = names
    (run / "config.json").write_text(json.dumps(config))
    try:
        evaluate(run, annotation="list.txt", num_workers=0)
    except UserError as error:  # before the work
        assert "class" in str(error) and "scored" not in capsys.readouterr().out
    else:
        assert (run / "predictions.csv").exists() and (run / "mistakes.png").exists()


def test_top5_of_few_classes_is_not_shown(tmp_path, made, capsys):
    (tmp_path / "list.txt").write_text("0;0.png\n1;1.png\n")
    for number in (3, 5, 6):
        run = make_run(tmp_path / f"run{number}", NAMES[:number], "colour")
        evaluate(run, annotation=tmp_path / "list.txt", num_workers=0)
        assert ("top-5" in capsys.readouterr().out) == (number > 5)


def test_a_folder_s_files_that_are_not_read_are_told(made, tmp_path, capsys):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "one.jpg")
    (tmp_path / "two.heic").write_text("of a phone")
    with pytest.raises(SystemExit) as ended:
        predict.main(["run", str(tmp_path)])
    out, err = capsys.readouterr()
    assert ended.value.code == 0 and out.count("\n") == 1 and "one.jpg: name " in out
    assert "left out (1): files (.heic) that are not read" in err


def test_a_picture_for_which_no_class_is_named(made, tmp_path, capsys, monkeypatch):
    """As another task may answer, with several labels a picture."""
    Image.new("RGB", (40, 40), "red").save(tmp_path / "one.jpg")
    monkeypatch.setattr(task, "top_predictions", lambda logits, names: [[] for _ in logits])
    with pytest.raises(SystemExit) as ended:
        explain.main(["run", str(tmp_path / "one.jpg"), "--out", str(tmp_path)])
    assert ended.value.code == 1 and "one.jpg: no class is named" in capsys.readouterr().err


def test_explain_takes_maxvit():
    network = get_model("maxvit_t", 3, [224, 224]).eval()
    _, features = explain.last_map(network, torch.randn(1, 3, 224, 224), (1, 3, 224, 224))
    assert features.shape[2:] == (7, 7)
