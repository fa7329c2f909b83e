"""Pictures: decoding with cropping, boxes, and normalisation, for training, evaluation and prediction alike."""
import io
import math
import os
import stat

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError

from utils.errors import UserError

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # torchvision has announced that its decoders will go; Pillow's does the same, a little slower
    decode_jpeg = None

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as torchvision's weights expect
REDUCIBLE = ("JPEG", "MPO")  # formats that Pillow can decode at a half, a quarter, an eighth
# EXIF orientation: the axes to mirror, after exchanging rows and columns from 5 on
MIRRORS = {1: (), 2: (1,), 3: (0, 1), 4: (0,), 5: (), 6: (1,), 7: (0, 1), 8: (0,)}


def normalize(images, device, settings=None):
    """uint8 (N, 3, H, W) from the loader → float32 on `device`, ImageNet-normalised, in the same memory format: the one place
    that does it."""
    images = images.to(device, non_blocking=True).to(torch.float32)
    mean, std = (255 * torch.stack([torch.full((1, 1), figure, device=images.device) for figure in figures])
                 for figures in (MEAN, STD))  # filled there: copying them would make each step wait for a GPU
    return images.sub_(mean).div_(std)


def to_rgb(image):
    """Any mode that Pillow reads → RGB: greys of more than 8 bits are scaled, transparency is laid on white.

    16 bits are always 0 … 65535, however dark. Of 32-bit whole numbers white is 255 or 65535, of floats 1, 255 or 65535: the
    first whose double no finite value reaches, as filters overshoot; beyond them it is the largest value. NaN is black.
    """
    if image.mode.startswith("I") or image.mode == "F":
        grey, whites = np.asarray(image, np.float32), {"F": (1, 255, 65535), "I": (255, 65535)}.get(image.mode, (65535,))
        whites = (65535,) if image.format == "PPM" else whites  # which Pillow reads into 32 bits
        peak = grey.max(initial=0, where=np.isfinite(grey))
        white = next((white for white in whites if peak < 2 * white or len(whites) == 1), peak)
        grey = np.nan_to_num(grey * (255 / white)).clip(0, 255).round()
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def orientation(image):
    """How a Pillow image's rows and columns lie, 1 … 8; it is decoded by this unless it is a JPEG, and is then of the size that
    counts.

    The rule for every format, size and decoder: EXIF's tag 0x0112 counts where it is a whole number from 1 to 8, everything
    else is 1, upright. XMP does not count.
    """
    for decoded in (False, True):
        for key in ("xmp", "XML:com.adobe.xmp"):
            image.info.pop(key, None)
        if not decoded and image.format not in REDUCIBLE:
            image.load()  # TIFF turns itself, by XMP as well; PNG's tags may come last
    try:
        value = image.getexif().get(0x0112)
    except Exception:  # Pillow raises nearly anything for broken tags
        value = None
    return int(value) if value in range(1, 9) else 1


def upright(pixels, turn):
    """(H, W, 3) as stored → as seen."""
    return (pixels.transpose(0, 1) if turn >= 5 else pixels).flip(MIRRORS[turn])


def contents(source):
    """What read_crop takes → a file's bytes, or a Pillow image that may be changed."""
    if isinstance(source, (str, os.PathLike)):
        if not stat.S_ISREG(os.stat(source).st_mode):  # asked before, as opening a FIFO waits for ever
            raise OSError(f"{os.fspath(source)!r} is no regular file")
        with open(source, "rb") as file:
            return file.read()
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    if isinstance(source, Image.Image):
        image = source.copy()
        image.format = source.format
        return image
    shape, dtype = tuple(getattr(source, "shape", ())), str(getattr(source, "dtype", type(source).__name__))
    if not dtype.endswith("uint8") or 0 in shape or not (len(shape) == 2 or len(shape) == 3 and shape[2] in (1, 3)):
        raise UserError("a picture must be a path, a file's bytes, a Pillow image or a uint8 array of shape (H, W), "
                        f"(H, W, 1) or (H, W, 3), not {dtype}" + (f" of shape {shape}" if shape else ""))
    array = np.asarray(source.cpu() if isinstance(source, torch.Tensor) else source)
    return Image.fromarray(array[..., 0] if shape[2:] == (1,) else array)


