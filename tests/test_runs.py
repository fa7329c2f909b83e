"""Which run is continued, whose it is, and what its folder may do."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import pytest
import torch

from tests.helpers import (
    ROOT,
    edit,
    environment,
    history,
    hooked,
    make_data,
    make_project,
    run_of,
    same,
    train,
    weights,
    write_network,
)
from utils.loss_history import LossHistory, stops_early
from utils.plumbing import console, files, processes, run
from utils.plumbing.errors import UserError
from utils.plumbing.files import clear_drafts, content_sum, draft, save_tensors, save_text

SETTINGS = {
    "backbone": "x",
    "optimizer_type": "sgd",
    "fp16": False,
    "Cuda": False,
    "UnFreeze_Epoch": 3,
    "early_stop": 0,
}


def finished_run(folder, start, finished=False, saved=True, **more):
    folder.mkdir(parents=True)
    if saved:
        (folder / "last_checkpoint.pth").touch()
    run.write_config(
        folder,
        {
            "settings": SETTINGS,
            "class_names": ["a", "b"],
            "finished": finished,
            "start": start,
            **more,
        },
    )
    return folder


@pytest.mark.parametrize("newest", ["2026_01_01_00_00_00", "2019_01_01_00_00_00", "a"])
def test_the_newest_run_is_the_one_that_was_started_last(tmp_path, newest):
    """Whatever the folders are called, and whatever the clock said."""
    for number, name in enumerate(("resnet_best", "2025_01_01_00_00_00", "old", newest), 1):
        finished_run(tmp_path / name, number)
    assert run.find_run(True, str(tmp_path)) == str(tmp_path / newest)


def test_a_start_that_has_saved_nothing_is_passed_over(tmp_path, monkeypatch):
    mine = finished_run(tmp_path / "mine", 1)
    failed = finished_run(tmp_path / "failed", 2, saved=False, launch="me")
    assert run.find_run(True, str(tmp_path)) == str(mine)
    shutil.rmtree(mine)
    assert run.find_run(True, str(tmp_path)) == str(failed)  # where there is nothing else
    monkeypatch.setattr(
        processes, "launch_id", "me"
    )  # but a group that is started anew goes on in its folder
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert run.find_run(False, str(tmp_path)) == str(failed)


def test_a_named_launch_goes_on_with_what_was_trained(tmp_path, monkeypatch):
    """A group with an --rdzv_id may have been restarted; its own run comes first, if it has one."""
    trained = finished_run(tmp_path / "trained", 1, launch="before")
    finished_run(tmp_path / "failed", 2, saved=False, launch="before")
    monkeypatch.setattr(processes, "launch_id", "x")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert run.find_run(True, str(tmp_path)) == str(trained)
    assert run.find_run(False, str(tmp_path)) is None
    own = finished_run(tmp_path / "own", 3, saved=False, launch="x")
    for resume in (True, False):
        assert run.find_run(resume, str(tmp_path)) == str(own)


def test_a_restarted_launch_goes_on_with_its_own_run(tmp_path, monkeypatch):
    """Also where another one was started since, and not at all where its own has finished."""
    own = finished_run(tmp_path / "own", 1, launch="me")
    process = holder(finished_run(tmp_path / "other", 2, launch="someone"))
    monkeypatch.setattr(processes, "launch_id", "me")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert run.find_run(True, str(tmp_path)) == str(own)
    run.write_config(own, {**run.read_config(own), "finished": True})
    for resume in (True, False):
        with pytest.raises(UserError, match="own of this launch has finished"):
            run.find_run(resume, str(tmp_path))
    process.stdin.close()
    process.wait()


def test_a_folder_that_cannot_be_is_no_reason_to_stop_looking(tmp_path, monkeypatch):
    """The sentence that it cannot be written comes where it is made."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    for resume in (True, False):
        assert run.find_run(resume, str(tmp_path / ("x" * 300))) is None


def begin(folder, settings, class_names):
    return run.begin_run(folder, settings, class_names, {}, SimpleNamespace(source=None), None)


