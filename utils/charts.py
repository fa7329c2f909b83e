"""Pictures that the program draws, with Pillow alone."""
import math
from bisect import bisect
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

COLOURS = ((31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40))
GREY, BLACK = (225, 225, 225), (40, 40, 40)


font = cache(ImageFont.load_default)  # font(size in pixels)


def shorten(text, width, size):
    """`text`, cut with an ellipsis to `width` pixels."""
    measure = font(size).getlength
    if len(text) <= width and measure(text) <= width:
        return text
    return text[:bisect(range(1, min(len(text), width)), width, key=lambda n: measure(text[:n] + "…"))] + "…"


def widest(names, size, limit):
    """Pixels that the longest name takes, at most `limit`."""
    return round(max(min(limit, font(size).getlength(name[:limit])) for name in names))


def ticks(low, high, number=5):
    """Round values from low to high, about `number` of them."""
    raw = (high - low) / number or 1
    power = 10 ** math.floor(math.log10(raw))
    step = power * min((f for f in (1, 2, 5, 10) if f * power >= raw), default=10)
    first = math.ceil(low / step - 1e-9)
    return [round((first + i) * step, 10) for i in range(int((high - first * step) / step + 1e-6) + 1)]


def line_chart(panels, width=640, height=420):
    """Panels side by side, each (title, {name: [(x, y), …]}, (lowest, highest) or None), with axes and legends."""
    image = Image.new("RGB", (width * len(panels), height), "white")
    draw = ImageDraw.Draw(image)
    for number, (title, series, limits) in enumerate(panels):
        points = [p for line in series.values() for p in line if math.isfinite(p[1])]
        xs, ys = [p[0] for p in points] or [0], [p[1] for p in points] or [0]
        x_low, x_high = min(xs), max(max(xs), min(xs) + 1)
        low, high = limits or (min(0, min(ys)), (max(ys) * 1.05) or 1)
        left, top, right, bottom = width * number + 70, 50, width * (number + 1) - 25, height - 55

        def place(x, y):
            return (left + (x - x_low) / (x_high - x_low) * (right - left), bottom - (y - low) / (high - low) * (bottom - top))
        draw.text(((left + right) / 2, 24), title, BLACK, font(20), anchor="mm")
        for y in ticks(low, high):
            draw.line([place(x_low, y), place(x_high, y)], GREY)
            draw.text((left - 8, place(x_low, y)[1]), f"{y:g}", BLACK, font(14), anchor="rm")
        for x in ticks(x_low, x_high, 8):
            if x == int(x):
                draw.text((place(x, low)[0], bottom + 16), f"{x:g}", BLACK, font(14), anchor="mm")
                draw.line([place(x, low), (place(x, low)[0], bottom + 5)], BLACK)
        draw.line([(left, top), (left, bottom), (right, bottom)], BLACK, 2)
        draw.text(((left + right) / 2, height - 18), "epoch", BLACK, font(15), anchor="mm")
        for row, (name, line) in enumerate(series.items()):
            colour = COLOURS[row % len(COLOURS)]
            dots = [place(x, min(max(y, low), high)) for x, y in line if math.isfinite(y)]
            if len(dots) > 1:
                draw.line(dots, colour, 3, joint="curve")
            if len(dots) <= 30:
                for x, y in dots:
                    draw.ellipse([x - 4, y - 4, x + 4, y + 4], colour)
            if line:
                name = f"{name}  (last {line[-1][1]:.4g})"
            y = (top + 14 if not limits else bottom - 14 - 22 * (len(series) - 1)) + 22 * row
            start = right - 30 - font(15).getlength(name)
            draw.rectangle([start - 30, y - 11, right, y + 11], "white")
            draw.line([(start - 26, y), (start - 6, y)], colour, 4)
            draw.text((start, y), name, BLACK, font(15), anchor="lm")
    return image


