"""Folders of pictures as people have them: links, odd files and names, outputs that clash, processes that die."""
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from unicodedata import normalize

import pytest
from PIL import Image

from tests.helpers import environment
from utils.annotation import main as annotate
from utils.errors import UserError
from utils.folders import pictures_below
from utils.shrink import on_all_cores


def tree(*paths, size=(4, 4)):
    for path in paths:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(path)


def numbered(*folders, count=5):
    tree(*(f"{folder}/{i}.png" for folder in folders for i in range(count)))


def listed():
    """Counter of the lines of both lists."""
    return Counter(Path("model_data/cls_train.txt").read_text().split() + Path("model_data/cls_test.txt").read_text().split())


def classes():
    return Path("model_data/cls_classes.txt").read_text(encoding="utf-8").splitlines()


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_links_that_lead_back_are_not_followed(capsys):
    numbered("ds/cat", "ds/dog")
    os.symlink(".", "ds/cat/loop")
    os.symlink("..", "ds/cat/up")
    os.symlink("../dog", "ds/cat/dog")
    os.symlink(".", "ds/self")
    os.symlink("cat", "ds/kitty")
    os.symlink(Path.cwd().parent, "ds/dog/above")
    os.symlink("/", "ds/dog/root")
    os.symlink("nowhere", "ds/dog/broken")
    os.symlink("round.png", "ds/dog/round.png")
    annotate(["ds"])
    assert classes() == ["cat", "dog"]
    assert listed() == Counter([*(f"0;ds/cat/{i}.png" for i in range(5)), *(f"1;ds/dog/{i}.png" for i in range(5))])
    assert "left out: 7 links to folders that are read anyway" in capsys.readouterr().out


def test_links_to_folders_elsewhere_are_followed_once(capsys):
    numbered("ds/cat", "ds/dog", "far/more", "far/dogs")
    os.symlink(Path("far/more").absolute(), "ds/cat/more")
    os.symlink(Path("far/more").absolute(), "ds/dog/more")
    os.symlink(".", "far/more/loop")
    os.symlink("../far/dogs", "ds/bird")
    os.symlink("..", "far/dogs/up")  # a folder around one that is a class
    annotate(["ds"])
    assert classes() == ["bird", "cat", "dog"]
    assert Counter(line.rpartition("/")[0] for line in listed()) == {"0;ds/bird": 5, "1;ds/cat": 5, "1;ds/cat/more": 5, "2;ds/dog": 5}
    assert sum(listed().values()) == 20


def test_each_file_is_listed_once(capsys):
    """A link beside its file, and one in another class: the file stands where it lies; a link to a file elsewhere is a picture."""
    numbered("ds/train/cat", "ds/train/dog", "ds/test/cat", "ds/test/dog", "far")
    os.symlink("0.png", "ds/train/cat/a copy.png")
    os.symlink("../../test/dog/0.png", "ds/train/cat/dog.png")
    os.symlink("../../../far/0.png", "ds/train/dog/far.png")
    os.symlink("../../../far/0.png", "ds/test/dog/far.png")
    annotate(["ds"])
    assert sum(listed().values()) == 21 and listed()["1;ds/train/dog/far.png"] == 1 and listed()["1;ds/test/dog/0.png"] == 1
    assert "left out: 3 links to pictures that are listed anyway" in capsys.readouterr().out
    assert pictures_below("ds/train/cat") == [f"ds/train/cat/{i}.png" for i in range(5)] + [
        "ds/train/cat/a copy.png", "ds/train/cat/dog.png"]


def test_names_that_no_list_can_hold(capsys):
    numbered("ds/cat", "ds/dog")
    for name in (b"line\nfeed.png", b"latin \xe9.png"):
        tree("odd.png")
        os.rename("odd.png", os.path.join(b"ds/cat", name))
    annotate(["ds"])
    assert sum(listed().values()) == 10 and "left out: 2 names that no text file can hold" in capsys.readouterr().out


def test_only_regular_files_are_listed(capsys):
    numbered("ds/cat", "ds/dog")
    os.mkfifo("ds/cat/fifo.png")
    os.symlink("/dev/zero", "ds/cat/zero.png")
    server = socket.socket(socket.AF_UNIX)
    server.bind("ds/cat/socket.png")
    annotate(["ds", "--check"])
    server.close()
    assert sum(listed().values()) == 10
    assert "left out: 3 pictures' names that are no regular files" in capsys.readouterr().out


@pytest.mark.parametrize("folders, expected", [
    (["train", "car", "bus"], ["bus", "car", "train"]),
    (["test", "car"], ["car", "test"]),
    (["val", "train", "car"], ["car", "train", "val"]),
    (["train/a", "train/b"], ["a", "b"]),
    (["train/a", "train/b", "val/a", "test"], ["a", "b"]),  # a test folder without labels, as ImageNet's
    (["train/a", "train/b", "valid/a"], ["a", "b"])])
def test_a_class_called_train(folders, expected):
    numbered(*(f"ds/{folder}" for folder in folders))
    Path("ds/papers").mkdir()
    Path("ds/papers/licence.txt").write_text("no picture")
    annotate(["ds"])
    assert [name for name in classes() if name != "papers"] == expected
    assert {line.partition(";ds/")[2].rpartition("/")[0] for line in listed()} == set(folders) - ({"test"} if "train/a" in folders else set())


