"""torchvision's reference trainer, its recipe at small size: v2 transforms, SGD, a cosine stepped
once an epoch.

Its random resized crop, made for photos, is kept out with --plain.
"""

import time

import torch
import torchvision
from shared import Clock, arguments
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def train_one_epoch(model, criterion, optimizer, loader):
    model.train()
    for images, targets in loader:
        loss = criterion(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()  # its meter reads it at every step


def evaluate(model, loader):
    model.eval()
    right = 0
    with torch.inference_mode():
        for images, targets in loader:
            right += (model(images).argmax(1) == targets).sum().item()
    return right / len(loader.dataset)


def main():
    args, clock = arguments(), Clock()
    torch.manual_seed(args.seed)
    side, last = (
        (args.size, args.size),
        [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)],
    )
    first = [
        v2.Resize(side) if args.plain else v2.RandomResizedCrop(side),
        v2.RandomHorizontalFlip(),
    ]
    train = ImageFolder(f"{args.data}/train", v2.Compose(first + last))
    test = ImageFolder(f"{args.data}/test", v2.Compose([v2.Resize(side), *last]))
    loader = DataLoader(train, args.batch, shuffle=True, num_workers=2)
    test_loader = DataLoader(test, args.batch, num_workers=2)
    model = torchvision.models.resnet18(num_classes=len(train.classes))
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(
        model.parameters(), 0.1 * args.batch / 256, momentum=0.9, weight_decay=1e-4
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    for _ in range(args.epochs):
        begin = time.perf_counter()
        train_one_epoch(model, criterion, optimizer, loader)
        seconds = time.perf_counter() - begin
        scheduler.step()
        clock.epoch(len(train), seconds, evaluate(model, test_loader))
    clock.report()


if __name__ == "__main__":
    main()
