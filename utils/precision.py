"""fp16 = "auto": float16 on CUDA; on a CPU float32 or bfloat16, whichever trains this network faster, found by trying."""
import copy
import time

import torch

from utils.fit import backward

FASTER = 1.1  # what bfloat16 must gain to be worth its rounding to 8 bits


def choose_precision(settings, model, batch, recipe, steps):
    """(fp16, why) of the setting; for 'auto' True on CUDA, and on a CPU what trains this network faster, found by trying.

    Tried on a copy of the model with a batch of the training pictures, in turn, four times each at the most, until 5 s or 2 % of
    the training's `steps` have passed. Instruction sets do not tell: bfloat16 makes some networks three times as fast and
    others half as fast on one machine.
    """
    if settings["fp16"] != "auto" or settings["Cuda"]:
        return bool(settings["fp16"]), ""
    trial, off = copy.deepcopy(model).train(), torch.amp.GradScaler("cpu", enabled=False)
    seconds, begin = {False: [], True: []}, time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        for attempt in range(4):
            for fp16 in (False, True):
                start = time.perf_counter()
                backward(trial, [batch], "cpu", False, fp16, off, recipe)
                seconds[fp16].append(time.perf_counter() - start)
                trial.zero_grad()
            if attempt and time.perf_counter() - begin > max(5, 0.02 * steps * min(seconds[False])):
                break
    single, half = (len(batch[0]) / min(seconds[fp16]) for fp16 in (False, True))
    return half > FASTER * single, f"tried: float32 {single:.0f}, bfloat16 {half:.0f} images/s"
