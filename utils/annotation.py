"""Write the class file and the annotation lists from folders of pictures.

python -m utils.annotation DATASETS        DATASETS/train/<class>/… and DATASETS/test/<class>/…
python -m utils.annotation DATASETS --test-share 0.2        DATASETS/<class>/…, split at random
python -m utils.annotation DATASETS --shrink 512        lists copies of the large pictures

Where there are train, val and test, val validates and test gets a list of its own, for the end.
"""

import argparse
import os
from collections import Counter
from pathlib import Path

from utils.plumbing.advice import advise
from utils.plumbing.console import prepare_program, say, shell_words
from utils.plumbing.errors import UserError, hint, printable
from utils.plumbing.files import discard, make_folder, save_text
from utils.plumbing.folders import find_splits, quote, say_left_out, split_by_chance, walk
from utils.plumbing.lists import DEFAULT_PATHS, PATH_SETTINGS, class_name, get_classes
from utils.plumbing.shrink import check_pictures, shrink_all

FEW = 10  # a class with fewer training pictures is warned about


def sort_pictures(pictures, splits, left_out):
    """Return [training, validation, kept] of find_splits, each [(class name, path), …]."""
    depth = 1 if splits else 0
    lists = [[], [], []]
    listed = set()
    for picture in sorted(pictures):  # a picture comes before the links to it
        folders = picture.folders
        if len(folders) <= depth or (splits and folders[0] not in splits):
            left_out["pictures outside of the class folders"].append(picture.path)
            continue
        if picture.real_path in listed:
            left_out["links to pictures that are listed already"].append(picture.path)
            continue
        listed.add(picture.real_path)
        number = splits.index(folders[0]) if splits else 0
        lists[number].append((class_name(folders[depth].strip()), picture.path))
    return lists


def collect(datasets, test_share, seed, nested=False):
    """Return (class names, lists, {reason: [path, …] that were left out}).

    lists: training, validation and what is kept for the end, each sorted [(class name, path), …].
    """
    if not os.path.isdir(datasets):
        raise UserError(f"{datasets!r} is not a folder{hint(datasets)}")
    say(f"looking for pictures in {datasets}")
    pictures, left_out = walk(datasets)
    splits = [] if nested else find_splits(pictures, datasets)
    lists = sort_pictures(pictures, splits, left_out)
    if len(splits) < 2:
        lists[:2] = split_by_chance(lists[0], datasets, test_share, seed)
    lists = [sorted(pairs) for pairs in lists]
    names = sorted({name for name, _ in lists[0]})
    for split, pairs in zip(splits, lists):
        if unknown := {name for name, _ in pairs}.difference(names):
            raise UserError(f"{split!r} has classes that training does not have: {quote(unknown)}")
    if len(splits) == 3:
        say(f"{splits[1]!r} is for validation, {splits[2]!r} is kept for the end")
    return names, lists, left_out


def check_lists(datasets, lists):
    """Raise UserError where nothing can be learnt from the lists, or nothing tested."""
    taught = {name for name, _ in lists[0]}
    if len(taught) < 2 or not lists[1]:
        raise UserError(
            f"{datasets!r} gives {len(lists[0])} training and {len(lists[1])} test pictures, of "
            f"these classes: {quote(taught) or 'none'}; both need some, of two classes or more: "
            f"make a folder of pictures for each class, and name the folder that holds them"
        )


def check_order(names, path):
    """Raise UserError where a class file has other class ids, which trained weights depend on."""
    if not os.path.exists(path):
        return
    try:
        old, _ = get_classes(path)
    except UserError as error:
        raise UserError(f"{error}; here --force overwrites it") from None
    if names[: len(old)] != old:
        raise UserError(
            f"{path} has other classes or another order, and trained weights depend on it: "
            f"--force overwrites it, --out NAME writes other files"
        )


def keep_readable(lists, datasets, size):
    """Return the lists without unreadable pictures; with copies of this shorter side, if given."""
    paths = [path for pairs in lists for _, path in pairs]
    readable = shrink_all(paths, datasets, size) if size else check_pictures(paths)
    kept = []
    for pairs in lists:
        kept.append([(name, readable[path]) for name, path in pairs if path in readable])
    return kept


