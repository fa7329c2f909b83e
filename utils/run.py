"""A run is a folder: which one to continue, how a new one is made, and its config.json."""
import json
import os
import platform
import time
from contextlib import suppress
from itertools import count
from pathlib import Path

import numpy
import PIL
import torch
import torchvision

from utils import files, processes
from utils.checkpoint import BEFORE, LAST
from utils.errors import UserError, plain, shown
from utils.files import check_regular, clear_drafts, load_tensors, save_text, writable
from utils.lists import difference
from utils.processes import say, world_size
from utils.scheduler import NBS, fit_lr, phases


def read_config(run):
    """A run's config.json: a dictionary with at least settings, class_names, finished, start. UserError for any other."""
    path = Path(run, "config.json")
    try:
        check_regular(path, "config.json")
        config = json.loads(path.read_text(encoding="utf-8"))
    except UserError as error:
        raise UserError(f"{str(run)!r} is not a run's folder: {error}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{str(path)!r} cannot be read: {plain(error)[:200]}") from None
    for key, kind in (("settings", dict), ("class_names", list), ("finished", bool)):
        if not isinstance(config, dict) or not isinstance(config.get(key), kind):
            raise UserError(f"{str(path)!r} is not of a run: {key!r} is missing, or no {kind.__name__}")
    if not config["class_names"] or not all(isinstance(name, str) for name in config["class_names"]):
        raise UserError(f"{str(path)!r} is not of a run: 'class_names' must be names")
    if type(config.get("start")) is not int:  # of a run from before starts were counted
        config["start"] = 0
    return config


def write_config(run, config):
    save_text(Path(run, "config.json"), json.dumps(config, indent=1, ensure_ascii=False, default=str) + "\n")


def checkpoints(run):
    """The paths of a run's checkpoints, the newest first; none when it has saved nothing yet."""
    return [path for path in (Path(run, LAST), Path(run, BEFORE)) if path.exists()]


def load_checkpoint(run):
    """The newest sound checkpoint of a run; None when it never wrote one; UserError when none can be read."""
    paths = checkpoints(run)
    for path in paths:
        try:
            state = load_tensors(path, "resume", check_sums=True)
            kinds = {"epoch": int, "step": int, "model": dict, "optimizer": dict, "history": dict, "order": str, "scored_on": str}
            if not all(isinstance(state.get(name), kind) for name, kind in kinds.items()):
                raise UserError(f"resume: {str(path)!r} is no checkpoint of this version of the program")
            return state
        except UserError as error:
            say(f"WARNING: {error}; trying the checkpoint before it")
    if paths:
        raise UserError(f"{run} has no readable checkpoint left: start anew with resume = False, "
                        f"perhaps from model_path = {str(Path(run, 'last_epoch_weights.pth'))!r}")
    return None


def runs_in(save_dir):
    """[(its config, its folder)] of the runs in a folder, the one that was begun or continued last first.

    Each start counts one up from the highest number that a run there has recorded: clocks and names do not tell.
    """
    found = []
    for path in Path(save_dir).glob("*/config.json"):
        try:
            found.append((read_config(path.parent), str(path.parent)))
        except UserError as error:
            if checkpoints(path.parent):  # else another program's config.json
                raise UserError(f"{error}. It may be the newest run: name the run to continue with resume = '…', or move "
                                f"{str(path.parent)!r} away") from None
    return sorted(found, key=lambda run: run[0]["start"], reverse=True)


def lock(run, seconds=0):
    """Take the run for this process's life; False when another one still trains it after so many seconds.

    The file stays open, as closing it would give the lock back.
    UserError when the lock's file cannot be opened: it may be another user's run.
    """
    try:
        number = os.open(Path(run, ".lock"), os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    except OSError as error:
        raise UserError(f"{run} cannot be trained: its file .lock cannot be opened ({error.strerror})") from None
    end = time.monotonic() + seconds
    while not files.lock(number, "lockf"):
        if time.monotonic() >= end:
            return False
        time.sleep(0.5)
    return True


def has_more(config, settings):
    """Whether a run has epochs left to train: one that early_stop has ended goes on when early_stop says so no longer."""
    stopped = config.get("stopped_after", 0)  # epochs without a better one
    return not config["finished"] or stopped and not 0 < settings.get("early_stop", 0) <= stopped


def find_run(resume, save_dir, settings):
    """The folder of the run to continue, locked, or None for a new one."""
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) or os.environ.get("TORCHELASTIC_RUN_ID", "none") != "none"
    if isinstance(resume, str):
        found = [str(Path(save_dir, resume)) if not os.path.exists(resume) and Path(save_dir, resume).exists() else resume]
        read_config(found[0])
    else:  # a group that torchrun has started anew, or that has torchrun's --rdzv_id, continues its own
        pairs = [(config["start"], run) for config, run in runs_in(save_dir) if has_more(config, settings)
                 and (resume or config.get("launch") == processes.launch_id)] if resume or again else []
        if len(pairs) > 1 and pairs[0][0] == pairs[1][0]:
            raise UserError(f"{pairs[0][1]} and {pairs[1][1]} are of the same start, one may be a copy: name the one to continue "
                            f"with resume = '…'")
        found = [run for _, run in pairs]
    empty = None  # a start that ended before it had saved anything: its folder will do when nothing else is there
    for run in found:
        if not lock(run, seconds=30 if again else 0):
            raise UserError(f"{run} is being trained by another process, and cannot be continued before that has ended"
                            + (": set resume = False for a new run" if resume is True else ""))
        if again or resume is not True or checkpoints(run):
            return run
        empty = empty or run
    if resume and not empty:
        say(f"resume = True: there is no unfinished run in {save_dir!r}, starting a new one")
    return empty


