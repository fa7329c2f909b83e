"""Folders of pictures: what is found in them, where links lead, and what is passed over."""
import os
from collections import Counter, deque
from pathlib import Path

from utils.pictures import endings

LEFT_BEHIND = {"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "#recycle", "$recycle.bin", "lost+found",
               "system volume information"}  # by operating systems and storage boxes, in lower case


class Walk:
    """A walk through a folder that enters each real folder once, those behind links last, so that a picture is found where it lies.

    folders: the names that lead from the root to each of them, such as ("train", "cat"), the root's own is (); pictures, links:
    [(such names, path)] of pictures, and of links to pictures; left_out: {what: how many} of all that was not taken.
    """

    def __init__(self, root):
        self.root, self.seen, self.left_out = os.path.realpath(root), set(), Counter()
        self.folders, self.pictures, self.links = [], [], []
        queue = deque([((), root)])
        while queue:
            names, folder = queue.popleft()
            if self.is_new(folder):
                self.folders.append(names)
                inner = [((*names, entry.name), entry) for entry in self.read(folder, names)]
                queue.extendleft((path, entry.path) for path, entry in reversed(inner) if not entry.is_symlink())
                queue.extend((path, entry.path) for path, entry in inner if entry.is_symlink())

    def is_new(self, path):
        """Whether to enter a folder: once, and not by a link that leads into the root or to a folder around others."""
        real = os.path.realpath(path)
        if real in self.seen or os.path.islink(path) and (real.startswith(os.path.join(self.root, "")) or any(
                other.startswith(os.path.join(real, "")) for other in self.seen)):
            self.left_out["links to folders that are read anyway"] += 1
            return False
        self.seen.add(real)
        return True

    def read(self, folder, names):
        """The folders in a folder, os.DirEntry by name; its pictures are taken, other things are counted, hidden ones are not."""
        try:
            found = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            self.left_out["folders that cannot be read"] += 1
            return
        for entry in found:
            path, link, ending = entry.path, entry.is_symlink(), os.path.splitext(entry.name)[1].lower()
            if entry.name.startswith(".") or entry.name.lower() in LEFT_BEHIND:
                continue
            if os.path.isdir(path) if link else entry.is_dir():
                yield entry
            elif ending not in endings():
                self.left_out[f"files ({ending or 'no ending'}) that are no pictures"] += 1
            elif not (os.path.isfile(path) if link else entry.is_file()):
                self.left_out["pictures' names that are no regular files"] += 1
            elif not is_line(path):
                self.left_out["names that no text file can hold"] += 1
            else:
                (self.links if link else self.pictures).append((names, Path(path).as_posix()))

    def each_once(self, wanted):
        """[(names, path)] of the pictures in folders that are wanted(names), without links to those that are among them anyway."""
        found = [(names, path) for names, path in self.pictures if wanted(names)]
        folders, taken = set(map(os.path.realpath, {os.path.dirname(path) for _, path in found})), set()
        for names, path in sorted(link for link in self.links if wanted(link[0])):
            real = os.path.realpath(path)
            if real in taken or os.path.dirname(real) in folders and os.path.splitext(real)[1].lower() in endings():
                self.left_out["links to pictures that are listed anyway"] += 1
            else:
                taken.add(real)
                found.append((names, path))
        self.left_out["pictures in none of the class folders"] += sum(not wanted(names) for names, _ in self.pictures + self.links)
        return found


def is_line(name):
    """Whether a line of UTF-8 text can hold it."""
    return name.isprintable() or not {"\n", "\r"} & {*name} and name.encode("utf-8", "replace") == os.fsencode(name)


def pictures_below(folder):
    """Sorted paths of the pictures in `folder` and its folders, links among them."""
    walk = Walk(folder)
    return sorted(path for _, path in walk.pictures + walk.links)
