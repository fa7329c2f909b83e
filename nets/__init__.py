"""Networks by name: every torchvision classifier, and each network of one's own in a file of this folder.

backbone = 'my_net' is the function my_net(num_classes, input_shape) in nets/my_net.py; resnet9.py there is the default.
"""

import copy
import importlib
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torchvision import models

from utils.plumbing.errors import UserError, did_you_mean

OWN = [file.stem for file in Path(__file__).parent.glob("[!_]*.py")]
DOCUMENTED_NAMES = {
    "mobilenetv2": "mobilenet_v2",
    "swin_transformer_tiny": "swin_t",
    "swin_transformer_small": "swin_s",
    "swin_transformer_base": "swin_b",
}


class Freezable:
    """The two documented methods, given to whatever network get_model builds (its state_dict keys stay its own)."""

    frozen = False

    def freeze_backbone(self, frozen=True):
        """Leave only the head trainable, and hold the backbone's BatchNorm statistics (and dropout) still."""
        self.requires_grad_(not frozen)
        for name in head_layers(self):
            self.get_submodule(name).requires_grad_()
        self.frozen = frozen
        self.train(self.training)

    def Unfreeze_backbone(self):
        """Make everything trainable again."""
        self.freeze_backbone(False)

    def train(self, mode=True):
        super().train(mode and not self.frozen)
        self.training = mode
        return self


def head_layers(model):
    """A set with the name of the layer that gives class scores, which is the network's last Linear or Conv2d."""
    layers = [
        name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))
    ]
    return set(layers[-1:])


def check_name(backbone):
    """The torchvision (or own) name of `backbone`; UserError with the nearest names when there is none."""
    name, known = DOCUMENTED_NAMES.get(backbone, backbone), models.list_models(module=models) + OWN
    if name not in known:
        raise UserError(
            f"backbone = {backbone!r} is not a network{did_you_mean(backbone, known + list(DOCUMENTED_NAMES))}; "
            f"the names are torchvision's classification models and the files of nets/"
        )
    return name


def is_transformer(backbone):
    return check_name(backbone).startswith(("vit_", "swin_", "maxvit_"))


@contextmanager
def size_errors(backbone, input_shape):
    """What torchvision's networks raise for pictures that they cannot take is a UserError; one's own keep theirs."""
    try:
        yield
    except Exception as error:
        if check_name(backbone) in OWN:
            raise
        raise UserError(
            f"input_shape = {list(input_shape)} is too small (or of a shape that does not fit) for "
            f"{backbone}: {' '.join(str(error).split())[:200]}"
        ) from error


def get_model(backbone, num_classes, input_shape=(224, 224), pretrained=False):
    """The network `backbone` with a new head of `num_classes` outputs for pictures of `input_shape` (height, width).

    Takes float (N, 3, H, W) pictures, ImageNet-normalised. pretrained: with torchvision's default weights but for the
    head. UserError: an unknown name, a size that the network cannot take.
    """
    name, options = check_name(backbone), {"num_classes": num_classes}
    if name in OWN:
        options["input_shape"] = tuple(input_shape)
    elif name in ("googlenet", "inception_v3"):
        options.update(
            aux_logits=False, transform_input=True, init_weights=True
        )  # their weights are for -1 to 1
    elif name.startswith("vit_"):
        options["image_size"] = input_shape[
            0
        ]  # of square pictures, others are refused when they come
    elif name == "maxvit_t":
        options["input_size"] = tuple(input_shape)
    with size_errors(backbone, input_shape):
        build = (
            getattr(importlib.import_module(f"nets.{name}"), name)
            if name in OWN
            else models.get_model_builder(name)
        )
        model = build(**options)
    model.__class__ = type(type(model).__name__, (Freezable, type(model)), {})
    if pretrained:
        from nets._weights import load_pretrained

        load_pretrained(model, name)
    return model


def load_file(model, path, class_names=None):
    """Give the model what fits of the weights file `path`, also of other trainers' and libraries' (nets/_weights.py)."""
    from nets import _weights

    _weights.load_file(model, path, class_names)


def lay_out(model, device):
    """The model on `device`, in channels_last memory as the pictures, faster for nearly all; on CUDA it computes in TF32."""
    torch.set_float32_matmul_precision("high")
    return model.to(device, memory_format=torch.channels_last)


def profile(model, backbone, input_shape, num_classes):
    """(parameters, FLOPs of one picture, two a multiply-add). UserError: a size or number of classes that does not fit."""
    from torch.utils.flop_counter import (
        FlopCounterMode,  # slow to import, and loader processes need none of it
    )

    # on the meta device nothing is computed
    with (
        size_errors(backbone, input_shape),
        torch.no_grad(),
        FlopCounterMode(display=False) as counter,
    ):
        scores = (
            copy.deepcopy(model).to("meta").eval()(torch.empty(2, 3, *input_shape, device="meta"))
        )
    found = list(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
    if found != [2, num_classes]:
        raise UserError(
            f"{backbone} gives {found} scores for 2 pictures, not [2, {num_classes}]: "
            f"its last layer needs num_classes outputs"
        )
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2
