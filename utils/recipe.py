"""The recipes around the loss: mixing, class weights, mixed precision, averaging the weights."""

import contextlib
import copy
from itertools import chain

import numpy as np
import torch
from torch import nn
from torchvision.transforms import v2

from utils.plumbing.errors import UserError
from utils.task import get_criterion

CLASS_WEIGHTS = {"balanced": 1.0, "sqrt": 0.5}  # class_weights: the power of 1 / frequency


class Recipe:
    """The loss, mixing and averaging: what fit_one_epoch needs besides its documented parameters.

    settings: train.py's; a missing one means off. model: what ema averages. num_classes: for
    mixing. weights: float32 (classes,) for the loss, or None. Its attribute extra_loss may be set
    to a function (the network's inputs, logits, targets) → scalar that is added to each batch's
    loss in training.
    """

    def __init__(self, settings={}, model=None, num_classes=None, weights=None):  # noqa: B006
        if weights is not None:
            weights = weights.to(next(model.parameters()).device)
        self.settings = settings
        self.criterion = get_criterion(settings, weights, training=True)
        self.val_criterion = get_criterion(settings)
        self.extra_loss = None
        self.mix = get_mix(settings, num_classes)
        self.ema = EMA(model, settings["ema_decay"]) if settings.get("ema_decay") else None


def get_mix(settings, num_classes):
    """Return a function that mixes a batch, by mixup or cutmix at random; None for neither.

    It is (inputs, class ids) → (inputs, float32 (N, classes) shares).
    """
    mixes = []
    if settings.get("mixup_alpha"):
        mixes.append(v2.MixUp(alpha=float(settings["mixup_alpha"]), num_classes=num_classes))
    if settings.get("cutmix_alpha"):
        mixes.append(v2.CutMix(alpha=float(settings["cutmix_alpha"]), num_classes=num_classes))
    return v2.RandomChoice(mixes) if mixes else None


def check_targets(targets, settings, num_classes):
    """Raise UserError where mixing or class weights meet targets that are no class ids."""
    names = ("mixup_alpha", "cutmix_alpha", "class_weights")
    used = [name for name in names if settings.get(name) not in (None, 0, "none")]
    class_ids = targets.dtype == torch.int64 and targets.dim() == 1
    if used and not (class_ids and ((targets >= 0) & (targets < num_classes)).all()):
        raise UserError(
            f"{used[0]} = {settings[used[0]]!r} is for targets that are class ids, one a picture, "
            f"and these are not: switch it off"
        )


def precision_name(Cuda, fp16):
    """Return 'float32', 'float16' or 'bfloat16' for the setting fp16.

    As documented, True is float16 on CUDA (on a CPU bfloat16), False float32. A string stays as it
    is, also 'auto'.
    """
    if isinstance(fp16, str):
        return fp16
    if not fp16:
        return "float32"
    return "float16" if Cuda else "bfloat16"


def mixed_precision(Cuda, fp16):
    """Return the context that the network computes in; fp16: as in precision_name."""
    name = precision_name(Cuda, fp16)
    if name == "float32":
        return contextlib.nullcontext()
    return torch.autocast("cuda" if Cuda else "cpu", dtype=getattr(torch, name))


def balanced_weights(class_ids, num_classes, power=1.0):
    """Return float32 (classes,) weights ∝ (number of pictures) ** -power; 0 for absent classes.

    class_ids: int64 (N,). The mean of the pictures' weights is 1. With power 1 they are
    scikit-learn's 'balanced'.
    """
    counts = np.bincount(class_ids, minlength=num_classes)
    present = counts > 0
    weights = np.zeros(num_classes)
    weights[present] = counts[present] ** -power
    weights *= len(class_ids) / (counts * weights).sum()
    return torch.tensor(weights).float()


class EMA(nn.Module):
    """Exponential moving average of a model's parameters and BatchNorm statistics.

    The decay begins low, min(decay, (1 + n) / (10 + n)) in step n, so that the first weights are
    soon forgotten, also in a short training. (torch's AveragedModel copies its counter to the GPU
    in every step, and waits for it.)
    """

    def __init__(self, model, decay):
        super().__init__()
        # deepcopy shares what its memo holds: BatchNorm's counters, which are not averaged
        shared = {
            id(buffer): buffer for buffer in model.buffers() if not buffer.is_floating_point()
        }
        self.module = copy.deepcopy(model, shared)
        self.decay = decay
        self.register_buffer("n_averaged", torch.tensor(0))  # stays on the CPU

    @torch.no_grad()
    def update_parameters(self, model):
        """Move the averages towards the values of `model`, after a step."""
        number = int(self.n_averaged)
        decay = min(self.decay, (1 + number) / (10 + number))
        averages, values = [], []
        saved = model.state_dict()
        # each once, also if shared
        for name, average in chain(self.module.named_parameters(), self.module.named_buffers()):
            if average.is_floating_point() and name in saved:
                averages.append(average)
                values.append(saved[name])
        torch._foreach_lerp_(averages, values, 1 - decay)
        self.n_averaged += 1
