"""Reading pictures in the usual way, on one core, as in a data-loader worker.

A round for each line of standard input.
"""

import json
import sys

import torch
from PIL import Image
from shared import serve
from torch.utils.data import Dataset, default_collate
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms import v2

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Usual(Dataset):
    """The usual torchvision pipeline.

    Pillow, a random or a centre crop of 224, float32, normalised.
    """

    def __init__(self, paths, random):
        first = (
            [v2.RandomResizedCrop(224), v2.RandomHorizontalFlip()]
            if random
            else [v2.Resize(256), v2.CenterCrop(224)]
        )
        self.paths = paths
        self.transform = v2.Compose(
            first
            + [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
        )

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return self.transform(Image.open(self.paths[index]).convert("RGB")), 0


def work(kind, paths):
    """What a round does: training, evaluation, or decoding alone by pillow or torchvision."""
    usual = Usual(paths, kind == "training")
    return {
        "pillow": lambda: [Image.open(path).load() for path in paths],
        "torchvision": lambda: [decode_jpeg(read_file(path), ImageReadMode.RGB) for path in paths],
    }.get(kind, lambda: default_collate([usual[i] for i in range(len(paths))]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(work(**json.loads(sys.argv[1])))
