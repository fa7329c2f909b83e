"""Write a trained run as a program that runs without this repository: python -m utils.export RUN

RUN/model.pt2 is a torch.export program: uint8 (N, 3, H, W) pictures of the run's input_shape → (N, classes)
probabilities; with onnx and onnxscript installed, RUN/model.onnx is the same.
"""
import argparse
import importlib.util
import io
import json
from pathlib import Path

import torch

from utils.checkpoint import save_file
from utils.errors import one_sentence_errors
from utils.pictures import normalize
from utils.predict import Run


class Program(torch.nn.Module):
    """Normalisation, network and softmax in one."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model(normalize(images, images.device, channels_last=False)).softmax(1)


def export(run, weights=None):
    """Write RUN/model.pt2, and RUN/model.onnx where its packages are installed; returns the paths."""
    loaded = Run(run, weights)
    module = Program(loaded.model.cpu().to(memory_format=torch.contiguous_format)).eval()
    example = torch.zeros(2, 3, *loaded.settings["input_shape"], dtype=torch.uint8)
    program = torch.export.export(module, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    memory = io.BytesIO()
    torch.export.save(program, memory, extra_files={"class_names.json": json.dumps(loaded.class_names)})
    written = [Path(run, "model.pt2")]
    save_file(written[0], lambda file: file.write(memory.getbuffer()))
    if importlib.util.find_spec("onnx") and importlib.util.find_spec("onnxscript"):
        onnx = torch.onnx.export(module, (example,), dynamo=True, verbose=False, input_names=["images"],
                                 output_names=["probabilities"], dynamic_shapes=({0: torch.export.Dim("batch")},))
        written.append(Path(run, "model.onnx"))
        save_file(written[1], lambda file: file.write(onnx.model_proto.SerializeToString()))
    else:
        print("no ONNX file: pip install onnx onnxscript for one")
    return written


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m utils.export", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run's folder, logs/…")
    parser.add_argument("--weights", help="weights file (the run's best_epoch_weights.pth)")
    options = parser.parse_args(arguments)
    one_sentence_errors()
    for path in export(options.run, options.weights):
        print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
