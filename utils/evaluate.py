"""Measure a trained run on a list of pictures: python -m utils.evaluate RUN

Prints every figure of the recipe and each class's precision, recall, F1 and support; writes predictions.csv, per_class.csv,
confusion_matrix.csv and .png, and mistakes.png (the most confident ones) into the run's folder, or --out.
"""

from utils.plumbing.start import start_program

if __name__ == "__main__":
    start_program()


import csv
import io
import os
import re
from collections import Counter
from itertools import chain

import numpy as np
import torch

from utils import task
from utils.dataloader import DataGenerator, own_data
from utils.plumbing import lists
from utils.plumbing.charts import draw_contact_sheet
from utils.plumbing.console import ProgressLine
from utils.plumbing.errors import UserError, printable
from utils.plumbing.files import save_image, save_text, writable
from utils.plumbing.settings import check_value
from utils.trained import TrainedRun, command


def pictures_of(run, annotation=None):
    """What a DataGenerator takes: the checked lines of the run's test list or of another file, or the fork's own data.

    Class ids that mean other classes than the run's are an error, in a list that the user names a warning: it may be older.
    """
    s, own = run.settings, None if annotation else own_data(run.settings)
    path, source = annotation or s["test_annotation_path"], "own_data" if own else s["classes_path"]
    names = (
        own[0]
        if own
        else lists.get_classes(source)[0]
        if os.path.exists(source)
        else run.class_names
    )
    if any(was != now for was, now in zip(run.class_names, names)):
        why = f"the classes of {run.folder} are not those of {source}, so class ids mean others"
        if not annotation:
            raise UserError(f"{why}: --annotation names a list with the run's ids")
        print(f"WARNING: {printable(why)}; those of {printable(path)} are taken for the run's")
    if own:
        return own[2]
    try:
        return lists.check_lines(
            lists.read_lines("annotation", path),
            path,
            len(run.class_names),
            run.folder,
        )
    except UserError:
        if annotation:
            raise  # a run of somebody else may name any file: its words are shown only where the user names it
        raise UserError(
            f"{path}, the run's test list, is none for its classes: --annotation {path} says why"
        ) from None


def score(run, data, batch_size, num_workers=None):
    """({figure: number}, the indices of the pictures that could be read, their targets, and answers)."""
    s, sums, targets, answers, unreadable = run.settings, Counter(), [], [], []
    criterion, progress = (
        task.get_criterion(s),
        ProgressLine("evaluating", -(-len(data) // batch_size)),
    )
    for step, (scores, truth, bad) in enumerate(run.scored(data, batch_size, num_workers), 1):
        for index, reason in bad:
            unreadable.append(index)
            print(f"\nunreadable picture: {printable(data.name(index))} ({printable(reason)})")
        if scores is not None:
            sums.update(
                task.batch_sums(criterion(scores, truth), scores, truth, s)
            )  # adds to what each name has
            targets.append(truth.cpu())
            answers += task.top_predictions(scores, run.class_names)
            progress.show(
                step,
                batch_size,
                lambda: ", ".join(task.metric_text(*f) for f in task.metrics_from(sums, s).items()),
            )
    progress.clear()
    if not targets:
        raise UserError("no picture of the list can be read, so there is no score")
    indices = np.delete(np.arange(len(data)), unreadable)
    for index, answer in zip(indices, answers):
        if isinstance(answer, str):
            raise UserError(f"{answer}: {printable(data.name(index))}")
    return task.metrics_from(sums, s), indices, torch.cat(targets), answers


def print_table(rows):
    """Print rows of task.whole_set_tables, titles first: a name, figures from 0 to 1, and a number of pictures."""
    titles, *rows = rows
    widths = [max(6, len(title)) for title in titles]
    widths[0] = max(len(printable(name)) for name, *_ in rows)
    lines = [titles]
    for name, *scores, support in rows:
        lines.append((printable(name), *(f"{score:.4f}" for score in scores), support))
    for name, *cells in lines:
        columns = [f"{cell:>{width}}" for cell, width in zip(cells, widths[1:])]
        print(f"{name:<{widths[0]}}", *columns, sep="  ")


def draw_mistakes(data, indices, mistakes):
    """Return a picture of task.mistakes' pictures; indices: their places in the data, without the unreadable ones."""
    small = DataGenerator(data.source, (112, 112), random=False, resize=data.resize)
    pictures = [small[int(indices[place])][0] for place, _ in mistakes]
    return draw_contact_sheet(pictures, [caption for _, caption in mistakes])


def save_csv(path, rows):
    """A name or path that begins as a formula does gets a quote before it: spreadsheets would compute it."""

    def cell(value):
        formula = re.match(r"[=@\t\r\n]|[+-](?![\d.]+(e-?\d+)?$)", str(value))
        return f"{value:.6f}" if isinstance(value, float) else f"'{value}" if formula else value

    memory = io.StringIO()
    csv.writer(memory, lineterminator="\n").writerows(map(cell, row) for row in rows)
    save_text(path, memory.getvalue())


def evaluate(run, weights=None, annotation=None, out=None, batch_size=None, num_workers=None):
    """Score, print and write everything; returns {**figures, 'scored'}."""
    run = TrainedRun(run, weights)
    names, s = run.class_names, run.settings
    batch_size = s["Unfreeze_batch_size"] if batch_size is None else batch_size
    check_value("Unfreeze_batch_size", batch_size)
    check_value("num_workers", num_workers or 0)
    data = DataGenerator(
        pictures_of(run, annotation),
        s["input_shape"],
        False,
        val_crop=s["val_crop"],
        num_classes=len(names),
        resize=s["resize"],
    )
    out = writable(out or run.folder, "name another folder with --out")
    figures, indices, targets, answers = score(run, data, batch_size, num_workers)
    rows, files = task.whole_set_tables(targets, answers, names)
    if rows:
        print_table(rows)
    mistakes = task.mistakes(targets, answers, names)
    if mistakes:
        files["mistakes.png"] = draw_mistakes(data, indices, mistakes)
    words = [task.metric_text(name, value, exact=True) for name, value in figures.items()]
    print(
        *words,
        f"{len(indices)} pictures scored",
        f"{len(data) - len(indices)} unreadable",
        sep=", ",
    )
    rows = [
        ["path", "true"]
        + [
            f"{what}{k}"
            for k in range(1, max(map(len, answers)) + 1)
            for what in task.PREDICTION_COLUMNS
        ]
    ]
    for name, target, answer in zip(map(data.name, indices), targets, answers):
        rows.append(
            [
                lists.split_line(name)[1] or name,
                task.target_text(target, names),
                *chain.from_iterable(answer),
            ]
        )
    files["predictions.csv"] = rows
    (out / "mistakes.png").unlink(missing_ok=True)  # of weights that made some
    for name, content in files.items():
        (save_csv if name.endswith(".csv") else save_image)(out / name, content)
    print(f"wrote {', '.join(sorted(files))} into {printable(out)}", flush=True)
    return {**figures, "scored": len(indices)}


def main(arguments=None):
    parser = command("evaluate", __doc__)
    parser.add_argument("--annotation", help="list of 'class_id;path' lines (the run's test list)")
    parser.add_argument("--out", help="folder to write into (the run's)")
    parser.add_argument("--batch-size", type=int, help="pictures a step (the run's)")
    parser.add_argument("--num-workers", type=int, help="data-loader processes (one a core)")
    evaluate(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    main()
