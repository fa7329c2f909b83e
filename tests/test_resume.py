"""Interrupted runs end with the weights of the uninterrupted one, bit for bit."""

import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from tests.helpers import (
    children,
    edit,
    environment,
    history,
    hooked,
    launch,
    make_data,
    make_project,
    originals,
    run_of,
    runs,
    same,
    start,
    torchrun,
    train,
    weights,
    write_network,
)

ALL_ON = dict(
    backbone="'shufflenet_v2_x0_5'",
    UnFreeze_Epoch=4,
    Freeze_Train=True,
    Freeze_Epoch=2,
    Freeze_batch_size=16,
    save_minutes=1 / 3000,
    num_workers=1,
    ema_decay=0.9,
    mixup_alpha=0.2,
    cutmix_alpha=1.0,
    label_smoothing=0.1,
    accumulate=2,
    clip_grad_norm=1.0,
    random_erasing=0.3,
    augmentation="'trivial'",
    backbone_lr_scale=0.5,
    class_weights="'balanced'",
)


RESTARTED = dict(train=104, test=30)


def kill_group(process, number):
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        pass


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """An uninterrupted run with every recipe on."""
    folder = make_project(tmp_path_factory.mktemp("reference"), **ALL_ON)
    make_data(folder, train=200, test=60)
    begin = time.monotonic()
    train(folder)
    return folder, time.monotonic() - begin


MOMENTS = [  # the calls before which a process dies, counted from its start
    ("torch.optim:SGD.step", 5),
    ("os:replace", 4),
    ("torch.optim:SGD.step", 9),
    ("utils.fit:score_batch", 4),
    ("os:replace", 6),
]


def test_kills(reference, tmp_path):
    folder = make_project(tmp_path, **ALL_ON)
    make_data(folder, train=200, test=60)
    for place, number in MOMENTS:
        script = hooked(folder, f"before('{place}', die, {number})")
        train(folder, "--resume", True, script=script, code=-signal.SIGKILL)
    train(folder, "--resume", True, "--num_workers", 0)  # the reference has a loader process
    same_end(folder, reference[0])


def interrupted(folder, number, after):
    """Start or continue training and send the whole group a signal after so many seconds.

    Returns the exit code.
    """
    process = start(folder)
    try:
        process.communicate(timeout=after)
    except subprocess.TimeoutExpired:
        kill_group(process, number)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def kill_until_done(folder, reference_seconds, kills, rng):
    """SIGKILL at random moments, `kills` times at least while the run lasts, then let it finish."""
    survived = 0
    edit(folder, resume=True)
    while survived < kills:
        code, out, err = interrupted(
            folder, signal.SIGKILL, rng.uniform(0.5, 1.1) * reference_seconds
        )
        if code == 0:
            return survived
        assert code == -signal.SIGKILL, (code, out, err)
        survived += 1
        if any(
            '"finished": true' in path.read_text() for path in folder.glob("logs/*/config.json")
        ):
            # killed after its last word; resume = True would rightly begin another run
            return survived
    train(folder)
    return survived


def same_end(folder, reference_folder):
    for name in ("last_epoch_weights.pth", "best_epoch_weights.pth"):
        assert same(weights(run_of(folder), name), weights(run_of(reference_folder), name)), name
    for ours, theirs in zip(
        history(run_of(folder)), history(run_of(reference_folder)), strict=True
    ):
        assert {k: v for k, v in ours.items() if k != "images_per_second"} == {
            k: v for k, v in theirs.items() if k != "images_per_second"
        }


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


def wait_for(process, text, timeout=300):
    """Read the process's output up to a line with `text`."""
    seen, end = "", time.monotonic() + timeout
    while text not in seen:
        line = process.stdout.readline()
        assert line and time.monotonic() < end, (
            f"{text!r} never came:\n{seen}\n{process.stderr.read() if not line else ''}"
        )
        seen += line
    return seen


def test_the_unedited_file_goes_on(tmp_path):
    """With pictures in memory, and loader workers in one leg alone."""
    shutil.copytree(originals(), tmp_path, dirs_exist_ok=True)
    make_data(tmp_path, train=96, test=30)
    words = ("--Cuda", False, "--fp16", False)  # 'auto' measures
    train(tmp_path, *words, "--save_dir", "whole")
    stops = hooked(tmp_path, "before('torch.optim:SGD.step', send_sigterm, 5)")  # of 3 an epoch
    train(tmp_path, *words, script=stops, code=128 + signal.SIGTERM)
    out, _ = train(tmp_path, *words, "--resume", True, "--num_workers", 2)
    assert "continuing" in out
    assert same(weights(run_of(tmp_path)), weights(next((tmp_path / "whole").iterdir())))


