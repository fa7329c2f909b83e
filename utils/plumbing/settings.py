"""What each setting may be, and what must hold between them: checked before training."""

import math
import os

import torch

from utils.dataloader import AUGMENTATIONS, RESIZES
from utils.optimizer import LR_DECAYS, OPTIMIZERS, phases
from utils.plumbing.errors import TOO_SMALL, UserError, did_you_mean, short_repr
from utils.plumbing.processes import LAUNCH_SETTINGS, local_rank, world_size
from utils.recipe import CLASS_WEIGHTS

WHOLE, NUMBER, TEXT, LIST = (int,), (int, float), (str,), (list, tuple)
TYPES = {
    WHOLE: "a whole number",
    NUMBER: "a number",
    TEXT: "a name or path in quotes, in UTF-8",
    LIST: "a list",
}
TEXTS = (
    "classes_path",
    "train_annotation_path",
    "test_annotation_path",
    "model_path",
    "save_dir",
    "backbone",
    "best_by",
    "resume",
)

MOST, BELOW_1 = 10**9, 1 - 1e-6  # more is a slip of the finger
BOUNDS = {  # setting: the lowest and highest number, which are whole where the lowest is
    "num_workers": (0, 1000),
    "cache_mb": (0.0, MOST),
    "seed": (0, 2**63 - 1),
    "input_shape": (1, 65535),
    "mean": (0.0, 1),
    "std": (0.001, 10),
    "crop_scale": (1e-6, 1),
    "val_crop": (1e-6, 1),
    "random_erasing": (0.0, 1),
    "Init_Epoch": (0, MOST),
    "Freeze_Epoch": (0, MOST),
    "Freeze_batch_size": (1, MOST),
    "UnFreeze_Epoch": (1, MOST),
    "Unfreeze_batch_size": (1, MOST),
    "accumulate": (1, 10_000),
    "Init_lr": (1e-9, 1000),
    "Min_lr": (0.0, 1000),
    "momentum": (0.0, BELOW_1),
    "weight_decay": (0.0, 1000),
    "backbone_lr_scale": (0.0, 1000),
    "label_smoothing": (0.0, BELOW_1),
    "mixup_alpha": (0.01, 1000),
    "cutmix_alpha": (0.01, 1000),
    "ema_decay": (0.0, BELOW_1),
    "clip_ratio": (1e-6, MOST),
    "clip_grad_norm": (1e-6, MOST),
    "early_stop": (0, MOST),
    "save_period": (1, MOST),
    "save_minutes": (0.0, MOST),
}
ITEMS = {
    "input_shape": ("height", "width"),
    **dict.fromkeys(("mean", "std"), ("red", "green", "blue")),
}  # lists of such numbers
FLAGS = ("Cuda", "distributed", "sync_bn", "compile", "pretrained", "Freeze_Train")
CHOICES = {  # setting: what it may be besides texts or such numbers, or instead of them
    **dict.fromkeys(FLAGS, (True, False)),
    "resume": (False, True),
    "model_path": ("",),
    "fp16": (True, False, "auto", "float32", "bfloat16", "float16"),
    "augmentation": AUGMENTATIONS,
    "resize": RESIZES,
    "num_workers": ("auto",),
    "optimizer_type": OPTIMIZERS,
    "lr_decay_type": LR_DECAYS,
    "class_weights": ("none", *CLASS_WEIGHTS),
    **dict.fromkeys(("mixup_alpha", "cutmix_alpha", "clip_ratio", "clip_grad_norm"), (0,)),
}


def fits(name, value, kind):
    """Return whether a value is of a type and, as a number, within the setting's bounds."""
    if isinstance(value, bool) or not isinstance(value, kind):  # Python counts True as an int
        return False
    if kind is TEXT:
        in_utf8 = value == value.encode(errors="replace").decode()
        return in_utf8 and "\0" not in value and (value != "" or name not in TEXTS)
    low, high = BOUNDS.get(name, (-1e300, 1e300))  # nan and inf are outside
    return kind is LIST or low <= value <= high


def kind_of(name, default):
    """Return the type of a setting; of a fork's own one its default's; None for choices alone."""
    if name in BOUNDS:
        default = BOUNDS[name][0]
    elif name in TEXTS:
        default = ""
    elif name in CHOICES or isinstance(default, bool):
        return None
    for kind in TYPES:
        if isinstance(default, kind):
            return kind
    return None


def choices_of(name, default):
    """Return what a setting may be besides its type, or instead of it."""
    flag = (True, False) if isinstance(default, bool) else ()
    return CHOICES.get(name, flag)


def is_one_of(value, choices):
    """Return whether a value is a choice; 1 is not True."""
    same_kind = [
        choice for choice in choices if isinstance(choice, bool) == isinstance(value, bool)
    ]
    return value in same_kind


def check_value(name, value, default=None):
    """Raise UserError unless a setting can have the value; `default` types a fork's own one."""
    value = value.tolist() if hasattr(value, "tolist") else value  # an array
    choices = choices_of(name, default)
    kind = kind_of(name, default)
    items = [value]
    if name in ITEMS and isinstance(value, LIST):
        items = value
    right = kind and len(items) == len(ITEMS.get(name, "1"))
    if right and all(fits(name, item, kind) for item in items):
        return
    if is_one_of(value, choices) or not (kind or choices):
        return
    hint = did_you_mean(short_repr(value).strip("'"), map(str, choices))
    raise UserError(f"{name} = {short_repr(value)} must be {allowed(name, kind, choices)}{hint}")


