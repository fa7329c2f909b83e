"""The same work on many pictures on all cores; reduced copies of large ones."""
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from utils.errors import UserError
from utils.pictures import image_orientation, to_rgb, upright
from utils.workers import stop_workers

MARK = ".reduced-copies"  # a file that says whose the folder is
PAYS = 1.25  # a copy of less than this times its size would save less than a third of the pixels

# Processes are forked from one that has imported everything, where the system can: a new one then costs nothing
CONTEXT = multiprocessing.get_context("forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn")
if CONTEXT.get_start_method() == "forkserver":
    CONTEXT.set_forkserver_preload(["torchvision", __name__])


def begin_worker():
    """Ctrl-C is the parent's to heed, and an orphan would wait for work for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


def attempt(work, items):
    """[(work(item), None) or (None, why not)]; a UserError ends everything."""
    found = []
    for item in items:
        try:
            found.append((work(item), None))
        except UserError:
            raise
        except Exception as error:  # Pillow's plugins raise nearly anything for a broken file
            found.append((None, f"{type(error).__name__}: {error}"))
    return found


class Pool:
    """Processes that do `work`; new ones when one was killed."""

    def __init__(self, work):
        self.work, self.killed = work, 0
        self.renew()

    def renew(self):
        self.executor = ProcessPoolExecutor(mp_context=CONTEXT, initializer=begin_worker)
        if CONTEXT.get_start_method() == "forkserver":  # born deaf to Ctrl-C, as it would speak of it while it imports
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            forkserver.ensure_running()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            CONTEXT.Process(target=int).start()  # returns when all is imported; a worker born after Ctrl-C would complain

    def submit(self, items):
        return self.executor.submit(attempt, self.work, items)

    def alone(self, item):
        """(work(item), None) or (None, why not), while nothing else runs."""
        try:
            found, = self.submit([item]).result()
            self.killed = 0
            return found
        except BrokenProcessPool:
            self.renew()
            self.killed += 1
            if self.killed == 10:
                raise UserError(f"ten pictures in a row ended their processes, the last one {item}: is there memory left?") from None
            return None, "it ended the process that decoded it, most likely for lack of memory"


def results(work, items):
    """Yield (item, work(item), None) or (item, None, why not), in order.

    When a process is killed, all that was under way is done again one by one: so the one whose fault it was is found.
    """
    cores = os.cpu_count() or 1
    size = max(1, min(16, len(items) // (8 * cores)))  # of a parcel, as sending each item costs more than a small picture
    parcels = deque(items[i:i + size] for i in range(0, len(items), size))
    pool, waiting = Pool(work), deque()
    try:
        while parcels or waiting:
            try:
                while parcels and len(waiting) < 4 * cores:
                    waiting.append((parcels[0], pool.submit(parcels[0])))
                    parcels.popleft()
                found = waiting[0][1].result()
            except BrokenProcessPool:
                pool.renew()
                suspects = [item for parcel, _ in waiting for item in parcel]
                waiting.clear()
                yield from ((item, *pool.alone(item)) for item in suspects)
            else:
                yield from ((item, *result) for item, result in zip(waiting.popleft()[0], found))
    finally:
        stop_workers()


def on_all_cores(work, items, title):
    """{item: work(item)} of the items that raise nothing; the others are printed. Progress and the time left go to stderr."""
    terminal, begin, done, bad = sys.stderr.isatty(), time.monotonic(), {}, 0
    clear, shown = "\r\033[K" if terminal else "", begin
    try:
        for number, (item, result, reason) in enumerate(results(work, items), 1):
            if reason:
                bad += 1
                print(f"{clear}unreadable: {item} ({reason})", flush=True)
            else:
                done[item] = result
            now, last = time.monotonic(), number == len(items)
            if last or now - shown > (0.5 if terminal else 30):
                shown, left = now, time.strftime("%H:%M:%S", time.gmtime((now - begin) / number * (len(items) - number)))
                print(f"{clear}{title} {number} of {len(items)}, {bad} unreadable, {left} left", file=sys.stderr, flush=True,
                      end="" if terminal and not last else "\n")
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # an ordinary end, in which multiprocessing clears up
    return done


def decode(path):
    """The path of a picture that can be decoded; else Pillow's exception."""
    with Image.open(path) as image:
        image.load()
    return path


def copies_folder(datasets, size):
    """The folder for the reduced copies, beside the data set's: photos-512. UserError where it is not ours, or cannot be made."""
    base = Path(datasets) if Path(datasets).name not in ("", "..") else Path(datasets).resolve()
    folder = base.with_name(f"{base.name}-{size}")
    try:
        if folder.exists() and any(folder.iterdir()) and not Path(folder, MARK).exists():
            raise UserError(f"{folder} holds other things than reduced copies: rename it")
        folder.mkdir(exist_ok=True)
        Path(folder, MARK).touch()
    except OSError as error:
        raise UserError(f"the reduced copies cannot be written into {folder} ({error.strerror}): link {base} to a place beside "
                        f"which there is room, and name the link") from None
    return folder


def copy_path(path, datasets, folder):
    """Where a picture's copy lies: as in the data set, with .jpg behind a name that does not say so; never two at one place."""
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
        turn = image_orientation(image)
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
        raise UserError(f"{copy} could not be written ({error.strerror or error}): make room, then the same command goes on") from None
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
