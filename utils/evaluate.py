"""Measure a trained run on a list of pictures: python -m utils.evaluate RUN

Prints the metrics, and precision, recall, F1 and support of each class. Writes predictions.csv,
per_class.csv, up to 1,000 classes confusion_matrix.csv and .png, and mistakes.png, the most
confident wrong ones, into the run's folder, or --out.
"""

from utils.plumbing.start import start_program

if __name__ == "__main__":
    start_program()


import csv
import io
import math
import os
import re
from collections import Counter
from itertools import chain

import numpy as np
import torch

from utils import task
from utils.dataloader import own_data
from utils.plumbing import lists
from utils.plumbing.charts import draw_contact_sheet, drawable_text
from utils.plumbing.console import ProgressLine, say
from utils.plumbing.errors import UserError, printable
from utils.plumbing.files import discard, make_folder, save_file, save_image
from utils.plumbing.settings import check_value
from utils.trained import Classifier, begin_command

OUTPUTS = (
    "predictions.csv",
    "per_class.csv",
    "confusion_matrix.csv",
    "confusion_matrix.png",
    "mistakes.png",
)


def evaluate(
    run,
    weights=None,
    annotation=None,
    out=None,
    batch_size=None,
    num_workers=None,
    mirrored=False,
):
    """Score a run, print and write everything; return {**metrics, "scored": number of pictures}."""
    classifier = Classifier(run, weights, mirrored)
    if batch_size is None:
        # one device takes what several shared in training
        batch_size = min(256, classifier.settings["Unfreeze_batch_size"])
    check_value("Unfreeze_batch_size", batch_size)
    check_value("num_workers", num_workers or 0)
    out = make_folder(out or classifier.folder, "name another folder with --out")
    for name in OUTPUTS:
        if (out / name).is_dir():
            raise UserError(f"{out / name} is a folder where a file is to be written: move it away")
    data = classifier.dataset(find_test_pictures(classifier, annotation))
    trained_with = None if annotation else classifier.test_list
    if trained_with and trained_with != data.fingerprint["list"]:
        say(
            "WARNING: the test list has changed since the training, so it may hold pictures that "
            "were trained on",
            everyone=True,
        )
    names = classifier.class_names

    metrics, indices, targets, predictions = score(classifier, data, batch_size, num_workers)
    rows, files, more = task.whole_set(targets, predictions, names)
    metrics.update(more)
    mistakes = task.mistakes(targets, predictions, names)
    if mistakes:
        files["mistakes.png"] = draw_mistakes(data, indices, mistakes)
    files["predictions.csv"] = tabulate(data, indices, targets, predictions, names)
    try:  # before anything is printed: '| head' ends the program there
        save_outputs(out, files)
    finally:  # a file that cannot be written costs no score
        if rows:
            print_table(rows)
        texts = task.metric_texts(metrics, exact=True)
        unreadable = len(data) - len(indices)
        print(*texts, f"{len(indices)} pictures scored", f"{unreadable} unreadable", sep=", ")
    print(f"wrote {', '.join(sorted(files))} into {printable(out)}", flush=True)
    return {**metrics, "scored": len(indices)}


def find_test_pictures(classifier, annotation=None):
    """Return what a DataGenerator takes: the checked lines of a list, or a fork's own data.

    annotation: the list's path; None: the run's test list. UserError: none that fits the run. It
    quotes nothing of a file that only the run names, as somebody else's run may name any file.
    """
    own = None if annotation else own_data(classifier.settings)
    if own:
        check_class_ids(classifier, own[0], "own_data")
        return own[2]
    path = annotation or classifier.settings["test_annotation_path"]
    classes_path, names = lists.classes_beside(path) if annotation else (None, None)
    try:
        if not names:
            classes_path, names = classifier.settings["classes_path"], classifier.class_names
            if os.path.exists(classes_path):
                names, _ = lists.get_classes(classes_path)
        lines = lists.read_lines("annotation", path)
        pictures, _ = lists.clean_lines(lines, path, len(classifier.class_names), classifier.folder)
    except UserError:
        if annotation:
            raise
        raise UserError(
            f"the run's classes_path ({classes_path}) or test_annotation_path ({path}) does not "
            f"fit the run: --annotation {path} tells why"
        ) from None
    check_class_ids(classifier, names, classes_path, annotation)
    return pictures


def check_class_ids(classifier, names, source, annotation=None):
    """Raise a UserError where class ids of today mean other classes than in training.

    It is only a warning for a list that the user names, which may be an older one.
    """
    if all(was == now for was, now in zip(classifier.class_names, names)):
        return
    change = (
        f"the classes of {classifier.folder} are not those of {source}, so class ids mean others"
    )
    if not annotation:
        raise UserError(f"{change}: --annotation names a list with the run's ids")
    print(f"WARNING: {printable(change)}; {printable(annotation)} is read with the run's classes")


