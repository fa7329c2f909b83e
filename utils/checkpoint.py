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
from utils.plumbing.errors import NOT_FINITE, UserError, short_repr
from utils.plumbing.files import LAST, load_tensors, save_tensors
from utils.plumbing.processes import rank
from utils.steps import Steps


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
        check_fits(self.run, state, self.parts)
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

    def compare_scores(self, before):
        """Seek the best epoch anew where something that a score depends on is not as it was before."""
        if not isinstance(before, dict):
            changed = ["what a score depends on was recorded by another version"]
        else:
            names = {**before, **self.scored_on}
            changed = [name for name in names if before.get(name) != self.scored_on.get(name)]
        if changed:
            self.best = None
            self.parts["history"].seek_best_anew()
            say(f"  the best epoch is sought anew: changed since: {', '.join(changed)}")

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
                    f"  epoch {epoch + 1} begins again, as the training pictures, how they are read "
                    f"or their order changed"
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

    def on_gpu(self):
        return self.device().type == "cuda"

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

    def commit(self, figures, judged, save_period, last_epoch):
        """Record an epoch, write the checkpoint, then the files for people. Collective.

        judged: the model that was validated. Return whether it is the best so far (rank 0).
        """
        best = rank() == 0 and self.parts["history"].append_loss(figures)
        if best:
            self.best_is_new = True
            weights = judged.state_dict()
            self.best = {
                name: value.detach().to("cpu", copy=True) for name, value in weights.items()
            }
        self.position = Position(figures["epoch"])
        self.save(figures["epoch"])
        self.publish(save_period, last_epoch)
        return best

    def publish(self, save_period, last_epoch):
        """Write the files that people read, on rank 0, if the checkpoint is that of an epoch's end."""
        history = self.parts["history"]
        if rank() or not history.rows or self.position.step:
            return
        history.write()
        if self.best_is_new and self.best is not None:
            save_tensors(Path(self.run, "best_epoch_weights.pth"), self.best)
        self.best_is_new = False
        row, weights = history.rows[-1], judged_model(self.parts).state_dict()
        save_tensors(Path(self.run, "last_epoch_weights.pth"), weights)
        if row["epoch"] % save_period == 0 or row["epoch"] == last_epoch:
            losses = f"loss{row['train_loss']:.3f}-val_loss{row['val_loss']:.3f}"
            save_tensors(Path(self.run, f"ep{row['epoch']:03d}-{losses}.pth"), weights)


def judged_model(parts):
    """Return the model that is validated and published: the averaged one where there is one."""
    return parts["model"] if parts["ema"] is None else parts["ema"].module


def check_finite(state):
    """Raise UserError where weights or sums of a state hold a number that is not finite."""
    for name, what in (
        ("model", "weights are"),
        ("ema", "averaged weights are"),
        ("totals", "loss is"),
    ):
        for value in (state[name] or {}).values():
            if isinstance(value, torch.Tensor) and not value.isfinite().all():
                raise UserError(
                    f"the {what} not finite any more after epoch {state['epoch']}, "
                    f"step {state['step']}: {NOT_FINITE}"
                )


# What the values of a checkpoint must be
KINDS = {
    "epoch": int,
    "step": int,
    "model": dict,
    "optimizer": dict,
    "history": dict,
    "scaler": (dict, type(None)),
    "ema": (dict, type(None)),
    "best": (dict, type(None)),
    "totals": (dict, type(None)),
    "order": str,
    "scored_on": (dict, str),  # a text before it was a dictionary
}


def load_checkpoint(run):
    """Return a run's checkpoint; None when it never wrote one. UserError: one that cannot be used."""
    path = Path(run, LAST)
    if not path.exists():
        return None
    try:
        state = load_tensors(path, "resume")
        check_whole(state, path)
    except UserError as error:
        weights = str(Path(run, "last_epoch_weights.pth"))
        raise UserError(
            f"{error}: start anew with resume = False, perhaps from model_path = {weights!r}"
        ) from None
    return state


def check_whole(state, path):
    """Raise UserError unless a checkpoint has all its parts, each of its kind."""
    wrong = [
        name
        for name, kind in KINDS.items()
        if name not in state or not isinstance(state[name], kind)
    ]
    if not wrong:
        wrong = wrong_parts(state)
    if wrong:
        raise UserError(
            f"resume: {str(path)!r} is no checkpoint of this version of the program "
            f"({', '.join(wrong)})"
        )


def wrong_parts(state):
    """Return the names of those parts of a checkpoint that hold what they cannot hold."""
    totals = state["totals"]
    right = {
        "epoch": state["epoch"] >= 0,
        "step": state["step"] >= 0 and (state["step"] == 0 or totals is not None),
        "history": are_rows(state["history"].get("rows")),
        "totals": totals is None or type(totals.get("unreadable")) is int,
    }
    for name in ("model", "best"):
        right[name] = all_tensors(state[name] or {})
    if totals is not None:
        sums = {name: value for name, value in totals.items() if name != "unreadable"}
        right["totals"] = right["totals"] and all_tensors(sums)
    return [name for name, is_right in right.items() if not is_right]


def all_tensors(state):
    return all(isinstance(value, torch.Tensor) for value in state.values())


def are_rows(rows):
    """Return whether `rows` are figures of epochs as LossHistory keeps them."""
    needed = {"epoch", "train_loss", "val_loss"}
    return isinstance(rows, list) and all(
        isinstance(row, dict)
        and needed <= row.keys()
        and all(isinstance(value, (int, float)) for value in row.values())
        for row in rows
    )


def check_fits(run, state, parts):
    """Raise UserError unless a checkpoint's tensors have the shapes that the parts' have now."""
    pairs = [("network", state["model"], parts["model"])]
    if parts["ema"] is not None:
        pairs.append(("averaged network", state["ema"] or {}, parts["ema"]))
    if state["best"] is not None:
        pairs.append(("network of the best epoch", state["best"], judged_model(parts)))
    for what, saved, part in pairs:
        before, now = shapes(saved), shapes(part.state_dict())
        different = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        if different:
            name = different[0]
            raise cannot_continue(
                run,
                f"the {what} has changed since it was saved ({len(different)} tensors; "
                f"{short_repr(name)} was {before.get(name, 'absent')}, "
                f"and is {now.get(name, 'absent')})",
            )
    check_buffers(run, state["optimizer"], parts["optimizer"])


def shapes(state):
    return {name: tuple(getattr(value, "shape", ("no tensor",))) for name, value in state.items()}


BUFFERS = ("momentum_buffer", "exp_avg", "exp_avg_sq")  # of a parameter, in the parameter's shape


def check_buffers(run, state, optimizer):
    """Raise UserError where what an optimizer has learned is not of its parameters' shapes."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    learned = state.get("state")
    if not isinstance(learned, dict):
        raise cannot_continue(run, "the optimizer's state is missing")
    for number, values in learned.items():
        fits = number in range(len(parameters)) and isinstance(values, dict)
        for name in BUFFERS:
            if fits and values.get(name) is not None:
                fits = getattr(values[name], "shape", None) == parameters[number].shape
        if not fits:
            raise cannot_continue(run, f"the optimizer's state {short_repr(number)} does not fit")


def cannot_continue(run, reason):
    return UserError(
        f"{run} cannot be continued: {reason}. Undo what was changed, or start anew with "
        f"resume = False"
    )
