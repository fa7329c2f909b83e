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


def regular(points, inner=1.0):
    """A regular polygon, or with `inner` < 1 a star, as (x, y) on the unit circle."""
    count = points * (2 if inner < 1 else 1)
    return [((inner if inner < 1 and i % 2 else 1) * math.cos(2 * math.pi * i / count),
             (inner if inner < 1 and i % 2 else 1) * math.sin(2 * math.pi * i / count)) for i in range(count)]


def curve(x, y, points=48):
    return [(x(2 * math.pi * i / points), y(2 * math.pi * i / points)) for i in range(points)]


CROSS = [(-.3, -1), (.3, -1), (.3, -.3), (1, -.3), (1, .3), (.3, .3), (.3, 1), (-.3, 1), (-.3, .3), (-1, .3),
         (-1, -.3), (-.3, -.3)]
ARROW = [(-1, -.28), (.1, -.28), (.1, -.8), (1, 0), (.1, .8), (.1, .28), (-1, .28)]
SHAPES = {  # outlines in a square from -1 to 1; the ring's hole is drawn as well
    "arrow": ARROW,
    "circle": curve(math.cos, math.sin),
    "crescent": curve(math.cos, math.sin)[6:43] + curve(lambda t: .25 + .8 * math.cos(t), lambda t: .8 * math.sin(t))[42:6:-1],
    "cross": CROSS,
    "heart": curve(lambda t: math.sin(t) ** 3,
                   lambda t: -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16),
    "rectangle": [(-1, -.35), (1, -.35), (1, .35), (-1, .35)],
    "ring": curve(math.cos, math.sin),
    "square": regular(4),
    "star": regular(5, .4),
    "triangle": regular(3),
}


def colour(rng, dark=0, bright=255):
    """A random colour whose luminance (ITU-R BT.601) is from `dark` to `bright`."""
    while True:
        red, green, blue = (rng.randrange(256) for _ in range(3))
        if dark <= 0.299 * red + 0.587 * green + 0.114 * blue <= bright:
            return red, green, blue


def draw_shape(name, rng):
    """One picture: a shape of any colour, size, angle and place, on clutter, partly covered."""
    scale = 3  # drawn larger and shrunk, for smooth edges
    side = SIZE * scale
    background = colour(rng, 0, 110)
    image = Image.new("RGB", (side, side), background)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randrange(3, 8)):  # clutter: lines and specks that are smaller than any shape
        x, y, length, angle = rng.random() * side, rng.random() * side, rng.uniform(5, 14) * scale, rng.random() * 7
        end = (x + length * math.cos(angle), y + length * math.sin(angle))
        draw.line([(x, y), end], fill=colour(rng), width=rng.randrange(1, 3) * scale)
    fill = colour(rng, 150, 255)
    radius, angle = rng.uniform(17, 28) * scale, rng.random() * 2 * math.pi
    x, y = (rng.uniform(radius * .9, side - radius * .9) for _ in range(2))

    def placed(points, factor=1.0):
        c, s = math.cos(angle) * radius * factor, math.sin(angle) * radius * factor
        return [(x + c * px - s * py, y + s * px + c * py) for px, py in points]
    draw.polygon(placed(SHAPES[name]), fill=fill)
    if name == "ring":
        draw.polygon(placed(SHAPES[name], .5), fill=background)
    for _ in range(rng.randrange(0, 2)):  # partial occlusion: bars across the shape
        a, across = rng.random() * 7, rng.uniform(-.6, .6) * radius
        cx, cy = x - across * math.sin(a), y + across * math.cos(a)
        reach = (radius * math.cos(a), radius * math.sin(a))
        draw.line([(cx - reach[0], cy - reach[1]), (cx + reach[0], cy + reach[1])], fill=colour(rng),
                  width=int(rng.uniform(.1, .22) * radius))
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
    say(f"{train_annotation_path} is absent: " + (f"training on the sample pictures in {FOLDER}" if FOLDER.exists() else
                                                  f"drawing {TRAIN} + {TEST} sample pictures into {FOLDER}"))
    if not FOLDER.exists():
        try:
            FOLDER.parent.mkdir(exist_ok=True)
            clear_drafts(FOLDER.parent)
            with draft(FOLDER, folder=True) as fresh:
                draw_set(fresh)
                os.chmod(fresh, 0o755)
                os.rename(fresh, FOLDER)  # at once, so that an interrupted drawing leaves no half set
        except OSError as error:
            if not FOLDER.exists():  # else another process was first
                raise UserError(f"the sample pictures could not be drawn into {FOLDER} ({error.strerror or error}): make "
                                f"{FOLDER.parent} writable and some room in it, or name lists of your own pictures") from error
    return tuple(str(FOLDER / name) for name in ("classes.txt", "train.txt", "test.txt"))
