"""Write a trained run as a program that runs without this repository: python -m utils.export RUN

RUN/model.pt2 is a torch.export program: uint8 (N, 3, H, W) pictures of the run's input_shape → (N, classes)
probabilities; with onnx and onnxscript installed, RUN/model.onnx is the same.
"""
import io
import json
from importlib.util import find_spec

import torch

from utils import recipe
from utils.errors import plain
from utils.files import save_file, writable
from utils.pictures import normalize
from utils.trained import TrainedRun, command


class Program(torch.nn.Module):
    """Normalisation, network and probabilities in one."""

    def __init__(self, model, settings={}):
        super().__init__()
        self.model, self.settings = model, settings

    def forward(self, images):
        return recipe.probabilities(self.model(normalize(images, images.device, self.settings)))


def export(run, weights=None):
    """Write RUN/model.pt2, and RUN/model.onnx where its packages are installed; returns the paths."""
    run = TrainedRun(run, weights)
    written = [writable(run.folder, "the program would stand there") / "model.pt2"]
    module = Program(run.model.cpu().to(memory_format=torch.contiguous_format), run.settings).eval()
    example, sizes = torch.zeros(2, 3, *run.settings["input_shape"], dtype=torch.uint8), ({0: torch.export.Dim("batch")},)
    program, memory = torch.export.export(module, (example,), dynamic_shapes=sizes), io.BytesIO()
    torch.export.save(program, memory, extra_files={"class_names.json": json.dumps(run.class_names)})
    save_file(written[0], lambda file: file.write(memory.getbuffer()))
    if find_spec("onnx") and find_spec("onnxscript"):
        onnx = torch.onnx.export(module, (example,), dynamo=True, verbose=False, input_names=["images"],
                                 output_names=["probabilities"], dynamic_shapes=sizes)
        written.append(written[0].with_suffix(".onnx"))
        save_file(written[1], lambda file: file.write(onnx.model_proto.SerializeToString()))
    else:
        print("no ONNX file: pip install onnx onnxscript for one")
    return written


def main(arguments=None):
    options = command("export", __doc__).parse_args(arguments)
    for path in export(options.run, options.weights):
        print(f"wrote {plain(path)} ({path.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
