"""What each setting may be, and what must hold between them: checked before training."""

import math
import os
from typing import NamedTuple

import torch

from utils.dataloader import AUGMENTATIONS, RESIZES
from utils.optimizer import LR_DECAYS, OPTIMIZERS, batch_size_names
from utils.plumbing.errors import TOO_SMALL, UserError, did_you_mean, short_repr
from utils.plumbing.processes import (
    is_data_parallel,
    local_rank,
    rank,
    world_size,
)
from utils.recipe import CLASS_WEIGHTS


class Kind(NamedTuple):
    """Values of some types; numbers within bounds. With names: a list with one for each."""

    text: str  # for messages
    types: tuple
    low: float = -1e300  # nan and inf are outside
    high: float = 1e300
    names: tuple = ()

    def __repr__(self):
        """Return the kind as messages show it."""
        return f"[{', '.join(self.names)}], each {self.text}" if self.names else self.text


def whole(low, high=10**9, names=()):  # above a billion it is a slip of the finger
    """Return the Kind of whole numbers within bounds."""
    return Kind(f"a whole number from {low} to {high:,}", (int,), low, high, names)


def number(low, high=10**9, names=()):
    """Return the Kind of numbers within bounds."""
    return Kind(f"a number from {low:g} to {high:,}", (int, float), low, high, names)


TEXT = Kind("a name or path in quotes, in UTF-8", (str,))
LIKE_DEFAULT = (  # what a fork's own settings may be
    Kind("a whole number", (int,)),
    Kind("a number", (int, float)),
    Kind("a text in UTF-8", (str,)),
    Kind("a list", (list, tuple)),
)
FLAG = (True, False)
CHANNELS = ("red", "green", "blue")
BELOW_1 = number(0, 1 - 1e-6)
FEW_STEPS = 300  # a training of fewer is warned of
RULES = {  # setting: the values that it may have, or kinds of values, or one kind
    "Cuda": FLAG,
    "distributed": FLAG,
    "sync_bn": FLAG,
    "fp16": (True, False, "auto", "float32", "bfloat16", "float16"),
    "compile": FLAG,
    "num_workers": ("auto", whole(0, 1000)),
    "cache_mb": number(0),
    "seed": whole(0, 2**63 - 1),
    "classes_path": TEXT,
    "train_annotation_path": TEXT,
    "test_annotation_path": TEXT,
    "input_shape": whole(1, 65535, ("height", "width")),
    "resize": RESIZES,
    "augmentation": AUGMENTATIONS,
    "crop_scale": number(1e-6, 1),
    "mean": number(0, 1, CHANNELS),
    "std": number(0.001, 10, CHANNELS),
    "val_crop": number(1e-6, 1),
    "random_erasing": number(0, 1),
    "backbone": TEXT,
    "pretrained": FLAG,
    "model_path": ("", TEXT),
    "Init_Epoch": whole(0),
    "Freeze_Epoch": whole(0),
    "Freeze_batch_size": whole(1),
    "UnFreeze_Epoch": whole(1),
    "Unfreeze_batch_size": whole(1),
    "Freeze_Train": FLAG,
    "accumulate": whole(1),
    "Init_lr": number(1e-9, 1000),
    "Min_lr": number(0),
    "optimizer_type": OPTIMIZERS,
    "momentum": BELOW_1,
    "weight_decay": number(0),
    "lr_decay_type": LR_DECAYS,
    "backbone_lr_scale": number(0),
    "label_smoothing": BELOW_1,
    "mixup_alpha": (0, number(0.01, 1000)),
    "cutmix_alpha": (0, number(0.01, 1000)),
    "class_weights": ("none", *CLASS_WEIGHTS),
    "ema_decay": BELOW_1,
    "clip_ratio": (0, number(1e-6)),
    "clip_grad_norm": (0, number(1e-6)),
    "best_by": TEXT,
    "early_stop": whole(0),
    "save_dir": TEXT,
    "save_period": whole(1),
    "save_minutes": number(0),
    "resume": (False, True, TEXT),
}


def rules_of(name, default):
    """Return what a setting may be, as a list of values and kinds of values.

    A setting without a rule may be what is of its default's type.
    """
    if name in RULES:
        rules = RULES[name]
        return [rules] if isinstance(rules, Kind) else list(rules)
    if isinstance(default, bool):
        return list(FLAG)
    return [kind for kind in LIKE_DEFAULT if isinstance(default, kind.types)][:1]


def fits(value, rules):
    """Return whether a value is one of those that the rules allow."""
    return any(fits_one(value, rule) for rule in rules)


def fits_one(value, rule):
    """Return whether a value is the one that a rule is, or of the kind that it is."""
    if not isinstance(rule, Kind):
        return value == rule and isinstance(value, bool) == isinstance(rule, bool)
    if not rule.names:
        return is_of(value, rule)
    right = isinstance(value, (list, tuple)) and len(value) == len(rule.names)
    return right and all(is_of(item, rule) for item in value)


