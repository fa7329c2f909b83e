"""A finished run, loaded once: the part that evaluate, predict and export share."""

import os
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from nets import build, lay_out
from nets._weights import check_numbers, load_weights
from utils.dataloader import detection_collate
from utils.fit import precision_name, score_batch
from utils.pictures import MEAN, STD
from utils.plumbing.console import show_errors_as_sentences
from utils.plumbing.errors import UserError
from utils.plumbing.lists import DEFAULT_PATHS, PATH_SETTINGS
from utils.plumbing.processes import cores, ignore_signals
from utils.plumbing.run import read_config
from utils.plumbing.settings import check_value

# What commands read of train.py's settings, with a value where a run may lack it
USED = {
    "backbone": None,
    "input_shape": None,
    "resize": "crop",
    "val_crop": 1.0,
    "mean": MEAN,
    "std": STD,
    "Cuda": False,
    "fp16": False,
    "Unfreeze_batch_size": 32,
    **dict(zip(PATH_SETTINGS, DEFAULT_PATHS)),
}


class TrainedRun:
    """A trained run: model (in evaluation mode, on the GPU where the run used one), settings, class_names, Cuda, fp16."""

    def __init__(self, run, weights=None):
        """run: its folder, or its name in logs/; weights: a file other than its best. UserError: no run, other weights."""
        self.folder = (
            run if os.path.exists(run) or not Path("logs", run).exists() else Path("logs", run)
        )
        config = read_config(self.folder)
        self.settings, self.class_names = {**USED, **config["settings"]}, config["class_names"]
        for name in USED:
            check_value(name, self.settings[name])
        backbone, input_shape, Cuda, fp16 = (
            self.settings[name] for name in ("backbone", "input_shape", "Cuda", "fp16")
        )
        self.Cuda = Cuda and torch.cuda.is_available()
        # a GPU's type computed on a CPU, or the other way round, would give other figures
        same_device = self.Cuda == Cuda and fp16 != "auto"
        self.fp16 = precision_name(fp16, Cuda) if same_device else "float32"
        self.model = build(self.settings, len(self.class_names))
        path = weights or Path(self.folder, "best_epoch_weights.pth")
        try:
            state = load_weights(path, "--weights")
            check_numbers(self.model.state_dict(), state, f"--weights: {path}")
            self.model.load_state_dict(state)
        except RuntimeError as error:
            raise UserError(
                f"--weights: {path} holds the weights of another network than {backbone} with "
                f"{len(self.class_names)} classes at {input_shape}"
            ) from error
        self.model = lay_out(self.model.eval(), "cuda" if self.Cuda else "cpu")

    def scored(self, data, batch_size, num_workers=None):
        """Yield each batch's (scores, (N, …) targets, [(index, reason)] unreadable) of a DataGenerator.

        Scores and targets are on the model's device; scores are None where none of the batch's pictures can be read.
        """
        loader = DataLoader(
            data,
            batch_size,
            num_workers=cores() if num_workers is None else num_workers,
            pin_memory=self.Cuda,
            collate_fn=detection_collate,
            worker_init_fn=ignore_signals,
        )
        for images, targets, unreadable in loader:
            read = (
                score_batch(self.model, images, targets, self.Cuda, self.fp16, self.settings)
                if len(images)
                else (None, targets)
            )
            yield *read, unreadable


def command(name, document):
    """The parser of utils.<name>, a command on a run; every error from here on is one sentence, Ctrl-C ends at once."""
    show_errors_as_sentences()
    torch.set_float32_matmul_precision("high")  # as training does
    parser = ArgumentParser(
        f"python -m utils.{name}", description=document, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="a run's folder, logs/…, or its name there")
    parser.add_argument("--weights", help="weights file (the run's best_epoch_weights.pth)")
    return parser
