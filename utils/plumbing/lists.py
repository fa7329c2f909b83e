"""Class names and annotation lines: what can be wrong with them, and the lines as a data set."""

import os
import re
import unicodedata
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

from utils.plumbing.console import say
from utils.plumbing.errors import UserError, hint, printable
from utils.plumbing.files import as_json, check_regular
from utils.plumbing.processes import gather_objects
from utils.task import read_label

PATH_SETTINGS = ("classes_path", "train_annotation_path", "test_annotation_path")
DEFAULT_PATHS = (
    "model_data/cls_classes.txt",
    "model_data/cls_train.txt",
    "model_data/cls_test.txt",
)
OF_A_MACHINE = ("num_workers", "resume", "cache_mb", "fp16")  # rank 0's precision is everyone's
PROJECT = Path(__file__).resolve().parents[2]  # where train.py stands


def split_line(line):
    """Return (class id as text, path) of 'class_id;path'; only the first ';' splits."""
    label, _, path = line.partition(";")
    return label, path


def class_name(text):
    """Return the one spelling of a name: é may be one character or two that look the same."""
    return unicodedata.normalize("NFC", text)


def read_text_file(
    name, path, remedy="python -m utils.annotation DATASETS writes it from folders of pictures"
):
    """Return a file's text without its byte-order mark.

    Raise UserError, which calls it `name`, if it is missing, no regular file, empty or not UTF-8.
    """
    try:
        check_regular(path, name)
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line} is not UTF-8 text: save {name}'s file as UTF-8") from None
    except (UserError, OSError) as error:
        raise UserError(f"{error}: {remedy}") from None
    if not text.strip():
        raise UserError(f"{name}: {path!r} is empty: {remedy}")
    return text


def read_lines(name, path):
    """Return the lines of a text file, ended as on any system. Raises what read_text_file does."""
    return read_text_file(name, path).rstrip("\n").split("\n")


def get_classes(classes_path):
    """Return (class names, their number) of a text file with one name a line."""
    lines = [line.strip() for line in read_lines("classes_path", classes_path)]
    while not lines[-1]:
        lines.pop()
    if sum(bool(re.match(r"-?\d+\s*;.", line)) for line in lines) > len(lines) / 2:
        raise UserError(
            f"classes_path: {classes_path} holds lines of 'class_id;path', not one class name a "
            f"line: python -m utils.annotation writes both files"
        )
    names = clean_names(map(class_name, lines), classes_path)
    return names, len(names)


def version(path):
    """Return (inode, time of change) of a file, or None where there is none."""
    with suppress(OSError, ValueError):
        found = os.stat(path)
        return found.st_ino, found.st_mtime_ns
    return None


def clean_names(names, source):
    """Return class names as a list of texts, some and all different; else raise UserError.

    source: what the sentence calls them.
    """
    names = list(names)
    if not names or not all(isinstance(name, str) and name for name in names):
        raise UserError(
            f"{source}: class names must be texts, none of them blank, as ids count them; "
            f"not {names[:5]}"
        )
    numbers = {}
    for number, name in enumerate(names, 1):
        if name in numbers:  # not shown: a run of somebody else may name any file
            raise UserError(
                f"{source} names a class more than once: number {numbers[name]} and number {number}"
            )
        numbers[name] = number
    return list(map(str, names))


def classes_beside(list_path):
    """Return (path, names) of the class file that utils.annotation wrote with a list, or Nones."""
    path = re.sub(r"_(train|test|holdout)\.txt$", "_classes.txt", str(list_path))
    if path != str(list_path):
        with suppress(UserError):
            return path, get_classes(path)[0]
    return None, None


def warn_of_other_classes(list_path, class_names, classes_path):
    """Warn where a list was written together with other classes than those of classes_path."""
    path, names = classes_beside(list_path)
    if names and names[: len(class_names)] != class_names[: len(names)]:
        say(
            f"WARNING: {path}, which lies beside {list_path}, has other classes than "
            f"{classes_path}: the list's class ids may mean those"
        )


def clean_lists(train_lines, val_lines, settings, class_names, train_version):
    """Return the training and the test list as clean_lines does, after every check of them.

    train_version: of the training list before any file was read. utils.annotation removes that one
    first and writes it last.
    """
    classes_path, train_path, val_path = (settings[name] for name in PATH_SETTINGS)
    if version(train_path) != train_version:
        raise UserError(
            f"{classes_path} and its lists are being written: start again when they are complete"
        )
    train_lines, train = clean_lines(train_lines, train_path, len(class_names), classes_path)
    val_lines, val = clean_lines(val_lines, val_path, len(class_names), classes_path)
    check_both(train, val, train_path, class_names)
    for path in (train_path, val_path):
        warn_of_other_classes(path, class_names, classes_path)
    return train_lines, val_lines


