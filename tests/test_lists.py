"""Class names and annotation lines: what is wrong with them becomes one sentence that names it."""

import contextlib
import os
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nets._weights import load_weights
from utils.dataloader import DataGenerator
from utils.plumbing import lists, sample, shapes
from utils.plumbing.errors import UserError
from utils.plumbing.settings import describe_few_steps

NAMES = "classes_path", "train_annotation_path", "test_annotation_path"


def lines_of(text, classes=3):
    lines = text.splitlines(keepends=True)
    return lists.clean_lines(lines, "list.txt", classes, "classes.txt")[0]


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("0;a\nno separator\n", "list.txt:2 is not"),
        ("0;a\n\nx;a\n", "list.txt:3: the class id 'x'"),
        ("-1;a\n", "class id -1 is outside 0 … 2"),
        ("3;a\n", "class id 3 is outside.*classes.txt"),
        ("1.0;a\n", "whole number like 0 or 12"),
        ("0;\n", "list.txt:1 is not"),
        (";a\n", "''"),
        ("0_0;a\n", "whole number"),
        ("+0;a\n", "whole number"),
        ("٠;a\n", "whole number"),
        ("9" * 5000 + ";a\n", "whole number"),
        (
            "0;a\n1;gone\n2;gone too\n0;b\n1;3\n1;4\n",
            "5 of 6 pictures do not exist.*the first is list.txt:2 'gone'",
        ),
        ("0;a \n", "list.txt:1 'a '"),
        ("0;~/a\n", "'~/a' .*write the whole path"),
        ("0;x\\a\n", "not by a backslash"),
    ],
)
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
    text = (
        "\ufeff0;a b.jpg\r\n\r\n\ufeff1;x;y.jpg\r\n 2 ;漢字/é ü.png\n   \n0;"
        + str(tmp_path / "plain")
        + "\n1;trailing "
    )
    kept = lines_of(text)
    data = DataGenerator(kept, (8, 8))
    assert [data.name(i).partition(";")[2] for i in range(len(data))] == [
        *names[:3],
        str(tmp_path / "plain"),
        "trailing ",
    ]


@pytest.mark.parametrize(
    "content, sentence",
    [
        (None, "does not exist.*python -m utils.annotation"),
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (b"0;a\n0;\xff\xfe\n", "list.txt:2 is not UTF-8"),
        ("folder", "is a folder"),
    ],
)
def test_text_files(tmp_path, monkeypatch, content, sentence):
    monkeypatch.chdir(tmp_path)
    if content == "folder":
        Path("list.txt").mkdir()
    elif content is not None:
        Path("list.txt").write_bytes(content)
    for name in ("classes_path", "train_annotation_path"):
        with pytest.raises(UserError, match=sentence):
            lists.read_text_file(name, "list.txt", "python -m utils.annotation writes it")


