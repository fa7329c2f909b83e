"""utils.evaluate and utils.export on runs whose weights are as they begin, and what every command
says of a damaged run.
"""

import codecs
import csv
import json
import multiprocessing
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn import metrics

import nets
from tests.helpers import ROOT, begin, environment, make_data, make_run, picture, weights
from utils import evaluate as module
from utils import export, predict, trained
from utils.evaluate import evaluate
from utils.fit import score_batch
from utils.pictures import centre_box, read_crop
from utils.plumbing.errors import UserError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a run of three classes and its lists."""
    folder = tmp_path_factory.mktemp("evaluate")
    make_data(folder, train=6, test=18)
    make_run(folder / "run", ["class0", "class1", "class2"])
    return folder


@pytest.fixture
def folder(made, monkeypatch):
    monkeypatch.chdir(made)
    return made


def write_list(path, ids):
    """A list of the test pictures, with other class ids."""
    Path(path).write_text(
        "".join(f"{class_id};model_data/test{i % 18}.png\n" for i, class_id in enumerate(ids))
    )


def scores_of(run, images):
    return score_batch(
        run.model, images, torch.zeros(len(images)), run.Cuda, run.fp16, run.settings
    )[0]


def predicted(out):
    with open(Path(out, "predictions.csv"), newline="", encoding="utf-8-sig") as file:
        return list(csv.reader(file))


def test_a_full_output_is_one_sentence(folder):
    for command in (["utils.evaluate", "run"], ["utils.predict", "run", "model_data/test0.png"]):
        with open("/dev/full", "w") as full:
            env = {**environment(), "PYTHONPATH": str(ROOT)}
            process = begin(folder, "-m", *command, stdout=full, env=env, fresh=True)
            _, err = process.communicate(timeout=300)
        assert process.returncode == 1 and "Traceback" not in err
        assert err.splitlines()[-1].startswith("error: the output cannot be written")


def test_the_mean_leaves_out_classes_without_pictures(folder, tmp_path, capsys):
    names = [f"class{i}" for i in range(10)]
    make_run(tmp_path / "run", names, classes_path="none.txt")
    ids = [0] * 3 + [4] * 10 + [7] * 5
    write_list(tmp_path / "list.txt", ids)
    evaluate(tmp_path / "run", annotation=tmp_path / "list.txt", num_workers=0)
    out = capsys.readouterr().out
    rows = predicted(tmp_path / "run")[1:]
    truth, called = [row[1] for row in rows], [row[2] for row in rows]
    present = sorted(set(truth))
    assert len(present) == 3
    for label, average in (("mean of 3 classes", "macro"), ("weighted mean", "weighted")):
        expected = metrics.precision_recall_fscore_support(
            truth, called, labels=present, average=average, zero_division=0
        )[:3]
        shown = re.search(rf"^{label} +([\d.]+) +([\d.]+) +([\d.]+) +18$", out, re.M).groups()
        assert [float(figure) for figure in shown] == pytest.approx(expected, abs=6e-5)


@pytest.mark.parametrize(
    "options, sentence",
    [
        (dict(out="train.txt/x"), "train.txt/x cannot be written.*--out"),
        (dict(out="train.txt"), "train.txt cannot be written"),
        (dict(weights="gone.pth"), "^weights: .*gone.pth"),
        (dict(annotation="gone.txt"), "annotation.*gone.txt"),
        (
            dict(weights="other.pth"),
            "weights: other.pth holds the weights of another network than squeezenet1_1 with "
            "3 classes",
        ),
        (dict(weights="keys.pth"), "weights: .*keys.pth"),
        (dict(weights="nan.pth"), "weights: nan.pth holds weights that are not finite"),
    ],
)
def test_what_is_wrong_is_said_before_any_work(folder, monkeypatch, options, sentence):
    Path("train.txt").write_text("a file")
    state = weights("run", "best_epoch_weights.pth")
    torch.save({**state, "classifier.1.bias": torch.zeros(5)}, "other.pth")
    torch.save({1: torch.zeros(5)}, "keys.pth")
    torch.save({**state, "classifier.1.bias": torch.tensor([0, float("inf"), 0])}, "nan.pth")
    monkeypatch.setattr(module, "score", None)
    with pytest.raises(UserError, match=sentence) as caught:
        evaluate("run", **options)
    assert "\n" not in str(caught.value) and "model_path" not in str(caught.value)


def test_pictures_that_another_program_holds_open_on_windows(folder, tmp_path, monkeypatch):
    def refuse(self, missing_ok=False):
        raise PermissionError(13, "The process cannot access the file")

    write_list(tmp_path / "list.txt", [0, 1, 2] * 6)  # not all of them right
    monkeypatch.setattr(Path, "unlink", refuse)
    evaluate("run", annotation=tmp_path / "list.txt", out=tmp_path, num_workers=0)
    assert (tmp_path / "mistakes.png").exists() and predicted(tmp_path)


def test_weights_in_another_trainers_checkpoint(folder, tmp_path):
    state = {name: value + 1 for name, value in weights("run", "best_epoch_weights.pth").items()}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "theirs.pth")
    loaded = predict.Classifier("run", tmp_path / "theirs.pth").network.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.items())


def test_weights_of_a_run_with_other_classes(folder, tmp_path):
    """As many classes, so that all tensors fit: each name would stand for another class."""
    make_run(tmp_path / "other", ["class1", "class0", "class2"])
    with pytest.raises(UserError, match="other classes.*'class1', 'class0'"):
        predict.Classifier("run", tmp_path / "other/best_epoch_weights.pth")
    make_run(tmp_path / "same", ["class0", "class1", "class2"])
    predict.Classifier("run", tmp_path / "same/best_epoch_weights.pth")


def test_in_a_process_that_may_have_no_children(folder, monkeypatch):
    """As a worker of Celery or of multiprocessing's Pool."""
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)
    pictures = ["model_data/test0.png"] * 70
    assert len(list(predict.Classifier("run").predictions(pictures))) == 70