@pytest.mark.parametrize(
    "number, world",
    [
        (signal.SIGTERM, 1),
        (signal.SIGINT, 1),
        (signal.SIGHUP, 1),
        pytest.param(signal.SIGTERM, 2, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 2, marks=pytest.mark.slow),
    ],
)
def test_signals_to_the_group(tmp_path, number, world):
    """Saved and ended within torchrun's 30 s; the resumed run trains each epoch that was left."""
    folder = make_project(tmp_path, num_workers=2, UnFreeze_Epoch=40, Unfreeze_batch_size=8)
    make_data(folder, train=64, test=16)
    launcher = (sys.executable,) if world == 1 else torchrun()
    process = start(folder, launcher=launcher)
    seen = wait_for(process, "epoch 2/40:")
    os.killpg(process.pid, number)
    # torchrun kills what has not ended after 30 s: then nothing would be saved
    out, err = process.communicate(timeout=300)
    # a shell's loop looks for the signal, and shows 130
    expected = -number if number == signal.SIGINT else 128 + number
    assert process.returncode == expected if world == 1 else process.returncode != 0
    assert (seen + out).count("continue with\n") == 1 and "Traceback" not in (
        err if world == 1 else ""
    )
    state = torch.load(run_of(folder) / "last_checkpoint.pth", weights_only=True)
    assert 2 <= state["epoch"] < 40
    edit(folder, resume=True, UnFreeze_Epoch=state["epoch"] + 2, num_workers=1)
    out, _ = launch(folder, processes=world)
    assert "continuing" in out and "UnFreeze_Epoch: 40 →" in out
    assert [row["epoch"] for row in history(run_of(folder))] == list(range(1, state["epoch"] + 3))


