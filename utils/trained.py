"""A finished run, loaded once: what evaluate, predict, explain and export share."""

import math
import multiprocessing
import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from codecs import BOM_UTF8
from collections import OrderedDict
from pathlib import Path
from threading import get_ident

import torch
from torch.utils.data import DataLoader

from nets import build, head_names, to_device
from nets._weights import check_numbers, load_weights, read_run
from utils import task
from utils.dataloader import SEEING, DataGenerator, detection_collate
from utils.fit import score_batch
from utils.plumbing.console import prepare_program
from utils.plumbing.errors import UserError, short_repr
from utils.plumbing.folders import NOT_FOR_LISTS, say_left_out, walk
from utils.plumbing.lists import DEFAULT_PATHS, PATH_SETTINGS, PROJECT
from utils.plumbing.processes import (
    computes_bfloat16,
    cores,
    free_shared_memory,
    iterate,
    prepare_worker,
)
from utils.plumbing.run import find_folder, read_config
from utils.plumbing.settings import check_value
from utils.recipe import precision_name

# The settings that commands read, with a value for runs that lack one
USED = {
    "backbone": None,
    "input_shape": None,
    **SEEING,
    "augmentation": "flip",
    "Cuda": False,
    "fp16": False,
    "Unfreeze_batch_size": 32,
    **dict(zip(PATH_SETTINGS, DEFAULT_PATHS)),
}


