import copy
import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight
from torch import nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

from nets import get_model, head_layers
from tests.bench_trainings import FINETUNE, SCRATCH
from tests.helpers import (
    command,
    default_settings,
    history,
    make_data,
    make_project,
    run_of,
    same,
    train,
    weights,
)
from utils import task
from utils.fit import compute_loss, forward_backward, optimizer_step, score_batch
from utils.optimizer import check_parameters, get_optimizer
from utils.pictures import normalize
from utils.plumbing.errors import UserError
from utils.recipe import CLASS_WEIGHTS, EMA, Recipe, balanced_weights, mixed_precision
from utils.task import metrics_from

DEFAULTS = dict(
    mixup_alpha=0.0,
    cutmix_alpha=0.0,
    label_smoothing=0.0,
    ema_decay=0.0,
    clip_grad_norm=0.0,
    accumulate=1,
    seed=0,
)
NO_SCALER = torch.amp.GradScaler("cuda", enabled=False)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 3)
    )


def batches(sizes):
    torch.manual_seed(1)
    return [
        (torch.randint(0, 256, (n, 3, 12, 12), dtype=torch.uint8), torch.randint(0, 3, (n,)), [])
        for n in sizes
    ]


def test_accumulated_gradients_are_those_of_the_large_batch():
    parts = batches([4, 4, 4])
    large = [(torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]), [])]
    gradients = []
    for given in (parts, large):
        model, sums = network(), Counter()
        for batch in forward_backward(model, given, False, False, NO_SCALER, Recipe()):
            sums.update(batch)
        gradients.append(([p.grad for p in model.parameters()], sums))
    for a, b in zip(*[g[0] for g in gradients]):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert gradients[0][1]["loss"].item() == pytest.approx(gradients[1][1]["loss"].item(), rel=1e-5)
    assert gradients[0][1]["pictures"] == gradients[1][1]["pictures"] == 12


def test_a_step_reads_no_figure():
    """On tensors without values: whatever would make a host wait for its GPU is an error."""
    settings = default_settings(clip_grad_norm=1.0, mixup_alpha=1.0, ema_decay=0.9)
    model, sums = network().to("meta"), Counter()
    recipe = Recipe(settings, model, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    parts = [(images.to("meta"), targets.to("meta"), []) for images, targets, _ in batches([4, 4])]
    for _ in range(2):
        for batch in forward_backward(model, parts, False, False, NO_SCALER, recipe):
            sums.update(batch)
        optimizer_step(optimizer, NO_SCALER, settings["clip_grad_norm"], settings["clip_ratio"])
        recipe.ema.update_parameters(model)
    for name in ("pictures", "loss"):
        with pytest.raises(RuntimeError):
            sums[name].item()


def test_clip_grad_norm():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = copy.deepcopy(model)
    F.cross_entropy(100 * model(torch.randn(4, 3, 12, 12)), torch.tensor([0, 1, 2, 0])).backward()
    optimizer_step(optimizer, NO_SCALER, 0.5)
    moved = sum(
        (a - b).detach().pow(2).sum() for a, b in zip(model.parameters(), before.parameters())
    ).sqrt()
    assert moved == pytest.approx(0.5, rel=1e-3)


def test_no_layers_gradient_is_longer_than_its_share():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    F.cross_entropy(100 * model(torch.randn(4, 3, 12, 12)), torch.tensor([0, 1, 2, 0])).backward()
    with torch.no_grad():
        *_, head = (p for p in model.parameters() if p.ndim > 1)
        head.zero_()  # weights that begin as zeros still learn
    before = copy.deepcopy(model)
    limits = [
        0.2 * max(p.norm().item(), 0.01 * p.numel() ** 0.5) if p.ndim > 1 else float("inf")
        for p in model.parameters()
    ]
    expected = [
        p.grad * min(1, limit / p.grad.norm().item())
        for p, limit in zip(model.parameters(), limits)
    ]
    assert any(p.grad.norm() > limit for p, limit in zip(model.parameters(), limits))
    optimizer_step(optimizer, NO_SCALER, clip_ratio=0.2)
    for one, other, step in zip(model.parameters(), before.parameters(), expected):
        assert torch.allclose(other - one, step, rtol=1e-3, atol=1e-6)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer_step(optimizer, NO_SCALER, clip_ratio=0.2)
    assert all(p.isfinite().all() for p in model.parameters())


def test_mixing():
    images, targets = torch.rand(8, 3, 12, 12), torch.arange(8) % 3
    assert Recipe(DEFAULTS, network(), 3).mix is None
    for name, alpha in (("mixup_alpha", 1.0), ("cutmix_alpha", 1.0), ("cutmix_alpha", 1)):
        mix = Recipe({**DEFAULTS, name: alpha}, network(), 3).mix
        torch.manual_seed(0)
        mixed, shares = mix(images, targets)
        assert (
            shares.shape == (8, 3)
            and torch.allclose(shares.sum(1), torch.ones(8))
            and not torch.equal(mixed, images)
        )


def test_a_step_trains_on_mixed_pictures_and_their_shares():
    [(images, targets, _)] = batches([8])
    settings, model = {**DEFAULTS, "mixup_alpha": 1.0}, network()
    recipe = Recipe(settings, model, 3)
    torch.manual_seed(0)
    inputs, shares = recipe.mix(normalize(images, "cpu"), targets)
    expected = F.cross_entropy(model(inputs), shares)
    torch.manual_seed(0)
    loss, _ = compute_loss(model, images, targets, False, False, recipe)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_second_input_needs_one_function(monkeypatch):
    """Training and scoring take the network's inputs and the targets from network_inputs."""

    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Conv2d(3, 2, 1)

        def forward(self, inputs):
            pictures, numbers = inputs
            return self.layer(pictures).mean((2, 3)) * numbers[:, None]

    def with_number(model, images, targets, settings):
        return (normalize(images, "cpu", settings), targets[:, 1]), targets[:, 0].long()

    monkeypatch.setattr("utils.fit.network_inputs", with_number)
    torch.manual_seed(0)
    images = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8).expand(2, 3, 8, 8)
    targets = torch.tensor([[1.0, 1.0], [0.0, 3.0]])
    model = Scaled()
    logits, class_ids = score_batch(model, images, targets, False, False, {})
    assert class_ids.tolist() == [1, 0]
    torch.testing.assert_close(logits[1], 3 * logits[0])
    loss, sums = compute_loss(model, images, targets, False, False, Recipe())
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, class_ids))
    assert not any(value.requires_grad for value in sums.values())


