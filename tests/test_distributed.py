"""Real groups of processes on this machine, over gloo."""

import sys

import pytest
import torch

from tests.helpers import (
    TORCHRUN,
    edit,
    free_port,
    history,
    hooked,
    launch,
    make_data,
    make_project,
    run_of,
    runs,
    start,
    train,
    weights,
    write_network,
)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run of one process, whose network has neither BatchNorm nor dropout."""
    folder = make_project(
        tmp_path_factory.mktemp("alone"), backbone="'convnext_tiny_plain'", UnFreeze_Epoch=3
    )
    plain_network(folder)
    imports, main, rest = (
        (folder / "train.py").read_text(encoding="utf-8").rpartition("\nif __name__")
    )
    mine = "\nF = torch.nn.functional  # a fork's, which no process can send another\n"
    (folder / "train.py").write_text(imports + mine + main + rest, encoding="utf-8")
    make_data(folder, train=50, test=17)  # a process has none of the last step's one picture
    train(folder)
    return folder, history(run_of(folder)), weights(run_of(folder))


def plain_network(folder):
    write_network(
        folder / "nets",
        "convnext_tiny_plain",
        "nn.Conv2d(3, 16, 3, 2), nn.ReLU(), nn.Conv2d(16, 16, 3, 2), nn.GroupNorm(4, 16), "
        "nn.ReLU(), "
        "nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes)",
    )


LAUNCHERS = {
    "torchrun": TORCHRUN,
    "launch": [
        *(sys.executable, "-W", "ignore", "-m", "torch.distributed.launch", "--nproc_per_node=2"),
    ],
}


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("launch", marks=pytest.mark.slow)])
def test_two_processes_agree_with_one(alone, launcher):
    folder, rows, end = alone
    edit(folder, save_dir=f"'{launcher}'")
    words = [*LAUNCHERS[launcher], f"--master_port={free_port()}"]
    out, _ = train(folder, launcher=words)
    edit(folder, save_dir="'logs'")
    (run,) = (folder / launcher).iterdir()
    agree(history(run), rows)
    assert weights(run).keys() == end.keys()
    for name, value in weights(run).items():
        torch.testing.assert_close(value, end[name], rtol=1e-3, atol=1e-4)
    assert out.count("epoch 2/3: train loss") == 1 and out.count("best top-1") == 1


def agree(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)
        assert a["val_loss"] == pytest.approx(b["val_loss"], rel=1e-4)
        assert a["top1"] == b["top1"] and a["scored"] == b["scored"] == 17


def test_an_early_stop_ends_all_processes(alone):
    folder, _, _ = alone
    code = """
from utils.loss_history import LossHistory
LossHistory.best = lambda self: next(iter(self.rows), None)  # the first epoch stays the best
"""
    words = ("--early_stop", 1, "--save_dir", "early")
    out, _ = launch(folder, *words, script=hooked(folder, code))
    (run,) = (folder / "early").iterdir()
    assert len(history(run)) == 2 and out.count("early_stop = 1: no better epoch") == 1


def test_two_nodes(alone):
    folder, rows, _ = alone
    edit(folder, save_dir="'nodes'")
    port = free_port()

    def agent(node):
        return [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nnodes=2",
            f"--node_rank={node}",
            "--nproc_per_node=1",
            "--master_addr=127.0.0.1",
            f"--master_port={port}",
        ]

    other = start(folder, launcher=agent(1))
    out, _ = train(folder, launcher=agent(0))
    out_1, err_1 = other.communicate(timeout=300)
    edit(folder, save_dir="'logs'")
    assert other.returncode == 0, err_1
    (run,) = (folder / "nodes").iterdir()
    agree(history(run), rows)
    assert "epoch" not in out_1


UNUSED = """from torch import nn


class Sometimes(nn.Module):
    has_unused_parameters = True

    def __init__(self, num_classes):
        super().__init__()
        self.unused, self.body = nn.Linear(4, 4), nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, num_classes)

    def forward(self, pictures):
        return self.head(self.body(pictures).mean((2, 3)))


def sometimes(num_classes, input_shape):
    return Sometimes(num_classes)