def test_class_files(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_bytes("\ufeffcat\r\ndog house\r\n\r\n".encode())
    assert lists.get_classes(path) == (["cat", "dog house"], 2)
    path.write_bytes("cat\rdog\u2028house\r".encode())
    assert lists.get_classes(path) == (["cat", "dog\u2028house"], 2)
    path.write_text("cat\n\ndog\n")
    with pytest.raises(
        UserError, match="classes.txt: class names must be texts, none of them blank"
    ):
        lists.get_classes(path)
    path.write_text("cafe\u0301\ndog\n", encoding="utf-8")
    assert lists.get_classes(path) == (["caf\u00e9", "dog"], 2)
    for text, numbers in (
        ("cat\ndog\ncat\n", (1, 3)),
        ("cafe\u0301\ncaf\u00e9\n", (1, 2)),
        ("password=1234\n" * 2, (1, 2)),  # a run of somebody else may name any file
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(
            UserError, match="more than once: number {} and number {}$".format(*numbers)
        ):
            lists.get_classes(path)


@pytest.fixture
def both(tmp_path, monkeypatch):
    """A function that checks two lists, whose pictures are there."""
    monkeypatch.chdir(tmp_path)
    for path in ("a", "b", "c", "d", "e", "real/b", "other/c"):
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).touch()
    Path("linked").symlink_to("real")

    def check(train, val, classes=3):
        parts = [
            lists.clean_lines(lines, path, classes, "classes.txt")[1]
            for lines, path in ((train, "train.txt"), (val, "test.txt"))
        ]
        lists.check_both(*parts, "train.txt", ["a", "b", "c"])

    return check


def test_two_lists(both, tmp_path, capsys):
    """One picture is one, however its folder is spelled: in both lists, or twice in one."""
    both(["0;a\n", "1;b\n", "2;c\n"], ["1;b\n", "0;c\n", "0;d\n"])
    assert capsys.readouterr().out.count("WARNING") == 1
    both(
        ["0;a", "1;real/b", "0;c", "1;other/c", "1;d"],
        [f"0;{tmp_path}/a", "1;linked/../linked/b", "0;./c", "0;e"],
    )
    assert "3 pictures are in both" in capsys.readouterr().out
    both(["0;a", "1;b", "0;a", "1;./a", "2;a"], ["0;c", "1;./c"])
    out = capsys.readouterr().out
    assert (
        "train.txt: 2 lines" in out
        and "'./a'" in out
        and "test.txt: 1 lines" in out
        and "both" not in out
    )


def test_one_label_is_nothing_to_learn(both):
    with pytest.raises(UserError, match="label '0'.*nothing to tell apart"):
        both(["0;a", "0;b"], ["0;c", "1;d"])


def test_classes_without_training_pictures(both, monkeypatch, capsys):
    both(["0;a", "2;b"], ["1;c"])
    assert (
        "classes without training pictures, which cannot be learnt (1): b\n"
        in capsys.readouterr().out
    )
    both(["0;a", "1;b", "2;c"], ["1;d"])
    monkeypatch.setattr(lists, "read_label", lambda label, classes: label)
    both(["0.5;a", "7;b"], ["1;d"])  # of another task
    assert capsys.readouterr().out == ""


def test_lists_that_change_while_they_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        Path(name).touch()
    given = dict(zip(NAMES, ("classes.txt", "train.txt", "test.txt")))
    lines = ["0;a\n", "1;b\n"]
    Path("train.txt").write_text("".join(lines))
    version = lists.version("train.txt")
    assert lists.clean_lists(lines, lines, given, ["a", "b"], version) == (["0;a", "1;b"],) * 2
    for replaced in (lambda: Path("new").write_text("0;b\n"), lambda: os.unlink("train.txt")):
        replaced()
        if os.path.exists("new"):
            os.replace("new", "train.txt")
        with pytest.raises(UserError, match="being written"):
            lists.clean_lists(lines, lines, given, ["a", "b"], version)


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_every_reader_knows_all_line_ends(tmp_path, ending):
    path = tmp_path / "list.txt"
    path.write_bytes(ending.join(["0;a b", "1;c", ""]).encode())
    with open(path, encoding="utf-8") as file:
        assert [line.rstrip("\n") for line in file] == lists.read_lines("annotation", path)


@pytest.mark.parametrize("text", ["0;a\n1;b\n", "\ufeff12;a b.jpg\r\n0;c;d\r\n", "0;a\r2;b\rcat"])
def test_a_list_given_for_the_class_file(tmp_path, text):
    path = tmp_path / "list.txt"
    path.write_bytes(text.encode())
    with pytest.raises(UserError, match="holds lines of .class_id;path."):
        lists.get_classes(path)


@settings(max_examples=300)
@given(
    st.binary(max_size=80) | st.text(alphabet="0129;:/.a\n\r \ufeff-", max_size=40).map(str.encode),
    st.integers(1, 4),
)
def test_random_bytes_as_annotation(tmp_path_factory, data, classes):
    path = tmp_path_factory.getbasetemp() / "fuzz.txt"
    path.write_bytes(data)
    try:
        lists.read_text_file("train_annotation_path", str(path), "write it")
        with open(path, encoding="utf-8") as f:
            kept, _ = lists.clean_lines(f.readlines(), "fuzz.txt", classes, "classes")
        dataset = DataGenerator(kept, (8, 8))
        assert [dataset.name(i) for i in range(len(dataset))] == kept
    except UserError as error:
        assert "\n" not in str(error)


def test_pictures_in_a_folder_that_may_not_be_listed(tmp_path, monkeypatch):
    """Entering is allowed, and so is reading: each file is asked for."""
    (tmp_path / "there.jpg").touch()

    def refuse(folder):
        raise PermissionError(13, "Permission denied", folder)

    monkeypatch.setattr(lists.os, "listdir", refuse)
    lines = [f"0;{tmp_path}/there.jpg\n"]
    assert lists.clean_lines(lines, "list", 1, "classes")[0] == [lines[0].strip()]
    with pytest.raises(UserError, match="1 of 2 pictures do not exist .*list:2 .*absent.jpg"):
        lists.clean_lines([*lines, f"0;{tmp_path}/absent.jpg\n"], "list", 1, "classes")


def test_a_million_lines_are_checked_quickly_enough(tmp_path):
    """No timing here (the benchmark has it): that folders are listed, not every file asked for."""
    for i in range(50):
        (tmp_path / f"{i}.jpg").touch()
    lines = [f"{i % 3};{tmp_path}/{i % 50}.jpg\n" for i in range(20_000)]
    calls = []
    real = os.path.isfile
    try:
        lists.os.path.isfile = lambda path: calls.append(path) or real(path)
        assert len(lists.clean_lines(lines, "list", 3, "classes")[0]) == 20_000
    finally:
        lists.os.path.isfile = real
    assert not calls


def test_shapes_are_drawn_where_train_stands_alone(tmp_path, monkeypatch):
    """In another folder an absent list is a mistake."""
    monkeypatch.setattr(sample, "PROJECT", tmp_path / "project")
    monkeypatch.setattr(shapes, "draw_set", None)
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="cls_train.txt does not exist in .*cd .*project"):
        sample.find_lists(dict(zip(NAMES, lists.DEFAULT_PATHS)))
    assert os.listdir() == ["project"]