def test_weights_of_mixed_pictures_are_float32():
    """A class of one picture in 300,000 has a weight that float16 does not have."""
    weights = torch.tensor([1e5, 0.5])
    targets = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    with torch.autocast("cpu", torch.float16):
        loss = task.get_criterion({}, weights, True)(torch.zeros(2, 2), targets)
    assert loss.item() == pytest.approx(math.log(2) * (0.5 * 1e5 + 0.25 + 1e5) / 2)


def test_label_smoothing_and_class_weights():
    scores, targets = torch.randn(6, 3), torch.tensor([0, 0, 0, 1, 1, 2])
    found = balanced_weights(targets.numpy(), 3)
    assert found.tolist() == pytest.approx(
        compute_class_weight(
            "balanced", classes=targets.unique().numpy(), y=targets.numpy()
        ).tolist()
    )
    recipe = Recipe({**DEFAULTS, "label_smoothing": 0.1}, network(), 3, found)
    each = found[targets] * F.cross_entropy(scores, targets, label_smoothing=0.1, reduction="none")
    torch.testing.assert_close(recipe.criterion(scores, targets), each.mean())
    mixed = 0.3 * F.one_hot(targets, 3).float() + 0.7 * F.one_hot(targets.flip(0), 3).float()
    both = 0.3 * each + 0.7 * found[targets.flip(0)] * F.cross_entropy(
        scores, targets.flip(0), label_smoothing=0.1, reduction="none"
    )
    torch.testing.assert_close(recipe.criterion(scores, mixed), both.mean())
    assert found[targets].mean() == pytest.approx(
        1
    )  # so that the rate means what it means without weights
    torch.testing.assert_close(
        recipe.val_criterion(scores, targets), F.cross_entropy(scores, targets)
    )