def test_a_spreadsheet_reads_the_names(folder, tmp_path):
    """Excel takes a file without the mark for one in the system's own encoding."""
    make_run(tmp_path / "run", ["Nävus", "黑色素瘤", "c"])
    write_list(tmp_path / "list.txt", [0, 1, 2])
    evaluate(tmp_path / "run", annotation=tmp_path / "list.txt", num_workers=0)
    for name in ("predictions", "per_class", "confusion_matrix"):
        content = (tmp_path / f"run/{name}.csv").read_bytes()
        assert content.startswith(codecs.BOM_UTF8) and "黑色素瘤" in content.decode()


def test_no_mistakes(folder, tmp_path):
    """leave no picture of them, nor an older one."""
    run = make_run(tmp_path / "run", ["a"], classes_path="none.txt")
    Path(run, "mistakes.png").write_text("of other weights")
    write_list("list.txt", [0] * 5)
    assert (
        evaluate(run, annotation="list.txt", num_workers=0)["top1"] == 1
        and not Path(run, "mistakes.png").exists()
    )


def test_scores_that_are_not_finite(folder, tmp_path):
    torch.save(
        {
            name: torch.full_like(tensor, 1e30)
            for name, tensor in weights("run", "best_epoch_weights.pth").items()
        },
        tmp_path / "huge.pth",
    )
    with pytest.raises(UserError, match="scores for it are not finite: 0;model_data/test0.png"):
        evaluate("run", tmp_path / "huge.pth", out=tmp_path, num_workers=0)


def test_ids_that_mean_other_classes(folder, tmp_path, capsys):
    for now in (["class0", "class2", "class1"], ["x"]):
        Path("classes.txt").write_text("\n".join(now) + "\n")
        make_run(tmp_path / "run", ["class0", "class1", "class2"], classes_path="classes.txt")
        with pytest.raises(
            UserError,
            match="the classes of .*run are not those of classes.txt, so class ids mean others: "
            "--annotation",
        ):
            evaluate(tmp_path / "run", num_workers=0)
    write_list("older.txt", [0, 1, 2])
    evaluate(tmp_path / "run", annotation="older.txt", num_workers=0)
    assert "WARNING: the classes of " in capsys.readouterr().out
    # beside this one lies the class file that it was written with
    evaluate(tmp_path / "run", annotation="model_data/cls_test.txt", num_workers=0)
    assert "WARNING" not in capsys.readouterr().out
    Path("new_classes.txt").write_text("class1\nclass2\n")
    write_list("new_test.txt", [0, 1])
    evaluate(tmp_path / "run", annotation="new_test.txt", num_workers=0)
    assert re.search("WARNING: .* not those of new_classes.txt", capsys.readouterr().out)
    Path("classes.txt").write_text("class0\nclass1\nclass2\na later one\n")
    write_list("longer.txt", [0, 1, 2, 3])
    with pytest.raises(
        UserError, match="longer.txt:4: class id 3 is outside 0 … 2 .*run has 3 classes"
    ):
        evaluate(tmp_path / "run", annotation="longer.txt", num_workers=0)


