"""How a run goes on: it is found, loaded and checked, and what has changed is printed."""

import math
from itertools import zip_longest
from pathlib import Path

from utils.optimizer import rate_at
from utils.plumbing.console import say
from utils.plumbing.errors import UserError, short_repr
from utils.plumbing.files import clear_drafts
from utils.plumbing.run import as_json, find_run, read_config, trained_files
from utils.plumbing.saved import load_checkpoint


def continued_run(resume, save_dir):
    """Return (folder, config.json, checkpoint or None) of the run to go on with; Nones for none."""
    run = find_run(resume, save_dir)
    if run is None:
        return None, None, None
    config = read_config(run)
    state = load_checkpoint(run)
    if state is None:
        check_nothing_trained(run)
    else:
        config["settings"]["Init_Epoch"] = state["epoch"]
    clear_drafts(run)
    return run, config, state


def check_nothing_trained(run):
    """Raise UserError where a run without a checkpoint holds what was trained: it would be lost."""
    trained = trained_files(run)
    if trained:
        raise UserError(
            f"{run} cannot be continued: it holds {trained[0]}, but its checkpoint is gone. "
            f"Begin a new run with resume = False (perhaps from model_path = "
            f"{str(Path(run, 'last_epoch_weights.pth'))!r}), or move the folder away"
        )


def check_goes_on(run, config, state, settings):
    """Raise UserError where no epoch is left, or what was trained cannot be trained on so."""
    if state is not None:
        before = {**settings, **config["settings"], "ema_decay": state["ema"] is not None}
        now = {**settings, "ema_decay": bool(settings.get("ema_decay"))}
        for name in ("backbone", "optimizer_type", "ema_decay"):
            if before.get(name) != now.get(name):
                raise changed_name(run, name, before.get(name), now.get(name))
    last = settings["UnFreeze_Epoch"]
    epochs = epochs_begun(state)
    if epochs > last or (config["finished"] and epochs == last):
        verb = "has finished" if config["finished"] else "has trained"
        raise UserError(
            f"{run} {verb} {epochs} epochs: raise UnFreeze_Epoch (now {last}) to train on, as in "
            f"--resume {run} --UnFreeze_Epoch {epochs + 5}"
        )


def epochs_begun(state):
    """Return the number of epochs that a checkpoint has trained, wholly or in part."""
    if state is None:
        return 0
    return state["epoch"] + (1 if state["step"] else 0)


def check_class_names(run, config, state, class_names):
    """Raise UserError where what was trained knows other classes."""
    if state is None:
        return
    pairs = zip_longest(config["class_names"], class_names)
    for number, (before, now) in enumerate(pairs):
        if before != now:
            raise changed_name(run, f"class {number}", before, now)


def changed_name(run, name, before, now):
    return UserError(
        f"{run} cannot be continued: {name} was {short_repr(before)} and is now {short_repr(now)} "
        f"(give what it was started with)"
    )


def describe_continued(run, config, state, settings, transformer):
    """Print where a run goes on, and which of its settings train on with another value."""
    place = "its beginning"
    if state:
        place = f"epoch {state['epoch'] + 1}, step {state['step'] + 1}"
    say(f"continuing {run} at {place}")
    before, now = config["settings"], as_json(settings)
    for name in now:
        if name in before and name != "resume" and now[name] != before[name]:
            say(f"  changed since: {name}: {short_repr(before[name])} → {short_repr(now[name])}")
    if state:
        describe_jump(before, settings, state, transformer)


def describe_jump(before, settings, state, transformer):
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
