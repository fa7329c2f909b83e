"""What each setting may be, the command line, and what must hold between settings.

Every mistake is one sentence that names it.
"""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train as trainer
from tests.helpers import history, make_data, make_project, run_of, train
from utils.optimizer import is_frozen
from utils.plumbing import settings as rules
from utils.plumbing.command_line import command_line
from utils.plumbing.command_line import constants as constants_of
from utils.plumbing.errors import UserError
from utils.plumbing.files import as_json
from utils.rehearsal import check_best_by

NAMES = {*rules.RULES}
CONSTANTS = {name: getattr(trainer, name) for name in NAMES}


def settings_with(**changes):
    return {**CONSTANTS, "Cuda": False, "fp16": False, "distributed": False, **changes}


def given_words(*words, **constants):
    """All settings after a command line, for a script whose constants are train.py's or these."""
    values = {
        **CONSTANTS,
        "__file__": trainer.__file__,
        "__doc__": trainer.__doc__,
        "Cuda": False,
        "torch": torch,
        "os": os,
        **constants,
    }
    result, _ = command_line(values, list(map(str, words)))
    assert result == {name: values[name] for name in CONSTANTS}
    return result


WRONG = [
    (dict(optimizer_type="sdg"), "'sgd' or 'adam' or 'adamw'.*did you mean 'sgd'"),
    (dict(lr_decay_type="cosine"), "'linear' or 'cos' or 'step'"),
    (dict(Unfreeze_batch_size=0), "Unfreeze_batch_size = 0 must be"),
    (dict(Freeze_batch_size=-4), "Freeze_batch_size"),
    (dict(UnFreeze_Epoch=0), "UnFreeze_Epoch"),
    (dict(Init_Epoch=10, UnFreeze_Epoch=10), "must be below"),
    (dict(Freeze_Train=True, Freeze_Epoch=30), "Freeze_Epoch = 30"),
    (dict(Min_lr=1.0), "Min_lr = 1.0 must be at most"),
    (dict(Init_lr=0), "Init_lr = 0 must be a number from 1e-09 to 1,000"),
    (dict(Init_lr=float("nan")), "Init_lr"),
    (dict(Init_lr=float("inf")), "Init_lr = inf"),
    (dict(Init_lr=True), "Init_lr = True"),
    (dict(Init_lr="0.1"), "Init_lr = '0.1'"),
    (dict(momentum=1.0), "momentum"),
    (dict(weight_decay=-1), "weight_decay"),
    (dict(input_shape=[64]), r"\[height, width\], each a whole"),
    (dict(input_shape=64), "input_shape"),
    (dict(input_shape=[0, 64]), "input_shape"),
    (dict(input_shape=[True, 64]), "input_shape"),
    (dict(input_shape=[64.0, 64]), "input_shape"),
    (dict(input_shape="64"), "input_shape"),
    (dict(backbone=18), "backbone = 18 must be a name"),
    (dict(fp16=1), "fp16 = 1 must be True or False or 'auto'"),
    (dict(fp16="yes"), "True or False or 'auto'"),
    (dict(num_workers=-1), "num_workers"),
    (dict(num_workers=1.5), "num_workers"),
    (dict(num_workers=10**6), "from 0 to 1,000"),
    (dict(save_period=0), "save_period"),
    (dict(seed=-1), "seed"),
    (dict(augmentation="flop"), "did you mean 'flip'"),
    (dict(label_smoothing=1.0), "label_smoothing"),
    (dict(random_erasing=2), "random_erasing"),
    (dict(mixup_alpha=-1), "mixup_alpha"),
    (dict(class_weights=True), "class_weights"),
    (dict(ema_decay=1), "ema_decay"),
    (dict(accumulate=0), "accumulate"),
    (dict(early_stop=-1), "early_stop"),
    (dict(val_crop=0), "val_crop"),
    (dict(crop_scale=2), "crop_scale"),
    (dict(seed=2**63), "seed = 9223372036854775808 must be"),
    (dict(mixup_alpha=1e-300), "0 or a number from 0.01 to 1,000"),
    (dict(clip_grad_norm=1e-300), "clip_grad_norm"),
    (dict(UnFreeze_Epoch=10**400), "UnFreeze_Epoch = 1000"),
    (dict(UnFreeze_Epoch=10**5000), "thousands of digits"),
    (dict(optimizer_type=10**5000), "thousands of digits"),
    (dict(weight_decay=10**400), "weight_decay"),
    (dict(save_dir="a\udc80"), "in UTF-8"),
    (dict(save_dir="a\0b"), "save_dir"),
    (dict(resume=3), "resume = 3 must be False or True or"),
    (dict(resume=""), "resume"),
    (dict(save_dir=""), "save_dir"),
    (dict(sync_bn=True), "set sync_bn = False"),
    (dict(distributed=True), "torchrun"),
    (dict(classes_path=None), "classes_path"),
    (dict(model_path=None), "model_path"),
    (dict(pretrained="no"), "pretrained = 'no' must be True or False"),
    (dict(Cuda=0), "Cuda = 0"),
    (
        dict(mean=[123.7, 116.3, 103.5]),
        r"mean = .* \[red, green, blue\], each a number from 0 to 1",
    ),
    (dict(mean=0.5), "mean"),
    (dict(std=[0.5, 0.5, 0]), "std"),
    (dict(std=[0.5, 0.5]), "std"),
    (dict(std=[0.5, 0.5, float("nan")]), "std"),
]


