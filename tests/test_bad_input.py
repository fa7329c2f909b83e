"""Whatever is wrong before the first epoch becomes one sentence that names it."""
import os
import pickle
import re
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st

from nets import get_model
from nets._weights import load_weights
from tests.helpers import make_data, make_project, start, train
from utils import lists
from utils.dataloader import DataGenerator
from utils.errors import UserError


def lines_of(text, classes=3):
    return lists.check_lines(text.splitlines(keepends=True), "list.txt", classes, "classes.txt")


@pytest.mark.parametrize("text, sentence", [
    ("0;a\nno separator\n", "list.txt:2 is not"), ("0;a\n\nx;a\n", "list.txt:3: the class id 'x'"), ("-1;a\n", "class id -1 is outside 0 … 2"),
    ("3;a\n", "class id 3 is outside.*classes.txt"), ("1.0;a\n", "whole number"), ("0;\n", "list.txt:1 is not"), (";a\n", "''"),
    ("0_0;a\n", "whole number"), ("+0;a\n", "whole number"), ("٠;a\n", "whole number"), ("9" * 5000 + ";a\n", "whole number"),
    ("0;a\n1;gone\n2;gone too\n0;b\n1;3\n1;4\n", "5 of 6 pictures do not exist.*list.txt:2 gone; list.txt:3 gone too; .*; …")])
def test_annotation_lines(tmp_path, monkeypatch, text, sentence):
    monkeypatch.chdir(tmp_path)
    Path("a").touch()
    with pytest.raises(UserError, match=sentence):
        lines_of(text)


def test_good_lines_of_every_kind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["a b.jpg", "x;y.jpg", "漢字/é ü.png", "plain", "trailing "]
    Path("漢字").mkdir()
    for name in names:
        Path(name).touch()
    text = "\ufeff0;a b.jpg\r\n\r\n1;x;y.jpg\r\n 2 ;漢字/é ü.png\n   \n0;" + str(tmp_path / "plain") + "\n1;trailing "
    kept = lines_of(text)
    data = DataGenerator(kept, (8, 8))
    assert [data.name(i).partition(";")[2] for i in range(len(data))] == [*names[:3], str(tmp_path / "plain"), "trailing "]


@pytest.mark.parametrize("content, sentence", [
    (None, "does not exist.*python -m utils.annotation"), (b"", "is empty"), (b" \n\n", "is empty"), (b"\xef\xbb\xbf", "is empty"),
    (b"0;a\n0;\xff\xfe\n", "list.txt:2 is not UTF-8"), ("folder", "is a folder")])
def test_text_files(tmp_path, monkeypatch, content, sentence):
    monkeypatch.chdir(tmp_path)
    if content == "folder":
        Path("list.txt").mkdir()
    elif content is not None:
        Path("list.txt").write_bytes(content)
    for name in ("classes_path", "train_annotation_path"):
        with pytest.raises(UserError, match=sentence):
            lists.check_text_file(name, "list.txt", "python -m utils.annotation writes it")


def test_class_files(tmp_path, capsys):
    path = tmp_path / "classes.txt"
    path.write_bytes("\ufeffcat\r\n\r\ndog house\r\n".encode())
    assert lists.get_classes(path) == (["cat", "dog house"], 2)
    path.write_text("cat\n\ndog\n")
    assert lists.get_classes(path) == (["cat", "dog"], 2) and "classes.txt:2 is blank" in capsys.readouterr().out
    path.write_text("cat\ndog\ncat\n")
    with pytest.raises(UserError, match="more than once: cat"):
        lists.get_classes(path)


def test_shared_pictures(capsys):
    lists.warn_shared(["0;a\n", "1;b\n", "0;c\n"], ["1;b\n", "0;c\n", "0;d\n"])
    assert "2 pictures" in capsys.readouterr().out


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("/tmp/this_code_has_run"),)


