"""Under torchrun every error appears exactly once, whichever process has it, and every process
ends.
"""

import re
import subprocess

import pytest

from tests.helpers import environment, make_data, make_project, torchrun


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = make_project(tmp_path_factory.mktemp("errors"), UnFreeze_Epoch=1)
    make_data(folder, train=32, test=8)
    return folder


def broken(folder, line, before="    # The data\n", rank=None):
    """train.py under another name, with `line` put in, on one rank or on all."""
    text = (folder / "train.py").read_text(encoding="utf-8")
    assert before in text
    condition = f"if rank() == {rank}: " if rank is not None else ""
    (folder / "broken.py").write_text(
        text.replace(before, f"    {condition}{line}\n{before}", 1), encoding="utf-8"
    )
    return "broken.py"


def torchrun_ends(folder, *words, script="train.py"):
    """stderr of a torchrun launch that must fail."""
    result = subprocess.run(
        [*torchrun(), script, *words],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode != 0
    return result.stdout + result.stderr


@pytest.mark.parametrize(
    "words, sentence",
    [
        (
            ["--backbone", "resnet81"],
            "did you mean 'resnet18'",
        ),  # found after the processes are connected
        (["--Unfreeze_batch_size", "3"], "cannot be divided by 2 processes"),  # and before
        (["--resume", "nowhere"], "not a run's folder"),
    ],
)  # on rank 0 alone, told to the others
def test_a_sentence_of_all_ranks_or_of_rank_0(folder, words, sentence):
    said = torchrun_ends(folder, *words)
    assert (
        said.count("error: ") == 1
        and said.count(sentence) == 1
        and "most recent call last" not in before_torchruns(said)
    )


def before_torchruns(said):
    """What the processes themselves said, without torchrun's own report."""
    return re.split(r"(?m)^[WE]\d{4} |^\[W\d{3}", said)[0]


CONNECTED, FIRST = "    # The data\n", "    settings = command_line"


SENTENCE, MISTAKE = (
    ("raise lists.UserError('mend this')", "error: mend this"),
    ("undefined_name", "NameError: name"),
)


@pytest.mark.parametrize(
    "fault, before, rank",
    [
        (SENTENCE, FIRST, 1),
        (MISTAKE, FIRST, None),
        (SENTENCE, CONNECTED, None),
        (MISTAKE, CONNECTED, 0),
        (MISTAKE, CONNECTED, 1),
    ],
)
def test_whoever_fails_speaks_once(folder, fault, before, rank):
    line, shown = fault
    said = torchrun_ends(folder, script=broken(folder, line, before, rank))
    assert said.count(shown) == 1, said
    assert before_torchruns(said).count("Traceback") == ("NameError" in shown), said


def test_memory_that_one_rank_lacks(folder):
    """In the middle of an epoch, when the other process waits for gradients."""
    text = (folder / "utils/fit.py").read_text(encoding="utf-8")
    try:
        (folder / "utils/fit.py").write_text(
            text.replace(
                "        optimizer_step(",
                "        if rank() == 1 and position.step == 2:\n"
                "            raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB')\n        optimizer_step(",
                1,
            )
        )
        said = torchrun_ends(folder)
    finally:
        (folder / "utils/fit.py").write_text(text)
    assert said.count(
        "[rank 1] error: out of memory: lower Unfreeze_batch_size"
    ) == 1 and "Traceback" not in before_torchruns(said), said
