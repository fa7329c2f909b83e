"""The one error that a user can mend, how it is shown, and the nearest name for a mistyped one."""
import difflib
import os
import sys
import time
import traceback

TOO_SMALL = "数据集过小,无法继续进行训练,请扩充数据集。"  # the documented words of the documented ValueError


class UserError(ValueError):
    """Something that the user can mend: shown as one sentence, without a traceback, exit code 1."""


def rank() -> int:
    """This process's number among all processes of the launch, known before they are connected."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """The number of processes of the launch on all nodes."""
    return int(os.environ.get("WORLD_SIZE", 1))


def nearest(name, choices) -> str:
    """' (did you mean …?)' for a mistyped name, or ''."""
    found = difflib.get_close_matches(str(name).lower(), list(choices), n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(map(repr, found))}?)" if found else ""


def show_error(kind, error, trace):
    """For sys.excepthook: a UserError becomes one sentence on stderr; anything else keeps its traceback."""
    if issubclass(kind, UserError) or TOO_SMALL in str(error):
        if rank() == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(5)  # torchrun ends the group when one process fails: let rank 0 speak first
    elif issubclass(kind, KeyboardInterrupt):  # before training, where there is nothing to save yet
        os._exit(130)
    else:
        traceback.print_exception(kind, error, trace)
    sys.stdout.flush()
    if world_size() > 1:
        os._exit(1)  # a connected process would first wait for the others


def one_sentence_errors():
    """Show every UserError of this program as one sentence (a command's first call)."""
    sys.excepthook = show_error
    for stream in (sys.stdout, sys.stderr):  # odd file names must not break a print on an ASCII terminal
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
