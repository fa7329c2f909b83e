"""Write the class file and both annotation files from folders of pictures.

    python -m utils.annotation DATASETS        DATASETS/train/<class>/… and DATASETS/test/<class>/… (or val, valid)
    python -m utils.annotation DATASETS --test-share 0.2        DATASETS/<class>/…, split class by class
    python -m utils.annotation DATASETS --shrink 512        lists copies in DATASETS-512/ of the large ones, which read faster
"""
import argparse
import os
import random
import shlex
import signal
from collections import Counter
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from utils.errors import UserError, plain
from utils.files import clear_drafts, lock, not_written, save_text, writable
from utils.folders import Walk, is_line
from utils.formats import endings
from utils.lists import class_name, get_classes, hint
from utils.processes import end, one_sentence_errors, say
from utils.sample_data import DEFAULT_PATHS
from utils.shrink import shrink

FEW = 10  # a class with fewer training pictures is warned about
SPLITS = ("train", "test", "val", "valid")


def find_split(datasets, folders, filled, test_share):
    """(the folder that holds the training classes, the test's or None), as Walk names them. A folder called train may be a class,
    if others stand by it. folders: all; filled: those that hold pictures."""
    splits = [name for name in SPLITS if (name,) in folders]
    classes = sorted({inside[0] for inside in filled if inside and inside[0] not in splits})
    deep = [name for name in splits if any(inside[:-1] == (name,) for inside in folders)]
    if not splits or classes and not deep:
        return (), None
    if classes:
        raise UserError(f"{datasets!r} holds {deep[0]!r}, a folder of folders, beside {classes[0]!r}, which holds pictures: as "
                        f"one cannot see whether {deep[0]!r} is a class, move or rename one of them")
    tests = [name for name in deep if name != "train"]
    if "train" not in deep or test_share is None and not tests and len(splits) > 1:
        raise UserError(f"{datasets!r} holds {' and '.join(map(repr, splits))}, but no class folders in "
                        f"{'train' if 'train' not in deep else splits[1]!r}")
    return ("train",), (tests[0],) if tests and test_share is None else None


def split_by_class(pairs, names, share, seed):
    """[training pairs, test pairs] of sorted pairs: `share` of each class for the test, at least one picture where there are two."""
    train, test = [], []
    for number, group in groupby(pairs, itemgetter(0)):
        mine = [*group]
        random.Random(f"{seed} {names[number]}").shuffle(mine)
        count = min(max(round(len(mine) * share), 1), len(mine) - 1)
        test += sorted(mine[:count])
        train += sorted(mine[count:])
    return [train, test]


def collect(datasets, test_share, seed):
    """(class names, [training [(class number, path)], test the same], what was left out and how often)."""
    if not os.path.isdir(datasets):
        raise UserError(f"{datasets!r} is not a folder{hint(datasets)}")
    walk = Walk(datasets)
    train, test = find_split(datasets, walk.folders, {inside for _, inside, *_ in walk.pictures}, test_share)
    names, tested = (sorted({class_name(inside[-1]) for inside in walk.folders if inside and inside[:-1] == part})
                     for part in (train, test))
    if not names:
        raise UserError(f"{datasets!r} has no class folders: make one folder of pictures for each class")
    unknown = [name for name in tested if name not in names]
    if unknown:
        raise UserError(f"{Path(datasets, *test)} has classes that training does not have: {', '.join(map(plain, unknown[:10]))}")
    bad = [name for name in names if name != name.strip("\ufeff").strip() or not is_line(name)]
    if bad:
        raise UserError(f"the folder {bad[0]!r} cannot be a class name: rename it")
    lists, numbers, depth = {train: [], test: []}, {name: number for number, name in enumerate(names)}, len(train)
    for inside, path in walk.each_once(lambda inside: len(inside) > depth and inside[:depth] in lists):
        lists[inside[:depth]].append((numbers[class_name(inside[depth])], path))
    lists = [sorted(pairs) for pairs in lists.values()]
    if test is None:
        lists = split_by_class(lists[0], names, 0.2 if test_share is None else test_share, seed)
    return names, lists, walk.left_out


def check_lists(datasets, names, lists):
    """UserError where nothing can be learnt from the lists, or nothing tested."""
    if not all(lists):
        raise UserError(f"{datasets!r} gives {len(lists[0])} training and {len(lists[1])} test pictures; both need "
                        f"some, in a folder for each class")
    taught = {number for number, _ in lists[0]}
    if len(taught) == 1:
        raise UserError(f"all training pictures of {datasets!r} are of one class, {names[taught.pop()]!r}, so there is nothing to "
                        f"tell apart: name the folder whose folders are the classes")


