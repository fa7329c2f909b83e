"""Folders of pictures as people have them.

Links, odd files and names, outputs that clash, processes that die.
"""

import errno
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from unicodedata import normalize

import pytest
from PIL import Image

import train as train_module
from tests.helpers import environment
from utils.annotation import main as annotate
from utils.plumbing import console, lists
from utils.plumbing.advice import advise
from utils.plumbing.command_line import command_line
from utils.plumbing.errors import UserError, explain
from utils.plumbing.lists import DEFAULT_PATHS
from utils.plumbing.settings import check_settings, describe_few_steps
from utils.plumbing.shrink import on_all_cores
from utils.trained import find_pictures


def tree(*paths, size=(4, 4)):
    for path in paths:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(path)


def numbered(*folders, count=5):
    tree(*(f"{folder}/{i}.png" for folder in folders for i in range(count)))


def listed():
    """Counter of the lines of both lists."""
    return Counter(
        Path("model_data/cls_train.txt").read_text().split()
        + Path("model_data/cls_test.txt").read_text().split()
    )


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
    assert listed() == Counter(
        [*(f"0;ds/cat/{i}.png" for i in range(5)), *(f"1;ds/dog/{i}.png" for i in range(5))]
    )
    assert "left out (7): links to folders that are read anyway" in capsys.readouterr().out


def test_links_to_folders_elsewhere_are_followed_once(capsys):
    numbered("ds/cat", "ds/dog", "far/more", "far/dogs")
    os.symlink(Path("far/more").absolute(), "ds/cat/more")
    os.symlink(Path("far/more").absolute(), "ds/dog/more")
    os.symlink(".", "far/more/loop")
    os.symlink("../far/dogs", "ds/bird")
    os.symlink("..", "far/dogs/up")  # a folder around one that is a class
    annotate(["ds"])
    assert classes() == ["bird", "cat", "dog"]
    assert Counter(line.rpartition("/")[0] for line in listed()) == {
        "0;ds/bird": 5,
        "1;ds/cat": 5,
        "1;ds/cat/more": 5,
        "2;ds/dog": 5,
    }
    assert sum(listed().values()) == 20


def test_each_file_is_listed_once(capsys):
    """A link beside its file, and one in another class.

    The file stands where it lies; a link to a file elsewhere is a picture.
    """
    numbered("ds/train/cat", "ds/train/dog", "ds/test/cat", "ds/test/dog", "far")
    os.symlink("0.png", "ds/train/cat/a copy.png")
    os.symlink("../../test/dog/0.png", "ds/train/cat/dog.png")
    os.symlink("../../../far/0.png", "ds/train/dog/far.png")
    os.symlink("../../../far/0.png", "ds/test/dog/far.png")
    annotate(["ds"])
    assert (
        sum(listed().values()) == 21
        and sum(line.endswith("/dog/far.png") for line in listed()) == 1
        and listed()["1;ds/test/dog/0.png"] == 1
    )
    assert "left out (3): links to pictures that are listed already: " in capsys.readouterr().out
    assert find_pictures(["ds/train/cat"]) == [f"ds/train/cat/{i}.png" for i in range(5)] + [
        "ds/train/cat/a copy.png",
        "ds/train/cat/dog.png",
    ]


def test_links_to_pictures_of_a_folder_that_is_not_used(capsys):
    numbered("ds/train/cat", "ds/train/dog", "ds/test")
    for folder in ("cat", "dog"):
        Path("ds/val", folder).mkdir(parents=True)
        os.symlink(f"../../test/{len(folder)}.png", f"ds/val/{folder}/a.png")
    os.symlink("../../test/0.png", "ds/val/cat/b.png")
    annotate(["ds"])
    assert Path("model_data/cls_test.txt").read_text().split() == [
        "0;ds/val/cat/a.png",
        "0;ds/val/cat/b.png",
    ]
    out = capsys.readouterr().out
    assert (
        "left out (5): pictures outside" in out and "(1): links to pictures that are listed" in out
    )


def test_names_that_no_list_can_hold(capsys):
    numbered("ds/cat", "ds/dog")
    for name in (b"line\nfeed.png", b"latin \xe9.png"):
        tree("odd.png")
        os.rename("odd.png", os.path.join(b"ds/cat", name))
    annotate(["ds"])
    out = capsys.readouterr().out
    assert sum(listed().values()) == 10
    assert "left out (2): paths with a line break" in out and r"'ds/cat/line\nfeed.png'" in out


