"""The constants of train.py, and the values that they take.

A run that is continued has settings of its own. For each constant the command line wins; else what
was edited in train.py since the run was started last; else the run's own value.
"""

import ast
import os
from typing import NamedTuple

from utils.plumbing.processes import LAUNCH_SETTINGS
from utils.plumbing.settings import BOUNDS, CHOICES, check_value

FIXED = ("pretrained", "model_path", "Init_Epoch", "save_dir")  # used only where a run begins


class Constant(NamedTuple):
    """A setting's line in the script."""

    source: str  # its expression
    comment: str
    title: str  # of its group: a comment that follows a blank line

    def uses(self, names):
        """Return whether the expression uses one of the names."""
        nodes = ast.walk(ast.parse(self.source, mode="eval"))
        return any(isinstance(node, ast.Name) and node.id in names for node in nodes)

    def evaluate(self, values):
        return eval(compile(self.source, "settings", "eval"), dict(values))


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


def set_constants(script, known, words, config=None):
    """Set constants of the script from the command line's words and from a continued run's config.

    What is computed from other constants (Min_lr from Init_lr) follows them. Return all of them.
    """
    own = {}
    changed = {*words}
    if config:
        own = own_settings(script, known, config)
        fixed = fixed_settings(script, config["settings"])
        words = {name: value for name, value in words.items() if name not in fixed}
        changed = {*words, *(known.keys() - own.keys())}
    for name, constant in known.items():
        value = script[name]
        follows = constant.uses(changed)
        if follows and name in own:
            follows = is_computed(name, constant, script, config["settings"])
        if name in words:
            value = words[name]
        elif name in own and not follows:
            value = own[name]
        elif constant.uses({*changed, *own}):
            value = constant.evaluate(script)
            changed.add(name)
        if name in words or name in own:
            check_value(name, value, script[name])
        script[name] = one_spelling(name, value)
    return {name: script[name] for name in known}


def own_settings(script, known, config):
    """Return a continued run's {setting: value} that hold unless the command line gives others."""
    run = config["settings"]
    sources = config["constants"]
    launch = launch_settings(script, run)
    own = {}
    for name in known.keys() & run.keys():
        edited = sources.get(name, known[name].source) != known[name].source
        if name in fixed_settings(script, run):
            own[name] = run[name]
        elif name not in launch and not edited and is_plain(script[name]):
            own[name] = run[name]
    return own


def launch_settings(script, run):
    """Return the names of the launch's settings: on another device also the precision."""
    return LAUNCH_SETTINGS if on_same_device(script, run) else (*LAUNCH_SETTINGS, "fp16")


def fixed_settings(script, run):
    """Return the names that a continued run keeps: also the precision that 'auto' has chosen."""
    chosen = script.get("fp16") == "auto" and on_same_device(script, run)
    return (*FIXED, "fp16") if chosen else FIXED


def on_same_device(script, run):
    return script.get("Cuda") == run.get("Cuda")


def is_computed(name, constant, script, run):
    """Return whether a run's value was computed from its other constants, and not given."""
    values = dict(script)
    for other, value in run.items():
        if other in script and is_plain(script[other]):
            values[other] = value
    return run[name] == constant.evaluate(values)


def is_plain(value):
    """Return whether config.json holds a value as it is."""
    if isinstance(value, list):
        return all(map(is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def one_spelling(name, value):
    """Return a setting's value with tuples and arrays as lists and '~' as the home folder."""
    if isinstance(value, tuple):
        return list(value)
    if name in (*BOUNDS, *CHOICES) and hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, str) and name.endswith(("_path", "_dir", "resume")):
        return os.path.expanduser(value)
    return value
