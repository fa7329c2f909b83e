"""What the benchmark's parts share.

Photos, timing by turns, and the other side in a process and environment of its own.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from tests.helpers import environment

REFERENCES = Path(__file__).resolve().parent / "references"


def report(what, value, target, detail=""):
    print(f"{what:<66} {value:>9} {target:>10}  {detail}", flush=True)


def seconds(work):
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def user_environment():
    """What a user's shell has.

    No launcher's variables and no thread settings, neither the caller's nor ours.
    """
    return {
        name: value
        for name, value in environment().items()
        if not name.startswith(("OMP_", "GOMP_", "KMP_", "MKL_"))
    }


class Reference:
    """The other side of a row: a script of tests/references as a process; a call is one round
    there, and returns its seconds.

    It must neither share this process's threads nor their settings, which `import utils` has made.
    """

    def __init__(self, script, **options):
        self.script = script
        self.process = subprocess.Popen(
            [sys.executable, str(REFERENCES / script), json.dumps(options)],
            env=user_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self):
        print(file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.script} ended with {self.process.wait()}")
        return float(answer)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.stdin.close()
        self.process.wait()


def by_turns(*sides, rounds=7):
    """[(seconds of each side)] of `rounds` rounds.

    Each side is called in turn and returns its seconds; one more warms up.
    """
    return [tuple(side() for side in sides) for _ in range(rounds + 1)][1:]


def pairs(ours, theirs, rounds=7):
    """(median of theirs/ours, our median seconds, theirs)."""
    times = by_turns(ours, theirs, rounds=rounds)
    return statistics.median(b / a for a, b in times), *(
        statistics.median(column) for column in zip(*times)
    )


def photos(folder, number, width, height, grain=12):
    """Synthetic photos with detail at every scale.

    The grain of a camera's sensor costs a JPEG most of its bytes.
    """
    rng, paths = np.random.default_rng(0), []
    for i in range(number):
        total = np.zeros((height, width, 3), np.float32)
        for cells in (4, 8, 16, 32, 64, 128, 256):
            noise = rng.normal(size=(cells, cells, 3)).astype(np.float32)
            for c in range(3):
                total[..., c] += np.asarray(
                    Image.fromarray(noise[..., c]).resize((width, height), 3)
                ) * (60 / cells**0.5)
        total = (
            total * 0.6
            + total.mean(2, keepdims=True) * 0.4
            + rng.normal(size=(height, width, 1)) * grain
        )
        paths.append(f"{folder}/{width}_{grain}_{i}.jpg")
        Image.fromarray((128 + total).clip(0, 255).astype(np.uint8)).save(paths[-1], quality=90)
    return paths
