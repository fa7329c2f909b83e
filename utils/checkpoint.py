"""All that resuming needs, as one file that is the commit; the files that people read follow it. Before each step the
processes agree on one number, so that none enters a step that another one leaves out."""

import atexit
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist

from utils.optimizer import restore_optimizer
from utils.plumbing import processes
from utils.plumbing.console import say
from utils.plumbing.errors import NOT_FINITE, UserError
from utils.plumbing.files import save_tensors
from utils.plumbing.processes import rank
from utils.plumbing.waiting import WaitingTime

LAST = "last_checkpoint.pth"
GO_ON, SAVE = 0, 1  # what a process wishes for the next step; 128 + a signal's number: save and end


@dataclass
class Position:
    """How far this process is in an epoch's training, or in its validation."""

    epoch: int
    step: int = 0  # global batches done
    sums: Counter = field(
        default_factory=Counter
    )  # of recipe.sums_of, whose update() adds; on the device, so no step waits
    unreadable: int = 0

    def totals(self):
        """{name: sum of all processes, on the CPU}, with 'unreadable' among them. Collective."""
        own, total = {name: value.cpu() for name, value in self.sums.items()}, Counter()
        for sums in processes.gather_objects({**own, "unreadable": self.unreadable}):
            total.update(sums)
        return dict(total)