class Classifier:
    """Classifier(run)(picture) → [(class name, probability), …], the five best in order.

    It may be called from several threads, but not in a process that was forked after it was made
    (gunicorn --preload): OpenMP would wait for threads that are not there. It has the run's folder,
    settings, class_names, and its network in evaluation mode; model is what gives the logits: the
    network itself, or Mirrored. Both are on the GPU where the run used one and there is one. fp16
    is the name of the precision.
    """

    def __init__(self, run, weights=None, mirrored=False):
        """Load a run: its folder, or its name in logs/.

        weights: a file other than the run's best. UserError: no run, or weights of another network.
        """
        # here or in the project's folder
        self.folder = find_folder(run, ("", "logs", PROJECT, PROJECT / "logs"))
        config = read_config(self.folder)
        self.class_names = config["class_names"]
        self.test_list = config.get("test_list")  # the fingerprint of training's; None: unknown
        self.settings = {**USED, **config["settings"]}
        for name in USED:
            check_value(name, self.settings[name])
        trained_on_gpu = self.settings["Cuda"]
        self.Cuda = trained_on_gpu and torch.cuda.is_available()
        precision = precision_name(self.Cuda, self.settings["fp16"])
        # one GPU scores, also where DataParallel would train on several
        one_gpu = {"Cuda": self.Cuda, "distributed": True}
        emulated = precision == "bfloat16" and not computes_bfloat16(one_gpu)
        self.fp16 = "float32"  # a GPU's precision on a CPU would give other scores
        if self.Cuda == trained_on_gpu and precision != "auto" and not emulated:
            self.fp16 = precision
        self.network = build(self.settings, len(self.class_names)).eval()
        self.load(weights or Path(self.folder, "best_epoch_weights.pth"))
        self.network = to_device(self.network, "cuda" if self.Cuda else "cpu")
        self.model = self.network
        if mirrored:
            upside_down = self.settings["augmentation"] == "flips"
            self.model = Mirrored(self.network, upside_down).eval()

    def load(self, path):
        """Load weights for the whole network from a file."""
        classes, _ = read_run(path)
        if classes not in (None, self.class_names):
            raise UserError(
                f"weights: {path} is of a run with other classes, {short_repr(classes)}"
            )
        try:
            state = load_weights(path, "weights")
            own = self.network.state_dict()
            check_numbers(own, state, f"weights: {path}")
            counters = {name: own[name] for name in own if name.endswith("num_batches_tracked")}
            marked = OrderedDict({**counters, **state})  # older files have no counters
            marked._metadata = own._metadata  # MNASNet loads nothing without its version's mark
            self.network.load_state_dict(marked)
        except RuntimeError as error:
            backbone, input_shape = self.settings["backbone"], self.settings["input_shape"]
            raise UserError(
                f"weights: {path} holds the weights of another network than {backbone} with "
                f"{len(self.class_names)} classes at {input_shape}, or has other names for them "
                f"(such as 'module.…', or those of an older revision)"
            ) from error

    def __call__(self, picture):
        """Classify a picture: a path, a file's bytes or a Pillow image.

        ValueError: it cannot be read, with the reason.
        """
        [(_, prediction)] = self.predictions([picture])
        if isinstance(prediction, str):
            raise ValueError(prediction)
        return prediction

    def features(self, picture):
        """Return the input of the network's head for a picture: float32 (D,), on the CPU.

        Where the head takes a map, as a convolution does, it is the mean over the places.
        """
        inputs = {}  # by thread

        def keep(module, given):
            inputs[get_ident()] = given[0]

        images, targets = self.read(picture)
        head = self.network.get_submodule(head_names(self.network)[0])
        with head.register_forward_pre_hook(keep):
            score_batch(self.network, images, targets, self.Cuda, self.fp16, self.settings)
        vector = inputs[get_ident()][0].float().cpu()
        return vector if vector.dim() == 1 else vector.flatten(1).mean(1)

    def read(self, picture):
        """Return a batch of one picture: uint8 (1, 3, H, W), (1,) targets. ValueError: why not."""
        data = self.pictures([picture])
        images, targets, unreadable = detection_collate([data[0]])
        for _, reason in unreadable:
            raise ValueError(f"unreadable picture ({reason})")
        return images, targets

    def predictions(self, pictures, batch_size=32):
        """Yield (picture, prediction) in order; a prediction is one of task.top_predictions.

        It is a sentence where there is none, as the picture cannot be read.
        """
        data = self.pictures(pictures)
        for logits, indices, unreadable in self.score(data, batch_size):
            batch = {index: f"unreadable picture ({reason})" for index, reason in unreadable}
            if logits is not None:
                batch.update(zip(indices.tolist(), task.top_predictions(logits, self.class_names)))
            for index in sorted(batch):
                yield pictures[index], batch[index]

    def pictures(self, pictures):
        """Return pictures without labels as a data set, as the network sees them."""
        return self.dataset([(picture, "") for picture in pictures], Pictures)

    def dataset(self, source, kind=DataGenerator):
        """Return pictures as the network sees them; source: what a DataGenerator takes."""
        number = len(self.class_names)
        return kind(source, self.settings["input_shape"], False, number, self.settings)

    def score(self, data, batch_size, num_workers=None):
        """Yield each batch's (logits, (N, …) targets, [(index, reason)] of unreadable pictures).

        Logits and targets are on the model's device; the logits are None where none of the batch's
        pictures can be read.
        """
        if multiprocessing.current_process().daemon:  # as Celery's: it may have no children
            num_workers = 0
        if num_workers is None:  # each holds two batches in shared memory
            worker_bytes = 2 * batch_size * 3 * math.prod(data.input_shape)
            room = free_shared_memory() / (2 * worker_bytes)
            num_workers = int(min(cores(), 32, room, len(data) // batch_size))
        loader = DataLoader(
            data,
            batch_size,
            num_workers=num_workers,
            pin_memory=self.Cuda,
            collate_fn=detection_collate,
            worker_init_fn=prepare_worker,
        )
        for images, targets, unreadable in iterate(loader):
            logits = None
            if len(images):
                logits, targets = score_batch(
                    self.model, images, targets, self.Cuda, self.fp16, self.settings
                )
            yield logits, targets, unreadable


class Mirrored(torch.nn.Module):
    """A network that takes the mean of its logits for a picture and for its mirror images.

    upside_down: also for the mirror images of the picture upside down, as 'flips' trains with.
    """

    def __init__(self, network, upside_down=False):
        super().__init__()
        self.network = network
        self.upside_down = upside_down

    def forward(self, pictures):
        views = [pictures, pictures.flip(3)]
        if self.upside_down:
            views += [view.flip(2) for view in views]
        # float32 before the mean, which bfloat16 would round once more
        return torch.stack([task.logits_from(self.network(view)) for view in views]).mean(0)


class Pictures(DataGenerator):
    """Pictures without labels: the target of each is its index."""

    def target(self, index, label):
        return index


def find_pictures(words):
    """Return the paths that words name: files, folders, and '-' for a list on standard input.

    UserError: there are none.
    """
    paths = []
    for word in words:
        if word == "-":
            lines = sys.stdin.buffer.read().removeprefix(BOM_UTF8).splitlines()
            paths += [decode_path(line) for line in lines if line]
        else:
            paths.append(word)
    if not paths:
        raise UserError("standard input names no picture")
    pictures = []
    for path in paths:
        inside, left_out = walk(path) if os.path.isdir(path) else ([], {})
        found = [picture.path for picture in inside] + left_out.pop(NOT_FOR_LISTS, [])
        pictures += sorted(found) or [path]
        say_left_out(left_out, file=sys.stderr)
    return pictures


def decode_path(line):
    """Return a path that stands on standard input, as bytes."""
    try:
        return os.fsdecode(line)
    except UnicodeDecodeError:  # on Windows alone, whose console writes another encoding
        return line.decode("oem", "replace")


def describe_prediction(prediction):
    """Return one of task.top_predictions as it is printed."""
    return ", ".join(task.prediction_text(name, value) for name, value in prediction)


def begin_command(name, document):
    """Begin the program utils.<name>, a command on a run, and return its parser."""
    prepare_program()
    parser = ArgumentParser(
        f"python -m utils.{name}", description=document, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="a run's folder, logs/…, or its name there")
    parser.add_argument("--weights", help="weights file (the run's best_epoch_weights.pth)")
    parser.add_argument(
        "--mirrored", action="store_true", help="score pictures together with their mirror images"
    )
    return parser


def add_pictures(parser):
    """Add the argument of commands that take pictures."""
    parser.add_argument("pictures", nargs="+", help="files, folders, or - for a list on stdin")
