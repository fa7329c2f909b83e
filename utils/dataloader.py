"""The data set and its batches.

Randomness is a function, not a stream: what happens to a picture depends on (seed, epoch, its place
in the epoch, index) alone, so that neither workers nor resuming change it.
"""

import io
import math
import random
import zlib
from contextlib import suppress
from functools import cached_property

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate

from utils.pictures import (
    MEAN,
    POLICIES,
    STD,
    PictureMemory,
    centre_box,
    describe_cut,
    random_box,
    random_transforms,
    read_crop,
    read_sizes,
)
from utils.plumbing.console import say_if_slow
from utils.plumbing.errors import UserError
from utils.plumbing.files import content_sum
from utils.plumbing.formats import BROKEN, failure_reason
from utils.plumbing.lists import AnnotationLines
from utils.recipe import check_targets
from utils.task import read_label

RESIZES = ("crop", "squeeze")  # cut to input_shape's proportions, or keep the whole picture
FIXED = ("none", "flip", "flips")  # these read the same crop of a picture in every epoch
AUGMENTATIONS = (*FIXED, "crop", *POLICIES)
# Settings that decide what the network sees, with their defaults
SEEING = {"resize": "crop", "val_crop": 1.0, "mean": MEAN, "std": STD}
AUGMENTING = {  # these in training alone
    "augmentation": "flip",
    "crop_scale": 0.08,
    "random_erasing": 0.0,
    "seed": 0,
}
DEFAULTS = {**SEEING, **AUGMENTING}


def own_data(settings):
    """Return (class names, training data set, test data set) of one's own; None to use the lists.

    settings: train.py's. A data set has a length, and items that stay the same: (a Pillow image, or
    a uint8 array or tensor (H, W) or (H, W, 3) of any size; a label as task.read_label takes it).
    An exception of formats.BROKEN counts as an unreadable picture; any other ends the program. It
    is asked by index alone: what is to change with the epoch belongs in
    DataGenerator.__getitem__, which knows it. An attribute that is set during training does not
    reach the worker processes, which have their own copy. Some pictures are read before these are
    forked: a file that stays open has to be opened anew where os.getpid() has changed.
    """
    return None


