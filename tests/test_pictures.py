"""What a picture file can be.

Its orientation, its depth, its kind, and what else can be handed over as a picture.
"""

import io
import os
import socket
import struct
import zlib
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, PngImagePlugin

from tests.helpers import command, make_project, make_run
from utils.pictures import centre_box, read_crop
from utils.plumbing.charts import draw_contact_sheet, draw_matrix, shorten
from utils.plumbing.errors import UserError
from utils.plumbing.folders import endings
from utils.plumbing.formats import BROKEN, FORMATS, open_picture, to_rgb, upright
from utils.plumbing.processes import prepare_pillow

XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def seen_size(path, size):
    """(width, height) of the upright picture as read_crop takes it, read to a square of `size`."""
    seen = []
    read_crop(path, (size, size), lambda h, w: seen.append((w, h)) or (0, 0, h, w))
    return seen[0]


def half_red(width, height):
    """Red above, blue below."""
    image = Image.new("RGB", (width, height), "red")
    image.paste("blue", (0, height // 2, width, height))
    return image


def ascii_exif(text):
    """EXIF whose orientation is stored as text."""
    return (
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02"
        + len(text).to_bytes(4, "big")
        + text.ljust(4, b"\0")
        + bytes(4)
    )


ODD_TAGS = (  # orientation 6, and a resolution that is a text: Pillow turns, and keeps the tag
    b"Exif\0\0MM\0*\0\0\0\x08\0\x02\x01\x12\0\x03\0\0\0\x01\0\x06\0\0"
    b"\x01\x1a\0\x02\0\0\0\x0372\0\0" + bytes(4)
)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "RGB"])
def test_tags_that_pillow_cannot_clean(tmp_path, mode):
    """They must not exchange the sides of what is upright already."""
    grey = Image.fromarray(np.arange(800).astype(np.uint8).reshape(20, 40)).convert(mode)
    grey.save(tmp_path / "turned.png", exif=ODD_TAGS)
    grey.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "plain.png")
    seen = []
    for name in ("turned.png", "plain.png"):
        seen.append(read_crop(tmp_path / name, (8, 8), partial(centre_box, (8, 8), 1.0)))
    assert torch.equal(*seen)


@pytest.mark.parametrize("size", [8, 64], ids=["Pillow decodes it", "torchvision decodes it"])
@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif"])
def test_orientation_in_xmp_counts_as_in_pillow(tmp_path, kind, size):
    path = tmp_path / f"photo.{kind}"
    options = dict(xmp=XMP)
    if kind == "png":
        options = dict(pnginfo=PngImagePlugin.PngInfo())
        options["pnginfo"].add_itxt("XML:com.adobe.xmp", XMP.decode())
    elif kind == "tif":
        options = dict(tiffinfo={700: XMP})
    half_red(120, 80).save(path, **options)
    with Image.open(path) as image:
        assert ImageOps.exif_transpose(image).size == (80, 120)
    assert seen_size(path, size) == (80, 120)


@pytest.mark.parametrize("size", [8, 64], ids=["Pillow decodes it", "torchvision decodes it"])
@pytest.mark.parametrize(
    "exif",
    [
        ascii_exif(b"6\0"),
        ascii_exif(b"\0\x06\0\x06"),
        b"Exif\0\0MM\0*\0\0\xff\xff\xff",
        b"Exif\0\0",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x09\0\0" + bytes(4),
    ],
    ids=["text", "bytes of a number", "cut", "empty", "9"],
)
def test_odd_orientations_are_upright(tmp_path, size, exif):
    half_red(120, 80).save(tmp_path / "photo.jpg", exif=exif)
    assert seen_size(tmp_path / "photo.jpg", size) == (120, 80)


@pytest.mark.parametrize("size", [8, 64], ids=["Pillow decodes it", "torchvision decodes it"])
def test_orientation_as_a_long_number(tmp_path, size):
    """Four bytes where two are usual, most significant first."""
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x04\0\0\0\x01\0\0\0\x08" + bytes(4)
    half_red(120, 80).save(tmp_path / "photo.jpg", exif=exif)
    assert seen_size(tmp_path / "photo.jpg", size) == (80, 120)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [16, 64], ids=["Pillow decodes it", "torchvision decodes it"])
