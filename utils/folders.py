"""Folders of pictures: what is found in them, where links lead, and what is passed over."""
import os
from collections import Counter
from heapq import heappop, heappush
from pathlib import Path

from utils.formats import endings

LEFT_BEHIND = {"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "#recycle", "$recycle.bin", "lost+found",
               "system volume information"}  # by operating systems and storage boxes, in lower case


class Walk:
    """A walk through a folder that enters each real folder once, those behind links last, and by no link one around others.

    folders: the names that lead from the root to each of them, such as ("train", "cat"), the root's own is (); pictures:
    [(whether it is a link, such names, path, where it lies)]; left_out: {what: how many} of all that was not taken.
    """

    def __init__(self, root):
        self.folders, self.pictures, self.left_out = [], [], Counter()
        self.waiting, seen = [(False, (), root)], set()
        while self.waiting:  # a heap, so that links come last
            link, names, folder = heappop(self.waiting)
            real = os.path.realpath(folder)
            if real in seen or link and any(other.startswith(os.path.join(real, "")) for other in seen):
                self.left_out["links to folders that are read anyway"] += 1
                continue
            seen.add(real)
            self.folders.append(names)
            try:
                for entry in os.scandir(folder):
                    self.take(entry, names, real)
            except OSError:
                self.left_out["folders that cannot be read"] += 1

    def take(self, entry, names, real):
        """Note a folder or a picture; other things are counted, hidden ones are not."""
        path, link, ending = entry.path, entry.is_symlink(), os.path.splitext(entry.name)[1].lower()
        if entry.name.startswith(".") or entry.name.lower() in LEFT_BEHIND:
            return
        if os.path.isdir(path) if link else entry.is_dir():
            heappush(self.waiting, (link, (*names, entry.name), path))
        elif ending not in endings():
            self.left_out[f"files ({ending or 'no ending'}) that are no pictures"] += 1
        elif not (os.path.isfile(path) if link else entry.is_file()):
            self.left_out["pictures' names that are no regular files"] += 1
        elif not is_line(path):
            self.left_out["names that no text file can hold"] += 1
        else:
            lies = os.path.realpath(path) if link else os.path.join(real, entry.name)
            self.pictures.append((link, names, Path(path).as_posix(), lies))

    def each_once(self, wanted):
        """[(names, path)] of the pictures in folders that are wanted(names), without links to those that are among them anyway."""
        found = {}
        for _, names, path, lies in sorted(self.pictures):
            if not wanted(names):
                self.left_out["pictures in none of the class folders"] += 1
            elif lies in found:
                self.left_out["links to pictures that are listed anyway"] += 1
            else:
                found[lies] = names, path
        return [*found.values()]


def is_line(name):
    """Whether a line of UTF-8 text can hold it."""
    return name.isprintable() or not {"\n", "\r"} & {*name} and name.encode("utf-8", "replace") == os.fsencode(name)


def pictures_below(folder):
    """Sorted paths of the pictures in `folder` and its folders, links among them."""
    return sorted(path for _, _, path, _ in Walk(folder).pictures)
