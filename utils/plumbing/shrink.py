"""Decoding all pictures of a list on all cores: finding the damaged ones, making reduced copies."""

import math
import os
import re
import signal
import sys
from functools import partial
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader

from utils.pictures import decode_jpeg
from utils.plumbing.console import ProgressLine, say
from utils.plumbing.errors import UserError, printable
from utils.plumbing.files import clear_drafts, draft, make_folder, move, not_written
from utils.plumbing.formats import REDUCIBLE, failure_reason, open_picture, upright
from utils.plumbing.processes import cores, iterate, prepare_worker

LONGEST = 65500  # pixels of a JPEG's side, libjpeg's limit: what is longer is listed as it is


def attempt(work, item):
    """Return (item, what `work` makes of it, None or why it cannot be read)."""
    try:
        return item, work(item), None
    except UserError:
        raise
    except Exception as error:  # Pillow's plugins raise nearly anything for a broken file
        return item, None, failure_reason(error)


def prepare_stoppable_worker(worker_id):
    """Prepare a worker that SIGTERM ends: the others are sent it when one has died."""
    prepare_worker(worker_id)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def on_all_cores(work, items, title):
    """Return {item: work(item)} of the items that raise nothing, and print the others.

    Progress and the time left go to stderr.
    """
    progress = ProgressLine(title, len(items), stream=sys.stderr)
    results = {}

    def describe():
        return f"{number - len(results)} unreadable"

    loader = DataLoader(
        items,
        batch_size=None,
        collate_fn=partial(attempt, work),
        worker_init_fn=prepare_stoppable_worker,
        num_workers=min(cores(), 60, math.ceil(len(items) / 4)),  # a spawned one imports torch
    )
    for number, (item, result, reason) in enumerate(iterate(loader), 1):
        if reason:
            progress.clear()
            say(f"unreadable: {printable(item)} ({reason})")
        else:
            results[item] = result
        progress.show(number, 1, describe, due=number == len(items))
    progress.clear()
    return results


def jpeg_warnings(data):
    """Return what libjpeg prints about damage while it decodes a JPEG's bytes, or ''.

    Pillow silences it, and what it prints during training names no file. Nothing else may write to
    stderr meanwhile.
    """
    stderr = os.dup(2)
    source, sink = os.pipe()  # a file needs room on a disk; libjpeg prints the first warning alone
    os.dup2(sink, 2)
    try:
        decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    except (RuntimeError, Warning):
        pass  # Pillow says why, or can read it
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(sink)
    with open(source, errors="replace") as printed:
        text = printed.read()
    return ", ".join(re.findall("^(?:Corrupt|Premature|Inconsistent).*", text, re.M))


def check_undamaged(image):
    """Raise OSError for a JPEG that can be decoded, but not as it was. image: not loaded yet."""
    is_jpeg = image.format in REDUCIBLE
    if is_jpeg and decode_jpeg and image.width * image.height < Image.MAX_IMAGE_PIXELS:
        if damage := jpeg_warnings(image.fp.getvalue()):
            raise OSError(f"damaged: {damage}")


def decode(image):
    """Decode an opened image, a JPEG at an eighth. Raises what Pillow does for a broken one."""
    image.draft(image.mode, (1, 1))
    upright(image)


def check(path):
    """Return the path of a picture that can be decoded; raise the reason why another one cannot."""
    with open_picture(path) as image:
        check_undamaged(image)
        decode(image)
    return path


def reduced_copy(path, datasets, folder, size):
    """Return a picture's path, or its copy's where the shorter side is well above `size`.

    The copy is as training sees the picture: upright, laid on white. It is made unless there is one
    with the picture's times.
    """
    name = f"{Path(path).relative_to(datasets)}.jpg"
    copy = folder / name
    if copy.resolve() != folder.resolve() / name:
        raise UserError(f"{str(copy)!r} would be written through a link in {folder}: remove it")
    found = os.stat(path)
    # Another file in the picture's place has another second time; file systems keep microseconds
    time_ns = (found.st_mtime_ns + found.st_ctime_ns) // 2000 * 1000
    if copy.exists() and os.stat(copy).st_mtime_ns == time_ns:
        return copy.as_posix()
    with open_picture(path) as image:
        check_undamaged(image)
        shorter, longer = sorted(image.size)
        saves_a_third = shorter >= 1.25 * size  # of the pixels
        if not saves_a_third or longer * size / shorter > LONGEST:
            decode(image)
            return path
        image.draft(image.mode, (size, size))  # at 1/2, 1/4 or 1/8, no smaller than the copy
        small = ImageOps.cover(upright(image), (size, size))
    save_copy(small, copy, folder, time_ns)
    return copy.as_posix()


def save_copy(image, copy, folder, time_ns):
    """Save a copy, with this time of change."""
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        with draft(folder / "copy") as fresh:
            # without the picture's own comment, which may be too long for a JPEG
            image.save(fresh, "JPEG", quality=95, subsampling=0, comment=b"")
            os.utime(fresh, ns=(time_ns, time_ns))
            move(fresh, copy)
    except OSError as error:
        raise not_written(copy, error) from None


def check_pictures(paths):
    """Return {picture: its path} of the readable ones."""
    return on_all_cores(check, paths, "checked")


def shrink_all(paths, datasets, size):
    """Return {picture: the path to list} of the readable ones: a copy's where one pays.

    size: the copies' shorter side. They lie beside the data set, as in photos-shrunk-512; those
    that are new or changed are made.
    """
    base = Path(datasets) if Path(datasets).name not in ("", "..") else Path(datasets).resolve()
    if not base.name:
        raise UserError(
            f"{datasets!r} is the top of a drive, and copies lie beside the data set: move its "
            f"folders into one, and name that"
        )
    folder = base.with_name(f"{base.name}-shrunk-{size}")
    if not folder.is_dir():  # another user's may be complete
        make_folder(folder, f"link {base} from a folder with room, and name the link")
    clear_drafts(folder)
    work = partial(reduced_copy, datasets=datasets, folder=folder, size=size)
    listed = on_all_cores(work, paths, "shrunk")
    number = sum(path != copy for path, copy in listed.items())
    say(f"{number} of {len(paths)} pictures are listed as copies in {folder}")
    return listed
