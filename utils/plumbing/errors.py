"""Errors that a user can mend, as one sentence, and how messages show names."""

import difflib
import errno
import os
import re
import sys
import traceback

TOO_SMALL = "数据集过小,无法继续进行训练,请扩充数据集。"  # the documented words of a ValueError
LOST = "another process of the launch has ended"
NOT_FINITE = (
    "lower Init_lr or clip_ratio, or set fp16 = False; the files saved before it are intact"
)
LIBRARIES = ("torch", "torchvision", "numpy", "PIL", "multiprocessing")
MACHINE_ERRORS = (RuntimeError, MemoryError, ConnectionError)
# Error numbers of a machine that has no more of something: open files or memory
USED_UP = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)

# Words in the messages of torch and the system, and what a user can do. The first row that fits
# counts. {line} is the message's first line, {all} the whole message.
ADVICE = (
    (
        "Too many open files",
        "too many open files: raise the limit (ulimit -n 4096), or lower num_workers",
    ),
    (
        "no kernel image|invalid device function",
        "this PyTorch was not built for this GPU: leave it out with CUDA_VISIBLE_DEVICES if there "
        "is another, install a build that was, or set Cuda = False ({line})",
    ),
    (
        "driver.*(too old|insufficient)",
        "the GPU's driver is too old for this PyTorch: update the driver, install a PyTorch for an "
        "older CUDA, or set Cuda = False ({line})",
    ),
    (
        "busy or unavailable|exclusive-(thread|process)",
        "another program has this GPU for itself: wait for it, choose another GPU with "
        "CUDA_VISIBLE_DEVICES=1, or set Cuda = False ({line})",
    ),
    (
        "device-side assert triggered|CUBLAS_STATUS_EXECUTION_FAILED",
        "an index was out of range on the GPU, often a class id: set CUDA_LAUNCH_BLOCKING=1, or "
        "Cuda = False, to see where ({line})",
    ),
    (
        "doesn't have NCCL built in",
        "this PyTorch has no NCCL, as on Windows: train on one GPU without torchrun, or set "
        "Cuda = False ({line})",
    ),
    (
        r"ibv_\w+.* failed",
        "the InfiniBand card may lock too little memory: raise that limit (ulimit -l unlimited, "
        "docker run --ulimit memlock=-1), or set NCCL_IB_DISABLE=1: {all}",
    ),
    (
        "out of memory|ALLOC_FAILED|ALLOCATION_FAILED|STATUS_NOT_INITIALIZED"
        "|CUDA calloc|[Cc]an(no|')t allocate memory|Unable to allocate|MemoryError",
        "out of memory: lower Unfreeze_batch_size (Freeze_batch_size in the frozen phase, "
        "--batch-size of a command), or input_shape; where others fill this GPU (nvidia-smi), take "
        "another with CUDA_VISIBLE_DEVICES ({line})",
    ),
    (
        "unable to find an engine",
        "cuDNN cannot compute a layer: no memory is left (lower Unfreeze_batch_size, in the frozen "
        "phase Freeze_batch_size, --batch-size of a command), or this GPU has no bfloat16 (set "
        "fp16 = 'auto') ({line})",
    ),
    (
        r"NCCL|\bnccl",
        "the GPUs cannot reach each other, mostly because /dev/shm is full (docker run "
        "--shm-size=16g), another process has ended, or the network card is another one "
        "(NCCL_SOCKET_IFNAME): {all}",
    ),
    (
        r"No working C\+\+ compiler|Failed to find C compiler|working triton installation"
        "|triton GPU compiler|out of resource:",
        "compile = True needs a C compiler, Triton and a GPU that suits it: install them, or set "
        "compile = False ({line})",
    ),
    (
        "more than 1 value per channel",
        "BatchNorm needs two pictures or more in each process, or on each GPU: raise "
        "Unfreeze_batch_size (Freeze_batch_size in the frozen phase)",
    ),
    (
        r"shared memory|torch_\w+>: No space|^OSError: \[Errno 28|[Bb]us error",
        "the data loader's workers have no shared memory left: give the container more (docker run "
        "--shm-size=16g), lower num_workers, or set num_workers = 0",
    ),
    (
        "shared file mapping.*<1455>|WinError 1455",
        "Windows has no memory left for the data loader's workers: close other programs, lower "
        "num_workers, or set num_workers = 0 ({line})",
    ),
    (
        "DataLoader worker .*(exited|killed)|EOFError|ConnectionResetError",
        "a data-loader worker died, most likely for lack of memory: close other programs, or lower "
        "num_workers or the batch size ({line})",
    ),
    (
        "connectFullMesh|Gloo.*(connect|resolve|address)|makeDeviceForHostname|nable to resolve",
        "the processes cannot reach each other: this host's name leads to an address that other "
        "machines do not see; name the network card, as in GLOO_SOCKET_IFNAME=eth0 ({line})",
    ),
    (
        r"\b[Gg]loo\b|Dist\w*Error|Connection (closed|reset|refused)|Broken pipe",
        LOST + ", or did not answer within the time-out of torch.distributed: its own output says "
        "why ({line})",
    ),
    (
        "Resource temporarily unavailable|can't start new thread",
        "the system allows no more processes or threads: lower num_workers, or raise the limit "
        "(ulimit -u, docker run --pids-limit) ({line})",
    ),
)


