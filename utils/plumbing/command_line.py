"""The command line: any constant of train.py by its name, and --help from its comments.

A run that is continued has words of its own, those of the command lines that it was started with.
They hold, unless they are given anew, or the constant was edited in train.py since.
"""

import argparse
import ast
import os
import re
from functools import cache
from typing import NamedTuple

from utils.plumbing.errors import UserError, did_you_mean, short_repr
from utils.plumbing.processes import LAUNCH_SETTINGS, computes_bfloat16
from utils.plumbing.settings import RULES, check_value, fits, rules_of

BEGINNING = ("pretrained", "model_path", "Init_Epoch", "save_dir")  # used only where a run begins
OTHER_COMMANDS = (
    "Other commands: python -m utils.annotation, python -m utils.evaluate, "
    "python -m utils.predict, python -m utils.explain, python -m utils.export"
)
OTHER_NAMES = {  # setting: what other programs call it
    "UnFreeze_Epoch": "epoch epochs num_epochs max_epochs",
    "Init_lr": "lr lr0 learning_rate",
    "Unfreeze_batch_size": "b batch batch_size",
    "input_shape": "imgsz img img_size image_size size crop_size resolution",
    "backbone": "model model_name arch network net",
    "model_path": "weights checkpoint",
    "train_annotation_path": "data data_path dataset train",
    "Cuda": "gpu gpus device cpu",
    "fp16": "amp half bf16 precision",
    "weight_decay": "wd",
    "lr_decay_type": "scheduler lr_scheduler",
    "early_stop": "patience",
    "save_dir": "out output output_dir project name",
}


class Constant(NamedTuple):
    """A setting's line in the script."""

    source: str  # its expression
    comment: str
    title: str  # of its group: a comment that follows a blank line


def command_line(script, arguments=None, config=None):
    """Set constants of the script, its globals(), from the command line.

    config: the config.json of a run that is continued. Return {setting: value}, and what the next
    config.json keeps to continue from: the constants as they are written, and the words.
    """
    known = constants(script["__file__"])
    for name in RULES:
        if name in script and name not in known:
            raise UserError(
                f"{name} must be set on a line of its own that is not indented, {name} = … (an if "
                f"below it may change it)"
            )
    words = parse(arguments, script, known)
    if config:
        words = {**words_of_run(config, known), **words}
    given = {name: value_of(name, word, script[name]) for name, word in words.items()}
    kept = kept_settings(config, {**script, **given}) if config else {}
    # not of the run's beginning: nothing is computed from these
    later = {name: kept.pop(name) for name in ("Init_Epoch", "fp16") if name in kept}
    set_constants(script, known, {**given, **kept})
    script.update(later)
    sources = {name: constant.source for name, constant in known.items()}
    return {name: script[name] for name in known}, {"constants": sources, "words": words}


def words_of_run(config, known):
    """Return a run's own {setting: word}, without those of the launch or of edited constants."""
    words = {}
    for name, word in config["words"].items():
        edited = name not in known or known[name].source != config["constants"].get(name)
        if not edited and name not in LAUNCH_SETTINGS:
            words[name] = str(word)
    return words


def kept_settings(config, script):
    """Return those of a run's settings that nothing changes.

    Among them is the precision that 'auto' has chosen, where this machine computes in it. A run
    that has saved nothing begins now: only its folder stays.
    """
    run = config["settings"]
    names = BEGINNING if config.get("trained", True) else ("save_dir",)
    kept = {name: run[name] for name in names if name in run}
    asked = config["words"].get("fp16", config["constants"].get("fp16", "auto"))
    was_chosen = str(asked).strip("'\"") == "auto"
    if was_chosen and script.get("fp16") == "auto" and script.get("Cuda") == run.get("Cuda"):
        chosen = run.get("fp16", "auto")
        if chosen != "bfloat16" or computes_bfloat16(script):
            kept["fp16"] = chosen
    return kept


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


def set_constants(script, known, given):
    """Set constants of the script to the values given.

    What is computed from other constants (Min_lr from Init_lr) follows them.
    """
    changed = {*given}
    for name, constant in known.items():
        value = script[name]
        if name in given:
            check_value(name, given[name], value)
            value = given[name]
        elif changed.intersection(re.findall(r"\w+", constant.source)):
            value = eval(constant.source, dict(script))
            changed.add(name)
        script[name] = one_spelling(name, value)


def one_spelling(name, value):
    """Return a setting's value with tuples and arrays as lists and '~' as the home folder."""
    if isinstance(value, tuple):
        return list(value)
    if name in RULES and hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, str) and name.endswith(("_path", "_dir", "resume")):
        return os.path.expanduser(value)
    return value


def help_text(name, comment, default):
    """Return a setting's comment, the choices that it leaves out, and the default."""
    parts = [comment] if comment else []
    for choice in rules_of(name, default):
        if isinstance(choice, str) and choice and repr(choice) not in comment:
            parts.append(f"or {choice!r}")
    parts.append(f"default: {short_repr(default)}")
    return "; ".join(parts).replace("%", "%%")


def make_parser(script, known):
    """Return the parser of `--setting value`; its --help has the script's own groups."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--setting value …]",
        description=script["__doc__"],
        epilog=OTHER_COMMANDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        exit_on_error=False,
        conflict_handler="resolve",  # a fork's constant goes before --local-rank
    )
    parser.add_argument("--local-rank", "--local_rank", help=argparse.SUPPRESS)  # older launchers'
    group_of = cache(parser.add_argument_group)  # one for each title
    for name, constant in known.items():
        default = script[name]
        group_of(constant.title).add_argument(
            f"--{name}",
            metavar=f'"{default}"' if isinstance(default, list) else "VALUE",
            help=help_text(name, constant.comment, default),
        )
    return parser


def parse(arguments, script, known):
    """Return {setting: word} of the command line. UserError: a word that is no setting."""
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
    return {name: word for name, word in vars(given).items() if name in known}


def advice_for(word, known):
    """Return what was probably meant by a word of the command line that is no setting's name."""
    # word processors make one long dash of two
    name = word.lstrip("-\u2013\u2014\u2212\uff0d").partition("=")[0].replace("-", "_")
    if word == "help":
        return ""
    if name in known:
        return f": write --{name}"
    for meant, others in OTHER_NAMES.items():
        if name.lower() in others.split() and meant in known:
            return f" (did you mean {meant!r}?)"
    if word.startswith("-"):
        return did_you_mean(name, known)
    return ': a value with blanks needs quotes, as in --input_shape "[224, 224]"'


def value_of(name, word, default):
    """Return the Python value that a word of the command line spells, else the word itself."""
    rules = rules_of(name, default)
    if len(word) > 1 and word[0] == word[-1] and word[0] in "'\"":
        word = word[1:-1]  # some shells leave the quotes
        if not rules or fits(word, rules):
            return word
    spelled = word.capitalize() if word.lower() in ("true", "false") else word
    try:
        value = ast.literal_eval(spelled)
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return word
    if fits(word, rules) and not fits(value, rules):
        return word  # a name such as 2026_11_24 spells a number as well
    return value
