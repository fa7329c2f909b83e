"""Other people's names for torchvision's layers: timm's, Microsoft's (Swin), Meta's (ConvNeXt) and the documented family's.

A table holds pairs (their name, torchvision's name) of how a key begins, the first that fits counts; # is a number,
% the same number less one. What no pair fits keeps its name, so torchvision's own files pass through unchanged.
"""
import re
from contextlib import suppress

import torch
from torchvision import models

from nets._weights import COMPUTED
from utils.errors import UserError

VIT_LAYER = "encoder.layers.encoder_layer_#."
VIT = [("cls_token", "class_token"), ("pos_embed", "encoder.pos_embedding"), ("patch_embed.proj.", "conv_proj."),
       *((f"blocks.#.{theirs}", VIT_LAYER + ours) for theirs, ours in (
           ("norm1.", "ln_1."), ("attn.qkv.weight", "self_attention.in_proj_weight"),
           ("attn.qkv.bias", "self_attention.in_proj_bias"), ("attn.proj.", "self_attention.out_proj."),
           ("norm2.", "ln_2."), ("mlp.fc1.", "mlp.0."), ("mlp.fc2.", "mlp.3."))),
       ("norm.", "encoder.ln."), ("head.", "heads.head."),
       (VIT_LAYER + "mlp.linear_1.", VIT_LAYER + "mlp.0."),  # torchvision's older files
       (VIT_LAYER + "mlp.linear_2.", VIT_LAYER + "mlp.3.")]


def swin(downsample):
    """The table of Swin v1 and v2. downsample: 2 where a stage ends with it (Microsoft, the family, timm < 0.8), else 0."""
    table = [("patch_embed.proj.", "features.0.0."), ("patch_embed.norm.", "features.0.2."), ("head.fc.", "head.")]
    for i in range(4):
        block, ours = f"layers.{i}.blocks.#.", f"features.{2 * i + 1}.#."
        table += [(block + "mlp.fc1.", ours + "mlp.0."), (block + "mlp.fc2.", ours + "mlp.3."), (block, ours),
                  (f"layers.{i}.downsample.", f"features.{2 * i + downsample}.")]
    return table


CONVNEXT = [("stem.", "features.0."), ("head.fc.", "classifier.2."), ("head.norm.", "classifier.0."),
            ("head.", "classifier.2."), ("norm.", "classifier.0."),  # Meta's own files: no head.norm
            *((f"{theirs}.", f"features.{2 * i}.")
              for i in range(4) for theirs in (f"downsample_layers.{i}", f"stages.{i}.downsample")),
            *((f"stages.{i}.{theirs}", f"features.{2 * i + 1}.#.{ours}") for i in range(4) for theirs, ours in (
                ("blocks.#.conv_dw.", "block.0."), ("blocks.#.norm.", "block.2."), ("blocks.#.mlp.fc1.", "block.3."),
                ("blocks.#.mlp.fc2.", "block.5."), ("blocks.#.gamma", "layer_scale"), ("#.dwconv.", "block.0."),
                ("#.norm.", "block.2."), ("#.pwconv1.", "block.3."), ("#.pwconv2.", "block.5."),
                ("#.gamma", "layer_scale")))]
REGNET = [("stem.conv.", "stem.0."), ("stem.bn.", "stem.1."), ("head.fc.", "fc."),
          *((f"s{i}.b#.{theirs}", f"trunk_output.block{i}.block{i}-%.{ours}")
            for i in (1, 2, 3, 4) for theirs, ours in (
                ("conv1.conv.", "f.a.0."), ("conv1.bn.", "f.a.1."), ("conv2.conv.", "f.b.0."), ("conv2.bn.", "f.b.1."),
                ("conv3.conv.", "f.c.0."), ("conv3.bn.", "f.c.1."), ("se.", "f.se."),
                ("downsample.conv.", "proj.0."), ("downsample.bn.", "proj.1.")))]
VGG = [("pre_logits.fc1.", "classifier.0."), ("pre_logits.fc2.", "classifier.3."), ("head.fc.", "classifier.6.")]
DENSENET = [(f"features.denseblock#.denselayer#.{part}.#.", f"features.denseblock#.denselayer#.{part}#.")
            for part in ("norm", "conv")]  # torchvision's older files
TABLES = {models.VisionTransformer: VIT, models.ConvNeXt: CONVNEXT, models.RegNet: REGNET, models.VGG: VGG,
          models.DenseNet: DENSENET}

