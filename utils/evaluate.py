"""Measure a trained run on a list of pictures: python -m utils.evaluate RUN

Prints top-1, top-5, loss and each class's precision, recall, F1 and support; writes confusion_matrix.csv and .png,
per_class.png, predictions.csv and mistakes.png (the most confident ones) into the run's folder, or --out.
"""
import csv
import io
import os
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter

import numpy as np
import torch

from utils import lists, recipe
from utils.charts import bars, contact_sheet, matrix
from utils.dataloader import DataGenerator, own_data
from utils.errors import UserError
from utils.files import save_image, save_text, writable
from utils.processes import ProgressLine, one_sentence_errors
from utils.trained import TrainedRun

SHOWN = {"top1": "top-1 {:.4%}", "top5": "top-5 {:.4%}", "loss": "loss {:.8g}"}  # other figures by their name


def pictures_of(run, annotation=None):
    """What a DataGenerator takes: the checked lines of the run's test list or of another file, or the fork's own data."""
    classes, path = run.settings["classes_path"], annotation or run.settings["test_annotation_path"]
    own = None if annotation else own_data(run.settings)
    now = own[0] if own else lists.get_classes(classes)[0] if os.path.isfile(classes) else []
    other = lists.difference(run.class_names, now, run.folder, "own_data" if own else classes)
    if other and not annotation:
        raise UserError(f"{other}, so class ids mean other classes: --annotation names a list with the run's ids")
    if other:
        print(f"WARNING: {other}; the ids of {annotation} are taken for the run's")
    if own:
        return own[2]
    lists.check_text_file("annotation", path, "python -m utils.annotation DATASETS writes it")
    with open(path, encoding="utf-8") as file:
        return lists.check_lines(file.readlines(), path, len(run.class_names), run.folder)


