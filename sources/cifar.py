"""Read CIFAR-10 and CIFAR-100 from their Python archives (https://www.cs.toronto.edu/~kriz/cifar.html).

Or from PNG files in class folders: train/<class>/*.png and test/<class>/*.png. The archives are pickles,
which could run any code. This reader builds only numeric arrays and plain values.
"""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from base.errors import DataError
from sources import folders
from sources.index import ArraySplit, DatasetIndex


@dataclass(frozen=True)
class Cifar:
    """One of the two datasets: its file names, and the keys inside the files."""

    name: str
    folder: str
    train: tuple[str, ...]
    val: str
    meta: str
    labels: bytes
    class_names: bytes
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


CIFAR10 = Cifar(
    "cifar10", "cifar-10-batches-py", tuple(f"data_batch_{i}" for i in range(1, 6)), "test_batch",
    "batches.meta", b"labels", b"label_names", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616),
)  # fmt: skip
CIFAR100 = Cifar(
    "cifar100", "cifar-100-python", ("train",), "test", "meta",
    b"fine_labels", b"fine_label_names", (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762),
)  # fmt: skip
DOWNLOAD = "python download_imagenet.py --method simple --dataset"


def cifar(data_dir: str, dataset: str) -> DatasetIndex:
    """Index `cifar10` or `cifar100`: 50,000 + 10,000 images of 32 px, held in memory (180 MB)."""
    which = CIFAR10 if dataset == "cifar10" else CIFAR100
    normalization = {"mean": which.mean, "std": which.std, "native_size": 32}
    if all(os.path.isdir(os.path.join(data_dir, part)) for part in ("train", "test")):
        listings = (folders.list_classes(data_dir, part) for part in ("train", "test"))
        return folders.from_listings(which.name, *listings, **normalization)
    folder = _find(data_dir, which)
    meta = _load(folder / which.meta, which)
    train, val = [_load(folder / name, which) for name in which.train], _load(folder / which.val, which)
    try:
        names = tuple(str(name, "utf-8") for name in meta[which.class_names])
        splits = {"train": _split(train, which, len(names)), "val": _split([val], which, len(names))}
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise _damaged(f"{folder} is not {which.name} as published: {error!r}", which) from error
    return DatasetIndex(which.name, names, **splits, **normalization)


def _find(data_dir: str, which: Cifar) -> Path:
    for folder in (Path(data_dir, which.folder), Path(data_dir)):
        if (folder / which.meta).is_file():
            return folder
    what = f"no {which.folder}/ with a file {which.meta} in {os.path.abspath(data_dir)}"
    raise DataError(what, f"{DOWNLOAD} {which.name} --data-dir {shlex.quote(data_dir)}")


def _load(path: Path, which: Cifar) -> dict:
    try:
        content = PlainUnpickler(path.read_bytes()).load()
        pairs = [(key if isinstance(key, bytes) else str(key).encode(), v) for key, v in content.items()]
        return {key: value.array if isinstance(value, _Array) else value for key, value in pairs}
    except Exception as error:  # hostile bytes make a pickle raise anything
        raise _damaged(f"cannot read {path}: {error}", which) from error


def _split(batches: list[dict], which: Cifar, num_classes: int) -> ArraySplit:
    rows = np.concatenate([batch[b"data"] for batch in batches])  # (n, 3072) uint8, channel by channel
    labels = np.concatenate([np.asarray(batch[which.labels], np.int64) for batch in batches])
    whole = rows.dtype == np.uint8 and rows.shape == (len(labels), 3072)
    if not whole or labels.min() < 0 or labels.max() >= num_classes:
        raise _damaged(f"{which.folder}: {rows.shape} {rows.dtype} values for {len(labels)} labels", which)
    images = rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return ArraySplit(np.ascontiguousarray(images), labels)


def _damaged(what: str, which: Cifar) -> DataError:
    return DataError(what, f"delete {which.folder}/, then: {DOWNLOAD} {which.name} --data-dir DIR")


class _Dtype:
    """Stands for numpy.dtype, which a pickle can make read bytes as pointers; `real` allows integers only."""

    NAMES = ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8")

    def __init__(self, name: str | bytes, *_):
        self.name, self.order = name.decode() if isinstance(name, bytes) else name, "|"

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1].decode() if isinstance(state[1], bytes) else state[1]

    def real(self) -> np.dtype:
        if self.name not in self.NAMES or self.order not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError(f"it holds an array of {self.name}")
        return np.dtype(self.order + self.name)


class _Array:
    """Stands for numpy.ndarray while a pickle is read."""

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, by_column, raw = state
        self.array = np.frombuffer(raw, dtype.real()).reshape(shape, order="F" if by_column else "C")


def _frombuffer(raw, dtype: _Dtype, shape: tuple, order: str) -> _Array:
    array = _Array()
    array.__setstate__((1, shape, dtype, order == "F", raw))
    return array


class PlainUnpickler(pickle.Unpickler):
    """Unpickle integer arrays and plain values. Any other global is refused before it is imported."""

    def __init__(self, data: bytes):
        super().__init__(io.BytesIO(data), encoding="bytes")
        self.left = len(data)
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            # The number of a memo entry also sets the size of the table that is allocated for it.
            if opcode.name.endswith("PUT") and argument > count:
                raise pickle.UnpicklingError("it asks for more memory than it can need")

    def find_class(self, module: str, name: str):
        core = module.removeprefix("numpy.").removeprefix("_core.").removeprefix("core.")  # NumPy 1 and 2
        known = {
            ("numpy", "ndarray"): _Array,
            ("numpy", "dtype"): _Dtype,
            ("multiarray", "_reconstruct"): lambda kind, shape, code: _Array(),
            ("numeric", "_frombuffer"): _frombuffer,  # protocol 5
            ("_codecs", "encode"): self._latin1,  # protocols 0 to 2 have no bytes
            ("__builtin__", "bytes"): lambda: b"",  # takes no size, which could ask for gigabytes
        }
        found = known.get((core if module.startswith("numpy.") else module, name))
        if found is None:
            raise pickle.UnpicklingError(f"it contains code ({module}.{name})")
        return found

    def _latin1(self, text: str, encoding: str) -> bytes:
        self.left -= len(text)
        if encoding != "latin1" or self.left < 0:  # more text than the file holds: the same text repeated
            raise pickle.UnpicklingError("it contains code (_codecs.encode)")
        return text.encode("latin1")
