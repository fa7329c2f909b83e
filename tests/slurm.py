"""A small Slurm of its own: munged, one slurmctld and two slurmd on this machine, everything in one
folder.

with Slurm(tmp_path) as slurm: job = slurm.submit(folder, script, "--time=5") slurm.wait(job,
"COMPLETED")

Two slurmd play two nodes. They are called 127.0.0.1 and 127.0.0.2, names that torchrun can connect
to as well. All that runs on a node is a descendant of its slurmd, so that it can die as a machine
does, and nothing is left behind at the end.
"""

import ctypes
import getpass
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from tests.helpers import children, environment

PLACES = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
PROGRAMS = {
    name: shutil.which(name, path=PLACES)
    for name in ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel")
}
NODES = ("127.0.0.1", "127.0.0.2")
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # of linux/prctl.h
CONF = """ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool.%n
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=1,sched_min_interval=100000,bf_interval=1
KillWait=30
ReturnToService=2
GresTypes=gpu
{extra}
{nodes}
{partitions}
"""
PARTITION = "PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP"


def missing():
    """The names of the programs that are not installed."""
    return [name for name, path in PROGRAMS.items() if path is None]


def free_ports(number):
    sockets = [socket.socket() for _ in range(number)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def descendants(pid):
    """Process ids of pid's living children, their children, and so on."""
    found = children(pid)
    for child in found:  # it grows meanwhile
        found += children(child)
    return found


def kill_tree(process):
    """SIGKILL a daemon's descendants and then itself, as when a machine loses power."""
    while process.poll() is None and (pids := descendants(process.pid)):
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        time.sleep(0.05)  # one of them may just have started another
    process.kill()
    process.wait()


def own_and_follow():
    """A daemon becomes the parent of what its children leave behind (Slurm's step processes detach
    themselves), and ends when the tests do, however they end.
    """
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Slurm:
    """extra, partitions: further lines of slurm.conf. Use it as a context manager."""

    def __init__(self, folder, extra="", partitions=PARTITION):
        self.folder, self.daemons = Path(folder).resolve() / "slurm", {}
        (self.folder / "state").mkdir(parents=True)
        ports = free_ports(1 + len(NODES))
        self.env = {
            **{
                name: value
                for name, value in environment().items()
                if not name.startswith(("SLURM", "SBATCH"))
            },
            "PATH": f"{Path(sys.executable).parent}:{PLACES}",
            "SLURM_CONF": str(self.folder / "slurm.conf"),
        }
        nodes = "\n".join(
            f"NodeName={name} NodeHostname=localhost NodeAddr={name} Port={port} CPUs=64 "
            f"Gres=gpu:8 State=UNKNOWN"
            for name, port in zip(NODES, ports[1:])
        )
        (self.folder / "slurm.conf").write_text(
            CONF.format(
                host=socket.gethostname().split(".")[0],
                port=ports[0],
                user=getpass.getuser(),
                folder=self.folder,
                extra=extra,
                nodes=nodes,
                partitions=partitions,
            )
        )
        for number in range(8):
            (self.folder / f"gpu{number}").touch()  # what Slurm takes for its eight GPUs
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-7]\n")
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)

    def __enter__(self):
        try:
            in_folder = [
                f"--{what}={self.folder}/munge.{ending}"
                for what, ending in (
                    ("socket", "socket"),
                    ("key-file", "key"),
                    ("pid-file", "pid"),
                    ("log-file", "log"),
                    ("seed-file", "seed"),
                )
            ]
            self.daemon("munged", "--foreground", "--force", *in_folder)
            self.until(lambda: (self.folder / "munge.socket").exists(), "munged did not start")
            self.daemon("slurmctld", "-D", "-c")
            for node in NODES:
                self.start_node(node)
            self.until(
                lambda: all(self.state_of(node) == "IDLE" for node in NODES),
                "the nodes did not come up",
            )
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error):
        for name in reversed(list(self.daemons)):
            kill_tree(self.daemons.pop(name))

    def daemon(self, program, *words, name=None):
        with open(self.folder / f"{name or program}.out", "a") as out:
            self.daemons[name or program] = subprocess.Popen(
                [PROGRAMS[program], *words],
                env=self.env,
                stdout=out,
                stderr=out,
                start_new_session=True,
                preexec_fn=own_and_follow,
            )

    def start_node(self, node):
        self.daemon("slurmd", "-D", "-N", node, name=node)

    def kill_node(self, node, tell=True):
        """The node's slurmd and all that runs there die at once.

        Slurmctld is told, as it would find out in minutes.
        """
        kill_tree(self.daemons.pop(node))
        if tell:
            self.tell_of_death(node)

    def tell_of_death(self, node):
        self.command("scontrol", "update", f"nodename={node}", "state=DOWN", "reason=test")

    def command(self, program, *words, **options):
        """The output of a Slurm command."""
        done = subprocess.run(
            [PROGRAMS[program], *map(str, words)],
            env=self.env,
            capture_output=True,
            text=True,
            timeout=60,
            **options,
        )
        assert done.returncode == 0, (
            f"{program} {words}: {done.stdout}\n{done.stderr}\n{self.logs()}"
        )
        return done.stdout

    def until(self, true, otherwise, timeout=60):
        end = time.monotonic() + timeout
        while not true():
            assert time.monotonic() < end, f"{otherwise}\n{self.logs()}"
            time.sleep(0.1)

    def logs(self):
        return "\n".join(
            f"--- {path.name}\n{path.read_text(errors='replace')[-4000:]}"
            for path in self.folder.glob("*.log")
        )

    def state_of(self, node):
        done = subprocess.run(
            [PROGRAMS["scontrol"], "show", "node", node],
            env=self.env,
            capture_output=True,
            text=True,
        )
        found = re.search(r"State=(\w+)\S*", done.stdout)
        return found and found[1] + ("*" if "NOT_RESPONDING" in found[0] else "")

    def submit(self, folder, script, *options):
        """Submit a batch script from `folder`.

        The job's id. Its output goes to folder/slurm-<id>.out.
        """
        words = self.command("sbatch", *options, cwd=folder, input=script)
        return int(words.split()[-1])

    def job(self, job):
        """{field: value} of `scontrol show job`, such as JobState, Restarts, ExitCode."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.command("scontrol", "show", "job", job)))

    def wait(self, job, *states, timeout=180):
        """Wait until the job is in one of the states; its fields."""
        fields = {}

        def there():
            fields.update(self.job(job))
            return fields["JobState"] in states

        self.until(there, f"job {job} is not {' or '.join(states)}", timeout)
        return fields

    def begin_again(self, job, timeout=60):
        """Begin a requeued job once its nodes are free; Slurm would let it wait for two minutes."""
        self.wait(job, "PENDING", timeout=timeout)
        self.until(
            lambda: all(self.state_of(node) == "IDLE" for node in NODES),
            "the nodes are not free again",
            timeout,
        )
        time.sleep(1)  # the last word of the ended batch script must not be taken for the new one's
        self.command("scontrol", "update", f"jobid={job}", "starttime=now")
        self.wait(job, "RUNNING", timeout=timeout)
