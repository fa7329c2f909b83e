"""The parts around train.py. Import it before torch: OpenMP reads its environment once."""
import os
import sys
import time


def others_running():
    """How many threads of other programs want a core at this moment (Linux; elsewhere the load of the last minute)."""
    try:
        found = []
        for _ in range(3):  # the least of three, as anything runs for a moment
            with open("/proc/stat") as file:
                found += [int(line.split()[1]) - 1 for line in file if line.startswith("procs_running")]
            time.sleep(0.002)
        return min(found)
    except (OSError, ValueError):
        return round(os.getloadavg()[0]) if hasattr(os, "getloadavg") else 0


# Idle OpenMP threads spin. Long turns wake them fast; where anything else wants their cores, the default of endless turns
# made training 30 times slower
os.environ.setdefault("GOMP_SPINCOUNT", "1000" if others_running() else "5000")


def quiet_interrupt(kind, error, trace):
    """Ctrl-C while torch is being imported needs no traceback."""
    if issubclass(kind, KeyboardInterrupt):
        os._exit(130)
    sys.__excepthook__(kind, error, trace)


sys.excepthook = quiet_interrupt
