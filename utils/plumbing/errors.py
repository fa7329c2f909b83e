"""What a user can mend: errors of one sentence, what PyTorch's and the system's messages mean, how names are shown."""

import difflib
import errno
import re

TOO_SMALL = "数据集过小,无法继续进行训练,请扩充数据集。"  # the documented words of the documented ValueError
LOST = "another process of the launch has ended"
NOT_FINITE = "lower Init_lr or clip_ratio; the files saved before it are intact"

# Words of PyTorch's and the system's messages → what a user can do. The first row that fits counts. {line}: the message's
# first line, {all}: all of it.
ADVICE = (
    (
        r"Too many open files",
        "too many open files: raise the limit (ulimit -n 4096), or lower num_workers",
    ),
    (
        r"no kernel image",
        "this PyTorch was not built for this GPU: install a build that was, or set Cuda = False ({line})",
    ),
    (
        r"NCCL|nccl",
        "the GPUs cannot reach each other, mostly because /dev/shm is full (docker run --shm-size=2g), another process "
        "has ended, or the network card is another one (NCCL_SOCKET_IFNAME): {all}",
    ),
    (
        r"out of memory|ALLOC_FAILED|[Cc]an't allocate memory|Unable to allocate|MemoryError",
        "out of memory: lower Unfreeze_batch_size (Freeze_batch_size in the frozen phase, --batch-size of a command), or "
        "input_shape ({line})",
    ),
    (
        r"more than 1 value per channel",
        "BatchNorm needs two pictures or more in each process, or on each GPU: raise "
        "Unfreeze_batch_size (Freeze_batch_size in the frozen phase)",
    ),
    (
        r"shared memory|torch_\w+>: No space|[Bb]us error",
        "the data loader's workers have no shared memory left: give the container more (docker run --shm-size=2g), lower "
        "num_workers, or set num_workers = 0",
    ),
    (
        r"DataLoader worker .*(exited|killed)|EOFError|ConnectionResetError",
        "a data-loader worker died, most likely for lack of memory: close other programs, or lower num_workers or the batch "
        "size ({line})",
    ),
    (
        r"gloo|Dist\w*Error|Connection (closed|reset|refused)|Broken pipe",
        LOST
        + ", or did not answer within the time-out of torch.distributed: the reason stands in its own output ({line})",
    ),
)


class UserError(ValueError):
    """Something that the user can mend: shown as one sentence, without a traceback, exit code 1."""


def did_you_mean(name, choices) -> str:
    """' (did you mean …?)' for a mistyped name, or a part of one, or ''."""
    word, known = str(name).lower()[:100], {choice.lower(): choice for choice in choices}
    inside = [choice for choice in known if len(word) > 1 and word.rstrip("s") in choice]
    found = inside[:4] or difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    return (
        f" (did you mean {' or '.join(repr(known[choice]) for choice in found)}?)" if found else ""
    )


def short_repr(value, length=80) -> str:
    """repr(value), shortened: a message must stay one readable sentence."""
    text = (
        repr(value)
        if type(value) is not int or value.bit_length() < 9999
        else "a number of thousands of digits"
    )
    return text if len(text) <= length else text[:length] + "…"


def printable(text) -> str:
    """A name or path from somebody else as a terminal may show it: what would move the cursor or begin a line is escaped."""
    return "".join(
        c if c.isprintable() or "\udc80" <= c <= "\udcff" else c.encode("unicode_escape").decode()
        for c in str(text)
    )


def explain(error):
    """What a user is told of an error that can be mended, or None for a programming error."""
    text = str(error).strip()
    if (
        "Traceback (most recent call last)" in text
    ):  # a loader worker's error brings its own, the message last
        text = text.splitlines()[-1]
    if isinstance(error, UserError) or TOO_SMALL in text:
        return text.rpartition("UserError: ")[2]
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EPIPE):
        return f"the output cannot be written ({error.strerror})"
    if isinstance(error, (RuntimeError, ValueError, OSError, EOFError, MemoryError)):
        for words, advice in ADVICE:
            if re.search(words, f"{type(error).__name__}: {text}"):
                line = (text.splitlines() or [type(error).__name__])[0]
                return advice.format(line=line[:300], all=" ".join(text.split()))
    return None
