"""Interrupted runs end with the weights of the uninterrupted one, bit for bit."""
import os
import random
import signal
import time

import pytest
import torch

from tests.helpers import (edit, history, make_data, make_project, run_of, same, start, torchrun, train, weights)

ALL_ON = dict(backbone="'shufflenet_v2_x0_5'", UnFreeze_Epoch=4, Freeze_Train=True, Freeze_Epoch=2, Freeze_batch_size=16,
              save_minutes=1 / 3000, num_workers=1, ema_decay=0.9, mixup_alpha=0.2, cutmix_alpha=1.0,
              label_smoothing=0.1, accumulate=2, clip_grad_norm=1.0, random_erasing=0.3, augmentation="'trivial'",
              backbone_lr_scale=0.5, class_weights="'balanced'")


def kill_group(process, number):
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        pass


def interrupted(folder, number, after):
    """Start or continue training and send the whole group a signal after so many seconds; the exit code."""
    process = start(folder)
    try:
        process.communicate(timeout=after)
    except Exception:
        kill_group(process, number)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """An uninterrupted run with every recipe on."""
    folder = make_project(tmp_path_factory.mktemp("reference"), **ALL_ON)
    make_data(folder, train=200, test=60)
    begin = time.monotonic()
    train(folder)
    return folder, time.monotonic() - begin


def kill_until_done(folder, reference_seconds, kills, rng):
    """SIGKILL at random moments, `kills` times at least while the run lasts, then let it finish."""
    survived = 0
    edit(folder, resume=True)
    while survived < kills:
        code, out, err = interrupted(folder, signal.SIGKILL, rng.uniform(0.5, 1.1) * reference_seconds)
        if code == 0:
            return survived
        assert code == -signal.SIGKILL, (code, out, err)
        survived += 1
    train(folder)
    return survived


def same_end(folder, reference_folder):
    for name in ("last_epoch_weights.pth", "best_epoch_weights.pth"):
        assert same(weights(run_of(folder), name), weights(run_of(reference_folder), name)), name
    for ours, theirs in zip(history(run_of(folder)), history(run_of(reference_folder)), strict=True):
        assert {k: v for k, v in ours.items() if k != "images_per_second"} == \
               {k: v for k, v in theirs.items() if k != "images_per_second"}


def test_random_kills(reference, tmp_path):
    folder = make_project(tmp_path, **ALL_ON)
    make_data(folder, train=200, test=60)
    assert kill_until_done(folder, reference[1], 3, random.Random(1)) >= 1
    same_end(folder, reference[0])


@pytest.mark.slow
def test_25_random_kills(reference, tmp_path):
    rng, kills, attempt = random.Random(time.time()), 0, 0
    while kills < 25:
        attempt += 1
        folder = make_project(tmp_path / str(attempt), **ALL_ON)
        make_data(folder, train=200, test=60)
        kills += kill_until_done(folder, reference[1], 6, rng)
        same_end(folder, reference[0])
    print(f"{kills} kills survived")