def test_a_folder_with_a_zero_in_its_name():
    """As a file's block has that a crash has emptied."""
    with pytest.raises(UserError, match="1 of 1 pictures do not exist"):
        lists.clean_lines(["0;pho\0tos/a.jpg"], "list.txt", 1, "classes.txt")


def test_no_shapes_are_drawn_for_a_run_that_had_its_own_lists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "PROJECT", tmp_path)
    monkeypatch.setattr(shapes, "draw_set", lambda *words: pytest.fail("drawn"))
    settings = dict(zip(NAMES, lists.DEFAULT_PATHS))
    with pytest.raises(UserError, match="classes_path: 'model_data/cls_classes.txt' .* not exist"):
        sample.find_lists(settings, {"settings": settings})


def test_the_first_run_goes_on_with_its_shapes(tmp_path, monkeypatch):
    """Lists of one's own, written since, are for a new run."""
    monkeypatch.chdir(tmp_path)
    drawn = tuple(f"model_data/shapes/{name}.txt" for name in ("classes", "train", "test"))
    for path in (*drawn, *lists.DEFAULT_PATHS):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text("a")
    config = {"settings": dict(zip(NAMES, drawn))}
    settings = dict(zip(NAMES, lists.DEFAULT_PATHS))
    for trained, paths in ((False, lists.DEFAULT_PATHS), (True, drawn)):
        assert sample.find_lists(settings, {**config, "trained": trained}) == paths
        assert tuple(settings.values()) == paths


@pytest.mark.parametrize(
    "number, epochs, batch_size, accumulate, needed",
    [(5000, 3, 32, 1, None), (75, 15, 32, 1, 100), (640, 5, 32, 2, 30), (640, 30, 32, 2, None),
     (20, 150, 8, 1, None), (4, 1, 8, 1, 100), (640, 5, 64, 3, 75)],
)  # fmt: skip
def test_too_few_steps_are_noted(number, epochs, batch_size, accumulate, needed):
    settings = dict(UnFreeze_Epoch=epochs, Unfreeze_batch_size=batch_size, accumulate=accumulate)
    note = describe_few_steps(settings, number)
    assert note.endswith(f"--UnFreeze_Epoch {needed}") if needed else note == ""