@pytest.mark.parametrize("number", [1, 3, 100])
def test_few_and_many_classes(folder, tmp_path, capsys, number):
    names = [f"name{i}" for i in range(number)]
    run = make_run(tmp_path / "run", names, classes_path="none.txt")
    write_list("list.txt", [i % number for i in range(max(number, 18))])
    figures = evaluate(run, annotation="list.txt", batch_size=64, num_workers=0)
    rows = predicted(run)
    assert (
        figures["scored"] == max(number, 18)
        and len((run / "confusion_matrix.csv").read_text().splitlines()) == number + 1
    )
    assert len(rows[0]) == 2 + 2 * min(number, 5) and ("top5" in figures) == (number > 5)
    best = predict.Classifier(run)("model_data/test0.png")
    assert [name for name, _ in best] == rows[1][2::2] and [p for _, p in best] == pytest.approx(
        [float(p) for p in rows[1][3::2]], abs=1e-5
    )
    assert "inf" not in capsys.readouterr().out


def test_what_is_printed_comes_after_what_is_saved(folder, tmp_path, monkeypatch):
    """As '| head' ends the program while it prints."""

    def gone(rows):
        raise BrokenPipeError

    monkeypatch.setattr(module, "print_table", gone)
    with pytest.raises(BrokenPipeError):
        evaluate("run", out=tmp_path, num_workers=0)
    assert {file.name for file in tmp_path.iterdir()} >= set(module.OUTPUTS) - {"mistakes.png"}


def test_a_mistake_that_is_gone_costs_no_score(folder, tmp_path, monkeypatch):
    """A picture may be moved after it was scored."""
    monkeypatch.chdir(tmp_path)
    make_data(tmp_path, train=6, test=6)
    draw = module.draw_mistakes

    def moved(data, indices, mistakes):
        for place, _ in mistakes:
            os.remove(module.picture_name(data, int(indices[place])))
        return draw(data, indices, mistakes)

    monkeypatch.setattr(module, "draw_mistakes", moved)
    figures = evaluate(folder / "run", out=tmp_path / "out", num_workers=0)
    assert figures["top1"] < 1 and Image.open(tmp_path / "out/mistakes.png").width > 100


def test_what_cannot_be_written_costs_no_score(folder, tmp_path, monkeypatch, capsys):
    def refused(path, content):
        raise UserError("is open in another program")

    monkeypatch.setattr(module, "save_csv", refused)
    with pytest.raises(UserError, match="another program"):
        evaluate("run", out=tmp_path, num_workers=0)
    assert "18 pictures scored" in capsys.readouterr().out


@pytest.mark.parametrize(
    "pictures, batch_size, expected",
    [(18, 8, (8, 2)), (18, 32, (32, 0)), (600, 2048, (256, 2)), (600, 4, (4, 5)), (600, 5, (5, 3))],
)
def test_what_reads_is_not_more_than_there_is_to_read(
    folder, tmp_path, monkeypatch, pictures, batch_size, expected
):
    """On a machine of five cores; half of what is free in shared memory is used."""
    seen = []

    def loader(data, batch_size, num_workers, **options):
        seen.append((batch_size, num_workers))
        return torch.utils.data.DataLoader(data, batch_size, num_workers=0, **options)

    run = make_run(tmp_path / "run", ["class0", "class1", "class2"], Unfreeze_batch_size=batch_size)
    write_list("some.txt", [0] * pictures)
    monkeypatch.setattr(trained, "DataLoader", loader)
    monkeypatch.setattr(trained, "cores", lambda: 5)
    room = 6 * 2 * batch_size * 32 * 32 * 3 if batch_size == 5 else 1e12  # of six workers
    monkeypatch.setattr(trained, "free_shared_memory", lambda: room)
    evaluate(run, annotation="some.txt")
    assert seen == [expected]


