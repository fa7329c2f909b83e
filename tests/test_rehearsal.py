"""What is tried before training: it finds out what does not go together, and leaves no trace."""

import copy
import math
import re

import pytest
import torch
from torch import nn

from tests.helpers import hooked, make_data, make_project, run_of, train
from utils import rehearsal
from utils.plumbing.errors import UserError
from utils.recipe import Recipe, check_targets
from utils.rehearsal import check_batch, choose_precision, first_batch

SETTINGS = {"Cuda": False, "distributed": False, "fp16": "auto", "best_by": "top1"}


class OwnLoss(nn.Module):
    """A loss that learns: weights, and BatchNorm's statistics."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.centres = nn.Parameter(torch.randn(3, 3))
        self.calls = 0

    def forward(self, inputs, logits, targets):
        self.calls += 1
        return (self.norm(logits) - self.centres[targets]).square().mean()


class Drawing(nn.Module):
    """What draws random numbers, also in evaluation."""

    def forward(self, logits):
        return logits + torch.rand(()) / 100


def get_parts(**settings):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 3)
    )
    recipe = Recipe({**SETTINGS, **settings}, model, 3)
    images = torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8)
    return model, recipe, (images, torch.arange(8) % 3, [])


@pytest.fixture
def able_cpu(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})


@pytest.mark.parametrize("closure", [False, True])
def test_no_trace_is_left(able_cpu, closure):
    model, recipe, batch = get_parts()
    model.append(Drawing())
    own = OwnLoss()
    recipe.extra_loss = (lambda *words: own(*words)) if closure else own
    before = copy.deepcopy((model.state_dict(), own.state_dict()))
    stream, mode = torch.get_rng_state(), [m.training for m in model.modules()]
    check_batch(batch, model, recipe.settings, 3)
    assert choose_precision(recipe.settings, model, batch) in ("float32", "bfloat16")
    after = model.state_dict(), own.state_dict()
    for old, new in zip(before, after):
        assert old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in old)
    assert all(p.grad is None for p in (*model.parameters(), *own.parameters()))
    assert torch.equal(torch.get_rng_state(), stream) and own.calls == 0
    assert [m.training for m in model.modules()] == mode


class Black:
    """40 black pictures, each with its index as the target."""

    def __len__(self):
        return 40

    def __getitem__(self, item):
        torch.manual_seed(item[2])
        return torch.zeros(4, 4, 3, dtype=torch.uint8), item[2], []


def test_the_first_batch_moves_no_random_stream(monkeypatch):
    stream = torch.get_rng_state()
    images, targets, _ = first_batch(Black(), 16, 5)
    assert images.shape == (16, 3, 4, 4) and len(set(targets.tolist())) == 16
    assert torch.equal(torch.get_rng_state(), stream)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    _, share, _ = first_batch(Black(), 16, 5)
    assert share.tolist() == targets[1::2].tolist()  # this process's


def test_no_trial_without_the_instructions(monkeypatch, capsys):
    monkeypatch.setattr(rehearsal, "compare_speed", lambda *words, **more: pytest.fail("tried"))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_f": True})
    model, recipe, batch = get_parts()
    assert choose_precision(recipe.settings, model, batch) == "float32"
    assert capsys.readouterr().out == "  precision    float32\n"


@pytest.mark.parametrize("name", ["avx512_bf16", "amx_bf16", "bf16", "sve_bf16"])
def test_a_trial_with_the_instructions(monkeypatch, capsys, name):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {name: True})
    monkeypatch.setattr(rehearsal, "compare_speed", lambda *words, **more: ("bfloat16", "tried"))
    model, recipe, batch = get_parts()
    assert choose_precision(recipe.settings, model, batch) == "bfloat16"
    assert capsys.readouterr().out == "  precision    bfloat16 (tried)\n"


@pytest.mark.parametrize(
    "fp16, Cuda, expected",
    [
        (True, False, "bfloat16"),
        (True, True, "float16"),
        (False, True, "float32"),
        ("bfloat16", True, "bfloat16"),
    ],
)
def test_a_setting_is_obeyed(fp16, Cuda, expected):
    model, recipe, batch = get_parts(fp16=fp16, Cuda=Cuda)
    assert choose_precision(recipe.settings, model, batch) == expected


def take_steps(monkeypatch, step):
    """Let step(precision) → seconds stand for the steps of a trial."""

    def prepare(settings, model, batch, precision):
        return lambda: step(precision)

    monkeypatch.setattr(rehearsal, "prepare_trial", prepare)


def clock_of(monkeypatch, seconds):
    """Let a step take so many seconds of each type; returns the list of the steps that are made."""
    now, made = [0.0], []

    def step(precision):
        made.append(precision)
        now[0] += seconds[precision]
        return seconds[precision]

    take_steps(monkeypatch, step)
    monkeypatch.setattr(rehearsal.time, "perf_counter", lambda: now[0])
    return made


@pytest.mark.parametrize(
    "single, half, chosen, most",
    [
        (0.1, 0.05, "bfloat16", 50),
        (0.1, 0.095, "float32", 40),  # too little for fewer digits
        (0.1, 0.3, "float32", 6),  # clear after three turns
        (50.0, 5.0, "bfloat16", 2),
        (5.0, 50.0, "float32", 2),
    ],
)
def test_the_faster_type_is_taken_within_bounds(
    able_cpu, monkeypatch, capsys, single, half, chosen, most
):
    made = clock_of(monkeypatch, {"float32": single, "bfloat16": half})
    model, recipe, batch = get_parts()
    assert choose_precision(recipe.settings, model, batch) == chosen
    assert len(made) <= most and "float32 " in capsys.readouterr().out.partition("(")[2]
    assert len(made) * (single + half) / 2 <= 3 + single + half


def test_a_type_that_gives_no_numbers_is_not_taken(able_cpu, monkeypatch):
    """As float16 on a GTX 1650, however fast it is."""

    def broken(model, batches, Cuda, precision, scaler, recipe, real=rehearsal.forward_backward):
        [sums] = real(model, batches, Cuda, precision, scaler, recipe)
        return [{**sums, "loss": sums["loss"] * math.nan}] if precision == "bfloat16" else [sums]

    monkeypatch.setattr(rehearsal, "forward_backward", broken)
    model, recipe, batch = get_parts()
    assert choose_precision(recipe.settings, model, batch) == "float32"


@pytest.mark.parametrize("slow", [range(1, 10), range(2)], ids=["the others", "the first two"])
def test_the_best_of_several_steps_counts(able_cpu, monkeypatch, slow):
    """Another program that takes the machine makes a step slower, never faster."""
    half = [0.4 if step in slow else 0.05 for step in range(10)]
    seconds = {"float32": [0.1] * 10, "bfloat16": half}

    take_steps(monkeypatch, lambda precision: seconds[precision].pop(0))
    model, recipe, batch = get_parts()
    assert choose_precision(recipe.settings, model, batch) == "bfloat16"


@pytest.mark.parametrize(
    "supported, gpus, distributed, half, chosen",
    [
        (True, 1, False, 0.1, "bfloat16"),
        (True, 1, False, 0.095, "bfloat16"),
        (True, 1, False, 0.08, "float16"),
        (False, 1, False, 0.1, "float32"),
        (False, 1, False, 0.08, "float16"),
        (True, 2, False, 0.08, "float16"),  # DataParallel
        (True, 2, False, 0.1, "float32"),
        (True, 2, True, 0.1, "bfloat16"),
    ],
)
def test_what_a_gpu_trains_in(monkeypatch, supported, gpus, distributed, half, chosen):
    """half: seconds of a step in float16, beside 0.1 in bfloat16, or in float32 without it."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(rehearsal, "kept_random_stream", lambda Cuda: torch.no_grad())
    seconds = iter(100 * [0.1, half])
    take_steps(monkeypatch, lambda precision: next(seconds))
    ticks = iter(range(100))
    monkeypatch.setattr(rehearsal.time, "perf_counter", lambda: 0.2 * next(ticks))
    model, recipe, batch = get_parts(Cuda=True, distributed=distributed)
    assert choose_precision(recipe.settings, model, batch) == chosen


