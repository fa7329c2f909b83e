"""The picture set that train.py draws when there is none: 10 shapes, 64×64, the same bytes for the same seed."""

import math
import os
import random
from pathlib import Path

from PIL import Image, ImageDraw

from utils.plumbing.console import say
from utils.plumbing.files import clear_drafts, draft, not_written, writable
from utils.plumbing.lists import DEFAULT_PATHS, PATH_SETTINGS, check_text_file

FOLDER = Path("model_data/shapes")
SIZE, TRAIN, TEST = 64, 5000, 600


def curve(points=48, x=math.cos, y=math.sin):
    """An outline: (x(t), y(t)) at evenly spaced angles t; of the unit circle, a regular polygon's few corners."""
    angles = [2 * math.pi * i / points for i in range(points)]
    return [(x(t), y(t)) for t in angles]


SHAPES = {  # outlines in a square from -1 to 1; the ring's hole is drawn as well
    "arrow": [(-1, -0.28), (0.1, -0.28), (0.1, -0.8), (1, 0), (0.1, 0.8), (0.1, 0.28), (-1, 0.28)],
    "circle": curve(),
    "crescent": curve()[6:43]
    + curve(48, lambda t: 0.25 + 0.8 * math.cos(t), lambda t: 0.8 * math.sin(t))[42:6:-1],
    "cross": [
        (-0.3, -1),
        (0.3, -1),
        (0.3, -0.3),
        (1, -0.3),
        (1, 0.3),
        (0.3, 0.3),
        (0.3, 1),
        (-0.3, 1),
        (-0.3, 0.3),
        (-1, 0.3),
        (-1, -0.3),
        (-0.3, -0.3),
    ],
    "heart": curve(
        48,
        lambda t: math.sin(t) ** 3,
        lambda t: (
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16
        ),
    ),
    "rectangle": [(-1, -0.35), (1, -0.35), (1, 0.35), (-1, 0.35)],
    "ring": curve(),
    "square": curve(4),
    "star": [(x * far, y * far) for (x, y), far in zip(curve(10), (1, 0.4) * 5)],
    "triangle": curve(3),
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
    for _ in range(
        rng.randrange(3, 8)
    ):  # clutter: lines and specks that are smaller than any shape
        speck = (
            rng.random() * side,
            rng.random() * side,
            rng.uniform(5, 14) * scale,
            rng.random() * 7,
        )
        draw.line(
            placed([(0, 0), (1, 0)], *speck), fill=colour(rng), width=rng.randrange(1, 3) * scale
        )
    fill, radius, angle = colour(rng, 150), rng.uniform(17, 28) * scale, rng.random() * 2 * math.pi
    x, y = (rng.uniform(radius * 0.9, side - radius * 0.9) for _ in range(2))
    draw.polygon(placed(SHAPES[name], x, y, radius, angle), fill=fill)
    if name == "ring":
        draw.polygon(placed(SHAPES[name], x, y, radius * 0.5, angle), fill=background)
    if rng.randrange(2):  # partial occlusion: a bar across the shape
        turn, across = rng.random() * 7, rng.uniform(-0.6, 0.6)
        bar = placed([(-1, across), (1, across)], x, y, radius, turn)
        draw.line(bar, fill=colour(rng), width=int(rng.uniform(0.1, 0.22) * radius))
    return image.resize((SIZE, SIZE), Image.Resampling.BOX)


def draw_set(folder, seed=0):
    """Draw the training and test pictures, the class file and both annotation files into `folder`."""
    names = sorted(SHAPES)
    Path(folder, "classes.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    for split, number in (("train", TRAIN), ("test", TEST)):
        lines = []
        for i in range(number):
            label = i % len(names)
            path = Path(split, names[label], f"{i:04d}.png")
            Path(folder, path).parent.mkdir(parents=True, exist_ok=True)
            draw_shape(names[label], random.Random(f"{seed} {split} {i}")).save(
                Path(folder, path), compress_level=1
            )
            lines.append(f"{label};{(FOLDER / path).as_posix()}\n")
        Path(folder, f"{split}.txt").write_text("".join(lines), encoding="utf-8")


def find_lists(settings):
    """The paths of the class file and both lists as in train.py's settings, checked; or, when they are the untouched, absent
    defaults, the sample's, which is drawn if need be, and stands in the settings from then on."""
    given = tuple(settings[name] for name in PATH_SETTINGS)
    if given != DEFAULT_PATHS or any(map(os.path.exists, given)):
        for name, path in zip(PATH_SETTINGS, given):
            check_text_file(name, path)
        return given
    doing = "training on the" if FOLDER.exists() else f"drawing {TRAIN} + {TEST}"
    say(f"{given[1]} is absent in {os.getcwd()}: {doing} sample pictures in {FOLDER}")
    try:
        if not FOLDER.exists():
            clear_drafts(writable(FOLDER.parent, "it is the place of the sample pictures"))
            with draft(FOLDER, folder=True) as fresh:
                draw_set(fresh)
                os.rename(
                    fresh, FOLDER
                )  # at once, so that an interrupted drawing leaves no half set
    except OSError as error:
        if not FOLDER.exists():  # else another process was first
            raise not_written(FOLDER, error) from error
    settings.update(
        zip(
            PATH_SETTINGS, (str(FOLDER / name) for name in ("classes.txt", "train.txt", "test.txt"))
        )
    )
    return tuple(settings[name] for name in PATH_SETTINGS)
