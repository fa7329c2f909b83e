"""The data loader's processes: the signals they heed, how they end, and what is said when one dies."""
import atexit
import ctypes
import multiprocessing
import signal
import sys

from utils.errors import UserError

PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def stop_workers():
    """Kill this process's workers; the standard library would send them the SIGTERM that they ignore, and wait."""
    for worker in multiprocessing.active_children():
        worker.kill()


atexit.register(stop_workers)


def ignore_signals(worker_id):
    """worker_init_fn: a signal to the whole process group must not take the workers from a process that is saving.

    On Linux a worker dies with its process, at once: an orphan would hold the sockets that it inherited, and a group that
    torchrun restarts would connect to them and wait for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def fetch(batches, number=1):
    """(list of the next `number` batches, or None and the sentence that says why there is none)."""
    try:
        return [next(batches) for _ in range(number)], None
    except UserError as error:  # a worker's error comes with its traceback as text, the sentence last
        return None, UserError(str(error).strip().splitlines()[-1].rpartition("UserError: ")[2])
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        return None, UserError("a data-loader worker died, most likely for lack of memory: lower num_workers or the "
                               f"batch size ({str(error).splitlines()[0]})")


def loader(gen):
    """The batches of `gen`; a worker's death is found by the next fetch, not by a signal handler amid a step."""
    batches = iter(gen)
    if gen.num_workers and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    yield from batches
