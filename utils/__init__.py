"""The parts around train.py. Import it before torch: OpenMP reads its environment once."""
import os
import sys
import time


def busy_seconds():
    """Seconds that all cores have worked for other programs, since the machine's start (Linux; elsewhere 0)."""
    try:
        with open("/proc/stat") as file:
            user, nice, system = map(int, file.readline().split()[1:4])
        return (user + nice + system) / os.sysconf("SC_CLK_TCK") - time.process_time()
    except (OSError, ValueError):
        return 0.0


def others_at_work():
    """Whether other programs take half a core or more: now, while NumPy and Pillow are imported, and in the last minute.

    Both, as a moment's work turns the first alone, and a training that has just ended the second.
    """
    begin, busy = time.monotonic(), busy_seconds()
    import numpy  # noqa: F401 needed anyway
    import PIL.Image  # noqa: F401
    now = busy_seconds() - busy > 0.5 * (time.monotonic() - begin) or not busy
    return now and hasattr(os, "getloadavg") and os.getloadavg()[0] > 0.1


def quiet_interrupt(kind, error, trace):
    """Ctrl-C while torch is being imported needs no traceback."""
    if issubclass(kind, KeyboardInterrupt):
        os._exit(130)
    sys.__excepthook__(kind, error, trace)


sys.excepthook = quiet_interrupt

# Idle OpenMP threads spin. Long turns wake them fast; where anything else wants their cores, the default of endless turns
# made training 30 times slower
os.environ.setdefault("GOMP_SPINCOUNT", "1000" if others_at_work() else "5000")
