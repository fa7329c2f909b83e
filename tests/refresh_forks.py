"""Write the diffs of utils/README.md anew where the code beside them has moved: python -m
tests.refresh_forks

A diff whose neighbouring lines have changed is named and left as it is.
"""

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.helpers import ROOT

README = ROOT / "utils/README.md"


def run(folder, *words, text=None):
    """Return what a program prints in a folder; CalledProcessError where it fails."""
    options = {"input": text, "cwd": folder, "capture_output": True, "text": True}
    return subprocess.run(words, check=True, **options).stdout


def refresh(change):
    """Return a diff with the line numbers and neighbours that the code has now."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("nets", "utils"):
            shutil.copytree(ROOT / name, Path(folder, name))
        shutil.copy(ROOT / "train.py", folder)
        run(folder, "git", "init", "-q")
        run(folder, "git", "add", ".")
        run(folder, "patch", "-p1", "-F0", "--no-backup-if-mismatch", text=change)
        made = run(folder, "git", "diff", "-U1")
    made = re.sub(r"^(diff|index|new file) .*\n", "", made, flags=re.M)
    return re.sub(r"^(@@ .* @@).*", r"\1", made, flags=re.M)


def main():
    def renew(block):
        try:
            return f"```diff\n{refresh(block[1])}```"
        except subprocess.CalledProcessError as error:
            print(block[1], error.stdout, error.stderr, sep="\n")
            return block[0]

    text = README.read_text(encoding="utf-8")
    README.write_text(re.sub(r"```diff\n(.*?)```", renew, text, flags=re.S), encoding="utf-8")


if __name__ == "__main__":
    main()
