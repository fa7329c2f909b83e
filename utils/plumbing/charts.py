"""Pictures that the program draws with Pillow: curves, sheets of captioned pictures, matrices."""

import math
from contextlib import suppress
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

COLOURS = ((31, 119, 180), (255, 127, 14))  # of curves
GREY = (225, 225, 225)
BLACK = (40, 40, 40)
# Fonts with the letters of many scripts, those with the most first; Pillow finds them by these
# names in the system's folders
FONTS = (
    "Arial Unicode.ttf",
    "NotoSansCJK-Regular.ttc",
    "PingFang.ttc",
    "Hiragino Sans GB.ttc",
    "msyh.ttc",
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "simhei.ttf",
    "malgun.ttf",
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "arial.ttf",
)
PANEL_WIDTH, PANEL_HEIGHT = 640, 420  # of a line chart, in pixels
CELL = 144  # sides of a picture on a sheet, in pixels
COLUMNS = 8
EDGE = 210  # pixels beside a matrix, for names


@cache
def font(size):
    """Return the first of FONTS on this machine, or Pillow's own, which has ASCII's letters."""
    for name in FONTS:
        with suppress(OSError):
            return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)


@cache
def is_drawable(letter):
    """Return whether the font has a letter, and would not draw a box for it."""
    box = bytes(font(20).getmask("\U0010ffff"))
    is_space = letter in " \u00a0\u3000"  # also those that Word and Chinese have
    return is_space or (letter.isprintable() and bytes(font(20).getmask(letter)) != box)


def drawable_text(text, otherwise):
    """Return `text`, or `otherwise` where the font lacks one of its letters."""
    return text if all(map(is_drawable, text)) else otherwise


def drawable_names(names):
    """Return class names, with the class id in place of a name that the font cannot write."""
    return [drawable_text(name, f"{number} (no font)") for number, name in enumerate(names)]


def write(draw, place, text, size, anchor="lm", ink=BLACK):
    draw.text(place, text, ink, font(size), anchor=anchor)


def shorten(text, width, size):
    """Return `text`, with an ellipsis in its middle where it is longer than `width` pixels."""
    kept = width // 2  # letters at each end: a letter has a pixel or more
    shortened = text
    while font(size).getlength(shortened[: 2 * width]) > width:
        kept -= 1
        shortened = f"{text[:kept]}…{text[-kept:]}"
    return shortened


def ticks(low, high, smallest_step=0):
    """Return multiples of a step of one digit from low to high, about five of them."""
    step = max(smallest_step, float(f"{(high - low) / 5:.1g}"))
    return step * np.arange(math.ceil(low / step), high / step + 1e-6)


def draw_line_chart(panels):
    """Return a picture of panels side by side, with axes and a legend.

    panels: [(title, {name: [(x, y), …]}), …] of finite numbers.
    """
    images = [draw_panel(title, curves) for title, curves in panels]
    return Image.fromarray(np.hstack(images))


def draw_panel(title, curves):
    """Return a picture of one panel. Zero is always on its vertical axis."""
    image = Image.new("RGB", (PANEL_WIDTH, PANEL_HEIGHT), "white")
    draw = ImageDraw.Draw(image)
    left, right, top, bottom, legend = 70, 615, 50, 365, 402
    xs, ys = zip(*(point for curve in curves.values() for point in curve))
    x_range = min(xs), max(*xs, min(xs) + 1)
    y_range = min(0, *ys), max(1e-6, *ys) * 1.05

    def place(x, y):
        return np.interp(x, x_range, (left, right)), np.interp(y, y_range, (bottom, top))

    write(draw, (PANEL_WIDTH / 2, 24), title, 20, "mm")
    for y in ticks(*y_range):
        _, down = place(0, y)
        draw.line([(left, down), (right, down)], GREY)
        write(draw, (left - 8, down), f"{y:g}", 14, "rm")
    for x in ticks(*x_range, smallest_step=1):
        across, _ = place(x, 0)
        write(draw, (across, bottom + 14), f"{x:g}", 14, "mm")
    write(draw, (right, legend), "epoch", 15, "rm")
    draw.line([(left, top), (left, bottom), (right, bottom)], BLACK, 2)
    for number, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[number]
        dots = [place(x, y) for x, y in curve]
        draw.line(dots, colour, 3, joint="curve")
        for dot in dots:
            draw.circle(dot, 3, colour)
        last = f"  (last {curve[-1][1]:.4g})" if curve else ""
        write(draw, (left + 220 * number, legend), name + last, 15, ink=colour)
    return image


def draw_contact_sheet(pictures, captions):
    """Return a picture of pictures in rows of eight, each with its caption below.

    pictures: uint8 (H, W, 3) tensors of any sizes; captions: strings of one or more lines.
    """
    lines = max(caption.count("\n") + 1 for caption in captions)
    width = CELL + 4
    height = CELL + 18 * lines + 8
    rows = math.ceil(len(pictures) / COLUMNS)
    columns = min(COLUMNS, len(pictures))
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (picture, caption) in enumerate(zip(pictures, captions)):
        row, column = divmod(number, COLUMNS)
        x, y = column * width + 2, row * height + 2
        padded = ImageOps.pad(Image.fromarray(picture.numpy()), (CELL, CELL), color="white")
        sheet.paste(padded, (x, y))
        text = "\n".join(shorten(line, CELL, 13) for line in caption.split("\n"))
        write(draw, (x, y + CELL), text, 13, "la")
    return sheet


def draw_matrix(counts, names):
    """Return a confusion matrix as a picture: rows true, columns predicted, shaded by row.

    counts: whole numbers (classes, classes). They are written into cells that are large enough,
    and names where there is room for them.
    """
    number = len(names)
    cell = max(1, min(56, 1000 // number))
    side = cell * number
    image = Image.new("RGB", (EDGE + side + 10, EDGE + side + 10), "white")
    draw = ImageDraw.Draw(image)
    write(draw, (10, 20), "rows: true class", 14, ink="grey")
    write(draw, (10, 40), "columns: predicted class", 14, ink="grey")

    shares = counts / counts.sum(1, keepdims=True).clip(1)
    shades = 255 - shares[..., None] * (255 - np.array(COLOURS[0]))
    cells = Image.fromarray(shades.round().astype("uint8"))
    image.paste(cells.resize((side, side), Image.Resampling.NEAREST), (EDGE, EDGE))
    if cell >= 10:
        names = drawable_names(names)
        image.paste(draw_names(names, cell), (0, EDGE))
        upwards = draw_names(names[::-1], cell).transpose(Image.Transpose.ROTATE_270)
        image.paste(upwards, (EDGE, 0))
    draw.rectangle([EDGE - 1, EDGE - 1, EDGE + side, EDGE + side], outline=BLACK)
    if cell >= 36:
        for row, column in np.argwhere(counts):
            middle = EDGE + (column + 0.5) * cell, EDGE + (row + 0.5) * cell
            ink = "white" if shares[row, column] > 0.5 else BLACK
            write(draw, middle, str(counts[row, column]), cell // 4, "mm", ink)
    return image


def draw_names(names, cell):
    """Return a picture of names, one every `cell` pixels, right-aligned."""
    image = Image.new("RGB", (EDGE, cell * len(names)), "white")
    draw = ImageDraw.Draw(image)
    size = min(18, cell)
    for place, name in enumerate(names):
        middle = (place + 0.5) * cell
        write(draw, (EDGE - 6, middle), shorten(name, EDGE - 16, size), size, "rm")
    return image
