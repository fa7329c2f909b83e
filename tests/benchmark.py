"""Ratios against the common recipe, each pair measured in turn on the same machine: python -m tests.benchmark [part …]

Parts: pictures, train, launch, evaluate, memory, cuda; all of them by default. The recipe of each row stands here.
"""
import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import utils  # noqa: F401 before torch, for its OpenMP setting
import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms import v2

from nets import get_model, head_layers
from tests.helpers import environment, history, make_data, make_project, runs, torchrun
from utils.dataloader import DataGenerator, EpochSampler, detection_collate
from utils.fit import autocast, fit_one_epoch
from utils.loss_history import LossHistory
from utils.pictures import MEAN, STD, normalize
from utils.recipe import Recipe, get_optimizer
from utils.workers import ignore_signals


def report(what, value, target, detail=""):
    print(f"{what:<66} {value:>9} {target:>10}  {detail}", flush=True)


def seconds(work):
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def pairs(ours, theirs, rounds=7):
    """(median of theirs/ours over rounds of ours, theirs, ours, …; ours in seconds, theirs in seconds)."""
    ours(), theirs()
    times = [(seconds(ours), seconds(theirs)) for _ in range(rounds)]
    return statistics.median(b / a for a, b in times), *(statistics.median(column) for column in zip(*times))


def photos(folder, number, width, height, grain=12):
    """Synthetic photos with detail at every scale. The grain of a camera's sensor costs a JPEG most of its bytes."""
    rng, paths = np.random.default_rng(0), []
    for i in range(number):
        total = np.zeros((height, width, 3), np.float32)
        for cells in (4, 8, 16, 32, 64, 128, 256):
            noise = rng.normal(size=(cells, cells, 3)).astype(np.float32)
            for c in range(3):
                total[..., c] += np.asarray(Image.fromarray(noise[..., c]).resize((width, height), 3)) * (60 / cells ** .5)
        total = total * .6 + total.mean(2, keepdims=True) * .4 + rng.normal(size=(height, width, 1)) * grain
        paths.append(f"{folder}/{width}_{grain}_{i}.jpg")
        Image.fromarray((128 + total).clip(0, 255).astype(np.uint8)).save(paths[-1], quality=90)
    return paths


