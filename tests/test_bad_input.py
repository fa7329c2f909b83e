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

import train as trainer
from nets import get_model
from nets._weights import load_weights
from tests.helpers import make_data, make_project, start, train
from utils import lists, settings as rules
from utils.dataloader import DataGenerator
from utils.errors import UserError

CONSTANTS = {name: getattr(trainer, name) for name in rules.RULES}


def settings_with(**changes):
    return {**CONSTANTS, "Cuda": False, "fp16": False, "distributed": False, **changes}


WRONG = [
    (dict(optimizer_type="sdg"), "'sgd', 'adam', 'adamw'.*did you mean 'sgd'"), (dict(lr_decay_type="cosine"), "'cos', 'step'"),
    (dict(Unfreeze_batch_size=0), "Unfreeze_batch_size = 0 must be"), (dict(Freeze_batch_size=-4), "Freeze_batch_size"),
    (dict(UnFreeze_Epoch=0), "UnFreeze_Epoch"), (dict(Init_Epoch=10, UnFreeze_Epoch=10), "must be below"),
    (dict(Freeze_Train=True, Freeze_Epoch=30), "Freeze_Epoch = 30"), (dict(Min_lr=1.0), "Min_lr = 1.0 must be at most"),
    (dict(Init_lr=0), "Init_lr"), (dict(Init_lr=float("nan")), "Init_lr"), (dict(Init_lr="0.1"), "Init_lr = '0.1'"),
    (dict(momentum=1.0), "momentum"), (dict(weight_decay=-1), "weight_decay"), (dict(input_shape=[64]), r"\[height, width\]"),
    (dict(input_shape=64), "input_shape"), (dict(input_shape=[0, 64]), "input_shape"), (dict(backbone=18), "backbone"),
    (dict(fp16=1), "fp16 = 1 is none of its choices: True, False"), (dict(num_workers=-1), "num_workers"), (dict(num_workers=1.5), "num_workers"),
    (dict(save_period=0), "save_period"), (dict(seed=-1), "seed"), (dict(augmentation="flop"), "did you mean 'flip'"),
    (dict(label_smoothing=1.0), "label_smoothing"), (dict(random_erasing=2), "random_erasing"), (dict(mixup_alpha=-1), "mixup_alpha"),
    (dict(class_weights=True), "class_weights"), (dict(ema_decay=1), "ema_decay"), (dict(accumulate=0), "accumulate"),
    (dict(early_stop=-1), "early_stop"), (dict(val_crop=0), "val_crop"), (dict(crop_scale=2), "crop_scale"),
    (dict(seed=2 ** 63), "seed = 9223372036854775808 must be"), (dict(mixup_alpha=1e-300), "from 0.01 to 1000"),
    (dict(UnFreeze_Epoch=10 ** 400), "UnFreeze_Epoch = 1000"), (dict(UnFreeze_Epoch=10 ** 5000), "thousands of digits"),
    (dict(save_dir="a\udc80"), "in UTF-8"), (dict(save_dir="a\0b"), "save_dir"), (dict(fp16="yes"), "True, False, 'auto'"),
    (dict(resume=3), "resume"), (dict(save_dir=""), "save_dir"), (dict(sync_bn=True), "set sync_bn = False"),
    (dict(distributed=True), "torchrun"), (dict(classes_path=None), "classes_path"), (dict(model_path=None), "model_path"),
]


@pytest.mark.parametrize("change, sentence", WRONG, ids=lambda v: str(next(iter(v))) if isinstance(v, dict) else "")
def test_settings(change, sentence):
    rules.check_settings(settings_with())
    with pytest.raises(UserError, match=sentence) as caught:
        rules.check_settings(settings_with(**change))
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu():
    with pytest.raises(UserError, match="set Cuda = False"):
        rules.check_settings(settings_with(Cuda=True))


def test_batch_sizes_of_several_processes(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UserError, match="needs a launcher"):  # which would have set the others, too
        rules.check_settings(settings_with(distributed=True))
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "4"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="set it to 4 or 8"):
        rules.check_settings(settings_with(distributed=True, Unfreeze_batch_size=6))
    with pytest.raises(UserError, match="Unfreeze_batch_size = 4 leaves one picture"):
        rules.check_batch_norm("Unfreeze_batch_size", 4)
    with pytest.raises(UserError, match="distributed = False"):
        rules.check_settings(settings_with())


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


