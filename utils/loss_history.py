"""The run's metrics: kept for the checkpoint, and written as history.csv and curves."""

import math
from functools import partial
from itertools import chain
from pathlib import Path

from utils.plumbing.charts import draw_line_chart
from utils.plumbing.console import say, shell_words
from utils.plumbing.files import save_image, save_text
from utils.task import epoch_order, metric_text, metric_texts

MUCH_WAITING = 1 / 3  # of an epoch's time: above it, the epoch's line says what helps


class LossHistory:
    """A dictionary of metrics for each epoch; task.epoch_order says which epoch is the best.

    model and input_shape are documented parameters, and not used.
    """

    def __init__(self, log_dir, model=None, input_shape=None, best_by="top1"):
        self.log_dir = log_dir
        self.rows = []
        self.best_by = best_by.removeprefix("-")
        self.order = partial(epoch_order, best_by=best_by)
        self.best_since = 0  # rows before this one were scored otherwise
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(log_dir, flush_secs=1)  # as a process may end at once
        except Exception:  # absent or broken: its files are all that is missing then
            self.writer = NoWriter()

    def append_loss(self, metrics):
        """Add an epoch's metrics, and return whether it is the best so far."""
        self.rows.append(metrics)
        try:
            for name, value in metrics.items():
                self.writer.add_scalar(name, value, metrics["epoch"])
        except OSError as error:  # perhaps of an earlier write: only its files are missing then
            say(f"WARNING: no more TensorBoard files ({error})")
            self.writer = NoWriter()
        return self.best() is metrics

    def best(self):
        """Return the best epoch's metrics, or None."""
        comparable = self.rows[self.best_since :]
        rows = [row for row in comparable if math.isfinite(row.get(self.best_by, math.nan))]
        return max(rows, key=self.order, default=None)

    def last_epoch(self):
        """Return the number of the last epoch, 0 where there is none."""
        return self.rows[-1]["epoch"] if self.rows else 0

    def describe_best(self):
        """Return the best epoch as the last line of a training names it."""
        best = self.best()
        if best is None:
            return "epoch: none yet"
        return f"{metric_text(self.best_by, best[self.best_by])} (epoch {best['epoch']})"

    def seek_best_anew(self):
        """Compare only epochs that follow from now on."""
        self.best_since = len(self.rows)

    def write(self):
        """Write history.csv, with a column for each metric of any epoch, and epoch_loss.png."""
        names = list(dict.fromkeys(chain(*self.rows)))
        lines = [",".join(names)]
        for row in self.rows:
            lines.append(",".join(f"{row.get(name, math.nan):.8g}" for name in names))
        save_text(Path(self.log_dir, "history.csv"), "\n".join(lines) + "\n")
        self.loss_plot()

    def loss_plot(self):
        """Draw the curves of the loss, and of the metric that decides which epoch is best."""
        other = "top1" if self.best_by == "val_loss" else self.best_by
        panels = []
        for name, validated in (("loss", "val_loss"), (other, other)):
            curves = {"training": self.curve(f"train_{name}"), "validation": self.curve(validated)}
            if any(curves.values()):
                panels.append((name, curves))
        save_image(Path(self.log_dir, "epoch_loss.png"), draw_line_chart(panels))

    def curve(self, name):
        """Return the points (epoch, value) of a metric, where it is finite."""
        points = [(row["epoch"], row.get(name, math.nan)) for row in self.rows]
        return [(epoch, value) for epoch, value in points if math.isfinite(value)]

    def state_dict(self):
        return {"rows": self.rows, "best_since": self.best_since}

    def load_state_dict(self, state):
        self.rows = state["rows"]
        self.best_since = int(state["best_since"])


def stops_early(history, early_stop):
    """Return whether a LossHistory has so many epochs since its best one, and say so."""
    best = history.best()
    if not early_stop or not best or history.last_epoch() - best["epoch"] < early_stop:
        return False
    say(
        f"early_stop = {early_stop}: no better epoch since epoch {best['epoch']}, so the training "
        f"ends here ({shell_words(['--resume', str(history.log_dir)])} --early_stop 0 trains on)"
    )
    return True


def describe_epoch(metrics, validated, waiting, is_best):
    """Return what is printed of an epoch."""
    texts = metric_texts({"train_loss": metrics["train_loss"], **validated})
    if metrics["unreadable"]:
        texts.append(f"{metrics['unreadable']} unreadable, {metrics['scored']} scored")
    mark = " *" if is_best else ""
    speed = f"{metrics['images_per_second']:.0f} images/s, {waiting}"
    return f"{', '.join(texts)} ({speed}){mark}"


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


class NoWriter:
    """A stand-in for TensorBoard's writer where that is absent or cannot write."""

    def add_scalar(self, name, value, epoch):
        pass

    def close(self):
        pass