def write_together(paths, names, lists):
    """Write the class file and the lists for training, validation and the end.

    They belong together, so the training list is removed first and written last: wherever this is
    stopped, train.py finds it missing, or new as the others are. An empty list is not written.
    """
    numbers = {name: number for number, name in enumerate(names)}
    for list_path in paths[1:]:
        discard(list_path)
    save_text(paths[0], "\n".join(names) + "\n")
    for list_path, pairs in reversed(list(zip(paths[1:], lists))):
        if pairs:
            save_text(list_path, "".join(f"{numbers[name]};{path}\n" for name, path in pairs))


def print_counts(names, lists):
    """Print how many pictures of each class every list has."""
    counts = [Counter(name for name, _ in pairs) for pairs in lists]
    for name in names:
        training, test, kept = (count[name] for count in counts)
        text = f"{printable(name)}: {training} training, {test} test"
        if lists[2]:
            text += f", {kept} for the end"
        if training < FEW or not test:
            text += "  WARNING: no or few training pictures, or none to test"
        say(text)


def read_arguments(arguments):
    """Return the options of the command line, checked."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.annotation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = parser.add_argument
    option("datasets", nargs="+", help="folder of train/ and test/ folders, or of class folders")
    option(
        "--test-share", type=float, default=0.2, help="of each class, without a test folder (0.2)"
    )
    option("--seed", type=int, default=0, help="of the random split")
    option("--check", action="store_true", help="decode all pictures, leave out the damaged ones")
    option("--shrink", type=int, metavar="512", help="list copies of this shorter side instead")
    option("--nested", action="store_true", help="all folders in DATASETS are classes")
    option("--force", action="store_true", help="overwrite a class file with other ids")
    option("--out", default="model_data/cls", help="beginning of the files' names (model_data/cls)")
    options = parser.parse_args(arguments)
    path = " ".join(options.datasets)
    if len(options.datasets) > 1:
        raise UserError(f"name one folder; a path with blanks needs quotes: {path!r}")
    options.datasets = path
    if not 0 < options.test_share < 1:
        raise UserError(
            f"--test-share {options.test_share} must be above 0 and below 1, such as 0.2"
        )
    if options.shrink is not None and options.shrink < 1:
        raise UserError(f"--shrink {options.shrink} must be 1 or more: the copies' shorter side")
    return options


def print_next_steps(paths, names, lists, is_shrunk):
    """Print what was written, and the commands to paste."""
    if lists[2]:
        say(
            f"{len(lists[2])} pictures are kept for the end; after training: "
            f"python -m utils.evaluate RUN --annotation {shell_words(paths[3:])}"
        )
    settings, notes = advise([(path, name) for name, path in lists[0]], len(names), is_shrunk)
    for note in notes:
        say(note)
    if tuple(paths[:3]) != DEFAULT_PATHS:
        for name, path in zip(PATH_SETTINGS, paths):
            settings[name] = shell_words([path])
    options = [f"--{name} {value}" for name, value in settings.items()]
    say(
        f"{len(names)} classes, {len(lists[0])} training and {len(lists[1])} test pictures; "
        f"to train on them:\n{' '.join(['python train.py', *options])}"
    )


def main(arguments=None):
    prepare_program()
    options = read_arguments(arguments)
    paths = [f"{options.out}_{part}.txt" for part in ("classes", "train", "test", "holdout")]
    make_folder(Path(paths[0]).parent, "name another place with --out")
    names, lists, left_out = collect(
        options.datasets, options.test_share, options.seed, options.nested
    )
    say_left_out(left_out)
    check_lists(options.datasets, lists)
    if not options.force:
        check_order(names, paths[0])
    if options.shrink or options.check:
        lists = keep_readable(lists, options.datasets, options.shrink)
        check_lists(options.datasets, lists)
        if not options.force:  # another one may have written meanwhile
            check_order(names, paths[0])
    print_counts(names, lists)
    write_together(paths, names, lists)
    print_next_steps(paths, names, lists, is_shrunk=bool(options.shrink))


if __name__ == "__main__":
    main()
