"""Fashion-MNIST (Debian's package dataset-fashion-mnist) as a yardstick: this project against other
trainers.

    python -m tests.benchmark fashion --epochs 3 10 --seeds 1 2 --json fashion.json
    python -m tests.benchmark fashion94

Every system trains in a process of its own, in a user's environment, on the same pictures in
folders: resnet18 from scratch, float32, the same size, batch and epochs. Each is judged on all test
pictures after every epoch. A result that stands in the JSON file already is not measured again.
"""

import argparse
import gzip
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from tests.bench_runs import Results, assignments, checkout, digest, print_table, timed, train
from tests.bench_tools import REFERENCES, user_environment

SOURCE = "/usr/share/datasets/fashion-mnist"
CLASSES = (
    "t_shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle_boot",
)
REFERENCE = {  # system: (script, the package that it needs, further words)
    "torchvision": ("torchvision_trainer.py", "torchvision", ["--plain"]),
    "torchvision, crops": ("torchvision_trainer.py", "torchvision", []),
    "examples": ("examples_trainer.py", "torchvision", ["--plain"]),
    "timm": ("timm_trainer.py", "timm", []),
    "timm, plain": ("timm_trainer.py", "timm", ["--plain"]),
    "ultralytics": ("ultralytics_trainer.py", "ultralytics", []),
    "ultralytics, plain": ("ultralytics_trainer.py", "ultralytics", ["--plain"]),
}
OWN = {  # our network and sizes, where the others have resnet18's
    "ours": {},
    "ours, resnet9": {
        "backbone": "resnet9",
        "input_shape": "[28, 28]",
        "Unfreeze_batch_size": 64,
        "fp16": "auto",
    },
}
SYSTEMS = (*OWN, *REFERENCE)
USUAL = [system for system in SYSTEMS if system != "torchvision, crops"]

# 94 % on the whole of Fashion-MNIST
FASHION94 = {
    "backbone": "resnet9_wide",
    "input_shape": "[28, 28]",
    "Unfreeze_batch_size": 128,
    "UnFreeze_Epoch": 14,
    "lr_decay_type": "cos",
    "label_smoothing": 0.1,
    "random_erasing": 0.25,
}
MINUTES, TOP1 = 30, 0.94


