"""Pictures that the program draws, with Pillow alone."""
import math

from PIL import Image, ImageDraw, ImageFont

COLOURS = ((31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40))
GREY, BLACK = (225, 225, 225), (40, 40, 40)


def font(size):
    return ImageFont.load_default(size)


def shorten(text, width, size):
    """`text`, cut with an ellipsis to `width` pixels."""
    measure = font(size).getlength
    if measure(text) <= width:
        return text
    while text and measure(text + "…") > width:
        text = text[:-1]
    return text + "…"


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
    """Pillow pictures in a grid, each with one or more caption lines (a string with newlines) under it."""
    lines = max((label.count("\n") + 1 for label in labels), default=1)
    rows = max(1, math.ceil(len(pictures) / columns))
    high = cell + lines * caption + 4
    sheet = Image.new("RGB", (min(columns, max(1, len(pictures))) * (cell + 4), rows * high), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (picture, label) in enumerate(zip(pictures, labels)):
        x, y = i % columns * (cell + 4) + 2, i // columns * high + 2
        scale = cell / max(picture.size)
        size = [max(1, round(side * scale)) for side in picture.size]
        sheet.paste(picture.resize(size), (x + (cell - size[0]) // 2, y + (cell - size[1]) // 2))
        for row, line in enumerate(label.split("\n")):
            draw.text((x + cell / 2, y + cell + row * caption + caption / 2), shorten(line, cell, 14), BLACK, font(14),
                      anchor="mm")
    return sheet


def first_batch(gen, class_names):
    """The first training pictures as the network will see them, each with its class name."""
    items = [gen.dataset[item] for _, item in zip(range(min(gen.batch_size, 32)), gen.sampler)]
    return contact_sheet([Image.fromarray(image.numpy()) for image, _, _ in items],
                         [class_names[class_id] for _, class_id, _ in items])
