"""What a dataset is to the rest of the project: classes, labels, names, and a way to read samples.

1.28 million paths are one bytes blob and an array of offsets, never a million Python objects: a
forked worker that touches the reference count of a Python object copies its page, so a list of
paths grows every worker's memory with the dataset, epoch after epoch.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from base.errors import DataError, UsageError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


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
    """Labelled samples. Subclasses say how a sample is read; ids are positions, 0 ... len - 1."""

    labels: np.ndarray  # (n,) int64

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, i: int) -> str:
        """How sample `i` is called in messages and fingerprints (relative path, or an index)."""
        return f"#{i}"

    def read(self, ids: Sequence[int]) -> list[bytes | np.ndarray]:
        """Each sample as an encoded file (bytes) or as pixels (H, W, 3) uint8, in the order asked."""
        raise NotImplementedError

    def for_size(self, image_size: int) -> Split:
        """The split to read for training at `image_size` px: packed data has a copy per size."""
        return self

    def digest(self) -> str:
        """SHA-256 over names and labels: the same data gives the same digest wherever it lies."""
        sha = hashlib.sha256(self.labels.astype("<i8").tobytes())
        for i in range(len(self)):
            sha.update(os.fsencode(self.name(i)) + b"\0")
        return sha.hexdigest()


class FileSplit(Split):
    """Images as files below `root`; `names` are relative to it."""

    def __init__(self, root: str | os.PathLike, names: Iterable[str | bytes], labels: Sequence[int]):
        self.root = os.fspath(root)
        self.names = names if isinstance(names, Names) else Names(names)
        self.labels = np.asarray(labels, np.int64)
        if len(self.names) != len(self.labels):
            raise ValueError(f"{len(self.names)} names but {len(self.labels)} labels")

    def name(self, i: int) -> str:
        return self.names[i]

    def path(self, i: int) -> str:
        return os.path.join(self.root, self.names[i])

    def read(self, ids: Sequence[int]) -> list[bytes | np.ndarray]:
        return [_read_file(self.path(i)) for i in ids]

    def digest(self) -> str:
        sha = hashlib.sha256(self.labels.astype("<i8").tobytes())
        sha.update(self.names.blob + self.names.offsets.astype("<i8").tobytes())
        return sha.hexdigest()


def _read_file(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


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
        self.labels = base.labels[self.ids]

    def name(self, i: int) -> str:
        return self.base.name(self.ids[i])

    def read(self, ids: Sequence[int]) -> list[bytes | np.ndarray]:
        return self.base.read([self.ids[i] for i in ids])

    def for_size(self, image_size: int) -> Split:
        return SubsetSplit(self.base.for_size(image_size), self.ids)


@dataclass(frozen=True)
class DatasetIndex:
    """A dataset found on disk (or made in memory), ready to be read."""

    name: str  # as in file names: "imagenet_1k", "digits"
    classes: tuple[str, ...]  # in label order: folder names, e.g. WordNet ids
    train: Split
    val: Split
    mean: tuple[float, float, float] = IMAGENET_MEAN  # of pixels in [0, 1]
    std: tuple[float, float, float] = IMAGENET_STD
    native_size: int | None = None  # side in px of every image, where they are all alike
    class_names: tuple[str, ...] | None = None  # for people, where `classes` are ids
    notes: tuple[str, ...] = field(default=())  # what the user should hear once (files passed over, ...)

    def __post_init__(self):
        # Class names go into checkpoints, manifests, tables and pages, which are all UTF-8. File names may be any bytes.
        for name in (*self.classes, *(self.class_names or ())):
            try:
                name.encode()
            except UnicodeEncodeError:
                raise DataError(
                    f"the class {os.fsencode(name)!r} has no name that can be written as text",
                    "rename its folder, in train/ and val/ alike",
                ) from None

    def fingerprint(self) -> dict[str, str | int]:
        """Plain values that say whether two runs saw the same data (promise R22)."""
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
    """`size` positions drawn from `labels` (n,), class-balanced, sorted, the same on every call.

    Every class gives size // K or one more; a class with fewer samples gives all it has and the
    others make up for it.
    """
    rng = np.random.Generator(np.random.Philox(seed))
    shuffled = rng.permutation(len(labels))
    # The rank of each sample inside its class, in shuffled order: taking the lowest ranks first is
    # taking the classes in turn.
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    ordered = labels[by_class]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    lengths = np.diff(np.r_[starts, len(ordered)])
    rank = np.arange(len(ordered)) - np.repeat(starts, lengths)
    return np.sort(by_class[np.argsort(rank, kind="stable")[:size]])


def stratified_split(labels: np.ndarray, val_fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions (train, val) of `labels` (n,), sorted: `val_fraction` of every class goes to val.

    Rounded to whole samples class by class; the same on every call.
    """
    rng = np.random.Generator(np.random.Philox(seed))
    in_val = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        in_val[members[: round(len(members) * val_fraction)]] = True
    return np.flatnonzero(~in_val), np.flatnonzero(in_val)


def take_subset(index: DatasetIndex, size: int, seed: int = 0) -> DatasetIndex:
    """A fixed draw of `size` training images, class-balanced, and a tenth as many for validation.

    Raises UsageError where `size` cannot hold one image of every class.
    """
    if size < len(index.classes):
        raise UsageError(
            f"--subset-size {size} < {len(index.classes)} classes",
            f"give --subset-size {len(index.classes)} or more",
        )
    train = balanced_subset(index.train.labels, min(size, len(index.train)), seed)
    val = balanced_subset(index.val.labels, min(max(1, size // 10), len(index.val)), seed)
    return replace(index, train=SubsetSplit(index.train, train), val=SubsetSplit(index.val, val))
