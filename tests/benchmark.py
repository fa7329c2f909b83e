"""Ratios against the common recipe, each pair measured in turn on the same machine: python -m
tests.benchmark [part …]

Parts: pictures, train, launch, evaluate, memory, cuda; all of them by default. Whole trainings,
each with options of its own (--help): fashion, against other trainers on Fashion-MNIST; recipes,
recipes on and off; finetune, from ImageNet's weights on few pictures; elpv, the same on photographs
of solar cells; fashion94, 94 % on all of Fashion-MNIST; main, the unedited train.py against an
older revision. Reference recipes stand in tests/references.
"""

import argparse
import os
import platform
import sys
import tempfile

import torch
import torchvision

from tests import bench_elpv, bench_finetune, bench_speed, bench_starts, bench_trainings, fashion

PARTS = {
    "pictures": bench_speed.bench_pictures,
    "train": bench_speed.bench_train,
    "launch": bench_starts.bench_launch,
    "evaluate": bench_speed.bench_evaluate,
    "memory": bench_starts.bench_memory,
    "cuda": bench_speed.bench_cuda,
}
TRAININGS = {
    "fashion": fashion.main,
    "recipes": bench_trainings.recipes,
    "finetune": bench_finetune.main,
    "elpv": bench_elpv.main,
    "fashion94": fashion.fashion94,
    "main": bench_trainings.main_job,
}


def machine():
    able = torch.cpu.get_capabilities()
    return (
        f"{able.get('cpu_name') or platform.processor()}, {os.cpu_count()} cores, "
        + ", ".join(name for name in ("amx_bf16", "avx512_bf16", "avx2") if able.get(name))
        + f"; Python {platform.python_version()}, torch {torch.__version__}, torchvision "
        f"{torchvision.__version__}"
    )


def main(words):
    print(machine(), flush=True)
    if words and words[0] in TRAININGS:
        return TRAININGS[words[0]](words[1:])
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="which parts to measure")
    for name in parser.parse_args(words).parts or PARTS:
        with tempfile.TemporaryDirectory() as folder:
            PARTS[name](folder)


if __name__ == "__main__":
    main(sys.argv[1:])
