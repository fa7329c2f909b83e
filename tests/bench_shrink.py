"""Training from reduced copies against training from the photos, and what making the copies costs: python -m tests.bench_shrink"""
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
from PIL import Image, ImageDraw
from torch.utils.data import default_collate

from tests.benchmark import Usual, pairs, photos, report
from tests.helpers import history, make_project, runs, train
from utils.annotation import main as annotate
from utils.dataloader import DataGenerator, detection_collate
from utils.sample_data import SHAPES
from utils.shrink import copy_path, reduced_copy, results

SIZE = 512  # shorter side of the copies
CLASSES = ("circle", "cross", "heart", "square", "star", "triangle")


def limit(path):
    """Decoding as small as the pass does, and nothing else."""
    with Image.open(path) as image:
        image.draft(image.mode, tuple(round(side * SIZE / min(image.size)) for side in image.size))
        image.load()


def everything(work, paths):
    for _, _, reason in results(work, paths):
        assert reason is None, reason


def bench_speed(folder):
    torch.set_num_threads(1)
    for grain in (12, 0):
        originals, copies = Path(folder, f"photos{grain}"), Path(folder, f"photos{grain}-{SIZE}")
        originals.mkdir()
        paths = photos(str(originals), 6, 3264, 2448, grain)
        name = f"3264×2448, {np.mean([os.path.getsize(path) for path in paths]) / 1e6:.1f} MB"
        make = partial(reduced_copy, datasets=originals, folder=copies, size=SIZE, check=False, drafts=folder)
        ratio, ours, theirs = pairs(lambda: everything(make, paths * 16), lambda: everything(limit, paths * 16), 5)
        report(f"making copies of {SIZE}, {name}: share of the decoding limit, all cores", f"{ratio:.2f}", "≥ 0.9",
               f"{96 / ours:.0f} of {96 / theirs:.0f} pictures/s; a copy has "
               f"{np.mean([path.stat().st_size for path in copies.iterdir()]) / 1e3:.0f} KB")
        data = DataGenerator([f"0;{copy_path(path, originals, copies)}" for path in paths], (224, 224), True, "crop")
        usual = Usual(paths, True)
        ratio, ours, theirs = pairs(lambda: [detection_collate([data[epoch, i] for i in range(6)]) for epoch in range(8)],
                                    lambda: default_collate([usual[i] for i in range(6)]), 7)
        report(f"training pictures from copies against the usual pipeline, {name}", f"{8 * ratio:.1f} ×", "≥ 15",
               f"{48 / ours:.0f} against {6 / theirs:.0f} pictures/s, one core")


def scene(label, rng, backgrounds):
    """A photo-like picture, 3264×2448, with one shape of any place, angle and colour, half transparent, on a structured ground."""
    ground = rng.choice(backgrounds)
    ground = ground.transpose(rng.choice([*Image.Transpose][:2] + [Image.Transpose.ROTATE_180]))
    radius, angle, x, y = rng.uniform(500, 800), rng.random() * 7, rng.uniform(900, 2364), rng.uniform(850, 1598)
    c, s = radius * math.cos(angle), radius * math.sin(angle)
    mask = Image.new("L", ground.size)
    ImageDraw.Draw(mask).polygon([(x + c * px - s * py, y + s * px + c * py) for px, py in SHAPES[CLASSES[label]]],
                                 rng.randrange(130, 220))
    ground.paste(Image.new("RGB", ground.size, tuple(rng.randrange(256) for _ in range(3))), mask=mask)
    return ground


def bench_accuracy(folder, each=60, test=25, seeds=(11, 12, 13)):
    """Best top-1 of trainings from the originals and from the copies, with the same settings and seeds."""
    project = make_project(Path(folder, "project"), backbone="'resnet18'", input_shape=[96, 96], augmentation="'crop'", crop_scale=0.5,
                           Unfreeze_batch_size=16, UnFreeze_Epoch=20, Init_lr=5e-2, num_workers=2, save_period=100)
    backgrounds = [Image.open(path).convert("RGB") for path in photos(folder, 8, 3264, 2448, grain=6)]
    for split, number in (("train", each), ("test", test)):
        for label, name in enumerate(CLASSES):
            target = project / "photos" / split / name
            target.mkdir(parents=True)
            for i in range(number):
                scene(label, random.Random(f"{split} {label} {i}"), backgrounds).save(target / f"{i}.jpg", quality=90)
    here = os.getcwd()
    os.chdir(project)
    lists = [word for name in ("classes", "train", "test") for word in (f"--{name}", f"model_data/{name}{SIZE}.txt")]
    annotate(["photos"])
    begin = time.perf_counter()
    annotate(["photos", "--shrink", str(SIZE), *lists])
    seconds = time.perf_counter() - begin
    os.chdir(here)
    found = {"originals": [], "copies": []}
    for seed in seeds:
        for name, words in (("originals", []), ("copies", [
                "--classes_path", f"model_data/classes{SIZE}.txt", "--train_annotation_path", f"model_data/train{SIZE}.txt",
                "--test_annotation_path", f"model_data/test{SIZE}.txt"])):
            begin = time.perf_counter()
            train(project, "--seed", seed, *words, timeout=3000)
            rows = history(runs(project)[-1])
            found[name].append((max(row["top1"] for row in rows), time.perf_counter() - begin))
    for name, trainings in found.items():
        report(f"top-1 from {name}, seeds {', '.join(map(str, seeds))}", f"{statistics.mean(top1 for top1, _ in trainings):.2%}", "the same",
               ", ".join(f"{top1:.2%}" for top1, _ in trainings) + f"; {statistics.median(s for _, s in trainings):.0f} s a training")
    report(f"making the {len(CLASSES) * (each + test)} copies", f"{seconds:.0f} s", "")


def bench_shrink(folder):
    bench_speed(folder)
    bench_accuracy(folder)


if __name__ == "__main__":
    parts = dict(speed=bench_speed, accuracy=bench_accuracy)
    for part in sys.argv[1:] or parts:
        with tempfile.TemporaryDirectory() as scratch:
            parts[part](scratch)
