"""Optimizers, the documented learning-rate curves and limits, phases, and clipping."""

import math
import re
from collections import defaultdict
from functools import partial
from typing import Callable, NamedTuple

import torch
from torch import nn

from utils.plumbing.errors import UserError


def sgd(parameters, momentum):
    """Return SGD with Nesterov's momentum, as documented."""
    optimizer = torch.optim.SGD(parameters, momentum=momentum, nesterov=momentum > 0, fused=True)
    fill_momentum(optimizer)
    return optimizer


def adam(parameters, momentum):
    """Return Adam; weight decay is an L2 term of the loss."""
    return torch.optim.Adam(parameters, betas=(momentum, 0.999), fused=True)


def adamw(parameters, momentum):
    """Return AdamW: the decay is decoupled from the gradient (Loshchilov and Hutter, 2019)."""
    return torch.optim.AdamW(parameters, betas=(momentum, 0.999), fused=True)


# What settings and the code decide of a parameter group; the rest an optimizer has learned
OPTIONS = ("lr", "lr_scale", "weight_decay", "momentum", "nesterov", "dampening", "betas", "eps",
           "alpha", "foreach")  # fmt: skip


class Optimizer(NamedTuple):
    make: Callable  # (parameter groups, momentum) → optimizer
    limits: tuple  # lowest and highest Init_lr_fit; a hundredth of them hold for Min_lr_fit
    transformer_limits: tuple  # the same for transformers


OPTIMIZERS = {  # optimizer_type: how it is made, and its limits
    "sgd": Optimizer(sgd, (5e-4, 1e-1), (5e-4, 1e-1)),
    "adam": Optimizer(adam, (1e-4, 1e-3), (1e-5, 1e-3)),
    "adamw": Optimizer(adamw, (1e-4, 1e-3), (1e-5, 1e-3)),
}


def get_optimizer(model, head, optimizer_type, momentum, weight_decay, backbone_lr_scale=1.0):
    """Return an optimizer of OPTIMIZERS, whose parameter groups have their own rate and decay.

    Each group has an lr_scale, 1 for the head's, which come last. Decay applies to the weights of
    layers only: not to biases, norm layers, position embeddings or layer scales. head: names of the
    head's layers (nets.head_layers).
    """
    norms = set()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):  # may have any shape; other norms' are vectors
            norms.update(id(parameter) for parameter in module.parameters(recurse=False))
    groups = defaultdict(list)  # by (whether they are the head's, whether they decay)
    for name, parameter in model.named_parameters():
        layer, _, kind = own_name(name).rpartition(".")
        decays = kind.endswith("weight") and parameter.ndim > 1 and id(parameter) not in norms
        groups[layer in head, decays].append(parameter)
    parameter_groups = []
    # False sorts before True: the head's groups come last
    for (in_head, decays), parameters in sorted(groups.items()):
        decay = weight_decay if decays else 0.0
        lr_scale = 1.0 if in_head else backbone_lr_scale
        group = {"params": parameters, "weight_decay": decay, "lr_scale": lr_scale}
        parameter_groups.append(group)
    return OPTIMIZERS[optimizer_type].make(parameter_groups, momentum)


def own_name(name):
    """Return a parameter's name as it is without torch.nn.utils.parametrize.

    '….parametrizations.weight.original0' becomes '….weight'.
    """
    return re.sub(r"parametrizations\.(\w+)\.original\d*$", r"\1", name)


def fill_momentum(optimizer):
    """Give SGD's parameters momentum of zeros where they have none.

    Zeros change nothing in a first step. Without them fused SGD reads uninitialised memory when the
    scaler skips a first step, and fails where a parameter is first used in a later step than
    others.
    """
    for group in optimizer.param_groups:
        if not group.get("momentum"):
            continue
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter)


def restore_optimizer(optimizer, state):
    """Load what an optimizer has learned (momentum); its OPTIONS stay those of the settings.

    Raise nearly any exception where the state is of another network.
    """
    own_groups = [dict(group) for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, own_groups):
        group.update({name: own[name] for name in own if name in OPTIONS or name not in group})
    if isinstance(optimizer, torch.optim.SGD):
        fill_momentum(optimizer)
    if not isinstance(optimizer, (torch.optim.SGD, torch.optim.Adam)):
        return  # states of others may have any shape
    for parameter, values in optimizer.state.items():
        for value in values.values():
            if torch.as_tensor(value).shape not in ((), parameter.shape):
                raise ValueError("the optimizer's state is of another network")


def check_parameters(optimizer, model):
    """Raise UserError where the optimizer trains what is no part of the network.

    It would not be saved, nor kept equal between processes.
    """
    own = {id(parameter) for parameter in model.parameters()}
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not all(id(parameter) in own for parameter in trained):
        raise UserError(
            "the optimizer trains parameters that are not in the network, so they would be "
            "neither saved nor the same in all processes: make their module an attribute of the "
            "network, in its file of nets/, from which the commands build it, too"
        )


def optimizer_step(optimizer, scaler, clip_grad_norm=None, clip_ratio=None):
    """Clip the gradients and make one optimizer step.

    Where the gradients have overflowed, the scaler skips it, and nothing changes.
    """
    if clip_ratio or clip_grad_norm:
        scaler.unscale_(optimizer)  # otherwise a fused optimizer does it on its way
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if clip_ratio:
            clip_layers(parameters, clip_ratio)
        if clip_grad_norm:
            torch.nn.utils.clip_grad_norm_(parameters, clip_grad_norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)