def test_command_line():
    def given_words(*words):
        values = {**CONSTANTS, "__file__": trainer.__file__, "__doc__": trainer.__doc__, "Cuda": False, "torch": torch, "os": os}
        assert rules.command_line(values, list(words)) == {name: values[name] for name in CONSTANTS}
        return values
    values = given_words("--Init_lr", "0.02", "--backbone=resnet50", "--input_shape", "[96, 128]", "--Freeze_Train", "True",
                         "--resume", "logs/2026_01_01", "--save_dir", "123")
    assert values["Init_lr"] == 0.02 and values["Min_lr"] == pytest.approx(0.0002) and values["backbone"] == "resnet50"
    assert values["input_shape"] == [96, 128] and values["Freeze_Train"] is True and values["resume"] == "logs/2026_01_01"
    assert values["save_dir"] == "123" and values["momentum"] == 0.9
    assert given_words("--resume", "2026_11_24_21_45_25")["resume"] == "2026_11_24_21_45_25"
    assert [given_words("--fp16", word)["fp16"] for word in ("auto", "True", "False")] == ["auto", True, False]
    assert given_words("--backbone", "'resnet18'", "--augmentation", "none")["backbone"] == "resnet18"
    for words, sentence in ((["--Init_lrr", "1"], "did you mean 'Init_lr'"), (["Init_lr"], "no setting"), (["--seed"], "--seed: expected one argument"),
                            (["--seed", "a"], "seed = 'a' must be"), (["--Cuda", "yes"], "True or False"), (["--seed", "9" * 5000], "seed = ")):
        with pytest.raises(UserError, match=sentence):
            given_words(*words)


def test_help(tmp_path):
    out, _ = train(make_project(tmp_path), "--help")
    for name in rules.RULES:
        assert re.search(rf"--{name} .*\n +\S", out), name


def test_every_constant_has_a_rule_a_line_and_a_comment():
    constants = rules.constants(trainer.__file__)
    assert set(constants) == set(rules.RULES) and all(comment for _, comment in constants.values())


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


VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.integers(-1, 300), max_size=3)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(rules.RULES)), VALUES, max_size=3))
def test_random_settings(changes):
    try:
        rules.check_settings(settings_with(**changes))
    except UserError as error:
        assert any(name in str(error) for name in rules.RULES)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["--Init_lr", "--seed", "--resume", "--x", "--", "-"]) | st.text(max_size=6), max_size=4))
def test_random_command_lines(words):
    values = {**CONSTANTS, "__file__": trainer.__file__, "__doc__": "", "torch": torch, "os": os}
    if not {"-h", "--help"} & set(words):
        try:
            rules.command_line(values, words)
        except UserError:
            pass


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


SCRIPT = """
gamma: float = 2.0  # my own
steps = 3  # a number
name = "a"  # a text
free = None  # anything
size = [1, 2]  # a list
half: float = gamma / 2  # follows
bare: int
"""


def test_settings_of_ones_own(tmp_path):
    """Without a rule, the default's type is the rule; annotated ones are settings as well."""
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)

    def given_words(*words):
        script = {"__file__": str(path), "__doc__": ""}
        exec(SCRIPT, script)
        return rules.command_line(script, [str(word) for word in words])
    assert given_words() == {"gamma": 2.0, "steps": 3, "name": "a", "free": None, "size": [1, 2], "half": 1.0}
    found = given_words("--gamma", 3, "--free", "[1]", "--size", "(4,)", "--name", 5)
    assert found == {"gamma": 3, "steps": 3, "name": "5", "free": [1], "size": (4,), "half": 1.5}
    for words in (("--gamma", "abc"), ("--gamma", "True"), ("--steps", 2.5), ("--steps", "True"), ("--size", 3)):
        with pytest.raises(UserError, match=f"{words[0][2:]} = .* must be "):
            given_words(*words)


def test_a_rule_whose_constant_is_gone_is_passed_over():
    for name in rules.RULES:
        given = settings_with()
        del given[name]
        rules.check_settings(given)


def test_best_by():
    rules.check_best_by("val_loss", 3)
    with pytest.raises(UserError, match="best_by = 'top_1' is no figure.*'top1'"):
        rules.check_best_by("top_1", 3)


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
