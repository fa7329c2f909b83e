"""Atomic writing and checked reading: what a run writes is whole, and what it reads is what was written."""
import argparse
import io
import os
import pickle
import re
import stat
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

from utils.errors import UserError
from utils.processes import rank

# Where other trainers' checkpoints keep weights. Averages and teachers come first: they are what publishers evaluate.
ENTRIES = ("model_ema", "state_dict_ema", "ema_state_dict", "ema", "teacher", "state_dict", "model", "student", "module")


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
        raise not_written(path, error) from error


def not_written(path, error):
    return UserError(f"{path} could not be written ({error.strerror or error}); the files saved before it are intact. "
                     f"Free some space or choose another folder (a training continues with resume = True)")


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
    """The dictionary in a file of tensors (torch.save's, or *.safetensors). UserError, which calls the path `name`,
    when it is missing, no regular file, cut short, or holds anything that could run."""
    check_regular(path, name)
    if Path(path).suffix == ".safetensors":
        return load_safetensors(path, name)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # a bag of options, it has no code to run
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        code = f" ({found[1]})" if found else ""
        raise UserError(f"{name}: {str(path)!r} is refused: it is no file of weights, or holds code, which is never "
                        f"run{code}. Save a plain model.state_dict() with torch.save") from None
    except Exception as error:  # a broken archive can raise nearly anything
        raise UserError(cannot_read(path, name, error)) from None
    if not isinstance(state, dict):
        raise UserError(f"{name}: {str(path)!r} holds a {type(state).__name__}, not a state_dict")
    return state


def cannot_read(path, name, error):
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return f"{name}: {str(path)!r} cannot be read, it may be cut short ({reason})"


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


def load_safetensors(path, name):
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise UserError(f"{name}: reading {str(path)!r} needs one more package: pip install safetensors") from None
    try:
        return load_file(path)
    except Exception as error:
        raise UserError(cannot_read(path, name, error)) from None


def choose_entry(state, depth=2):
    """(the state_dict in a checkpoint, its entry's name), looking into ENTRIES in their order, `depth` levels down.

    ({}, "") where there are no tensors with names. The counter that AveragedModel adds, and its prefix, are taken off.
    """
    for key in ENTRIES if depth else ():
        if isinstance(state.get(key), dict):
            inner, entry = choose_entry(state[key], depth - 1)
            if inner:
                return inner, f"{key}.{entry}".rstrip(".")
    if not any(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()):
        return {}, ""
    if "n_averaged" in state:
        del state["n_averaged"]
        torch.nn.modules.utils.consume_prefix_in_state_dict_if_present(state, "module.")
    return state, ""


def load_weights(path, name="model_path"):
    """A state_dict from a file: what choose_entry finds. UserError, which calls the path `name`, where it finds none."""
    state, entry = choose_entry(load_tensors(path, name))
    strange = [key for key in state if not isinstance(key, str)]
    if strange or not state:
        why = f"a tensor is called {strange[0]!r}, which is no name" if strange else "it has no tensors by name"
        raise UserError(f"{name}: {str(path)!r} holds no state_dict ({why}): save model.state_dict() with torch.save")
    if entry and rank() == 0:
        print(f"{path}: taking the weights in its entry {entry}", file=sys.stderr)
    return state
