"""Rows of speed.

Pictures, training, evaluation, a GPU. Every reference is a process of its own (tests/references).
"""

import os
import statistics
import sys

import numpy as np
import torch
from torch.utils.data import DataLoader

import utils  # noqa: F401 before torch, for its OpenMP setting
from nets import get_model, head_layers
from tests.bench_tools import Reference, by_turns, pairs, photos, report, seconds
from tests.helpers import default_settings
from utils.dataloader import DataGenerator, detection_collate
from utils.fit import fit_one_epoch
from utils.loss_history import LossHistory
from utils.optimizer import get_optimizer
from utils.plumbing.processes import prepare_worker
from utils.recipe import Recipe
from utils.sampler import EpochSampler


def bench_pictures(folder):
    torch.set_num_threads(1)
    small = photos(folder, 32, 500, 375)

    def reading(paths, random):
        settings = {"augmentation": "crop", "val_crop": 0.875}
        data = DataGenerator([f"0;{p}" for p in paths], (224, 224), random, settings=settings)
        return lambda: seconds(
            lambda: detection_collate([data[1, i, i] for i in range(len(paths))])
        )

    for paths, size, target in (
        (small, "500×375", "≥ 2"),
        (photos(folder, 32, 500, 375, grain=0), "500×375", "≥ 2"),
        (photos(folder, 6, 3264, 2448), "3264×2448", "≥ 4"),
        (photos(folder, 6, 3264, 2448, grain=0), "3264×2448", "≥ 4"),
    ):
        name = f"{size}, {np.mean([os.path.getsize(p) for p in paths]) / 1e3:.0f} KB"
        for kind in ("training", "evaluation"):
            with Reference("pictures.py", kind=kind, paths=paths) as usual:
                ratio, ours, theirs = pairs(reading(paths, kind == "training"), usual, 11)
            report(
                f"{kind} pictures, {name}, one core",
                f"{ratio:.2f} ×",
                target,
                f"{len(paths) / ours:.0f} against {len(paths) / theirs:.0f} pictures/s",
            )
    with (
        Reference("pictures.py", kind="pillow", paths=small) as pillow,
        Reference("pictures.py", kind="torchvision", paths=small) as tv,
    ):
        faster, name = (pillow, "pillow") if pairs(pillow, tv)[0] > 1 else (tv, "torchvision")
        ratio, ours, theirs = pairs(reading(small, True), faster, 15)
    report(
        "share of the decoding limit, 500×375",
        f"{ratio:.2f}",
        "≥ 0.65",
        f"{name}: {len(small) / theirs:.0f} pictures/s",
    )


class Ready:
    """A loader of batches that are in memory already."""

    num_workers = 0

    def __init__(self, batches, batch_size):
        self.batches, self.batch_size, self.dataset = (
            batches,
            batch_size,
            range(batch_size * len(batches)),
        )
        self.sampler = EpochSampler(batch_size * len(batches), batch_size)

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)


def ready_batches(batch, steps, pin_memory=False):
    images, targets = (
        torch.randint(0, 256, (batch, 224, 224, 3), dtype=torch.uint8),
        torch.randint(0, 10, (batch,)),
    )
    if pin_memory:
        images, targets = images.pin_memory(), targets.pin_memory()
    return Ready([(images.permute(0, 3, 1, 2), targets, [])] * steps, batch)


def loader(data, batch_size, workers=2, pin_memory=False):
    return DataLoader(
        data,
        batch_size,
        num_workers=workers,
        collate_fn=detection_collate,
        worker_init_fn=prepare_worker,
        sampler=EpochSampler(len(data), batch_size),
        persistent_workers=True,
        drop_last=True,
        pin_memory=pin_memory,
    )


def train_seconds(model, optimizer, gen, steps, folder, Cuda, fp16, scaler=None):
    """Seconds that fit_one_epoch spends on training.

    Its validation has two pictures, and is not counted.
    """
    val = Ready(
        [(torch.zeros(2, 3, 64, 64, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), [])], 2
    )
    with open(os.devnull, "w") as quiet:
        out, sys.stdout = sys.stdout, quiet
        try:
            figures = fit_one_epoch(
                model,
                model,
                LossHistory(folder),
                optimizer,
                0,
                steps,
                1,
                gen,
                val,
                1000,
                Cuda,
                fp16,
                scaler,
                1000,
                folder,
                0,
                recipe=Recipe(default_settings(), model, 10),
            )
        finally:
            sys.stdout = out
    return steps * gen.batch_size / figures["images_per_second"]


def network(name="resnet18", device="cpu"):
    model = get_model(name, 10, [224, 224]).to(device, memory_format=torch.channels_last)
    optimizer = get_optimizer(model, head_layers(model), "sgd", 0.9, 5e-4)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3  # random labels at its 0.1 end in a loss that is not finite
    return model, optimizer


