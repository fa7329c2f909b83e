"""A step as train.py makes it, with train.py's own settings: nothing of it stays behind."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from tests.helpers import (
    default_settings,
    history,
    hooked,
    launch,
    make_data,
    make_project,
    same,
    weights,
)
from utils.fit import forward_backward, optimizer_step
from utils.optimizer import get_optimizer
from utils.recipe import Recipe

SETTINGS = default_settings()


@pytest.fixture
def one_process_group(tmp_path):
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )


def make_step(model_train, model, optimizer, recipe):
    """One step; returns the gradients as forward_backward left them."""
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    batch = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8), torch.arange(6) % 3, []
    forward_backward(model_train, [batch], False, False, scaler, recipe)
    gradients = [parameter.grad for parameter in model.parameters()]
    optimizer_step(optimizer, scaler, SETTINGS["clip_grad_norm"], SETTINGS["clip_ratio"])
    return gradients


def get_parts():
    model = network()
    optimizer = get_optimizer(
        model, ["4"], SETTINGS["optimizer_type"], SETTINGS["momentum"], SETTINGS["weight_decay"]
    )
    return model, optimizer, Recipe(SETTINGS, model, 3)


def graph_size(tensors):
    """The number of autograd's nodes behind tensors."""
    seen, waiting = set(), [tensor.grad_fn for tensor in tensors if tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting += [other for other, _ in node.next_functions if other]
    return len(seen)


def test_a_step_is_not_recorded_by_autograd():
    model, optimizer, recipe = get_parts()
    assert SETTINGS["clip_ratio"] > 0
    assert graph_size(make_step(model, model, optimizer, recipe)) == 0
    assert not any(
        state.requires_grad
        for part in optimizer.state.values()
        for state in part.values()
        if isinstance(state, torch.Tensor)
    )


def test_the_graph_behind_ddp_s_gradients_does_not_grow(one_process_group):
    model, optimizer, recipe = get_parts()
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    assert [graph_size(make_step(wrapped, model, optimizer, recipe)) for _ in range(5)] == [0] * 5


def test_gradients_travel_once_a_step(one_process_group):
    """Also where a step has several batches."""
    model, _, recipe = get_parts()
    wrapped = DistributedDataParallel(model)
    travelled = []

    def note(group, bucket):
        travelled.append(bucket.index())
        return allreduce_hook(group, bucket)

    wrapped.register_comm_hook(None, note)
    batch = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8), torch.arange(6) % 3, []
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    forward_backward(wrapped, [batch] * 3, False, False, scaler, recipe)
    assert travelled == [0]


@pytest.mark.parametrize("words", [(), ("--ema_decay", 0.5, "--accumulate", 2)])
def test_buffers_that_are_not_broadcast_in_each_step_change_no_bit(tmp_path, words):
    """Only the first process's BatchNorm statistics count, before and after an unfreezing."""
    folder = make_project(
        tmp_path, backbone="'shufflenet_v2_x0_5'", Freeze_Train=True, Freeze_Epoch=1
    )
    make_data(folder, train=24, test=6)
    broadcasting = """
import torch

class Broadcasting(torch.nn.parallel.DistributedDataParallel):
    def __setattr__(self, name, value):
        super().__setattr__(name, name == "broadcast_buffers" or value)

torch.nn.parallel.DistributedDataParallel = Broadcasting
"""
    found = []
    for save_dir, script in (("without", "train.py"), ("with", hooked(folder, broadcasting))):
        launch(folder, "--save_dir", save_dir, *words, script=script)
        (run,) = (folder / save_dir).iterdir()
        found.append((weights(run), history(run)[-1]["val_loss"]))
    assert same(found[0][0], found[1][0]) and found[0][1] == found[1][1]


def test_gradients_are_added_up_in_one_order_from_the_first_step_on(tmp_path):
    """More than two processes end with the same bits only so, where one was stopped and resumed."""
    folder = make_project(tmp_path, backbone="'shufflenet_v2_x0_5'", UnFreeze_Epoch=1)
    make_data(folder, train=24, test=6)
    code = """
import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
wrapper = torch.nn.parallel.DistributedDataParallel

def note(group, bucket):
    print("travels", [list(parameter.shape) for parameter in bucket.parameters()])
    return allreduce_hook(group, bucket)

def wrap(*given, **options):
    wrapped = wrapper(*given, **options)
    wrapped.register_comm_hook(None, note)
    return wrapped

torch.nn.parallel.DistributedDataParallel = wrap
"""
    out, err = launch(folder, script=hooked(folder, code), processes=1)
    travelled = [line for line in out.splitlines() if line.startswith("travels")]
    assert len(travelled) == 3 * len(set(travelled)) > 0  # three steps
    assert err == ""
