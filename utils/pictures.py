"""Pictures: which files are read, decoding with cropping, boxes, and normalisation; training and every command share it."""
import errno
import io
import math
import os
from contextlib import suppress
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, UnidentifiedImageError
from torchvision.transforms import RandomResizedCrop

from utils.errors import UserError, plain

# torchvision has announced that its decoders will go; Pillow's does the same, a little slower
decode_jpeg = getattr(getattr(torchvision, "io", None), "decode_jpeg", None)
# What is opened, by content, whatever a file is called. Raster formats that Pillow decodes itself: for some others it starts
# another program. Pillow opens MPO (a JPEG with a second one behind it) as JPEG; TGA has no mark to know it by, so it is last.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "QOI", "PCX", "SGI", "ICO", "TGA")
BROKEN = (OSError, EOFError, SyntaxError, Image.DecompressionBombError)  # what Pillow raises for a file that is no whole picture
REDUCIBLE = ("JPEG", "MPO")  # formats that Pillow can decode at a half, a quarter, an eighth
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as torchvision's weights expect
# What Pillow calls the EXIF orientations from 2 on
TURNS = "FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90"


@cache
def endings():
    """The usual file endings of FORMATS, in lower case with their dot."""
    Image.init()
    return {ending for ending, kind in Image.registered_extensions().items() if kind in (*FORMATS, *REDUCIBLE)}


@cache
def constants(figures, device):
    """255 times each channel's figure, float32 (3, 1, 1): made once, as copying it would make each step wait for a GPU."""
    return 255 * torch.tensor(figures, device=device)[:, None, None]


def normalize(images, device, settings={}):
    """uint8 (N, 3, H, W) from the loader → float32 on `device`, (image / 255 - mean) / std, in the same memory format: the one
    place that does it. settings: train.py's, or nothing for MEAN and STD."""
    images = images.to(device, non_blocking=True).to(torch.float32)
    made = constants.__wrapped__ if torch.compiler.is_compiling() else constants  # a traced tensor is no value to keep
    mean, std = (made(tuple(settings.get(name, usual)), images.device) for name, usual in (("mean", MEAN), ("std", STD)))
    return images.sub_(mean).div_(std)


def to_rgb(image):
    """Any mode that Pillow reads → RGB: greys of more than 8 bits are scaled, transparency is laid on white.

    16 bits are always 0 … 65535, however dark. Of 32 bits white is 1, 255 or 65535: the first whose double no finite value
    reaches, as filters overshoot; beyond them it is the largest value. NaN is black.
    """
    if image.mode.startswith("I") or image.mode == "F":
        raw, white = np.asarray(image, np.float32), 65535
        if image.mode in ("I", "F") and image.format != "PPM":  # whose 16 bits Pillow reads into 32
            peak = raw.max(initial=0, where=np.isfinite(raw))
            white = next((white for white in (1, 255, 65535) if peak < 2 * white), peak)
        grey = raw * (255 / white)
        if getattr(image, "tag_v2", {}).get(262) == 0:  # TIFF's photometric interpretation "white is zero", which Pillow minds
            grey = 255 - grey                           # in 8 bits alone
        grey = np.nan_to_num(grey).clip(0, 255).round()
        grey[raw == image.info.get("transparency", -1)] = 255
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def orientation(image):
    """How a Pillow image's rows and columns lie, 1 … 8, by EXIF's tag 0x0112. All but a JPEG is decoded by this."""
    image.info.pop("xmp", None)  # XMP does not count, but a TIFF would turn itself by it
    if image.format not in REDUCIBLE:
        image.load()
    for key in ("xmp", "XML:com.adobe.xmp"):  # a PNG's may come last
        image.info.pop(key, None)
    value = None
    with suppress(Exception):  # Pillow raises nearly anything for broken tags
        value = image.getexif().get(0x0112)
    return int(value) if value in range(1, 9) else 1


def upright(image, turn):
    """A Pillow image of any mode, whose `orientation` is turn → RGB as seen; it outlives its file."""
    image.load()
    image = to_rgb(image)
    return image.transpose(Image.Transpose[TURNS[turn - 2]]) if turn > 1 else image


def why(error):
    """One line of the reason for an unreadable picture; what the machine lacks is not the picture's fault, and raised again."""
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        raise error
    return plain(f"{type(error).__name__}: {error}")


def file_bytes(path):
    """A regular file's bytes, no more than it says to have: devices have no end, and kernel files without one say 0."""
    size = os.path.getsize(path)
    if size > 2 ** 31 or not os.path.isfile(path):
        raise OSError(f"{os.fspath(path)!r} is no regular file, or larger than 2 GiB")
    with open(path, "rb") as file:
        return file.read(size)


