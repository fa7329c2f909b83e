"""Ranks, what the processes of a launch tell each other, and how a process ends.

All of it also works in one process. Collective: every process of the launch has to call it.
"""

import atexit
import builtins
import contextlib
import ctypes
import logging
import math
import multiprocessing.queues
import multiprocessing.util
import os
import shutil
import signal
import sys
import threading
import time
import uuid
import warnings
from multiprocessing import resource_tracker

import torch
import torch.distributed as dist
from PIL import PngImagePlugin

LAUNCH_SETTINGS = ("Cuda", "distributed", "num_workers", "resume")  # the machine's, not a run's
# names in torch.cpu.get_capabilities(); without these bfloat16 is emulated, 10 times slower
BFLOAT16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
STOP_SIGNALS = [  # Windows has no SIGHUP
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)
]
CPU_QUOTA = "/sys/fs/cgroup/cpu.max"  # of a Linux container
held_runs = {}  # a run's real path: the number of its open lock
launch_id = uuid.uuid4().hex  # of all processes of one launch, also after torchrun restarts them


def number_from_launcher(name, default):
    """Return a whole number from an environment variable that torchrun sets.

    The program ends where it is none.
    """
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise SystemExit(
            f"error: the environment variable {name} = {text!r} is not a whole number: start with "
            f"torchrun, which sets it, or remove it (unset {name})"
        )
    return int(text)


def rank():
    """Return this process's number among all of the launch, known before they are connected."""
    return number_from_launcher("RANK", 0)


def local_rank():
    """Return this process's number among those of its machine."""
    return number_from_launcher("LOCAL_RANK", 0)


def world_size():
    """Return the number of processes of the launch on all machines."""
    return number_from_launcher("WORLD_SIZE", 1)


def local_world_size():
    """Return the number of the launch's processes on this machine."""
    return number_from_launcher("LOCAL_WORLD_SIZE", 1)


def several_machines():
    """Return whether the launch has processes on other machines."""
    return local_world_size() < world_size()


def cores():
    """Return the number of cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    number = len(affinity(0)) if affinity else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError), open(CPU_QUOTA) as file:
        quota, period = map(int, file.read().split())  # microseconds; without a quota 'max'
        number = min(number, max(1, quota // period))
    return number


def free_shared_memory():
    """Return the bytes that are free in /dev/shm, inf where there is none."""
    return shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else math.inf


def count_workers(num_workers, Cuda, in_memory):
    """Return how many processes read pictures for each training process, from the setting."""
    if num_workers != "auto":
        return num_workers
    if Cuda:
        return min(8, max(1, cores() // local_world_size()))
    # with pictures in memory, loader processes would cost a CPU more than they save
    return 0 if in_memory else min(2, cores())


def connect(Cuda):
    """Join the launcher's processes; return the documented local_rank."""
    if Cuda:
        torch.cuda.set_device(local_rank())
    # Python objects travel over gloo, gradients of GPUs over nccl
    backend = "cpu:gloo,cuda:nccl" if Cuda else "gloo"
    hook = sys.excepthook
    dist.init_process_group(backend, store=group_store(), rank=rank(), world_size=world_size())
    sys.excepthook = hook  # torch's own would print every error once more
    return local_rank()


def group_store():
    """Return the launcher's store under a prefix that only the living processes know.

    torchrun's store outlives a restart and holds dead processes' addresses, and each machine counts
    restarts for itself. So each process asks under a name that it draws, and rank 0 answers with
    the group's prefix until everyone is here.
    """
    global launch_id
    store, _, _ = next(dist.rendezvous("env://"))
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")  # torchrun's --rdzv_id
    if run_id == "none":
        run_id = store.compare_set("launch", "", launch_id).decode()
    launch_id = run_id
    own_name = uuid.uuid4().hex
    if rank() > 0:
        store.set(f"ask {rank()}", own_name)
        group = store.get(f"answer {own_name}").decode()
        store.set(f"{group} {rank()}", "here")
        return dist.PrefixStore(group, store)
    for other in range(1, world_size()):
        while not store.check([f"{own_name} {other}"]):
            if store.check([f"ask {other}"]):
                name = store.get(f"ask {other}").decode()
                store.set(f"answer {name}", own_name)
            time.sleep(0.01)
    return dist.PrefixStore(own_name, store)


def connected():
    """Return whether this process has joined a group."""
    return dist.is_available() and dist.is_initialized()


def is_data_parallel(settings):
    """Return whether this process alone trains on several GPUs, by DataParallel."""
    on_gpus = settings.get("Cuda") and not settings.get("distributed")
    return bool(on_gpus) and torch.cuda.device_count() > 1


def computes_bfloat16(settings):
    """Return whether what will train computes in bfloat16, and does not emulate it."""
    if not settings.get("Cuda"):
        able = torch.cpu.get_capabilities()
        return any(able.get(name) for name in BFLOAT16_INSTRUCTIONS)
    # DataParallel's threads compute in autocast's default type
    supported = torch.cuda.is_bf16_supported(including_emulation=False)
    return supported and not is_data_parallel(settings)


def describe_device(Cuda):
    """Return the name of what trains, for the header."""
    if not Cuda:
        threads = torch.get_num_threads()
        return "CPU, 1 thread" if threads == 1 else f"CPU, {threads} threads"
    name = torch.cuda.get_device_name()
    if connected():
        return f"{world_size()} × {name}"
    number = torch.cuda.device_count()
    return f"{number} × {name}" + (" (torchrun is faster)" if number > 1 else "")


