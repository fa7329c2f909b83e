"""Two torchrun agents play two nodes.

One dies, stops or disagrees, and the run goes on or says why.
"""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers import (
    environment,
    free_port,
    history,
    hooked,
    make_data,
    make_project,
    runs,
    same,
    torchrun,
    train,
    weights,
)
from tests.slurm import descendants, kill_tree

pytestmark = pytest.mark.slow
EPOCHS = 8
IMPATIENT = """
import datetime, functools
import torch.distributed as dist

seconds = datetime.timedelta(seconds=10)
dist.init_process_group = functools.partial(dist.init_process_group, timeout=seconds)
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The last weights of a run of two processes that nobody disturbed."""
    folder = make_project(tmp_path_factory.mktemp("alone"), UnFreeze_Epoch=EPOCHS)
    make_data(folder)
    train(folder, launcher=torchrun(), timeout=300)
    return weights(only(runs(folder)))


def only(items):
    (item,) = items
    return item


class Nodes:
    """Two agents of one launch. rendezvous: 'static' (README's lines), or 'c10d'; first: the c10d
    node that gets rank 0.

    folders: where each agent works; by default both in one project, as on a file system that they
    share. impatient: processes give up waiting for each other after 10 s.
    """

    def __init__(
        self, folder, rendezvous="static", first=0, folders=None, restarts=3, impatient=False
    ):
        self.folder, self.rendezvous, self.first, self.restarts = (
            folder,
            rendezvous,
            first,
            restarts,
        )
        if not folders:
            make_data(make_project(folder, UnFreeze_Epoch=EPOCHS))
        self.script = hooked(folder, IMPATIENT) if impatient else "train.py"
        self.folders, self.port, self.agents = folders or [folder, folder], free_port(), {}

    def __enter__(self):
        self.start(0)
        if self.rendezvous == "c10d":  # the one that comes first holds the store
            until(lambda: listening(self.port), "the first agent's store")
        self.start(1)
        return self

    def __exit__(self, *error):
        for agent in self.agents.values():
            kill_tree(agent)

    def start(self, node):
        where = {
            "static": [
                f"--node_rank={node}",
                "--master_addr=127.0.0.1",
                f"--master_port={self.port}",
            ],
            "c10d": [
                "--rdzv_backend=c10d",
                f"--rdzv_endpoint=localhost:{self.port}",
                f"--local_addr=127.0.0.{1 + (node != self.first)}",
            ],
        }[self.rendezvous]
        with open(self.folder / f"node{node}.out", "a") as out:
            self.agents[node] = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "torch.distributed.run",
                    "--nnodes=2",
                    "--nproc_per_node=1",
                    "--rdzv_id=one-launch",
                    f"--max-restarts={self.restarts}",
                    *where,
                    self.script,
                ],
                stdout=out,
                stderr=out,
                start_new_session=True,
                env={**environment(), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
                cwd=self.folders[node],
            )

    def process(self, node):
        """The id of a node's training process."""
        return only(
            pid
            for pid in descendants(self.agents[node].pid)
            if parent(pid) == self.agents[node].pid
        )

    def output(self):
        return "".join(
            (self.folder / f"node{node}.out").read_text(errors="replace") for node in (0, 1)
        )

    def until_it_prints(self, text):
        until(lambda: text in self.output(), f"{text!r}:\n{self.output()}")

    def ends(self, code=0, timeout=180):
        until(
            lambda: all(agent.poll() is not None for agent in self.agents.values()),
            "the end:\n" + self.output(),
            timeout,
        )
        codes = [agent.returncode for agent in self.agents.values()]
        assert codes == [code, code], self.output()

    def ends_as(self, reference, continued=1):
        self.ends()
        assert self.output().count("continuing logs/") == continued, self.output()
        run = only(runs(self.folders[0]))
        assert [row["epoch"] for row in history(run)] == list(range(1, EPOCHS + 1)) and same(
            weights(run), reference
        )


def parent(pid):
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[1])


def listening(port):
    with open("/proc/net/tcp") as four, open("/proc/net/tcp6") as six:
        return any(
            line.split()[1].endswith(f":{port:04X}") and line.split()[3] == "0A"
            for file in (four, six)
            for line in list(file)[1:]
        )


def until(true, what, timeout=300):
    end = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < end, f"never came: {what}"
        time.sleep(0.1)


@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
@pytest.mark.parametrize("node", [0, 1])
def test_a_process_dies(alone, tmp_path, rendezvous, node):
    """Both agents live.

    Torchrun's store keeps the addresses of the dead group, which the new one must not use.
    """
    with Nodes(tmp_path, rendezvous) as nodes:
        nodes.until_it_prints("epoch 3/8:")
        os.kill(nodes.process(node), signal.SIGKILL)
        nodes.ends_as(alone)