def test_only_regular_files_are_listed(capsys):
    numbered("ds/cat", "ds/dog")
    os.mkfifo("ds/cat/fifo.png")
    os.symlink("/dev/zero", "ds/cat/zero.png")
    os.symlink("round.png", "ds/dog/round.png")
    os.symlink("nowhere.png", "ds/dog/nowhere.png")
    server = socket.socket(socket.AF_UNIX)
    server.bind("ds/cat/socket.png")
    annotate(["ds", "--check"])
    server.close()
    assert sum(listed().values()) == 10
    out = capsys.readouterr().out
    reason = "pipes, devices, links that lead nowhere, and paths that are too long for Windows"
    assert f"left out (5): {reason}: 'ds/cat/fifo.png', " in out


@pytest.mark.parametrize(
    "folders, expected",
    [
        (["train", "car", "bus"], ["bus", "car", "train"]),
        (["test", "car"], ["car", "test"]),
        (["val", "train", "car"], ["car", "train", "val"]),
        (["train/a", "train/b"], ["a", "b"]),
        (
            ["train/a", "train/b", "val/a", "test"],
            ["a", "b"],
        ),  # a test folder without labels, as ImageNet's
        (["train/a", "train/b", "valid/a"], ["a", "b"]),
    ],
)
def test_a_class_called_train(folders, expected):
    numbered(*(f"ds/{folder}" for folder in folders))
    Path("ds/papers").mkdir()
    Path("ds/papers/licence.txt").write_text("no picture")
    annotate(["ds"])
    assert classes() == expected
    assert {line.partition(";ds/")[2].rpartition("/")[0] for line in listed()} == set(folders) - (
        {"test"} if "train/a" in folders else set()
    )


@pytest.mark.parametrize(
    "train, val, test",
    [
        ("Train", "Test", ""),
        ("TRAIN", "VAL", "TEST"),
        ("training_set", "test_set", ""),
        ("Training Set", "Validation Set", "Test Set"),
        ("training", "validation", "testing"),
        ("train", "dev", "eval"),
        ("train", "eval", "test"),
        ("train", "test", "holdout"),
        ("train2017", "val2017", ""),
        ("trainset", "valid", "tests"),
        ("my-train-images", "my-test-images", ""),
        ("seg_train", "seg_test", ""),
        ("Trainingsdaten", "Testdaten", ""),
        ("训练集", "验证集", "测试集"),
    ],
)
def test_folders_of_a_split(train, val, test, capsys):
    """Whatever they are called: the first beside training validates, the other has its own list."""
    numbered(*(f"ds/{part}/{name}" for part in (train, val, test) if part for name in "ab"))
    annotate(["ds"])
    assert classes() == ["a", "b"]
    out = capsys.readouterr().out
    for part, list_name in ((train, "train"), (val, "test"), (test, "holdout")):
        path = Path(f"model_data/cls_{list_name}.txt")
        assert path.exists() == bool(part)
        for line in path.read_text(encoding="utf-8").splitlines() if part else ():
            assert line.startswith((f"0;ds/{part}/a/", f"1;ds/{part}/b/"))
    assert ("--annotation model_data/cls_holdout.txt" in out) == bool(test)
    assert (f"{test!r} is kept for the end" in out) == bool(test)


def test_a_list_for_the_end_goes_with_its_data_set():
    numbered(*(f"ds/{part}/{name}" for part in ("train", "val", "test") for name in "ab"))
    annotate(["ds"])
    assert Path("model_data/cls_holdout.txt").read_text().count("\n") == 10
    numbered("other/a", "other/b")
    annotate(["other"])
    assert not os.path.exists("model_data/cls_holdout.txt")


@pytest.mark.parametrize(
    "tops",
    [("known", "unknown"), ("part 1", "part 2"), ("entrenamiento", "prueba"), ("A", "b", "c")],
)
def test_the_same_names_side_by_side(tops):
    """They may be parts of a split; an option takes them for classes."""
    numbered(*(f"ds/{top}/{name}" for top in tops for name in ("cat", "dog")))
    with pytest.raises(UserError, match="hold folders of the same names, 'cat', 'dog'.*--nested"):
        annotate(["ds"])
    annotate(["ds", "--nested"])
    assert classes() == sorted(tops)


