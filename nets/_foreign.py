"""Other people's names for torchvision's layers: timm's, Microsoft's, Meta's and others'.

A table holds pairs (regular expression, replacement), which are used one after another. A name that
none of them matches stays.
"""

import re
from contextlib import suppress

from torchvision.models import ConvNeXt, DenseNet, SwinTransformer, VisionTransformer
from torchvision.models.vision_transformer import interpolate_embeddings

# What others put before a network's names
WRAPPERS = ("module.", "model.", "backbone.", "encoder.", "_orig_mod.")


def stage(offset):
    """Return a replacement: torchvision numbers stages and the layers between them in one list."""

    def renumber(match):
        return f"features.{2 * int(match[1]) + offset}."

    return renumber


VIT = [
    (r"^cls_token$", "class_token"),
    (r"^pos_embed$", "encoder.pos_embedding"),
    (r"^patch_embed\.proj", "conv_proj"),
    (r"^norm\.", "encoder.ln."),
    (r"^head\.", "heads.head."),
    (r"^blocks\.", "encoder.layers.encoder_layer_"),
    (r"\.norm([12])\.", r".ln_\1."),
    (r"\.attn\.qkv\.", ".self_attention.in_proj_"),
    (r"\.attn\.proj\.", ".self_attention.out_proj."),
    (r"\.mlp\.(fc|linear_)1\.", ".mlp.0."),  # linear_: torchvision's older files
    (r"\.mlp\.(fc|linear_)2\.", ".mlp.3."),
]
SWIN = [
    (r"^patch_embed\.proj", "features.0.0"),
    (r"^patch_embed\.norm", "features.0.2"),
    (r"^head\.fc\.", "head."),
    (r"^layers\.(\d)\.blocks\.", stage(1)),
    (r"^layers\.(\d)\.downsample\.", stage(2)),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.fc2\.", ".mlp.3."),
]
# timm's stages begin with what halves the pictures (since version 0.8), others' end with it
SWIN_TIMM = [(r"^layers\.(\d)\.downsample\.", stage(0)), *SWIN]
CONVNEXT = [
    (r"^stem\.", "features.0."),
    (r"^(head\.)?norm\.", "classifier.0."),
    (r"^head\.(fc\.)?", "classifier.2."),
    (r"^downsample_layers\.(\d)\.", stage(0)),
    (r"^stages\.(\d)\.downsample\.", stage(0)),
    (r"^stages\.(\d)\.(blocks\.)?", stage(1)),
    (r"\.(conv_dw|dwconv)", ".block.0"),
    (r"\.norm", ".block.2"),
    (r"\.(mlp\.fc|pwconv)1", ".block.3"),
    (r"\.(mlp\.fc|pwconv)2", ".block.5"),
    (r"\.gamma$", ".layer_scale"),
]
DENSENET = [(r"(denselayer\d+\.(norm|conv))\.(\d)", r"\1\3")]  # torchvision's older files
TABLES = {VisionTransformer: VIT, SwinTransformer: SWIN, ConvNeXt: CONVNEXT, DenseNet: DENSENET}


def table_for(model, state):
    """Return the pairs for a model and the names in a state_dict; [] where none are known."""
    for kind, table in TABLES.items():
        if isinstance(model, kind):
            if table is SWIN and "layers.0.downsample.norm.weight" not in state:
                return SWIN_TIMM
            return table
    return []


def translate(model, state):
    """Return `state` under the model's names and in its shapes, as far as they are known here."""
    table = table_for(model, state)
    translated = {}
    for name, value in state.items():
        for theirs, ours in table:
            name = re.sub(theirs, ours, name)
        if table is CONVNEXT and name.endswith("layer_scale"):
            value = value.reshape(-1, 1, 1)  # others leave out the two axes
        translated[name] = value
    if table is VIT:
        # raised where the positions are not a square and one class token
        with suppress(LookupError, ValueError, RuntimeError):
            return interpolate_embeddings(model.image_size, model.patch_size, translated)
    return translated


def best_fit(model, state, prefix=""):
    """Return (what of `state` fits the model, of how many tensors, the prefix that was taken off).

    What fits by name and shape is under the model's names. The prefix, made of WRAPPERS, is the one
    without which most tensors fit.
    """
    ours = model.state_dict()
    fitting = {}
    for name, value in translate(model, state).items():
        if name in ours and value.shape == ours[name].shape:
            fitting[name] = value
    best = fitting, len(state), prefix
    for word in WRAPPERS:
        inside = {}
        for name, value in state.items():
            if name.startswith(word):
                inside[name.removeprefix(word)] = value
        if inside:
            other = best_fit(model, inside, prefix + word)
            if len(other[0]) > len(best[0]):  # of equals the first stays, which has no prefix
                best = other
    return best