def test_figures_of_a_fork_are_printed(folder, tmp_path, monkeypatch, capsys):
    real = module.task.batch_sums, module.task.metrics_from
    monkeypatch.setattr(
        module.task,
        "batch_sums",
        lambda loss, scores, targets, settings: {
            **real[0](loss, scores, targets, settings),
            "sure": scores.softmax(1).amax(1).double().sum(),
        },
    )
    monkeypatch.setattr(
        module.task,
        "metrics_from",
        lambda sums, settings: {
            **real[1](sums, settings),
            "sureness": (sums["sure"] / sums["pictures"]).item(),
        },
    )
    figures = evaluate("run", out=tmp_path, num_workers=0)
    sure = np.mean([float(row[3]) for row in predicted(tmp_path)[1:]])
    assert (
        figures["sureness"] == pytest.approx(sure, abs=1e-5)
        and f"sureness {figures['sureness']:.8g}" in capsys.readouterr().out
    )


@pytest.mark.parametrize("bias", [[0, 0, 0, 0], [0, 1, 1, 0], [1, 0, 1, 0]])
def test_equal_scores_are_one_story(folder, tmp_path, capsys, bias):
    """The figures, the table, the matrix, predictions.csv, mistakes and predict name the same
    class: the first of the best.
    """
    run, names = make_run(tmp_path / "run", list("abcd"), classes_path="none.txt"), list("abcd")
    state = weights(run, "best_epoch_weights.pth")
    state.update(
        {
            "classifier.1.weight": torch.zeros_like(state["classifier.1.weight"]),
            "classifier.1.bias": torch.tensor(bias).float(),
        }
    )
    torch.save(state, run / "best_epoch_weights.pth")
    write_list("list.txt", [0, 1, 2, 3, 1, 2, 2])
    found = evaluate(run, annotation="list.txt", num_workers=0)
    rows, first = predicted(run)[1:], names[bias.index(max(bias))]
    with open(run / "confusion_matrix.csv", newline="") as file:
        counts = np.array([[int(cell) for cell in row[1:]] for row in list(csv.reader(file))[1:]])
    right = {"a": 1, "b": 2, "c": 3, "d": 1}[first]
    assert {row[2] for row in rows} == {first} and sum(
        row[1] == row[2] for row in rows
    ) == right == counts.trace()
    assert found["top1"] == right / 7 and counts.sum(0)[names.index(first)] == 7
    out = capsys.readouterr().out
    assert f"top-1 {right / 7:.4%}" in out
    assert re.search(rf"^{first} +{right / 7:.4f} +1.0000", out, re.M)
    order = [name for name, _ in predict.Classifier(run)("model_data/test0.png")]
    assert order == rows[0][2::2] == sorted(names, key=lambda name: -bias[names.index(name)])


class Drawn(torch.utils.data.Dataset):
    """Data that are no files: (picture, class id)."""

    def __init__(self, ids):
        self.ids = ids

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return picture(self.ids[index] % 3, np.random.default_rng(index)), self.ids[index]


def test_data_of_ones_own(folder, tmp_path, monkeypatch):
    names = ["class0", "class1", "class2"]
    monkeypatch.setattr(module, "own_data", lambda settings: (names, None, Drawn([0, 1, 2, 0])))
    assert evaluate("run", out=tmp_path, num_workers=0)["scored"] == 4
    assert [row[:2] for row in predicted(tmp_path)[1:3]] == [
        ["picture 0 of the data set", "class0"],
        ["picture 1 of the data set", "class1"],
    ]
    assert Image.open(tmp_path / "mistakes.png").width > 100
    assert (
        evaluate("run", annotation="model_data/cls_test.txt", out=tmp_path, num_workers=0)["scored"]
        == 18
    )
    for given, sentence in (
        (names[::-1], "the classes of run are not those of own_data"),
        ([*names, "x"], "class id 3"),
    ):
        monkeypatch.setattr(module, "own_data", lambda settings: (given, None, Drawn([0, 3])))
        with pytest.raises(UserError, match=sentence):
            evaluate("run", out=tmp_path, num_workers=0)