def check_outputs(options):
    """The files that --classes, --train and --test lead to. UserError unless they are three, and can be written."""
    paths = {name: os.path.realpath(getattr(options, name)) for name in ("classes", "train", "test")}
    for name, path in paths.items():
        if [*paths.values()].count(path) > 1:
            raise UserError(f"--{name} {path} is to be written twice: --classes, --train and --test must be three files")
        if os.path.lexists(path) and not os.path.isfile(path) or os.path.splitext(path)[1].lower() in endings():
            raise UserError(f"--{name} {path} is no text file: choose another one")
        writable(os.path.dirname(path), f"it is the folder of --{name} {path}, choose another one")
    return paths


def replace_together(texts):
    """Write {path: text} of the class file, the training and the test list, which belong together.

    The lists are taken away first, and the test list comes back last: whatever instant this stops at, nobody finds files that
    do not belong together, as one of each two is absent until both are new. UserError: they cannot be written.
    """
    classes, train, test = texts
    folder = os.open(os.path.dirname(classes), os.O_DIRECTORY) if hasattr(os, "O_DIRECTORY") else None  # Windows opens none
    try:
        if not lock(folder):
            raise UserError(f"another annotation is writing {classes}: try again")
        for path in (test, train):
            Path(path).unlink(missing_ok=True)
        for path, text in texts.items():
            clear_drafts(os.path.dirname(path))
            save_text(path, text)
    except OSError as error:
        raise not_written(classes, error) from None
    finally:
        if folder is not None:
            os.close(folder)


def report(names, lists, left_out):
    """Print how many pictures each class has, and what was left out."""
    counts = [Counter(number for number, _ in pairs) for pairs in lists]
    shown = [*map(plain, names)]
    width = max(map(len, [*shown, "class"]))
    say(f"{'class':<{width}}  {'training':>8}  {'test':>8}")
    for number, name in enumerate(shown):
        train, test = (count[number] for count in counts)
        note = "  WARNING: few training pictures" if train < FEW else "" if test else "  WARNING: no test pictures"
        say(f"{name:<{width}}  {train:>8}  {test:>8}{note}")
    for what, count in (+left_out).most_common(10):
        say(f"left out: {count} {plain(what)}")


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m utils.annotation", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("datasets", help="folder of train/ and test/ folders, or of class folders")
    parser.add_argument("--test-share", type=float, help="share of each class for the test list (0.2 without a test folder)")
    parser.add_argument("--seed", type=int, default=0, help="of the split")
    parser.add_argument("--check", action="store_true", help="decode every picture and leave out the unreadable ones")
    parser.add_argument("--shrink", type=int, metavar="512", help="list copies of large pictures, with this shorter side")
    parser.add_argument("--force", action="store_true", help="overwrite a class file with other ids")
    for name, default in zip(("--classes", "--train", "--test"), DEFAULT_PATHS):
        parser.add_argument(name, default=default, help=f"file to write ({default})")
    options = parser.parse_args(arguments)
    one_sentence_errors()
    signal.signal(signal.SIGINT, lambda *_: end(130))  # also in a process that is being started, which would print a traceback
    if options.test_share is not None and not 0 < options.test_share < 1:
        raise UserError(f"--test-share {options.test_share} must be between 0 and 1")
    if options.shrink is not None and options.shrink < 1:
        raise UserError(f"--shrink {options.shrink} must be 1 or more")
    outputs = check_outputs(options)
    names, lists, left_out = collect(options.datasets, options.test_share, options.seed)
    check_lists(options.datasets, names, lists)
    if os.path.exists(options.classes) and not options.force:
        old, _ = get_classes(options.classes)
        if names[:len(old)] != old:
            raise UserError(f"{options.classes} has other classes or another order, and trained weights depend on it: "
                            f"--force overwrites it, --classes FILE writes another one")
    if options.shrink or options.check:
        paths = [path for pairs in lists for _, path in pairs]
        readable = shrink(paths, options.datasets, options.shrink)
        lists = [[(number, readable[path]) for number, path in pairs if path in readable] for pairs in lists]
        check_lists(options.datasets, names, lists)
    report(names, lists, left_out)
    texts = ["".join(f"{number};{path}\n" for number, path in pairs) for pairs in lists]
    replace_together(dict(zip(outputs.values(), ["\n".join(names) + "\n", *texts])))
    settings = ("classes_path", options.classes), ("train_annotation_path", options.train), ("test_annotation_path", options.test)
    words = [f" --{name} {shlex.quote(path)}" for (name, path), usual in zip(settings, DEFAULT_PATHS) if path != usual]
    say(f"{len(names)} classes, {len(lists[0])} training and {len(lists[1])} test pictures; to train on them:\n"
        f"python train.py{''.join(words)}")


if __name__ == "__main__":
    main()