def clean_lines(lines, path, num_classes, classes_path):
    """Return (lines without line ends, byte-order marks and blank ones, label_pictures of them).

    Raise UserError for the first line that is wrong, or if pictures do not exist.
    """
    if len(lines) > 100_000:
        say(f"checking {len(lines)} lines of {path}")
    kept, entries = [], []
    known = set()
    for number, line in enumerate(lines, 1):
        line = line.rstrip("\r\n").removeprefix("\ufeff")  # also inside, where files were joined
        if not line.strip():
            continue
        label, picture = split_line(line)
        if not picture.strip():
            raise UserError(f"{path}:{number} is not 'class_id;path': {line[:120]!r}")
        if label not in known:  # of a million lines, few have a label of their own
            try:
                read_label(label, num_classes)
            except UserError as error:
                raise UserError(
                    f"{path}:{number}: {error} ({classes_path} has {num_classes} classes)"
                ) from None
            known.add(label)
        kept.append(line)
        entries.append((number, label.strip(), picture))
    return kept, label_pictures(entries, path)


def label_pictures(entries, path):
    """Return {(real folder, file name): label} of a list's (line number, label, path of a picture).

    Raise UserError with the number of pictures that do not exist and the first of them; warn of
    pictures with two labels. Each folder is listed once: a million questions for single files are
    slow on a network disk.
    """

    @cache
    def look_into(folder):
        real_folder, names = folder, set()
        with suppress(OSError, ValueError):
            real_folder = os.path.realpath(folder)
            names.update(os.listdir(folder or "."))
        return real_folder, names

    labels, missing, others = {}, [], []
    for number, label, picture in entries:
        folder, name = os.path.split(picture)
        real_folder, names = look_into(folder)
        if name not in names and not os.path.isfile(picture):
            missing.append((number, picture))
        if labels.setdefault((real_folder, name), label) != label:
            others.append(picture)
    if missing:
        number, picture = missing[0]
        raise UserError(
            f"{len(missing)} of {len(entries)} pictures do not exist (relative paths start at "
            f"{os.getcwd()}; python -m utils.annotation writes the lists anew), the first is "
            f"{path}:{number} {picture!r}{hint(picture)}"
        )
    if others:
        say(
            f"WARNING: {path}: {len(others)} lines give a picture another label than a line "
            f"before, as {others[0]!r}"
        )
    return labels


def check_both(train, val, train_path, class_names):
    """Raise UserError if all training pictures have one label. Both are as label_pictures returns.

    Warn of classes without training pictures, and of pictures in both lists.
    """
    learnt = set(train.values())
    if len(learnt) == 1:
        raise UserError(
            f"{train_path}: all pictures have the label {min(learnt)!r}, nothing to tell apart: "
            f"name the folder whose folders are the classes to utils.annotation, not one around it"
        )
    ids = [str(class_id) for class_id in range(len(class_names))]
    if learnt < set(ids):  # labels of another task are no class ids
        others = [printable(class_names[int(text)]) for text in ids if text not in learnt]
        say(
            f"WARNING: classes without training pictures, which cannot be learnt ({len(others)}): "
            f"{', '.join(others[:5])}"
        )
    shared = len(train.keys() & val.keys())
    if shared:
        say(
            f"WARNING: {shared} pictures are in both the training and the test list: the scores "
            f"will be too good"
        )


class AnnotationLines:
    """Checked 'class_id;path' lines as a data set: item i is (path, class id as text).

    They are packed into one tensor. A list of strings would be copied into every forked worker
    little by little, as its reference counts are touched; where workers are spawned, torch shares
    the tensor.
    """

    def __init__(self, lines):
        text = "\n".join(["", *(line.rstrip("\r\n") for line in lines), ""])
        data = bytearray(text.encode("utf-8", "surrogateescape"))
        self.text = torch.frombuffer(data, dtype=torch.uint8)
        self.ends = (self.text == ord("\n")).nonzero()[:, 0]

    def __len__(self):
        return len(self.ends) - 1

    def line(self, index):
        """Return a line as text."""
        text = self.text[int(self.ends[index]) + 1 : int(self.ends[index + 1])]
        return bytes(text.numpy()).decode("utf-8", "surrogateescape")

    def __getitem__(self, index):
        label, path = split_line(self.line(index))
        return path, label


def check_same_everywhere(settings, train_data, val_data):
    """Raise UserError unless every process has the same settings and lists. Collective.

    What OF_A_MACHINE names may differ, and paths.
    """
    own = {}
    for name, value in as_json(settings).items():
        if name not in OF_A_MACHINE and not name.endswith(("_path", "_dir")):
            own[name] = str(value)
    own["train_annotation_path"] = train_data.fingerprint["list"]
    own["test_annotation_path"] = val_data.fingerprint["list"]
    everyone = gather_objects(own)
    for name in sorted(set().union(*everyone)):
        values = sorted({other.get(name, "absent") for other in everyone})
        if len(values) > 1:
            raise UserError(
                f"{name} differs between the processes ({' and '.join(values[:2])}): every machine "
                f"needs the same train.py, command line and lists (or own data), and a GPU where "
                f"Cuda is True; what each process computes for itself belongs below 'if __name__'"
            )
