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
from utils.pictures import MEAN, STD
from utils.processes import cores, ignore_signals
from utils.run import read_config
from utils.settings import check_value


class TrainedRun:
    """A trained run: model (in evaluation mode, on the GPU where the run used one), settings, class_names, Cuda, fp16."""

    def __init__(self, run, weights=None):
        """run: its folder, or its name in logs/; weights: a file other than its best. UserError: no run, or weights that do not fit."""
        self.folder = run if os.path.exists(run) or not Path("logs", run).exists() else Path("logs", run)
        config = read_config(self.folder)
        self.settings, self.class_names = config["settings"], config["class_names"]
        Cuda, fp16, channels_last, *_ = (self.setting(name, default) for name, default in (
            ("Cuda", False), ("fp16", False), ("channels_last", True), ("mean", MEAN), ("std", STD)))
        self.Cuda = Cuda and torch.cuda.is_available()
        # 'auto' where training has not decided yet; float16's stand-in on a CPU would give other figures
        self.fp16 = (self.Cuda if fp16 == "auto" else fp16) and self.Cuda == Cuda
        self.input_shape, self.val_crop = self.setting("input_shape"), self.setting("val_crop", 1.0)
        self.model = get_model(self.setting("backbone"), len(self.class_names), self.input_shape)
        self.load(weights or Path(self.folder, "best_epoch_weights.pth"), "--weights" if weights else "the run's best weights")
        self.model = lay_out(self.model.eval(), "cuda" if self.Cuda else "cpu", channels_last)

    def setting(self, name, default=None):
        """A setting, or `default` where the run is of before the setting. UserError for a value that it cannot have."""
        value = self.settings.get(name, default)
        try:
            check_value(name, value, default)
        except UserError as error:
            raise UserError(f"{Path(self.folder, 'config.json')}: {error}") from None
        return value

    def load(self, path, name):
        """Give the model the weights of a file, which messages call `name`."""
        try:
            state = load_weights(path, name)
            check_numbers(self.model.state_dict(), state, f"{name}: {path}")
            self.model.load_state_dict(state)
        except (RuntimeError, AttributeError, TypeError) as error:  # keys that are no text are an AttributeError
            reason = str(error).split("\n\t")[min(1, str(error).count("\n\t"))].strip()[:200]
            raise UserError(f"{name}: {path} holds the weights of another network than {self.settings['backbone']} with "
                            f"{len(self.class_names)} classes at {self.input_shape} ({reason})") from error

    def scores(self, images):
        """uint8 (N, 3, H, W) pictures of the run's size → float32 (N, classes) on the model's device."""
        return score_batch(self.model, images, images.new_empty(0), self.Cuda, self.fp16, self.settings)[0]

    def scored(self, data, batch_size, num_workers=None, sampler=None):
        """Yield each batch's (scores, (N, …) targets, [(index, reason)] unreadable); data as a DataGenerator.

        Scores and targets are on the model's device; both are None where none of the batch's pictures can be read.
        """
        num_workers = cores() if num_workers is None else num_workers
        for images, targets, unreadable in DataLoader(data, batch_size, sampler=sampler, num_workers=num_workers, pin_memory=self.Cuda,
                                                      collate_fn=detection_collate, worker_init_fn=ignore_signals):
            readable = len(images) > 0
            yield *(score_batch(self.model, images, targets, self.Cuda, self.fp16, self.settings) if readable else (None, None)), unreadable