class DataGenerator(Dataset):
    """Pictures of annotation lines or of a data set as in own_data, cropped and augmented.

    data[epoch, place, index] is one item, data[index] where nothing is random. place: where in the
    epoch's order, so that a picture that a sampler draws twice is augmented otherwise each time.
    An item is (uint8 (H, W, 3), target, [(index, reason)] of what was unreadable).
    random: augment, and replace an unreadable picture by another one; otherwise an unreadable
    picture's image and target are None.
    settings: train.py's; DEFAULTS hold where one is missing.
    cache_mb (of 10⁶ bytes): what was read is kept in memory, if all of it fits and a picture's crop
    is the same in every epoch.
    """

    def __init__(
        self,
        annotation_lines,
        input_shape,
        random=True,
        num_classes=None,
        settings=None,
        cache_mb=0,
    ):
        self.source = annotation_lines
        is_list = isinstance(annotation_lines, list)
        if is_list and all(isinstance(line, str) for line in annotation_lines):
            self.source = AnnotationLines(annotation_lines)
        self.input_shape = tuple(input_shape)
        self.random = random
        self.num_classes = num_classes
        self.settings = {**DEFAULTS, **(settings or {})}
        augmentation = self.settings["augmentation"]
        self.random_crops = random and augmentation not in FIXED
        size = len(self) * math.prod(self.input_shape) * 3
        self.in_memory = not self.random_crops and size <= cache_mb * 1e6
        self.memory = None  # the PictureMemory, when the first picture has been read
        self.named_unreadable = set()  # indices of pictures that training has named already
        self.transforms = random_transforms(self.settings) if random else []

    def __len__(self):
        return len(self.source)

    def name(self, index):
        """Return a picture's name in messages: its annotation line, or its number."""
        if isinstance(self.source, AnnotationLines):
            return self.source.line(index)
        return f"picture {index} of the data set"

    def target(self, index, label):
        """Return a picture's target, as task.read_label makes it of its label."""
        if hasattr(label, "tolist"):  # an array or tensor
            label = label.tolist()
        try:
            return read_label(label, self.num_classes)
        except UserError as error:
            raise UserError(f"{self.name(index)}: {error}") from None

    def choose_box(self, height, width):
        """Return the (top, left, height, width) that is read of a picture of this size."""
        squeeze = self.settings["resize"] == "squeeze"
        shape = (height, width) if squeeze else self.input_shape
        if self.random_crops:
            return random_box(self.settings["crop_scale"], height, width, shape[1] / shape[0])
        return centre_box(shape, self.settings["val_crop"], height, width)

    def describe_cut(self):
        """Return pictures.describe_cut's note on some of the pictures; "" where all is kept."""
        if self.settings["resize"] == "squeeze":
            return ""
        return describe_cut(read_sizes(self.source), self.input_shape)

    def class_ids(self):
        """Return every target, int64 (N,) of class ids.

        UserError: a picture cannot be read, or class weights meet targets that are no class ids.
        torchvision's `targets` saves reading the pictures, unless a transform may change them.
        """
        labels = getattr(self.source, "targets", None)
        transforms = ("transforms", "target_transform")
        is_changed = any(getattr(self.source, name, None) for name in transforms)
        if labels is None or is_changed:
            labels = (self.source[index][1] for index in range(len(self)))
        targets = []
        try:
            with say_if_slow("reading the class of each training picture …"):
                for index, label in enumerate(labels):
                    targets.append(self.target(index, label))
        except BROKEN as error:
            raise UserError(
                f"{self.name(len(targets))} cannot be read ({failure_reason(error)}), and its "
                f"class is needed (class_weights): leave it out"
            ) from None
        targets = np.array(targets)
        check_targets(torch.from_numpy(targets), self.settings, self.num_classes)
        return targets

    @cached_property
    def fingerprint(self):
        """Return {name: value} of all that items depend on, but for what the files of a list hold.

        When one has changed, an interrupted epoch begins again, and the best epoch is sought anew.
        A subclass that reads pictures in another way adds what that depends on.
        """
        if isinstance(self.source, AnnotationLines):
            content = zlib.crc32(self.source.text.numpy())
        else:
            content = self.sample_content()
        names = DEFAULTS if self.random else SEEING
        return {
            "list": f"{len(self)} pictures, {content:08x}",
            "num_classes": self.num_classes,
            "input_shape": list(self.input_shape),
            "random": self.random,
            **{name: self.settings[name] for name in names},
        }

    def sample_content(self):
        """Return a CRC-32 of about eight reduced pictures of a data set, and of its `targets`."""
        data = DataGenerator(self.source, (64, 64), random=False, num_classes=self.num_classes)
        places = range(0, len(data), max(1, len(data) // 8))
        images, targets, _ = detection_collate([data[index] for index in places])
        content = io.BytesIO()
        torch.save([images, targets, getattr(self.source, "targets", None)], content)
        return zlib.crc32(content.getvalue())

    def content(self):
        """Return a checksum that changes with the files of a list; "" for a data set."""
        if not isinstance(self.source, AnnotationLines):
            return ""
        with say_if_slow("reading a part of each test picture …"):
            return content_sum(self.source[index][0] for index in range(len(self)))

    def share_memory(self):
        """Let worker processes share the pictures in memory; if it has no room, keep none."""
        if self.in_memory:
            for index in range(len(self)):
                with suppress(*BROKEN):
                    self.read(index)  # the first that can be read makes the memory for all
                    break
        if self.memory is not None and self.memory.has_room_to_share():
            self.memory.share()
        else:
            self.in_memory = False
            self.memory = None

    def read(self, index):
        """Return (image, target). image: uint8 (H, W, 3), perhaps the kept copy: do not change it.

        Raises one of BROKEN for a picture that cannot be read.
        """
        if self.memory and self.memory.filled[index]:
            return self.memory.images[index], self.memory.targets[index]
        picture, label = self.source[index]
        image = read_crop(picture, self.input_shape, self.choose_box)
        target = self.target(index, label)
        if self.in_memory:
            if self.memory is None:
                self.memory = PictureMemory(len(self), image, target)
            self.memory.keep(index, image, target)
        return image, target

    def read_or_replace(self, index, rng):
        """Return (image, target, [(index, reason)] of this picture, if it could not be read).

        In training another one takes an unreadable picture's place, drawn from rng, a
        random.Random; else image and target are None.
        """
        unreadable = []
        while len(unreadable) < 100:
            try:
                return *self.read(index), unreadable[:1]  # others count at their own places
            except BROKEN as error:
                unreadable.append((index, failure_reason(error)))
            if not self.random:
                return None, None, unreadable
            last = index
            index = rng.randrange(len(self))
        raise UserError(
            f"100 pictures in a row cannot be read, the last one: "
            f"{self.name(last)} ({unreadable[-1][1]})"
        )

    def augment(self, image, rng):
        """Return a uint8 (H, W, 3) picture changed by chance.

        rng: a random.Random; the policies and erasing draw from torch's own generator.
        """
        if not self.random:
            return image
        # v2's flip wants (3, H, W) and takes three times as long
        if self.settings["augmentation"] != "none" and rng.random() < 0.5:
            image = image.flip(1)
        if self.settings["augmentation"] == "flips" and rng.random() < 0.5:
            image = image.flip(0)
        for transform in self.transforms:
            image = transform(image.permute(2, 0, 1)).permute(1, 2, 0)
        return image.contiguous()

    def __getitem__(self, item):
        is_place = isinstance(item, tuple) and len(item) == 3
        if self.random and not is_place:
            raise UserError(
                f"a training picture is asked for by (epoch, place, index), not {item!r}: "
                f"derive your sampler from EpochSampler, with another order()"
            )
        epoch, place, index = item if is_place else (0, 0, item)
        # a text as the seed mixes all four well
        rng = random.Random(f"{self.settings['seed']} {epoch} {place} {index}")
        if self.random:
            # torch.manual_seed would walk through every device
            torch.default_generator.manual_seed(rng.getrandbits(63))
        image, target, unreadable = self.read_or_replace(index, rng)
        if image is not None:
            image = self.augment(image, rng)
        return image, target, unreadable


def detection_collate(batch):
    """Make a batch of a DataGenerator's items; the name is the documented one.

    Returns uint8 (N, 3, H, W) in channels_last memory; (N, …) targets, int64 (N,) of class ids; and
    [(index, reason)] of what could not be read. Items without a picture are left out of the first
    two, so N may be below len(batch), and 0.
    """
    unreadable = []
    readable = []
    for image, target, reasons in batch:
        unreadable += reasons
        if image is not None:
            # default_collate would make float64 of numbers, and columns of lists
            readable.append((image, torch.as_tensor(target)))
    if not readable:
        return torch.empty(0, 3, 1, 1).byte(), torch.empty(0).long(), unreadable
    images, targets = default_collate(readable)  # in shared memory, where a worker does it
    return images.permute(0, 3, 1, 2), targets, unreadable
