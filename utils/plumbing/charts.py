"""Pictures that the program draws, with Pillow alone."""

import math
from contextlib import suppress
from functools import cache
from itertools import chain

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

COLOURS = ((31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40))
GREY, BLACK = (225, 225, 225), (40, 40, 40)
# Fonts with the letters of many scripts, the most first; by these names Pillow finds them in the system's folders
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


@cache
def font(size):
    """The first of FONTS that is on this machine, else Pillow's own, which has the letters of ASCII."""
    for name in FONTS:
        with suppress(OSError):
            return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)


def drawable_names(names):
    """The names; for one with a letter that the font lacks, and would draw a box for, its number."""
    box = bytes(font(20).getmask("\U0010ffff"))
    letters = {
        c for c in set("".join(names)) if c.isprintable() and bytes(font(20).getmask(c)) != box
    } | {" "}
    return [
        name if letters.issuperset(name) else f"{number} (no font)"
        for number, name in enumerate(names)
    ]


def write(draw, place, text, size, anchor="lm", ink=BLACK):
    draw.text(place, text, ink, font(size), anchor=anchor)


def shorten(text, width, size):
    """`text`, cut with an ellipsis to `width` pixels."""
    measure, cut = font(size).getlength, text[:width]
    while measure(cut + "…" * (cut != text)) > width:
        cut = cut[:-1]
    return cut + "…" * (cut != text)


def ticks(low, high, least=0):
    """Multiples of a step of one digit from low to high, about five of them."""
    step = max(least, float(f"{(high - low) / 5:.1g}"))
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step + 1e-6) + 1)]


def draw_line_chart(panels):
    """Panels side by side, each (title, {name: [(x, y), …]}) of finite numbers, with axes and a legend."""
    width, height, top, bottom = 640, 420, 50, 365
    image = Image.new("RGB", (width * len(panels), height), "white")
    draw = ImageDraw.Draw(image)
    for number, (title, series) in enumerate(panels):
        xs, ys = zip(*chain(*series.values()))
        x_low, x_high, low, high = (
            min(xs),
            max(*xs, min(xs) + 1),
            min(0, *ys),
            max(1e-6, *ys) * 1.05,
        )
        left, right = width * number + 70, width * (number + 1) - 25

        def place(x, y):
            return np.interp(x, [x_low, x_high], [left, right]), np.interp(
                y, [low, high], [bottom, top]
            )

        write(draw, ((left + right) / 2, 24), title, 20, "mm")
        for y in ticks(low, high):
            draw.line([place(x_low, y), place(x_high, y)], GREY)
            write(draw, (left - 8, place(x_low, y)[1]), f"{y:g}", 14, "rm")
        for x in ticks(x_low, x_high, least=1):
            write(draw, (place(x, low)[0], bottom + 14), f"{x:g}", 14, "mm")
        write(draw, (right, height - 18), "epoch", 15, "rm")
        draw.line([(left, top), (left, bottom), (right, bottom)], BLACK, 2)
        for column, (colour, (name, line)) in enumerate(zip(COLOURS, series.items())):
            dots = [place(x, y) for x, y in line]
            draw.line(dots, colour, 3, joint="curve")
            for dot in dots if len(dots) <= 30 else ():
                draw.circle(dot, 4, colour)
            last = f"  (last {line[-1][1]:.4g})" if line else ""
            write(draw, (left + 220 * column, height - 18), name + last, 15, ink=colour)
    return image


def draw_contact_sheet(pictures, labels):
    """uint8 (H, W, 3) tensors in rows of eight, each with one or more caption lines (a string with newlines) under it."""
    cell, caption = 112, 18
    high = cell + caption * max(label.count("\n") + 1 for label in labels) + 4
    rows, columns = math.ceil(len(pictures) / 8), min(8, len(pictures))
    sheet = Image.new("RGB", (columns * (cell + 4), rows * high), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (picture, label) in enumerate(zip(pictures, labels)):
        x, y = i % 8 * (cell + 4) + 2, i // 8 * high + 2
        sheet.paste(
            ImageOps.pad(Image.fromarray(picture.numpy()), (cell, cell), color="white"), (x, y)
        )
        for row, line in enumerate(label.split("\n")):
            write(
                draw,
                (x + cell / 2, y + cell + (row + 0.5) * caption),
                shorten(line, cell, 14),
                14,
                "mm",
            )
    return sheet


def draw_matrix(counts, names):
    """A confusion matrix as a picture: rows true, columns predicted, shaded by the row's share.

    counts: whole numbers (classes, classes). They stand in cells that are large enough; names, where there is room for them.
    """
    cell, shares = (
        max(1, min(56, 1000 // len(names))),
        counts / counts.sum(1, keepdims=True).clip(1),
    )
    size, side = min(18, max(10, cell - 4)), cell * len(names)
    names = [shorten(name, 194, size) for name in drawable_names(names)]
    edge = 16 + round(max(map(font(size).getlength, names)))
    image = Image.new("RGB", (edge + max(side + 30, 300), edge + side + 50), "white")
    draw = ImageDraw.Draw(image)
    shades = (255 - shares[..., None] * (255 - np.array(COLOURS[0]))).round().astype("uint8")
    image.paste(
        Image.fromarray(shades).resize((side, side), Image.Resampling.NEAREST), (edge, edge)
    )
    draw.rectangle([edge - 1, edge - 1, edge + side, edge + side], outline=BLACK)
    upwards = ImageFont.TransposedFont(font(size), Image.Transpose.ROTATE_90)
    middles = [edge + (i + 0.5) * cell for i in range(len(names))]
    for middle, name in [*zip(middles, names)][:: math.ceil(12 / cell)]:
        write(draw, (edge - 6, middle), name, size, "rm")
        *_, across, up = upwards.getbbox(name)
        draw.text((middle - across / 2, edge - 6 - up), name, BLACK, upwards)
    for y, x in np.argwhere(counts) if cell >= 24 else ():
        number, ink = str(counts[y, x]), "white" if shares[y, x] > 0.5 else BLACK
        write(
            draw,
            (middles[x], middles[y]),
            number,
            min(size, int(cell * 1.5 / len(number))),
            "mm",
            ink,
        )
    write(draw, (edge, image.height - 24), "rows: true class, columns: predicted class", 14)
    return image