@pytest.mark.parametrize("rendezvous, first", [("static", 0), ("c10d", 0), ("c10d", 1)])
def test_a_node_dies_and_comes_back(alone, tmp_path, rendezvous, first):
    """The one without the store.

    Where it has rank 0, the agent that decides what to continue has not restarted anything.
    """
    with Nodes(tmp_path, rendezvous, first) as nodes:
        nodes.until_it_prints("epoch 3/8:")
        kill_tree(nodes.agents[1])
        nodes.start(1)
        nodes.ends_as(alone)


@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_the_node_with_the_store_dies(alone, tmp_path, rendezvous):
    """Then the other agent ends too; both started again with the same --rdzv_id continue."""
    with Nodes(tmp_path, rendezvous) as nodes:
        nodes.until_it_prints("epoch 3/8:")
        kill_tree(nodes.agents[0])
        until(lambda: nodes.agents[1].poll() is not None, "the other agent's end")
        assert nodes.agents[1].returncode == 1
        nodes.__enter__()
        nodes.ends_as(alone)


@pytest.mark.parametrize("node", [0, 1])
def test_a_machine_that_is_told_to_stop_ends_the_launch(tmp_path, node):
    """The other one's torchrun must not start its process again and wait in silence."""
    with Nodes(tmp_path) as nodes:
        nodes.until_it_prints("epoch 2/8:")
        nodes.agents[node].terminate()
        for agent in nodes.agents.values():
            assert agent.wait(120) != 0
        assert "SIGTERM: saved at epoch" in nodes.output()
        assert "SIGTERM on another machine" in nodes.output()
        (run,) = runs(tmp_path)
        assert (run / "last_checkpoint.pth").exists()


def test_only_the_first_node_has_the_folder(alone, tmp_path):
    """Each node with its own copy of project and pictures.

    The run is in the first one's, the other writes nothing.
    """
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        make_data(make_project(folder, UnFreeze_Epoch=EPOCHS))
    with Nodes(tmp_path, folders=folders) as nodes:
        nodes.until_it_prints("epoch 3/8:")
        os.kill(nodes.process(1), signal.SIGKILL)
        nodes.ends_as(alone)
    assert not (folders[1] / "logs").exists()


@pytest.mark.parametrize("change", ["another order", "a line less", "another class"])
def test_lists_that_differ(tmp_path, change):
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        make_data(make_project(folder, UnFreeze_Epoch=EPOCHS))
    path = folders[1] / "model_data" / "cls_train.txt"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(
        "".join(
            {
                "another order": lines[1:] + lines[:1],
                "a line less": lines[1:],
                "another class": ["1" + lines[0][1:]] + lines[1:],
            }[change]
        )
    )
    with Nodes(tmp_path, folders=folders, restarts=0) as nodes:
        nodes.ends(code=1, timeout=300)
    said = [line for line in nodes.output().splitlines() if line.startswith("error: ")]
    assert 1 <= len(said) <= 2 and all(
        "differ" in line and "train_annotation_path" in line for line in said
    )  # once a machine
    assert 'train.py", line' not in nodes.output() and not (folders[0] / "logs").exists()


def test_a_process_stops_for_a_while(alone, tmp_path):
    """The others wait for it; nothing is lost, nothing restarted."""
    with Nodes(tmp_path) as nodes:
        nodes.until_it_prints("epoch 3/8:")
        pid = nodes.process(1)
        os.kill(pid, signal.SIGSTOP)
        time.sleep(10)
        os.kill(pid, signal.SIGCONT)
        nodes.ends_as(alone, continued=0)


@pytest.mark.parametrize("node", [0, 1])
def test_a_process_stops_for_ever(alone, tmp_path, node):
    """After gloo's time (half an hour, here 10 s) the other one fails, and torchrun restarts the
    group: it kills what has not ended 30 s after SIGTERM, which a stopped process does not heed.
    """
    with Nodes(tmp_path, "c10d", impatient=True) as nodes:
        nodes.until_it_prints("epoch 3/8:")
        os.kill(nodes.process(node), signal.SIGSTOP)
        nodes.ends_as(alone)


def test_a_process_stops_for_ever_where_agents_do_not_meet(alone, tmp_path):
    """By --node_rank an agent knows nothing of the other one.

    The group waits until someone kills the stopped process.
    """
    with Nodes(tmp_path, "static", impatient=True) as nodes:
        nodes.until_it_prints("epoch 3/8:")
        pid = nodes.process(1)
        os.kill(pid, signal.SIGSTOP)
        time.sleep(25)
        os.kill(pid, signal.SIGKILL)
        nodes.ends_as(alone)
