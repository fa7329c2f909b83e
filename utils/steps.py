"""The steps of an epoch: the processes agree before each, and a signal ends a run between two.

They agree on one number (0: go on, 1: save, 128 + a signal's number: save and end; the largest
decides), so that no process enters a step that another one leaves out.
"""

import os
import shlex
import signal
import sys
import time
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist

from utils.plumbing import processes
from utils.plumbing.console import say

GO_ON, SAVE, END = 0, 1, 128
MUCH_WAITING = 1 / 3  # of an epoch's time: above it, the epoch's line says what helps


class Steps:
    """A run's steps, before each of which the processes agree.

    A subclass has `position`, save(), is_due() and is_idle().
    """

    def __init__(self, run):
        self.run = run
        self.signal = 0
        self.signalled_at = 0.0
        self.request = torch.tensor([GO_ON])  # the largest of all processes once `work` is done
        self.work = None
        self.waited = 0.0  # seconds for pictures, in the last call of steps()

    def catch_signals(self):
        """Note SIGTERM, Ctrl-C and SIGHUP from now on, and obey them before the next step."""
        for name in ("SIGTERM", "SIGINT", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number and signal.getsignal(number) != signal.SIG_IGN:  # nohup stays in force
                signal.signal(number, self.note_signal)

    def note_signal(self, number, frame):
        """Note the first signal; end at once at a second Ctrl-C."""
        repeated = time.monotonic() - self.signalled_at < 1  # by torchrun
        if self.signal and number == signal.SIGINT and not repeated:
            say(
                f"\nended at once: {self.run} is as it was saved last; "
                f"{advice_to_continue(self.run)}"
            )
            processes.end(END + number)
        if not self.signal:
            self.signal = number
            self.signalled_at = time.monotonic()

    def steps(self, gen, total, accumulate=1):
        """Yield `accumulate` batches of `gen` at a time (fewer at the end), `total` in all.

        A process without a share of the last step gets an empty list.
        """
        self.waited = 0.0
        batches = iter(gen)
        for done in range(0, total, accumulate):
            begin = time.monotonic()
            current = list(islice(batches, min(accumulate, total - done)))
            if self.is_idle():  # a GPU may still compute, and then the host waits at no cost
                self.waited += time.monotonic() - begin
            self.agree()
            yield current

    def agree(self):
        """Act on the largest request made one step ago, then send the next.

        It travels while the step computes.
        """
        if self.work:
            self.work.wait()
        request = int(self.request)
        if request != GO_ON:
            self.save()
        if request > END:
            self.stop(request)
        self.request = torch.tensor([self.next_request()])
        if processes.connected():
            self.work = dist.all_reduce(self.request, dist.ReduceOp.MAX, async_op=True)

    def next_request(self):
        """Return what this process asks of all."""
        if self.signal:
            return END + self.signal
        return SAVE if self.is_due() else GO_ON

    def stop(self, request):
        """Say how to continue, and end every process with 128 + the signal's number."""
        number = request - END
        name = signal.Signals(number).name
        place = f"epoch {self.position.epoch + 1}, step {self.position.step}"
        say(f"\n{name}: saved at {place}; {advice_to_continue(self.run)}")
        processes.barrier()
        if not self.signal and processes.stop_launcher(number):
            say(f"\n{name} on another machine: the run is saved and ends here too", everyone=True)
        processes.leave(request)


def advice_to_continue(run):
    """Return the words 'continue with' and the command that continues a run, to be pasted."""
    if processes.several_machines():
        return f"continue with the same command on every machine, and --resume {run} at its end"
    return f"continue with\n  {command_to_continue(run)}"


def command_to_continue(run):
    """Return the command of this launch with `--resume RUN` at its end, where it decides."""
    words = sys.orig_argv
    launcher = ["python"]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        words = parent_command()
        launcher = ["torchrun", f"--nproc_per_node={processes.local_world_size()}"]
    if words[-len(sys.argv) :] != sys.argv:  # as in a notebook, or not on Linux
        words = [*launcher, *sys.argv]
    end = ["--resume", str(run)]
    if words[-2:] != end:
        words = [*words, *end]
    return shlex.join(words)


def parent_command():
    """Return the words of the parent process's command; [] where they are unknown."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    except OSError:
        return []
    return [os.fsdecode(word) for word in words.split(b"\0")[:-1]]


def describe_waiting(seconds, epoch_seconds, gen):
    """Return how much of an epoch training waited for pictures of `gen`, and what helps.

    On a GPU it is the most that it can have been.
    """
    share = seconds / epoch_seconds
    text = f"waited {share:.0%} for pictures"
    read_once = getattr(gen.dataset, "in_memory", False)
    if share <= MUCH_WAITING or read_once:
        return text
    return (
        f"{text}: raise num_workers (now {gen.num_workers}), or list smaller copies of large "
        f"pictures with python -m utils.annotation DATASETS --shrink 512"
    )
