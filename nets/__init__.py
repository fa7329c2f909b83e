"""Networks by name: every torchvision classifier, and each network of one's own in a file of this folder.

A file nets/my_net.py has a function my_net(num_classes, input_shape) that returns a torch.nn.Module from (N, 3, H, W)
pictures to (N, num_classes) scores, last layer the head; backbone = 'my_net'. nets/resnet9.py is the default.
"""
import copy
import importlib
import math
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torchvision import models

from utils.errors import UserError, nearest

DOCUMENTED_NAMES = {"mobilenetv2": "mobilenet_v2", "swin_transformer_tiny": "swin_t",
                    "swin_transformer_small": "swin_s", "swin_transformer_base": "swin_b"}


class Freezable:
    """The two documented methods, given to whatever network get_model builds (its state_dict keys stay its own)."""
    frozen = False

    def freeze_backbone(self, frozen=True):
        """Leave only the head trainable, and hold the backbone's BatchNorm statistics (and dropout) still."""
        head = head_layers(self)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(not frozen or name.rpartition(".")[0] in head)
        self.frozen = frozen
        self.train(self.training)

    def Unfreeze_backbone(self):
        """Make everything trainable again."""
        self.freeze_backbone(False)

    def train(self, mode=True):
        super().train(mode)
        for module in self.modules() if mode and self.frozen else ():
            module.training = module is self  # its own flag decides which outputs a network with auxiliary heads returns
        return self


def head_layers(model):
    """Names of the layers that give class scores: the network's last Linear or Conv2d and its auxiliary heads'."""
    layers = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    if not layers:
        raise UserError("the network has no Linear or Conv2d layer, so there is no head to tell from a backbone")
    auxiliary = [[n for n in layers if n.startswith(part + ".")] for part in ("aux1", "aux2", "AuxLogits")]
    return {layers[-1], *(names[-1] for names in auxiliary if names)}


def own_networks():
    """Names of the networks in this folder's own files."""
    return [file.stem for folder in __path__ for file in Path(folder).glob("[!_]*.py")]


def check_name(backbone):
    """The torchvision (or own) name of `backbone`; UserError with the nearest names when there is none."""
    name = DOCUMENTED_NAMES.get(backbone, backbone)
    known = models.list_models(module=models) + own_networks()
    if name not in known:
        raise UserError(f"backbone = {backbone!r} is not a network{nearest(backbone, known + list(DOCUMENTED_NAMES))}; "
                        f"the names are torchvision's classification models and the files of nets/")
    return name


def is_transformer(backbone):
    return check_name(backbone).startswith(("vit_", "swin_", "maxvit_"))


@contextmanager
def size_errors(backbone, input_shape):
    """What torchvision's networks raise for pictures that they cannot take becomes a UserError; one's own keep their words."""
    try:
        yield
    except (RuntimeError, ValueError, ZeroDivisionError, AssertionError, IndexError) as error:
        if isinstance(error, UserError) or check_name(backbone) in own_networks():
            raise
        line, *_ = str(error).split("\n")
        raise UserError(f"input_shape = {list(input_shape)} is too small (or of a shape that does not fit) for "
                        f"{backbone}: {line}") from error


def build(name, num_classes, input_shape):
    """An untrained network with torchvision's own builder."""
    height, width = input_shape
    if name in own_networks():
        return getattr(importlib.import_module(f"nets.{name}"), name)(num_classes=num_classes, input_shape=input_shape)
    options = {"num_classes": num_classes}
    if name in ("googlenet", "inception_v3"):
        # transform_input is what their published weights expect after ImageNet normalisation; harmless without them
        options.update(transform_input=True, init_weights=True)
        options["aux_logits"] = name == "googlenet" or min(height, width) >= 299  # Inception's has no room below
    if name.startswith("vit_"):
        options["image_size"] = height  # of square pictures, others are refused when they come
    if name == "maxvit_t":
        # the paper's windows are 1/32 of the picture; torchvision's function, of which the rest is, fixes them at 7
        window = 7 if height % 224 == width % 224 == 0 else math.gcd(height // 32, width // 32)
        return models.MaxVit(input_size=(height, width), stem_channels=64, block_channels=[64, 128, 256, 512],
                             partition_size=window, block_layers=[2, 2, 5, 2],
                             head_dim=32, stochastic_depth_prob=0.2, num_classes=num_classes)
    return models.get_model(name, weights=None, **options)


def get_model(backbone, num_classes, input_shape=(224, 224), pretrained=False):
    """The network `backbone` with a new head of `num_classes` outputs for pictures of `input_shape` (height, width).

    Takes float (N, 3, H, W) pictures, ImageNet-normalised. With `pretrained`, torchvision's default weights are
    loaded into everything but the head. UserError: an unknown name, a size that the network cannot take.
    """
    name = check_name(backbone)
    with size_errors(backbone, input_shape):
        model = build(name, num_classes, tuple(input_shape))
    model.__class__ = type(type(model).__name__, (Freezable, type(model)), {})
    if pretrained:
        from nets._weights import load_pretrained
        load_pretrained(model, name)
    return model


def load_file(model, path, class_names=None):
    """Give the model what fits of the weights file `path`, also of other trainers' and libraries' (nets/_weights.py)."""
    from nets._weights import load_matching, load_weights
    load_matching(model, load_weights(path), path, class_names)


def lay_out(model, device, channels_last):
    """The model on `device`: the one place that decides its memory format and, on CUDA, TF32. Pictures come in channels_last."""
    torch.set_float32_matmul_precision("high")
    if not channels_last:
        model.register_forward_pre_hook(lambda module, pictures: (pictures[0].contiguous(), *pictures[1:]))
    return model.to(device, memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def profile(model, backbone, input_shape, num_classes):
    """(parameters, FLOPs of one picture, whether it has BatchNorm), found on the meta device, without computing.

    A training step of two pictures is tried as well: UserError when they are too small for the network, or its scores are not
    (N, num_classes). FLOPs count a multiply-add as two, as torch.utils.flop_counter does.
    """
    from torch.utils.flop_counter import FlopCounterMode  # slow to import, and loader processes need none of it
    trial, pictures = copy.deepcopy(model).to("meta"), torch.empty(2, 3, *input_shape, device="meta")
    with size_errors(backbone, input_shape), torch.no_grad():
        trial.train()(pictures)
        with FlopCounterMode(display=False) as counter:
            scores = trial.eval()(pictures)
    found = list(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
    if found != [2, num_classes]:
        raise UserError(f"{backbone} gives {found} scores for 2 pictures, not [2, {num_classes}]: its last layer needs num_classes "
                        f"outputs")
    has_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2, has_norm
