"""Reading a checkpoint: one that is not whole, or of another network, is refused in a sentence."""

from pathlib import Path

import torch

from utils.plumbing.errors import UserError, short_repr
from utils.plumbing.files import LAST, load_tensors

KINDS = {  # what the parts of a checkpoint must be
    "epoch": int,
    "step": int,
    "model": dict,
    "optimizer": dict,
    "history": dict,
    "scaler": (dict, type(None)),
    "ema": (dict, type(None)),
    "best": (dict, type(None)),
    "totals": (dict, type(None)),
    "order": str,
    "scored_on": (dict, str),  # a text before it was a dictionary
}
BUFFERS = ("momentum_buffer", "exp_avg", "exp_avg_sq")  # of a parameter, in the parameter's shape


def load_checkpoint(run):
    """Return a run's checkpoint; None where there is none. UserError: one that cannot be used."""
    path = Path(run, LAST)
    if not path.exists():
        return None
    try:
        state = load_tensors(path, "resume")
        wrong = wrong_parts(state)
        if wrong:
            raise UserError(
                f"resume: {str(path)!r} is no checkpoint of this version of the program "
                f"({', '.join(wrong)})"
            )
    except UserError as error:
        weights = str(Path(run, "last_epoch_weights.pth"))
        raise UserError(
            f"{error}: start anew with resume = False, perhaps from model_path = {weights!r}"
        ) from None
    return state


def wrong_parts(state):
    """Return the names of a checkpoint's parts that are missing or of another kind."""
    wrong = []
    for name, kind in KINDS.items():
        value = state.get(name, KINDS)  # which no part can be
        if value is KINDS or isinstance(value, bool) or not isinstance(value, kind):
            wrong.append(name)
    return wrong or wrong_contents(**state)


def wrong_contents(epoch, step, totals, history, model, best, **others):
    """Return the names of a checkpoint's parts that hold what they cannot hold."""
    wrong = []
    if epoch < 0:
        wrong.append("epoch")
    if step < 0 or (step > 0 and totals is None):
        wrong.append("step")
    if not are_rows(history.get("rows")) or type(history.get("best_since", 0)) is not int:
        wrong.append("history")
    sums = dict(totals or {"unreadable": 0})
    if type(sums.pop("unreadable", None)) is not int:
        wrong.append("totals")
    for name, tensors in (("totals", sums), ("model", model), ("best", best or {})):
        if not all(isinstance(value, torch.Tensor) for value in tensors.values()):
            wrong.append(name)
    return wrong


def are_rows(rows):
    """Return whether `rows` are the metrics of epochs as LossHistory keeps them."""
    return isinstance(rows, list) and all(map(is_row, rows))


def is_row(row):
    if not isinstance(row, dict) or not {"epoch", "train_loss", "val_loss"} <= row.keys():
        return False
    return all(isinstance(value, (int, float)) for value in row.values())


def check_same_shapes(run, what, saved, part):
    """Raise UserError unless saved tensors have the names and shapes of a network's state_dict."""
    before, now = shapes(saved), shapes(part.state_dict())
    different = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if different:
        name = different[0]
        raise cannot_continue(
            run,
            f"the {what} has changed since it was saved, in {len(different)} tensors "
            f"({short_repr(name)} was {before.get(name, 'absent')}, and is "
            f"{now.get(name, 'absent')})",
        )


def shapes(state):
    """Return {name: shape} of the tensors in a state."""
    return {name: tuple(getattr(value, "shape", ("no tensor",))) for name, value in state.items()}


def check_buffers(run, state, optimizer):
    """Raise UserError where what an optimizer has learned is not of its parameters' shapes."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    learned = state.get("state")
    if not isinstance(learned, dict):
        raise cannot_continue(run, "the optimizer's state is missing")
    for number, values in learned.items():
        if number not in range(len(parameters)) or not isinstance(values, dict):
            raise cannot_continue(run, "the optimizer's state does not fit its parameters")
        for name in BUFFERS:
            buffer = values.get(name)
            shape = getattr(buffer, "shape", None)
            if buffer is not None and shape != parameters[number].shape:
                raise cannot_continue(run, f"the optimizer's {name} {number} does not fit")


def cannot_continue(run, reason):
    """Return the UserError that a run cannot be continued."""
    return UserError(
        f"{run} cannot be continued: {reason}. Undo what was changed, or start anew with "
        f"resume = False"
    )