def new_run(save_dir):
    """Make, lock and return save_dir/<start time>, a folder that nobody else has."""
    folder, start = writable(save_dir, "name another folder with save_dir = …"), time.strftime("%Y_%m_%d_%H_%M_%S")
    for attempt in count():
        run = Path(folder, start + (f"_{attempt}" if attempt else ""))
        with suppress(FileExistsError):
            run.mkdir()
            lock(run)
            return str(run)


def continued_run(resume, save_dir, settings, class_names):
    """(folder, checkpoint or None) of the run that is to go on, or (None, None); says what has changed in it.

    Its precision is kept where fp16 is 'auto'. UserError for another network, optimizer or class list, or a finished run.
    """
    run = find_run(resume, save_dir, settings)
    if run is None:
        return None, None
    config = read_config(run)
    old, was = config["settings"], config["class_names"]
    others = [f"{name} was {shown(old[name])} and is now {shown(settings[name])}" for name in ("backbone", "optimizer_type")
              if old.get(name, settings[name]) != settings[name]]
    others += filter(None, [difference(was, class_names, "the run", "the class list")])
    others += [f"it has {len(was)} classes, the class list {len(class_names)}"] if len(was) != len(class_names) else []
    if others and checkpoints(run):
        raise UserError(f"{run} cannot be continued: {others[0]} (give the settings that it was started with)")
    if settings["fp16"] == "auto" and old.get("Cuda") == settings["Cuda"]:
        settings["fp16"] = old.get("fp16", "auto")
    state, last = load_checkpoint(run), settings["UnFreeze_Epoch"]
    done = state["epoch"] + bool(state["step"]) if state else 0
    if done > last or config["finished"] and (done >= last or state is None):
        so_far = "finished" if config["finished"] else f"trained {done} epochs"
        raise UserError(f"{run} has {so_far}: raise UnFreeze_Epoch (now {last}) to train on")
    if config["finished"] and config.get("stopped_after") and not has_more(config, settings):
        raise UserError(f"{run} has finished, as early_stop = {settings['early_stop']} ended it: set early_stop = 0 to train on")
    clear_drafts(run)
    place = f"epoch {state['epoch'] + 1}, step {state['step'] + 1}" if state else "its beginning"
    changed = [f"{name}: {shown(old[name])} → {shown(value)}" for name, value in json.loads(json.dumps(settings)).items()
               if name in old and old[name] != value and name != "resume"]
    say(f"continuing {run} at {place}" + "".join(f"\n  changed since: {c}" for c in changed))
    return run, state


def describe_rates(s, transformer):
    """For the header: the optimizer, each phase's highest and lowest rate as they train, and what limits have changed."""
    told = []
    for name in phases(s):
        batch_size = s[name] * s.get("accumulate", 1)
        asked = tuple(batch_size / NBS[transformer] * s[rate] for rate in ("Init_lr", "Min_lr"))
        fitted = fit_lr(batch_size, s["Init_lr"], s["Min_lr"], s["optimizer_type"], transformer)
        limits = " (Init_lr and Min_lr ask for {:.3g} to {:.3g}; the limits stand in utils/recipe.py)".format(*asked)
        told.append(f"lr {fitted[0]:.3g} to {fitted[1]:.3g}" + limits * (fitted != asked))
    return f"{s['optimizer_type']}, {s['lr_decay_type']}, {', then '.join(dict.fromkeys(told))}"


def begin_run(run, settings, class_names, first_epoch, facts):
    """Print what is about to be trained, and write config.json, which makes the folder a run; returns what it holds.

    facts: {row of the header: text}, which come before the settings' own rows.
    """
    s = {**settings, "Init_Epoch": first_epoch}
    rows = {"run": run, **facts, "input_shape": s["input_shape"],
            "epochs": f"{first_epoch} to {s['UnFreeze_Epoch']}"
                      + (f", frozen to {s['Freeze_Epoch']}" if s.get("Freeze_Train") else ""),
            "batch_size": f"{', then '.join(str(s[name]) for name in phases(s))} over {world_size()} processes, "
                          f"{s.get('accumulate', 1)} to a step"}
    say("\n".join(f"  {name:<{max(map(len, rows))}}  {value}" for name, value in rows.items()))
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__,
                "torchvision": torchvision.__version__, "pillow": PIL.__version__}
    number = 1 + max((config["start"] for config, _ in runs_in(Path(run).parent)), default=0)
    config = {"settings": settings, "class_names": class_names, "launch": processes.launch_id, "start": number, "finished": False,
              "versions": versions}
    write_config(run, config)
    return config