def test_a_name_side_by_side():
    """One name that two folders share is enough where they hold others."""
    numbered("ds/known/cat", "ds/known/dog", "ds/unknown/Cat", "ds/unknown/eel")
    with pytest.raises(
        UserError, match="'known', 'unknown'.*hold folders of the same names, 'cat'"
    ):
        annotate(["ds"])


def test_a_copy_of_the_data_set_among_its_classes():
    """As an archive that was unpacked there leaves; a class' own name in it is none."""
    numbered("ds/cat", "ds/dog/dog", "ds/Photos/Cat", "ds/Photos/dog")
    with pytest.raises(UserError, match="'Photos'.*hold folders of the same names, 'cat', 'dog'"):
        annotate(["ds"])
    annotate(["ds", "--nested"])
    assert classes() == ["Photos", "cat", "dog"]


@pytest.mark.parametrize(
    "folders",
    [
        ["cat/images", "dog/images"],
        ["cat/2019", "cat/2020", "dog/2021"],
    ],
)
def test_folders_in_class_folders(folders):
    numbered(*(f"ds/{folder}" for folder in folders))
    annotate(["ds"])
    assert classes() == sorted({folder.split("/")[0] for folder in folders})


def split_of(*words):
    """(training, test) paths of ds by utils.annotation."""
    annotate(["ds", "--force", *words])
    return [
        {line.partition(";")[2] for line in Path(f"model_data/cls_{name}.txt").open()}
        for name in ("train", "test")
    ]


def test_a_split_stays_when_the_data_set_grows():
    numbered("ds/cat", "ds/dog", count=150)
    train, test = split_of()
    assert 40 <= len(test) <= 80  # a fifth of 300
    tree("ds/cat/!first.png", "ds/dog/new/0.png", *(f"ds/cat/1{i}x.png" for i in range(30)))
    numbered("ds/bird", count=40)
    os.unlink("ds/cat/3.png")
    os.rename("ds/dog/4.png", "ds/dog/renamed.png")
    after_train, after_test = split_of()
    gone = {"ds/cat/3.png\n", "ds/dog/4.png\n"}
    assert train - gone <= after_train and test - gone <= after_test
    assert split_of("--seed", "1")[1] != after_test
    assert len(split_of("--test-share", "0.5")[1]) > 2 * len(test)


@pytest.mark.parametrize(
    "count, share", [(1, "0.5"), (2, "0.01"), (2, "0.99"), (3, "0.2"), (9, "0.9")]
)
def test_small_classes_are_split(count, share):
    """Each class of two pictures or more trains and is tested."""
    numbered(*(f"ds/{name}" for name in "abcdef"), count=count)
    numbered("ds/large", count=20)
    train, test = split_of("--test-share", share)
    for name in "abcdef":
        assert any(f"/{name}/" in path for path in train)
        assert any(f"/{name}/" in path for path in test) == (count > 1)


def test_a_class_that_loses_its_training_pictures(capsys):
    numbered("ds/train/a", "ds/train/b", "ds/train/c", "ds/test/a", "ds/test/b", "ds/test/c")
    for path in Path("ds/train/b").iterdir():
        path.write_bytes(b"nothing")
    annotate(["ds", "--check"])
    assert "WARNING: no or few training pictures" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--test-share", "1"], "--test-share 1.0 must be above 0 and below 1"),
        (["--test-share", "20"], "--test-share 20.0 must be"),
        (["--test-share", "nan"], "--test-share nan must be"),
        (["--shrink", "0"], "--shrink 0 must be 1 or more"),
        (["--shrink", "-3"], "--shrink -3 must be 1 or more"),
    ],
)
def test_numbers_out_of_range_are_named(words, sentence):
    numbered("ds/a", "ds/b")
    with pytest.raises(UserError, match=sentence):
        annotate(["ds", *words])


def test_a_path_with_blanks():
    with pytest.raises(UserError, match="a path with blanks needs quotes: 'Obst und Früchte'"):
        annotate(["Obst", "und", "Früchte", "--check"])


def test_what_is_left_out_is_named(capsys):
    numbered("ds/cat", "ds/dog")
    Path("ds/cat/IMG 1.HEIC").touch()
    Path("ds/notes").touch()
    annotate(["ds"])
    out = capsys.readouterr().out
    assert "not read, convert pictures to JPEG or PNG: 'ds/cat/IMG 1.HEIC'" in out
    assert "files (no ending) that are not read" in out and ": 'ds/notes'\n" in out


