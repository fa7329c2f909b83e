"""Whole runs of an edited train.py, as a user makes them."""

import json
import re
import shutil

import pytest
import torch
import torchvision
from PIL import Image

from tests.helpers import (
    edit,
    history,
    hooked,
    make_data,
    make_project,
    run_of,
    runs,
    same,
    train,
    weights,
    write_network,
)
from utils.plumbing.command_line import constants


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """One run that learns: (folder, what it printed)."""
    folder = make_project(
        tmp_path_factory.mktemp("first"),
        backbone="'resnet18'",
        UnFreeze_Epoch=5,
        save_period=2,
        Init_lr=0.02,
        num_workers=2,
        weight_decay=1e-3,
    )
    make_data(folder, train=96, test=30, size=(40, 32))
    return folder, train(folder)[0]


def test_it_learns_and_says_so(first):
    folder, out = first
    rows, run = history(run_of(folder)), run_of(folder)
    best = max(row["top1"] for row in rows)
    assert (
        best > 0.9 and rows[-1]["train_loss"] < rows[0]["train_loss"] and rows[-1]["scored"] == 30
    )
    assert (
        out.strip().splitlines()[-1].startswith(f"best top-1 {best:.2%}")
        and str(run.name) in out.splitlines()[-1]
    )
    assert "GFLOPs" in out and "M parameters" in out and "resnet18" in out
    assert (
        len(
            re.findall(
                r"^epoch \d+/5: train loss .* val loss .* top-1 .* mean recall ", out, flags=re.M
            )
        )
        == 5
    )
    keys = [(row["top1"], -row["val_loss"]) for row in rows]
    stars = [line.endswith(" *") for line in out.splitlines() if re.match(r"epoch \d/5:", line)]
    assert stars == [key > max(keys[:i], default=(-1, 0)) for i, key in enumerate(keys)]


def test_the_run_folder(first):
    folder, _ = first
    run = run_of(folder)
    names = {p.name for p in run.iterdir()}
    assert names >= {
        "config.json",
        "history.csv",
        "epoch_loss.png",
        "first_batch.png",
        "best_epoch_weights.pth",
        "last_epoch_weights.pth",
        "last_checkpoint.pth",
    }
    assert not [n for n in names if "draft" in n or n.endswith(".new")]
    rows = history(run)
    kept = sorted(n for n in names if n.startswith("ep0"))
    assert kept == [
        "ep%03d-loss%.3f-val_loss%.3f.pth" % (e, rows[e - 1]["train_loss"], rows[e - 1]["val_loss"])
        for e in (2, 4, 5)
    ]
    for name in ("epoch_loss.png", "first_batch.png"):
        assert Image.open(run / name).width > 300
    config = json.loads((run / "config.json").read_text())
    assert (
        config["class_names"] == ["class0", "class1", "class2"]
        and config["settings"]["backbone"] == "resnet18"
    )
    assert config["finished"] and config["versions"]["torch"] == torch.__version__
    assert config["settings"].keys() == constants(folder / "train.py").keys()
    assert config["versions"].keys() == {"python", "torch", "torchvision", "numpy", "PIL"}


def test_weights_are_torchvisions(first):
    run = run_of(first[0])
    for name in ("best_epoch_weights.pth", "last_epoch_weights.pth"):
        torchvision.models.resnet18(num_classes=3).load_state_dict(weights(run, name))
    best = max(history(run), key=lambda row: (row["top1"], -row["val_loss"]))
    assert (best["epoch"] == 5) == same(weights(run), weights(run, "best_epoch_weights.pth"))


def test_model_path_and_freeze(first, tmp_path):
    source = run_of(first[0]) / "best_epoch_weights.pth"
    folder = make_project(
        tmp_path,
        backbone="'resnet18'",
        model_path=repr(str(source)),
        Freeze_Train=True,
        Freeze_Epoch=1,
        Freeze_batch_size=4,
        UnFreeze_Epoch=1,
    )
    make_data(folder, train=24, test=6, size=(40, 32))
    out, _ = train(folder)
    assert "122 of 122" in out
    before, after = weights(source.parent, source.name), weights(run_of(folder))
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed == {"fc.weight", "fc.bias"}
    edit(folder, UnFreeze_Epoch=2, save_dir="'other'", Init_Epoch=0)
    train(folder)
    after = weights(next((folder / "other").iterdir()))
    assert len({k for k in before if not torch.equal(before[k], after[k])}) > 100
    assert len(history(next((folder / "other").iterdir()))) == 2


