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


load = cache(lambda path, size: ImageFont.truetype(path, size) if path else ImageFont.load_default(size))


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


def write(draw, place, text, size, anchor="lm", ink=BLACK):
    draw.text(place, text, ink, font(size, text), anchor=anchor)


def shorten(text, width, size):
    """`text`, cut with an ellipsis to `width` pixels."""
    measure = font(size, text).getlength
    if len(text) <= width and measure(text) <= width:
        return text
    return text[:bisect(range(1, min(len(text), width)), width, key=lambda n: measure(text[:n] + "…"))] + "…"


def widest(names, size, limit):
    """Pixels that the longest name takes, at most `limit`."""
    return round(max(min(limit, font(size, name).getlength(name[:limit])) for name in names))


def ticks(low, high, number=5):
    """Round values from low to high, about `number` of them."""
    raw = (high - low) / number or 1
    step = 10 ** math.ceil(math.log10(raw))
    step /= next((part for part in (5, 2) if step / part >= raw), 1)
    return [round(step * i, 10) for i in range(math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6) + 1)]


def line_chart(panels, width=640, height=420):
    """Panels side by side, each (title, {name: [(x, y), …]}, (lowest, highest) or None), with axes and legends."""
    image = Image.new("RGB", (width * len(panels), height), "white")
    draw = ImageDraw.Draw(image)
    for number, (title, series, limits) in enumerate(panels):
        xs, ys = zip(*[p for line in series.values() for p in line if math.isfinite(p[1])] or [(0, 0)])
        x_low, x_high = min(xs), max(max(xs), min(xs) + 1)
        low, high = limits or (min(0, min(ys)), (max(ys) * 1.05) or 1)
        left, top, right, bottom = width * number + 70, 50, width * (number + 1) - 25, height - 55

        def place(x, y):
            return (left + (x - x_low) / (x_high - x_low) * (right - left), bottom - (y - low) / (high - low) * (bottom - top))
        write(draw, ((left + right) / 2, 24), title, 20, "mm")
        write(draw, ((left + right) / 2, height - 18), "epoch", 15, "mm")
        for y in ticks(low, high):
            draw.line([place(x_low, y), place(x_high, y)], GREY)
            write(draw, (left - 8, place(x_low, y)[1]), f"{y:g}", 14, "rm")
        for x in filter(float.is_integer, map(float, ticks(x_low, x_high, 8))):
            draw.line([place(x, low), (place(x, low)[0], bottom + 5)], BLACK)
            write(draw, (place(x, low)[0], bottom + 16), f"{x:g}", 14, "mm")
        draw.line([(left, top), (left, bottom), (right, bottom)], BLACK, 2)
        for row, (colour, (name, line)) in enumerate(zip(COLOURS, series.items())):
            dots = [place(x, min(max(y, low), high)) for x, y in line if math.isfinite(y)]
            draw.line(dots, colour, 3, joint="curve")
            for x, y in dots if len(dots) <= 30 else ():
                draw.ellipse([x - 4, y - 4, x + 4, y + 4], colour)
            name += f"  (last {line[-1][1]:.4g})" if line else ""
            y = (top + 14 if not limits else bottom - 14 - 22 * (len(series) - 1)) + 22 * row
            draw.text((right - 20, y), name, colour, font(15, name), anchor="rm", stroke_width=4, stroke_fill="white")
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
    """A confusion matrix as a picture: rows true, columns predicted, shaded by the row's share; 2 to 1,000 classes."""
    number, names = len(names), drawable(names)
    cell = max(1, min(56, 1000 // number))
    named = cell >= 12  # room for a name beside each row; otherwise every so many rows are numbered
    size = min(18, max(10, cell - 4)) if named else 14
    margin = widest(names, size, 204) + 16 if named else 60
    image = Image.new("RGB", (max(margin + cell * number + 30, margin + 300), margin + cell * number + 50), "white")
    draw = ImageDraw.Draw(image)
    shares = counts / counts.sum(1, keepdims=True).clip(1)
    shades = (255 - shares[..., None] * (255 - np.array(COLOURS[0]))).round().astype("uint8")
    image.paste(Image.fromarray(shades).resize((cell * number, cell * number), Image.Resampling.NEAREST), (margin, margin))
    draw.rectangle([margin - 1, margin - 1, margin + cell * number, margin + cell * number], outline=BLACK)
    for i in range(number) if named else map(int, ticks(0, number - 1, 10)):
        middle, text = margin + i * cell + cell / 2, shorten(names[i], margin - 10, size) if named else f"{i}"
        write(draw, (margin - 6, middle), text, size, "rm")
        label = Image.new("L", (margin, size + 6))
        write(ImageDraw.Draw(label), (4, label.height / 2), text, size, ink=255)
        label = label.rotate(90, expand=True)
        image.paste(BLACK, (round(middle - label.width / 2), margin - label.height - 2), label)
    for row, column in np.argwhere(counts) if cell >= 24 else ():
        text, ink = str(counts[row, column]), "white" if shares[row, column] > 0.5 else BLACK
        write(draw, (margin + (column + .5) * cell, margin + (row + .5) * cell), text, min(size, int(cell * 1.5 / len(text))), "mm", ink)
    write(draw, (margin, image.height - 24), "rows: true class, columns: predicted class", 14)
    return image


def bars(names, figures):
    """Every class's figures (name → values from 0 to 1) as horizontal bars, in columns of up to 100 classes."""
    rows, names = min(len(names), 100), drawable(names)
    label = widest(names, 13, 188) + 12
    high, width = 11 * len(figures) + 8, label + 230
    image = Image.new("RGB", (math.ceil(len(names) / rows) * width + 20, rows * high + 50), "white")
    draw = ImageDraw.Draw(image)
    for column, (colour, name) in enumerate(zip(COLOURS, figures)):
        write(draw, (10 + 80 * column, 20), name, 14, ink=colour)
    for i, name in enumerate(names):
        left, top = i // rows * width + label + 10, 40 + i % rows * high
        write(draw, (left - 6, top + high / 2 - 4), shorten(name, label - 8, 13), 13, "rm")
        for row, (colour, values) in enumerate(zip(COLOURS, figures.values())):
            y = top + 11 * row
            draw.rectangle([left, y, left + 160, y + 9], GREY)
            draw.rectangle([left, y, left + round(160 * values[i]), y + 9], colour)
            write(draw, (left + 166, y + 5), f"{values[i]:.3f}", 10)
    return image