def opened(data):
    """A Pillow image of a file's bytes; its error would name the place of the bytes in memory."""
    try:
        return Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        raise UnidentifiedImageError("no picture in a format that Pillow reads") from None


def read_crop(source, input_shape, choose_box):
    """Decode a picture and resize the box that `choose_box(height, width)` → (top, left, height, width) names.

    source: a path, a file's bytes, a Pillow image, or a uint8 array or tensor (H, W), (H, W, 1) or (H, W, 3). The box counts
    in the upright picture's full size. Returns uint8 (H, W, 3) of input_shape. A JPEG is decoded no larger than the crop
    needs (libjpeg's 1/2, 1/4, 1/8), never smaller than input_shape. Raises UserError for any other source, OSError for a path
    that is no regular file, and whatever Pillow raises for a file that is no readable picture.
    """
    def place(height, width):
        """(top, left, height, width) of the box and the size to resize it to, in the file's own rows and columns."""
        sides = (width, height) if turn >= 5 else (height, width)
        top, left, box_height, box_width = choose_box(*sides)
        top = sides[0] - top - box_height if 0 in MIRRORS[turn] else top
        left = sides[1] - left - box_width if 1 in MIRRORS[turn] else left
        return ((left, top, box_width, box_height), input_shape[::-1]) if turn >= 5 else (
            (top, left, box_height, box_width), input_shape)

    source = contents(source)
    with opened(source) if isinstance(source, bytes) else source as image:
        turn, stored, jpeg = orientation(image), image.size, image.format in REDUCIBLE
        (top, left, height, width), shape = place(*stored[::-1])
        if jpeg and decode_jpeg and isinstance(source, bytes) and math.prod(stored) < 16 * math.prod(input_shape):
            try:  # below four times the sides, decoding all of it by torchvision is faster than reducing by Pillow
                pixels = decode_jpeg(torch.frombuffer(bytearray(source), dtype=torch.uint8), ImageReadMode.RGB)
            except RuntimeError:
                pass  # a broken file, which Pillow names
            else:
                crop = pixels.permute(1, 2, 0)[None, top:top + height, left:left + width].contiguous().permute(0, 3, 1, 2)
                # in channels_last memory, which the decoder wrote, it takes half the time
                return upright(F.interpolate(crop, shape, mode="bilinear", antialias=True)[0].permute(1, 2, 0), turn)
        if jpeg:
            shrink = max(1, min(height // shape[0], width // shape[1]))
            image.draft(image.mode, (stored[0] // shrink, stored[1] // shrink))
        image = to_rgb(image)
        x, y = image.width / stored[0], image.height / stored[1]  # below 1 where the decoder reduced
        return upright(torch.from_numpy(np.array(image.resize(shape[::-1], Image.Resampling.BILINEAR, box=(
            left * x, top * y, (left + width) * x, (top + height) * y)))), turn)


def centre_box(input_shape, share, height, width):
    """The largest box of input_shape's proportions in the middle, its sides times `share`."""
    scale = min(height / input_shape[0], width / input_shape[1]) * share
    box_height, box_width = (max(1, round(side * scale)) for side in input_shape)
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def random_box(rng, smallest, height, width):
    """Random resized crop as in torchvision (and "Going Deeper with Convolutions"): `smallest` to all of the area,
    proportions 3:4 to 4:3; in plain numbers, because torchvision's draws of tensors take a twentieth of an item's time."""
    for _ in range(10):
        area = height * width * rng.uniform(smallest, 1)
        proportion = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        box_height, box_width = round(math.sqrt(area / proportion)), round(math.sqrt(area * proportion))
        if 0 < box_height <= height and 0 < box_width <= width:
            return rng.randint(0, height - box_height), rng.randint(0, width - box_width), box_height, box_width
    box_height, box_width = min(height, round(width / (3 / 4))), min(width, round(height * (4 / 3)))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width
