"""A run is a folder: which one to continue, how a new one is made, and its config.json."""
import json
import os
import platform
import socket
import time
from pathlib import Path

import numpy
import PIL
import torch
import torchvision

from utils.checkpoint import load_checkpoint, save_text
from utils.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
held = []  # the lock's file stays open, as closing it would give the lock back


def launch_id():
    """The same for all processes of one launch, also after torchrun has restarted them."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return run_id if run_id != "none" else f"{socket.gethostname()} {os.getppid()}"


def read_config(run):
    try:
        return json.loads(Path(run, "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{str(run)!r} is not a run's folder: it does not exist or has no config.json") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{Path(run, 'config.json')} cannot be read: {error}") from None


def write_config(run, config):
    save_text(Path(run, "config.json"), json.dumps(config, indent=1, ensure_ascii=False, default=str) + "\n")


def hold(run):
    """Take the run for this process's life; False while another one trains it. POSIX locks end with their process."""
    try:
        held.append(open(Path(run, ".lock"), "a"))
        if fcntl:
            fcntl.lockf(held[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"{run} is being trained by another process")
        return False
    except OSError:
        pass  # a file system without locks, or one that cannot be written, which saving will say
    return True


def find_run(resume, save_dir):
    """The folder of the run to continue, or None for a new one."""
    if isinstance(resume, str):
        read_config(resume)
        if not hold(resume):
            raise UserError(f"{resume} cannot be continued before the process that trains it has ended")
        return resume
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    for run in sorted(Path(save_dir).glob("*/config.json"), key=lambda p: p.parent.name, reverse=True):
        try:
            config = read_config(run.parent)
        except UserError as error:
            print(f"passed over: {error}")
            continue
        if not config["finished"] and (resume or (restarted and config["launch"] == launch_id())) and hold(run.parent):
            return str(run.parent)
    if resume:
        print(f"resume = True: there is no unfinished run in {save_dir!r}, starting a new one")
    return None


def new_run(save_dir):
    """Make and return save_dir/<start time>, a folder that nobody else has."""
    start = time.strftime("%Y_%m_%d_%H_%M_%S")
    for attempt in range(1000):
        run = Path(save_dir, start + (f"_{attempt}" if attempt else ""))
        try:
            run.mkdir(parents=True)
            hold(run)
            return str(run)
        except FileExistsError:
            if Path(save_dir).exists() and not Path(save_dir).is_dir():
                raise UserError(f"save_dir = {save_dir!r} is a file, not a folder") from None
        except OSError as error:
            raise UserError(f"save_dir = {save_dir!r}: a folder cannot be made there ({error.strerror})") from None
    raise UserError(f"save_dir = {save_dir!r} has a thousand runs of this second")


def open_run(resume, save_dir, settings, class_names):
    """(run folder, config to write once all is set up, checkpoint or None). A new folder, or the one that `resume` says.

    Without its config.json a folder is no run: a start that fails in setting up leaves nothing for resume = True to find.
    Continuing lists the settings that changed. UserError for another network or class list, or a finished run.
    """
    run = find_run(resume, save_dir)
    state, kept = None, {}
    if run:
        config = read_config(run)
        old = config["settings"]
        for name, was, now in (("backbone", old["backbone"], settings["backbone"]),
                               ("the class list", config["class_names"], class_names)):
            if was != now:
                raise UserError(f"{run} cannot be continued: {name} was {was!r} and is now {now!r}")
        kept = {"fp16": old["fp16"]}  # changing the arithmetic in mid-run would be another experiment
        changed = [f"{name}: {old[name]!r} → {value!r}" for name, value in settings.items()
                   if name in old and old[name] != value and name not in ("resume", *kept)]
        state = load_checkpoint(run)
        if config["finished"] and (state is None or state["epoch"] >= settings["UnFreeze_Epoch"] or
                                   old["UnFreeze_Epoch"] >= settings["UnFreeze_Epoch"]):
            raise UserError(f"{run} has finished its {old['UnFreeze_Epoch']} epochs: raise UnFreeze_Epoch to train on")
        place = f"epoch {state['epoch'] + 1}, step {state['step'] + 1}" if state else "its beginning"
        print(f"continuing {run} at {place}" + "".join(f"\n  changed since: {c}" for c in changed))
    else:
        run = new_run(save_dir)
    return run, {"settings": {**settings, **kept}, "class_names": class_names, "launch": launch_id(), "finished": False,
                 "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__,
                              "torchvision": torchvision.__version__, "pillow": PIL.__version__}}, state