def test_ema_is_what_is_validated_and_saved(tmp_path):
    folder = make_project(
        tmp_path, ema_decay=0.5, UnFreeze_Epoch=1, backbone="'shufflenet_v2_x0_5'"
    )
    make_data(folder, train=24, test=6)
    train(folder)
    state = torch.load(run_of(folder) / "last_checkpoint.pth", weights_only=True)
    ema = {k.removeprefix("module."): v for k, v in state["ema"].items() if k != "n_averaged"}
    assert (
        same(weights(run_of(folder)), ema)
        and not same(ema, state["model"])
        and state["ema"]["n_averaged"] == 3
    )
    assert same(weights(run_of(folder), "best_epoch_weights.pth"), ema)
    raw = run_of(folder) / "raw.pth"
    torch.save(state["model"], raw)
    losses = []
    for name in (raw, run_of(folder) / "last_epoch_weights.pth"):
        words = [run_of(folder), "--weights", name, "--out", "e"]
        out, _ = command(folder, "utils.evaluate", *words)
        losses.append(float(out.split("loss ")[1].split(",")[0]))
    assert (
        losses[1] == pytest.approx(history(run_of(folder))[0]["val_loss"], rel=1e-7)
        and losses[0] != losses[1]
    )


def test_ema_with_its_ramp():
    model = get_model("shufflenet_v2_x0_5", 3, [32, 32])
    ema = EMA(model, 0.25)
    expected = {k: v.clone() for k, v in model.state_dict().items()}
    for decay in (1 / 10, 2 / 11, 3 / 12, 0.25, 0.25):  # (1 + n) / (10 + n), but no more than 0.25
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1
        model(torch.rand(2, 3, 32, 32))
        ema.update_parameters(model)
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                expected[name] = decay * expected[name] + (1 - decay) * value
            else:
                expected[name] = value.clone()
    ours = ema.module.state_dict()
    assert ours.keys() == expected.keys() and ema.n_averaged == 5
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value)


def test_shared_weights_are_averaged_once():
    model = nn.ModuleList([nn.Linear(1, 1)] * 2)
    nn.init.zeros_(model[0].weight)
    ema = EMA(model, 0.5)
    ema.n_averaged += 1000
    nn.init.ones_(model[0].weight)
    ema.update_parameters(model)
    assert ema.module[1].weight.item() == 0.5


def test_a_buffer_that_the_first_step_makes_is_no_average():
    """What is not saved is not averaged, and moves nothing of what is."""
    model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
    model[0].register_buffer("grid", None, persistent=False)
    ema = EMA(model, 0.5)
    model[0].grid = torch.full((1,), 9.0)
    model[1].running_mean += 1
    ema.update_parameters(model)
    assert ema.module[1].running_mean.item() == pytest.approx(0.9)
    assert ema.module[1].running_var.item() == 1


def test_a_long_ema_of_a_short_training_has_forgotten_the_first_weights():
    model = nn.Linear(1, 1)
    nn.init.constant_(model.weight, 1000.0)
    ema = EMA(model, 0.9999)
    nn.init.constant_(model.weight, 1.0)
    for _ in range(150):
        ema.update_parameters(model)
    assert ema.module.weight.item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("recipe", [SCRATCH, FINETUNE], ids=["scratch", "finetune"])
def test_the_recipes_that_are_measured(tmp_path, recipe):
    folder = make_project(tmp_path, UnFreeze_Epoch=2)
    make_data(folder, train=24, test=6)
    train(
        folder,
        *(
            word
            for name, value in {**recipe, "Freeze_Epoch": 1}.items()
            for word in (f"--{name}", value)
        ),
    )
    assert len(history(run_of(folder))) == 2


@pytest.mark.parametrize("counts", [[980, 20], [960] * 9 + [10]])
def test_the_best_scores_under_class_weights_are_right(counts):
    """With smoothing and weights, the loss's own optimum names every picture rightly where pictures
    can be told apart.
    """
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    recipe = Recipe(
        {**DEFAULTS, "label_smoothing": 0.1},
        network(),
        len(counts),
        balanced_weights(labels.numpy(), len(counts)),
    )
    scores = torch.zeros(
        len(counts), len(counts), requires_grad=True
    )  # one row of scores for the pictures of each class
    optimizer = torch.optim.Adam([scores], 0.1)
    for _ in range(300):
        optimizer.zero_grad()
        recipe.criterion(scores[labels], labels).backward()
        optimizer.step()
    assert scores.argmax(1).tolist() == list(range(len(counts)))


def test_weights_by_the_square_root_of_frequency():
    class_ids = torch.repeat_interleave(torch.tensor([0, 2, 3]), torch.tensor([100, 25, 4])).numpy()
    weights = balanced_weights(class_ids, 5, CLASS_WEIGHTS["sqrt"])
    assert weights[1] == weights[4] == 0 and weights[class_ids].mean() == pytest.approx(1)
    assert weights[2] / weights[0] == pytest.approx(2) and weights[3] / weights[0] == pytest.approx(
        5
    )


