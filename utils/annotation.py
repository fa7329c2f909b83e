"""Write the class file and both annotation files from folders of pictures.

    python -m utils.annotation DATASETS        DATASETS/train/<class>/… and DATASETS/test/<class>/… (or val, valid)
    python -m utils.annotation DATASETS --test-share 0.2        DATASETS/<class>/…, split class by class
    python -m utils.annotation DATASETS --shrink 512        lists copies in DATASETS-512/ of the large ones, which read faster
"""
import argparse
import os
import random
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path

from PIL import Image

from utils.errors import UserError
from utils.files import save_text
from utils.lists import get_classes
from utils.processes import one_sentence_errors
from utils.sample_data import DEFAULT_PATHS
from utils.shrink import decode, on_all_cores, shrink

FEW = 10  # a class with fewer training pictures is warned about
SPLITS = ("train", "test", "val", "valid")


@cache
def endings():
    """The file endings that this Pillow can open, in lower case."""
    Image.init()
    return {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}


class Folders:
    """Walks through a data set's folders. left_out: {what: how many} of all that was not taken."""

    def __init__(self, root):
        self.root, self.left_out = os.path.realpath(root), Counter()
        self.seen = {self.root}

    def is_new(self, path):
        """Whether to enter a folder: once, and not by a link that leads into the data set or to a folder around others."""
        real = os.path.realpath(path)
        inside, around = os.path.join(self.root, ""), os.path.join(real, "")
        if real in self.seen or os.path.islink(path) and (
                real.startswith(inside) or any(other.startswith(around) for other in self.seen)):
            self.left_out["links to folders that are read anyway"] += 1
            return False
        self.seen.add(real)
        return True

    def entries(self, folder):
        """(its folders, its pictures), sorted [(path, whether it is a link)]; what else it holds is counted."""
        folders, pictures = [], []
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            self.left_out["folders that cannot be read"] += 1
            return folders, pictures
        for entry in entries:
            path, ending, link = Path(entry.path).as_posix(), os.path.splitext(entry.name)[1].lower(), entry.is_symlink()
            if entry.name.startswith("."):
                continue
            if os.path.isdir(path) if link else entry.is_dir():
                folders.append((path, link))
            elif ending not in endings():
                self.left_out[f"files ({ending or 'no ending'}) that Pillow does not open"] += 1
            elif not os.path.isfile(path) if link else not entry.is_file():
                self.left_out["pictures' names that are no regular files"] += 1
            elif not is_line(path):
                self.left_out["names that no text file can hold"] += 1
            else:
                pictures.append((path, link))
        return folders, pictures

    def inside(self, folder, without=()):
        """{name: path} of the folders to enter in `folder`, which should hold nothing else."""
        folders, pictures = self.entries(folder)
        self.left_out["pictures beside the class folders"] += len(pictures)
        return {Path(path).name: path for path, _ in folders if Path(path).name not in without and self.is_new(path)}

    def pictures(self, folder):
        """Yield (path, whether it is a link) of the pictures in `folder` and its folders, sorted."""
        folders, pictures = self.entries(folder)
        yield from pictures
        for path, _ in folders:
            if self.is_new(path):
                yield from self.pictures(path)


def is_line(name):
    """Whether a line of UTF-8 text can hold it."""
    return name.isprintable() or not {"\n", "\r"} & {*name} and name.encode("utf-8", "replace") == os.fsencode(name)


def pictures_below(folder):
    """Sorted paths of the pictures in `folder` and its folders."""
    return [path for path, _ in Folders(folder).pictures(folder)]


def find_split(data, datasets, test_share):
    """({class: folder} for training, the same for test or None). A folder called train may be a class, if others stand by it."""
    if not os.path.isdir(datasets):
        raise UserError(f"{datasets!r} is not a folder")
    folders = {Path(path).name: path for path, _ in Folders(datasets).entries(datasets)[0]}
    splits = {name: folders[name] for name in SPLITS if name in folders}
    data.seen.update(map(os.path.realpath, splits.values()))
    others = data.inside(datasets, splits)
    classes = [name for name, path in others.items() if next(Folders(path).pictures(path), None)]
    deep = [name for name, path in splits.items() if Folders(path).entries(path)[0]]
    if not splits or classes and not deep:
        return {**others, **splits}, None
    if classes:
        raise UserError(f"{datasets!r} holds {deep[0]!r}, a folder of folders, beside {classes[0]!r}, which holds pictures: as "
                        f"one cannot see whether {deep[0]!r} is a class, move or rename one of them")
    tests = [name for name in deep if name != "train"]
    if "train" not in deep or test_share is None and not tests and len(splits) > 1:
        raise UserError(f"{datasets!r} holds {' and '.join(map(repr, splits))}, but no class folders in "
                        f"{'train' if 'train' not in deep else [*splits][1]!r}")
    train = data.inside(splits["train"])
    if not tests or test_share is not None:
        return train, None
    test = data.inside(splits[tests[0]])
    unknown = sorted(set(test) - set(train))
    if unknown:
        raise UserError(f"{splits[tests[0]]} has classes that training does not have: {', '.join(unknown[:10])}")
    return train, test


