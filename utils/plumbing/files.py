"""Atomic writing and checked reading: what a run writes is whole, and what it reads is what was written."""

import contextlib
import copy
import io
import os
import pickle
import re
import shutil
import stat
import tempfile
import time
import uuid
import zipfile
import zlib
from pathlib import Path

import torch

from utils.plumbing.errors import UserError

LAST = "last_checkpoint.pth"


@contextlib.contextmanager
def draft(path, folder=False):
    """The path of a new file (or folder) beside `path`, with a name of its own; it is removed unless it was moved away."""
    fresh = Path(path).with_name(f".{Path(path).name}.{uuid.uuid4().hex[:8]}.draft")
    fresh.mkdir() if folder else fresh.touch(exist_ok=False)  # neither goes through a link
    try:
        yield fresh
    finally:
        remove(fresh)


def remove(path):
    with contextlib.suppress(OSError):
        shutil.rmtree(path) if os.path.isdir(path) and not os.path.islink(path) else os.unlink(path)


def clear_drafts(folder):
    """Remove what killed programs have left in a folder: drafts that nobody has written to for ten minutes."""
    for path in Path(folder).glob(".*.draft"):
        with contextlib.suppress(OSError):
            if path.lstat().st_mtime < time.time() - 600:
                remove(path)


def save_file(path, write):
    """write(binary file) on a draft beside `path`, which then takes its place: never half a file, nor through a link."""
    try:
        with draft(path) as fresh:
            with open(fresh, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(fresh, path)
    except OSError as error:
        raise not_written(path, error) from error


def not_written(path, error):
    return UserError(
        f"{path} could not be written ({error.strerror or error}); the files saved before it are intact. "
        f"Free some space or choose another folder (a training continues with resume = True)"
    )


def save_text(path, text):
    save_file(path, lambda file: file.write(text.encode("utf-8")))


def save_image(path, image):
    save_file(path, lambda file: image.save(file, "PNG"))


def on_cpu(state):
    """A nested state with every tensor on the CPU: files must load on a machine without a GPU."""
    if isinstance(state, torch.Tensor):
        return state.detach().cpu()
    if isinstance(state, dict):
        kept = copy.copy(state)  # with a state_dict's version marks
        kept.update((name, on_cpu(value)) for name, value in state.items())
        return kept
    return type(state)(map(on_cpu, state)) if isinstance(state, (list, tuple)) else state


def save_tensors(path, state):
    """torch.save through memory: a full disk then raises OSError instead of aborting inside PyTorch's own writer."""
    memory = io.BytesIO()
    torch.save(on_cpu(state), memory)
    save_file(path, lambda file: file.write(memory.getbuffer()))


def writable(folder, remedy):
    """The folder's Path, made where it is missing; a UserError, before any work, when no file can be written there."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} cannot be written ({getattr(error, 'strerror', None) or error}): {remedy}"
        ) from None
    return Path(folder)


def check_regular(path, name):
    """UserError when `path` is missing, a folder, or nothing that ends when it is read (a pipe, a device)."""
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:
        problem = (
            "does not exist"
            if isinstance(error, FileNotFoundError)
            else f"cannot be read ({error})"
        )
    else:
        whole = (
            stat.S_ISREG(found.st_mode) and found.st_size
        )  # a file of the kernel without an end says that it is empty
        problem = (
            "is a folder, not a file"
            if stat.S_ISDIR(found.st_mode)
            else None
            if whole
            else "is empty, or no regular file"
        )
    if problem:
        raise UserError(f"{name}: {str(path)!r} {problem}")


def load_tensors(path, name="model_path"):
    """Return the dictionary in a file of torch.save, on the CPU.

    UserError, which calls the path `name`: a file that cannot be read, that holds anything that could
    run, or that has changed since it was written.
    """
    check_regular(path, name)
    try:
        check_sums(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        found = f" ({code[1]})" if code else ""
        raise UserError(
            f"{name}: {str(path)!r} is refused: it is no file of weights, or holds code, which is "
            f"never run{found}. Save a plain model.state_dict() with torch.save"
        ) from None
    except Exception as error:  # a broken archive can raise nearly anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(
            f"{name}: {str(path)!r} cannot be read, it may be damaged or cut short ({reason})"
        ) from None
    if not isinstance(state, dict):
        raise UserError(f"{name}: {str(path)!r} holds a {type(state).__name__}, not a state_dict")
    return state


def check_sums(path):
    """Raise BadZipFile where a part of torch's archive has changed since it was written.

    torch writes a CRC-32 of each tensor, and never looks. (Before 1.6 its files were no archives.)
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged:
        raise zipfile.BadZipFile(f"{damaged} has changed since it was written")


def content_sum(paths):
    """Return a CRC-32 of files' sizes and of 4 kB in the middle of each.

    It tells other pictures under the same names, at the cost of one short read each. (Dates would
    change with each copy of a data set.) What is no regular file is passed over.
    """
    total = 0
    for path in filter(os.path.isfile, paths):
        try:
            with open(path, "rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(size // 2)
                sample = file.read(4096)
        except OSError:
            continue
        total = zlib.crc32(sample, zlib.crc32(str(size).encode(), total))
    return f"{total:08x}"
