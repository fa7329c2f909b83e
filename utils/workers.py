"""To go: what is left until its callers iterate over a DataLoader as it is."""
from utils.processes import ignore_signals, stop_workers  # noqa: F401


def batches_of(gen):
    return iter(gen)