class UserError(ValueError):
    """Say what a user can mend: shown as one sentence, without a traceback, exit code 1."""


def hint(path):
    """Return ' (why a path may lead nowhere)', or ''."""
    if str(path).startswith("~"):
        return " ('~' means nothing outside of a shell: write the whole path)"
    if re.search(r"[\x00-\x1f]", str(path)):
        return " (in quotes a backslash begins an escape, as \\t a tab: divide folders by '/')"
    if "\\" in str(path) and os.sep == "/":
        return " (folders are divided by '/', not by a backslash)"
    try:
        os.stat(path)
    except PermissionError:
        return " (you may not enter its folder, or one around it)"
    except (OSError, ValueError):
        pass
    return ""


def explain(error):
    """Return what a user can do about an error, as a sentence; None for a programming error."""
    text = str(error).strip()
    # an error from a worker or a thread has its traceback inside, and the message last
    if "Traceback (most recent call last)" in text:
        text = re.split(r"\n +.+\n(?=\S)", text)[-1]  # what follows the last indented line
    if isinstance(error, UserError) or TOO_SMALL in text:
        return text.rpartition("UserError: ")[2]
    cannot_write = (errno.ENOSPC, errno.EDQUOT, errno.EPIPE)
    no_output = isinstance(error, OSError) and error.errno in cannot_write
    if no_output and "multiprocessing" not in str(place_of(error)):  # whose are in /dev/shm
        return f"the output cannot be written ({error.strerror})"
    if not comes_from_library(error):
        return None
    line = (text.splitlines() or [type(error).__name__])[0][:300]
    for words, advice in ADVICE:
        if re.search(words, f"{type(error).__name__}: {text}"):
            return advice.format(line=line, all=" ".join(text.split()))
    return None


def comes_from_library(error):
    """Return whether torch or the system raised an error, and not a `raise` in somebody's own code.

    A fork's own ValueError("unknown class 'igloo'") must keep its traceback.
    """
    place = place_of(error)
    in_library = place is None or in_libraries(place[0])
    if not in_library and re.search(r"\braise\b", place[1]):
        return False
    # by its text: an error from a worker has lost its errno
    numbers = re.findall(r"\[Errno (\d+)\]", str(error))
    is_used_up = isinstance(error, OSError) and any(int(number) in USED_UP for number in numbers)
    return in_library or is_used_up or isinstance(error, MACHINE_ERRORS)


def place_of(error):
    """Return (path, source line) of where an error was raised, or None where that is not known.

    An error in a loader worker is raised again by torch; its message holds the worker's traceback.
    """
    worker = re.findall(r'File "(.+)", line \d+, in .+\n +(.+)', str(error))
    if worker:
        return worker[-1]
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return None
    return frames[-1].filename, frames[-1].line or ""


def in_libraries(path):
    """Return whether a source file belongs to one of LIBRARIES."""
    modules = [sys.modules[name] for name in LIBRARIES if name in sys.modules]
    return any(path.startswith(os.path.dirname(module.__file__)) for module in modules)


def did_you_mean(name, choices):
    """Return ' (did you mean …?)' for a mistyped name, or a part of one, or ''."""
    word = str(name).lower()[:100]
    known = {choice.lower(): choice for choice in choices}
    near = []
    if len(word) > 1:
        near = [choice for choice in known if word.rstrip("s") in choice][:4]
    near = near or difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    if not near:
        return ""
    return f" (did you mean {' or '.join(repr(known[choice]) for choice in near)}?)"


def short_repr(value, length=80):
    """Return repr(value), cut to `length` characters: a message stays one readable sentence."""
    if type(value) is int and value.bit_length() > 9999:
        return "a number of thousands of digits"
    text = repr(value)
    return text if len(text) <= length else text[:length] + "…"


def printable(text):
    """Return somebody else's name or path with all escaped that would move a terminal's cursor."""
    shown = ""
    for letter in str(text):
        shown += letter if letter.isprintable() else letter.encode("unicode_escape").decode()
    return shown