def read_idx(path):
    """The uint8 array of an IDX file.

    Two zeros, a type, the number of sides, each side as a big-endian int32, the bytes.
    """
    data = gzip.decompress(Path(path).read_bytes())
    sides = np.frombuffer(data, ">i4", data[3], 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(sides)


def write_pictures(folder, per_class, classes=CLASSES, source=SOURCE, test_per_class=None):
    """folder/train/<class>/*.png, the first `per_class` of each of these classes, and
    folder/test/…, None: all of theirs.
    """
    if not Path(source).is_dir():
        raise SystemExit(
            f"{source} is absent: install Debian's package dataset-fashion-mnist, or give --source"
        )
    for split, name, number in (("train", "train", per_class), ("test", "t10k", test_per_class)):
        images, labels = (
            read_idx(Path(source, f"{name}-{kind}-ubyte.gz"))
            for kind in ("images-idx3", "labels-idx1")
        )
        for class_name in classes:
            place = Path(folder, split, class_name)
            place.mkdir(parents=True)
            for i in np.flatnonzero(labels == CLASSES.index(class_name))[:number]:
                Image.fromarray(images[i]).save(place / f"{i:05d}.png", compress_level=1)
    return Path(folder)


def write_lists(project, pictures, name="cls"):
    """Our lists of these pictures, by our own command; the three settings that name them."""
    paths = {
        f"{kind}_path"
        if kind == "classes"
        else f"{kind}_annotation_path": f"model_data/{name}_{kind}.txt"
        for kind in ("classes", "train", "test")
    }
    timed(
        [
            sys.executable,
            "-m",
            "utils.annotation",
            pictures.resolve(),
            "--out",
            f"model_data/{name}",
        ],
        project,
    )
    return paths


def common_parser(part, **defaults):
    parser = argparse.ArgumentParser(prog=f"python -m tests.benchmark {part}")
    parser.add_argument("--seeds", type=int, nargs="+", default=defaults.pop("seeds"))
    parser.add_argument(
        "--json", help="keep every finished run in this file, and go on where it ends"
    )
    parser.add_argument("--source", default=SOURCE, help="folder of Fashion-MNIST's four files")
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    return parser


def installed(python, package):
    script = f"import importlib.util as u; raise SystemExit(u.find_spec({package!r}) is None)"
    return subprocess.run([python, "-c", script], env=user_environment()).returncode == 0


def reference(python, system, pictures, epochs, seed, batch, size):
    script, _, words = REFERENCE[system]
    wall, output = timed(
        [
            python,
            REFERENCES / script,
            pictures,
            "--epochs",
            epochs,
            "--seed",
            seed,
            "--batch",
            batch,
            "--size",
            size,
            *words,
        ],
        pictures,
    )
    figures = json.loads(output.strip().splitlines()[-1])
    return {"wall": wall, **figures}


def main(words):
    parser = common_parser("fashion", seeds=[1, 2], per_class=1000, batch=128, size=32)
    parser.add_argument("--epochs", type=int, nargs="+", default=[3, 10])
    parser.add_argument(
        "--systems",
        nargs="+",
        choices=SYSTEMS,
        default=USUAL,
        metavar="SYSTEM",
        help=f"of {', '.join(map(repr, SYSTEMS))}",
    )
    parser.add_argument(
        "--python", default=sys.executable, help="the interpreter that has timm and ultralytics"
    )
    args = parser.parse_args(words)
    lacking = [
        s for s in args.systems if s in REFERENCE and not installed(args.python, REFERENCE[s][1])
    ]
    for system in lacking:
        print(f"{system}: not installed ({REFERENCE[system][1]})")
    results, done = Results(args.json), []
    with tempfile.TemporaryDirectory() as folder:
        pictures = write_pictures(Path(folder, "pictures"), args.per_class, source=args.source)
        project = checkout(Path(folder, "project"))
        write_lists(project, pictures)
        for epochs in args.epochs:
            for seed in args.seeds:
                for system in (s for s in args.systems if s not in lacking):
                    equal = {
                        "backbone": "resnet18",
                        "input_shape": f"[{args.size}, {args.size}]",
                        "fp16": False,
                        "Unfreeze_batch_size": args.batch,
                        "UnFreeze_Epoch": epochs,
                        "seed": seed,
                    }
                    if system in REFERENCE:
                        code = digest(REFERENCES / REFERENCE[system][0], REFERENCES / "shared.py")
                        work = lambda: reference(
                            args.python, system, pictures, epochs, seed, args.batch, args.size
                        )  # noqa: E731
                    else:
                        code = digest(project)
                        work = lambda: train(project, **{**equal, **OWN[system]})  # noqa: E731
                    key = {
                        "part": "fashion",
                        "system": system,
                        "epochs": epochs,
                        "seed": seed,
                        "per_class": args.per_class,
                        "batch": args.batch,
                        "size": args.size,
                        "code": code,
                    }
                    done.append(results.once(key, work))
    print_table(done)


def fashion94(words):
    parser = common_parser("fashion94", seeds=[1], per_class=6000)
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE", help="other settings of train.py"
    )
    args = parser.parse_args(words)
    results, done, settings = Results(args.json), [], {**FASHION94, **assignments(args.set)}
    print(
        "python train.py " + " ".join(f'--{name} "{value}"' for name, value in settings.items()),
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        pictures = write_pictures(Path(folder, "pictures"), args.per_class, source=args.source)
        project = checkout(Path(folder, "project"))
        write_lists(project, pictures)
        for seed in args.seeds:
            key = {
                "part": "fashion94",
                "system": json.dumps(settings),
                "epochs": settings["UnFreeze_Epoch"],
                "seed": seed,
                "per_class": args.per_class,
                "code": digest(project),
            }
            done.append(results.once(key, lambda: train(project, **{**settings, "seed": seed})))
    print_table(done)
    reached = all(run["top1"] >= TOP1 and run["wall"] <= 60 * MINUTES for run in done)
    print(
        f"{'reached' if reached else 'NOT reached'}: top-1 of at least {TOP1:.0%} after the "
        f"last epoch, within {MINUTES} minutes"
    )
    raise SystemExit(not reached)
