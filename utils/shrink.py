"""The same work on many pictures on all cores; reduced copies of large ones."""
import os
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from utils.errors import UserError
from utils.pictures import orientation, to_rgb, upright
from utils.processes import ProgressLine, ignore_signals, stop_workers
batches_of = iter

MARK = ".reduced-copies"  # a file that says whose the folder is
PAYS = 1.25  # a copy of less than this times its size would save less than a third of the pixels


class Attempts(Dataset):
    """Index → (item, work(item), None), or (item, None, why not)."""

    def __init__(self, work, items):
        self.work, self.items = work, items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        item = self.items[index]
        try:
            return item, self.work(item), None
        except UserError as error:
            return item, None, error
        except Exception as error:  # Pillow's plugins raise nearly anything for a broken file
            return item, None, f"{type(error).__name__}: {error}"


def parcels(work, items, size, workers):
    """Lists of what Attempts gives, in order; UserError at the next one when a worker is killed."""
    return batches_of(DataLoader(Attempts(work, items), size, num_workers=workers, collate_fn=list, worker_init_fn=ignore_signals))


def results(work, items):
    """What Attempts gives, one by one. Whatever was under way when a worker was killed is done again, each alone."""
    cores, at, killed = os.cpu_count() or 1, 0, 0
    size = max(1, min(16, len(items) // (8 * cores)))
    while at < len(items):
        try:
            for parcel in parcels(work, items[at:], size, cores):
                at += len(parcel)
                yield from parcel
        except UserError:
            for item in items[at:at + 2 * cores * size]:  # a loader fetches two parcels for each worker in advance
                try:
                    (found,), = parcels(work, [item], 1, 1)
                    killed = 0
                except UserError:
                    killed += 1
                    if killed == 5:
                        raise UserError(f"five pictures in a row ended their processes, at last {item}: is there memory left?")
                    found = item, None, "it ended the process that read it, most likely for lack of memory"
                at += 1
                yield found


def on_all_cores(work, items, title):
    """{item: work(item)} of the items that raise nothing; the others are printed. Progress and the time left go to stderr."""
    progress, done = ProgressLine(title, len(items), stream=sys.stderr), {}
    try:
        for number, (item, result, reason) in enumerate(results(work, items), 1):
            if isinstance(reason, UserError):
                raise reason
            if reason:
                progress.clear()
                print(f"unreadable: {item} ({reason})", flush=True)
            else:
                done[item] = result
            progress.show(number, 1, lambda: f"{number - len(done)} unreadable", due=number == len(items))
    finally:
        stop_workers()
        print(end="\n" * progress.terminal, file=sys.stderr)
    return done


def decode(path):
    """The path of a picture that can be decoded; else Pillow's exception."""
    with Image.open(path) as image:
        image.load()
    return path


def copies_folder(datasets, size):
    """The folder for the copies, beside the data set's: photos-512. UserError where it is not ours, or cannot be made."""
    base = Path(datasets) if Path(datasets).name not in ("", "..") else Path(datasets).resolve()
    folder = base.with_name(f"{base.name}-{size}")
    try:
        if folder.exists() and any(folder.iterdir()) and not Path(folder, MARK).exists():
            raise UserError(f"{folder} holds other things than reduced copies: rename it")
        folder.mkdir(exist_ok=True)
        Path(folder, MARK).touch()
    except OSError as error:
        raise UserError(f"reduced copies cannot be written into {folder} ({error.strerror}): link {base} to a place that has "
                        f"room for them, and name the link") from None
    return folder


def copy_path(path, datasets, folder):
    """Where a picture's copy lies: as in the data set, with .jpg behind other names; never two at one place."""
    name, ending = os.path.splitext(path)
    jpeg = ending.lower() in (".jpg", ".jpeg") and not os.path.splitext(name)[1]
    return Path(folder, Path(path).relative_to(datasets)).as_posix() + ("" if jpeg else ".jpg")


def is_current(path, copy):
    """A copy has its picture's time, to the nanosecond."""
    try:
        return os.stat(path).st_mtime_ns == os.stat(copy).st_mtime_ns and os.path.getsize(copy) > 0
    except OSError:
        return False


def reduced_copy(path, datasets, folder, size, check, drafts):
    """Write the copy of a picture whose shorter side is well above `size`; returns the path to list, the copy's or its own.

    Pixels are what training makes of them: upright, transparency on white, colours as stored (an RGB's profile goes along).
    A JPEG is decoded at 1/2, 1/4 or 1/8 where that is no smaller than the copy.
    """
    time_ns = os.stat(path).st_mtime_ns
    with Image.open(path) as image:
        if min(image.size) < PAYS * size:
            if check:
                image.load()
            return path
        profile = image.info.get("icc_profile") if image.mode == "RGB" else None
        turn = orientation(image)
        wide, high = (round(side * size / min(image.size)) for side in image.size)
        image.draft(image.mode, (wide, high))
        pixels = torch.from_numpy(np.array(to_rgb(image)))
    small = F.interpolate(pixels.permute(2, 0, 1)[None], (high, wide), mode="bicubic", antialias=True)[0].permute(1, 2, 0)
    copy, draft = copy_path(path, datasets, folder), Path(drafts, f"{os.getpid()}.jpg")
    try:
        os.makedirs(os.path.dirname(copy), exist_ok=True)
        Image.fromarray(upright(small, turn).numpy()).save(draft, quality=95, subsampling=0, icc_profile=profile)
        os.utime(draft, ns=(time_ns, time_ns))
        os.replace(draft, copy)
    except OSError as error:
        raise UserError(f"{copy} could not be written ({error.strerror or error}): make room, then the same command "
                        f"goes on") from None
    return copy


def shrink(paths, datasets, size, check):
    """{picture: the path to list, its copy's where one pays} of the readable ones; only what is new or changed is done."""
    folder = copies_folder(datasets, size)
    done = {path: copy for path in paths if is_current(path, copy := copy_path(path, datasets, folder))}
    with tempfile.TemporaryDirectory(prefix=".drafts", dir=folder, ignore_cleanup_errors=True) as drafts:
        done |= on_all_cores(partial(reduced_copy, datasets=datasets, folder=folder, size=size, check=check, drafts=drafts),
                             [path for path in paths if path not in done], "shrunk")
    print(f"{sum(path != listed for path, listed in done.items())} of {len(paths)} pictures are listed as copies in {folder}")
    return done
