"""Pictures: decoding with cropping, boxes, and normalisation, for training, evaluation and prediction alike."""
import io
import math
import os

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # torchvision has announced that its decoders will go; Pillow's does the same, a little slower
    decode_jpeg = None

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as torchvision's weights expect
FRAME_HEADERS = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # markers of a JPEG that are followed by its size


def normalize(images, device):
    """uint8 (N, 3, H, W) from the loader → float32 on `device`, ImageNet-normalised, in the same memory format: the one place
    that does it."""
    images = images.to(device, non_blocking=True).to(torch.float32)
    mean, std = (255 * torch.stack([torch.full((1, 1), figure, device=images.device) for figure in figures])
                 for figures in (MEAN, STD))  # filled there: copying them would make each step wait for a GPU
    return images.sub_(mean).div_(std)


def to_rgb(image):
    """Any mode that Pillow reads → RGB: 16-bit and float greys are scaled, transparency is laid on white."""
    if image.mode.startswith("I") or image.mode == "F":
        grey = np.asarray(image, np.float32)
        if image.mode != "F":
            grey = grey / 257  # 65535 → 255
        elif grey.max() <= 1:
            grey = grey * 255
        return Image.fromarray(grey.clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def jpeg_pixels(source):
    """Height times width in a JPEG's frame header (ITU-T T.81, B.2.2), infinite where there is none.

    Pillow would say it too, but opening a picture to choose its decoder takes a twentieth of a small one's time.
    """
    if not isinstance(source, bytes) or not source.startswith(b"\xff\xd8"):
        return math.inf
    at = 2
    while at + 9 <= len(source) and source[at] == 0xFF:  # segments: 0xFF, a marker, the length of the rest
        if source[at + 1] in FRAME_HEADERS:
            return int.from_bytes(source[at + 5:at + 7], "big") * int.from_bytes(source[at + 7:at + 9], "big")
        at += 2 + int.from_bytes(source[at + 2:at + 4], "big")
    return math.inf


def read_crop(source, input_shape, choose_box):
    """Decode a picture and resize the box that `choose_box(height, width)` → (top, left, height, width) names.

    source: a path, the file's bytes, or a Pillow image. Returns uint8 (H, W, 3). EXIF orientation is applied before
    the box is chosen. Large JPEGs are decoded no larger than the crop needs (libjpeg's 1/2, 1/4, 1/8), never smaller
    than input_shape. Raises whatever Pillow raises for a file that is no readable picture.
    """
    if isinstance(source, (str, os.PathLike)):
        with open(source, "rb") as file:
            source = file.read()
    if decode_jpeg and jpeg_pixels(source) < 16 * input_shape[0] * input_shape[1]:
        try:  # below four times the sides, decoding all of it by torchvision is faster than reducing by Pillow
            pixels = decode_jpeg(torch.frombuffer(bytearray(source), dtype=torch.uint8), ImageReadMode.RGB,
                                 apply_exif_orientation=True)
        except RuntimeError:
            pass  # a broken file, which Pillow names
        else:
            top, left, height, width = choose_box(*pixels.shape[1:])
            crop = pixels.permute(1, 2, 0)[None, top:top + height, left:left + width].contiguous().permute(0, 3, 1, 2)
            # in channels_last memory, which the decoder wrote, it takes half the time
            return F.interpolate(crop, input_shape, mode="bilinear", antialias=True)[0].permute(1, 2, 0)
    with source.copy() if isinstance(source, Image.Image) else Image.open(io.BytesIO(source)) as image:
        reducible = image.format in ("JPEG", "MPO")
        if reducible:
            turned = image.getexif().get(0x0112, 1) >= 5  # by a quarter: the sides change places
            sides = image.size[::-1] if turned else image.size
            box = choose_box(*sides[::-1])
            shrink = max(1, min(box[2] // input_shape[0], box[3] // input_shape[1]))
            image.draft(image.mode, (image.width // shrink, image.height // shrink))
        ImageOps.exif_transpose(image, in_place=True)
        image = to_rgb(image)
        if not reducible:
            sides, box = image.size, choose_box(image.height, image.width)
        top, left, height, width = box
        x, y = image.width / sides[0], image.height / sides[1]  # below 1 where the decoder reduced
        return torch.from_numpy(np.array(image.resize(input_shape[::-1], Image.Resampling.BILINEAR, box=(
            left * x, top * y, (left + width) * x, (top + height) * y))))


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
