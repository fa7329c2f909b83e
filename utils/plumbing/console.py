"""What the user sees: messages, the progress line, and errors as one sentence."""

import contextlib
import multiprocessing.util
import os
import signal
import sys
import time
import traceback

from utils.plumbing.errors import LOST, explain, printable
from utils.plumbing.processes import end, rank


def say(text, everyone=False, as_it_is=False, **options):
    """Print on rank 0 or everyone's, at once, plain but for line ends. A closed pipe or full disk decides nothing."""
    if rank() == 0 or everyone:
        with contextlib.suppress(OSError, ValueError):
            print(
                text if as_it_is else "\n".join(map(printable, text.split("\n"))),
                **options,
                flush=True,
            )


class ProgressLine:
    """One line, redrawn in place twice a second on a terminal, printed every half minute into a log."""

    def __init__(self, title, steps, first_step=0, stream=None):
        self.title, self.steps, self.first_step, self.stream = (
            title,
            steps,
            first_step,
            stream or sys.stdout,
        )
        self.terminal = getattr(self.stream, "isatty", bool)()
        self.begin = self.shown = time.monotonic()

    def show(self, step, images, describe, due=False):
        """images: to a step. describe() reads figures off the device, so it is only called when the line is due."""
        now = time.monotonic()
        if rank() or not due and now - self.shown < (0.5 if self.terminal else 30):
            return
        self.shown, done, seconds = now, step - self.first_step, max(now - self.begin, 1e-3)
        minutes, left = divmod(round(seconds / done * (self.steps - step)), 60)
        text = (
            f"{self.title} {step}/{self.steps} {describe()} {images * done / seconds:.0f} images/s "
            f"{minutes // 60:02}:{minutes % 60:02}:{left:02} left"
        )
        say(
            f"\r{text}\033[K" if self.terminal else text,
            end="" if self.terminal else "\n",
            file=self.stream,
            as_it_is=True,
        )

    def clear(self):
        if self.terminal:
            say("\r\033[K", end="", file=self.stream, as_it_is=True)


def one_sentence_errors():
    """Show every error of this program that a user can mend as one sentence; Ctrl-C ends it without words."""
    sys.excepthook = show_error
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # nohup stays in force
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    multiprocessing.util.get_temp_dir()  # one folder for this process and its workers, which cannot remove theirs when killed
    for stream in (sys.stdout, sys.stderr):
        if hasattr(
            stream, "reconfigure"
        ):  # odd file names must not break a print on an ASCII terminal
            stream.reconfigure(errors="backslashreplace")


def show_error(kind, error, trace):
    """For sys.excepthook: what a user can mend becomes one sentence on stderr; anything else keeps its traceback."""
    with contextlib.suppress(
        RuntimeError
    ):  # torch's handler raises what it finds of dead workers, also in here
        signal.signal(getattr(signal, "SIGCHLD", signal.SIGTERM), signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    told, other = explain(error), int(os.environ.get("LOCAL_RANK", 0)) > 0
    # a machine's first process speaks at once; others, and who only knows that another one has ended, wait for the launcher
    time.sleep(2 * other + 5 * bool(told and told.startswith(LOST)))
    whose = f"[rank {rank()}] " if other else ""
    print(
        f"{whose}error: {printable(told)}"
        if told
        else whose + "".join(traceback.format_exception(kind, error, trace)),
        file=sys.stderr,
    )
    end(1)
