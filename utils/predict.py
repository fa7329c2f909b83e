"""Name what is on pictures with a trained run: python -m utils.predict RUN PICTURE…

From Python: from utils.predict import Classifier; classify = Classifier("logs/…"); classify("picture.jpg")
"""
import argparse
import json
import os
import signal
import sys
from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageOps

from nets import get_model
from utils.annotation import endings, pictures_below
from utils.charts import font
from utils.checkpoint import load_weights, save_image
from utils.errors import UserError, one_sentence_errors
from utils.fit import autocast
from utils.pictures import centre_box, normalize, read_crop, to_rgb
from utils.run import read_config


class Run:
    """A trained run: model (in evaluation mode, on the GPU where the run used one), settings, class_names."""

    def __init__(self, run, weights=None):
        config = read_config(run)
        self.folder, self.settings, self.class_names = run, config["settings"], config["class_names"]
        s = self.settings
        self.Cuda = s["Cuda"] and torch.cuda.is_available()
        self.fp16 = s["fp16"] and self.Cuda == s["Cuda"]  # float16's stand-in on a CPU would give other figures
        self.model = get_model(s["backbone"], len(self.class_names), s["input_shape"])
        path = weights or Path(run, "best_epoch_weights.pth")
        try:
            self.model.load_state_dict(load_weights(path, "--weights" if weights else "run"))
        except RuntimeError as error:
            raise UserError(f"{path} holds the weights of another network than {s['backbone']} with "
                            f"{len(self.class_names)} classes ({str(error).splitlines()[1].strip()[:200]})") from error
        layout = torch.channels_last if s["channels_last"] else torch.contiguous_format
        self.model = self.model.eval().to("cuda" if self.Cuda else "cpu", memory_format=layout)

    def probabilities(self, images):
        """uint8 (N, 3, H, W) pictures of the run's size → float32 (N, classes)."""
        with torch.no_grad(), autocast(self.Cuda, self.fp16):
            images = normalize(images, next(self.model.parameters()).device, self.settings["channels_last"])
            return self.model(images).float().softmax(1).cpu()


class Classifier(Run):
    """Classifier(run)(picture) → [(class name, probability)], the best five first; safe to call from several threads."""

    def __call__(self, picture):
        """picture: a path, a file's bytes or a Pillow image. Raises what Pillow raises for an unreadable one."""
        return self.best([self.crop(picture)])[0]

    def crop(self, picture):
        """uint8 (3, H, W) of a picture, cropped as in validation."""
        shape = tuple(self.settings["input_shape"])
        return read_crop(picture, shape, partial(centre_box, shape, self.settings["val_crop"])).permute(2, 0, 1)

    def best(self, crops):
        """For each crop [(class name, probability)], the best five first."""
        found = self.probabilities(torch.stack(crops)).topk(min(5, len(self.class_names)))
        return [[(self.class_names[index], value) for value, index in zip(*row)]
                for row in zip(found.values.tolist(), found.indices.tolist())]


def predictions(classify, paths, size):
    """Yield (path, what `classify` returns, or the exception that the picture raised), `size` pictures at a time."""
    paths = iter(paths)
    while chunk := list(islice(paths, size)):
        found = {}
        for path in chunk:
            try:
                found[path] = classify.crop(path)
            except Exception as error:  # Pillow's plugins raise nearly anything for a broken file
                found[path] = error
        readable = [path for path in found if isinstance(found[path], torch.Tensor)]
        if readable:
            found.update(zip(readable, classify.best([found[path] for path in readable])))
        yield from ((path, found[path]) for path in chunk)


def listed(words):
    """The picture paths that files, folders and '-' (a list on standard input) name."""
    for word in words:
        if word == "-":
            yield from (line.rstrip("\r\n") for line in sys.stdin if line.strip())
        elif os.path.isdir(word):
            yield from pictures_below(word, endings(), Counter())
        else:
            yield word


def save_labelled(path, label, target):
    with Image.open(path) as image:
        image = to_rgb(ImageOps.exif_transpose(image))
    image.thumbnail((1024, 1024))
    size = max(14, image.height // 20)
    draw = ImageDraw.Draw(image)
    draw.rectangle(draw.textbbox((4, 4), label, font(size)), "white")
    draw.text((4, 4), label, "black", font(size))
    target.parent.mkdir(exist_ok=True)
    save_image(target, image)


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m utils.predict", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run's folder, logs/…")
    parser.add_argument("pictures", nargs="+", help="files, folders, or - for a list on standard input")
    parser.add_argument("--weights", help="weights file (the run's best_epoch_weights.pth)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--save", action="store_true", help="draw the label on a copy in RUN/predictions")
    options = parser.parse_args(arguments)
    one_sentence_errors()
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end quietly when `| head` has seen enough
    classify, failed = Classifier(options.run, options.weights), 0
    size = 1 if "-" in options.pictures else 32  # another program may wait for each answer
    for number, (path, best) in enumerate(predictions(classify, listed(options.pictures), size)):
        if isinstance(best, Exception):
            failed += 1
            print(f"unreadable picture: {path} ({type(best).__name__}: {best})", file=sys.stderr)
            if options.json:
                print(json.dumps({"picture": path, "error": str(best)}, ensure_ascii=False), flush=True)
            continue
        if options.json:
            print(json.dumps({"picture": path, "top5": [{"class": name, "probability": round(p, 6)} for name, p in best]},
                             ensure_ascii=False), flush=True)
        else:
            print(f"{path}: " + ", ".join(f"{name} {p:.1%}" for name, p in best), flush=True)
        if options.save:
            name = f"{number:05d}_{Path(path).stem}.png"
            save_labelled(path, f"{best[0][0]} {best[0][1]:.0%}", Path(options.run, "predictions", name))
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