def test_a_trial_computes_as_training_does(able_cpu, monkeypatch):
    """With cuDNN, which a context of torch's switches off unless it is told otherwise."""
    enabled = []

    def look(*words, real=rehearsal.forward_backward):
        enabled.append(torch.backends.cudnn.enabled and torch.backends.cudnn.benchmark)
        return real(*words)

    monkeypatch.setattr(rehearsal, "forward_backward", look)
    model, recipe, batch = get_parts()
    choose_precision(recipe.settings, model, batch)
    assert len(enabled) >= 2 and all(enabled)


@pytest.mark.parametrize("half, chosen", [(0.1, "bfloat16"), (0.08, "float16")])
def test_what_a_gpu_does_once_does_not_count(monkeypatch, half, chosen):
    """The first steps of a type load libraries and choose kernels, for longer than the trial."""
    now, made = [0.0], []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(rehearsal, "kept_random_stream", lambda Cuda: torch.no_grad())
    monkeypatch.setattr(rehearsal.time, "perf_counter", lambda: now[0])

    def step(precision):
        seconds = {"bfloat16": 0.1, "float16": half}[precision]
        seconds += {0: 4.0, 1: 1.0}.get(len(made), 0.0)
        made.append(precision)
        now[0] += seconds
        return seconds

    take_steps(monkeypatch, step)
    model, recipe, batch = get_parts(Cuda=True)
    assert choose_precision(recipe.settings, model, batch) == chosen and len(made) >= 6


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("FIND was unable to find an engine to execute this computation"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ],
)
def test_a_trial_that_has_no_memory_ends_no_training(monkeypatch, error):
    """It holds copies of the network, which training does not need, and gives the memory back."""
    given_back = []

    def fail(*words, **options):
        raise error

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given_back.append(True))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(rehearsal, "compare_speed", fail)
    model, recipe, batch = get_parts(Cuda=True)
    assert choose_precision(recipe.settings, model, batch) == "bfloat16" and given_back


