"""Networks by name: every torchvision classifier, and each network of one's own in a file of this folder.

A network of one's own is a file nets/my_net.py with a function my_net(num_classes, input_shape) that returns
a torch.nn.Module from (N, 3, H, W) pictures to (N, num_classes) scores, last layer the head; backbone = 'my_net'.
nets/resnet9.py is one, and the default.
"""
import importlib
import math
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torchvision import models

from utils.errors import UserError, nearest, shown

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
        if height != width:
            raise UserError(f"input_shape = {list(input_shape)}: {name} takes square pictures only")
        options["image_size"] = height
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
        from nets._weights import load_matching
        load_matching(model, pretrained_state(name), f"torchvision's weights of {name}")
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


def pretrained_state(name):
    """torchvision's default state_dict of the network `name`, from torch.hub's cache or the network."""
    if name in own_networks():
        raise UserError(f"pretrained = True: {name} is a network of nets/, nobody publishes weights of it; "
                        f"set pretrained = False, or model_path")
    weights = models.get_model_weights(name).DEFAULT
    target = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
    try:
        return weights.get_state_dict(progress=True, check_hash=True, weights_only=True, map_location="cpu")
    except Exception as error:  # no network, a cut download, a wrong hash: the remedy is the same
        raise UserError(f"the pretrained weights of {name} could not be loaded ({error}): put {weights.url} "
                        f"at {target}, or set pretrained = False") from error


def profile(model, backbone, pictures, num_classes):
    """(parameters, FLOPs of one picture, whether it has BatchNorm), found on the meta device, without computing.

    pictures: float (N, 3, H, W), of which the shape counts. A training step of two pictures is tried as well: UserError
    when they are too small for the network, or its scores are not (N, num_classes).
    FLOPs count a multiply-add as two, as torch.utils.flop_counter does.
    """
    from torch.utils.flop_counter import FlopCounterMode
    weights = {k: v.to("meta") for k, v in (*model.named_parameters(), *model.named_buffers())}
    pictures, mode = torch.empty(2, *pictures.shape[1:], device="meta"), model.training
    with size_errors(backbone, pictures.shape[2:]), torch.no_grad():
        torch.func.functional_call(model.train(), weights, (pictures,))
        with FlopCounterMode(display=False) as counter:
            scores = torch.func.functional_call(model.eval(), weights, (pictures,))
    model.train(mode)
    if getattr(scores, "shape", None) != (2, num_classes):
        raise UserError(f"{backbone} gives {shown(list(getattr(scores, 'shape', [type(scores).__name__])))} scores for 2 pictures, "
                        f"not [2, {num_classes}]: its last layer needs num_classes outputs")
    has_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2, has_norm
