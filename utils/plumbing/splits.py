"""Which pictures train, which validate and which are kept for the end: by folders, or by chance."""

import hashlib
import re
from collections import Counter, defaultdict

from utils.plumbing.errors import UserError, short_repr

NOUNS = "(the|my|data|dataset|set|split|image|img|picture|pic|photo|sample|file|folder|dir|daten)s?"
# What people call the folders of a split, whatever the case, digits and punctuation. Beside
# training the first in this order validates, and the second is kept for the end.
ROLES = {
    "train": "train(ing|ings|val)?|trn|learn(ing)?|训练集?",
    "val": "val(id|idate|idating|idation)?|dev(el|elopment)?|验证集?",
    "eval": "eval(uate|uating|uation)?|评估集?",
    "test": "te?st(s|ing)?|测试集?",
    "holdout": "h[eo]ldout|unseen",
}


def role_of(name, anywhere=False):
    """Return which of ROLES the name of a folder says, or None.

    anywhere: one of its words is enough, as in 'seg_train'.
    """
    words = re.findall(r"[^\W\d_]+", name.casefold())
    for text in words if anywhere else ["".join(words)]:
        for role, spelling in ROLES.items():
            if re.fullmatch(f"({NOUNS})*({spelling})({NOUNS})*", text):
                return role
    return None


def find_roles(inside):
    """Return {top folder: its role or None}; inside: {top folder: names of the folders in it}."""
    roles = {top: role_of(top) for top in inside}
    if any(roles[top] for top in inside if inside[top]):
        return roles
    vague = {top: role_of(top, anywhere=True) for top in inside}
    if "train" in vague.values() and all(vague[top] and inside[top] for top in inside):
        return vague
    return roles


def find_splits(pictures, datasets):
    """Return the names of the folders that train, that validate and that are kept for the end.

    The list is empty where the top folders are classes, also those called train that hold pictures
    beside others. Raise UserError where nobody can see what is meant.
    """
    inside = defaultdict(set)
    for picture in pictures:
        if picture.folders:
            inside[picture.folders[0]].update(picture.folders[1:2])
    roles = find_roles(inside)
    order = list(ROLES)
    splits = [top for top in inside if inside[top] and roles[top]]
    splits.sort(key=lambda top: order.index(roles[top]))
    if not splits and not (inside and all(roles.values())):
        check_classes(inside, datasets)
        return []
    kinds = [roles[top] for top in splits]
    are_clear = kinds[:1] == ["train"] and len(set(kinds)) == len(kinds) <= 3
    are_all = all(roles.values()) and (len(splits) > 1 or len(inside) == 1)
    if not (are_clear and are_all):
        raise UserError(
            f"{datasets!r} holds {quote(inside)}: make it one folder of pictures for each class, "
            f"or 'train' and 'test' (or 'train', 'val' and 'test') with such folders in each, and "
            f"nothing else; --nested takes every folder that it holds for a class"
        )
    return splits


def check_classes(inside, datasets):
    """Raise UserError where folders side by side hold the same names, as parts of a split do."""
    folded = {top: {name.casefold() for name in names} for top, names in inside.items()}
    counts = Counter(name for names in folded.values() for name in names)
    shared = {name for name, count in counts.items() if count > 1}
    tops = [top for top in inside if shared & folded[top]]
    if len(set().union(*(folded[top] for top in tops))) > 1:  # one is no split: cat/images
        raise UserError(
            f"the folders {quote(tops)} of {datasets!r} hold folders of the same names, "
            f"{quote(shared)}: if those are the classes, call the ones around them 'train', 'val' "
            f"and 'test'; if {quote(tops)} are the classes, add --nested"
        )


def quote(names):
    """Return at most five of some names, sorted, as a message shows them."""
    return ", ".join(map(short_repr, sorted(names)[:5])) + (", …" if len(names) > 5 else "")


def draw_number(*words):
    """Return a number from 0 to 1 that depends on these words alone."""
    text = "/".join(map(str, words)).encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") / 2**64


def split_by_chance(entries, share, seed):
    """Return (training, test) of entries (class name, path, path below the class's folder).

    Each picture's own number decides, so that the others stay where they are when some are added
    or deleted. Of a class with two pictures or more at least one trains and one tests.
    """
    classes = defaultdict(list)
    for entry in entries:
        name, _, below = entry
        classes[name].append((draw_number(seed, name, below), entry))
    training, test = [], []
    for numbered in classes.values():
        numbered.sort()
        count = sum(number < share for number, _ in numbered)
        count = min(max(count, 1), len(numbered) - 1)
        test += [entry for _, entry in numbered[:count]]
        training += [entry for _, entry in numbered[count:]]
    return sorted(training), sorted(test)
