"""Pictures as the network gets them: decoded, cropped, normalised, kept."""

import math
from contextlib import suppress
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torchvision.transforms import RandomResizedCrop, v2

from utils.plumbing.errors import UserError
from utils.plumbing.formats import (
    BROKEN,
    REDUCIBLE,
    broken_as_os_error,
    open_picture,
    orientation,
    read_size,
    seen_size,
    upright,
)
from utils.plumbing.processes import free_shared_memory, local_world_size

# torchvision has announced that its decoders will go; Pillow's does the same, a little slower
decode_jpeg = getattr(getattr(torchvision, "io", None), "decode_jpeg", None)
# of ImageNet, as torchvision's weights expect
MEAN = [0.485, 0.456, 0.406]
STD = [0.229, 0.224, 0.225]
POLICIES = {  # augmentation: whole sets of changes
    "trivial": v2.TrivialAugmentWide,
    "rand": v2.RandAugment,
    "auto": v2.AutoAugment,
    "aug_mix": v2.AugMix,
}
MOST_CUT = 1 / 3  # share of the usual picture's area that may be cut away without a note


def channel_planes(values, height, width, device):
    """Return 255 times each channel's value, float32 (1, 3, height, width) in channels_last memory.

    Whole planes, because subtracting (3, 1, 1) from channels_last pictures takes a CPU seven times
    as long.
    """
    planes = 255 * torch.tensor(values, device=device)[:, None, None].expand(1, 3, height, width)
    return planes.contiguous(memory_format=torch.channels_last)


cached_planes = cache(channel_planes)  # a new tensor every step would make the host wait for a GPU


def normalize(images, device, settings={}):  # noqa: B006, as it is only read
    """Return uint8 (N, 3, H, W) images as float32 on `device`: (image / 255 - mean) / std.

    The memory format stays. settings: train.py's; without `mean` and `std` MEAN and STD hold.
    """
    # a copy, also of a fork's float32, as it is changed below
    images = images.to(device, non_blocking=True).to(torch.float32, copy=True)
    # while tracing, the tensor is symbolic and must not be cached
    planes = channel_planes if torch.compiler.is_compiling() else cached_planes
    height, width = images.shape[2:]
    mean = planes(tuple(settings.get("mean", MEAN)), height, width, images.device)
    std = planes(tuple(settings.get("std", STD)), height, width, images.device)
    return images.sub_(mean).div_(std)