def test_each_start_counts_on(tmp_path):
    finished_run(tmp_path / "zzz", 7)
    mine = run.new_run(str(tmp_path))
    settings = {
        **SETTINGS,
        "input_shape": [8, 8],
        "Init_Epoch": 0,
        "Freeze_Train": False,
        "Unfreeze_batch_size": 2,
        "accumulate": 1,
    }
    assert begin(mine, settings, ["a", "b"])["start"] == 8
    assert begin(str(tmp_path / "zzz"), settings, ["a", "b"])["start"] == 9  # continued
    assert run.find_run(True, str(tmp_path)) == str(tmp_path / "zzz")


def test_another_user_s_run_is_passed_over(tmp_path, monkeypatch, capsys):
    mine = finished_run(tmp_path / "mine", 1)
    theirs = finished_run(tmp_path / "theirs", 2)
    monkeypatch.setattr(run.os, "access", lambda path, mode: str(path) != str(theirs))
    assert run.find_run(True, str(tmp_path)) == str(mine)
    assert f"{theirs} is passed over" in capsys.readouterr().out


def test_a_damaged_run_is_passed_over(tmp_path):
    finished_run(tmp_path / "good", 1)
    bad = finished_run(tmp_path / "bad", 2, saved=False)
    (bad / "config.json").write_text('{"settings": {"back')
    assert run.find_run(True, str(tmp_path)) == str(tmp_path / "good")
    with pytest.raises(UserError, match="bad' is not a run's folder"):
        run.find_run(str(bad), str(tmp_path))
    settings = {**SETTINGS, "input_shape": [8, 8], "Unfreeze_batch_size": 2}
    assert (
        run.find_run("good", str(tmp_path))
        and begin(tmp_path / "good", settings, ["a", "b"])["start"] == 2
    )


def test_only_its_own_launch_continues_a_run_without_resume(tmp_path, monkeypatch):
    mine, other = (
        finished_run(tmp_path / "mine", 1, launch="me"),
        finished_run(tmp_path / "other", 2, launch="someone"),
    )
    monkeypatch.setattr(processes, "launch_id", "me")
    assert run.find_run(False, str(tmp_path)) is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert run.find_run(False, str(tmp_path)) == str(mine)
    monkeypatch.setattr(processes, "launch_id", "nobody")
    assert run.find_run(False, str(tmp_path)) is None and other.exists()


def holder(folder):
    """A process that holds a run's lock until its standard input ends."""
    lock = f"from utils.plumbing import run; run.lock({str(folder)!r})"
    code = f"{lock}; print('held', flush=True); input()"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**environment(), "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_a_run_in_training_is_not_passed_over(tmp_path, monkeypatch):
    finished_run(tmp_path / "abandoned", 1)
    busy = finished_run(tmp_path / "busy", 2, launch="me")
    process = holder(busy)
    for resume in (True, str(busy)):
        with pytest.raises(UserError, match="busy is being trained by another process"):
            run.find_run(resume, str(tmp_path))
    monkeypatch.setattr(processes, "launch_id", "me")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    process.stdin.close()  # the process of before the restart ends while the new one waits
    assert run.find_run(False, str(tmp_path)) == str(busy)
    process.wait()


