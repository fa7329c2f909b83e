"""The Python that has imported torch gives its programs what a fresh one does."""

import json
import os
import signal
import subprocess

import pytest

from tests.helpers import (
    begin,
    ended,
    environment,
    launch,
    make_data,
    make_project,
    same,
    start,
    train,
    warm,
    weights,
)

pytestmark = pytest.mark.skipif(not warm(), reason="every program has a fresh Python here")

STATE = """
import json, multiprocessing, os, random, signal, sys, tempfile, threading
print(json.dumps({
    "name": __name__, "file": __file__, "words": sys.argv, "path": sys.path, "folder": os.getcwd(),
    "environment": dict(os.environ), "excepthook": sys.excepthook is sys.__excepthook__,
    "signals": [str(signal.getsignal(number)) for number in sorted(signal.valid_signals())],
    "streams": [
        (s.encoding, s.errors, s.line_buffering) for s in (sys.stdin, sys.stdout, sys.stderr)],
    "main": sys.modules["__main__"].__file__, "threads": threading.active_count(),
    "parent": str(multiprocessing.parent_process()), "temporary": tempfile.gettempdir(),
    "leader": os.getpid() == os.getsid(0), "input": sys.stdin.read(), "mask": os.umask(0),
    "ours": sorted({"utils", "nets", "tests"} & sys.modules.keys())}))
"""


def both(folder, *words, code=0, text=None, **options):
    """(stdout, stderr) of a fresh Python and of the other one."""
    options["stdin"] = subprocess.PIPE
    return [
        ended(begin(folder, *words, fresh=fresh, **options), code, text=text)
        for fresh in (True, False)
    ]


@pytest.mark.parametrize("words", [("state.py",), ("-m", "state")])
def test_a_program_begins_alike(tmp_path, words):
    (tmp_path / "state.py").write_text(STATE)
    more = {
        "PYTHONPATH": "/elsewhere",
        "PYTHONIOENCODING": "ascii:replace",
        "TMPDIR": str(tmp_path),
    }
    env = {**environment(), **more}
    (fresh, _), (other, err) = both(tmp_path, *words, "a word", "é", env=env, text="read\n")
    fresh, other = json.loads(fresh), json.loads(other)
    assert other == fresh and not err
    assert fresh["input"] == "read\n" and fresh["path"][:2] == [str(tmp_path), "/elsewhere"]


ENDS = [
    ("sys.exit()", 0),
    ("sys.exit(7)", 7),
    ("sys.exit('a word')", 1),
    ("undefined", 1),
    ("os._exit(9)", 9),
    ("raise KeyboardInterrupt", -signal.SIGINT),
    ("os.kill(os.getpid(), 9)", -signal.SIGKILL),
    ("threading.Thread(target=print, args=('thread',)).start()", 0),
]


@pytest.mark.parametrize("end, code", ENDS)
def test_a_program_ends_alike(tmp_path, end, code):
    (tmp_path / "end.py").write_text(
        "import atexit, os, sys, threading\natexit.register(print, 'at exit')\nprint('printed')\n"
        + end
    )
    (fresh, fresh_err), (other, err) = both(tmp_path, "end.py", code=code)
    assert other == fresh
    assert err.splitlines()[-1:] == fresh_err.splitlines()[-1:]


def test_random_numbers_differ(tmp_path):
    (tmp_path / "draw.py").write_text(
        "import random, numpy\nprint(random.random(), numpy.random.rand())"
    )
    draws = [ended(begin(tmp_path, "draw.py"))[0].split() for _ in range(2)]
    assert draws[0][0] != draws[1][0] and draws[0][1] != draws[1][1]


def test_training_has_the_same_bits(tmp_path):
    make_data(make_project(tmp_path, num_workers=1), train=24, test=6)
    ended(start(tmp_path, "--save_dir", "fresh", fresh=True))
    train(tmp_path, "--save_dir", "warm")
    fresh, other = (weights(next((tmp_path / name).iterdir())) for name in ("fresh", "warm"))
    assert same(fresh, other)


def test_a_group_that_fails_ends(tmp_path):
    make_data(make_project(tmp_path), train=24, test=6)
    _, err = launch(tmp_path, "--Init_lr", "x", code=1)
    assert "Init_lr" in err


def test_a_server_that_is_gone_is_an_error(tmp_path):
    server = type(warm())(environment())
    os.kill(server.process.pid, signal.SIGKILL)
    server.process.wait()
    with pytest.raises((RuntimeError, OSError)):
        server.start(["end.py"], tmp_path, environment())


def test_programs_end_with_their_server(tmp_path):
    (tmp_path / "wait.py").write_text("import time\nprint('waits', flush=True)\ntime.sleep(600)")
    server = type(warm())(environment())
    pipe, other = os.pipe()
    program = server.start(["wait.py"], tmp_path, environment(), stdout=other)
    os.close(other)
    assert os.read(pipe, 100) == b"waits\n"
    server.stop()
    assert os.read(pipe, 100) == b""  # nobody holds its output any more
    assert program.wait() == -signal.SIGKILL
    os.close(pipe)
