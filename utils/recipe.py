"""What is learned and how it is judged: the loss, the figures, the optimizers, and the recipes around them."""
import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import v2

NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


def get_criterion(settings, weights=None, training=False):
    """The loss: criterion(scores, targets) → scalar, the mean over the batch's pictures.

    scores: float32 (N, classes). targets: int64 (N,), or float32 (N, classes) where pictures are mixed. weights: float32
    (classes,) or None. Only training has weights and label smoothing. A picture counts as much as its label weighs: smoothed
    shares weighed by their own classes would teach the network to name the rare ones. The sum is divided by the number of
    pictures, as the sum of their weights would depend on how a batch is spread over processes.
    """
    smoothing = settings.get("label_smoothing", 0.0) if training else 0.0

    def criterion(scores, targets):
        share = torch.ones((), device=scores.device)
        if weights is not None and targets.dim() == 1:
            share = weights[targets]
        elif weights is not None:  # each label's loss by its own weight, as much as there is of the label
            share = targets @ weights
            targets = targets * weights / share[:, None]
        return (share * F.cross_entropy(scores, targets, reduction="none", label_smoothing=smoothing)).mean()
    return criterion


def probabilities(scores):
    """float32 (N, classes) scores → what predict, evaluate and export show for each class, from 0 to 1."""
    return scores.softmax(1)


def ranked(scores, number):
    """int64 (N, number) class ids of the highest scores. The one order among equals: the lower class id first."""
    return scores.argsort(dim=1, descending=True, stable=True)[:, :number]


def answers(scores, names):
    """What is said of pictures: for each row of float32 (N, classes) scores [(class name, probability)], the best five
    first; or a text that says why there is none."""
    indices = ranked(scores, 5)  # of scores, as small probabilities are rounded to the same number
    values = probabilities(scores).gather(1, indices)
    return [[(names[index], value) for value, index in zip(*row)] if finite else "the network's scores for it are not finite"
            for finite, *row in zip(scores.isfinite().all(1).tolist(), values.tolist(), indices.tolist())]


ANSWER = ("class", "probability")  # what the two parts of an answer are called in predictions.csv and JSON


def as_json(answer):
    """A picture's answer, one of what `answers` gives, for programs."""
    return {"top5": [dict(zip(ANSWER, (name, round(value, 6)))) for name, value in answer]}


def answer_text(name, value):
    """One of the pairs that `answers` gives, as it is printed and drawn."""
    return f"{name} {value:.1%}"


def said(target, names):
    """A picture's target as captions and tables show it: its class name."""
    return names[int(target)]


def sums_of(loss, scores, targets, settings):
    """What a batch adds to the figures of training and evaluation: {name: float64 tensor of any shape} on the batch's device, so
    that no step waits. loss: scalar mean; scores: float32 (N, classes); targets: as get_criterion's."""
    labels = targets if targets.dim() == 1 else targets.argmax(1)  # mixed: the larger label
    right = (ranked(scores, 5) == labels[:, None]).sum(0)
    return {"pictures": torch.full((), len(scores), dtype=torch.float64, device=scores.device),
            "loss": loss.detach().double() * len(scores), "top1": right[0].double(), "top5": right.sum().double()}


def figures_of(sums, settings):
    """{name: number} from the added sums of sums_of. Whatever stands here is in the history, with 'train_' for training's."""
    figures = {name: (sums[name] / sums["pictures"]).item() for name in ("loss", "top1", "top5")}
    return figures


def figure_text(name, value, exact=False):
    """A figure with its name, as it is printed; exact: with digits enough to compare it."""
    if name in ("top1", "top5"):
        return f"top-{name[3:]} {value:.{4 if exact else 2}%}"
    return f"{name.replace('_', ' ')} {value:{'.8g' if exact else '.4f' if name.endswith('loss') else '.4g'}}"


class EMA(nn.Module):
    """Exponential moving average of a model's parameters and BatchNorm statistics, from the first step's on. (torch's own
    AveragedModel copies its counter to the GPU at every step, and waits for it.)"""

    def __init__(self, model, decay):
        super().__init__()
        counters = {id(buffer): buffer for buffer in model.buffers() if not buffer.is_floating_point()}
        self.module, self.decay = copy.deepcopy(model, counters), decay  # which are BatchNorm's of batches, and shared
        self.register_buffer("n_averaged", torch.tensor(0))  # on the host

    @torch.no_grad()
    def update_parameters(self, model):
        pairs = zip(self.module.state_dict().values(), model.state_dict().values())
        averages, values = zip(*(pair for pair in pairs if pair[0].is_floating_point()))
        torch._foreach_lerp_(averages, values, 1 - self.decay if self.n_averaged else 1.0)
        self.n_averaged += 1


