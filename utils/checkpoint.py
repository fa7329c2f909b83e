"""All that resuming needs, in one file that is an epoch's commit; what people read follows it."""

import atexit
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from utils.optimizer import restore_optimizer
from utils.plumbing import processes
from utils.plumbing.console import say
from utils.plumbing.errors import NOT_FINITE, UserError
from utils.plumbing.files import LAST, save_tensors
from utils.plumbing.processes import rank
from utils.plumbing.saved import cannot_continue, check_buffers, check_same_shapes
from utils.steps import Steps

# What messages call parts of what a score depends on
IN_WORDS = {"list": "the test list", "pictures": "the test pictures"}


@dataclass
class Position:
    """How far this process is in an epoch's training, or in its validation."""

    epoch: int
    step: int = 0  # global batches done
    sums: Counter = field(default_factory=Counter)  # of batch_sums, on the device: no step waits
    unreadable: int = 0

    def totals(self):
        """Return {name: sum over all processes, on the CPU}, with 'unreadable'. Collective."""
        own = {name: value.cpu() for name, value in self.sums.items()}
        own["unreadable"] = self.unreadable
        total = Counter()
        for sums in processes.gather_objects(own):
            total.update(sums)
        return dict(total)


class Checkpoint(Steps):
    """A run's state: saved, loaded and published.

    parts: {name: object with state_dict() and load_state_dict(), or None} of model, optimizer,
    scaler, ema and history. scored_on: {name: value} of all that a score depends on; when one has
    changed, the best epoch is sought anew.
    """

    def __init__(self, run, parts, save_minutes=0, scored_on=None):
        atexit.register(processes.stop_workers)  # Python would wait for workers that ignore SIGTERM
        super().__init__(run)
        self.parts = parts
        self.save_minutes = save_minutes
        self.scored_on = {name: str(value) for name, value in (scored_on or {}).items()}
        self.best = None  # the weights of history's best epoch, on the CPU
        self.best_is_new = False
        self.position = Position(0)
        self.order = ""
        self.resumed = {}
        self.saved_at = time.monotonic()

    def load(self, state):
        """Load each part's state and drop it from `state`, to free its memory.

        UserError: the state of another network or optimizer, or one that is not whole.
        """
        self.check_fits(state)
        for name, part in self.parts.items():
            saved = state.pop(name)
            if part is None or saved is None:
                continue
            try:
                if name == "optimizer":
                    restore_optimizer(part, saved)
                else:
                    part.load_state_dict(saved)
            except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
                raise cannot_continue(
                    self.run, f"the {name}'s state does not fit ({error})"
                ) from None
        self.best = state.pop("best")
        self.best_is_new = True
        if rank() == 0:
            self.compare_scores(state["scored_on"])
        self.resumed = state
        self.position = Position(state["epoch"], state["step"])

    def check_fits(self, state):
        """Raise UserError unless a checkpoint's tensors have the parts' names and shapes."""
        check_same_shapes(self.run, "network", state["model"], self.parts["model"])
        if self.parts["ema"] is not None:
            check_same_shapes(self.run, "averages", state["ema"] or {}, self.parts["ema"])
        if state["best"] is not None:
            published = published_model(self.parts)
            check_same_shapes(self.run, "best epoch's network", state["best"], published)
        check_buffers(self.run, state["optimizer"], self.parts["optimizer"])

    def compare_scores(self, before):
        """Seek the best epoch anew where something that a score depends on has changed."""
        if not isinstance(before, dict):
            before = {"the version of the program": ""}
        names = {**before, **self.scored_on}
        changed = [name for name in names if before.get(name) != self.scored_on.get(name)]
        if not changed:
            return
        self.best = None
        self.parts["history"].seek_best_anew()
        texts = ", ".join(IN_WORDS.get(name, name) for name in changed)
        say(f"  the best epoch is sought anew, changed: {texts}")

    def begin(self, epoch, order):
        """Return the Position at an epoch's beginning, or where the epoch was interrupted.

        order: a text of all that the pictures of a step depend on; if it has changed since the
        interruption, the epoch begins again.
        """
        self.position = Position(epoch)
        self.order = order
        if self.resumed.get("epoch") == epoch and self.resumed["step"]:
            if self.resumed["order"] == order:
                self.go_on()
            else:
                say(
                    f"  epoch {epoch + 1} begins again, as the training pictures, how they are "
                    f"read or their order changed"
                )
        return self.position

    def go_on(self):
        """Set the position to where the epoch was interrupted; rank 0 takes the sums of all."""
        self.position.step = self.resumed["step"]
        if rank() == 0:
            totals = self.resumed["totals"]
            device = self.device()
            self.position.unreadable = totals.pop("unreadable")
            self.position.sums.update({name: value.to(device) for name, value in totals.items()})

    def device(self):
        """Return where the model is."""
        return next(self.parts["model"].parameters()).device

    def is_idle(self):
        """Return whether what trains has done all that it was given."""
        device = self.device()
        return device.type != "cuda" or torch.cuda.current_stream(device).query()

    def is_due(self):
        """Return whether rank 0 has not saved for save_minutes."""
        seconds = time.monotonic() - self.saved_at
        return rank() == 0 and self.save_minutes > 0 and seconds > 60 * self.save_minutes

    def save_position(self):
        """Save inside an epoch. Collective."""
        self.save(self.position.epoch, self.position.step, self.position.totals())

    def save(self, epoch, step=0, totals=None):
        """Write last_checkpoint.pth on rank 0. Collective.

        UserError: weights that are not finite, a full disk.
        """
        if rank() == 0:
            state = {
                name: None if part is None else part.state_dict()
                for name, part in self.parts.items()
            }
            state.update(epoch=epoch, step=step, totals=totals)
            state.update(best=self.best, order=self.order, scored_on=self.scored_on)
            check_finite(state)
            save_tensors(Path(self.run, LAST), state)
        processes.barrier()
        self.saved_at = time.monotonic()

    def commit(self, metrics, validated, save_period, last_epoch):
        """Record an epoch, write the checkpoint, then the files for people. Collective.

        validated: the model that the metrics are of. Return whether it is the best so far (rank 0).
        """
        best = rank() == 0 and self.parts["history"].append_loss(metrics)
        if best:
            self.best_is_new = True
            weights = validated.state_dict()
            self.best = {
                name: value.detach().to("cpu", copy=True) for name, value in weights.items()
            }
        self.position = Position(metrics["epoch"])
        self.save(metrics["epoch"])
        self.publish(save_period, last_epoch)
        return best

    def publish(self, save_period, last_epoch):
        """Write the files that people read, on rank 0, where an epoch has ended."""
        history = self.parts["history"]
        if rank() or not history.rows or self.position.step:
            return
        history.write()
        if self.best_is_new and self.best is not None:
            save_tensors(Path(self.run, "best_epoch_weights.pth"), self.best)
        self.best_is_new = False
        row = history.rows[-1]
        weights = published_model(self.parts).state_dict()
        save_tensors(Path(self.run, "last_epoch_weights.pth"), weights)
        if row["epoch"] % save_period == 0 or row["epoch"] == last_epoch:
            losses = f"loss{row['train_loss']:.3f}-val_loss{row['val_loss']:.3f}"
            save_tensors(Path(self.run, f"ep{row['epoch']:03d}-{losses}.pth"), weights)


def published_model(parts):
    """Return the model that is validated and published: the averaged one where there is one."""
    return parts["model"] if parts["ema"] is None else parts["ema"].module


def check_finite(state):
    """Raise UserError where weights or sums of a state hold a number that is not finite."""
    for name, what in (
        ("model", "weights are"),
        ("ema", "averaged weights are"),
        ("totals", "loss is"),
    ):
        values = state[name] or {}
        for key, value in values.items():
            if not isinstance(value, torch.Tensor):
                continue
            no_loss_was_finite = name == "totals" and key == "finite" and value == 0
            if no_loss_was_finite or not value.isfinite().all():
                raise UserError(
                    f"the {what} not finite any more after epoch {state['epoch']}, "
                    f"step {state['step']}: {NOT_FINITE}"
                )
