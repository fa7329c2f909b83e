"""Data-loader workers: what they ignore, what their failures mean, and their end."""
import atexit
import ctypes
import multiprocessing
import signal
import sys

from utils.errors import TOO_MANY_FILES, UserError


def ignore_signals(worker_id):
    """worker_init_fn: a signal to the whole process group must not take the workers from a process that is saving.

    On Linux a worker dies with its process, at once: an orphan would hold the sockets that it inherited, and a group that
    torchrun restarts would connect to them and wait for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":
        pr_set_pdeathsig = 1  # of linux/prctl.h
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def batches_of(gen):
    """Yield the batches of a DataLoader. UserError: the sentence for a worker that has failed.

    A worker's death is found by the next fetch, not by torch's signal handler amid whatever is done with a batch.
    Workers are passed over where the pictures are in memory and no GPU is at work meanwhile: they would take from the cores
    that train more than they save.
    """
    data = gen.dataset
    if gen.num_workers and not gen.pin_memory and hasattr(data, "share_cached") and data.share_cached() > 0.9:
        batches = (gen.collate_fn([data[item] for item in items]) for items in gen.batch_sampler)
    else:
        batches = iter(gen)
    if gen.num_workers and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield from batches
    except UserError as error:  # a worker's error comes with its traceback as text, the sentence last
        raise UserError(str(error).strip().splitlines()[-1].rpartition("UserError: ")[2]) from None
    except (RuntimeError, OSError, EOFError) as error:
        text = str(error)
        if "shared memory" in text or "bus error" in text.lower():
            reason = ("the data loader's workers have no shared memory left: give the container more (docker run --shm-size=2g), "
                      "lower num_workers, or set num_workers = 0")
        elif "Too many open files" in text:
            reason = TOO_MANY_FILES
        elif "Caught" not in text and ("DataLoader worker" in text or isinstance(error, (OSError, EOFError))):
            reason = ("a data-loader worker died, most likely for lack of memory: lower num_workers or the batch size "
                      f"({(text.splitlines() or [type(error).__name__])[0]})")
        else:
            raise  # a programming error in a worker
        raise UserError(reason) from error


def stop_workers():
    """Kill this process's workers; the standard library would send them the SIGTERM that they ignore, and wait."""
    for worker in multiprocessing.active_children():
        worker.kill()


atexit.register(stop_workers)  # for a program of one's own that returns from its last line
