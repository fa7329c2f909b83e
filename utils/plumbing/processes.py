"""Ranks, what processes tell each other and the user, and how one begins and ends; all of it also works in one process."""

import atexit
import contextlib
import ctypes
import multiprocessing.util
import os
import signal
import sys
import time
import uuid

import torch
import torch.distributed as dist

launch_id = (
    uuid.uuid4().hex
)  # the same for all processes of one launch, also after torchrun has restarted them


def rank():
    """This process's number among all of the launch, known before they are connected."""
    return int(os.environ.get("RANK", 0))


def world_size():
    """The number of processes of the launch on all nodes."""
    return int(os.environ.get("WORLD_SIZE", 1))


def cores():
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def connect(Cuda):
    """Join the launcher's processes; returns the documented local_rank."""
    local_rank = int(os.environ["LOCAL_RANK"])
    if Cuda:
        torch.cuda.set_device(local_rank)
    hook = sys.excepthook
    backend = (
        "cpu:gloo,cuda:nccl" if Cuda else "gloo"
    )  # small facts travel over gloo, gradients of GPUs over nccl
    dist.init_process_group(backend, store=group_store(), rank=rank(), world_size=world_size())
    sys.excepthook = (
        hook  # torch's own would keep our sentence in memory until a return that never comes
    )
    return local_rank


def describe_device(Cuda):
    """What trains, for people."""
    if not Cuda:
        return f"CPU, {torch.get_num_threads()} threads"
    number = world_size() if connected() else torch.cuda.device_count()
    return f"{number} × {torch.cuda.get_device_name()}" + " (torchrun is faster)" * (
        number > 1 and not connected()
    )


def group_store():
    """The launcher's store, under a name that only the living processes know: torchrun keeps it over a restart, with the addresses
    of dead processes in it, and each node counts restarts for itself. So each process asks under a name that it draws, and rank 0
    answers with the group's until everyone is here."""
    global launch_id
    launchers, _, _ = next(dist.rendezvous("env://"))
    named = os.environ.get("TORCHELASTIC_RUN_ID", "none")  # torchrun's --rdzv_id
    launch_id = (
        named if named != "none" else launchers.compare_set("launch", "", launch_id).decode()
    )
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
    everyone = [item] * world_size()
    if connected():
        dist.all_gather_object(everyone, item)
    return everyone


def on_rank_0(work):
    """work() on rank 0 alone; its result on every process. Collective."""
    answer = [work() if rank() == 0 else None]
    if connected():
        dist.broadcast_object_list(answer, src=0)
    return answer[0]


def sync_buffers(model):
    """Rank 0's buffers (BatchNorm statistics) to every process, as DistributedDataParallel does before a step."""
    for buffer in model.buffers() if connected() else ():
        dist.broadcast(buffer, src=0)


def barrier():
    if connected():
        dist.all_reduce(torch.zeros(1))  # not dist.barrier(), which would go to a GPU


def ignore_signals(worker_id):
    """worker_init_fn: a signal to the whole process group must not take the workers from a process that is saving."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.excepthook = lambda *error: (
        None
    )  # its errors travel to the loader; a thread of its own has nothing else to say
    if (
        sys.platform == "linux"
    ):  # die with the process: a group that torchrun restarts would connect to an orphan's sockets
        pr_set_pdeathsig = 1  # of linux/prctl.h
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        parent, server = (
            multiprocessing.parent_process(),
            multiprocessing.get_start_method() == "forkserver",
        )
        if (
            not parent.is_alive() if server else os.getppid() != parent.pid
        ):  # it ended before this was asked for
            os._exit(1)


def stop_workers():
    """Kill this process's workers; the standard library would send them the SIGTERM that they ignore, and wait."""
    signal.signal(
        getattr(signal, "SIGCHLD", signal.SIGTERM), signal.SIG_DFL
    )  # torch's handler raises where a worker is killed
    for worker in multiprocessing.active_children():
        worker.kill()


atexit.register(stop_workers)  # for a program of one's own that returns from its last line


def end(code):
    """The one way in which training ends: without clean-up that could wait for a worker or another process, or abort, as gloo's
    threads end in an order of chance."""
    stop_workers()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    sys.stdout = sys.stderr = None  # what clean-up would say is of no use
    with contextlib.suppress(Exception):
        multiprocessing.util._run_finalizers()  # semaphores, the folder for temporary files
    os._exit(code)