def test_another_number_of_processes(tmp_path):
    """Stopped in one process, continued in two.

    The right pictures, the same figures within float tolerance.
    """
    ends = []
    for split in (False, True):
        folder = make_project(
            tmp_path / str(split),
            UnFreeze_Epoch=2,
            save_minutes=1 / 6000,
            Init_lr=1e-3,
            Unfreeze_batch_size=4,
        )
        make_data(folder, train=240, test=16)
        edit(folder, backbone="'plain'")
        write_network(
            folder / "nets",
            "plain",
            "nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), "
            "nn.Linear(128, num_classes)",
        )
        if split:
            stop = hooked(folder, "before('torch.optim:SGD.step', send_sigterm, 80)")
            train(folder, script=stop, code=143)
            state = torch.load(run_of(folder) / "last_checkpoint.pth", weights_only=True)
            assert state["epoch"] == 1 and 0 < state["step"] < 60
            edit(folder, resume=True)
            launch(folder)
        else:
            train(folder)
        ends.append((history(run_of(folder)), weights(run_of(folder))))
    for a, b in zip(ends[0][0], ends[1][0], strict=True):
        assert (
            a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-3)
            and a["scored"] == b["scored"]
        )
    for name, value in ends[0][1].items():
        torch.testing.assert_close(value, ends[1][1][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "launcher", [(sys.executable, "-u"), pytest.param("torchrun", marks=pytest.mark.slow)]
)
def test_the_printed_command_continues_the_run(tmp_path, monkeypatch, launcher):
    """It is pasted into a shell, and trains what the stopped run would have trained."""
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID"):  # they decide what stands in front
        monkeypatch.delenv(name, raising=False)
    launcher = torchrun() if launcher == "torchrun" else launcher
    folder = make_project(tmp_path / "it's a project", distributed="'LOCAL_RANK' in os.environ")
    make_data(folder, train=64, test=16)
    words = ("--input_shape", "[40, 40]", "--UnFreeze_Epoch", 200, "--save_dir", "my runs")
    words = (*words, "--num_workers", 1, "--Cuda=False")
    process = start(folder, *words, launcher=launcher)
    seen = wait_for(process, "epoch 2/200:")
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=300)
    command = re.search(r"continue with\n  (.*)\n", seen + out)[1]
    (run,) = (folder / "my runs").iterdir()
    assert command.endswith(f" --num_workers 1 --Cuda=False --resume 'my runs/{run.name}'")
    assert shlex.split(command)[: 1 + len(launcher)] == ["OMP_NUM_THREADS=1", *launcher]
    last = torch.load(run / "last_checkpoint.pth", weights_only=True)["epoch"] + 2
    command = f"{command} --UnFreeze_Epoch {last} --model_path nothing.pth --pretrained True"
    result = subprocess.run(
        command, shell=True, cwd=folder, env=environment(), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert f"UnFreeze_Epoch: 200 → {last}" in result.stdout and "nothing" not in result.stdout
    assert "pretrained" not in result.stdout
    config = json.loads((run / "config.json").read_text())
    assert config["settings"]["input_shape"] == [40, 40] and config["settings"]["num_workers"] == 1
    assert config["settings"]["save_dir"] == "my runs"
    assert len(history(run)) == last


def killed_run(folder):
    """Make a project, train two epochs in it, and end as by SIGKILL; returns the run."""
    kill = "before('utils.checkpoint:Checkpoint.publish', die, 3)"
    words = ("--input_shape", "[40,40]", "--UnFreeze_Epoch", 3, "--early_stop", 9)
    train(folder, *words, script=hooked(folder, kill), code=-signal.SIGKILL)
    return run_of(folder)


def test_a_signal_is_obeyed_after_its_step(tmp_path):
    """A step may take long: one process has nobody to agree with, and makes no further one."""
    make_data(make_project(tmp_path), train=40, test=6)
    code = "before('torch.optim:SGD.step', send_sigterm, 3)\n"
    out, _ = train(tmp_path, script=hooked(tmp_path, code), code=128 + signal.SIGTERM)
    assert "SIGTERM: saved at epoch 1, step 3" in out


def test_a_resumed_run_keeps_its_settings(tmp_path):
    folder = make_project(tmp_path, resume=True)
    make_data(folder, train=24, test=6)
    run = killed_run(folder)
    edit(folder, momentum=0.8)
    out, _ = train(folder, "--early_stop", 0, "--save_dir", "other", "--resume", run)
    assert "changed since: momentum: 0.9 → 0.8" in out and "early_stop: 9 → 0" in out
    assert out.count("changed since") == 2 and "learning rate goes" not in out
    assert len(history(run)) == 3 and not (folder / "other").exists()
    _, err = train(folder, "--resume", run, code=1)
    assert "has finished 3 epochs: raise UnFreeze_Epoch (now 3)" in err
    out, _ = train(folder, "--resume", run, "--UnFreeze_Epoch", 9, "--accumulate", 2)
    rate = re.search("learning rate goes from (.*) to (.*) here", out)
    assert float(rate[2]) > 10 * float(rate[1])
    assert float(rate[2]) == pytest.approx(history(run)[3]["lr"], rel=0.01)


def test_a_run_without_its_checkpoint_is_not_begun_anew(tmp_path):
    folder = make_project(tmp_path)
    make_data(folder, train=24, test=6)
    run = killed_run(folder)
    (run / "last_checkpoint.pth").unlink()
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    for words in (("--resume", True), ("--resume", run)):
        _, err = train(folder, *words, "--early_stop", 0, code=1)
        assert "its checkpoint is gone" in err and "Traceback" not in err
    assert before == {path.name: path.read_bytes() for path in run.iterdir()}
    for name in before:
        if name != "history.csv" and name.endswith(("pth", "csv")):
            (run / name).unlink()
    _, err = train(folder, "--resume", True, code=1)
    assert "history.csv" in err


def torchrun_kills(folder, reference_folder, kills, rng, seconds):
    """SIGKILL one worker of a torchrun group again and again.

    The group must restart and end as the reference.
    """
    process = start(folder, launcher=[*torchrun(), "--max-restarts=100"])
    done = 0
    while not list(folder.glob("logs/*/last_checkpoint.pth")) and process.poll() is None:
        time.sleep(0.05)
    while done < kills and process.poll() is None:
        time.sleep(rng.uniform(0.01, 0.2) * seconds)
        workers = children(process.pid)
        if workers and process.poll() is None:
            try:
                os.kill(rng.choice(workers), signal.SIGKILL)
                done += 1
            except ProcessLookupError:
                pass
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    same_end(folder, reference_folder)
    return done


@pytest.fixture(scope="module")
def torchrun_reference(tmp_path_factory):
    folder = make_project(tmp_path_factory.mktemp("torchrun"), **ALL_ON)
    make_data(folder, **RESTARTED)
    begin = time.monotonic()
    launch(folder)
    return folder, time.monotonic() - begin


@pytest.mark.slow
def test_torchrun_restarts(torchrun_reference, tmp_path):
    """One worker dies in the second epoch; the group starts anew and ends as the reference."""
    folder = make_project(tmp_path, **ALL_ON)
    make_data(folder, **RESTARTED)
    code = """
if (os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]) == ("0", "1"):
    before("torch.optim:SGD.step", die, 5)
"""
    launcher = [*torchrun(), "--max-restarts=3"]
    out, _ = train(folder, launcher=launcher, script=hooked(folder, code))
    assert out.count("continuing") == 1
    same_end(folder, torchrun_reference[0])


@pytest.mark.slow
def test_torchrun_random_kills(torchrun_reference, tmp_path):
    rng, kills, attempt = random.Random(time.time()), 0, 0
    while kills < 25:
        attempt += 1
        folder = make_project(tmp_path / str(attempt), **ALL_ON)
        make_data(folder, **RESTARTED)
        kills += torchrun_kills(folder, torchrun_reference[0], 5, rng, torchrun_reference[1])
    print(f"{kills} kills survived under torchrun")


def test_the_rules_of_resuming(tmp_path):
    """Broken checkpoints, finished runs, other networks: one run after another in one folder."""
    folder = make_project(tmp_path, UnFreeze_Epoch=2, resume=True)
    make_data(folder, train=24, test=6)
    out, _ = train(folder)
    assert "there is no unfinished run in 'logs', starting a new one" in out
    run = run_of(folder)
    relative = f"logs/{run.name}"
    _, err = train(folder, "--resume", relative, code=1)
    assert "finished" in err and "UnFreeze_Epoch" in err
    out, _ = train(folder, "--resume", relative, "--UnFreeze_Epoch", 3, "--momentum", 0.8)
    assert "momentum: 0.9 → 0.8" in out and len(history(run)) == 3
    broken = (run / "last_checkpoint.pth").read_bytes()
    (run / "last_checkpoint.pth").write_bytes(broken[: len(broken) // 2])
    _, err = train(folder, "--resume", relative, "--UnFreeze_Epoch", 4, code=1)
    assert (
        "last_checkpoint.pth' cannot be read" in err
        and "start anew" in err
        and "Traceback" not in err
    )
    (run / "last_checkpoint.pth").write_bytes(broken)
    _, err = train(folder, "--resume", relative, "--backbone", "squeezenet1_0", code=1)
    assert "backbone was 'squeezenet1_1'" in err
    (folder / "model_data" / "cls_classes.txt").write_text("a\nb\nc\n")
    _, err = train(folder, "--resume", relative, "--UnFreeze_Epoch", 4, code=1)
    assert "and is now 'a'" in err
    _, err = train(folder, "--resume", "logs/nowhere", code=1)
    assert "not a run's folder" in err
    train(folder, "--save_dir", "fresh", "--model_path", "nowhere.pth", code=1)
    out, _ = train(folder, "--save_dir", "fresh", "--UnFreeze_Epoch", 1)
    assert "there is no unfinished run in 'fresh'" in out  # a start that failed is none


def test_a_run_in_training_is_left_alone(tmp_path):
    """Two jobs with resume = True in one save_dir must not write into one run."""
    folder = make_project(tmp_path, UnFreeze_Epoch=1000, resume=True)
    make_data(folder, train=24, test=6)
    living = start(folder)
    try:
        wait_for(living, "epoch 2/1000:")  # so the first epoch's checkpoint is written
        busy = run_of(folder)
        _, err = train(folder, "--resume", f"logs/{busy.name}", code=1)
        assert "is being trained by another process" in err
        _, err = train(folder, "--UnFreeze_Epoch", 1, code=1)  # not an older, abandoned one either
        assert (
            "is being trained by another process" in err
            and "resume = False" in err
            and len(runs(folder)) == 1
        )
    finally:
        os.killpg(living.pid, signal.SIGKILL)
        living.communicate()
    done = len(history(busy))
    out, _ = train(folder, "--UnFreeze_Epoch", done + 2, "--resume", f"logs/{busy.name}")
    assert f"continuing logs/{busy.name}" in out and len(history(busy)) == done + 2
