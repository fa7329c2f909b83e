"""The documented learning-rate curves: functions of the epoch, so that a resumed run needs no scheduler state."""
import math
from functools import partial

from utils.recipe import OPTIMIZERS


def cosine(lr, min_lr, total, epoch):
    """The documented 'cos': a squared warm-up, half a cosine, then min_lr held (YOLOX's yoloxwarmcos)."""
    warmup = min(max(0.05 * total, 1), 3)
    hold = min(max(0.05 * total, 1), 15)
    start = max(0.1 * lr, 1e-6)
    if epoch <= warmup:
        return (lr - start) * (epoch / warmup) ** 2 + start
    if epoch >= total - hold:
        return min_lr
    return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * (epoch - warmup) / (total - warmup - hold)))


def step(lr, min_lr, total, epoch):
    """The documented 'step': ten equal stairs from lr to min_lr, each beginning with an epoch."""
    rate = (min_lr / lr) ** (1 / 9)
    return lr * rate ** (math.floor(epoch) // (total / 10))


LR_DECAYS = {  # lr_decay_type: function of the highest rate, the lowest, the number of epochs, and the epoch (0 …, parts too)
    "cos": cosine,
    "step": step,
}


def get_lr_scheduler(lr_decay_type, lr, min_lr, total_iters):
    """A function from the epoch (0 …, parts too) to the learning rate; lr_decay_type is a name of LR_DECAYS."""
    return partial(LR_DECAYS[lr_decay_type], lr, min_lr, total_iters)


NBS = {False: 64, True: 256}  # pictures a step that Init_lr and Min_lr are for; a transformer's are more


def fit_lr(batch_size, Init_lr, Min_lr, optimizer_type, transformer):
    """(Init_lr_fit, Min_lr_fit): the rates scaled by batch size and held within the optimizer's documented limits."""
    low, high = OPTIMIZERS[optimizer_type][2 if transformer else 1]
    scale = batch_size / NBS[transformer]
    return min(max(scale * Init_lr, low), high), min(max(scale * Min_lr, low * 1e-2), high * 1e-2)


def phases(s):
    """Which of 'Freeze_batch_size' and 'Unfreeze_batch_size' will be trained with, in this order. s: train.py's settings."""
    frozen = s.get("Freeze_Epoch", 0) if s.get("Freeze_Train") else 0
    spans = {"Freeze_batch_size": (0, frozen), "Unfreeze_batch_size": (frozen, s.get("UnFreeze_Epoch", math.inf))}
    return [name for name, (first, end) in spans.items() if name in s and max(first, s.get("Init_Epoch", 0)) < end]


def set_optimizer_lr(optimizer, lr_scheduler_func, epoch):
    """Set every parameter group to the epoch's rate, times the group's own lr_scale where it has one."""
    lr = lr_scheduler_func(epoch)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
