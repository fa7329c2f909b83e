import math

import pytest
import torch
from torchvision.models import SwinTransformer, VisionTransformer

from nets import get_model, head_layers
from utils.optimizer import (
    OPTIMIZERS,
    describe_rates,
    fit_lr,
    get_lr_scheduler,
    get_optimizer,
    set_optimizer_lr,
)


@pytest.mark.parametrize("total", [1, 2, 3, 20, 100, 200, 400])
def test_cosine(total):
    lr, low = 0.01, 0.0001
    warm, hold, start = (
        min(max(0.05 * total, 1), 3),
        min(max(0.05 * total, 1), 15),
        max(0.1 * lr, 1e-6),
    )
    curve = get_lr_scheduler("cos", lr, low, total)
    for epoch in range(total):
        if epoch <= warm:
            expected = start + (lr - start) * (epoch / warm) ** 2
        elif epoch >= total - hold:
            expected = low
        else:
            expected = low + (lr - low) / 2 * (
                1 + math.cos((epoch - warm) / (total - warm - hold) * math.pi)
            )
        assert curve(epoch) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("total, warm", [(1, 0.1), (5, 0.5), (14, 1.4), (30, 3), (200, 3)])
def test_linear(total, warm):
    curve = get_lr_scheduler("linear", 0.1, 0.001, total)
    assert [curve(0), curve(warm / 2), curve(warm)] == pytest.approx([0.01, 0.055, 0.1])
    assert curve((warm + total) / 2) == pytest.approx(0.0505)
    assert curve(total) == pytest.approx(0.001)


def test_step():
    curve = get_lr_scheduler("step", 0.1, 0.001, 50)
    assert [curve(e) for e in range(50)] == pytest.approx(
        [0.1 * (0.01 ** (1 / 9)) ** (e // 5) for e in range(50)]
    )
    assert curve(49) == pytest.approx(0.001)
    assert [curve(e + 0.99) for e in range(50)] == [curve(e) for e in range(50)]
    stairs = get_lr_scheduler("step", 0.1, 0.001, 25)  # each of two and a half epochs
    assert [stairs(2.49), stairs(2.5)] == pytest.approx([0.1, 0.1 * 0.01 ** (1 / 9)])


@pytest.mark.parametrize("total", [1, 2, 3, 18, 22, 44])
def test_step_has_ten_stairs_of_one_length(total):
    curve = get_lr_scheduler("step", 0.1, 0.001, total)
    middles = [curve(total * (stair + 0.5) / 10) for stair in range(10)]
    assert middles == pytest.approx([0.1 * 0.01 ** (stair / 9) for stair in range(10)])
    assert curve(total / 2) == pytest.approx(middles[5])


LIMITS = {  # of Init_lr_fit; a hundredth of them for Min_lr_fit
    ("sgd", False): (5e-4, 1e-1),
    ("sgd", True): (5e-4, 1e-1),
    ("adam", False): (1e-4, 1e-3),
    ("adam", True): (1e-5, 1e-3),
    ("adamw", False): (1e-4, 1e-3),
    ("adamw", True): (1e-5, 1e-3),
}


def fitted(batch_size, Init_lr, Min_lr, optimizer_type, transformer):
    settings = dict(Init_lr=Init_lr, Min_lr=Min_lr, optimizer_type=optimizer_type)
    return fit_lr(settings, batch_size, transformer)


def test_every_limit():
    assert {kind for kind, _ in LIMITS} == OPTIMIZERS.keys()
    for (kind, transformer), (low, high) in LIMITS.items():
        assert fitted(64, 9.0, 9.0, kind, transformer) == pytest.approx((high, high / 100))
        assert fitted(64, 1e-9, 1e-9, kind, transformer) == pytest.approx((low, low / 100))
        whole = 256 if transformer else 64
        between = (low * high) ** 0.5
        for share in (0.5, 1, 2):
            found = fitted(int(whole * share), between, between / 100, kind, transformer)
            assert found == pytest.approx((share * between, share * between / 100))


def test_tables_of_positions_and_tokens_do_not_decay():
    transformer = VisionTransformer(8, 4, 2, 2, 6, 12, num_classes=3)
    window = SwinTransformer([2, 2], 8, [1, 1], [2, 2], [4, 4], num_classes=3)
    for model in (transformer, window):
        optimizer = get_optimizer(model, head_layers(model), "sgd", 0.9, 0.1)
        decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
        names = [name for name, p in model.named_parameters() if decays[id(p)] == 0.1]
        tables = ("pos_embedding", "class_token", "relative_position_bias_table", "norm", "ln_")
        assert not [name for name in names if name.endswith("bias") or "table" in name]
        assert not [name for name in names if any(word in name for word in tables)]
        assert any("mlp" in name for name in names) and any("head" in name for name in names)


def test_norm_layers_of_any_shape_and_vectors_do_not_decay():
    nn = torch.nn
    norms = nn.LayerNorm([4, 6, 6]), nn.PReLU(4), nn.GroupNorm(2, 4)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), *norms, nn.Flatten(), nn.Linear(144, 2))
    optimizer = get_optimizer(model, {"5"}, "sgd", 0.9, 0.1)
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    names = [name for name, p in model.named_parameters() if decays[id(p)] == 0.1]
    assert names == ["0.weight", "5.weight"]