@pytest.mark.parametrize("folders, words", [
    (["train/steam", "train/electric", "car"], "'train'.*beside 'car'"), (["train", "test"], "no class folders in 'train'"),
    (["train/a", "test"], "no class folders in 'test'"), (["test/a"], "no class folders in 'train'"),
    (["train/a", "test", "bus"], "beside 'bus'")])
def test_ambiguous_folders_are_refused(folders, words):
    numbered(*(f"ds/{folder}" for folder in folders))
    with pytest.raises(UserError, match=words):
        annotate(["ds"])
    assert not os.path.exists("model_data/cls_train.txt")


@pytest.mark.parametrize("name", ["👩‍🔬", "a\u00a0b", "ﬁ", "a\u2028b", "עברית", "e\u0301", ";#"])
def test_odd_class_names_are_kept(name):
    numbered(f"ds/{name}", "ds/zz")
    annotate(["ds"])
    assert Path("model_data/cls_classes.txt").read_text(encoding="utf-8").split("\n")[:-1] == sorted([normalize("NFC", name), "zz"])
    annotate(["ds"])  # the class file is read as it was written


@pytest.mark.parametrize("name", [" a", "a\n", "a\nb", "\ufeffa", b"\xff\xfe", "a\u2003"])
def test_class_names_that_no_file_can_hold(name):
    numbered("ds/zz")
    os.mkdir(os.path.join(b"ds", os.fsencode(name)))
    with pytest.raises(UserError, match="rename it"):
        annotate(["ds"])


@pytest.mark.parametrize("words", [["--train", "x.txt", "--test", "x.txt"], ["--classes", "x.txt", "--test", "x.txt"],
                                   ["--train", "x.txt", "--test", "link.txt"], ["--train", "x.txt", "--classes", "./far/../x.txt"]])
def test_outputs_must_be_three_files(words):
    numbered("ds/cat")
    os.symlink("x.txt", "link.txt")
    os.mkdir("far")
    with pytest.raises(UserError, match="must be three files"):
        annotate(["ds", *words])
    assert not os.path.exists("x.txt")


@pytest.mark.parametrize("output", ["/dev/null", "fifo", "far", "blocked/list.txt", "ds/cat/0.png", "/proc/list.txt"])
def test_outputs_that_cannot_be_made_are_found_first(output, monkeypatch):
    numbered("ds/cat")
    os.mkfifo("fifo")
    os.mkdir("far")
    Path("blocked").write_text("a file")
    monkeypatch.setattr("utils.annotation.on_all_cores", None)
    before = Path("ds/cat/0.png").read_bytes()
    for option in ("--train", "--test"):
        with pytest.raises(UserError, match=f"{option}.*choose another one"):
            annotate(["ds", "--check", option, output])
    assert Path("ds/cat/0.png").read_bytes() == before and not os.path.exists("model_data/cls_classes.txt")


def test_a_linked_list_is_written_through():
    numbered("ds/cat", "ds/dog")
    os.mkdir("far")
    Path("far/train.txt").write_text("old")
    os.symlink("far/train.txt", "train.txt")
    os.symlink("far/new.txt", "test.txt")
    annotate(["ds", "--train", "train.txt", "--test", "test.txt"])
    assert os.path.islink("train.txt") and os.path.islink("test.txt")
    assert Path("far/train.txt").read_text().count("\n") == 8 and Path("far/new.txt").read_text().count("\n") == 2


def fragile(path):
    if "deadly" in path:
        os.kill(os.getpid(), signal.SIGKILL)
    if "wrong" in path:
        raise OSError("wrong")
    return path.upper()


def test_a_killed_process_costs_its_picture_alone(capsys):
    items = [f"{i}" for i in range(40)] + ["deadly"] + [f"{i}" for i in range(40, 60)] + ["wrong"]
    done = on_all_cores(fragile, items, "tried")
    assert done == {f"{i}": f"{i}" for i in range(60)}
    out, err = capsys.readouterr()
    assert [line.partition(" (")[0] for line in out.splitlines()] == ["unreadable: deadly", "unreadable: wrong"]
    assert "ended the process" in out and "tried 62/62 2 unreadable" in err


@pytest.mark.slow
def test_processes_that_all_die_end_it():
    with pytest.raises(UserError, match="five pictures in a row"):
        on_all_cores(fragile, [f"deadly {i}" for i in range(12)], "tried")


SLOW = """
import sys, time
from utils.annotation import main
from utils.processes import one_sentence_errors
import utils.shrink
def work(path):
    open("begun", "w").close()
    time.sleep(60)
utils.shrink.decode = work
import utils.annotation
utils.annotation.decode = work
if __name__ == "__main__":
    main(["ds", "--check"])
"""


@pytest.mark.parametrize("when", ["processes begin", "processes work"])
def test_ctrl_c_ends_a_check_at_once(when):
    """Without a word, and none of them is left."""
    numbered("ds/cat", "ds/dog", count=10)
    Path("slow.py").write_text(SLOW)
    root = Path(__file__).resolve().parent.parent
    with open("out.txt", "w") as out:
        process = subprocess.Popen([sys.executable, "slow.py"], env={**environment(), "PYTHONPATH": str(root)}, stdout=out,
                                   stderr=subprocess.STDOUT, start_new_session=True)

    def group():
        found = subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True, text=True).stdout.split()
        return set(found) - {str(process.pid)}
    while not (group() if when == "processes begin" else os.path.exists("begun")):
        assert process.poll() is None, Path("out.txt").read_text()
        time.sleep(0.05)
    begin = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(10) == 130
    while group():
        assert time.monotonic() - begin < 20
        time.sleep(0.1)
    assert Path("out.txt").read_text() == ""
