"""How many processes read pictures, how long training waits for them, and what helps."""

import time

import torch

from utils.plumbing.processes import cores, local_world_size

MUCH = 1 / 3  # of an epoch's time: above it, the epoch's line says what helps


def count_workers(num_workers, Cuda, in_memory):
    """Return how many processes read pictures for each training process, from the setting."""
    if num_workers != "auto":
        return num_workers
    if Cuda:
        return min(8, max(1, cores() // local_world_size()))
    # out of memory, loader processes would take more from a CPU that trains than they save
    return 0 if in_memory else 2


class WaitingTime:
    """Adds up the seconds in which what trains has nothing to do while batches are fetched.

    A GPU's own clock measures its pauses: while it still computes, the host waits at no cost.
    """

    def __init__(self, Cuda):
        self.Cuda = Cuda
        self.pauses = []  # (begin, end) as `now` gives them, which the GPU has not reached yet
        self.seconds = 0.0

    def now(self):
        """Return this moment, on the clock of what trains."""
        if not self.Cuda:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, begin):
        """Count the time from `begin`, which `now` gave, until now."""
        end = self.now()
        if not self.Cuda:
            self.seconds += end - begin
            return
        self.pauses.append((begin, end))
        while self.pauses and self.pauses[0][1].query():  # the GPU has come so far
            begin, end = self.pauses.pop(0)
            self.seconds += begin.elapsed_time(end) / 1000  # of milliseconds


def describe_waiting(seconds, epoch_seconds, gen):
    """Return how much of an epoch training waited for pictures of `gen`, and what helps."""
    share = seconds / epoch_seconds
    text = f"waited {share:.0%} for pictures"
    read_once = getattr(gen.dataset, "in_memory", False)
    if share <= MUCH or read_once:
        return text
    return (
        f"{text}: raise num_workers (now {gen.num_workers}), or list smaller copies of large "
        f"pictures with python -m utils.annotation DATASETS --shrink 512"
    )