def test_a_trial_with_one_picture_a_process(able_cpu):
    """Which BatchNorm refuses and SyncBatchNorm does not: two are tried."""
    recipe = Recipe(SETTINGS)
    layers = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(3), nn.Linear(3, 40)
    model = nn.Sequential(*layers)
    batch = first_batch(Black(), 1, 5)
    assert choose_precision(recipe.settings, model, batch) in ("float32", "bfloat16")


OTHERS = {
    "numbers": torch.tensor([0.5, 1.5]),
    "columns": torch.tensor([[0, 1], [1, 0]]),
    "shares": torch.tensor([[0.0, 1.0], [1.0, 0.0]]),
    "maps": torch.zeros(2, 4, 4, dtype=torch.int64),
    "ages": torch.tensor([41, 17]),
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize(
    "settings", [{"mixup_alpha": 0.2}, {"cutmix_alpha": 1}, {"class_weights": "sqrt"}]
)
def test_recipes_for_class_ids_refuse_other_targets(kind, settings):
    off = {"mixup_alpha": 0.0, "cutmix_alpha": 0.0, "class_weights": "none"}
    check_targets(OTHERS[kind], off, 2)
    check_targets(torch.tensor([0, 1]), {**off, **settings}, 2)
    with pytest.raises(UserError, match=f"{next(iter(settings))} = .* class ids"):
        check_targets(OTHERS[kind], {**off, **settings}, 2)


def test_almost_black_pictures_get_a_note(capsys):
    model, recipe, (images, targets, _) = get_parts(fp16=False)
    check_batch((images // 16, targets, []), model, recipe.settings, 3)
    assert "almost black" in capsys.readouterr().out
    check_batch((images, targets, []), model, recipe.settings, 3)
    assert "almost black" not in capsys.readouterr().out


def test_the_header_comes_before_the_first_picture_is_read(tmp_path):
    folder = make_project(tmp_path)
    make_data(folder, train=24, test=6)
    fails = "before('utils.dataloader:DataGenerator.__getitem__', lambda *words: 1 / 0)"
    out, err = train(folder, script=hooked(folder, fails), code=1)
    assert "optimizer " in out and "input_shape" in out and "ZeroDivisionError" in err
    assert not list((folder / "logs").glob("*/config.json"))


def test_a_resumed_run_keeps_its_precision(tmp_path):
    folder = make_project(tmp_path, fp16="'auto'", UnFreeze_Epoch=1)
    make_data(folder, train=24, test=6)
    chooses = """
import torch, utils.rehearsal
torch.cpu.get_capabilities = lambda: dict(avx512_bf16=True)
utils.rehearsal.compare_speed = lambda *words, **more: ("{}", "tried")
"""
    out, _ = train(folder, script=hooked(folder, chooses.format("bfloat16")))
    assert (
        "bfloat16 (tried)" in out
        and '"fp16": "bfloat16"' in (run_of(folder) / "config.json").read_text()
    )
    script = hooked(folder, chooses.format("float32"))
    out, _ = train(folder, "--resume", run_of(folder), "--UnFreeze_Epoch", 2, script=script)
    assert "precision    bfloat16\n" in out


def test_a_clock_is_read(able_cpu, capsys):
    model, recipe, batch = get_parts()
    choose_precision(recipe.settings, model, batch)
    speed = capsys.readouterr().out.partition("(")[2]
    assert re.fullmatch(r"float32 [1-9]\d* images/s, bfloat16 [1-9]\d* images/s\)\n", speed)


def test_the_first_pictures_stand_above_their_own_labels(tmp_path, monkeypatch):
    drawn = []
    sheet = rehearsal.draw_contact_sheet

    def note(pictures, captions):
        drawn.extend([pictures, captions])
        return sheet(pictures, captions)

    monkeypatch.setattr(rehearsal, "draw_contact_sheet", note)
    images = torch.arange(40, dtype=torch.uint8)[:, None, None, None].expand(40, 3, 4, 6)
    batch = images, torch.arange(40) % 3, []
    rehearsal.save_first_batch(tmp_path / "sheet.png", batch, ["a", "b", "c"])
    assert [int(picture[0, 0, 0]) for picture in drawn[0]] == list(range(32))
    assert drawn[1] == list("abc" * 11)[:32]