def test_a_lock_that_cannot_be_opened(tmp_path):
    folder = finished_run(tmp_path / "run", 1)
    (tmp_path / "elsewhere").write_text("mine")
    (folder / ".lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="cannot be trained: its file .lock cannot be opened"):
        run.find_run(True, str(tmp_path))
    (folder / ".lock").unlink()
    (folder / ".lock").mkdir()
    with pytest.raises(UserError, match="cannot be trained"):
        run.find_run(str(folder), str(tmp_path))


def test_nothing_in_a_folder_leads_a_write_out_of_it(tmp_path):
    (tmp_path / "outside").write_text("mine")
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("history.csv", "weights.pth", ".history.csv.draft"):
        (folder / name).symlink_to(tmp_path / "outside")
    save_text(folder / "history.csv", "figures")
    save_tensors(folder / "weights.pth", {"a": torch.ones(2)})
    assert (tmp_path / "outside").read_text() == "mine" and (
        folder / "history.csv"
    ).read_text() == "figures"
    assert (
        not (folder / "history.csv").is_symlink()
        and torch.load(folder / "weights.pth", weights_only=True)["a"].sum() == 2
    )


def test_drafts_of_killed_programs_are_cleared(tmp_path):
    (tmp_path / ".a.csv.x1.draft").write_text("left")
    (tmp_path / ".shapes.x2.draft").mkdir()
    (tmp_path / ".shapes.x2.draft/picture.png").write_text("left")
    for path in tmp_path.iterdir():
        os.utime(path, (0, 0))  # a living program writes to its own
    with draft(tmp_path / "b.csv") as file, draft(tmp_path / "c", folder=True) as made:
        clear_drafts(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {file.name, made.name}
    assert not list(tmp_path.iterdir())


def test_an_early_stop_says_why(tmp_path, capsys):
    history = LossHistory(tmp_path)
    assert not stops_early(history, 1) and history.last_epoch() == 0
    for epoch, top1 in ((1, 0.5), (2, 0.9), (3, 0.8), (4, 0.7)):
        history.append_loss({"epoch": epoch, "top1": top1, "val_loss": 1.0})
    assert not stops_early(history, 0) and not stops_early(history, 3)
    assert capsys.readouterr().out == "" and history.last_epoch() == 4
    assert stops_early(history, 2)
    assert "early_stop = 2: no better epoch since epoch 2" in capsys.readouterr().out


def test_a_run_that_is_passed_over_is_not_held(tmp_path):
    trained = finished_run(tmp_path / "trained", 1)
    for number in (2, 3):
        finished_run(tmp_path / f"empty{number}", number, saved=False)
    code = """
import sys
from utils.plumbing import run
for folder in sys.argv[1:]:
    run.lock(folder)
    print(folder[-6:], flush=True)
"""
    assert run.find_run(True, str(tmp_path)) == str(trained)
    folders = [tmp_path / name for name in ("empty2", "empty3", "trained")]
    words = [sys.executable, "-c", code, *folders]
    result = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert result.stdout.split() == ["empty2", "empty3"], result.stderr
    assert "is being trained by another process" in result.stderr


def test_an_epoch_that_is_none_is_told_before_training(tmp_path):
    """A run that began at a later epoch, and has saved nothing."""
    make_data(make_project(tmp_path), train=16, test=6)
    words = ("--Init_Epoch", 2, "--UnFreeze_Epoch", 5)
    dies = hooked(tmp_path, "before('torch.optim:SGD.step', die, 1)")
    train(tmp_path, *words, script=dies, code=-signal.SIGKILL)
    _, err = train(tmp_path, "--resume", True, "--UnFreeze_Epoch", 2, code=1)
    assert "Init_Epoch = 2 must be below UnFreeze_Epoch = 2" in err


def test_early_stop_and_what_follows(tmp_path):
    """Killed right after the commit of the epoch that ends it, it trains no further.

    Without early_stop it does.
    """
    folder = make_project(
        tmp_path,
        early_stop=2,
        UnFreeze_Epoch=30,
        backbone="'colour'",
        best_by="'val_loss'",
        save_period=1,
    )
    make_data(folder, train=24, test=6)
    layers = "nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, num_classes)"
    write_network(folder / "nets", "colour", layers)
    lists = folder / "model_data/cls_test.txt"
    wrong = {"0": "1", "1": "2", "2": "0"}  # what is learned makes the first epoch the best
    lists.write_text("".join(wrong[line[0]] + line[1:] for line in lists.open()))
    train(folder)
    whole = run_of(folder)
    assert len(history(whole)) == 3 and json.loads((whole / "config.json").read_text())["finished"]
    end = weights(whole)
    (first,) = whole.glob("ep001-*.pth")
    assert same(weights(whole, "best_epoch_weights.pth"), weights(whole, first.name))
    # after the commit of the epoch that ends it, before what people read follows
    dies = hooked(folder, "before('utils.loss_history:LossHistory.write', die, 3)")
    train(folder, "--save_dir", "killed", script=dies, code=-signal.SIGKILL)
    out, _ = train(folder, "--save_dir", "killed", "--resume", True)
    (killed,) = (folder / "killed").iterdir()
    assert "best" in out and len(history(killed)) == 3 and same(weights(killed), end)
    out, _ = train(folder, "--resume", whole.name)
    assert "(epoch 1)" in out.splitlines()[-1] and len(history(whole)) == 3
    before = (whole / "config.json").read_bytes()
    out, _ = train(folder, "--resume", True, "--seed", 3, "--UnFreeze_Epoch", 1)  # of a loop
    assert "there is no unfinished run" in out and (whole / "config.json").read_bytes() == before
    out, _ = train(folder, "--resume", whole.name, "--early_stop", 0, "--UnFreeze_Epoch", 4)
    assert f"continuing {whole.relative_to(folder)}" in out and len(history(whole)) == 4


def test_what_makes_scores_incomparable(tmp_path):
    """Whatever a score depends on: the best epoch is then sought among the epochs that compare."""
    folder = make_project(tmp_path, UnFreeze_Epoch=1)
    make_data(folder, train=24, test=6)
    train(folder)
    epoch = 1
    for word, value in (
        ("--val_crop", 0.5),
        ("--input_shape", "[40,40]"),
        ("--best_by", "val_loss"),
    ):
        epoch += 1
        out, _ = train(
            folder, "--resume", run_of(folder).name, "--UnFreeze_Epoch", epoch, word, value
        )
        assert "the best epoch is sought anew" in out and f"(epoch {epoch})" in out.splitlines()[-1]
        edit(folder, **{word.strip("-"): repr(value) if word == "--best_by" else value})
    out, _ = train(
        folder, "--resume", run_of(folder).name, "--UnFreeze_Epoch", epoch + 1, "--momentum", 0.5
    )
    assert "sought anew" not in out


def test_a_start_that_fails_leaves_nothing(tmp_path):
    folder = make_project(tmp_path, backbone="'resnet18'", Unfreeze_batch_size=25)
    make_data(folder, train=24, test=6)
    _, err = train(folder, code=1)
    assert "Unfreeze_batch_size = 25" in err
    _, err = train(folder, "--Unfreeze_batch_size", 8, "--best_by", "f1", code=1)
    assert "best_by = 'f1' is not a metric" in err
    assert not list((folder / "logs").iterdir() if (folder / "logs").exists() else [])


def test_a_day_is_no_end_of_the_time_left(capsys, monkeypatch):
    clock = SimpleNamespace(monotonic=iter([0.0, 100.0]).__next__)
    monkeypatch.setattr(console, "time", clock)
    line = console.ProgressLine("epoch 1/2", 1000)
    line.show(1, 8, lambda: "", due=True)
    assert "1 day, 3:45:00 left" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="others keep their own way")
def test_workers_are_forked_on_linux():
    """Also by a Python whose own choice is another one, as from 3.14 on."""
    code = """
import multiprocessing.context as context
from utils.plumbing.console import prepare_program
context._default_context._default_context = context._concrete_contexts["forkserver"]
prepare_program()
print(context._default_context.get_start_method())
"""
    env = {**environment(), "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", code]
    result = subprocess.run(words, capture_output=True, text=True, env=env, timeout=120)
    assert result.stdout == "fork\n", result.stderr


@pytest.mark.slow
def test_nothing_is_left_behind(tmp_path):
    """No folder for temporary files, and no semaphore, where loader processes come from a server of
    them.
    """
    folder = make_project(tmp_path / "project", UnFreeze_Epoch=1, num_workers=1)
    make_data(folder, train=16, test=6)
    code = "import multiprocessing\nmultiprocessing.set_start_method('forkserver', force=True)\n"
    script = hooked(folder, code)
    with tempfile.TemporaryDirectory(dir="/tmp") as temporary:  # a short path: it holds sockets
        result = subprocess.run(
            [sys.executable, script],
            cwd=folder,
            env={**environment(), "TMPDIR": temporary},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == 0 and result.stderr == "", result.stderr
        assert not os.listdir(temporary)


@pytest.mark.parametrize("before, after", [(0.0, 0.9), (0.9, 0.0)])
def test_an_average_that_is_turned_on_or_off(tmp_path, before, after):
    folder = make_project(tmp_path, UnFreeze_Epoch=1, ema_decay=before)
    make_data(folder, train=24, test=6)
    train(folder)
    _, err = train(
        folder, "--resume", run_of(folder).name, "--UnFreeze_Epoch", 2, "--ema_decay", after, code=1
    )
    assert (
        f"ema_decay > 0 was {before > 0} and is now {after > 0}" in err
        and len(history(run_of(folder))) == 1
    )
    train(
        folder, "--resume", run_of(folder).name, "--UnFreeze_Epoch", 2, "--ema_decay", 0.8 * before
    )
    assert len(history(run_of(folder))) == 2


FOREIGN = [
    dict(start=10**4000),
    dict(start=10**9 + 1),
    dict(start=-1),
    dict(start=True),
    dict(start="3"),
    dict(class_names=["a", "b", "a"]),
    dict(class_names=[]),
    dict(class_names=["a", ""]),
    dict(constants=[]),
    dict(settings=[]),
    dict(finished=1),
]


@pytest.mark.parametrize("change", FOREIGN, ids=lambda change: next(iter(change)))
def test_a_foreign_config_stops_no_new_training(tmp_path, change):
    """It is no run, and does not decide how starts are counted."""
    finished_run(tmp_path / "mine", 7)
    foreign = finished_run(tmp_path / "foreign", 1, saved=False)
    config = {**json.loads((foreign / "config.json").read_text()), **change}
    (foreign / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="foreign' is not a run's folder: ") as caught:
        run.read_config(foreign)
    assert len(str(caught.value)) < 400
    new = run.new_run(str(tmp_path))
    assert begin(new, SETTINGS, ["a"])["start"] == 8
    assert run.read_config(new)["start"] == 8
    assert run.find_run(True, str(tmp_path)) == str(tmp_path / "mine")


def test_two_runs_that_begin_in_one_second(tmp_path, monkeypatch):
    names = iter(["2026_01_01_00_00_00"] * 2 + ["2026_01_01_00_00_01"])
    monkeypatch.setattr(run.time, "strftime", lambda form: next(names))
    made = [os.path.basename(run.new_run(str(tmp_path))) for _ in range(2)]
    assert made == ["2026_01_01_00_00_00", "2026_01_01_00_00_01"]


def test_tensorboard_is_told_each_figure(tmp_path, monkeypatch):
    """By a stand-in for it."""
    told = []
    writer = SimpleNamespace(add_scalar=lambda *words: told.append(words))
    module = SimpleNamespace(SummaryWriter=lambda log_dir, flush_secs: writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    LossHistory(tmp_path).append_loss({"epoch": 3, "top1": 0.5, "val_loss": 1.0})
    assert told == [("epoch", 3, 3), ("top1", 0.5, 3), ("val_loss", 1.0, 3)]


def test_a_tensorboard_that_cannot_begin_ends_no_run(tmp_path, monkeypatch):
    def full(*words, **options):
        raise OSError("No space left on device")

    module = SimpleNamespace(SummaryWriter=full)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    assert LossHistory(tmp_path).append_loss({"epoch": 1, "top1": 0.5, "val_loss": 1.0})


def test_tensorboard_ends_no_run(tmp_path, capsys):
    """It raises what an earlier write has met."""

    def full(*words):
        raise OSError("No space left on device")

    loss_history = LossHistory(tmp_path)
    loss_history.writer = SimpleNamespace(add_scalar=full)
    for epoch in (1, 2):
        loss_history.append_loss({"epoch": epoch, "top1": 0.5})
    assert loss_history.last_epoch() == 2
    assert capsys.readouterr().out.count("WARNING: no more TensorBoard files (No space left") == 1


def test_the_highest_start_is_no_dead_end(tmp_path):
    finished_run(tmp_path / "foreign", 10**9)
    new = run.new_run(str(tmp_path))
    begin(new, SETTINGS, ["a"])
    assert run.read_config(new)["start"] == 10**9


def test_a_folder_that_is_no_run_names_the_newest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="'RUN' is not a run's folder: .*does not exist$"):
        run.read_config("RUN")
    finished_run(tmp_path / "logs/old", 1)
    finished_run(tmp_path / "logs/new", 2)
    for name in ("RUN", "logs", "logs/typo"):
        with pytest.raises(UserError, match="; the newest run in 'logs' is 'logs/new'$"):
            run.read_config(name)
    (tmp_path / "logs/link").mkdir()
    (tmp_path / "logs/link/config.json").symlink_to("nowhere")
    glob = run.Path.glob  # from Python 3.13 on it finds such links, too

    def with_links(folder, pattern):
        link = folder / "link/config.json"
        return [*glob(folder, pattern), *[link] * os.path.lexists(link)]

    monkeypatch.setattr(run.Path, "glob", with_links)
    assert [name for _, name in run.runs_in("logs")] == ["logs/new", "logs/old"]
    with pytest.raises(UserError, match="is not a run's folder"):  # beyond what a path may have
        run.find_run("x" * 5000, "logs")


@pytest.mark.parametrize(
    "environment, words, expected",
    [
        ({}, ["--Init_lr", "0.1"], "python -u train.py --Init_lr 0.1 --resume logs/1"),
        ({}, [], "python -u train.py --resume logs/1"),
        ({}, ["--resume", "True"], "python -u train.py --resume True --resume logs/1"),
        ({}, ["--resume", "logs/1"], "python -u train.py --resume logs/1"),
        (
            {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "4"},
            ["--seed", "2"],  # of a launcher that is not this process's parent
            "torchrun --nproc_per_node=4 train.py --seed 2 --resume logs/1",
        ),
    ],
)
def test_the_command_that_continues(monkeypatch, environment, words, expected):
    for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-u", "train.py", *words])
    assert console.command_to_continue("logs/1") == expected
    assert console.advice_to_continue("logs/1") == f"continue with\n  {expected}"
    for gpus, shown in (("1", "1"), ("", "''"), ("0, 1", "'0, 1'")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
        assert console.command_to_continue("logs/1") == f"CUDA_VISIBLE_DEVICES={shown} {expected}"
    monkeypatch.setenv("SLURM_JOB_ID", "7")  # whose next job is given others
    assert console.command_to_continue("logs/1") == expected
    monkeypatch.setattr(sys, "orig_argv", ["ipython"])  # a notebook's %run
    if not environment:
        assert console.command_to_continue("a b").startswith("python train.py ")
        assert console.command_to_continue("a b").endswith(" --resume 'a b'")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert "on every machine" in console.advice_to_continue("logs/1")


def test_the_header(capsys):
    settings = {"UnFreeze_Epoch": 5, "Unfreeze_batch_size": 32, "input_shape": [8, 8]}
    run.print_header(settings, {"backbone": "x"})
    out = capsys.readouterr().out
    assert "epochs       1 to 5\n" in out and "batch_size   32\n" in out
    run.print_header({**settings, "Init_Epoch": 3, "accumulate": 2, "num_workers": 4}, {})
    out = capsys.readouterr().out
    assert "epochs       4 to 5\n" in out and "batch_size   32, 2 batches to a step\n" in out
    assert "num_workers  4\n" in out
    run.print_header({**settings, "Init_Epoch": 5}, {})
    assert "epochs       all 5 are trained\n" in capsys.readouterr().out


def test_other_content_is_told(tmp_path):
    """By a file's size and its middle, whatever it is called."""
    paths = [tmp_path / name for name in ("a", "b")]
    for path in paths:
        path.write_bytes(bytes(30_000))
    same_content = content_sum(paths)
    assert content_sum(paths[::-1]) == same_content
    assert content_sum([*paths, tmp_path / "gone", tmp_path]) == same_content
    found = {same_content, content_sum(paths[:1]), content_sum([])}
    paths[1].write_bytes(bytes(30_001))
    found.add(content_sum(paths))
    paths[1].write_bytes(bytes(15_000) + b"1" + bytes(14_999))
    found.add(content_sum(paths))
    assert len(found) == 5


@pytest.mark.parametrize("held", [False, True])
def test_a_lock_on_windows(tmp_path, monkeypatch, held):
    class Msvcrt:
        LK_NBLCK = 2

        @staticmethod
        def locking(number, mode, size):
            assert (mode, size) == (2, 1) and os.fstat(number)
            if held:
                raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(run, "fcntl", None)
    monkeypatch.setattr(run, "msvcrt", Msvcrt, raising=False)
    with pytest.raises(UserError, match="by another") if held else contextlib.nullcontext():
        run.lock(str(tmp_path))


class WindowsLocks:
    """Locks that belong to an open file, and not to its process."""

    LK_NBLCK = 1

    def __init__(self):
        self.held = {}

    def locking(self, number, mode, size):
        place = os.fstat(number).st_ino
        held = self.held.get(place, number)  # the same number again: what had it is closed
        if held != number and os.path.exists(f"/proc/self/fd/{held}"):
            raise PermissionError(13, "Permission denied")
        self.held[place] = number


def test_a_session_trains_a_run_again_on_windows(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "fcntl", None)
    monkeypatch.setattr(run, "msvcrt", WindowsLocks(), raising=False)
    folder = finished_run(tmp_path / "run", 1)
    for resume in (True, str(folder), True):
        assert run.find_run(resume, str(tmp_path)) == str(folder)
    with pytest.raises(SystemExit):
        processes.leave(0)
    other = os.open(folder / ".lock", os.O_RDWR)
    run.msvcrt.locking(other, 1, 1)
    with pytest.raises(UserError, match="by another process"):
        run.find_run(True, str(tmp_path))
    os.close(other)


@pytest.mark.parametrize("found", [True, False])
def test_the_command_that_continues_where_a_venv_starts_another_python(monkeypatch, found):
    python = sys.executable
    for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(sys, "argv", ["train.py", "--seed", "3"])
    monkeypatch.setattr(sys, "orig_argv", ["/Python.app/Contents/MacOS/Python", *sys.argv])
    monkeypatch.setattr(console.shutil, "which", lambda name: python if found else None)
    words = console.command_to_continue("logs/1").split()
    assert words == ["python" if found else python, *sys.argv, "--resume", "logs/1"]


def test_a_folder_that_may_not_be_written(tmp_path, monkeypatch):
    def refuse(self, exist_ok=True):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files.Path, "touch", refuse)
    with pytest.raises(UserError, match=r"cannot be written \(Permission denied\): name another"):
        files.make_folder(tmp_path / "out", "name another")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_progress_line_fits_the_terminal(monkeypatch):
    """A longer one could not be redrawn, and would scroll."""
    monkeypatch.setenv("COLUMNS", "40")
    line = console.ProgressLine("epoch 1/3", 100, stream=Terminal())
    line.show(20, 32, lambda: "x" * 100, due=True)
    line.clear()
    *shown, end = line.stream.getvalue().split("\r")
    assert all(len(text) <= 39 for text in shown) and re.match(
        r"epoch 1/3 20/100 \d:\d\d:\d\d left x", shown[2]
    )
    assert not shown[-1].strip() and end == "" and "\033" not in line.stream.getvalue()


def test_a_file_that_another_program_holds_open_on_windows(tmp_path, monkeypatch):
    failures = iter([True, True, False])

    def replace(fresh, path, original=os.replace):
        if next(failures):
            raise PermissionError(13, "The process cannot access the file")
        original(fresh, path)

    monkeypatch.setattr(files, "os", SimpleNamespace(name="nt", replace=replace))
    (tmp_path / "fresh").write_text("new")
    files.move(tmp_path / "fresh", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "new"