@broken_as_os_error()
def read_crop(source, input_shape, choose_box):
    """Decode a picture, turn it upright (EXIF), crop its choose_box(height, width), and resize it.

    source: a path, a file's bytes, a Pillow image, or a uint8 array or tensor (H, W), (H, W, 1) or
    (H, W, 3). The box is (top, left, height, width). Returns uint8 (H, W, 3) of input_shape. A JPEG
    is decoded no larger than the crop needs (at 1/2, 1/4 or 1/8), never smaller.
    Raises UserError for any other source, one of BROKEN for a file that is no whole picture.
    """
    image = open_picture(source)
    is_jpeg_file = image.format in REDUCIBLE and getattr(image, "fp", None) is not None
    if is_jpeg_file:  # not decoded yet: draft() below can still choose a smaller size
        height, width = seen_size(image)
    else:
        image = upright(image)
        height, width = image.size[::-1]  # not seen_size: an odd tag may still be there
    box = choose_box(height, width)
    # below four times the sides, decoding all by torchvision is faster than reducing by Pillow
    is_small = height * width < 16 * math.prod(input_shape)
    if decode_jpeg and is_jpeg_file and is_small and orientation(image) == 1:
        # where this fails Pillow goes on below, and names what is wrong; warnings may be errors
        with suppress(RuntimeError, Warning):
            return crop_jpeg(image.fp.getvalue(), input_shape, box)

    top, left, box_height, box_width = box
    shrink = max(1, min(box_height // input_shape[0], box_width // input_shape[1]))
    if is_jpeg_file:
        image.draft(image.mode, (image.width // shrink, image.height // shrink))
        image = upright(image)
    x = image.width / width  # below 1 where the decoder reduced
    y = image.height / height
    corners = (left * x, top * y, (left + box_width) * x, (top + box_height) * y)
    resized = image.resize(input_shape[::-1], Image.Resampling.BILINEAR, box=corners)
    return torch.from_numpy(np.array(resized))


def crop_jpeg(data, input_shape, box):
    """Return the crop of a JPEG's bytes, decoded by torchvision. RuntimeError: it is broken."""
    top, left, height, width = box
    whole = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), "RGB")  # (3, H, W)
    part = whole[None, :, top : top + height, left : left + width]
    # in the memory format that the decoder wrote, it takes half the time
    part = part.contiguous(memory_format=torch.channels_last)
    resized = F.interpolate(part, input_shape, mode="bilinear", antialias=True)
    return resized[0].permute(1, 2, 0)


def centre_box(input_shape, share, height, width):
    """Return the largest box of input_shape's proportions in the middle, its sides times share."""
    scale = min(height / input_shape[0], width / input_shape[1]) * share
    box_height, box_width = (max(1, round(side * scale)) for side in input_shape)
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def kept_share(height, width, proportions):
    """Return the share of a picture's area in its largest box of `proportions`, width by height."""
    stretch = width / height / proportions
    return min(stretch, 1 / stretch)


def random_box(smallest, height, width, proportions=1.0):
    """Return a random box ("Going Deeper with Convolutions").

    Its width is 3/4 to 4/3 of `proportions` times its height. Its area is at least `smallest` of
    the largest box with these proportions (of what is larger, little would fit), at most all.
    """
    smallest *= kept_share(height, width, proportions)
    image = torch.empty(1, 1, 1).expand(3, height, width)  # only its size is read
    ratios = [3 / 4 * proportions, 4 / 3 * proportions]
    return RandomResizedCrop.get_params(image, [smallest, 1.0], ratios)


def random_transforms(settings):
    """Return what training changes by chance in a uint8 (3, H, W) picture, besides flips."""
    transforms = []
    if settings["augmentation"] in POLICIES:
        transforms.append(POLICIES[settings["augmentation"]]())
    if settings["random_erasing"]:
        grey = [255 * value for value in settings["mean"]]
        transforms.append(v2.RandomErasing(settings["random_erasing"], value=grey))
    return transforms


def read_sizes(source):
    """Return [(height, width)] of about 20 of a data set's pictures, which are not decoded."""
    sizes = []
    for index in range(0, len(source), math.ceil(len(source) / 20)):
        with suppress(UserError, *BROKEN):
            sizes.append(read_size(source[index][0]))
    return sizes


def describe_cut(sizes, input_shape):
    """Return a note where the centre crop loses over a third of the usual picture, or "".

    sizes: [(height, width)] of some pictures.
    """
    if not sizes:
        return ""
    proportion = input_shape[1] / input_shape[0]
    losses = []
    for height, width in sizes:
        losses.append((1 - kept_share(height, width, proportion), height, width))
    loss, height, width = sorted(losses)[len(losses) // 2]
    if loss <= MOST_CUT:
        return ""
    return (
        f"NOTE: a usual picture is {width}×{height}, and the crop to input_shape = "
        f"{list(input_shape)} cuts {loss:.0%} of it away: "
        f"--resize squeeze keeps the whole picture"
    )


class PictureMemory:
    """Pictures and their targets by index, kept when they are read first.

    images: uint8 (N, H, W, 3), or of the kind of a fork's first one. targets: (N, …) of the kind of
    the first target. filled: uint8 (N,), 1 where both are kept.
    """

    def __init__(self, number, image, target):
        target = torch.as_tensor(target)
        self.images = torch.empty(number, *image.shape, dtype=image.dtype)
        self.targets = torch.empty(number, *target.shape, dtype=target.dtype)
        self.filled = torch.zeros(number, dtype=torch.uint8)

    def has_room_to_share(self):
        """Return whether shared memory has room for twice the pictures of this machine's processes.

        They ask at the same time, and batches need it as well.
        """
        needed = 2 * self.images.nbytes * local_world_size()
        return needed < free_shared_memory()

    def share(self):
        """Move all to memory that worker processes fill and read together."""
        for part in (self.images, self.targets, self.filled):
            part.share_memory_()

    def keep(self, index, image, target):
        """Keep a picture, unless its target is of another dtype or shape than the first one's."""
        target = torch.as_tensor(target)
        if target.dtype == self.targets.dtype and target.shape == self.targets.shape[1:]:
            self.images[index] = image
            self.targets[index] = target
            self.filled[index] = 1  # last: from now on other processes read both
