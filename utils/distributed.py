"""The little that processes tell each other. Every function also works in one unconnected process."""
import os
import sys

import torch
import torch.distributed as dist

from utils.errors import rank, world_size
from utils.workers import stop_workers


def connect(Cuda):
    """Join the launcher's processes; returns the documented local_rank. Small facts travel over gloo, gradients of GPUs over nccl."""
    local_rank = int(os.environ["LOCAL_RANK"])
    if Cuda:
        torch.cuda.set_device(local_rank)
    store = None
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE"):
        # on one machine torchrun keeps its store over a restart, and with it the addresses of dead processes
        store, _, _ = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group("cpu:gloo,cuda:nccl" if Cuda else "gloo", store=store, rank=rank() if store else -1,
                            world_size=world_size() if store else -1)
    return local_rank


def connected():
    return dist.is_available() and dist.is_initialized()


def gather(values):
    """Every process's list of numbers, as a float64 (world_size, len(values)) tensor on the CPU."""
    mine = torch.as_tensor(values, dtype=torch.float64)
    if not connected():
        return mine[None]
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return torch.stack(everyone)


def gather_objects(item):
    """Every process's `item`, in the order of ranks."""
    if not connected():
        return [item]
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, item)
    return everyone


def from_rank_0(item):
    """Rank 0's `item`, on every process."""
    if not connected():
        return item
    box = [item]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_rank_0(work):
    """work() on rank 0 alone; its result, or its error, on every process."""
    result = error = None
    if rank() == 0:
        try:
            result = work()
        except Exception as caught:  # told to all, so that none waits for ever, then raised
            error = caught
    result, error = from_rank_0((result, error))
    if error is not None:
        raise error
    return result


def sync_buffers(model):
    """Rank 0's buffers (BatchNorm statistics) to every process, as DistributedDataParallel does before a step."""
    if connected():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def barrier():
    gather([0])


def leave():
    """End a connected process, after all have come this far, without Python's and gloo's own clean-up.

    That clean-up destroys gloo's threads in an order of chance: now and then a process that has done all its work
    aborted ('terminate called without an active exception') or waited for ever.
    """
    barrier()
    stop_workers()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
