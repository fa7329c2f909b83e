"""A finished run, loaded once: the part that evaluate, predict and export share."""
import os
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from nets import get_model, lay_out
from nets._weights import check_numbers, load_weights
from utils.dataloader import detection_collate
from utils.errors import UserError
from utils.fit import score_batch
from utils.run import read_config
from utils.processes import ignore_signals


def cores():
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class TrainedRun:
    """A trained run: model (in evaluation mode, on the GPU where the run used one), settings, class_names, Cuda, fp16."""

    def __init__(self, run, weights=None):
        """run: its folder; weights: a file other than its best. UserError: no run, or weights that do not fit."""
        config = read_config(run)
        self.folder, self.settings, self.class_names = run, config["settings"], config["class_names"]
        s = self.settings
        self.Cuda = s["Cuda"] and torch.cuda.is_available()
        fp16 = self.Cuda if s["fp16"] == "auto" else s["fp16"]  # 'auto' where training has not decided yet
        self.fp16 = fp16 and self.Cuda == s["Cuda"]  # float16's stand-in on a CPU would give other figures
        self.model = get_model(s["backbone"], len(self.class_names), s["input_shape"])
        self.load(weights or Path(run, "best_epoch_weights.pth"), "--weights" if weights else "the run's best weights")
        self.model = lay_out(self.model.eval(), "cuda" if self.Cuda else "cpu", s["channels_last"])

    def load(self, path, name):
        """Give the model the weights of a file, which messages call `name`."""
        try:
            state = load_weights(path, name)
            check_numbers(self.model.state_dict(), state, f"{name}: {path}")
            self.model.load_state_dict(state)
        except (RuntimeError, AttributeError, TypeError) as error:  # keys that are no text are an AttributeError
            reason = str(error).split("\n\t")[min(1, str(error).count("\n\t"))].strip()[:200]
            raise UserError(f"{name}: {path} holds the weights of another network than {self.settings['backbone']} with "
                            f"{len(self.class_names)} classes at {self.settings['input_shape']} ({reason})") from error
        if not all(tensor.isfinite().all() for tensor in self.model.state_dict().values()):
            raise UserError(f"{name}: {path} holds weights that are not finite, so there is nothing to predict with")

    def scores(self, images):
        """uint8 (N, 3, H, W) pictures of the run's size → float32 (N, classes) on the model's device."""
        return score_batch(self.model, images, images.new_empty(0), self.Cuda, self.fp16, self.settings)[0]

    def scored(self, data, batch_size, num_workers=None, sampler=None):
        """Yield each batch's (scores, int64 (N,) targets, [(index, reason)] unreadable); data as a DataGenerator.

        Scores and targets are on the model's device; both are None where none of the batch's pictures can be read.
        """
        num_workers = cores() if num_workers is None else num_workers
        loader = DataLoader(data, batch_size, sampler=sampler, num_workers=num_workers, pin_memory=self.Cuda,
                            collate_fn=detection_collate, worker_init_fn=ignore_signals)
        for images, targets, unreadable in loader:
            scored = score_batch(self.model, images, targets, self.Cuda, self.fp16, self.settings) if len(targets) else (None, None)
            yield *scored, unreadable
