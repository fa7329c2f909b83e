"""The settings: what each may be, and how the command line sets them. All of it is found out before training."""

import os

import torch

from utils.dataloader import AUGMENTATIONS, RESIZES
from utils.optimizer import LR_DECAYS, OPTIMIZERS, phases
from utils.plumbing.errors import TOO_SMALL, UserError, did_you_mean, short_repr
from utils.plumbing.processes import world_size
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


def fits(value, kind, low, high):
    """Whether a value is of one of the types, a number within its bounds, a text that a file name can hold."""
    if isinstance(value, bool) or not isinstance(value, kind):  # Python counts True as an int
        return False
    if isinstance(value, str):
        return "\0" not in value and value == value.encode(errors="replace").decode()
    return kind not in (WHOLE, NUMBER) or low <= value <= high


def check_value(name, value, default=None):
    """UserError when `value` is not one that the setting `name` can have; one of a fork's own is typed by its `default`."""
    low, high = BOUNDS.get(name, (-1e300, 1e300))  # nan and inf are outside
    choices, names = (
        CHOICES.get(name, (True, False) if isinstance(default, bool) else ()),
        ITEMS.get(name, ()),
    )
    example = (
        low if name in BOUNDS else "" if name in TEXTS else None if choices else default
    )  # of the type
    kind = next((kind for kind in TYPES if isinstance(example, kind)), None)
    items = value if names and isinstance(value, LIST) else [value]
    chosen = any(
        value == choice and isinstance(value, bool) == isinstance(choice, bool)
        for choice in choices
    )
    right = (
        kind
        and len(items) == max(len(names), 1)
        and all(fits(item, kind, low, high) for item in items)
    )
    if chosen or right and (value != "" or name not in TEXTS) or not (kind or choices):
        return
    wanted = list(map(repr, choices))
    if kind:
        wanted.append(
            ("or " if choices else "")
            + (f"[{', '.join(names)}], each " if names else "")
            + TYPES[kind]
            + (
                f" from {low:g} to {high:,}"
                if name in BOUNDS
                else ""
                if name in TEXTS
                else ", as its default is"
            )
        )
    hint = did_you_mean(short_repr(value).strip("'"), map(str, choices))
    raise UserError(
        f"{name} = {short_repr(value)} must be {'' if kind else 'one of '}{', '.join(wanted)}{hint}"
    )


RELATIONS = (  # settings, what must hold between them, and what is said otherwise; passed over where one is gone
    (
        ("Init_Epoch", "UnFreeze_Epoch"),
        lambda a, b: a < b,
        "Init_Epoch = {} must be below UnFreeze_Epoch = {}",
    ),
    (
        ("Freeze_Epoch", "UnFreeze_Epoch", "Freeze_Train"),
        lambda a, b, on: a <= b or not on,
        "Freeze_Epoch = {} must be at most UnFreeze_Epoch = {}",
    ),
    (("Min_lr", "Init_lr"), lambda a, b: a <= b, "Min_lr = {} must be at most Init_lr = {}"),
    (
        ("distributed",),
        lambda on: (
            not on
            or {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
            <= os.environ.keys()
        ),
        "distributed = {} needs a launcher: torchrun --nproc_per_node=2 train.py, or set distributed = False",
    ),
    (
        ("distributed",),
        lambda on: on or world_size() == 1,
        "a launcher started several processes, but distributed = {}: set it to True",
    ),
    (
        ("Cuda",),
        lambda on: not on or int(os.environ.get("LOCAL_RANK", 0)) < torch.cuda.device_count(),
        "Cuda = {} needs a GPU for each process, and PyTorch sees fewer here: set Cuda = False, or lower --nproc_per_node",
    ),
    (
        ("sync_bn", "Cuda", "distributed"),
        lambda on, a, b: not on or (a and b),
        "sync_bn = {} works under torchrun on GPUs only (PyTorch's SyncBatchNorm has no CPU version): set sync_bn = False",
    ),
    (
        ("compile", "Cuda", "distributed"),
        lambda on, a, b: not on or not a or b or torch.cuda.device_count() < 2,
        "compile = {} on several GPUs needs torchrun --nproc_per_node=2 train.py (DataParallel cannot copy a compiled network)",
    ),
)


def check_settings(s):
    """UserError for the first setting that is out of range, of the wrong type, or at odds with another one."""
    for name, value in s.items():
        check_value(name, value)
    for names, holds, sentence in RELATIONS:
        if all(name in s for name in names) and not holds(*(s[name] for name in names)):
            raise UserError(sentence.format(*(s[name] for name in names)))
    for name in phases(s):
        if s[name] % world_size():
            below = s[name] - s[name] % world_size()
            sizes = " or ".join(str(n) for n in (below, below + world_size()) if n)
            raise UserError(
                f"{name} = {s[name]} cannot be divided by {world_size()} processes: set it to {sizes}"
            )


def too_small(num_train, num_val, name, batch_size):
    """The documented words next to a sentence with the numbers."""
    return (
        f"{TOO_SMALL} {num_train} training and {num_val} test pictures do not fill one batch of {name} = {batch_size}: "
        f"add pictures, or set it to {num_train} or less"
    )


def check_phases(s, num_train, num_val):
    """ValueError unless each phase that will be trained has a whole batch: found out now, not after hours of the first."""
    for name in phases(s):
        if num_train < s[name] or not num_val:
            raise ValueError(too_small(num_train, num_val, name, s[name]))