def test_a_head_of_zeros_learns_under_clipping():
    """As torchvision's ViT has one, and as LoRA's second matrix begins.

    Its steps are no shorter than others'.
    """
    torch.manual_seed(0)
    images, targets = torch.randn(64, 32), torch.arange(64) % 4
    moved = {}
    for begin in ("zeros", "usual"):
        model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4))
        if begin == "zeros":
            nn.init.zeros_(model[2].weight)
        optimizer = get_optimizer(model, {"2"}, "sgd", 0.9, 0.0)
        before = model[2].weight.detach().clone()
        for _ in range(60):
            F.cross_entropy(model(images), targets).backward()
            optimizer.param_groups[-1]["lr"] = 0.1
            optimizer_step(optimizer, NO_SCALER, clip_ratio=0.5)
        moved[begin] = (model[2].weight - before).norm().item()
    assert moved["zeros"] > 0.7 * moved["usual"]


@pytest.mark.parametrize("optimizer_type", ["sgd", "adam", "adamw"])
def test_a_parameter_that_is_used_later(optimizer_type):
    """As behind stochastic depth: its first step is one of its own."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    optimizer = get_optimizer(model, {"1"}, optimizer_type, 0.9, 5e-4)
    for number in range(4):
        x = model[0](torch.randn(3, 4))
        before = model[1].weight.detach().clone()
        (model[1](x) if number >= 2 else x).square().mean().backward()
        optimizer_step(optimizer, NO_SCALER, clip_ratio=0.5)
        assert torch.equal(model[1].weight, before) == (number < 2)


def test_momentum_of_zeros_has_the_bits_of_none():
    torch.manual_seed(0)
    ours = nn.Linear(5, 3)
    theirs = copy.deepcopy(ours)
    optimizers = [
        get_optimizer(ours, {""}, "sgd", 0.9, 0.0),
        torch.optim.SGD(theirs.parameters(), 1e-3, 0.9, nesterov=True, fused=True),
    ]
    optimizers[0].param_groups[0]["lr"] = 1e-3
    for number in range(3):
        pictures = torch.randn(4, 5, generator=torch.Generator().manual_seed(number))
        for model, optimizer in zip((ours, theirs), optimizers):
            for group in optimizer.param_groups:
                group["lr"] = 1e-3
            model(pictures).square().mean().backward()
            optimizer_step(optimizer, NO_SCALER)
    assert same(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("wrap", [weight_norm, spectral_norm, orthogonal])
def test_weight_decay_sees_parametrized_weights(wrap):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), wrap(nn.Linear(4, 3)))
    optimizer = get_optimizer(model, head_layers(model), "sgd", 0.9, 0.1)
    decayed = {
        id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]
    }
    head = {id(p) for group in optimizer.param_groups[-2:] for p in group["params"]}
    for name, parameter in model.named_parameters():
        is_weight = "parametrizations" in name or name == "0.weight"
        assert (id(parameter) in decayed) == is_weight, name
        assert (id(parameter) in head) == name.startswith("2."), name


def test_what_is_trained_outside_of_the_network_is_refused():
    model = network()
    optimizer = get_optimizer(model, head_layers(model), "sgd", 0.9, 5e-4)
    check_parameters(optimizer, model)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3, 4))]})
    with pytest.raises(UserError, match="neither saved nor the same in all processes"):
        check_parameters(optimizer, model)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_mixed_precision_computes_in_the_type_that_it_names(name):
    with mixed_precision(False, name):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == getattr(torch, name)


def test_an_overflowing_loss_is_the_scalers_to_skip():
    """A batch with an infinite loss of float16 leaves no trace in the sums.

    Without a scaler it stays, and ends the run.
    """
    model, parts = network(), batches([4, 4])
    recipe = Recipe()
    values = iter((float("inf"), 0.0) * 2)
    recipe.extra_loss = lambda inputs, logits, targets: torch.tensor(next(values))
    for scaler, finite in ((torch.amp.GradScaler("cpu"), True), (NO_SCALER, False)):
        sums = Counter()
        for batch in forward_backward(model, parts, False, False, scaler, recipe):
            sums.update(batch)
        metrics = metrics_from(sums, {})
        assert math.isfinite(metrics["loss"]) == finite
        assert sums["pictures"] == sums["hits"][:, 0].sum() == (4 if finite else 8)
        if finite:  # as the second batch alone has it
            expected = F.cross_entropy(model(normalize(parts[1][0], "cpu")), parts[1][1])
            assert metrics["loss"] == pytest.approx(float(expected), rel=1e-5)