def test_what_is_left_out_is_counted_once(capsys):
    numbered("ds/train/a", "ds/train/b")
    for folder in ("ds", "ds/train"):
        Path(folder, "notes.txt").write_text("no picture")
        tree(f"{folder}/cover.png")
    annotate(["ds"])
    out = capsys.readouterr().out
    assert "left out (2): files (.txt)" in out and "left out (2): pictures outside" in out


@pytest.mark.parametrize(
    "folders, words",
    [
        (["train/steam", "train/electric", "car"], "'car', 'train'"),
        (["train", "test"], "'test', 'train'"),
        (["train/a", "test"], "'test', 'train'"),
        (["test/a"], "'test'"),
        (["train/a", "test", "bus"], "'bus', 'test', 'train'"),
    ],
)
def test_ambiguous_folders_are_refused(folders, words):
    numbered(*(f"ds/{folder}" for folder in folders))
    with pytest.raises(UserError, match=f"holds {words}: make it"):
        annotate(["ds"])
    assert not os.path.exists("model_data/cls_train.txt")


@pytest.mark.parametrize("name", ["👩‍🔬", "a\u00a0b", "ﬁ", "a\u2028b", "עברית", "e\u0301", ";#"])
def test_odd_class_names_are_kept(name):
    numbered(f"ds/{name}", "ds/zz")
    annotate(["ds"])
    assert Path("model_data/cls_classes.txt").read_text(encoding="utf-8").split("\n")[
        :-1
    ] == sorted([normalize("NFC", name), "zz"])
    annotate(["ds"])  # the class file is read as it was written


@pytest.mark.parametrize("name", ["a\n", "a\nb", b"\xff\xfe"])
def test_class_names_that_no_file_can_hold(name, capsys):
    numbered("ds/yy", "ds/zz", "ds/new")
    os.rename(b"ds/new", os.path.join(b"ds", os.fsencode(name)))
    annotate(["ds"])
    assert classes() == ["yy", "zz"]
    assert "left out (5): paths with a line break or letters that are" in capsys.readouterr().out


@pytest.mark.parametrize("name", [" a", "a\u2003", "a "])
def test_class_names_with_space_around_them(name):
    """They are read as they are written."""
    numbered(f"ds/{name}", "ds/zz")
    for _ in range(2):
        annotate(["ds"])
    assert classes() == ["a", "zz"]


def test_lists_that_another_one_writes_meanwhile_are_kept(monkeypatch):
    numbered("birds/crow", "birds/tit", "fish/eel", "fish/cod")
    from utils import annotation

    check = annotation.check_pictures

    def slow_check(paths):
        if "fish" in paths[0]:
            annotate(["birds"])
        return check(paths)

    monkeypatch.setattr(annotation, "check_pictures", slow_check)
    with pytest.raises(UserError, match="other classes or another order.*--force"):
        annotate(["fish", "--check"])
    assert classes() == ["crow", "tit"]


@pytest.mark.parametrize("output", ["blocked/list", "/proc/list", "blocked/"])
def test_outputs_that_cannot_be_made_are_found_first(output, monkeypatch):
    numbered("ds/cat", "ds/dog")
    Path("blocked").write_text("a file")
    monkeypatch.setattr("utils.annotation.collect", None)
    with pytest.raises(UserError, match="cannot be written.*--out"):
        annotate(["ds", "--check", "--out", output])


def test_a_linked_list_is_replaced():
    """What it leads to stays."""
    numbered("ds/train/cat", "ds/train/dog", count=4)
    numbered("ds/test/cat", "ds/test/dog", count=1)
    Path("far.txt").write_text("old")
    for name in ("a_classes.txt", "a_train.txt", "a_test.txt"):
        os.symlink("far.txt", name)
    annotate(["ds", "--out", "a", "--force"])
    assert Path("far.txt").read_text() == "old" and Path("a_train.txt").read_text().count("\n") == 8
    assert (
        Path("a_test.txt").read_text().count("\n") == 2
        and Path("a_classes.txt").read_text() == "cat\ndog\n"
    )


REFUSALS = UserError, FileNotFoundError  # a list is away while it is replaced


