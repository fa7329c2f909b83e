"""What only a GPU can show; skipped without one."""
import pytest
import torch
from torchvision.transforms import v2

from nets import get_model, head_layers
from tests.helpers import history, make_data, make_project, run_of, torchrun, train, weights
from utils.checkpoint import Position
from utils.fit import backward, optimizer_step
from utils.recipe import EMA, Recipe, get_optimizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture
def folder(tmp_path):
    folder = make_project(tmp_path, backbone="'resnet18'", Cuda=True, fp16=True, num_workers=2, UnFreeze_Epoch=4, Init_lr=0.05,
                          weight_decay=1e-3)
    make_data(folder, train=96, test=30)
    return folder


def learned(folder):
    rows = history(run_of(folder))
    assert max(row["top1"] for row in rows) > 0.8 and all(row["scored"] == 30 for row in rows)


def test_data_parallel_with_float16_and_the_scaler(folder):
    train(folder)
    learned(folder)
    state = torch.load(run_of(folder) / "last_checkpoint.pth", weights_only=True)
    assert state["scaler"]["scale"] > 0 and weights(run_of(folder))["fc.weight"].dtype == torch.float32


def test_distributed_on_one_gpu(folder):
    train(folder, "--sync_bn", True, launcher=[w if w != "--nproc_per_node=2" else "--nproc_per_node=1" for w in torchrun()])
    learned(folder)


def test_every_recipe_and_resume(folder):
    words = ["--ema_decay", 0.5, "--mixup_alpha", 0.2, "--cutmix_alpha", 1.0, "--clip_grad_norm", 1.0, "--accumulate", 2,
             "--Freeze_Train", True, "--Freeze_Epoch", 1, "--class_weights", "balanced", "--compile", False]
    train(folder, *words)
    train(folder, *words, "--UnFreeze_Epoch", 5, "--resume", f"logs/{run_of(folder).name}")
    assert [row["epoch"] for row in history(run_of(folder))] == [1, 2, 3, 4, 5]


def test_no_step_waits_for_the_gpu():
    model = get_model("resnet18", 10, [64, 64]).cuda()
    optimizer, scaler = get_optimizer(model, head_layers(model), "sgd", 0.9, 5e-4), torch.amp.GradScaler("cuda")
    parts = [(torch.zeros(8, 3, 64, 64, dtype=torch.uint8).pin_memory(), torch.zeros(8, dtype=torch.int64).pin_memory(), [])] * 2
    position = Position(0, torch.device("cuda"), 0)
    recipe = Recipe(mix=v2.RandomChoice([v2.MixUp(num_classes=10), v2.CutMix(num_classes=10)]), ema=EMA(model, 0.9))
    for mode in ("default", "error", "error", "error"):  # the first step may set things up
        torch.cuda.set_sync_debug_mode(mode)
        try:
            backward(model, parts, position.device, True, True, scaler, recipe, position)
            optimizer_step(optimizer, scaler, 1.0)
            recipe.ema.update_parameters(model)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert position.sums["pictures"] == 64
