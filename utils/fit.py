"""fit_one_epoch: one epoch of training and validation, as documented, and the parts that evaluation shares."""

import contextlib
import math
import random
import time

import torch

from utils.checkpoint import Checkpoint, Position
from utils.optimizer import clip_layers, set_optimizer_lr
from utils.pictures import normalize
from utils.plumbing import processes
from utils.plumbing.console import ProgressLine, say
from utils.plumbing.errors import NOT_FINITE, UserError, printable
from utils.plumbing.processes import rank, world_size
from utils.recipe import Recipe
from utils.task import batch_sums, metric_text, metrics_from

named_unreadable = set()  # pictures that were named already
VALIDATION = {
    "loss": "val_loss"
}  # what the history calls a figure of validation, where not by its own name


def backward(model_train, batches, Cuda, fp16, scaler, recipe):
    """Gradients of the mean loss over `batches` (more than one: accumulated); what each gave: [(loss, scores, targets)]."""
    done, device = [], next(model_train.parameters()).device
    for number, (images, targets, _) in enumerate(batches, 1):
        images, targets = (
            normalize(images, device, recipe.settings),
            targets.to(device, non_blocking=True),
        )
        if recipe.mix:
            images, targets = recipe.mix(images, targets)
        wait = number < len(batches) and hasattr(
            model_train, "no_sync"
        )  # DDP: reduce once, with the last part
        with model_train.no_sync() if wait else contextlib.nullcontext():
            with torch.autocast(
                "cuda" if Cuda else "cpu", enabled=fp16
            ):  # float16 on CUDA, bfloat16 on a CPU
                scores = model_train(images).float()
                loss = recipe.criterion(scores, targets)
                if recipe.extra_loss:
                    loss = loss + recipe.extra_loss(images, scores, targets)
            scaler.scale(loss / len(batches)).backward()
        done.append((loss.detach(), scores.detach(), targets))
    return done


def optimizer_step(optimizer, scaler, clip_grad_norm=None, clip_ratio=None):
    """One step, which leaves no trace where the gradients have overflowed, and the scaler skips it.

    A fused optimizer makes a parameter's state before it looks for overflow, and would leave it unfilled: SGD's momentum would
    begin as whatever the memory held. So in a step that makes state the scaler looks itself, for which it waits for the GPU.
    """
    parameters = [
        p for group in optimizer.param_groups for p in group["params"] if p.grad is not None
    ]
    makes_state = scaler.is_enabled() and any(  # without a scaler no step is skipped
        not optimizer.state.get(p) or any(value is None for value in optimizer.state[p].values())
        for p in parameters
    )
    optimizer._step_supports_amp_scaling = (
        optimizer.defaults.get("fused") and not makes_state
    )  # what the scaler goes by
    if clip_ratio or clip_grad_norm:
        scaler.unscale_(optimizer)  # otherwise the fused optimizer does it on its way
    if clip_ratio:
        clip_layers(parameters, clip_ratio)
    if clip_grad_norm:
        torch.nn.utils.clip_grad_norm_(parameters, clip_grad_norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)


def seed_step(seed, epoch, step, Cuda):
    """What is random in a step depends on these and the rank alone. (torch.manual_seed would take 0.2 ms.)"""
    step_seed = random.Random(f"{seed} {epoch} {step} {rank()}").getrandbits(63)
    torch.default_generator.manual_seed(step_seed)
    if Cuda:
        torch.cuda.manual_seed_all(step_seed)


def score_batch(model, images, targets, Cuda, fp16, settings):
    """(float32 (N, classes) scores, targets) of a batch from the loader, both on the model's device; model in eval mode."""
    device = next(model.parameters()).device
    with torch.no_grad(), torch.autocast("cuda" if Cuda else "cpu", enabled=fp16):
        return model(normalize(images, device, settings)).float(), targets.to(
            device, non_blocking=True
        )


def count_unreadable(batches, data, position):
    """Name each unreadable picture once, and count it."""
    for index, reason in (bad for batch in batches for bad in batch[2]):
        if index not in named_unreadable:
            say(
                f"\nunreadable picture: {printable(data.name(index))} ({printable(reason)})",
                everyone=True,
            )
        named_unreadable.add(index)
        position.unreadable += 1
    check_unreadable(
        position.unreadable, data
    )  # of this process; those of all when the epoch is done


def check_unreadable(number, data):
    if number > max(1, 0.01 * len(data)):
        raise UserError(
            f"{number} {'training' if data.random else 'test'} pictures cannot be read, more than 1 %: "
            f"python -m utils.annotation DATASETS --check lists them"
        )


def check_training(position, scaler, lr, late):
    """UserError when the sum of losses is not finite, or the scaler has skipped nearly every step. Waits for a GPU."""
    if not math.isfinite(position.sums["loss"]):
        raise UserError(
            f"the loss is not finite in epoch {position.epoch + 1}, {'by ' * late}step {position.step}, "
            f"at lr {lr:.3g}: {NOT_FINITE}"
        )
    if scaler.get_scale() < 1:
        raise UserError(
            f"float16 gradients overflow in every step by epoch {position.epoch + 1}, step {position.step}, "
            f"at any scale: set fp16 = False, or lower Init_lr or clip_ratio"
        )


