"""What the processes' wish costs where it travels slowly. python -m tests.bench_wish [rounds]

Two processes train steps of 50 ms through fit_one_epoch; every all-reduce of one whole number takes
20 ms, as between far machines, while gradients are reduced as ever. Sent before a step and read
after it, the wish must cost at most 3 %.
"""

import os
import statistics
import sys
import tempfile
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset

from tests.slurm import free_ports
from utils.checkpoint import Checkpoint
from utils.dataloader import detection_collate
from utils.fit import fit_one_epoch
from utils.loss_history import LossHistory
from utils.plumbing import processes
from utils.sampler import EpochSampler

STEP, DELAY, STEPS, MOST = 0.05, 0.02, 60, 0.03


class SlowNetwork(nn.Sequential):
    """A linear layer whose training step takes STEP seconds."""

    def forward(self, images):
        if self.training:
            time.sleep(STEP)
        return super().forward(images)


class Pictures(Dataset):
    fingerprint, random = "numbers", True

    def __init__(self, number):
        self.number = number

    def __len__(self):
        return self.number

    def __getitem__(self, item):
        return torch.full((8, 8, 3), item[1] % 256, dtype=torch.uint8), item[1] % 2, []


class Delayed:
    """A reduction that is not done before DELAY seconds have passed."""

    def __init__(self, work):
        self.work, self.done = work, time.perf_counter() + DELAY

    def wait(self, *arguments):
        time.sleep(max(0, self.done - time.perf_counter()))
        return self.work.wait(*arguments)

    def is_completed(self):
        return time.perf_counter() >= self.done and self.work.is_completed()


class SlowWishes:
    """While active, delays every all-reduce that is called in Python for one int64 (gradients are
    reduced in C++).
    """

    def __init__(self):
        self.real, self.count = dist.all_reduce, 0

    def __enter__(self):
        dist.all_reduce = self.all_reduce
        return self

    def __exit__(self, *error):
        dist.all_reduce = self.real

    def all_reduce(self, tensor, *arguments, **options):
        work = self.real(tensor, *arguments, **options)
        if tensor.dtype != torch.int64 or tensor.numel() != 1:
            return work
        self.count += 1
        if work is None:  # a blocking call
            time.sleep(DELAY)
            return None
        return Delayed(work)


def loader(number, world, shuffle):
    return DataLoader(
        Pictures(number),
        1,
        drop_last=shuffle,
        collate_fn=detection_collate,
        sampler=EpochSampler(number, world, dist.get_rank(), world, shuffle=shuffle),
    )


def process(rank, port, folder, rounds):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    processes.connect(False)
    model = SlowNetwork(nn.Flatten(), nn.Linear(8 * 8 * 3, 2))
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    history = LossHistory(folder, input_shape=[8, 8]) if rank == 0 else None
    checkpoint = Checkpoint(folder, model, optimizer, None, None, history)
    words = dict(recipe=None, checkpoint=checkpoint)
    model_train = nn.parallel.DistributedDataParallel(model)
    gen, gen_val = loader(2 * STEPS, 2, True), loader(4, 2, False)

    def speed(epoch):
        return fit_one_epoch(
            model_train,
            model,
            history,
            optimizer,
            epoch,
            STEPS,
            2,
            gen,
            gen_val,
            2 * rounds,
            False,
            False,
            None,
            1000,
            folder,
            rank,
            **words,
        )["images_per_second"]

    losses, wishes = [], 0
    for number in range(rounds):
        undelayed = speed(2 * number)
        with SlowWishes() as slow:
            delayed = speed(2 * number + 1)
        losses.append(undelayed / delayed - 1)
        wishes += slow.count
    if rank == 0:
        print(
            f"a step of {1e3 * STEP:.0f} ms with a wish of {1e3 * DELAY:.0f} ms takes "
            f"{statistics.median(losses):+.1%} longer ({min(losses):+.1%} to "
            f"{max(losses):+.1%}), {wishes / rounds / STEPS:.2f} wishes a step"
        )
        assert wishes >= rounds * STEPS, "not every step sent a wish: nothing was measured"
        assert statistics.median(losses) <= MOST
    processes.barrier()
    processes.end(0)


def main(rounds=5):
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(process, (free_ports(1)[0], folder, rounds), nprocs=2)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
