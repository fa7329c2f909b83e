"""resnet9 at width 32, 1.65 million parameters, for more pictures: how to vary a network."""

from nets.resnet9 import resnet9


def resnet9_wide(num_classes, input_shape):
    return resnet9(num_classes, input_shape, width=32)