def allowed(name, kind, choices):
    """Return the values that a setting can have, for a message."""
    texts = [repr(choice) for choice in choices]
    if not kind:
        return f"one of {', '.join(texts)}"
    text = "or " if choices else ""
    if name in ITEMS:
        text += f"[{', '.join(ITEMS[name])}], each "
    text += TYPES[kind]
    if name in BOUNDS:
        low, high = BOUNDS[name]
        text += f" from {low:g} to {high:,}"
    elif name not in TEXTS:
        text += ", as its default is"
    return ", ".join([*texts, text])


def check_launch(s):
    """Raise UserError where the settings of the machine do not fit this machine or this launch."""
    for name in (*LAUNCH_SETTINGS, "save_dir"):
        if name in s:
            check_value(name, s[name])
    distributed = s.get("distributed")
    from_launcher = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    if distributed and not from_launcher <= os.environ.keys():
        raise UserError(
            "distributed = True needs a launcher: torchrun --nproc_per_node=2 train.py, or set "
            "distributed = False"
        )
    if distributed is False and world_size() > 1:
        raise UserError(
            "a launcher started several processes, but distributed = False: set it to True"
        )
    if s.get("Cuda") and local_rank() >= torch.cuda.device_count():
        raise UserError(
            "Cuda = True needs a GPU for each process, and PyTorch sees fewer here: set "
            "Cuda = False, or lower --nproc_per_node"
        )


def check_settings(s, continued=False):
    """Raise UserError for the first setting that is out of range, or at odds with another one.

    continued: a run's own settings, of which every epoch may be trained already.
    """
    check_launch(s)
    for name, value in s.items():
        check_value(name, value)
    check_epochs(s, continued)
    if {"Min_lr", "Init_lr"} <= s.keys() and s["Min_lr"] > s["Init_lr"]:
        raise UserError(f"Min_lr = {s['Min_lr']} must be at most Init_lr = {s['Init_lr']}")
    if s.get("sync_bn") and not (s.get("Cuda", True) and s.get("distributed", True)):
        raise UserError(
            "sync_bn = True works under torchrun on GPUs only (PyTorch's SyncBatchNorm has no CPU "
            "version): set sync_bn = False"
        )
    several_gpus = s.get("Cuda") and not s.get("distributed") and torch.cuda.device_count() > 1
    if s.get("compile") and several_gpus:
        raise UserError(
            "compile = True on several GPUs needs torchrun --nproc_per_node=2 train.py "
            "(DataParallel cannot copy a compiled network)"
        )
    for name in phases(s):
        check_divisible(name, s[name])


def check_epochs(s, continued):
    """Raise UserError where an epoch number of the settings lies behind the last one."""
    last = s.get("UnFreeze_Epoch", MOST)
    first = s.get("Init_Epoch", 0)
    if first >= last and not continued:
        raise UserError(f"Init_Epoch = {first} must be below UnFreeze_Epoch = {last}")
    frozen = s.get("Freeze_Epoch", 0)
    if s.get("Freeze_Train") and frozen > last:
        raise UserError(f"Freeze_Epoch = {frozen} must be at most UnFreeze_Epoch = {last}")


def check_divisible(name, batch_size):
    """Raise UserError unless every process gets the same share of a batch."""
    rest = batch_size % world_size()
    if not rest:
        return
    sizes = [str(size) for size in (batch_size - rest, batch_size - rest + world_size()) if size]
    raise UserError(
        f"{name} = {batch_size} cannot be divided by {world_size()} processes: "
        f"set it to {' or '.join(sizes)}"
    )


FEW_STEPS = 300  # a shorter training is warned of


def too_small(num_train, num_val, name, batch_size):
    """Return a sentence with the numbers, and the documented words beside it."""
    return (
        f"{num_train} training and {num_val} test pictures do not fill one batch of "
        f"{name} = {batch_size}: add pictures, or set it to {num_train} or less ({TOO_SMALL})"
    )


def check_phases(s, num_train, num_val):
    """Raise ValueError unless each phase has a whole batch: now, not after hours of the first."""
    for name in phases(s):
        if num_train < s[name] or not num_val:
            raise ValueError(too_small(num_train, num_val, name, s[name]))


def describe_few_steps(s, num_train):
    """Return a note where a training makes too few steps for most networks to learn, or ""."""
    epochs = s["UnFreeze_Epoch"]
    epoch_step = max(1, num_train // s["Unfreeze_batch_size"])
    steps = epochs * epoch_step // s["accumulate"]
    if steps >= FEW_STEPS or epochs >= 100:
        return ""
    needed = min(math.ceil(FEW_STEPS * s["accumulate"] / epoch_step), 100)
    return (
        f"NOTE: {num_train} pictures make {steps} steps in {epochs} epochs, and most networks need "
        f"hundreds to learn: --UnFreeze_Epoch {needed}\n"
    )
