"""Everything that a run writes and reads again: atomically, and with weights_only=True."""
import argparse
import io
import os
import pickle
import re
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from utils import distributed
from utils.errors import UserError, rank
from utils.workers import stop_workers

LAST, BEFORE = "last_checkpoint.pth", "last_checkpoint_previous.pth"


def save_file(path, write):
    """Call write(binary file) on a draft beside `path`, then move it into place: never a half-written file."""
    path = Path(path)
    draft = path.with_name(f".{path.name}.draft")
    try:
        with open(draft, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError as error:
        try:
            draft.unlink(missing_ok=True)
        except OSError:
            pass  # the folder is not writable: there is no draft either
        raise UserError(f"{path} could not be written ({error.strerror or error}); the files saved before it are intact. "
                        f"Free some space or choose another save_dir, then continue with resume = "
                        f"{str(path.parent)!r}") from error


def save_text(path, text):
    save_file(path, lambda file: file.write(text.encode("utf-8")))


def save_image(path, image):
    save_file(path, lambda file: image.save(file, "PNG"))


def save_tensors(path, state):
    """torch.save through memory: a full disk then raises OSError instead of aborting inside PyTorch's own writer."""
    memory = io.BytesIO()
    torch.save(state, memory)
    save_file(path, lambda file: file.write(memory.getbuffer()))


# Where other trainers' checkpoints keep weights. Averages and teachers come first: they are what publishers evaluate.
ENTRIES = ("model_ema", "state_dict_ema", "ema_state_dict", "ema", "teacher", "state_dict", "model", "student", "module")


def load_tensors(path, name="model_path"):
    """The dictionary in a file of tensors (torch.save's, or *.safetensors). UserError, which calls the path `name`,
    when it is missing, no regular file, cut short, or holds anything that could run."""
    try:
        if not Path(path).is_file() and os.path.exists(path) and not Path(path).is_dir():
            raise UserError(f"{name}: {str(path)!r} is no regular file (a pipe or a device), copy it to one first")
        if Path(path).suffix == ".safetensors":
            return load_safetensors(path, name)
        with torch.serialization.safe_globals([argparse.Namespace]):  # a bag of options, it has no code to run
            state = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{name}: {str(path)!r} does not exist") from None
    except IsADirectoryError:
        raise UserError(f"{name}: {str(path)!r} is a folder, not a file of weights") from None
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        code = f" ({found[1]})" if found else ""
        raise UserError(f"{name}: {str(path)!r} is refused: it is no file of weights, or holds code, which is never "
                        f"run{code}. Save a plain model.state_dict() with torch.save") from None
    except Exception as error:  # a broken archive can raise nearly anything
        raise UserError(f"{name}: {str(path)!r} cannot be read, it may be cut short "
                        f"({str(error).splitlines()[0] if str(error) else type(error).__name__})") from None
    if not isinstance(state, dict):
        raise UserError(f"{name}: {str(path)!r} holds a {type(state).__name__}, not a state_dict")
    return state


def load_safetensors(path, name):
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise UserError(f"{name}: reading {str(path)!r} needs one more package: pip install safetensors") from None
    return load_file(path)


def choose_entry(state, depth=2):
    """(the state_dict in a checkpoint, its entry's name), looking into ENTRIES in their order, `depth` levels down.

    ({}, "") where there are no tensors with names. The counter that AveragedModel adds, and its prefix, are taken off.
    """
    for key in ENTRIES if depth else ():
        if isinstance(state.get(key), dict):
            inner, entry = choose_entry(state[key], depth - 1)
            if inner:
                return inner, f"{key}.{entry}".rstrip(".")
    if not any(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()):
        return {}, ""
    if "n_averaged" in state:
        del state["n_averaged"]
        torch.nn.modules.utils.consume_prefix_in_state_dict_if_present(state, "module.")
    return state, ""


def load_weights(path, name="model_path"):
    """A state_dict from a file: what choose_entry finds. UserError, which calls the path `name`, where it finds none."""
    state, entry = choose_entry(load_tensors(path, name))
    strange = [key for key in state if not isinstance(key, str)]
    if strange or not state:
        why = f"a tensor is called {strange[0]!r}, which is no name" if strange else "it has no tensors by name"
        raise UserError(f"{name}: {str(path)!r} holds no state_dict ({why}): save model.state_dict() with torch.save")
    if entry and rank() == 0:
        print(f"{path}: taking the weights in its entry {entry}", file=sys.stderr)
    return state


def load_checkpoint(run):
    """The newest readable checkpoint of a run; None when it never wrote one; UserError when none can be read."""
    paths = [p for p in (Path(run, LAST), Path(run, BEFORE)) if p.exists()]
    for path in paths:
        try:
            return load_tensors(path, "resume")
        except UserError as error:
            print(f"WARNING: {error}; trying the checkpoint before it")
    if paths:
        raise UserError(f"{run} has no readable checkpoint left: start anew with resume = False, "
                        f"perhaps from model_path = {str(Path(run, 'last_epoch_weights.pth'))!r}")
    return None


@dataclass
class EpochState:
    """How far one process is in an epoch. The tensors are on its device, so that no step waits for their figures."""
    epoch: int
    lr: float
    allowed: float  # unreadable pictures of all processes
    sums: torch.Tensor  # float64 (3,): loss, right, pictures
    first_bad: torch.Tensor  # int64 (): the first step whose loss is not finite, 0 for none
    step: int = 0
    unreadable: int = 0

    def totals(self):
        """[loss, right, pictures, unreadable] over all processes. Collective."""
        return distributed.gather([*self.sums.tolist(), self.unreadable]).sum(0).tolist()


class Checkpointer:
    """Saves all that resuming needs, and brings the processes to agree when to save, stop or give up.

    parts: {name: object with state_dict()/load_state_dict() or None}, the model first.
    """

    def __init__(self, run, parts, save_minutes=0):
        self.run, self.parts, self.save_minutes = run, parts, save_minutes
        self.resumed = {"epoch": None}
        self.signal, self.saved_at = 0, time.monotonic()
        self.named = set()

    def load(self, state):
        """Give every part its own back, taking it out of `state`: it would fill memory for the rest of the run."""
        for name, part in self.parts.items():
            kept = state.pop(name, None)
            if part is not None and kept is not None:
                try:
                    part.load_state_dict(kept)
                except (RuntimeError, ValueError, KeyError) as error:
                    raise UserError(f"{self.run} cannot be continued, its {name} is of another network or optimizer: "
                                    f"{str(error).splitlines()[0]}") from error
        self.resumed = state

    def begin(self, epoch, lr, allowed, device):
        """The EpochState at the beginning of an epoch, or where it was interrupted."""
        state = EpochState(epoch, lr, allowed, torch.zeros(3, dtype=torch.float64, device=device),
                           torch.zeros((), dtype=torch.int64, device=device))
        if self.resumed["epoch"] == epoch and self.resumed["totals"]:
            state.step = self.resumed["step"]
            if rank() == 0:
                *sums, state.unreadable = self.resumed["totals"]
                state.sums += torch.tensor(sums, dtype=torch.float64, device=device)
        return state

    def save(self, epoch, step=0, totals=None):
        """Write last_checkpoint.pth on rank 0, keeping the one before it; the other processes wait."""
        def write():
            state = {name: part and part.state_dict() for name, part in self.parts.items()}
            target = Path(self.run, LAST)
            fresh = target.with_name("." + LAST + ".new")
            save_tensors(fresh, {**state, "epoch": epoch, "step": step, "totals": totals})
            if target.exists():
                os.replace(target, target.with_name(BEFORE))
            os.replace(fresh, target)
        distributed.on_rank_0(write)
        self.saved_at = time.monotonic()

    def catch_signals(self):
        """From now on SIGTERM, Ctrl-C and SIGHUP are noted and obeyed after the current step."""
        def note(number, frame):
            self.signal = number
        for number in (signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGTERM)):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup stays in force
                signal.signal(number, note)

    def name_unreadable(self, unreadable, gen):
        """Print each unreadable picture once, with its annotation line. Collective."""
        for index, reason in sum(distributed.gather_objects(unreadable), []):
            if index not in self.named and rank() == 0:
                print(f"\nunreadable picture: {gen.dataset.line(index)} ({reason})", flush=True)
            self.named.add(index)

    def agree(self, state, failure=None, unreadable=(), gen=None, look=True):
        """Before each step: the processes stop together, on a signal or a fault, or save if it is time. Collective.

        failure: why this process cannot go on, or None. unreadable: the new ones of the loader `gen`, (index, reason)
        each. look: read first_bad, for which a GPU has to finish its steps; it is always read before anything is saved.
        """
        due = bool(self.save_minutes) and rank() == 0 and time.monotonic() - self.saved_at > 60 * self.save_minutes
        everyone = distributed.gather([self.signal, due, failure is not None, look and state.first_bad.item(),
                                       len(unreadable), state.unreadable])
        signals, dues, failures, bad, news, _ = everyone.max(0).values.int().tolist()
        count, where = int(everyone[:, 5].sum()), f"epoch {state.epoch + 1}, step {state.step}"
        if news:
            self.name_unreadable(list(unreadable), gen)
        if (signals or dues or failures) and not bad:
            bad = int(distributed.gather([state.first_bad.item()]).max())
        if bad:
            raise UserError(f"the loss is not finite in epoch {state.epoch + 1}, step {bad}, at lr {state.lr:.3g}: lower "
                            f"Init_lr, or set clip_grad_norm; the files saved before it are intact")
        if count > state.allowed:
            raise UserError(f"{count} pictures of epoch {state.epoch + 1} cannot be read, more than 1 % of them: "
                            f"python -m utils.annotation DATASETS --check lists them")
        if signals or dues or failures:
            self.save(state.epoch, state.step, state.totals())
        if failures:
            reasons = [reason for reason in distributed.gather_objects(failure and str(failure)) if reason]
            raise UserError(f"{reasons[0]}. The state up to {where} is saved: continue with resume = {self.run!r}") from failure
        if signals:
            if rank() == 0:
                print(f"\n{signal.Signals(signals).name}: saved at {where}; continue with "
                      f"resume = {self.run!r} (or resume = True) in train.py", flush=True)
            distributed.barrier()
            stop_workers()
            os._exit(128 + signals)  # no clean-up that could wait for a worker or another process