def reader():
    """What train.py does, in three parts; an error, or names and lists that belong together."""
    version = lists.version(DEFAULT_PATHS[1])
    names, _ = lists.get_classes(DEFAULT_PATHS[0])
    yield
    train = Path(DEFAULT_PATHS[1]).read_text().split()
    yield
    test = Path(DEFAULT_PATHS[2]).read_text().split()
    settings = dict(zip(lists.PATH_SETTINGS, DEFAULT_PATHS))
    lists.clean_lists(train, test, settings, names, version)
    pairs = [
        (names[int(label)], path.split("/")[1])
        for label, path in map(lists.split_line, train + test)
    ]
    assert all(name == folder for name, folder in pairs) and len({*train, *test}) == len(
        pairs
    ) == 5 * len(names)


def refuses(steps):
    """Whether a reader ends in an error."""
    try:
        return [*steps] and False
    except REFUSALS:
        return True


def instants(monkeypatch, act):
    """Call act(number, name of the function) before each step of writing files."""
    count = iter(range(1000))
    for name in ("replace", "unlink", "fsync"):
        real = getattr(os, name)

        def step(*words, real=real, name=name, **options):
            act(next(count), name)
            return real(*words, **options)

        monkeypatch.setattr(os, name, step)

    def unlink(path, missing_ok=False):  # Python 3.10's own has kept the os.unlink of before
        try:
            os.unlink(path)
        except FileNotFoundError:
            if not missing_ok:
                raise

    monkeypatch.setattr(Path, "unlink", unlink)
    # some file systems have nameless files, others unlink what is tried
    monkeypatch.setattr("utils.annotation.make_folder", lambda *words: None)
    return count


def two_sets(new_class=True):
    """Lists of two classes, and another split to write now, with a third class before them."""
    numbered("ds/b", "ds/c")
    annotate(["ds"])
    if new_class:
        numbered("ds/a")
    return ["ds", "--force", "--seed", "3"]


# Three lists are taken away; each of three files is made safe, put into place, its draft cleared
INSTANTS = 3 + 3 * 3


@pytest.mark.parametrize("new_class", [True, False])
def test_whoever_reads_meanwhile_gets_what_belongs_together(monkeypatch, new_class):
    """A reader that reads its three files at any three instants."""
    words, waiting, ends = two_sets(new_class), [], []
    last = INSTANTS

    def act(now, name=""):
        assert now <= last
        for schedule, steps in waiting:
            if now in schedule:
                try:
                    for _ in range(schedule.count(now)):
                        next(steps)
                except (*REFUSALS, StopIteration) as end:
                    ends.append((schedule, type(end)))
        waiting[:] = [
            (schedule, steps) for schedule, steps in waiting if schedule not in dict(ends)
        ]

    waiting += [
        ((i, j, k), reader())
        for i in range(last + 1)
        for j in range(i, last + 1)
        for k in range(j, last + 1)
    ]
    with monkeypatch.context() as patch:
        count = instants(patch, act)
        annotate(words)
        act(next(count))
    assert not waiting and {kind for _, kind in ends} == {*REFUSALS, StopIteration}
    assert dict(ends)[0, 0, 0] == dict(ends)[last, last, last] == StopIteration
    assert dict(ends)[6, 6, 6] in REFUSALS
    assert len(listed()) == 10 + 5 * new_class and not refuses(reader())


def test_a_kill_at_any_instant(monkeypatch):
    """train.py refuses, or reads what belongs together, and the same command mends it."""
    words, number, refused = two_sets(), 0, 0
    while True:
        child = os.fork()
        if not child:
            instants(
                monkeypatch, lambda now, _: now == number and os.kill(os.getpid(), signal.SIGKILL)
            )
            annotate(words)
            os._exit(0)
        ended = os.waitpid(child, 0)[1]
        refused += refuses(reader())
        assert lists.get_classes(DEFAULT_PATHS[0])[0] in (["b", "c"], ["a", "b", "c"])
        annotate(words)
        assert len(listed()) == 15 and not refuses(reader())
        if not ended:
            break
        number += 1
        annotate(["ds", "--force", "--seed", str(number)])
    assert number == INSTANTS and refused == 10


@pytest.mark.parametrize("file", [0, 1, 2])
def test_a_full_disk(file, monkeypatch):
    """Nobody finds what does not belong together, and with some room the same command mends it."""
    words, written = two_sets(), []

    def full(now, name):
        if name == "fsync":
            written.append(now)
            if len(written) == file + 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        instants(patch, full)
        with pytest.raises(UserError, match="No space left"):
            annotate(words)
    assert refuses(reader())
    annotate(words)
    assert len(listed()) == 15 and not refuses(reader()) and len(os.listdir("model_data")) == 3


