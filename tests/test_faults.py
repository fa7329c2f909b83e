"""Disks, pictures, losses, workers and memory that fail while training."""

import errno
import multiprocessing.synchronize
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
import torch

from tests.helpers import (
    ROOT,
    children,
    edit,
    environment,
    history,
    hooked,
    make_data,
    make_project,
    run_of,
    start,
    train,
    write_network,
)
from tests.test_resume import wait_for
from utils.plumbing import console, processes
from utils.plumbing.errors import UserError, explain
from utils.plumbing.files import check_regular


def test_disk_full(tmp_path):
    """With a limit on file sizes, saving fails after the first epoch.

    What was there stays loadable.
    """
    folder = make_project(tmp_path, UnFreeze_Epoch=2)
    make_data(folder, train=24, test=6)
    train(folder)
    run = run_of(folder)
    before = {p.name: p.read_bytes() for p in run.iterdir() if p.suffix == ".pth"}
    edit(folder, UnFreeze_Epoch=4, resume=repr(f"logs/{run.name}"))
    limit = 1_000_000  # squeezenet's weights are larger, the other files are not
    process = start(
        folder, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    )
    out, err = process.communicate(timeout=300)
    assert process.returncode == 1 and "Traceback" not in err and err.count("error: ") == 1, err
    assert "could not be written" in err and "intact" in err
    assert {p.name: p.read_bytes() for p in run.iterdir() if p.suffix == ".pth"} == before
    assert not [p for p in run.iterdir() if "draft" in p.name]
    train(folder)
    assert [row["epoch"] for row in history(run)] == [1, 2, 3, 4]


def test_unreadable_pictures(tmp_path):
    folder = make_project(tmp_path, UnFreeze_Epoch=2, num_workers=1, augmentation="'none'")
    make_data(folder, train=320, test=20)
    broken = folder / "model_data"
    (broken / "train3.png").write_bytes(b"")
    (broken / "train9.png").write_bytes((broken / "train9.png").read_bytes()[:300])
    (broken / "test5.png").write_text("no picture")
    out, _ = train(folder)
    for name, class_id in (("train3", 0), ("train9", 0), ("test5", 2)):
        assert out.count(f"unreadable picture: {class_id};model_data/{name}.png") == 1
    rows = history(run_of(folder))
    assert [row["scored"] for row in rows] == [19, 19] and [row["unreadable"] for row in rows] == [
        3,
        3,
    ]
    assert "3 unreadable, 19 scored" in out
    for i in (20, 21):
        (broken / f"train{i}.png").write_bytes(b"")
    _, err = train(folder, code=1)
    assert "more than 1 %" in err and "Traceback" not in err


def test_loss_that_is_not_finite(tmp_path):
    folder = make_project(tmp_path, UnFreeze_Epoch=3)
    make_data(folder, train=24, test=6)
    code = """
def ruin(optimizer, *rest):
    optimizer.param_groups[0]["params"][0].grad.fill_(float("nan"))

before("torch.optim:SGD.step", ruin, 1)
"""
    _, err = train(folder, script=hooked(folder, code), code=1)
    assert re.search(r"not finite by epoch 1, step 2, at lr ", err) or os.environ.get("TEST_CUDA")
    assert "Traceback" not in err
    assert not list(run_of(folder).glob("*.pth"))


def test_a_worker_dies(tmp_path):
    folder = make_project(tmp_path, UnFreeze_Epoch=1000, num_workers=1, cache_mb=0)
    make_data(folder, train=64, test=16)
    process = start(folder)
    wait_for(process, "epoch 2/1000")
    os.kill(children(process.pid)[0], signal.SIGKILL)
    out, err = process.communicate(timeout=300)
    assert (
        process.returncode == 1
        and "data-loader worker died" in err
        and "num_workers" in err
        and "Traceback" not in err
    )


def test_torch_s_handler_for_dead_workers_does_not_stay(tmp_path):
    """It would raise at any instant, also while an error is shown."""
    folder = make_project(tmp_path, UnFreeze_Epoch=1, num_workers=1)
    make_data(folder, train=24, test=6)
    code = """
def look(*rest):
    print("handler is the default:", signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL)

before("torch.optim:SGD.step", look, 1)
"""
    out, _ = train(folder, script=hooked(folder, code))
    assert "handler is the default: True" in out


def accelerator_error(text):
    """As torch makes it: with a number."""
    error = torch.AcceleratorError(text)
    error.error_code = 2
    return error


