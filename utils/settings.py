"""The settings: what each may be, and how the command line sets them. All of it is found out before training."""
import argparse
import ast
import os
import shutil
from typing import Any, NamedTuple

import torch

from utils.dataloader import AUGMENTATIONS
from utils.errors import TOO_SMALL, UserError, nearest, shown
from utils.processes import world_size
from utils.recipe import OPTIMIZERS, figures_of, sums_of
from utils.scheduler import LR_DECAYS

MOST = 10 ** 9  # of whole numbers: beyond it is a slip of the finger


def is_path(value):
    try:
        return "\0" not in value and bool(value.encode("utf-8"))
    except UnicodeEncodeError:  # bytes of a command line that are no UTF-8
        return False


class Rule(NamedTuple):
    types: tuple
    test: Any
    wanted: str


FLAG = Rule((bool,), lambda v: True, "True or False")
COUNT = Rule((int,), lambda v: 0 <= v <= MOST, "a whole number from 0 to 1,000,000,000")
SIZE = Rule((int,), lambda v: 1 <= v <= MOST, "a whole number from 1 to 1,000,000,000")
SEED = Rule((int,), lambda v: 0 <= v < 2 ** 63, "a whole number from 0 to below 2 ** 63")
RATE = Rule((int, float), lambda v: 0 < v < 1e9, "a number above 0")
AMOUNT = Rule((int, float), lambda v: 0 <= v < 1e9, "a number, 0 or more")
ALPHA = Rule((int, float), lambda v: v == 0 or 0.01 <= v <= 1000, "0, or a number from 0.01 to 1000")
SHARE = Rule((int, float), lambda v: 0 <= v <= 1, "a number from 0 to 1")
BELOW_ONE = Rule((int, float), lambda v: 0 <= v < 1, "a number from 0 to below 1")
PART = Rule((int, float), lambda v: 1e-6 <= v <= 1, "a number above 0, at most 1")
TEXT = Rule((str,), is_path, "a path or name in quotes, in UTF-8")
PATH_OR_EMPTY = Rule((str,), lambda v: v == "" or is_path(v), "a path in quotes, '' for none")
SHAPE = Rule((list, tuple), lambda v: len(v) == 2 and all(type(n) is int and 0 < n <= 65535 for n in v), "[height, width]")

RULES = {  # setting: its rule, or a collection of its choices
    "Cuda": FLAG, "distributed": FLAG, "sync_bn": FLAG, "fp16": (True, False, "auto"), "channels_last": FLAG, "compile": FLAG,
    "seed": SEED, "classes_path": TEXT, "train_annotation_path": TEXT, "test_annotation_path": TEXT,
    "input_shape": SHAPE, "backbone": TEXT, "pretrained": FLAG, "model_path": PATH_OR_EMPTY,
    "Init_Epoch": COUNT, "Freeze_Epoch": COUNT, "Freeze_batch_size": SIZE, "UnFreeze_Epoch": SIZE,
    "Unfreeze_batch_size": SIZE, "Freeze_Train": FLAG, "accumulate": SIZE, "Init_lr": RATE, "Min_lr": RATE,
    "optimizer_type": OPTIMIZERS, "momentum": BELOW_ONE, "weight_decay": AMOUNT,
    "lr_decay_type": LR_DECAYS, "backbone_lr_scale": AMOUNT, "clip_grad_norm": AMOUNT, "ema_decay": BELOW_ONE,
    "augmentation": AUGMENTATIONS, "crop_scale": PART, "val_crop": PART, "random_erasing": SHARE,
    "mixup_alpha": ALPHA, "cutmix_alpha": ALPHA, "label_smoothing": BELOW_ONE,
    "class_weights": ("none", "balanced"), "early_stop": COUNT, "best_by": TEXT, "save_period": SIZE, "save_minutes": AMOUNT,
    "save_dir": TEXT, "num_workers": COUNT, "cache_mb": AMOUNT,
    "resume": Rule((bool, str), lambda v: v is True or v is False or is_path(v), "False, True or the path of a run's folder"),
}


def rule_of(name, default):
    """The rule of a setting; of one that a fork has added, its default's type (None: anything)."""
    if name in RULES or default is None:
        return RULES.get(name)
    types = (int, float) if type(default) is float else (list, tuple) if isinstance(default, (list, tuple)) else (type(default),)
    return Rule(types, lambda v: True, f"{'a number' if type(default) is float else type(default).__name__}, as its default is")


