"""Draw the sample pictures that train.py learns from where there are no lists: shapes on clutter.

The same seed gives the same bytes on any machine with the same version of Pillow.
"""

import random
from pathlib import Path

from PIL import Image, ImageDraw

from utils.plumbing.console import ProgressLine, say
from utils.plumbing.files import clear_drafts, draft, make_folder, move, not_written

SIZE, TRAIN, TEST = 64, 5000, 600
SCALE = 3  # pictures are drawn three times as large and reduced, for smooth edges
SIDE = SIZE * SCALE
SQUARE = (0, 0, 200, 200)  # left, top, right and bottom of what a shape is drawn into
CIRCLE = (100, 100, 100)  # x, y and radius of the circle in it


def arrow(draw):
    draw.rectangle((0, 70, 110, 130), fill=255)
    draw.polygon((110, 20, 200, 100, 110, 180), fill=255)


def circle(draw):
    draw.ellipse(SQUARE, fill=255)


def crescent(draw):
    circle(draw)
    draw.ellipse((45, 20, 205, 180), fill=0)


def cross(draw):
    draw.rectangle((0, 70, 200, 130), fill=255)
    draw.rectangle((70, 0, 130, 200), fill=255)


def heart(draw):
    draw.ellipse((0, 10, 110, 120), fill=255)
    draw.ellipse((90, 10, 200, 120), fill=255)
    draw.polygon((10, 95, 190, 95, 100, 200), fill=255)


def rectangle(draw):
    draw.rectangle((0, 65, 200, 135), fill=255)


def ring(draw):
    draw.ellipse(SQUARE, outline=255, width=50)


def square(draw):
    draw.regular_polygon(CIRCLE, 4, fill=255)


def star(draw):
    triangle(draw)
    draw.regular_polygon(CIRCLE, 3, rotation=180, fill=255)


def triangle(draw):
    draw.regular_polygon(CIRCLE, 3, fill=255)


SHAPES = (arrow, circle, crescent, cross, heart, rectangle, ring, square, star, triangle)


def random_colour(rng, darkest=10, brightest=90):
    """Return a colour in Pillow's notation, with a lightness between these, in percent."""
    lightness = rng.randint(darkest, brightest)
    return f"hsl({rng.randrange(360)}, {rng.randrange(100)}%, {lightness}%)"


def draw_line(draw, rng, x, y, reach, width):
    """Draw a line in any colour and direction with (x, y) in its middle."""
    right, down = rng.uniform(-reach, reach), rng.uniform(-reach, reach)
    ends = (x - right, y - down, x + right, y + down)
    draw.line(ends, random_colour(rng), round(width))


def draw_shape(shape, rng):
    """Return one picture: a shape of any colour, size, angle and place, on clutter."""
    image = Image.new("RGB", (SIDE, SIDE), random_colour(rng, darkest=10, brightest=40))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randrange(3, 8)):
        x, y = rng.randrange(SIDE), rng.randrange(SIDE)
        draw_line(draw, rng, x, y, reach=5 * SCALE, width=SCALE * rng.randint(1, 2))

    mask = Image.new("L", (200, 200))
    shape(ImageDraw.Draw(mask))
    radius = SCALE * rng.randint(17, 28)
    mask = mask.resize((2 * radius, 2 * radius)).rotate(rng.uniform(0, 360), expand=True)
    margin = 0.85 * radius  # so that a little of a large shape may lie outside
    x, y = rng.uniform(margin, SIDE - margin), rng.uniform(margin, SIDE - margin)
    corner = round(x - mask.width / 2), round(y - mask.height / 2)
    image.paste(random_colour(rng, darkest=60, brightest=90), corner, mask)
    if rng.random() < 0.5:  # partly covered
        draw_line(draw, rng, x, y, reach=radius, width=radius * rng.uniform(0.1, 0.22))
    return image.reduce(SCALE)


def draw_set(folder, place):
    """Draw the training and test pictures, the class file and both lists into `folder`.

    place: the Path where the folder will be moved to, which the lists' paths begin with.
    """
    names = [shape.__name__ for shape in SHAPES]
    Path(folder, "classes.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    progress = ProgressLine("drawing", TRAIN + TEST)
    drawn = 0
    for split, number in (("train", TRAIN), ("test", TEST)):
        lines = ""
        for i in range(number):
            label = i % len(SHAPES)
            path = Path(split, names[label], f"{i:04d}.png")
            Path(folder, path).parent.mkdir(parents=True, exist_ok=True)
            picture = draw_shape(SHAPES[label], random.Random(f"0 {split} {i}"))
            picture.save(Path(folder, path), compress_level=1)
            lines += f"{label};{(place / path).as_posix()}\n"
            drawn += 1
            progress.show(drawn, images=1, describe=place.as_posix)
        Path(folder, f"{split}.txt").write_text(lines, encoding="utf-8")
    progress.clear()


def draw_once(folder):
    """Draw the pictures into a folder, so that an interrupted drawing leaves no half set.

    UserError: they cannot be written.
    """
    say(f"drawing {TRAIN} + {TEST} pictures of {len(SHAPES)} shapes")
    try:
        clear_drafts(make_folder(folder.parent, "it is the place of the sample pictures"))
        with draft(folder, folder=True) as fresh:
            draw_set(fresh, folder)
            move(fresh, folder)
    except OSError as error:
        if not folder.exists():  # else another process was first
            raise not_written(folder, error) from error