@pytest.mark.parametrize(
    "change, sentence", WRONG, ids=lambda v: str(next(iter(v))) if isinstance(v, dict) else ""
)
def test_settings(change, sentence):
    rules.check_settings(settings_with())
    with pytest.raises(UserError, match=sentence) as caught:
        rules.check_settings(settings_with(**change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        dict(Min_lr=0),
        dict(mixup_alpha=0),
        dict(clip_grad_norm=0),
        dict(model_path=""),
        dict(resume=True),
        dict(seed=2**63 - 1),
        dict(input_shape=(64, 48)),
        dict(std=(1, 1, 1)),
        dict(Min_lr=0.05),
        dict(save_dir="ä 猫"),
    ],
)
def test_good_settings(change):
    rules.check_settings(settings_with(**change))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu():
    with pytest.raises(UserError, match="set Cuda = False"):
        rules.check_settings(settings_with(Cuda=True))


@pytest.fixture
def launched(monkeypatch):
    """As torchrun starts a process of four."""
    for name, value in (
        ("RANK", "0"),
        ("LOCAL_RANK", "0"),
        ("WORLD_SIZE", "4"),
        ("MASTER_ADDR", "localhost"),
        ("MASTER_PORT", "1"),
    ):
        monkeypatch.setenv(name, value)


def test_a_launcher_is_asked_for(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UserError, match="needs a launcher"):  # which would have set the others, too
        rules.check_settings(settings_with(distributed=True))


def test_batch_sizes_of_several_processes(launched):
    with pytest.raises(UserError, match="distributed = False"):
        rules.check_settings(settings_with())
    s = settings_with(distributed=True)
    with pytest.raises(UserError, match="Unfreeze_batch_size = 6 .*set it to a multiple of 4"):
        rules.check_settings({**s, "Unfreeze_batch_size": 6})
    with pytest.raises(UserError, match="Unfreeze_batch_size = 3 .*set it to a multiple of 4$"):
        rules.check_settings({**s, "Unfreeze_batch_size": 3})


def test_only_phases_that_are_trained_are_checked(launched):
    s = settings_with(distributed=True, UnFreeze_Epoch=20)
    rules.check_settings({**s, "Freeze_batch_size": 7})  # nothing is frozen
    rules.check_phases({**s, "Freeze_batch_size": 999}, 100, 10)
    frozen = {**s, "Freeze_Train": True, "Freeze_Epoch": 5}
    with pytest.raises(UserError, match="Freeze_batch_size = 7"):
        rules.check_settings({**frozen, "Freeze_batch_size": 7})
    rules.check_settings({**frozen, "Freeze_batch_size": 7, "Init_Epoch": 5})
    rules.check_settings({**frozen, "Unfreeze_batch_size": 7, "UnFreeze_Epoch": 5})
    with pytest.raises(ValueError, match="Freeze_batch_size = 999.*数据集过小"):
        rules.check_phases({**frozen, "Freeze_batch_size": 999}, 100, 10)
    with pytest.raises(ValueError, match="100 training and 0 test pictures"):
        rules.check_phases(s, 100, 0)
    rules.check_phases({**s, "Init_Epoch": s["UnFreeze_Epoch"]}, 1, 0)  # nothing is left to train


