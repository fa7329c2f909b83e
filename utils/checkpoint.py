"""Where an epoch stands, the steps that lead through it, and what is saved on the way.

Before each step the processes agree by one number, the largest wish of all: so none enters a step that another one leaves
out. Wishes travel while the step before computes, and nothing waits for them.
"""
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from utils import processes
from utils.errors import UserError
from utils.files import check_sums, load_tensors, save_tensors
from utils.processes import rank
from utils.recipe import restore_optimizer

LAST, BEFORE = "last_checkpoint.pth", "last_checkpoint_previous.pth"
GO_ON, SAVE, GIVE_UP = 0, 1, 2  # wishes; 128 + a signal's number is the wish to save and end


@dataclass
class Position:
    """How far this process is in an epoch's training, or in its validation."""
    epoch: int
    device: object
    allowed: float  # unreadable pictures of all processes
    step: int = 0  # global batches done
    sums: dict = field(default_factory=dict)  # of recipe.sums_of, on the device, so that no step waits for figures
    unreadable: int = 0
    cleared: int = 0  # as many of them were found to be few enough, together with the other processes'
    lr: float = 0.0
    bad_step: torch.Tensor = None  # int64 (): the first step whose loss is not finite, 0 for none

    def __post_init__(self):
        self.bad_step = torch.zeros((), dtype=torch.int64, device=self.device)

    def add(self, sums):
        """Add a batch's sums of recipe.sums_of."""
        for name, value in sums.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def note_loss(self, loss):
        """Remember the first step whose loss is not finite, without waiting for the device."""
        bad = torch.isfinite(loss).logical_not() & (self.bad_step == 0)
        self.bad_step = torch.where(bad, self.step, self.bad_step)

    def totals(self):
        """(added sums of all processes, on the CPU; unreadable pictures of all). Collective."""
        return added(processes.gather_objects(self.mine()))

    def mine(self):
        return {name: value.cpu() for name, value in self.sums.items()}, self.unreadable


def added(everyone):
    """(sums, unreadable) of every process → those of all, in the order of ranks."""
    total, unreadable = {}, 0
    for sums, count in everyone:
        unreadable += count
        for name, value in sums.items():
            total[name] = total[name] + value if name in total else value
    return total, unreadable


def differing(old, new):
    """Names whose values are others than they were; what was not recorded is taken for unchanged."""
    return [name for name, value in new.items() if (old or {}).get(name, value) != value]


def load_checkpoint(run):
    """The newest sound checkpoint of a run; None when it never wrote one; UserError when none can be read."""
    paths = [p for p in (Path(run, LAST), Path(run, BEFORE)) if p.exists()]
    for path in paths:
        try:
            check_sums(path, "resume")
            state = load_tensors(path, "resume")
            if not (type(state.get("epoch")) is type(state.get("step")) is int and isinstance(state.get("model"), dict)
                    and isinstance(state.get("optimizer"), dict) and isinstance(state.get("history"), dict)):
                raise UserError(f"resume: {str(path)!r} is no checkpoint of a run")
            return state
        except UserError as error:
            print(f"WARNING: {error}; trying the checkpoint before it")
    if paths:
        raise UserError(f"{run} has no readable checkpoint left: start anew with resume = False, "
                        f"perhaps from model_path = {str(Path(run, 'last_epoch_weights.pth'))!r}")
    return None


def check_finite(model, where):
    """UserError when a weight is NaN or infinite."""
    floating = [t for t in model.state_dict().values() if t.is_floating_point()]
    if not torch.stack([torch.isfinite(t).all() for t in floating]).all():
        raise UserError(f"the weights are not finite any more {where}: lower Init_lr, or set clip_grad_norm; "
                        f"the files saved before are intact")