def test_weight_files(tmp_path):
    good = get_model("squeezenet1_1", 3, [32, 32]).state_dict()
    torch.save(good, tmp_path / "good.pth")
    assert load_weights(tmp_path / "good.pth").keys() == good.keys()
    data = (tmp_path / "good.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(data[:len(data) // 2])
    (tmp_path / "text.pth").write_text("no weights\n" * 10)
    (tmp_path / "empty.pth").touch()
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"model": Bomb()}, tmp_path / "bomb.pth")
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps(Bomb()))
    for name in ("cut", "text", "empty", "list", "bomb", "pickle", "missing"):
        with pytest.raises(UserError, match=name) as caught:
            load_weights(tmp_path / f"{name}.pth")
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="folder"):
        load_weights(tmp_path)
    assert not Path("/tmp/this_code_has_run").exists()


def test_whole_runs_end_with_one_sentence(tmp_path):
    folder = make_project(tmp_path)
    make_data(folder, train=24, test=6)
    for words, sentence in ((["--backbone", "resnet81"], "did you mean 'resnet18'"), (["--backbone", "densenet121", "--input_shape",
                            "[16, 16]"], "too small"), (["--model_path", "gone.pth"], "gone.pth"),
                            (["--backbone", "resnet18", "--Unfreeze_batch_size", 1], "BatchNorm"),
                            (["--classes_path", "train.py", "--test_annotation_path", "gone.txt"], "gone.txt")):
        _, err = train(folder, *words, code=1)
        assert re.search(sentence, err) and "Traceback" not in err and err.count("error: ") == 1, err
    assert not (folder / "logs").exists() or not list((folder / "logs").glob("*/*.pth"))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=80) | st.text(alphabet="0129;:/.a\n\r \ufeff-", max_size=40).map(str.encode), st.integers(1, 4))
def test_random_bytes_as_annotation(tmp_path_factory, data, classes):
    path = tmp_path_factory.getbasetemp() / "fuzz.txt"
    path.write_bytes(data)
    try:
        lists.check_text_file("train_annotation_path", str(path), "write it")
        with open(path, encoding="utf-8") as f:
            kept = lists.check_lines(f.readlines(), "fuzz.txt", classes, "classes")
        dataset = DataGenerator(kept, (8, 8))
        assert [dataset.name(i) for i in range(len(dataset))] == kept
    except UserError as error:
        assert "\n" not in str(error)


def test_a_million_lines_are_checked_quickly_enough(tmp_path):
    """No timing here (the benchmark has it): that folders are listed, not every file asked for."""
    for i in range(50):
        (tmp_path / f"{i}.jpg").touch()
    lines = [f"{i % 3};{tmp_path}/{i % 50}.jpg\n" for i in range(20_000)]
    calls = []
    real = os.path.isfile
    try:
        lists.os.path.isfile = lambda path: calls.append(path) or real(path)
        assert len(lists.check_lines(lines, "list", 3, "classes")) == 20_000
    finally:
        lists.os.path.isfile = real
    assert not calls


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (str(tmp_path / "pipe"), "/dev/zero"):
        for read in (lambda: load_weights(path), lambda: lists.check_text_file("classes_path", path), lambda: lists.get_classes(path)):
            with pytest.raises(UserError, match="no regular file"):
                read()


def test_few_files_may_be_open(tmp_path):
    """ulimit -n 24: a sentence, whatever it is that cannot be opened."""
    folder = make_project(tmp_path, num_workers=4)
    make_data(folder, train=24, test=6)
    process = start(folder, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24)))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "too many open files" in err and "ulimit -n" in err and "Traceback" not in err, err


def test_folders_that_cannot_be_made(tmp_path):
    folder = make_project(tmp_path)
    make_data(folder, train=24, test=6)
    (folder / "dangling").symlink_to("nowhere")
    for name in ("dangling", "x" * 300, "train.py"):
        _, err = train(folder, "--save_dir", name, code=1)
        assert "save_dir = " in err and "Traceback" not in err and len(err) < 400


def test_interrupt_while_importing(tmp_path):
    folder = make_project(tmp_path)
    process = start(folder)
    time.sleep(0.4)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT) and "Traceback" not in err, err
