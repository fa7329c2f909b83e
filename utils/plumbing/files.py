"""Write files whole and read them checked: what a run reads is what was written."""

import contextlib
import copy
import io
import json
import os
import pickle
import re
import shutil
import time
import uuid
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from utils.plumbing.errors import UserError, hint

LAST = "last_checkpoint.pth"


@contextlib.contextmanager
def draft(path, folder=False):
    """Yield the path of a new file or folder beside `path`; it is removed unless moved away."""
    fresh = Path(path).with_name(f".{Path(path).name}.{uuid.uuid4().hex[:8]}.draft")
    if folder:
        fresh.mkdir()
    else:
        fresh.touch(exist_ok=False)  # not through a link
    try:
        yield fresh
    finally:
        remove(fresh)


def remove(path):
    """Remove a file, a link or a folder with all that is in it, if it is there."""
    with contextlib.suppress(OSError):
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            os.unlink(path)


def discard(path):
    """Remove a file, if it is there. UserError: it cannot be removed, as on Windows an open one."""
    try:
        Path(path).unlink(missing_ok=True)
    except OSError as error:
        raise not_written(path, error) from error


def clear_drafts(folder):
    """Remove drafts of killed programs from a folder: those not written to for ten minutes."""
    for path in Path(folder).glob(".*.draft"):
        with contextlib.suppress(OSError):
            if path.lstat().st_mtime < time.time() - 600:
                remove(path)


def save_file(path, data):
    """Write bytes to a draft beside `path`, then move it into place: nobody reads half a file."""
    try:
        with draft(path) as fresh:
            with open(fresh, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            move(fresh, path)
    except OSError as error:
        raise not_written(path, error) from error


def move(fresh, path):
    """Move a file or folder into place. Windows refuses while another program has one open."""
    for _ in range(100 if os.name == "nt" else 0):
        with contextlib.suppress(PermissionError):
            os.replace(fresh, path)
            return
        time.sleep(0.1)
    os.replace(fresh, path)


def not_written(path, error):
    """Return the UserError for a file that could not be written."""
    return UserError(
        f"{path} could not be written ({error.strerror or error}); the files saved before it are "
        f"intact. Free some space, close the program that has it open, or choose another folder (a "
        f"training goes on with resume = True)"
    )


def save_text(path, text):
    """Save a text in UTF-8."""
    save_file(path, text.encode("utf-8"))


def save_image(path, image):
    """Save a Pillow image as PNG."""
    memory = io.BytesIO()
    image.save(memory, "PNG")
    save_file(path, memory.getbuffer())


def save_tensors(path, state):
    """Save a state with torch.save, with every tensor on the CPU.

    It goes through memory: on a full disk PyTorch's own writer would abort the program.
    """
    memory = io.BytesIO()
    torch.save(on_cpu(state), memory)
    save_file(path, memory.getbuffer())


def on_cpu(state):
    """Return a nested state with every tensor on the CPU: it must load where there is no GPU."""
    if isinstance(state, torch.Tensor):
        return state.detach().cpu()
    if isinstance(state, dict):
        moved = copy.copy(state)  # with a state_dict's version marks
        for name, value in state.items():
            moved[name] = on_cpu(value)
        return moved
    if isinstance(state, (list, tuple)):
        return type(state)(map(on_cpu, state))
    # a fork's numpy numbers would be refused when it is loaded
    return state.tolist() if isinstance(state, (np.generic, np.ndarray)) else state


def as_json(settings):
    """Return settings as they read in config.json, the same in every process."""
    return json.loads(json.dumps(settings, default=as_list_or_text, skipkeys=True))


def as_list_or_text(value):
    """Return what stands in config.json for a value that JSON does not have."""
    if isinstance(value, (set, frozenset)):  # in an order of its own in each process
        return sorted(str(as_list_or_text(item)) for item in value)
    if hasattr(value, "tolist") and not isinstance(value, type):
        return value.tolist()
    return re.sub(" at 0x[0-9a-fA-F]+", "", str(value))  # an object's address


def make_folder(folder, remedy):
    """Make a folder if it is missing, and return its Path. UserError: it cannot be written."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with draft(Path(folder, "trial")):  # tempfile would try for hours on Windows
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{folder} cannot be written ({reason}): {remedy}") from None
    return Path(folder)


def check_regular(path, name):
    """Raise UserError for a path that is missing, a folder, or endless (a pipe, a device)."""
    problem = None
    if os.path.isdir(path):
        problem = "is a folder, not a file"
    elif not os.path.exists(path):
        problem = "does not exist"
    # a file of the kernel without an end reports that it is empty
    elif not os.path.isfile(path) or os.path.getsize(path) == 0:
        problem = "is empty, or no regular file"
    if problem:
        raise UserError(f"{name}: {str(path)!r} {problem}{hint(path)}")


def load_tensors(path, name="model_path"):
    """Return the dictionary in a file of torch.save, on the CPU.

    UserError, which calls the path `name`: a file that cannot be read, that holds anything that can
    run, or that has changed since it was written.
    """
    check_regular(path, name)
    try:
        check_sums(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{name}: {str(path)!r} is refused: it is no file of weights, or holds code, which is "
            f"never run. Save a plain model.state_dict() with torch.save"
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
    paths = iter(paths)
    with ThreadPoolExecutor(32) as pool:  # a network disk answers many questions at a time
        while some := list(islice(paths, 4096)):  # the others would wait in memory
            for sample in pool.map(size_and_middle, some):
                total = zlib.crc32(sample, total)
    return f"{total:08x}"


def size_and_middle(path):
    """Return a file's size and 4 kB in its middle as bytes, b"" of what is no regular file."""
    with contextlib.suppress(OSError):
        if os.path.isfile(path):
            with open(path, "rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(size // 2)
                return str(size).encode() + file.read(4096)
    return b""
