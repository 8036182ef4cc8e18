"""List image folders, and turn a training and a validation listing into a `DatasetIndex`.

The type of a file comes with its directory entry, so 1.28 million files are listed without a stat call for
each. Names stay bytes, because file names need not be valid UTF-8.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from base.errors import DataError, UsageError, printable
from sources.index import DatasetIndex, FileSplit

IMAGE_EXTENSIONS = (b".jpeg", b".jpg", b".png", b".webp", b".bmp")
OTHER_IMAGES = (
    b".heic", b".heif", b".gif", b".tif", b".tiff", b".avif", b".jxl", b".jp2", b".jfif", b".dng", b".cr2",
    b".cr3", b".nef", b".arw", b".raf", b".orf", b".rw2",
)  # fmt: skip
SHOWN = 10  # names in one message
ACCEPTED = (
    "use <class>/*.jpg, or train/<class>/*.jpg and val/<class>/*.jpg, or name the dataset that has this "
    "layout with --dataset (docs/datasets.md shows every layout)"
)


def is_image(name: bytes) -> bool:
    """Return whether a file's name is that of an image. macOS leaves metadata as `._x.JPEG` beside x.JPEG."""
    return name[-5:].lower().endswith(IMAGE_EXTENSIONS) and name[:2] != b"._"


def check_outside(index: DatasetIndex, out: str | os.PathLike, flag: str) -> None:
    """Raise UsageError if `out` is inside the class folders: what is written there would become a class."""
    parts = [split.whole for split in (index.train, index.val) if isinstance(split.whole, FileSplit)]
    for part in parts:
        inside = os.path.relpath(os.path.realpath(out), os.path.realpath(part.root))
        first = inside.partition(os.sep)[0]
        if first == os.pardir:
            continue
        if index.split_file or any(name.startswith(f"{first}/") for name in part.names_of(range(len(part)))):
            what = f"{flag} {out} is inside the images, {part.root}: it would become a class"
            raise UsageError(what, f"use a directory elsewhere: {flag} DIR")


def passed_over(names: Iterable[bytes]) -> str:
    """Return how many of the files `names` are images of kinds that are not read, or ''."""
    endings = [os.path.splitext(name)[1].lower() for name in names if os.path.basename(name)[:2] != b"._"]
    counts = Counter(ending.decode() for ending in endings if ending in OTHER_IMAGES)
    if not counts:
        return ""
    kinds = ", ".join(f"{count:,} {ending}" for ending, count in counts.most_common())
    files, them = ("file", "it") if (total := counts.total()) == 1 else ("files", "them")
    return f"skipped {total:,} {files}: {kinds}; convert {them} to JPEG"


def every(names: Sequence[bytes]) -> str:
    """Return all names, for a message in which each of them matters."""
    return printable(", ".join(os.fsdecode(name) for name in names))


def some(names: Sequence[bytes]) -> str:
    """Return the first few names, for a message."""
    return every(names[:SHOWN]) + (f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else "")


@dataclass
class Listing:
    """The images found in some folders of `root`, by class; their names are relative to `root`."""

    root: bytes
    by_class: dict[bytes, list[bytes]] = field(default_factory=dict)
    others: list[bytes] = field(default_factory=list)  # files that are not images
    repeated: list[bytes] = field(default_factory=list)  # links to folders that are listed anyway
    broken: list[bytes] = field(default_factory=list)  # links to nothing
    seen: set[bytes] = field(default_factory=set)  # real paths of the listed folders

    def __len__(self) -> int:
        return sum(map(len, self.by_class.values()))

    @property
    def classes(self) -> list[bytes]:
        return sorted(self.by_class)

    def split(self, classes: list[bytes]) -> FileSplit:
        """Return the images of `classes`, labelled by their positions in it."""
        groups = [self.by_class.get(name, []) for name in classes]
        labels = np.repeat(np.arange(len(classes)), [len(group) for group in groups])
        return FileSplit(os.fsdecode(self.root), [name for group in groups for name in group], labels)


def notes(listings: dict[str, Listing]) -> tuple[str, ...]:
    """Return what to tell the user about files and links that were ignored in `listings`, {part: listing}."""
    found, unread = [], []
    for part, listing in listings.items():
        images = [name for name in listing.others if is_image(os.path.basename(name))]
        unread += (passed := [name for name in listing.others if passed_over([name])])
        rest = sorted({*listing.others} - {*images, *passed})
        for names, kind in (
            (images, "images that are in no class folder"),
            (rest, "files that are not images"),
            (listing.repeated, "links to folders that are listed anyway"),
        ):
            if names:
                found.append(f"{part}: ignored {len(names):,} {kind} ({some(names)})")
    return (*found, *filter(None, [passed_over(unread)]))


def list_classes(root: str | os.PathLike, *folders: str, only: Collection[bytes] | None = None) -> Listing:
    """List `root`/<folder>/<class>/... of all `folders` as one set of classes; `only` restricts the classes.

    A class includes its subfolders and may be empty. A folder reached twice through links counts once.
    Raises DataError for a folder that cannot be read and for broken links.
    """
    listing = Listing(os.fsencode(root))
    entries = [entry for folder in folders for entry in _class_entries(listing, os.fsencode(folder))]
    entries = [entry for entry in entries if only is None or entry.name in only]
    # Of two names for one folder, the real one counts, not the link.
    for entry in sorted(entries, key=lambda entry: (entry.is_symlink(), entry.path)):
        relative = os.path.relpath(entry.path, listing.root)
        if _first_visit(listing, entry.path, relative):
            listing.by_class.setdefault(entry.name, []).append(relative)
    # All classes are known before any is entered: a link from one class to another must not move its images.
    for name, inside in listing.by_class.items():
        listing.by_class[name] = sorted(image for folder in inside for image in _images(listing, folder))
    _refuse_broken(listing)
    return listing


