"""The data set, its batches, and the order of an epoch.

Randomness is a function, not a stream: what happens to a picture depends on (seed, epoch, index) alone.
"""
import math
import mmap
import random
import zlib
from functools import partial

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler, default_collate, get_worker_info
from torchvision.transforms import v2

from utils.errors import UserError
from utils.lists import split_line
from utils.pictures import MEAN, centre_box, random_box, read_crop

POLICIES = {"trivial": v2.TrivialAugmentWide, "rand": v2.RandAugment, "auto": v2.AutoAugment, "aug_mix": v2.AugMix}
FIXED = ("none", "flip")  # augmentations whose crop of a picture is the same in every epoch
AUGMENTATIONS = (*FIXED, "crop", *POLICIES)


def own_data(settings):
    """Data that are no lists of files: return (class names, training data set, test data set); None for the lists.

    An item of such a data set is (picture, class id): a Pillow image, or a uint8 array or tensor (H, W) or (H, W, 3), of any
    size; and a number from 0. It has a length, its items do not change, and it can be pickled where workers are spawned.
    Crops, augmentation, seeding, resuming, validation and utils.evaluate are then those of the lists.
    """
    return None


class AnnotationLines(Dataset):
    """Checked 'class_id;path' lines as a data set: item i is (path, class id).

    They are packed into two shared-memory tensors, because a list of Python strings would be copied into every
    worker little by little, as its reference counts are touched.
    """

    def __init__(self, lines):
        packed = "\n".join(line.rstrip("\r\n") for line in lines).encode("utf-8", "surrogateescape")
        self.packed = torch.frombuffer(bytearray(packed or b"\n"), dtype=torch.uint8).share_memory_()
        ends = np.append(np.flatnonzero(self.packed.numpy() == ord("\n")), len(packed))
        self.ends = torch.from_numpy(ends[:len(lines)]).share_memory_()

    def __len__(self):
        return len(self.ends)

    def line(self, index):
        start = int(self.ends[index - 1]) + 1 if index else 0
        return bytes(self.packed[start:int(self.ends[index])].numpy()).decode("utf-8", "surrogateescape")

    def __getitem__(self, index):
        class_id, path = split_line(self.line(index))
        return path, int(class_id)


class CropCache:
    """Crops by index: uint8 (N, H, W, 3), and int64 (N,) class ids, -1 for one that is not here yet.

    Forked workers share it; it does not travel to spawned ones. It is anonymous memory, which is taken up as it is filled, and
    not from /dev/shm, of which containers have little. Where there is no memory it holds nothing.
    """

    def __init__(self, number, input_shape):
        size = math.prod(input_shape) * 3
        try:
            memory = mmap.mmap(-1, number * (8 + size) or 1)
        except (OSError, OverflowError):
            number, memory = 0, bytearray()
        self.class_ids = np.frombuffer(memory, np.int64, number)  # NumPy reads one number in a tenth of a tensor's time
        self.class_ids.fill(-1)
        self.crops = torch.from_numpy(np.frombuffer(memory, np.uint8, number * size, 8 * number)).view(number, *input_shape, 3)

    def __reduce__(self):
        return CropCache, (0, self.crops.shape[1:3])

    def get(self, index):
        """(uint8 (H, W, 3) to be read only, class id), or None."""
        if index < len(self.class_ids) and self.class_ids[index] >= 0:
            return self.crops[index], int(self.class_ids[index])

    def put(self, index, crop, class_id):
        if index < len(self.class_ids):
            self.crops[index] = crop
            self.class_ids[index] = class_id


