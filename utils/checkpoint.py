"""Where an epoch stands, and the steps that lead through it.

Before each step the processes agree by one number, the largest wish of all: so none enters a step that another one leaves
out. Wishes travel while the step before computes, and nothing waits for them.
"""
import math
import signal
import time
from collections import Counter
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from utils import processes
from utils.errors import UserError
from utils.processes import rank
from utils.state import RunState
from utils.workers import batches_of

GO_ON, SAVE, GIVE_UP = 0, 1, 2  # wishes; 128 + a signal's number is the wish to save and end


@dataclass
class Position:
    """How far this process is in an epoch's training, or in its validation."""
    epoch: int
    device: torch.device
    allowed: float  # unreadable pictures of all processes
    step: int = 0  # global batches done
    sums: Counter = field(default_factory=Counter)  # of recipe.sums_of, whose update() adds; on the device, so no step waits
    unreadable: int = 0
    cleared: int = 0  # as many of them were found to be few enough, together with the other processes'
    lr: float = 0.0

    def totals(self):
        """({name: sum of all processes, on the CPU}, unreadable pictures of all). Collective."""
        everyone = processes.gather_objects(({name: value.cpu() for name, value in self.sums.items()}, self.unreadable))
        total = Counter()
        for sums, _ in everyone:
            total.update(sums)
        return dict(total), sum(unreadable for _, unreadable in everyone)


class Checkpoint(RunState):
    """Leads the processes through the steps together, and saves the run's state when it is time, or when they have to end."""

    def __init__(self, run, parts, save_minutes=0, **options):
        super().__init__(run, parts, **options)
        self.save_minutes, self.position, self.signal, self.signalled_at = save_minutes, None, 0, 0
        self.wishes, self.bad_step, self.failure, self.named = 0, 0, None, set()

    def catch_signals(self):
        """From now on SIGTERM, Ctrl-C and SIGHUP are noted and obeyed after the current step; a second Ctrl-C ends at once."""
        def note(number, frame):
            if self.signal and number == signal.SIGINT and time.monotonic() - self.signalled_at > 1:  # torchrun repeats the first
                if rank() == 0:
                    print(f"\nended at once: {self.run} is as it was saved last", flush=True)
                processes.end(128 + number)
            if not self.signal:
                self.signal, self.signalled_at = number, time.monotonic()
        for number in (signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGTERM)):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup stays in force
                signal.signal(number, note)

    def begin(self, epoch, allowed, device):
        """The Position at the beginning of an epoch, or where it was interrupted."""
        self.position = Position(epoch, device, allowed)
        if self.resumed.get("epoch") == epoch and self.resumed.get("totals"):
            self.position.step = self.resumed["step"]
            if rank() == 0:
                sums, self.position.unreadable = self.resumed["totals"]
                self.position.sums.update({name: value.to(device) for name, value in sums.items()})
        return self.position

    def steps(self, gen, position, steps, number=1):
        """Yield the next `number` batches of `gen` at a time, `steps` in all, agreeing with the other processes before each.

        The loop's body computes with them. Meanwhile the next ones are here and this process's wish travels.
        Batches that this process has no share in are left out of the list. Used for training and validation alike.
        """
        batches = batches_of(gen)
        ready = self.fetch(batches, min(number, steps))
        wish = self.wish(position)
        while steps > 0:
            self.obey(wish, position)
            current, steps = ready, steps - number
            ready = self.fetch(batches, min(number, steps))
            if any(batch[2] for batch in current):
                self.note_unreadable(current, gen, position)
            wish = self.wish(position)
            yield current
        self.obey(wish, position)
        self.obey(self.wish(position, look=True), position)  # a loss that was not finite in the last step

    def fetch(self, batches, number):
        """The next `number` batches, or fewer at the end; a loader that fails is remembered as this process's failure."""
        got = []
        try:
            while len(got) < number and (batch := next(batches, None)) is not None:
                got.append(batch)
        except UserError as error:
            self.failure = str(error)
        return got

    def note_unreadable(self, batches, gen, position):
        """Count the unreadable pictures, and print each once, with its annotation line."""
        for index, reason in (bad for batch in batches for bad in batch[2]):
            position.unreadable += 1
            if index not in self.named:
                print(f"\nunreadable picture: {gen.dataset.name(index)} ({reason})", flush=True)
            self.named.add(index)

    def wish(self, position, look=False):
        """Send this process's wish on its way: (int64 (1,), its journey or None).

        A GPU has to finish its steps before its losses can be looked at: every 20th time.
        """
        self.wishes += 1
        look = look or position.device.type == "cpu" or self.wishes % 20 == 0
        due = self.save_minutes and rank() == 0 and time.monotonic() - self.saved_at > 60 * self.save_minutes
        # whether they are too many is seen from all processes' sum, when saving
        too_many = position.unreadable > max(position.allowed / processes.world_size(), position.cleared)
        wish = torch.tensor([SAVE if due or too_many else GO_ON])
        if self.failure or look and self.find_bad_step(position):
            wish.fill_(GIVE_UP)
        if self.signal:
            wish.fill_(128 + self.signal)
        return wish, dist.all_reduce(wish, dist.ReduceOp.MAX, async_op=True) if processes.connected() else None

    def find_bad_step(self, position):
        """The training step at which the sum of losses was first seen to be not finite; 0 for none. Waits for a GPU."""
        if not self.bad_step and not math.isfinite(position.sums["loss"]):
            self.bad_step = position.step
        return self.bad_step

    def obey(self, wish, position):
        """Do what the processes have agreed on: go on, save, give up with a sentence, or save and end. Collective."""
        largest, journey = wish
        if journey:
            journey.wait()
        if largest == GO_ON:
            return
        training, validating = self.position, position is not self.position
        where = f"epoch {training.epoch + 1}, step {training.step}"
        told = processes.gather_objects((self.find_bad_step(position), self.failure))
        bad_step, failure = max(bad for bad, _ in told), next((failure for _, failure in told if failure), None)
        if bad_step:
            raise UserError(f"the loss is not finite in epoch {training.epoch + 1}, step {bad_step}, at lr {training.lr:.3g}: "
                            f"lower Init_lr, or set clip_grad_norm; the files saved before it are intact")
        totals, (_, unreadable) = training.totals(), position.totals()
        too_many = f"{unreadable} pictures of {'the test list' if validating else f'epoch {training.epoch + 1}'} cannot be read, more than 1 %"
        if unreadable > position.allowed and not validating:
            raise UserError(f"{too_many} of them: python -m utils.annotation DATASETS --check lists them")
        position.cleared = position.unreadable
        self.save(training.epoch, training.step, totals)
        if unreadable > position.allowed:
            failure = f"{too_many}, and a score of the others would not compare: mend them, and the validation alone is repeated"
        if failure:
            raise UserError(f"{failure}. The state up to {where} is saved: continue with resume = {self.run!r}")
        if largest > 128:
            if rank() == 0:
                print(f"\n{signal.Signals(int(largest) - 128).name}: saved at {where}; continue with "
                      f"resume = {self.run!r} (or resume = True) in train.py", flush=True)
            processes.barrier()
            processes.end(int(largest))
