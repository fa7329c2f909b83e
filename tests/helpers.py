"""What the tests share.

A copy of the project with edited constants, small picture sets, and ways to run both.
"""

import atexit
import compileall
import csv
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from py_compile import PycInvalidationMode

import numpy as np
import torch
from PIL import Image

from tests.warm import Warm

ROOT = Path(__file__).resolve().parent.parent
SMALL = dict(
    backbone="'squeezenet1_1'",
    input_shape=[32, 32],
    UnFreeze_Epoch=2,
    Freeze_batch_size=8,
    num_workers=0,
    Unfreeze_batch_size=8,
    Init_lr=1e-2,
    fp16=False,
    cache_mb=0,
    Cuda="TEST_CUDA" in os.environ,
)  # the switch: TEST_CUDA=1
PYTHON = (sys.executable,)
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]


def picture(label, rng, size=(32, 32), classes=3):
    """A noisy picture whose colour says its class."""
    pixels = rng.integers(0, 90, (size[1], size[0], 3))
    pixels[..., label % 3] += 120 if label < 3 else 60
    return Image.fromarray(pixels.astype(np.uint8))


def make_data(folder, train=48, test=20, classes=3, size=(32, 32), ending="png"):
    """Pictures, class file and annotation lists under folder/model_data, at train.py's default
    paths.
    """
    rng = np.random.default_rng(0)
    data = Path(folder, "model_data")
    data.mkdir(parents=True, exist_ok=True)
    (data / "cls_classes.txt").write_text(
        "".join(f"class{i}\n" for i in range(classes)), encoding="utf-8"
    )
    for split, number in (("train", train), ("test", test)):
        lines = []
        for i in range(number):
            path = data / f"{split}{i}.{ending}"
            picture(i % classes, rng, size).save(path)
            lines.append(f"{i % classes};model_data/{path.name}\n")
        (data / f"cls_{split}.txt").write_text("".join(lines), encoding="utf-8")


@cache
def originals():
    """A copy of train.py, nets/ and utils/ to copy from, compiled.

    What is compiled is checked by its source's hash: by its date, a source that is edited twice
    within one second would be taken for the first edit's.
    """
    folder = Path(tempfile.mkdtemp(prefix="project-"))
    atexit.register(shutil.rmtree, folder)
    for part in ("nets", "utils"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train.py", folder)
    compileall.compile_dir(folder, quiet=1, invalidation_mode=PycInvalidationMode.CHECKED_HASH)
    return folder


def make_project(folder, **constants):
    """A copy of train.py, nets/ and utils/ in `folder`, its constants edited as a user does."""
    folder = Path(folder)
    shutil.copytree(originals(), folder, dirs_exist_ok=True)
    edit(folder, **{**SMALL, **constants})
    return folder


def edit(folder, **constants):
    path = Path(folder, "train.py")
    text = path.read_text(encoding="utf-8")
    for name, value in constants.items():
        text, count = re.subn(
            rf"^{name} = [^\n]*?(?=  #|$)", lambda m: f"{name} = {value}", text, count=1, flags=re.M
        )
        assert count == 1, f"train.py has no constant {name}"
    path.write_text(text, encoding="utf-8")


def write_network(nets, name, layers):
    """A network of one's own in the folder `nets`; layers: the source of Sequential's arguments."""
    Path(nets, f"{name}.py").write_text(
        f"from torch import nn\n\n\ndef {name}(num_classes, input_shape):\n"
        f"    return nn.Sequential({layers})\n"
    )


def environment():
    drop = (
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "TORCHELASTIC_RESTART_COUNT",
        "TORCHELASTIC_RUN_ID",
        "PYTHONUNBUFFERED",
        "PYTHONWARNINGS",
        "PYTHONSAFEPATH",
        "TORCH_LOGS",
        "TORCH_CPP_LOG_LEVEL",
        "FORCE_COLOR",
    )
    stand_in = [
        p
        for p in os.environ.get("PYTHONPATH", "").split(os.pathsep)
        if Path(p, "fakecuda.py").is_file()
    ]  # for CUDA
    return {
        **{k: v for k, v in os.environ.items() if k not in drop},
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(stand_in),
    }


@cache
def warm():
    """This process's Python that has imported torch.

    None where programs need a fresh one: on a GPU or its stand-in.
    """
    env = environment()
    if sys.platform != "linux" or env["PYTHONPATH"] or "TEST_CUDA" in env:
        return None
    return Warm(env)


def begin(folder, *words, launcher=PYTHON, env=None, fresh=False, **options):
    """Begin `launcher words…` in a process group of its own.

    Without a launcher it is a Python that has imported torch already, unless a fresh one is asked
    for.
    """
    words = [str(word) for word in words]
    env = env or environment()
    options = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    fresh = fresh or "preexec_fn" in options or tuple(launcher) != PYTHON
    if not fresh and warm():
        return warm().start(words, folder, env, **options)
    words = [*map(str, launcher), *words]
    return subprocess.Popen(words, cwd=folder, env=env, start_new_session=True, **options)


def ended(process, code=0, timeout=900, text=None):
    """Wait for a process's end; returns (stdout, stderr) after checking the exit code."""
    try:
        out, err = process.communicate(text, timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"no end after {timeout} s: {process.communicate()}") from None
    assert process.returncode == code, f"exit {process.returncode}, not {code}:\n{out}\n{err}"
    return out, err


def start(folder, *words, script="train.py", **options):
    """Begin `launcher train.py words…`; options as begin's."""
    return begin(folder, script, *words, **options)


def train(folder, *words, code=0, timeout=900, **options):
    """Run training to its end; returns (stdout, stderr) after checking the exit code."""
    return ended(start(folder, *words, **options), code, timeout)


def command(folder, module, *words, code=0, text=None):
    """Run `python -m module words…` with `text` on its standard input.

    Returns (stdout, stderr), the exit code checked.
    """
    stdin = subprocess.PIPE if text is not None else None
    return ended(begin(folder, "-m", module, *words, stdin=stdin), code, text=text)


HOOKS = """
import itertools, os, pkgutil, signal, sys

def before(place, action, number=None):
    # Call action(*arguments) before each call, or the number-th one, of a place like "os:replace"
    owner, _, name = place.rpartition("." if "." in place.partition(":")[2] else ":")
    owner = pkgutil.resolve_name(owner)
    original, calls = getattr(owner, name), itertools.count(1)
    def replaced(*arguments, **options):
        if next(calls) == number or number is None:
            action(*arguments)
        return original(*arguments, **options)
    setattr(owner, name, replaced)

def die(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)

def send_sigterm(*arguments):
    os.kill(os.getpid(), signal.SIGTERM)

"""


def hooked(folder, code):
    """Write train.py with `code` run before it, which replaces what it uses; returns the script's
    name.

    The code has before(place, action, number), die and send_sigterm at hand.
    """
    text = Path(folder, "train.py").read_text(encoding="utf-8")
    Path(folder, "hooks.py").write_text(HOOKS + code, encoding="utf-8")
    Path(folder, "hooked.py").write_text(f"import hooks\n{text}", encoding="utf-8")
    return "hooked.py"


def start_group(folder, *words, processes=2, **options):
    """Begin training in several connected processes, as torchrun does but without one."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "WORLD_SIZE": processes,
        "LOCAL_WORLD_SIZE": processes,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": store.port,
        "TORCHELASTIC_USE_AGENT_STORE": True,
        "TORCHELASTIC_RESTART_COUNT": 0,
        "TORCHELASTIC_RUN_ID": "none",
    }
    if sys.platform == "linux":
        shared["GLOO_SOCKET_IFNAME"] = "lo"  # whatever this machine's name leads to
    group = []
    for rank in range(processes):
        own = {"RANK": rank, "LOCAL_RANK": rank, **shared}
        env = {**environment(), **{name: str(value) for name, value in own.items()}}
        group.append(start(folder, *words, env=env, **options))
        group[-1].store = store  # lives as long as they do
    return group


def launch(folder, *words, code=0, timeout=900, **options):
    """Run training in several connected processes to its end, and end them all where one fails.

    Returns (stdout, stderr) of all after checking the exit code, which is the first one's that
    fails.
    """
    group = start_group(folder, *words, **options)
    failed, running, end = None, True, time.monotonic() + timeout
    while failed is None and running:
        running = any(process.poll() is None for process in group)  # before their codes are read
        failed = next((process.poll() for process in group if process.poll()), None)
        if running and time.monotonic() > end:
            failed = f"none within {timeout} s"  # they wait for each other
        time.sleep(0.02)
    outputs = []
    for process in group:
        if failed is not None and process.poll() is None:
            process.kill()  # one that saves at SIGTERM would wait for the others
        outputs.append(process.communicate(timeout=timeout))
    out, err = ("".join(texts) for texts in zip(*outputs, strict=True))
    assert (failed or 0) == code, f"exit {failed}, not {code}:\n{out}\n{err}"
    return out, err


def children(pid):
    """Process ids of pid's living children (of Linux's /proc)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            state, parent = stat.read_text(errors="replace").rpartition(")")[2].split()[:2]
            if int(parent) == pid and state != "Z":
                found.append(int(stat.parent.name))
    return found