def list_labelled(
    root: str | os.PathLike, folder: str, label_of: dict[bytes, bytes], only: Collection[bytes] | None = None
) -> Listing:
    """List the images in the flat `root`/`folder`; `label_of` maps names without extensions to classes."""
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
        what = f"{len(unlabelled):,} images have no label: {some(unlabelled)}"
        raise DataError(what, "remove these images, or complete the labels")
    return listing


def class_names(path: str | os.PathLike) -> list[bytes]:
    """Return the folders of `path` that could be classes: none for a flat val/."""
    return [entry.name for entry in scan(os.fsencode(path)) if _is_class(entry)]


def scan(path: bytes) -> list[os.DirEntry]:
    """Return the entries of a folder. Raises DataError if it cannot be read."""
    try:
        with os.scandir(path) as entries:
            return list(entries)
    except OSError as error:
        what = f"cannot list {os.fsdecode(path)}: {error.strerror}"
        raise DataError(what, "check that the folder exists and that you may read it") from error


def _class_entries(listing: Listing, folder: bytes) -> list[os.DirEntry]:
    path = os.path.join(listing.root, folder)
    listing.seen.add(os.path.realpath(path))
    classes = []
    for entry in scan(path):
        if _is_class(entry):
            classes.append(entry)
        elif _kind(entry) == "broken":
            listing.broken.append(entry.path)
        else:  # loose files, .ipynb_checkpoints
            listing.others.append(os.path.join(folder, entry.name))
    return classes


def _images(listing: Listing, folder: bytes) -> list[bytes]:
    """Return the images in `folder` and below, relative to the listing's root."""
    images, folders = [], []
    prefix = os.path.join(folder, b"")
    for entry in scan(os.path.join(listing.root, folder)):
        kind = _kind(entry)
        if kind == "folder" and is_hidden(entry.name):
            listing.others.append(prefix + entry.name)
        elif kind == "folder":
            folders.append(entry)
        elif not is_image(entry.name):
            listing.others.append(prefix + entry.name)
        elif kind == "file":
            images.append(prefix + entry.name)
        else:
            listing.broken.append(entry.path)
    for entry in folders:
        if _first_visit(listing, entry.path, prefix + entry.name):
            images += _images(listing, prefix + entry.name)
    return images


def _first_visit(listing: Listing, path: bytes, relative: bytes) -> bool:
    """Record a visit to the folder `path`, and return whether it was the first."""
    real = os.path.realpath(path)
    if real in listing.seen:
        listing.repeated.append(relative)
        return False
    listing.seen.add(real)
    return True


def _composed(names: Iterable[bytes]) -> set[str]:
    return {unicodedata.normalize("NFC", os.fsdecode(name)) for name in names}


def is_hidden(name: bytes) -> bool:
    """Return whether a folder holds no images of its own: thumbnails, checkpoints, a NAS's recycle bin."""
    return name.startswith(b".") or name in (b"@eaDir", b"#recycle")


def _is_class(entry: os.DirEntry) -> bool:
    return _kind(entry) == "folder" and not is_hidden(entry.name)


def _kind(entry: os.DirEntry) -> str:
    try:
        return "file" if entry.is_file() else "folder" if entry.is_dir() else "broken"
    except OSError:  # a link to itself
        return "broken"


def _refuse_broken(listing: Listing) -> None:
    if listing.broken:
        what = f"{len(listing.broken):,} links point to nothing: {some(listing.broken)}"
        raise DataError(what, "restore their targets (is a disk not mounted?), or remove the links")


def from_listings(
    name: str, train: Listing, val: Listing, *, allow_class_mismatch: bool = False, **extra
) -> DatasetIndex:
    """Return an index whose classes are the training folders; `extra` sets its other fields.

    Raises DataError if there are no images, or if training and validation have different classes.
    """
    root = os.path.abspath(os.fsdecode(train.root))
    if not train.by_class:
        raise DataError(f"no class folders for training in {root}", ACCEPTED)
    if empty := [key for key in train.classes if not train.by_class[key]]:
        what = f"classes without training images in {root}: {every(empty)}"
        raise DataError(what, f"fill or remove these folders (images end in {every(IMAGE_EXTENSIONS)})")
    if not len(val):
        raise DataError(f"no validation images in class folders in {root}", ACCEPTED)
    only_train = [key for key in train.classes if not val.by_class.get(key)]
    only_val = sorted(val.by_class.keys() - train.by_class.keys())
    if only_val or (only_train and not allow_class_mismatch):
        parts = {"only in train": only_train, "only in val": only_val}
        lists = "; ".join(f"{where}: {every(keys)}" for where, keys in parts.items() if keys)
        fix = "complete val, or pass --allow-class-mismatch"
        if only_val:
            fix = "give both the same class folders"
            if _composed(only_val) & _composed(only_train):
                fix += ": some of these names look alike, but macOS wrote their accents in another form (NFD)"
        raise DataError(f"training and validation classes differ in {root}: {lists}", fix)
    return DatasetIndex(
        name=name,
        classes=tuple(os.fsdecode(key) for key in train.classes),
        train=train.split(train.classes),
        val=val.split(train.classes),
        notes=notes({"train": train, "val": val}),
        **extra,
    )
