"""Name what is in pictures, with a trained run: python -m utils.predict RUN PICTURE…

From Python, in any folder, with the project's folder on sys.path:

    from utils.predict import Classifier
    classify = Classifier("/path/to/project/logs/…")
    classify("picture.jpg")             # [(class name, probability), …], the best five first
    classify.features("picture.jpg")    # the vector that the network's head sees
"""

from utils.plumbing.start import start_program

if __name__ == "__main__":
    start_program()


import json
import os
import sys
from threading import get_ident

import torch

from nets import head_names
from utils import task
from utils.dataloader import DataGenerator, detection_collate
from utils.fit import score_batch
from utils.plumbing.errors import UserError, printable
from utils.plumbing.folders import pictures_below
from utils.plumbing.processes import cores
from utils.trained import TrainedRun, add_mirrored, command


class Pictures(DataGenerator):
    """Pictures without labels: the target of each is its index."""

    def target(self, index, label):
        return index


class Classifier(TrainedRun):
    """Classifier(run)(picture) → [(class name, probability), …], the best five first.

    It may be called from several threads.
    """

    def __call__(self, picture):
        """Classify a picture: a path, a file's bytes or a Pillow image.

        ValueError: it cannot be read, with the reason.
        """
        [(_, prediction)] = predictions(self, [picture])
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

        head = self.network.get_submodule(head_names(self.network)[0])
        hook = head.register_forward_pre_hook(keep)
        try:
            images = read_picture(self, picture)
            settings = self.settings
            score_batch(self.network, images, torch.zeros(1), self.Cuda, self.fp16, settings)
        finally:
            hook.remove()
        vector = inputs[get_ident()][0].float().cpu()
        return vector if vector.dim() == 1 else vector.flatten(1).mean(1)


def read_picture(run, picture):
    """Return a picture as the run's network takes it, uint8 (1, 3, H, W). ValueError: why not."""
    data = run.dataset([(picture, "")], Pictures)
    images, _, unreadable = detection_collate([data[0]])
    for _, reason in unreadable:
        raise ValueError(f"unreadable picture ({reason})")
    return images


def predictions(run, pictures, batch_size=32):
    """Yield (picture, prediction) in order; a prediction is one of task.top_predictions.

    It is a sentence where there is none, as the picture cannot be read.
    """
    data = run.dataset([(picture, "") for picture in pictures], Pictures)
    num_workers = min(cores(), len(pictures) // batch_size)
    for logits, indices, unreadable in run.score(data, batch_size, num_workers):
        batch = {}
        for index, reason in unreadable:
            batch[index] = f"unreadable picture ({reason})"
        if logits is not None:
            batch.update(zip(indices.tolist(), task.top_predictions(logits, run.class_names)))
        for index in sorted(batch):
            yield pictures[index], batch[index]


def find_pictures(words):
    """Yield the paths that words name: files, folders, and '-' for a list on standard input."""
    for word in words:
        paths = [word]
        if word == "-":
            lines = sys.stdin.buffer.read().splitlines()
            paths = [os.fsdecode(line) for line in lines if line]
        for path in paths:
            inside = pictures_below(path) if os.path.isdir(path) else []
            yield from inside or [path]


def print_prediction(path, prediction, as_json):
    """Print a prediction, or on standard error why there is none (in JSON: as 'error')."""
    unreadable = isinstance(prediction, str)
    if as_json:
        found = {"error": prediction} if unreadable else task.prediction_json(prediction)
        print(json.dumps({"picture": path, **found}), flush=True)
    elif unreadable:
        print(printable(f"{path}: {prediction}"), file=sys.stderr, flush=True)
    else:
        texts = [task.prediction_text(name, value) for name, value in prediction]
        print(printable(f"{path}: {', '.join(texts)}"), flush=True)


def main(arguments=None):
    parser = command("predict", __doc__)
    add_mirrored(parser)
    parser.add_argument("pictures", nargs="+", help="files, folders, or - for a list on stdin")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args(arguments)
    run = Classifier(options.run, options.weights, options.mirrored)
    paths = list(find_pictures(options.pictures))
    if not paths:
        raise UserError("standard input names no picture")
    failed = False
    for path, prediction in predictions(run, paths):
        failed = failed or isinstance(prediction, str)
        print_prediction(path, prediction, options.json)
    raise SystemExit(int(failed))


if __name__ == "__main__":
    main()