class Usual(Dataset):
    """The usual torchvision pipeline."""

    def __init__(self, paths, random):
        first = [v2.RandomResizedCrop(224), v2.RandomHorizontalFlip()] if random else [v2.Resize(256), v2.CenterCrop(224)]
        self.paths = paths
        self.transform = v2.Compose(first + [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return self.transform(Image.open(self.paths[index]).convert("RGB")), 0


def bench_pictures(folder):
    torch.set_num_threads(1)
    small = photos(folder, 32, 500, 375)
    for paths, size, target in ((small, "500×375", "≥ 2"), (photos(folder, 32, 500, 375, grain=0), "500×375", "≥ 2"),
                                (photos(folder, 6, 3264, 2448), "3264×2448", "≥ 4"),
                                (photos(folder, 6, 3264, 2448, grain=0), "3264×2448", "≥ 4")):
        name = f"{size}, {np.mean([os.path.getsize(p) for p in paths]) / 1e3:.0f} KB"
        for random in (True, False):
            data = DataGenerator([f"0;{p}" for p in paths], (224, 224), random, "crop", val_crop=0.875)
            usual = Usual(paths, random)
            ratio, ours, theirs = pairs(lambda: detection_collate([data[1, i] for i in range(len(paths))]),
                                        lambda: default_collate([usual[i] for i in range(len(paths))]), 11)
            report(f"{'training' if random else 'evaluation'} pictures, {name}, one core", f"{ratio:.2f} ×", target,
                   f"{len(paths) / ours:.0f} against {len(paths) / theirs:.0f} pictures/s")
    data = DataGenerator([f"0;{p}" for p in small], (224, 224), True, "crop")
    def pillow():
        for path in small:
            Image.open(path).load()
    def torchvisions():
        for path in small:
            decode_jpeg(read_file(path), ImageReadMode.RGB)
    faster = pillow if pairs(pillow, torchvisions)[0] > 1 else torchvisions
    ratio, ours, theirs = pairs(lambda: detection_collate([data[1, i] for i in range(len(small))]), faster, 15)
    report("share of the decoding limit, 500×375", f"{ratio:.2f}", "≥ 0.65", f"{faster.__name__}: {len(small) / theirs:.0f} pictures/s")


class Ready:
    """A loader of batches that are in memory already."""
    num_workers = 0

    def __init__(self, batches, batch_size):
        self.batches, self.batch_size = batches, batch_size
        self.sampler = EpochSampler(batch_size * len(batches), batch_size)

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)


def loader(data, batch_size, workers=2, pin_memory=False):
    return DataLoader(data, batch_size, num_workers=workers, collate_fn=detection_collate, worker_init_fn=ignore_signals,
                      sampler=EpochSampler(len(data), batch_size), persistent_workers=True, drop_last=True, pin_memory=pin_memory)


def train_seconds(model, optimizer, gen, steps, folder, Cuda, fp16, epoch=0, scaler=None, channels_last=True):
    """Seconds that fit_one_epoch spends on training; its validation has two pictures, and is not counted."""
    val = Ready([(torch.zeros(2, 3, 64, 64, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), [])], 2)
    with open(os.devnull, "w") as quiet:
        out, sys.stdout = sys.stdout, quiet
        try:
            figures = fit_one_epoch(model, model, LossHistory(folder), optimizer, epoch, steps, 1, gen, val, 1000, Cuda, fp16, scaler,
                                    1000, folder, 0, recipe=Recipe(channels_last=channels_last))
        finally:
            sys.stdout = out
    return steps * gen.batch_size / figures["images_per_second"]


def network(channels_last=True, name="resnet18", device="cpu"):
    model = get_model(name, 10, [224, 224])
    model.to(device, memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    return model, get_optimizer(model, head_layers(model), "sgd", 0.9, 5e-4)


def best_precision():
    able = torch.cpu.get_capabilities()
    return able.get("amx_bf16", False) or able.get("avx512_bf16", False)


def bench_train(folder):
    torch.set_num_threads(os.cpu_count())
    able, fp16 = torch.cpu.get_capabilities(), best_precision()
    target = "≥ 3" if able.get("amx_bf16") else "≥ 2" if able.get("avx512_bf16") else "≥ 1.1"
    paths = photos(folder, 96, 500, 375)
    model, optimizer = network()
    gen = loader(DataGenerator([f"0;{p}" for p in paths], (224, 224), True, "crop"), 32)
    plain = get_model("resnet18", 10, [224, 224])
    plain_optimizer = torch.optim.SGD(plain.parameters(), 0.01, 0.9, weight_decay=5e-4)
    plain_gen = DataLoader(Usual(paths, True), 32, shuffle=True, num_workers=2, drop_last=True, persistent_workers=True)
    def usual():
        begin = time.perf_counter()
        plain.train()
        for images, targets in plain_gen:
            plain_optimizer.zero_grad()
            loss = F.cross_entropy(plain(images), targets)
            loss.backward()
            plain_optimizer.step()
            loss.item()
        return time.perf_counter() - begin
    ratios = []
    for round in range(4):
        ours, theirs = train_seconds(model, optimizer, gen, 3, folder, False, fp16), usual()
        ratios += [theirs / ours] if round else []
    report(f"end to end, resnet18 at 224, batch 32 ({'bfloat16' if fp16 else 'float32'}, channels_last)",
           f"{statistics.median(ratios):.2f} ×", target, f"{96 / ours:.1f} against {96 / theirs:.1f} images/s")

    batches = [(torch.randint(0, 256, (16, 3, 224, 224), dtype=torch.uint8).contiguous(memory_format=torch.channels_last),
                torch.randint(0, 10, (16,)), []) for _ in range(4)]
    ready = [(normalize(images, "cpu"), targets) for images, targets, _ in batches]
    def bare():
        begin = time.perf_counter()
        model.train()
        for images, targets in ready:
            with autocast(False, fp16):
                loss = F.cross_entropy(model(images), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return time.perf_counter() - begin
    ratios = []
    for round in range(8):
        ours, theirs = train_seconds(model, optimizer, Ready(batches, 16), 4, folder, False, fp16), bare()
        ratios += [ours / theirs] if round else []
    report("fit_one_epoch over ready batches against the bare loop", f"{statistics.median(ratios):.3f}", "≤ 1.03")
    ratios = []
    for round in range(5):
        model.freeze_backbone()
        frozen = train_seconds(model, optimizer, Ready(batches, 16), 4, folder, False, fp16)
        model.Unfreeze_backbone()
        ratios += [train_seconds(model, optimizer, Ready(batches, 16), 4, folder, False, fp16) / frozen] if round else []
    report("frozen against unfrozen, resnet18 at 224", f"{statistics.median(ratios):.2f} ×", "≥ 2")


def bench_launch(folder):
    project = make_project(Path(folder, "launch"), backbone="'resnet18'", input_shape=[224, 224], Unfreeze_batch_size=32, UnFreeze_Epoch=3)
    make_data(project, 128, 2, size=(224, 224), ending="jpg")
    def speed(launcher, threads):
        subprocess.run([*launcher, "train.py"], cwd=project, env={**environment(), "OMP_NUM_THREADS": threads},
                       capture_output=True, check=True)
        epochs = history(runs(project)[-1])[1:]  # the first one warms up
        return statistics.median(epoch["images_per_second"] for epoch in epochs)
    measured = [(speed(torchrun(29690), "1"), speed([sys.executable], "2")) for _ in range(5)]
    report("torchrun, 2 processes × 1 thread against 1 × 2 threads, resnet18 at 224",
           f"{statistics.median(ours / theirs for ours, theirs in measured):.2f} ×", "≥ 0.95",
           "{:.1f} against {:.1f} images/s".format(*(statistics.median(side) for side in zip(*measured))))

    (project / "first_step.py").write_text(
        "import os, runpy, torch.optim.optimizer as o\nend = o.register_optimizer_step_post_hook(lambda *a: os._exit(0))\n"
        "runpy.run_path('train.py', run_name='__main__')\n")
    for name in ("train", "test"):
        (project / "model_data" / f"cls_{name}.txt").unlink()
    (project / "model_data" / "cls_classes.txt").unlink()
    (project / "train.py").write_text(Path("train.py").read_text(encoding="utf-8"), encoding="utf-8")
    def start():
        subprocess.run([sys.executable, "first_step.py"], cwd=project, env=environment(), check=True, stdout=subprocess.DEVNULL)
    def imports():
        subprocess.run([sys.executable, "-c", "import os, torch, torchvision; os._exit(0)"], env=environment(), check=True)
    ratio, ours, theirs = pairs(start, imports, 7)
    report("start to the first optimizer step against importing torch, torchvision", f"{1 / ratio:.2f} ×", "≤ 1.6",
           f"{ours:.2f} against {theirs:.2f} s")


def bench_evaluate(folder):
    from utils.evaluate import score
    from utils.trained import TrainedRun
    torch.set_num_threads(os.cpu_count())
    paths = photos(folder, 256, 500, 375)
    run = TrainedRun.__new__(TrainedRun)
    run.Cuda, run.fp16, run.class_names = False, False, [str(i) for i in range(10)]
    lines = [f"{i % 10};{p}" for i, p in enumerate(paths)]
    for name in ("resnet18", "resnet50"):
        run.settings = dict(input_shape=[224, 224], val_crop=0.875, channels_last=True)
        run.model = network(name=name)[0].eval()
        data = DataGenerator(lines, (224, 224), False, val_crop=0.875)
        images = detection_collate([data[i] for i in range(32)])[0]
        def decode():
            for _ in DataLoader(data, 32, num_workers=2, collate_fn=detection_collate, sampler=EpochSampler(256, 32, shuffle=False)):
                pass
        def forward():
            with torch.no_grad():
                for _ in range(8):
                    run.model(normalize(images, "cpu")).softmax(1)
        def ours():
            score(run, data, 32, 2)
        ours(), decode(), forward()
        times = [(seconds(ours), seconds(decode), seconds(forward)) for _ in range(5)]
        ours_s, decode_s, forward_s = (statistics.median(column) for column in zip(*times))
        report(f"evaluate against the slower of its limits, {name}", f"{statistics.median(max(d, f) / o for o, d, f in times):.2f}",
               "≥ 0.9", f"decoding {256 / decode_s:.0f}, forward {256 / forward_s:.0f}, both on the same cores {256 / ours_s:.0f} pictures/s")


MEMORY = """
import sys, time, torch, torchvision, numpy as np
from utils import checks
from utils.dataloader import DataGenerator
def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here, not from the imports' own
before, begin = status("VmRSS"), time.perf_counter()
path = sys.argv[1]
checks.check_text_file("train_annotation_path", path, "")
with open(path, encoding="utf-8") as f:
    train_lines = f.readlines()
train_lines = checks.check_lines(train_lines, path, 1000, "classes")
np.random.seed(10101)
np.random.shuffle(train_lines)
data = DataGenerator(train_lines, (224, 224))
print(time.perf_counter() - begin, (status("VmHWM") - before) / 1024)
"""

WORKER = """
import sys, torch, tests.benchmark as b
from utils.dataloader import DataGenerator
from torch.utils.data import DataLoader
if __name__ == "__main__":
    data = b.Touch([f"{i % 1000};train/n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG" for i in range(1_280_000)], (8, 8))
    loader = DataLoader(data, 1000, num_workers=1, multiprocessing_context=sys.argv[1], collate_fn=b.last)
    memory = list(loader)
    print((memory[-1] - memory[1]) / 1024)
"""


class Touch(DataGenerator):
    """Reads each line without opening its picture; the item is the process's private memory in KB."""

    def __getitem__(self, index):
        self.line(index)
        if index % 1000 == 999:
            text = Path("/proc/self/smaps_rollup").read_text()
            return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Private_"))


def last(items):
    return items[-1]


def bench_memory(folder):
    os.makedirs(f"{folder}/pictures")
    names = [f"{folder}/pictures/n{i:08d}.JPEG" for i in range(64_000)]
    for name in names:
        os.mknod(name)
    python = [sys.executable, "-c"]
    for number, target in ((1_280_000, "≤ 4 s, 400 MB"), (2_560_000, "linear"), (10_000_000, "linear")):
        with open(f"{folder}/lines.txt", "w") as file:
            file.writelines(f"{i % 1000};{names[i % 64_000]}\n" for i in range(number))
        found = subprocess.run([*python, MEMORY, f"{folder}/lines.txt"], capture_output=True, text=True, check=True).stdout.split()
        report(f"{number:,} lines read, checked (files too), packed", f"{float(found[0]):.2f} s", target, f"{float(found[1]):.0f} MB at peak")
    script = Path(folder, "worker.py")
    script.write_text(WORKER)
    for context in ("fork", "spawn"):
        found = subprocess.run([sys.executable, script, context], capture_output=True, text=True, check=True,
                               env={**os.environ, "PYTHONPATH": os.getcwd()}).stdout
        report(f"a worker's private memory over a pass of 1,280,000 lines, {context}", f"{float(found):+.1f} MB", "< 20 MB")


def bench_cuda(folder):
    if not torch.cuda.is_available():
        return report("resnet50 at 224, float16, on a GPU", "-", "", "no GPU here")
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    size, steps = 256, 60
    model, optimizer = network(name="resnet50", device="cuda")
    scaler = torch.amp.GradScaler("cuda")
    images = torch.randint(0, 256, (size, 224, 224, 3), dtype=torch.uint8).pin_memory().permute(0, 3, 1, 2)
    batches = [(images, torch.randint(0, 10, (size,)).pin_memory(), [])] * steps
    ready, targets = normalize(images, "cuda"), batches[0][1].cuda()
    def bare():
        torch.cuda.synchronize()
        begin = time.perf_counter()
        model.train()
        for _ in range(steps):
            with autocast(True, True):
                loss = F.cross_entropy(model(ready), targets)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        torch.cuda.synchronize()
        return time.perf_counter() - begin
    ratios = []
    for round in range(4):
        ours, theirs = train_seconds(model, optimizer, Ready(batches, size), steps, folder, True, True, scaler=scaler), bare()
        ratios += [theirs / ours] if round else []
    name = f"resnet50 at 224, float16, {torch.cuda.get_device_name()}"
    report(f"{name}: ready batches, share of the bare loop", f"{statistics.median(ratios):.3f}", "",
           f"{size * steps / ours:.0f} against {size * steps / theirs:.0f} images/s")
    paths, workers = photos(folder, 64, 500, 375), os.cpu_count()
    gen = loader(DataGenerator([f"0;{p}" for p in paths * 4 * steps], (224, 224), True, "crop"), size, workers, pin_memory=True)
    def decode():
        for _ in gen:
            pass
    rounds = []
    for round in range(4):
        ours, decoding, theirs = train_seconds(model, optimizer, gen, steps, folder, True, True, scaler=scaler), seconds(decode), bare()
        rounds += [(max(decoding, theirs) / ours, decoding / ours)] if round else []
    both, decoded = (statistics.median(column) for column in zip(*rounds))
    report(f"{name}: from JPEG files, {workers} workers, share of decoding", f"{decoded:.3f}", "",
           f"{both:.3f} of the slower of decoding and the bare loop; {size * steps / ours:.0f}, decoding {size * steps / decoding:.0f} images/s")


def main():
    parts = dict(pictures=bench_pictures, train=bench_train, launch=bench_launch, evaluate=bench_evaluate, memory=bench_memory,
                 cuda=bench_cuda)
    parser = argparse.ArgumentParser(prog="python -m tests.benchmark", description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*parts, []], help="which parts to measure")
    chosen = parser.parse_args().parts or parts
    able = torch.cpu.get_capabilities()
    print(f"{able.get('cpu_name') or platform.processor()}, {os.cpu_count()} cores, "
          + ", ".join(name for name in ("amx_bf16", "avx512_bf16", "avx2") if able.get(name))
          + f"; Python {platform.python_version()}, torch {torch.__version__}, torchvision {torchvision.__version__}")
    for name in chosen:
        with tempfile.TemporaryDirectory() as folder:
            parts[name](folder)


if __name__ == "__main__":
    main()
