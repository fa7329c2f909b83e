"""How a run goes on: it is found, loaded and checked, and what has changed is printed."""

import math
from itertools import zip_longest
from pathlib import Path

from utils.checkpoint import cannot_continue
from utils.optimizer import rate_at
from utils.plumbing.console import say, shell_words
from utils.plumbing.errors import UserError, short_repr
from utils.plumbing.files import LAST, as_json, clear_drafts, load_tensors
from utils.plumbing.run import find_run, read_config, trained_files


def continued_run(resume, save_dir):
    """Return (folder, config.json, checkpoint or None) of the run to continue; Nones for none."""
    run = find_run(resume, save_dir)
    if run is None:
        return None, None, None
    config = read_config(run)
    state = None
    if Path(run, LAST).exists():
        state = load_checkpoint(run)
        config["settings"]["Init_Epoch"] = state["epoch"]  # where train.py's loop begins
    elif trained_files(run):  # a new beginning would overwrite it
        raise cannot_continue(run, f"it holds {trained_files(run)[0]}, but its checkpoint is gone")
    config["trained"] = state is not None
    clear_drafts(run)
    return run, config, state


def load_checkpoint(run):
    """Return a run's checkpoint. UserError: one that cannot be used."""
    try:
        state = load_tensors(Path(run, LAST), "resume")
    except UserError as error:
        raise cannot_continue(run, error) from None
    for name in ("epoch", "step"):
        number = state.get(name)
        if type(number) is not int or number < 0:
            raise cannot_continue(
                run, f"{LAST} is no checkpoint (its {name}: {short_repr(number)})"
            )
    return state


def check_goes_on(run, config, state, settings, class_names):
    """Raise UserError where no epoch is left, or what was trained had other settings or classes."""
    epochs = 0  # that were begun
    if state is not None:
        epochs = state["epoch"] + (1 if state["step"] else 0)
        before = {**config["settings"], "ema_decay > 0": state.get("ema") is not None}
        now = {**settings, "ema_decay > 0": bool(settings.get("ema_decay"))}
        for name in ("backbone", "optimizer_type", "ema_decay > 0"):
            check_same(run, name, before.get(name), now.get(name))
        pairs = zip_longest(config["class_names"], class_names, fillvalue="no class")
        for number, (old, new) in enumerate(pairs):
            check_same(run, f"class {number}", old, new)
    last = settings["UnFreeze_Epoch"]
    if epochs > last or (config["finished"] and epochs == last):
        verb = "has finished" if config["finished"] else "has trained"
        raise UserError(
            f"{run} {verb} {epochs} epochs: raise UnFreeze_Epoch (now {last}) to train on, as in "
            f"{shell_words(['--resume', run])} --UnFreeze_Epoch {epochs + 5}"
        )


def check_same(run, name, before, now):
    """Raise UserError where a run cannot go on, as something is not what it was."""
    if before != now:
        raise cannot_continue(run, f"{name} was {short_repr(before)} and is now {short_repr(now)}")


def print_continued(run, config, state, settings, transformer, train_data):
    """Print where a run goes on, and which of its settings train on with another value."""
    place = "its beginning"
    if state:
        place = f"epoch {state['epoch'] + 1}, step {state['step'] + 1}"
    say(f"continuing {run} at {place}")
    before, now = config["settings"], as_json(settings)
    for name in {**before, **now}:
        old, new = before.get(name, "absent"), now.get(name, "absent")
        if old != new and name != "resume":
            say(f"  changed since: {name}: {short_repr(old)} → {short_repr(new)}")
    if state and train_data.fingerprint["list"] not in str(state.get("order")):
        say("  changed since: the training data")
    if state and state["epoch"] < settings["UnFreeze_Epoch"]:
        print_jump(before, settings, state, transformer)


def print_jump(before, settings, state, transformer):
    """Print how the learning rate jumps where the curve is another one than before."""
    position = state["epoch"]
    try:
        old = rate_at({**settings, **before}, position, transformer)
    except (LookupError, TypeError, ValueError, ArithmeticError):  # settings of another version
        return
    new = rate_at(settings, position, transformer)
    if not math.isclose(old, new, rel_tol=0.01):
        say(
            f"  the learning rate goes from {old:.3g} to {new:.3g} here, where the curve of "
            f"{settings['UnFreeze_Epoch']} epochs is at epoch {position + 1}"
        )
