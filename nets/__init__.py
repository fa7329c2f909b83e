"""Networks by name: every torchvision classifier, and each file of this folder.

backbone = "my_net" is the function my_net(num_classes, input_shape) in nets/my_net.py; the default
is resnet9.py.
"""

import copy
import importlib
from functools import cache
from pathlib import Path

import torch
from torch import nn
from torchvision import models
from torchvision.models.maxvit import RelativePositionalMultiHeadAttention
from torchvision.models.swin_transformer import ShiftedWindowAttention

from utils.plumbing.errors import UserError, did_you_mean
from utils.task import check_outputs

OWN = [file.stem for file in Path(__file__).parent.glob("[!_]*.py")]  # the networks of this folder
DOCUMENTED_NAMES = {
    "mobilenetv2": "mobilenet_v2",
    "swin_transformer_tiny": "swin_t",
    "swin_transformer_small": "swin_s",
    "swin_transformer_base": "swin_b",
}
ATTENTION = (nn.MultiheadAttention, ShiftedWindowAttention, RelativePositionalMultiHeadAttention)


class Freezable:
    """The two documented methods, given to whatever network get_model builds.

    A network may say itself which of its modules are heads: head_names = ["head", …].
    """

    frozen = ()  # names of the parameters that freeze_backbone holds still

    def freeze_backbone(self):
        """Train the head alone, and hold the backbone's BatchNorm statistics and dropout still."""
        self.Unfreeze_backbone()
        heads = head_layers(self)
        self.frozen = [
            name
            for name, parameter in self.named_parameters()
            if parameter.requires_grad and name.rpartition(".")[0] not in heads
        ]
        for name in self.frozen:
            self.get_parameter(name).requires_grad_(False)
        self.train(self.training)

    def Unfreeze_backbone(self):
        """Make trainable again what freeze_backbone has held still."""
        for name in self.frozen:
            self.get_parameter(name).requires_grad_()
        self.frozen = ()
        self.train(self.training)

    def train(self, mode=True):
        """Switch modes as usual, but leave all but the head in evaluation mode while frozen."""
        super().train(mode and not self.frozen)
        for name in head_names(self):
            self.get_submodule(name).train(mode)
        self.training = mode  # the one asked for, which freezing and unfreezing apply again
        return self

    def __reduce__(self):
        """Pickle by the network's own class: pickle cannot find the one that `freezable` made."""
        own_class = type(self).__bases__[1]
        return empty_network, (own_class,), self.__dict__


@cache
def freezable(own_class):
    """Return a subclass of a network's class that has the methods of Freezable."""
    return type(own_class.__name__, (Freezable, own_class), {})


def empty_network(own_class):
    """Return what pickle fills with a network's state."""
    made = freezable(own_class)
    return made.__new__(made)


def head_layers(model):
    """Return the names of the modules that give the logits, and of all inside them, as a set."""
    heads = set()
    for name in head_names(model):
        inside = model.get_submodule(name).named_modules(prefix=name)
        heads.update(dict(inside))
    return heads


def head_names(model):
    """Return the network's attribute head_names, or [the name of its last Linear or Conv2d]."""
    if hasattr(model, "head_names"):
        return model.head_names
    kinds = (nn.Linear, nn.Conv2d)
    layers = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    return layers[-1:]


def network_name(backbone):
    """Return the torchvision (or own) name of `backbone`. UserError: there is no such network."""
    name = backbone if backbone in OWN else DOCUMENTED_NAMES.get(backbone, backbone)
    known = models.list_models(module=models) + OWN
    if name not in known:
        advice = did_you_mean(backbone, known + list(DOCUMENTED_NAMES))
        raise UserError(
            f"backbone = {backbone!r} is not a network{advice}; "
            f"the names are torchvision's classification models and the files of nets/"
        )
    return name


def is_transformer(model):
    """Return whether a network has layers of attention, so that transformers' rates suit it.

    A network may decide itself, by an attribute: is_transformer = True or False.
    """
    has_attention = any(isinstance(module, ATTENTION) for module in model.modules())
    return getattr(model, "is_transformer", has_attention)


