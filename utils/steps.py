"""The steps of an epoch: the processes agree before each, and a signal ends a run between two.

They agree on one number (0: go on, 1: save, 128 + a signal's number: save and end; the largest
decides), so that no process enters a step that another one leaves out.
"""

import signal
import time
from itertools import islice

import torch
import torch.distributed as dist

from utils.plumbing import processes
from utils.plumbing.console import advice_to_continue, say

GO_ON, SAVE, END = 0, 1, 128


class Steps:
    """An epoch's batches: before each step the processes agree to go on, to save, or to end.

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
        for number in processes.STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup stays in force
                signal.signal(number, self.note_signal)

    def note_signal(self, number, frame):
        """Note the first signal; end at once at a second Ctrl-C."""
        repeated = time.monotonic() - self.signalled_at < 1  # torchrun sends one Ctrl-C on
        if self.signal and number == signal.SIGINT and not repeated:
            say(
                f"\nended at once: {self.run} is as it was saved last; "
                f"{advice_to_continue(self.run)}"
            )
            end = processes.leave if processes.in_session() else processes.end
            end(END + number)
        if not self.signal:
            self.signal = number
            self.signalled_at = time.monotonic()

    def steps(self, gen, total, accumulate=1):
        """Yield `accumulate` batches of `gen` at a time (fewer at the end), `total` in all.

        A process without a share of the last step gets an empty list.
        """
        self.waited = 0.0
        batches = uninterrupted(processes.iterate(gen))
        for done in range(0, total, accumulate):
            begin = time.monotonic()
            current = list(islice(batches, min(accumulate, total - done)))
            if self.is_idle():  # a GPU may still compute, and then the host waits at no cost
                self.waited += time.monotonic() - begin
            self.agree()
            yield current

    def agree(self):
        """Act on the largest request of all processes, which was made one step ago.

        The next one travels while the step computes. One process alone acts at once.
        """
        connected = processes.connected()
        if not connected:
            self.request = torch.tensor([self.next_request()])
        elif self.work:
            self.work.wait()
        request = int(self.request)
        if request != GO_ON:
            self.save()
        if request > END:
            self.stop(request)
        if connected:
            self.request = torch.tensor([self.next_request()])
            self.work = dist.all_reduce(self.request, dist.ReduceOp.MAX, async_op=True)

    def next_request(self):
        """Return what this process asks of all."""
        if self.signal:
            return END + self.signal
        return SAVE if self.is_due() else GO_ON

    def stop(self, request):
        """Say how to continue, and end every process."""
        number = request - END
        name = signal.Signals(number).name
        place = f"epoch {self.position.epoch + 1}, step {self.position.step}"
        say(f"\n{name}: saved at {place}; {advice_to_continue(self.run)}")
        processes.barrier()
        if not self.signal and processes.stop_launcher(number):
            say(f"\n{name} on another machine: the run is saved and ends here too", everyone=True)
        processes.leave(request)


def uninterrupted(batches):
    """Yield batches. On Windows Ctrl-C, which is noted, ends the wait for one: wait again."""
    while True:
        try:
            yield next(batches)
        except InterruptedError:
            continue
        except StopIteration:
            return
