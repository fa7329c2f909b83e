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

# What is opened, by content, whatever a file is called: raster formats that Pillow decodes itself,
# as for some others it starts another program. Pillow opens MPO (a JPEG with a second one behind
# it) as JPEG. TGA has no mark to know it by, so it is last.
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
# what Pillow raises for a file that is no whole picture
BROKEN = (OSError, EOFError, SyntaxError, Image.DecompressionBombError)
REDUCIBLE = ("JPEG", "MPO")  # formats that Pillow can decode at a half, a quarter, an eighth
TURNS = {  # EXIF's orientations: what makes the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
ORIENTATION_TEXTS = (b"XML:com.adobe.xmp", b"Raw profile type exif")  # Pillow reads it from these
# by how Pillow decodes a PNG's pixels: it scales them to 8 bits, but not their transparent value
PNG_SCALES = {"L;2": 85, "L;4": 17, "RGB;16B": 1 / 256}


def to_rgb(image):
    """Return an image of any mode as RGB: deep greys are scaled, transparency is laid on white."""
    if image.format in REDUCIBLE:
        check_pixels(image)
    if image.mode.startswith("I") or image.mode == "F":
        return deep_grey_to_rgb(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def deep_grey_to_rgb(image):
    """Return greys of more than 8 bits as RGB; NaN is black."""
    raw = np.asarray(image, np.float32)
    grey = raw * (255 / white_level(image, raw))
    white_is_zero = getattr(image, "tag_v2", {}).get(262) == 0  # TIFF's photometric interpretation
    if white_is_zero:  # Pillow minds it in 8 bits alone
        grey = 255 - grey
    grey = np.nan_to_num(grey).clip(0, 255).round()
    grey[raw == image.info.get("transparency", -1)] = 255
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")


def white_level(image, raw):
    """Return the value that is white in an image of deep greys, raw: float32 (H, W).

    Of 16 bits it is always 65535, however dark the picture. Of 32 bits it is 1, 255 or 65535: the
    first whose double no finite value reaches, as filters overshoot; else the largest value.
    """
    is_32_bits = image.mode in ("I", "F") and image.format != "PPM"  # 16 bits are read into 32
    if not is_32_bits:
        return 65535
    peak = raw.max(initial=0, where=np.isfinite(raw))
    for white in (1, 255, 65535):
        if peak < 2 * white:
            return white
    return peak


def orientation(image):
    """Return how an image's rows and columns lie, 1 … 8, by EXIF's tag 0x0112.

    All but a JPEG is decoded for this: a TIFF turns itself, and a PNG's tags may come last.
    """
    if image.format not in REDUCIBLE:
        image.load()
    with suppress(Exception):  # Pillow raises nearly anything for broken tags
        value = image.getexif().get(0x0112)
        if value in range(1, 9):
            return int(value)
    return 1


def upright_size(image, turn):
    """Return (height, width) of a Pillow image as seen, whose `orientation` is turn."""
    width, height = image.size
    return (width, height) if turn >= 5 else (height, width)


def upright(image, turn):
    """Return a Pillow image of any mode, whose `orientation` is turn, as RGB and as seen."""
    image = to_rgb(image)
    return image.transpose(TURNS[turn]) if turn in TURNS else image


def failure_reason(error):
    """Return in one line why a picture cannot be read.

    Errors of the machine (no memory, too many open files) are raised again: the picture is not to
    blame.
    """
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        raise error
    if isinstance(error, FileNotFoundError):
        return "it does not exist"
    return printable(f"{type(error).__name__}: {error}")


def open_picture(source):
    """Return what read_crop takes as a Pillow image, which the caller may change.

    A file is not decoded yet. Raises what read_crop does.
    """
    if isinstance(source, Image.Image):
        image = source.copy()
        image.format = source.format
        image.tag_v2 = getattr(source, "tag_v2", {})
        return image
    data = source
    if isinstance(source, (str, os.PathLike)):
        size = file_size(source)
        with open(source, "rb") as file:
            data = file.read(size)  # devices have no end, and kernel files without one say 0
    if not isinstance(data, (bytes, bytearray, memoryview)):
        return Image.fromarray(pixels(data))
    image = open_bytes(without_texts(data))
    if image.format == "PNG" and "transparency" in image.info:
        scale = PNG_SCALES.get(image.tile[0][3])
        if scale:
            value = np.multiply(image.info["transparency"], scale)
            image.info["transparency"] = value.astype(int).tolist()
    return image


def open_bytes(data):
    """Return a file's bytes as a Pillow image, not decoded yet.

    A JPEG may be larger than Pillow opens, as it is decoded reduced: to_rgb checks what is left.
    """
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:  # its own words name the place of the bytes in memory
        raise UnidentifiedImageError(explain_unknown(data)) from None
    except Image.DecompressionBombError:
        if bytes(data[:3]) != b"\xff\xd8\xff":
            raise Image.DecompressionBombError(
                f"more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels. Only a JPEG can be decoded at a "
                f"smaller size: save a smaller copy"
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


def without_texts(data):
    """Return a PNG's bytes without its texts and colour profile, other bytes as they are.

    Pillow refuses a whole picture for a megabyte of them. Texts that may hold its orientation stay.
    """
    if bytes(data[:8]) != b"\x89PNG\r\n\x1a\n":
        return data
    parts = [data[:8]]
    place = 8
    while place < len(data):
        end = place + 12 + int.from_bytes(data[place : place + 4], "big")
        kind = bytes(data[place + 4 : place + 8])
        keyword = bytes(data[place + 8 : place + 32]).partition(b"\0")[0]
        if kind not in PNG_TEXTS or keyword in ORIENTATION_TEXTS:
            parts.append(data[place:end])
        place = end
    return b"".join(parts)


def file_size(path):
    """Return the size in bytes of a file that may be a picture; OSError for anything else."""
    size = os.path.getsize(path)
    if size > 2**31 or not os.path.isfile(path):
        raise OSError(
            f"{os.fspath(path)!r} is a folder without pictures, no regular file, "
            f"or larger than 2 GiB"
        )
    return size


@contextmanager
def broken_as_os_error():
    """Raise OSError in place of what else Pillow's plugins raise for a broken file."""
    try:
        yield
    except (UserError, MemoryError, *BROKEN):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def read_size(source):
    """Return (height, width) of what read_crop takes, of a file by its header alone.

    Raises what read_crop does.
    """
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
    """Return a uint8 array or tensor (H, W), (H, W, 1) or (H, W, 3) as an array for Pillow.

    UserError: anything else.
    """
    shape = tuple(getattr(source, "shape", ()))
    dtype = str(getattr(source, "dtype", type(source).__name__))
    is_grey = len(shape) == 2 or shape[2:] == (1,)
    is_colour = len(shape) == 3 and shape[2] == 3
    if not dtype.endswith("uint8") or 0 in shape or not (is_grey or is_colour):
        of_shape = f" of shape {shape}" if shape else ""
        raise UserError(
            "a picture must be a path, a file's bytes, a Pillow image or a uint8 array of shape "
            f"(H, W), (H, W, 1) or (H, W, 3), not {dtype}{of_shape}"
        )
    array = np.asarray(source.cpu() if isinstance(source, torch.Tensor) else source)
    return array[..., 0] if shape[2:] == (1,) else array
