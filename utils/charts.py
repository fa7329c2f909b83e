"""Pictures that the program draws, with Pillow alone."""
import math
import os
from bisect import bisect
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

COLOURS = ((31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40))
GREY, BLACK = (225, 225, 225), (40, 40, 40)
FONTS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.fonts", "~/.local/share/fonts", "/Library/Fonts", "~/Library/Fonts",
         "/System/Library/Fonts", "C:/Windows/Fonts")
FANCY = ("Bold", "Italic", "Oblique", "Mono", "Serif")


@cache
def font_files():
    """Pillow's own font (None), which has the letters of ASCII, and the system's: plain ones first, then those with most in them."""
    found = [path for folder in FONTS for path in Path(os.path.expanduser(folder)).rglob("*.[to]t[cf]") if path.is_file()]
    return [None, *sorted(found, key=lambda path: (any(word in path.name for word in FANCY), -path.stat().st_size))]


@cache
def load(path, size):
    return ImageFont.truetype(path, size) if path else ImageFont.load_default(size)


@cache
def has(path, character):
    """Whether a font draws a character, and not the box that stands for all that it lacks."""
    try:
        mark, box = (load(path, 20).getmask(c) for c in (character, "\U0010ffff"))
    except (OSError, ValueError, RuntimeError):  # a font of one size only; no character
        return False
    return mark.size != box.size or bytes(mark) != bytes(box)


@cache
def font_file(text):
    """The first font that has all of a text and the ellipsis that may end it; '' where none has."""
    characters = set(text + "…") - {" "}
    return next((path for path in font_files() if all(has(path, c) for c in characters)), "")


def font(size, text=""):
    return load(font_file(text) or None, size)


def drawable(names):
    """The names; for one that no font of this machine can draw, its number."""
    return [f"{number} (no font)" if font_file(name) == "" else name for number, name in enumerate(names)]


def write(draw, place, text, size, anchor="lm", ink=BLACK, **options):
    draw.text(place, text, ink, font(size, text), anchor=anchor, **options)


def shorten(text, width, size):
    """`text`, cut with an ellipsis to `width` pixels."""
    measure = font(size, text).getlength
    if len(text) <= width and measure(text) <= width:
        return text
    return text[:bisect(range(1, min(len(text), width)), width, key=lambda n: measure(text[:n] + "…"))] + "…"


def ticks(low, high, number, least=0):
    """Multiples of a step of one digit from low to high, about `number` of them."""
    step = max(least, float(f"{(high - low) / number:.1g}"))
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step + 1e-6) + 1)]


def line_chart(panels, width=640, height=420):
    """Panels side by side, each (title, {name: [(x, y), …]}, (lowest, highest) or None), with axes and legends."""
    image = Image.new("RGB", (width * len(panels), height), "white")
    draw = ImageDraw.Draw(image)
    for number, (title, series, limits) in enumerate(panels):
        xs, ys = zip(*[p for line in series.values() for p in line if math.isfinite(p[1])] or [(0, 1)])
        x_low, x_high = min(xs), max(max(xs), min(xs) + 1)
        low, high = limits or (min(0, *ys), max(1e-6, max(ys) * 1.05))
        left, top, right, bottom = width * number + 70, 50, width * (number + 1) - 25, height - 55

        def place(x, y):
            return np.interp(x, [x_low, x_high], [left, right]), np.interp(y, [low, high], [bottom, top])
        write(draw, ((left + right) / 2, 24), title, 20, "mm")
        write(draw, ((left + right) / 2, height - 18), "epoch", 15, "mm")
        for y in ticks(low, high, 5):
            draw.line([place(x_low, y), place(x_high, y)], GREY)
            write(draw, (left - 8, place(x_low, y)[1]), f"{y:g}", 14, "rm")
        for x in ticks(x_low, x_high, 8, least=1):
            draw.line([place(x, low), (place(x, low)[0], bottom + 5)], BLACK)
            write(draw, (place(x, low)[0], bottom + 16), f"{x:g}", 14, "mm")
        draw.line([(left, top), (left, bottom), (right, bottom)], BLACK, 2)
        for row, (colour, (name, line)) in enumerate(zip(COLOURS, series.items())):
            dots = [place(x, y) for x, y in line if math.isfinite(y)]
            draw.line(dots, colour, 3, joint="curve")
            for x, y in dots if len(dots) <= 30 else ():
                draw.ellipse([x - 4, y - 4, x + 4, y + 4], colour)
            name += f"  (last {line[-1][1]:.4g})" if line else ""
            y = (top + 14 if not limits else bottom - 14 - 22 * (len(series) - 1)) + 22 * row
            write(draw, (right - 20, y), name, 15, "rm", colour, stroke_width=4, stroke_fill="white")
    return image


def contact_sheet(pictures, labels, columns=8, cell=112, caption=18):
    """uint8 (H, W, 3) tensors in a grid, each with one or more caption lines (a string with newlines) under it."""
    high = cell + caption * max((label.count("\n") + 1 for label in labels), default=1) + 4
    rows, columns = max(1, math.ceil(len(pictures) / columns)), min(columns, max(1, len(pictures)))
    sheet = Image.new("RGB", (columns * (cell + 4), rows * high), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (picture, label) in enumerate(zip(pictures, labels)):
        x, y = i % columns * (cell + 4) + 2, i // columns * high + 2
        picture = ImageOps.contain(Image.fromarray(picture.numpy()), (cell, cell))
        sheet.paste(picture, (x + (cell - picture.width) // 2, y + (cell - picture.height) // 2))
        for row, line in enumerate(label.split("\n")):
            write(draw, (x + cell / 2, y + cell + row * caption + caption / 2), shorten(line, cell, 14), 14, "mm")
    return sheet


def matrix(counts, names):
    """A confusion matrix as a picture: rows true, columns predicted, shaded by the row's share; 2 to 1,000 classes.

    counts: whole numbers (classes, classes). They stand in cells that are large enough; names, where there is room for them.
    """
    cell, shares = max(1, min(56, 1000 // len(names))), counts / counts.sum(1, keepdims=True).clip(1)
    size, side = min(18, max(10, cell - 4)), cell * len(names)
    names = [shorten(name, 194, size) for name in drawable(names)]
    edge = 16 + round(max(font(size, name).getlength(name) for name in names))
    image = Image.new("RGB", (edge + max(side + 30, 300), edge + side + 50), "white")
    draw = ImageDraw.Draw(image)
    shades = (255 - shares[..., None] * (255 - np.array(COLOURS[0]))).round().astype("uint8")
    image.paste(Image.fromarray(shades).resize((side, side), Image.Resampling.NEAREST), (edge, edge))
    draw.rectangle([edge - 1, edge - 1, edge + side, edge + side], outline=BLACK)
    middles = [edge + (i + .5) * cell for i in range(len(names))]
    for middle, name in [*zip(middles, names)][::math.ceil(12 / cell)]:
        write(draw, (edge - 6, middle), name, size, "rm")
        upwards = ImageFont.TransposedFont(font(size, name), Image.Transpose.ROTATE_90)
        *_, across, up = upwards.getbbox(name)
        draw.text((middle - across / 2, edge - 6 - up), name, BLACK, upwards)
    for y, x in np.argwhere(counts) if cell >= 24 else ():
        number, ink = str(counts[y, x]), "white" if shares[y, x] > 0.5 else BLACK
        write(draw, (middles[x], middles[y]), number, min(size, int(cell * 1.5 / len(number))), "mm", ink)
    write(draw, (edge, image.height - 24), "rows: true class, columns: predicted class", 14)
    return image
