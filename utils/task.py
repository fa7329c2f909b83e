"""What makes this project a classifier: labels, the loss, the metrics, and predictions as people and programs see them."""

import re

import torch
import torch.nn.functional as F

from utils.plumbing.errors import UserError


def read_label(label, num_classes=None):
    """What a label says, a line's text or whatever a data set gives: the class id, an int. UserError, without the place."""
    text = str(label).strip()
    if not re.fullmatch(
        "0|-?[1-9][0-9]{0,17}", text
    ):  # int() would take '+0', '00', '٠' and 0.5 as well
        raise UserError(f"the class id {text[:40]!r} is not a whole number")
    if num_classes is not None and not 0 <= int(text) < num_classes:
        raise UserError(f"class id {int(text)} is outside 0 … {num_classes - 1}")
    return int(text)


def get_criterion(settings, weights=None, training=False):
    """The loss: criterion(scores, targets) → scalar, the mean over the batch's pictures.

    scores: float32 (N, classes). targets: int64 (N,), or float32 (N, classes) where pictures are mixed. weights: float32
    (classes,) or None. Only training has weights and label smoothing. A picture counts as much as its label weighs: smoothed
    shares weighed by their own classes would teach the network to name the rare ones. The sum is divided by the number of
    pictures, as the sum of their weights would depend on how a batch is spread over processes.
    """
    smoothing = settings.get("label_smoothing", 0.0) if training else 0.0

    def criterion(scores, targets):
        share = torch.ones((), device=scores.device)
        if weights is not None and targets.dim() == 1:
            share = weights[targets]
        elif (
            weights is not None
        ):  # each label's loss by its own weight, as much as there is of the label
            share = targets @ weights
            targets = targets * weights / share[:, None]
        return (
            share * F.cross_entropy(scores, targets, reduction="none", label_smoothing=smoothing)
        ).mean()

    return criterion


def probabilities(scores):
    """float32 (N, classes) scores → what predict, evaluate and export show for each class, from 0 to 1."""
    return scores.softmax(1)


def top_classes(scores, number):
    """int64 (N, number) class ids of the highest scores. The one order among equals: the lower class id first."""
    return scores.argsort(dim=1, descending=True, stable=True)[:, :number]


def top_predictions(scores, names):
    """What is said of pictures: for each row of float32 (N, classes) scores [(class name, probability)], the best five
    first; or a text that says why there is none."""
    indices = top_classes(
        scores, 5
    )  # of scores, as small probabilities are rounded to the same number
    values = probabilities(scores).gather(1, indices)
    return [
        [(names[index], value) for value, index in zip(*row)]
        if finite
        else "the network's scores for it are not finite"
        for finite, *row in zip(
            scores.isfinite().all(1).tolist(), values.tolist(), indices.tolist()
        )
    ]


PREDICTION_COLUMNS = (
    "class",
    "probability",
)  # what the two parts of an answer are called in predictions.csv and JSON


def prediction_json(answer):
    """A picture's answer, one of what `answers` gives, for programs."""
    return {
        "top5": [dict(zip(PREDICTION_COLUMNS, (name, round(value, 6)))) for name, value in answer]
    }


def prediction_text(name, value):
    """One of the pairs that `answers` gives, as it is printed and drawn."""
    return f"{name} {value:.1%}"


def target_text(target, names):
    """A picture's target as captions and tables show it: its class name."""
    return names[int(target)]


def batch_sums(loss, scores, targets, settings):
    """What a batch adds to the figures of training and evaluation: {name: float64 tensor of any shape} on the batch's device, so
    that no step waits. loss: scalar mean; scores: float32 (N, classes); targets: as get_criterion's."""
    labels = targets if targets.dim() == 1 else targets.argmax(1)  # mixed: the larger label
    right = (top_classes(scores, 5) == labels[:, None]).sum(0)
    return {
        "pictures": torch.full((), len(scores), dtype=torch.float64, device=scores.device),
        "loss": loss.detach().double() * len(scores),
        "top1": right[0].double(),
        "top5": right.sum().double(),
    }


def metrics_from(sums, settings):
    """{name: number} from the added sums of sums_of. Whatever stands here is in the history, with 'train_' for training's."""
    figures = {name: (sums[name] / sums["pictures"]).item() for name in ("loss", "top1", "top5")}
    return figures


def metric_text(name, value, exact=False):
    """A figure with its name, as it is printed; exact: with digits enough to compare it."""
    if name in ("top1", "top5"):
        return f"top-{name[3:]} {value:.{4 if exact else 2}%}"
    return f"{name.replace('_', ' ')} {value:{'.8g' if exact else '.4f' if name.endswith('loss') else '.4g'}}"
