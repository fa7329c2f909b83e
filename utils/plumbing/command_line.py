"""The command line: any constant of train.py by its name, and --help from its comments."""

import argparse
import ast
import os
from functools import partial

from utils.plumbing.errors import UserError, did_you_mean, short_repr
from utils.plumbing.settings import BOUNDS, CHOICES, LIST, TEXTS, check_value


def constants(path):
    """{setting: (its expression's syntax tree, its line's comment, the title above it)} of all names that a script assigns at
    module level; a title is a comment that follows a blank line."""
    with open(path, encoding="utf-8-sig") as file:
        source = file.read()
    lines, found = ["", *source.split("\n")], {}
    titles = {
        number: line[2:]
        for number, line in enumerate(lines)
        if line.startswith("# ") and not lines[number - 1].strip()
    }
    for node in ast.parse(source).body:
        title = next(
            (titles[number] for number in reversed(titles) if number < node.lineno), "Settings"
        )
        for target in getattr(node, "targets", [getattr(node, "target", None)]):
            if isinstance(target, ast.Name) and node.value:
                found[target.id] = (
                    ast.Expression(node.value),
                    lines[node.lineno].partition(" #")[2].strip(),
                    title,
                )
    return found


def parse(arguments, script, known):
    """{setting: value} of `--setting value` and `--setting=value`; --help shows the script's own groups."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--setting value …]",
        description=script["__doc__"],
        exit_on_error=False,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"Other commands: {', '.join(f'python -m utils.{name}' for name in ('annotation', 'evaluate', 'predict', 'export'))}",
    )
    parser.add_argument(
        "--local-rank", "--local_rank", help=argparse.SUPPRESS
    )  # torch.distributed.launch's own
    groups = {title: parser.add_argument_group(title) for _, _, title in known.values()}
    for name, (_, comment, title) in known.items():
        default = short_repr(script[name])
        unsaid = [
            f"or {c!r}"
            for c in CHOICES.get(name, ())
            if c not in (True, False, 0) and repr(c) not in comment
        ]
        groups[title].add_argument(
            f"--{name}",
            type=partial(from_word, name, default=script[name]),
            metavar=f'"{default}"' if isinstance(script[name], LIST) else "VALUE",
            help="; ".join(filter(None, [comment, *unsaid, f"default: {default}"])).replace(
                "%", "%%"
            ),
        )
    try:
        given, unknown = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise UserError(f"{error} (write --name=value); --help lists the settings") from None
    for word in unknown:
        hint = (
            did_you_mean(word.lstrip("-").partition("=")[0].replace("-", "_"), known)
            if word.startswith("-")
            else (': a value with blanks needs quotes, as in --input_shape "[224, 224]"')
        )
        raise UserError(
            f"{short_repr(word)} is no setting of {parser.prog}{hint}; --help lists them"
        )
    return {name: value for name, value in vars(given).items() if name in known}


def from_word(name, word, default):
    """The value of a setting that a word of the command line gives: the Python value that it spells, or else the text."""
    if isinstance(default, str) and True not in CHOICES.get(name, ()) and name not in BOUNDS:
        return (
            word[1:-1] if len(word) > 1 and word[0] == word[-1] in "'\"" else word
        )  # some shells leave them
    try:
        value = ast.literal_eval({"true": "True", "false": "False"}.get(word.lower(), word))
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return word
    return (
        word if name in TEXTS and not isinstance(value, (bool, str)) else value
    )  # 2026_11_24 spells a number as well


def command_line(script, arguments=None):
    """Set constants of the script, its globals(), from `--name value` or `--name=value`; returns all of them, {name: value}.
    What is computed from others (Min_lr from Init_lr) follows. A tuple becomes a list and '~' a path, also in the script."""
    known = constants(script["__file__"])
    changed = parse(arguments, script, known)
    for name, (expression, _, _) in known.items():
        if name not in changed and any(
            isinstance(node, ast.Name) and node.id in changed for node in ast.walk(expression)
        ):
            changed[name] = eval(compile(expression, "settings", "eval"), script)
        value = changed.get(name, script[name])
        if name in changed:
            check_value(name, value, script[name])
        if isinstance(value, str) and name.endswith(("_path", "_dir", "resume")):
            value = os.path.expanduser(value)
        script[name] = list(value) if isinstance(value, tuple) else value
    return {name: script[name] for name in known}