def test_several_gpus_of_one_process(monkeypatch):
    """DataParallel cannot copy a compiled network."""
    for gpus in (1, 2):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        rules.check_settings(settings_with(Cuda=True, compile=gpus == 1))
        rules.check_settings(settings_with(Cuda=True, fp16="bfloat16" if gpus == 1 else "float16"))
    for changes in ({"compile": True}, {"fp16": "bfloat16"}):
        with pytest.raises(UserError, match=f"{next(iter(changes))} = .* needs torchrun"):
            rules.check_settings(settings_with(Cuda=True, **changes))


def test_command_line():
    values = given_words(
        "--Init_lr",
        "0.02",
        "--backbone=resnet50",
        "--input_shape",
        "[96, 128]",
        "--Freeze_Train",
        "True",
        "--resume",
        "logs/2026_01_01",
        "--save_dir",
        "123",
    )
    assert (
        values["Init_lr"] == 0.02
        and values["Min_lr"] == pytest.approx(0.0002)
        and values["backbone"] == "resnet50"
    )
    assert (
        values["input_shape"] == [96, 128]
        and values["Freeze_Train"] is True
        and values["resume"] == "logs/2026_01_01"
    )
    assert values["save_dir"] == "123" and values["momentum"] == 0.9
    assert given_words("--resume", "2026_11_24_21_45_25")["resume"] == "2026_11_24_21_45_25"
    assert [given_words("--fp16", word)["fp16"] for word in ("auto", "True", "False")] == [
        "auto",
        True,
        False,
    ]
    assert (
        given_words("--backbone", "'resnet18'", "--augmentation", "none")["backbone"] == "resnet18"
    )
    assert given_words("--input_shape", "'[96, 128]'")["input_shape"] == [96, 128]
    assert given_words("--Init_lr", "'0.25'", "--save_dir", "'7'")["Init_lr"] == 0.25
    assert given_words("--save_dir", "it's 'mine'")["save_dir"] == "it's 'mine'"
    assert given_words("--local-rank=0", "--best_by=-mae")["best_by"] == "-mae"
    assert (
        given_words("--seed", "3", "--seed=4")["seed"] == 4
    )  # the last one counts, as in a script that ends with "$@"