CHANGES = {
    "momentum": 0.5,
    "weight_decay": 0.3,
    "Init_lr": 0.08,
    "optimizer_type": "adam",
    "Unfreeze_batch_size": 4,
    "seed": 99,
    "input_shape": [40, 24],
    "augmentation": "trivial",
    "clip_ratio": 1e-3,
    "clip_grad_norm": 1e-3,
}


def test_settings_take_effect(tmp_path):
    """Each constant edited alone must change the run's weights, or it does nothing."""
    constants = dict(UnFreeze_Epoch=1, Init_lr=0.02)
    make_data(make_project(tmp_path, **constants), train=24, test=6)
    train(tmp_path)
    seen = [weights(run_of(tmp_path))]
    assert seen[0].keys() == torchvision.models.squeezenet1_1(num_classes=3).state_dict().keys()
    for name, value in CHANGES.items():
        make_project(
            tmp_path, **{**constants, "save_dir": repr(f"changed {name}"), name: repr(value)}
        )
        train(tmp_path)
        (run,) = (tmp_path / f"changed {name}").iterdir()
        assert json.loads((run / "config.json").read_text())["settings"][name] == value
        seen.append(weights(run))
        assert not any(same(seen[-1], other) for other in seen[:-1]), name


def test_paths_and_rates(tmp_path):
    folder = make_project(
        tmp_path,
        classes_path="'lists/names.txt'",
        train_annotation_path="'lists/a.txt'",
        Min_lr=2e-4,
        test_annotation_path="'lists/b.txt'",
        save_dir="'runs here'",
        save_period=1,
        UnFreeze_Epoch=3,
        Init_lr=4e-2,
        lr_decay_type="'cos'",
    )
    make_data(folder, train=24, test=6)
    (folder / "lists").mkdir()
    for old, new in (("cls_classes", "names"), ("cls_train", "a"), ("cls_test", "b")):
        (folder / f"model_data/{old}.txt").rename(folder / f"lists/{new}.txt")
    train(folder)
    (run,) = (folder / "runs here").iterdir()
    assert len(list(run.glob("ep00?-loss*-val_loss*.pth"))) == 3
    # 8 pictures a step are an eighth of 64: 5e-3 and 2.5e-5, warmed up in the first epoch, held in
    # the last
    assert [row["lr"] for row in history(run)] == pytest.approx([5e-4, 5e-3, 2.5e-5], rel=1e-6)


def test_a_setting_of_ones_own(tmp_path):
    make_data(
        make_project(
            tmp_path,
            UnFreeze_Epoch=1,
            Min_lr="Init_lr * 0.01  # lowest\nwarm = Init_lr / 2  # my own",
        ),
        train=24,
        test=6,
    )
    out, _ = train(tmp_path, "--help")
    assert re.search(r"--warm VALUE +my own [^-]*;\s+default:\s+0.005", out)
    for words, value in (([], 0.005), (["--Init_lr", 0.04], 0.02), (["--warm", "1"], 1)):
        train(tmp_path, *words, "--save_dir", f"{value}")
        (run,) = (tmp_path / f"{value}").iterdir()
        assert json.loads((run / "config.json").read_text())["settings"]["warm"] == value
    _, err = train(tmp_path, "--warm", "abc", code=1)
    assert "warm = 'abc' must be a number" in err and "Traceback" not in err


