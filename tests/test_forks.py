"""The README's forks, as they stand there: alone, under torchrun, through a resume, and in evaluate and predict."""
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from nets import get_model
from tests.helpers import ROOT, environment, history, make_project, run_of, runs, same, start, torchrun, train, weights
from tests.test_resume import kill_group

FORKS = re.findall(r"\*\*([^*]+)\*\*:[^`]*?(?:`[^`\n]+`[^`]*?)*```diff\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
NAMES = ["The loss", "A loss that needs the pictures or another network", "A metric, and which epoch is best", "An optimizer",
         "A learning-rate curve", "The data"]
WORDS = ["--optimizer_type", "rmsprop", "--lr_decay_type", "linear", "--focal_gamma", 1.5, "--Init_lr", 1e-3, "--num_workers", 1]


def apply(folder, change):
    """Apply a diff without line numbers: its old lines must stand in the file, once."""
    for part in re.split(r"^--- ", change, flags=re.M)[1:]:
        name, *lines = part.splitlines()
        old, new = ("".join(line[1:] + "\n" for line in lines if line[:1] in signs) for signs in ("- ", "+ "))
        path = folder / name
        text = path.read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{name} has {text.count(old)} times:\n{old}"
        path.write_text(text.replace(old, new), encoding="utf-8")


def fashion(folder, train_pictures, test_pictures):
    """Files in the data set's own format: magic number, sizes, bytes. The class shows in the brightness."""
    raw = folder / "model_data/FashionMNIST/raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, number in (("train", train_pictures), ("t10k", test_pictures)):
        labels = np.arange(number) % 10
        images = (labels[:, None, None] * 22 + rng.integers(0, 30, (number, 28, 28))).astype(np.uint8)
        for kind, array, sizes in (("images-idx3", images, (number, 28, 28)), ("labels-idx1", labels.astype(np.uint8), (number,))):
            header = np.array([0x0800 + len(sizes), *sizes], ">i4").tobytes()
            (raw / f"{name}-{kind}-ubyte").write_bytes(header + array.tobytes())


def forked(folder, names):
    make_project(folder, UnFreeze_Epoch=2, Freeze_batch_size=20, Unfreeze_batch_size=20, save_minutes=1 / 6000)
    fashion(folder, 400, 50)
    torch.manual_seed(0)
    torch.save(get_model("resnet18", 10, [32, 32]).state_dict(), folder / "model_data/teacher.pth")
    for name, change in FORKS:
        if name in names or name == "The data":
            apply(folder, change)
    return folder


def command(folder, module, *words):
    result = subprocess.run([sys.executable, "-m", module, *map(str, words)], cwd=folder, env=environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_readme_shows_each_fork():
    assert [name for name, _ in FORKS] == NAMES
    places = {name: (len(set(re.findall(r"^--- (.*)$", change, re.M))), change.count("--- ")) for name, change in FORKS}
    assert all(files <= 2 and places <= 4 for files, places in places.values()), places


def test_all_forks_at_once(tmp_path):
    folder = forked(tmp_path / "a", NAMES)
    out, _ = train(folder, *WORDS)
    run, rows = run_of(folder), history(run_of(folder))
    assert "recall" in out and "best recall" in out.splitlines()[-1] and rows[-1]["recall"] == pytest.approx(rows[-1]["top1"])
    assert rows[-1]["train_recall"] > 0 and [row["lr"] for row in rows] == pytest.approx([3.125e-4, 1.578125e-4], rel=1e-3)
    assert "teacher's weights: 122 of 122" in out and rows[-1]["train_loss"] > rows[-1]["val_loss"]  # with the distillation
    said = command(folder, "utils.evaluate", run.relative_to(folder))
    best = max(rows, key=lambda row: row["recall"])
    assert f"loss {best['val_loss']:.6g}"[:12] in said and "recall" in said

    process = start(folder, *WORDS)  # and interrupted
    while len(runs(folder)) < 2 or not (runs(folder)[1] / "last_checkpoint.pth").exists():
        time.sleep(0.01)
    kill_group(process, signal.SIGTERM)
    process.communicate(timeout=60)
    train(folder, *WORDS, "--resume", True)
    assert same(weights(runs(folder)[1]), weights(run)) and history(runs(folder)[1])[-1]["recall"] == rows[-1]["recall"]

    train(folder, *WORDS, "--save_dir", "both", launcher=torchrun())
    together = history(next((folder / "both").iterdir()))
    assert [row["scored"] for row in together] == [50, 50] and together[0]["recall"] == pytest.approx(together[0]["top1"])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_each_fork_alone(tmp_path, name):
    folder = forked(tmp_path, [name])
    words = [word for pair in zip(WORDS[::2], WORDS[1::2]) for word in pair
             if {"--optimizer_type": "An optimizer", "--lr_decay_type": "A learning-rate curve", "--focal_gamma": "The loss"}.get(
                 pair[0], name) == name]
    train(folder, *words)
    train(folder, *words, launcher=torchrun())
    train(folder, *words, "--UnFreeze_Epoch", 3, "--resume", runs(folder)[0].name)
    assert len(history(runs(folder)[0])) == 3
