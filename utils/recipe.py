"""What is learned and how it is judged: the loss, the figures, the optimizers, and the recipes around them."""

import copy

import numpy as np
import torch
from torch import nn
from torchvision.transforms import v2

from utils.task import get_criterion


class EMA(nn.Module):
    """Exponential moving average of a model's parameters and BatchNorm statistics, from the first step's on. (torch's own
    AveragedModel copies its counter to the GPU at every step, and waits for it.)"""

    def __init__(self, model, decay):
        super().__init__()
        counters = {
            id(buffer): buffer for buffer in model.buffers() if not buffer.is_floating_point()
        }
        self.module, self.decay = (
            copy.deepcopy(model, counters),
            decay,
        )  # which are BatchNorm's of batches, and shared
        self.register_buffer("n_averaged", torch.tensor(0))  # on the host

    @torch.no_grad()
    def update_parameters(self, model):
        pairs = zip(self.module.state_dict().values(), model.state_dict().values())
        averages, values = zip(*(pair for pair in pairs if pair[0].is_floating_point()))
        torch._foreach_lerp_(averages, values, 1 - self.decay if self.n_averaged else 1.0)
        self.n_averaged += 1


class Recipe:
    """What fit_one_epoch needs beyond the documented parameters, made of train.py's settings, each of which may be absent.

    weights: float32 (classes,) or None. extra_loss: (pictures as the network saw them, scores, targets) → scalar, or None.
    """

    def __init__(self, settings={}, model=None, num_classes=None, weights=None):
        mixes = [
            mix(
                alpha=float(settings[name]), num_classes=num_classes
            )  # (pictures, class ids) → (pictures, probabilities)
            for name, mix in (("mixup_alpha", v2.MixUp), ("cutmix_alpha", v2.CutMix))
            if settings.get(name)
        ]
        weights = weights if weights is None else weights.to(next(model.parameters()).device)
        self.settings, self.extra_loss = settings, None
        self.criterion, self.val_criterion = (
            get_criterion(settings, weights, training=True),
            get_criterion(settings),
        )
        self.mix = v2.RandomChoice(mixes) if mixes else None
        self.ema = (
            EMA(model, settings["ema_decay"]) if settings.get("ema_decay") else None
        )  # then validated and saved


def balanced_weights(class_ids, num_classes):
    """float32 (classes,) weights from int64 (N,) class_ids: number / (present classes · count), as scikit-learn's 'balanced'; 0
    for absent ones. The mean of the pictures' weights is 1."""
    counts = np.bincount(class_ids, minlength=num_classes)
    return torch.tensor(
        np.where(counts > 0, len(class_ids) / ((counts > 0).sum() * np.maximum(counts, 1)), 0)
    ).float()
