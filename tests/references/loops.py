"""Bare loops of plain PyTorch: a round for each line of standard input.

'usual': the usual pipeline from files, float32; 'train': ready batches; 'forward': ready batches,
without gradients.
"""

import json
import sys

import torch
import torch.nn.functional as F
import torchvision
from pictures import Usual
from shared import serve
from torch.utils.data import DataLoader


def usual(paths, batch):
    model = torchvision.models.resnet18(num_classes=10).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9, weight_decay=5e-4)
    loader = DataLoader(
        Usual(paths, True),
        batch,
        shuffle=True,
        num_workers=2,
        drop_last=True,
        persistent_workers=True,
    )

    def epoch():
        for images, targets in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), targets)
            loss.backward()
            optimizer.step()
            loss.item()

    return epoch


def ready(kind, network, batch, steps, device="cpu", mixed=False):
    model = torchvision.models.get_model(network, num_classes=10).to(
        device, memory_format=torch.channels_last
    )
    optimizer = torch.optim.SGD(
        model.parameters(), 1e-3, 0.9, weight_decay=5e-4, nesterov=True, fused=True
    )
    images = torch.randn(batch, 3, 224, 224, device=device).contiguous(
        memory_format=torch.channels_last
    )
    targets = torch.randint(0, 10, (batch,), device=device)
    lower = torch.autocast(
        device, torch.float16 if device == "cuda" else torch.bfloat16, enabled=mixed
    )
    scaler = torch.amp.GradScaler(device, enabled=mixed and device == "cuda")
    if device == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")

    def train():
        model.train()
        for _ in range(steps):
            with lower:
                loss = F.cross_entropy(model(images), targets)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

    def forward():
        model.eval()
        with torch.no_grad():
            for _ in range(steps):
                model(images).softmax(1)

    def whole():
        {"train": train, "forward": forward}[kind]()
        if device == "cuda":
            torch.cuda.synchronize()

    return whole


if __name__ == "__main__":
    options = json.loads(sys.argv[1])
    serve(usual(**options) if "paths" in options else ready(**options))
