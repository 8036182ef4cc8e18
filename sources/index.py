"""`DatasetIndex`: the classes, labels and names of a dataset, and a way to read its samples.

The paths of 1.28 million files are one bytes blob and an array of offsets, not Python objects: a forked
worker that touches the reference count of an object copies its page, so with a list of paths the memory of
every worker would grow epoch after epoch.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from base.errors import DataError, UsageError

NAME_BYTES = 100  # of a dataset's name, which is part of file names
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def short_names(names: Sequence[str]) -> list[str]:
    """Return class names up to their first comma, "tench" for "tench, Tinca tinca", if they stay unique."""
    short = [name.partition(",")[0] for name in names]
    return short if len({*short}) == len(short) else list(names)


def safe_name(path: str) -> str:
    """Return the last part of `path` as the name of a dataset: short, and safe in the names of files."""
    name = unicodedata.normalize("NFC", os.path.basename(os.path.abspath(path)))
    name = re.sub(r"[^\w.+@=-]+", "_", name).lstrip(".+@=-").encode(errors="ignore")[:NAME_BYTES]
    return name.decode(errors="ignore") or "data"


class Names(Sequence):
    """An immutable sequence of file names, held as one bytes blob and (n + 1,) offsets."""

    def __init__(self, names: Iterable[str | bytes]):
        encoded = [name if isinstance(name, bytes) else os.fsencode(name) for name in names]
        self.blob = b"".join(encoded)
        self.offsets = np.zeros(len(encoded) + 1, np.int64)
        np.cumsum([len(name) for name in encoded], out=self.offsets[1:])

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> str:
        return os.fsdecode(self.blob[self.offsets[i] : self.offsets[i + 1]])


class Split:
    """Labelled samples, numbered 0 ... len - 1. Subclasses define how they are read."""

    labels: np.ndarray  # (n,) int64
    crop_root = ""  # the directory that may hold its evaluation crops, see `sources.crops`

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def whole(self) -> Split:
        """The split that this one is a part of, or this one."""
        return self

    def name(self, i: int) -> str:
        """Return the name of sample `i` for messages and fingerprints: a relative path or a number."""
        return f"#{i}"

    def names_of(self, ids: Sequence[int]) -> Iterable[str]:
        """Return the names of the samples `ids`, in that order."""
        return map(self.name, ids)

    def read(self, ids: Sequence[int]) -> list[bytes | np.ndarray]:
        """Return the samples `ids` in that order, each as an encoded file or as pixels (H, W, 3) uint8."""
        raise NotImplementedError

    def for_size(self, image_size: int) -> Split:
        """Return the split to train from at `image_size` px: packed data has a copy for each size."""
        return self

    def digest(self) -> str:
        """Return a SHA-256 over names and labels: equal data has equal digests wherever it is stored."""
        sha = hashlib.sha256(self.labels.astype("<i8").tobytes())
        for name in self.names_of(range(len(self))):
            sha.update(os.fsencode(name) + b"\0")
        return sha.hexdigest()

    def content(self) -> str:
        """Return the digest of what `read` returns: it differs between the copies of a packed split."""
        return self.digest()


def read_samples(split: Split, ids: Sequence[int]) -> list[bytes | np.ndarray]:
    """Return `split.read(ids)`. Raises DataError if the disk does not give them."""
    try:
        return split.read(ids)
    except OSError as error:
        what = f"cannot read {error.filename or 'the data'}: {error.strerror or error}"
        fix = "check the disk and the permissions, then run the command again (train.py with --resume auto)"
        raise DataError(what, fix) from error


class FileSplit(Split):
    """Image files; `names` are relative to `root`."""

    def __init__(self, root: str | os.PathLike, names: Iterable[str | bytes], labels: Sequence[int]):
        self.root = os.fspath(root)
        self.names, self.labels = Names(names), np.asarray(labels, np.int64)

    def name(self, i: int) -> str:
        return self.names[i]

    def path(self, i: int) -> str:
        return os.path.join(self.root, self.names[i])

    def read(self, ids: Sequence[int]) -> list[bytes | np.ndarray]:
        return [Path(self.path(i)).read_bytes() for i in ids]

    def digest(self) -> str:
        sha = hashlib.sha256(self.labels.astype("<i8").tobytes())
        sha.update(self.names.blob + self.names.offsets.astype("<i8").tobytes())
        return sha.hexdigest()


class ArraySplit(Split):
    """Images already in memory: (n, H, W, 3) uint8."""

    def __init__(self, images: np.ndarray, labels: Sequence[int]):
        self.images, self.labels = images, np.asarray(labels, np.int64)

    def read(self, ids: Sequence[int]) -> list[bytes | np.ndarray]:
        return [self.images[i] for i in ids]

    def digest(self) -> str:
        return hashlib.sha256(self.labels.astype("<i8").tobytes() + self.images.tobytes()).hexdigest()


class SubsetSplit(Split):
    """The samples `ids` of another split."""

    def __init__(self, base: Split, ids: Sequence[int]):
        self.base, self.ids = base, np.asarray(ids, np.int64)
        self.labels, self.crop_root = base.labels[self.ids], base.crop_root

    def name(self, i: int) -> str:
        return self.base.name(self.ids[i])

    def names_of(self, ids: Sequence[int]) -> Iterable[str]:
        return self.base.names_of(self.ids[np.asarray(ids, np.int64)])

    def read(self, ids: Sequence[int]) -> list[bytes | np.ndarray]:
        return self.base.read([self.ids[i] for i in ids])

    def for_size(self, image_size: int) -> Split:
        return SubsetSplit(self.base.for_size(image_size), self.ids)

    @property
    def whole(self) -> Split:
        return self.base.whole

    def content(self) -> str:
        ids = self.ids.astype("<i8").tobytes()
        return hashlib.sha256(self.base.content().encode() + ids).hexdigest()


@dataclass(frozen=True)
class DatasetIndex:
    """A dataset on disk or in memory, ready to be read."""

    name: str  # used in the names of files: "imagenet_1k", "digits"
    classes: tuple[str, ...]  # in label order: folder names, e.g. WordNet ids
    train: Split
    val: Split
    mean: tuple[float, float, float] = IMAGENET_MEAN  # of pixels in [0, 1]
    std: tuple[float, float, float] = IMAGENET_STD
    native_size: int | None = None  # side in px, if all images are squares of one size
    class_names: tuple[str, ...] | None = None  # readable names, if `classes` are ids
    exif: bool = False  # whether images are turned as their EXIF orientation says
    split_file: tuple[Path, str] | None = None  # that keeps the split, with what to write: `sources.splits`
    notes: tuple[str, ...] = ()  # for the user, such as ignored files

    def __post_init__(self):
        # Class names go into checkpoints, tables and pages, which are UTF-8. File names may be any bytes.
        for name in (*self.classes, *(self.class_names or ())):
            try:
                name.encode()
            except UnicodeEncodeError:
                what = f"the class name {os.fsencode(name)!r} is not valid text"
                raise DataError(what, "rename the class's folder in train/ and in val/") from None

    def fingerprint(self) -> dict[str, str | int]:
        """Return plain values that are equal only for two runs on the same data."""
        classes = hashlib.sha256("\0".join(self.classes).encode("utf-8", "surrogateescape")).hexdigest()
        return {
            "classes": classes,
            "num_classes": len(self.classes),
            "train": self.train.digest(),
            "num_train": len(self.train),
            "val": self.val.digest(),
            "num_val": len(self.val),
        }


def balanced_subset(labels: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Return `size` positions in `labels` (n,), class-balanced and sorted, the same on every call.

    Each of the K classes contributes size // K or one more. A class with fewer samples contributes all of
    them, and the others make up for it.
    """
    rng = np.random.Generator(np.random.Philox(seed))
    shuffled = rng.permutation(len(labels))
    # The rank of each sample within its class: the samples of lowest rank take the classes in turn.
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    ordered = labels[by_class]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    lengths = np.diff(np.r_[starts, len(ordered)])
    rank = np.arange(len(ordered)) - np.repeat(starts, lengths)
    return np.sort(by_class[np.argsort(rank, kind="stable")[:size]])


