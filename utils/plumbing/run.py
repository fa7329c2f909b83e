"""A run is a folder: its config.json, its lock, which one to continue, how a new one is made."""

import json
import os
import platform
import time
from contextlib import suppress
from pathlib import Path

import numpy
import PIL
import torch
import torchvision

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

from utils.optimizer import batch_size_names
from utils.plumbing import processes
from utils.plumbing.console import say, say_if_slow, say_row, shell_words
from utils.plumbing.errors import UserError, printable
from utils.plumbing.files import as_json, check_regular, make_folder, save_text
from utils.plumbing.lists import AnnotationLines, clean_names
from utils.plumbing.processes import world_size

KINDS = {  # what config.json must hold
    "settings": dict,
    "constants": dict,
    "words": dict,
    "class_names": list,
    "finished": bool,
    "start": int,
}
HIGHEST_START = 10**9  # nobody starts as often
MISSING = {"start": 0, "constants": {}, "words": {}}  # in older runs, which lack them


def read_config(run):
    """Return a run's config.json, with at least the names in KINDS. UserError for any other."""
    path = Path(run, "config.json")
    try:
        check_regular(path, "config.json")
        config = {**MISSING, **json.loads(path.read_text(encoding="utf-8"))}
        for name, kind in KINDS.items():
            if type(config[name]) is not kind:
                raise ValueError(f"{name} is no {kind.__name__}")
        if not 0 <= config["start"] <= HIGHEST_START:
            raise ValueError("start is out of range")
        clean_names(config["class_names"], "class_names")
    except (OSError, ValueError, RecursionError, LookupError, TypeError) as error:
        reason = f"{printable(error)[:200]}{newest_hint(run)}"
        raise UserError(f"{str(run)!r} is not a run's folder: {reason}") from None
    return config


def find_folder(run, places):
    """Return a run's folder: its path, or that of its name in one of some places."""
    for place in places:
        if os.path.exists(Path(place, run)):
            return Path(place, run)
    return run


def newest_hint(run):
    """Return '; the newest run is …' for a folder that is no run but stands beside some, or ''."""
    # also a link to nowhere, which runs_in finds from Python 3.13 on
    if os.path.lexists(Path(run, "config.json")):
        return ""
    for folder in (Path(run).parent, Path("logs")):
        runs = runs_in(folder)
        if runs:
            return f"; the newest run in {str(folder)!r} is {runs[0][1]!r}"
    return ""


def write_config(run, config):
    """Write a run's config.json."""
    text = json.dumps(as_json(config), indent=1, ensure_ascii=False)
    save_text(Path(run, "config.json"), text + "\n")


def runs_in(save_dir):
    """Return [(config, folder)] of the runs in a folder, the one that was started last first.

    A config.json that cannot be read is another program's, and passed over.
    """
    runs = []
    found = Path(save_dir).glob("*/config.json") if os.path.isdir(save_dir) else ()
    for path in found:
        run = str(path.parent)
        with suppress(UserError):
            runs.append((read_config(run), run))
    return sorted(runs, key=start_number, reverse=True)


def start_number(run):
    """Return the number of the last start that a run recorded; clocks and names can be wrong."""
    config, _ = run
    return config["start"]


def release(run):
    """Let go of a run that this process holds."""
    number = processes.held_runs.pop(os.path.realpath(run), None)
    if number is not None:
        os.close(number)


def lock(run, seconds=0):
    """Hold the run while this process lives, or until it is released.

    UserError where another one holds it after `seconds`.
    """
    release(run)  # on Windows this process, too, is another one
    try:
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        number = os.open(Path(run, ".lock"), flags, 0o666)
    except OSError as error:  # it may be another user's run
        raise UserError(
            f"{run} cannot be trained: its file .lock cannot be opened ({error.strerror})"
        ) from None
    end = time.monotonic() + seconds
    with say_if_slow(f"waiting up to {seconds} s for the process that trains {run} …"):
        while not is_locked_now(number):
            if time.monotonic() >= end:
                raise UserError(
                    f"{run} is being trained by another process, and cannot be continued before "
                    f"that has ended (resume = False begins a new run; if its machine has died, "
                    f"remove {run}/.lock)"
                )
            time.sleep(0.5)
    processes.held_runs[os.path.realpath(run)] = number


