"""Picture files: which formats are read, and any of them as an upright RGB image."""

import errno
import io
import math
import os
from contextlib import contextmanager, suppress

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from utils.plumbing.errors import UserError, printable

# What is opened, by content, whatever a file is called. Raster formats that Pillow decodes itself: for some others it starts
# another program. Pillow opens MPO (a JPEG with a second one behind it) as JPEG; TGA has no mark to know it by, so it is last.
FORMATS = (
    "JPEG",
    "PNG",
    "WEBP",
    "GIF",
    "BMP",
    "TIFF",
    "PPM",
    "JPEG2000",
    "AVIF",
    "QOI",
    "PCX",
    "SGI",
    "ICO",
    "TGA",
)
BROKEN = (
    OSError,
    EOFError,
    SyntaxError,
    Image.DecompressionBombError,
)  # what Pillow raises for a file that is no whole picture
REDUCIBLE = ("JPEG", "MPO")  # formats that Pillow can decode at a half, a quarter, an eighth
# What Pillow calls the EXIF orientations from 2 on
TURNS = (
    "FLIP_LEFT_RIGHT",
    "ROTATE_180",
    "FLIP_TOP_BOTTOM",
    "TRANSPOSE",
    "ROTATE_270",
    "TRANSVERSE",
    "ROTATE_90",
)


def to_rgb(image):
    """Any mode that Pillow reads → RGB: greys of more than 8 bits are scaled, transparency is laid on white.

    16 bits are always 0 … 65535, however dark. Of 32 bits white is 1, 255 or 65535: the first whose double no finite value
    reaches, as filters overshoot; beyond them it is the largest value. NaN is black.
    """
    if image.format in REDUCIBLE:
        check_pixels(image)
    if image.mode.startswith("I") or image.mode == "F":
        raw, white = np.asarray(image, np.float32), 65535
        if image.mode in ("I", "F") and image.format != "PPM":  # whose 16 bits Pillow reads into 32
            peak = raw.max(initial=0, where=np.isfinite(raw))
            white = next((white for white in (1, 255, 65535) if peak < 2 * white), peak)
        grey = raw * (255 / white)
        if (
            getattr(image, "tag_v2", {}).get(262) == 0
        ):  # TIFF's photometric interpretation "white is zero", which Pillow minds
            grey = 255 - grey  # in 8 bits alone
        grey = np.nan_to_num(grey).clip(0, 255).round()
        grey[raw == image.info.get("transparency", -1)] = 255
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def orientation(image):
    """How a Pillow image's rows and columns lie, 1 … 8, by EXIF's tag 0x0112; all but a JPEG is decoded for this."""
    if image.format not in REDUCIBLE:
        image.load()  # a TIFF turns itself, and a PNG's tags may come last
    with suppress(Exception):  # Pillow raises nearly anything for broken tags
        value = image.getexif().get(0x0112)
        return int(value) if value in range(1, 9) else 1
    return 1


def upright_size(image, turn):
    """Return (height, width) of a Pillow image as seen, whose `orientation` is turn."""
    width, height = image.size
    return (width, height) if turn >= 5 else (height, width)


def upright(image, turn):
    """A Pillow image of any mode, whose `orientation` is turn → RGB as seen."""
    image = to_rgb(image)
    return image.transpose(Image.Transpose[TURNS[turn - 2]]) if turn > 1 else image


def failure_reason(error):
    """One line of the reason for an unreadable picture; what the machine lacks is not the picture's fault, and raised again."""
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        raise error
    if isinstance(error, FileNotFoundError):
        return "it does not exist"
    return printable(f"{type(error).__name__}: {error}")


def open_picture(source):
    """What read_crop takes → a Pillow image, of a file not decoded yet, that may be changed. Raises what read_crop does."""
    if isinstance(source, Image.Image):
        image = source.copy()
        image.format, image.tag_v2 = source.format, getattr(source, "tag_v2", {})
        return image
    data = source
    if isinstance(source, (str, os.PathLike)):
        size = file_size(source)
        with open(source, "rb") as file:
            data = file.read(size)  # devices have no end, and kernel files without one say 0
    if not isinstance(data, (bytes, bytearray, memoryview)):
        return Image.fromarray(pixels(data))
    image = open_bytes(data)
    scale = {"L;2": 85, "L;4": 17, "RGB;16B": 1 / 256}.get(
        image.format == "PNG" and image.tile[0][3]
    )
    if (
        scale and "transparency" in image.info
    ):  # Pillow scales a PNG's pixels to 8 bits, but not its transparent value
        image.info["transparency"] = (
            np.multiply(image.info["transparency"], scale).astype(int).tolist()
        )
    return image