def is_choices(rule):
    return rule is not None and not isinstance(rule, Rule)


def check_value(name, value, default=None):
    """UserError when `value` is not one that the setting `name` can have."""
    rule = rule_of(name, default)
    if is_choices(rule):
        if not any(value == choice and type(value) is type(choice) for choice in rule):
            raise UserError(f"{name} = {shown(value)} is none of its choices: {', '.join(map(repr, rule))}{nearest(value, map(str, rule))}")
    elif rule:
        of_type = isinstance(value, rule.types) and (not isinstance(value, bool) or bool in rule.types)
        if not of_type or not rule.test(value):
            raise UserError(f"{name} = {shown(value)} must be {rule.wanted}")


def constants(path):
    """{setting: (its expression's syntax tree, its line's comment)} of a script: every name assigned at module level."""
    with open(path, encoding="utf-8") as file:
        source = file.read()
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target if isinstance(node, ast.AnnAssign) else None
        if isinstance(target, ast.Name) and node.value:
            found[target.id] = ast.Expression(node.value), lines[node.lineno - 1].partition("  # ")[2]
    return found


def from_word(name, word, default):
    """The value of a setting that a word of the command line gives: the Python value that it spells, or else the text."""
    if isinstance(default, str) and name not in ("fp16", "resume"):
        return word.strip("'\"")  # some shells leave them
    try:
        value = ast.literal_eval(word)
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return word
    return word if name == "resume" and not isinstance(value, (bool, str)) else value  # 2026_11_24 spells a number as well


