"""timm by its own parts, set as its train.py sets them by default.

Crops, colour jitter, label smoothing 0.1, five epochs of warm-up. --plain: only a flip, and one
epoch of warm-up followed at every step, which suits a short training better.
"""

import time

import timm
import torch
from shared import Clock, arguments
from timm.data import create_dataset, create_loader
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, accuracy, random_seed


def main():
    args, clock = arguments(), Clock()
    random_seed(args.seed)
    device = torch.device("cpu")
    model = timm.create_model("resnet18", num_classes=10).to(device)
    train_set = create_dataset(
        "", root=args.data, split="train", is_training=True, batch_size=args.batch, seed=args.seed
    )
    test_set = create_dataset("", root=args.data, split="test", batch_size=args.batch)
    common = dict(
        input_size=(3, args.size, args.size), batch_size=args.batch, num_workers=2, device=device
    )
    own = dict(interpolation="random")
    if args.plain:
        own = dict(interpolation="bilinear", scale=(1.0, 1.0), ratio=(1.0, 1.0), color_jitter=0.0)
    loader = create_loader(train_set, is_training=True, **common, **own)
    test_loader = create_loader(test_set, crop_pct=1.0, **common)
    optimizer = create_optimizer_v2(
        model, opt="sgd", lr=0.1 * args.batch / 256, weight_decay=2e-5, momentum=0.9
    )
    scheduler, epochs = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=args.epochs,
        warmup_lr=1e-5,
        warmup_epochs=1 if args.plain else 5,
        step_on_epochs=not args.plain,
        updates_per_epoch=len(loader),
    )
    criterion, updates = LabelSmoothingCrossEntropy(0.1), 0
    scheduler.step_update(0) if args.plain else scheduler.step(0)
    for epoch in range(epochs):
        begin = time.perf_counter()
        model.train()
        for images, target in loader:
            loss = criterion(model(images), target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            updates += 1
            scheduler.step_update(num_updates=updates)
        seconds = time.perf_counter() - begin
        model.eval()
        top1 = AverageMeter()
        with torch.no_grad():
            for images, target in test_loader:
                top1.update(accuracy(model(images), target)[0].item() / 100, len(target))
        scheduler.step(epoch + 1)
        clock.epoch(len(loader) * args.batch, seconds, top1.avg)
    clock.report()


if __name__ == "__main__":
    main()
