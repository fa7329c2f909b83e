"""Name what is on pictures with a trained run: python -m utils.predict RUN PICTURE…

From Python: from utils.predict import Classifier; classify = Classifier("logs/…"); classify("picture.jpg")
"""

from utils.plumbing.start import start_program

if __name__ == "__main__":
    start_program()


import json
import os
import re
import sys

from utils import task
from utils.dataloader import DataGenerator
from utils.plumbing.errors import UserError, printable
from utils.plumbing.folders import pictures_below
from utils.plumbing.processes import cores
from utils.trained import TrainedRun, command


class Pictures(DataGenerator):
    """Pictures of which nobody knows the target: each has its number for one, whatever a label is."""

    def target(self, index, label):
        return index


class Classifier(TrainedRun):
    """Classifier(run)(picture) → [(class name, probability)], the best five first; safe to call from several threads."""

    def __call__(self, picture):
        """picture: a path, a file's bytes or a Pillow image. ValueError, which says why, where it cannot be read."""
        ((_, best),) = predictions(self, [picture])
        if isinstance(best, str):
            raise ValueError(best)
        return best


def predictions(run, pictures, size=32):
    """Yield (picture, recipe.answers' answer, or a text that says why there is none) in order, from `size` at a time."""
    source, s = [(picture, "") for picture in pictures], run.settings
    data = Pictures(
        source, s["input_shape"], random=False, val_crop=s["val_crop"], resize=s["resize"]
    )
    for scores, numbers, unreadable in run.scored(data, size, min(cores(), len(pictures) // size)):
        found = {number: f"unreadable picture ({why})" for number, why in unreadable}
        if scores is not None:
            found.update(zip(numbers.tolist(), task.top_predictions(scores, run.class_names)))
        yield from ((pictures[number], found[number]) for number in sorted(found))


def listed(words):
    """The paths of the pictures that files, folders and '-' (a list of both on standard input) name."""
    for word in words:
        given = (
            os.fsdecode(sys.stdin.buffer.read()) if word == "-" and sys.stdin else ""
        )  # None where it is closed
        for path in filter(None, re.split("\r?\n", given)) if word == "-" else [word]:
            yield from os.path.isdir(path) and pictures_below(path) or [path]


def main(arguments=None):
    parser = command("predict", __doc__)
    parser.add_argument(
        "pictures", nargs="+", help="files, folders, or - for a list on standard input"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args(arguments)
    run, paths, failed = (
        Classifier(options.run, options.weights),
        list(listed(options.pictures)),
        False,
    )
    if not paths:
        raise UserError("standard input names no picture")
    for path, found in predictions(run, paths):
        unreadable = isinstance(found, str)
        failed |= unreadable
        if options.json:
            print(
                json.dumps(
                    {
                        "picture": path,
                        **({"error": found} if unreadable else task.prediction_json(found)),
                    }
                ),
                flush=True,
            )
        else:
            text = (
                found
                if unreadable
                else ", ".join(task.prediction_text(name, p) for name, p in found)
            )
            print(
                f"{printable(path)}: {printable(text)}",
                file=sys.stderr if unreadable else sys.stdout,
                flush=True,
            )
    raise SystemExit(int(failed))


if __name__ == "__main__":
    main()