class Checkpoint:
    """Saves all that resuming needs, and leads the processes through the steps together.

    parts: {name: object with state_dict()/load_state_dict() or None}: model, optimizer, scaler, ema, history.
    order: what the order of an epoch's pictures depends on, {name: value}; when it has changed, a resumed run begins its
    interrupted epoch again. judge: what the best epoch depends on; when it has changed, the best is sought anew.
    """

    def __init__(self, run, parts, save_minutes=0, order=None, judge=None):
        self.run, self.parts, self.save_minutes = run, parts, save_minutes
        self.order, self.judge = order or {}, judge or {}
        self.best = None  # the best epoch's weights, on the CPU: with the history they make one story
        self.resumed, self.position = {}, None
        self.signal = self.signalled_at = 0
        self.saved_at, self.looked_at, self.failure, self.named = time.monotonic(), 0, None, set()

    # -- saving and loading

    def load(self, state):
        """Give every part its own back, taking it out of `state`: it would fill memory for the rest of the run."""
        for name, part in self.parts.items():
            kept = state.pop(name, None)
            if part is not None and kept is not None:
                try:
                    restore_optimizer(part, kept) if name == "optimizer" else part.load_state_dict(kept)
                except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
                    raise UserError(f"{self.run} cannot be continued, its {name} is of another network or optimizer: "
                                    f"{(str(error).splitlines() or [''])[0]}") from error
        self.best = state.pop("best", None)
        changed = differing(state.get("order"), self.order)
        if state["totals"] is not None and not isinstance(state["totals"], tuple):
            changed.append("the program's version")
        if changed and state["step"]:
            state.update(step=0, totals=None)
            if rank() == 0:
                print(f"  epoch {state['epoch'] + 1} begins again, as its order depends on {' and '.join(changed)}")
        changed = differing(state.get("judge"), self.judge)
        if changed:
            self.best = None
            if self.parts.get("history"):
                self.parts["history"].seek_best_anew()
                print(f"  the best epoch is sought anew, as {' and '.join(changed)} changed: the scores do not compare")
        self.resumed = state

    def save(self, epoch, step=0, totals=None):
        """Write last_checkpoint.pth on rank 0, keeping the one before it; the other processes wait. Collective.

        UserError when the weights are not finite, or the disk is full; the files saved before are then intact.
        """
        def write():
            for name in ("model", "ema"):
                if self.parts.get(name):
                    check_finite(self.parts[name], f"in epoch {epoch + 1}, step {step}" if step else f"after epoch {epoch}")
            state = {name: part and part.state_dict() for name, part in self.parts.items()}
            state.update(best=self.best, epoch=epoch, step=step, totals=totals, order=self.order, judge=self.judge)
            target = Path(self.run, LAST)
            fresh = target.with_name(f".{LAST}.new")
            save_tensors(fresh, state)
            if target.exists():
                target.replace(target.with_name(BEFORE))
            fresh.replace(target)
        processes.on_rank_0(write)
        self.saved_at = time.monotonic()

    def publish(self, save_period, last_epoch, with_last=True, with_best=True):
        """Rank 0: bring the files that people read in line with the checkpoint: history.csv, curves, weight files.

        with_last: the model stands at the end of the history's last epoch.
        """
        history, judged = self.parts["history"], self.parts.get("ema") or self.parts["model"]
        history.write()
        if with_best and self.best is not None:
            save_tensors(Path(self.run, "best_epoch_weights.pth"), self.best)
        if with_last and history.rows:
            row, weights = history.rows[-1], getattr(judged, "module", judged).state_dict()
            save_tensors(Path(self.run, "last_epoch_weights.pth"), weights)
            if row["epoch"] % save_period == 0 or row["epoch"] == last_epoch:
                name = "ep%03d-loss%.3f-val_loss%.3f.pth" % (row["epoch"], row["train_loss"], row["val_loss"])
                save_tensors(Path(self.run, name), weights)

    # -- the steps

    def catch_signals(self):
        """From now on SIGTERM, Ctrl-C and SIGHUP are noted and obeyed after the current step; a second Ctrl-C ends at once."""
        def note(number, frame):
            if number == self.signal == signal.SIGINT and time.monotonic() - self.signalled_at > 1:  # torchrun repeats the first
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
        training = self.position
        told = processes.gather_objects((training.mine(), position.unreadable, position.bad_step.item(), self.failure))
        where = f"epoch {training.epoch + 1}, step {training.step}"
        bad_step = max(bad for _, _, bad, _ in told)
        if bad_step:
            raise UserError(f"the loss is not finite in epoch {training.epoch + 1}, step {bad_step}, at lr {training.lr:.3g}: "
                            f"lower Init_lr, or set clip_grad_norm; the files saved before it are intact")
        unreadable, of_test = sum(count for _, count, _, _ in told), position is not training
        if unreadable > position.allowed and not of_test:
            raise UserError(f"{unreadable} pictures of epoch {training.epoch + 1} cannot be read, more than 1 % of them: "
                            f"python -m utils.annotation DATASETS --check lists them")
        position.cleared = position.unreadable
        self.save(training.epoch, training.step, added(mine for mine, _, _, _ in told))
        if unreadable > position.allowed:
            raise UserError(f"{unreadable} pictures of the test list cannot be read, more than 1 % of them, and a score of "
                            f"the others would not be comparable. The state up to {where} is saved: continue with "
                            f"resume = {self.run!r}, which repeats the validation alone")
        failures = [failure for _, _, _, failure in told if failure]
        if failures:
            raise UserError(f"{failures[0]}. The state up to {where} is saved: continue with resume = {self.run!r}")
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
