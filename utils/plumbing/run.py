"""A run is a folder: which one to continue, how a new one is made, and its config.json."""

import json
import os
import platform
import time
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path

import numpy
import PIL
import torch
import torchvision

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from utils.checkpoint import LAST
from utils.optimizer import phases
from utils.plumbing import processes
from utils.plumbing.console import say, say_row
from utils.plumbing.errors import UserError, printable, short_repr
from utils.plumbing.files import check_regular, clear_drafts, load_tensors, save_text, writable
from utils.plumbing.processes import world_size


def read_config(run):
    """A run's config.json: a dictionary with at least settings, class_names, finished, start. UserError for any other."""
    path = Path(run, "config.json")
    try:
        check_regular(path, "config.json")
        config = {
            "start": 0,
            **json.loads(path.read_text(encoding="utf-8")),
        }  # 0: of before starts were counted
        kinds = {"settings": dict, "class_names": list, "finished": bool, "start": int}
        if not all(type(config[key]) is kind for key, kind in kinds.items()) or {
            *map(type, config["class_names"])
        } != {str}:
            raise ValueError("settings, class_names, finished or start are of another kind")
        return config
    except (OSError, ValueError, RecursionError, LookupError, TypeError) as error:
        raise UserError(f"{str(run)!r} is not a run's folder: {printable(error)[:200]}") from None


def write_config(run, config):
    save_text(
        Path(run, "config.json"),
        json.dumps(config, indent=1, ensure_ascii=False, default=str) + "\n",
    )


def load_checkpoint(run):
    """A run's checkpoint; None when it never wrote one; UserError when it cannot be read."""
    path = Path(run, LAST)
    if not path.exists():
        return None
    try:
        state = load_tensors(path, "resume", check_sums=True)
        kinds = {
            "epoch": int,
            "step": int,
            "model": dict,
            "optimizer": dict,
            "history": dict,
            "order": str,
            "scored_on": str,
        }
        if not all(isinstance(state.get(name), kind) for name, kind in kinds.items()):
            raise UserError(
                f"resume: {str(path)!r} is no checkpoint of this version of the program"
            )
        return state
    except UserError as error:
        raise UserError(
            f"{error}: start anew with resume = False, perhaps from model_path = "
            f"{str(Path(run, 'last_epoch_weights.pth'))!r}"
        ) from None


def runs_in(save_dir, damaged=False):
    """[(its config, its folder)] of the runs in a folder, the one that was begun or continued last first."""
    found = []
    for path in Path(save_dir).glob("*/config.json"):
        try:
            found.append((read_config(path.parent), str(path.parent)))
        except UserError as error:
            if (
                not damaged and Path(path.parent, LAST).exists()
            ):  # else another program's config.json
                raise UserError(
                    f"{error}. It may be the newest run: name the run to continue with resume = '…', or move "
                    f"{str(path.parent)!r} away"
                ) from None
    return sorted(found, key=lambda run: run[0]["start"], reverse=True)


def lock(run, seconds=0):
    """Take the run for this process's life; UserError when another one still trains it after so many seconds."""
    try:
        number = os.open(
            Path(run, ".lock"), os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666
        )
    except OSError as error:  # it may be another user's run
        raise UserError(
            f"{run} cannot be trained: its file .lock cannot be opened ({error.strerror})"
        ) from None
    end = time.monotonic() + seconds
    while fcntl:
        try:
            return fcntl.lockf(
                number, fcntl.LOCK_EX | fcntl.LOCK_NB
            )  # the file stays open, as closing it would end the lock
        except OSError as error:
            if not isinstance(
                error, (BlockingIOError, PermissionError)
            ):  # a file system without locks
                return None
        if time.monotonic() >= end:
            raise UserError(
                f"{run} is being trained by another process, and cannot be continued before that has ended "
                f"(resume = False begins a new run)"
            )
        time.sleep(0.5)


def find_run(resume, save_dir):
    """The folder of the run to continue, locked, or None for a new one."""
    again = (
        int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        or os.environ.get("TORCHELASTIC_RUN_ID", "none") != "none"
    )
    if isinstance(resume, str):
        found = [
            str(Path(save_dir, resume))
            if not os.path.exists(resume) and Path(save_dir, resume).exists()
            else resume
        ]
        read_config(found[0])
    else:  # a group that torchrun has started anew, or that has torchrun's --rdzv_id, continues its own
        found = (
            [
                run
                for config, run in runs_in(save_dir)
                if not config["finished"]
                and (resume or config.get("launch") == processes.launch_id)
            ]
            if resume or again
            else []
        )
    empty = None  # a start that ended before it had saved anything: its folder will do when nothing else is there
    for run in found:
        lock(run, seconds=30 if again else 0)
        if again or resume is not True or Path(run, LAST).exists():
            return run
        empty = empty or run
    if resume and not empty:
        say(f"resume = True: there is no unfinished run in {save_dir!r}, starting a new one")
    return empty


