"""Picture files: which formats are read, and any of them as an upright RGB image."""

import io
import math
import os
from contextlib import contextmanager, suppress

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from utils.plumbing.errors import USED_UP, UserError, printable

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


def upright(image):
    """Return a Pillow image of any mode as RGB and as seen. It may change the image."""
    # Pillow opens nothing larger, but open_bytes does
    most = 2 * (Image.MAX_IMAGE_PIXELS or math.inf)
    too_many = image.format in REDUCIBLE and image.width * image.height > most
    if too_many or image.width > 3e7:  # Pillow's decoders call a longer row a lack of memory
        raise Image.DecompressionBombError(
            f"{image.width} × {image.height} pixels are too many for memory: save a smaller copy"
        )
    image.load()
    with suppress(Exception):  # Pillow raises nearly anything for broken tags
        ImageOps.exif_transpose(image, in_place=True)
    return to_rgb(image)


def to_rgb(image):
    """Return an image of any mode as RGB: greys of 16 bits are scaled, transparency becomes white.

    As in Pillow, a transparent colour of a PNG of 2, 4 or 16 bits counts as any other colour.
    """
    if image.mode.startswith("I") or image.mode == "F":
        return deep_grey_to_rgb(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def deep_grey_to_rgb(image):
    """Return greys of 16 bits as RGB: 65535 is white, however dark the picture.

    OSError: greys of 32 bits, as nobody can see which number is white.
    """
    # Pillow reads a PPM's 16 bits into 32
    is_32_bits = image.mode == "F" or (image.mode == "I" and image.format != "PPM")
    if is_32_bits:
        raise OSError("its greys have 32 bits, or a sign: save it with 8 or 16 bits and no sign")
    grey = np.asarray(image, np.float32) / 257
    white_is_zero = getattr(image, "tag_v2", {}).get(262) == 0  # TIFF's photometric interpretation
    if white_is_zero:  # Pillow minds it in 8 bits alone
        grey = 255 - grey
    return Image.fromarray(grey.round().astype(np.uint8)).convert("RGB")


def orientation(image):
    """Return how an opened JPEG's rows and columns lie, 1 … 8, by EXIF's tag 0x0112."""
    with suppress(Exception):  # Pillow raises nearly anything for broken tags
        value = image.getexif().get(0x0112)
        if value in range(1, 9):
            return int(value)
    return 1


def seen_size(image):
    """Return (height, width) of an opened JPEG as it is seen."""
    return image.size if orientation(image) >= 5 else image.size[::-1]


def failure_reason(error):
    """Return in one line why a picture cannot be read.

    Errors of the machine (no memory, too many open files) are raised again: the picture is not to
    blame.
    """
    out_of_files = isinstance(error, OSError) and error.errno in USED_UP
    if out_of_files or isinstance(error, MemoryError):
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
        if hasattr(source, "tag_v2"):  # TIFF: whether white is zero
            image.tag_v2 = source.tag_v2
        return image
    data = source
    if isinstance(source, (str, os.PathLike)):
        size = file_size(source)
        with open(source, "rb") as file:
            data = file.read(size)  # devices have no end, and kernel files without one say 0
    if not isinstance(data, (bytes, bytearray, memoryview)):
        return Image.fromarray(pixels(data))
    return open_bytes(data)


def open_bytes(data):
    """Return a file's bytes as a Pillow image, not decoded yet.

    A JPEG may be larger than Pillow opens, as it is decoded reduced: `upright` checks what is left.
    """
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:  # its own words name the place of the bytes in memory
        raise UnidentifiedImageError(
            "it is empty or damaged, or of a kind that is not read, as HEIC, RAW, EPS and SVG: "
            "convert it to JPEG or PNG"
        ) from None
    except Image.DecompressionBombError:
        if bytes(data[:3]) != b"\xff\xd8\xff":
            raise
        image = JpegImageFile(io.BytesIO(data))
        if image.info.get("progressive"):  # its decoder holds all of it, whatever it gives
            raise
        return image


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
    """Return (height, width) of what read_crop takes, undecoded. Raises what read_crop does."""
    with broken_as_os_error():
        image = open_picture(source)
        # only a JPEG has its orientation in front of the pixels for certain
        return seen_size(image) if image.format in REDUCIBLE else image.size[::-1]


def pixels(source):
    """Return a uint8 array or tensor (H, W), (H, W, 1) or (H, W, 3) as an array for Pillow.

    UserError: anything else.
    """
    shape = tuple(getattr(source, "shape", ()))
    dtype = str(getattr(source, "dtype", type(source).__name__))
    is_picture = len(shape) == 2 or shape[2:] in ((1,), (3,))
    if not dtype.endswith("uint8") or 0 in shape or not is_picture:
        raise UserError(
            "a picture must be a path, a file's bytes, a Pillow image or a uint8 array of shape "
            f"(H, W), (H, W, 1) or (H, W, 3), not {dtype} of shape {shape}"
        )
    array = np.asarray(source.cpu() if isinstance(source, torch.Tensor) else source)
    return array[..., 0] if shape[2:] == (1,) else array
