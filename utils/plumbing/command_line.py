"""The command line: any constant of train.py by its name, and --help from its comments.

A run that is continued has settings of its own. For each constant the command line wins; else what
was edited in train.py since the run was started last; else the run's own value.
"""

import argparse
import ast
import os
from typing import NamedTuple

from utils.plumbing.errors import UserError, did_you_mean, short_repr
from utils.plumbing.processes import LAUNCH_SETTINGS
from utils.plumbing.settings import BOUNDS, CHOICES, LIST, TEXTS, check_value

COMMANDS = ("annotation", "evaluate", "predict", "export")
FIXED = ("pretrained", "model_path", "Init_Epoch", "save_dir")  # used only where a run begins

# What other programs call a setting → the setting that is meant
OTHER_NAMES = {
    "epochs": "UnFreeze_Epoch",
    "epoch": "UnFreeze_Epoch",
    "num_epochs": "UnFreeze_Epoch",
    "max_epochs": "UnFreeze_Epoch",
    "lr": "Init_lr",
    "lr0": "Init_lr",
    "learning_rate": "Init_lr",
    "b": "Unfreeze_batch_size",
    "batch": "Unfreeze_batch_size",
    "batch_size": "Unfreeze_batch_size",
    "j": "num_workers",
    "workers": "num_workers",
    "imgsz": "input_shape",
    "img": "input_shape",
    "img_size": "input_shape",
    "image_size": "input_shape",
    "size": "input_shape",
    "crop_size": "input_shape",
    "model": "backbone",
    "model_name": "backbone",
    "arch": "backbone",
    "network": "backbone",
    "net": "backbone",
    "weights": "model_path",
    "checkpoint": "model_path",
    "data": "train_annotation_path",
    "data_path": "train_annotation_path",
    "dataset": "train_annotation_path",
    "train": "train_annotation_path",
    "val": "test_annotation_path",
    "test": "test_annotation_path",
    "classes": "classes_path",
    "num_classes": "classes_path",
    "gpu": "Cuda",
    "gpus": "Cuda",
    "device": "Cuda",
    "amp": "fp16",
    "half": "fp16",
    "bf16": "fp16",
    "precision": "fp16",
    "opt": "optimizer_type",
    "optimizer": "optimizer_type",
    "wd": "weight_decay",
    "scheduler": "lr_decay_type",
    "lr_scheduler": "lr_decay_type",
    "aug": "augmentation",
    "augment": "augmentation",
    "freeze": "Freeze_Train",
    "patience": "early_stop",
    "ema": "ema_decay",
    "mixup": "mixup_alpha",
    "cutmix": "cutmix_alpha",
    "smoothing": "label_smoothing",
    "out": "save_dir",
    "output": "save_dir",
    "output_dir": "save_dir",
    "project": "save_dir",
    "name": "save_dir",
}


class Constant(NamedTuple):
    """A setting's line in the script."""

    source: str  # its expression
    comment: str
    title: str  # of its group: a comment that follows a blank line

    def names(self):
        """Return the names that the expression uses."""
        nodes = ast.walk(ast.parse(self.source, mode="eval"))
        return {node.id for node in nodes if isinstance(node, ast.Name)}


def constants(path):
    """Return {setting: Constant} of all names that a script assigns at module level."""
    with open(path, encoding="utf-8-sig") as file:
        source = file.read()
    lines = ["", *source.split("\n")]  # numbered from 1, as syntax trees are
    titles = {0: "Settings"}
    for number, line in enumerate(lines):
        if line.startswith("# ") and not lines[number - 1].strip():
            titles[number] = line[2:]
    known = {}
    for node in ast.parse(source).body:
        if not isinstance(node, (ast.Assign, ast.AnnAssign)) or node.value is None:
            continue
        title = titles[max(number for number in titles if number < node.lineno)]
        comment = lines[node.lineno].partition(" #")[2].strip()
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for target in targets:
            if isinstance(target, ast.Name):
                known[target.id] = Constant(ast.unparse(node.value), comment, title)
    return known


def sources(path):
    """Return {setting: its expression} of a script."""
    return {name: constant.source for name, constant in constants(path).items()}


def help_text(name, comment, default):
    """Return a setting's comment, the choices that it leaves out, and the default."""
    parts = [comment] if comment else []
    for choice in CHOICES.get(name, ()):
        if isinstance(choice, str) and repr(choice) not in comment:
            parts.append(f"or {choice!r}")
    parts.append(f"default: {short_repr(default)}")
    return "; ".join(parts).replace("%", "%%")


def make_parser(script, known):
    """Return the parser of `--setting value` and `--setting=value`; --help has the script's groups."""
    commands = ", ".join(f"python -m utils.{name}" for name in COMMANDS)
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--setting value …]",
        description=script["__doc__"],
        epilog=f"Other commands: {commands}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--local-rank", "--local_rank", help=argparse.SUPPRESS)  # older launchers'
    groups = {}
    for name, constant in known.items():
        default = script[name]
        if constant.title not in groups:
            groups[constant.title] = parser.add_argument_group(constant.title)
        groups[constant.title].add_argument(
            f"--{name}",
            metavar=f'"{default}"' if isinstance(default, LIST) else "VALUE",
            help=help_text(name, constant.comment, default),
        )
    return parser