def score(run, data, batch_size, num_workers=None):
    """({figure: number}, float32 (N, classes) probabilities, int64 (N,) true classes, (N,) indices of what was scored)."""
    criterion, sums, shown, truth, unreadable = recipe.get_criterion(run.settings), Counter(), [], [], []
    progress = ProgressLine("evaluating", -(-len(data) // batch_size))
    for step, (scores, targets, named) in enumerate(run.scored(data, batch_size, num_workers), 1):
        for index, reason in named:
            unreadable.append(index)
            print(f"\nunreadable picture: {data.name(index)} ({reason})")
        if scores is not None:
            sums.update(recipe.sums_of(criterion(scores, targets), scores, targets, run.settings))  # adds to what each name has
            shown.append(recipe.probabilities(scores).cpu())
            truth.append(targets.cpu())
            progress.show(step, batch_size, lambda: "top1 {:.1%}".format(recipe.figures_of(sums, run.settings).get("top1", 0)))
    progress.clear()
    if not truth:
        raise UserError("no picture of the list can be read, so there is no score")
    shown, indices = torch.cat(shown), np.delete(np.arange(len(data)), unreadable)
    for index in indices[~shown.isfinite().all(1).numpy()]:
        raise UserError(f"the network's scores are not finite, first for {data.name(index)}")
    return recipe.figures_of(sums, run.settings), shown.numpy(), torch.cat(truth).numpy(), indices


def per_class(confusion):
    """precision, recall, F1 (0 where undefined) and support from a confusion matrix, rows true, columns predicted."""
    right, support, called = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    precision, recall = right / np.maximum(called, 1), right / np.maximum(support, 1)
    return precision, recall, 2 * right / np.maximum(support + called, 1), support


def save_csv(path, rows):
    memory = io.StringIO()
    csv.writer(memory, lineterminator="\n").writerows(rows)
    save_text(path, memory.getvalue())


def report(names, confusion):
    """The table of per-class figures and their means, as text; the plain mean is that of the classes with pictures."""
    table, seen = per_class(confusion), confusion.sum(1) > 0
    width = max(map(len, [*names, "weighted mean"]))
    lines = [f"{'class':<{width}}  precision  recall      F1  support"]
    lines += [f"{name:<{width}}  {p:9.4f}  {r:6.4f}  {f:6.4f}  {n:7d}" for name, p, r, f, n in zip(names, *table)]
    for label, weights in (("mean", seen), ("weighted mean", table[3])):
        means = [np.average(figure, weights=weights) for figure in table[:3]]
        lines.append("{:<{}}  {:9.4f}  {:6.4f}  {:6.4f}  {:7d}".format(label, width, *means, confusion.sum()))
    lines += [f"mean: without {np.sum(~seen)} of {len(names)} classes, which have no picture here"] * (not seen.all())
    return "\n".join(lines)


def sheet_of_mistakes(source, indices, names, shown, truth, number=32):
    """The wrongly classified pictures with the highest probability of the wrong class."""
    called, sure = shown.argmax(1), shown.max(1)
    wrong = np.argsort(np.where(called != truth, -sure, 1), kind="stable")[:min(number, np.sum(called != truth))]
    data = DataGenerator(source, (112, 112), random=False)
    return contact_sheet([data[int(i)][0] for i in indices[wrong]],
                         [f"{names[truth[i]]}\nnot {names[called[i]]}\n{sure[i]:.0%}" for i in wrong])


def evaluate(run_folder, weights=None, annotation=None, out=None, batch_size=None, num_workers=None):
    """Score, print and write everything; returns {**figures, 'scored', 'confusion'}."""
    for name, value, low, high in (("--batch-size", batch_size, 1, 100_000), ("--num-workers", num_workers, 0, 1_000)):
        if value is not None and (type(value) is not int or not low <= value <= high):
            raise UserError(f"{name} {value!r} must be a whole number from {low} to {high}")
    run = TrainedRun(run_folder, weights)
    source, names = pictures_of(run, annotation), run.class_names
    out = writable(out or run_folder, "name another folder with --out")
    s, begin = run.settings, time.monotonic()
    data = DataGenerator(source, s["input_shape"], random=False, val_crop=s["val_crop"], num_classes=len(names))
    found, shown, truth, indices = score(run, data, batch_size or s["Unfreeze_batch_size"], num_workers)
    count, speed = len(truth), len(truth) / max(time.monotonic() - begin, 1e-3)
    confusion = np.bincount(truth * len(names) + shown.argmax(1), minlength=len(names) ** 2).reshape(len(names), -1)
    print(report(names, confusion))
    words = [SHOWN.get(name, name + " {:.6g}").format(found[name]) for name in {**SHOWN, **found} if name in found]
    unreadable = [f"{len(data) - count} unreadable"] if count < len(data) else []
    print(*words, f"{count} pictures scored", *unreadable, f"{speed:.0f} images/s", sep=", ")
    best = np.argsort(-shown, axis=1, kind="stable")[:, :5]
    rows = [["path", "true"] + [f"{what}{k}" for k in range(1, best.shape[1] + 1) for what in ("class", "probability")]]
    for i, label, five, row in zip(indices, truth, best, shown):
        cells = [cell for k in five for cell in (names[k], f"{row[k]:.6f}")]
        rows.append([lists.split_line(data.name(i))[1] or data.name(i), names[label], *cells])
    save_csv(out / "predictions.csv", rows)
    save_csv(out / "confusion_matrix.csv",
             [["true \\ predicted", *names], *([name, *row] for name, row in zip(names, confusion.tolist()))])
    save_image(out / "confusion_matrix.png", matrix(confusion, names))
    save_image(out / "per_class.png", bars(names, dict(zip(("precision", "recall", "F1"), per_class(confusion)))))
    save_image(out / "mistakes.png", sheet_of_mistakes(source, indices, names, shown, truth))
    print(f"wrote confusion_matrix.csv, confusion_matrix.png, per_class.png, predictions.csv, mistakes.png into {out}")
    return {**found, "scored": count, "confusion": confusion}


def main(arguments=None):
    parser = ArgumentParser("python -m utils.evaluate", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("run_folder", metavar="run", help="a run's folder, logs/…")
    parser.add_argument("--weights", help="weights file (the run's best_epoch_weights.pth)")
    parser.add_argument("--annotation", help="list of 'class_id;path' lines (the run's test list)")
    parser.add_argument("--out", help="folder to write into (the run's)")
    parser.add_argument("--batch-size", type=int, help="pictures a step (the run's)")
    parser.add_argument("--num-workers", type=int, help="data-loader processes (one a core)")
    one_sentence_errors()
    evaluate(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    main()
