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

from utils.errors import UserError, shown
from utils.files import check_regular, save_text
from utils.lists import difference
from utils.processes import world_size
from utils.settings import check_value
from utils.state import load_checkpoint

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
locks = []  # their files stay open, as closing one would give its lock back
COMMANDS_READ = {  # settings that a finished run's commands need, and what they were before a fork or a version had them
    "backbone": None, "input_shape": None, "Cuda": False, "fp16": False, "channels_last": True, "val_crop": 1.0,
    "Unfreeze_batch_size": 32, "UnFreeze_Epoch": 10, "classes_path": "model_data/cls_classes.txt",
    "test_annotation_path": "model_data/cls_test.txt"}


def launch_id():
    """The same for all processes of one launch, also after torchrun has restarted them."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return run_id if run_id != "none" else f"{socket.gethostname()} {os.getppid()}"


def read_config(run):
    """A run's config.json as a dictionary with at least settings, class_names and finished. UserError for any other file."""
    path = Path(run, "config.json")
    try:
        check_regular(path, "config.json")
        config = json.loads(path.read_text(encoding="utf-8"))
    except UserError as error:
        raise UserError(f"{str(run)!r} is not a run's folder: {error}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    for key, kind in (("settings", dict), ("class_names", list), ("finished", bool)):
        if not isinstance(config, dict) or not isinstance(config.get(key), kind):
            raise UserError(f"{path} is not of a run: {key!r} is missing, or no {kind.__name__}")
    if not config["class_names"] or not all(isinstance(name, str) for name in config["class_names"]):
        raise UserError(f"{path} is not of a run: 'class_names' must be names")
    for name in ("backbone", "input_shape"):
        if name not in config["settings"]:
            raise UserError(f"{path} is not of a run: its settings lack {name!r}")
    for name, default in COMMANDS_READ.items():
        try:
            check_value(name, config["settings"].setdefault(name, default))
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    return config


def write_config(run, config):
    save_text(Path(run, "config.json"), json.dumps(config, indent=1, ensure_ascii=False, default=str) + "\n")


def lock(run):
    """Take the run for this process's life; False while another one trains it. POSIX locks end with their process."""
    try:
        locks.append(open(Path(run, ".lock"), "a"))
        if fcntl:
            fcntl.lockf(locks[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"{run} is being trained by another process")
        return False
    except OSError:
        pass  # a file system without locks, or one that cannot be written, which saving will say
    return True


def find_run(resume, save_dir):
    """The folder of the run to continue, or None for a new one."""
    if isinstance(resume, str):
        run = str(Path(save_dir, resume)) if not os.path.exists(resume) and Path(save_dir, resume).exists() else resume
        read_config(run)
        if not lock(run):
            raise UserError(f"{run} cannot be continued before the process that trains it has ended")
        return run
    named = os.environ.get("TORCHELASTIC_RUN_ID", "none") != "none"  # torchrun's --rdzv_id: a node started anew belongs to it
    if not (resume or named or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))):
        return None
    for path in sorted(Path(save_dir).glob("*/config.json"), key=lambda p: p.parent.name, reverse=True):
        try:
            config = read_config(path.parent)
        except UserError:
            continue  # many programs have a config.json
        ours = resume or config.get("launch") == launch_id()
        if ours and not config["finished"] and lock(path.parent):
            return str(path.parent)
    if resume:
        print(f"resume = True: there is no unfinished run in {save_dir!r}, starting a new one")
    return None


def new_run(save_dir):
    """Make and return save_dir/<start time>, a folder that nobody else has."""
    start = time.strftime("%Y_%m_%d_%H_%M_%S")
    try:
        Path(save_dir).mkdir(parents=True, exist_ok=True)
        for attempt in range(1000):
            run = Path(save_dir, start + (f"_{attempt}" if attempt else ""))
            try:
                run.mkdir()
            except FileExistsError:
                continue
            lock(run)
            return str(run)
    except FileExistsError:
        raise UserError(f"save_dir = {shown(save_dir)} is a file or a broken link, not a folder") from None
    except OSError as error:
        raise UserError(f"save_dir = {shown(save_dir)}: a folder cannot be made there ({error.strerror})") from None
    raise UserError(f"save_dir = {save_dir!r} has a thousand runs of this second")