def score(classifier, data, batch_size, num_workers=None):
    """Return (metrics, indices of the pictures that were read, their targets, predictions)."""
    settings = classifier.settings
    criterion = task.get_criterion(settings)
    sums = Counter()
    all_targets, predictions, unreadable = [], [], []
    progress = ProgressLine("evaluating", math.ceil(len(data) / batch_size))

    def describe():
        return ", ".join(task.metric_texts(task.metrics_from(sums, settings)))

    for step, batch in enumerate(classifier.score(data, batch_size, num_workers), 1):
        logits, targets, unread = batch
        for index, reason in unread:
            unreadable.append(index)
            say(f"\nunreadable picture: {data.name(index)} ({reason})", everyone=True)
        if logits is None:
            continue
        loss = criterion(logits, targets)
        sums.update(task.batch_sums(loss, logits, targets, settings))  # a Counter's update adds
        all_targets.append(targets.cpu())
        predictions += task.top_predictions(logits, classifier.class_names)
        progress.show(step, batch_size, describe)
    progress.clear()
    if not predictions:
        raise UserError("no picture of the list can be read, so there is no score")
    indices = np.delete(np.arange(len(data)), unreadable)
    for index, prediction in zip(indices, predictions):
        if isinstance(prediction, str):
            raise UserError(f"{prediction}: {printable(data.name(index))}")
    return task.metrics_from(sums, settings), indices, torch.cat(all_targets), predictions


def print_table(rows):
    """Print rows of task.whole_set: titles, then a name, shares and a number in each."""
    titles, *rows = rows
    width = max(len(printable(row[0])) for row in rows)
    print(" " * width, *(f"{title:>9}" for title in titles[1:]))
    for name, *shares, number in rows:
        columns = [f"{share:9.4f}" for share in shares]
        print(printable(name).ljust(width), *columns, f"{number:9}")


def tabulate(data, indices, targets, predictions, names):
    """Return the rows of predictions.csv: path, true class, and the best classes."""
    most = max(map(len, predictions))
    header = ["path", "true"]
    for place in range(1, most + 1):
        header += [f"{column}{place}" for column in task.PREDICTION_COLUMNS]
    rows = [header]
    for index, target, prediction in zip(indices, targets, predictions):
        true = task.target_text(target, names)
        rows.append([picture_name(data, index), true, *chain.from_iterable(prediction)])
    return rows


def picture_name(data, index):
    """Return the path of a picture, or how messages name it."""
    name = data.name(index)
    return lists.split_line(name)[1] or name


def draw_mistakes(data, indices, mistakes):
    """Return a picture of task.mistakes as the network sees them, each with its file's name.

    indices: the data's index of each prediction, as unreadable pictures have none.
    """
    pictures, captions = [], []
    for place, caption in mistakes:
        index = int(indices[place])
        image, _, _ = data[index]
        pictures.append(torch.zeros(1, 1, 3).byte() if image is None else image)  # it is gone
        file = os.path.basename(picture_name(data, index))
        captions.append(f"{caption}\n{drawable_text(file, f'number {index + 1}')}")
    return draw_contact_sheet(pictures, captions)


def save_outputs(out, files):
    """Write {name: rows or picture} into a folder."""
    for name, content in files.items():
        save = save_csv if name.endswith(".csv") else save_image
        save(out / name, content)
    if "mistakes.png" not in files:  # it may be of weights that made some
        discard(out / "mistakes.png")


def save_csv(path, rows):
    """Save rows as a CSV file; what is not UTF-8 is escaped."""
    memory = io.StringIO()
    writer = csv.writer(memory, lineterminator="\n")
    for row in rows:
        writer.writerow(map(cell, row))
    content = memory.getvalue().encode("utf-8-sig", "backslashreplace")  # as Excel needs
    save_file(path, content)


def cell(value):
    """Return a value as a cell of a CSV file; spreadsheets would compute a text such as '=1+1'."""
    if isinstance(value, float):
        return f"{value:.6f}"
    is_formula = re.match(r"[=@\t\r\n]|[+-](?![\d.]+(e-?\d+)?$)", str(value))
    return f"'{value}" if is_formula else value


def main(arguments=None):
    parser = begin_command("evaluate", __doc__)
    parser.add_argument("--annotation", help="list of 'class_id;path' lines (the run's test list)")
    parser.add_argument("--out", help="folder to write into (the run's)")
    parser.add_argument("--batch-size", type=int, help="pictures a step (the run's, at most 256)")
    parser.add_argument(
        "--num-workers", type=int, help="data-loader processes (at most one a core)"
    )
    evaluate(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    main()
