"""In a launch each error appears once, whichever process has it, and every process ends."""

import os
import re
import signal
import subprocess

import pytest

from tests.helpers import begin, hooked, launch, make_data, make_project, torchrun
from utils.plumbing import processes

CONNECTED = "utils.dataloader:own_data"  # called when the processes are connected
FIRST = "utils.plumbing.settings:check_settings"  # and before
SENTENCE = "from utils.plumbing.errors import UserError; raise UserError('mend this')"
MISTAKE = "undefined_name"
SHOWN = {SENTENCE: "error: mend this", MISTAKE: "NameError: name"}
BY_THE_LAUNCHER = (SENTENCE, CONNECTED, None), (MISTAKE, CONNECTED, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = make_project(tmp_path_factory.mktemp("errors"), UnFreeze_Epoch=1)
    make_data(folder, train=32, test=8)
    return folder


def broken(folder, fault, place, rank):
    """train.py with a fault before `place`, on one rank or on all."""
    condition = f"if os.environ['RANK'] == '{rank}': " if rank is not None else ""
    return hooked(
        folder, f"def fail(*arguments):\n    {condition}{fault}\n\nbefore('{place}', fail)"
    )


def torchrun_fails(folder, *words, script="train.py"):
    """What a torchrun launch prints that must fail."""
    process = begin(folder, script, *words, launcher=torchrun(), stderr=subprocess.STDOUT)
    out, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    return out


def group_fails(folder, *words, script="train.py"):
    """The same of processes without a launcher."""
    return "".join(launch(folder, *words, script=script, code=1))


def before_torchruns(text):
    """What the processes themselves printed, without torchrun's own report."""
    return re.split(r"(?m)^[WE]\d{4} |^\[W\d{3}", text)[0]


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--backbone", "resnet81"], "did you mean 'resnet18'"),  # when they are connected
        (["--Unfreeze_batch_size", "3"], "cannot be divided by 2 processes"),  # and before
        (["--resume", "nowhere"], "not a run's folder"),  # by rank 0 alone, which tells the others
    ],
)
def test_a_sentence_of_all_ranks_or_of_rank_0(folder, words, sentence):
    text = group_fails(folder, *words)
    assert text.count("error: ") == 1 and text.count(sentence) == 1
    assert "most recent call last" not in text


FAULTS = [
    *BY_THE_LAUNCHER,
    (SENTENCE, FIRST, 1),
    (MISTAKE, FIRST, None),
    (MISTAKE, CONNECTED, 0),
]


@pytest.mark.parametrize("fault, place, rank", FAULTS)
def test_whoever_fails_speaks_once(folder, fault, place, rank):
    fails = torchrun_fails if (fault, place, rank) in BY_THE_LAUNCHER else group_fails
    text = fails(folder, script=broken(folder, fault, place, rank))
    assert text.count(SHOWN[fault]) == 1, text
    assert before_torchruns(text).count("Traceback") == (fault == MISTAKE), text


def test_memory_that_one_rank_lacks(folder):
    """In the middle of an epoch, when the other process waits for gradients."""
    code = """
import torch
def fail(*arguments):
    if os.environ["RANK"] == "1":
        torch.empty(1 << 60)
before("torch.optim:SGD.step", fail, 2)
"""
    text = group_fails(folder, script=hooked(folder, code))
    assert text.count("[rank 1] error: out of memory: lower Unfreeze_batch_size") == 1
    assert "Traceback" not in text


@pytest.mark.parametrize(
    "launcher, local_rank, own, expected",
    [
        ("torchrun", 0, 2, True),
        ("torchrun", 1, 2, False),
        ("torchrun", 0, 4, False),
        (None, 0, 2, False),
    ],
)
def test_the_first_process_of_a_machine_stops_its_torchrun(
    monkeypatch, launcher, local_rank, own, expected
):
    """But no other parent, and not where torchrun has all processes: it was told itself."""
    sent = []
    monkeypatch.setattr(processes.os, "kill", lambda *words: sent.append(words))
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(own))
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if launcher:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert processes.stop_launcher(signal.SIGTERM) == expected
    assert sent == [(os.getppid(), signal.SIGTERM)] * expected
