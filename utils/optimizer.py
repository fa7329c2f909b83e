"""Optimizers, the documented learning-rate curves and limits, phases, and clipping."""

import math
from functools import partial

import torch
from torch import nn

NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


OPTIMIZERS = {  # optimizer_type: (function of parameters and momentum, limits of Init_lr_fit, the same for transformers)
    "sgd": (
        lambda parameters, momentum: torch.optim.SGD(  # with Nesterov's momentum, as documented
            parameters, momentum=momentum, nesterov=momentum > 0, fused=True
        ),
        (5e-4, 1e-1),
        (5e-4, 1e-1),
    ),
    "adam": (
        lambda parameters, momentum: (
            torch.optim.Adam(  # decay as an L2 term of the loss; momentum is beta1
                parameters, betas=(momentum, 0.999), fused=True
            )
        ),
        (1e-4, 1e-3),
        (1e-5, 1e-3),
    ),
    "adamw": (
        lambda parameters, momentum: torch.optim.AdamW(  # decoupled decay (Loshchilov and Hutter)
            parameters, betas=(momentum, 0.999), fused=True
        ),
        (1e-4, 1e-3),
        (1e-5, 1e-3),
    ),
}


def get_optimizer(model, head, optimizer_type, momentum, weight_decay, backbone_lr_scale=1.0):
    """An optimizer of OPTIMIZERS over parameter groups. Each has an lr_scale, which is 1 for the head, whose group is the last.

    Decay is for the weights of layers alone: not for biases, norm layers, and what a network learns besides, such as tables of
    positions and scales. head: names of the head's layers (nets.head_layers).
    """
    norms = {
        id(p) for m in model.modules() if isinstance(m, NORMS) for p in m.parameters(recurse=False)
    }
    groups = {(part, decayed): [] for part in ("backbone", "head") for decayed in (False, True)}
    for name, parameter in model.named_parameters():
        part = "head" if name.rpartition(".")[0] in head else "backbone"
        decayed = name.endswith("weight") and parameter.ndim > 1 and id(parameter) not in norms
        groups[part, decayed].append(parameter)
    return OPTIMIZERS[optimizer_type][0](
        [
            {
                "params": tensors,
                "weight_decay": weight_decay if decayed else 0.0,
                "lr_scale": backbone_lr_scale if part == "backbone" else 1.0,
            }
            for (part, decayed), tensors in groups.items()
            if tensors
        ],
        momentum,
    )


@torch.no_grad()  # else autograd records it, and behind DDP, which keeps the gradients' memory, one graph chains to the next
def clip_layers(parameters, ratio):
    """Adaptive gradient clipping (Brock et al., "High-Performance Large-Scale Image Recognition Without Normalization", 2021), by
    layer: no weight tensor's gradient stays longer than `ratio` times the tensor. Biases and norm layers are left alone."""
    weights = [p for p in parameters if p.ndim > 1]
    gradients = [p.grad for p in weights]
    limits = torch._foreach_mul(
        torch._foreach_clamp_min(torch._foreach_norm(weights), 1e-3), ratio
    )  # of zeros too
    shares = torch._foreach_div(
        limits, torch._foreach_norm(gradients)
    )  # infinite where there is no gradient
    torch._foreach_mul_(gradients, torch._foreach_clamp_max(shares, 1.0))


def restore_optimizer(optimizer, state):
    """load_state_dict that brings back what was learned (momentum buffers); the options stay those of the settings."""
    options = [
        {k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups
    ]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, options):
        group.update(own)


def cosine(lr, min_lr, total, epoch):
    """The documented 'cos': a squared warm-up, half a cosine, then min_lr held (YOLOX's yoloxwarmcos)."""
    warmup = min(max(0.05 * total, 1), 3)
    hold = min(max(0.05 * total, 1), 15)
    start = max(0.1 * lr, 1e-6)
    if epoch <= warmup:
        return (lr - start) * (epoch / warmup) ** 2 + start
    if epoch >= total - hold:
        return min_lr
    return min_lr + 0.5 * (lr - min_lr) * (
        1 + math.cos(math.pi * (epoch - warmup) / (total - warmup - hold))
    )


def linear(lr, min_lr, total, epoch):
    """Return the rate of 'linear': a tenth of the epochs (at most 3) up to lr, then down to min_lr.

    Both are straight lines. Over ten tasks no usual curve did better in Defazio et al., "Optimal
    Linear Decay Learning Rate Schedules and Further Refinements", 2023.
    """
    warmup = min(0.1 * total, 3)
    start = 0.1 * lr
    if epoch < warmup:
        return start + (lr - start) * epoch / warmup
    return lr + (min_lr - lr) * (epoch - warmup) / (total - warmup)


def step(lr, min_lr, total, epoch):
    """The documented 'step': ten equal stairs from lr to min_lr, each beginning with an epoch."""
    rate = (min_lr / lr) ** (1 / 9)
    return lr * rate ** (math.floor(epoch) // (total / 10))


LR_DECAYS = {  # lr_decay_type: function of the highest rate, the lowest, the number of epochs, and the epoch (0 …, parts too)
    "linear": linear,
    "cos": cosine,
    "step": step,
}


def get_lr_scheduler(lr_decay_type, lr, min_lr, total_iters):
    """A function from the epoch (0 …, parts too) to the learning rate; lr_decay_type is a name of LR_DECAYS."""
    return partial(LR_DECAYS[lr_decay_type], lr, min_lr, total_iters)


NBS = {
    False: 64,
    True: 256,
}  # pictures a step that Init_lr and Min_lr are for; a transformer's are more


def fit_lr(batch_size, Init_lr, Min_lr, optimizer_type, transformer):
    """(Init_lr_fit, Min_lr_fit): the rates scaled by batch size and held within the optimizer's documented limits."""
    low, high = OPTIMIZERS[optimizer_type][2 if transformer else 1]
    scale = batch_size / NBS[transformer]
    return min(max(scale * Init_lr, low), high), min(max(scale * Min_lr, low * 1e-2), high * 1e-2)


def phases(s):
    """Which of 'Freeze_batch_size' and 'Unfreeze_batch_size' will be trained with, in this order. s: train.py's settings."""
    frozen = s.get("Freeze_Epoch", 0) if s.get("Freeze_Train") else 0
    spans = {
        "Freeze_batch_size": (0, frozen),
        "Unfreeze_batch_size": (frozen, s.get("UnFreeze_Epoch", math.inf)),
    }
    return [
        name
        for name, (first, end) in spans.items()
        if name in s and max(first, s.get("Init_Epoch", 0)) < end
    ]


def set_optimizer_lr(optimizer, lr_scheduler_func, epoch):
    """Set every parameter group to the epoch's rate, times the group's own lr_scale where it has one."""
    lr = lr_scheduler_func(epoch)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def describe_rates(s, transformer):
    """For the header: the optimizer, each phase's highest and lowest rate as they train, and what limits have changed."""
    told = []
    for name in phases(s):
        batch_size = s[name] * s.get("accumulate", 1)
        fitted = fit_lr(batch_size, s["Init_lr"], s["Min_lr"], s["optimizer_type"], transformer)
        asked = tuple(batch_size / NBS[transformer] * s[rate] for rate in ("Init_lr", "Min_lr"))
        limits = " (Init_lr and Min_lr ask for {:.3g} to {:.3g}; the limits stand in utils/recipe.py)".format(
            *asked
        )
        told.append(f"lr {fitted[0]:.3g} to {fitted[1]:.3g}" + limits * (fitted != asked))
    return f"{s['optimizer_type']}, {s['lr_decay_type']}, {', then '.join(dict.fromkeys(told))}"