def command_line(script, arguments=None):
    """Set constants of the script from `--name value` or `--name=value`; returns all of them, {name: value}.

    script: its globals(). A value is read as a Python literal, or else taken as text. Constants that are computed from others
    (Min_lr from Init_lr) follow. UserError for an unknown name and for a value that the setting cannot have.
    """
    known = constants(script["__file__"])
    defaults = {name: script[name] for name in known}
    parser = argparse.ArgumentParser(usage="%(prog)s [--setting value …]", description=script["__doc__"], exit_on_error=False,
                                     allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local-rank", "--local_rank", help=argparse.SUPPRESS)  # torch.distributed.launch's own
    for name, (_, comment) in known.items():
        rule = rule_of(name, defaults[name])
        choices = f" ({', '.join(map(repr, rule))})" if is_choices(rule) else ""
        parser.add_argument(f"--{name}", default=argparse.SUPPRESS, metavar=repr(defaults[name]).replace("%", "%%"),
                            help=(comment + choices).replace("%", "%%"))
    try:
        given, unknown = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise UserError(f"{error}; --help lists the settings") from None
    if unknown:
        raise UserError(f"{unknown[0]!r} is no setting of {parser.prog}"
                        f"{nearest(unknown[0].lstrip('-').partition('=')[0], known)}; --help lists them")
    changed = {name: from_word(name, word, defaults[name]) for name, word in vars(given).items() if name in known}
    for name, (expression, _) in known.items():
        if name not in changed and any(isinstance(node, ast.Name) and node.id in changed for node in ast.walk(expression)):
            changed[name] = eval(compile(expression, "settings", "eval"), script)
        if name in changed:
            check_value(name, changed[name], defaults[name])
            script[name] = changed[name]
    return {name: script[name] for name in known}


RELATIONS = (  # settings, what must hold between them, and what is said otherwise; passed over where one is gone
    (("Init_Epoch", "UnFreeze_Epoch"), lambda a, b: a < b, "Init_Epoch = {} must be below UnFreeze_Epoch = {}"),
    (("Freeze_Epoch", "UnFreeze_Epoch", "Freeze_Train"), lambda a, b, on: a <= b or not on,
     "Freeze_Epoch = {} must be at most UnFreeze_Epoch = {}"),
    (("Min_lr", "Init_lr"), lambda a, b: a <= b, "Min_lr = {} must be at most Init_lr = {}"),
    (("distributed",), lambda on: not on or {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys(),
     "distributed = {} needs a launcher: torchrun --nproc_per_node=2 train.py, or set distributed = False"),
    (("distributed",), lambda on: on or world_size() == 1,
     "a launcher started several processes, but distributed = {}: set it to True"),
    (("Cuda",), lambda on: not on or torch.cuda.is_available(), "Cuda = {}, but PyTorch sees no GPU: set Cuda = False"),
    (("sync_bn", "Cuda", "distributed"), lambda on, a, b: not on or (a and b),
     "sync_bn = {} works under torchrun on GPUs only (PyTorch's SyncBatchNorm has no CPU version): set sync_bn = False"),
    (("Cuda", "distributed"), lambda a, b: not (a and b) or int(os.environ["LOCAL_RANK"]) < torch.cuda.device_count(),
     "Cuda = {}, distributed = {}: more processes than this machine has GPUs: lower --nproc_per_node"),
)


def check_settings(s):
    """UserError for the first setting that is out of range, of the wrong type, or at odds with another one."""
    for name in RULES:
        if name in s:
            check_value(name, s[name])
    for names, fits, sentence in RELATIONS:
        if all(name in s for name in names) and not fits(*(s[name] for name in names)):
            raise UserError(sentence.format(*(s[name] for name in names)))
    for name in ("Freeze_batch_size", "Unfreeze_batch_size"):
        if name in s and s[name] % world_size():
            below = s[name] - s[name] % world_size()
            fits = " or ".join(str(n) for n in (below, below + world_size()) if n)
            raise UserError(f"{name} = {s[name]} cannot be divided by {world_size()} processes: set it to {fits}")


def too_small(num_train, num_val, name, batch_size):
    """The documented words next to a sentence with the numbers."""
    return (f"{TOO_SMALL} {num_train} training and {num_val} test pictures do not fill one batch of {name} = {batch_size}: "
            f"add pictures, or lower the batch size")


def check_phases(s, num_train, num_val, has_batch_norm):
    """Both phases that training will go through can be trained: found out now, not after hours of the first. ValueError, UserError."""
    frozen = s.get("Freeze_Train") and s["Init_Epoch"] < s["Freeze_Epoch"]
    unfrozen = not s.get("Freeze_Train") or s["Freeze_Epoch"] < s["UnFreeze_Epoch"]
    for name, used in (("Freeze_batch_size", frozen), ("Unfreeze_batch_size", unfrozen)):
        if used and (num_train < s[name] or not num_val):
            raise ValueError(too_small(num_train, num_val, name, s[name]))
    if unfrozen and has_batch_norm and not s.get("sync_bn"):  # frozen, its statistics stand still
        check_batch_norm("Unfreeze_batch_size", s["Unfreeze_batch_size"])
    note_shared_memory(s)


def note_shared_memory(s):
    """Print a note when the batches in flight may not fit into /dev/shm, of which docker gives a container 64 MB."""
    if not s.get("num_workers") or not os.path.isdir("/dev/shm") or int(os.environ.get("LOCAL_RANK", 0)):
        return
    free, (height, width) = shutil.disk_usage("/dev/shm").free, s["input_shape"]
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    batches = s["num_workers"] * 2 + 2  # each worker makes two ahead; one is here and one in use
    need = processes * batches * s["Unfreeze_batch_size"] // world_size() * height * width * 3
    if need > free:
        print(f"NOTE: /dev/shm has {free / 1e6:.0f} MB free, and the batches in flight may take {need / 1e6:.0f} MB: if workers fail, "
              f"give the container more (docker run --shm-size=2g), or set num_workers = 0", flush=True)


def figure_names(num_classes):
    nothing = sums_of(torch.zeros(()), torch.zeros(1, num_classes), torch.zeros(1, dtype=torch.int64), {})
    return ["val_loss" if name == "loss" else name for name in figures_of(nothing, {})]


def check_best_by(best_by, num_classes):
    """UserError unless validation has a figure of that name."""
    names = figure_names(num_classes)
    if best_by not in names:
        raise UserError(f"best_by = {shown(best_by)} is no figure of validation: {', '.join(map(repr, names))}{nearest(best_by, names)}")


def check_batch_norm(name, batch_size):
    """A BatchNorm network cannot learn from one picture per process."""
    if batch_size // world_size() < 2:
        raise UserError(f"{name} = {batch_size} leaves one picture per process, and this network's BatchNorm "
                        f"needs at least two: set it to {2 * world_size()} or more")
