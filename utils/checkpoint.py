"""Where an epoch stands, and the steps that lead through it.

Before each step the processes agree by one number, the largest wish of all: so none enters a step that another one leaves
out. Wishes travel while the step before computes, and nothing waits for them.
"""
import signal
import time
from dataclasses import dataclass, field

import torch

from utils import processes
from utils.errors import UserError
from utils.processes import rank
from utils.state import RunState

GO_ON, SAVE, GIVE_UP = 0, 1, 2  # wishes; 128 + a signal's number is the wish to save and end


@dataclass
class Position:
    """How far this process is in an epoch's training, or in its validation."""
    epoch: int
    device: torch.device
    allowed: float  # unreadable pictures of all processes
    step: int = 0  # global batches done
    sums: dict = field(default_factory=dict)  # of recipe.sums_of, on the device, so that no step waits for figures
    unreadable: int = 0
    cleared: int = 0  # as many of them were found to be few enough, together with the other processes'
    lr: float = 0.0
    bad_step: torch.Tensor = None  # int64 (): the first step whose loss is not finite, 0 for none

    def __post_init__(self):
        self.bad_step = torch.zeros((), dtype=torch.int64, device=self.device)

    def add(self, loss, sums):
        """Add a batch's loss and its sums of recipe.sums_of; without waiting for the device."""
        bad = torch.isfinite(loss).logical_not() & (self.bad_step == 0)
        self.bad_step = torch.where(bad, self.step, self.bad_step)
        self.sums = {name: self.sums.get(name, 0) + value for name, value in sums.items()}

    def totals(self):
        """({name: sum of all processes, on the CPU}, unreadable pictures of all). Collective."""
        everyone = processes.gather_objects(({name: value.cpu() for name, value in self.sums.items()}, self.unreadable))
        names = dict.fromkeys(name for sums, _ in everyone for name in sums)
        return {name: sum(sums[name] for sums, _ in everyone if name in sums) for name in names}, sum(n for _, n in everyone)


class Checkpoint(RunState):
    """Leads the processes through the steps together, and saves the run's state when it is time, or when they have to end."""

    def __init__(self, run, parts, save_minutes=0, **options):
        super().__init__(run, parts, **options)
        self.save_minutes, self.position, self.signal, self.signalled_at = save_minutes, None, 0, 0
        self.looked_at, self.failure, self.named = 0, None, set()

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
                self.position.sums = {name: value.to(device) for name, value in sums.items()}
        return self.position

    def steps(self, gen, position, steps, number=1):
        """Yield the next `number` batches of `gen` at a time, `steps` in all, agreeing with the other processes before each.

        The loop's body computes with them. Meanwhile the next ones are here and this process's wish travels.
        Batches that this process has no share in are left out of the list. Used for training and validation alike.
        """
        batches = in_this_process(gen)
        ready = self.fetch(batches, min(number, steps))
        wish = self.wish(position)
        while steps > 0:
            self.obey(wish.wait(), position)
            current, steps = ready, steps - number
            ready = self.fetch(batches, min(number, steps))
            self.note_unreadable(current, gen, position)
            wish = self.wish(position)
            yield current
        self.obey(wish.wait(), position)
        self.obey(self.wish(position, look=True).wait(), position)  # a loss that was not finite in the last step

    def fetch(self, batches, number):
        """The next `number` batches, or fewer at the end; a loader that fails is remembered as this process's failure."""
        got = []
        try:
            while len(got) < number and (batch := next_batch(batches)) is not None:
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
        """Send this process's wish on its way. A GPU has to finish its steps before its losses can be looked at: every 20th time."""
        self.looked_at += 1
        look = look or position.device.type == "cpu" or self.looked_at % 20 == 0
        due = self.save_minutes and rank() == 0 and time.monotonic() - self.saved_at > 60 * self.save_minutes
        # whether they are too many is seen from all processes' sum, when saving
        too_many = position.unreadable > max(position.allowed / processes.world_size(), position.cleared)
        if self.signal:
            return processes.Wish(128 + self.signal)
        if self.failure or look and position.bad_step.item():
            return processes.Wish(GIVE_UP)
        return processes.Wish(SAVE if due or too_many else GO_ON)

    def obey(self, wish, position):
        """Do what the processes have agreed on: go on, save, give up with a sentence, or save and end. Collective."""
        if wish == GO_ON:
            return
        training, validating = self.position, position is not self.position
        where = f"epoch {training.epoch + 1}, step {training.step}"
        told = processes.gather_objects((position.bad_step.item(), self.failure))
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
        if wish > 128:
            if rank() == 0:
                print(f"\n{signal.Signals(wish - 128).name}: saved at {where}; continue with "
                      f"resume = {self.run!r} (or resume = True) in train.py", flush=True)
            processes.barrier()
            processes.end(wish)


def in_this_process(gen):
    """The batches of `gen`; a worker's death is found by the next fetch, not by a signal handler amid a step."""
    batches = iter(gen)
    if gen.num_workers and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return batches


def next_batch(batches):
    """The next batch, or None at the end. UserError: the sentence for a worker that has failed."""
    try:
        return next(batches, None)
    except UserError as error:  # a worker's error comes with its traceback as text, the sentence last
        raise UserError(str(error).strip().splitlines()[-1].rpartition("UserError: ")[2]) from None
    except (RuntimeError, OSError, EOFError) as error:
        if loader_failure(error):
            raise UserError(loader_failure(error)) from error
        raise


def loader_failure(error):
    """A sentence for an error that a DataLoader raised, or None for a programming error in a worker."""
    text = str(error)
    if "shared memory" in text or "bus error" in text.lower():
        return ("the data loader's workers have no shared memory left: give the container more (docker run --shm-size=2g), "
                "lower num_workers, or set num_workers = 0")
    if "Too many open files" in text:
        return "too many open files: raise the limit (ulimit -n 4096), or lower num_workers"
    if "Caught" not in text and ("DataLoader worker" in text or isinstance(error, (OSError, EOFError))):
        return ("a data-loader worker died, most likely for lack of memory: lower num_workers or the batch size "
                f"({(text.splitlines() or [type(error).__name__])[0]})")
    return None
