"""The command line: any constant of train.py by its name, and --help from its comments."""

import argparse
import ast

from utils.plumbing.constants import constants, set_constants
from utils.plumbing.errors import UserError, did_you_mean, short_repr
from utils.plumbing.settings import BOUNDS, CHOICES, LIST, TEXTS

COMMANDS = ("annotation", "evaluate", "predict", "export")
OTHER_NAMES = {  # setting: what other programs call it
    "UnFreeze_Epoch": "epoch epochs num_epochs max_epochs",
    "Init_lr": "lr lr0 learning_rate",
    "Unfreeze_batch_size": "b batch batch_size",
    "num_workers": "j workers",
    "input_shape": "imgsz img img_size image_size size crop_size resolution",
    "backbone": "model model_name arch network net",
    "model_path": "weights checkpoint",
    "train_annotation_path": "data data_path dataset train",
    "test_annotation_path": "val test",
    "classes_path": "classes num_classes",
    "Cuda": "gpu gpus device cpu",
    "fp16": "amp half bf16 precision",
    "optimizer_type": "opt optimizer",
    "weight_decay": "wd",
    "lr_decay_type": "scheduler lr_scheduler",
    "augmentation": "aug augment auto_augment",
    "Freeze_Train": "freeze",
    "early_stop": "patience",
    "ema_decay": "ema",
    "mixup_alpha": "mixup",
    "cutmix_alpha": "cutmix",
    "label_smoothing": "smoothing",
    "save_dir": "out output output_dir project name",
}


def command_line(script, arguments=None, config=None):
    """Set constants of the script, its globals(), from the command line, and return all of them.

    config: the config.json of a run that is continued, which has settings of its own.
    """
    known = constants(script["__file__"])
    words = parse(arguments, script, known)
    return set_constants(script, known, words, config)


def help_text(name, comment, default):
    """Return a setting's comment, the choices that it leaves out, and the default."""
    parts = [comment] if comment else []
    for choice in CHOICES.get(name, ()):
        if isinstance(choice, str) and repr(choice) not in comment:
            parts.append(f"or {choice!r}")
    parts.append(f"default: {short_repr(default)}")
    return "; ".join(parts).replace("%", "%%")


def make_parser(script, known):
    """Return the parser of `--setting value`; its --help has the script's own groups."""
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
    for meant, others in OTHER_NAMES.items():
        if name.lower() in others.split():
            return did_you_mean(name, known, meant)
    if word.startswith("-"):
        return did_you_mean(name, known)
    return ': a value with blanks needs quotes, as in --input_shape "[224, 224]"'


def value_of(name, word, default):
    """Return the Python value that a word of the command line spells, else the word itself."""
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
