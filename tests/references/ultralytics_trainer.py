"""ultralytics' classifier: the network that it builds from torchvision's resnet18, untrained, under
its own head.

Its defaults are AdamW by itself, crops, RandAugment, erasing, EMA, one OpenMP thread. --plain: only
a flip.
"""

import os
import tempfile
import time
from pathlib import Path

from shared import Clock, arguments

scratch = tempfile.TemporaryDirectory()
os.environ.update(YOLO_CONFIG_DIR=scratch.name, YOLO_OFFLINE="true", YOLO_AUTOINSTALL="false")
from ultralytics import YOLO, settings  # noqa: E402 reads the lines above

NETWORK = """
nc: 10
backbone:
  - [-1, 1, TorchVision, [512, resnet18, null, True, 2]]
head:
  - [-1, 1, Classify, [nc]]
"""


def main():
    args, clock = arguments(), Clock()
    settings.update(
        {
            name: False
            for name in ("sync", "tensorboard", "wandb", "mlflow", "comet", "clearml", "neptune")
            if name in settings
        }
    )
    network = Path(scratch.name, "resnet18-cls.yaml")
    network.write_text(NETWORK)
    begun, trained = [], []
    model = YOLO(str(network), task="classify")
    model.add_callback("on_train_epoch_start", lambda trainer: begun.append(time.perf_counter()))
    model.add_callback("on_train_epoch_end", lambda trainer: trained.append(time.perf_counter()))
    model.add_callback(
        "on_fit_epoch_end",
        lambda trainer: (
            len(trained) > len(clock.top1)
            and clock.epoch(
                len(trainer.train_loader.dataset),
                trained[-1] - begun[-1],
                trainer.metrics["metrics/accuracy_top1"],
            )
        ),
    )
    plain = (
        dict(auto_augment=None, erasing=0.0, scale=0.0, hsv_h=0.0, hsv_s=0.0, hsv_v=0.0)
        if args.plain
        else {}
    )
    model.train(
        data=args.data,
        epochs=args.epochs,
        batch=args.batch,
        imgsz=args.size,
        seed=args.seed,
        device="cpu",
        workers=2,
        amp=False,
        plots=False,
        pretrained=False,
        project=scratch.name,
        name="run",
        split="test",
        **plain,
    )
    clock.report()


if __name__ == "__main__":
    main()
