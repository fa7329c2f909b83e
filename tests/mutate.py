"""Change one small thing of the program at a time, and see whether a quick test notices.

    python -m tests.mutate --number 150 --seed 1           survivors are printed, and counted
    python -m tests.mutate --file utils/fit.py             of one file
    python -m tests.mutate --places utils/fit.py:97:12     what was printed before, again

A change is made in a copy of the project. What can change is drawn over all files at once, so that
a file gets as many changes as it has code. For each file the tests nearest to it run first, then
those of whole runs. The changed program is tested in a fork of a Python that has torch and pytest.
"""

import argparse
import ast
import importlib
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NEAREST = {
    "train.py": "numbers train settings data",
    "nets/__init__.py": "nets weight_files",
    "nets/_foreign.py": "weight_files weights",
    "nets/_weights.py": "nets weight_files bad_input",
    "nets/resnet9.py": "nets",
    "nets/resnet9_wide.py": "nets",
    "utils/annotation.py": "annotation commands",
    "utils/checkpoint.py": "checkpoint numbers runs",
    "utils/dataloader.py": "sight data numbers",
    "utils/evaluate.py": "evaluate numbers commands poor_classifier",
    "utils/explain.py": "poor_classifier commands",
    "utils/export.py": "evaluate commands",
    "utils/fit.py": "step recipes skipped_steps numbers faults",
    "utils/loss_history.py": "numbers checkpoint runs",
    "utils/optimizer.py": "scheduler step skipped_steps recipes numbers",
    "utils/pictures.py": "sight data pictures numbers",
    "utils/plumbing/advice.py": "annotation",
    "utils/plumbing/charts.py": "charts commands",
    "utils/plumbing/command_line.py": "settings",
    "utils/plumbing/console.py": "runs guest faults predict",
    "utils/plumbing/errors.py": "faults settings pictures",
    "utils/plumbing/files.py": "runs checkpoint lists",
    "utils/plumbing/folders.py": "annotation pictures",
    "utils/plumbing/formats.py": "pictures data",
    "utils/plumbing/lists.py": "lists data",
    "utils/plumbing/processes.py": "numbers guest launch_errors data faults",
    "utils/plumbing/run.py": "runs checkpoint",
    "utils/plumbing/sample.py": "lists data",
    "utils/plumbing/settings.py": "settings",
    "utils/plumbing/shapes.py": "data lists",
    "utils/plumbing/shrink.py": "shrink annotation",
    "utils/plumbing/start.py": "guest bad_input",
    "utils/predict.py": "predict commands",
    "utils/recipe.py": "recipes sight rehearsal numbers",
    "utils/rehearsal.py": "rehearsal numbers",
    "utils/resume.py": "checkpoint resume runs",
    "utils/steps.py": "checkpoint resume data",
    "utils/task.py": "task charts numbers recipes evaluate",
    "utils/trained.py": "evaluate predict numbers poor_classifier",
}
OF_WHOLE_RUNS = "numbers checkpoint train runs faults commands evaluate"
TOO_LONG = (  # for a change: they start Pythons of their own, and prove what those are for
    "torchrun or two_nodes or launch or signals_to or export or printing or shared_memory or warm "
    "or sample_data or nothing_is_left or many_classes or child_processes or disk_full "
    "or crops_match"
)
OTHER = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip


def nearest_tests(name):
    """Return the tests of a file by the ends of their names; of one that is not listed, its own."""
    own = Path(name).stem
    listed = NEAREST.get(name, own if (ROOT / f"tests/test_{own}.py").exists() else "numbers")
    return " ".join(test for test in listed.split() if (ROOT / f"tests/test_{test}.py").exists())


def changed_constant(node):
    if type(node.value) is bool:
        yield ast.Constant(not node.value)
    elif type(node.value) is int:
        yield ast.Constant(node.value + 1)
    elif type(node.value) is float:
        yield ast.Constant(node.value * 2 if node.value else 1.0)


def changed_operator(node):
    if isinstance(node, ast.BinOp) and type(node.op) in OTHER:
        yield ast.BinOp(node.left, OTHER[type(node.op)](), node.right)
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(OTHER[type(node.op)](), node.values)
        yield from node.values
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in OTHER:
        yield ast.Compare(node.left, [OTHER[type(node.ops[0])](), *node.ops[1:]], node.comparators)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        yield node.operand


def changed_call(node):
    for keyword in node.keywords:
        others = [other for other in node.keywords if other is not keyword]
        yield ast.Call(node.func, node.args, others)
    if len(node.args) > 1 and not any(isinstance(arg, ast.Starred) for arg in node.args):
        yield ast.Call(node.func, [node.args[1], node.args[0], *node.args[2:]], node.keywords)


def changed(node):
    """Yield other expressions in place of an expression."""
    if isinstance(node, ast.Constant):
        yield from changed_constant(node)
    elif isinstance(node, ast.IfExp):
        yield from (node.body, node.orelse)
    elif isinstance(node, ast.Call):
        yield from changed_call(node)
    else:
        yield from changed_operator(node)