def opened(source):
    """What read_crop takes → a Pillow image, of a file not decoded yet, that may be changed. Raises what read_crop does."""
    if isinstance(source, Image.Image):
        image = source.copy()
        image.format, image.tag_v2 = source.format, getattr(source, "tag_v2", {})
        return image
    data = file_bytes(source) if isinstance(source, (str, os.PathLike)) else source
    if not isinstance(data, (bytes, bytearray, memoryview)):
        return Image.fromarray(pixels(data))
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:  # whose own words name the place of the bytes in memory
        raise UnidentifiedImageError("none of the formats that are read (HEIC, RAW, EPS and SVG are not): convert it to JPEG or "
                                     "PNG" if data else "an empty file") from None
    scale = {"L;2": 85, "L;4": 17, "RGB;16B": 1 / 256}.get(image.format == "PNG" and image.tile[0][3])
    if scale and "transparency" in image.info:  # Pillow scales a PNG's pixels to 8 bits, but not its transparent value
        image.info["transparency"] = np.multiply(image.info["transparency"], scale).astype(int).tolist()
    return image


def pixels(source):
    """A uint8 array or tensor (H, W), (H, W, 1) or (H, W, 3) → an array as Pillow takes it; UserError for anything else."""
    shape, dtype = tuple(getattr(source, "shape", ())), str(getattr(source, "dtype", type(source).__name__))
    if not dtype.endswith("uint8") or 0 in shape or not (len(shape) == 2 or len(shape) == 3 and shape[2] in (1, 3)):
        raise UserError("a picture must be a path, a file's bytes, a Pillow image or a uint8 array of shape (H, W), "
                        f"(H, W, 1) or (H, W, 3), not {dtype}" + (f" of shape {shape}" if shape else ""))
    array = np.asarray(source.cpu() if isinstance(source, torch.Tensor) else source)
    return array[..., 0] if shape[2:] == (1,) else array


def read_crop(source, input_shape, choose_box):
    """Decode a picture and resize the box `choose_box(height, width)` → (top, left, height, width) of it, as it stands upright.

    source: a path, a file's bytes, a Pillow image, or a uint8 array or tensor (H, W), (H, W, 1) or (H, W, 3). Returns uint8
    (H, W, 3) of input_shape. A JPEG is decoded no larger than the crop needs (libjpeg's 1/2, 1/4, 1/8), never smaller.
    UserError: any other source; one of BROKEN: a file that is no whole picture.
    """
    try:
        with opened(source) as image:
            return crop(image, tuple(input_shape), choose_box)
    except (UserError, *BROKEN):
        raise
    except Exception as error:  # Pillow's plugins raise nearly anything for a broken file
        raise OSError(f"{type(error).__name__}: {error}") from error


def crop(image, input_shape, choose_box):
    """read_crop of an opened image."""
    turn, file = orientation(image), getattr(image, "fp", None)
    width, height = image.size[::-1] if turn >= 5 else image.size
    top, left, box_height, box_width = choose_box(height, width)
    if decode_jpeg and file and image.format in REDUCIBLE and turn == 1 and height * width < 16 * math.prod(input_shape):
        # below four times the sides, decoding all of it by torchvision is faster than reducing by Pillow
        with suppress(RuntimeError):  # of a broken file, which Pillow names
            whole = decode_jpeg(torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8), "RGB")
            box = whole.permute(1, 2, 0)[None, top:top + box_height, left:left + box_width].contiguous().permute(0, 3, 1, 2)
            # in channels_last memory, which the decoder wrote, it takes half the time
            return F.interpolate(box, input_shape, mode="bilinear", antialias=True)[0].permute(1, 2, 0)
    shrink = max(1, min(box_height // input_shape[0], box_width // input_shape[1]))
    image.draft(image.mode, (image.width // shrink, image.height // shrink))  # does nothing but to a JPEG
    image = upright(image, turn)
    x, y = image.width / width, image.height / height  # below 1 where the decoder reduced
    box = left * x, top * y, (left + box_width) * x, (top + box_height) * y
    return torch.from_numpy(np.array(image.resize(input_shape[::-1], Image.Resampling.BILINEAR, box=box)))


def centre_box(input_shape, share, height, width):
    """The largest box of input_shape's proportions in the middle, its sides times `share`."""
    scale = min(height / input_shape[0], width / input_shape[1]) * share
    box_height, box_width = (max(1, round(side * scale)) for side in input_shape)
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def random_box(smallest, height, width):
    """Random resized crop ("Going Deeper with Convolutions"): `smallest` to all of the area, proportions 3:4 to 4:3."""
    return RandomResizedCrop.get_params(torch.empty(1, 1, 1).expand(3, height, width), [smallest, 1.0], [3 / 4, 4 / 3])
