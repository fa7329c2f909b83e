"""What is tried on one batch before training.

It leaves no trace: networks are copied, and the random stream is put back.
"""

import copy
import math
import time
from itertools import islice

import torch

from utils.dataloader import detection_collate
from utils.fit import VALIDATION, forward_backward, score_batch
from utils.optimizer import optimizer_step
from utils.plumbing import processes
from utils.plumbing.charts import draw_contact_sheet, drawable_names
from utils.plumbing.console import say, say_if_slow, say_row
from utils.plumbing.errors import UserError, did_you_mean, short_repr
from utils.plumbing.files import save_image
from utils.plumbing.processes import rank, world_size
from utils.recipe import Recipe, check_targets, precision_name
from utils.sampler import EpochSampler
from utils.task import batch_sums, metrics_from, target_text

FASTER = 1.1  # what a type of fewer digits, or one that needs a scaler, must gain to be chosen


def first_batch(data, batch_size, seed):
    """Return this process's first training batch as the loader gives it, 2 to 64 pictures."""
    sampler = EpochSampler(len(data), batch_size, rank(), world_size(), seed=seed)
    with say_if_slow("reading the first pictures …"), torch.random.fork_rng(devices=[]):
        items = islice(sampler, min(64, max(2, batch_size // world_size())))  # BatchNorm needs two
        return detection_collate([data[item] for item in items])


def check_batch(batch, model, settings, num_classes):
    """Raise UserError for settings that do not suit a batch, and note nearly black pictures."""
    images, targets, _ = batch
    if images.amax((1, 2, 3)).median() <= 16:
        say(
            "NOTE: most pictures are almost black (nothing above 16 of 255). 12-bit images in "
            "16-bit files look like this: multiply their values by 16"
        )
    check_targets(targets, settings, num_classes)
    check_best_by(settings, model, batch)


def check_best_by(settings, model, batch):
    """Raise UserError unless best_by is a metric of validation, or one after '-'.

    Two pictures are scored for the metrics' names.
    """
    Cuda = settings["Cuda"]
    best_by = settings["best_by"]
    with kept_random_stream(Cuda):
        trial = copy.deepcopy(model).eval()
        logits, targets = score_batch(trial, batch[0][:2], batch[1][:2], Cuda, False, settings)
        sums = batch_sums(logits.new_zeros(()), logits, targets, settings)
    names = [VALIDATION.get(name, name) for name in metrics_from(sums, settings)]
    if best_by.removeprefix("-") not in names:
        raise UserError(
            f"best_by = {short_repr(best_by)} is not a metric of validation: "
            f"{', '.join(names)}{did_you_mean(best_by, names)}"
        )


def choose_precision(settings, model, batch):
    """Return the name of the type to train in, and print it with the reason.

    It is the one that fp16 names, and for 'auto' the faster of those that train well.
    """
    Cuda = settings["Cuda"]
    reason = ""
    if settings["fp16"] != "auto":
        precision = precision_name(Cuda, settings["fp16"])
    elif Cuda:
        precision, reason = choose_on_cuda(settings, model, batch)
    elif not processes.computes_bfloat16(settings):
        precision = "float32"
    else:  # some networks train three times as fast in bfloat16, others half as fast
        few = [part[:8] for part in batch[:2]]
        precision, reason = compare_speed(settings, model, few, "float32", "bfloat16", seconds=3)
    say_row("precision", f"{precision} ({reason})" if reason else precision)
    return precision


def choose_on_cuda(settings, model, batch):
    """Choose (type, why): bfloat16, or float32 where there is none; float16 where it is FASTER.

    bfloat16 needs no scaler. float16 can be faster in networks with BatchNorm, which cuDNN does not
    compute in bfloat16; GPUs from before 2018 are slow in it, and the GTX 16 gives nan.
    """
    has_bfloat16 = processes.computes_bfloat16(settings)
    usual = "bfloat16" if has_bfloat16 else "float32"
    try:
        return compare_speed(settings, model, batch, usual, "float16", seconds=1)
    except RuntimeError:  # mostly too little memory for the copies, in cuDNN's words
        return "bfloat16" if has_bfloat16 else "float16", "no other could be tried"
    finally:
        torch.cuda.empty_cache()  # NCCL takes its memory beside torch's


def compare_speed(settings, model, batch, usual, other, seconds):
    """Return (`other` where it is FASTER than `usual`, else `usual`; and why).

    Each trains a copy of the network by turns, for `seconds` altogether, but one turn at least.
    """
    best_times = {usual: math.inf, other: math.inf}
    with (
        say_if_slow(f"trying {usual} and {other} for {seconds} s, or for one step each …"),
        kept_random_stream(settings["Cuda"]),
        # the context would switch cuDNN off by default
        torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, benchmark=True),
    ):
        trials = {name: prepare_trial(settings, model, batch, name) for name in best_times}
        if settings["Cuda"]:  # not counted: libraries are loaded, and cuDNN tries its kernels
            for train_and_time in trials.values():
                train_and_time()
        begin = time.perf_counter()
        for turn in range(5):  # the best of five short steps is steady enough
            for name, train_and_time in trials.items():
                best_times[name] = min(best_times[name], train_and_time())
            is_clear = turn > 1 and max(best_times.values()) > 2 * min(best_times.values())
            if is_clear or time.perf_counter() - begin > seconds:
                break
    speed = {name: len(batch[0]) / step_time for name, step_time in best_times.items()}
    fastest = other if speed[other] > FASTER * speed[usual] else usual
    return fastest, ", ".join(f"{name} {value:.0f} images/s" for name, value in speed.items())


def prepare_trial(settings, model, batch, precision):
    """Return a function that trains a copy of the network on a batch, in one precision.

    It returns the seconds of a step, inf where the loss is not finite.
    """
    Cuda = settings["Cuda"]
    trained = copy.deepcopy(model).train()
    device = next(model.parameters()).device
    images, targets = (part.to(device) for part in batch[:2])
    recipe = Recipe({**settings, "mixup_alpha": 0, "cutmix_alpha": 0, "ema_decay": 0})
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.0, fused=True)
    scaler = torch.amp.GradScaler("cuda", enabled=precision == "float16")
    steps = 5 if Cuda else 1  # a GPU can queue several

    def train_and_time():
        begin = time.perf_counter()
        for _ in range(steps):
            batches = [(images, targets, [])]
            [sums] = forward_backward(trained, batches, Cuda, precision, scaler, recipe)
            optimizer_step(optimizer, scaler)
        if Cuda:
            torch.cuda.synchronize()
        if not math.isfinite(sums["loss"] / sums["pictures"]):
            return math.inf
        return (time.perf_counter() - begin) / steps

    return train_and_time


def kept_random_stream(Cuda):
    """Return a context after which the random stream goes on as if nothing had been drawn in it."""
    return torch.random.fork_rng(devices=[torch.cuda.current_device()] if Cuda else [])


def save_first_batch(path, batch, class_names):
    """Draw the first pictures as they are trained on, with their targets."""
    names = drawable_names(class_names)
    captions = [target_text(target, names) for target in batch[1][:32]]
    save_image(path, draw_contact_sheet(batch[0][:32].permute(0, 2, 3, 1), captions))
