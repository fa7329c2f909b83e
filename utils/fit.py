"""One epoch of training and validation: fit_one_epoch, as documented, then its parts."""

import contextlib
import math
import random
import time

import torch

from utils.checkpoint import Checkpoint, Position, published_model
from utils.loss_history import describe_epoch, describe_waiting
from utils.optimizer import check_parameters, optimizer_step, set_optimizer_lr
from utils.pictures import normalize
from utils.plumbing import processes
from utils.plumbing.console import ProgressLine, say
from utils.plumbing.errors import NOT_FINITE, UserError, printable
from utils.plumbing.processes import rank, world_size
from utils.recipe import Recipe, mixed_precision
from utils.task import batch_sums, logits_from, metric_texts, metrics_from

VALIDATION = {"loss": "val_loss"}  # a metric's name in the history, where validation's differs
LOOK_EVERY = 20  # optimizer steps between looks at a GPU's loss: reading it waits for queued work


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
    """Train one epoch, validate, record and save; the first sixteen parameters are documented.

    model_train is the wrapped model, model the bare one; loss_history is None on all processes but
    the first; fp16 is True, False or a type's name (precision_name); save_dir is the run's folder;
    local_rank is not used.
    checkpoint, a Checkpoint, continues an interrupted epoch where it stopped. lr_scheduler_func:
    the rate follows it at every step, at epoch + step / epoch_step; without it the rate stays as it
    is. Returns {metric: number}, the same on every process but for images_per_second; its 'lr' is
    the documented one, which the optimizer has at the call. UserError: a loss or weights that are
    not finite, too many unreadable pictures, a full disk.
    """
    recipe = recipe or Recipe()
    settings = recipe.settings
    accumulate = settings.get("accumulate", 1)
    images_per_batch = gen.batch_size * world_size()
    used_scaler = scaler or torch.amp.GradScaler("cuda", enabled=False)  # disabled, it only steps
    if checkpoint is None:
        checkpoint = Checkpoint(save_dir, model, optimizer, scaler, recipe.ema, loss_history)
    check_parameters(optimizer, model)
    first_lr = current_lr(optimizer)

    begin = time.monotonic()
    # not a copy: a save between two steps writes what the loop below adds to it
    position = checkpoint.begin(epoch, fingerprint_of(gen))
    first_step = position.step
    gen.sampler.set_epoch(epoch, first_step)
    model_train.train()
    title = f"epoch {epoch + 1}/{UnFreeze_Epoch}"
    progress = ProgressLine(title, epoch_step, first_step)

    def describe():
        texts = metric_texts(metrics_from(position.sums, settings))
        return " ".join([*texts, f"lr {current_lr(optimizer):.2e}"])

    # lists of `accumulate` batches; before each the processes agree whether to save or to end
    for batches in checkpoint.steps(gen, epoch_step - first_step, accumulate):
        count_unreadable(batches, gen.dataset, position)
        if lr_scheduler_func:
            set_optimizer_lr(optimizer, lr_scheduler_func, epoch + position.step / epoch_step)
        seed_step(settings.get("seed", 0), epoch, position.step, Cuda)
        for sums in forward_backward(model_train, batches, Cuda, fp16, used_scaler, recipe):
            position.sums.update(sums)  # a Counter's update adds
        optimizer_step(
            optimizer, used_scaler, settings.get("clip_grad_norm"), settings.get("clip_ratio")
        )
        if recipe.ema:
            recipe.ema.update_parameters(model)
        position.step += len(batches)
        at_end = position.step == epoch_step
        if at_end or not Cuda or position.step // accumulate % LOOK_EVERY == 0:
            check_training(position, used_scaler, current_lr(optimizer))
        progress.show(position.step, images_per_batch, describe)
    progress.clear()
    seconds = max(time.monotonic() - begin, 1e-3)  # Windows' clock has coarse steps
    waited = max(processes.gather_objects(checkpoint.waited))  # all wait for the slowest
    waiting = describe_waiting(waited, seconds, gen)

    totals = position.totals()
    unreadable = totals.pop("unreadable")
    check_unreadable(unreadable, gen.dataset)
    validated_model = published_model(checkpoint.parts)
    processes.sync_buffers(validated_model)
    scoring_model = choose_scoring_model(validated_model, model_train)
    validated = validate(
        scoring_model, gen_val, epoch, epoch_step_val, Cuda, fp16, recipe, checkpoint
    )

    speed = (epoch_step - first_step) * images_per_batch / seconds
    metrics = {
        "epoch": epoch + 1,
        "lr": first_lr,
        "scored": validated.pop("scored"),
        "unreadable": unreadable + validated.pop("unreadable"),
        "images_per_second": round(speed, 3),
    }
    if scaler:
        metrics["scale"] = scaler.get_scale()
    for name, value in metrics_from(totals, settings).items():
        metrics[f"train_{name}"] = value
    metrics.update(validated)
    is_best = checkpoint.commit(metrics, save_period, UnFreeze_Epoch)
    say(f"{title}: {describe_epoch(metrics, validated, waiting, is_best)}")
    return metrics


def forward_backward(model_train, batches, Cuda, fp16, scaler, recipe):
    """Run the network forward and backward over `batches`, and return the batch_sums of each.

    The gradients are those of the mean loss: several batches accumulate for one optimizer step.
    """
    all_sums = []
    for number, (images, targets, _) in enumerate(batches, 1):
        reduce_later = number < len(batches) and hasattr(model_train, "no_sync")
        # DDP: the gradients are reduced once, with the last batch
        with model_train.no_sync() if reduce_later else contextlib.nullcontext():
            loss, sums = compute_loss(model_train, images, targets, Cuda, fp16, recipe)
            scaler.scale(loss / len(batches)).backward()
        if scaler.is_enabled():
            # a loss that overflowed in float16 must not make the sums nan: the step is skipped
            finite = loss.detach().isfinite()
            for name, value in sums.items():
                sums[name] = torch.where(finite, value, 0)
        all_sums.append(sums)
    return all_sums


