"""The same work on many pictures on all cores; reduced copies of large ones."""

import os
import sys
from functools import partial
from pathlib import Path

from PIL import Image
from torch.utils.data import DataLoader

from utils.plumbing.console import ProgressLine, say
from utils.plumbing.errors import UserError, printable
from utils.plumbing.files import clear_drafts, draft, not_written, writable
from utils.plumbing.formats import failure_reason, open_picture, orientation, to_rgb, upright
from utils.plumbing.processes import cores, ignore_signals


def attempt(work, item):
    """(item, what `work` makes of it, None or why it cannot be read)"""
    try:
        return item, work(item), None
    except UserError:
        raise
    except Exception as error:  # Pillow's plugins raise nearly anything for a broken file
        return item, None, failure_reason(error)


def on_all_cores(work, items, title):
    """{item: work(item)} of the items that raise nothing; the others are printed. Progress and the time left go to stderr."""
    progress, done = ProgressLine(title, len(items), stream=sys.stderr), {}
    loader = DataLoader(
        items,
        batch_size=None,
        collate_fn=partial(attempt, work),
        worker_init_fn=ignore_signals,
        num_workers=min(cores(), 60, len(items)),
    )
    for number, (item, result, reason) in enumerate(loader, 1):
        if reason:
            progress.clear()
            say(f"unreadable: {printable(item)} ({reason})")
        else:
            done[item] = result
        progress.show(
            number, 1, lambda: f"{number - len(done)} unreadable", due=number == len(items)
        )
    progress.clear()
    return done


def decode(path):
    """The path of a picture that can be decoded; else Pillow's exception."""
    with open_picture(path) as image:
        image.load()
    return path


def reduced_copy(path, datasets, folder, size, drafts):
    """The path to list for a picture: its own, or its copy's where its shorter side is well above `size`.

    The copy is made unless it has the picture's times. Its pixels are what training makes of the picture's: upright,
    transparency on white. A JPEG is decoded at 1/2, 1/4 or 1/8 where that is no smaller than the copy.
    """
    copy, fresh = (
        Path(folder, f"{Path(path).relative_to(datasets)}.jpg"),
        Path(drafts, f"{os.getpid()}.jpg"),
    )
    if not os.path.realpath(copy).startswith(os.path.join(os.path.realpath(folder), "")):
        raise UserError(f"{str(copy)!r} would be written through a link out of {folder}: remove it")
    found = os.stat(
        path
    )  # its second time changes as well when another file takes the picture's place
    made = (found.st_mtime_ns + found.st_ctime_ns) // 2000 * 1000  # file systems keep microseconds
    if copy.exists() and os.stat(copy).st_mtime_ns == made:
        return copy.as_posix()
    with open_picture(path) as image:
        if min(image.size) < 1.25 * size:  # a copy would save less than a third of the pixels
            image.load()
            return path
        turn = orientation(image)
        wide, high = (round(side * size / min(image.size)) for side in image.size)
        image.draft(image.mode, (wide, high))
        small = upright(to_rgb(image).resize((wide, high), Image.Resampling.BICUBIC), turn)
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        small.save(fresh, quality=95, subsampling=0)
        os.utime(fresh, ns=(made, made))
        os.replace(fresh, copy)
    except OSError as error:
        raise not_written(copy, error) from None
    return copy.as_posix()


def shrink(paths, datasets, size):
    """{picture: the path to list} of the readable ones, a copy's where one pays; what is new or changed is copied.

    size: the copies' shorter side; 0: none are made. They lie beside the data set, as in photos-shrunk-512.
    """
    if not size:
        return on_all_cores(decode, paths, "checked")
    base = Path(datasets) if Path(datasets).name not in ("", "..") else Path(datasets).resolve()
    folder = writable(
        base.with_name(f"{base.name}-shrunk-{size}"),
        f"link {base} from a folder with room, and name the link",
    )
    clear_drafts(folder)
    with draft(folder / "copies", folder=True) as drafts:
        work = partial(reduced_copy, datasets=datasets, folder=folder, size=size, drafts=drafts)
        listed = on_all_cores(work, paths, "shrunk")
    say(
        f"{sum(path != copy for path, copy in listed.items())} of {len(paths)} pictures are listed as copies in {folder}"
    )
    return listed