def test_limits():
    assert fitted(64, 0.01, 0.0001, "sgd", False) == pytest.approx((0.01, 0.0001))
    assert fitted(32, 0.01, 0.0001, "sgd", False) == pytest.approx((0.005, 0.00005))
    assert fitted(6400, 0.01, 0.0001, "sgd", False) == pytest.approx((0.1, 0.001))
    assert fitted(1, 0.01, 0.0001, "sgd", False) == pytest.approx((5e-4, 5e-6))
    assert fitted(64, 1e-3, 1e-5, "adam", False) == pytest.approx((1e-3, 1e-5))
    assert fitted(1, 1e-3, 1e-5, "adam", False) == pytest.approx((1e-4, 1e-6))
    assert fitted(1, 1e-3, 1e-5, "adamw", True) == pytest.approx((1e-5, 1e-7))
    assert fitted(256, 1e-3, 1e-5, "adam", True) == pytest.approx((1e-3, 1e-5))


def test_groups_keep_their_ratio_and_decay():
    model = get_model("resnet18", 3, [32, 32])
    optimizer = get_optimizer(model, head_layers(model), "sgd", 0.9, 5e-4, backbone_lr_scale=0.1)
    set_optimizer_lr(optimizer, lambda epoch: 0.5, 0)
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    for name, p in model.named_parameters():
        assert decays[id(p)] == (5e-4 if p.ndim > 1 else 0), name
        assert rates[id(p)] == pytest.approx(0.5 if name.startswith("fc.") else 0.05), name
    assert optimizer.param_groups[-1]["lr"] == 0.5


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("momentum", [0.8, 0.0])
def test_every_optimizer_decays_and_matches_the_plain_one(kind, channels_last, momentum):
    torch.manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(16, 2)
    ).to(memory_format=layout)
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = get_optimizer(model, {"2"}, kind, momentum, 0.1)
    plain = [torch.nn.Parameter(p.clone()) for p in start]
    betas = momentum, 0.999
    other = {
        "sgd": lambda ps: torch.optim.SGD(
            ps, lr=0.1, momentum=momentum, nesterov=momentum > 0, weight_decay=0.1
        ),
        "adam": lambda ps: torch.optim.Adam(ps, lr=0.1, betas=betas, weight_decay=0.1),
        "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.1, betas=betas, weight_decay=0.1),
    }[kind]([{"params": plain[::2]}, {"params": plain[1::2], "weight_decay": 0.0}])
    set_optimizer_lr(optimizer, lambda epoch: 0.1, 0)
    for _ in range(3):
        for p, q in zip(model.parameters(), plain):
            q.grad = torch.randn(p.shape)
            p.grad = torch.empty_like(p).copy_(q.grad)
        optimizer.step()
        other.step()
    for p, q in zip(model.parameters(), plain):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-5, atol=1e-6, check_stride=False)


def settings_of(**changes):
    return {
        **dict(
            Init_lr=0.05,
            Min_lr=0.0005,
            optimizer_type="sgd",
            lr_decay_type="cos",
            Unfreeze_batch_size=32,
            Freeze_batch_size=64,
            Freeze_Train=False,
            Freeze_Epoch=5,
            UnFreeze_Epoch=10,
            Init_Epoch=0,
        ),
        **changes,
    }


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, "sgd, cos, lr 0.025 to 0.00025"),
        (dict(accumulate=2), "sgd, cos, lr 0.05 to 0.0005"),
        (dict(Freeze_Train=True), "sgd, cos, lr 0.05 to 0.0005, then lr 0.025 to 0.00025"),
        (dict(Freeze_Train=True, Init_Epoch=5), "sgd, cos, lr 0.025 to 0.00025"),
        (dict(Freeze_Train=True, UnFreeze_Epoch=5), "sgd, cos, lr 0.05 to 0.0005"),
        (dict(Freeze_Train=True, Freeze_batch_size=32), "sgd, cos, lr 0.025 to 0.00025"),
        (dict(Init_Epoch=10), "sgd, cos, no epoch is left"),
        (
            dict(optimizer_type="adamw", Init_lr=2e-5, Min_lr=2e-7, Unfreeze_batch_size=8),
            "adamw, cos, lr 0.0001 to 1e-06 (Init_lr = 2e-05 gives 2.5e-06, outside adamw's "
            "limits) (Min_lr = 2e-07 gives 2.5e-08, outside adamw's limits)",
        ),
        (
            dict(Init_lr=0.01, Min_lr=0.01, Unfreeze_batch_size=64),
            "sgd, cos, lr 0.01 to 0.001 (Min_lr = 0.01 gives 0.01, outside sgd's limits)",
        ),
        (dict(Init_lr=0.001, Min_lr=0.001, Unfreeze_batch_size=64), "sgd, cos, lr 0.001 to 0.001"),
    ],
)
def test_the_rates_that_train_are_said(changes, expected):
    assert describe_rates(settings_of(**changes), False) == expected


def test_the_rates_of_transformers_are_for_256():
    s = settings_of(optimizer_type="adamw", Init_lr=1e-3, Min_lr=1e-5, Unfreeze_batch_size=128)
    assert describe_rates(s, True) == "adamw, cos, lr 0.0005 to 5e-06"