def validate(model, gen_val, epoch, epoch_step_val, Cuda, fp16, recipe, checkpoint):
    """Validation's figures, with 'scored' and 'unreadable', the numbers of pictures, over all processes."""
    position = Position(epoch)
    gen_val.sampler.set_epoch(epoch)
    model.eval()
    for batches in checkpoint.steps(gen_val, epoch_step_val):
        count_unreadable(batches, gen_val.dataset, position)
        for images, targets, _ in batches:
            if len(targets):
                scores, targets = score_batch(model, images, targets, Cuda, fp16, recipe.settings)
                position.sums.update(
                    batch_sums(
                        recipe.val_criterion(scores, targets), scores, targets, recipe.settings
                    )
                )
    totals = position.totals()
    check_unreadable(totals["unreadable"], gen_val.dataset)
    if "pictures" not in totals:
        raise UserError("no picture of the test list can be read, so there is no score")
    figures = {
        VALIDATION.get(name, name): value
        for name, value in metrics_from(totals, recipe.settings).items()
    }
    return {**figures, "scored": int(totals["pictures"]), "unreadable": totals["unreadable"]}


def fit_one_epoch(
    model_train,
    model,
    loss_history,
    optimizer,
    epoch,
    epoch_step,
    epoch_step_val,
    gen,
    gen_val,
    UnFreeze_Epoch,
    Cuda,
    fp16,
    scaler,
    save_period,
    save_dir,
    local_rank,
    *,
    recipe=None,
    checkpoint=None,
    lr_scheduler_func=None,
):
    """Train one epoch, validate, record and save; the sixteen parameters are the documented ones.

    model_train is the wrapped model, model the bare one; loss_history is None on all processes but the first;
    save_dir is the run's folder. checkpoint (a Checkpoint) continues an interrupted epoch where it stopped.
    lr_scheduler_func: the rate follows it at every step, at epoch + step / epoch_step; without it, it stays as it is.
    Returns {figure: value}, the same on every process; its 'lr' is the documented one, that of the epoch's first step.
    UserError: a loss or weights that are not finite, too many unreadable pictures, a full disk.
    """
    recipe = recipe or Recipe()
    checkpoint = checkpoint or Checkpoint(
        save_dir,
        {
            "model": model,
            "optimizer": optimizer,
            "scaler": scaler,
            "ema": recipe.ema,
            "history": loss_history,
        },
    )
    s, used_scaler = (
        recipe.settings,
        scaler or torch.amp.GradScaler("cuda", enabled=False),
    )  # which only steps the optimizer
    accumulate, images_per_step = s.get("accumulate", 1), gen.batch_size * world_size()
    look_every = 20 if Cuda else 1  # a GPU has to finish its steps to be looked at
    begin, position = time.monotonic(), checkpoint.begin(epoch, order_of(gen))
    first_step, lr = (
        position.step,
        lr_scheduler_func(epoch) if lr_scheduler_func else optimizer.param_groups[-1]["lr"],
    )

    gen.sampler.set_epoch(epoch, first_step)
    model_train.train()
    progress = ProgressLine(f"epoch {epoch + 1}/{UnFreeze_Epoch}", epoch_step, first_step)
    for batches in checkpoint.steps(gen, epoch_step - first_step, accumulate):
        count_unreadable(batches, gen.dataset, position)
        if lr_scheduler_func:
            set_optimizer_lr(optimizer, lr_scheduler_func, epoch + position.step / epoch_step)
        seed_step(s.get("seed", 0), epoch, position.step, Cuda)
        done = backward(model_train, batches, Cuda, fp16, used_scaler, recipe)
        optimizer_step(optimizer, used_scaler, s.get("clip_grad_norm"), s.get("clip_ratio"))
        if recipe.ema:
            recipe.ema.update_parameters(model)
        for loss, scores, targets in done:
            position.sums.update(batch_sums(loss, scores, targets, s))  # adds to what each name has
        position.step += len(batches)
        if position.step // accumulate % look_every == 0 or position.step == epoch_step:
            check_training(position, used_scaler, optimizer.param_groups[-1]["lr"], Cuda)
        progress.show(
            position.step,
            images_per_step,
            lambda: " ".join(
                [metric_text(*figure) for figure in metrics_from(position.sums, s).items()]
                + [f"lr {optimizer.param_groups[-1]['lr']:.2e}"]
            ),
        )
    progress.clear()
    seconds = time.monotonic() - begin

    totals, judged = position.totals(), recipe.ema.module if recipe.ema else model
    check_unreadable(totals["unreadable"], gen.dataset)
    processes.sync_buffers(judged)
    wrapped = (
        model_train if isinstance(model_train, torch.nn.DataParallel) and not recipe.ema else judged
    )
    validated = validate(wrapped, gen_val, epoch, epoch_step_val, Cuda, fp16, recipe, checkpoint)
    if not math.isfinite(validated["val_loss"]):
        raise UserError(f"the validation loss of epoch {epoch + 1} is not finite: {NOT_FINITE}")
    unreadable = totals["unreadable"] + validated.pop("unreadable")
    figures = {
        "epoch": epoch + 1,
        "lr": lr,
        "scored": validated.pop("scored"),
        "unreadable": unreadable,
        "images_per_second": round((epoch_step - first_step) * images_per_step / seconds, 3),
        **({"scale": scaler.get_scale()} if scaler else {}),
        **{f"train_{name}": value for name, value in metrics_from(totals, s).items()},
        **validated,
    }
    best = checkpoint.commit(figures, judged, save_period, UnFreeze_Epoch)
    told = [metric_text(name, figures[name]) for name in ("train_loss", *validated)]
    told += [f"{unreadable} unreadable, {figures['scored']} scored"] if unreadable else []
    say(
        f"epoch {epoch + 1}/{UnFreeze_Epoch}: {', '.join(told)} ({figures['images_per_second']:.0f} images/s)"
        + " *" * best
    )
    return figures


def order_of(gen):
    """A text of all that the pictures of a step depend on, but for the number of processes."""
    own = ("rank", "world_size", "epoch", "first_step")
    return f"{[pair for pair in vars(gen.sampler).items() if pair[0] not in own]} {gen.dataset.fingerprint}"
