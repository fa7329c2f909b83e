"""The picture set that train.py draws when there is none: 10 shapes, 64×64, the same bytes for the same seed."""
import math
import os
import random
from pathlib import Path

from PIL import Image, ImageDraw

from utils.errors import UserError
from utils.files import clear_drafts, draft
from utils.lists import check_text_file
from utils.processes import say

DEFAULT_PATHS = ("model_data/cls_classes.txt", "model_data/cls_train.txt", "model_data/cls_test.txt")
FOLDER = Path("model_data/shapes")
SIZE, TRAIN, TEST = 64, 5000, 600


def curve(x, y, points=48):
    """An outline: (x(t), y(t)) at evenly spaced angles t; of the unit circle, a regular polygon's few corners."""
    angles = [2 * math.pi * i / points for i in range(points)]
    return [(x(t), y(t)) for t in angles]


CIRCLE = curve(math.cos, math.sin)
SHAPES = {  # outlines in a square from -1 to 1; the ring's hole is drawn as well
    "arrow": [(-1, -.28), (.1, -.28), (.1, -.8), (1, 0), (.1, .8), (.1, .28), (-1, .28)],
    "circle": CIRCLE,
    "crescent": CIRCLE[6:43] + curve(lambda t: .25 + .8 * math.cos(t), lambda t: .8 * math.sin(t))[42:6:-1],
    "cross": [(-.3, -1), (.3, -1), (.3, -.3), (1, -.3), (1, .3), (.3, .3), (.3, 1), (-.3, 1), (-.3, .3), (-1, .3),
              (-1, -.3), (-.3, -.3)],
    "heart": curve(lambda t: math.sin(t) ** 3,
                   lambda t: -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16),
    "rectangle": [(-1, -.35), (1, -.35), (1, .35), (-1, .35)],
    "ring": CIRCLE,
    "square": curve(math.cos, math.sin, 4),
    "star": [(x * far, y * far) for (x, y), far in zip(curve(math.cos, math.sin, 10), (1, .4) * 5)],
    "triangle": curve(math.cos, math.sin, 3),
}


def colour(rng, dark=0, bright=255):
    """A random colour whose luminance (ITU-R BT.601) is from `dark` to `bright`."""
    while True:
        red, green, blue = (rng.randrange(256) for _ in range(3))
        if dark <= 0.299 * red + 0.587 * green + 0.114 * blue <= bright:
            return red, green, blue


def placed(points, x, y, radius, angle):
    """An outline's points in a picture: `radius` times as large, turned by `angle`, around (x, y)."""
    c, s = radius * math.cos(angle), radius * math.sin(angle)
    return [(x + c * px - s * py, y + s * px + c * py) for px, py in points]


def draw_shape(name, rng):
    """One picture: a shape of any colour, size, angle and place, on clutter, partly covered."""
    scale = 3  # drawn larger and shrunk, for smooth edges
    side = SIZE * scale
    background = colour(rng, 0, 110)
    image = Image.new("RGB", (side, side), background)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randrange(3, 8)):  # clutter: lines and specks that are smaller than any shape
        speck = rng.random() * side, rng.random() * side, rng.uniform(5, 14) * scale, rng.random() * 7
        draw.line(placed([(0, 0), (1, 0)], *speck), fill=colour(rng), width=rng.randrange(1, 3) * scale)
    fill = colour(rng, 150, 255)
    radius, angle = rng.uniform(17, 28) * scale, rng.random() * 2 * math.pi
    x, y = (rng.uniform(radius * .9, side - radius * .9) for _ in range(2))
    draw.polygon(placed(SHAPES[name], x, y, radius, angle), fill=fill)
    if name == "ring":
        draw.polygon(placed(SHAPES[name], x, y, radius * .5, angle), fill=background)
    for _ in range(rng.randrange(0, 2)):  # partial occlusion: a bar across the shape
        turn, across = rng.random() * 7, rng.uniform(-.6, .6)
        bar = placed([(-1, across), (1, across)], x, y, radius, turn)
        draw.line(bar, fill=colour(rng), width=int(rng.uniform(.1, .22) * radius))
    return image.resize((SIZE, SIZE), Image.Resampling.BOX)


def draw_set(folder, seed=0):
    """Draw the training and test pictures, the class file and both annotation files into `folder`."""
    names = sorted(SHAPES)
    Path(folder, "classes.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    for split, number in (("train", TRAIN), ("test", TEST)):
        lines = []
        for i in range(number):
            label = i % len(names)
            target = Path(folder, split, names[label], f"{i:04d}.png")
            target.parent.mkdir(parents=True, exist_ok=True)
            draw_shape(names[label], random.Random(f"{seed} {split} {i}")).save(target, compress_level=1)
            lines.append(f"{label};{Path(FOLDER, split, names[label], target.name).as_posix()}\n")
        Path(folder, f"{split}.txt").write_text("".join(lines), encoding="utf-8")


def data_paths(classes_path, train_annotation_path, test_annotation_path):
    """The three paths as given, checked; or the sample's, drawn first if need be, when they are the untouched, absent defaults."""
    given = (classes_path, train_annotation_path, test_annotation_path)
    if given != DEFAULT_PATHS or any(os.path.exists(path) for path in given):
        for name, path in zip(("classes_path", "train_annotation_path", "test_annotation_path"), given):
            check_text_file(name, path)
        return given
    say(f"{train_annotation_path} is absent in {os.getcwd()}: " + (f"training on the sample pictures in {FOLDER}" if FOLDER.exists() else
                                                  f"drawing {TRAIN} + {TEST} sample pictures into {FOLDER}"))
    if not FOLDER.exists():
        try:
            FOLDER.parent.mkdir(exist_ok=True)
            clear_drafts(FOLDER.parent)
            with draft(FOLDER, folder=True) as fresh:
                draw_set(fresh)
                os.rename(fresh, FOLDER)  # at once, so that an interrupted drawing leaves no half set
        except OSError as error:
            if not FOLDER.exists():  # else another process was first
                raise UserError(f"the sample pictures could not be drawn into {FOLDER} ({error.strerror or error}): make "
                                f"{FOLDER.parent} writable and some room in it, or name lists of your own pictures") from error
    return tuple(str(FOLDER / name) for name in ("classes.txt", "train.txt", "test.txt"))
