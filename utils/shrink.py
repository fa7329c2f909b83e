"""The same work on many pictures on all cores; reduced copies of large ones."""
import contextlib
import os
import sys
from functools import partial
from itertools import chain
from pathlib import Path

from PIL import Image
from torch.utils.data import DataLoader

from utils.errors import UserError, plain
from utils.files import clear_drafts, draft, writable
from utils.formats import opened, orientation, to_rgb, upright, why
from utils.processes import ProgressLine, cores, ignore_signals, say

MARK = ".reduced-copies"  # a file that says whose the folder is
PAYS = 1.25  # a copy of less than this times its size would save less than a third of the pixels


class Attempts(partial):
    """A function as a DataLoader's data set, whose indices are the items themselves: processes then share no list of them, which
    would be copied into each, little by little."""

    def __getitem__(self, item):
        """(what it makes of an item, None), or (None, why it cannot be read)."""
        try:
            return self(item), None
        except UserError:
            raise
        except Exception as error:  # Pillow's plugins raise nearly anything for a broken file
            return None, why(error)


def on_all_cores(work, items, title):
    """{item: work(item)} of the items that raise nothing; the others are printed. Progress and the time left go to stderr."""
    progress, done, number = ProgressLine(title, len(items), stream=sys.stderr), {}, 0
    loader = DataLoader(Attempts(work), 1 + min(len(items) // 500, 15), sampler=items, collate_fn=list,  # few: to each its share
                        num_workers=min(cores(), 60, len(items)), worker_init_fn=ignore_signals)
    try:
        for number, ((result, reason), item) in enumerate(zip(chain.from_iterable(loader), items), 1):
            if reason:
                progress.clear()
                say(f"unreadable: {plain(item)} ({reason})")
            else:
                done[item] = result
            progress.show(number, 1, lambda: f"{number - len(done)} unreadable", due=number == len(items))
    except RuntimeError as error:  # the loader's own: what `work` raises is an answer
        raise UserError(f"a process was ended while it read {items[number]!r} or one of the next pictures, most likely for lack of "
                        f"memory: close other programs, or take that picture away, and give the same command again ({error})") from None
    finally:
        say("", end="\n" * progress.terminal, file=sys.stderr)
    return done


def decode(path):
    """The path of a picture that can be decoded; else Pillow's exception."""
    with opened(path) as image:
        image.load()
    return path


def copies_folder(datasets, size):
    """The folder for the copies, beside the data set's: photos-512. UserError where it is not ours, or cannot be made."""
    base = Path(datasets) if Path(datasets).name not in ("", "..") else Path(datasets).resolve()
    folder = writable(base.with_name(f"{base.name}-{size}"), f"link {base} to a place that has room for reduced copies, and name the link")
    if any(folder.iterdir()) and not Path(folder, MARK).exists():
        raise UserError(f"{folder} holds other things than reduced copies: rename it")
    with contextlib.suppress(FileExistsError):
        open(Path(folder, MARK), "x").close()  # which makes nothing through a link
    clear_drafts(folder)
    return folder


def copy_path(path, datasets, folder):
    """Where a picture's copy lies: as in the data set, with .jpg behind other names; never two at one place."""
    name, ending = os.path.splitext(path)
    jpeg = ending.lower() in (".jpg", ".jpeg") and not os.path.splitext(name)[1]
    return Path(folder, Path(path).relative_to(datasets)).as_posix() + ("" if jpeg else ".jpg")


def copy_time(path):
    """The time that a picture's copy gets, ns: another one when the picture is changed, or another takes its place."""
    found = os.stat(path)
    return (found.st_mtime_ns + found.st_ctime_ns) // 2000 * 1000  # file systems keep microseconds


def is_current(path, copy):
    with contextlib.suppress(OSError):
        return copy_time(path) == os.stat(copy).st_mtime_ns and os.path.getsize(copy) > 0


def reduced_copy(path, datasets, folder, size, drafts):
    """Write the copy of a picture whose shorter side is well above `size`; returns the path to list, the copy's or its own.

    Pixels are what training makes of them: upright, transparency on white, colours as stored (an RGB's profile goes along).
    A JPEG is decoded at 1/2, 1/4 or 1/8 where that is no smaller than the copy.
    """
    time = copy_time(path)
    with opened(path) as image:
        if min(image.size) < PAYS * size:
            image.load()
            return path
        profile = image.info.get("icc_profile") if image.mode == "RGB" else None
        turn = orientation(image)
        wide, high = (round(side * size / min(image.size)) for side in image.size)
        image.draft(image.mode, (wide, high))
        small = upright(to_rgb(image).resize((wide, high), Image.Resampling.BICUBIC), turn)
    copy, fresh = Path(copy_path(path, datasets, folder)), Path(drafts, f"{os.getpid()}.jpg")
    if any(place.is_symlink() for place in copy.parents if place.is_relative_to(folder) and place != Path(folder)):
        raise UserError(f"{str(copy)!r} would be written through a link, which may lead anywhere: remove the links in {folder}")
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        small.save(fresh, quality=95, subsampling=0, icc_profile=profile)
        os.utime(fresh, ns=(time, time))
        os.replace(fresh, copy)
    except OSError as error:
        raise UserError(f"{str(copy)!r} could not be written ({error.strerror or error}): make room, then the same command "
                        f"goes on") from None
    return copy.as_posix()


def shrink(paths, datasets, size):
    """{picture: the path to list, its copy's where one pays} of the readable ones; only what is new or changed is done.

    Without a size no copies are made.
    """
    if not size:
        return on_all_cores(decode, paths, "checked")
    folder = copies_folder(datasets, size)
    done = {path: copy for path in paths if is_current(path, copy := copy_path(path, datasets, folder))}
    with draft(folder / "copies", folder=True) as drafts:
        done |= on_all_cores(partial(reduced_copy, datasets=datasets, folder=folder, size=size, drafts=drafts),
                             [path for path in paths if path not in done], "shrunk")
    say(f"{sum(path != listed for path, listed in done.items())} of {len(paths)} pictures are listed as copies in {folder}")
    return done
