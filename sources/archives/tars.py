"""ImageNet read straight from the published tars, without unpacking them: for pack_dataset.py.

ILSVRC2012_img_train.tar holds one tar per class. Nothing is ever extracted: members are listed,
and an image is read by its offset. Links and other special members are never followed.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from base.errors import DataError
from sources import ilsvrc, unpack
from sources.imagenet import flat_val_labels, human_names
from sources.index import DatasetIndex, Names, Split

TRAIN, VAL, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
CLASS_TAR, TRAIN_IMAGE = re.compile(r"(n\d{8})\.tar"), re.compile(r"n\d{8}_\d+\.JPEG")
VAL_IMAGE = re.compile(r"ILSVRC2012_val_\d{8}\.JPEG")
DEVKIT_FILES = ("meta.mat", "ILSVRC2012_validation_ground_truth.txt")


class TarSplit(Split):
    """Images inside one tar: (n,) offsets and sizes in bytes."""

    def __init__(
        self,
        path: str,
        names: Sequence[str],
        labels: Sequence[int],
        offsets: Sequence[int],
        sizes: Sequence[int],
    ):
        self.path, self.names, self.labels = path, Names(names), np.asarray(labels, np.int64)
        self.offsets, self.sizes = np.asarray(offsets, np.int64), np.asarray(sizes, np.int64)
        self._file = None

    def __getstate__(self):
        return {**self.__dict__, "_file": None}

    def name(self, i: int) -> str:
        return self.names[i]

    def read(self, ids: Sequence[int]) -> list[bytes | np.ndarray]:
        self._file = self._file or open(self.path, "rb", buffering=0)  # noqa: SIM115  (open as long as the split)
        # pread: a file that processes share by fork has one position for all of them.
        return [os.pread(self._file.fileno(), int(self.sizes[i]), int(self.offsets[i])) for i in ids]


def present(data_dir: str | os.PathLike) -> bool:
    return os.path.isfile(os.path.join(data_dir, TRAIN)) and not os.path.isdir(
        os.path.join(data_dir, "train")
    )


def imagenet_tars(data_dir: str | os.PathLike) -> DatasetIndex:
    """ImageNet from the three published archives in `data_dir` (the devkit may be unpacked, or a csv of labels)."""
    data_dir = os.fspath(data_dir)
    train, val = os.path.join(data_dir, TRAIN), os.path.join(data_dir, VAL)
    if not os.path.isfile(val):
        raise DataError(f"{os.path.abspath(data_dir)} has {TRAIN} but not {VAL}", "put both there")
    found = sorted(_train_images(train))
    classes = sorted({name.split("/")[1] for name, _, _ in found})
    number = {name: k for k, name in enumerate(classes)}
    label_of = {key.decode(): number.get(value.decode(), -1) for key, value in _val_labels(data_dir).items()}
    pictures = sorted(_val_images(val))
    unknown = [name for name, _, _ in pictures if label_of.get(_stem(name), -1) < 0]
    if unknown:
        raise DataError(
            f"{len(unknown):,} validation images have no label among the {len(classes)} training classes, "
            f"such as {unknown[0]}",
            "check that the archives and the devkit belong together",
        )
    return DatasetIndex(
        name="imagenet_1k",
        classes=tuple(classes),
        train=_split(train, found, [number[name.split("/")[1]] for name, _, _ in found]),
        val=_split(val, pictures, [label_of[_stem(name)] for name, _, _ in pictures]),
        class_names=human_names(tuple(classes), Path(data_dir)),
    )


def _split(path: str, found: list[tuple[str, int, int]], labels: list[int]) -> TarSplit:
    names, offsets, sizes = zip(*found, strict=True)
    return TarSplit(path, names, labels, offsets, sizes)


def _stem(name: str) -> str:
    return os.path.splitext(os.path.basename(name))[0]


def _train_images(path: str) -> Iterator[tuple[str, int, int]]:
    """(train/<class>/<image>, offset, size) of every image of the nested tars."""
    with open(path, "rb") as file:
        for name, offset, size in _members(file, path, CLASS_TAR):
            part = _Window(file, offset, size)
            for image, start, length in _members(part, f"{path}:{name}", TRAIN_IMAGE):
                yield f"train/{name[:-4]}/{image}", offset + start, length


def _val_images(path: str) -> Iterator[tuple[str, int, int]]:
    with open(path, "rb") as file:
        for name, offset, size in _members(file, path, VAL_IMAGE):
            yield f"val/{name}", offset, size


def _members(file, where: str, wanted: re.Pattern) -> list[tuple[str, int, int]]:
    """(base name, offset, size) of the regular members whose base name is `wanted`."""
    found, end, last = [], file.seek(0, os.SEEK_END), -1
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                if member.offset <= last or member.offset_data + member.size > end:
                    raise DataError(f"{where} is truncated or damaged at {member.name}", "download it again")
                last, name = member.offset, os.path.basename(member.name)
                if member.isreg() and not member.issparse() and wanted.fullmatch(name):
                    found.append((name, member.offset_data, member.size))
                archive.members.clear()  # 1.28 million TarInfo objects are a gigabyte
    except (
        tarfile.TarError,
        OSError,
        ValueError,
        KeyError,
        IndexError,
        EOFError,
        OverflowError,
        RecursionError,
        MemoryError,
    ) as error:
        raise DataError(f"cannot read {where}: {error}", "download it again, and check its MD5") from error
    if not found:
        raise DataError(f"{where} holds no {wanted.pattern}", "is this the published archive?")
    return found


class _Window(io.RawIOBase):
    """Bytes `start` ... `start + size` - 1 of an open file, as a file."""

    def __init__(self, file, start: int, size: int):
        self.file, self.start, self.size, self.at = file, start, size, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.size}[whence]
        if self.at < 0:
            raise ValueError("seek before the start")
        return self.at

    def tell(self) -> int:
        return self.at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self.size - self.at)
        size = left if size < 0 else min(size, left)
        self.file.seek(self.start + self.at)
        data = self.file.read(size)
        self.at += len(data)
        return data


def _val_labels(data_dir: str) -> dict[bytes, bytes]:
    """{image name without ending: class}, from the devkit's archive or from what lies unpacked near."""
    devkit = os.path.join(data_dir, DEVKIT)
    if not os.path.isfile(devkit):
        return flat_val_labels(data_dir, data_dir)
    with tempfile.TemporaryDirectory() as scratch:
        kit = Path(scratch, "kit")
        with unpack.opened(Path(devkit)) as members:
            unpack.unpack(members, kit, ilsvrc.devkit_place, max_size=64 << 20)
        if not all((kit / "data" / name).is_file() for name in DEVKIT_FILES):
            raise DataError(f"{devkit} lacks {' or '.join(DEVKIT_FILES)}", "download it again")
        return flat_val_labels(os.fspath(kit), os.fspath(kit))
