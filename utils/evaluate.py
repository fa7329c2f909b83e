"""Measure a trained run on a list of pictures: python -m utils.evaluate RUN

Prints every figure of the recipe and each class's precision, recall, F1 and support; writes predictions.csv, per_class.csv,
confusion_matrix.csv and .png, and mistakes.png (the most confident ones) into the run's folder, or --out.
"""
import csv
import io
import re
import time
from collections import Counter
from contextlib import suppress
from itertools import chain

import numpy as np
import torch

from utils import lists, recipe
from utils.charts import contact_sheet, drawable, matrix
from utils.dataloader import DataGenerator, own_data
from utils.errors import UserError, plain
from utils.files import save_file, save_image, writable
from utils.processes import ProgressLine
from utils.trained import TrainedRun, command

MOST = 1000  # classes of which a table or a matrix can be read


def pictures_of(run, annotation=None):
    """What a DataGenerator takes: the checked lines of the run's test list or of another file, or the fork's own data.

    A config.json of somebody else may name any file: its words are in a message only where the user names it.
    """
    own, now = None if annotation else own_data(run.settings), []
    classes, path = "own_data" if own else run.settings["classes_path"], annotation or run.settings["test_annotation_path"]
    with suppress(UserError):  # without a list of classes there is nothing to compare
        now = own[0] if own else lists.get_classes(classes)[0]
    moved = [number for number, names in enumerate(zip(run.class_names, now)) if len(set(map(lists.class_name, names))) > 1]
    if moved:
        why = f"class {moved[0]} is {run.class_names[moved[0]]!r} in {run.folder}, but not in {classes}"
        if not annotation:
            raise UserError(f"{why}, so class ids mean other classes: --annotation names a list with the run's ids")
        print(f"WARNING: {plain(why)}; the ids of {plain(annotation)} are taken for the run's")
    if own:
        return own[2]
    lists.check_text_file("annotation", path)
    try:
        with open(path, encoding="utf-8") as file:
            return lists.check_lines(file.readlines(), path, len(run.class_names), run.folder)
    except UserError:
        if annotation:
            raise
        raise UserError(f"{path}, the run's test list, is none for its classes: --annotation {path} says why") from None


