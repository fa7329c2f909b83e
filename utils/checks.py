"""Everything that can be wrong before the first epoch, each as one sentence: settings, command line, files, lines."""
import argparse
import ast
import os
from collections import Counter

import torch

from utils.dataloader import AUGMENTATIONS, split_line
from utils.errors import UserError, nearest, rank, world_size

FLAG = ((bool,), lambda v: True, "True or False")
COUNT = ((int,), lambda v: v >= 0, "a whole number, 0 or more")
SIZE = ((int,), lambda v: v >= 1, "a whole number, 1 or more")
RATE = ((int, float), lambda v: v > 0 and v < float("inf"), "a number above 0")
AMOUNT = ((int, float), lambda v: 0 <= v < float("inf"), "a number, 0 or more")
SHARE = ((int, float), lambda v: 0 <= v <= 1, "a number from 0 to 1")
BELOW_ONE = ((int, float), lambda v: 0 <= v < 1, "a number from 0 to below 1")
PART = ((int, float), lambda v: 0 < v <= 1, "a number above 0, at most 1")
TEXT = ((str,), lambda v: v != "" and "\0" not in v, "a path or name in quotes")
PATH_OR_EMPTY = ((str,), lambda v: "\0" not in v, "a path in quotes, '' for none")
SHAPE = ((list, tuple), lambda v: len(v) == 2 and all(type(n) is int and n > 0 for n in v), "[height, width]")

RULES = {  # setting: (types, test, what it must be), or the tuple of its choices
    "Cuda": FLAG, "distributed": FLAG, "sync_bn": FLAG, "fp16": FLAG, "channels_last": FLAG, "compile": FLAG,
    "seed": COUNT, "classes_path": TEXT, "train_annotation_path": TEXT, "test_annotation_path": TEXT,
    "input_shape": SHAPE, "backbone": TEXT, "pretrained": FLAG, "model_path": PATH_OR_EMPTY,
    "Init_Epoch": COUNT, "Freeze_Epoch": COUNT, "Freeze_batch_size": SIZE, "UnFreeze_Epoch": SIZE,
    "Unfreeze_batch_size": SIZE, "Freeze_Train": FLAG, "accumulate": SIZE, "Init_lr": RATE, "Min_lr": RATE,
    "optimizer_type": ("sgd", "adam", "adamw"), "momentum": BELOW_ONE, "weight_decay": AMOUNT,
    "lr_decay_type": ("cos", "step"), "backbone_lr_scale": AMOUNT, "clip_grad_norm": AMOUNT, "ema_decay": BELOW_ONE,
    "augmentation": AUGMENTATIONS, "crop_scale": PART, "val_crop": PART, "random_erasing": SHARE,
    "mixup_alpha": AMOUNT, "cutmix_alpha": AMOUNT, "label_smoothing": BELOW_ONE,
    "class_weights": ("none", "balanced"), "early_stop": COUNT, "save_period": SIZE, "save_minutes": AMOUNT,
    "save_dir": TEXT, "num_workers": COUNT,
    "resume": ((bool, str), lambda v: v != "", "False, True or the path of a run's folder"),
}


def check_value(name, value):
    """UserError when `value` is not one that the setting `name` can have; a fork's own setting may have any."""
    rule = RULES.get(name)
    if rule and isinstance(rule[0], str):
        if value not in rule:
            raise UserError(f"{name} = {value!r} is none of its choices: "
                            f"{', '.join(map(repr, rule))}{nearest(value, rule)}")
    elif rule:
        types, test, wanted = rule
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types) or not test(value):
            raise UserError(f"{name} = {value!r} must be {wanted}")


def constants(path):
    """{setting: (its expression's syntax tree, its line's comment)} of a script: every name assigned at module level."""
    with open(path, encoding="utf-8") as file:
        source = file.read()
    lines = source.splitlines()
    return {node.targets[0].id: (ast.Expression(node.value), lines[node.lineno - 1].partition("  # ")[2])
            for node in ast.parse(source).body if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)}


def unquoted(text):
    return text.strip("'\"")  # some shells leave them