def test_what_a_killed_drawing_of_the_sample_leaves_is_cleared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "PROJECT", tmp_path)
    monkeypatch.setattr(
        "utils.plumbing.shapes.draw_set", lambda folder, place: Path(folder, "train.txt").touch()
    )
    Path("model_data/.shapes.abcd.draft").mkdir(parents=True)
    os.utime("model_data/.shapes.abcd.draft", (0, 0))
    assert (
        sample.find_lists(dict(zip(NAMES, lists.DEFAULT_PATHS)))[1] == "model_data/shapes/train.txt"
    )
    assert os.listdir("model_data") == ["shapes"] and os.listdir("model_data/shapes") == [
        "train.txt"
    ]


@pytest.mark.parametrize("names", [[], [0, 1], range(2), ["a", "a"], [b"a", "b"]])
def test_names_that_are_none(names):
    with pytest.raises(UserError, match="own_data.*(must be texts|more than once)"):
        lists.clean_names(names, "own_data")


def test_names_of_a_dictionary():
    assert lists.clean_names({"cat": 0, "dog": 1}, "own_data") == ["cat", "dog"]


@pytest.mark.parametrize(
    "beside, warned", [("a\nb\n", False), ("a\nb\nc\n", False), ("b\nc\n", True), (None, False)]
)
def test_lists_that_were_written_with_other_classes(tmp_path, monkeypatch, capsys, beside, warned):
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.png"):
        Path(name).touch()
    Path("cls_classes.txt").write_text("a\nb\n")
    if beside:
        Path("new_classes.txt").write_text(beside)
    paths = "cls_classes.txt", "new_train.txt", "new_test.txt"
    for path in paths[1:]:
        Path(path).write_text("0;a.png\n1;b.png\n")
    lines = Path(paths[1]).read_text().splitlines()
    version = lists.version(paths[1])
    lists.clean_lists(lines, lines, dict(zip(NAMES, paths)), ["a", "b"], version)
    out = capsys.readouterr().out
    assert out.count("new_classes.txt, which lies beside new_t") == 2 * warned


@pytest.mark.parametrize(
    "path, why",
    [
        ("model_data\train.txt", "a backslash begins an escape"),
        ("~/train.txt", "outside of a shell"),
        ("model_data\\own.txt", "divided by '/'"),
    ],
)
def test_why_a_path_leads_nowhere(path, why):
    """The first holds a tab, which is shown as it was typed."""
    for read in (partial(lists.read_text_file, "classes_path"), load_weights):
        with pytest.raises(UserError, match=f"does not exist .*{why}"):
            read(path)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"Init_lr": 0.02}, "Init_lr differs between the processes .0.01 and 0.02"),
        ({"new": 7}, "new differs between the processes .7 and absent"),
        ({"mine": 3}, "mine differs between the processes .2 and 3"),
        ({"Cuda": True}, "Cuda differs between the processes .False and True.*a GPU where Cuda"),
        ({"num_workers": 7, "cache_mb": 1, "fp16": "float32"}, None),
        ({"classes_path": "elsewhere.txt", "save_dir": "there"}, None),
    ],
)
def test_machines_with_other_settings(monkeypatch, change, named):
    """What is edited in one machine's train.py alone would train a wrong network in silence."""
    settings = {"Init_lr": 0.01, "mine": 2, "num_workers": 1, "Cuda": False, "cache_mb": 5}
    settings.update(fp16="auto", classes_path="c.txt", save_dir="logs")
    data = DataGenerator(["0;a.png"], (8, 8), num_classes=2)

    def gather(own):
        other = {**own, **{name: str(change[name]) for name in own if name in change}}
        other.update(new="7") if change == {"new": 7} else None
        return [own, other]

    monkeypatch.setattr(lists, "gather_objects", gather)
    with pytest.raises(UserError, match=named) if named else contextlib.nullcontext():
        lists.check_same_everywhere(settings, data, data)