def contact_sheet(pictures, labels, columns=8, cell=112, caption=18):
    """uint8 (H, W, 3) tensors in a grid, each with one or more caption lines (a string with newlines) under it."""
    lines = max((label.count("\n") + 1 for label in labels), default=1)
    rows = max(1, math.ceil(len(pictures) / columns))
    high = cell + lines * caption + 4
    sheet = Image.new("RGB", (min(columns, max(1, len(pictures))) * (cell + 4), rows * high), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (picture, label) in enumerate(zip(pictures, labels)):
        x, y = i % columns * (cell + 4) + 2, i // columns * high + 2
        picture = ImageOps.contain(Image.fromarray(picture.numpy()), (cell, cell))
        sheet.paste(picture, (x + (cell - picture.width) // 2, y + (cell - picture.height) // 2))
        for row, line in enumerate(label.split("\n")):
            draw.text((x + cell / 2, y + cell + row * caption + caption / 2), shorten(line, cell, 14), BLACK, font(14),
                      anchor="mm")
    return sheet


def first_batch(gen, class_names):
    """The first training pictures as the network will see them, each with its class name."""
    items = [gen.dataset[item] for _, item in zip(range(min(gen.batch_size, 32)), gen.sampler)]
    return contact_sheet([image for image, _, _ in items],
                         [class_names[class_id] for _, class_id, _ in items])


def matrix(counts, names):
    """A confusion matrix as a picture: rows true, columns predicted, shaded by the row's share; 2 to 1,000 classes."""
    number = len(names)
    cell = max(1, min(56, 1000 // number))
    size = min(18, max(10, cell - 4))
    named = cell >= 12  # room for a name beside each row; otherwise every so many rows are numbered
    margin = widest(names, size, 204) + 16 if named else 60
    image = Image.new("RGB", (max(margin + cell * number + 30, margin + 300), margin + cell * number + 50), "white")
    draw = ImageDraw.Draw(image)
    shares = counts / counts.sum(1, keepdims=True).clip(1)
    shades = (255 - shares[..., None] * (255 - np.array(COLOURS[0]))).round().astype("uint8")
    image.paste(Image.fromarray(shades).resize((cell * number, cell * number), Image.Resampling.NEAREST), (margin, margin))
    draw.rectangle([margin - 1, margin - 1, margin + cell * number, margin + cell * number], outline=BLACK)
    for i in (range(number) if named else ticks(0, number - 1, 10)):
        middle = margin + int(i) * cell + cell / 2
        text = shorten(names[int(i)], margin - 10, size) if named else f"{int(i)}"
        draw.text((margin - 6, middle), text, BLACK, font(size if named else 14), anchor="rm")
        label = Image.new("L", (margin, size + 6 if named else 20))
        ImageDraw.Draw(label).text((4, label.height / 2), text, 255, font(size if named else 14), anchor="lm")
        label = label.rotate(90, expand=True)
        image.paste(BLACK, (round(middle - label.width / 2), margin - label.height - 2), label)
    for row, column in np.argwhere(counts) if cell >= 24 else ():
        text, ink = str(counts[row, column]), "white" if shares[row, column] > 0.5 else BLACK
        draw.text((margin + (column + .5) * cell, margin + (row + .5) * cell), text, ink,
                  font(min(size, int(cell * 1.5 / len(text)))), anchor="mm")
    draw.text((margin, image.height - 24), "rows: true class, columns: predicted class", BLACK, font(14), anchor="lm")
    return image


def bars(names, figures):
    """Every class's figures (name → values from 0 to 1) as horizontal bars, in columns of up to 100 classes."""
    rows = min(len(names), 100)
    label = widest(names, 13, 188) + 12
    high, width = 11 * len(figures) + 8, label + 230
    image = Image.new("RGB", (math.ceil(len(names) / rows) * width + 20, rows * high + 50), "white")
    draw = ImageDraw.Draw(image)
    x = 10
    for colour, name in zip(COLOURS, figures):
        draw.rectangle([x, 14, x + 16, 26], colour)
        draw.text((x + 22, 20), name, BLACK, font(14), anchor="lm")
        x += 40 + round(font(14).getlength(name))
    for i, name in enumerate(names):
        left, top = i // rows * width + label + 10, 40 + i % rows * high
        draw.text((left - 6, top + high / 2 - 4), shorten(name, label - 8, 13), BLACK, font(13), anchor="rm")
        for row, (colour, values) in enumerate(zip(COLOURS, figures.values())):
            y = top + 11 * row
            draw.rectangle([left, y, left + 160, y + 9], GREY)
            draw.rectangle([left, y, left + round(160 * values[i]), y + 9], colour)
            draw.text((left + 166, y + 5), f"{values[i]:.3f}", BLACK, font(10), anchor="lm")
    return image
