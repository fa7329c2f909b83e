"""Training from reduced copies against training from the photos, and making the copies.

Python -m tests.bench_shrink [part …]
"""

import math
import os
import random
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tests.bench_tools import Reference, pairs, photos, report, seconds
from tests.helpers import history, make_project, runs, train
from utils.annotation import main as annotate
from utils.dataloader import DataGenerator, detection_collate
from utils.plumbing.shrink import on_all_cores, reduced_copy

SIZE = 512  # shorter side of the copies
CLASSES = ("upright", "level", "checks", "dots", "rings", "slanted")


def limit(path):
    """Decoding as small as the pass does, and nothing else."""
    with Image.open(path) as image:
        image.draft(image.mode, tuple(round(side * SIZE / min(image.size)) for side in image.size))
        image.load()


def everything(work, paths):
    assert on_all_cores(work, paths, "read").keys() == {*paths}


def bench_speed(folder):
    torch.set_num_threads(1)
    for grain in (12, 0):
        originals, copies = Path(folder, f"photos{grain}"), Path(folder, f"photos{grain}-{SIZE}")
        originals.mkdir()
        paths = photos(str(originals), 6, 3264, 2448, grain)
        for path in paths:
            os.utime(
                path, (time.time() + 1e6,) * 2
            )  # newer than a copy, so that each is made every time
        name = f"3264×2448, {np.mean([os.path.getsize(path) for path in paths]) / 1e6:.1f} MB"
        make = partial(reduced_copy, datasets=originals, folder=copies, size=SIZE, drafts=folder)
        ratio, ours, theirs = pairs(
            lambda: seconds(lambda: everything(make, paths * 16)),
            lambda: seconds(lambda: everything(limit, paths * 16)),
            5,
        )
        report(
            f"making copies of {SIZE}, {name}: share of the decoding limit, all cores",
            f"{ratio:.2f}",
            "≥ 0.9",
            f"{96 / ours:.0f} of {96 / theirs:.0f} pictures/s; a copy has "
            f"{np.mean([path.stat().st_size for path in copies.iterdir()]) / 1e3:.0f} KB",
        )
        lines = [f"0;{path}" for path in sorted(copies.iterdir())]
        data = DataGenerator(lines, (224, 224), settings={"augmentation": "crop"})

        def reading():
            return seconds(
                lambda: [
                    detection_collate([data[epoch, i, i] for i in range(6)]) for epoch in range(8)
                ]
            )

        with Reference("pictures.py", kind="training", paths=paths) as usual:
            ratio, ours, theirs = pairs(reading, usual, 7)
        report(
            f"training pictures from copies against the usual pipeline, {name}",
            f"{8 * ratio:.1f} ×",
            "≥ 15",
            f"{48 / ours:.0f} against {6 / theirs:.0f} pictures/s, one core",
        )


def scene(name, rng, background):
    """A photo-like picture, 3264×2448, on which a large disc of one texture shows faintly, at any
    place, scale and phase.
    """
    pixels = np.asarray(
        background if rng.random() < 0.5 else background.transpose(Image.Transpose.ROTATE_180),
        np.float32,
    )
    x, y = np.meshgrid(
        np.arange(pixels.shape[1], dtype=np.float32), np.arange(pixels.shape[0], dtype=np.float32)
    )
    middle = rng.uniform(900, 2364), rng.uniform(850, 1598)
    distance = np.hypot(x - middle[0], y - middle[1])
    step, tilt = 2 * math.pi / rng.uniform(140, 260), rng.uniform(-0.15, 0.15)
    u, v = (
        np.sin(step * (x + tilt * y) + rng.random() * 7),
        np.sin(step * (y - tilt * x) + rng.random() * 7),
    )
    texture = {
        "upright": u,
        "level": v,
        "checks": u * v,
        "dots": 2 * np.maximum(u + v - 0.8, 0),
        "rings": np.sin(step * distance),
        "slanted": np.sin(step * 0.7 * (x + rng.choice((-1, 1)) * y)),
    }[name]
    texture = texture * (distance < rng.uniform(600, 800)) * rng.uniform(12, 35)
    return Image.fromarray((pixels + texture[..., None]).clip(0, 255).astype(np.uint8))


def bench_accuracy(folder, each=40, test=20, seeds=(11, 12, 13)):
    """Best top-1 of trainings from the originals and from the copies, with the same settings and
    seeds.
    """
    project = make_project(
        Path(folder, "project"),
        backbone="'resnet18'",
        input_shape=[96, 96],
        augmentation="'crop'",
        crop_scale=0.5,
        Unfreeze_batch_size=16,
        UnFreeze_Epoch=30,
        Init_lr=5e-2,
        num_workers=2,
        save_period=100,
    )
    backgrounds = [
        Image.open(path).convert("RGB") for path in photos(folder, 8, 3264, 2448, grain=6)
    ]
    for split, number in (("train", each), ("test", test)):
        for label, name in enumerate(CLASSES):
            target = project / "photos" / split / name
            target.mkdir(parents=True)
            for i in range(number):
                rng = random.Random(f"{split} {label} {i}")
                scene(name, rng, rng.choice(backgrounds)).save(target / f"{i}.jpg", quality=90)
    here = os.getcwd()
    os.chdir(project)
    annotate(["photos"])
    making = seconds(
        lambda: annotate(["photos", "--shrink", str(SIZE), "--out", f"model_data/{SIZE}"])
    )
    os.chdir(here)
    found = {"originals": [], "copies": []}
    for seed in seeds:
        for name, words in (
            ("originals", []),
            (
                "copies",
                [
                    "--classes_path",
                    f"model_data/{SIZE}_classes.txt",
                    "--train_annotation_path",
                    f"model_data/{SIZE}_train.txt",
                    "--test_annotation_path",
                    f"model_data/{SIZE}_test.txt",
                ],
            ),
        ):
            begin = time.perf_counter()
            train(project, "--seed", seed, *words, timeout=3000)
            rows = history(runs(project)[-1])
            found[name].append((max(row["top1"] for row in rows), time.perf_counter() - begin))
    for name, trainings in found.items():
        top1 = statistics.mean(top1 for top1, _ in trainings)
        report(
            f"top-1 from {name}, seeds {', '.join(map(str, seeds))}",
            f"{top1:.2%}",
            "the same",
            ", ".join(f"{top1:.2%}" for top1, _ in trainings)
            + f"; {statistics.median(s for _, s in trainings):.0f} s a training",
        )
    report(f"making the {len(CLASSES) * (each + test)} copies", f"{making:.0f} s", "")


def bench_shrink(folder):
    bench_speed(folder)
    bench_accuracy(folder)


if __name__ == "__main__":
    parts = dict(speed=bench_speed, accuracy=bench_accuracy)
    for part in sys.argv[1:] or parts:
        with tempfile.TemporaryDirectory() as scratch:
            parts[part](scratch)