class Checkpoint:
    """A run's state: saved, loaded and published; and the steps, before each of which the processes agree.

    parts: {name: object with state_dict()/load_state_dict() or None}: model, optimizer, scaler, ema, history.
    scored_on: a text of all that a score depends on; when it has changed, the best epoch is sought anew.
    """

    def __init__(self, run, parts, save_minutes=0, scored_on=""):
        atexit.register(processes.stop_workers)  # Python would wait for workers that ignore SIGTERM
        self.run, self.parts, self.save_minutes, self.scored_on = (
            run,
            parts,
            save_minutes,
            scored_on,
        )
        self.best, self.best_is_new = (
            None,
            False,
        )  # the best epoch's weights, on the CPU: one story with the history
        self.position, self.order, self.resumed = Position(0), "", {}
        self.signal, self.signalled_at, self.saved_at = 0, 0, time.monotonic()
        self.asked = (
            torch.tensor([GO_ON]),
            None,
        )  # the last wish, and its journey to the other processes

    def load(self, state):
        """Give every part its own back, taking it out of `state`: it would fill memory for the rest of the run."""
        for name, part in self.parts.items():
            kept = state.pop(name)
            if part and kept:
                restore_optimizer(part, kept) if name == "optimizer" else part.load_state_dict(kept)
        self.best, self.best_is_new = state.pop("best"), True
        if state["scored_on"] != self.scored_on:
            self.best = None
            if rank() == 0:
                self.parts["history"].seek_best_anew()
            say(
                "  the best epoch is sought anew: the test pictures, how they are read or best_by changed"
            )
        self.resumed, self.position = state, Position(state["epoch"], state["step"])

    def begin(self, epoch, order):
        """The Position at an epoch's beginning, or where it was interrupted if its `order`, a text, is still the same."""
        kept, self.position, self.order = self.resumed, Position(epoch), order
        interrupted = kept.get("epoch") == epoch and kept["step"]
        if interrupted and kept["order"] != order:
            say(
                f"  epoch {epoch + 1} begins again, as the training pictures, how they are read or their order changed"
            )
        elif interrupted:
            self.position.step = kept["step"]
            if rank() == 0:
                self.position.unreadable = kept["totals"].pop("unreadable")
                device = next(self.parts["model"].parameters()).device
                self.position.sums.update(
                    {name: value.to(device) for name, value in kept["totals"].items()}
                )
        return self.position

    def save(self, epoch, step=0, totals=None):
        """Write last_checkpoint.pth on rank 0. Collective. UserError: weights that are not finite, a full disk."""
        if rank() == 0:
            state = {name: part and part.state_dict() for name, part in self.parts.items()}
            state.update(
                best=self.best,
                epoch=epoch,
                step=step,
                totals=totals,
                order=self.order,
                scored_on=self.scored_on,
            )
            for name, what in (
                ("model", "weights are"),
                ("ema", "averaged weights are"),
                ("totals", "loss is"),
            ):
                tensors = [
                    value
                    for value in (state[name] or {}).values()
                    if isinstance(value, torch.Tensor)
                ]
                if not all(tensor.isfinite().all() for tensor in tensors):
                    raise UserError(
                        f"the {what} not finite any more after epoch {epoch}, step {step}: {NOT_FINITE}"
                    )
            save_tensors(Path(self.run, LAST), state)
        processes.barrier()
        self.saved_at = time.monotonic()

    def commit(self, figures, judged, save_period, last_epoch):
        """End an epoch in one checkpoint; whether `judged`, the model that was validated, is the best (rank 0). Collective."""
        best = rank() == 0 and self.parts["history"].append_loss(figures)
        if best:
            self.best_is_new = True
            self.best = {
                name: value.detach().to("cpu", copy=True)
                for name, value in judged.state_dict().items()
            }
        self.position = Position(figures["epoch"])
        self.save(figures["epoch"])
        self.publish(save_period, last_epoch)
        return best

    def publish(self, save_period, last_epoch):
        """After an epoch's end, also when resuming there: what people read follows the checkpoint, on rank 0."""
        history, judged = self.parts["history"], self.parts["ema"] or self.parts["model"]
        if rank() or not history.rows or self.position.step:
            return
        history.write()
        if self.best_is_new and self.best is not None:
            save_tensors(Path(self.run, "best_epoch_weights.pth"), self.best)
        self.best_is_new = False
        row, weights = history.rows[-1], getattr(judged, "module", judged).state_dict()
        save_tensors(Path(self.run, "last_epoch_weights.pth"), weights)
        if row["epoch"] % save_period == 0 or row["epoch"] == last_epoch:
            name = "ep%03d-loss%.3f-val_loss%.3f.pth" % (
                row["epoch"],
                row["train_loss"],
                row["val_loss"],
            )
            save_tensors(Path(self.run, name), weights)

    def catch_signals(self):
        """From now on SIGTERM, Ctrl-C and SIGHUP are noted and obeyed before the next step; a second Ctrl-C ends at once."""

        def note(number, frame):
            if (
                self.signal and number == signal.SIGINT and time.monotonic() - self.signalled_at > 1
            ):  # torchrun repeats the first
                say(f"\nended at once: {self.run} is as it was saved last")
                processes.end(128 + number)
            if not self.signal:
                self.signal, self.signalled_at = number, time.monotonic()

        for number in (signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGTERM)):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup stays in force
                signal.signal(number, note)

    def steps(self, gen, steps, number=1):
        """Yield `number` batches of `gen` at a time (fewer where a process has no share), `steps` in all, once all agree."""
        batches = iter(gen)
        self.waiting = WaitingTime(next(self.parts["model"].parameters()).is_cuda)
        for done in range(0, steps, number):
            begin = self.waiting.now()
            current = list(islice(batches, min(number, steps - done)))
            self.waiting.add(begin)
            self.agree()
            yield current

    def agree(self):
        """Obey the largest wish of the step before (go on, save, save and end); the next travels while a step computes."""
        wish, journey = self.asked
        if journey:
            journey.wait()
        if wish != GO_ON:
            epoch, step = self.position.epoch, self.position.step
            self.save(epoch, step, self.position.totals())
        if wish > 128:
            say(
                f"\n{signal.Signals(int(wish) - 128).name}: saved at epoch {epoch + 1}, step {step}; continue with "
                f"resume = {self.run!r} (or resume = True), the other settings as they are"
            )
            processes.barrier()
            processes.end(int(wish))
        due = (
            self.save_minutes
            and rank() == 0
            and time.monotonic() - self.saved_at > 60 * self.save_minutes
        )
        wish = torch.tensor([128 + self.signal if self.signal else SAVE if due else GO_ON])
        self.asked = (
            wish,
            dist.all_reduce(wish, dist.ReduceOp.MAX, async_op=True)
            if processes.connected()
            else None,
        )
