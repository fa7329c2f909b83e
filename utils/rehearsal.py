"""What is tried on one batch before training."""

import copy
import time

import torch

from utils.fit import VALIDATION, backward, score_batch
from utils.plumbing.errors import UserError, did_you_mean, short_repr
from utils.task import batch_sums, metrics_from


def check_best_by(best_by, model, batch, Cuda, recipe):
    """UserError unless best_by is a figure of validation, found with two pictures, or '-' and one (the lowest is best)."""
    scores, targets = score_batch(
        model.eval(), batch[0][:2], batch[1][:2], Cuda, False, recipe.settings
    )
    sums = batch_sums(recipe.val_criterion(scores, targets), scores, targets, recipe.settings)
    names = [VALIDATION.get(name, name) for name in metrics_from(sums, recipe.settings)]
    if best_by.removeprefix("-") not in names:
        raise UserError(
            f"best_by = {short_repr(best_by)} is no figure of validation: {', '.join(names)}{did_you_mean(best_by, names)}"
        )


FASTER = 1.1  # what bfloat16 must gain to be worth its rounding to 8 bits


def choose_precision(settings, model, batch, recipe):
    """(fp16, why) of the setting; for 'auto' True on CUDA, and on a CPU what trains this network faster, found by trying two to
    four steps: bfloat16 makes some networks three times as fast and others half as fast on one machine."""
    if settings["fp16"] != "auto" or settings["Cuda"]:
        return bool(settings["fp16"]), ""
    trial, off = copy.deepcopy(model).train(), torch.amp.GradScaler("cpu", enabled=False)
    seconds, begin = {False: [], True: []}, time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        for fp16 in (False, True) * 4:
            start = time.perf_counter()
            if start - begin > 5 and len(seconds[True]) >= 2:
                break
            backward(trial, [batch], False, fp16, off, recipe)
            seconds[fp16].append(time.perf_counter() - start)
            trial.zero_grad()
    single, half = (len(batch[0]) / min(seconds[fp16]) for fp16 in (False, True))
    return half > FASTER * single, f"tried: float32 {single:.0f}, bfloat16 {half:.0f} images/s"


def note(images):
    """A line to print before a training of which uint8 (N, 3, H, W) are pictures, where they are nearly black, or ''."""
    return (
        "NOTE: the pictures look nearly black, no value of most of them is above 16 of 255. So do greys of 12 bits in 16-bit "
        "files, where white is 65535: multiply them by 16\n"
        if images.amax((1, 2, 3)).median() <= 16
        else ""
    )
