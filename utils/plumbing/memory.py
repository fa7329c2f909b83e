"""Decoded pictures in memory."""

import os
import shutil

import torch


class PictureMemory:
    """Pictures and their targets by index, kept when they are read first.

    images: uint8 (N, H, W, 3). targets: (N, …) of the kind of the first target. filled: uint8 (N,),
    1 where both are kept.
    """

    def __init__(self, number, input_shape, target):
        target = torch.as_tensor(target)
        self.images = torch.empty(number, *input_shape, 3, dtype=torch.uint8)
        self.targets = torch.empty(number, *target.shape, dtype=target.dtype)
        self.filled = torch.zeros(number, dtype=torch.uint8)

    def has_room_to_share(self):
        """Return whether shared memory has room for twice the pictures: batches need it as well."""
        if not os.path.isdir("/dev/shm"):
            return True
        return 2 * self.images.numel() < shutil.disk_usage("/dev/shm").free

    def share(self):
        """Move all to memory that worker processes fill and read together."""
        for part in (self.images, self.targets, self.filled):
            part.share_memory_()

    def keep(self, index, image, target):
        """Keep a picture, unless its target is of another kind than the first."""
        target = torch.as_tensor(target)
        if target.dtype == self.targets.dtype and target.shape == self.targets.shape[1:]:
            self.images[index] = image
            self.targets[index] = target
            self.filled[index] = 1  # last: from now on other processes read both
