"""Show what a trained run looked at in pictures: python -m utils.explain RUN PICTURE…

Writes explained_1.png, explained_2.png, … into the run's folder, or --out: the picture as the
network saw it, and beside it the places that spoke for the class it names, red the most.
"""

from utils.plumbing.start import start_program

if __name__ == "__main__":
    start_program()


import sys

import torch
import torch.nn.functional as F
from PIL import Image

from nets import ATTENTION
from utils import task
from utils.pictures import normalize
from utils.plumbing.errors import UserError, printable
from utils.plumbing.files import save_image
from utils.predict import Classifier, find_pictures, read_picture
from utils.trained import command, free_outputs


def has_places(output, images):
    """Return whether a module's output is a map (1, C, h, w) of the picture (1, 3, H, W)."""
    if not isinstance(output, torch.Tensor) or output.dim() != 4:
        return False
    height, width = output.shape[2:]
    stretch = height / width / (images.shape[2] / images.shape[3])
    return height * width > 1 and 0.5 < stretch < 2  # else it is of another layout


def last_map(network, images):
    """Return (logits, map): the last output of a module that still has places.

    UserError: the network has none, or looks at whole pictures after it, as a ViT does.
    """
    maps = []

    def keep(module, inputs, output):
        if isinstance(module, ATTENTION):
            maps.clear()  # each place now knows of the others
        elif has_places(output, images):
            maps.append(output)

    hooks = [module.register_forward_hook(keep) for module in network.modules()]
    logits = task.logits_from(network(images))
    for hook in hooks:
        hook.remove()
    if not maps:
        raise UserError(
            f"{type(network).__name__} has no layer with places of the picture before its logits, "
            f"so there is nothing to show: networks of convolutions have one for larger pictures"
        )
    return logits, maps[-1]


def look(run, images):
    """Return (logits, heat) of uint8 (1, 3, H, W): heat is float (H, W) from 0 to 1.

    Grad-CAM (Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based
    Localization", 2017): the channels of the last map, weighted by the mean gradient of the highest
    logit; what speaks against the class is cut off.
    """
    device = next(run.network.parameters()).device
    logits, features = last_map(run.network, normalize(images, device, run.settings))
    [gradient] = torch.autograd.grad(logits.max(), features)
    weights = gradient.mean((2, 3), keepdim=True)
    heat = (weights * features).sum(1, keepdim=True).relu()
    heat = F.interpolate(heat, images.shape[2:], mode="bilinear")[0, 0]
    return logits.detach(), (heat / heat.max().clamp(min=1e-12)).detach().cpu()


def colour(picture, heat):
    """Return uint8 (H, W, 3) of a picture under its heat: 0 blue, 1 red."""
    distance = (4 * heat[..., None] - torch.tensor([3, 2, 1])).abs()
    colours = 255 * (1.5 - distance).clamp(0, 1)
    return (0.5 * picture + 0.5 * colours).round().to(torch.uint8)


def explain(run, picture):
    """Return (prediction, image) of a picture; ValueError: there is none, with the reason."""
    images = read_picture(run, picture)
    logits, heat = look(run, images)
    [prediction] = task.top_predictions(logits, run.class_names)
    if isinstance(prediction, str):
        raise ValueError(prediction)
    original = images[0].permute(1, 2, 0)
    both = torch.cat([original, colour(original, heat)], 1)
    image = Image.fromarray(both.numpy())
    scale = max(1, 256 // image.height)
    return prediction, image.resize((image.width * scale, image.height * scale))


def main(arguments=None):
    parser = command("explain", __doc__)
    parser.add_argument("pictures", nargs="+", help="files, folders, or - for a list on stdin")
    parser.add_argument("--out", help="folder to write into (the run's)")
    options = parser.parse_args(arguments)
    run = Classifier(options.run, options.weights)
    paths = list(find_pictures(options.pictures))
    names = [f"explained_{number}.png" for number in range(1, len(paths) + 1)]
    out = free_outputs(options.out or run.folder, names, "name another folder with --out")
    failed = False
    for path, name in zip(paths, names):
        try:
            prediction, image = explain(run, path)
        except UserError:
            raise
        except ValueError as error:
            failed = True
            print(f"{printable(path)}: {printable(error)}", file=sys.stderr)
            continue
        save_image(out / name, image)
        text = task.prediction_text(*prediction[0])
        print(f"{printable(path)}: {printable(text)}, {printable(out / name)}", flush=True)
    raise SystemExit(int(failed))


if __name__ == "__main__":
    main()
