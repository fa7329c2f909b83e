"""From folders of pictures to predictions, each command as a user runs it."""

import csv
import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn import metrics

from tests.helpers import (
    begin,
    command,
    ended,
    environment,
    history,
    make_project,
    picture,
    run_of,
    train,
)
from utils.annotation import main as annotate
from utils.plumbing import charts
from utils.plumbing.charts import draw_line_chart, draw_matrix, drawable_names
from utils.task import per_class


def picture_folders(root, counts, splits=("train", "test")):
    rng = np.random.default_rng(0)
    for split in splits:
        for label, (name, count) in enumerate(counts.items()):
            for i in range(count if split in ("train", "") else max(1, count // 2)):
                path = Path(
                    root,
                    split,
                    name,
                    "nested é" if i % 2 else "",
                    f"picture {i}{split}.{'JPG' if i % 3 else 'png'}",
                )
                path.parent.mkdir(parents=True, exist_ok=True)
                picture(label, rng, (48, 40)).save(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on folders of one's own: (project folder, run folder, what annotation printed)."""
    folder = make_project(
        tmp_path_factory.mktemp("own"),
        backbone="'resnet18'",
        UnFreeze_Epoch=3,
        Init_lr=0.02,
        num_workers=2,
    )
    picture_folders(folder / "photos", {"blåbär": 24, "apple tree": 24, "Zebra": 24, "a": 4})
    out, _ = command(folder, "utils.annotation", "photos")
    train(folder)
    return folder, run_of(folder).relative_to(folder), out


def test_annotation(trained):
    folder, _, out = trained
    assert (folder / "model_data/cls_classes.txt").read_text(encoding="utf-8").split("\n") == [
        "Zebra",
        "a",
        "apple tree",
        "blåbär",
        "",
    ]
    lines = (folder / "model_data/cls_train.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 76 and sum(line.startswith("1;photos/train/a/") for line in lines) == 4
    assert (
        "few training pictures" in out
        and "76 training" in out
        and out.splitlines()[-1].startswith(
            "python train.py --pretrained True --backbone resnet18 "
        )
    )


def test_annotation_rules(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    picture_folders("data", {"b": 4, "c": 4}, splits=("train",))
    picture_folders("data", {"c": 4}, splits=("valid",))
    annotate(["data"])
    assert Path("model_data/cls_test.txt").read_text().count("1;data/valid/c/") == 2
    picture_folders("data", {"a": 2}, splits=("valid",))
    with pytest.raises(Exception, match="classes that training does not have: 'a'"):
        annotate(["data"])
    picture_folders("data", {"a": 2}, splits=("train",))
    with pytest.raises(Exception, match="--force"):
        annotate(["data"])
    annotate(["data", "--force"])
    assert Path("model_data/cls_classes.txt").read_text() == "a\nb\nc\n"
    for wrong in ("nowhere", "data/train/b/nested é"):
        with pytest.raises(Exception, match="not a folder|make a folder of pictures"):
            annotate([wrong, "--force"])


def test_annotation_split_and_check(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    picture_folders("data", {"x": 20, "y": 10}, splits=("",))
    Path("data/x/broken.png").write_bytes(b"")
    Path("data/y/notes.txt").write_text("no picture")
    annotate(["data", "--test-share", "0.3", "--check"])
    first = Path("model_data/cls_test.txt").read_text()
    out = capsys.readouterr().out
    assert "broken.png" in out and ".txt" in out
    assert 2 <= first.count("0;") <= 11 and 1 <= first.count("1;") <= 7  # about 30 %
    assert "broken" not in first + Path("model_data/cls_train.txt").read_text()
    annotate(["data", "--test-share", "0.3", "--check"])
    assert Path("model_data/cls_test.txt").read_text() == first


def read(path):
    with open(path, newline="", encoding="utf-8-sig") as file:
        return list(csv.reader(file))


def test_evaluate(trained):
    folder, run, _ = trained
    out, _ = command(folder, "utils.evaluate", run)
    best = max(history(folder / run), key=lambda row: (row["top1"], -row["val_loss"]))
    rows = read(folder / run / "predictions.csv")[1:]
    names = (folder / "model_data/cls_classes.txt").read_text(encoding="utf-8").split("\n")[:-1]
    truth, called = [row[1] for row in rows], [row[2] for row in rows]
    assert len(rows) == best["scored"] == 38
    assert metrics.accuracy_score(truth, called) == pytest.approx(best["top1"], abs=1e-6)
    assert f"top-1 {best['top1']:.4%}" in out
    loss = float(out.split("loss ")[1].split(",")[0])
    assert loss == pytest.approx(best["val_loss"], rel=1e-7)
    counts = np.array(
        [[int(cell) for cell in row[1:]] for row in read(folder / run / "confusion_matrix.csv")[1:]]
    )
    assert (counts == metrics.confusion_matrix(truth, called, labels=names)).all()
    expected = metrics.precision_recall_fscore_support(truth, called, labels=names, zero_division=0)
    ids = [np.array([names.index(name) for name in column]) for column in (truth, called)]
    for ours, theirs in zip(per_class(*ids, len(names)), expected):
        np.testing.assert_allclose(ours, theirs)
    for row, *figures in zip(read(folder / run / "per_class.csv")[1:], names, *expected):
        assert row[0] == figures[0] and [float(figure) for figure in row[1:]] == pytest.approx(
            figures[1:], abs=1e-6
        )
    Image.open(folder / run / "confusion_matrix.png").verify()
    assert (folder / run / "mistakes.png").exists() == (counts.trace() < counts.sum())
    out, _ = command(
        folder,
        "utils.evaluate",
        run,
        "--weights",
        folder / run / "last_epoch_weights.pth",
        "--annotation",
        "model_data/cls_train.txt",
        "--out",
        "elsewhere",
    )
    assert "76 pictures scored" in out and (folder / "elsewhere/predictions.csv").exists()
    assert "WARNING" not in out
    tests = folder / "model_data/cls_test.txt"
    before = tests.read_bytes()
    tests.write_bytes((folder / "model_data/cls_train.txt").read_bytes())
    out, _ = command(folder, "utils.evaluate", run, "--out", "elsewhere")
    tests.write_bytes(before)
    assert "WARNING: the test list has changed since the training" in out
    _, err = command(folder, "utils.evaluate", "logs/none", code=1)
    assert "not a run's folder" in err and "Traceback" not in err


def test_predict(trained):
    folder, run, _ = trained
    good = sorted((folder / "photos/test/Zebra").rglob("*.*"))[0]
    (folder / "broken.jpg").write_bytes(b"x")
    out, err = command(
        folder, "utils.predict", run, good, "broken.jpg", "photos/test/a", "--json", code=1
    )
    rows = [json.loads(line) for line in out.splitlines()]
    assert not err and "unreadable picture" in rows[1]["error"] and len(rows) == 4
    assert len(rows[0]["top5"]) == 4 and sum(
        item["probability"] for item in rows[0]["top5"]
    ) == pytest.approx(1, abs=1e-4)
    out, _ = command(folder, "utils.predict", run, "-", text=f"{good}\n{good}\n")
    assert out.count(f"{good}: ") == 2
    if not (folder / run / "predictions.csv").exists():  # when this test is run alone
        command(folder, "utils.evaluate", run)
    expected = {
        row[0]: (row[2], float(row[3])) for row in read(folder / run / "predictions.csv")[1:]
    }
    name, probability = expected[good.relative_to(folder).as_posix()]
    assert rows[0]["top5"][0] == {
        "class": name,
        "probability": pytest.approx(probability, abs=1e-4),
    }


def test_classifier_from_python_and_threads(trained, monkeypatch):
    from utils.predict import Classifier

    folder, run, _ = trained
    monkeypatch.chdir(folder)
    classify = Classifier(run)
    paths = sorted(Path("photos/test/Zebra").rglob("*.*"))[:6]
    expected = [classify(path) for path in paths]
    assert (
        classify(Image.open(paths[0]))[0][0] == expected[0][0][0]
        and classify(paths[0].read_bytes()) == expected[0]
    )
    results = [None] * 6

    def work(i):
        results[i] = [classify(paths[i]) for _ in range(5)][-1]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [r[0][0] for r in results] == [e[0][0] for e in expected]
    assert [r[0][1] for r in results] == pytest.approx([e[0][1] for e in expected], abs=1e-6)


def test_predictions_in_batches_are_those_of_one_picture(trained, monkeypatch):
    from utils.predict import Classifier

    folder, run, _ = trained
    monkeypatch.chdir(folder)
    classify, good = (
        Classifier(run),
        [str(path) for path in sorted(Path("photos/test/Zebra").rglob("*.*"))[:5]],
    )
    paths = [good[0], "gone.jpg", *good[1:], good[0], "photos"]
    found = list(classify.predictions(paths, 3))
    assert [path for path, _ in found] == paths
    for path, best in found:
        if path in good:
            assert [p for _, p in best] == pytest.approx([p for _, p in classify(path)], abs=1e-6)
        else:
            assert best.startswith("unreadable picture (")


def test_export(trained, tmp_path):
    folder, run, _ = trained
    out, _ = command(folder, "utils.export", run)
    from utils.fit import score_batch
    from utils.trained import Classifier

    extra = dict.fromkeys(["class_names.json", "pictures.json"], "")
    torch.export.load(folder / run / "model.pt2", extra_files=extra)
    names = (folder / "model_data/cls_classes.txt").read_text(encoding="utf-8").splitlines()
    assert json.loads(extra["class_names.json"]) == names
    assert json.loads(extra["pictures.json"])["input_shape"] == [32, 32]
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    loaded = Classifier(folder / run)
    expected = score_batch(loaded.model, images, torch.zeros(5), False, False, loaded.settings)[
        0
    ].softmax(1)
    np.save(tmp_path / "images.npy", images.numpy())
    np.save(tmp_path / "expected.npy", expected.numpy())
    (tmp_path / "clean.py").write_text(
        "import sys, numpy, torch\nprogram = torch.export.load(sys.argv[1]).module()\n"
        "images, expected = (torch.from_numpy(numpy.load(n)) for n in ('images.npy', "
        "'expected.npy'))\n"
        "for n in (5, 1, 3):\n    torch.testing.assert_close(program(images[:n]), expected[:n], "
        "rtol=1e-4, atol=1e-5)\n"
        "assert 'torchvision' not in sys.modules\n"
    )
    result = subprocess.run(
        [sys.executable, "clean.py", folder / run / "model.pt2"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(folder / run / "model.onnx")
    for n in (5, 1):
        (ours,) = session.run(None, {"images": images[:n].numpy()})
        np.testing.assert_allclose(ours, expected[:n].numpy(), rtol=1e-3, atol=1e-5)


def test_first_batch(trained):
    folder, run, _ = trained
    assert Image.open(folder / run / "first_batch.png").width > 400


@pytest.mark.slow
@pytest.mark.parametrize(
    "module, words",
    [
        ("annotation", ["photos", "--shrink", "16", "--out", "spawned"]),
        ("evaluate", ["RUN", "--batch-size", "4"]),
        ("predict", ["RUN", "photos"]),
    ],
)
def test_commands_whose_processes_are_spawned(trained, module, words):
    """As on macOS and Windows: what they need travels, and none of them runs the command again."""
    folder, run, _ = trained
    code = "import multiprocessing\nmultiprocessing.set_start_method('spawn')\n"
    (folder / "sitecustomize.py").write_text(code)
    env = {**environment(), "PYTHONPATH": str(folder)}
    words = [str(run) if word == "RUN" else word for word in words]
    out, err = ended(begin(folder, "-m", f"utils.{module}", *words, env=env, fresh=True))
    (folder / "sitecustomize.py").unlink()
    assert "Traceback" not in err and out.count("looking for") == (module == "annotation")


@pytest.mark.parametrize("number", [2, 30, 100, 1000])
def test_charts_of_many_sizes(number):
    names = [f"class {i}" for i in range(number)]
    counts = np.eye(number, dtype=int) * 3
    assert min(draw_matrix(counts, names).size) > 150
    curve = [(i + 1, 1 / (i + 1)) for i in range(number)]
    assert draw_line_chart([("loss", {"training": curve, "validation": []})]).size == (640, 420)
    assert draw_line_chart([("loss", {"training": curve[:1]})]).size == (640, 420)
    assert draw_line_chart(
        [("loss", {"training": [(1, -1.0)], "validation": [(1, -2.0)]})]
    ).size == (640, 420)


def test_names_in_any_script(monkeypatch):
    """A name is drawn with a font of the system.

    Where that lacks a letter, or there is none, its number stands, and never a box.
    """
    names = ["cat", "b\u00e4r", "\u732b\u3000\u72d7", "\u0642", "\ud800", "a\tb"]
    for name in ("font", "is_drawable"):  # not what is kept of this machine's
        monkeypatch.setattr(charts, name, getattr(charts, name).__wrapped__)

    class Chinese:
        def getmask(self, letter):
            return letter.encode() if letter.isascii() or letter in "\u00e4\u732b\u72d7" else b"box"

    def truetype(name, size, real=charts.ImageFont.truetype, **options):
        if name in charts.FONTS and name != "msyh.ttc":
            raise OSError
        return Chinese() if name == "msyh.ttc" else real(name, size, **options)

    monkeypatch.setattr(charts.ImageFont, "truetype", truetype)
    assert drawable_names(names) == [*names[:3], "3 (no font)", "4 (no font)", "5 (no font)"]
    monkeypatch.setattr(charts, "FONTS", charts.FONTS[:2])
    assert drawable_names(names) == ["cat", *(f"{i} (no font)" for i in range(1, 6))]


@pytest.mark.parametrize("module", ["annotation", "evaluate", "predict", "explain", "export"])
def test_help(module, capsys, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    main = __import__(f"utils.{module}", fromlist=["main"]).main
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m utils.{module} ")
