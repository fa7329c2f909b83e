"""The command that continues a run, to be pasted."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from utils.plumbing.processes import LAUNCH_SETTINGS, local_world_size


def advice_to_continue(run):
    """Return the words 'continue with' and the command that continues a run, to be pasted."""
    if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        return f"continue with the same command on every machine, and --resume {run} at its end"
    return f"continue with\n  {command_to_continue(run)}"


def command_to_continue(run):
    """Return the command of this launch with `--resume RUN` in place of the run's own settings."""
    arguments = sys.argv[1:]
    words = launcher(arguments) + launch_arguments(arguments) + ["--resume", str(run)]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def launcher(arguments):
    """Return the words before the script's own arguments: Python's or torchrun's, and its path."""
    words = sys.orig_argv
    fallback = ["python", sys.argv[0]]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        words = parent_command()
        fallback = ["torchrun", f"--nproc_per_node={local_world_size()}", sys.argv[0]]
    end = len(words) - len(arguments)
    known = end > 1 and words[end:] == arguments and words[end - 1] == sys.argv[0]
    return words[:end] if known else fallback


def parent_command():
    """Return the words of the parent process's command; [] where they are unknown."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    except OSError:  # not Linux
        return []
    return [os.fsdecode(word) for word in words.split(b"\0")[:-1]]


def launch_arguments(arguments):
    """Return those of a script's arguments that a continued run does not bring itself."""
    kept = []
    for number, word in enumerate(arguments):
        name, equals, _ = word.partition("=")
        if name.startswith("--") and name[2:] in LAUNCH_SETTINGS and name != "--resume":
            kept += [word] if equals else arguments[number : number + 2]
    return kept
