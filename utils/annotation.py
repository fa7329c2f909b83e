"""Write the class file and both annotation files from folders of pictures.

    python -m utils.annotation DATASETS        DATASETS/train/<class>/… and DATASETS/test/<class>/… (or val, valid)
    python -m utils.annotation DATASETS --test-share 0.2        DATASETS/<class>/…, split class by class
"""
import argparse
import multiprocessing
import os
import random
import sys
from collections import Counter
from pathlib import Path

from PIL import Image

from utils.files import save_text
from utils.lists import get_classes
from utils.errors import UserError
from utils.processes import one_sentence_errors
from utils.sample_data import DEFAULT_PATHS

FEW = 10  # a class with fewer training pictures is warned about


def endings():
    """The file endings that this Pillow can open, in lower case."""
    Image.init()
    return {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def class_folders(folder):
    return {entry.name: entry.path for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")}


def pictures_below(folder, known, left_out):
    """Sorted picture paths in `folder` and its folders; other files are counted in `left_out` by ending."""
    found = []
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path, ending = Path(place, name).as_posix(), os.path.splitext(name)[1].lower()
            if name.startswith("."):
                continue
            if ending not in known:
                left_out[ending or "no ending"] += 1
            elif "\n" in path or "\r" in path or not path.isprintable() and path.encode("utf-8", "replace") != path.encode(
                    "utf-8", "surrogateescape"):
                left_out["names that no text file can hold"] += 1
            else:
                found.append(path)
    return found


def find_split(datasets, test_share):
    """({class: folder} for training, the same for test or None) of a data set's folder."""
    if not os.path.isdir(datasets):
        raise UserError(f"{datasets!r} is not a folder")
    splits = class_folders(datasets)
    tests = [splits[name] for name in ("test", "val", "valid") if name in splits]
    if "train" not in splits and tests:
        raise UserError(f"{datasets!r} has {Path(tests[0]).name!r} but no 'train' folder")
    if "train" not in splits:
        return splits, None
    if not tests or test_share is not None:
        return class_folders(splits["train"]), None
    train, test = class_folders(splits["train"]), class_folders(tests[0])
    unknown = sorted(set(test) - set(train))
    if unknown:
        raise UserError(f"{tests[0]} has classes that training does not have: {', '.join(unknown[:10])}")
    return train, test


def collect(datasets, test_share, seed):
    """(class names, training [(class number, path)], test the same, files left out by ending)."""
    train_folders, test_folders = find_split(datasets, test_share)
    names, known, left_out = sorted(train_folders), endings(), Counter()
    if not names:
        raise UserError(f"{datasets!r} has no class folders: make one folder of pictures for each class")
    bad = [name for name in names if name != name.strip() or not name.isprintable()]
    if bad:
        raise UserError(f"the folder {bad[0]!r} cannot be a class name: rename it")
    train, test = [], []
    for number, name in enumerate(names):
        paths = pictures_below(train_folders[name], known, left_out)
        if test_folders is None:
            random.Random(f"{seed} {name}").shuffle(paths)
            share = 0.2 if test_share is None else test_share
            count = min(max(round(len(paths) * share), 1), len(paths) - 1) if len(paths) > 1 else 0
            test += [(number, path) for path in sorted(paths[:count])]
            paths = sorted(paths[count:])
        elif name in test_folders:
            test += [(number, path) for path in pictures_below(test_folders[name], known, left_out)]
        train += [(number, path) for path in paths]
    if not train or not test:
        raise UserError(f"{datasets!r} gives {len(train)} training and {len(test)} test pictures; both need some")
    return names, train, test, left_out


def problem(path):
    """(path, why it cannot be decoded, or None)."""
    try:
        with Image.open(path) as image:
            image.load()
    except Exception as error:  # Pillow's plugins raise nearly anything for a broken file
        return path, f"{type(error).__name__}: {error}"
    return path, None


def check(paths):
    """Decode every picture on all cores, with progress; returns the [(path, reason)] of the unreadable ones."""
    bad = []
    with multiprocessing.get_context("spawn").Pool() as pool:
        for number, (path, reason) in enumerate(pool.imap(problem, paths, chunksize=16), 1):
            if reason:
                bad.append((path, reason))
                print(f"unreadable: {path} ({reason})")
            if number % 1000 == 0 or number == len(paths):
                print(f"checked {number} of {len(paths)}, {len(bad)} unreadable", file=sys.stderr, flush=True)
    return bad


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m utils.annotation", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("datasets", help="folder of train/ and test/ folders, or of class folders")
    parser.add_argument("--test-share", type=float, help="share of each class for the test list (0.2 without a test folder)")
    parser.add_argument("--seed", type=int, default=0, help="of the split")
    parser.add_argument("--check", action="store_true", help="decode every picture and leave out the unreadable ones")
    parser.add_argument("--force", action="store_true", help="overwrite a class file with other ids")
    for name, default in zip(("--classes", "--train", "--test"), DEFAULT_PATHS):
        parser.add_argument(name, default=default, help=f"file to write ({default})")
    options = parser.parse_args(arguments)
    one_sentence_errors()
    if options.test_share is not None and not 0 < options.test_share < 1:
        raise UserError(f"--test-share {options.test_share} must be between 0 and 1")
    names, train, test, left_out = collect(options.datasets, options.test_share, options.seed)
    if os.path.exists(options.classes) and not options.force:
        old, _ = get_classes(options.classes)
        if names[:len(old)] != old:
            raise UserError(f"{options.classes} has other classes or another order, and trained weights depend on it: "
                            f"--force overwrites it, --classes FILE writes another one")
    bad = {path for path, _ in check([path for _, path in train + test])} if options.check else set()
    lists = [[pair for pair in pairs if pair[1] not in bad] for pairs in (train, test)]
    counts = [Counter(number for number, _ in pairs) for pairs in lists]
    width = max(map(len, [*names, "class"]))
    print(f"{'class':<{width}}  {'training':>8}  {'test':>8}")
    for number, name in enumerate(names):
        note = "no training pictures" if not counts[0][number] else "few training pictures" if counts[0][number] < FEW else \
            "no test pictures" if not counts[1][number] else ""
        print(f"{name:<{width}}  {counts[0][number]:>8}  {counts[1][number]:>8}" + (f"  WARNING: {note}" if note else ""))
    for ending, count in left_out.most_common(10):
        print(f"left out: {count} files ({ending}) that Pillow does not open")
    for path, text in [(options.classes, "\n".join(names) + "\n")] + [
            (path, "".join(f"{number};{picture}\n" for number, picture in pairs))
            for path, pairs in zip((options.train, options.test), lists)]:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        save_text(path, text)
    print(f"{len(names)} classes, {len(lists[0])} training and {len(lists[1])} test pictures; in train.py (or after "
          f"python train.py):\n  classes_path = {options.classes!r}\n  train_annotation_path = {options.train!r}\n"
          f"  test_annotation_path = {options.test!r}")


if __name__ == "__main__":
    main()