def test_mixed_precision_is_the_runs(folder, tmp_path, monkeypatch):
    """On a CPU bfloat16, whose figures differ from float32's a little."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    half = make_run(tmp_path / "half", ["class0", "class1", "class2"])
    config = json.loads((half / "config.json").read_text())
    config["settings"]["fp16"] = True
    (half / "config.json").write_text(json.dumps(config))
    losses = [evaluate(run, out=tmp_path / "out", num_workers=0)["loss"] for run in ("run", half)]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.02)


def test_the_mean_of_mirrored_logits_is_float32():
    class Views(torch.nn.Module):
        answers = [1.0, 1.0078125]  # neighbours in bfloat16

        def forward(self, pictures):
            return torch.full((1, 2), self.answers.pop(), dtype=torch.bfloat16)

    logits = trained.Mirrored(Views())(torch.zeros(1, 3, 2, 2))
    assert logits.tolist() == [[1.00390625] * 2]


@pytest.mark.parametrize("able, name", [({"amx_bf16": True}, "bfloat16"), ({}, "float32")])
@pytest.mark.parametrize("fp16", ["bfloat16", True])
def test_a_precision_that_this_machine_emulates_is_not_used(
    folder, tmp_path, monkeypatch, able, name, fp16
):
    run = make_run(tmp_path / "run", ["class0", "class1", "class2"], fp16=fp16)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert predict.Classifier(run).fp16 == name


DAMAGED = [
    ("", "not a run's folder"),
    ("{", "not a run's folder"),
    ("[]", "not a run's folder"),
    ("{}", "settings"),
    ('{"settings": 3}', "settings"),
    (dict(class_names=None), "class_names"),
    (dict(class_names=[]), "class_names"),
    (dict(class_names=[1]), "class_names"),
    (dict(class_names=["a"] * 4), "a class more than once: number 1 and number 2"),
    (dict(class_names=list("abcd")), "4 classes"),
    (dict(finished="no"), "finished"),
    (dict(backbone=7), "backbone"),
    (dict(backbone="resnet81"), "resnet81"),
    (dict(input_shape=[32]), "input_shape"),
    (dict(input_shape=None), "input_shape"),
    (dict(Cuda="yes"), "Cuda"),
    (dict(fp16=None), "fp16"),
    (dict(val_crop="all"), "val_crop"),
    (dict(val_crop=0), "val_crop"),
]


@pytest.mark.parametrize("change, sentence", DAMAGED, ids=str)
def test_a_damaged_config_is_one_sentence_in_every_command(folder, tmp_path, change, sentence):
    """Where the config is read, or where the setting is."""
    config = json.loads(Path("run/config.json").read_text())
    if isinstance(change, str):
        text = change
    else:
        text = json.dumps(
            {
                **config,
                **{k: v for k, v in change.items() if k in config},
                "settings": {
                    **config["settings"],
                    **{k: v for k, v in change.items() if k not in config},
                },
            }
        )
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "best_epoch_weights.pth").write_bytes(
        Path("run/best_epoch_weights.pth").read_bytes()
    )
    for command in (
        lambda: evaluate(tmp_path),
        lambda: predict.Classifier(tmp_path),
        lambda: export.export(tmp_path),
    ):
        with pytest.raises(UserError, match=sentence) as caught:
            command()
        assert "\n" not in str(caught.value)


def test_settings_that_a_config_lacks_are_those_of_train(folder, tmp_path):
    """A fork adds settings, and has runs that were made before."""
    run = make_run(tmp_path / "run", ["class0", "class1", "class2"])
    config = json.loads((run / "config.json").read_text())
    for name in (
        "val_crop",
        "label_smoothing",
        "test_annotation_path",
        "mean",
        "std",
        "Unfreeze_batch_size",
    ):
        config["settings"].pop(name, None)
    (run / "config.json").write_text(json.dumps(config))
    assert evaluate(run, num_workers=0)["scored"] == 18
    del config["settings"]["backbone"]
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="backbone = None must"):
        evaluate(run, num_workers=0)


@pytest.mark.parametrize(
    "word, value", [("batch_size", 0), ("batch_size", -1), ("num_workers", -1)]
)
def test_numbers_that_are_none(folder, tmp_path, word, value):
    with pytest.raises(UserError, match=f"{word} = {value} must be .*a whole number"):
        evaluate(make_run(tmp_path / "run", ["class0", "class1", "class2"]), **{word: value})


def test_a_run_without_an_epoch_has_no_weights(folder, tmp_path):
    run = make_run(tmp_path / "run", ["a"])
    (run / "best_epoch_weights.pth").unlink()
    with pytest.raises(UserError, match="best_epoch_weights.pth' does not exist"):
        predict.Classifier(run)


def test_what_scores_mean_is_said_once(folder, tmp_path, monkeypatch):
    """Another meaning of scores in recipe.py is in each command's probabilities."""
    run = predict.Classifier(make_run(tmp_path / "run", ["a", "b"], classes_path="none.txt"))
    monkeypatch.setattr(module.task, "probabilities", torch.sigmoid)
    images = torch.stack(
        [
            read_crop(
                f"model_data/test{i}.png", (32, 32), partial(centre_box, (32, 32), 1.0)
            ).permute(2, 0, 1)
            for i in range(3)
        ]
    )
    expected = torch.sigmoid(scores_of(run, images))
    write_list("list.txt", [0, 1, 0])
    evaluate(run.folder, annotation="list.txt", num_workers=0)
    for i, row in enumerate(predicted(run.folder)[1:]):
        best = expected[i].sort(descending=True)
        assert [float(p) for p in row[3::2]] == pytest.approx(best.values.tolist(), abs=2e-6)
        assert [p for _, p in run(f"model_data/test{i}.png")] == pytest.approx(
            best.values.tolist(), abs=2e-6
        )
    torch.testing.assert_close(
        export.Program(run.model, run.settings)(images), expected, rtol=1e-4, atol=1e-5
    )