def parse(arguments, script, known):
    """Return {setting: value} of the command line's words. UserError: a word that is no setting."""
    parser = make_parser(script, known)
    try:
        given, unknown = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        name = error.argument_name
        raise UserError(
            f"{name} needs a value (write {name}=VALUE); --help lists the settings"
        ) from None
    if unknown:
        raise UserError(
            f"{short_repr(unknown[0])} is no setting of {parser.prog}"
            f"{advice_for(unknown[0], known)}; --help lists them"
        )
    words = vars(given).items()
    return {name: value_of(name, word, script[name]) for name, word in words if name in known}


def advice_for(word, known):
    """Return what was probably meant by a word of the command line that is no setting's name."""
    name = word.lstrip("-").partition("=")[0].replace("-", "_")
    if word == "help":
        return ""
    if name in known:
        return f": write --{name}"
    meant = OTHER_NAMES.get(name.lower())
    if word.startswith("-") or meant in known:
        return did_you_mean(name, known, meant)
    return ': a value with blanks needs quotes, as in --input_shape "[224, 224]"'


def value_of(name, word, default):
    """Return the Python value that a word of the command line spells for a setting, else the word."""
    is_text = isinstance(default, str) and name not in BOUNDS
    if is_text and True not in CHOICES.get(name, ()):
        quoted = len(word) > 1 and word[0] == word[-1] and word[0] in "'\""
        return word[1:-1] if quoted else word  # some shells leave the quotes
    if word.lower() in ("true", "false"):
        return word.lower() == "true"
    try:
        value = ast.literal_eval(word)
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return word
    if name in TEXTS and not isinstance(value, (bool, str)):
        return word  # a name such as 2026_11_24 spells a number as well
    return value


def own_settings(script, known, config):
    """Return a continued run's {setting: value} that hold unless the command line gives others."""
    run, sources = config["settings"], config["constants"]
    launch = launch_settings(script, run)
    own = {}
    for name in known.keys() & run.keys():
        edited = sources.get(name, known[name].source) != known[name].source
        if name in fixed_settings(script, run):
            own[name] = run[name]
        elif name not in launch and not edited and is_plain(script[name]):
            own[name] = run[name]
    return own


def on_same_device(script, run):
    return script.get("Cuda") == run.get("Cuda")


def launch_settings(script, run):
    """Return the names that belong to the launch; on another device 'auto' precision is sought anew."""
    return LAUNCH_SETTINGS if on_same_device(script, run) else (*LAUNCH_SETTINGS, "fp16")


def fixed_settings(script, run):
    """Return the names that a continued run keeps whatever is given; precision that it has chosen."""
    chosen = script.get("fp16") == "auto" and on_same_device(script, run)
    return (*FIXED, "fp16") if chosen else FIXED


def is_plain(value):
    """Return whether config.json holds a value as it is."""
    if isinstance(value, list):
        return all(map(is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def evaluate(constant, values):
    return eval(compile(constant.source, "settings", "eval"), values)


def command_line(script, arguments=None, config=None):
    """Set constants of the script, its globals(), from the command line, and return all of them.

    config: the config.json of a run that is continued. What is computed from other constants (Min_lr
    from Init_lr) follows them. A tuple becomes a list and '~' a path, also in the script.
    """
    known = constants(script["__file__"])
    words = parse(arguments, script, known)
    run = config["settings"] if config else {}
    own, before = {}, {}  # a continued run's settings: those that hold, and all
    changed = set(words)
    if config:
        before = {name: run[name] for name in known.keys() & run.keys() if is_plain(script[name])}
        own = own_settings(script, known, config)
        fixed = fixed_settings(script, run)
        words = {name: word for name, word in words.items() if name not in fixed}
        changed = {*words, *(known.keys() - own.keys())}
    for name, constant in known.items():
        value = script[name]
        names = constant.names()
        if name in words:
            value = words[name]
        elif name in own and names.isdisjoint(changed):
            value = own[name]
        elif name in own and own[name] != evaluate(constant, {**script, **before}):
            value = own[name]  # it was given to the run, not computed
        elif not names.isdisjoint({*changed, *own}):
            value = evaluate(constant, script)
            changed.add(name)
        if name in words or name in own:
            check_value(name, value, script[name])
        script[name] = one_spelling(name, value)
    return {name: script[name] for name in known}


def one_spelling(name, value):
    """Return a setting's value with tuples and arrays as lists and '~' as the home folder."""
    if isinstance(value, tuple):
        return list(value)
    if name in (*BOUNDS, *CHOICES) and hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, str) and name.endswith(("_path", "_dir", "resume")):
        return os.path.expanduser(value)
    return value
