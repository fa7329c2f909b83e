"""Whatever is wrong before the first epoch becomes one sentence that names it."""

import os
import pickle
import re
import resource
import signal
from pathlib import Path

import pytest
import torch

from nets import get_model
from nets._weights import load_weights
from tests.helpers import make_data, make_project, start, train
from utils.plumbing import lists
from utils.plumbing.errors import UserError


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_weight_files(tmp_path):
    good = get_model("squeezenet1_1", 3, [32, 32]).state_dict()
    torch.save(good, tmp_path / "good.pth")
    assert load_weights(tmp_path / "good.pth").keys() == good.keys()
    data = (tmp_path / "good.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.pth").write_text("no weights\n" * 10)
    (tmp_path / "empty.pth").touch()
    torch.save([1, 2], tmp_path / "list.pth")
    bomb = Bomb(tmp_path / "this code has run")
    torch.save({"model": bomb}, tmp_path / "bomb.pth")
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps(bomb))
    for name in ("cut", "text", "empty", "list", "bomb", "pickle", "missing"):
        with pytest.raises(UserError, match=name) as caught:
            load_weights(tmp_path / f"{name}.pth")
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="folder"):
        load_weights(tmp_path)
    assert not bomb.path.exists()


def test_whole_runs_end_with_one_sentence(tmp_path):
    folder = make_project(tmp_path)
    make_data(folder, train=24, test=6)
    for words, sentence in (
        (["--backbone", "resnet81"], "did you mean 'resnet18'"),
        (["--backbone", "densenet121", "--input_shape", "[16, 16]"], "too small"),
        (["--model_path", "gone.pth"], "gone.pth"),
        (["--backbone", "resnet18", "--Unfreeze_batch_size", 1], "BatchNorm"),
        (["--classes_path", "train.py", "--test_annotation_path", "gone.txt"], "gone.txt"),
    ):
        _, err = train(folder, *words, code=1)
        assert re.search(sentence, err) and "Traceback" not in err and err.count("error: ") == 1, (
            err
        )
    assert not (folder / "logs").exists() or not list((folder / "logs").glob("*/*.pth"))


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (str(tmp_path / "pipe"), "/dev/zero"):
        for read in (
            lambda: load_weights(path),
            lambda: lists.read_text_file("classes_path", path),
            lambda: lists.get_classes(path),
        ):
            with pytest.raises(UserError, match="no regular file"):
                read()


def test_few_files_may_be_open(tmp_path):
    """ulimit -n 20: a sentence, whatever it is that cannot be opened."""
    folder = make_project(tmp_path, num_workers=4)
    make_data(folder, train=24, test=6)
    process = start(folder, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20)))
    out, err = process.communicate(timeout=300)
    assert (
        process.returncode == 1
        and "too many open files" in err
        and "ulimit -n" in err
        and "Traceback" not in err
    ), err


def test_folders_that_cannot_be_made(tmp_path):
    folder = make_project(tmp_path)
    make_data(folder, train=24, test=6)
    (folder / "dangling").symlink_to("nowhere")
    for name in ("dangling", "x" * 300, "train.py"):
        _, err = train(folder, "--save_dir", name, code=1)
        assert "save_dir = " in err and "Traceback" not in err and len(err) < 400


def test_interrupt_while_importing(tmp_path):
    folder = make_project(tmp_path)
    code = "import time\nprint('importing', flush=True)\ntime.sleep(600)\n"
    (folder / "numpy.py").write_text(code)  # the folder comes first among the places of modules
    process = start(folder, fresh=True)
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode in (130, -signal.SIGINT) and "Traceback" not in err, err
