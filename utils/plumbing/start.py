"""What train.py and the commands do before torch is imported."""

import atexit
import gc
import os
import sys


def start_program():
    """Set OpenMP's environment, which it reads once, and let Ctrl-C during the imports end quietly.

    GOMP_SPINCOUNT is how long idle OpenMP threads spin before they sleep. The default, for ever,
    made training up to 30 times slower on a shared machine; far fewer turns make them slow to wake.
    At the exit Python would look for garbage among all that torch has loaded, for a second.
    """
    atexit.register(gc.freeze)
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    sys.excepthook = end_quietly_on_interrupt


def end_quietly_on_interrupt(kind, error, trace):
    """Handle an uncaught exception: no words for Ctrl-C, the usual traceback for any other."""
    if kind is KeyboardInterrupt:
        os._exit(130)
    sys.__excepthook__(kind, error, trace)
