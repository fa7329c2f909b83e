"""What train.py and the commands do before torch is imported."""

import atexit
import gc
import os
import signal
import sys
import traceback


def start_program():
    """Set OpenMP's environment, which it reads once, and let Ctrl-C during the imports end quietly.

    GOMP_SPINCOUNT is how long idle OpenMP threads spin before they sleep. The default, for ever,
    made training up to 30 times slower on a shared machine; far fewer turns make them slow to wake.
    At the exit Python would look for garbage among all that torch has loaded, for a second.
    """
    atexit.register(gc.freeze)
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    sys.excepthook = end_quietly_on_interrupt


def start_worker():
    """Let a spawned loader worker ignore Ctrl-C while it imports torch; prepare_worker follows."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def end_quietly_on_interrupt(kind, error, trace):
    """Show an uncaught error, but nothing of Ctrl-C.

    A constant that cannot be computed is shown as a sentence, anything else as usual.
    """
    if kind is KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if os.name != "nt":  # where it would end with another code
            signal.raise_signal(signal.SIGINT)  # a shell's loop looks for it, and ends as well
        os._exit(130)  # also process 1 of a container
    place = traceback.extract_tb(trace)[-1:]
    in_constants = place and place[0].filename == getattr(sys.modules["__main__"], "__file__", "")
    if kind in (TypeError, NameError) and in_constants:
        print(
            f"error: line {place[0].lineno} of {os.path.basename(place[0].filename)}, "
            f"{place[0].line!r}, cannot be computed ({error}): numbers, also in the lines above, "
            f"are written without quotes and commas (0.01), words in quotes, True and False with a "
            f"capital",
            file=sys.stderr,
        )
        return
    sys.__excepthook__(kind, error, trace)
