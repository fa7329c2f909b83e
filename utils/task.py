"""What makes this project a classifier: labels, loss, metrics, predictions and their tables.

Another task is another file in place of this one, with the same functions, by which alone training
and the commands know it (but top_classes, per_class, true_and_predicted and calibration_error are
this file's own). Logits: what the network gives, float32 (N, classes). Targets: int64
(N,) class ids, or float32 (N, classes) shares where pictures are mixed. settings: train.py's, also
given where this task reads none of them.
"""

import re

import numpy as np
import torch
import torch.nn.functional as F

from utils.plumbing.charts import draw_matrix, drawable_names
from utils.plumbing.errors import UserError

PREDICTION_COLUMNS = ("class", "probability")  # of predictions.csv and JSON
SHARES = {"top1": "top-1", "top5": "top-5", "recall": "mean recall"}  # metrics in percent


def read_label(label, num_classes=None):
    """Return the class id, an int, that the label of an annotation line or a data set names.

    UserError: it is no whole number, or outside of 0 … num_classes - 1.
    """
    text = str(label).strip()
    # int() would also take '+0', '00' and '٠'
    if not re.fullmatch("0|-?[1-9][0-9]{0,17}", text):
        raise UserError(f"the class id {text[:40]!r} is not a whole number like 0 or 12")
    if num_classes is not None and not 0 <= int(text) < num_classes:
        raise UserError(f"class id {int(text)} is outside 0 … {num_classes - 1}")
    return int(text)


def get_criterion(settings, weights=None, training=False):
    """Return the loss, criterion(logits, targets) → scalar, the mean over the batch's pictures.

    weights: float32 (classes,) or None. Only training has weights and label smoothing. A picture's
    loss is multiplied by the weight of its label: cross_entropy(weight=…) would weight each
    smoothed class by its own, and favour rare ones. The sum is divided by the number of pictures,
    not by the sum of their weights, so that it does not matter how a batch is spread over
    processes.
    """
    smoothing = settings.get("label_smoothing", 0.0) if training else 0.0

    def criterion(logits, targets):
        if weights is None:  # the usual case, and always in validation
            return F.cross_entropy(logits, targets, label_smoothing=smoothing)
        if targets.dim() == 1:
            picture_weights = weights[targets]
        else:  # mixed: each label by its own weight
            picture_weights = (targets * weights).sum(1)  # float32, where @ would be half
            targets = targets * weights / picture_weights[:, None]
        losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
        return (picture_weights * losses).mean()

    return criterion


def logits_from(outputs):
    """Return a network's outputs as float32 logits: mixed precision leaves them in another type."""
    return outputs.float()


def check_outputs(outputs, num_classes):
    """Raise UserError unless a network's outputs for two pictures are (2, num_classes) logits."""
    if not isinstance(outputs, torch.Tensor):
        shape = type(outputs).__name__
    else:
        shape = list(outputs.shape)
    if shape != [2, num_classes]:
        raise UserError(
            f"the network gives {shape} for 2 pictures, not [2, {num_classes}]: "
            f"its last layer needs num_classes outputs"
        )


def batch_sums(loss, logits, targets, settings):
    """Return what a batch adds to the metrics: {name: float64 tensor}, on the batch's device.

    The tensors may have any shape. No number is read here: a GPU would have to finish the step
    first. loss: scalar mean over the batch. 'hits' is a table (classes, 1 + min(5, classes)). Row c
    is about the pictures whose label is c: column 0 counts them, column k those of them whose k-th
    highest logit is c's.
    """
    labels = targets if targets.dim() == 1 else targets.argmax(1)  # mixed: the larger label
    # column 0 is the label itself, so its hits are the pictures of the class
    columns = torch.cat([labels[:, None], top_classes(logits, 5)], 1)
    hits = torch.zeros(logits.shape[1], columns.shape[1], dtype=torch.float64, device=logits.device)
    hits.index_add_(0, labels, (columns == labels[:, None]).double())
    return {
        "pictures": hits.new_full((), len(logits)),
        "loss": loss.detach().double() * len(logits),
        "hits": hits,
    }


def metrics_from(sums, settings):
    """Return the metrics, {name: number}, from the added batch_sums.

    All of them are in the history; training's have 'train_' before their names. There is no top5
    of five classes or fewer.
    """
    hits = sums["hits"].cpu()
    of_class, top1, top5 = hits[:, 0], hits[:, 1], hits[:, 1:].sum(1)
    present = of_class > 0
    metrics = {
        "loss": (sums["loss"] / sums["pictures"]).item(),
        "top1": (top1.sum() / of_class.sum()).item(),
        "top5": (top5.sum() / of_class.sum()).item(),
        "recall": (top1[present] / of_class[present]).mean().item(),
    }
    if len(hits) <= 5:  # it is always 100 %
        del metrics["top5"]
    return metrics


def metric_text(name, value, exact=False):
    """Return a metric with its name, for people; exact: with enough digits to compare it."""
    if name in SHARES:
        return f"{SHARES[name]} {value:.4%}" if exact else f"{SHARES[name]} {value:.2%}"
    digits = ".4f" if name.endswith("loss") else ".4g"
    if exact:
        digits = ".8g"
    return f"{name.replace('_', ' ')} {value:{digits}}"


def metric_texts(metrics, exact=False):
    """Return the texts of {name: number}."""
    return [metric_text(name, value, exact) for name, value in metrics.items()]