def new_run(save_dir):
    """Make, lock and return save_dir/<start time>, a folder that nobody else has."""
    folder = writable(save_dir, "name another folder with save_dir = …")
    while True:
        run = Path(folder, time.strftime("%Y_%m_%d_%H_%M_%S"))
        with suppress(FileExistsError):
            run.mkdir()
            lock(run)
            return str(run)
        time.sleep(0.1)  # another run has begun in this second


def continued_run(resume, save_dir, settings, class_names):
    """(folder, checkpoint or None) of the run that is to go on, or (None, None); what has changed in it is said."""
    run = find_run(resume, save_dir)
    if run is None:
        return None, None
    config, state, last = read_config(run), load_checkpoint(run), settings["UnFreeze_Epoch"]
    old = config["settings"]
    if state:
        check_same(
            run,
            {**old, "ema_decay": bool(state["ema"])},
            {**settings, "ema_decay": bool(settings.get("ema_decay"))},
            config["class_names"],
            class_names,
        )
    if settings["fp16"] == "auto" and old.get("Cuda") == settings["Cuda"]:
        settings["fp16"] = old.get("fp16", "auto")
    done = state["epoch"] + bool(state["step"]) if state else 0
    if done > last or config["finished"] and (done == last or state is None):
        so_far = "finished" if config["finished"] else f"trained {done} epochs"
        raise UserError(f"{run} has {so_far}: raise UnFreeze_Epoch (now {last}) to train on")
    clear_drafts(run)
    place = f"epoch {state['epoch'] + 1}, step {state['step'] + 1}" if state else "its beginning"
    changed = [
        f"{name}: {short_repr(old[name])} → {short_repr(value)}"
        for name, value in json.loads(json.dumps(settings)).items()
        if name in old and old[name] != value and name not in ("resume", "Init_Epoch")
    ]
    say(f"continuing {run} at {place}" + "".join(f"\n  changed since: {c}" for c in changed))
    return run, state


def check_same(run, old, new, was, now):
    """UserError where a checkpoint cannot go on, as settings (old, new) or class names (was, now) are others."""
    pairs = [
        (name, old.get(name, new[name]), new[name])
        for name in ("backbone", "optimizer_type", "ema_decay")
    ]
    pairs += [(f"class {number}", *names) for number, names in enumerate(zip_longest(was, now))]
    others = [
        f"{name} was {short_repr(before)} and is now {short_repr(after)}"
        for name, before, after in pairs
        if before != after
    ]
    if others:
        raise UserError(f"{run} cannot be continued: {others[0]} (give what it was started with)")


def print_header(s, facts):
    """Print what is about to be trained: `facts`, then rows of the settings s."""
    epochs = f"{s.get('Init_Epoch', 0)} to {s['UnFreeze_Epoch']}"
    if s.get("Freeze_Train"):
        epochs += f", frozen to {s['Freeze_Epoch']}"
    sizes = ", then ".join(str(s[name]) for name in phases(s))
    rows = {
        **facts,
        "input_shape": s["input_shape"],
        "epochs": epochs,
        "num_workers": s.get("num_workers", 0),
        "batch_size": f"{sizes} over {world_size()} processes, {s.get('accumulate', 1)} to a step",
    }
    for name, value in rows.items():
        say_row(name, value)


def begin_run(run, s, class_names):
    """Print the run's folder; write and return what its config.json holds."""
    say_row("run", run)
    versions = {
        "python": platform.python_version(),
        **{m.__name__: m.__version__ for m in (torch, torchvision, numpy, PIL)},
    }
    # clocks and names do not tell which run is the newest: each start counts on
    number = 1 + max(
        (config["start"] for config, _ in runs_in(Path(run).parent, damaged=True)), default=0
    )
    config = {
        "settings": s,
        "class_names": class_names,
        "launch": processes.launch_id,
        "start": number,
        "finished": False,
        "versions": versions,
    }
    write_config(run, config)
    return config
