"""Write a trained run as a program that runs without this project: python -m utils.export RUN

RUN/model.pt2 takes uint8 pictures (N, 3, H, W) of the run's input_shape and returns probabilities
(N, classes). It needs torch alone:

    files = {"class_names.json": "", "pictures.json": ""}
    program = torch.export.load("model.pt2", extra_files=files).module()
    names = json.loads(files["class_names.json"])
    probabilities = program(pictures)

pictures.json tells how a picture becomes its input, in words and by the settings for it. With onnx
and onnxscript installed, RUN/model.onnx is the same; its metadata hold the same texts.
"""

from utils.plumbing.start import start_program

if __name__ == "__main__":
    start_program()


import io
import json
from importlib.util import find_spec
from pathlib import Path

import torch

from utils import task
from utils.pictures import normalize
from utils.plumbing.errors import printable
from utils.plumbing.files import save_file
from utils.trained import Classifier, begin_command

INPUT = (
    "RGB (transparency is white, greys of 16 bits are divided by 257), upright (EXIF orientation "
    "applied); of it with resize 'crop' the largest box in the "
    "middle with the proportions of input_shape (height, width), with 'squeeze' the whole picture; "
    "of that the middle, its sides times val_crop; resized to input_shape (bilinear, antialiased); "
    "uint8 from 0 to 255, (N, 3, height, width)"
)


class Program(torch.nn.Module):
    """Normalisation, network and probabilities in one."""

    def __init__(self, model, settings):
        super().__init__()
        self.model = model
        self.settings = settings

    def forward(self, images):
        inputs = normalize(images, images.device, self.settings)
        return task.probabilities(task.logits_from(self.model(inputs)))


def describe_input(settings):
    """Return how a picture becomes the program's input, as JSON."""
    crop = {name: settings[name] for name in ("input_shape", "resize", "val_crop")}
    return json.dumps({**crop, "input": INPUT})


def to_torch(program, example, sizes, texts):
    """Return the bytes of model.pt2."""
    memory = io.BytesIO()  # on a full disk torch's own writer aborts
    exported = torch.export.export(program, example, dynamic_shapes=sizes)
    torch.export.save(exported, memory, extra_files=texts)
    return memory.getvalue()


def to_onnx(program, example, sizes, texts):
    """Return the bytes of model.onnx."""
    exported = torch.onnx.export(
        program,
        example,
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=["probabilities"],
        dynamic_shapes=sizes,
    )
    proto = exported.model_proto
    for name, text in texts.items():
        proto.metadata_props.add(key=name, value=text)
    return proto.SerializeToString()


def export(run, weights=None, mirrored=False):
    """Write RUN/model.pt2, and RUN/model.onnx where its packages are; return the paths."""
    classifier = Classifier(run, weights, mirrored)
    writers = {"model.pt2": to_torch}
    if find_spec("onnx") and find_spec("onnxscript"):
        writers["model.onnx"] = to_onnx
    model = classifier.model.cpu().to(memory_format=torch.contiguous_format).requires_grad_(False)
    program = Program(model, classifier.settings).eval()
    example = (torch.zeros(2, 3, *classifier.settings["input_shape"], dtype=torch.uint8),)
    sizes = ({0: torch.export.Dim("batch")},)
    texts = {
        "class_names.json": json.dumps(classifier.class_names),
        "pictures.json": describe_input(classifier.settings),
    }
    paths = []
    for name, write in writers.items():
        content = write(program, example, sizes, texts)
        path = Path(classifier.folder, name)
        save_file(path, content)
        paths.append(path)
        print(f"wrote {printable(path)} ({len(content) / 1e6:.1f} MB)")
    print(texts["pictures.json"], flush=True)
    return paths


def main(arguments=None):
    parser = begin_command("export", __doc__)
    export(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    main()