class Recipe:
    """What fit_one_epoch needs beyond the documented parameters, made of train.py's settings, each of which may be absent.

    weights: float32 (classes,) or None. extra_loss: (pictures as the network saw them, scores, targets) → scalar, or None.
    """

    def __init__(self, settings={}, model=None, num_classes=None, weights=None):
        mixes = [mix(alpha=float(settings[name]), num_classes=num_classes)  # (pictures, class ids) → (pictures, probabilities)
                 for name, mix in (("mixup_alpha", v2.MixUp), ("cutmix_alpha", v2.CutMix)) if settings.get(name)]
        weights = weights if weights is None else weights.to(next(model.parameters()).device)
        self.settings, self.extra_loss = settings, None
        self.criterion, self.val_criterion = get_criterion(settings, weights, training=True), get_criterion(settings)
        self.mix = v2.RandomChoice(mixes) if mixes else None
        self.ema = EMA(model, settings["ema_decay"]) if settings.get("ema_decay") else None  # then validated and saved


OPTIMIZERS = {  # optimizer_type: (function of parameters and momentum, limits of Init_lr_fit, the same for transformers)
    "sgd": (lambda parameters, momentum: torch.optim.SGD(  # with Nesterov's momentum, as documented
        parameters, momentum=momentum, nesterov=momentum > 0, fused=True), (5e-4, 1e-1), (5e-4, 1e-1)),
    "adam": (lambda parameters, momentum: torch.optim.Adam(  # decay as an L2 term of the loss; momentum is beta1
        parameters, betas=(momentum, 0.999), fused=True), (1e-4, 1e-3), (1e-5, 1e-3)),
    "adamw": (lambda parameters, momentum: torch.optim.AdamW(  # decoupled decay (Loshchilov and Hutter)
        parameters, betas=(momentum, 0.999), fused=True), (1e-4, 1e-3), (1e-5, 1e-3)),
}


def get_optimizer(model, head, optimizer_type, momentum, weight_decay, backbone_lr_scale=1.0):
    """An optimizer of OPTIMIZERS over parameter groups. Each has an lr_scale, which is 1 for the head, whose group is the last.

    Decay is for the weights of layers alone: not for biases, norm layers, and what a network learns besides, such as tables of
    positions and scales. head: names of the head's layers (nets.head_layers).
    """
    norms = {id(p) for m in model.modules() if isinstance(m, NORMS) for p in m.parameters(recurse=False)}
    groups = {(part, decayed): [] for part in ("backbone", "head") for decayed in (False, True)}
    for name, parameter in model.named_parameters():
        part = "head" if name.rpartition(".")[0] in head else "backbone"
        decayed = name.endswith("weight") and parameter.ndim > 1 and id(parameter) not in norms
        groups[part, decayed].append(parameter)
    return OPTIMIZERS[optimizer_type][0](
        [{"params": tensors, "weight_decay": weight_decay if decayed else 0.0,
          "lr_scale": backbone_lr_scale if part == "backbone" else 1.0}
         for (part, decayed), tensors in groups.items() if tensors], momentum)


@torch.no_grad()  # else autograd records it, and behind DDP, which keeps the gradients' memory, one graph chains to the next
def clip_layers(parameters, ratio):
    """Adaptive gradient clipping (Brock et al., "High-Performance Large-Scale Image Recognition Without Normalization", 2021), by
    layer: no weight tensor's gradient stays longer than `ratio` times the tensor. Biases and norm layers are left alone."""
    weights = [p for p in parameters if p.ndim > 1]
    gradients = [p.grad for p in weights]
    limits = torch._foreach_mul(torch._foreach_clamp_min(torch._foreach_norm(weights), 1e-3), ratio)  # of zeros too
    shares = torch._foreach_div(limits, torch._foreach_norm(gradients))  # infinite where there is no gradient
    torch._foreach_mul_(gradients, torch._foreach_clamp_max(shares, 1.0))


def restore_optimizer(optimizer, state):
    """load_state_dict that brings back what was learned (momentum buffers); the options stay those of the settings."""
    options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, options):
        group.update(own)


def balanced_weights(class_ids, num_classes):
    """float32 (classes,) weights from int64 (N,) class_ids: number / (present classes · count), as scikit-learn's 'balanced'; 0
    for absent ones. The mean of the pictures' weights is 1."""
    counts = np.bincount(class_ids, minlength=num_classes)
    return torch.tensor(np.where(counts > 0, len(class_ids) / ((counts > 0).sum() * np.maximum(counts, 1)), 0)).float()