def once(found, left_out):
    """[(…, path, whether it is a link)] without the links to files that stand there themselves, or by an earlier link."""
    real_folder = cache(os.path.realpath)
    taken = {os.path.join(real_folder(os.path.dirname(path)), os.path.basename(path))
             for *_, path, link in found if not link} if any(link for *_, link in found) else set()
    kept = []
    for *where, path, link in found:
        target = os.path.realpath(path) if link else None
        if target in taken:
            left_out["links to pictures that are listed anyway"] += 1
        else:
            kept.append((*where, path))
            taken.update([target] if link else [])
    return kept


def collect(datasets, test_share, seed):
    """(class names, [training [(class number, path)], test the same], what was left out and how often)."""
    data = Folders(datasets)
    train_folders, test_folders = find_split(data, datasets, test_share)
    names = sorted(train_folders)
    if not names:
        raise UserError(f"{datasets!r} has no class folders: make one folder of pictures for each class")
    bad = [name for name in names if name != name.strip("\ufeff").strip() or not is_line(name)]
    if bad:
        raise UserError(f"the folder {bad[0]!r} cannot be a class name: rename it")
    found = [(split, number, *picture) for split, folders in enumerate((train_folders, test_folders or {}))
             for number, name in enumerate(names) if name in folders for picture in data.pictures(folders[name])]
    found = once(found, data.left_out)
    lists = [[pair for part, *pair in found if part == split] for split in (0, 1)]
    if test_folders is None:
        lists = split_by_class(lists[0], names, 0.2 if test_share is None else test_share, seed)
    if not all(lists):
        raise UserError(f"{datasets!r} gives {len(lists[0])} training and {len(lists[1])} test pictures; both need some")
    return names, lists, data.left_out


def split_by_class(pairs, names, share, seed):
    """[training pairs, test pairs]: `share` of each class for the test, at least one picture where there are two."""
    paths = {number: [] for number in range(len(names))}
    for number, path in pairs:
        paths[number].append(path)
    train, test = [], []
    for number, name in enumerate(names):
        random.Random(f"{seed} {name}").shuffle(paths[number])
        count = len(paths[number])
        count = min(max(round(count * share), 1), count - 1) if count > 1 else 0
        test += [(number, path) for path in sorted(paths[number][:count])]
        train += [(number, path) for path in sorted(paths[number][count:])]
    return [train, test]


def check_outputs(options):
    """The files that --classes, --train and --test lead to. UserError unless they are three, and can be written."""
    paths = {name: os.path.realpath(getattr(options, name)) for name in ("classes", "train", "test")}
    for name, path in paths.items():
        if [*paths.values()].count(path) > 1:
            raise UserError(f"--{name} {path} is to be written twice: --classes, --train and --test must be three files")
        if os.path.lexists(path) and not os.path.isfile(path) or os.path.splitext(path)[1].lower() in endings():
            raise UserError(f"--{name} {path} is no text file: choose another one")
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            tempfile.TemporaryFile(dir=os.path.dirname(path)).close()
        except OSError as error:
            raise UserError(f"--{name} {path} cannot be written ({error.strerror}): choose another one") from None
    return paths


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
    if options.test_share is not None and not 0 < options.test_share < 1:
        raise UserError(f"--test-share {options.test_share} must be between 0 and 1")
    if options.shrink is not None and options.shrink < 1:
        raise UserError(f"--shrink {options.shrink} must be 1 or more")
    outputs = check_outputs(options)
    names, lists, left_out = collect(options.datasets, options.test_share, options.seed)
    if os.path.exists(options.classes) and not options.force:
        old, _ = get_classes(options.classes)
        if names[:len(old)] != old:
            raise UserError(f"{options.classes} has other classes or another order, and trained weights depend on it: "
                            f"--force overwrites it, --classes FILE writes another one")
    paths = [path for pairs in lists for _, path in pairs]
    if options.shrink:
        readable = shrink(paths, options.datasets, options.shrink, options.check)
    elif options.check:
        readable = on_all_cores(decode, paths, "checked")
    if options.shrink or options.check:
        lists = [[(number, readable[path]) for number, path in pairs if path in readable] for pairs in lists]
    counts = [Counter(number for number, _ in pairs) for pairs in lists]
    width = max(map(len, [*names, "class"]))
    print(f"{'class':<{width}}  {'training':>8}  {'test':>8}")
    for number, name in enumerate(names):
        note = "no training pictures" if not counts[0][number] else "few training pictures" if counts[0][number] < FEW else \
            "no test pictures" if not counts[1][number] else ""
        print(f"{name:<{width}}  {counts[0][number]:>8}  {counts[1][number]:>8}" + (f"  WARNING: {note}" if note else ""))
    for what, count in (+left_out).most_common(10):
        print(f"left out: {count} {what}")
    save_text(outputs["classes"], "\n".join(names) + "\n")
    for name, pairs in zip(("train", "test"), lists):
        save_text(outputs[name], "".join(f"{number};{picture}\n" for number, picture in pairs))
    print(f"{len(names)} classes, {len(lists[0])} training and {len(lists[1])} test pictures; in train.py (or after "
          f"python train.py):\n  classes_path = {options.classes!r}\n  train_annotation_path = {options.train!r}\n"
          f"  test_annotation_path = {options.test!r}")


if __name__ == "__main__":
    main()