def test_pretrained_weights_of_the_cache(tmp_path, monkeypatch):
    """As torch.hub leaves them; frozen, they come out of the run as they went in, but the head."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    cached = (
        tmp_path
        / "cache/hub/checkpoints"
        / torchvision.models.ResNet18_Weights.DEFAULT.url.rpartition("/")[2]
    )
    cached.parent.mkdir(parents=True)
    torch.manual_seed(5)
    theirs = torchvision.models.resnet18().state_dict()
    torch.save(theirs, cached)
    folder = make_project(
        tmp_path / "project",
        backbone="'resnet18'",
        pretrained=True,
        Freeze_Train=True,
        Freeze_Epoch=1,
        UnFreeze_Epoch=1,
        optimizer_type="'adamw'",
        Init_lr=1e-3,
    )
    make_data(folder, train=24, test=6)
    out, _ = train(folder)
    assert "120 of 122 tensors" in out and "the head starts anew" in out
    ours = weights(run_of(folder))
    assert {k for k in ours if not torch.equal(ours[k], theirs[k])} == {"fc.weight", "fc.bias"}


def test_same_seed_same_run_and_other_workers(tmp_path):
    folder = make_project(
        tmp_path,
        augmentation="'crop'",
        lr_decay_type="'step'",
        optimizer_type="'adamw'",
        UnFreeze_Epoch=3,
        Init_Epoch=1,
        Init_lr=1e-3,
    )
    make_data(folder, train=24, test=6)
    train(folder)
    edit(folder, num_workers=2)
    train(folder)
    a, b = runs(folder)
    assert a != b and same(weights(a), weights(b))
    rows = history(a)
    assert [row["epoch"] for row in rows] == [2, 3]
    # 8 pictures a step: 1e-3 is scaled to 1.25e-4, and decays in steps of a tenth of the epochs
    expected = [1.25e-4 * (1e-2 ** (1 / 9)) ** (epoch // 0.3) for epoch in (1, 2)]
    assert [row["lr"] for row in rows] == pytest.approx(expected, rel=1e-4)


def test_bfloat16_on_cpu(tmp_path):
    folder = make_project(tmp_path, fp16=True, UnFreeze_Epoch=1)
    make_data(folder, train=24, test=6)
    train(folder)
    edit(folder, fp16=False)
    train(folder)
    a, b = runs(folder)
    assert (
        not same(weights(a), weights(b))
        and weights(a)["classifier.1.weight"].dtype == torch.float32
    )
    assert "scale" not in history(a)[0]  # a scaler is for float16 alone


needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="inductor wants a C++ compiler")


@pytest.mark.parametrize(
    "backend", ["eager", pytest.param("inductor", marks=[pytest.mark.slow, needs_compiler])]
)
def test_compile(tmp_path, backend):
    """The same keys, and the same training within rounding.

    A network whose BatchNorm has many values to a channel and that has no dropout: torchvision's
    with BatchNorm over 1 x 1 pixels turn a rounding error of the first layer into a difference of
    per cents, and compiled dropout draws anew.
    """
    make_project(tmp_path, backbone="'plain'", Freeze_Train=True, Freeze_Epoch=1)
    write_network(
        tmp_path / "nets",
        "plain",
        "nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(4), "
        "nn.Flatten(), nn.Linear(128, num_classes)",
    )
    make_data(tmp_path, train=24, test=6)
    train(tmp_path, "--save_dir", "plain")
    code = "import torch, functools\n"
    code += f"torch.compile = functools.partial(torch.compile, backend='{backend}')"
    script = hooked(tmp_path, code + "\nbefore('torch:compile', lambda *given: print('compiled'))")
    out, _ = train(tmp_path, "--save_dir", "compiled", "--compile", True, script=script)
    assert out.count("compiled") >= 2
    plain, compiled = (weights(next((tmp_path / name).iterdir())) for name in ("plain", "compiled"))
    assert plain.keys() == compiled.keys()
    for name in plain:
        torch.testing.assert_close(compiled[name], plain[name], rtol=1e-4, atol=1e-5)


def test_small_data_set(tmp_path):
    folder = make_project(tmp_path, Unfreeze_batch_size=32, UnFreeze_Epoch=1)
    make_data(folder, train=40, test=10, size=(96, 32))
    out, _ = train(folder)
    assert "cuts 67% of it away" in out
    assert history(run_of(folder))[0]["scored"] == 10
    edit(folder, Unfreeze_batch_size=41)
    _, err = train(folder, code=1)
    assert (
        "数据集过小,无法继续进行训练,请扩充数据集。" in err
        and "40" in err
        and "Traceback" not in err
    )


def test_a_network_with_auxiliary_heads_trains_without_them(tmp_path):
    folder = make_project(
        tmp_path, backbone="'googlenet'", UnFreeze_Epoch=2, Freeze_Train=True, Freeze_Epoch=1
    )
    make_data(folder, train=16, test=6)
    train(folder)
    assert len(history(run_of(folder))) == 2


def test_tensorboard_is_optional(first):
    pytest.importorskip(
        "tensorboard", reason="without it, the first run has shown that nothing else is lost"
    )
    assert list(run_of(first[0]).glob("events.out.tfevents*"))


def test_sample_data(tmp_path):
    """Without any list, the shapes are drawn and trained on.

    With a list named, their absence is an error.
    """
    folder = make_project(
        tmp_path,
        UnFreeze_Epoch=1,
        num_workers=2,
        cache_mb=500,
        Unfreeze_batch_size=100,
        backbone="'shufflenet_v2_x0_5'",
    )
    out, _ = train(folder)
    assert out.count("drawing 5000 + 600 pictures") == 1
    assert len(list((folder / "model_data/shapes/train").rglob("*.png"))) == 5000
    assert history(run_of(folder))[0]["scored"] == 600
    edit(folder, train_annotation_path="'mine.txt'")
    _, err = train(folder, code=1)
    assert "mine.txt" in err or "model_data" in err
    assert "python -m utils.annotation" in err and "Traceback" not in err


def test_progress_is_sparse_in_a_log(first):
    assert "\r" not in first[1] and len(first[1].splitlines()) < 30
