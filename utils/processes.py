"""Ranks, what processes tell each other, and how one begins and ends. All of it also works in one unconnected process."""
import datetime
import errno
import os
import sys
import time
import traceback
import uuid

import torch
import torch.distributed as dist

from utils.errors import TOO_MANY_FILES, TOO_SMALL, UserError
from utils.workers import stop_workers

store = None  # the connected processes' own, which outlives each of them under torchrun


def rank() -> int:
    """This process's number among all processes of the launch, known before they are connected."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """The number of processes of the launch on all nodes."""
    return int(os.environ.get("WORLD_SIZE", 1))


def connect(Cuda):
    """Join the launcher's processes; returns the documented local_rank. Small facts travel over gloo, gradients of GPUs over nccl."""
    global store
    local_rank = int(os.environ["LOCAL_RANK"])
    if Cuda:
        torch.cuda.set_device(local_rank)
    hook, store = sys.excepthook, group_store()
    dist.init_process_group("cpu:gloo,cuda:nccl" if Cuda else "gloo", store=store, rank=rank(), world_size=world_size())
    sys.excepthook = hook  # torch's own would keep our sentence in memory until a return that never comes
    return local_rank


def group_store():
    """The launcher's store, under a name that only the living processes know.

    torchrun keeps its store over a restart, and with it the addresses of dead processes; and neither its restart count, which
    each node counts for itself, nor anything else tells one group from the next. So each process asks under a name that it
    draws, and rank 0 answers with the group's name until everyone has said that it is here.
    """
    launchers, _, _ = next(dist.rendezvous("env://"))
    mine = uuid.uuid4().hex
    if rank():
        launchers.set(f"ask {rank()}", mine)
        group = launchers.get(f"answer {mine}").decode()
        launchers.set(f"{group} {rank()}", "here")
        return dist.PrefixStore(group, launchers)
    for other in range(1, world_size()):
        while not launchers.check([f"{mine} {other}"]):
            if launchers.check([f"ask {other}"]):
                launchers.set("answer " + launchers.get(f"ask {other}").decode(), mine)
            time.sleep(0.01)
    return dist.PrefixStore(mine, launchers)


def connected():
    return dist.is_available() and dist.is_initialized()


def gather_objects(item):
    """Every process's `item`, in the order of ranks. Collective."""
    if not connected():
        return [item]
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, item)
    return everyone


def on_rank_0(work):
    """work() on rank 0 alone; its result, or its error, on every process. Collective."""
    if not connected():
        return work()
    answer = [None, None]  # its result, or its error's kind and text: told to all, so that none waits for ever
    if rank() == 0:
        try:
            answer[0] = work()
        except UserError as error:
            answer[1] = UserError, str(error)
        except Exception:
            answer[1] = RuntimeError, f"on rank 0:\n{traceback.format_exc()}"
    dist.broadcast_object_list(answer, src=0)
    if answer[1]:
        kind, text = answer[1]
        raise kind(text)
    return answer[0]


def sync_buffers(model):
    """Rank 0's buffers (BatchNorm statistics) to every process, as DistributedDataParallel does before a step."""
    if connected():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def barrier():
    if connected():
        dist.all_reduce(torch.zeros(1))  # not dist.barrier(), which would go to a GPU


class Unbreakable:
    """A stream whose failures are forgotten: a closed pipe or a full disk under a log must not decide what is saved."""

    def __init__(self, stream):
        self.stream = stream

    def attempt(self, method, *words):
        try:
            return getattr(self.stream, method)(*words)
        except (OSError, ValueError):
            self.stream = open(os.devnull, "w", encoding="utf-8", errors="backslashreplace")  # from now on into nothing
            return 0

    def write(self, text):
        return self.attempt("write", text)

    def flush(self):
        self.attempt("flush")

    def __getattr__(self, name):
        return getattr(self.stream, name)


def one_sentence_errors(must_print=False):
    """Show every UserError of this program as one sentence (its first call). Unless the program must print, a standard
    output that cannot be written does not end it."""
    sys.excepthook = show_error
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:  # closed by `>&-`: the next file to be opened would get its number, and our lines
            while (nothing := os.open(os.devnull, os.O_WRONLY)) < number:
                pass
            stream = open(nothing, "w", closefd=False)
        elif hasattr(stream, "reconfigure"):  # odd file names must not break a print on an ASCII terminal
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, stream if must_print else Unbreakable(stream))


def is_ours_to_say():
    """Whether this process is the first of its launch to report an error: it appears once, from whichever process has it."""
    if world_size() == 1:
        return True
    try:
        claims = store
        if claims is None and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # not connected yet
            claims = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
                                   timeout=datetime.timedelta(seconds=5))
        if claims is not None:
            claims.set_timeout(datetime.timedelta(seconds=5))
            return claims.add(f"errors of start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", 1) == 1
    except Exception:  # the store ended with its process, which may have been the one to speak
        pass
    if rank():
        time.sleep(5)  # a launcher ends the group when one process fails: let rank 0 speak first
    return True


def sentence(error):
    """What a user is told of an error that can be mended, or None for a programming error."""
    text = str(error)
    if isinstance(error, UserError) or TOO_SMALL in text:
        return text
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE) or "Too many open files" in text:
        return TOO_MANY_FILES
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EPIPE):
        return f"the output cannot be written ({error.strerror})"
    if isinstance(error, RuntimeError) and connected() and ("gloo" in text or isinstance(error, dist.DistError)):
        return ("another process of the launch has ended, or did not answer within the time-out of torch.distributed: "
                f"the reason stands in its own output ({text.splitlines()[0][:200]})")
    return None


def show_error(kind, error, trace):
    """For sys.excepthook: what a user can mend becomes one sentence on stderr; anything else keeps its traceback."""
    if issubclass(kind, KeyboardInterrupt):  # before training, where there is nothing to save yet
        end(130)
    if is_ours_to_say():
        told = sentence(error)
        if told:
            print(f"error: {told}", file=sys.stderr, flush=True)
        else:
            traceback.print_exception(kind, error, trace)
    else:
        time.sleep(1)  # torchrun ends the group once one has ended: the process that speaks shall have finished
    end(1)


def end(code):
    """The one way in which training ends: without clean-up that could wait for a worker or another process.

    gloo's threads are destroyed in an order of chance: now and then a process that had done all its work
    aborted ('terminate called without an active exception') or waited for ever.
    """
    stop_workers()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            pass
    os._exit(code)