def changes_of(name):
    """Return [(name, line, column, number, the changed source, what was and is)] of a file."""
    source = (ROOT / name).read_text(encoding="utf-8")
    lines = source.splitlines(keepends=True)
    tree = ast.parse(source)
    texts = {
        part
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
        for part in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        statement = isinstance(node, (ast.Expr, ast.AugAssign)) and not isinstance(
            getattr(node, "value", None), ast.Constant
        )
        if not (isinstance(node, ast.expr) or statement) or node in texts:
            continue
        before = "".join(lines[: node.lineno - 1]) + as_text(
            lines[node.lineno - 1], node.col_offset
        )
        old = ast.get_source_segment(source, node)
        options = ["None"] if statement else [f"({ast.unparse(other)})" for other in changed(node)]
        for number, new in enumerate(options):
            if new == f"({ast.unparse(node)})":  # two equal arguments, exchanged
                continue
            after = source[len(before) + len(old) :]
            words = f"{' '.join(old.split())[:70]}  →  {new[:70]}"
            place = name, node.lineno, node.col_offset, number
            found.append((*place, before + new + after, words))
    return found


def as_text(line, column):
    """Return the first `column` bytes of a line, as ast counts."""
    return line.encode()[:column].decode()


def prepare():
    """Import what the tests import of other packages, once; returns the server that they share."""
    # a shell's background job, and what it starts, would ignore Ctrl-C; under nohup, SIGHUP
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    place = runpy.run_path(str(ROOT / "tests/warm.py"))
    names = place["IMPORTS"] + " pytest hypothesis sklearn.metrics sklearn.utils.class_weight timm"
    for name in names.split():
        importlib.import_module(name)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    environment.pop("PYTHONUNBUFFERED", None)
    return place["Warm"](environment)


class FirstFailure:
    """A plugin of pytest that writes the name of the test that fails first into a file."""

    def __init__(self, path):
        self.path = path

    def pytest_runtest_logreport(self, report):
        if report.failed and not self.path.exists():
            self.path.write_text(report.nodeid)

    def pytest_collectreport(self, report):
        if report.failed and not self.path.exists():
            self.path.write_text(report.nodeid)


def become_pytest(folder, words, server, failure):
    """Run pytest, in a fork, in the project in `folder`; its modules replace those of this one."""
    os.setsid()
    os.chdir(folder)
    sys.path[:] = [str(folder), *(path for path in sys.path if path not in ("", str(ROOT)))]
    for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "utils")]:
        del sys.modules[name]
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    helpers = importlib.import_module("tests.helpers")
    helpers.warm = lambda: server
    options = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "-k", f"not ({TOO_LONG})"]
    main = importlib.import_module("pytest").main
    return int(main([*words, *options], plugins=[FirstFailure(failure)]))


class Tests:
    """The tests of a copy of the project. Those that fail without a change are left out."""

    def __init__(self, folder, server, seconds):
        self.folder, self.server, self.seconds = Path(folder), server, seconds
        self.failure = Path(folder, "failure")
        self.sound, self.broken = set(), set()

    def first_failure(self, words):
        """Return the name of the test that fails first, 'a hang' or 'an end', or None."""
        self.failure.unlink(missing_ok=True)
        words = [*words, *(f"--deselect={name}" for name in self.broken)]
        pid = os.fork()
        if pid == 0:
            code = 99
            try:
                code = become_pytest(self.folder, words, self.server, self.failure)
            finally:
                os._exit(code)
        end = time.monotonic() + self.seconds
        while time.monotonic() < end:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended and os.waitstatus_to_exitcode(status) in (0, 5):  # 5: no test is left to run
                return None
            if ended:
                return self.failure.read_text() if self.failure.exists() else "an end"
            time.sleep(0.05)
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return "a hang"

    def notice(self, name, source, files):
        """Return what notices that the file `name` holds `source`: a test that passes without."""
        original = Path(self.folder, name).read_text(encoding="utf-8")
        words = [f"tests/test_{file}.py" for file in files.split()]
        while True:
            Path(self.folder, name).write_text(source, encoding="utf-8")
            failed = self.first_failure(words)
            Path(self.folder, name).write_text(original, encoding="utf-8")
            if failed is None or "::" not in failed or failed in self.sound:
                return failed
            if self.first_failure([failed]) is None:
                self.sound.add(failed)
                return failed
            self.broken.add(failed)
            print(f"left out, as it fails without a change: {failed}", flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--number", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--file", help="draw from this file alone")
    parser.add_argument(
        "--places", nargs="+", help="FILE:LINE:COLUMN of changes, as they are printed"
    )
    parser.add_argument("--nearest", action="store_true", help="leave out the tests of whole runs")
    parser.add_argument("--seconds", type=float, default=900, help="after which a change hangs")
    options = parser.parse_args()
    files = ["train.py", *ROOT.glob("nets/*.py"), *ROOT.glob("utils/**/*.py")]
    names = sorted(str((ROOT / file).relative_to(ROOT)) for file in files)
    every = [change for name in names for change in changes_of(name)]
    chosen = [change for change in every if options.file in (None, change[0])]
    if options.places:
        chosen = [c for c in every if f"{c[0]}:{c[1]}:{c[2]}" in options.places]
    else:
        chosen = random.Random(options.seed).sample(chosen, min(options.number, len(chosen)))
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        for part in ("train.py", "nets", "utils", "tests", "README.md", "requirements.txt", ".ci"):
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
            copy(ROOT / part, Path(folder, part))
        tests = Tests(folder, prepare(), options.seconds)
        for number, (name, line, column, _, source, words) in enumerate(chosen, 1):
            nearest = nearest_tests(name)
            noticed = tests.notice(name, source, nearest)
            rest = set(OF_WHOLE_RUNS.split()) - set(nearest.split())
            if not noticed and not options.nearest:
                noticed = tests.notice(name, source, " ".join(sorted(rest)))
            survivors += not noticed
            result = f"by {noticed}" if noticed else "SURVIVES"
            print(f"{number:4} {name}:{line}:{column}  {words}  {result}", flush=True)
    share = 1 - survivors / max(1, len(chosen))
    print(f"{len(chosen)} of {len(every)} changes, {survivors} survive: {share:.1%} noticed")


if __name__ == "__main__":
    main()
