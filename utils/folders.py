"""Folders of pictures: what is found in them, where links lead, and what is passed over."""
import os
from collections import Counter, deque
from pathlib import Path

from utils.pictures import endings

LEFT_BEHIND = {"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "#recycle", "$recycle.bin", "lost+found",
               "system volume information"}  # by operating systems and storage boxes, in lower case


class Walk:
    """A walk through a folder that enters each real folder once. left_out: {what: how many} of all that was not taken."""

    def __init__(self, root):
        self.root, self.left_out = os.path.realpath(root), Counter()
        self.seen = {self.root}

    def is_new(self, path):
        """Whether to enter a folder: once, and not by a link that leads into the root or to a folder around others."""
        real = os.path.realpath(path)
        if real in self.seen or os.path.islink(path) and (real.startswith(os.path.join(self.root, "")) or any(
                other.startswith(os.path.join(real, "")) for other in self.seen)):
            self.left_out["links to folders that are read anyway"] += 1
            return False
        self.seen.add(real)
        return True

    def entries(self, folder):
        """(its folders, its pictures): os.DirEntry by name; other things are counted, hidden ones are not."""
        folders, pictures = [], []
        try:
            found = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            self.left_out["folders that cannot be read"] += 1
            return folders, pictures
        for entry in found:
            path, ending = entry.path, os.path.splitext(entry.name)[1].lower()
            if entry.name.startswith(".") or entry.name.lower() in LEFT_BEHIND:
                continue
            if os.path.isdir(path) if entry.is_symlink() else entry.is_dir():
                folders.append(entry)
            elif ending not in endings():
                self.left_out[f"files ({ending or 'no ending'}) that are no pictures"] += 1
            elif not os.path.isfile(path) if entry.is_symlink() else not entry.is_file():
                self.left_out["pictures' names that are no regular files"] += 1
            elif not is_line(path):
                self.left_out["names that no text file can hold"] += 1
            else:
                pictures.append(entry)
        return folders, pictures

    def below(self, starts):
        """Yield (key, DirEntry) of all pictures below the (key, folder) pairs. Real folders come before links to others, so
        that a picture is found where it lies; those of the pairs are entered in any case."""
        queue = deque((key, folder, True) for key, folder in starts)
        while queue:
            key, folder, entered = queue.popleft()
            if entered or self.is_new(folder):
                folders, pictures = self.entries(folder)
                for entry in folders:
                    (queue.append if entry.is_symlink() else queue.appendleft)((key, entry.path, False))
                yield from ((key, entry) for entry in pictures)

    def below_once(self, starts):
        """Sorted [(key, path)] of all pictures below the (key, folder) pairs, without links to those that are listed anyway."""
        found, links = [], []
        for key, entry in self.below(starts):
            (links if entry.is_symlink() else found).append((key, Path(entry.path).as_posix()))
        for key, path in sorted(links):
            real = os.path.realpath(path)
            if real in self.seen or os.path.dirname(real) in self.seen and os.path.splitext(real)[1].lower() in endings():
                self.left_out["links to pictures that are listed anyway"] += 1
            else:
                self.seen.add(real)
                found.append((key, path))
        return sorted(found)


def is_line(name):
    """Whether a line of UTF-8 text can hold it."""
    return name.isprintable() or not {"\n", "\r"} & {*name} and name.encode("utf-8", "replace") == os.fsencode(name)


def pictures_below(folder):
    """Sorted paths of the pictures in `folder` and its folders, links among them."""
    return sorted(Path(entry.path).as_posix() for _, entry in Walk(folder).below([(None, folder)]))