def literal(text):
    """The Python value that `text` spells, or else the text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return text


def command_line(settings, arguments=None):
    """Set constants of the script from `--name value` or `--name=value`; settings is the script's globals().

    The value is read as a Python literal, or else taken as text. Constants that are computed from others
    (Min_lr from Init_lr) follow.
    """
    known = constants(settings["__file__"])
    parser = argparse.ArgumentParser(usage="%(prog)s [--setting value …]", description=settings["__doc__"], exit_on_error=False,
                                     allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local-rank", "--local_rank", help=argparse.SUPPRESS)  # torch.distributed.launch's own
    for name, (_, comment) in known.items():
        parser.add_argument(f"--{name}", type=unquoted if isinstance(settings[name], str) else literal,
                            default=argparse.SUPPRESS, metavar=repr(settings[name]), help=comment.replace("%", "%%"))
    try:
        given, unknown = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise UserError(f"{error}; --help lists the settings") from None
    if unknown:
        raise UserError(f"{unknown[0]!r} is no setting of {parser.prog}"
                        f"{nearest(unknown[0].lstrip('-').partition('=')[0], known)}; --help lists them")
    changed = vars(given)
    for name, (expression, _) in known.items():
        if name not in changed and any(isinstance(node, ast.Name) and node.id in changed for node in ast.walk(expression)):
            changed[name] = eval(compile(expression, "settings", "eval"), settings)
        if name in changed:
            check_value(name, changed[name])
            settings[name] = changed[name]


def check_settings(s):
    """UserError for the first setting that is out of range, of the wrong type, or at odds with another one."""
    for name in RULES:
        check_value(name, s[name])
    if s["Init_Epoch"] >= s["UnFreeze_Epoch"]:
        raise UserError(f"Init_Epoch = {s['Init_Epoch']} must be below UnFreeze_Epoch = {s['UnFreeze_Epoch']}")
    if s["Freeze_Train"] and s["Freeze_Epoch"] > s["UnFreeze_Epoch"]:
        raise UserError(f"Freeze_Epoch = {s['Freeze_Epoch']} must be at most UnFreeze_Epoch = {s['UnFreeze_Epoch']}")
    if s["Min_lr"] > s["Init_lr"]:
        raise UserError(f"Min_lr = {s['Min_lr']} must be at most Init_lr = {s['Init_lr']}")
    if s["distributed"] and "LOCAL_RANK" not in os.environ:
        raise UserError("distributed = True needs a launcher: torchrun --nproc_per_node=2 train.py, "
                        "or set distributed = False")
    if not s["distributed"] and world_size() > 1:
        raise UserError("a launcher started several processes, but distributed = False: set it to True")
    if s["Cuda"] and not torch.cuda.is_available():
        raise UserError("Cuda = True, but PyTorch sees no GPU: set Cuda = False")
    if s["sync_bn"] and not (s["Cuda"] and s["distributed"]):
        raise UserError("sync_bn = True works under torchrun on GPUs only (PyTorch's SyncBatchNorm has no CPU "
                        "version): set sync_bn = False")
    if s["Cuda"] and s["distributed"] and int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
        raise UserError(f"more processes than the {torch.cuda.device_count()} GPUs of this machine: "
                        f"lower --nproc_per_node")
    for name in ("Freeze_batch_size", "Unfreeze_batch_size"):
        if s[name] % world_size():
            below = s[name] - s[name] % world_size()
            fits = " or ".join(str(n) for n in (below, below + world_size()) if n)
            raise UserError(f"{name} = {s[name]} cannot be divided by {world_size()} processes: set it to {fits}")


def check_batch_norm(name, batch_size):
    """A BatchNorm network cannot learn from one picture per process."""
    if batch_size // world_size() < 2:
        raise UserError(f"{name} = {batch_size} leaves one picture per process, and this network's BatchNorm "
                        f"needs at least two: set it to {2 * world_size()} or more")


def check_text_file(name, path, remedy):
    """UserError when the file is missing, a folder, empty, unreadable or not UTF-8; returns its text's lines."""
    try:
        with open(path, "rb") as file:
            data = file.read()
        data.decode("utf-8")
    except FileNotFoundError:
        raise UserError(f"{name} = {path!r} does not exist: {remedy}") from None
    except IsADirectoryError:
        raise UserError(f"{name} = {path!r} is a folder, not a file") from None
    except UnicodeDecodeError as error:
        line = data[:error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line} is not UTF-8 text: save {name}'s file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{name} = {path!r} cannot be read: {error.strerror}") from None
    if not data.removeprefix(b"\xef\xbb\xbf").strip():
        raise UserError(f"{name} = {path!r} is empty: {remedy}")


def check_data_files(s):
    """The three text files exist and are UTF-8 text."""
    remedy = "python -m utils.annotation DATASETS writes it from folders of pictures"
    for name in ("classes_path", "train_annotation_path", "test_annotation_path"):
        check_text_file(name, s[name], remedy)


def get_classes(classes_path):
    """(class names, their number) from a text file, one name a line."""
    check_text_file("classes_path", classes_path, "write one class name a line")
    with open(classes_path, encoding="utf-8-sig") as file:
        names = [line.strip() for line in file if line.strip()]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{classes_path} names a class more than once: {', '.join(twice[:5])}")
    return names, len(names)


def check_lines(lines, path, num_classes, classes_path):
    """Annotation lines without blank ones and the BOM. UserError names the first wrong line; missing pictures are counted.

    Folders are listed once instead of asking for each file: a million questions are slow on a network disk.
    """
    kept, folders, missing = [], {}, []
    for number, line in enumerate(lines, 1):
        line = (line[1:] if number == 1 and line.startswith("\ufeff") else line).rstrip("\r\n")
        if not line.strip():
            continue
        class_id, separator, picture = line.partition(";")
        where = f"{path}:{number}"
        if not separator or not picture.strip():
            raise UserError(f"{where} is not 'class_id;path': {line[:120]!r}")
        try:
            class_number = int(class_id)
        except ValueError:
            raise UserError(f"{where}: the class id {class_id[:40]!r} is not a whole number") from None
        if not 0 <= class_number < num_classes:
            raise UserError(f"{where}: class id {class_number} is outside 0 … {num_classes - 1}, "
                            f"the {num_classes} classes of {classes_path}")
        folder, slash, name = picture.rpartition("/")
        if folder not in folders:
            try:
                folders[folder] = set(os.listdir(folder + slash or "."))
            except (OSError, ValueError):
                folders[folder] = set()
        if name not in folders[folder] and not os.path.isfile(picture):
            missing.append(f"{where} {picture}")
        kept.append(line)
    if missing:
        shown = "; ".join(missing[:3]) + ("; …" if len(missing) > 3 else "")
        raise UserError(f"{len(missing)} of {len(kept)} pictures do not exist (relative paths start at "
                        f"{os.getcwd()}): {shown}")
    return kept


def warn_shared(train_lines, val_lines):
    """Print how many pictures stand in both lists."""
    shared = {split_line(line)[1] for line in val_lines}
    count = len(shared.intersection(split_line(line)[1] for line in train_lines))
    if count and rank() == 0:
        print(f"WARNING: {count} pictures are in both the training and the test list: the scores will flatter")
