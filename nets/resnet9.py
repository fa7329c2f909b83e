"""A residual network to read, for small pictures; and the example of a network of your own.

The ResNet-9 of DAWNBench's fastest CIFAR-10 entries (David Page, "How to train your ResNet",
2018), narrower: at width 24 it has 0.93 million parameters. Its last function is all that get_model
asks of a file nets/NAME.py.
"""

from torch import nn

from utils.plumbing.errors import UserError


def convolution(inputs, outputs, stride=1, pool=False):
    """Return 3×3 convolution, BatchNorm, ReLU: (N, inputs, H, W) → (N, outputs, H / stride, …).

    pool: halve the sides before BatchNorm, which then has a quarter of the work.
    """
    # BatchNorm has the bias
    layers = [nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)]
    if pool:
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.BatchNorm2d(outputs), nn.ReLU())


class Residual(nn.Sequential):
    """Two convolutions whose result is added to what came in: (N, channels, H, W) → the same."""

    def __init__(self, channels):
        super().__init__(convolution(channels, channels), convolution(channels, channels))

    def forward(self, pictures):
        return pictures + super().forward(pictures)


class ResNet9(nn.Module):
    """Nine layers with weights: eight convolutions and the head.

    width: channels of the first layer, an eighth of the last one's; stride: the first layer's.
    """

    def __init__(self, num_classes, width, stride):
        super().__init__()
        self.body = nn.Sequential(
            convolution(3, width, stride),
            convolution(width, 2 * width, pool=True),
            Residual(2 * width),
            convolution(2 * width, 4 * width, pool=True),
            convolution(4 * width, 8 * width, pool=True),
            Residual(8 * width),
        )
        self.head = nn.Linear(8 * width, num_classes)

    def forward(self, pictures):
        """Return float (N, num_classes) logits of float (N, 3, H, W) pictures."""
        features = self.body(pictures).amax((2, 3))
        return self.head(features) / 8  # Page's scale: larger logits learn badly at first


def resnet9(num_classes, input_shape, width=24):
    """Return the network for pictures of input_shape (height, width), both 8 pixels or more."""
    if min(input_shape) < 8:
        raise UserError(
            f"input_shape = {list(input_shape)}: resnet9 halves pictures three times, "
            f"so both sides need 8 pixels or more"
        )
    stride = 2 if min(input_shape) >= 48 else 1  # large pictures are slow at full size
    return ResNet9(num_classes, width, stride)