def test_one_spelling_of_lists_and_paths(monkeypatch):
    """A tuple is a list and '~' the home folder, wherever they are written."""
    monkeypatch.setenv("HOME", "/home/me")
    for values in (
        given_words(
            "--input_shape=96,128", "--save_dir=~/x", "--model_path=~/w.pth", "--resume=~/logs/1"
        ),
        given_words(input_shape=(96, 128), save_dir="~/x", model_path="~/w.pth", resume="~/logs/1"),
    ):
        assert (
            values["input_shape"] == [96, 128]
            and values["save_dir"] == "/home/me/x"
            and values["resume"] == "/home/me/logs/1"
        )
        assert (
            values["model_path"] == "/home/me/w.pth"
            and values["classes_path"] == "model_data/cls_classes.txt"
        )
    assert given_words("--save_dir=./~/x", "--backbone=~")["save_dir"] == "./~/x"


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("--Init_lrr 1", "did you mean 'Init_lr'"),
        ("Init_lr", "'Init_lr' is no setting"),
        ("--seed", "--seed needs a value .write --seed=VALUE"),
        ("--seed --Cuda False", "--seed needs a value"),
        ("--best_by -mae", "write --best_by=VALUE"),
        ("help", "'help' is no setting of [^:]*; --help lists them"),
        ("seed 3", "'seed' is no setting.*: write --seed"),
        ("\u2014seed 3", "'\u2014seed' is no setting.*: write --seed"),
        ("epochs=3", "did you mean 'UnFreeze_Epoch'"),
        ("--seed a", "seed = 'a' must be"),
        ("--Cuda yes", "True or False"),
        ("--seed " + "9" * 5000, "seed = "),
        ("--Init_lr 1e400", "Init_lr = inf"),
        ("--Init_lr nan", "Init_lr = 'nan'"),
        ("--Init_lr=-1", "Init_lr = -1 must"),
        ("--Init_lr -1", "Init_lr = -1 must"),
        ("--Init_lr True", "Init_lr = True"),
        ("--no-pretrained", "did you mean 'pretrained'"),
        ("--no-Cuda", "did you mean 'Cuda'"),
        ("--input_shape [224, 224]", "'224\\]' is no setting.*quotes"),
        ("--input_shape 224x224", "must be \\[height, width\\]"),
        ("--input_shape=['a','b']", "input_shape"),
        ("--seed １２", "seed = '１２'"),
        ("--seed=", "seed = '' must be"),
        ("--save_dir=", "save_dir = '' must be"),
        ("-- --seed 3", "no setting"),
        ("-b 32", "'-b' is no setting"),
        ("--=3", "'--=3' is no setting"),
        ("--Init_lr (((((((", "Init_lr = "),
        ("--seed 1e3", "seed = 1000.0"),
        ("--seed None", "seed = None"),
        ("--help-me", "no setting"),
        ("--Init", "did you mean"),
        ("--save_dir a\udc80", "in UTF-8"),
        ("--init_lr 3", "did you mean 'Init_lr'"),
        *(
            (f"--{word} 3", f"did you mean '{name}'")
            for word, name in dict(
                lr="Init_lr",
                epochs="UnFreeze_Epoch",
                epoch="UnFreeze_Epoch",
                batch_size="Unfreeze_batch_size",
                workers="num_workers",
                imgsz="input_shape",
                image_size="input_shape",
                model="backbone",
                arch="backbone",
                weights="model_path",
                data="train_annotation_path",
                gpu="Cuda",
                device="Cuda",
                amp="fp16",
                optimizer="optimizer_type",
                scheduler="lr_decay_type",
                wd="weight_decay",
                patience="early_stop",
                output="save_dir",
                LR="Init_lr",
            ).items()
        ),
        ("--batch-size=3", "did you mean 'Unfreeze_batch_size'"),
    ],
)
def test_mistakes_on_the_command_line(words, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        given_words(*words.split(" "))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_help(capsys, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    with pytest.raises(SystemExit):
        given_words("--help")
    out, constants = capsys.readouterr().out, constants_of(trainer.__file__)
    places = [out.index(f"  --{name} ") for name in constants]
    assert places == sorted(places)
    for title in dict.fromkeys(title for _, _, title in constants.values()):
        assert f"\n{title}:\n" in out
    flat = re.sub(r"\s+", " ", out)
    assert (
        flat.count("default: ") == len(constants)
        and '--input_shape "[48, 48]" ' in flat
        and "default: 'model_data/cls_train.txt'" in flat
        and flat.count("'adamw'") == 1
    )
    assert all(
        f"python -m utils.{name}" in flat
        for name in ("annotation", "evaluate", "predict", "export")
    )


def test_choices_that_a_fork_adds_are_in_help(monkeypatch, capsys):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setitem(rules.RULES, "lr_decay_type", ("linear", "cos", "step", "constant"))
    with pytest.raises(SystemExit):
        given_words("--help")
    assert re.search(
        r"'cos',\s+'step':[^;]*;\s+or\s+'constant';\s+default:", capsys.readouterr().out
    )


def test_every_constant_has_a_rule_a_line_and_a_comment():
    constants = constants_of(trainer.__file__)
    assert set(constants) == NAMES and all(
        comment and title != "Settings" for _, comment, title in constants.values()
    )


FILE = """
Cuda = False
distributed = "DISTRIBUTED" in os.environ
num_workers = 2
fp16 = "auto"
pretrained = False
model_path = ""
Init_Epoch = 0
UnFreeze_Epoch = 5
Init_lr = 5e-2
Min_lr = Init_lr * 0.01
lowest = Min_lr / 10
mean = [0.5, 0.5, 0.5]
weights = np.ones(2)
save_dir = "logs"
resume = False
"""


def continued(tmp_path, text, *words, config=None, check=False):
    """The settings of a script's start, as (what trains, config.json)."""
    path = tmp_path / "script.py"
    path.write_text(text)
    script = {"__file__": str(path), "__doc__": "", "os": os, "np": np}
    exec(text, script)
    values, recorded = command_line(script, list(map(str, words)))
    if config:
        values, recorded = command_line(script, list(map(str, words)), config=config)
    if check:
        rules.check_settings(values)
    return values, as_json({"settings": values, **recorded})


def test_a_run_goes_on_with_its_own_settings(tmp_path):
    first, config = continued(tmp_path, FILE, "--UnFreeze_Epoch", 12, "--Init_lr", 0.02)
    assert first["Min_lr"] == pytest.approx(2e-4)
    again, _ = continued(tmp_path, FILE, "--resume", True, config=config)
    assert {**as_json(again), "resume": False} == config["settings"]
    given, after = continued(tmp_path, FILE, "--Init_lr", 0.03, config=config)
    assert given["UnFreeze_Epoch"] == 12  # the command line wins, and what is computed follows
    assert given["Min_lr"] == pytest.approx(3e-4) and given["lowest"] == pytest.approx(3e-5)
    edited = FILE.replace("5e-2", "0.04").replace("Epoch = 5", "Epoch = 0x5")  # the same number
    values, _ = continued(tmp_path, edited, config=config)
    assert values["Init_lr"] == 0.04 and values["Min_lr"] == pytest.approx(4e-4)
    assert values["UnFreeze_Epoch"] == 12
    values, _ = continued(tmp_path, edited, "--Init_lr", 0.01, config=config)
    assert values["Init_lr"] == 0.01
    values, _ = continued(tmp_path, FILE.replace("* 0.01", "* 0.1"), config=config)
    assert values["Init_lr"] == 0.02 and values["Min_lr"] == pytest.approx(2e-3)
    values, _ = continued(tmp_path, FILE, config=after)  # of the last start, not of the first
    assert values["Init_lr"] == 0.03


def test_what_was_given_to_a_run_is_not_computed_anew(tmp_path):
    _, config = continued(tmp_path, FILE, "--Min_lr", 1e-5)
    values, _ = continued(tmp_path, FILE, "--Init_lr", 0.03, config=config)
    assert values["Min_lr"] == 1e-5 and values["lowest"] == pytest.approx(1e-6)


def test_what_belongs_to_the_launch(tmp_path, monkeypatch):
    words = ("--num_workers", 7, "--save_dir", "mine", "--pretrained", True)
    _, config = continued(tmp_path, FILE, *words)
    words = ("--save_dir", "other", "--pretrained", False, "--model_path", "nothing.pth")
    monkeypatch.setenv("DISTRIBUTED", "1")
    values, _ = continued(tmp_path, FILE, *words, "--Init_Epoch", 3, config=config)
    assert values["num_workers"] == 2 and values["distributed"]
    assert values["save_dir"] == "mine" and values["pretrained"] and values["model_path"] == ""
    assert values["Init_Epoch"] == 0


@pytest.mark.parametrize("words", [(), ("--fp16", "auto")])
def test_a_chosen_precision_stays(tmp_path, words):
    _, config = continued(tmp_path, FILE)
    config["settings"]["fp16"] = True
    assert continued(tmp_path, FILE, *words, config=config)[0]["fp16"] is True
    assert continued(tmp_path, FILE, "--fp16", False, config=config)[0]["fp16"] is False
    config["settings"]["Cuda"] = True
    assert continued(tmp_path, FILE, *words, config=config)[0]["fp16"] == "auto"


@pytest.mark.parametrize("able, kept", [({"avx512_bf16": True}, "bfloat16"), ({}, "auto")])
def test_a_precision_is_chosen_anew_where_the_machine_emulates_it(
    tmp_path, monkeypatch, able, kept
):
    _, config = continued(tmp_path, FILE)
    config["settings"]["fp16"] = "bfloat16"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert continued(tmp_path, FILE, config=config)[0]["fp16"] == kept


def test_auto_is_asked_anew_where_a_type_was_told(tmp_path):
    """And not where it has chosen one, by a constant or by a word."""
    _, told = continued(tmp_path, FILE, "--fp16", False)
    told["settings"]["fp16"] = "float32"  # as training records it
    assert continued(tmp_path, FILE, "--fp16", "auto", config=told)[0]["fp16"] == "auto"
    constant = FILE.replace('fp16 = "auto"', "fp16 = False")
    _, told = continued(tmp_path, constant)
    assert continued(tmp_path, FILE, config=told)[0]["fp16"] == "auto"  # the constant was edited
    _, chosen = continued(tmp_path, constant, "--fp16", "auto")
    chosen["settings"]["fp16"] = "float32"
    assert continued(tmp_path, constant, config=chosen)[0]["fp16"] == "float32"


def test_a_run_that_has_saved_nothing_begins_with_what_is_given_now(tmp_path):
    _, config = continued(tmp_path, FILE, "--model_path", "a.pth", "--save_dir", "mine")
    config["trained"] = False
    values, _ = continued(tmp_path, FILE, config=config)
    assert values["model_path"] == "a.pth" and values["save_dir"] == "mine"
    words = ("--model_path", "b.pth", "--save_dir", "other")
    values, _ = continued(tmp_path, FILE, *words, config=config)
    assert values["model_path"] == "b.pth" and values["save_dir"] == "mine"
    edited = FILE.replace("pretrained = False", "pretrained = True")
    assert continued(tmp_path, edited, config=config)[0]["pretrained"] is True


def test_constants_that_come_and_go(tmp_path):
    _, config = continued(tmp_path, FILE, "--UnFreeze_Epoch", 12, "--Init_lr", 0.02)
    more = FILE + "more = UnFreeze_Epoch + 1\n"  # a constant that the run has not
    values, _ = continued(tmp_path, more, config=config)
    assert values["more"] == 13 and values["weights"].tolist() == [1, 1]
    less = "".join(line for line in FILE.splitlines(True) if "lr" not in line and "Min" not in line)
    assert "Init_lr" not in continued(tmp_path, less, config=config)[0]
    config["words"]["UnFreeze_Epoch"] = "many"
    with pytest.raises(UserError, match="UnFreeze_Epoch = 'many' must be"):
        continued(tmp_path, FILE, config=config)
    config["words"]["UnFreeze_Epoch"] = 7
    assert continued(tmp_path, FILE, config=config)[0]["UnFreeze_Epoch"] == 7


def test_words_hold_through_several_legs(tmp_path):
    _, config = continued(tmp_path, FILE, "--Init_lr", 0.02, "--num_workers", 7)
    _, config = continued(tmp_path, FILE, "--UnFreeze_Epoch", 9, "--model_path", "x", config=config)
    values, config = continued(tmp_path, FILE, config=config)
    assert (values["Init_lr"], values["UnFreeze_Epoch"], values["num_workers"]) == (0.02, 9, 2)
    assert values["model_path"] == ""
    edited = FILE.replace("5e-2", "0.04")
    _, config = continued(tmp_path, edited, config=config)
    values, _ = continued(tmp_path, edited, config=config)  # an edit outlives its leg as well
    assert (values["Init_lr"], values["UnFreeze_Epoch"]) == (0.04, 9)


def test_config_holds_what_json_does_not_have():
    settings = {"mean": np.array([0.5, 0.25]), "place": Path("data"), "epochs": 3, "names": None}
    expected = {"mean": [0.5, 0.25], "place": "data", "epochs": 3, "names": None}
    assert as_json(settings) == expected


def test_arrays_as_constants(tmp_path):
    text = FILE.replace("[0.5, 0.5, 0.5]", "np.array([0.5, 0.4, 0.3])")
    text = text.replace("Epoch = 5", "Epoch = np.int64(5)")
    values, config = continued(tmp_path, text)
    assert values["mean"] == [0.5, 0.4, 0.3] and values["UnFreeze_Epoch"] == 5
    assert config["settings"]["weights"] == [1, 1]
    again, _ = continued(tmp_path, text, config=config)
    assert isinstance(again["weights"], np.ndarray)
    with pytest.raises(UserError, match="mean = .* must be"):
        continued(tmp_path, text + "\nmean = np.zeros((2, 2))\n", check=True)


VALUES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.lists(st.integers(-1, 300) | st.floats(), max_size=3)
)


@settings(max_examples=300)
@given(st.dictionaries(st.sampled_from(sorted(NAMES)), VALUES, max_size=3))
def test_random_settings(changes):
    try:
        rules.check_settings(settings_with(**changes))
    except UserError as error:
        assert any(name in str(error) for name in NAMES)


@settings(max_examples=100)
@given(
    st.lists(
        st.sampled_from(
            ["--Init_lr", "--seed", "--resume", "--x", "--", "-", "--mean=", "--save_dir="]
        )
        | st.text(max_size=6),
        max_size=4,
    )
)
def test_random_command_lines(words):
    if not {"-h", "--help"} & set(words) and not any(word.startswith("-h") for word in words):
        try:
            given_words(*words)
        except UserError as error:
            assert "\n" not in str(error)


SCRIPT = """
# First
gamma: float = 2.0  # my own
# no title
steps = 3  # a number

# Then
name = "a"  # a text
free = None  # anything
size = [1, 2]  # a list
half: float = gamma / 2  # follows
on = False  # a flag
home_dir = "."  # a path
bare: int
low = high = 1 # two at once
table = {}
"""


def test_settings_of_ones_own(tmp_path, monkeypatch):
    """Without a rule, the default's type is the rule; annotated ones are settings as well."""
    monkeypatch.setenv("HOME", "/home/me")
    path = tmp_path / "script.py"
    path.write_text(SCRIPT, encoding="utf-8-sig")  # as some editors save it

    def own_words(*words):
        script = {"__file__": str(path), "__doc__": ""}
        exec(SCRIPT, script)
        values, _ = command_line(script, [str(word) for word in words])
        return values

    assert own_words() == {
        "gamma": 2.0,
        "steps": 3,
        "name": "a",
        "free": None,
        "size": [1, 2],
        "half": 1.0,
        "on": False,
        "home_dir": ".",
        "low": 1,
        "high": 1,
        "table": {},
    }
    assert own_words("--size", "['aB', 'True']")["size"] == ["aB", "True"]
    found = own_words(
        "--gamma",
        3,
        "--free",
        "[1]",
        "--size",
        "(4,)",
        "--name",
        5,
        "--on",
        "True",
        "--home_dir=~",
        "--high",
        2,
        "--table",
        "{1: 2}",
    )
    assert found == {
        "gamma": 3,
        "steps": 3,
        "name": "5",
        "free": [1],
        "size": [4],
        "half": 1.5,
        "on": True,
        "home_dir": "/home/me",
        "low": 1,
        "high": 2,
        "table": {1: 2},
    }
    assert own_words("--name=", "--free", "True")["free"] is True
    for words in (
        ("--gamma", "abc"),
        ("--gamma", "True"),
        ("--gamma", "1e400"),
        ("--steps", 2.5),
        ("--steps", "True"),
        ("--size", 3),
        ("--on", 1),
        ("--name", "\udc80"),
    ):
        with pytest.raises(UserError, match=f"{words[0][2:]} = .* must be "):
            own_words(*words)
    assert [title for _, _, title in constants_of(path).values()] == ["First"] * 2 + ["Then"] * 9
    assert constants_of(path)["high"][1] == "two at once"


def test_a_rule_whose_constant_is_gone_is_passed_over():
    for name in NAMES:
        given = settings_with()
        del given[name]
        rules.check_settings(given)
        rules.check_phases(given, 100, 10)
        if name not in ("UnFreeze_Epoch", "Unfreeze_batch_size"):
            rules.describe_few_steps(given, 100)
        is_frozen({**given, "Freeze_Epoch": 1}, 0)


def test_what_is_computed_from_the_beginning_stays(tmp_path):
    """A continued run begins later, and ends where it would have ended."""
    text = FILE + "Init_Epoch = 0  # begun\nlast = Init_Epoch + 20  # of mine\n"
    _, config = continued(tmp_path, text)
    config["settings"]["Init_Epoch"] = 7
    values, _ = continued(tmp_path, text, config=config)
    assert (values["Init_Epoch"], values["last"]) == (7, 20)
    _, config = continued(tmp_path, text, "--Init_Epoch", 5)
    config["settings"]["Init_Epoch"] = 7
    values, _ = continued(tmp_path, text, config=config)
    assert (values["Init_Epoch"], values["last"]) == (7, 25)


def test_what_is_computed_from_what_the_run_keeps_follows_it(tmp_path):
    text = FILE + "pretrained = True  # begin\nmine = pretrained  # of mine\n"
    _, config = continued(tmp_path, text)
    edited = text.replace("pretrained = True", "pretrained = False")  # for another run
    values, _ = continued(tmp_path, edited, config=config)
    assert values["pretrained"] is True and values["mine"] is True


@pytest.mark.parametrize(
    "line",
    [
        "mixup_alpha, cutmix_alpha = 0.2, 1.0",
        "if True:\n    mixup_alpha = 0.2",
        "for mixup_alpha in (0.1, 0.2): pass",
    ],
)
def test_a_constant_that_would_be_passed_over(tmp_path, line):
    with pytest.raises(UserError, match="mixup_alpha must be set on a line of its own"):
        continued(tmp_path, FILE + line + "\n")


def test_a_fork_s_constant_goes_before_the_launchers_word(tmp_path):
    values, _ = continued(tmp_path, FILE + "local_rank = 0  # of mine\n", "--local_rank", 3)
    assert values["local_rank"] == 3


def test_settings_that_json_does_not_have():
    """They read the same in every process, and a table with two keys a cell is left out."""
    relu = torch.nn.functional.relu
    mine = {"names": {"b", "a"}, "act": relu, "acts": {relu}, "cost": {("a", "b"): 1.0}}
    assert as_json(mine) == {
        "names": ["a", "b"], "act": "<function relu>", "acts": ["<function relu>"], "cost": {}
    }  # fmt: skip
    assert as_json({"dtype": np.float32}) == {"dtype": "<class 'numpy.float32'>"}


def test_a_rank_that_no_launcher_has_given(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UserError, match="unset RANK WORLD_SIZE"):
        rules.check_launch({"distributed": False})


def test_best_by():
    model, batch = (
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 7)),
        (torch.zeros(3, 3, 2, 2).byte(), torch.arange(3)),
    )
    for good in ("val_loss", "top1", "top5", "recall", "-top1", "-val_loss"):
        check_best_by({"Cuda": False, "best_by": good}, model, batch)
    for bad in ("top_1", "-", "", "--top1", "- top1", "loss"):
        with pytest.raises(
            UserError, match="best_by = '.*' is not a metric.*: val_loss, top1, top5, recall"
        ):
            check_best_by({"Cuda": False, "best_by": bad}, model, batch)


