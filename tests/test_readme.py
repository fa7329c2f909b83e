"""Every command of README, as it stands there, in the order of its reader.

Only what takes long is made short. Each program begins in a fresh Python the first time.
"""

import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
import torchvision

from tests.helpers import (
    PYTHON,
    ROOT,
    begin,
    ended,
    environment,
    free_port,
    make_project,
    picture,
    runs,
)

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^ *```\n(.*?)^ *```", README, re.M | re.S)
TABLE = re.findall(r"^\| [^|]* \| `(torchrun [^`]*|python [^`]*)` \|$", README, re.M)
COMMANDS = [
    line.strip()
    for block in BLOCKS
    for line in block.splitlines()
    if re.match(r" *(python -m utils|python train|torchrun)", line)
]
SHORT = ["--UnFreeze_Epoch", "1", "--num_workers", "0", "--fp16", "False"]


def short(word_list):
    """The command without what takes long.

    One epoch, small pictures; one machine stands for several.
    """
    words = shlex.split(re.sub(r"\[224,224\]", "[64,64]", " ".join(map(shlex.quote, word_list))))
    for name in ("--UnFreeze_Epoch", "--Freeze_Epoch"):
        if name in words:
            words[words.index(name) + 1] = "1"
    if "train.py" in words:
        words += [
            word for pair in zip(SHORT[::2], SHORT[1::2]) if pair[0] not in words for word in pair
        ]
    return words


started = []  # the programs


def run(folder, text):
    run_folder = (
        max(runs(folder), key=lambda path: path.stat().st_mtime)
        if (folder / "logs").exists()
        else "RUN"
    )
    words = short(
        [
            word.replace("RUN", str(run_folder))
            .replace("FOLDER", "photos")
            .replace("PICTURE", "photo.jpg")
            for word in shlex.split(text)
        ]
    )
    env = {**environment(), "TORCH_HOME": str(folder / "cache")}
    program = words[2] if words[1] == "-m" else words[1]
    options = {"env": env, "fresh": program not in started}
    started.append(program)
    if words[0] == "torchrun":
        options["launcher"] = [*PYTHON, "-m", "torch.distributed.run"]
        one_machine = [word for word in words[1:] if not re.match("--(nnodes|node_|master)", word)]
        words = [f"--master_port={free_port()}", *one_machine]
        words = ["torchrun", *(word.replace("=8", "=2") for word in words)]
    return "".join(ended(begin(folder, *words[1:], **options), timeout=900))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The project with a folder of photos, and torchvision's weights where a download would have
    put them.
    """
    folder = make_project(
        tmp_path_factory.mktemp("readme"), backbone="'resnet9'", Unfreeze_batch_size=8
    )
    rng = np.random.default_rng(0)
    for split, number in (("train", 12), ("test", 4)):
        for label, name in enumerate(("cat", "dog")):
            (folder / "photos" / split / name).mkdir(parents=True)
            for i in range(number):
                picture(label, rng).save(folder / "photos" / split / name / f"{i}.jpg")
    picture(0, rng).save(folder / "photo.jpg")
    cached = (
        folder
        / "cache/hub/checkpoints"
        / torchvision.models.ResNet18_Weights.DEFAULT.url.rpartition("/")[2]
    )
    cached.parent.mkdir(parents=True)
    torch.save(torchvision.models.resnet18().state_dict(), cached)
    return folder


def test_it_is_short_and_names_what_there_is():
    assert len(README.encode()) <= 12_000
    assert not set(re.findall(r"\b[A-Z]{5,}\b", README)) - {
        "README",
        "FOLDER",
        "PICTURE",
        "SIGTERM",
        "MNIST",
    }, "a placeholder"
    assert len(COMMANDS) >= 9 and len(TABLE) >= 3
    for name in re.findall(r"`((?:utils|nets|tests)/[\w./]+)`", README):
        assert (ROOT / name).exists(), name
    for target in re.findall(r"\]\(([\w./]+)", README):
        assert (ROOT / target).exists(), target


def test_its_commands(folder):
    run(
        folder, "python -m utils.annotation photos"
    )  # so that the first training is of photos and not of 5,000 shapes
    done = set()
    for text in [*COMMANDS, *TABLE]:
        if text not in done and "--resume" not in text:
            out = run(folder, text)
            assert not re.search(r"(?m)^(\[rank \d+\] )?error: ", out)
        done.add(text)
    out = run(folder, "python train.py --resume True")
    assert "there is no unfinished run" in out


def test_its_python(folder):
    if not (folder / "logs").exists():  # when this test is run alone
        run(folder, "python -m utils.annotation photos")
        run(folder, "python train.py")
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    result = subprocess.run(
        [sys.executable, "-c", code.replace("RUN", str(runs(folder)[-1]))],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0 and re.search(r"\('(cat|dog)', [\d.]+", result.stdout), (
        result.stderr
    )


def test_the_settings_that_it_names():
    import train as trainer

    named = re.findall(r"^\| `(\w+)`(?:, `(\w+)`)? \| ", README, re.M)
    for name in filter(None, (name for pair in named for name in pair)):
        assert hasattr(trainer, name) or os.path.exists(ROOT / "utils" / f"{name}.py"), name
