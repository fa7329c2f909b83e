"""What a network costs on this machine: its parameters, its FLOPs, and which precision trains it faster."""
import copy
import time

import torch
from torch import nn

from nets import size_errors
from utils.errors import UserError
from utils.fit import backward

FASTER = 1.1  # what bfloat16 must gain to be worth its rounding to 8 bits


def profile(model, backbone, input_shape, num_classes):
    """(parameters, FLOPs of one picture, whether it has BatchNorm), found on the meta device, without computing.

    A training step of two pictures is tried as well: UserError when they are too small for the network, or its scores are not
    (N, num_classes). FLOPs count a multiply-add as two, as torch.utils.flop_counter does.
    """
    from torch.utils.flop_counter import FlopCounterMode  # slow to import, and loader processes need none of it
    trial, pictures = copy.deepcopy(model).to("meta"), torch.empty(2, 3, *input_shape, device="meta")
    with size_errors(backbone, input_shape), torch.no_grad():
        trial.train()(pictures)
        with FlopCounterMode(display=False) as counter:
            scores = trial.eval()(pictures)
    found = list(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
    if found != [2, num_classes]:
        raise UserError(f"{backbone} gives {found} scores for 2 pictures, not [2, {num_classes}]: its last layer needs num_classes "
                        f"outputs")
    has_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2, has_norm


def choose_precision(settings, model, batch, recipe):
    """(fp16, why) of the setting; for 'auto' True on CUDA, and on a CPU what trains this network faster, found by trying.

    Two to four steps of each, in turn, for 5 s, on a copy of the model with a batch of the training pictures. Instruction sets
    do not tell: bfloat16 makes some networks three times as fast and others half as fast on one machine.
    """
    if settings["fp16"] != "auto" or settings["Cuda"]:
        return bool(settings["fp16"]), ""
    trial, off = copy.deepcopy(model).train(), torch.amp.GradScaler("cpu", enabled=False)
    seconds, begin = {False: [], True: []}, time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        for fp16 in (False, True) * 4:
            start = time.perf_counter()
            if start - begin > 5 and len(seconds[True]) >= 2:
                break
            backward(trial, [batch], "cpu", False, fp16, off, recipe)
            seconds[fp16].append(time.perf_counter() - start)
            trial.zero_grad()
    single, half = (len(batch[0]) / min(seconds[fp16]) for fp16 in (False, True))
    return half > FASTER * single, f"tried: float32 {single:.0f}, bfloat16 {half:.0f} images/s"
