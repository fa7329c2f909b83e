"""Folders of pictures: what lies in them, what is left out and why, and which train or test."""

import os
import random
import re
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from utils.plumbing.console import say
from utils.plumbing.errors import UserError, short_repr
from utils.plumbing.formats import FORMATS, REDUCIBLE
from utils.plumbing.lists import class_name

# Thumbnails and deleted pictures of storage boxes, in lower case
LEFT_BEHIND = {"@eadir", "@recycle", "#recycle", "$recycle.bin"}
# Why files are left out that a list cannot hold, and that predict can read
NOT_FOR_LISTS = "paths with a line break or letters that are not UTF-8, rename them"

NOUNS = "(the|my|data|set|split|image|img|picture|pic|photo|sample|file|folder|dir|daten)s?"
# What people call the folders of a split, whatever the case, digits and punctuation. Beside
# training the first in this order validates, and the second is kept for the end.
ROLES = {
    "train": "train(ing|ings|val)?|trn|learn(ing)?|训练集?",
    "val": "val(id|idate|idating|idation)?|dev(el|elopment)?|验证集?",
    "eval": "eval(uate|uating|uation)?|评估集?",
    "test": "te?st(s|ing)?|测试集?",
    "holdout": "h[eo]ldout|unseen",
}


class Picture(NamedTuple):
    is_link: bool
    folders: tuple  # the names of the folders from the root to it
    path: str
    real_path: str


@cache
def endings():
    """Return the usual file endings of FORMATS, in lower case with their dot."""
    registered = Image.registered_extensions().items()
    return {ending for ending, kind in registered if kind in (*FORMATS, *REDUCIBLE)}


def reason_to_leave_out(path, is_regular):
    """Return why a file cannot be listed, or None."""
    # Windows' listing says nothing of paths that are too long to be opened
    if (os.name == "nt" or not is_regular) and not os.path.isfile(path):
        return "pipes, devices, links that lead nowhere, and paths that are too long for Windows"
    ending = os.path.splitext(path)[1].lower()
    if ending not in endings():
        return f"files ({ending or 'no ending'}) that are not read, convert pictures to JPEG or PNG"
    if re.search("[\n\r\ud800-\udfff]", path):
        return NOT_FOR_LISTS
    return None


def visible(names):
    """Return the sorted names of what is neither hidden nor of a storage box's own."""
    return sorted(
        name for name in names if not name.startswith(".") and name.lower() not in LEFT_BEHIND
    )


def walk(root):
    """Return ([Picture, …] below a folder, {reason: [path, …] of what was left out}).

    Each real folder is entered once, those behind links after all others. Hidden files and folders
    are passed over.
    """
    pictures, left_out = [], defaultdict(list)
    seen = set()  # the real folders that were entered, and all around them
    waiting = [root]
    while waiting:
        folder = waiting.pop(0)
        real = Path(folder).resolve()
        if real in seen:
            left_out["links to folders that are read anyway"].append(folder)
            continue
        seen.update((real, *real.parents))
        try:
            # the listing tells what is regular: asking for each file is slow on a network disk
            entries = {entry.name: entry for entry in os.scandir(folder)}
        except OSError:
            left_out["folders that cannot be read"].append(folder)
            continue
        folders = Path(folder).relative_to(root).parts
        inside, links = [], []
        for name in visible(entries):
            entry = entries[name]
            path = Path(folder, name).as_posix()
            is_link = entry.is_symlink()
            if entry.is_dir(follow_symlinks=False):
                inside.append(path)
            elif is_link and os.path.isdir(path):
                links.append(path)
            elif reason := reason_to_leave_out(path, entry.is_file(follow_symlinks=False)):
                left_out[reason].append(path)
            else:
                real_path = os.path.realpath(path) if is_link else os.path.join(real, name)
                pictures.append(Picture(is_link, folders, path, real_path))
        waiting[:0] = inside
        waiting += links  # behind all others
    return pictures, left_out


