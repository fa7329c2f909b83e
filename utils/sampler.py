"""The order of an epoch: which pictures each process sees, and in which steps."""

import numpy as np
from torch.utils.data import Sampler


class EpochSampler(Sampler):
    """The (epoch, place, index) of one process's pictures: every world_size-th of an epoch's order.

    Training (shuffle) drops the remainder of the global batch, other pictures each epoch;
    validation keeps all. The order depends on (seed, epoch) alone; first_step continues an
    interrupted epoch at that global batch.
    """

    def __init__(self, number, batch_size, rank=0, world_size=1, shuffle=True, seed=0):
        self.number = number
        self.batch_size = batch_size  # of all processes together
        self.rank = rank
        self.world_size = world_size
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0
        self.first_step = 0
        self.left_out = number % batch_size if shuffle else 0

    def set_epoch(self, epoch, first_step=0):
        """Set the epoch, and the global batch that it begins at."""
        self.epoch = epoch
        self.first_step = first_step

    @property
    def fingerprint(self):
        """Return {name: value} of all that the order of an epoch depends on.

        When one has changed, an interrupted epoch begins again. A subclass adds its own.
        """
        return {
            "number": self.number,
            "batch_size": self.batch_size,
            "shuffle": self.shuffle,
            "seed": self.seed,
        }

    def order(self):
        """Return the indices of an epoch over all processes, number - left_out of them.

        Another way of sampling is a subclass with another order.
        """
        if not self.shuffle:
            return np.arange(self.number)
        permutation = np.random.default_rng((self.seed, 0)).permutation(self.number)
        # rotated by what an epoch leaves out, the same permutation leaves out others each epoch
        turned = np.roll(permutation, self.epoch * self.left_out)
        chosen = turned[: self.number - self.left_out]
        return np.random.default_rng((self.seed, 1, self.epoch)).permutation(chosen)

    def places(self):
        """Return the places in the epoch's order that this process visits."""
        first = self.first_step * self.batch_size + self.rank
        return range(first, self.number - self.left_out, self.world_size)

    def __iter__(self):
        order = self.order()
        return ((self.epoch, place, int(order[place])) for place in self.places())

    def __len__(self):
        return len(self.places())
