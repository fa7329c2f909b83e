"""Class names and annotation lines: what can be wrong with them before training, each as one sentence."""
import os
from collections import Counter

from utils.errors import UserError
from utils.files import check_regular
from utils.processes import gather_objects, rank

REMEDY = "python -m utils.annotation DATASETS writes it from folders of pictures"


def split_line(line):
    """'class_id;path' → (class_id text, path): only the first ';' splits."""
    class_id, _, path = line.rstrip("\r\n").partition(";")
    return class_id, path


def check_text_file(name, path, remedy=REMEDY):
    """UserError when the file is missing, no regular file, empty, unreadable or not UTF-8."""
    try:
        check_regular(path, name)
    except UserError as error:
        raise UserError(f"{error}: {remedy}") from None
    try:
        with open(path, "rb") as file:
            data = file.read()
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[:error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line} is not UTF-8 text: save {name}'s file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{name}: {path!r} cannot be read ({error.strerror})") from None
    if not data.removeprefix(b"\xef\xbb\xbf").strip():
        raise UserError(f"{name}: {path!r} is empty: {remedy}")


def get_classes(classes_path):
    """(class names, their number) from a text file, one name a line; blank lines are passed over, and it is said."""
    check_text_file("classes_path", classes_path, "write one class name a line")
    with open(classes_path, encoding="utf-8-sig") as file:
        names = [line.strip() for line in file.read().rstrip().split("\n")]
    if "" in names and rank() == 0:
        print(f"WARNING: {classes_path}:{names.index('') + 1} is blank: ids count the names alone, so the class after it has "
              f"the id of the blank line")
    names = [name for name in names if name]
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
        digits = class_id.strip().removeprefix("-")
        if not (digits.isascii() and digits.isdigit() and len(digits) < 19):  # int() would take '+0', '0_0' and '٠' as well
            raise UserError(f"{where}: the class id {class_id[:40]!r} is not a whole number")
        if not 0 <= int(class_id) < num_classes:
            raise UserError(f"{where}: class id {int(class_id)} is outside 0 … {num_classes - 1}, "
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


def difference(was, now, before, after):
    """'' or the beginning of a sentence: the first class that has another name in the list `now` than in `was`."""
    return next((f"class {number} is {old!r} in {before}, but {new!r} in {after}"
                 for number, (old, new) in enumerate(zip(was, now)) if old != new), "")


def warn_shared(train_lines, val_lines):
    """Print how many pictures stand in both lists."""
    shared = {split_line(line)[1] for line in val_lines}
    count = len(shared.intersection(split_line(line)[1] for line in train_lines))
    if count and rank() == 0:
        print(f"WARNING: {count} pictures are in both the training and the test list: the scores will flatter")


def check_same_everywhere(**fingerprints):
    """UserError unless every process has read the same lists, {setting: fingerprint}. Collective."""
    everyone = gather_objects(fingerprints)
    for name, mine in fingerprints.items():
        for number, other in enumerate(everyone):
            if other[name] != everyone[0][name]:
                raise UserError(f"{name}: the lists of the processes differ ({everyone[0][name]} on rank 0, {other[name]} on "
                                f"rank {number}): every machine needs the same file")
