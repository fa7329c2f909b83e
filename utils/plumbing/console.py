"""What the user sees: messages, the progress line, how to continue, and errors as one sentence."""

import contextlib
import multiprocessing.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch

from utils.plumbing.errors import LOST, UserError, explain, printable
from utils.plumbing.processes import (
    cores,
    end,
    in_session,
    local_rank,
    local_world_size,
    prepare_pillow,
    rank,
    several_machines,
)


def say(text, everyone=False, as_it_is=False, **options):
    """Print a message on rank 0, or on every rank, at once; control characters are escaped.

    A closed pipe or a full disk is no error here: printing never decides what is saved.
    """
    if rank() > 0 and not everyone:
        return
    if not as_it_is:
        text = "\n".join(map(printable, text.split("\n")))
    try:
        print(text, **options, flush=True)
    except OSError:
        discard_output(options.get("file") or sys.stdout)
    except ValueError:  # the stream was closed
        pass


def discard_output(stream):
    """Point a stream to nowhere: what waits in its buffer would fail at each later flush."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def say_note(text):
    """Print a note, unless it is ""."""
    if text:
        say(text)


def say_row(name, value):
    """Print a row of the header of a run."""
    say(f"  {name:<11}  {value}")


@contextlib.contextmanager
def say_if_slow(text):
    """Print `text` where what is done inside takes longer than a second."""
    timer = threading.Timer(1, say, [text])
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class ProgressLine:
    """One line, redrawn twice a second on a terminal, printed every half minute in a log."""

    def __init__(self, title, steps, first_step=0, stream=None):
        self.title = title
        self.steps = steps
        self.first_step = first_step
        self.stream = stream or sys.stdout
        self.terminal = hasattr(self.stream, "isatty") and self.stream.isatty()
        self.seconds_between = 0.5 if self.terminal else 30
        self.begin = self.last = time.monotonic()

    def show(self, step, images, describe, due=False):
        """Show the line if it is due. images: how many a step has; due: show it in any case.

        describe() → text reads numbers off the device, so it is called only when the line is due.
        """
        now = time.monotonic()
        if rank() > 0 or (now - self.last < self.seconds_between and not due):
            return
        self.last = now
        steps_done = step - self.first_step
        seconds = max(now - self.begin, 1e-3)
        left = timedelta(seconds=round(seconds / steps_done * (self.steps - step)))
        self.write(
            f"{self.title} {step}/{self.steps} {left} left {describe()} "
            f"{images * steps_done / seconds:.0f} images/s"
        )

    def write(self, text):
        if self.terminal:
            width = shutil.get_terminal_size().columns - 1  # a longer line could not be redrawn
            say(f"\r{' ' * width}\r{text[:width]}", end="", file=self.stream, as_it_is=True)
        else:
            say(text, file=self.stream, as_it_is=True)

    def clear(self):
        if self.terminal:
            self.write("")


def advice_to_continue(run):
    """Return the words 'continue with' and the command that continues a run, to be pasted."""
    if several_machines():
        end = shell_words(["--resume", str(run)])
        return f"continue with the same command on every machine, and {end} at its end"
    return f"continue with\n  {command_to_continue(run)}"


def command_to_continue(run):
    """Return the command of this launch with `--resume RUN` at its end, where it decides."""
    words = sys.orig_argv
    if sys.platform != "linux":  # a venv's python starts another one there, without its packages
        words = [python_word(), *words[1:]]
    launcher = ["python"]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        words = parent_command()
        launcher = ["torchrun", f"--nproc_per_node={local_world_size()}"]
    if words[-len(sys.argv) :] != sys.argv:  # as in a notebook, or not on Linux
        words = [*launcher, *sys.argv]
    end = ["--resume", str(run)]
    if words[-2:] != end:
        words = [*words, *end]
    command = shell_words(words)
    if os.name != "nt" and "SLURM_JOB_ID" not in os.environ:  # whose jobs are given others
        for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
            if name in os.environ:
                command = f"{name}={shlex.quote(os.environ[name])} {command}"
    return command


def python_word():
    """Return how this Python is started: 'python', or its whole path."""
    found = os.path.normcase(shutil.which("python") or "")
    return "python" if found == os.path.normcase(sys.executable) else sys.executable


def shell_words(words):
    """Return words as they are pasted into a shell, with the quotes that this system's needs."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def parent_command():
    """Return the words of the parent process's command; [] where they are unknown."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    except OSError:
        return []
    return [os.fsdecode(word) for word in words.split(b"\0")[:-1]]


def prepare_program():
    """Prepare train.py or a command: errors are sentences, Ctrl-C is silent, Pillow is quiet."""
    sys.excepthook = show_error
    own_handler = signal.getsignal(signal.SIGINT) == signal.default_int_handler  # not under nohup
    if own_handler and not in_session():
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if os.getpid() == 1:  # as in a container: it is sent no signal that it has no handler for
            signal.signal(signal.SIGINT, end_by_signal)
            signal.signal(signal.SIGTERM, end_by_signal)
    if cores() < torch.get_num_threads():  # beyond a container's quota they stop one another
        torch.set_num_threads(cores())
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs that have it
    prepare_pillow()
    if sys.platform == "linux" and not multiprocessing.get_start_method(allow_none=True):
        # Python 3.14's fork server would end at a signal to the group, and loader workers with it
        multiprocessing.set_start_method("fork")
    make_temp_dir()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # odd file names must not break an ASCII terminal
            stream.reconfigure(errors="backslashreplace")


def end_by_signal(number, frame):
    """End this process as a signal without a handler does."""
    os._exit(128 + number)


def make_temp_dir():
    """Make the folder of temporary files that workers share, which leave theirs when killed.

    Batches travel through sockets in it, whose whole path has 107 bytes at most.
    """
    before = tempfile.tempdir
    try:
        if os.name != "nt" and len(os.fsencode(tempfile.gettempdir())) > 70:
            tempfile.tempdir = "/tmp"  # for this folder alone
        multiprocessing.util.get_temp_dir()
    except OSError as error:
        raise UserError(
            f"{error.strerror}: set TMPDIR to a short path of a folder that can be written"
        ) from None
    finally:
        tempfile.tempdir = before


def show_error(kind, error, trace):
    """Print an uncaught error to stderr, as one sentence where a user can mend it, and end.

    A machine's first process speaks at once. Others, and one that only knows that another process
    has ended, wait a little for the launcher to end them.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sentence = explain(error)
    if sentence:
        text = f"error: {printable(sentence)}"
    else:
        text = "".join(traceback.format_exception(kind, error, trace))
    if local_rank() > 0:
        time.sleep(2)
        text = f"[rank {rank()}] {text}"
    if sentence and sentence.startswith(LOST):
        time.sleep(5)
    say(text, everyone=True, as_it_is=True, file=sys.stderr)
    end(1)
