"""Show what a trained run looked at in pictures: python -m utils.explain RUN PICTURE…

Writes explained_1.png, explained_2.png, … into the run's folder, or --out: the picture as the
network saw it, and beside it the places that spoke for the class it names, red the most.
"""

from utils.plumbing.start import start_program

if __name__ == "__main__":
    start_program()


import sys
from contextlib import ExitStack
from threading import get_ident

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from utils import task
from utils.fit import network_inputs
from utils.plumbing.errors import UserError, printable
from utils.plumbing.files import make_folder, save_image
from utils.trained import (
    Classifier,
    add_pictures,
    begin_command,
    describe_prediction,
    find_pictures,
)

SIZE = (1024, 512)  # of what is drawn, in pixels: two pictures side by side fit into it


def explain(classifier, picture):
    """Return (prediction, image) of a picture; ValueError: there is none, with the reason.

    image: the picture, and beside it the same under its heat, from blue to red.
    """
    prediction = classifier(picture)
    if not prediction:
        raise ValueError("no class is named, so there is nothing to show")
    class_id = classifier.class_names.index(prediction[0][0])
    images, targets = classifier.read(picture)
    heat = Image.fromarray((255 * grad_cam(classifier, images, targets, class_id)).byte().numpy())
    colours = ImageOps.colorize(heat, "blue", "red", mid="lime")
    original = Image.fromarray(images[0].permute(1, 2, 0).numpy())
    both = np.hstack([original, Image.blend(original, colours, 0.5)])
    return prediction, ImageOps.contain(Image.fromarray(both), SIZE)


def grad_cam(classifier, images, targets, class_id):
    """Return what speaks for a class in uint8 (1, 3, H, W): float (H, W) from 0 to 1, on the CPU.

    Grad-CAM (Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based
    Localization", 2017): the channels of the last map, weighted by the mean gradient of the class'
    logit; what speaks against the class is cut off.
    """
    inputs, _ = network_inputs(classifier.network, images, targets, classifier.settings)
    for parameter in classifier.network.parameters():  # it may have fixed its backbone
        parameter.requires_grad_(parameter.is_floating_point())
    logits, features = last_map(classifier.network, inputs, images.shape)
    [gradient] = torch.autograd.grad(logits[0, class_id], features)
    weights = gradient.mean((2, 3), keepdim=True)
    heat = (weights * features).sum(1, keepdim=True).relu()
    heat = F.interpolate(heat, images.shape[2:], mode="bilinear")[0, 0]
    heat = heat / heat.max().clamp(min=1e-12)
    return heat.detach().cpu()


def last_map(network, inputs, shape):
    """Return (logits, map): the last output (1, C, h, w) of a module that still has places.

    shape: the pictures', (1, 3, H, W). UserError: the last output with more than one value a
    channel is no map, as in a ViT, or there is none.
    """
    outputs = []
    thread = get_ident()  # another one may use the network meanwhile

    def keep(module, inputs, output):
        if get_ident() != thread or not isinstance(output, torch.Tensor):
            return
        if output.shape[2:].numel() > 1:
            outputs.append(output)

    with ExitStack() as hooks:
        for module in network.modules():
            hooks.enter_context(module.register_forward_hook(keep))
        logits = task.logits_from(network(inputs))
    if not outputs or not is_map(outputs[-1], shape):
        raise UserError(
            f"{type(network).__name__} has no feature map before its logits, so there is nothing "
            f"to show: convolutional networks have one where input_shape is large enough"
        )
    return logits, outputs[-1]


def is_map(output, shape):
    """Return whether an output is (1, C, h, w), with the proportions of a shape (1, 3, H, W)."""
    if output.dim() != 4:
        return False
    height, width = output.shape[2:]
    return 0.2 < height / width * shape[3] / shape[2] < 5


def main(arguments=None):
    parser = begin_command("explain", __doc__)
    add_pictures(parser)
    parser.add_argument("--out", help="folder to write into (the run's)")
    options = parser.parse_args(arguments)
    classifier = Classifier(options.run, options.weights, options.mirrored)
    out = make_folder(options.out or classifier.folder, "name another folder with --out")
    failed = False
    for number, path in enumerate(find_pictures(options.pictures), 1):
        try:
            prediction, image = explain(classifier, path)
        except ValueError as error:
            failed = True
            print(printable(f"{path}: {error}"), file=sys.stderr)
            continue
        file = out / f"explained_{number}.png"
        save_image(file, image)
        print(printable(f"{path}: {describe_prediction(prediction)}, {file}"), flush=True)
    raise SystemExit(int(failed))


if __name__ == "__main__":
    main()
