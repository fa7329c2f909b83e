"""Atomic writing and checked reading: what a run writes is whole, and what it reads is what was written."""
import argparse
import contextlib
import copy
import io
import os
import pickle
import re
import shutil
import stat
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

from utils.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
UMASK = os.umask(0)  # it can only be asked for by setting it
os.umask(UMASK)

# Where other trainers' checkpoints keep weights. Averages and teachers come first: they are what publishers evaluate.
ENTRIES = ("model_ema", "state_dict_ema", "ema_state_dict", "ema", "teacher", "state_dict", "model", "student", "module")


@contextlib.contextmanager
def draft(path, folder=False):
    """The path of a new file (or folder) beside `path`, with a name of its own; it is removed unless it was moved away.

    It is locked, so that clear_drafts can tell the draft of a living program from what a killed one has left.
    """
    path, make = Path(path), tempfile.mkdtemp if folder else tempfile.mkstemp
    made = make(prefix=f".{path.name}.", suffix=".draft", dir=path.parent)
    number, name = (os.open(made, os.O_RDONLY), made) if folder else made
    try:
        lock(number)
        yield Path(name)
    finally:
        os.close(number)
        remove(name)


def lock(number):
    """Whether an open file is now this program's alone; True as well where there are no locks. It ends with the program."""
    try:
        if fcntl:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def remove(path):
    with contextlib.suppress(OSError):
        shutil.rmtree(path) if os.path.isdir(path) and not os.path.islink(path) else os.unlink(path)


def clear_drafts(folder):
    """Remove the drafts in a folder that killed programs have left."""
    for path in Path(folder).glob(".*.draft") if fcntl else ():
        with contextlib.suppress(OSError):
            number = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            if lock(number):
                remove(path)
            os.close(number)


def save_file(path, write, keep=None):
    """Call write(binary file) on a draft beside `path`, then move it into place: never a half-written file, nor through a link.

    keep: where the file goes that stood there. UserError when it cannot be written; what stood there is then intact.
    """
    path = Path(path)
    try:
        with draft(path) as fresh, open(fresh, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(fresh, 0o666 & ~UMASK)
            if keep and path.is_file():
                os.replace(path, keep)
            os.replace(fresh, path)
    except OSError as error:
        raise not_written(path, error) from error


def not_written(path, error):
    return UserError(f"{path} could not be written ({error.strerror or error}); the files saved before it are intact. "
                     f"Free some space or choose another folder (a training continues with resume = True)")


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


def save_tensors(path, state, keep=None):
    """torch.save through memory: a full disk then raises OSError instead of aborting inside PyTorch's own writer."""
    memory = io.BytesIO()
    torch.save(on_cpu(state), memory)
    save_file(path, lambda file: file.write(memory.getbuffer()), keep)


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
    if entry and int(os.environ.get('RANK', 0)) == 0:
        print(f"{path}: taking the weights in its entry {entry}", file=sys.stderr)
    return state