def bench_train(folder):
    torch.set_num_threads(os.cpu_count())
    able = torch.cpu.get_capabilities()
    fp16 = able.get("amx_bf16", False) or able.get("avx512_bf16", False)
    target = "≥ 3" if able.get("amx_bf16") else "≥ 2" if able.get("avx512_bf16") else "≥ 1.1"
    paths = photos(folder, 96, 500, 375)
    model, optimizer = network()
    gen = loader(
        DataGenerator(
            [f"0;{p}" for p in paths], (224, 224), True, settings={"augmentation": "crop"}
        ),
        32,
    )
    with Reference("loops.py", paths=paths, batch=32) as usual:
        ratio, ours, theirs = pairs(
            lambda: train_seconds(model, optimizer, gen, 3, folder, False, fp16), usual, 5
        )
    report(
        f"end to end, resnet18 at 224, batch 32 ({'bfloat16' if fp16 else 'float32'}, "
        f"channels_last)",
        f"{ratio:.2f} ×",
        target,
        f"{96 / ours:.1f} against {96 / theirs:.1f} images/s",
    )

    ready = ready_batches(16, 4)

    def epoch():
        return train_seconds(model, optimizer, ready, 4, folder, False, fp16)

    with Reference(
        "loops.py", kind="train", network="resnet18", batch=16, steps=4, mixed=fp16
    ) as bare:
        report(
            "fit_one_epoch over ready batches against the bare loop",
            f"{1 / pairs(epoch, bare, 9)[0]:.3f}",
            "≤ 1.03",
        )

    def frozen():
        model.freeze_backbone()
        spent = epoch()
        model.Unfreeze_backbone()
        return spent

    report("frozen against unfrozen, resnet18 at 224", f"{pairs(frozen, epoch, 5)[0]:.2f} ×", "≥ 2")


def bench_evaluate(folder):
    from utils.evaluate import score
    from utils.trained import Classifier

    torch.set_num_threads(os.cpu_count())
    paths = photos(folder, 256, 500, 375)
    run = Classifier.__new__(Classifier)
    run.Cuda, run.fp16, run.class_names = False, False, [str(i) for i in range(10)]
    run.settings = dict(input_shape=[224, 224], val_crop=0.875)
    lines = [f"{i % 10};{p}" for i, p in enumerate(paths)]
    data = DataGenerator(lines, (224, 224), False, settings={"val_crop": 0.875})

    def decode():
        for _ in DataLoader(
            data,
            32,
            num_workers=2,
            collate_fn=detection_collate,
            sampler=EpochSampler(256, 32, shuffle=False),
        ):
            pass

    for name in ("resnet18", "resnet50"):
        run.model = network(name)[0].eval()
        with Reference("loops.py", kind="forward", network=name, batch=32, steps=8) as forward:
            times = by_turns(
                lambda: seconds(lambda: score(run, data, 32, 2)),
                lambda: seconds(decode),
                forward,
                rounds=5,
            )
        ours, decoding, forwards = (statistics.median(column) for column in zip(*times))
        report(
            f"evaluate against the slower of its limits, {name}",
            f"{statistics.median(max(d, f) / o for o, d, f in times):.2f}",
            "≥ 0.9",
            f"decoding {256 / decoding:.0f}, forward {256 / forwards:.0f}, both on the same "
            f"cores {256 / ours:.0f} pictures/s",
        )


def bench_cuda(folder):
    if not torch.cuda.is_available():
        return report("resnet50 at 224, float16, on a GPU", "-", "", "no GPU here")
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    size, steps = 256, 60
    model, optimizer = network("resnet50", "cuda")
    scaler = torch.amp.GradScaler("cuda")

    def epoch(gen):
        return lambda: train_seconds(model, optimizer, gen, steps, folder, True, True, scaler)

    paths, workers = photos(folder, 64, 500, 375), os.cpu_count()
    gen = loader(
        DataGenerator(
            [f"0;{p}" for p in paths * 4 * steps],
            (224, 224),
            True,
            settings={"augmentation": "crop"},
        ),
        size,
        workers,
        pin_memory=True,
    )

    def decode():
        for _ in gen:
            pass

    name = f"resnet50 at 224, float16, {torch.cuda.get_device_name()}"
    with Reference(
        "loops.py",
        kind="train",
        network="resnet50",
        batch=size,
        steps=steps,
        device="cuda",
        mixed=True,
    ) as bare:
        ratio, ours, theirs = pairs(epoch(ready_batches(size, steps, pin_memory=True)), bare, 3)
        report(
            f"{name}: ready batches, share of the bare loop",
            f"{ratio:.3f}",
            "",
            f"{size * steps / ours:.0f} against {size * steps / theirs:.0f} images/s",
        )
        times = by_turns(epoch(gen), lambda: seconds(decode), bare, rounds=3)
    ours, decoding, _ = (statistics.median(column) for column in zip(*times))
    both, decoded = (
        statistics.median(column) for column in zip(*((max(d, b) / o, d / o) for o, d, b in times))
    )
    report(
        f"{name}: from JPEG files, {workers} workers, share of decoding",
        f"{decoded:.3f}",
        "",
        f"{both:.3f} of the slower of decoding and the bare loop; {size * steps / ours:.0f}, "
        f"decoding {size * steps / decoding:.0f} images/s",
    )
