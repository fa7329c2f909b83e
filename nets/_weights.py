"""Weight files: what stands in one, also in another trainer's, and loading what fits a network."""

import argparse
import json
import sys
from contextlib import suppress
from pathlib import Path

import torch
from torchvision import models

from nets import OWN, head_layers
from nets._foreign import fit
from utils.plumbing.console import say
from utils.plumbing.errors import UserError, short_repr
from utils.plumbing.files import check_regular, load_tensors

# Where other trainers' checkpoints keep weights. Averages and teachers come first: they are what publishers evaluate.
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
FLOATS = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
)  # those of 8 bits would need a scale


def load_safetensors(path, name):
    check_regular(path, name)
    try:
        from safetensors.torch import load_file

        return load_file(path)
    except Exception as error:  # a broken file can raise nearly anything
        raise UserError(
            f"{name}: {str(path)!r} cannot be read ({error}): it may be cut short, "
            f"or it is for you to pip install safetensors"
        ) from None


def entries(checkpoint, depth=2, name=""):
    """Yield (name, its tensors by their names) of whatever may be a checkpoint's state_dict, the likeliest first."""
    for key in ENTRIES if depth else ():
        if isinstance(checkpoint.get(key), dict):
            yield from entries(checkpoint[key], depth - 1, f"{name}.{key}".lstrip("."))
    yield (
        name,
        {k: v for k, v in checkpoint.items() if isinstance(k, str) and isinstance(v, torch.Tensor)},
    )


def load_weights(path, name="model_path"):
    """The state_dict in a file: the first entry that holds tensors. UserError, calling the path `name`, if none does."""
    load = load_safetensors if Path(path).suffix == ".safetensors" else load_tensors
    with torch.serialization.safe_globals(
        [argparse.Namespace]
    ):  # a bag of options, it has no code to run
        checkpoint = load(path, name)
    entry, state = next((found for found in entries(checkpoint) if found[1]), ("", {}))
    if not state or any(
        v.is_meta or v.is_quantized or v.is_nested or v.layout != torch.strided
        for v in state.values()
    ):
        raise UserError(
            f"{name}: {str(path)!r} holds no state_dict of names and plain tensors (not quantized, sparse, "
            f"nested, or without values): save model.state_dict() with torch.save"
        )
    if entry:
        say(f"{path}: taking the weights in its entry {entry}", file=sys.stderr)
    return state


def check_numbers(ours, state, source):
    """UserError where `state` has no plain float for one of `ours`, or one that becomes infinite in its kind of float."""
    for name, value in state.items():
        kind = ours[name].dtype if name in ours else None
        if kind in FLOATS and not (value.dtype in FLOATS and value.to(kind).isfinite().all()):
            raise UserError(
                f"{source} holds weights that are not finite as {kind}, or no floats of 16 bits or more "
                f"({name!r} is {value.dtype})"
            )


def load_file(model, path, class_names=None):
    """load_matching of a file, without the head where a config.json beside it names other classes than class_names."""
    state, classes, config = load_weights(path), class_names, Path(path).with_name("config.json")
    with suppress(Exception):  # none, or another program's
        check_regular(config, "config.json")
        classes = json.loads(config.read_text(encoding="utf-8"))["class_names"]
    if class_names and classes != class_names:
        head = head_layers(model)
        state = {k: v for k, v in state.items() if k.rpartition(".")[0] not in head}
        say(f"{path}: the head is left out, as its classes were {short_repr(classes)}")
    load_matching(model, state, path)


def load_matching(model, state, source):
    """Load what matches by name and shape, and say how much did. Returns the names of the floats that did not.

    state: {name: tensor}, other people's names are translated. UserError: nothing of `source` fits, or no plain floats.
    """
    fitting, state, prefix = fit(model, state)
    if not fitting:
        raise UserError(
            f"{source}: none of the {len(state)} tensors fits this network by name and shape; "
            f"set backbone to the network that the weights are of (nets/README.md: whose names are known)"
        )
    ours, head = (
        model.state_dict(),
        head_layers(model),
    )  # torchvision's dictionary has version marks, a plain one none
    matching = {k: v for k, v in state.items() if k in ours and v.shape == ours[k].shape}
    check_numbers(ours, matching, source)
    missed = [
        k for k, v in ours.items() if k not in matching and v.is_floating_point()
    ]  # not counters, nor indices
    ours.update(matching)
    model.load_state_dict(ours)
    lost = [k for k in missed if k.rpartition(".")[0] not in head]
    say(
        f"{source}: {len(matching)} of {len(matching) + len(missed)} tensors loaded, "
        f"from {len(state)} of the file{f' under {prefix!r}' if prefix else ''}"
    )
    if lost:
        say(
            f"  WARNING: {len(lost)} of the backbone are not in the file, which is not normal: {short_repr(lost, 200)}"
        )
    say(
        "  the head starts anew, which is normal for other classes"
        if len(lost) < len(missed)
        else "  the head is taken as it is: its classes must be yours, in this order"
    )
    return missed


def load_pretrained(model, name):
    """load_matching of torchvision's default weights of the network `name`, from torch.hub's cache or the network."""
    if name in OWN:
        raise UserError(
            f"pretrained = True: {name} is a network of nets/, nobody publishes weights of it; "
            f"set pretrained = False, or model_path"
        )
    weights = models.get_model_weights(name).DEFAULT
    try:
        state = weights.get_state_dict(
            progress=True, check_hash=True, weights_only=True, map_location="cpu"
        )
    except Exception as error:  # no network, a cut download, a wrong hash: the remedy is the same
        raise UserError(
            f"the pretrained weights of {name} could not be loaded ({error}): put {weights.url} into "
            f"{Path(torch.hub.get_dir(), 'checkpoints')}, or set pretrained = False"
        ) from error
    load_matching(model, state, f"torchvision's weights of {name}")
