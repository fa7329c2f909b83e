"""Class names and annotation lines: what can be wrong with them, each as one sentence, and the lines as a data set."""

import os
import re
import unicodedata
from collections import Counter
from contextlib import suppress
from functools import cache, partial

import torch

from utils.plumbing.console import say
from utils.plumbing.errors import UserError, printable
from utils.plumbing.files import check_regular
from utils.plumbing.processes import gather_objects
from utils.task import read_label

PATH_SETTINGS = ("classes_path", "train_annotation_path", "test_annotation_path")
DEFAULT_PATHS = (
    "model_data/cls_classes.txt",
    "model_data/cls_train.txt",
    "model_data/cls_test.txt",
)


def split_line(line):
    """'class_id;path' → (class_id text, path): only the first ';' splits."""
    return line.rstrip("\r\n").partition(";")[::2]


def class_name(text):
    """The one spelling of a name: é may be one character or two, and look the same."""
    return unicodedata.normalize("NFC", text)


def hint(path):
    """' (why a path may lead nowhere)', or ''."""
    if str(path).startswith("~"):
        return " ('~' means nothing outside of a shell: write the whole path)"
    return (
        " (folders are divided by '/', not by a backslash)"
        if "\\" in str(path) and os.sep == "/"
        else ""
    )


def check_text_file(
    name, path, remedy="python -m utils.annotation DATASETS writes it from folders of pictures"
):
    """The file's text without a BOM; UserError when it is missing, no regular file, empty, unreadable or not UTF-8."""
    try:
        check_regular(path, name)
        with open(path, "rb") as file:
            text = file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line} is not UTF-8 text: save {name}'s file as UTF-8") from None
    except (UserError, OSError) as error:
        raise UserError(f"{error}{hint(path)}: {remedy}") from None
    if not text.strip():
        raise UserError(f"{name}: {path!r} is empty: {remedy}")
    return text


def get_classes(classes_path):
    """(class names, their number) from a text file, one name a line."""
    text = check_text_file("classes_path", classes_path, "write one class name a line")
    names = check_names(
        [class_name(line.strip()) for line in re.split("\r\n?|\n", text.rstrip())], classes_path
    )
    return names, len(names)


def check_unchanged(classes_path, class_names):
    """UserError where utils.annotation has replaced the class file since its names were read, and with it the lists."""
    if get_classes(classes_path)[0] != class_names:
        raise UserError(
            f"{classes_path} and its lists are being written: start again when they are complete"
        )


def check_names(names, source):
    """Class names as a list of texts. UserError, which calls the list `source`, unless there are some, all different."""
    names = list(names)
    if not names or not all(isinstance(name, str) and name for name in names):
        raise UserError(
            f"{source}: class names must be texts, none of them blank, as ids count them; not {names[:5]}"
        )
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(
            f"{source} names a class more than once: {', '.join(map(printable, twice[:5]))}"
        )
    return list(map(str, names))


def check_lines(lines, path, num_classes, classes_path):
    """Annotation lines without blank ones and BOMs. UserError names the first wrong line; missing pictures are counted."""
    kept, folders, missing, read = [], {}, [], cache(partial(read_label, num_classes=num_classes))
    for number, line in enumerate(lines, 1):
        line = line.removeprefix("\ufeff").rstrip(
            "\r\n"
        )  # a BOM stands inside as well where files were joined
        if not line.strip():
            continue
        label, picture = split_line(line)
        if not picture.strip():
            raise UserError(f"{path}:{number} is not 'class_id;path': {line[:120]!r}")
        try:
            read(label)
        except UserError as error:
            raise UserError(
                f"{path}:{number}: {error} ({classes_path} has {num_classes} classes)"
            ) from None
        folder, slash, name = picture.rpartition("/")
        if (
            folder not in folders
        ):  # listed once, as a million questions for single files are slow on a network disk
            folders[folder] = set()
            with suppress(OSError, ValueError):
                folders[folder].update(os.listdir(folder + slash or "."))
        if name not in folders[folder] and not os.path.isfile(picture):
            missing.append((number, picture))
        kept.append(line)
    if missing:
        number, picture = missing[0]
        raise UserError(
            f"{len(missing)} of {len(kept)} pictures do not exist (relative paths start at {os.getcwd()}; "
            f"python -m utils.annotation writes the lists anew), the first is {path}:{number} {picture!r}{hint(picture)}"
        )
    return kept


def check_both(train_lines, val_lines, train_path, val_path):
    """Checked lines: UserError when there is one label alone; a warning of pictures with two labels, or in both lists."""
    folders, found = cache(os.path.realpath), []  # one picture may be spelled in several ways
    for path, lines in ((train_path, train_lines), (val_path, val_lines)):
        labels, others = {}, []
        for label, picture in map(split_line, lines):
            folder, slash, file = picture.rpartition("/")
            if labels.setdefault((folders(folder + slash), file), label.strip()) != label.strip():
                others.append(picture)
        if others:
            say(
                f"WARNING: {path}: {len(others)} lines give a picture another label than a line before, as {others[0]!r}"
            )
        found.append(labels)
    train, val = found
    if len(set(train.values())) == 1:
        raise UserError(
            f"{train_path}: all pictures have the label {min(train.values())!r}, nothing to tell apart: name the folder "
            f"whose folders are the classes to utils.annotation, not one around it"
        )
    if shared := len(train.keys() & val.keys()):
        say(
            f"WARNING: {shared} pictures are in both the training and the test list: the scores will flatter"
        )


class AnnotationLines:
    """Checked 'class_id;path' lines as a data set: item i is (path, class id as text). They stand in one shared-memory tensor: a
    list of strings would be copied into every worker little by little, as its reference counts are touched."""

    def __init__(self, lines):
        text = "\n".join(["", *(line.rstrip("\r\n") for line in lines), ""])
        self.text = torch.frombuffer(
            bytearray(text.encode("utf-8", "surrogateescape")), dtype=torch.uint8
        ).share_memory_()
        self.ends = (self.text == ord("\n")).nonzero()[:, 0].share_memory_()

    def __len__(self):
        return len(self.ends) - 1

    def line(self, index):
        text = self.text[int(self.ends[index]) + 1 : int(self.ends[index + 1])]
        return bytes(text.numpy()).decode("utf-8", "surrogateescape")

    def __getitem__(self, index):
        return split_line(self.line(index))[::-1]


def check_same_everywhere(*data):
    """UserError unless every process has read the same lists into its training and test data. Collective."""
    found = {*map(str, gather_objects([part.fingerprint["source"] for part in data]))}
    if len(found) > 1:
        raise UserError(
            f"train_annotation_path or test_annotation_path differ between the processes "
            f"({' and '.join(sorted(found)[:2])}): every machine needs the same lists"
        )
