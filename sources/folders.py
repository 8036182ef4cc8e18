"""Listing images on disk, fast and without surprises, and an index of two listings. Knows no dataset by name.

A name's kind comes with the directory entry, so 1.28 million files are listed without touching them.
Names stay bytes: not every file name is valid UTF-8.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np

from base.errors import DataError, printable
from sources.index import DatasetIndex, FileSplit

IMAGE_ENDINGS = (b".jpeg", b".jpg", b".png", b".webp", b".bmp")
SHOWN = 10  # names in one message
ACCEPTED = (
    "lay it out as train/<class>/*.JPEG and val/<class>/*.JPEG, or give the folder of a dataset as it was "
    "published with its --dataset (README, 'Datasets', shows every tree)"
)


def is_image(name: bytes) -> bool:
    """By its name; `._x.JPEG` is what macOS leaves beside x.JPEG on foreign disks."""
    return name[-5:].lower().endswith(IMAGE_ENDINGS) and name[:2] != b"._"


def some(names: list[bytes] | list[str]) -> str:
    """The first few names, for a message."""
    return every(names[:SHOWN]) + (f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else "")


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
            notes.append(
                f"{what}: passed over {len(self.others):,} that are not images ({some(self.others)})"
            )
        if self.again:
            notes.append(f"{what}: passed over links to folders that are listed anyway ({some(self.again)})")
        return notes

    def split(self, classes: list[bytes]) -> FileSplit:
        """The images of `classes`, labelled by their positions there."""
        groups = [self.by_class.get(name, []) for name in classes]
        labels = np.repeat(np.arange(len(classes)), [len(group) for group in groups])
        return FileSplit(os.fsdecode(self.root), [name for group in groups for name in group], labels)


def list_classes(root: str | os.PathLike, *folders: str, only: Collection[bytes] | None = None) -> Listing:
    """List `root`/<folder>/<class>/... for all `folders` as one set of classes; an empty class has an empty list.

    only: enter no other classes than these
    Folders inside a class are part of it. A folder reached twice through links counts once.
    Raises DataError for a folder that cannot be read and for links to nothing.
    """
    listing = Listing(os.fsencode(root))
    found = [entry for folder in folders for entry in _class_entries(listing, os.fsencode(folder))]
    found = [entry for entry in found if only is None or entry.name in only]
    found.sort(
        key=lambda entry: (entry.is_symlink(), entry.path)
    )  # of two names for one folder, the real one counts
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


def list_labelled(
    root: str | os.PathLike, folder: str, label_of: dict[bytes, bytes], only: Collection[bytes] | None = None
) -> Listing:
    """List the images in the flat `root`/`folder`; `label_of` gives the class of each name without its ending."""
    listing = Listing(os.fsencode(root))
    listing.seen.add(os.path.realpath(os.path.join(listing.root, os.fsencode(folder))))
    unlabelled = []
    for name in sorted(_images(listing, os.fsencode(folder))):
        label = label_of.get(os.path.splitext(os.path.basename(name))[0])
        if label is None:
            unlabelled.append(name)
        elif only is None or label in only:
            listing.by_class.setdefault(label, []).append(name)
    _refuse_broken(listing)
    if unlabelled:
        raise DataError(
            f"{len(unlabelled):,} images have no label: {some(unlabelled)}",
            "remove them, or complete the labels",
        )
    return listing


def count_classes(path: str | os.PathLike) -> int:
    """How many folders of `path` could be classes: none in a flat val/."""
    return sum(
        _kind(entry) == "folder" and not entry.name.startswith(b".") for entry in scan(os.fsencode(path))
    )


def _class_entries(listing: Listing, folder: bytes) -> list[os.DirEntry]:
    path = os.path.join(listing.root, folder)
    listing.seen.add(os.path.realpath(path))
    folders = []
    for entry in scan(path):
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
    for entry in scan(os.path.join(listing.root, folder)):
        if is_image(entry.name) and entry.is_file(follow_symlinks=False):  # nearly always
            names.append(prefix + entry.name)
            continue
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


def scan(path: bytes) -> list[os.DirEntry]:
    """The entries of a folder; DataError where it cannot be read."""
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


def from_listings(
    name: str, train: Listing, val: Listing, *, allow_class_mismatch: bool = False, **extra
) -> DatasetIndex:
    """An index whose classes are the training folders; validation is mapped by them."""
    where = os.path.abspath(os.fsdecode(train.root))
    if not train.by_class:
        raise DataError(f"no class folders for training in {where}", ACCEPTED)
    if train.empty():
        raise DataError(
            f"classes without a single training image in {where}: {every(train.empty())}",
            f"fill or remove these folders (images end in {every(IMAGE_ENDINGS)})",
        )
    classes = train.classes
    filled = {key for key in val.by_class if val.by_class[key]}
    unknown, missing = sorted(set(val.by_class) - set(classes)), [key for key in classes if key not in filled]
    if not filled:
        raise DataError(f"no validation images in class folders in {where}", ACCEPTED)
    if unknown or (missing and not allow_class_mismatch):
        raise DataError(
            f"training and validation classes differ in {where}: "
            + "; ".join(
                f"{what}: {every(keys)}"
                for what, keys in (("only in train", missing), ("only in val", unknown))
                if keys
            ),
            "give both the same class folders" if unknown else "complete val, or pass --allow-class-mismatch",
        )
    return DatasetIndex(
        name=name,
        classes=tuple(os.fsdecode(key) for key in classes),
        train=train.split(classes),
        val=val.split(classes),
        notes=tuple(train.notes("train") + val.notes("val")),
        **extra,
    )


def every(names: list[bytes] | list[str] | tuple[bytes, ...]) -> str:
    """All the names, for a message where each of them matters."""
    return printable(", ".join(os.fsdecode(name) for name in names))