def test_out_of_memory_names_the_setting():
    for error in (
        accelerator_error("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation'"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        raised(lambda: torch.empty(1 << 60, dtype=torch.uint8)),
    ):
        assert "lower Unfreeze_batch_size" in explain(error)
    assert explain(RuntimeError("other")) is None
    with pytest.raises(ValueError) as caught:
        torch.nn.BatchNorm2d(3)(torch.zeros(1, 3, 1, 1))
    assert "BatchNorm needs two pictures" in explain(caught.value)


def raised(work):
    try:
        work()
    except Exception as error:
        return error


def test_nccl_says_all_and_an_old_gpu_what_it_lacks():
    full = (
        "NCCL error in: ProcessGroupNCCL.cpp:77, unhandled system error, NCCL version "
        "2.27.3\nncclSystemError: System call failed."
        "\nLast error:\nError while creating shared memory segment /dev/shm/nccl-x (size "
        "9637888), error: No space left on device"
    )
    told = explain(torch.distributed.DistBackendError(full))
    assert "No space left on device" in told and "--shm-size" in told and "\n" not in told
    text = "CUDA error: no kernel image is available for execution on the device\nmore of it"
    for error in (RuntimeError(text), accelerator_error(text)):
        assert "not built for this GPU" in explain(error)


def test_a_programming_error_keeps_its_traceback(tmp_path):
    folder = make_project(tmp_path, backbone="'mine'")
    make_data(folder, train=24, test=6)
    write_network(folder / "nets", "mine", "undefined_name")
    _, err = train(folder, code=1)
    assert "Traceback" in err and "NameError" in err and "error: " not in err


def test_a_test_list_that_goes_away(tmp_path):
    """A file server's hiccup in validation.

    No score of the few that are left; mended, the epoch is repeated.
    """
    folder = make_project(tmp_path, UnFreeze_Epoch=2)
    make_data(folder, train=24, test=24)
    whole = tmp_path / "whole"
    train(folder, "--save_dir", "whole")
    code = """
import shutil
def move_away(*arguments):
    for i in range(2, 24):
        shutil.move(f"model_data/test{i}.png", f"model_data/away{i}.png")

before("utils.fit:validate", move_away, 1)
"""
    _, err = train(folder, script=hooked(folder, code), code=1)
    assert "test pictures cannot be read, more than 1 %" in err and "Traceback" not in err
    run = run_of(folder)
    assert not (run / "best_epoch_weights.pth").exists() and not (run / "history.csv").exists()
    for i in range(2, 24):
        (folder / f"model_data/away{i}.png").rename(folder / f"model_data/test{i}.png")
    train(folder, "--resume", True)
    for ours, theirs in zip(history(run), history(next(whole.iterdir())), strict=True):
        assert ours["scored"] == 24 and all(
            ours[name] == theirs[name] for name in ("train_loss", "val_loss", "top1")
        )


def test_an_error_in_a_worker_keeps_its_own_text(tmp_path):
    folder = make_project(tmp_path, num_workers=1, cache_mb=0)
    make_data(folder, train=24, test=6)
    for error, shown in (
        ("RuntimeError('my own mistake')", "RuntimeError: my own mistake"),
        ("KeyError('lost')", "'lost'"),
    ):
        code = f"def fail(*words):\n    raise {error}\n\nbefore('utils.dataloader:read_crop', fail)"
        _, err = train(folder, script=hooked(folder, code), code=1)
        assert shown in err and "Traceback" in err and "worker died" not in err


def test_both_phases_are_checked_at_the_start(tmp_path):
    folder = make_project(tmp_path)
    make_data(folder, train=24, test=6)
    for sizes in ((8, 25), (25, 8)):
        _, err = train(
            folder,
            "--Freeze_Train",
            True,
            "--Freeze_Epoch",
            1,
            "--Freeze_batch_size",
            sizes[0],
            "--Unfreeze_batch_size",
            sizes[1],
            code=1,
        )
        assert "数据集过小" in err and "_batch_size = 25" in err and "Traceback" not in err
    assert not list(folder.glob("logs/*/history.csv"))


@pytest.mark.parametrize("where", ["| head -1", "> /dev/full", ">&-"])
def test_printing_decides_nothing(tmp_path, where):
    folder = make_project(tmp_path, num_workers=1)
    make_data(folder, train=24, test=6)
    result = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {sys.executable} train.py {where}"],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert (
        len(history(run_of(folder))) == 2
        and '"finished": true' in (run_of(folder) / "config.json").read_text()
    )


def test_an_error_ends_the_process_where_it_cannot_be_printed(tmp_path):
    """At once: Python's own clean-up could wait for other processes."""
    folder = make_project(tmp_path)
    make_data(folder, train=16, test=8)
    code = "import atexit\natexit.register(lambda: open('cleaned', 'w'))\n"
    command = f"{sys.executable} {hooked(folder, code)} --backbone none 2> /dev/full"
    result = subprocess.run(["bash", "-c", command], cwd=folder, env=environment(), timeout=300)
    assert result.returncode == 1 and not (folder / "cleaned").exists()