def is_of(value, kind):
    """Return whether a value, or an item of a list, is of a kind."""
    if isinstance(value, bool) or not isinstance(value, kind.types):  # True is an int in Python
        return False
    if isinstance(value, str):
        in_utf8 = value == value.encode(errors="replace").decode()
        return in_utf8 and "\0" not in value and (value != "" or kind is not TEXT)
    return isinstance(value, (list, tuple)) or kind.low <= value <= kind.high


def check_value(name, value, default=None):
    """Raise UserError unless a setting can have the value.

    default: of a setting without a rule, which may have values of its type.
    """
    rules = rules_of(name, default)
    if rules and not fits(value, rules):
        texts = map(repr, rules)
        words = [rule for rule in rules if isinstance(rule, str)]
        near = did_you_mean(short_repr(value).strip("'"), words)
        raise UserError(f"{name} = {short_repr(value)} must be {' or '.join(texts)}{near}")


def check_launch(settings):
    """Raise UserError for a setting out of range, or at odds with this machine or this launch."""
    for name, value in settings.items():
        check_value(name, value)
    distributed = settings.get("distributed")
    from_launcher = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    if distributed and not from_launcher <= os.environ.keys():
        raise UserError(
            "distributed = True needs a launcher: torchrun --nproc_per_node=2 train.py, or set "
            "distributed = False"
        )
    if distributed is False and (world_size() > 1 or rank() > 0):
        raise UserError(
            "a launcher started several processes (RANK and WORLD_SIZE are set), but distributed = "
            "False: set it to True, or remove them (unset RANK WORLD_SIZE)"
        )
    if settings.get("Cuda") and local_rank() >= torch.cuda.device_count():
        raise UserError(
            "Cuda = True needs a GPU for each process, and PyTorch sees fewer here: set "
            "Cuda = False, or lower --nproc_per_node"
        )


def check_settings(settings, continued=False):
    """Raise UserError for the first setting that is out of range, or at odds with another one.

    continued: a run's own settings, of which every epoch may be trained already.
    """
    check_launch(settings)
    check_epochs(settings, continued)
    if {"Min_lr", "Init_lr"} <= settings.keys() and settings["Min_lr"] > settings["Init_lr"]:
        raise UserError(
            f"Min_lr = {settings['Min_lr']} must be at most Init_lr = {settings['Init_lr']}"
        )
    on_gpus = settings.get("Cuda", True)
    launched = settings.get("distributed", True)
    if settings.get("sync_bn") and not (on_gpus and launched):
        raise UserError(
            "sync_bn = True works under torchrun on GPUs only (PyTorch's SyncBatchNorm has no CPU "
            "version): set sync_bn = False"
        )
    if is_data_parallel(settings):
        check_data_parallel(settings)
    number = world_size()
    for name in batch_size_names(settings):
        if settings[name] % number:
            raise UserError(
                f"{name} = {settings[name]} cannot be divided by {number} processes: "
                f"set it to a multiple of {number}"
            )


def check_data_parallel(settings):
    """Raise UserError for what DataParallel cannot do."""
    problem = None
    if settings.get("compile"):
        problem = "compile = True", "it cannot copy a compiled network"
    elif settings.get("fp16") == "bfloat16":
        problem = "fp16 = 'bfloat16'", "its threads would compute in float16"
    if problem:
        name, reason = problem
        raise UserError(
            f"{name} on several GPUs needs torchrun --nproc_per_node=2 train.py, as without it "
            f"DataParallel trains, and {reason}"
        )


def check_epochs(settings, continued):
    """Raise UserError where an epoch number of the settings lies behind the last one."""
    last = settings.get("UnFreeze_Epoch", math.inf)
    first = settings.get("Init_Epoch", 0)
    if first >= last and not continued:
        raise UserError(f"Init_Epoch = {first} must be below UnFreeze_Epoch = {last}")
    frozen = settings.get("Freeze_Epoch", 0)
    if settings.get("Freeze_Train") and frozen > last:
        raise UserError(f"Freeze_Epoch = {frozen} must be at most UnFreeze_Epoch = {last}")


def too_small(num_train, num_val, name, batch_size):
    """Return a sentence with the numbers, and the documented words beside it."""
    return (
        f"{num_train} training and {num_val} test pictures do not fill one batch of "
        f"{name} = {batch_size}: add pictures, or set it to {num_train} or less ({TOO_SMALL})"
    )


def check_phases(settings, num_train, num_val):
    """Raise ValueError unless each phase has a whole batch: now, not after hours of the first."""
    for name in batch_size_names(settings):
        if num_train < settings[name] or not num_val:
            raise ValueError(too_small(num_train, num_val, name, settings[name]))


def describe_few_steps(settings, num_train):
    """Return a note where a training makes too few steps for most networks to learn, or ""."""
    epochs = settings["UnFreeze_Epoch"]
    batches = max(1, num_train // settings["Unfreeze_batch_size"])
    epoch_steps = math.ceil(batches / settings.get("accumulate", 1))
    steps = epochs * epoch_steps
    if steps >= FEW_STEPS or epochs >= 100:
        return ""
    needed = min(math.ceil(FEW_STEPS / epoch_steps), 100)
    return (
        f"NOTE: {num_train} pictures make {steps} steps in {epochs} epochs, and most networks need "
        f"hundreds to learn: --UnFreeze_Epoch {needed}"
    )
