"""utils.predict on folders, lists and odd names, on a run whose weights are as they begin."""

import codecs
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests import helpers
from tests.helpers import HOOKS, ROOT, environment, make_run, picture, weights
from utils import dataloader, predict, trained
from utils.plumbing import processes
from utils.plumbing.errors import UserError, explain


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a run, 70 pictures of which two are broken, and an empty folder."""
    folder = tmp_path_factory.mktemp("predict")
    make_run(folder / "run", ["a", "b", "c"])
    (folder / "empty/none").mkdir(parents=True)
    (folder / "empty/notes.txt").write_text("no picture")
    rng = np.random.default_rng(0)
    (folder / "many").mkdir()
    for i in range(70):
        picture(i % 3, rng, (40, 36)).save(folder / f"many/{i:02d}.png")
    for i in (5, 40):
        (folder / f"many/{i:02d}.png").write_text("no picture")
    return folder


@pytest.fixture
def call(folder, monkeypatch, capfd):
    """call(words…) runs the command in this process.

    Returns (exit code, standard output, standard error).
    """
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)

    def call(*words, text=b""):
        with (
            open("stdin", "wb+") as file,
            monkeypatch.context() as patch,
            pytest.raises(SystemExit) as ended,
        ):
            file.write(text)
            file.seek(0)
            patch.setattr(sys, "stdin", open(file.fileno(), closefd=False, encoding="utf-8"))
            predict.main([*map(str, words)])
        out, err = capfd.readouterr()
        code = ended.value.code
        return (1, out, err + code) if isinstance(code, str) else (code, out, err)

    return call


def begin(folder, *words, encoding="utf-8", program=("-m", "utils.predict")):
    """The command as a process of its own, in a group of its own; its streams are bytes."""
    env = {**environment(), "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding}
    return helpers.begin(folder, *program, *words, env=env, text=False, stdin=subprocess.PIPE)


def test_a_folder_is_answered_in_order_by_several_processes(folder, call, monkeypatch):
    if multiprocessing.get_start_method() == "fork":  # others would not see what is patched here

        def noting(source, *rest, real=dataloader.read_crop):
            Path(folder, "readers").open("a").write(f"{os.getpid()}\n")
            return real(source, *rest)

        monkeypatch.setattr(dataloader, "read_crop", noting)
        monkeypatch.setattr("utils.trained.cores", lambda: 2)
    code, out, err = call("run", "many", "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 1 and [row["picture"] for row in rows] == [
        f"many/{i:02d}.png" for i in range(70)
    ]
    assert [i for i, row in enumerate(rows) if "error" in row] == [5, 40] and not err
    assert all(
        row["error"].startswith("unreadable picture (UnidentifiedImageError: ")
        for row in rows
        if "error" in row
    )
    if multiprocessing.get_start_method() == "fork":
        readers = set(Path(folder, "readers").read_text().split())
        assert len(readers) == 2 and str(os.getpid()) not in readers
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    classify = predict.Classifier("run")
    for row in (rows[0], rows[33], rows[69]):
        best = classify(row["picture"])
        assert [item["class"] for item in row["top5"]] == [name for name, _ in best]
        assert [item["probability"] for item in row["top5"]] == pytest.approx(
            [p for _, p in best], abs=1e-5
        )


def test_what_is_no_picture_is_said(call):
    code, out, err = call("run", "empty", "gone.png")
    assert (
        code == 1
        and not out
        and err.count("empty: unreadable picture") == 1
        and "gone.png: unreadable picture (it does not exist)" in err
    )
    code, out, err = call("run", "empty/none", "--json")
    assert code == 1 and set(json.loads(out)) == {"picture", "error"} and not err


def test_a_list_that_an_editor_or_windows_has_written(monkeypatch):
    """begins with a byte-order mark; or is in the console's encoding, not the file system's."""
    words = SimpleNamespace(buffer=io.BytesIO(b"\xef\xbb\xbfa.jpg\r\nb.jpg\r\n"))
    monkeypatch.setattr(sys, "stdin", words)
    assert trained.find_pictures(["-"]) == ["a.jpg", "b.jpg"]

    def decode(line):
        return line.decode("utf-8")

    def oem(name):
        return codecs.lookup("cp850") if name == "oem" else None

    codecs.register(oem)
    monkeypatch.setattr(trained, "os", SimpleNamespace(fsdecode=decode))
    assert trained.decode_path(b"caf\x82.jpg") == "café.jpg"
    assert trained.decode_path("café.jpg".encode()) == "café.jpg"


def test_a_list_on_standard_input(folder, call):
    """Of files and folders; a dash in it is a file."""
    code, out, err = call("run", "-", text=b"-\nmany/00.png\r\nempty\n")
    assert code == 1 and out.startswith("many/00.png: ") and len(out.splitlines()) == 1
    assert err.startswith("left out (1): ") and "'empty/notes.txt'" in err.splitlines()[0]
    assert [line.partition(": ")[0] for line in err.splitlines()[1:]] == ["-", "empty"]


def test_paths_do_not_reach_the_terminal_as_they_are(folder, call):
    names = ["\x1b[2J.png", "a\nforged.png: b 100.0%.png", "\u202egnp.png", "gone\x9b2J\rx.png"]
    for name in names[:3]:
        (folder / name).write_bytes((folder / "many/00.png").read_bytes())
    code, out, err = call("run", *names)
    assert (
        code == 1
        and len(out.splitlines()) == 3
        and out.startswith(r"\x1b[2J.png: ")
        and r"a\nforged.png: b" in out
    )
    assert not any(c in out + err for c in "\x1b\x9b\r\u202e") and r"gone\x9b2J\rx.png" in err
    code, out, err = call("run", *names, "--json")
    assert [json.loads(line)["picture"] for line in out.splitlines()] == names and not any(
        c in out for c in "\x1b\x9b\r\u202e"
    )


def test_a_picture_that_does_not_exist_is_one_sentence(folder):
    with pytest.raises(ValueError, match="^unreadable picture .it does not exist.$"):
        predict.Classifier(folder / "run")(Path("gone.jpg"))


def test_an_empty_folder_does_not_end_the_rest(call):
    code, out, err = call("run", "empty", "many/00.png")
    assert code == 1 and out.startswith("many/00.png: ") and "empty" in err
    assert call("run", "many/00.png")[0] == 0


def test_names_that_are_no_text(folder):
    """A Latin-1 name is read; JSON is ASCII, and holds the name's bytes."""
    name = b"caf\xe9.png"
    for path in (os.path.join(os.fsencode(folder), name), os.fsencode(folder / "naïve.png")):
        with open(path, "wb") as file:
            file.write((folder / "many/00.png").read_bytes())
    given = name + b"\ngone\xff.png\n" + "naïve.png\n".encode()
    out, err = begin(folder, "run", "-").communicate(given, timeout=300)
    assert (
        out.startswith(rb"caf\udce9.png: ")
        and "naïve.png: ".encode() in out
        and len(out.splitlines()) == 2
        and b"Traceback" not in err
    )
    out, err = (process := begin(folder, "run", "-", "--json", encoding="ascii")).communicate(
        given, timeout=300
    )
    rows = [json.loads(line) for line in out.decode("ascii").splitlines()]
    assert [os.fsencode(row["picture"]) for row in rows] == given.splitlines() and not err
    assert process.returncode == 1 and "error" in rows[1] and "top5" in rows[0]