@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_boxes_count_in_the_upright_picture(tmp_path, orientation, size, kind):
    """The same box of a picture stored in any of the eight ways is the same crop."""
    rng = np.random.default_rng(0)
    upright = Image.fromarray(rng.integers(0, 256, (12, 18, 3), dtype=np.uint8)).resize(
        (180, 120), Image.Resampling.BICUBIC
    )
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    stored = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / f"photo.{kind}", exif=exif, quality=100, subsampling=0)
    assert seen_size(tmp_path / f"photo.{kind}", size) == (180, 120)
    crop = read_crop(
        tmp_path / f"photo.{kind}", (size, size * 3 // 4), lambda h, w: (40, 30, 64, 48)
    ).float()
    expected = upright.crop((30, 40, 78, 104)).resize(
        (size * 3 // 4, size), Image.Resampling.BILINEAR
    )
    assert crop.shape == (size, size * 3 // 4, 3)
    assert (crop - torch.from_numpy(np.array(expected)).float()).abs().mean() < 4


RAMP = np.tile(np.linspace(0, 1, 64), (64, 1))


def levels(array):
    """uint8 grey levels of an array that was saved as TIFF and read again."""
    file = io.BytesIO()
    Image.fromarray(array).save(file, "TIFF")
    return (
        read_crop(file.getvalue(), array.shape, lambda h, w: (0, 0, h, w))
        .numpy()[..., 0]
        .astype(int)
    )


def test_greys_of_16_bits_keep_their_levels():
    assert np.abs(levels((RAMP * 65535).astype(np.uint16)) - RAMP * 255).max() <= 1


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_greys_of_32_bits_are_refused_by_a_sentence(kind):
    """Nobody can see which number is white."""
    with pytest.raises(OSError, match="32 bits, or a sign: save it with 8 or 16"):
        levels((RAMP * 255).astype(kind))


def test_dark_greys_of_16_bits_stay_dark():
    assert levels(np.full((8, 8), 200, np.uint16)).max() == 1
    pgm = b"P5 8 8 65535\n" + np.full((8, 8), 200, ">u2").tobytes()
    assert read_crop(pgm, (8, 8), lambda h, w: (0, 0, h, w)).max() == 1
    assert read_crop(Image.open(io.BytesIO(pgm)), (8, 8), lambda h, w: (0, 0, h, w)).max() == 1


def png_file(colour, depth, pixels, transparent, width):
    """A PNG of one row, which Pillow itself does not write."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0))
        + chunk(b"tRNS", transparent)
        + chunk(b"IDAT", zlib.compress(b"\0" + pixels))
        + chunk(b"IEND", b"")
    )


def with_chunks(data, *chunks, last=False):
    """A PNG's bytes with further chunks behind its header, or before its end."""
    place = len(data) - 12 if last else 33
    new = b""
    for kind, content in chunks:
        length = struct.pack(">I", len(content))
        new += length + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return data[:place] + new + data[place:]


TEXT = b"x" * 2_000_000
ZIPPED = zlib.compress(TEXT)
HUGE_CHUNKS = [
    (b"tEXt", b"Comment\0" + TEXT),
    (b"zTXt", b"Comment\0\0" + ZIPPED),
    (b"iTXt", b"Comment\0\1\0\0\0" + ZIPPED),
    (b"iTXt", b"Comment\0\0\0\0\0" + TEXT),
    (b"iCCP", b"profile\0\0" + ZIPPED),
]


@pytest.mark.parametrize("last", [False, True], ids=["in front", "at the end"])
@pytest.mark.parametrize(
    "chunk", [*HUGE_CHUNKS, HUGE_CHUNKS[1]], ids=lambda chunk: chunk[0].decode()
)
def test_texts_and_profiles_of_any_size_do_not_hide_a_picture(tmp_path, chunk, last, monkeypatch):
    """The orientation in XMP, also a text, still counts. Elsewhere than in programs of the project
    Pillow's limits hold.
    """
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_CHUNK", 2**20)  # Pillow's own
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_MEMORY", 2**26)
    monkeypatch.setattr("warnings.filterwarnings", lambda *words, **options: None)
    file = io.BytesIO()
    half_red(12, 8).save(file, "PNG")
    xmp = (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)
    data = with_chunks(file.getvalue(), *[chunk] * 40, xmp, last=last)
    with pytest.raises(BROKEN):
        read_crop(data, (12, 8), whole)
    prepare_pillow()
    assert read_crop(data, (12, 8), whole)[0, :, 0].tolist() == [0] * 4 + [255] * 4  # turned
    (tmp_path / "photo.png").write_bytes(data)
    assert read_crop(tmp_path / "photo.png", (12, 8), whole).shape == (12, 8, 3)


@pytest.mark.parametrize("length", range(0, 60))
def test_a_cut_png_is_unreadable_and_no_more(length):
    file = io.BytesIO()
    half_red(12, 8).save(file, "PNG")
    with pytest.raises(BROKEN):
        read_crop(file.getvalue()[:length], (12, 8), whole)


def test_reasons_are_true(tmp_path):
    """A picture of a format that is read is not called one that is not."""
    file = io.BytesIO()
    half_red(12, 8).save(file, "PNG")
    wrong = bytearray(file.getvalue())
    wrong[29] ^= 1  # the header's checksum
    reasons = {"damaged, or of a kind that is not read": bytes(wrong)}
    wrong = bytearray(file.getvalue())
    wrong[wrong.index(b"IDAT") + 10] ^= 1
    reasons["checksum in .*IDAT|broken data stream|truncated|decoding"] = bytes(wrong)
    bands = io.BytesIO()
    Image.new("RGB", (8, 8)).save(bands, "TIFF")
    tiff = bytearray(bands.getvalue())
    place = tiff.find(struct.pack("<HHI", 277, 3, 1)) + 8  # samples a pixel
    assert place > 7 and tiff[place] == 3
    tiff[place] = 7
    damaged = "damaged, or of a kind that is not read"
    for words, data in [*reasons.items(), (damaged, bytes(tiff)), (damaged, b"\xff\xd8\xff\xd9")]:
        with pytest.raises(BROKEN, match=words) as caught:
            read_crop(data, (12, 8), whole)
        assert "none of the formats" not in str(caught.value) and "\n" not in str(caught.value)
        assert "BytesIO" not in str(caught.value)


def test_commands_do_not_print_pillow_s_warnings(tmp_path):
    """Neither from the program's process nor from workers; they name no file."""
    folder = make_project(tmp_path)
    make_run(folder / "logs/run", ["a", "b"])
    cut = b"Exif\0\0MM\0*\0\0\0\x08\0\xff\x01\x12\0\x03"  # 255 tags are announced
    half_red(12, 8).save(folder / "exif.jpg", exif=cut)
    half_red(12, 8).save(folder / "bands.tif")
    tiff = bytearray((folder / "bands.tif").read_bytes())
    tiff[tiff.find(struct.pack("<HHI", 277, 3, 1)) + 8] = 7
    (folder / "bands.tif").write_bytes(tiff)
    for pictures in (["exif.jpg", "bands.tif"], ["exif.jpg"] * 40 + ["bands.tif"] * 40):
        out, err = command(folder, "utils.predict", "run", *pictures, code=1)
        assert out.count("exif.jpg: ") == pictures.count("exif.jpg")
        lines = err.splitlines()
        assert len(lines) == pictures.count("bands.tif")
        assert all(line.startswith("bands.tif: unreadable picture") for line in lines)


def test_a_jpeg_beyond_pillow_s_limit_is_decoded_reduced(tmp_path, monkeypatch):
    """No other format is, and not where all of it is wanted."""
    picture = half_red(480, 320)
    picture.paste("lime", (0, 0, 120, 320))
    picture.save(tmp_path / "photo.jpg", quality=95)
    picture.save(tmp_path / "photo.png")
    picture.save(tmp_path / "progressive.jpg", progressive=True)
    expected = read_crop(picture, (32, 48), whole).float()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 480 * 320 // 5)
    found = read_crop(tmp_path / "photo.jpg", (32, 48), whole).float()
    assert (found - expected).abs().mean() < 12
    monkeypatch.setattr("utils.pictures.decode_jpeg", None)
    with monkeypatch.context() as context:
        context.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as some programs do: no limit
        assert (read_crop(tmp_path / "photo.jpg", (32, 48), whole) - expected).abs().mean() < 12
    for name, size in (("photo.png", 32), ("progressive.jpg", 32), ("photo.jpg", 300)):
        with pytest.raises(Image.DecompressionBombError, match="smaller copy|exceeds limit"):
            read_crop(tmp_path / name, (size, size), whole)


@pytest.mark.parametrize(
    "colour, depth, pixels, transparent",
    [
        (0, 1, b"\x40", b"\0\1"),
        (0, 8, b"\0\x09", b"\0\x09"),
        (2, 8, b"\0\0\0\1\2\3", b"\0\1\0\2\0\3"),
    ],
)
def test_a_transparent_value_is_white(colour, depth, pixels, transparent):
    found = read_crop(
        png_file(colour, depth, pixels, transparent, 2), (1, 2), lambda h, w: (0, 0, h, w)
    )
    assert found[0].tolist() == [[0, 0, 0], [255, 255, 255]]


@pytest.mark.parametrize("kind, white", [(np.uint8, 255), (np.uint16, 65535)])
def test_white_is_zero_is_no_negative(kind, white):
    array = (RAMP * white).astype(kind)
    file = io.BytesIO()
    Image.fromarray(array).save(file, "TIFF")
    data = bytearray(file.getvalue())
    place = data.find(struct.pack("<HHI", 262, 3, 1)) + 8  # Pillow itself would write 8 bits only
    data[place : place + 2] = bytes(2)
    for source in (data, Image.open(io.BytesIO(data))):
        found = read_crop(source, array.shape, whole)
        assert np.abs(found.numpy()[..., 0].astype(int) - (1 - RAMP) * 255).max() <= 1


def whole(height, width):
    return 0, 0, height, width


def test_arrays_and_tensors_are_pictures():
    colours = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    expected = read_crop(Image.fromarray(colours), (20, 30), whole)
    assert (expected.numpy() == colours).all()
    for source in (
        colours,
        torch.from_numpy(colours),
        np.asfortranarray(colours),
        colours[:, ::-1][:, ::-1],
    ):
        assert torch.equal(read_crop(source, (20, 30), whole), expected)
    grey = colours[..., 0]
    for source in (
        grey,
        grey[..., None],
        torch.from_numpy(grey.copy()),
        torch.from_numpy(grey.copy())[..., None],
    ):
        assert (read_crop(source, (20, 30), whole).numpy() == grey[..., None]).all()
    assert read_crop(bytearray(png()), (4, 4), whole).shape == (4, 4, 3)


def png():
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    "source, words",
    [
        (np.zeros((4, 4, 3), np.float32), r"float32 of shape \(4, 4, 3\)"),
        (np.zeros((3, 8, 9), np.uint8), r"uint8 of shape \(3, 8, 9\)"),
        (torch.zeros(3, 8, 9, dtype=torch.uint8), r"uint8 of shape \(3, 8, 9\)"),
        (torch.zeros(8, 9), r"float32 of shape \(8, 9\)"),
        (np.zeros((0, 4), np.uint8), r"uint8 of shape \(0, 4\)"),
        (np.zeros((2, 4, 4, 3), np.uint8), "shape"),
        (None, "NoneType"),
        (3, "int"),
        ([1, 2], "list"),
        (np.zeros((4, 4, 4), np.uint8), r"\(4, 4, 4\)"),
    ],
)
def test_what_is_no_picture_is_said(source, words):
    with pytest.raises(UserError, match=words) as caught:
        read_crop(source, (4, 4), whole)
    assert "(H, W, 3)" in str(caught.value) and "\n" not in str(caught.value)


def test_only_regular_files_are_read(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "fifo.jpg")
    server = socket.socket(socket.AF_UNIX)
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    server.bind("socket.jpg")
    (tmp_path / "link.jpg").symlink_to("fifo.jpg")
    for path in ("fifo.jpg", tmp_path / "link.jpg", "socket.jpg", "/dev/zero", tmp_path):
        with pytest.raises(OSError, match="no regular file"):
            read_crop(path, (4, 4), whole)
    server.close()
    with pytest.raises(FileNotFoundError):
        read_crop(tmp_path / "gone.jpg", (4, 4), whole)


@pytest.mark.parametrize("kind", ["EPS", "PDF", "MPEG", "HDF5", "WMF", "text", "empty", "HEIC"])
def test_other_formats_are_not_opened(tmp_path, monkeypatch, kind):
    """Under any name; for some of them Pillow would start another program."""

    def start(*arguments, **options):
        raise SystemExit("a program is started")

    monkeypatch.setattr("subprocess.Popen", start)
    begin = {
        "MPEG": b"\0\0\1\xb3",
        "HDF5": b"\x89HDF\r\n\x1a\n",
        "WMF": b"\xd7\xcd\xc6\x9a\0\0",
        "text": b"no picture",
        "empty": b"",
        "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    }
    if kind in begin:
        (tmp_path / "cat.jpg").write_bytes(begin[kind] + bytes(100 * (kind != "empty")))
    else:
        Image.new("RGB", (9, 9)).save(tmp_path / "cat.jpg", kind)
    with pytest.raises(OSError, match="empty.*HEIC.*convert it to JPEG") as caught:
        read_crop(tmp_path / "cat.jpg", (4, 4), whole)
    assert "BytesIO" not in str(caught.value)


@pytest.mark.parametrize("kind", [*FORMATS, "MPO"])
def test_formats_are_read_under_any_name(tmp_path, kind):
    if kind not in Image.SAVE and Image.init() and kind not in Image.SAVE:
        pytest.skip("Pillow does not write it")
    Image.new("RGB", (16, 16), (200, 100, 50)).save(tmp_path / "photo.HEIC", kind)
    found = read_crop(tmp_path / "photo.HEIC", (4, 4), whole)
    assert (found.float() - torch.tensor([200.0, 100, 50])).abs().max() < 8


def test_endings():
    assert {".jpg", ".jpeg", ".png", ".webp", ".tif", ".bmp", ".mpo"} < endings()
    assert not {".eps", ".ps", ".pdf", ".mpg", ".h5", ".wmf", ".heic"} & endings()


def test_files_without_an_end_are_not_read(tmp_path):
    with open(tmp_path / "sparse.jpg", "wb") as file:
        file.truncate(2**31 + 1)
    kernel = [
        path
        for path in ("/proc/self/pagemap", "/proc/kmsg", "/proc/kcore", "/proc/self/mem")
        if os.path.exists(path)
    ]
    for path in [tmp_path / "sparse.jpg", *kernel]:
        with pytest.raises(OSError):
            read_crop(path, (4, 4), whole)


def test_an_upright_picture_outlives_its_file(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    half_red(8, 6).save(tmp_path / "photo.png", exif=exif)
    with open_picture(tmp_path / "photo.png") as image:
        seen = upright(image)
    assert seen.size == (6, 8) and seen.getpixel((0, 0)) == (0, 0, 255)


def test_rgb_as_it_is():
    image = Image.new("RGB", (2, 2))
    assert to_rgb(image) is image


@pytest.mark.parametrize("length", [3000, 20_000])
def test_names_of_any_length_are_drawn(length):
    names = ["漢é" * (length // 2), "short"]
    images = [
        draw_matrix(np.eye(2, dtype=int), names),
        draw_contact_sheet([torch.zeros(4, 4, 3, dtype=torch.uint8)], [names[0]]),
    ]
    assert max(max(image.size) for image in images) < 2000
    assert shorten("abc", 100, 14) == "abc"
    short = shorten("a" * 200 + "b" * 200, 60, 14)
    assert len(short) < 20 and short.strip("ab") == "…" and short[0] == "a" and short[-1] == "b"


def test_floats_are_no_picture(tmp_path):
    """Nobody knows which number is white."""
    (tmp_path / "floats.pfm").write_bytes(b"Pf\n2 1\n-1.0\n" + struct.pack("<2f", 0.2, 1.0))
    with pytest.raises(OSError, match="32 bits"):
        read_crop(tmp_path / "floats.pfm", (8, 8), whole)
    (tmp_path / "deep.pgm").write_bytes(b"P5\n2 1\n65535\n\x80\0\xff\xff")
    assert read_crop(tmp_path / "deep.pgm", (1, 2), whole)[0, :, 0].tolist() == [128, 255]
