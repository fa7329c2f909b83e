"""DistributedDataParallel's options: what they do to a step's time and to the gradients. python -m
tests.bench_ddp [rounds]

Two processes of one thread over gloo; resnet18 at 128, 16 pictures over both. Each option's share
of the time that train.py's setting takes, the options in turn in every round, so that a machine
that slows down slows all of them.
"""

import inspect
import statistics
import sys
import tempfile
import time

import torch
import torch.distributed as dist
import torchvision
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from tests.helpers import default_settings
from utils.fit import forward_backward, optimizer_step
from utils.recipe import Recipe

NO_SCALER = torch.amp.GradScaler("cuda", enabled=False)
OURS = dict(gradient_as_bucket_view=True)
OPTIONS = {
    "ours: gradient_as_bucket_view": OURS,
    "none": {},
    "static_graph": dict(OURS, static_graph=True),
    "find_unused_parameters": dict(OURS, find_unused_parameters=True),
    "bucket_cap_mb 5": dict(OURS, bucket_cap_mb=5),
    "bucket_cap_mb 100": dict(OURS, bucket_cap_mb=100),
    "batched_grad_copy": dict(OURS, batched_grad_copy=True),
    "bf16_compress_hook": dict(OURS, hook=bf16_compress_hook),
}
KNOWN = inspect.signature(DistributedDataParallel).parameters
STEPS = 3  # of one option in one round


def wrapped(option, frozen=False):
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10).to(memory_format=torch.channels_last)
    if frozen:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("fc."))
    words = dict(OPTIONS[option])
    hook = words.pop("hook", None)
    ddp = DistributedDataParallel(model, **words)
    if hook:
        ddp.register_comm_hook(None, hook)
    return ddp


def batch(step):
    generator = torch.Generator().manual_seed(2 * step + dist.get_rank())
    images = torch.randint(256, (8, 3, 128, 128), generator=generator, dtype=torch.uint8)
    labels = torch.randint(10, (8,), generator=generator)
    return images.contiguous(memory_format=torch.channels_last), labels, []


def step(ddp, optimizer, batches):
    """One optimizer step over the accumulated batches, with train.py's own settings."""
    settings = default_settings()
    forward_backward(ddp, batches, False, False, NO_SCALER, Recipe(settings))
    optimizer_step(optimizer, NO_SCALER, settings["clip_grad_norm"], settings["clip_ratio"])


def optimizer_of(ddp):
    return torch.optim.SGD([p for p in ddp.parameters() if p.requires_grad], 0.01, 0.9, fused=True)


def end_of(option, frozen, accumulate):
    """All trained weights after three steps, in one vector, or the error's first sentence."""
    try:
        ddp = wrapped(option, frozen)
        optimizer = optimizer_of(ddp)
        for number in range(3):
            step(ddp, optimizer, [batch(number * accumulate + part) for part in range(accumulate)])
        return torch.cat([p.detach().flatten() for p in ddp.parameters() if p.requires_grad])
    except RuntimeError as error:
        return str(error).splitlines()[0]


def check(options):
    """{option: what differs from no option at all, in each of four settings}, on every process."""
    found = {}
    for frozen in (False, True):
        for accumulate in (1, 2):
            plain = end_of("none", frozen, accumulate)
            for option in options:
                end = end_of(option, frozen, accumulate)
                what = (
                    end
                    if isinstance(end, str)
                    else "same bits"
                    if torch.equal(end, plain)
                    else f"largest difference {float((end - plain).abs().max()):.1e}"
                )
                found.setdefault(option, []).append(
                    f"{'frozen' if frozen else 'all'}, accumulate {accumulate}: {what}"
                )
    return found


def measure(options, rounds):
    """{option: [seconds of a step, one number a round]}."""
    models = {option: wrapped(option) for option in options}
    optimizers = {option: optimizer_of(ddp) for option, ddp in models.items()}
    batches = [batch(number) for number in range(STEPS)]
    seconds = {option: [] for option in options}
    for number in range(-1, rounds):  # the first one warms up, and lets DDP rebuild its buckets
        for option in options if number % 2 else reversed(options):
            dist.barrier()
            begin = time.perf_counter()
            for each in batches:
                step(models[option], optimizers[option], [each])
            if number >= 0:
                seconds[option].append((time.perf_counter() - begin) / STEPS)
    return seconds


def process(rank, file, rounds):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    options = [
        name
        for name, words in OPTIONS.items()
        if all(word in KNOWN for word in words if word != "hook")
    ]
    found, seconds = check(options), measure(options, rounds)
    dist.barrier()
    if rank == 0:
        ours = seconds[options[0]]
        for option in options:
            shares = sorted(theirs / our for theirs, our in zip(seconds[option], ours))
            print(
                f"{option:32} {1e3 * statistics.median(seconds[option]):6.0f} ms a step, "
                f"{statistics.median(shares):.3f} of ours ({shares[0]:.3f} to {shares[-1]:.3f})"
            )
        for option, lines in found.items():
            print(option, *lines, sep="\n    ")


def main(rounds=8):
    with tempfile.NamedTemporaryFile() as file:
        torch.multiprocessing.spawn(process, (file.name, rounds), nprocs=2)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
