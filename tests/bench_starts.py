"""Rows of launching and of memory."""

import os
import statistics
import subprocess
import sys
from pathlib import Path

from tests.bench_tools import pairs, report, seconds, user_environment
from tests.helpers import ROOT, history, make_data, make_project, runs, torchrun
from utils.dataloader import DataGenerator


def bench_launch(folder):
    project = make_project(
        Path(folder, "launch"),
        backbone="'resnet18'",
        input_shape=[224, 224],
        Unfreeze_batch_size=32,
        UnFreeze_Epoch=3,
    )
    make_data(project, 128, 2, size=(224, 224), ending="jpg")

    def speed(launcher):
        subprocess.run(
            [*launcher, "train.py"],
            cwd=project,
            env=user_environment(),
            capture_output=True,
            check=True,
        )
        epochs = history(runs(project)[-1])[1:]  # the first one warms up
        return statistics.median(epoch["images_per_second"] for epoch in epochs)

    measured = [(speed(torchrun()), speed([sys.executable])) for _ in range(5)]
    report(
        "torchrun, 2 processes × 1 thread against 1 × 2 threads, resnet18 at 224",
        f"{statistics.median(ours / theirs for ours, theirs in measured):.2f} ×",
        "≥ 0.95",
        "{:.1f} against {:.1f} images/s".format(
            *(statistics.median(side) for side in zip(*measured))
        ),
    )

    (project / "first_step.py").write_text(
        "import os, runpy, torch.optim.optimizer as o\nend = "
        "o.register_optimizer_step_post_hook(lambda *a: os._exit(0))\n"
        "runpy.run_path('train.py', run_name='__main__')\n"
    )
    for name in ("cls_train.txt", "cls_test.txt", "cls_classes.txt"):
        (project / "model_data" / name).unlink()
    (project / "train.py").write_text(
        (ROOT / "train.py").read_text(encoding="utf-8"), encoding="utf-8"
    )

    def ending(*words):
        return lambda: seconds(
            lambda: subprocess.run(
                [sys.executable, *words],
                cwd=project,
                env=user_environment(),
                check=True,
                stdout=subprocess.DEVNULL,
            )
        )

    ratio, ours, theirs = pairs(
        ending("first_step.py"), ending("-c", "import os, torch, torchvision; os._exit(0)"), 7
    )
    report(
        "start to the first optimizer step against importing torch, torchvision",
        f"{1 / ratio:.2f} ×",
        "≤ 1.6",
        f"{ours:.2f} against {theirs:.2f} s",
    )


MEMORY = """
import sys, time, torch, torchvision, numpy as np
from utils import lists
from utils.dataloader import DataGenerator
def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
before, begin = status("VmRSS"), time.perf_counter()
path = sys.argv[1]
lists.read_text_file("train_annotation_path", path)
with open(path, encoding="utf-8") as f:
    train_lines = f.readlines()
train_lines, _ = lists.clean_lines(train_lines, path, 1000, "classes")
np.random.seed(10101)
np.random.shuffle(train_lines)
data = DataGenerator(train_lines, (224, 224))
print(time.perf_counter() - begin, (status("VmHWM") - before) / 1024)
"""

WORKER = """
import sys, torch, tests.bench_starts as b
from utils.dataloader import DataGenerator
from torch.utils.data import DataLoader
if __name__ == "__main__":
    names = [f"{i % 1000};train/n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG" for i in range(1_280_000)]
    options = dict(num_workers=1, multiprocessing_context=sys.argv[1], collate_fn=b.last)
    loader = DataLoader(b.Touch(names, (8, 8)), 1000, **options)
    memory = list(loader)
    print((memory[-1] - memory[1]) / 1024)
"""


class Touch(DataGenerator):
    """Reads each line without its picture; the item is the process's private memory in KB."""

    def __getitem__(self, index):
        self.name(index)
        if index % 1000 == 999:
            text = Path("/proc/self/smaps_rollup").read_text()
            return sum(
                int(line.split()[1]) for line in text.splitlines() if line.startswith("Private_")
            )


def last(items):
    return items[-1]


def bench_memory(folder):
    os.makedirs(f"{folder}/pictures")
    names = [f"{folder}/pictures/n{i:08d}.JPEG" for i in range(64_000)]
    for name in names:
        os.mknod(name)
    python = [sys.executable, "-c"]
    for number, target in (
        (1_280_000, "≤ 4 s, 400 MB"),
        (2_560_000, "linear"),
        (10_000_000, "linear"),
    ):
        with open(f"{folder}/lines.txt", "w") as file:
            file.writelines(f"{i % 1000};{names[i % 64_000]}\n" for i in range(number))
        found = subprocess.run(
            [*python, MEMORY, f"{folder}/lines.txt"], capture_output=True, text=True, check=True
        ).stdout.split()
        report(
            f"{number:,} lines read, checked (files too), packed",
            f"{float(found[0]):.2f} s",
            target,
            f"{float(found[1]):.0f} MB at peak",
        )
    script = Path(folder, "worker.py")
    script.write_text(WORKER)
    for context in ("fork", "spawn"):
        found = subprocess.run(
            [sys.executable, script, context],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONPATH": os.getcwd()},
        ).stdout
        report(
            f"a worker's private memory over a pass of 1,280,000 lines, {context}",
            f"{float(found):+.1f} MB",
            "< 20 MB",
        )
