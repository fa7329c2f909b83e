"""What the task says of targets, metrics and epochs."""

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

from utils.plumbing.errors import UserError
from utils.task import (
    batch_sums,
    check_outputs,
    epoch_order,
    logits_from,
    metric_text,
    metrics_from,
    top_classes,
)


def test_of_equal_logits_the_lower_class_id_comes_first():
    assert top_classes(torch.zeros(2, 5000), 5).tolist() == 2 * [[0, 1, 2, 3, 4]]


def test_logits_are_float32_whatever_the_network_computes_in():
    for kind in (torch.float16, torch.bfloat16, torch.float32):
        assert logits_from(torch.ones(2, 3, dtype=kind)).dtype == torch.float32


@pytest.mark.parametrize("classes, pictures", [(3, 40), (10, 300), (12, 30)])
def test_metrics_are_scikit_learns(classes, pictures):
    torch.manual_seed(classes)
    logits, targets = torch.randn(pictures, classes), torch.randint(0, classes - 1, (pictures,))
    sums = batch_sums(torch.tensor(0.5), logits, targets, {})
    metrics = metrics_from(sums, {})
    predicted = logits.argmax(1)
    assert metrics["loss"] == 0.5
    assert metrics["top1"] == pytest.approx((predicted == targets).double().mean().item())
    present = sorted(set(targets.tolist()))
    recalls = [(predicted[targets == i] == i).double().mean().item() for i in present]
    assert metrics["recall"] == pytest.approx(np.mean(recalls))
    if set(predicted.tolist()) <= set(present):
        assert metrics["recall"] == pytest.approx(balanced_accuracy_score(targets, predicted))
    assert ("top5" in metrics) == (classes > 5)
    if classes > 5:
        top5 = top_k_accuracy_score(targets, logits, k=5, labels=range(classes))
        assert metrics["top5"] == pytest.approx(top5)


def test_sums_add_up_over_batches():
    torch.manual_seed(0)
    logits, targets = torch.randn(12, 7), torch.randint(0, 7, (12,))
    parts = [
        batch_sums(torch.tensor(loss), logits[part], targets[part], {})
        for loss, part in ((1.0, slice(0, 9)), (3.0, slice(9, 12)))
    ]
    added = {name: parts[0][name] + parts[1][name] for name in parts[0]}
    whole = batch_sums(torch.tensor(1.5), logits, targets, {})
    assert metrics_from(added, {}) == pytest.approx(metrics_from(whole, {}))


def test_mixed_targets_count_as_their_larger_label():
    logits = torch.eye(3)
    shares = torch.tensor([[0.6, 0.4, 0.0], [0.6, 0.4, 0.0], [0.0, 0.3, 0.7]])
    mixed = metrics_from(batch_sums(torch.tensor(1.0), logits, shares, {}), {})
    plain = metrics_from(batch_sums(torch.tensor(1.0), logits, torch.tensor([0, 0, 2]), {}), {})
    assert mixed == plain and plain["recall"] == pytest.approx((0.5 + 1) / 2)


@pytest.mark.parametrize(
    "best_by, best",
    [("top1", 2), ("-top1", 0), ("val_loss", 3), ("-mae", 1), ("mae", 3), ("recall", 1)],
)
def test_the_best_epoch(best_by, best):
    """Of equal ones the one with the lower val_loss; of those the first, which max() takes."""
    rows = [
        {"top1": 0.5, "val_loss": 0.9, "mae": 2.0, "recall": 0.7},
        {"top1": 0.9, "val_loss": 0.8, "mae": 1.0, "recall": 0.8},
        {"top1": 0.9, "val_loss": 0.2, "mae": 2.0, "recall": 0.6},
        {"top1": 0.7, "val_loss": 0.1, "mae": 3.0, "recall": 0.6},
        {"top1": 0.9, "val_loss": 0.2, "mae": 2.0, "recall": 0.6},
    ]
    assert rows.index(max(rows, key=lambda row: epoch_order(row, best_by))) == best


def test_texts():
    assert metric_text("recall", 0.123456) == "mean recall 12.35%"
    assert metric_text("recall", 0.123456, exact=True) == "mean recall 12.3456%"
    assert metric_text("top5", 1.0) == "top-5 100.00%"
    assert metric_text("val_loss", 0.123456) == "val loss 0.1235"


def test_outputs_that_the_loss_cannot_take():
    check_outputs(torch.zeros(2, 5), 5)
    with pytest.raises(UserError, match=r"\[2, 4\] for 2 pictures, not \[2, 5\]"):
        check_outputs(torch.zeros(2, 4), 5)
    with pytest.raises(UserError, match="tuple"):
        check_outputs((torch.zeros(2, 5), torch.zeros(2, 5)), 5)
