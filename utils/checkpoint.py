"""Save and restore a run: the checkpoint is written first, as an epoch's commit, then the rest."""

import copy
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from utils.optimizer import restore_optimizer
from utils.plumbing import processes
from utils.plumbing.console import say
from utils.plumbing.errors import NOT_FINITE, UserError
from utils.plumbing.files import LAST, on_cpu, save_tensors
from utils.plumbing.processes import rank
from utils.steps import Steps


@dataclass
class Position:
    """How far this process is in an epoch's training, or in its validation."""

    epoch: int  # from 0
    step: int = 0  # batches done, each of all processes; `accumulate` make one optimizer step
    fingerprint: str = ""  # all that the pictures of a step depend on
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

    def take(self, totals, device):
        """Continue from the `totals` of all processes."""
        self.unreadable = totals.pop("unreadable")
        for name, value in totals.items():
            self.sums[name] = value.to(device)


class Checkpoint(Steps):
    """The state of a run: it is saved, loaded and published. Steps also saves it inside an epoch.

    Its parts have state_dict() and load_state_dict(); scaler, ema and history may be None.
    scored_on: {name: value} of all that a score depends on; when one has changed, the best epoch is
    sought anew.
    """

    def __init__(self, run, model, optimizer, scaler, ema, history, save_minutes=0, scored_on=None):
        super().__init__(run)
        self.parts = {
            "model": model,
            "optimizer": optimizer,
            "scaler": scaler,
            "ema": ema,
            "history": history,
        }
        self.save_minutes = save_minutes
        self.scored_on = {name: str(value) for name, value in (scored_on or {}).items()}
        self.best = None  # the weights of history's best epoch, on the CPU
        self.position = Position(0)
        self.saved_at = time.monotonic()

    def load(self, state, save_period, last_epoch):
        """Load each part's state, drop it from `state` to free its memory, and publish it.

        UserError: the state of another network or optimizer, or one that is not whole.
        """
        try:
            for name, part in self.parts.items():
                saved = state.pop(name)
                if name == "optimizer":
                    restore_optimizer(part, saved)
                elif part is not None and saved is not None:
                    part.load_state_dict(saved)
            best = state.pop("best")
            self.best = best if rank() == 0 else None  # which alone saves it
            self.position = Position(state["epoch"], state["step"], state["order"])
            if rank() == 0:
                self.seek_best_if_changed(state["scored_on"])
                if self.position.step:
                    self.position.take(state["totals"], self.device())
            self.publish(save_period, last_epoch)  # the process may have died between save and this
        except UserError:
            raise
        except Exception as error:  # what is not whole can raise nearly anything
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:220]
            raise cannot_continue(
                self.run, f"{LAST} is not whole, or the network has changed since ({reason})"
            ) from None

    def seek_best_if_changed(self, before):
        """Seek the best epoch anew where scored_on is not what it was `before`.

        The weights that were best until then are kept under another name.
        """
        names = {**before, **self.scored_on}
        changed = [name for name in names if before.get(name) != self.scored_on.get(name)]
        if not changed:
            return
        if "list" in changed and "list" in before:
            say(
                "  WARNING: the test data have changed: if pictures among them were trained on, "
                "the scores will be too good"
            )
        history = self.parts["history"]
        if self.best is not None:
            name = f"best_until_ep{history.last_epoch():03d}.pth"
            save_tensors(Path(self.run, name), self.best)
        self.best = None
        history.seek_best_anew()
        say(f"  the best epoch is sought anew, changed: {', '.join(changed)}")

    def begin(self, epoch, fingerprint):
        """Return the Position at an epoch's beginning, or where the epoch was interrupted.

        If its fingerprint has changed since the interruption, the epoch begins again.
        """
        interrupted = self.position.step and self.position.epoch == epoch
        if interrupted and self.position.fingerprint == fingerprint:
            return self.position
        self.position = Position(epoch, fingerprint=fingerprint)
        if interrupted:
            say(
                f"  epoch {epoch + 1} begins again, as the training pictures, how they are "
                f"read or their order changed"
            )
        return self.position

    def device(self):
        """Return where the model is."""
        return next(self.parts["model"].parameters()).device

    def is_idle(self):
        """Return whether the GPU's queue is empty; always True on a CPU."""
        device = self.device()
        return device.type != "cuda" or torch.cuda.current_stream(device).query()

    def is_due(self):
        """Return whether rank 0 has not saved for save_minutes."""
        seconds = time.monotonic() - self.saved_at
        return rank() == 0 and self.save_minutes > 0 and seconds > 60 * self.save_minutes

    def save(self):
        """Write last_checkpoint.pth on rank 0. Collective.

        UserError: weights that are not finite, a full disk.
        """
        position = self.position
        totals = position.totals() if position.step else None
        if rank() == 0:
            state = {
                name: None if part is None else part.state_dict()
                for name, part in self.parts.items()
            }
            state.update(epoch=position.epoch, step=position.step, totals=totals)
            state.update(best=self.best, order=position.fingerprint, scored_on=self.scored_on)
            check_finite(state)
            save_tensors(Path(self.run, LAST), state)
        processes.barrier()
        self.saved_at = time.monotonic()

    def commit(self, metrics, save_period, last_epoch):
        """Record an epoch, write the checkpoint, then the files for people. Collective.

        Return whether it is the best so far (rank 0).
        """
        best = rank() == 0 and self.parts["history"].append_loss(metrics)
        if best:
            self.best = copy.deepcopy(on_cpu(published_model(self.parts).state_dict()))
        # the next epoch's beginning: metrics count epochs from 1, positions from 0
        self.position = Position(metrics["epoch"], fingerprint=self.position.fingerprint)
        self.save()
        self.publish(save_period, last_epoch, best)
        return best

    def publish(self, save_period, last_epoch, best_is_new=True):
        """Write the files that people read, on rank 0."""
        history = self.parts["history"]
        if rank() or not history.rows:
            return
        try:
            history.write()
        except UserError as error:  # Windows: it is open in another program; written next time
            if not isinstance(error.__cause__, PermissionError):
                raise
            say(
                f"WARNING: history.csv or epoch_loss.png cannot be replaced "
                f"({error.__cause__.strerror}), and lacks this epoch: close the program that has "
                f"it open before the training ends, which goes on"
            )
        if best_is_new and self.best is not None:
            save_tensors(Path(self.run, "best_epoch_weights.pth"), self.best)
        if self.position.step:  # the model is inside an epoch
            return
        row = history.rows[-1]
        weights = published_model(self.parts).state_dict()
        save_tensors(Path(self.run, "last_epoch_weights.pth"), weights)
        if row["epoch"] % save_period == 0 or row["epoch"] == last_epoch:
            losses = f"loss{row['train_loss']:.3f}-val_loss{row['val_loss']:.3f}"
            save_tensors(Path(self.run, f"ep{row['epoch']:03d}-{losses}.pth"), weights)


def cannot_continue(run, reason):
    """Return the UserError that a run cannot be continued."""
    return UserError(
        f"{run} cannot be continued: {reason}. Undo what was changed, or start anew with "
        f"resume = False, perhaps from its last_epoch_weights.pth (model_path)"
    )


def published_model(parts):
    """Return the model that is validated and published: the averaged one where there is one."""
    return parts["model"] if parts["ema"] is None else parts["ema"].module


def check_finite(state):
    """Raise UserError where weights or sums of a state hold a number that is not finite."""
    parts = {
        "weights are": state["model"],
        "averaged weights are": state["ema"],
        "loss is": state["totals"],
    }
    for what, values in parts.items():
        values = values or {}
        tensors = [value for value in values.values() if isinstance(value, torch.Tensor)]
        finite = all(tensor.isfinite().all() for tensor in tensors)
        if not finite or values.get("pictures") == 0:  # no batch had a finite loss
            raise UserError(
                f"the {what} not finite any more after epoch {state['epoch']}, "
                f"step {state['step']}: {NOT_FINITE}"
            )