# timm's layers of these networks, in the order in which they compute; torchvision numbers the same layers.
MOBILE = (models.EfficientNet, models.MobileNetV2, models.MobileNetV3, models.MNASNet)
MOBILE_BLOCKS = (("conv", "bn1"), ("conv_exp", "bn1", "conv_pwl", "bn2"),
                 ("conv_dw", "bn1", "se.conv_reduce", "se.conv_expand", "conv_pw", "bn2"),
                 ("conv_pw", "bn1", "conv_dw", "bn2", "se.conv_reduce", "se.conv_expand", "conv_pwl", "bn3"))


def mobile(model, state):
    """{timm's layer: torchvision's}, both in the order of computing; {} unless every layer but the head has its size."""
    sizes, ours = ({key[:-7]: v.numel() for key, v in tensors.items() if key.endswith(".weight")}
                   for tensors in (state, model.state_dict()))
    blocks = {}
    for layer in sizes:
        if found := re.match(r"blocks\.(\d+)\.(\d+)\.", layer):
            blocks.setdefault((int(found[1]), int(found[2])), set()).add(layer[found.end():])
    inside = [f"blocks.{i}.{j}.{name}" for (i, j), names in sorted(blocks.items())
              for name in next((order for order in MOBILE_BLOCKS if names <= set(order)), ()) if name in names]
    theirs = [layer for layer in ("conv_stem", "bn1", *inside, "conv_head", "bn2", "classifier") if layer in sizes]
    same = [sizes[layer] for layer in theirs][:len(ours) - 1] == list(ours.values())[:-1]
    return dict(zip(theirs, ours)) if same else {}


def rename(key, table):
    for theirs, ours in table:
        if found := re.match(re.escape(theirs).replace(r"\#", r"(\d+)"), key):
            numbers = map(int, found.groups())
            return re.sub("[#%]", lambda sign: str(next(numbers) - (sign[0] == "%")), ours) + key[found.end():]
    return key


def reshape(model, name, value, wanted):
    """`value` in the shape of `wanted` where it holds the same, or the same for another picture size."""
    if name == "encoder.pos_embedding":
        with suppress(ValueError, RuntimeError):  # no square of positions and one class token
            value = models.vision_transformer.interpolate_embeddings(model.image_size, model.patch_size, {name: value.float()})[name]
    if value.dim() != wanted.dim() and value.shape[:1] == wanted.shape[:1] and value.numel() == wanted.numel():
        return value.reshape(wanted.shape)  # a Linear layer written as a convolution, a scale with axes of one
    return value


def translate(model, state):
    """`state` by the model's names and in its shapes, as far as they are known here."""
    table = next((t for kind, t in TABLES.items() if isinstance(model, kind)), ())
    if isinstance(model, models.SwinTransformer):
        table = swin(2 if "layers.0.downsample.norm.weight" in state else 0)
        for key in [key for key in state if key.endswith(".q_bias")]:  # v2 has no bias for the keys
            q = state.pop(key)
            v = state.pop(key[:-6] + "v_bias", torch.zeros_like(q))
            state[key[:-6] + "qkv.bias"] = torch.cat([q, torch.zeros_like(q), v])
    if isinstance(model, MOBILE) and "conv_stem.weight" in state:
        layers = mobile(model, state)
        state = {f"{layers.get(layer, layer)}.{part}": v for k, v in state.items() for layer, _, part in [k.rpartition(".")]}
    named, wanted = {rename(k, table): v for k, v in state.items()}, model.state_dict()
    return {k: reshape(model, k, v, wanted[k]) if k in wanted and v.shape != wanted[k].shape and v.is_floating_point() else v
            for k, v in named.items() if not COMPUTED.search(k)}


def fit(model, state, source):
    """(tensors by the model's names, the prefix of wrappers that most parameters fit under). UserError when two tie."""
    state = {k.replace("_orig_mod.", ""): v for k, v in state.items()}
    words = {re.match(r"((module|model|backbone|encoder)\.)*", key)[0] for key in state}
    prefixes = {"", *(w[:end.end()] for w in words for end in re.finditer(r"\.", w))}
    parameters = {k: v.shape for k, v in model.named_parameters()}
    found = {prefix: translate(model, {k[len(prefix):]: v for k, v in state.items() if k.startswith(prefix)})
             for prefix in sorted(prefixes, key=len)}
    fitting = {prefix: sum(v.shape == parameters.get(k) for k, v in under.items()) for prefix, under in found.items()}
    most = max(fitting.values())
    best = [prefix for prefix in found if fitting[prefix] == most]
    if most and len(best) > 1 and best[0]:
        raise UserError(f"{source} holds this network more than once, under {' and '.join(map(repr, best))}: "
                        f"save the state_dict of the one that you mean")
    return found[best[0]], best[0]
