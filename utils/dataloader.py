"""The data set of annotation lines in shared memory, its batches, and the order of an epoch.

Randomness is a function, not a stream: what happens to a picture depends on (seed, epoch, index) alone.
"""
import random
from functools import partial

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler
from torchvision.transforms import v2

from utils.errors import UserError
from utils.pictures import MEAN, centre_box, random_box, read_crop

POLICIES = {"trivial": v2.TrivialAugmentWide, "rand": v2.RandAugment, "auto": v2.AutoAugment, "aug_mix": v2.AugMix}
AUGMENTATIONS = ("none", "flip", "crop", *POLICIES)


def split_line(line):
    """'class_id;path' → (class_id text, path): only the first ';' splits."""
    class_id, _, path = line.rstrip("\r\n").partition(";")
    return class_id, path


class DataGenerator(Dataset):
    """Pictures of annotation lines. Item (epoch, index), or index → (uint8 (H, W, 3) or None, class id, unreadable).

    annotation_lines: checked 'class_id;path' strings. They are packed into two shared-memory tensors, because
    a list of Python strings would be copied into every worker little by little, as its reference counts are touched.
    random: augment, and replace an unreadable picture by another one; without it, None stands for such a picture.
    unreadable: a list of (index, reason), empty for a good picture.
    """

    def __init__(self, annotation_lines, input_shape, random=True, augmentation="flip", random_erasing=0.0,
                 crop_scale=0.08, val_crop=1.0, seed=0):
        packed = "\n".join(line.rstrip("\r\n") for line in annotation_lines).encode("utf-8", "surrogateescape")
        self.packed = torch.frombuffer(bytearray(packed or b"\n"), dtype=torch.uint8).share_memory_()
        ends = np.append(np.flatnonzero(self.packed.numpy() == ord("\n")), len(packed))
        self.ends = torch.from_numpy(ends[:len(annotation_lines)]).share_memory_()
        self.input_shape, self.random, self.augmentation = tuple(input_shape), random, augmentation
        self.crop_scale, self.val_crop, self.seed = crop_scale, val_crop, seed
        steps = [POLICIES[augmentation]()] if augmentation in POLICIES else []
        if random_erasing:
            steps.append(v2.RandomErasing(random_erasing, value=[255 * m for m in MEAN]))
        self.augment = (v2.Compose(steps) if len(steps) > 1 else steps[0]) if random and steps else None

    def __len__(self):
        return len(self.ends)

    def line(self, index):
        start = int(self.ends[index - 1]) + 1 if index else 0
        return bytes(self.packed[start:int(self.ends[index])].numpy()).decode("utf-8", "surrogateescape")

    def __getitem__(self, item):
        epoch, index = item if isinstance(item, tuple) else (0, item)
        rng = random.Random(f"{self.seed} {epoch} {index}")  # a text seeds well mixed, and faster than NumPy's generators
        choose_box = partial(centre_box, self.input_shape, self.val_crop)
        if self.random and self.augmentation not in ("none", "flip"):
            choose_box = partial(random_box, rng, self.crop_scale)
        unreadable = []
        while len(unreadable) < 100:
            class_id, path = split_line(self.line(index))
            try:
                image = read_crop(path, self.input_shape, choose_box)
            except Exception as error:  # Pillow's plugins raise nearly anything for a broken file
                unreadable.append((index, f"{type(error).__name__}: {error}".replace("\n", " ")))
                if not self.random:
                    return None, int(class_id), unreadable
                index = rng.randrange(len(self))
                continue
            if self.random and self.augmentation != "none" and rng.random() < 0.5:
                image = image.flip(1)  # v2's flip wants (3, H, W) and takes three times as long
            if self.augment:
                torch.default_generator.manual_seed(rng.getrandbits(63))  # torch.manual_seed would walk through every device
                image = self.augment(image.permute(2, 0, 1)).permute(1, 2, 0)
            return image.contiguous(), int(class_id), unreadable
        raise UserError(f"100 pictures in a row cannot be read, the last one: {self.line(index)} ({unreadable[-1][1]})")


def detection_collate(batch):
    """Items → (uint8 (N, 3, H, W) in channels_last memory, int64 (N,) class ids, [(index, reason)] unreadable)."""
    readable = [item for item in batch if item[0] is not None]
    images = torch.stack([image for image, _, _ in readable]) if readable else torch.empty(0, 1, 1, 3).byte()
    targets = torch.tensor([class_id for _, class_id, _ in readable], dtype=torch.int64)
    return images.permute(0, 3, 1, 2), targets, [bad for item in batch for bad in item[2]]


class EpochSampler(Sampler):
    """The (epoch, index) pairs of one process: every `world_size`-th of the epoch's order, from rank on.

    Training (shuffle) drops the remainder of the global batch, other pictures each epoch; validation keeps all.
    The order depends on (seed, epoch) alone; first_step continues an interrupted epoch at that global batch.
    """

    def __init__(self, number, batch_size, rank=0, world_size=1, shuffle=True, seed=0):
        self.number, self.batch_size, self.rank, self.world_size = number, batch_size, rank, world_size
        self.shuffle, self.seed, self.epoch, self.first_step = shuffle, seed, 0, 0

    def set_epoch(self, epoch, first_step=0):
        self.epoch, self.first_step = epoch, first_step

    def order(self):
        """The epoch's indices over all processes, an int64 array."""
        if not self.shuffle:
            return np.arange(self.number)
        left_out = self.number % self.batch_size
        turned = np.roll(np.random.default_rng((self.seed, 0)).permutation(self.number), self.epoch * left_out)
        return np.random.default_rng((self.seed, 1, self.epoch)).permutation(turned[:self.number - left_out])

    def __iter__(self):
        mine = self.order()[self.first_step * self.batch_size + self.rank::self.world_size]
        return ((self.epoch, int(index)) for index in mine)

    def __len__(self):
        kept = self.number - self.number % self.batch_size if self.shuffle else self.number
        return max(0, -(-(kept - self.first_step * self.batch_size - self.rank) // self.world_size))