"""


def test_parameters_that_no_step_uses(tmp_path):
    folder = make_project(tmp_path, backbone="'sometimes'", UnFreeze_Epoch=1)
    (folder / "nets/sometimes.py").write_text(UNUSED)
    make_data(folder, train=24, test=6)
    launch(folder)
    assert len(history(run_of(folder))) == 1


def test_validation_is_the_same_for_the_same_weights(alone):
    """With a learning rate of nearly nothing both launches validate the same weights."""
    folder, _, _ = alone
    for name, processes in (("one", 1), ("two", 2)):
        launch(
            folder,
            "--Init_lr",
            1e-3,
            "--backbone_lr_scale",
            0.0,
            "--Freeze_Train",
            True,
            "--Freeze_Epoch",
            1,
            "--model_path",
            run_of(folder) / "last_epoch_weights.pth",
            "--UnFreeze_Epoch",
            1,
            "--momentum",
            0.0,
            "--clip_grad_norm",
            1e-6,
            "--weight_decay",
            0.0,
            "--save_dir",
            f"{name}_val",
            processes=processes,
        )
    one, two = (history(next((folder / f"{name}_val").iterdir()))[0] for name in ("one", "two"))
    assert one["scored"] == two["scored"] == 17 and one["top1"] == two["top1"]
    assert one["val_loss"] == pytest.approx(two["val_loss"], rel=1e-6)


def test_batch_norm_network_and_freeze(tmp_path):
    folder = make_project(
        tmp_path,
        backbone="'shufflenet_v2_x0_5'",
        Freeze_Train=True,
        Freeze_Epoch=1,
        num_workers=1,
        ema_decay=0.9,
        accumulate=2,
    )
    make_data(folder, train=36, test=11)
    out, _ = launch(folder)
    assert [row["scored"] for row in history(run_of(folder))] == [11, 11]
    assert len(runs(folder)) == 1 and out.count("continuing") == 0


def test_settings_that_need_a_launcher_or_a_gpu(tmp_path):
    folder = make_project(tmp_path, distributed=True)
    make_data(folder)
    _, err = train(folder, code=1)
    assert "torchrun --nproc_per_node" in err and "Traceback" not in err
    if not torch.cuda.is_available():
        for constants, word in (
            ({"Cuda": True}, "set Cuda = False"),
            ({"sync_bn": True}, "set sync_bn = False"),
        ):
            edit(folder, **{"distributed": False, "Cuda": False, "sync_bn": False, **constants})
            _, err = train(folder, code=1)
            assert word in err and "Traceback" not in err


def test_class_weights_do_not_depend_on_the_processes(alone):
    """A batch's share of rare classes differs between processes; each picture counts the same."""
    folder, _, _ = alone
    rows = []
    lines = (folder / "model_data/cls_train.txt").read_text().splitlines(keepends=True)
    (folder / "model_data/uneven.txt").write_text(
        "".join(line for i, line in enumerate(lines) if line[0] == "0" or i % 5 == 0)
    )
    for name, processes in (("one", 1), ("two", 2)):
        launch(
            folder,
            "--class_weights",
            "balanced",
            "--train_annotation_path",
            "model_data/uneven.txt",
            "--save_dir",
            f"{name}_uneven",
            processes=processes,
        )
        rows.append(history(next((folder / f"{name}_uneven").iterdir())))
    agree(*rows)


def test_unreadable_pictures_are_counted_over_the_processes(alone):
    """The second test picture is the second process's."""
    folder, _, _ = alone
    lines = (folder / "model_data/cls_test.txt").read_text().splitlines(keepends=True)
    (folder / "model_data/broken.png").write_bytes(b"no picture")
    lines[1] = "1;model_data/broken.png\n"
    (folder / "model_data/one_broken.txt").write_text("".join(lines))
    words = "--test_annotation_path model_data/one_broken.txt --UnFreeze_Epoch 1 --save_dir broken"
    out, _ = launch(folder, *words.split())
    (row,) = history(next((folder / "broken").iterdir()))
    assert row["unreadable"] == 1 and row["scored"] == 16 and out.count("unreadable picture") == 1