def score(run, data, batch_size, num_workers=None):
    """({figure: number}, the indices of the pictures that could be read, their targets, best class ids, and answers)."""
    s, sums, targets, best, answers, unreadable = run.settings, Counter(), [], [], [], []
    criterion, progress = recipe.get_criterion(s), ProgressLine("evaluating", -(-len(data) // batch_size))
    for step, (scores, truth, bad) in enumerate(run.scored(data, batch_size, num_workers), 1):
        for index, reason in bad:
            unreadable.append(index)
            print(f"\nunreadable picture: {plain(data.name(index))} ({plain(reason)})")
        if scores is not None:
            sums.update(recipe.sums_of(criterion(scores, truth), scores, truth, s))  # adds to what each name has
            targets.append(truth.cpu())
            best.append(recipe.ranked(scores, 1)[1][:, 0].cpu())
            answers += recipe.answers(scores, run.class_names)
            progress.show(step, batch_size, lambda: ", ".join(recipe.figure_text(*f) for f in recipe.figures_of(sums, s).items()))
    progress.clear()
    indices = np.delete(np.arange(len(data)), unreadable)
    if not targets:
        raise UserError("no picture of the list can be read, so there is no score")
    for index, answer in zip(indices, answers):
        if isinstance(answer, str):
            raise UserError(f"{answer}: {plain(data.name(index))}")
    return recipe.figures_of(sums, s), indices, torch.cat(targets), torch.cat(best), answers


def per_class(truth, called, number):
    """precision, recall, F1 (0 where undefined) and support of each class, from int64 (N,) class ids, true and predicted."""
    support, named, right = (np.bincount(ids, minlength=number) for ids in (truth, called, truth[truth == called]))
    return right / np.maximum(named, 1), right / np.maximum(support, 1), 2 * right / np.maximum(support + named, 1), support


def report(names, table):
    """Print the table of per_class and its means; the plain mean is that of the classes with pictures."""
    seen, rows = table[3] > 0, [*zip(names, *table)] if len(names) <= MOST else []
    for label, weights in (("mean", seen), ("weighted mean", table[3])):
        rows.append((label, *(np.average(figure, weights=weights) for figure in table[:3]), table[3].sum()))
    width = max(len(name) for name, *_ in rows)
    print(f"{'class':<{width}}  precision  recall      F1  support")
    for name, precision, recall, f1, support in rows:
        print(f"{name:<{width}}  {precision:9.4f}  {recall:6.4f}  {f1:6.4f}  {support:7d}")
    if len(names) > MOST:
        print(f"({len(names)} classes are more than anybody reads: they stand in per_class.csv, and there is no confusion matrix)")
    if not seen.all():
        print(f"mean: without {np.sum(~seen)} of {len(names)} classes, which have no picture here")


def by_class(data, names, indices, truth, called, answers):
    """What holds where each picture is of one class: prints the table, returns ({file name: rows or picture}, confusion matrix).

    truth, called: int64 (N,) class ids. Rows of the matrix are true classes; of more than MOST classes it is None.
    """
    truth, called, number, shown = truth.numpy(), called.numpy(), len(names), list(map(plain, names))
    table, drawn, confusion = per_class(truth, called, number), drawable(shown), None
    report(shown, table)
    files = {"per_class.csv": [("class", "precision", "recall", "F1", "support"), *zip(names, *table)]}
    if wrong := sorted(np.flatnonzero(truth != called), key=lambda i: -answers[i][0][1])[:32]:
        small = DataGenerator(data.source, (112, 112), random=False)
        files["mistakes.png"] = contact_sheet([small[int(indices[i])][0] for i in wrong], [
            f"{drawn[truth[i]]}\nnot {drawn[called[i]]}\n{answers[i][0][1]:.0%}" for i in wrong])
    if number <= MOST:
        confusion = np.bincount(truth * number + called, minlength=number ** 2).reshape(number, number)
        files["confusion_matrix.csv"] = [["true \\ predicted", *names], *([name, *row] for name, row in zip(names, confusion.tolist()))]
        files["confusion_matrix.png"] = matrix(confusion, shown)
    return files, confusion


def save_csv(path, rows):
    """A name or path that begins as a formula does gets a quote before it: spreadsheets would compute it."""
    def cell(value):
        formula = re.match(r"[=@\t\r\n]|[+-](?![\d.]+(e-?\d+)?$)", str(value))
        return f"{value:.6f}" if isinstance(value, float) else f"'{value}" if formula else value
    memory = io.StringIO()
    csv.writer(memory, lineterminator="\n").writerows(map(cell, row) for row in rows)
    save_file(path, lambda file: file.write(memory.getvalue().encode("utf-8", "backslashreplace")))


def evaluate(run, weights=None, annotation=None, out=None, batch_size=None, num_workers=None):
    """Score, print and write everything; returns {**figures, 'scored', 'confusion'}."""
    for name, value, low, high in (("--batch-size", batch_size, 1, 100_000), ("--num-workers", num_workers, 0, 1_000)):
        if value is not None and (type(value) is not int or not low <= value <= high):
            raise UserError(f"{name} {value!r} must be a whole number from {low} to {high}")
    run = TrainedRun(run, weights)
    names, s = run.class_names, run.settings
    data = DataGenerator(pictures_of(run, annotation), s["input_shape"], random=False, val_crop=s["val_crop"], num_classes=len(names))
    out, begin = writable(out or run.folder, "name another folder with --out"), time.monotonic()
    figures, indices, targets, best, answers = score(run, data, batch_size or s["Unfreeze_batch_size"], num_workers)
    count, speed = len(indices), len(indices) / max(time.monotonic() - begin, 1e-3)
    files, confusion = by_class(data, names, indices, targets, best, answers)
    words = [recipe.figure_text(name, value, exact=True) for name, value in figures.items()]
    unreadable = [f"{len(data) - count} unreadable"] if count < len(data) else []
    print(*words, f"{count} pictures scored", *unreadable, f"{speed:.0f} images/s", sep=", ")
    rows = [["path", "true"] + [f"{what}{k}" for k in range(1, max(map(len, answers)) + 1) for what in recipe.ANSWER]]
    for name, target, answer in zip(map(data.name, indices), targets, answers):
        rows.append([lists.split_line(name)[1] or name, recipe.said(target, names), *chain.from_iterable(answer)])
    files["predictions.csv"] = rows
    (out / "mistakes.png").unlink(missing_ok=True)  # of weights that made some
    for name, content in files.items():
        (save_csv if name.endswith(".csv") else save_image)(out / name, content)
    print(f"wrote {', '.join(sorted(files))} into {plain(out)}")
    return {**figures, "scored": count, "confusion": confusion}


def main(arguments=None):
    parser = command("evaluate", __doc__)
    parser.add_argument("--annotation", help="list of 'class_id;path' lines (the run's test list)")
    parser.add_argument("--out", help="folder to write into (the run's)")
    parser.add_argument("--batch-size", type=int, help="pictures a step (the run's)")
    parser.add_argument("--num-workers", type=int, help="data-loader processes (one a core)")
    evaluate(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    main()
