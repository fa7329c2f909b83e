"""Whole trainings as their users run them.

Each a process in a user's environment; kept in a file, and tabulated.
"""

import hashlib
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import time
from pathlib import Path

from tests.bench_tools import user_environment
from tests.helpers import ROOT, history, runs


def timed(command, folder):
    """(wall seconds from the process's start to its end, its standard output).

    SystemExit with its last words if it fails.
    """
    begin = time.perf_counter()
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env=user_environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    wall = time.perf_counter() - begin
    if done.returncode:
        raise SystemExit(
            f"{' '.join(map(str, command))} ended with "
            f"{done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}"
        )
    return wall, done.stdout


def checkout(folder, revision=None):
    """train.py, nets/ and utils/ in a new folder.

    As they are here, or at a revision. Returns the folder.
    """
    folder = Path(folder)
    folder.mkdir()
    if revision is None:
        for part in ("nets", "utils"):
            shutil.copytree(
                ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__")
            )
        shutil.copy(ROOT / "train.py", folder)
    else:
        packed = subprocess.run(
            ["git", "archive", revision, "train.py", "nets", "utils"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            check=True,
        )
        tarfile.open(fileobj=io.BytesIO(packed.stdout)).extractall(folder, filter="data")
    return folder


def digest(*paths):
    """Ten letters that change with the Python files.

    Results of other code must not be taken for this one's.
    """
    files = sorted(
        file
        for path in map(Path, paths)
        for file in ([path] if path.is_file() else path.rglob("*.py"))
    )
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:10]


def train(project, **settings):
    """Run the project's train.py with settings on its command line.

    The figures of its history, and its wall time.
    """
    words = [word for name, value in settings.items() for word in (f"--{name}", value)]
    wall, _ = timed([sys.executable, "train.py", *words], project)
    rows = history(runs(project)[-1])
    return {
        "top1": rows[-1]["top1"],
        "best_top1": max(row["top1"] for row in rows),
        "wall": wall,
        "images_per_second": statistics.harmonic_mean([row["images_per_second"] for row in rows]),
    }


def assignments(words):
    """['name=value', …] → {name: value}, settings for train.py's command line."""
    return dict(word.split("=", 1) for word in words)


class Results:
    """Finished runs, each a dictionary of what identifies it and of its figures, in a JSON file if
    `path` names one.
    """

    def __init__(self, path=None):
        self.path, self.runs = Path(path).resolve() if path else None, []
        if self.path:
            self.path.parent.mkdir(
                parents=True, exist_ok=True
            )  # said now rather than after the first run
            self.runs = json.loads(self.path.read_text()) if self.path.exists() else []

    def once(self, key, work):
        """The run that `key` identifies.

        From the file, or else work()'s figures, kept and printed at once.
        """
        run = next((run for run in self.runs if key.items() <= run.items()), None)
        if run is None:
            run = {**key, **work()}
            self.runs.append(run)
            if self.path:
                draft = self.path.with_suffix(".part")
                draft.write_text("[" + ",\n".join(map(json.dumps, self.runs)) + "]\n")
                os.replace(draft, self.path)
        print(
            f"{key['part']}, {key['system']}, {key['epochs']} epochs, seed {key['seed']}: top-1 "
            f"{run['top1']:.2%} "
            f"(best epoch {run['best_top1']:.2%}), {run['wall']:.1f} s, "
            f"{run['images_per_second']:.0f} pictures/s",
            flush=True,
        )
        return run


def spread(values, digits):
    """'mean (lowest to highest)'."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ({low} to {high})"


def print_table(done):
    """Markdown: a row for each system and number of epochs of these runs, mean and range over the
    seeds.
    """
    print(
        "\n| system | epochs | seeds | top-1 %, last epoch | top-1 %, best epoch | wall time, s "
        "| training pictures/s |"
    )
    print("|---" * 7 + "|")
    for part, epochs, system in dict.fromkeys(
        (run["part"], run["epochs"], run["system"]) for run in done
    ):
        rows = [
            run
            for run in done
            if (run["part"], run["epochs"], run["system"]) == (part, epochs, system)
        ]
        columns = [
            spread([factor * row[name] for row in rows], digits)
            for name, factor, digits in (
                ("top1", 100, 2),
                ("best_top1", 100, 2),
                ("wall", 1, 1),
                ("images_per_second", 1, 0),
            )
        ]
        print(f"| {system} | {epochs} | {len(rows)} | " + " | ".join(columns) + " |")
