"""What a user can mend: the error that is one sentence, what PyTorch's and the system's messages mean, and how names are shown."""
import difflib
import errno
import re

TOO_SMALL = "数据集过小,无法继续进行训练,请扩充数据集。"  # the documented words of the documented ValueError

# Words of other people's messages → what to do. The first that fits counts; {} is the message's own first line.
ADVICE = (
    (r"Too many open files", "too many open files: raise the limit (ulimit -n 4096), or lower num_workers"),
    (r"no kernel image|not compatible with the current PyTorch", "this PyTorch was not built for this GPU: install the build that "
     "pytorch.org names for it, or set Cuda = False ({})"),
    (r"NCCL|nccl", "the GPUs of the launch cannot talk to each other. {all} Mostly /dev/shm is full (docker run --shm-size=2g), another "
     "process has ended (its reason stands in its own output), or the network card is another one (NCCL_SOCKET_IFNAME)"),
    (r"out of memory|ALLOC_FAILED|can't allocate memory|Unable to allocate|MemoryError", "out of memory: lower Unfreeze_batch_size "
     "(Freeze_batch_size in the frozen phase; --batch-size of a command), or input_shape ({})"),
    (r"shared memory|[Bb]us error", "the data loader's workers have no shared memory left: give the container more (docker run "
     "--shm-size=2g), lower num_workers, or set num_workers = 0"),
    (r"DataLoader worker .*(exited|killed)", "a data-loader worker died, most likely for lack of memory: lower num_workers or the "
     "batch size ({})"),
    (r"gloo|Connection (closed|reset|refused)|[Ss]ocket|[Bb]roken pipe|Timed out|TCPStore", "another process of the launch has ended, or did "
     "not answer within the time-out of torch.distributed: the reason stands in its own output ({})"),
)
LOST = ADVICE[-1][1].partition(":")[0]  # how a sentence begins that only tells of another process's end


class UserError(ValueError):
    """Something that the user can mend: shown as one sentence, without a traceback, exit code 1."""


def nearest(name, choices) -> str:
    """' (did you mean …?)' for a mistyped name, or ''."""
    found = difflib.get_close_matches(str(name).lower()[:100], list(choices), n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(map(repr, found))}?)" if found else ""


def shown(value, length=80) -> str:
    """repr(value), shortened: a message must stay one readable sentence."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to spell a number of more than 4,300 digits
        text = "a number of thousands of digits"
    return text if len(text) <= length else text[:length] + "…"


def plain(text) -> str:
    """A name or path from somebody else as a terminal may show it: what would move the cursor or begin a line is escaped."""
    return "".join(c if c.isprintable() or "\ud800" <= c <= "\udfff" else c.encode("unicode_escape").decode() for c in str(text))


def first_line(error) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def sentence(error):
    """What a user is told of an error that can be mended, or None for a programming error."""
    text = str(error)
    if isinstance(error, UserError) or TOO_SMALL in text:
        return text.strip().splitlines()[-1].rpartition("UserError: ")[2]  # a worker's comes with its traceback, the sentence last
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EPIPE, errno.EDQUOT):
        return f"the output cannot be written ({error.strerror})"
    if not isinstance(error, (RuntimeError, OSError, EOFError, MemoryError)) or "Traceback (most recent call last)" in text:
        return None  # what a program raises by mistake, here or in a worker, keeps its traceback
    for words, advice in ADVICE:
        if re.search(words, f"{type(error).__name__}: {text}"):
            return advice.replace("{all}", " ".join(text.split())).replace("{}", first_line(error))
    return None