reserved = []


def free_port():
    """A port for a launcher to listen on. Kept bound, so that no other program is given it."""
    probe = socket.socket()
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the launcher's has it as well
    probe.bind(("127.0.0.1", 0))
    reserved.append(probe)
    return probe.getsockname()[1]


def torchrun():
    """The launcher of two processes, on a port that nobody uses."""
    return [*TORCHRUN, f"--master_port={free_port()}"]


def runs(folder):
    return sorted(p for p in Path(folder, "logs").iterdir() if p.is_dir())


def run_of(folder):
    (only,) = runs(folder)
    return only


def history(run):
    with open(Path(run, "history.csv"), encoding="utf-8") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def weights(run, name="last_epoch_weights.pth"):
    return torch.load(Path(run, name), weights_only=True)


def same(a, b):
    """Whether two state_dicts are bit-identical."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def data_of(source, shape, random=True, augmentation="flip", random_erasing=0.0, **settings):
    """A DataGenerator with some settings, which may stand in its call."""
    from utils.dataloader import DataGenerator

    own = {name: settings.pop(name) for name in ("num_classes", "cache_mb") if name in settings}
    settings.update(augmentation=augmentation, random_erasing=random_erasing)
    return DataGenerator(source, shape, random, settings=settings, **own)


def default_settings(**changes):
    """train.py's own settings, with changes."""
    import train as trainer

    settings = {
        name: value
        for name, value in vars(trainer).items()
        if type(value) in (bool, int, float, str, list) and not name.startswith("_")
    }
    return {**settings, **changes}


def make_run(folder, names, backbone="squeezenet1_1", **settings):
    """A run's folder with untrained weights, for what commands do with any.

    Returns it. Settings as train.py's.
    """
    from nets import get_model
    from utils.plumbing.run import write_config

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    usual = dict(input_shape=[32, 32], Unfreeze_batch_size=8, fp16=False, Cuda=False)
    values = default_settings(backbone=backbone, **{**usual, **settings})
    write_config(folder, {"settings": values, "class_names": list(names), "finished": True})
    torch.manual_seed(0)
    torch.save(
        get_model(backbone, len(names), values["input_shape"]).state_dict(),
        folder / "best_epoch_weights.pth",
    )
    return folder
