"""fit_one_epoch: one epoch of training and validation, as documented, and the parts that evaluation shares."""
import contextlib
import os
import random
import time

import torch
import torch.nn.functional as F

from utils import distributed
from utils.checkpoint import Checkpointer, save_tensors
from utils.console import ProgressLine
from utils.errors import UserError, rank, world_size
from utils.pictures import normalize
from utils.recipe import Recipe
from utils.workers import fetch, loader


def autocast(Cuda, fp16):
    """float16 on CUDA, bfloat16 on CPU, or nothing."""
    return torch.autocast("cuda" if Cuda else "cpu", torch.float16 if Cuda else torch.bfloat16, enabled=fp16)


def loss_of(outputs, targets, criterion):
    """(loss, scores): auxiliary outputs count 0.3 (GoogLeNet's paper) or 0.4 (Inception v3)."""
    if isinstance(outputs, torch.Tensor):
        return criterion(outputs, targets), outputs
    main, *others = [output for output in outputs if output is not None]
    share = 0.3 if len(others) == 2 else 0.4
    return criterion(main, targets) + share * sum(criterion(output, targets) for output in others), main


def backward(model_train, batches, device, Cuda, fp16, scaler, recipe, sums):
    """Gradients of the mean loss over `batches` (more than one: accumulated); adds to sums in place."""
    for number, (images, targets, _) in enumerate(batches, 1):
        images = normalize(images, device, recipe.channels_last)
        targets = targets.to(device, non_blocking=True)
        if recipe.mix:
            images, targets = recipe.mix(images, targets)
        wait = number < len(batches) and hasattr(model_train, "no_sync")  # DDP: reduce once, with the last part
        with model_train.no_sync() if wait else contextlib.nullcontext():
            with autocast(Cuda, fp16):
                loss, scores = loss_of(model_train(images), targets, recipe.criterion)
            scaler.scale(loss / len(batches)).backward()
        with torch.no_grad():  # on the device, so that no step waits for the figures
            labels = targets if targets.dim() == 1 else targets.argmax(1)  # mixed: the larger label
            right = (scores.argmax(1) == labels).sum()
            sums += torch.stack([loss.detach().double() * len(labels), right.double(),
                                 torch.full_like(loss, len(labels), dtype=torch.float64)])


def optimizer_step(optimizer, scaler, clip_grad_norm):
    if clip_grad_norm:
        scaler.unscale_(optimizer)  # otherwise the fused optimizer does it on its way
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
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


