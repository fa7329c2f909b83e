"""Write a trained run as a program that runs without this repository: python -m utils.export RUN

RUN/model.pt2 is a torch.export program: uint8 (N, 3, H, W) pictures of the run's input_shape → (N, classes)
probabilities; with onnx and onnxscript installed, RUN/model.onnx is the same.
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
from utils.trained import TrainedRun, command


class Program(torch.nn.Module):
    """Normalisation, network and probabilities in one."""

    def __init__(self, model, settings={}):
        super().__init__()
        self.model, self.settings = model, settings

    def forward(self, images):
        inputs = normalize(images, images.device, self.settings)
        return task.probabilities(task.logits_from(self.model(inputs)))


def export(run, weights=None):
    """Write RUN/model.pt2, and RUN/model.onnx where its packages are installed; returns the paths."""
    run = TrainedRun(run, weights)
    module = Program(run.model.cpu().to(memory_format=torch.contiguous_format), run.settings).eval()
    example, sizes = (
        torch.zeros(2, 3, *run.settings["input_shape"], dtype=torch.uint8),
        ({0: torch.export.Dim("batch")},),
    )
    memory = io.BytesIO()  # on a full disk PyTorch's own writer aborts
    torch.export.save(
        torch.export.export(module, (example,), dynamic_shapes=sizes),
        memory,
        extra_files={
            "class_names.json": json.dumps(run.class_names),
            # how a picture becomes the program's input
            "pictures.json": json.dumps(
                {name: run.settings[name] for name in ("input_shape", "resize", "val_crop")}
            ),
        },
    )
    programs = {Path(run.folder, "model.pt2"): memory.getvalue()}
    if find_spec("onnx") and find_spec("onnxscript"):
        onnx = torch.onnx.export(
            module,
            (example,),
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=["probabilities"],
            dynamic_shapes=sizes,
        )
        programs[Path(run.folder, "model.onnx")] = onnx.model_proto.SerializeToString()
    for path, program in programs.items():
        save_file(path, lambda file: file.write(program))
        print(f"wrote {printable(path)} ({len(program) / 1e6:.1f} MB)", flush=True)
    return list(programs)


def main(arguments=None):
    options = command("export", __doc__).parse_args(arguments)
    export(options.run, options.weights)


if __name__ == "__main__":
    main()
