"""Name what is on pictures with a trained run: python -m utils.predict RUN PICTURE…

From Python: from utils.predict import Classifier; classify = Classifier("logs/…"); classify("picture.jpg")
"""
import json
import os
import signal
import sys
from itertools import chain
from pathlib import Path

from PIL import ImageDraw

from utils import recipe
from utils.charts import drawable, font
from utils.dataloader import DataGenerator
from utils.errors import UserError, plain
from utils.files import save_image, writable
from utils.folders import pictures_below
from utils.formats import opened, orientation, upright
from utils.processes import cores
from utils.trained import TrainedRun, command


class Pictures(DataGenerator):
    """Pictures, cropped as in validation; as nobody knows their targets, each has its number for one, whatever a label is."""

    def __init__(self, run, pictures):
        super().__init__([(picture, number) for number, picture in enumerate(pictures)], run.settings["input_shape"],
                         random=False, val_crop=run.settings["val_crop"])

    def target(self, index, label):
        return label


class Classifier(TrainedRun):
    """Classifier(run)(picture) → [(class name, probability)], the best five first; safe to call from several threads."""

    def __call__(self, picture):
        """picture: a path, a file's bytes or a Pillow image. Raises what Pillow raises for an unreadable one."""
        if isinstance(picture, (str, os.PathLike)) and not os.path.exists(picture):
            raise FileNotFoundError(f"the picture {os.fspath(picture)!r} does not exist")
        image, _ = Pictures(self, [picture]).read(0)
        best, = recipe.answers(self.scores(image.permute(2, 0, 1)[None]), self.class_names)
        if isinstance(best, str):
            raise ValueError(best)
        return best


def predictions(run, paths, size=32):
    """Yield (path, recipe.answers' answer, or a text that says why there is none) in order, from `size` at a time."""
    for scores, numbers, unreadable in run.scored(Pictures(run, paths), size, min(cores(), len(paths) // size)):
        found = {number: "does not exist" if not os.path.exists(paths[number]) else "a folder without a picture"
                 if os.path.isdir(paths[number]) else f"unreadable picture ({why})" for number, why in unreadable}
        if scores is not None:
            found.update(zip(numbers.tolist(), recipe.answers(scores, run.class_names)))
        yield from ((paths[number], found[number]) for number in sorted(found))


def listed(words):
    """The picture paths that files, folders and '-' (a list of both on standard input) name; a folder without any is its own."""
    for word in words:
        lines = sys.stdin.buffer if word == "-" and sys.stdin else []  # None where it is closed
        for path in (os.fsdecode(line).rstrip("\r\n") for line in lines if line.strip()) if word == "-" else [word]:
            yield from (os.path.isdir(path) and pictures_below(path)) or [path]


def show(path, found, as_json, utf8):
    """Print one answer; JSON is escaped where it holds what no terminal should get, or this one cannot show."""
    unreadable = isinstance(found, str)
    if unreadable:
        print(f"{plain(path)}: {plain(found)}", file=sys.stderr)
    if as_json:
        best = {"error": found} if unreadable else recipe.as_json(found)
        text = json.dumps({"picture": path, **best}, ensure_ascii=not utf8)
        print(text if text.isprintable() else json.dumps({"picture": path, **best}), flush=True)
    elif not unreadable:
        print(f"{plain(path)}: " + ", ".join(recipe.answer_text(plain(name), p) for name, p in found), flush=True)


def save_labelled(path, label, target):
    """A copy of the picture, its longer side at most 1,024 pixels, with the label on it."""
    with opened(path) as image:
        image = upright(image, orientation(image))
    image.thumbnail((1024, 1024))
    draw, letters = ImageDraw.Draw(image), font(max(14, image.height // 20), label)
    draw.rectangle(draw.textbbox((4, 4), label, letters), "white")
    draw.text((4, 4), label, "black", letters)
    save_image(target, image)


def copies_folder(run):
    """RUN/predictions. A run may be somebody else's: a link there must not lead the copies out of it."""
    folder = Path(run.folder, "predictions")
    if folder.is_symlink():
        raise UserError(f"{folder} is a link, which copies do not follow: remove it")
    return writable(folder, "--save needs it")


def main(arguments=None):
    parser = command("predict", __doc__)
    parser.add_argument("pictures", nargs="+", help="files, folders, or - for a list on standard input")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--save", action="store_true", help="draw the label on a copy in RUN/predictions")
    options = parser.parse_args(arguments)
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end quietly when `| head` has seen enough
    utf8 = str(sys.stdout.encoding).lower() in ("utf-8", "utf8")
    if utf8 and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="surrogateescape")  # a name that is no text leaves as it came
    run, paths = Classifier(options.run, options.weights), listed(options.pictures)
    copies, failed, number = options.save and copies_folder(run), False, -1
    drawn = dict(zip(run.class_names, drawable(list(map(plain, run.class_names))))) if copies else {}
    # one by one from standard input, where another program may wait for each answer
    parts = ([path] for path in paths) if "-" in options.pictures else [list(paths)]
    for number, (path, found) in enumerate(chain.from_iterable(predictions(run, part) for part in parts)):
        show(path, found, options.json, utf8)
        failed |= isinstance(found, str)
        if copies and not isinstance(found, str):
            stem = os.fsencode(Path(path).stem)[:200].decode("utf-8", "ignore")  # most file systems hold 255 bytes
            label = "".join(recipe.answer_text(drawn.get(name, name), p) for name, p in found[:1])
            try:
                save_labelled(path, label, copies / f"{number:05d}_{stem}.png")
            except (OSError, ValueError) as error:  # UserError is one, from the OSError that it tells of
                failed = True
                print(f"no labelled copy of {plain(path)} ({plain(error.__cause__ or error)})", file=sys.stderr)
    if copies:
        print(f"labelled copies are in {plain(copies)}", file=sys.stderr)
    raise SystemExit("error: standard input names no picture" if number < 0 else int(failed))


if __name__ == "__main__":
    main()