def test_over_quota_is_as_a_full_disk():
    assert "cannot be written" in explain(OSError(errno.EDQUOT, "Disk quota exceeded"))


def test_a_full_shared_memory_is_no_full_output(monkeypatch):
    """A loader's first semaphore lies there."""

    place = multiprocessing.synchronize.__file__
    with open("/dev/full", "wb", buffering=0) as device:
        names = {"device": device}
        exec(compile("def full(*words): device.write(b'x')", place, "exec"), names)
        monkeypatch.setattr(multiprocessing.synchronize._multiprocessing, "SemLock", names["full"])
        with pytest.raises(OSError) as caught:
            multiprocessing.Lock()
    assert "lower num_workers" in explain(caught.value)


def test_a_folder_that_is_closed_is_not_called_missing(monkeypatch):
    def refuse(path, real=os.stat, **options):
        if "theirs" in str(path):
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, **options)

    monkeypatch.setattr(os, "stat", refuse)
    with pytest.raises(UserError, match="you may not enter its folder"):
        check_regular("theirs/list.txt", "train_annotation_path")


UNSENT = """
from torch.utils.data import DataLoader
from utils.plumbing.processes import iterate, prepare_worker

def item(index):
    return lambda: index  # cannot be sent

if __name__ == "__main__":
    data = [0, 1]
    loader = DataLoader(
        data, batch_size=None, num_workers=1, worker_init_fn=prepare_worker, collate_fn=item,
        multiprocessing_context="fork",
    )
    list(iterate(loader))
"""


@pytest.mark.slow
def test_a_batch_that_cannot_be_sent_ends_the_wait(tmp_path):
    """As where the folder of the workers' sockets has no room: torch would wait without end."""
    (tmp_path / "program.py").write_text(UNSENT)
    process = start(tmp_path, script="program.py", env={**environment(), "PYTHONPATH": str(ROOT)})
    _, err = process.communicate(timeout=60)
    assert process.returncode and "cannot send its pictures" in err
    with open("/dev/full", "w") as full:  # as a log on the same disk
        process = start(
            tmp_path,
            script="program.py",
            env={**environment(), "PYTHONPATH": str(ROOT)},
            stderr=full,
        )
        assert process.wait(60)


def test_a_stream_that_cannot_be_written_silences_no_other():
    code = "import sys; from utils.plumbing.console import say; say('a', file=sys.stderr); say('b')"
    command = f'{sys.executable} -c "{code}" 2> /dev/full'
    out = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True).stdout
    assert out == "b\n"


def test_a_long_tmpdir(tmp_path):
    """Loader workers hand batches over through sockets there, whose paths are limited."""
    folder = make_project(tmp_path, UnFreeze_Epoch=1, num_workers=1)
    make_data(folder, train=16, test=8)
    place = folder / ("x" * 90)
    place.mkdir()
    train(folder, env={**environment(), "TMPDIR": str(place)}, fresh=True, timeout=120)


def test_no_folder_for_temporary_files_is_one_sentence(monkeypatch):
    def none():
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(console.tempfile, "gettempdir", none)
    with pytest.raises(UserError, match="No usable temporary directory found: set TMPDIR"):
        console.make_temp_dir()


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_signals_end_process_1_of_a_container(number):
    """The kernel sends it none that it has no handler for."""
    code = f"""
import os, signal, time
pid, os.getpid = os.getpid(), lambda: 1
from utils.plumbing.console import prepare_program
prepare_program()
assert callable(signal.getsignal({int(number)}))
os.kill(pid, {int(number)})
time.sleep(60)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 128 + number


@pytest.mark.parametrize(
    "quota, number",
    [("200000 100000", 2), ("max 100000", 8), ("50000 100000", 1), ("900000 100000", 8), (None, 8)],
)
def test_a_container_s_quota_of_cores(tmp_path, monkeypatch, quota, number):
    if quota:
        (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(processes, "CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert processes.cores() == number


def test_threads_keep_to_the_quota():
    code = """
import torch
from utils.plumbing import console
for before, after in ((1, 1), (4, 2)):
    torch.set_num_threads(before)
    console.cores = lambda: 2
    console.prepare_program()
    assert torch.get_num_threads() == after
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_second_interrupt_ends_at_once(tmp_path):
    """While a worker is stuck, no step ends, and so none is saved."""
    folder = make_project(tmp_path, UnFreeze_Epoch=1000, num_workers=1, cache_mb=0)
    make_data(folder, train=64, test=16)
    process = start(folder)
    wait_for(process, "epoch 2/1000")
    workers = children(process.pid)
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    while list(filter(running, workers)):
        time.sleep(0.02)
    interrupts = 0
    while process.poll() is None:  # a repeated one within a second is torchrun's, and not a second
        os.kill(process.pid, signal.SIGINT)
        interrupts += 1
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=1.5)
    out, err = process.communicate(timeout=60)
    assert interrupts >= 2
    assert process.returncode == -signal.SIGINT and "as it was saved last" in out
    assert "Traceback" not in err
    assert not [
        pid
        for pid in workers
        if os.path.exists(f"/proc/{pid}/stat")
        and open(f"/proc/{pid}/stat").read().split()[2] == "T"
    ]


