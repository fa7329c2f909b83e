"""README's batch script in a real Slurm.

What goes back into the queue, what does not, and how it ends.
"""

import os
import re
import time

import pytest
import torch

from tests.helpers import ROOT, make_data, make_project, same, torchrun, train, weights
from tests.slurm import NODES, Slurm, missing

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing()), reason=f"not installed: {', '.join(missing())}"),
]

# jobs of the partition 'first' preempt those of the other one, which have a minute to end
PREEMPTION = dict(
    extra="PreemptType=preempt/partition_prio\nPreemptMode=REQUEUE",
    partitions=(
        "PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 "
        "GraceTime=60\n"
        "PartitionName=first Nodes=ALL State=UP PriorityTier=10 PreemptMode=OFF"
    ),
)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """(folder, the script of utils/README.md for one process a node, the last weights of a run that
    nobody disturbed).
    """
    folder = make_project(tmp_path_factory.mktemp("project"), UnFreeze_Epoch=8)
    make_data(folder)
    blocks = (ROOT / "utils/README.md").read_text(encoding="utf-8").split("\n```\n")
    (script,) = (block for block in blocks if "#SBATCH" in block)
    assert script.startswith("#!/bin/bash\n") and script.count("--nproc_per_node=8") == 1
    train(folder, "--save_dir", "alone", launcher=torchrun(), timeout=300)
    (run,) = (folder / "alone").iterdir()
    return folder, script.replace("--nproc_per_node=8", "--nproc_per_node=1") + "\n", weights(run)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with Slurm(tmp_path_factory.mktemp("slurm"), **PREEMPTION) as slurm:
        yield slurm


class Job:
    """README's script, submitted, and what it has printed and saved."""

    def __init__(self, slurm, folder, script):
        self.slurm, self.folder, self.id = slurm, folder, slurm.submit(folder, script)

    def output(self):
        path = self.folder / f"slurm-{self.id}.out"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def until_it_prints(self, text):
        self.slurm.until(lambda: text in self.output(), f"{text!r} was never printed", 240)

    def run(self):
        (run,) = (self.folder / "logs" / str(self.id)).iterdir()
        return run

    def ends(self, state, restarts, timeout=300):
        fields = self.slurm.wait(
            self.id, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", timeout=timeout
        )
        assert (fields["JobState"], fields["Restarts"]) == (state, str(restarts)), self.output()
        return fields["ExitCode"]

    def ends_as(self, reference, restarts):
        assert self.ends("COMPLETED", restarts) == "0:0"
        out = self.output()
        assert (
            out.count(f"continuing logs/{self.id}/") == restarts and out.count("best top-1") == 1
        ), out
        assert same(weights(self.run()), reference)


def test_a_job_that_ends_in_time(slurm, project):
    folder, script, reference = project
    Job(slurm, folder, script).ends_as(reference, restarts=0)


def test_time_is_over(slurm, project):
    """The batch shell alone gets the signal, as --signal=B:USR1@120 sends it."""
    folder, script, reference = project
    job = Job(slurm, folder, script)
    job.until_it_prints("epoch 3/8:")
    slurm.command("scancel", "--batch", "--signal=USR1", job.id)
    slurm.begin_again(job.id)
    job.ends_as(reference, restarts=1)
    assert job.output().count("SIGTERM: saved at epoch ") == 1


@pytest.mark.parametrize("by", ["an administrator", "another job"])
def test_a_job_that_makes_room(slurm, project, by):
    folder, script, reference = project
    job = Job(slurm, folder, script)
    job.until_it_prints("epoch 3/8:")
    if by == "another job":
        other = slurm.submit(
            folder, "#!/bin/bash\nsleep 1\n", "--partition=first", "--nodes=2", "--exclusive"
        )
        slurm.wait(other, "COMPLETED")
    else:
        slurm.command("scontrol", "requeue", job.id)
    slurm.begin_again(job.id)
    job.ends_as(reference, restarts=1)
    assert job.output().count("SIGTERM: saved at epoch ") == 1


@pytest.mark.parametrize("node", NODES)
def test_a_node_dies(slurm, project, node):
    """The first node runs the batch script and holds the rendezvous."""
    folder, script, reference = project
    job = Job(slurm, folder, script)
    job.until_it_prints("epoch 3/8:")
    slurm.kill_node(node)
    slurm.wait(job.id, "PENDING")
    slurm.start_node(node)
    slurm.begin_again(job.id)
    job.ends_as(reference, restarts=1)


def test_a_failing_job_waits_for_the_news_of_a_dead_node(slurm, project):
    """The other node's processes fail at once, Slurm learns of the death later.

    The job must still be there.
    """
    folder, script, reference = project
    job = Job(slurm, folder, script)
    job.until_it_prints("epoch 3/8:")
    slurm.kill_node(NODES[1], tell=False)
    job.until_it_prints("task 0: Exited with exit code 1")
    time.sleep(3)
    assert slurm.job(job.id)["JobState"] == "RUNNING"
    slurm.tell_of_death(NODES[1])
    slurm.wait(job.id, "PENDING")
    slurm.start_node(NODES[1])
    slurm.begin_again(job.id)
    job.ends_as(reference, restarts=1)


def test_a_wrong_setting_is_not_tried_again(slurm, project):
    folder, script, _ = project
    job = Job(slurm, folder, script.replace("train.py", "train.py --Init_lrr 0.1"))
    assert job.ends("FAILED", restarts=0) == "1:0"
    assert job.output().count("error: ") - job.output().count("srun: error: ") <= len(
        NODES
    )  # once a machine
    assert "did you mean 'Init_lr'" in job.output() and not (folder / "logs" / str(job.id)).exists()


def test_scancel(slurm, project):
    folder, script, _ = project
    job = Job(slurm, folder, script)
    job.until_it_prints("epoch 3/8:")
    slurm.command("scancel", job.id)
    job.ends("CANCELLED", restarts=0)
    saved = re.search(r"SIGTERM: saved at epoch (\d+), step (\d+)", job.output())
    state = torch.load(job.run() / "last_checkpoint.pth", weights_only=True)
    assert saved and (state["epoch"] + 1, state["step"]) == tuple(map(int, saved.groups()))
    assert os.listdir(folder / "logs" / str(job.id)) == [job.run().name]