# Otherwise memory would grow at each step: DDP's gradients lie in buckets that outlive a step
# (gradient_as_bucket_view), and would keep each step's graph
@torch.no_grad()
def clip_layers(parameters, ratio):
    """Clip the norm of each weight tensor's gradient to `ratio` times the tensor's own norm.

    Brock et al., "High-Performance Large-Scale Image Recognition Without Normalization", 2021; of
    whole tensors here, of units there. Biases and norm layers are left alone. A tensor's norm
    counts as at least 0.01 an element (root mean square), so that zeros can learn.
    """
    weights = [p for p in parameters if p.ndim > 1 and p.grad is not None]
    gradients = [p.grad for p in weights]
    floors = [0.01 * math.sqrt(p.numel()) for p in weights]
    limits = torch._foreach_clamp_min(torch._foreach_norm(weights), floors)
    torch._foreach_mul_(limits, ratio)
    # infinite for a gradient of zero, and so 1
    factors = torch._foreach_div(limits, torch._foreach_norm(gradients))
    torch._foreach_clamp_max_(factors, 1.0)
    torch._foreach_mul_(gradients, factors)


def cosine(lr, min_lr, total, epoch):
    """Return the rate of the documented 'cos': squared warm-up, half a cosine, then min_lr held.

    It is YOLOX's yoloxwarmcos.
    """
    warmup = min(max(0.05 * total, 1), 3)
    hold = min(max(0.05 * total, 1), 15)
    start = max(0.1 * lr, 1e-6)
    if epoch <= warmup:
        return (lr - start) * (epoch / warmup) ** 2 + start
    if epoch >= total - hold:
        return min_lr
    done = (epoch - warmup) / (total - warmup - hold)
    return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * done))


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
    """Return the rate of the documented 'step': ten stairs, each lower by the same factor."""
    rate = (min_lr / lr) ** (1 / 9)
    return lr * rate ** math.floor(10 * epoch / total)


# lr_decay_type: function of the highest rate, the lowest, the number of epochs, and the epoch
# (0 …, parts too)
LR_DECAYS = {
    "linear": linear,
    "cos": cosine,
    "step": step,
}


def get_lr_scheduler(lr_decay_type, lr, min_lr, total_iters):
    """Return a function from the epoch (0 …, parts too) to the learning rate.

    lr_decay_type: a name of LR_DECAYS; total_iters: the number of epochs.
    """
    return partial(LR_DECAYS[lr_decay_type], lr, min_lr, total_iters)


def scaled_rates(settings, batch_size, transformer):
    """Return Init_lr and Min_lr, scaled from 64 pictures a step (transformers: 256) to the batch's.

    The documented code calls 64 and 256 nbs, the nominal batch size.
    """
    pictures = batch_size * settings.get("accumulate", 1)
    scale = pictures / (256 if transformer else 64)
    return scale * settings["Init_lr"], scale * settings["Min_lr"]


def fit_lr(settings, batch_size, transformer):
    """Return (Init_lr_fit, Min_lr_fit): the rates scaled by batch size, within the limits.

    The limits are the optimizer's documented ones.
    """
    entry = OPTIMIZERS[settings["optimizer_type"]]
    low, high = entry.transformer_limits if transformer else entry.limits
    Init_lr, Min_lr = scaled_rates(settings, batch_size, transformer)
    Init_lr_fit = min(max(Init_lr, low), high)
    Min_lr_fit = min(max(Min_lr, low * 1e-2), high * 1e-2)
    return Init_lr_fit, Min_lr_fit


def is_frozen(settings, epoch):
    """Return whether an epoch (0 …) trains the head alone."""
    return bool(settings.get("Freeze_Train")) and epoch < settings["Freeze_Epoch"]


def batch_size_names(settings):
    """Return the names of the settings with the batch sizes that will be trained with, in order.

    They are 'Freeze_batch_size', 'Unfreeze_batch_size', or both.
    """
    frozen = settings.get("Freeze_Epoch", 0) if settings.get("Freeze_Train") else 0
    begin = settings.get("Init_Epoch", 0)
    end = settings.get("UnFreeze_Epoch", math.inf)
    names = []
    if begin < frozen:
        names.append("Freeze_batch_size")
    if max(begin, frozen) < end:
        names.append("Unfreeze_batch_size")
    return [name for name in names if name in settings]


def set_optimizer_lr(optimizer, lr_scheduler_func, epoch):
    """Set every parameter group's rate to the epoch's, times the group's lr_scale if it has one."""
    lr = lr_scheduler_func(epoch)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def rate_at(settings, epoch, transformer):
    """Return the learning rate at an epoch (0 …), before layers' scales."""
    phase = "Freeze_batch_size" if is_frozen(settings, epoch) else "Unfreeze_batch_size"
    fitted = fit_lr(settings, settings[phase], transformer)
    curve = get_lr_scheduler(settings["lr_decay_type"], *fitted, settings["UnFreeze_Epoch"])
    return curve(epoch)


def describe_rates(settings, transformer):
    """Return the header's text: the optimizer, each phase's rates, the limits that changed them."""
    optimizer_type = settings["optimizer_type"]
    texts = []
    for name in batch_size_names(settings):
        rates = scaled_rates(settings, settings[name], transformer)
        fitted = fit_lr(settings, settings[name], transformer)
        text = f"lr {fitted[0]:.3g} to {fitted[1]:.3g}"
        for setting, scaled, value in zip(("Init_lr", "Min_lr"), rates, fitted):
            if scaled != value:
                text += (
                    f" ({setting} = {settings[setting]:.3g} gives {scaled:.3g}, "
                    f"outside {optimizer_type}'s limits)"
                )
        if text not in texts:
            texts.append(text)
    text = ", then ".join(texts) or "no epoch is left"
    return f"{optimizer_type}, {settings['lr_decay_type']}, {text}"
