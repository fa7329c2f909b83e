"""fit_one_epoch: one epoch of training and validation, as documented, and the parts that evaluation shares."""
import contextlib
import math
import random
import sys
import time

import torch

from utils import processes
from utils.checkpoint import Checkpoint, Position
from utils.errors import UserError
from utils.pictures import normalize
from utils.processes import ProgressLine, rank, world_size
from utils.recipe import Recipe, figures_of, sums_of
from utils.scheduler import set_optimizer_lr


def autocast(Cuda, fp16):
    """float16 on CUDA, bfloat16 on CPU, or nothing."""
    return torch.autocast("cuda" if Cuda else "cpu", torch.float16 if Cuda else torch.bfloat16, enabled=fp16)


def batch_loss(outputs, images, targets, recipe):
    """(loss, float32 scores): auxiliary outputs count 0.3 (GoogLeNet's paper) or 0.4 (Inception v3)."""
    others = []
    if not isinstance(outputs, torch.Tensor):
        outputs, *others = [output for output in outputs if output is not None]
    scores, share = outputs.float(), 0.3 if len(others) == 2 else 0.4
    loss = recipe.criterion(scores, targets)
    for output in others:
        loss = loss + share * recipe.criterion(output.float(), targets)
    if recipe.extra_loss:
        loss = loss + recipe.extra_loss(images, scores, targets)
    return loss, scores


def backward(model_train, batches, device, Cuda, fp16, scaler, recipe, position):
    """Gradients of the mean loss over `batches` (more than one: accumulated); their figures are added to the position."""
    for number, (images, targets, _) in enumerate(batches, 1):
        images, targets = normalize(images, device), targets.to(device, non_blocking=True)
        if recipe.mix:
            images, targets = recipe.mix(images, targets)
        wait = number < len(batches) and hasattr(model_train, "no_sync")  # DDP: reduce once, with the last part
        with model_train.no_sync() if wait else contextlib.nullcontext():
            with autocast(Cuda, fp16):
                loss, scores = batch_loss(model_train(images), images, targets, recipe)
            scaler.scale(loss / len(batches)).backward()
        with torch.no_grad():
            position.step += 1
            position.sums.update(sums_of(loss, scores, targets, recipe.settings))


def filled(state):
    """Names of what an optimizer has of a parameter."""
    return {name for name, value in state.items() if value is not None}


def optimizer_step(optimizer, scaler, clip_grad_norm):
    """One step, which leaves no trace where the scaler skips it because the gradients have overflowed.

    A fused optimizer makes a parameter's state before it looks for overflow, and in a skipped step returns without filling
    it: SGD's momentum would begin as whatever the memory held. Only steps that make state wait for the scale to be read.
    """
    if clip_grad_norm:
        scaler.unscale_(optimizer)  # otherwise the fused optimizer does it on its way
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, clip_grad_norm)
    before = {parameter: dict(state) for parameter, state in optimizer.state.items()}
    scaler.step(optimizer)
    begun = [parameter for parameter, state in optimizer.state.items() if filled(state) - filled(before.get(parameter, {}))]
    scale = scaler.get_scale() if begun else None
    scaler.update()
    if begun and scaler.get_scale() < scale:
        for parameter in begun:
            optimizer.state.pop(parameter)
        optimizer.state.update((parameter, before[parameter]) for parameter in begun if parameter in before)
    optimizer.zero_grad(set_to_none=True)


def seed_step(seed, epoch, step, Cuda):
    """What is random in a step depends on these and the rank alone. (torch.manual_seed would take 0.2 ms.)"""
    step_seed = random.Random(f"{seed} {epoch} {step} {rank()}").getrandbits(63)
    torch.default_generator.manual_seed(step_seed)
    if Cuda:
        torch.cuda.manual_seed_all(step_seed)


@contextlib.contextmanager
def memory_advice(settings="Unfreeze_batch_size (Freeze_batch_size in the frozen phase), or input_shape"):
    """Out of memory → a sentence with the settings to lower."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise UserError(f"out of memory: lower {settings} ({str(error).splitlines()[0]})") from error
        raise


def score_batch(model, images, targets, Cuda, fp16):
    """(float32 (N, classes) scores, class ids) of a batch from the loader, both on the model's device; model in eval mode."""
    device = next(model.parameters()).device
    with torch.no_grad(), autocast(Cuda, fp16):
        return model(normalize(images, device)).float(), targets.to(device, non_blocking=True)


def validate(model, gen_val, epoch, epoch_step_val, Cuda, fp16, recipe, checkpoint):
    """(validation's figures, pictures scored, unreadable ones) over all processes."""
    position = Position(epoch, next(model.parameters()).device, max(1, 0.01 * len(gen_val.dataset)))
    gen_val.sampler.set_epoch(epoch)
    model.eval()
    for batches in checkpoint.steps(gen_val, position, epoch_step_val):
        for images, targets, _ in batches:
            if len(targets):
                scores, targets = score_batch(model, images, targets, Cuda, fp16)
                position.sums.update(sums_of(recipe.val_criterion(scores, targets), scores, targets, recipe.settings))
    sums, unreadable = position.totals()
    if not sums:
        raise UserError("no picture of the test list can be read, so there is no score")
    return figures_of(sums, recipe.settings), int(sums["pictures"]), unreadable


