"""Folders of pictures: what lies in them, where links lead, and what is left out and why."""

import os
import re
from collections import defaultdict
from functools import cache
from heapq import heappop, heappush
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from utils.plumbing.formats import FORMATS, REDUCIBLE

# Thumbnails and deleted pictures of storage boxes, in lower case
LEFT_BEHIND = {"@eadir", "@recycle", "#recycle", "$recycle.bin"}


class Picture(NamedTuple):
    is_link: bool
    folders: tuple  # the names of the folders from the root to it
    path: str
    real_path: str


@cache
def endings():
    """Return the usual file endings of FORMATS, in lower case with their dot."""
    Image.init()
    registered = Image.registered_extensions().items()
    return {ending for ending, kind in registered if kind in (*FORMATS, *REDUCIBLE)}


def kind_of(entry):
    """Return (is a folder, is a file) of an entry of scandir; the disk is asked of links alone."""
    if entry.is_symlink():
        return os.path.isdir(entry.path), os.path.isfile(entry.path)
    return entry.is_dir(), entry.is_file()


def reason_to_leave_out(path, is_file):
    """Return why a file cannot be listed, or None."""
    if not is_file:
        return "pipes, sockets and devices" if os.path.exists(path) else "links that lead nowhere"
    if re.search("[\n\r\ud800-\udfff]", path):
        return "paths with a line break or letters that are not UTF-8, rename them"
    ending = os.path.splitext(path)[1].lower()
    if ending not in endings():
        return f"files ({ending or 'no ending'}) that are not read, convert pictures to JPEG or PNG"
    return None


def leads_back(real, entered):
    """Return whether a folder was entered already, or lies around one that was."""
    inside = os.path.join(real, "")
    return real in entered or any(other.startswith(inside) for other in entered)


def walk(root):
    """Return ([Picture, …] below a folder, {reason: [path, …] of what was left out}).

    Each real folder is entered once, those behind links after all others. Hidden files and folders
    are passed over.
    """
    pictures, left_out = [], defaultdict(list)
    entered = set()
    waiting = [(False, (), root)]
    while waiting:
        is_link, names, folder = heappop(waiting)
        real = os.path.realpath(folder)
        if is_link and leads_back(real, entered):
            left_out["links to folders that are read anyway"].append(folder)
            continue
        entered.add(real)
        try:
            entries = list(os.scandir(folder))
        except OSError:
            left_out["folders that cannot be read"].append(folder)
            continue
        for entry in entries:
            if entry.name.startswith(".") or entry.name.lower() in LEFT_BEHIND:
                continue
            path = Path(entry.path).as_posix()
            is_link = entry.is_symlink()
            is_folder, is_file = kind_of(entry)
            if is_folder:
                heappush(waiting, (is_link, (*names, entry.name), path))
            elif reason := reason_to_leave_out(path, is_file):
                left_out[reason].append(path)
            else:
                own_path = os.path.join(real, entry.name)
                real_path = os.path.realpath(path) if is_link else own_path
                pictures.append(Picture(is_link, names, path, real_path))
    return pictures, left_out


def pictures_below(folder):
    """Return the sorted paths of the pictures in `folder` and its folders, links among them."""
    return sorted(picture.path for picture in walk(folder)[0])