@pytest.mark.parametrize(
    "folders, given, named",
    [
        (["ds/train", "ds/test"], "ds", "'test', 'train'"),
        (["ds/train"], "ds", "'train'"),
        (["up/ds/cat", "up/ds/dog"], "up", "classes: 'ds'"),
        (["up/ds/train/cat", "up/ds/test/cat"], "up", "classes: 'ds'"),
        (["ds/train/cat", "ds/test/cat"], "ds", "classes: 'cat'"),
        (["ds/cat"], "ds", "classes: 'cat'"),
        (["ds"], "ds", "classes: none; .* make a folder of pictures for each class"),
    ],
)
def test_one_class_is_nothing_to_learn(folders, given, named):
    numbered(*folders)
    Path(given, "papers").mkdir()  # without pictures
    with pytest.raises(UserError, match=named):
        annotate([given])
    assert not os.path.exists("model_data/cls_train.txt")


def test_one_class_where_the_other_cannot_be_read():
    numbered("ds/cat", "ds/dog")
    for path in Path("ds/dog").iterdir():
        path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="training and . test pictures, of these classes: 'cat';"):
        annotate(["ds", "--check"])


def test_one_name_in_two_spellings():
    """é is one character on one disk and two on another.

    The class is one, and each path is as it lies there.
    """
    one, two = normalize("NFC", "café"), normalize("NFD", "café")
    numbered(f"ds/train/{one}", f"ds/train/{two}", "ds/train/tea", f"ds/test/{two}", "ds/test/tea")
    annotate(["ds"])
    assert classes() == [one, "tea"] and sum(listed().values()) == 25
    assert {line.rpartition("/")[0] for line in listed()} == {
        f"0;ds/train/{one}",
        f"0;ds/train/{two}",
        f"0;ds/test/{two}",
        "1;ds/train/tea",
        "1;ds/test/tea",
    }
    assert all(os.path.isfile(line.partition(";")[2]) for line in listed())


def test_what_operating_systems_leave_behind(capsys):
    numbered(
        "ds/cat",
        "ds/dog",
        "ds/@eaDir",
        "ds/cat/@eaDir",
        "ds/$RECYCLE.BIN",
        "ds/.ipynb_checkpoints",
        "ds/dog/.Trash-1000",
    )
    tree("ds/cat/._0.png", "ds/__MACOSX/cat/._0.png")
    Path("ds/lost+found").mkdir()
    Path("ds/cat/.DS_Store").write_text("nothing")
    annotate(["ds"])
    assert (
        classes() == ["cat", "dog"]
        and sum(listed().values()) == 10
        and "left out" not in capsys.readouterr().out
    )


def test_a_folder_without_pictures_is_no_class(capsys):
    numbered("ds/cat", "ds/dog", "ds/papers")
    for path in Path("ds/papers").iterdir():
        path.rename(path.with_suffix(".heic"))
    annotate(["ds"])
    assert (
        classes() == ["cat", "dog"]
        and "left out (5): files (.heic) that are not read" in capsys.readouterr().out
    )


def test_a_folder_without_any_picture_that_is_read(capsys):
    numbered("ds/cat", "ds/dog")
    for path in Path("ds").rglob("*.png"):
        path.rename(path.with_suffix(".heic"))
    with pytest.raises(UserError, match="'ds' gives 0 training and 0 test pictures"):
        annotate(["ds"])
    assert "left out (10): files (.heic) that are not read" in capsys.readouterr().out


def test_names_do_not_move_the_cursor(capsys):
    numbered("ds/\x1b[2Jcat", "ds/dog\u202e")
    Path("ds/dog\u202e/\x1b]0;x\x07.png").write_text("nothing")
    Path("ds/dog\u202e/a.\x1b[1m").write_text("nothing")
    annotate(["ds", "--check"])
    out, err = capsys.readouterr()
    assert (
        out.replace("×", "x").isascii()
        and "\x1b" not in out + err
        and out.count("\\x1b[2Jcat") == 1
        and "unreadable: ds/dog\\u202e/\\x1b]0;x\\x07.png" in out
    )


