"""A finished run, loaded once: the part that evaluate, predict and export share."""
import os
import signal
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from nets import get_model, lay_out
from nets._weights import check_numbers, load_weights
from utils.dataloader import detection_collate
from utils.errors import UserError
from utils.fit import score_batch
from utils.pictures import MEAN, STD
from utils.processes import cores, end, ignore_signals, one_sentence_errors
from utils.run import read_config
from utils.settings import check_value

# What commands read of train.py's settings: what a run has that is older than the setting, None where every run has one
USED = {"backbone": None, "input_shape": None, "val_crop": 1.0, "mean": MEAN, "std": STD, "Cuda": False, "fp16": False,
        "Unfreeze_batch_size": 32,
        "classes_path": "model_data/cls_classes.txt", "test_annotation_path": "model_data/cls_test.txt"}


class TrainedRun:
    """A trained run: model (in evaluation mode, on the GPU where the run used one), settings, class_names, Cuda, fp16."""

    def __init__(self, run, weights=None):
        """run: its folder, or its name in logs/; weights: a file other than its best. UserError: no run, or weights that do not fit."""
        self.folder = run if os.path.exists(run) or not Path("logs", run).exists() else Path("logs", run)
        config = read_config(self.folder)
        self.settings, self.class_names = {**USED, **config["settings"]}, config["class_names"]
        try:
            for name, default in USED.items():
                check_value(name, self.settings[name], default)
        except UserError as error:
            raise UserError(f"{Path(self.folder, 'config.json')}: {error}") from None
        Cuda, fp16 = self.settings["Cuda"], self.settings["fp16"]
        self.Cuda = Cuda and torch.cuda.is_available()
        # 'auto' where training has not decided yet; float16's stand-in on a CPU would give other figures
        self.fp16 = (self.Cuda if fp16 == "auto" else fp16) and self.Cuda == Cuda
        self.model = get_model(self.settings["backbone"], len(self.class_names), self.settings["input_shape"])
        self.load(weights or Path(self.folder, "best_epoch_weights.pth"), "--weights" if weights else "the run's best weights")
        self.model = lay_out(self.model.eval(), "cuda" if self.Cuda else "cpu")

    def load(self, path, name):
        """Give the model the weights of a file, which messages call `name`."""
        try:
            state = load_weights(path, name)
            check_numbers(self.model.state_dict(), state, f"{name}: {path}")
            self.model.load_state_dict(state)
        except (RuntimeError, AttributeError) as error:  # what is no tensor has no shape
            reason = str(error).split("\n\t")[:2][-1].strip()[:200]
            raise UserError(f"{name}: {path} holds the weights of another network than {self.settings['backbone']} with "
                            f"{len(self.class_names)} classes at {self.settings['input_shape']} ({reason})") from error

    def scores(self, images):
        """uint8 (N, 3, H, W) pictures of the run's size → float32 (N, classes) on the model's device."""
        return score_batch(self.model, images, images.new_empty(0), self.Cuda, self.fp16, self.settings)[0]

    def scored(self, data, batch_size, num_workers=None):
        """Yield each batch's (scores, (N, …) targets, [(index, reason)] unreadable) of a DataGenerator.

        Scores and targets are on the model's device; scores are None where none of the batch's pictures can be read.
        """
        loader = DataLoader(data, batch_size, num_workers=cores() if num_workers is None else num_workers, pin_memory=self.Cuda,
                            collate_fn=detection_collate, worker_init_fn=ignore_signals)
        for images, targets, unreadable in loader:
            scores = self.scores(images) if len(images) else None
            yield scores, targets.to("cuda" if self.Cuda else "cpu", non_blocking=True), unreadable


def command(name, document):
    """The parser of utils.<name>, a command on a run; every error from here on is one sentence, and Ctrl-C ends it at once."""
    one_sentence_errors()
    signal.signal(signal.SIGINT, lambda *_: end(130))  # raised while workers are being started, it would be lost
    parser = ArgumentParser(f"python -m utils.{name}", description=document, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run's folder, logs/…, or its name there")
    parser.add_argument("--weights", help="weights file (the run's best_epoch_weights.pth)")
    return parser
