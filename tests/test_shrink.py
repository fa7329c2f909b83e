"""Reduced copies of large pictures: what they show, when they are made, what is never touched."""

import errno
import io
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin
from PIL.PngImagePlugin import PngInfo

from tests.helpers import environment
from tests.test_data import photo
from utils.annotation import main as annotate
from utils.pictures import read_crop
from utils.plumbing import shrink
from utils.plumbing.errors import UserError
from utils.plumbing.shrink import shrink_all


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def save(path, image, **options):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def large():
    """Two pictures of each of two classes."""
    for name in ("cat/a", "cat/b", "dog/a", "dog/b"):
        save(f"photos/{name}.jpg", photo(400, 300))


def refuse(words, sentence):
    """Expect a UserError; what its frames hold is freed, as waiting workers end with the loader."""
    with pytest.raises(UserError, match=sentence) as caught:
        annotate(words)
    traceback.clear_frames(caught.tb)


def listed():
    return {
        line.partition(";")[2]
        for name in ("train", "test")
        for line in Path(f"model_data/cls_{name}.txt").read_text().splitlines()
    }


def snapshot(folder):
    return {
        path: (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


def test_copies(capsys):
    """Large pictures of any kind get a copy, small ones stay, unreadable ones are left out.

    A second run does what is new.
    """
    exif = Image.Exif()
    exif[0x0112] = 6
    save("photos/cat/a.JPG", photo(400, 300), exif=exif)
    save("photos/cat/b.png", photo(300, 400, 1).convert("RGBA"))
    save("photos/cat/b.png.jpg", photo(300, 400, 2))
    save(
        "photos/cat/deep er/c.tif",
        Image.fromarray((np.asarray(photo(200, 210).convert("L")).astype(np.uint16) * 257)),
    )
    save("photos/dog/small.jpg", photo(90, 79))
    save("photos/dog/tiny.png", photo(20, 10))
    save("photos/dog/wide.jpg", photo(800, 100))
    Path("photos/dog/cut.jpg").write_bytes(Path("photos/cat/a.JPG").read_bytes()[:9000])
    Path("photos/dog/text.png").write_text("no picture")
    before = snapshot("photos")
    annotate(["photos", "--shrink", "64"])
    assert snapshot("photos") == before
    copies = {
        "cat/a.JPG.jpg": (64, 85),
        "cat/b.png.jpg": (64, 85),
        "cat/b.png.jpg.jpg": (64, 85),
        "cat/deep er/c.tif.jpg": (64, 67),
        "dog/wide.jpg.jpg": (512, 64),
    }
    assert listed() == {f"photos-shrunk-64/{name}" for name in copies} | {
        "photos/dog/small.jpg",
        "photos/dog/tiny.png",
    }
    usual = io.BytesIO()
    photo(64, 64).save(usual, "JPEG", quality=95)
    for name, size in copies.items():
        with Image.open(f"photos-shrunk-64/{name}") as copy:
            assert copy.quantization == Image.open(usual).quantization
            assert JpegImagePlugin.get_sampling(copy) == 0
            assert (
                copy.size == size
                and copy.mode == "RGB"
                and copy.format == "JPEG"
                and copy.getexif().get(0x0112) is None
            )
    original = (
        photo(400, 300)
        .transpose(Image.Transpose.ROTATE_270)
        .resize((64, 85), Image.Resampling.BICUBIC)
    )
    assert (
        np.abs(
            np.asarray(original, float)
            - np.asarray(Image.open("photos-shrunk-64/cat/a.JPG.jpg"), float)
        ).mean()
        < 4
    )
    out = capsys.readouterr().out
    assert (
        "unreadable: photos/dog/cut.jpg" in out
        and "unreadable: photos/dog/text.png" in out
        and "5 of 9 pictures" in out
    )
    assert not [*Path("photos-shrunk-64").rglob(".*")]

    old = snapshot("photos-shrunk-64")
    save("photos/cat/b.png", photo(300, 400, 5))
    save("photos/dog/new.jpg", photo(200, 200))
    os.utime("photos/dog/wide.jpg", ns=(1, 1))  # older than its copy, and yet changed
    annotate(["photos", "--shrink", "64"])
    new = snapshot("photos-shrunk-64")
    changed = {path.as_posix() for path in new if new[path] != old.get(path) and path.suffix}
    assert changed == {
        f"photos-shrunk-64/{name}.jpg" for name in ("cat/b.png", "dog/new.jpg", "dog/wide.jpg")
    }


def test_another_picture_with_the_same_time_and_size():
    for name in ("cat/a", "cat/b", "dog/a", "dog/b"):
        save(f"photos/{name}.bmp", photo(200, 150))
    annotate(["photos", "--shrink", "64"])
    before, old = snapshot("photos-shrunk-64"), os.stat("photos/cat/a.bmp")
    save("new.bmp", photo(200, 150, 7))
    os.utime("new.bmp", ns=(old.st_atime_ns, old.st_mtime_ns))
    os.replace("new.bmp", "photos/cat/a.bmp")
    assert (os.stat("photos/cat/a.bmp").st_mtime_ns, os.path.getsize("photos/cat/a.bmp")) == (
        old.st_mtime_ns,
        old.st_size,
    )
    annotate(["photos", "--shrink", "64"])
    after = snapshot("photos-shrunk-64")
    assert {path.as_posix() for path in after if after[path] != before[path]} == {
        "photos-shrunk-64/cat/a.bmp.jpg"
    }
    shown = np.asarray(Image.open("photos-shrunk-64/cat/a.bmp.jpg"), float)
    assert (
        np.abs(
            shown - np.asarray(photo(200, 150, 7).resize((85, 64), Image.Resampling.BICUBIC), float)
        ).mean()
        < 6
    )


@pytest.mark.parametrize("target", ["cat", "cat/deep", "cat/a.jpg.jpg", "cat/deep/er/c.jpg.jpg"])
def test_links_in_the_copies_folder_lead_nothing_out_of_it(target):
    large()
    save("photos/cat/deep/er/c.jpg", photo(400, 300))
    for name in ("home/a.jpg.jpg", "home/er/c.jpg.jpg"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("mine")
    before, link = snapshot("home"), Path("photos-shrunk-64", target)
    link.parent.mkdir(parents=True)
    link.symlink_to(Path("home/new.jpg" if target.endswith("jpg") else "home").absolute())
    refuse(["photos", "--shrink", "64"], "through a link.*remove")
    assert snapshot("home") == before and len(list(Path("home").rglob("*"))) == 3


def test_class_folders_that_change_places():
    """Renaming a folder changes no file's times, so a copy carries those of its picture."""
    large()
    annotate(["photos", "--shrink", "64"])
    before = {path: Image.open(path).tobytes() for path in listed()}
    os.utime("photos/cat/a.jpg", (1, 1))
    for old, new in (("cat", "away"), ("dog", "cat"), ("away", "dog")):
        os.rename(f"photos/{old}", f"photos/{new}")
    annotate(["photos", "--shrink", "64"])
    for path, pixels in before.items():
        other = path.replace("/cat/", "/x/").replace("/dog/", "/cat/").replace("/x/", "/dog/")
        assert Image.open(other).tobytes() == pixels


def test_what_a_killed_pass_leaves_is_cleared():
    large()
    Path("photos-shrunk-64").mkdir()
    Path("photos-shrunk-64/.copy.abcd.draft").touch()
    Path("photos-shrunk-64/.copy.efgh.draft").touch()
    for path in Path("photos-shrunk-64").iterdir():
        os.utime(path, (0, 0))
    annotate(["photos", "--shrink", "64"])
    assert sorted(os.listdir("photos-shrunk-64")) == ["cat", "dog"]


def test_the_top_of_a_drive_has_no_place_beside_it():
    with pytest.raises(UserError, match="'/' is the top of a drive"):
        shrink_all([], "/", 64)


def test_a_comment_that_is_too_long_for_a_jpeg():
    large()
    text = PngInfo()
    text.add_text("comment", "x" * 70_000, zip=True)
    save("photos/cat/long.png", photo(400, 300), pnginfo=text)
    annotate(["photos", "--shrink", "64"])
    assert "photos-shrunk-64/cat/long.png.jpg" in listed()


def test_another_size_has_another_folder():
    large()
    for size in (64, 32):
        annotate(["photos/", "--shrink", str(size)])
        assert listed() == {
            f"photos-shrunk-{size}/{name}.jpg.jpg" for name in ("cat/a", "cat/b", "dog/a", "dog/b")
        }
        assert Image.open(f"photos-shrunk-{size}/cat/a.jpg.jpg").height == size
    os.chdir("photos")
    annotate([".", "--shrink", "16"])
    assert listed() == {
        str(Path(f"../photos-shrunk-16/{name}.jpg.jpg").resolve())
        for name in ("cat/a", "cat/b", "dog/a", "dog/b")
    }


def test_a_folder_that_cannot_be_made():
    large()
    Path("photos-shrunk-32").write_text("a file")
    refuse(["photos", "--shrink", "32"], "photos-shrunk-32.*link photos")
    refuse(["photos", "--shrink", "-1"], "1 or more")
    assert not os.path.exists("model_data/cls_train.txt")


def test_a_copy_that_cannot_be_written_is_one_sentence():
    large()
    Path("photos-shrunk-64").mkdir()
    Path("photos-shrunk-64/cat").write_text("in the way")
    refuse(["photos", "--shrink", "64"], "photos-shrunk-64/cat/.*could not be written")


def test_small_pictures_are_decoded_as_well(capsys):
    for name in ("cat/a", "cat/b", "dog/a", "dog/b", "cat/c"):
        save(f"photos/{name}.jpg", photo(60, 60, 3))
    Path("photos/cat/c.jpg").write_bytes(Path("photos/cat/c.jpg").read_bytes()[:1200])
    annotate(["photos", "--shrink", "64", "--seed", "1"])
    assert (
        listed() == {f"photos/{name}.jpg" for name in ("cat/a", "cat/b", "dog/a", "dog/b")}
        and "unreadable: photos/cat/c.jpg" in capsys.readouterr().out
    )


def damaged(data):
    """Copies of a JPEG's bytes that decoders read with a warning or not at all: {name: bytes}."""
    middle = len(data) // 2
    return {
        "cut": data[: middle * 3 // 2],
        "zeros": data[:middle] + bytes(40) + data[middle + 40 :],
        "marker": data[:middle] + b"\xff\xd9" + data[middle:],
        "trailing": data[:-2] + bytes(100) + data[-2:],
    }


@pytest.mark.parametrize("words", [["--check"], ["--shrink", "64"]])
def test_damaged_jpegs_are_named(words, capfd):
    """Also those that Pillow reads without a word, and in training libjpeg speaks of without a
    name.
    """
    large()
    for name, data in damaged(Path("photos/cat/a.jpg").read_bytes()).items():
        Path(f"photos/cat/{name}.jpg").write_bytes(data)
    annotate(["photos", *words, "--seed", "1"])
    out, err = capfd.readouterr()
    for name in ("cut", "zeros", "marker", "trailing"):
        assert f"unreadable: photos/cat/{name}.jpg (" in out
    assert "zeros.jpg (OSError: damaged: Corrupt JPEG data: " in out
    assert "JPEG" not in err and len(listed()) == 4
    for name in ("zeros", "trailing"):  # training reads them as far as they go
        seen = read_crop(f"photos/cat/{name}.jpg", (64, 64), lambda *size: (0, 0, *size))
        assert seen.shape == (64, 64, 3)


def test_damage_is_found_where_no_file_can_be_made(monkeypatch):
    def full(*words, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    large()
    data = damaged(Path("photos/cat/a.jpg").read_bytes())["zeros"]
    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    assert shrink.jpeg_warnings(data).startswith("Corrupt JPEG data: ")


def test_copies_that_may_only_be_read(monkeypatch):
    """As those of another user."""
    large()
    annotate(["photos", "--shrink", "64"])
    before = listed()

    def refuse(path, exist_ok=True):
        raise PermissionError(errno.EACCES, "Permission denied")

    shutil.rmtree("model_data")
    os.mkdir("model_data")
    touch = Path.touch
    monkeypatch.setattr(
        Path,
        "touch",
        lambda path, **options: (refuse if "shrunk" in str(path) else touch)(path, **options),
    )
    annotate(["photos", "--shrink", "64"])
    assert listed() == before and "shrunk" in str(before)


def test_pictures_that_are_too_large_for_pillow(monkeypatch, capsys):
    """A JPEG is decoded reduced; of others, and of progressive ones, the limit holds."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)  # 40,000 are refused
    for name in ("cat/a", "cat/b", "dog/a", "dog/b"):
        save(f"photos/{name}.jpg", photo(100, 80))
    save("photos/cat/large.jpg", photo(400, 300))
    save("photos/cat/large progressive.jpg", photo(400, 300), progressive=True)
    save("photos/dog/large.png", photo(400, 300))
    for words, copy in ((["--check"], ""), (["--shrink", "64"], "-shrunk-64")):
        annotate(["photos", *words])
        out = capsys.readouterr().out
        assert (
            f"photos{copy}/cat/large.jpg"
            in {path.removesuffix(".jpg") for path in listed()} | listed()
        )
        assert "unreadable: photos/dog/large.png (DecompressionBombError: " in out
        assert "exceeds limit" in out and "large progressive.jpg (DecompressionBombError" in out
        assert out.count("unreadable") == 2


def test_a_row_that_pillow_s_decoders_cannot_hold(capsys):
    """They call it a lack of memory, which would end the check."""
    large()
    Path("photos/cat/row.ppm").write_bytes(b"P6 100000000 1 255\n" + bytes(9))
    annotate(["photos", "--check", "--seed", "1"])
    assert "unreadable: photos/cat/row.ppm (DecompressionBombError: " in capsys.readouterr().out


def test_a_panorama_whose_copy_would_be_longer_than_a_jpeg_can_be():
    """It is listed as it is."""
    large()
    save("photos/cat/wide.png", Image.new("RGB", (100_000, 20), "red"))
    save("photos/dog/high.png", Image.new("RGB", (20, 90_000), "red"))
    annotate(["photos", "--shrink", "16"])
    assert {"photos/cat/wide.png", "photos/dog/high.png"} < listed()


def test_what_is_wrong_with_a_picture(capsys):
    """Damaged and rare files of a known format are not said to be of another one."""
    large()
    save("photos/cat/sum.png", photo(40, 30))
    data = bytearray(Path("photos/cat/sum.png").read_bytes())
    data[29] ^= 1
    Path("photos/cat/sum.png").write_bytes(data)
    bands = [
        struct.pack("<HHII", tag, kind, 1, value)
        for tag, kind, value in (
            (256, 3, 2), (257, 3, 2), (258, 3, 8), (259, 3, 1), (262, 3, 1),
            (273, 4, 128), (277, 3, 5), (278, 3, 2), (279, 4, 20),
        )
    ]  # fmt: skip
    start = b"II*\0" + struct.pack("<IH", 8, len(bands)) + b"".join(bands)
    Path("photos/cat/bands.tif").write_bytes(start.ljust(128, b"\0") + bytes(20))
    Path("photos/cat/words.jpg").write_text("no picture at all")
    annotate(["photos", "--check", "--seed", "1"])
    out = capsys.readouterr().out
    for name in ("sum.png", "bands.tif", "words.jpg"):
        assert f"{name} (UnidentifiedImageError: it is empty or damaged, or of a kind" in out


def test_stopped_and_continued():
    """Ctrl-C leaves whole copies and no lists; the same command does the rest."""
    save("photos/cat/0.png", Image.effect_noise((2000, 1500), 50), compress_level=1)
    Path("photos/dog").mkdir()
    for i in range(1, 60):
        shutil.copy("photos/cat/0.png", f"photos/{'cat' if i % 2 else 'dog'}/{i}.png")
    Path("two.py").write_text(
        "from utils import annotation\nfrom utils.plumbing import shrink\n"
        "from utils.plumbing.processes import cores\n"
        "shrink.cores = lambda: min(cores(), 2)  # many would be done at once\n"
        "if __name__ == '__main__':\n    annotation.main()\n"
    )
    words = [sys.executable, "two.py", "photos", "--shrink", "32"]
    root = Path(__file__).resolve().parent.parent
    with open("out.txt", "w") as out:
        process = subprocess.Popen(
            words,
            env={**environment(), "PYTHONPATH": str(root)},
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    while len(list(Path("photos-shrunk-32").rglob("*.jpg"))) < 3:
        assert process.poll() is None, Path("out.txt").read_text()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == -signal.SIGINT
    assert Path("out.txt").read_text() == "looking for pictures in photos\n"

    def copies():  # a killed worker may leave its draft, or has moved it a moment ago
        paths = Path("photos-shrunk-32").rglob("*.jpg")
        return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}

    early = copies()
    assert len(early) < 60 and not os.path.exists("model_data/cls_train.txt")
    for path in early:
        Image.open(path).load()
    annotate(words[2:])
    late = copies()
    assert len(listed()) == len(late) == 60 and all(late[path] == early[path] for path in early)
