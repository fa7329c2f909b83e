"""The run's figures: kept for the checkpoint, and written as history.csv, epoch_loss.png and TensorBoard scalars."""

import math
from functools import partial
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

from utils.plumbing.charts import draw_line_chart
from utils.plumbing.files import save_image, save_text
from utils.task import epoch_order, metric_text


class LossHistory:
    """One dictionary of metrics an epoch, as fit_one_epoch returns them; task.epoch_order says which is the best."""

    def __init__(self, log_dir, model=None, input_shape=None, best_by="top1"):
        self.log_dir, self.rows, self.best_by = log_dir, [], best_by.removeprefix("-")
        self.order = partial(epoch_order, best_by=best_by)
        self.best_since = 0  # rows before this one were scored otherwise
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(log_dir)
        except ImportError:  # its files are all that is missing then
            self.writer = SimpleNamespace(add_scalar=lambda *words: None, close=lambda: None)

    def append_loss(self, figures):
        """Add an epoch's figures; True when it is the best so far."""
        self.rows.append(figures)
        for name, value in figures.items():
            self.writer.add_scalar(name, value, figures["epoch"])
        return self.best() is figures

    def best(self):
        """Return the best epoch's figures, or None."""
        rows = [
            row
            for row in self.rows[self.best_since :]
            if math.isfinite(row.get(self.best_by, math.nan))
        ]
        return max(rows, key=self.order, default=None)

    def describe_best(self):
        """The best epoch as the last line of a training says it."""
        best = self.best()
        return (
            f"{metric_text(self.best_by, best[self.best_by])} (epoch {best['epoch']})"
            if best
            else "epoch: none yet"
        )

    def seek_best_anew(self):
        self.best_since = len(self.rows)

    def since_best(self):
        """Epochs since the best one."""
        best = self.best()
        return self.rows[-1]["epoch"] - best["epoch"] if best else 0

    def write(self):
        """history.csv, whose columns are all figures that any epoch has ('nan' where one lacks it), and epoch_loss.png."""
        names = list(dict.fromkeys(chain(*self.rows)))
        lines = [",".join(f"{row.get(name, math.nan):.8g}" for name in names) for row in self.rows]
        save_text(Path(self.log_dir, "history.csv"), "\n".join([",".join(names), *lines, ""]))
        self.loss_plot()

    def loss_plot(self):
        """The curves of the loss, and of the figure that decides which epoch is best."""

        def curves(name, validation):
            return {
                label: [
                    (row["epoch"], row[key])
                    for row in self.rows
                    if math.isfinite(row.get(key, math.nan))
                ]
                for label, key in (("training", f"train_{name}"), ("validation", validation))
            }

        name = "top1" if self.best_by == "val_loss" else self.best_by
        panels = [("loss", curves("loss", "val_loss")), (name, curves(name, name))]
        save_image(
            Path(self.log_dir, "epoch_loss.png"),
            draw_line_chart([panel for panel in panels if any(panel[1].values())]),
        )

    def state_dict(self):
        return {"rows": self.rows, "best_since": self.best_since}

    def load_state_dict(self, state):
        self.rows, self.best_since = state["rows"], state.get("best_since", 0)
