"""Whole trainings of this project against itself: recipes on and off, and the unedited job against
an older revision.

python -m tests.benchmark recipes --seeds 1 2 --json recipes.json
python -m tests.benchmark main --base REVISION --seeds 11 12 13
"""

import argparse
import tempfile
from pathlib import Path

from tests.bench_runs import Results, assignments, checkout, digest, print_table, train
from tests.fashion import CLASSES, common_parser, write_lists, write_pictures
from tests.helpers import runs

SCRATCH = {
    "augmentation": "trivial",
    "crop_scale": 0.5,
    "random_erasing": 0.1,
    "label_smoothing": 0.1,
    "mixup_alpha": 0.2,
    "cutmix_alpha": 1.0,
    "ema_decay": 0.99,
}
FINETUNE = {
    "Freeze_Train": True,
    "Freeze_Epoch": 5,
    "backbone_lr_scale": 0.3,
    "label_smoothing": 0.1,
}


def scratch(args, folder, project, once):
    """A recipe for training from scratch against the defaults, on a small part of Fashion-MNIST."""
    pictures = write_pictures(
        folder / "scratch", args.per_class, source=args.source, test_per_class=args.test_per_class
    )
    lists = write_lists(project, pictures, "scratch")
    block = {**SCRATCH, **assignments(args.set)}
    for seed in args.seeds:
        forced = {
            **lists,
            "backbone": "resnet18",
            "input_shape": f"[{args.size}, {args.size}]",
            "fp16": False,
            "seed": seed,
            "Unfreeze_batch_size": args.batch,
            "UnFreeze_Epoch": args.epochs,
        }
        for system, settings in (("defaults", {}), ("recipe from scratch", block)):
            once(system, args.epochs, seed, {**settings, **forced})


def finetune(args, folder, project, once):
    """Five classes of Fashion-MNIST to learn features from, then few pictures of the other five.

    A recipe, the same start with everything trained at the full rate, and no start at all.
    """
    first = write_lists(
        project,
        write_pictures(folder / "first", args.first_per_class, CLASSES[:5], args.source),
        "first",
    )
    few = write_lists(
        project,
        write_pictures(folder / "few", args.few, CLASSES[5:], args.source, args.test_per_class),
        "few",
    )
    same = {"backbone": "resnet18", "input_shape": f"[{args.size}, {args.size}]", "fp16": False}
    block = {**FINETUNE, **assignments(args.set)}
    for seed in args.seeds:
        weights = project / f"first_{seed}.pth"

        def start():
            if not weights.exists():
                train(
                    project,
                    **first,
                    **same,
                    seed=seed,
                    Unfreeze_batch_size=args.batch,
                    UnFreeze_Epoch=args.first_epochs,
                )
                (runs(project)[-1] / "last_epoch_weights.pth").rename(weights)

        forced = {
            **few,
            **same,
            "seed": seed,
            "UnFreeze_Epoch": args.few_epochs,
            "Freeze_batch_size": args.few_batch,
            "Unfreeze_batch_size": args.few_batch,
        }
        for system, settings in (
            ("from scratch", {}),
            ("everything at once", {"model_path": weights.name}),
            ("recipe for fine-tuning", {**block, "model_path": weights.name}),
        ):
            once(
                system,
                args.few_epochs,
                seed,
                {**settings, **forced},
                start if "model_path" in settings else None,
            )


def recipes(words):
    parser = common_parser(
        "recipes",
        seeds=[1, 2],
        size=32,
        per_class=200,
        test_per_class=300,
        epochs=40,
        batch=64,
        first_per_class=1000,
        first_epochs=8,
        few=20,
        few_epochs=30,
        few_batch=16,
    )
    parser.add_argument(
        "--which", nargs="+", choices=("scratch", "finetune"), default=["scratch", "finetune"]
    )
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="other settings in the recipes' rows",
    )
    args = parser.parse_args(words)
    results, done = Results(args.json), []
    with tempfile.TemporaryDirectory() as folder:
        project = checkout(Path(folder, "project"))
        code = digest(project)
        for which in args.which:
            data = (
                "test_per_class",
                *(
                    ("per_class",)
                    if which == "scratch"
                    else ("first_per_class", "first_epochs", "batch", "few")
                ),
            )

            def once(system, epochs, seed, settings, before=None):
                key = {
                    "part": which,
                    "system": system,
                    "epochs": epochs,
                    "seed": seed,
                    "code": code,
                    "settings": {name: str(value) for name, value in settings.items()},
                    **{name: vars(args)[name] for name in data},
                }
                done.append(
                    results.once(key, lambda: (before and before(), train(project, **settings))[1])
                )

            {"scratch": scratch, "finetune": finetune}[which](args, Path(folder), project, once)
    print_table(done)


def main_job(words):
    """The unedited train.py on the shapes that it draws, here and at an older revision, in turn."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmark main")
    parser.add_argument("--base", required=True, help="the revision to compare with")
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13])
    parser.add_argument(
        "--json", help="keep every finished run in this file, and go on where it ends"
    )
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="settings other than the unedited ones",
    )
    args = parser.parse_args(words)
    results, done = Results(args.json), []
    with tempfile.TemporaryDirectory() as folder:
        sides = {}
        for system, revision in ((args.base, args.base), ("here", None)):
            sides[system] = checkout(Path(folder, "base" if revision else "here"), revision)
            train(sides[system], UnFreeze_Epoch=1)  # draws the pictures, which no later run does
        for seed in args.seeds:
            for system, place in sides.items():
                key = {
                    "part": "main",
                    "system": system,
                    "epochs": "its own",
                    "seed": seed,
                    "set": " ".join(args.set),
                    "code": digest(place),
                }
                done.append(
                    results.once(
                        key, lambda: train(place, **{**assignments(args.set), "seed": seed})
                    )
                )
    print_table(done)
    ours, base = (
        [run["wall"] for run in done if run["system"] == system] for system in ("here", args.base)
    )
    print(
        f"\nwall time here against {args.base}: "
        + ", ".join(f"{a / b:.3f}" for a, b in zip(ours, base))
    )