def test_many_classes_take_little_memory(folder, tmp_path):
    """What is kept grows with what occurs; a matrix that nobody can read is left out."""
    run = make_run(tmp_path / "run", [f"name {i}" for i in range(21_841)], classes_path="none.txt")
    write_list("list.txt", [0, 7, 21_840] * 20)
    code = (  # not getrusage's ru_maxrss, which a process inherits from the tests' own
        "import re, sys\nfrom utils.evaluate import main\nmain(sys.argv[1:])\n"
        "print('peak', re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, run, "--annotation", "list.txt", "--num-workers", "0"],
        capture_output=True,
        text=True,
        env={**environment(), "PYTHONPATH": str(ROOT)},
    )
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout.split("peak ")[1]) < 1.5e6 and "mean of 3 classes" in ended.stdout
    assert (
        not [path for path in run.iterdir() if "matrix" in path.name] and len(predicted(run)) == 61
    )
    assert len((run / "per_class.csv").read_text().splitlines()) == 21_842


HOSTILE = [
    "\x1b[2J=up",
    "=cmd|' /C calc'!A0",
    "line\nforged.png: cat 100.0%",
    "-1+1",
    "@x",
    "a\u202eb",
    "\tx",
]


def test_names_of_somebody_else_are_only_names(folder, tmp_path, capsys):
    run = make_run(tmp_path / "run", HOSTILE, classes_path="none.txt")
    Path("=1+1.png").write_bytes(Path("model_data/test0.png").read_bytes())
    Path("gone \x1b[2J.png").write_text("no picture")
    Path("list.txt").write_text(
        "".join(f"{i};=1+1.png\n" for i in range(7)) + "0;gone \x1b[2J.png\n", newline=""
    )
    evaluate(run, annotation="list.txt", num_workers=0)
    out = capsys.readouterr().out
    assert (
        "\x1b" not in out
        and "\u202e" not in out
        and "\nforged" not in out
        and r"\x1b[2J=up" in out
        and r"line\nforged" in out
    )
    rows = predicted(run)
    assert rows[1][0] == "'=1+1.png" and [row[1] for row in rows[1:]] == [
        f"'{name}" if name[0] in "=+-@\t\r" else name for name in HOSTILE
    ]
    for file in ("predictions.csv", "confusion_matrix.csv", "per_class.csv"):
        with open(run / file, newline="") as opened:
            assert not any(
                cell[:1] in tuple("=+-@\t\r") for row in csv.reader(opened) for cell in row
            )


