"""Weight files: find the weights in one, also in other trainers', and load what fits a network."""

import argparse
import json
import sys
from pathlib import Path

import torch
from torchvision import models

from nets import OWN, head_layers
from nets._foreign import best_fit
from utils.plumbing import processes
from utils.plumbing.console import say
from utils.plumbing.errors import UserError, short_repr
from utils.plumbing.files import check_regular, load_tensors

# Where other trainers' checkpoints keep weights. Averages and teachers come first: they are what
# their publishers evaluate.
ENTRIES = (
    "model_ema",
    "state_dict_ema",
    "ema_state_dict",
    "ema",
    "teacher",
    "state_dict",
    "model",
    "student",
    "module",
)
# Floats of 8 bits are left out, as they would need a scale
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def load_file(model, path, class_names=None, settings=None):
    """Load what fits of a weights file.

    If it lies in a run's folder, the head is left out where the run's classes are not class_names,
    and a warning tells where the run normalised pictures otherwise than settings do.
    """
    state = load_weights(path)
    classes, trained = read_run(path)
    has_others = class_names and classes and classes != class_names
    if has_others:
        say(
            f"{path}: the head is left out, as its classes were {short_repr(classes)}; of a class "
            f"that was only renamed, test pictures may have been trained on"
        )
    load_matching(model, state, path, with_head=not has_others)
    if settings:
        compare_normalization(path, trained, settings)


def load_pretrained(model, name, settings=None):
    """Load what matches of the weights that torchvision publishes for the network `name`.

    Collective: a machine's first process downloads them for all.
    """
    if processes.local_rank() == 0:
        download(name)
    processes.barrier()
    state, weights = download(name)
    source = f"torchvision's weights of {name}"
    load_matching(model, state, source)
    if settings:
        preset = weights.transforms()
        compare_normalization(source, {"mean": preset.mean, "std": preset.std}, settings)


def download(name):
    """Return (state_dict, entry) of the weights that torchvision publishes for a network.

    UserError: there are none, or they are not in torch.hub's cache and cannot be downloaded.
    """
    if name in OWN:
        raise UserError(
            f"pretrained = True: {name} is a network of nets/, for which nobody publishes "
            f"weights: set pretrained = False, or give a file with model_path"
        )
    weights = models.get_model_weights(name).DEFAULT
    try:
        state = weights.get_state_dict(
            progress=True, check_hash=True, weights_only=True, map_location="cpu"
        )
    except Exception as error:  # no network, a cut download, a wrong hash: the remedy is the same
        folder = Path(torch.hub.get_dir(), "checkpoints")
        raise UserError(
            f"the pretrained weights of {name} could not be loaded ({error}): put {weights.url} "
            f"into {folder}, or set pretrained = False"
        ) from error
    return state, weights


def load_matching(model, state, source, with_head=True):
    """Load what matches by name and shape, print how much, and return the names of the floats left.

    state: {name: tensor}, in which other people's names are translated. UserError: nothing of
    `source` fits, or it holds something else than plain floats.
    """
    matching, number, prefix = best_fit(model, state)
    if matching.keys().isdisjoint(dict(model.named_parameters())):
        raise UserError(
            f"{source}: none of the {len(state)} tensors fits this network by name and shape; set "
            f"backbone to the network that the weights are of (nets/README.md lists known names)"
        )
    if not with_head:
        matching = {name: matching[name] for name in without_head(model, matching)}
    ours = model.state_dict()  # torchvision's has version marks, which a plain dictionary lacks
    check_numbers(ours, matching, source)
    # floats alone: not counters, nor indices
    floats = [name for name, value in ours.items() if value.is_floating_point()]
    missed = [name for name in floats if name not in matching]
    ours.update(matching)
    model.load_state_dict(ours)

    under = f" under {prefix!r}" if prefix else ""
    total = len(matching) + len(missed)
    say(f"{source}: {len(matching)} of {total} tensors loaded, from {number} of the file{under}")
    lost = without_head(model, missed)
    if lost:
        names = short_repr(lost, 200)
        say(f"  WARNING: the file lacks {len(lost)} tensors of the backbone: {names}")
    if len(lost) < len(missed):
        say("  the head starts anew, which is normal for other classes")
    else:
        say("  the head is taken as it is: its classes must be yours, in this order")
    return missed


def compare_normalization(source, trained, settings):
    """Warn where the settings' mean or std is not the one that weights were trained with."""
    for name in ("mean", "std"):
        ours = list(settings[name])
        theirs = trained.get(name, ours)
        if theirs != ours:
            say(
                f"  WARNING: {source} was trained with {name} = {theirs}, not {ours}: "
                f"set {name} to that"
            )


def check_numbers(ours, state, source):
    """Raise a UserError where `state` holds something else than finite floats for one of `ours`."""
    for name, value in state.items():
        kind = ours[name].dtype if name in ours else None
        if kind not in FLOATS:
            continue
        is_plain = value.layout == torch.strided and not value.is_meta
        if not is_plain or value.dtype not in FLOATS or not value.to(kind).isfinite().all():
            raise UserError(
                f"{source} holds weights that are not finite as {kind}, or no plain floats of 16 "
                f"bits or more ({name!r} is {value.dtype})"
            )


def without_head(model, names):
    """Return those of a state_dict's names that are not of the model's head."""
    heads = head_layers(model)
    return [name for name in names if name.rpartition(".")[0] not in heads]


def read_run(path):
    """Return (class names, settings) of the run beside a weights file, or (None, {})."""
    try:
        config = Path(path).with_name("config.json")
        check_regular(config, "config.json")
        found = json.loads(config.read_text(encoding="utf-8"))
        return found["class_names"], dict(found["settings"])
    except Exception:  # there is none, or it is another program's
        return None, {}


def load_weights(path, name="model_path"):
    """Return the state_dict in a file: the first of its entries that holds tensors.

    UserError, which calls the path `name`: there is none, or the file cannot be read.
    """
    load = load_safetensors if Path(path).suffix == ".safetensors" else load_tensors
    # other trainers save their options as a Namespace, which has no code to run
    with torch.serialization.safe_globals([argparse.Namespace]):
        checkpoint = load(path, name)
    entry, state = find_state(checkpoint)
    if not state:
        raise UserError(
            f"{name}: {str(path)!r} holds no state_dict of names and tensors: save "
            f"model.state_dict() with torch.save"
        )
    if entry:
        say(f"{path}: taking the weights in its entry {entry}", file=sys.stderr)
    return state


def find_state(checkpoint):
    """Return (entry, {name: tensor}) of the first of ENTRIES that holds tensors, else of all."""
    for key in ENTRIES:
        if isinstance(checkpoint.get(key), dict):
            entry, tensors = find_state(checkpoint[key])
            if tensors:
                return f"{key}.{entry}".rstrip("."), tensors
    tensors = {}
    for key, value in checkpoint.items():
        if isinstance(key, str) and isinstance(value, torch.Tensor):
            tensors[key] = value
    return "", tensors


def load_safetensors(path, name):
    """Return {name: tensor} of a .safetensors file."""
    check_regular(path, name)
    try:
        import safetensors.torch

        return safetensors.torch.load_file(path)
    except Exception as error:  # a broken file can raise nearly anything
        raise UserError(
            f"{name}: {str(path)!r} cannot be read ({error}). It may be cut short, or safetensors "
            f"is not installed: pip install safetensors"
        ) from None