def is_locked_now(number):
    """Lock an open file, and return whether that was possible. Closing it would end the lock."""
    try:
        if fcntl:
            fcntl.lockf(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            msvcrt.locking(number, msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # a file system without locks
        return True
    return True


def find_run(resume, save_dir):
    """Return the folder of the run to continue, locked, or None for a new one."""
    launched = "TORCHELASTIC_RUN_ID" in os.environ  # perhaps again: torchrun does not always say
    seconds = 30 if launched else 0  # in which the processes of before it end
    if isinstance(resume, str):
        run = str(find_folder(resume, ("", save_dir)))
        read_config(run)
        lock(run, seconds)
        return run
    runs = runs_in(save_dir) if launched or resume else []
    for config, run in runs if launched else []:
        if config.get("launch") == processes.launch_id:
            if config["finished"]:
                raise UserError(
                    f"{run} of this launch has finished: {shell_words(['--resume', run])} "
                    f"--UnFreeze_Epoch … trains on (--early_stop 0 after an early stop), another "
                    f"--rdzv_id begins a new run"
                )
            lock(run, seconds)
            return run
    return find_unfinished(runs, save_dir, seconds) if resume else None


def find_unfinished(runs, save_dir, seconds):
    """Return the newest unfinished one of runs_in(save_dir), locked, or None.

    One that has saved nothing is taken where there is no other.
    """
    empty = None
    for config, run in runs:
        if config["finished"]:
            continue
        if not os.access(run, os.W_OK):  # another user's
            say(f"resume = True: {run} is passed over, as you may not write there")
            continue
        lock(run, seconds)
        if trained_files(run):
            return run
        release(run)
        empty = empty or run
    if empty:
        lock(empty, seconds)
    else:
        say(f"resume = True: there is no unfinished run in {save_dir!r}, starting a new one")
    return empty


def trained_files(run):
    """Return the names of what was trained in a run: its history, weights and checkpoint."""
    paths = [*Path(run).glob("history.csv"), *Path(run).glob("[!.]*.pth")]
    return [path.name for path in paths]


def new_run(save_dir):
    """Make, lock and return save_dir/<start time>, a folder that nobody else has."""
    folder = make_folder(save_dir, "name another folder with save_dir = …")
    while True:
        run = Path(folder, time.strftime("%Y_%m_%d_%H_%M_%S"))
        with suppress(FileExistsError):
            run.mkdir()
            lock(run)
            return run.as_posix()  # on Windows as a constant can hold it, too
        time.sleep(0.1)  # another run has begun in this second


def begin_run(run, settings, class_names, recorded, val_data, before):
    """Print the run's folder; write and return what its config.json holds.

    recorded: what command_line returned beside the settings. before: the config.json of what goes
    on, or None. Of val_data the fingerprint of the first start's list is kept, which evaluate
    compares with.
    """
    say_row("run", run)
    is_list = isinstance(val_data.source, AnnotationLines)
    test_list = val_data.fingerprint["list"] if is_list else None
    modules = (torch, torchvision, numpy, PIL)
    versions = {module.__name__: module.__version__ for module in modules}
    others = runs_in(Path(run).parent)
    last = start_number(others[0]) if others else 0
    config = {
        "settings": settings,
        **recorded,
        "class_names": class_names,
        "test_list": before.get("test_list") if before else test_list,
        "launch": processes.launch_id,
        "start": min(last + 1, HIGHEST_START),
        "finished": False,
        "versions": {"python": platform.python_version(), **versions},
    }
    write_config(run, config)
    return config


def print_header(settings, facts):
    """Print what is about to be trained: `facts`, then how long and how large."""
    first = settings.get("Init_Epoch", 0) + 1
    epochs = f"{first} to {settings['UnFreeze_Epoch']}"
    if first > settings["UnFreeze_Epoch"]:
        epochs = f"all {settings['UnFreeze_Epoch']} are trained"
    if settings.get("Freeze_Train"):
        epochs += f", frozen to {settings['Freeze_Epoch']}"
    sizes = (
        ", then ".join(str(settings[name]) for name in batch_size_names(settings)) or "none is left"
    )
    if world_size() > 1:
        sizes += f" over {world_size()} processes"
    if settings.get("accumulate", 1) > 1:
        sizes += f", {settings['accumulate']} batches to a step"
    rows = {
        **facts,
        "input_shape": settings["input_shape"],
        "epochs": epochs,
        "num_workers": settings.get("num_workers", 0),
        "batch_size": sizes,
    }
    for name, value in rows.items():
        say_row(name, value)