@pytest.mark.parametrize(
    "name, words",
    [("ds ", "'ds ' is not a folder"), ("~/ds", "write the whole path"), ("ds\\cat", "backslash")],
)
def test_folders_that_are_not_there(name, words):
    numbered("ds/cat")
    with pytest.raises(UserError, match=words):
        annotate([name])


def where(path):
    return f"{path} {os.getpid()}"


@pytest.mark.parametrize("number", [1, 3])
def test_as_many_processes_as_cores(number, monkeypatch):
    monkeypatch.setattr("utils.plumbing.shrink.cores", lambda: number)
    processes = {
        text.split()[1] for text in on_all_cores(where, [*map(str, range(50))], "tried").values()
    }
    assert len(processes) == number and str(os.getpid()) not in processes


def test_few_items_start_few_processes(monkeypatch):
    """Each imports torch where processes are spawned."""
    monkeypatch.setattr("utils.plumbing.shrink.cores", lambda: 16)
    processes = {text.split()[1] for text in on_all_cores(where, ["a", "b"], "tried").values()}
    assert len(processes) == 1


def fragile(path):
    if "deadly" in path:
        os.kill(os.getpid(), signal.SIGKILL)
    if "wrong" in path:
        raise OSError("wrong")
    return path.upper()


def without_memory(path):
    raise MemoryError


@pytest.mark.parametrize("number", [1, 2])
def test_a_machine_without_memory_makes_no_picture_unreadable(number, monkeypatch):
    monkeypatch.setattr("utils.plumbing.shrink.cores", lambda: number)
    with pytest.raises(MemoryError):
        on_all_cores(without_memory, ["a", "b"], "tried")


@pytest.mark.parametrize("number", [1, 2])
def test_items_that_cannot_be_read(number, monkeypatch, capsys):
    monkeypatch.setattr("utils.plumbing.shrink.cores", lambda: number)
    items = [f"{i}" for i in range(60)]
    assert on_all_cores(fragile, [*items, "wrong"], "tried") == {item: item for item in items}
    out, err = capsys.readouterr()
    assert (
        out == "unreadable: wrong (OSError: wrong)\n"
        and "tried 61/61 0:00:00 left 1 unreadable" in err
    )
    assert on_all_cores(fragile, [], "tried") == {}


@pytest.mark.parametrize("number", [1, 2])
def test_a_killed_process_ends_it(number, monkeypatch):
    """In one sentence."""
    monkeypatch.setattr("utils.plumbing.shrink.cores", lambda: number)
    items = [f"{i}" for i in range(100)]
    items[40] = "deadly"
    with pytest.raises(RuntimeError) as caught:
        on_all_cores(fragile, items, "tried")
    assert "memory" in explain(caught.value) and "\n" not in explain(caught.value)


def of_sigterm(item):
    return signal.getsignal(signal.SIGTERM)


def test_workers_can_be_ended():
    """One may wait for ever for a lock of another that was killed, and the program for it."""
    assert on_all_cores(of_sigterm, ["one"], "tried") == {"one": signal.SIG_DFL}


ADAM = "--optimizer_type adam --Init_lr 4e-3 --Unfreeze_batch_size"


@pytest.mark.parametrize(
    "count, size, side, words, note",
    [
        (50, (300, 225), 224, f"{ADAM} 16 --UnFreeze_Epoch 84", "a usual picture is 300×225"),
        (200, (100, 100), 224, f"{ADAM} 16 --UnFreeze_Epoch 20", "a usual picture is 100×100"),
        (20, (640, 120), 224, f"{ADAM} 8 --UnFreeze_Epoch 100 --resize squeeze", "81% of it away"),
        (4, (1000, 1200), 224, f"{ADAM} 8 --UnFreeze_Epoch 100", "--shrink 512"),
        (50, (28, 28), 96, f"{ADAM} 16 --UnFreeze_Epoch 84", "28×28"),
        (320, (48, 30), None, '--input_shape "[30,48]" --UnFreeze_Epoch 50', "48×30"),
        (
            320,
            (512, 32),
            None,
            '--input_shape "[32,224]" --UnFreeze_Epoch 50 --resize squeeze',
            "[32, 224] cuts 56% of it away",
        ),
    ],
)
def test_what_is_to_be_pasted(count, size, side, words, note, capsys):
    """A command that fits the pictures, whose settings train.py takes."""
    tree(*(f"ds/train/{name}/{i}.png" for name in "ab" for i in range(count)), size=size)
    tree("ds/test/a/0.png", "ds/test/b/0.png")
    annotate(["ds"])
    out = capsys.readouterr().out
    if side:
        words = f'--pretrained True --backbone resnet18 --input_shape "[{side},{side}]" {words}'
    assert note in out and out.splitlines()[-1] == f"python train.py {words}"
    settings, _ = command_line(dict(vars(train_module)), shlex.split(words))
    check_settings(settings)
    assert describe_few_steps(settings, 2 * count) == ""


