"""fp16 = "auto": float16 on CUDA; on a CPU float32 or bfloat16, whichever trains this network faster, found by trying."""
import copy
import time

import torch

from utils.fit import autocast, batch_loss
from utils.pictures import normalize
from utils.processes import world_size
from utils.recipe import Recipe

WORTH = 1.1  # bfloat16 must be faster by this factor, as it rounds to 8 bits


def trial_step(model, images, targets, fp16):
    """Seconds of a training step without the optimizer's part, which is the same in both."""
    begin = time.perf_counter()
    with autocast(False, fp16):
        loss, _ = batch_loss(model(images), images, targets, Recipe())
    loss.backward()
    model.zero_grad()
    return time.perf_counter() - begin


def choose_precision(config, model, num_classes, num_train):
    """fp16, True or False, for 'auto' on a CPU found by trying; the config gets it, and why it is so.

    Tried on a copy of the model with pictures of noise, in turn, four times each at the most, until 5 s or 2 % of the
    training's `steps` have passed. Instruction sets do not tell: bfloat16 makes some networks three times as fast and
    others half as fast on one machine.
    """
    settings = config["settings"]
    if settings["fp16"] != "auto":
        return settings["fp16"]
    if settings["Cuda"]:
        settings["fp16"], config["precision"] = True, "the default on CUDA"
        return True
    batch_size, steps = settings["Unfreeze_batch_size"] // world_size(), settings["UnFreeze_Epoch"] * num_train // settings["Unfreeze_batch_size"]
    trial, seconds, begin = copy.deepcopy(model).train(), {False: [], True: []}, time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        images = normalize(torch.randint(0, 256, (batch_size, *settings["input_shape"], 3), dtype=torch.uint8).permute(0, 3, 1, 2), "cpu")
        targets = torch.randint(0, num_classes, (batch_size,))
        for attempt in range(4):
            for fp16 in (False, True):
                seconds[fp16].append(trial_step(trial, images, targets, fp16))
            if attempt and time.perf_counter() - begin > max(5, 0.02 * steps * min(seconds[False])):
                break
    single, half = (batch_size / min(seconds[fp16]) for fp16 in (False, True))
    settings["fp16"], config["precision"] = half > WORTH * single, f"tried: float32 {single:.0f}, bfloat16 {half:.0f} images/s"
    return settings["fp16"]
