"""A Python that has imported torch once and forks to become each program of a project.

`Warm.start` returns a `subprocess.Popen` for `python train.py …` or `python -m utils.… …`, without
the seconds that importing torch takes. The program's weights are those of a fresh Python, bit for
bit: this file imports nothing of the project, computes nothing, and starts no thread before it
forks. What a Python reads once when it starts is the server's for all of them: OMP_NUM_THREADS, the
locale, the seed of hashes, warning filters. A test about the start itself takes a fresh Python.
"""

import array
import atexit
import gc
import importlib
import json
import multiprocessing.process
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
from contextlib import suppress
from pathlib import Path

IMPORTS = """
    multiprocessing.queues multiprocessing.synchronize
    numpy PIL.ImageDraw PIL.ImageFont PIL.ImageOps
    torch torch._dynamo torch.distributed.launcher.api torch.utils.data torch.utils.flop_counter
    torch.utils.serialization.config torchvision.models torchvision.transforms.v2
"""
NUMBER = array.array("q", [0])  # what travels in a report: a process's id, then its wait status


class Process(subprocess.Popen):
    """As subprocess.Popen, for a child of the warm server: the server forks it and waits for it."""

    def __init__(self, server, words, **options):
        self.server = server
        super().__init__(words, **options)

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest):
        pipes = rest[3:9]  # after startupinfo, creationflags and shell: both ends of each stream's
        streams = [pipes[0], pipes[3], pipes[5]]
        for number, stream in enumerate(streams):
            if stream == -1:  # not redirected
                streams[number] = number
        self.report, report = os.pipe()
        request = {"words": list(args), "folder": os.fspath(cwd), "environment": env}
        socket.send_fds(self.server, [json.dumps(request).encode()], [*streams, report])
        os.close(report)
        self._close_pipe_fds(*pipes)
        self.pid = self.read_report()
        if self.pid is None:
            raise RuntimeError("the warm server has ended")
        self._child_created = True

    def read_report(self):
        number = array.array("q", os.read(self.report, NUMBER.itemsize))
        return number[0] if number else None

    def _try_wait(self, wait_flags):
        """Return (pid, status) as os.waitpid does for a child of our own."""
        if wait_flags == os.WNOHANG and not select.select([self.report], [], [], 0)[0]:
            return 0, 0
        status = self.read_report()
        os.close(self.report)
        if status is None:
            status = signal.SIGKILL  # the server has ended, and its programs with it
        return self.pid, status

    def _internal_poll(self, _deadstate=None):
        with self._waitpid_lock:
            if self.returncode is None:
                pid, status = self._try_wait(os.WNOHANG)
                if pid:
                    self._handle_exitstatus(status)
        return self.returncode


class Warm:
    """The server, from this process's side: it ends with this process."""

    def __init__(self, environment):
        self.requests, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        words = [sys.executable, __file__, str(other.fileno())]
        self.process = subprocess.Popen(
            words, env=environment, pass_fds=[other.fileno()], start_new_session=True
        )
        other.close()
        atexit.register(self.stop)

    def start(self, words, folder, environment, **options):
        """Begin `python words…` in `folder`, in a process group of its own.

        Words: a file, or -m and a module first.
        """
        words = [str(word) for word in words]
        return Process(self.requests, words, cwd=folder, env=environment, **options)

    def stop(self):
        self.requests.close()
        self.process.wait()


def serve(requests):
    """Fork at each request.

    Returns, in the child, what it is to become, and None when no more requests can come.
    """
    living = {}
    while True:
        ready, _, _ = select.select([requests, *living], [], [])
        for one in set(ready) - {requests}:
            pid, report = living.pop(one)
            send_report(report, os.waitpid(pid, 0)[1])
            os.close(report)
            os.close(one)
        if requests not in ready:
            continue
        text, streams, _, _ = socket.recv_fds(requests, 1 << 20, 4)
        if not text:
            for pid, _ in living.values():
                with suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
            return None
        *streams, report = streams
        pid = os.fork()
        if pid == 0:
            requests.close()
            for one, (_, other) in living.items():
                os.close(one)
                os.close(other)
            os.setsid()
            send_report(report, os.getpid())
            os.close(report)
            return json.loads(text), streams
        for stream in streams:
            os.close(stream)
        living[os.pidfd_open(pid)] = pid, report


def send_report(report, number):
    with suppress(BrokenPipeError):
        os.write(report, array.array("q", [number]))


def become(request, streams):
    """Make this process what a fresh Python is before the first line of its program."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    tempfile.tempdir = None
    multiprocessing.process.ORIGINAL_DIR = os.getcwd()
    importlib.import_module("numpy").random.seed()  # a fresh one has not this server's
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [os.getcwd(), *filter(None, paths)]
    encoding, _, errors = os.environ.get("PYTHONIOENCODING", "").partition(":")
    options = {"encoding": encoding or None, "closefd": False}
    sys.stdin = sys.__stdin__ = open(0, errors=errors or None, **options)
    sys.stdout = sys.__stdout__ = open(1, "w", errors=errors or None, **options)
    sys.stderr = sys.__stderr__ = open(2, "w", 1, errors="backslashreplace", **options)


def run(words):
    """Run a file or a module as `__main__`, with its words in sys.argv."""
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        return
    sys.argv = words
    main = types.ModuleType("__main__")
    main.__file__ = os.path.abspath(words[0])
    sys.modules["__main__"] = main
    exec(compile(Path(words[0]).read_bytes(), main.__file__, "exec"), vars(main))


def leave(code):
    """End as Python does, but without taking its modules apart.

    That takes longer than most programs do.
    """
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    del sys.path[0]  # tests/, whose files the program would not see
    for name in IMPORTS.split():
        importlib.import_module(name)
    assert not {"utils", "nets", "train"} & sys.modules.keys()
    assert len(os.listdir("/proc/self/task")) == 1, "a thread would be missing in each child"
    gc.collect()
    gc.freeze()  # what is shared stays so
    task = serve(socket.socket(fileno=int(sys.argv[1])))
    if task:
        become(*task)
        code = 0
        try:
            run(task[0]["words"])
        except SystemExit as ended:
            if (
                type(ended.code) is not int
            ):  # what this means, as any other error, is Python's own affair
                raise
            code = ended.code
        leave(code)