def test_links_in_a_runs_folder_lead_no_write_out_of_it(folder, tmp_path):
    run, outside = make_run(tmp_path / "run", ["class0", "class1", "class2"]), tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("mine")
    names = [
        "confusion_matrix.csv",
        "confusion_matrix.png",
        "per_class.csv",
        "predictions.csv",
        "mistakes.png",
        "model.pt2",
    ]
    for name in names:
        (run / name).symlink_to(outside / "file")
        (run / f".{name}.draft").symlink_to(outside / "file")
    evaluate(run, num_workers=0)
    export.export(run)
    assert [path.name for path in outside.iterdir()] == ["file"] and (
        outside / "file"
    ).read_text() == "mine"
    assert not any((run / name).is_symlink() for name in names)


def test_several_at_once_all_succeed(folder, tmp_path):
    run = make_run(tmp_path / "run", ["class0", "class1", "class2"])
    with ThreadPoolExecutor(3) as pool:
        assert [
            found["scored"] for found in pool.map(lambda _: evaluate(run, num_workers=0), range(6))
        ] == [18] * 6
    assert len(predicted(run)) == 19 and not list(run.glob(".*.draft"))


def test_a_network_that_loads_only_marked_weights(tmp_path):
    """MNASNet: with weights from a plain dictionary, and with those that training saves."""
    run = make_run(tmp_path / "run", ["a", "b"], backbone="mnasnet0_5")
    state = weights(run, "best_epoch_weights.pth")
    torch.save(dict(state), Path(run, "best_epoch_weights.pth"))
    loaded = predict.Classifier(run).network.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.items())


MINE = """from torch import nn
from torchvision import models


def mine(num_classes, input_shape):
    return nn.Sequential(models.mnasnet0_5(num_classes=7), nn.Linear(7, num_classes))
"""


def test_one_inside_a_network_of_one_s_own(tmp_path, monkeypatch):
    """And files without BatchNorm's counters, as older ones are."""
    monkeypatch.setattr(nets, "__path__", [*nets.__path__, str(tmp_path)])
    monkeypatch.setattr(nets, "OWN", ["mine"])
    (tmp_path / "mine.py").write_text(MINE)
    run = make_run(tmp_path / "run", ["a", "b"], backbone="mine")
    path = Path(run, "best_epoch_weights.pth")
    state = weights(run, path.name)
    torch.save({name: state[name] for name in state if "num_batches" not in name}, path)
    loaded = predict.Classifier(run).network.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.items())


def test_a_run_by_its_name(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "logs/2026_01_01", ["a"], classes_path="none.txt")
    picture(0, np.random.default_rng(0)).save("a.png")
    Path("list.txt").write_text("0;a.png\n")
    assert evaluate("2026_01_01", annotation="list.txt", num_workers=0)["scored"] == 1
    assert (
        Path("logs/2026_01_01/predictions.csv").exists() and export.export("2026_01_01")[0].exists()
    )


def test_pictures_are_normalised_as_the_run_says(folder, tmp_path):
    mean, std = [0.5, 0.5, 0.5], [0.25, 0.5, 1.0]
    run = predict.Classifier(make_run(tmp_path / "run", ["a", "b"], mean=mean, std=std))
    image = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    by_hand = (image / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        expected = run.model(by_hand)
    torch.testing.assert_close(scores_of(run, image), expected, rtol=1e-3, atol=1e-3)
    program = torch.export.load(export.export(run.folder)[0]).module()
    torch.testing.assert_close(program(image), expected.softmax(1), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        scores_of(run, image), expected, rtol=1e-3, atol=1e-3
    )  # exporting leaves nothing behind


def test_test_data_of_other_normal_forms(folder, tmp_path):
    Path("classes.txt").write_text("cafe\u0301\nclass1\nclass2\n", encoding="utf-8")
    run = make_run(tmp_path / "run", ["caf\u00e9", "class1", "class2"], classes_path="classes.txt")
    assert evaluate(run, num_workers=0)["scored"] == 18