@contextlib.contextmanager
def memory_advice(name):
    """Out of memory → a sentence with the setting to lower."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise UserError(f"out of memory: lower {name} ({str(error).splitlines()[0]})") from error
        raise


def score_batches(model, gen_val, epoch_step_val, Cuda, fp16, channels_last=True, between=lambda failure, unreadable: None):
    """Yield (float32 scores, class ids) of every validation batch; shared with utils.evaluate.

    between(failure, unreadable) is called before each step, also on a process whose share has run out, so that
    processes can agree.
    """
    device = next(model.parameters()).device
    batches = loader(gen_val)
    model.eval()
    for step in range(epoch_step_val):
        got, failure = fetch(batches) if step < len(gen_val) else (None, None)
        between(failure, got[0][2] if got else [])
        if got and len(got[0][1]):
            images, targets, _ = got[0]
            with torch.no_grad(), autocast(Cuda, fp16):
                scores = model(normalize(images, device, channels_last)).float()
            yield scores, targets.to(device, non_blocking=True)


def score_sums(scores, targets):
    """float64 (4,): summed cross-entropy, right in the first 1, right in the first 5, number of pictures."""
    losses = F.cross_entropy(scores, targets, reduction="none").double()
    right = scores.topk(min(5, scores.shape[1])).indices == targets[:, None]
    return torch.stack([losses.sum(), right[:, 0].sum().double(), right.sum().double(),
                        losses.new_full((), len(losses))])


def fit_one_epoch(model_train, model, loss_history, optimizer, epoch, epoch_step, epoch_step_val, gen, gen_val,
                  UnFreeze_Epoch, Cuda, fp16, scaler, save_period, save_dir, local_rank, *,
                  recipe=None, checkpoint=None):
    """Train one epoch, validate, record and save; the sixteen parameters are the documented ones.

    model_train is the wrapped model, model the bare one; loss_history is None on all processes but the first;
    save_dir is the run's folder. checkpoint (a Checkpointer) continues an interrupted epoch where it stopped.
    Returns {figure: value}, the same on every process. UserError: a loss that is not finite, too many unreadable
    pictures, too little memory, a dead worker, a full disk.
    """
    recipe = recipe or Recipe()
    checkpoint = checkpoint or Checkpointer(save_dir, {"model": model, "optimizer": optimizer, "scaler": scaler})
    scaler = scaler or torch.amp.GradScaler("cuda", enabled=False)  # then its calls do nothing but the optimizer's step
    device = next(model.parameters()).device
    lr = optimizer.param_groups[-1]["lr"]
    images_per_step = gen.batch_size * world_size()
    begin, state = time.monotonic(), checkpoint.begin(epoch, lr, 0.01 * epoch_step * images_per_step, device)
    first_step, sums = state.step, state.sums

    gen.sampler.set_epoch(epoch, first_step)
    model_train.train()
    progress = ProgressLine(f"epoch {epoch + 1}/{UnFreeze_Epoch}", epoch_step, first_step)
    batches = loader(gen)
    while state.step < epoch_step:
        number = min(recipe.accumulate, epoch_step - state.step)
        parts, failure = fetch(batches, number)
        named = [bad for part in parts or () for bad in part[2]]
        state.unreadable += len(named)
        checkpoint.agree(state, failure, named, gen, look=not Cuda or state.step % 20 < number)
        seed_step(recipe.seed, epoch, state.step, Cuda)
        with memory_advice(recipe.batch_size_name):
            backward(model_train, parts, device, Cuda, fp16, scaler, recipe, sums)
            optimizer_step(optimizer, scaler, recipe.clip_grad_norm)
        state.step += number
        state.first_bad += state.step * (~torch.isfinite(sums[0]) & (state.first_bad == 0))
        if recipe.ema:
            recipe.ema.update_parameters(model)
        progress.show(state.step, images_per_step, lambda: "loss {:.3f} top1 {:.1%} lr {:.2e}".format(
            *(sums[:2] / sums[2]).tolist(), lr))
    progress.clear()
    checkpoint.agree(state)  # reads a figure, so a GPU has done the steps when it returns
    seconds = time.monotonic() - begin

    judged = recipe.ema.module if recipe.ema else model
    distributed.sync_buffers(judged)
    wrapped = model_train if isinstance(model_train, torch.nn.DataParallel) and not recipe.ema else judged
    val_sums, left_out = torch.zeros(4, dtype=torch.float64, device=device), []

    def between(failure, named):
        left_out.extend(named)
        checkpoint.agree(state, failure, named, gen_val, look=False)
    gen_val.sampler.set_epoch(epoch)
    with memory_advice(recipe.batch_size_name):
        for scores, targets in score_batches(wrapped, gen_val, epoch_step_val, Cuda, fp16, recipe.channels_last, between):
            val_sums += score_sums(scores, targets)
    train_loss, train_right, trained, unreadable = state.totals()
    val_loss, top1, top5, scored, unscored = distributed.gather([*val_sums.tolist(), len(left_out)]).sum(0).tolist()
    if not scored:
        raise UserError("no picture of the test list can be read, so there is no score")

    figures = {"epoch": epoch + 1, "lr": lr, "train_loss": train_loss / trained, "val_loss": val_loss / scored,
               "train_top1": train_right / trained, "top1": top1 / scored, "top5": top5 / scored,
               "scored": int(scored), "unreadable": int(unreadable + unscored),
               "images_per_second": round((epoch_step - first_step) * images_per_step / seconds, 3)}
    distributed.on_rank_0(lambda: record(figures, loss_history, judged, save_period, save_dir, UnFreeze_Epoch))
    checkpoint.save(epoch + 1)
    return figures


def record(figures, loss_history, judged, save_period, save_dir, UnFreeze_Epoch):
    """Rank 0: the epoch's summary, history, curve and weight files."""
    epoch, best = figures["epoch"], loss_history.append_loss(figures)
    print("epoch {epoch}/{last}: train loss {train_loss:.4f}, val loss {val_loss:.4f}, top-1 {top1:.2%}, top-5 {top5:.2%}"
          .format(**figures, last=UnFreeze_Epoch)
          + (f", {figures['unreadable']} unreadable, {figures['scored']} scored" if figures["unreadable"] else "")
          + f" ({figures['images_per_second']:.0f} images/s){' *' if best else ''}", flush=True)
    weights = judged.state_dict()
    names = ["last_epoch_weights.pth"] + ["best_epoch_weights.pth"] * best
    if epoch % save_period == 0 or epoch == UnFreeze_Epoch:
        names.append("ep%03d-loss%.3f-val_loss%.3f.pth" % (epoch, figures["train_loss"], figures["val_loss"]))
    for name in names:
        save_tensors(os.path.join(save_dir, name), weights)
