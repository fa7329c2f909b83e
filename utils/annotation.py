"""Write the class file and both annotation files from folders of pictures.

python -m utils.annotation DATASETS        DATASETS/train/<class>/… and DATASETS/test/<class>/… (or val, valid)
python -m utils.annotation DATASETS --test-share 0.2        DATASETS/<class>/…, split class by class
python -m utils.annotation DATASETS --shrink 512        lists copies of the large ones, in DATASETS-shrunk-512/
"""

from utils.plumbing.start import start_program

if __name__ == "__main__":
    start_program()


import argparse
import os
import random
import shlex
from collections import Counter
from itertools import groupby
from pathlib import Path

from utils.plumbing.console import say, show_errors_as_sentences
from utils.plumbing.errors import UserError, printable
from utils.plumbing.files import save_text, writable
from utils.plumbing.folders import walk
from utils.plumbing.lists import DEFAULT_PATHS, PATH_SETTINGS, class_name, get_classes, hint
from utils.plumbing.shrink import shrink

FEW = 10  # a class with fewer training pictures is warned about
SPLITS = ("train", "test", "val", "valid")


def find_split(datasets, folders):
    """(the folder of the training classes, the test's or None), as walk names them. folders: those that hold pictures.

    A folder called train may be a class, if others stand by it. UserError where one cannot see what is meant.
    """
    tops = {names[0] for names in folders if names}
    deep = [
        split for split in SPLITS if any(names[0] == split for names in folders if len(names) > 1)
    ]
    if not deep and (not tops or tops.difference(SPLITS)):
        return (), None
    if "train" not in deep or tops.difference(SPLITS) or len(deep) < 2 <= len(tops):
        raise UserError(
            f"{datasets!r} holds {', '.join(map(repr, sorted(tops)))}: make it one folder of pictures for each "
            f"class, or 'train' and 'test' with such folders in each, and nothing else"
        )
    return ("train",), (deep[1],) if deep[1:] else None


def split_by_class(pairs, share, seed):
    """[training pairs, test pairs] of sorted pairs: `share` of each class for the test, at least one where there are two."""
    test = set()
    for name, group in groupby(pairs, lambda pair: pair[0]):
        mine = [*group]
        count = min(max(round(len(mine) * share), 1), len(mine) - 1)
        test.update(random.Random(f"{seed} {name}").sample(mine, count))
    return [[pair for pair in pairs if pair not in test], sorted(test)]


def collect(datasets, test_share, seed):
    """(class names, [training [(class name, path)], test the same], what was left out and how often)."""
    if not os.path.isdir(datasets):
        raise UserError(f"{datasets!r} is not a folder{hint(datasets)}")
    pictures, left_out = walk(datasets)
    train, test = find_split(datasets, {names for _, names, *_ in pictures})
    found, depth = {}, len(train)
    for _, names, path, lies in sorted(pictures):  # a picture before the links to it
        if len(names) > depth and names[:depth] in (train, test):
            found.setdefault(lies, (names[:depth], class_name(names[depth].strip()), path))
    left_out["pictures outside of the class folders, or listed already"] = len(pictures) - len(
        found
    )
    lists = [
        sorted((name, path) for part, name, path in found.values() if part == wanted)
        for wanted in (train, test)
    ]
    names, tested = (sorted({name for name, _ in pairs}) for pairs in lists)
    if unknown := [name for name in tested if name not in names]:
        raise UserError(
            f"{test[0]} has classes that training does not have: {', '.join(map(printable, unknown[:10]))}"
        )
    if not test:
        lists = split_by_class(lists[0], test_share, seed)
    return names, lists, left_out


def check_lists(datasets, lists):
    """UserError where nothing can be learnt from the lists, or nothing tested."""
    taught = sorted({printable(name) for name, _ in lists[0]})
    if len(taught) < 2 or not lists[1]:
        raise UserError(
            f"{datasets!r} gives {len(lists[0])} training and {len(lists[1])} test pictures, of these classes: "
            f"{', '.join(taught[:10]) or 'none'}; both need some, of two classes or more: name the folder that "
            f"holds a folder of pictures for each class"
        )


def write_together(paths, names, lists):
    """Write the class file, the training and the test list, which belong together.

    The lists are taken away first, and the test list comes back last: at whatever instant this stops, nobody finds files
    that do not belong together, as one of each two is absent until both are new.
    """
    numbers = {name: number for number, name in enumerate(names)}
    texts = ["".join(f"{numbers[name]};{path}\n" for name, path in pairs) for pairs in lists]
    for path in paths[:0:-1]:
        Path(path).unlink(missing_ok=True)
    for path, text in zip(paths, ["\n".join(names) + "\n", *texts]):
        save_text(path, text)


def report(names, lists):
    """Print how many pictures each class has."""
    train, test = (Counter(name for name, _ in pairs) for pairs in lists)
    width = max(len(printable(name)) for name in [*names, "class"])
    say(f"{'class':<{width}}  {'training':>8}  {'test':>8}")
    for name in names:
        note = (
            "  WARNING: few training pictures"
            if train[name] < FEW
            else ""
            if test[name]
            else "  WARNING: no test pictures"
        )
        say(f"{printable(name):<{width}}  {train[name]:>8}  {test[name]:>8}{note}")


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m utils.annotation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("datasets", help="folder of train/ and test/ folders, or of class folders")
    parser.add_argument(
        "--test-share",
        type=float,
        default=0.2,
        help="of each class for testing, if there is no test folder",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the split")
    parser.add_argument(
        "--check",
        action="store_true",
        help="decode every picture and leave out the unreadable ones",
    )
    parser.add_argument(
        "--shrink",
        type=int,
        default=0,
        metavar="512",
        help="list copies of large pictures, of this shorter side",
    )
    parser.add_argument(
        "--force", action="store_true", help="overwrite a class file with other ids"
    )
    parser.add_argument(
        "--out",
        default="model_data/cls",
        help="how the names of the three files begin (model_data/cls)",
    )
    options = parser.parse_args(arguments)
    show_errors_as_sentences()
    if not 0 < options.test_share < 1 or options.shrink < 0:
        raise UserError("--test-share must be between 0 and 1, --shrink 1 or more")
    paths = tuple(f"{options.out}_{part}.txt" for part in ("classes", "train", "test"))
    writable(Path(options.out).parent, "name another place with --out")
    names, lists, left_out = collect(options.datasets, options.test_share, options.seed)
    for what, count in (+left_out).most_common(10):
        say(f"left out: {count} {printable(what)}")
    check_lists(options.datasets, lists)
    if os.path.exists(paths[0]) and not options.force:
        old, _ = get_classes(paths[0])
        if names[: len(old)] != old:
            raise UserError(
                f"{paths[0]} has other classes or another order, and trained weights depend on it: "
                f"--force overwrites it, --out NAME writes other files"
            )
    if options.shrink or options.check:
        readable = shrink(
            [path for pairs in lists for _, path in pairs], options.datasets, options.shrink
        )
        lists = [
            [(name, readable[path]) for name, path in pairs if path in readable] for pairs in lists
        ]
        check_lists(options.datasets, lists)
    report(names, lists)
    write_together(paths, names, lists)
    given = (
        ""
        if paths == DEFAULT_PATHS
        else "".join(f" --{name} {shlex.quote(path)}" for name, path in zip(PATH_SETTINGS, paths))
    )
    say(
        f"{len(names)} classes, {len(lists[0])} training and {len(lists[1])} test pictures; to train on them:\n"
        f"python train.py{given}"
    )


if __name__ == "__main__":
    main()
