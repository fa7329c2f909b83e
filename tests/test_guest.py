"""In other people's programs: importing changes nothing, and a session outlives what it runs."""

import builtins
import resource
import signal
import subprocess
import sys

import pytest
import torch

from tests.helpers import ROOT, environment, make_data, make_project
from utils.pictures import read_crop
from utils.plumbing import processes
from utils.plumbing.errors import UserError, explain
from utils.steps import Steps

MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for folder in ("nets", "utils")
    for path in (ROOT / folder).rglob("[!_]*.py")
)

UNCHANGED = """
import atexit, importlib, os, signal, sys
import logging, multiprocessing
import numpy, torch, torchvision  # may change what they like
from PIL import Image, PngImagePlugin

def state():
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    precision = torch.get_float32_matmul_precision(), torch.get_num_threads()
    random_state = torch.random.get_rng_state().sum().item(), numpy.random.get_state()[2]
    return (sys.excepthook, sys.displayhook, dict(os.environ), handlers, atexit._ncallbacks(),
            precision, random_state, sys.stdout.errors, os.umask(os.umask(0)),
            PngImagePlugin.MAX_TEXT_CHUNK, Image.MAX_IMAGE_PIXELS, logging.getLogger("PIL").level,
            multiprocessing.get_start_method(allow_none=True))

importlib.import_module("torch.utils.data")
importlib.import_module("torchvision.transforms.v2")
importlib.import_module("multiprocessing.util")
before = state()
for name in sys.argv[1:]:
    importlib.import_module(name)
    assert state() == before, name
"""

CHILDREN = """
import multiprocessing, time
import utils.predict, utils.checkpoint
from utils.plumbing import processes

def work(queue):
    time.sleep(1)
    open("result", "w").write("done")

if __name__ == "__main__":
    multiprocessing.set_start_method("fork")
    multiprocessing.Process(target=work, args=(None,)).start()
    processes.stop_workers()
"""


def run_python(folder, *words, code=0):
    result = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=folder,
        env={**environment(), "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == code, result.stderr
    return result.stdout


def test_importing_changes_nothing():
    run_python(ROOT, "-c", UNCHANGED, "train", *MODULES)


def test_child_processes_of_another_program_live_on(tmp_path):
    folder = make_project(tmp_path)
    (folder / "other.py").write_text(CHILDREN)
    run_python(folder, "other.py")
    assert (folder / "result").read_text() == "done"


def test_a_session_goes_on_after_a_training(tmp_path):
    folder = make_project(tmp_path, UnFreeze_Epoch=1, num_workers=1)
    make_data(folder, train=16, test=8)
    session = (
        "import runpy, signal, sys\n"
        "try:\n"
        "    runpy.run_path('train.py', run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    assert not end.code\n"
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
        "assert sys.excepthook is sys.__excepthook__\n"
        "assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL\n"
        "print('still here')"
    )
    assert run_python(folder, "-c", session).endswith("still here\n")


def test_a_second_interrupt_ends_the_run_and_not_the_session(monkeypatch, capsys):
    monkeypatch.setattr(builtins, "__IPYTHON__", True, raising=False)
    monkeypatch.setattr(processes, "STOP_SIGNALS", [])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    steps = Steps("run")
    steps.signal = signal.SIGINT
    with pytest.raises(SystemExit) as ended:
        steps.note_signal(signal.SIGINT, None)
    assert ended.value.code == 130 and "ended at once" in capsys.readouterr().out


def raise_here(error):
    raise error


OWN_ERRORS = [
    ValueError("unknown class 'igloo'"),
    RuntimeError("out of memory in my cache"),
    RuntimeError("NCCL is not what I want"),
    KeyError("Too many open files"),
    OSError("no shared memory"),
    ConnectionError("Connection reset by my server"),
    EOFError("EOFError"),
    MemoryError("my buffer"),
]


@pytest.mark.parametrize("error", OWN_ERRORS, ids=repr)
def test_an_error_of_one_s_own_keeps_its_traceback(error):
    with pytest.raises(type(error)) as caught:
        raise_here(error)
    assert explain(caught.value) is None


def call(depth, function, *words):
    """Call a function from so many functions inside each other."""
    return call(depth - 1, function, *words) if depth else function(*words)


@pytest.mark.parametrize("error", OWN_ERRORS, ids=repr)
def test_where_an_error_was_raised_decides_and_not_who_called(error):
    with pytest.raises(type(error)) as caught:
        call(3, raise_here, error)
    assert explain(caught.value) is None
    with pytest.raises(RuntimeError) as caught:
        call(3, torch.empty, 10**15)
    assert "out of memory" in explain(caught.value)


@pytest.mark.parametrize("word", ["gloo", "nccl", "CUDA out of memory", "shared memory"])
def test_a_word_in_somebody_s_value_is_no_advice(word):
    for call in (int, lambda text: open(text + "/none"), lambda text: {}[text]):
        with pytest.raises((ValueError, OSError, KeyError)) as caught:
            call(word)
        assert explain(caught.value) is None


def test_an_error_of_one_s_own_in_a_worker(tmp_path):
    class Data(torch.utils.data.Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            raise ValueError("unknown class 'igloo'" if index else UserError("mend this"))

    with pytest.raises(ValueError) as caught:
        list(torch.utils.data.DataLoader(Data(), 1, num_workers=1, sampler=[1]))
    assert explain(caught.value) is None


class Opens(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
        try:
            return read_crop(__file__, (8, 8), None)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_no_more_open_files_is_a_sentence_also_in_a_worker(num_workers):
    with pytest.raises(OSError) as caught:
        list(torch.utils.data.DataLoader(Opens(), 1, num_workers=num_workers))
    assert "raise the limit" in (explain(caught.value) or "")


def test_torch_s_own_errors_are_explained():
    import torch

    with pytest.raises(ValueError) as caught:
        torch.nn.BatchNorm1d(2).train()(torch.zeros(1, 2))
    assert "BatchNorm needs two pictures" in explain(caught.value)
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert "out of memory" in explain(caught.value)
