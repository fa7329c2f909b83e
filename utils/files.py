"""Atomic writing and checked reading: what a run writes is whole, and what it reads is what was written."""
import io
import os
import pickle
import stat
import tempfile
import zipfile
from pathlib import Path

import torch

from utils.errors import UserError


def save_file(path, write):
    """Call write(binary file) on a draft beside `path`, then move it into place: never a half-written file."""
    path = Path(path)
    draft = path.with_name(f".{path.name}.draft")
    try:
        with open(draft, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError as error:
        try:
            draft.unlink(missing_ok=True)
        except OSError:
            pass  # the folder is not writable: there is no draft either
        raise UserError(f"{path} could not be written ({error.strerror or error}); the files saved before it are intact. "
                        f"Free some space or choose another folder; a training continues with resume = "
                        f"{str(path.parent)!r}") from error


def save_text(path, text):
    save_file(path, lambda file: file.write(text.encode("utf-8")))


def save_image(path, image):
    save_file(path, lambda file: image.save(file, "PNG"))


def save_tensors(path, state):
    """torch.save through memory: a full disk then raises OSError instead of aborting inside PyTorch's own writer."""
    memory = io.BytesIO()
    torch.save(state, memory)
    save_file(path, lambda file: file.write(memory.getbuffer()))


def writable(folder, remedy):
    """The folder's Path, made where it is missing; a UserError, before any work, when no file can be written there."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} cannot be written ({getattr(error, 'strerror', None) or error}): {remedy}") from None
    return Path(folder)


def check_regular(path, name):
    """UserError when `path` is missing, a folder, or nothing that ends when it is read (a pipe, a device)."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise UserError(f"{name}: {str(path)!r} does not exist") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: {str(path)!r} cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if stat.S_ISDIR(mode):
        raise UserError(f"{name}: {str(path)!r} is a folder, not a file")
    if not stat.S_ISREG(mode):
        raise UserError(f"{name}: {str(path)!r} is no regular file")


def load_tensors(path, name="model_path"):
    """The dictionary of tensors in a file. UserError when it is missing, cut short, or anything but tensors."""
    check_regular(path, name)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{name}: {str(path)!r} is refused: it is no file of weights, or holds code, which is never "
                        f"run. Save a plain model.state_dict() with torch.save") from None
    except Exception as error:  # a broken archive can raise nearly anything
        raise UserError(f"{name}: {str(path)!r} cannot be read, it may be cut short "
                        f"({str(error).splitlines()[0] if str(error) else type(error).__name__})") from None
    if not isinstance(state, dict):
        raise UserError(f"{name}: {str(path)!r} holds a {type(state).__name__}, not a state_dict")
    return state


def check_sums(path, name):
    """UserError when a file that save_tensors wrote has changed since: torch writes a CRC-32 of each tensor, and never looks."""
    check_regular(path, name)
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # a broken archive can raise nearly anything
        damaged = f"the archive: {error}"
    if damaged:
        raise UserError(f"{name}: {str(path)!r} is damaged ({damaged})")


def load_weights(path, name="model_path"):
    """A state_dict from a weights file, or from a checkpoint that holds one under 'model' or 'state_dict'."""
    state = load_tensors(path, name)
    for key in ("model", "state_dict"):
        if isinstance(state.get(key), dict):
            return state[key]
    return state