def continue_run(run, settings, class_names):
    """The checkpoint of a run that is to go on, or None; says what has changed. Its precision is kept where fp16 is 'auto'."""
    config = read_config(run)
    old, finished = config["settings"], config["finished"]
    others = [f"{name} was {shown(old[name])} and is now {shown(settings[name])}" for name in ("backbone", "optimizer_type")
              if name in settings and old.get(name, settings[name]) != settings[name]]
    was, now = config["class_names"], class_names
    others += filter(None, [difference(was, now, "the run", "the class list")])
    others += [f"it has {len(was)} classes, the class list {len(now)}"] if len(was) != len(now) else []
    if others:
        raise UserError(f"{run} cannot be continued: {others[0]}")
    if settings.get("fp16") == "auto" and old.get("Cuda") == settings.get("Cuda"):
        settings["fp16"] = old.get("fp16", "auto")
    state, last = load_checkpoint(run), settings["UnFreeze_Epoch"]
    done = state["epoch"] + bool(state["step"]) if state else 0
    nothing_left = done > last or done == last and not state["step"] and not state["history"].get("rows")
    if nothing_left or finished and (state is None or old.get("UnFreeze_Epoch", 0) >= last):
        raise UserError(f"{run} has {'finished' if finished else f'trained {done} epochs'}: raise UnFreeze_Epoch (now {last}) "
                        f"to train on")
    place = f"epoch {state['epoch'] + 1}, step {state['step'] + 1}" if state else "its beginning"
    changed = [f"{name}: {shown(old[name])} → {shown(value)}" for name, value in settings.items()
               if name in old and old[name] != value and name != "resume"]
    print(f"continuing {run} at {place}" + "".join(f"\n  changed since: {c}" for c in changed))
    return state


def open_run(resume, save_dir, settings, class_names):
    """(run folder, config to write once all is set up, checkpoint or None). A new folder, or the one that `resume` says.

    Without its config.json a folder is no run: a start that fails in setting up leaves nothing for resume = True to find.
    UserError for another network, optimizer or class list, or a finished run.
    """
    run = find_run(resume, save_dir)
    state = continue_run(run, settings, class_names) if run else None
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__,
                "torchvision": torchvision.__version__, "pillow": PIL.__version__}
    config = {"settings": settings, "class_names": class_names, "launch": launch_id(), "finished": False, "versions": versions}
    return run or new_run(save_dir), config, state


def begin_run(run, config, parameters, flops, num_train, num_val):
    """Print what is about to be trained, and write config.json, which makes the folder a run."""
    s = config["settings"]
    precision = f"{'mixed precision' if s.get('fp16') else 'float32'}" + (f" ({config['precision']})" if config.get("precision") else "")
    frozen = f", frozen to {s['Freeze_Epoch']}" if s.get("Freeze_Train") else ""
    rows = {"run": run, "backbone": f"{s['backbone']} ({parameters / 1e6:.2f} M parameters, {flops / 1e9:.3f} GFLOPs)",
            "input_shape": s["input_shape"],
            "pictures": f"{num_train} training, {num_val} test, {len(config['class_names'])} classes",
            "epochs": f"{s.get('Init_Epoch', 0)} to {s['UnFreeze_Epoch']}{frozen}",
            "batch_size": f"{s['Unfreeze_batch_size']} over {world_size()} processes, {s.get('accumulate', 1)} to a step",
            "optimizer": f"{s['optimizer_type']}, Init_lr {s['Init_lr']:g}, {s['lr_decay_type']}",
            "device": f"{'CUDA' if s['Cuda'] else 'CPU'}, {precision}"}
    print("\n".join(f"  {name:<{max(map(len, rows))}}  {value}" for name, value in rows.items()), flush=True)
    write_config(run, config)
