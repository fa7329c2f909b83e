"""Other people's names for torchvision's layers: timm's, Microsoft's, Meta's and the documented family's.

A table holds pairs (regular expression, what replaces it), used one after another. What none finds keeps its name.
"""

import re
from contextlib import suppress

from torchvision.models import ConvNeXt, DenseNet, SwinTransformer, VisionTransformer
from torchvision.models.vision_transformer import interpolate_embeddings

WRAPPERS = (
    "module.",
    "model.",
    "backbone.",
    "encoder.",
    "_orig_mod.",
)  # what others put before a network's names


def stage(offset):
    """A stage's number in torchvision's list, where stages and what halves the pictures between them take turns."""
    return lambda found: f"features.{2 * int(found[1]) + offset}."


VIT = [
    (r"^cls_token$", "class_token"),
    (r"^pos_embed$", "encoder.pos_embedding"),
    (r"^patch_embed\.proj", "conv_proj"),
    (r"^norm\.", "encoder.ln."),
    (r"^head\.", "heads.head."),
    (r"^blocks\.", "encoder.layers.encoder_layer_"),
    (r"\.norm([12])\.", r".ln_\1."),
    (r"\.attn\.qkv\.", ".self_attention.in_proj_"),
    (r"\.attn\.proj\.", ".self_attention.out_proj."),  # linear_: torchvision's older files
    (r"\.mlp\.(fc|linear_)1\.", ".mlp.0."),
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
SWIN_TIMM = [
    (r"^layers\.(\d)\.downsample\.", stage(0)),
    *SWIN,
]  # from 0.8 on stages begin with it, elsewhere they end so
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


def translate(model, state):
    """`state` by the model's names and in its shapes, as far as they are known here."""
    table = next((table for kind, table in TABLES.items() if isinstance(model, kind)), [])
    if table is SWIN and "layers.0.downsample.norm.weight" not in state:
        table = SWIN_TIMM
    named = {}
    for name, value in state.items():
        for theirs, ours in table:
            name = re.sub(theirs, ours, name)
        if table is CONVNEXT and name.endswith("layer_scale"):
            value = value.reshape(-1, 1, 1)  # others write it without the two axes
        named[name] = value
    if table is VIT:
        with suppress(
            LookupError, ValueError, RuntimeError
        ):  # no square of positions and one class token
            named = interpolate_embeddings(model.image_size, model.patch_size, named)
    return named


def fit(model, state, prefix=""):
    """(how many parameters fit, `state` by the model's names, the wrappers' prefix that was taken off for the most)."""
    named, shapes = translate(model, state), {k: v.shape for k, v in model.named_parameters()}
    found = [(sum(v.shape == shapes.get(k) for k, v in named.items()), named, prefix)]
    for word in WRAPPERS:
        inside = {k.removeprefix(word): v for k, v in state.items() if k.startswith(word)}
        if inside:
            found.append(fit(model, inside, prefix + word))
    return max(
        found, key=lambda fitting: fitting[0]
    )  # the first of equals: what has no prefix stays
