"""Pictures in: annotation lines in shared memory, decoding, augmentation, and the order of an epoch.

Randomness is a function, not a stream: what happens to a picture depends on (seed, epoch, index) alone.
"""
import atexit
import ctypes
import io
import math
import multiprocessing
import os
import random
import signal
import sys
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.data import Dataset, Sampler
from torchvision.transforms import v2

from utils.errors import UserError

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # torchvision has announced that its decoders will go; Pillow's does the same, a little slower
    decode_jpeg = None

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as torchvision's weights expect
POLICIES = {"trivial": v2.TrivialAugmentWide, "rand": v2.RandAugment, "auto": v2.AutoAugment, "aug_mix": v2.AugMix}
JPEG_START = b"\xff\xd8"  # of every JPEG file; asking torchvision's decoder would cost other formats a third of their time
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
AUGMENTATIONS = ("none", "flip", "crop", *POLICIES)


def normalize(images, device, channels_last=True):
    """uint8 (N, 3, H, W) from the loader → float32 on `device`, ImageNet-normalised: the one place that does it."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    images = images.to(device, non_blocking=True).to(torch.float32, memory_format=layout)
    mean, std = (torch.stack([torch.full((1, 1), 255 * figure, device=images.device) for figure in figures])
                 for figures in (MEAN, STD))  # filled there: copying them would make each step wait for a GPU
    return images.sub_(mean).div_(std)


def to_rgb(image):
    """Any mode that Pillow reads → RGB: 16-bit and float greys are scaled, transparency is laid on white."""
    if image.mode.startswith("I") or image.mode == "F":
        grey = np.asarray(image, np.float32)
        if image.mode != "F":
            grey = grey / 257  # 65535 → 255
        elif grey.max() <= 1:
            grey = grey * 255
        return Image.fromarray(grey.clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def read_crop(source, input_shape, choose_box):
    """Decode a picture and resize the box that `choose_box(height, width)` → (top, left, height, width) names.

    source: a path, the file's bytes, or a Pillow image. Returns uint8 (H, W, 3). EXIF orientation is applied before
    the box is chosen. Large JPEGs are decoded no larger than the crop needs (libjpeg's 1/2, 1/4, 1/8), never smaller
    than input_shape. Raises whatever Pillow raises for a file that is no readable picture.
    """
    if isinstance(source, (str, os.PathLike)):
        with open(source, "rb") as file:
            source = file.read()
    jpeg = isinstance(source, bytes) and source.startswith(JPEG_START)
    if decode_jpeg and jpeg and len(source) < 4 * input_shape[0] * input_shape[1]:
        try:  # a file of so few bytes seldom has pixels enough to be reduced, and this decoder is faster than Pillow's
            pixels = decode_jpeg(torch.frombuffer(bytearray(source), dtype=torch.uint8), ImageReadMode.RGB,
                                 apply_exif_orientation=True)
        except RuntimeError:
            pass  # a broken file, which Pillow names
        else:
            top, left, height, width = choose_box(*pixels.shape[1:])
            crop = pixels.permute(1, 2, 0)[None, top:top + height, left:left + width].contiguous().permute(0, 3, 1, 2)
            # in channels_last memory, which the decoder wrote, it takes half the time
            return F.interpolate(crop, input_shape, mode="bilinear", antialias=True)[0].permute(1, 2, 0)
    with source.copy() if isinstance(source, Image.Image) else Image.open(io.BytesIO(source)) as image:
        if image.format in ("JPEG", "MPO"):
            turned = image.getexif().get(0x0112, 1) >= 5  # by a quarter: the sides change places
            sides = image.size[::-1] if turned else image.size
            box = choose_box(*sides[::-1])
            shrink = max(1, min(box[2] // input_shape[0], box[3] // input_shape[1]))
            image.draft(image.mode, (image.width // shrink, image.height // shrink))
            image = to_rgb(ImageOps.exif_transpose(image))
        else:
            image = to_rgb(ImageOps.exif_transpose(image))
            sides, box = image.size, choose_box(image.height, image.width)
        top, left, height, width = box
        x, y = image.width / sides[0], image.height / sides[1]  # below 1 where the decoder reduced
        return torch.from_numpy(np.array(image.resize(input_shape[::-1], Image.Resampling.BILINEAR, box=(
            left * x, top * y, (left + width) * x, (top + height) * y))))


def centre_box(input_shape, share, height, width):
    """The largest box of input_shape's proportions in the middle, its sides times `share`."""
    scale = min(height / input_shape[0], width / input_shape[1]) * share
    box_height, box_width = (max(1, round(side * scale)) for side in input_shape)
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def random_box(rng, smallest, height, width):
    """Random resized crop as in torchvision (and "Going Deeper with Convolutions"): `smallest` to all of the area,
    proportions 3:4 to 4:3; in plain numbers, because torchvision's draws of tensors take a twentieth of an item's time."""
    for _ in range(10):
        area = height * width * rng.uniform(smallest, 1)
        proportion = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        box_height, box_width = round(math.sqrt(area / proportion)), round(math.sqrt(area * proportion))
        if 0 < box_height <= height and 0 < box_width <= width:
            return rng.randint(0, height - box_height), rng.randint(0, width - box_width), box_height, box_width
    box_height, box_width = min(height, round(width / (3 / 4))), min(width, round(height * (4 / 3)))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


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


def stop_workers():
    """Kill this process's workers; the standard library would send them the SIGTERM that they ignore, and wait."""
    for worker in multiprocessing.active_children():
        worker.kill()


atexit.register(stop_workers)


def ignore_signals(worker_id):
    """worker_init_fn: a signal to the whole process group must not take the workers from a process that is saving.

    On Linux a worker dies with its process, at once: an orphan would hold the sockets that it inherited, and a group that
    torchrun restarts would connect to them and wait for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