def test_a_folder_s_pictures_need_no_name_for_a_list(folder, call, tmp_path):
    for name in (b"caf\xe9.png", b"two\nlines.png", b"Icon\r", b"r\xe9sum\xe9.txt"):
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            file.write((folder / "many/00.png").read_bytes())
    code, out, err = call("run", tmp_path)
    assert code == 0 and len(out.splitlines()) == 2 and err.count("left out (1): files (") == 2


def test_figures_that_are_not_finite_are_no_json(folder, call, tmp_path):
    broken = weights(folder / "run", "best_epoch_weights.pth")
    broken["classifier.1.bias"][1] = float("nan")
    torch.save(broken, tmp_path / "nan.pth")
    with pytest.raises(UserError, match="weights: .*nan.pth holds weights that are not finite"):
        predict.main(["run", "many/00.png", "--weights", str(tmp_path / "nan.pth")])
    with pytest.raises(UserError, match="weights: .*gone.pth"):
        predict.main(["run", "many/00.png", "--weights", "gone.pth"])
    for key in broken:
        broken[key] = torch.full_like(broken[key], 1e30)
    torch.save(broken, tmp_path / "huge.pth")  # finite, but its scores are not
    code, out, err = call("run", "many/00.png", "--json", "--weights", tmp_path / "huge.pth")
    assert code == 1 and "not finite" in json.loads(out)["error"] and "NaN" not in out
    with pytest.raises(ValueError, match="not finite"):
        predict.Classifier("run", tmp_path / "huge.pth")("many/00.png")


@pytest.mark.parametrize("when", ["processes begin", "answers come"])
def test_ctrl_c_in_a_folder(folder, when):
    long = folder / "long"
    long.mkdir(exist_ok=True)
    for i in range(len(list(long.iterdir())), 3000):
        os.link(folder / "many/00.png", long / f"{i}.png")
    (folder / "hooks.py").write_text(
        HOOKS + "before('utils.dataloader:read_crop', lambda *words: os.write(2, b'reading\\n'), 1)"
    )
    (folder / "command.py").write_text("import hooks\nfrom utils import predict\npredict.main()\n")
    process = begin(folder, "run", "long", program=["command.py"])
    assert process.stderr.readline() == b"reading\n"  # in a process of several
    if when == "answers come":
        process.stdout.readline()
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (
        process.returncode == -signal.SIGINT and b"Traceback" not in err and out.count(b"\n") < 2900
    ), err


def test_a_service_registers_nothing_with_each_picture(folder, monkeypatch):
    """Python up to 3.13 keeps a slot for whatever has ever been registered."""
    classify = predict.Classifier(folder / "run")
    monkeypatch.setattr(processes.atexit, "register", None)  # it is not called
    assert classify(folder / "many/00.png")


@pytest.mark.slow
@pytest.mark.skipif(
    multiprocessing.get_start_method() != "fork",
    reason="a worker would not see what is patched here",
)
def test_a_killed_worker_is_one_sentence(folder, call, monkeypatch):
    """Slow for torch's five seconds between two looks at its workers."""

    def die(*rest):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(dataloader, "read_crop", die)
    monkeypatch.setattr("utils.trained.cores", lambda: 2)
    with pytest.raises(RuntimeError) as caught:
        predict.main(["run", "many"])
    assert "data-loader worker died" in explain(caught.value)
