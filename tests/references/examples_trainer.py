"""pytorch/examples' imagenet script, its recipe at small size: the older transforms, SGD, a tenth
of the rate at each third.

(Its steps of 30 stand for 90 epochs.) --plain leaves its random resized crop out.
"""

import time

import torch
from shared import Clock, arguments
from torch import nn, optim
from torch.utils.data import DataLoader
from torchvision import datasets, models, transforms


def main():
    args, clock = arguments(), Clock()
    torch.manual_seed(args.seed)
    model = models.resnet18(num_classes=10)
    criterion = nn.CrossEntropyLoss()
    optimizer = optim.SGD(
        model.parameters(), 0.1 * args.batch / 256, momentum=0.9, weight_decay=1e-4
    )
    scheduler = optim.lr_scheduler.StepLR(
        optimizer, step_size=max(1, round(args.epochs / 3)), gamma=0.1
    )
    side = (args.size, args.size)
    tensor = [
        transforms.ToTensor(),
        transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ]
    shape = transforms.Resize(side) if args.plain else transforms.RandomResizedCrop(side)
    train_set = datasets.ImageFolder(
        f"{args.data}/train",
        transforms.Compose([shape, transforms.RandomHorizontalFlip(), *tensor]),
    )
    test_set = datasets.ImageFolder(
        f"{args.data}/test", transforms.Compose([transforms.Resize(side), *tensor])
    )
    train_loader = DataLoader(train_set, batch_size=args.batch, shuffle=True, num_workers=2)
    test_loader = DataLoader(test_set, batch_size=args.batch, num_workers=2)
    for _ in range(args.epochs):
        begin = time.perf_counter()
        model.train()
        for images, target in train_loader:
            output = model(images)
            loss = criterion(output, target)
            output.topk(5, 1)[1].t().eq(
                target
            ).float().sum().item()  # its meters read loss and top-1, -5 at every step
            loss.item()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        seconds = time.perf_counter() - begin
        model.eval()
        right = 0
        with torch.no_grad():
            for images, target in test_loader:
                right += (model(images).argmax(1) == target).sum().item()
        scheduler.step()
        clock.epoch(len(train_set), seconds, right / len(test_set))
    clock.report()


if __name__ == "__main__":
    main()