def gather_objects(item):
    """Return every process's `item`, in the order of ranks. Collective."""
    items = [item] * world_size()
    if connected():
        dist.all_gather_object(items, item)
    return items


def on_rank_0(function, *arguments):
    """Return function(*arguments), called on rank 0 alone, on every process. Collective."""
    result = [function(*arguments) if rank() == 0 else None]
    if connected():
        dist.broadcast_object_list(result, src=0)
    return result[0]


def sync_buffers(model):
    """Copy rank 0's buffers (BatchNorm statistics) to every process. Collective."""
    if connected():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def barrier():
    """Wait for all processes. Collective."""
    if connected():
        dist.all_reduce(torch.zeros(1))  # dist.barrier() would go to a GPU


def prepare_worker(worker_id):
    """Prepare a loader worker: DataLoader's worker_init_fn.

    It ignores signals, as one to the whole process group must not take the workers from a process
    that is saving.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if os.name != "nt":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # of held_signals
    sys.excepthook = show_nothing  # its errors travel to the loader
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(end_sender)
    prepare_pillow()
    if sys.platform == "linux":
        die_with_parent()


def prepare_pillow():
    """Print no warnings and log messages of Pillow's, which name no file.

    A PNG with more than a megabyte of text or colour profile is read, too.
    """
    warnings.filterwarnings("ignore", module="PIL")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    PngImagePlugin.MAX_TEXT_CHUNK = 2**28
    PngImagePlugin.MAX_TEXT_MEMORY = 2**30


def show_nothing(kind, error, trace):
    """Show nothing of an uncaught error in a loader worker's threads."""


def end_sender(error, batch):
    """End a worker whose batch cannot be sent: the loader would wait for it without end."""
    try:
        os.write(2, f"error: a loader worker cannot send its pictures ({error})\n".encode())
    finally:  # also where that cannot be written
        os._exit(1)


def die_with_parent():
    """Let the kernel kill this worker when its process ends.

    A group that torchrun restarts would otherwise connect to an orphan's sockets. (One whose parent
    has ended before this is asked for is told so by torch, within five seconds.)
    """
    pr_set_pdeathsig = 1  # of linux/prctl.h
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def iterate(loader):
    """Return iter(loader) without the handler of SIGCHLD that torch installs with its workers.

    It would raise at any instant, also while an error is shown. Without it a dead worker is found
    when its batch is missing, within five seconds.
    """
    if not getattr(loader, "num_workers", 0):
        return iter(loader)
    atexit.unregister(stop_workers)  # it would be registered once an epoch
    atexit.register(stop_workers)
    number = getattr(signal, "SIGCHLD", None)  # Windows has none
    handler = number and signal.getsignal(number)
    with held_signals():
        batches = iter(loader)
    if number and threading.current_thread() is threading.main_thread():
        signal.signal(number, handler or signal.SIG_DFL)
    return batches


@contextlib.contextmanager
def held_signals():
    """Let signals wait, also in the workers that are started meanwhile, until they are prepared.

    One that is spawned imports torch for seconds, and a signal to the group would end it.
    """
    if os.name == "nt" or multiprocessing.get_start_method() == "fork":  # which takes no time
        yield
        return
    resource_tracker.ensure_running()  # it would let SIGINT and SIGTERM through when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def stop_workers():
    """Kill this process's daemons, such as loader workers, which ignore SIGTERM.

    Python would send them SIGTERM at its end, and wait. Other child processes are left alone.
    """
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def stop_launcher(number):
    """Send torchrun a signal, from its first process on each machine of several.

    It would otherwise start its processes again, and wait for the machine that was told to stop.
    Return whether it was sent.
    """
    launched = "TORCHELASTIC_RUN_ID" in os.environ
    stops = launched and local_rank() == 0 and several_machines()
    if stops:
        os.kill(os.getppid(), number)
    return stops


def in_session():
    """Return whether IPython runs this program: the session outlives it."""
    return hasattr(builtins, "__IPYTHON__")


def finish():
    """End a training that went well. Collective."""
    barrier()
    leave(0)


def leave(code):
    """End this process, at once where it belongs to a group: Python's clean-up could hang there.

    Alone it ends as any program does, so that a session (IPython's %run) that runs it goes on.
    """
    if connected():
        end(code)
    stop_workers()
    while held_runs:
        os.close(held_runs.popitem()[1])
    for number in STOP_SIGNALS:  # a handler would keep the network, too
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.excepthook = sys.__excepthook__
    if code == 128 + signal.SIGINT and not in_session():
        sys.excepthook = show_all_but_interrupt
        raise KeyboardInterrupt  # Python then ends by the signal, too: see end
    raise SystemExit(code)


def show_all_but_interrupt(kind, error, trace):
    """Show an uncaught error, but nothing of Ctrl-C."""
    if kind is not KeyboardInterrupt:
        sys.__excepthook__(kind, error, trace)


def end(code):
    """End this process at once.

    Python's own clean-up could wait for a worker or another process, or abort, as gloo's threads
    end in an order of chance.
    """
    stop_workers()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    sys.stdout = sys.stderr = None  # what the clean-up below prints is of no use
    with contextlib.suppress(Exception):
        multiprocessing.util._run_finalizers()  # semaphores, the folder for temporary files
    if code == 128 + signal.SIGINT and os.name != "nt" and not connected():
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)  # a shell's loop looks for the signal, and ends as well
    os._exit(code)