def test_a_launch_says_which_limit_changed_the_rate(tmp_path):
    """What the header shows is what trains, and what the history has."""
    folder = make_project(
        tmp_path, optimizer_type="'adamw'", Init_lr=2e-5, UnFreeze_Epoch=1, Freeze_batch_size=7
    )
    make_data(folder, train=24, test=6)
    out, _ = train(folder)
    assert "adamw, linear, lr 0.0001 to 1e-06 (Init_lr = 2e-05 gives 2.5e-06, outside adamw" in out
    assert history(run_of(folder))[0]["lr"] == pytest.approx(1e-5)  # a tenth, as the warm-up begins


@pytest.mark.parametrize(
    "constant, value, words",
    [
        ("Init_lr", "'5e-2'", "Min_lr = Init_lr * 0.01"),
        pytest.param("Init_lr", "0,5", "Min_lr = Init_lr * 0.01", marks=pytest.mark.slow),
        ("backbone", "resnet18", "backbone = resnet18"),
        pytest.param("pretrained", "true", "pretrained = true", marks=pytest.mark.slow),
    ],
)
def test_a_constant_that_cannot_be_computed(tmp_path, constant, value, words):
    """Nothing can be checked before."""
    folder = make_project(tmp_path, **{constant: value})
    _, err = train(folder, code=1, fresh=True)
    assert words in err and "without quotes and commas" in err and "words in quotes" in err
    assert err.count("\n") == 1 and "Traceback" not in err
