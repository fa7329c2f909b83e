"""Weight files: what stands in one, also in another trainer's, and loading what fits a network."""
import argparse
import json
import re
import sys
from contextlib import suppress
from pathlib import Path

import torch
from torchvision import models

from nets import head_layers, own_networks
from utils.errors import UserError, plain, shown
from utils.files import check_regular, load_tensors
from utils.processes import say

# Where other trainers' checkpoints keep weights. Averages and teachers come first: they are what publishers evaluate.
ENTRIES = ("model_ema", "state_dict_ema", "ema_state_dict", "ema", "teacher", "state_dict", "model", "student", "module")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # those of 8 bits would need a scale
# What the network works out from its sizes and no file needs to hold.
COMPUTED = re.compile(r"relative_position_index$|relative_coords_table$|attn_mask$")


def load_safetensors(path, name):
    check_regular(path, name)
    try:
        from safetensors.torch import load_file
        return load_file(path)
    except ImportError:
        raise UserError(f"{name}: reading {str(path)!r} needs one more package: pip install safetensors") from None
    except Exception as error:  # a broken file can raise nearly anything
        raise UserError(f"{name}: {str(path)!r} cannot be read, it may be cut short ({error})") from None


def choose_entry(state, depth=2):
    """(the state_dict in a checkpoint, its entry's name), looking into ENTRIES in their order, `depth` levels down.

    ({}, "") where there are no tensors with names. The counter that AveragedModel adds, and its prefix, are taken off.
    """
    for key in ENTRIES if depth else ():
        if isinstance(state.get(key), dict):
            inner, entry = choose_entry(state[key], depth - 1)
            if inner:
                return inner, f"{key}.{entry}".rstrip(".")
    if not any(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()):
        return {}, ""
    if state.pop("n_averaged", None) is not None:
        torch.nn.modules.utils.consume_prefix_in_state_dict_if_present(state, "module.")
    return state, ""


def load_weights(path, name="model_path"):
    """A state_dict from a file: what choose_entry finds. UserError, which calls the path `name`, where it finds none."""
    load = load_safetensors if Path(path).suffix == ".safetensors" else load_tensors
    with torch.serialization.safe_globals([argparse.Namespace]):  # a bag of options, it has no code to run
        state, entry = choose_entry(load(path, name))
    strange = [key for key in state if not isinstance(key, str)]
    if strange or not state:
        why = f"a tensor is called {strange[0]!r}, which is no name" if strange else "it has no tensors by name"
        raise UserError(f"{name}: {str(path)!r} holds no state_dict ({why}): save model.state_dict() with torch.save")
    for key, value in state.items():
        if isinstance(value, torch.Tensor) and (value.is_meta or value.is_quantized or value.is_nested or value.layout != torch.strided):
            raise UserError(f"{name}: {str(path)!r} holds {key!r} quantized, sparse, nested or without values (meta): "
                            f"save plain tensors, after dequantize() or to_dense()")
    if entry:
        say(f"{plain(path)}: taking the weights in its entry {entry}", file=sys.stderr)
    return state


def check_numbers(ours, state, source):
    """UserError where a float of `ours` has no plain float by its name in `state`, or one that becomes infinite here."""
    for name in sorted(ours.keys() & state.keys()):
        own, value = ours[name], state[name]
        if own.is_floating_point() and value.shape == own.shape:
            if value.dtype not in FLOATS:
                raise UserError(f"{source} holds {name!r} as {value.dtype}, this network as {own.dtype}: save floats, scaled as they were")
            if not value.to(own.dtype).isfinite().all():
                raise UserError(f"{source} holds weights that are not finite as {own.dtype} ({name!r})")


def classes_beside(path):
    """The class names of the run in whose folder a weights file lies; None where it lies in none."""
    config = Path(path).with_name("config.json")
    with suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
        check_regular(config, "config.json")
        return [str(name) for name in json.loads(config.read_text(encoding="utf-8"))["class_names"]]


def load_matching(model, state, source, class_names=None):
    """Load what matches by name and shape, and say how much did. Returns the names that did not.

    state: {name: tensor}; where names differ, nets/_foreign.py translates other libraries'. With class_names, source is the
    file's path: a run's file for other classes gives no head. UserError: nothing matches, or other kinds of numbers.
    """
    ours, prefix = model.state_dict(), ""  # with torchvision's version marks, which a plain dictionary lacks
    head = {k for k in ours if k.rpartition(".")[0] in head_layers(model)}
    state = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}
    if any(k not in state or state[k].shape != v.shape and k not in head for k, v in model.named_parameters()):
        from nets import _foreign
        state, prefix = _foreign.fit(model, state, source)
    check_numbers(ours, state, source)
    classes = classes_beside(source) if class_names else None
    others = head if classes not in (None, list(class_names or [])) else set()
    wanted = [k for k in ours if not COMPUTED.search(k) and (k in state or not k.endswith("num_batches_tracked"))]
    matching = {k: state[k] for k in wanted if k in state and state[k].shape == ours[k].shape and k not in others}
    missed = [k for k in wanted if k not in matching]
    if not any(k in matching for k, _ in model.named_parameters()):
        raise UserError(f"{source}: none of the {len(state)} tensors fits this network by name and shape; "
                        f"set backbone to the network that the weights are of")
    ours.update(matching)
    model.load_state_dict(ours)

    def some(names):
        return plain(", ".join(names[:8]) + (" …" if len(names) > 8 else ""))
    say(f"{plain(source)}: {len(matching)} of {len(wanted)} tensors loaded" + (f", those under {prefix!r}" if prefix else ""))
    if new := [k for k in missed if k in head]:
        why = f"as its classes were {shown(classes)}" if others else "which is normal for other classes"
        say(f"  the head starts anew, {why}: {some(new)}")
    elif classes is None:
        say("  the head is taken as it is: its classes must be yours, in this order")
    if lost := [k for k in missed if k not in head]:
        say(f"  WARNING: {len(lost)} tensors of the backbone were not in the file, which is not normal: {some(lost)}")
    if strangers := [k for k in state if k not in ours]:
        say(f"  {len(strangers)} tensors of the file have no place in this network: {some(strangers)}")
    return missed


def load_pretrained(model, name):
    """load_matching of torchvision's default weights of the network `name`, from torch.hub's cache or the network."""
    if name in own_networks():
        raise UserError(f"pretrained = True: {name} is a network of nets/, nobody publishes weights of it; "
                        f"set pretrained = False, or model_path")
    weights = models.get_model_weights(name).DEFAULT
    target = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
    try:
        state = weights.get_state_dict(progress=True, check_hash=True, weights_only=True, map_location="cpu")
    except Exception as error:  # no network, a cut download, a wrong hash: the remedy is the same
        raise UserError(f"the pretrained weights of {name} could not be loaded ({error}): put {weights.url} "
                        f"at {target}, or set pretrained = False") from error
    load_matching(model, state, f"torchvision's weights of {name}")
