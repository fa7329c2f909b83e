"""All that resuming needs, as one file that is the commit; and the files that people read, which follow it."""
import time
from pathlib import Path

import torch

from utils import processes
from utils.errors import UserError
from utils.files import check_sums, load_tensors, not_written, save_tensors
from utils.processes import rank
from utils.recipe import restore_optimizer

LAST, BEFORE = "last_checkpoint.pth", "last_checkpoint_previous.pth"


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


class RunState:
    """What a run is made of, saved, loaded and published.

    parts: {name: object with state_dict()/load_state_dict() or None}: model, optimizer, scaler, ema, history.
    order: what the order of an epoch's pictures depends on, {name: value}; when it has changed, a resumed run begins its
    interrupted epoch again. judge: what the best epoch depends on; when it has changed, the best is sought anew.
    """

    def __init__(self, run, parts, order=None, judge=None):
        self.run, self.parts = run, parts
        self.order, self.judge = order or {}, judge or {}
        self.best = None  # the best epoch's weights, on the CPU: with the history they make one story
        self.resumed, self.saved_at = {}, time.monotonic()
        self.between_epochs = True  # whether the model stands at the end of the history's last epoch

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
        self.best, self.between_epochs = state.pop("best", None), state["step"] == 0
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
            try:
                if target.is_file():
                    target.replace(target.with_name(BEFORE))
                fresh.replace(target)
            except OSError as error:
                raise not_written(target, error) from error
        processes.on_rank_0(write)
        self.saved_at, self.between_epochs = time.monotonic(), step == 0

    def publish(self, save_period, last_epoch, with_best=True):
        """Rank 0: bring the files that people read in line with the checkpoint: history.csv, curves, weight files."""
        history, judged = self.parts["history"], self.parts.get("ema") or self.parts["model"]
        history.write()
        if with_best and self.best is not None:
            save_tensors(Path(self.run, "best_epoch_weights.pth"), self.best)
        if self.between_epochs and history.rows:
            row, weights = history.rows[-1], getattr(judged, "module", judged).state_dict()
            save_tensors(Path(self.run, "last_epoch_weights.pth"), weights)
            if row["epoch"] % save_period == 0 or row["epoch"] == last_epoch:
                name = "ep%03d-loss%.3f-val_loss%.3f.pth" % (row["epoch"], row["train_loss"], row["val_loss"])
                save_tensors(Path(self.run, name), weights)
