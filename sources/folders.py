"""Listing images on disk, fast and without surprises: class folders, and nothing about any one dataset.

A name's kind comes with the directory entry, so 1.28 million files are listed without touching them.
Names stay bytes: not every file name is valid UTF-8.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import numpy as np

from errors import DataError
from sources.index import FileSplit

IMAGE_ENDINGS = (b".jpeg", b".jpg", b".png", b".webp", b".bmp")
SHOWN = 10  # names in one message


def is_image(name: bytes) -> bool:
    """By its name; `._x.JPEG` is what macOS leaves beside x.JPEG on foreign disks."""
    return name.lower().endswith(IMAGE_ENDINGS) and not name.startswith(b"._")


def some(names: list[bytes] | list[str]) -> str:
    """The first few names, for a message."""
    text = ", ".join(os.fsdecode(name) for name in names[:SHOWN])
    return text + (f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else "")


@dataclass
class Listing:
    """What was found below some folders of `root`: image names (relative to it) by class."""

    root: bytes
    by_class: dict[bytes, list[bytes]] = field(default_factory=dict)
    others: list[bytes] = field(default_factory=list)  # files that are not images
    again: list[bytes] = field(default_factory=list)  # links to folders that are listed anyway
    broken: list[bytes] = field(default_factory=list)  # links to nothing
    seen: set[bytes] = field(default_factory=set)  # real paths of listed folders

    def __len__(self) -> int:
        return sum(map(len, self.by_class.values()))

    @property
    def classes(self) -> list[bytes]:
        return sorted(self.by_class)

    def empty(self) -> list[bytes]:
        return [name for name in self.classes if not self.by_class[name]]

    def notes(self, what: str) -> list[str]:
        """What the user should hear once about what was passed over."""
        notes = []
        if self.others:
            notes.append(f"{what}: passed over {len(self.others):,} that are not images ({some(self.others)})")
        if self.again:
            notes.append(f"{what}: passed over links to folders that are listed anyway ({some(self.again)})")
        return notes

    def split(self, classes: list[bytes]) -> FileSplit:
        """The images of `classes`, labelled by their positions there."""
        groups = [self.by_class.get(name, []) for name in classes]
        labels = np.repeat(np.arange(len(classes)), [len(group) for group in groups])
        return FileSplit(os.fsdecode(self.root), [name for group in groups for name in group], labels)


def list_classes(root: str | os.PathLike, *folders: str) -> Listing:
    """List `root`/<folder>/<class>/... for all `folders` as one set of classes; an empty class has an empty list.

    Folders inside a class are part of it. A folder reached twice through links counts once.
    Raises DataError for a folder that cannot be read and for links to nothing.
    """
    listing = Listing(os.fsencode(root))
    found = [entry for folder in folders for entry in _class_entries(listing, os.fsencode(folder))]
    found.sort(key=lambda entry: (entry.is_symlink(), entry.path))  # of two names for one folder, the real one counts
    for entry in found:
        real = os.path.realpath(entry.path)
        relative = os.path.relpath(entry.path, listing.root)
        if real in listing.seen:
            listing.again.append(relative)
            continue
        listing.seen.add(real)
        listing.by_class.setdefault(entry.name, []).append(relative)
    # All classes are known before any is entered: a link from one class to another must not move its images.
    for name, inside in listing.by_class.items():
        images = [image for folder in inside for image in _images(listing, folder)]
        listing.by_class[name] = sorted(images)
    _refuse_broken(listing)
    return listing


def list_flat(root: str | os.PathLike, folder: str) -> Listing:
    """List the images lying directly or deeper in `root`/`folder`, as the one class b""."""
    listing = Listing(os.fsencode(root))
    listing.by_class[b""] = sorted(_images(listing, os.fsencode(folder)))
    _refuse_broken(listing)
    return listing


def _class_entries(listing: Listing, folder: bytes) -> list[os.DirEntry]:
    path = os.path.join(listing.root, folder)
    listing.seen.add(os.path.realpath(path))
    folders = []
    for entry in _scan(path):
        kind = _kind(entry)
        if kind == "broken":
            listing.broken.append(entry.path)
        elif kind == "folder" and not entry.name.startswith(b"."):
            folders.append(entry)
        else:  # loose files, .ipynb_checkpoints
            listing.others.append(os.path.join(folder, entry.name))
    return folders


def _images(listing: Listing, folder: bytes) -> list[bytes]:
    """Names of the images in `folder` and below, relative to the listing's root."""
    names, folders = [], []
    prefix = os.path.join(folder, b"")
    for entry in _scan(os.path.join(listing.root, folder)):
        kind = _kind(entry)
        if kind == "folder":
            folders.append(entry)
        elif not is_image(entry.name):
            listing.others.append(prefix + entry.name)
        elif kind == "file":
            names.append(prefix + entry.name)
        else:
            listing.broken.append(entry.path)
    for entry in folders:
        real = os.path.realpath(entry.path)
        if real in listing.seen:
            listing.again.append(prefix + entry.name)
        else:
            listing.seen.add(real)
            names += _images(listing, prefix + entry.name)
    return names


def _kind(entry: os.DirEntry) -> str:
    try:
        return "file" if entry.is_file() else "folder" if entry.is_dir() else "broken"
    except OSError:  # a link to itself
        return "broken"


def _scan(path: bytes) -> list[os.DirEntry]:
    try:
        with os.scandir(path) as entries:
            return list(entries)
    except OSError as error:
        raise DataError(
            f"cannot list {os.fsdecode(path)}: {error.strerror}",
            "check that the folder exists and that you may read it",
        ) from error


def _refuse_broken(listing: Listing) -> None:
    if listing.broken:
        raise DataError(
            f"{len(listing.broken):,} links lead nowhere: {some(listing.broken)}",
            "restore what they point to (is a disk not mounted?), or remove them",
        )