def open_bytes(data):
    """Return Pillow's image of a file's bytes, not decoded yet.

    A JPEG may be larger than Pillow opens, as it is decoded reduced: to_rgb minds what is left.
    """
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:  # its own words name the place of the bytes in memory
        raise UnidentifiedImageError(explain_unknown(data)) from None
    except Image.DecompressionBombError as error:
        if bytes(data[:3]) != b"\xff\xd8\xff":
            raise Image.DecompressionBombError(
                f"{error} Only a JPEG can be decoded at a smaller size: save a smaller copy"
            ) from None
        image = JpegImageFile(io.BytesIO(data))
        if image.info.get("progressive"):  # its decoder holds all of it, whatever it gives
            check_pixels(image, 2)
        return image


def check_pixels(image, times=1):
    """Raise DecompressionBombError above so many times the number of pixels that Pillow opens."""
    if image.width * image.height > 2 * times * (Image.MAX_IMAGE_PIXELS or math.inf):
        raise Image.DecompressionBombError(
            f"{image.width} × {image.height} pixels are too many for memory: save a smaller copy"
        )


def explain_unknown(data):
    """Return why Pillow cannot open a file's bytes, as the opener of their first ones says it."""
    if not data:
        return "an empty file"
    for kind in FORMATS:
        opener, accepts = Image.OPEN[kind]
        if accepts and accepts(bytes(data[:16])) is True:
            try:
                opener(io.BytesIO(data), "")
            except Exception as error:  # Pillow's plugins raise nearly anything for a broken file
                bands = ", as of unusual bands" if kind == "TIFF" else ""
                return f"a damaged {kind}, or of a kind that is not read ({error}{bands})"
    return (
        "none of the formats that are read (HEIC, RAW, EPS and SVG are not): convert it to JPEG or "
        "PNG"
    )


def file_size(path):
    """Return the size in bytes of a file that may be a picture; OSError for anything else."""
    size = os.path.getsize(path)
    if size > 2**31 or not os.path.isfile(path):
        raise OSError(
            f"{os.fspath(path)!r} is a folder without pictures, no regular file, or larger than 2 GiB"
        )
    return size


@contextmanager
def broken_as_os_error():
    """Raise OSError in place of what else Pillow's plugins raise for a broken file: nearly anything."""
    try:
        yield
    except (UserError, MemoryError, *BROKEN):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def read_size(source):
    """Return (height, width) of what read_crop takes, of a file by its header alone. Raises what read_crop does."""
    with broken_as_os_error():
        if not isinstance(source, (str, os.PathLike)):
            image = open_picture(source)
            return image.height, image.width
        file_size(source)
        with Image.open(source, formats=FORMATS) as image:
            # only a JPEG has its orientation in front of the pixels for certain
            turn = orientation(image) if image.format in REDUCIBLE else 1
            return upright_size(image, turn)


def pixels(source):
    """A uint8 array or tensor (H, W), (H, W, 1) or (H, W, 3) → an array as Pillow takes it; UserError for anything else."""
    shape, dtype = (
        tuple(getattr(source, "shape", ())),
        str(getattr(source, "dtype", type(source).__name__)),
    )
    if (
        not dtype.endswith("uint8")
        or 0 in shape
        or not (len(shape) == 2 or len(shape) == 3 and shape[2] in (1, 3))
    ):
        raise UserError(
            "a picture must be a path, a file's bytes, a Pillow image or a uint8 array of shape (H, W), "
            f"(H, W, 1) or (H, W, 3), not {dtype}" + (f" of shape {shape}" if shape else "")
        )
    array = np.asarray(source.cpu() if isinstance(source, torch.Tensor) else source)
    return array[..., 0] if shape[2:] == (1,) else array
