"""How to learn: the optimizer with its parameter groups, and the recipes around the loss, from torch and torchvision."""
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.transforms import v2

from utils.dataloader import split_line

NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


class EMA(AveragedModel):
    """Exponential moving average of a model's parameters and BatchNorm statistics, from the first step's on.

    torch's own update copies its counter to the GPU at every step, and waits for it.
    """

    def __init__(self, model, decay):
        super().__init__(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)

    def update_parameters(self, model):
        if self.n_averaged == 0:  # on the host
            return super().update_parameters(model)  # a copy
        means, values = [], []
        for mean, value in zip(*(chain(m.parameters(), m.buffers()) for m in (self.module, model))):
            if mean.is_floating_point():
                means.append(mean)
                values.append(value)
            else:
                mean.copy_(value)  # such as BatchNorm's count of batches
        self.multi_avg_fn(means, values, None)
        self.n_averaged += 1


@dataclass
class Recipe:
    """What fit_one_epoch needs beyond the sixteen documented parameters; the defaults are the documented training."""
    criterion: Any = F.cross_entropy
    mix: Any = None  # (pictures, class ids) → (pictures, class probabilities), such as v2.MixUp
    ema: Any = None  # EMA of the model; it is then what is validated and saved
    clip_grad_norm: float = 0.0
    accumulate: int = 1
    seed: int = 0
    channels_last: bool = True
    batch_size_name: str = "Unfreeze_batch_size"  # the setting to lower when memory runs out


def get_recipe(s, model, num_classes, weights=None):
    """The Recipe of train.py's settings `s`; weights: float32 (num_classes,) or None, on the model's device."""
    mixes = [mix(alpha=s[name], num_classes=num_classes) for name, mix in (("mixup_alpha", v2.MixUp),
                                                                           ("cutmix_alpha", v2.CutMix)) if s[name]]
    decay = s["ema_decay"]
    return Recipe(
        criterion=partial(F.cross_entropy, weight=weights, label_smoothing=s["label_smoothing"]),
        mix=v2.RandomChoice(mixes) if mixes else None,
        ema=EMA(model, decay) if decay else None,
        clip_grad_norm=s["clip_grad_norm"], accumulate=s["accumulate"], seed=s["seed"], channels_last=s["channels_last"])


def get_optimizer(model, head, optimizer_type, momentum, weight_decay, backbone_lr_scale=1.0):
    """'sgd' (Nesterov, as documented), 'adam' (L2 decay) or 'adamw' (decoupled), in its fused form.

    head: names of the head's layers (nets.head_layers). Biases and norm layers are not decayed. Each group has an
    lr_scale: backbone_lr_scale for the backbone, 1 for the head, whose group is the last.
    """
    norms = {id(p) for m in model.modules() if isinstance(m, NORMS) for p in m.parameters(recurse=False)}
    groups = {(part, decayed): [] for part in ("backbone", "head") for decayed in (False, True)}
    for name, parameter in model.named_parameters():
        part = "head" if name.rpartition(".")[0] in head else "backbone"
        groups[part, parameter.ndim > 1 and id(parameter) not in norms].append(parameter)
    parameters = [{"params": tensors, "weight_decay": weight_decay if decayed else 0.0,
                   "lr_scale": backbone_lr_scale if part == "backbone" else 1.0}
                  for (part, decayed), tensors in groups.items() if tensors]
    if optimizer_type == "sgd":
        return torch.optim.SGD(parameters, lr=0.1, momentum=momentum, nesterov=momentum > 0, fused=True)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[optimizer_type]
    return kind(parameters, lr=1e-3, betas=(momentum, 0.999), fused=True)


def balanced_weights(lines, num_classes):
    """float32 (num_classes,) weights, number / (num_classes · count), as scikit-learn's 'balanced'; 0 for absent ones."""
    counts = np.bincount([int(split_line(line)[0]) for line in lines], minlength=num_classes)
    return torch.tensor(np.where(counts > 0, len(lines) / (num_classes * np.maximum(counts, 1)), 0)).float()