def training_sample(index: DatasetIndex) -> SubsetSplit:
    """Return the images that train_top1 is measured on: the same class-balanced ones on every call.

    As many as there are validation images, at most 10,000. Of packed data, the largest copy is read.
    """
    size = min(10_000, len(index.val), len(index.train))
    return SubsetSplit(index.train, balanced_subset(index.train.labels, size, seed=1))


def stratified_split(labels: np.ndarray, val_fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return sorted positions in `labels` (n,) for train and val, the same on every call.

    `val_fraction` of every class, rounded to whole samples, goes to val.
    """
    rng = np.random.Generator(np.random.Philox(seed))
    in_val = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        in_val[members[: round(len(members) * val_fraction)]] = True
    return np.flatnonzero(~in_val), np.flatnonzero(in_val)


def first_classes(index: DatasetIndex, count: int) -> DatasetIndex:
    """Return `index` with the images of its first `count` classes only. Raises UsageError for too many."""
    if count > len(index.classes):
        what = f"--classes {count}: there are only {len(index.classes)} classes"
        raise UsageError(what, "give a smaller number, or leave it out")
    train, val = (SubsetSplit(s, np.flatnonzero(s.labels < count)) for s in (index.train, index.val))
    names = index.class_names and index.class_names[:count]
    return replace(index, classes=index.classes[:count], class_names=names, train=train, val=val)


def hold_out(index: DatasetIndex, held: float, seed: int = 0) -> DatasetIndex:
    """Return `index` with part of its training images for validation, the same part on every call.

    held: a share of every class, or a number of images, which every class gives its share of, rounded
    The official validation images are not in the result: use them once, after every choice was made.
    Raises UsageError if no image is left for training or for validation.
    """
    total = len(index.train)
    train, val = stratified_split(index.train.labels, held if held < 1 else min(1, held / total), seed)
    if not (len(train) and len(val)):
        what = (
            f"--holdout {held} leaves {len(train):,} of {total:,} images for training, {len(val):,} held out"
        )
        raise UsageError(what, "use another number, or a share such as 0.1")
    return replace(index, train=SubsetSplit(index.train, train), val=SubsetSplit(index.train, val))


def take_subset(index: DatasetIndex, size: int, seed: int = 0, whole_val: bool = False) -> DatasetIndex:
    """Return `index` cut to a class-balanced draw of `size` training and a tenth as many validation images.

    whole_val: keep all validation images
    Every call returns the same draw. Raises UsageError if `size` is below the number of classes.
    """
    if size < (classes := len(index.classes)):
        raise UsageError(f"--subset-size {size} < {classes} classes", f"use --subset-size {classes} or more")
    train = balanced_subset(index.train.labels, min(size, len(index.train)), seed)
    index = replace(index, train=SubsetSplit(index.train, train))
    if whole_val:
        return index
    val = balanced_subset(index.val.labels, min(max(1, size // 10), len(index.val)), seed)
    return replace(index, val=SubsetSplit(index.val, val))


def read_class_weights(path: str | os.PathLike, classes: Sequence[str]) -> list[float]:
    """Return the weight of each of `classes` from a file with a line "<class> <weight>" for every one.

    Raises DataError.
    """
    try:
        lines = Path(path).read_text("utf-8-sig", "surrogateescape").splitlines()
    except OSError as error:
        what = f"cannot read the class weights {path}: {error.strerror}"
        raise DataError(what, "check --class-weights: balanced, or a file") from error
    weights: dict[str, float] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            name, text = line.strip().rsplit(None, 1)
            weight = float(text)
        except ValueError:
            name, weight = "", math.nan
        if name in weights or not 0 <= weight < math.inf:
            what = f"{path}, line {number}: {line.strip()[:80]!r} is not a new class and its weight"
            raise DataError(what, "write one line for each class: its name, a space, and a number from 0")
        weights[name] = weight
    if odd := sorted(weights.keys() ^ set(classes)):
        what = f"{path} has other classes than the data: {odd[0][:80]!r} is in one of them only"
        raise DataError(what, "write one line for each class of the data")
    if not any(weights.values()):
        raise DataError(f"{path} gives every class the weight 0", "give one of them a positive weight")
    return [weights[name] for name in classes]
