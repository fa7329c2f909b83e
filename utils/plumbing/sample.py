"""Which lists are trained on: those of the settings, or the sample pictures' for a first job."""

import os
from pathlib import Path

from utils.plumbing.console import say, shell_words
from utils.plumbing.errors import UserError
from utils.plumbing.lists import DEFAULT_PATHS, PATH_SETTINGS, PROJECT, read_text_file

SAMPLE = Path("model_data/shapes")


def find_lists(settings, config=None):
    """Return the paths of the class file and both lists, as in train.py's settings, checked.

    Where these are the untouched defaults and none of the files exists, sample pictures are drawn,
    and the settings name their lists from then on; but only in train.py's own folder, and not for a
    run that had its own lists there (config: that of a continued run). A run that began on the
    sample goes on with it, also where lists have been written since.
    """
    ran_on = config["settings"].get("classes_path") if config else None
    paths = tuple(settings[name] for name in PATH_SETTINGS)
    drawn = tuple((SAMPLE / name).as_posix() for name in ("classes.txt", "train.txt", "test.txt"))
    if ran_on == drawn[0] and paths == DEFAULT_PATHS and config.get("trained", True):
        paths = drawn  # lists that were written since are for a new run
        settings.update(zip(PATH_SETTINGS, drawn))
    had_lists = ran_on == DEFAULT_PATHS[0]
    if had_lists or paths not in (DEFAULT_PATHS, drawn) or any(map(os.path.exists, paths)):
        for name, path in zip(PATH_SETTINGS, paths):
            read_text_file(name, path)
        return paths
    if not os.path.samefile(os.getcwd(), PROJECT):
        raise UserError(
            f"{paths[1]} does not exist in {os.getcwd()}: start train.py in its own folder "
            f"(cd {shell_words([str(PROJECT)])}), where the paths of its settings begin"
        )
    say(f"{paths[1]} is absent in {os.getcwd()}: training on the sample pictures in {SAMPLE}")
    if not SAMPLE.exists():
        from utils.plumbing import shapes  # of use in the first job alone

        shapes.draw_once(SAMPLE)
    settings.update(zip(PATH_SETTINGS, drawn))
    return drawn
