"""Checkpoints of other trainers.

Which entry is taken, prefixes, safetensors, and what is refused in one sentence.
"""

import argparse
import builtins
import os
import socket

import numpy as np
import pytest
import torch
from torch import nn

from nets._weights import load_matching, load_weights
from tests.helpers import same
from utils.plumbing.errors import UserError
from utils.plumbing.files import load_tensors, save_tensors


def tiny():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    )


def state(value):
    return {k: torch.full_like(v, value) for k, v in tiny().state_dict().items()}


def under(prefix, tensors):
    return {prefix + k: v for k, v in tensors.items()}


@pytest.mark.parametrize(
    "saved, entry",
    [
        ({"state_dict": state(7), "args": argparse.Namespace(lr=0.1), "epoch": 3}, "state_dict"),
        ({"model": state(7), "optimizer": {"state": {0: torch.zeros(1)}}}, "model"),
        ({"model": state(1), "model_ema": state(7)}, "model_ema"),
        ({"model": state(1), "model_ema": {"module": state(7)}}, "model_ema.module"),
        (
            {
                "model": state(1),
                "model_ema": {**under("module.", state(7)), "n_averaged": torch.tensor(9)},
            },
            "model_ema",
        ),
        ({"state_dict": state(1), "state_dict_ema": state(7)}, "state_dict_ema"),
        ({"model": state(1), "ema": {"state_dict": state(7), "decay": 0.9}}, "ema.state_dict"),
        ({"model": state(7), "ema": None}, "model"),
        ({"model": state(7), "ema": {"decay": 0.9}}, "model"),
        ({"student": state(1), "teacher": under("module.backbone.", state(7))}, "teacher"),
        ({"student": under("module.", state(7))}, "student"),
        ({"model": {"state_dict": under("module._orig_mod.", state(7))}}, "model.state_dict"),
        (
            {"state_dict": {**under("model.", state(7)), "criterion.weight": torch.ones(2)}},
            "state_dict",
        ),
        ({**under("encoder.", state(7)), "projector.0.weight": torch.ones(9, 4)}, None),
        ({**state(7), "epoch": 4}, None),
    ],
)
def test_entries(saved, entry, tmp_path, capsys):
    torch.save(saved, tmp_path / "w.pth")
    model = tiny()
    assert load_matching(model, load_weights(tmp_path / "w.pth"), "w.pth") == []
    assert same(model.state_dict(), state(7))
    assert entry is None or f"its entry {entry}\n" in capsys.readouterr().err


def test_wrappers_are_named(capsys):
    model = tiny()
    load_matching(model, {**under("encoder.", state(1)), **under("backbone.", state(2))}, "w.pth")
    assert (
        same(model.state_dict(), state(2))
        and "from 9 of the file under 'backbone.'" in capsys.readouterr().out
    )


def test_a_network_with_such_names():
    """Names of one's own that look like a wrapper's stay."""

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.backbone, self.module = tiny(), tiny(), tiny()

    source, target = Own(), Own()
    assert load_matching(target, source.state_dict(), "own") == [] and same(
        source.state_dict(), target.state_dict()
    )
    assert load_matching(target, under("module.", source.state_dict()), "wrapped") == []


def test_safetensors(tmp_path, monkeypatch):
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file(under("model.", state(7)), tmp_path / "w.safetensors")
    model = tiny()
    assert load_matching(model, load_weights(tmp_path / "w.safetensors"), "w") == [] and same(
        model.state_dict(), state(7)
    )
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "w.safetensors").read_bytes()[:100])
    with pytest.raises(UserError, match="cut short"):
        load_weights(tmp_path / "cut.safetensors")
    with pytest.raises(UserError, match="does not exist"):
        load_weights(tmp_path / "missing.safetensors")


def test_safetensors_not_installed(tmp_path, monkeypatch):
    (tmp_path / "w.safetensors").write_bytes(b"any")
    plain = builtins.__import__

    def without(name, *args, **options):
        if name.startswith("safetensors"):
            raise ImportError(name)
        return plain(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="pip install safetensors"):
        load_weights(tmp_path / "w.safetensors")


def test_numpy_s_numbers_are_saved_as_plain_ones(tmp_path):
    """A fork's curve or metric may give some."""
    save_tensors(tmp_path / "w.pth", {"lr": np.float64(0.5), "rows": [(np.int64(3), np.ones(2))]})
    assert load_tensors(tmp_path / "w.pth") == {"lr": 0.5, "rows": [(3, [1.0, 1.0])]}


@pytest.mark.parametrize(
    "saved, words",
    [
        ({0: torch.zeros(2)}, "no state_dict"),
        ({"model": {"a": 1}}, "no state_dict"),
        ({}, "no state_dict"),
        ({"epoch": 3, "best": "x"}, "no state_dict"),
        ({"state_dict": state(7), "best_acc": np.float64(0.5)}, r"never run"),
    ],
)
def test_no_state_dict(saved, words, tmp_path):
    torch.save(saved, tmp_path / "w.pth")
    with pytest.raises(UserError, match=words) as caught:
        load_weights(tmp_path / "w.pth", "weights")
    message = str(caught.value)
    assert message.startswith("weights: ") and "model_path" not in message and "\n" not in message


def test_names_for_the_terminal(capsys):
    strange = nn.Module()
    strange.register_parameter("\x1b[2Jevil\n", nn.Parameter(torch.zeros(1)))
    strange.network = tiny()
    load_matching(strange, under("network.", state(7)), "w\x1b[2J.pth")
    out = capsys.readouterr().out
    assert "\x1b" not in out and r"\x1b[2Jevil" in out and len(out.splitlines()) == 3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "strange",
    [
        lambda: torch.zeros(2, 2, device="meta"),
        lambda: torch.eye(2).to_sparse(),
        lambda: torch.eye(2).to_sparse_csr(),
        lambda: torch.quantize_per_tensor(torch.eye(2), 0.1, 0, torch.qint8),
        lambda: torch.quantize_per_channel(
            torch.eye(2), torch.ones(2), torch.zeros(2), 0, torch.qint8
        ),
    ],
)
def test_tensors_that_are_not_plain(strange, tmp_path):
    torch.save({"model": {"bias": torch.zeros(2), "weight": strange()}}, tmp_path / "w.pth")
    with pytest.raises(
        UserError, match="w.pth'? (holds weights that are|cannot be read)"
    ) as caught:
        load_matching(nn.Linear(2, 2), load_weights(tmp_path / "w.pth"), "w.pth")
    assert "\n" not in str(caught.value)


def test_pipes_and_devices_are_not_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    os.mkfifo(tmp_path / "pipe.pth")
    with socket.socket(socket.AF_UNIX) as door:
        door.bind("door.pth")
        for path in (tmp_path / "pipe.pth", tmp_path / "door.pth", "/dev/zero"):
            with pytest.raises(UserError, match="no regular file"):
                load_tensors(path)