def compute_loss(model_train, images, targets, Cuda, fp16, recipe):
    """Return (loss, batch_sums) of a batch from the loader.

    To show a further loss among the metrics, add its sum here, and read it in task.metrics_from.
    """
    inputs, targets = network_inputs(model_train, images, targets, recipe.settings)
    if recipe.mix:
        inputs, targets = recipe.mix(inputs, targets)
    with mixed_precision(Cuda, fp16):
        logits = logits_from(model_train(inputs))
        loss = recipe.criterion(logits, targets)
        if recipe.extra_loss:
            loss = loss + recipe.extra_loss(inputs, logits, targets)
    return loss, batch_sums(loss, logits.detach(), targets, recipe.settings)


def score_batch(model, images, targets, Cuda, fp16, settings):
    """Return (logits, targets) of a batch from the loader, on the model's device.

    model: in evaluation mode.
    """
    inputs, targets = network_inputs(model, images, targets, settings)
    with torch.no_grad(), mixed_precision(Cuda, fp16):
        return logits_from(model(inputs)), targets


def network_inputs(model, images, targets, settings):
    """Return (what the network takes, targets) of a batch from the loader, on the model's device.

    To fork it for a network of several inputs, return a tuple of them in place of the pictures.
    """
    device = next(model.parameters()).device
    return normalize(images, device, settings), targets.to(device, non_blocking=True)


def seed_step(seed, epoch, step, Cuda):
    """Seed what is random in a step by these numbers and the rank alone."""
    step_seed = random.Random(f"{seed} {epoch} {step} {rank()}").getrandbits(63)
    torch.default_generator.manual_seed(step_seed)  # torch.manual_seed would take 0.2 ms
    if Cuda:  # the process's own GPU gets step_seed, DataParallel's others another one each
        for number, generator in enumerate(torch.cuda.default_generators):
            generator.manual_seed(step_seed + number - processes.local_rank())


def validate(model, gen_val, epoch, epoch_step_val, Cuda, fp16, recipe, checkpoint):
    """Return validation's metrics over all processes.

    'scored' and 'unreadable' among them are numbers of pictures.
    """
    position = Position(epoch)
    settings = recipe.settings
    gen_val.sampler.set_epoch(epoch)
    model.eval()
    for batches in checkpoint.steps(gen_val, epoch_step_val):
        count_unreadable(batches, gen_val.dataset, position)
        for images, targets, _ in batches:
            if len(targets):
                logits, targets = score_batch(model, images, targets, Cuda, fp16, settings)
                loss = recipe.val_criterion(logits, targets)
                position.sums.update(batch_sums(loss, logits, targets, settings))
    totals = position.totals()
    unreadable = totals.pop("unreadable")
    check_unreadable(unreadable, gen_val.dataset)
    if "pictures" not in totals:
        raise UserError("no picture of the test list can be read, so there is no score")
    validated = {}
    for name, value in metrics_from(totals, settings).items():
        validated[VALIDATION.get(name, name)] = value
    if not math.isfinite(validated["val_loss"]):
        raise UserError(f"the validation loss of epoch {epoch + 1} is not finite: {NOT_FINITE}")
    return {**validated, "scored": int(totals["pictures"]), "unreadable": unreadable}


def choose_scoring_model(model, model_train):
    """Return model_train where it is the network on several GPUs, else model (EMA's is not)."""
    if isinstance(model_train, torch.nn.DataParallel) and model_train.module is model:
        return model_train
    return model


def current_lr(optimizer):
    """Return the learning rate of the head, which is the last parameter group."""
    return optimizer.param_groups[-1]["lr"]


def fingerprint_of(gen):
    """Return a text of all that a step's pictures depend on, except the number of processes."""
    return str([gen.sampler.fingerprint, gen.dataset.fingerprint])


def count_unreadable(batches, data, position):
    """Name each unreadable picture once, and count it. UserError: there are too many."""
    for _, _, unreadable in batches:
        for index, reason in unreadable:
            if index not in data.named_unreadable:
                name = printable(data.name(index))
                say(f"\nunreadable picture: {name} ({printable(reason)})", everyone=True)
            data.named_unreadable.add(index)
            position.unreadable += 1
    # of this process; those of all are checked at the epoch's end
    check_unreadable(position.unreadable, data)


def check_unreadable(number, data):
    """Raise UserError where more than one picture, and more than 1 %, cannot be read."""
    if number > max(1, 0.01 * len(data)):
        kind = "training" if data.random else "test"
        raise UserError(
            f"{number} {kind} pictures cannot be read, more than 1 %: "
            f"python -m utils.annotation DATASETS --check writes lists without them (to keep lists "
            f"of your own, add --out NAME)"
        )


def check_training(position, scaler, lr):
    """Raise UserError where the loss is not finite, or float16 overflows at any scale.

    Reading the loss waits for the GPU.
    """
    epoch, step = position.epoch + 1, position.step
    # with a scaler the sums are of the batches whose loss was finite; where there was none,
    # 0 / 0 is nan
    if not math.isfinite(position.sums["loss"] / position.sums["pictures"]):
        raise UserError(
            f"the loss is not finite by epoch {epoch}, step {step}, at lr {lr:.3g}: {NOT_FINITE}"
        )
    if scaler.get_scale() < 1:
        raise UserError(
            f"float16 gradients overflow in every step by epoch {epoch}, step {step}, "
            f"at any scale: set fp16 = False, or lower Init_lr or clip_ratio"
        )
