"""Measure a trained run on a list of pictures: python -m utils.evaluate RUN

Prints top-1, top-5, loss and each class's precision, recall, F1 and support; writes confusion_matrix.csv and .png,
per_class.png, predictions.csv and mistakes.png (the most confident ones) into the run's folder, or --out.
"""
import argparse
import csv
import io
import os
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from utils import checks
from utils.charts import bars, contact_sheet, matrix
from utils.checkpoint import save_image, save_text
from utils.console import ProgressLine
from utils.dataloader import DataGenerator, EpochSampler, detection_collate, split_line
from utils.errors import UserError, one_sentence_errors
from utils.fit import score_batches, score_sums
from utils.predict import Run
from utils.workers import ignore_signals


def read_lines(run, annotation):
    """Checked annotation lines of the run's test list, or of another file."""
    path = annotation or run.settings["test_annotation_path"]
    checks.check_text_file("annotation", path, "python -m utils.annotation DATASETS writes it")
    with open(path, encoding="utf-8") as file:
        return checks.check_lines(file.readlines(), path, len(run.class_names), run.settings["classes_path"])


def score(run, lines, batch_size, num_workers):
    """(float64 sums as fit.score_sums gives, float32 (N, classes) probabilities, int64 (N,) true classes, (N,) indices)."""
    s = run.settings
    data = DataGenerator(lines, s["input_shape"], random=False, val_crop=s["val_crop"])
    gen = DataLoader(data, batch_size, num_workers=num_workers, pin_memory=run.Cuda, collate_fn=detection_collate,
                     sampler=EpochSampler(len(lines), batch_size, shuffle=False), worker_init_fn=ignore_signals)
    unreadable, sums, probabilities, truth = set(), 0, [], []

    def between(failure, named):
        if failure:
            raise failure
        for index, reason in named:
            unreadable.add(index)
            print(f"\nunreadable picture: {data.line(index)} ({reason})")
    progress = ProgressLine("evaluating", len(gen))
    for step, (scores, targets) in enumerate(score_batches(run.model, gen, len(gen), run.Cuda, run.fp16,
                                                           s["channels_last"], between), 1):
        sums = sums + score_sums(scores, targets).cpu()
        probabilities.append(scores.softmax(1).cpu())
        truth.append(targets.cpu())
        progress.show(step, batch_size, lambda: f"top1 {sums[1] / sums[3]:.1%}")
    progress.clear()
    if not truth:
        raise UserError("no picture of the list can be read, so there is no score")
    indices = np.array([i for i in range(len(lines)) if i not in unreadable])
    return sums.numpy(), torch.cat(probabilities).numpy(), torch.cat(truth).numpy(), indices


def per_class(confusion):
    """precision, recall, F1 (0 where undefined) and support from a confusion matrix, rows true, columns predicted."""
    right, support, called = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    precision, recall = right / np.maximum(called, 1), right / np.maximum(support, 1)
    f1 = 2 * right / np.maximum(support + called, 1)
    return precision, recall, f1, support


def csv_text(rows):
    memory = io.StringIO()
    csv.writer(memory, lineterminator="\n").writerows(rows)
    return memory.getvalue()


def report(names, confusion):
    """The table of per-class figures and their means, as text."""
    precision, recall, f1, support = figures = per_class(confusion)
    width = max(map(len, [*names, "weighted mean"]))
    lines = [f"{'class':<{width}}  precision  recall      F1  support"]
    lines += [f"{name:<{width}}  {p:9.4f}  {r:6.4f}  {f:6.4f}  {n:7d}" for name, p, r, f, n in zip(names, *figures)]
    for label, weight in (("mean", np.full(len(names), 1 / len(names))), ("weighted mean", support / support.sum())):
        means = [(figure * weight).sum() for figure in (precision, recall, f1)]
        lines.append("{:<{}}  {:9.4f}  {:6.4f}  {:6.4f}  {:7d}".format(label, width, *means, support.sum()))
    return "\n".join(lines)


def sheet_of_mistakes(data_lines, names, probabilities, truth, number=32):
    """The wrongly classified pictures with the highest probability of the wrong class."""
    called = probabilities.argmax(1)
    wrong = np.flatnonzero(called != truth)
    wrong = wrong[np.argsort(-probabilities[wrong, called[wrong]], kind="stable")][:number]
    lines = DataGenerator([data_lines[i] for i in wrong], (112, 112), random=False)
    pictures = [lines[i][0] for i in range(len(wrong))]
    labels = [f"{names[truth[i]]}\nnot {names[called[i]]}\n{probabilities[i, called[i]]:.0%}" for i in wrong]
    return contact_sheet(pictures, labels)


def evaluate(run_folder, weights=None, annotation=None, out=None, batch_size=None, num_workers=None):
    """Score, print and write everything; returns {'top1', 'top5', 'loss', 'scored', 'confusion'}."""
    run = Run(run_folder, weights)
    lines, names, out = read_lines(run, annotation), run.class_names, Path(out or run_folder)
    begin = time.monotonic()
    sums, probabilities, truth, indices = score(run, lines, batch_size or run.settings["Unfreeze_batch_size"],
                                                (os.cpu_count() or 1) if num_workers is None else num_workers)
    seconds, count = time.monotonic() - begin, len(truth)
    called = probabilities.argmax(1)
    confusion = np.bincount(truth * len(names) + called, minlength=len(names) ** 2).reshape(len(names), -1)
    print(report(names, confusion))
    figures = {"top1": sums[1] / count, "top5": sums[2] / count, "loss": sums[0] / count, "scored": count}
    print("top-1 {top1:.4%}, top-5 {top5:.4%}, loss {loss:.8g}, {scored} pictures scored".format(**figures)
          + (f", {len(lines) - count} unreadable" if count < len(lines) else "") + f", {count / seconds:.0f} images/s")
    out.mkdir(parents=True, exist_ok=True)
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :5]
    rows = [["path", "true"] + [f"{what}{k}" for k in range(1, order.shape[1] + 1) for what in ("class", "probability")]]
    for i, label, best in zip(indices, truth, order):
        row = len(rows) - 1
        rows.append([split_line(lines[i])[1], names[label]]
                    + [cell for k in best for cell in (names[k], f"{probabilities[row, k]:.6f}")])
    save_text(out / "predictions.csv", csv_text(rows))
    save_text(out / "confusion_matrix.csv", csv_text([["true \\ predicted", *names],
                                                      *([name, *row] for name, row in zip(names, confusion.tolist()))]))
    save_image(out / "confusion_matrix.png", matrix(confusion, names))
    save_image(out / "per_class.png", bars(names, dict(zip(("precision", "recall", "F1"), per_class(confusion)))))
    save_image(out / "mistakes.png", sheet_of_mistakes([lines[i] for i in indices], names, probabilities, truth))
    print(f"wrote confusion_matrix.csv, confusion_matrix.png, per_class.png, predictions.csv, mistakes.png into {out}")
    return {**figures, "confusion": confusion}


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m utils.evaluate", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run's folder, logs/…")
    parser.add_argument("--weights", help="weights file (the run's best_epoch_weights.pth)")
    parser.add_argument("--annotation", help="list of 'class_id;path' lines (the run's test list)")
    parser.add_argument("--out", help="folder to write into (the run's)")
    parser.add_argument("--batch-size", type=int, help="pictures a step (the run's)")
    parser.add_argument("--num-workers", type=int, help="data-loader processes (one a core)")
    options = parser.parse_args(arguments)
    one_sentence_errors()
    evaluate(options.run, options.weights, options.annotation, options.out, options.batch_size, options.num_workers)


if __name__ == "__main__":
    main()