def say_left_out(left_out, **options):
    """Print how many files were left out for each of the usual reasons, and which."""
    for reason in sorted(left_out, key=lambda reason: -len(left_out[reason]))[:10]:
        paths = left_out[reason]
        say(f"left out ({len(paths)}): {reason}: {quote(paths, length=4096)}", **options)


def role_of(name):
    """Return which of ROLES a word of a folder's name says, or None."""
    for word in re.findall(r"[^\W\d_]+", name.casefold()):
        for role, spelling in ROLES.items():
            if re.fullmatch(f"({NOUNS})*({spelling})({NOUNS})*", word):
                return role
    return None


def find_splits(pictures, datasets):
    """Return the names of the folders that train, that validate and that are kept for the end.

    The list is empty where the top folders are classes, also those called train that hold pictures
    beside others. Raise UserError where nobody can see what is meant.
    """
    inside = defaultdict(set)  # of each top folder that holds pictures, the folders in it
    for picture in pictures:
        if picture.folders:
            inside[picture.folders[0]].update(picture.folders[1:2])
    roles = {top: role_of(top) for top in inside}
    with_classes = [top for top in inside if roles[top] and inside[top]]
    if not inside or (not with_classes and not all(roles.values())):
        check_classes(inside, datasets)
        return []
    splits = {roles[top]: top for top in with_classes}
    # each role belongs to one folder, and nothing lies beside the split
    are_clear = "train" in splits and len(splits) == len(with_classes) <= 3
    are_all = all(roles.values()) and (len(splits) > 1 or len(inside) == 1)
    if not (are_clear and are_all):
        raise UserError(
            f"{datasets!r} holds {quote(inside)}: make it one folder of pictures for each class, "
            f"or 'train' and 'test' (or 'train', 'val' and 'test') with such folders in each, and "
            f"nothing else; --nested takes every folder that it holds for a class"
        )
    return [splits[role] for role in ROLES if role in splits]


def check_classes(inside, datasets):
    """Raise UserError where folders side by side hold the same names, as parts of a split do.

    So does a copy of the whole data set among its classes.
    """
    folded = {}
    for top, names in inside.items():
        folded[top] = {name.casefold() for name in names} - {top.casefold()}  # cat/cat is no copy
    counts = Counter(name for names in folded.values() for name in names)
    counts.update(map(str.casefold, inside))
    shared = {name for name, count in counts.items() if count > 1}
    tops = [top for top in inside if shared & folded[top]]
    if len(set().union(*(folded[top] for top in tops))) > 1:  # one is no split: cat/images
        raise UserError(
            f"the folders {quote(tops)} of {datasets!r} hold folders of the same names, "
            f"{quote(shared)}, as others hold or are: if those are the classes, call the ones "
            f"around them 'train', 'val' and 'test', and move away what is there twice; if "
            f"{quote(tops)} are the classes, add --nested"
        )


def quote(names, length=80):
    """Return at most five of some names, sorted, as a message shows them."""
    texts = [short_repr(name, length) for name in sorted(names)[:5]]
    return ", ".join(texts) + (", …" if len(names) > 5 else "")


def split_by_chance(pairs, datasets, share, seed):
    """Return (training, test) of [(class name, path), …] below the folder `datasets`.

    Each picture's own number decides, so that the others stay where they are when some are added
    or deleted. Of a class with two pictures or more at least one trains and one tests, whatever
    their numbers.
    """
    classes = defaultdict(list)
    for name, path in pairs:
        below = class_name(Path(path).relative_to(datasets).as_posix())
        number = random.Random(f"{seed}/{below}").random()
        classes[name].append((number, path))
    training, test = [], []
    for name, numbered in classes.items():
        numbered.sort()
        count = sum(number < share for number, _ in numbered)
        count = min(max(count, 1), len(numbered) - 1)
        test += [(name, path) for _, path in numbered[:count]]
        training += [(name, path) for _, path in numbered[count:]]
    return training, test
