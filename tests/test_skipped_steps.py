"""A step that the scaler skips because its gradients overflow leaves weights and state as if it had
never been made.
"""

import copy

import pytest
import torch
from torch import nn

from utils.fit import optimizer_step
from utils.optimizer import OPTIMIZERS, get_optimizer, restore_optimizer


@pytest.fixture(autouse=True)
def empty_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def setting(optimizer_type):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    return (
        model,
        get_optimizer(model, ["2"], optimizer_type, 0.9, 5e-4),
        torch.amp.GradScaler("cpu", init_scale=1024.0),
    )


def step(model, optimizer, scaler, number, overflow=False, **clip):
    pictures = torch.randn(5, 4, generator=torch.Generator().manual_seed(number))
    loss = model(pictures).square().mean()
    scaler.scale(loss * float("inf") if overflow else loss).backward()
    optimizer_step(optimizer, scaler, **clip)


def same(a, b):
    """Whether two nested states are bit-identical."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def learned(optimizer):
    """What an optimizer has learned: its state, but for zeros, which are as good as none."""
    state = optimizer.state_dict()["state"]
    return {key: values for key, values in state.items() if any(map(torch.any, values.values()))}


def assert_same(one, other):
    assert same(one[0].state_dict(), other[0].state_dict())
    assert same(learned(one[1]), learned(other[1]))


@pytest.mark.parametrize("clip", [{}, {"clip_grad_norm": 1.0}, {"clip_ratio": 0.1}])
@pytest.mark.parametrize("optimizer_type", OPTIMIZERS)
def test_the_first_step(optimizer_type, clip):
    skipped, clean = setting(optimizer_type), setting(optimizer_type)
    step(*skipped, 0, overflow=True, **clip)
    assert skipped[2].get_scale() == 512
    assert_same(skipped, clean)
    for number in range(3):
        step(*skipped, number, **clip)
        step(*clean, number, **clip)
        assert_same(skipped, clean)


@pytest.mark.parametrize("optimizer_type", OPTIMIZERS)
def test_a_later_step_and_the_first_unfrozen_one(optimizer_type):
    skipped, clean = setting(optimizer_type), setting(optimizer_type)
    for training in (skipped, clean):
        training[0][0].requires_grad_(False)
        step(*training, 0)
    step(*skipped, 1, overflow=True)
    for training in (skipped, clean):
        training[0].requires_grad_(True)
    step(*skipped, 2, overflow=True)
    assert_same(skipped, clean)
    for number in range(3):
        step(*skipped, number)
        step(*clean, number)
    assert_same(skipped, clean)


def test_a_state_with_shorter_sides_goes_on():
    """Adafactor's averages over rows and columns."""
    layers = [torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)]
    first, second = (torch.optim.Adafactor(layer.parameters()) for layer in layers)
    layers[0](torch.ones(2, 4)).sum().backward()
    first.step()
    restore_optimizer(second, copy.deepcopy(first.state_dict()))
    assert same(second.state_dict()["state"], first.state_dict()["state"])


def test_what_an_optimizer_keeps_in_its_groups_is_restored_and_the_settings_are_not():
    class Counts(torch.optim.SGD):
        def __init__(self, parameters, lr):
            super().__init__(parameters, lr)
            self.param_groups[0]["steps"] = 0

    layer = torch.nn.Linear(4, 3)
    first, second = Counts(layer.parameters(), 0.1), Counts(layer.parameters(), 0.2)
    first.param_groups[0]["steps"] = 7
    restore_optimizer(second, first.state_dict())
    assert second.param_groups[0]["steps"] == 7 and second.param_groups[0]["lr"] == 0.2
    assert second.param_groups[0]["dampening"] == 0
    assert second.param_groups[0]["params"] == list(layer.parameters())


@pytest.mark.parametrize("optimizer_type", ["sgd", "adam", "adamw"])
def test_a_state_of_another_network_is_refused(optimizer_type):
    trained, other = setting(optimizer_type), setting(optimizer_type)
    step(*trained, 0)
    state = copy.deepcopy(trained[1].state_dict())
    values = next(iter(state["state"].values()))
    name = next(name for name in values if values[name].dim())
    values[name] = torch.zeros(7)
    with pytest.raises(ValueError, match="another network"):
        restore_optimizer(other[1], state)


@pytest.mark.parametrize("optimizer_type", OPTIMIZERS)
@pytest.mark.parametrize("lacking", ["all", "one", "none as a value"])
def test_a_checkpoint_that_lacks_buffers(optimizer_type, lacking):
    """As one that was written before a step had been made."""
    skipped, clean = setting(optimizer_type), setting(optimizer_type)
    trained = setting(optimizer_type)
    step(*trained, 0)
    state = copy.deepcopy(trained[1].state_dict())
    if lacking == "all":
        state["state"] = {}
    elif lacking == "one":
        del state["state"][0]
    elif optimizer_type == "sgd":
        state["state"][0]["momentum_buffer"] = None
    for training in (skipped, clean):
        restore_optimizer(training[1], copy.deepcopy(state))
    step(*skipped, 1, overflow=True)
    assert_same(skipped, clean)
    for number in range(2):
        step(*skipped, number)
        step(*clean, number)
    assert_same(skipped, clean)
    assert all(weight.isfinite().all() for weight in skipped[0].state_dict().values())