def test_lists_elsewhere_are_named_to_be_pasted(capsys):
    numbered("ds/cat", "ds/dog")
    annotate(["ds", "--out", "other lists/a"])
    assert (
        capsys.readouterr()
        .out.splitlines()[-1]
        .endswith(
            " --classes_path 'other lists/a_classes.txt' "
            "--train_annotation_path 'other lists/a_train.txt' "
            "--test_annotation_path 'other lists/a_test.txt'"
        )
    )


def test_what_is_pasted_on_windows(capsys, monkeypatch):
    """Its shell knows no single quotes, and takes a backslash as it is."""
    monkeypatch.setattr(console, "os", SimpleNamespace(name="nt"))
    assert console.shell_words(["other lists/a", "model_data\\mine"]) == (
        '"other lists/a" model_data\\mine'
    )


@pytest.mark.parametrize("text", ["", "a\na\n"])
def test_a_broken_class_file_can_be_overwritten(text):
    numbered("ds/cat", "ds/dog")
    Path("model_data").mkdir()
    Path("model_data/cls_classes.txt").write_text(text)
    with pytest.raises(UserError, match="--force overwrites it"):
        annotate(["ds"])
    annotate(["ds", "--force"])
    assert Path("model_data/cls_classes.txt").read_text() == "cat\ndog\n"


def test_a_list_that_cannot_be_removed_is_one_sentence():
    numbered("ds/cat", "ds/dog")
    Path("model_data/cls_test.txt/inside").mkdir(parents=True)
    with pytest.raises(UserError, match="cls_test.txt could not be written"):
        annotate(["ds"])


def test_an_unreadable_header_is_no_hindrance(capsys):
    numbered("ds/cat", "ds/dog", "ds/eel")
    for path in Path("ds/eel").iterdir():
        path.write_bytes(b"nothing")
    annotate(["ds"])
    assert "a usual picture is 4×4" in capsys.readouterr().out


SLOW = """
import sys, time
from utils.annotation import main
import utils.plumbing.shrink
def work(path):
    open("begun", "w").close()
    time.sleep(60)
utils.plumbing.shrink.check = work
if __name__ == "__main__":
    main(["ds", "--check"])
"""


def test_ctrl_c_ends_a_check_at_once():
    """Without a word, and none of them is left."""
    numbered("ds/cat", "ds/dog", count=10)
    Path("slow.py").write_text(SLOW)
    root = Path(__file__).resolve().parent.parent
    with open("out.txt", "w") as out:
        process = subprocess.Popen(
            [sys.executable, "slow.py"],
            env={**environment(), "PYTHONPATH": str(root)},
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def group():
        with suppress(ProcessLookupError):
            os.killpg(process.pid, 0)
            return True

    while not os.path.exists("begun"):
        assert process.poll() is None, Path("out.txt").read_text()
        time.sleep(0.05)
    begin = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == -signal.SIGINT
    while group():
        assert time.monotonic() - begin < 60
        time.sleep(0.1)
    assert Path("out.txt").read_text() == "looking for pictures in ds\n"


@pytest.mark.parametrize("shrunk", [False, True])
@pytest.mark.parametrize("side", [300, 1000])
def test_copies_of_large_photos_are_advised_once(tmp_path, side, shrunk):
    paths = [tmp_path / f"{i}.jpg" for i in range(4)]
    for path in paths:
        Image.new("RGB", (side + 200, side)).save(path)
    _, notes = advise([(path, "name") for path in paths], 2, shrunk)
    assert f"{side + 200}×{side}" in notes[0]
    assert any("--shrink" in note for note in notes) == (side == 1000 and not shrunk)


def test_the_advised_size_is_one_that_the_network_takes(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    for path in paths:
        Image.new("RGB", (40, 6)).save(path)
    pairs = [(path, "name") for path in paths] * 60
    settings, _ = advise(pairs, 2, False)
    assert settings["input_shape"] == '"[8,40]"'
