"""The settings to begin with for a set of pictures, and notes on what to do before."""

import math

import numpy as np

from utils.pictures import describe_cut, read_sizes

SMALL = 96  # pixels; from this shorter side on, photographs resemble those of ImageNet
FEW = 100  # training pictures of a class; below it pretrained weights pay for small pictures, too
SLOW = 900  # pixels; a photo of this shorter side takes longer to decode than to train on


def count_epochs(number, batch_size, steps):
    """Return how many epochs of `number` pictures make so many steps, from 3 to 100."""
    return min(max(3, math.ceil(steps / max(1, number // batch_size))), 100)


def advise(pairs, num_classes, is_shrunk):
    """Return ({setting: value} for training on [(path, class name), …], [note, …] for people).

    The values are as a command line has them. tests/README.md, Fine-tuning, has the measurements.
    """
    sizes = read_sizes(pairs)
    if not sizes:
        return {}, []
    height, width = (round(side) for side in np.median(sizes, axis=0))
    notes = [f"a usual picture is {width}×{height}"]
    if min(height, width) >= SLOW and not is_shrunk:
        notes.append("--shrink 512 makes copies of large photos, which train many times faster")
    is_small = min(height, width) < SMALL
    if is_small and len(pairs) > FEW * num_classes:
        # resnet9 takes 8 pixels or more
        height, width = (min(max(side, 8), 224) for side in (height, width))
        epochs = count_epochs(len(pairs), 32, steps=1000)
        settings = {"input_shape": f'"[{height},{width}]"', "UnFreeze_Epoch": epochs}
    else:
        height = width = SMALL if is_small else 224
        batch_size = min(16 if len(pairs) >= 64 else 8, len(pairs))
        settings = {
            "pretrained": True,
            "backbone": "resnet18",
            "input_shape": f'"[{height},{width}]"',
            "optimizer_type": "adam",
            "Init_lr": "4e-3",
            "Unfreeze_batch_size": batch_size,
            "UnFreeze_Epoch": count_epochs(len(pairs), batch_size, steps=500),
        }
    if cut := describe_cut(sizes, [height, width]):
        settings["resize"] = "squeeze"
        notes.append(cut)
    return settings, notes
