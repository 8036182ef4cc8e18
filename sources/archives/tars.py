"""Read ImageNet directly from its published tar files, for pack_dataset.py."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from base.errors import DataError
from sources.archives import ilsvrc
from sources.archives.unpack import FILE, Member, opened, tar_members, unpack
from sources.imagenet import flat_val_labels, human_names
from sources.index import DatasetIndex, Names, Split

TRAIN, VAL, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
Entry = tuple[str, int, int]  # name, offset and size in bytes


class TarSplit(Split):
    """Labelled images inside one tar file."""

    def __init__(self, path: Path, entries: Sequence[Entry], labels: Sequence[int]):
        names, offsets, sizes = zip(*entries, strict=True)
        self.path, self.names, self.labels = path, Names(names), np.asarray(labels, np.int64)
        self.offsets, self.sizes = np.asarray(offsets, np.int64), np.asarray(sizes, np.int64)
        self._file = None

    def __getstate__(self):
        return {**self.__dict__, "_file": None}

    def name(self, i: int) -> str:
        return self.names[i]

    def read(self, ids: Sequence[int]) -> list[bytes | np.ndarray]:
        # Left open on purpose. `pread`, because forked processes share the position of an open file.
        self._file = self._file or open(self.path, "rb", buffering=0)  # noqa: SIM115
        return [os.pread(self._file.fileno(), int(self.sizes[i]), int(self.offsets[i])) for i in ids]


def present(data_dir: str | os.PathLike) -> bool:
    """Return whether `data_dir` holds the training tar and no unpacked train/."""
    return Path(data_dir, TRAIN).is_file() and not Path(data_dir, "train").is_dir()


def imagenet_tars(data_dir: str | os.PathLike) -> DatasetIndex:
    """Index the published tars in `data_dir`. Validation labels: the devkit (packed or not), or a CSV file.

    Raises DataError if an archive or a label is missing, or an archive is damaged.
    """
    data_dir = Path(data_dir)
    if not (data_dir / VAL).is_file():
        raise DataError(f"{data_dir.resolve()} has {TRAIN} but not {VAL}", "put both there")
    train, val = _entries(data_dir / TRAIN, _train_images), _entries(data_dir / VAL, _val_images)
    classes = sorted({_class(name) for name, _, _ in train})
    number = {name: i for i, name in enumerate(classes)}
    labels = {name: number.get(os.fsdecode(label)) for name, label in _val_labels(data_dir).items()}
    val_numbers = [labels.get(Path(name).stem.encode()) for name, _, _ in val]
    if None in val_numbers:
        example = val[val_numbers.index(None)][0]
        raise DataError(
            f"{val_numbers.count(None):,} validation images, such as {example}, have no label among the "
            f"{len(classes)} training classes",
            "check that the archives and the development kit belong together",
        )
    return DatasetIndex(
        name="imagenet_1k",
        classes=tuple(classes),
        train=TarSplit(data_dir / TRAIN, train, [number[_class(name)] for name, _, _ in train]),
        val=TarSplit(data_dir / VAL, val, val_numbers),
        class_names=human_names(tuple(classes), data_dir),
    )


def _class(name: str) -> str:
    return name.split("/")[1]


def _entries(path: Path, images: Callable[[Iterator[Member]], Iterator[Entry]]) -> list[Entry]:
    with opened(path) as members:
        entries = sorted(images(members))
    if not entries:
        raise DataError(f"{path} contains no ImageNet images", "is this the published archive?")
    return entries


def _train_images(members: Iterator[Member]) -> Iterator[Entry]:
    for name, outer in _matching(r"n\d{8}\.tar", members):
        for image, member in _matching(r"n\d{8}_\d+\.JPEG", tar_members(outer.stream, outer)):
            yield f"train/{name[:-4]}/{image}", member.offset, member.size


def _val_images(members: Iterator[Member]) -> Iterator[Entry]:
    for name, member in _matching(r"ILSVRC2012_val_\d{8}\.JPEG", members):
        yield f"val/{name}", member.offset, member.size


def _matching(pattern: str, members: Iterator[Member]) -> Iterator[tuple[str, Member]]:
    """Yield (base name, member) of the regular files whose base name matches `pattern`."""
    for member in members:
        name = os.path.basename(member.name)
        if member.kind == FILE and re.fullmatch(pattern, name):
            yield name, member


def _val_labels(data_dir: Path) -> dict[bytes, bytes]:
    """Return {image name without extension: class} from the devkit's archive, or by `flat_val_labels`."""
    devkit = data_dir / DEVKIT
    if not devkit.is_file():
        return flat_val_labels(data_dir, data_dir)
    with tempfile.TemporaryDirectory() as scratch:
        kit = Path(scratch, "kit")
        unpack(devkit, kit, ilsvrc.devkit_place)
        if not all((kit / name).is_file() for name in ilsvrc.DEVKIT_LABELS):
            raise DataError(f"{devkit} lacks {' or '.join(ilsvrc.DEVKIT_LABELS)}", "download it again")
        return flat_val_labels(kit, kit)