def running(pid):
    return open(f"/proc/{pid}/stat").read().split()[2] != "T"


def test_little_shared_memory(tmp_path):
    """As in a container with docker's 64 MB: one sentence instead of waiting for ever."""
    if (
        not shutil.which("unshare")
        or subprocess.run(
            ["unshare", "-m", "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/dev/shm"],
            capture_output=True,
        ).returncode
    ):
        pytest.skip("no private mounts here")
    folder = make_project(
        tmp_path, num_workers=2, cache_mb=0, Unfreeze_batch_size=24, input_shape=[256, 256]
    )
    make_data(folder, train=72, test=24)
    result = subprocess.run(
        [
            "unshare",
            "-m",
            "bash",
            "-c",
            f"mount -t tmpfs -o size=4m tmpfs /dev/shm && exec {sys.executable} train.py",
        ],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    assert (
        result.stderr.count("error: ") == 1
        and "--shm-size" in result.stderr
        and "num_workers = 0" in result.stderr
    )


MESSAGES = [  # as PyTorch and the system write them
    (
        "CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side "
        "assertions.",
        "out of memory",
    ),
    ("CUDA error: device-side assert triggered", "an index was out of range on the GPU"),
    ("CUDA error: exclusive-thread device already in use", "has this GPU for itself"),
    ("No valid triton configs. OutOfResources: out of resource: shared memory", "compile = False"),
    (
        "Caught AcceleratorError in replica 1 on device 1.\nOriginal Traceback (most recent call "
        'last):\n  File "a.py", line 1, in _worker\n    output = module(*input)\n'
        "torch.AcceleratorError: CUDA error: no kernel image is available\n"
        "For debugging consider passing CUDA_LAUNCH_BLOCKING=1",
        "this PyTorch was not built for this GPU",
    ),
    (
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "out of memory",
    ),
    ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", "out of memory"),
    ("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED", "out of memory"),
    ("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED", "out of memory"),
    ("GET was unable to find an engine to execute this computation", "no bfloat16"),
    ("NCCL error: Failed to CUDA calloc async 8388608 bytes", "out of memory"),
    ("ncclUnhandledCudaError: Last error: Cuda failure 2 'out of memory'", "out of memory"),
    (
        "NCCL error in: a.hpp:328, unhandled system error\nLast error:\n"
        "Call to ibv_create_cq failed with error Cannot allocate memory",
        "ulimit -l",
    ),
    ("HIP error: invalid device function", "CUDA_VISIBLE_DEVICES"),
    ("CUDA error: device-side assert triggered\nCUDA kernel errors might", "CUDA_LAUNCH_BLOCKING"),
    ("CUDA error: all CUDA-capable devices are busy or unavailable", "CUDA_VISIBLE_DEVICES"),
    ("The NVIDIA driver on your system is too old (found version 11040).", "driver"),
    ("CUDA error: CUDA driver version is insufficient for CUDA runtime version", "driver"),
    ("Failed to find C compiler. Please specify via CC environment variable.", "compile = False"),
    ("No working C++ compiler found in torch._inductor.config.cpp.cxx: (None, 'g++')", "compile"),
    ("Cannot find a working triton installation. Either the package is", "compile = False"),
    ("Distributed package doesn't have NCCL built in", "without torchrun"),
    ("can't start new thread", "ulimit -u"),
    ("NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.hpp:219", "NCCL_SOCKET_IFNAME"),
    (
        "Gloo connectFullMesh failed with [../gloo/transport/tcp/pair.cc:144] no error",
        "GLOO_SOCKET",
    ),
    ("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer", "has ended"),
]


@pytest.mark.parametrize("text, advice", MESSAGES)
def test_what_pytorch_s_messages_mean(text, advice):
    sentence = explain(RuntimeError(text))
    assert advice in sentence and "\n" not in sentence


@pytest.mark.parametrize(
    "name, value", [("RANK", "x"), ("WORLD_SIZE", "-1"), ("LOCAL_RANK", "1.5")]
)
def test_a_stale_environment_is_one_sentence(tmp_path, monkeypatch, name, value):
    from utils.plumbing import processes

    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=f"^error: .*{name} = '{value}'.*unset {name}"):
        processes.rank(), processes.world_size(), processes.local_rank()
    monkeypatch.setenv(name, "")
    assert (processes.rank(), processes.world_size(), processes.local_rank()) == (0, 1, 0)