def epoch_order(metrics, best_by):
    """Return the key by which epochs are compared: the best epoch has the highest.

    Equal ones go by val_loss. best_by: a name in metrics. The lowest value is best for a name that
    ends in 'loss', or with '-' in front ('-mae').
    """
    name = best_by.removeprefix("-")
    lowest_is_best = best_by.startswith("-") or name.endswith("loss")
    value = -metrics[name] if lowest_is_best else metrics[name]
    return value, -metrics.get("val_loss", 0.0)


def probabilities(logits):
    """Return the probabilities, float32 (N, classes), that predict, evaluate and export show."""
    return logits.softmax(1)


def top_classes(logits, number):
    """Return the int64 ids of the highest logits, of equal ones the lower first.

    They are (N, number), or as many as there are classes.
    """
    return logits.argsort(dim=1, descending=True, stable=True)[:, :number]


def top_predictions(logits, names):
    """Return a prediction for each row: [(class name, probability), …], the five best in order.

    A row whose logits are not finite has a sentence in its place.
    """
    ids = top_classes(logits, 5)  # by logits: small probabilities are rounded to equal numbers
    values = probabilities(logits).gather(1, ids)
    finite = logits.isfinite().all(1)
    predictions = []
    for row_ids, row_values, is_finite in zip(ids.tolist(), values.tolist(), finite.tolist()):
        if is_finite:
            predictions.append([(names[i], value) for i, value in zip(row_ids, row_values)])
        else:
            predictions.append("the network's scores for it are not finite")
    return predictions


def prediction_json(prediction):
    """Return one of top_predictions for programs."""
    pairs = [(name, round(value, 6)) for name, value in prediction]
    return {"top5": [dict(zip(PREDICTION_COLUMNS, pair)) for pair in pairs]}


def prediction_text(name, value):
    """Return one pair of a prediction as it is printed and drawn."""
    return f"{name} {value:.1%}"


def target_text(target, names):
    """Return a picture's target as captions and tables show it: its class name."""
    return names[int(target)]


def per_class(targets, predicted, number):
    """Return precision, recall, F1 (0 where undefined) and support of each class.

    targets, predicted: int64 (N,) arrays of class ids; number: how many classes there are.
    """
    support = np.bincount(targets, minlength=number)
    named = np.bincount(predicted, minlength=number)
    right = np.bincount(targets[targets == predicted], minlength=number)
    precision = right / np.maximum(named, 1)
    recall = right / np.maximum(support, 1)
    f1 = 2 * right / np.maximum(support + named, 1)
    return precision, recall, f1, support


def true_and_predicted(targets, predictions, names):
    """Return (N,) arrays: the targets' ids, the ids predicted first, and their probabilities."""
    ids = {name: class_id for class_id, name in enumerate(names)}
    predicted, probability = zip(*(prediction[0] for prediction in predictions))
    return targets.numpy(), np.array([ids[name] for name in predicted]), np.array(probability)


def whole_set(targets, predictions, names):
    """Return (rows to print, {file name: content}, {metric: number}) for a whole list's pictures.

    targets: int64 (N,) tensor; predictions: those of top_predictions. The printed rows are
    per_class's, then two means: over the classes that have pictures, and weighted by their number.
    A file's content is the rows of a table, or a picture: per_class.csv and the confusion matrix.
    The metrics are those that only all pictures together tell.
    """
    targets, predicted, probability = true_and_predicted(targets, predictions, names)
    number = len(names)
    *scores, support = per_class(targets, predicted, number)
    header = ("class", "precision", "recall", "F1", "support")
    rows = [header, *zip(names, *scores, support)]
    files = {"per_class.csv": list(rows)}
    present = support > 0
    for title, weights in (
        (f"mean of {present.sum()} classes", present),
        ("weighted mean", support),
    ):
        means = [np.average(score, weights=weights) for score in scores]
        rows.append((title, *means, len(targets)))
    if number <= 1000:  # a matrix of more classes takes gigabytes
        counts = np.bincount(targets * number + predicted, minlength=number**2)
        counts = counts.reshape(number, number)
        matrix = [[name, *row] for name, row in zip(names, counts)]
        files["confusion_matrix.csv"] = [["true \\ predicted", *names], *matrix]
        files["confusion_matrix.png"] = draw_matrix(counts, names)
    metrics = {"calibration_error": calibration_error(probability, targets == predicted)}
    return rows, files, metrics


def mistakes(targets, predictions, names, number=32):
    """Return [(place, caption)] of the wrong predictions, the most confident ones first.

    place: the prediction's, from 0. There are at most `number`.
    """
    targets, predicted, probability = true_and_predicted(targets, predictions, names)
    shown = drawable_names(names)
    wrong = np.flatnonzero(targets != predicted)
    wrong = wrong[np.argsort(-probability[wrong], kind="stable")][:number]
    captions = []
    for place in wrong.tolist():
        true, named = shown[targets[place]], shown[predicted[place]]
        captions.append((place, f"true: {true}\npredicted: {named}\n{probability[place]:.0%}"))
    return captions


def calibration_error(confidence, correct, bins=15):
    """Return the expected calibration error: how far confidence is from accuracy, from 0 to 1.

    confidence: (N,) probabilities of the predicted classes; correct: (N,) booleans. The mean of
    |accuracy - mean confidence| over bins of equal width, weighted by their pictures (Guo et al.,
    "On Calibration of Modern Neural Networks", 2017).
    """
    places = np.minimum((confidence * bins).astype(int), bins - 1)
    # |accuracy - mean confidence| of a bin times its pictures is |the sum of their differences|
    gaps = np.bincount(places, weights=confidence - correct, minlength=bins)
    return np.abs(gaps).sum() / len(confidence)
