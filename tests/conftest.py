"""Markers, and the slow proofs that run only when asked for: python -m pytest tests --slow"""

import multiprocessing
import signal
import sys
import threading

import hypothesis
import pytest
import torch

torch.set_num_threads(1)
if sys.platform == "linux" and not multiprocessing.get_start_method(allow_none=True):
    multiprocessing.set_start_method("fork")  # as the programs do, whatever Python's own is
if threading.current_thread() is threading.main_thread():
    # a shell's background job, and what it starts, would ignore Ctrl-C; under nohup, SIGHUP
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
hypothesis.settings.register_profile(  # the same cases each time, however slow the machine is
    "steady",
    database=None,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.load_profile("steady")

LONGEST = ("test_readme", "test_resume", "test_train", "test_forks")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Three processes where pytest-xdist is installed; -n 0 for one.

    Most tests' runs use one core, and many wait: with two processes two cores were often idle.
    """
    # a worker has None here as well, and would start three more, and those three more
    a_worker = hasattr(config, "workerinput")
    if getattr(config.option, "numprocesses", 0) is None and not a_worker:
        config.option.numprocesses, config.option.dist = 3, "loadfile"
        config.option.loadscopereorder = False  # else files with few tests, however long, come last


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the long proofs as well")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: a long proof, run with --slow")


def pytest_collection_modifyitems(config, items):
    # the longest files first, so that no process is left alone with one at the end
    items.sort(key=lambda item: item.path.stem not in LONGEST)
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="a long proof: --slow runs it"))
