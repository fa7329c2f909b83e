"""The run's figures: kept for the checkpoint, and written as history.csv, epoch_loss.png and TensorBoard scalars."""
from pathlib import Path

from utils.charts import line_chart
from utils.checkpoint import save_image, save_text


class NoWriter:
    """Stands for TensorBoard's SummaryWriter where tensorboard is not installed."""

    def add_scalar(self, *args, **kwargs):
        pass

    def close(self):
        pass


class LossHistory:
    """One dictionary of figures an epoch; the best epoch is the first with the highest validation top-1."""

    def __init__(self, log_dir, model=None, input_shape=None):
        self.log_dir, self.rows = log_dir, []
        try:
            from torch.utils.tensorboard import SummaryWriter
            self.writer = SummaryWriter(log_dir)
        except ImportError:
            self.writer = NoWriter()

    def append_loss(self, figures):
        """Add an epoch's figures and write the files; True when its validation top-1 is the best so far."""
        best = not self.rows or figures["top1"] > self.best()["top1"]
        self.rows.append(figures)
        for name in ("lr", "train_loss", "val_loss", "train_top1", "top1", "top5"):
            self.writer.add_scalar(name, figures[name], figures["epoch"])
        text = [",".join(self.rows[0])] + [",".join(f"{v:.8g}" if isinstance(v, float) else str(v) for v in row.values())
                                           for row in self.rows]
        save_text(Path(self.log_dir, "history.csv"), "\n".join(text) + "\n")
        self.loss_plot()
        return best

    def best(self):
        return max(self.rows, key=lambda row: row["top1"])

    def since_best(self):
        """Epochs since the best one."""
        return self.rows[-1]["epoch"] - self.best()["epoch"] if self.rows else 0

    def loss_plot(self):
        def curve(name):
            return [(row["epoch"], row[name]) for row in self.rows]
        save_image(Path(self.log_dir, "epoch_loss.png"), line_chart([
            ("loss", {"training": curve("train_loss"), "validation": curve("val_loss")}, None),
            ("top-1", {"training": curve("train_top1"), "validation": curve("top1")}, (0, 1))]))

    def state_dict(self):
        return {"rows": self.rows}

    def load_state_dict(self, state):
        self.rows = state["rows"]