def check_shape(name, input_shape):
    """Raise a UserError for pictures that one of torchvision's transformers cannot take."""
    if name.startswith("vit_"):
        multiple = int(name.rpartition("_")[2])  # the patches' size
    elif name == "maxvit_t":
        multiple = 224  # halves pictures five times, then needs whole windows of 7
    else:
        return
    side = max(1, round(min(input_shape) / multiple)) * multiple
    if list(input_shape) != [side, side]:
        raise UserError(
            f"input_shape = {list(input_shape)}: {name} takes square pictures with sides that are "
            f"multiples of {multiple}, such as [{side}, {side}]"
        )


def get_model(backbone, num_classes, input_shape=(224, 224), pretrained=False):
    """Return the network `backbone`: float32 pictures (N, 3, H, W) → logits (N, num_classes).

    input_shape: the pictures' (height, width). pretrained: with what fits of torchvision's weights.
    UserError: an unknown name, or a size that the network cannot take.
    """
    name = network_name(backbone)
    if name in OWN:
        builder = getattr(importlib.import_module(f"nets.{name}"), name)
        options = {"input_shape": tuple(input_shape)}
    else:
        check_shape(name, input_shape)
        builder = models.get_model_builder(name)
        options = torchvision_options(name, input_shape)
    model = builder(num_classes=num_classes, **options)
    if not isinstance(model, Freezable):  # not wrapped, so that its keys stay torchvision's
        model.__class__ = freezable(type(model))
    if pretrained:
        load_pretrained(model, backbone)
    return model


def torchvision_options(name, input_shape):
    """Return what a builder of torchvision's is given besides num_classes."""
    if name in ("googlenet", "inception_v3"):
        # transform_input: their published weights take pictures from -1 to 1
        return {"aux_logits": False, "transform_input": True, "init_weights": True}
    if name.startswith("vit_"):
        return {"image_size": input_shape[0]}
    if name == "maxvit_t":
        return {"input_size": tuple(input_shape)}
    return {}


def build(settings, num_classes):
    """Return the untrained network of train.py's settings, for training and all commands."""
    return get_model(settings["backbone"], num_classes, settings["input_shape"])


def load_pretrained(model, backbone, settings=None):
    """Load what fits of the weights that torchvision publishes. All processes call it.

    It warns where the settings normalise pictures otherwise.
    """
    from nets import _weights  # imports this file

    _weights.load_pretrained(model, network_name(backbone), settings)


def load_file(model, path, class_names=None, settings=None):
    """Load what fits of a weights file, also of other trainers' and libraries'."""
    from nets import _weights  # imports this file

    _weights.load_file(model, path, class_names, settings)


def to_device(model, device):
    """Return the model on `device` in channels_last memory, which is nearly always faster."""
    model = model.to(device)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dim() == 4:  # torch's own way fails where another tensor has five axes
            tensor.data = tensor.data.to(memory_format=torch.channels_last)
    return model


def profile(model, backbone, input_shape, num_classes):
    """Return (parameters, FLOPs of one picture); a multiply-add counts as two.

    UserError: a size that the network cannot take, or another number of logits than num_classes.
    """
    # slow to import, and loader processes do not need it
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    inputs = torch.empty(2, 3, *input_shape, device="meta")  # two, as check_outputs expects
    on_meta = copy.deepcopy(model).to("meta").eval()  # where nothing is computed
    try:
        with torch.no_grad(), counter:
            outputs = on_meta(inputs)
    except Exception as error:
        if network_name(backbone) in OWN:
            raise
        raise UserError(
            f"input_shape = {list(input_shape)} is too small (or of a shape that does not fit) for "
            f"{backbone}: {' '.join(str(error).split())[:200]}"
        ) from error
    check_outputs(outputs, num_classes)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return parameters, counter.get_total_flops() // 2  # of one of the two pictures