def fit_one_epoch(model_train, model, loss_history, optimizer, epoch, epoch_step, epoch_step_val, gen, gen_val,
                  UnFreeze_Epoch, Cuda, fp16, scaler, save_period, save_dir, local_rank, *,
                  recipe=None, checkpoint=None, lr_scheduler_func=None):
    """Train one epoch, validate, record and save; the sixteen parameters are the documented ones.

    model_train is the wrapped model, model the bare one; loss_history is None on all processes but the first;
    save_dir is the run's folder. checkpoint (a Checkpoint) continues an interrupted epoch where it stopped.
    lr_scheduler_func: the rate follows it at every step, at epoch + step / epoch_step; without it, it stays as it is.
    Returns {figure: value}, the same on every process; its 'lr' is the documented one, that of the epoch's first step. UserError: a loss or weights that
    are not finite, too many unreadable pictures, too little memory, a dead worker, a full disk.
    """
    recipe = recipe or Recipe()
    checkpoint = checkpoint or Checkpoint(save_dir, {"model": model, "optimizer": optimizer, "scaler": scaler,
                                                     "ema": recipe.ema, "history": loss_history})
    scaler = scaler or torch.amp.GradScaler("cuda", enabled=False)  # then its calls do nothing but the optimizer's step
    device, images_per_step = next(model.parameters()).device, gen.batch_size * world_size()
    begin, position = time.monotonic(), checkpoint.begin(epoch, 0.01 * epoch_step * images_per_step, device)
    first_step = position.step
    first_lr = lr_scheduler_func(epoch) if lr_scheduler_func else optimizer.param_groups[-1]["lr"]

    gen.sampler.set_epoch(epoch, first_step)
    model_train.train()
    progress = ProgressLine(f"epoch {epoch + 1}/{UnFreeze_Epoch}", epoch_step, first_step)
    with memory_advice():
        for batches in checkpoint.steps(gen, position, epoch_step - first_step, recipe.accumulate):
            if lr_scheduler_func:
                set_optimizer_lr(optimizer, lr_scheduler_func, epoch + position.step / epoch_step)
            position.lr = optimizer.param_groups[-1]["lr"]
            seed_step(recipe.seed, epoch, position.step, Cuda)
            backward(model_train, batches, device, Cuda, fp16, scaler, recipe, position)
            optimizer_step(optimizer, scaler, recipe.clip_grad_norm)
            if recipe.ema:
                recipe.ema.update_parameters(model)
            progress.show(position.step, images_per_step, lambda: " ".join(
                f"{name} {value:.3f}" for name, value in figures_of(position.sums, recipe.settings).items()) + f" lr {position.lr:.2e}")
        progress.clear()
        seconds = time.monotonic() - begin

        judged = recipe.ema.module if recipe.ema else model
        processes.sync_buffers(judged)
        wrapped = model_train if isinstance(model_train, torch.nn.DataParallel) and not recipe.ema else judged
        scored_figures, scored, unscored = validate(wrapped, gen_val, epoch, epoch_step_val, Cuda, fp16, recipe, checkpoint)
    sums, unreadable = position.totals()
    figures = {"epoch": epoch + 1, "lr": first_lr, "scored": scored, "unreadable": unreadable + unscored,
               "images_per_second": round((epoch_step - first_step) * images_per_step / seconds, 3)}
    figures.update({f"train_{name}": value for name, value in figures_of(sums, recipe.settings).items()})
    figures.update({"val_loss" if name == "loss" else name: value for name, value in scored_figures.items()})
    if not math.isfinite(figures["val_loss"]):
        raise UserError(f"the validation loss of epoch {epoch + 1} is not finite: lower Init_lr, or set clip_grad_norm; "
                        f"the files saved before it are intact")
    close_epoch(figures, loss_history, judged, save_period, UnFreeze_Epoch, checkpoint)
    return figures


def close_epoch(figures, loss_history, judged, save_period, UnFreeze_Epoch, checkpoint):
    """The checkpoint is the commit; the files that people read follow it, now or when the run is resumed. Collective."""
    best = loss_history.append_loss(figures) if rank() == 0 else False
    if best:
        checkpoint.best = {name: value.detach().to("cpu", copy=True) for name, value in judged.state_dict().items()}
    checkpoint.save(figures["epoch"])
    processes.on_rank_0(lambda: checkpoint.publish(save_period, UnFreeze_Epoch, with_best=best))
    if rank() == 0:
        print(summary(figures, UnFreeze_Epoch) + " *" * best, flush=True)


def summary(figures, last_epoch):
    """An epoch in one line; figures that a fork has added come last."""
    shown = {"epoch", "lr", "scored", "unreadable", "images_per_second", "train_loss", "val_loss", "top1", "top5"}
    percents = [(label, figures[name]) for name, label in (("top1", "top-1"), ("top5", "top-5")) if name in figures]
    return (f"epoch {figures['epoch']}/{last_epoch}: train loss {figures['train_loss']:.4f}, val loss {figures['val_loss']:.4f}"
            + "".join(f", {label} {value:.2%}" for label, value in percents)
            + "".join(f", {name} {value:.4g}" for name, value in figures.items() if name not in shown and "train_" not in name)
            + (f", {figures['unreadable']} unreadable, {figures['scored']} scored" if figures["unreadable"] else "")
            + f" ({figures['images_per_second']:.0f} images/s)")