class DataGenerator(Dataset):
    """Pictures of annotation lines or of a data set as own_data describes it, cropped and augmented.

    Item (epoch, index), or index → (uint8 (H, W, 3) or None, class id, unreadable). random: augment, and replace an unreadable
    picture by another one; without it, None stands for such a picture. unreadable: a list of (index, reason), empty
    for a good picture. cache_mb: megabytes (10⁶ bytes) of crops to keep in memory, where they are the same in every epoch.
    """

    def __init__(self, annotation_lines, input_shape, random=True, augmentation="flip", random_erasing=0.0,
                 crop_scale=0.08, val_crop=1.0, seed=0, num_classes=None, cache_mb=0):
        lines = isinstance(annotation_lines, list) and all(isinstance(line, str) for line in annotation_lines)
        self.source = AnnotationLines(annotation_lines) if lines else annotation_lines
        self.input_shape, self.random, self.augmentation = tuple(input_shape), random, augmentation
        self.fixed = not random or augmentation in FIXED
        room = int(cache_mb * 1e6 / (3 * math.prod(self.input_shape))) if self.fixed else 0
        self.cache = CropCache(min(room, len(self)), self.input_shape)
        self.crop_scale, self.val_crop, self.seed, self.num_classes = crop_scale, val_crop, seed, num_classes
        steps = [POLICIES[augmentation]()] if augmentation in POLICIES else []
        if random_erasing:
            steps.append(v2.RandomErasing(random_erasing, value=[255 * m for m in MEAN]))
        self.augment = (v2.Compose(steps) if len(steps) > 1 else steps[0]) if random and steps else None

    def __len__(self):
        return len(self.source)

    def name(self, index):
        """How messages name a picture: by its annotation line, or its number."""
        return self.source.line(index) if isinstance(self.source, AnnotationLines) else f"picture {index} of the data set"

    def class_ids(self):
        """int64 (N,) class ids; from the data set's `targets`, as torchvision's have, or else read one by one."""
        targets = getattr(self.source, "targets", None)
        return np.array([class_id for _, class_id in map(self.source.__getitem__, range(len(self)))] if targets is None
                        else targets, np.int64)

    def fingerprint(self):
        """A short text that changes with the annotation lines (their CRC-32), or with a data set's length."""
        if isinstance(self.source, AnnotationLines):
            return f"{len(self)} lines, {zlib.crc32(self.source.packed.numpy()):08x}"
        return f"{len(self)} pictures"

    def share_cached(self):
        """The part of the pictures that is in memory, 0 to 1."""
        return np.count_nonzero(self.cache.class_ids >= 0) / max(1, len(self))

    def crop(self, index, choose_box):
        """(uint8 (H, W, 3), class id) of a picture of the source, or from memory."""
        kept = self.cache.get(index)
        if kept:
            return kept
        picture, class_id = self.source[index]
        class_id = int(class_id)
        if self.num_classes is not None and not 0 <= class_id < self.num_classes:
            raise UserError(f"{self.name(index)} has class id {class_id}, outside 0 … {self.num_classes - 1}")
        image = read_crop(picture, self.input_shape, choose_box)
        self.cache.put(index, image, class_id)
        return image, class_id

    def __getitem__(self, item):
        epoch, index = item if isinstance(item, tuple) else (0, item)
        rng = random.Random(f"{self.seed} {epoch} {index}")  # a text seeds well mixed, and faster than NumPy's generators
        choose_box = partial(centre_box, self.input_shape, self.val_crop)
        if not self.fixed:
            choose_box = partial(random_box, rng, self.crop_scale)
        unreadable = []
        while len(unreadable) < 100:
            try:
                image, class_id = self.crop(index, choose_box)
            except UserError:  # not a broken picture, but a data set that returns something else
                raise
            except Exception as error:  # Pillow's plugins raise nearly anything for a broken file
                unreadable.append((index, f"{type(error).__name__}: {error}".replace("\n", " ")))
                if not self.random:
                    return None, 0, unreadable
                index = rng.randrange(len(self))
                continue
            if self.random and self.augmentation != "none" and rng.random() < 0.5:
                image = image.flip(1)  # v2's flip wants (3, H, W) and takes three times as long
            if self.augment:
                torch.default_generator.manual_seed(rng.getrandbits(63))  # torch.manual_seed would walk through every device
                image = self.augment(image.permute(2, 0, 1)).permute(1, 2, 0)
            return image.contiguous(), class_id, unreadable
        raise UserError(f"100 pictures in a row cannot be read, the last one: {self.name(index)} ({unreadable[-1][1]})")


def detection_collate(batch):
    """Items → (uint8 (N, 3, H, W) in channels_last memory, int64 (N,) class ids, [(index, reason)] unreadable).

    In a worker both are made in shared memory, so that a lack of it is an error there, with its reason, and not a batch that
    never arrives.
    """
    readable = [item for item in batch if item[0] is not None]
    images = default_collate([image for image, _, _ in readable]) if readable else torch.empty(0, 1, 1, 3).byte()
    targets = torch.tensor([class_id for _, class_id, _ in readable], dtype=torch.int64)
    if get_worker_info():  # where default_collate does the same
        targets.share_memory_()
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
