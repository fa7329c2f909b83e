"""Folders of pictures: what is found in them, where links lead, and what is passed over."""

import os
import re
from collections import Counter
from functools import cache
from heapq import heappop, heappush
from pathlib import Path

from PIL import Image

from utils.plumbing.formats import FORMATS, REDUCIBLE

LEFT_BEHIND = {
    "@eadir",
    "@recycle",
    "#recycle",
    "$recycle.bin",
}  # thumbnails and deleted pictures; in lower case


@cache
def endings():
    """The usual file endings of FORMATS, in lower case with their dot."""
    Image.init()
    return {
        ending
        for ending, kind in Image.registered_extensions().items()
        if kind in (*FORMATS, *REDUCIBLE)
    }


def walk(root):
    """What is below a folder: ([a picture's (whether it is a link, the folders' names from the root to it, path, where it
    lies)], {what was left out: how many}).

    Each real folder is entered once, those behind links last, and by no link one around others. Hidden ones are passed over.
    """
    pictures, left_out, seen, waiting = [], Counter(), set(), [(False, (), root)]
    while waiting:
        link, names, folder = heappop(waiting)
        real = os.path.realpath(folder)
        if real in seen or link and any(other.startswith(os.path.join(real, "")) for other in seen):
            left_out["links to folders that are read anyway"] += 1
            continue
        seen.add(real)
        try:
            for entry in os.scandir(folder):
                link, path = entry.is_symlink(), Path(entry.path).as_posix()
                ending, is_file = (
                    os.path.splitext(path)[1].lower(),
                    os.path.isfile(path) if link else entry.is_file(),
                )
                if entry.name.startswith(".") or entry.name.lower() in LEFT_BEHIND:
                    continue
                if (
                    os.path.isdir(path) if link else entry.is_dir()
                ):  # which asks the disk about links alone
                    heappush(waiting, (link, (*names, entry.name), path))
                elif (
                    is_file and ending in endings() and not re.search("[\n\r\ud800-\udfff]", path)
                ):  # which no list can hold
                    lies = os.path.realpath(path) if link else os.path.join(real, entry.name)
                    pictures.append((link, names, path, lies))
                else:
                    left_out[
                        f"files ({ending or 'no ending'}) that are not read (JPEG and PNG are)"
                    ] += 1
        except OSError:
            left_out["folders that cannot be read"] += 1
    return pictures, left_out


def pictures_below(folder):
    """Sorted paths of the pictures in `folder` and its folders, links among them."""
    return sorted(path for _, _, path, _ in walk(folder)[0])
