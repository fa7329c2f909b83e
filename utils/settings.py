"""The settings: what each may be, and how the command line sets them. All of it is found out before training."""
import argparse
import ast
import copy
import os
import time
from functools import partial

import torch

from utils.dataloader import AUGMENTATIONS
from utils.errors import TOO_SMALL, UserError, nearest, shown
from utils.fit import backward
from utils.processes import world_size
from utils.recipe import OPTIMIZERS
from utils.scheduler import LR_DECAYS, phases

WHOLE, NUMBER, TEXT, LIST = (int,), (int, float), (str,), (list, tuple)
TYPES = {WHOLE: "a whole number", NUMBER: "a number", TEXT: "a name or path in quotes, in UTF-8", LIST: "a list"}
TEXTS = ("classes_path", "train_annotation_path", "test_annotation_path", "model_path", "save_dir", "backbone", "best_by", "resume")
FASTER = 1.1  # what bfloat16 must gain to be worth its rounding to 8 bits
MOST, BELOW_1 = 10 ** 9, 1 - 1e-6  # more is a slip of the finger
BOUNDS = {  # setting: the lowest and highest number, which are whole where the lowest is
    "num_workers": (0, 1000), "cache_mb": (0.0, MOST), "seed": (0, 2 ** 63 - 1), "input_shape": (1, 65535),
    "mean": (0.0, 1), "std": (0.001, 10), "crop_scale": (1e-6, 1), "val_crop": (1e-6, 1), "random_erasing": (0.0, 1),
    "Init_Epoch": (0, MOST), "Freeze_Epoch": (0, MOST), "Freeze_batch_size": (1, MOST), "UnFreeze_Epoch": (1, MOST),
    "Unfreeze_batch_size": (1, MOST), "accumulate": (1, 10_000), "Init_lr": (1e-9, 1000), "Min_lr": (0.0, 1000),
    "momentum": (0.0, BELOW_1), "weight_decay": (0.0, 1000), "backbone_lr_scale": (0.0, 1000),
    "label_smoothing": (0.0, BELOW_1), "mixup_alpha": (0.01, 1000), "cutmix_alpha": (0.01, 1000), "ema_decay": (0.0, BELOW_1),
    "clip_ratio": (1e-6, MOST), "clip_grad_norm": (1e-6, MOST), "early_stop": (0, MOST), "save_period": (1, MOST),
    "save_minutes": (0.0, MOST),
}
ITEMS = {"input_shape": ("height", "width"), **dict.fromkeys(("mean", "std"), ("red", "green", "blue"))}  # lists of such numbers
FLAGS = ("Cuda", "distributed", "sync_bn", "compile", "pretrained", "Freeze_Train")
CHOICES = {  # setting: what it may be besides texts or such numbers, or instead of them
    **dict.fromkeys(FLAGS, (True, False)), "resume": (False, True), "model_path": ("",), "fp16": (True, False, "auto"),
    "augmentation": AUGMENTATIONS, "optimizer_type": OPTIMIZERS, "lr_decay_type": LR_DECAYS, "class_weights": ("none", "balanced"),
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
    choices, names = CHOICES.get(name, (True, False) if isinstance(default, bool) else ()), ITEMS.get(name, ())
    example = low if name in BOUNDS else "" if name in TEXTS else None if choices else default  # of the type
    kind = next((kind for kind in TYPES if isinstance(example, kind)), None)
    items = value if names and isinstance(value, LIST) else [value]
    chosen = any(value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in choices)
    right = kind and len(items) == max(len(names), 1) and all(fits(item, kind, low, high) for item in items)
    if chosen or right and (value != "" or name not in TEXTS) or not (kind or choices):
        return
    wanted = list(map(repr, choices))
    if kind:
        wanted.append(("or " if choices else "") + (f"[{', '.join(names)}], each " if names else "") + TYPES[kind] + (
            f" from {low:g} to {high:,}" if name in BOUNDS else "" if name in TEXTS else ", as its default is"))
    hint = nearest(shown(value).strip("'"), map(str, choices))
    raise UserError(f"{name} = {shown(value)} must be {'' if kind else 'one of '}{', '.join(wanted)}{hint}")


def constants(path):
    """{setting: (its expression's syntax tree, its line's comment, the title above it)} of all names that a script assigns at
    module level; a title is a comment that follows a blank line."""
    with open(path, encoding="utf-8-sig") as file:
        source = file.read()
    lines, found = ["", *source.split("\n")], {}
    titles = {number: line[2:] for number, line in enumerate(lines) if line.startswith("# ") and not lines[number - 1].strip()}
    for node in ast.parse(source).body:
        title = next((titles[number] for number in reversed(titles) if number < node.lineno), "Settings")
        for target in getattr(node, "targets", [getattr(node, "target", None)]):
            if isinstance(target, ast.Name) and node.value:
                found[target.id] = ast.Expression(node.value), lines[node.lineno].partition(" #")[2].strip(), title
    return found


def parse(arguments, script, known):
    """{setting: value} of `--setting value` and `--setting=value`; --help shows the script's own groups."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--setting value …]", description=script["__doc__"], exit_on_error=False, allow_abbrev=False,
        argument_default=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"Other commands: {', '.join(f'python -m utils.{name}' for name in ('annotation', 'evaluate', 'predict', 'export'))}")
    parser.add_argument("--local-rank", "--local_rank", help=argparse.SUPPRESS)  # torch.distributed.launch's own
    groups = {title: parser.add_argument_group(title) for _, _, title in known.values()}
    for name, (_, comment, title) in known.items():
        default = shown(script[name])
        unsaid = [f"or {c!r}" for c in CHOICES.get(name, ()) if c not in (True, False, 0) and repr(c) not in comment]
        groups[title].add_argument(
            f"--{name}", type=partial(from_word, name, default=script[name]),
            metavar=f'"{default}"' if isinstance(script[name], LIST) else "VALUE",
            help="; ".join(filter(None, [comment, *unsaid, f"default: {default}"])).replace("%", "%%"))
    try:
        given, unknown = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise UserError(f"{error} (write --name=value); --help lists the settings") from None
    for word in unknown:
        hint = nearest(word.lstrip("-").partition("=")[0].replace("-", "_"), known) if word.startswith("-") else (
            ': a value with blanks needs quotes, as in --input_shape "[224, 224]"')
        raise UserError(f"{shown(word)} is no setting of {parser.prog}{hint}; --help lists them")
    return {name: value for name, value in vars(given).items() if name in known}


def from_word(name, word, default):
    """The value of a setting that a word of the command line gives: the Python value that it spells, or else the text."""
    if isinstance(default, str) and True not in CHOICES.get(name, ()):
        return word[1:-1] if len(word) > 1 and word[0] == word[-1] in "'\"" else word  # some shells leave them
    try:
        value = ast.literal_eval({"true": "True", "false": "False"}.get(word.lower(), word))
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return word
    return word if name in TEXTS and not isinstance(value, (bool, str)) else value  # 2026_11_24 spells a number as well


def command_line(script, arguments=None):
    """Set constants of the script, its globals(), from `--name value` or `--name=value`; returns all of them, {name: value}.
    What is computed from others (Min_lr from Init_lr) follows. A tuple becomes a list and '~' a path, also in the script."""
    known = constants(script["__file__"])
    changed = parse(arguments, script, known)
    for name, (expression, _, _) in known.items():
        if name not in changed and any(isinstance(node, ast.Name) and node.id in changed for node in ast.walk(expression)):
            changed[name] = eval(compile(expression, "settings", "eval"), script)
        value = changed.get(name, script[name])
        if name in changed:
            check_value(name, value, script[name])
        if isinstance(value, str) and name.endswith(("_path", "_dir", "resume")):
            value = os.path.expanduser(value)
        script[name] = list(value) if isinstance(value, tuple) else value
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
    (("Cuda",), lambda on: not on or int(os.environ.get("LOCAL_RANK", 0)) < torch.cuda.device_count(),
     "Cuda = {} needs a GPU for each process, and PyTorch sees fewer here: set Cuda = False, or lower --nproc_per_node"),
    (("sync_bn", "Cuda", "distributed"), lambda on, a, b: not on or (a and b),
     "sync_bn = {} works under torchrun on GPUs only (PyTorch's SyncBatchNorm has no CPU version): set sync_bn = False"),
    (("compile", "Cuda", "distributed"), lambda on, a, b: not on or not a or b or torch.cuda.device_count() < 2,
     "compile = {} on several GPUs needs torchrun --nproc_per_node=2 train.py (DataParallel cannot copy a compiled network)"),
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
            raise UserError(f"{name} = {s[name]} cannot be divided by {world_size()} processes: set it to {sizes}")


def too_small(num_train, num_val, name, batch_size):
    """The documented words next to a sentence with the numbers."""
    return (f"{TOO_SMALL} {num_train} training and {num_val} test pictures do not fill one batch of {name} = {batch_size}: "
            f"add pictures, or set it to {num_train} or less")


def check_phases(s, num_train, num_val):
    """ValueError unless each phase that will be trained has a whole batch: found out now, not after hours of the first."""
    for name in phases(s):
        if num_train < s[name] or not num_val:
            raise ValueError(too_small(num_train, num_val, name, s[name]))


def choose_precision(settings, model, batch, recipe):
    """(fp16, why) of the setting; for 'auto' True on CUDA, and on a CPU what trains this network faster, found by trying two to
    four steps: bfloat16 makes some networks three times as fast and others half as fast on one machine."""
    if settings["fp16"] != "auto" or settings["Cuda"]:
        return bool(settings["fp16"]), ""
    trial, off = copy.deepcopy(model).train(), torch.amp.GradScaler("cpu", enabled=False)
    seconds, begin = {False: [], True: []}, time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        for fp16 in (False, True) * 4:
            start = time.perf_counter()
            if start - begin > 5 and len(seconds[True]) >= 2:
                break
            backward(trial, [batch], False, fp16, off, recipe)
            seconds[fp16].append(time.perf_counter() - start)
            trial.zero_grad()
    single, half = (len(batch[0]) / min(seconds[fp16]) for fp16 in (False, True))
    return half > FASTER * single, f"tried: float32 {single:.0f}, bfloat16 {half:.0f} images/s"
