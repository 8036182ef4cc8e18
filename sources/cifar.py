"""CIFAR-10 and CIFAR-100 from their python archives (https://www.cs.toronto.edu/~kriz/cifar.html).

The archives are pickles, and a pickle can run any code: this reader builds NumPy arrays and plain values only.
"""

from __future__ import annotations

import io
import os
import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from errors import DataError
from sources.index import ArraySplit, DatasetIndex

ALLOWED = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    # Where NumPy 1 and 2 keep the function that pickled arrays name.
    ("numpy.core.multiarray", "_reconstruct"): np.ndarray.__reduce__(np.empty(0))[0],
    ("numpy._core.multiarray", "_reconstruct"): np.ndarray.__reduce__(np.empty(0))[0],
}


@dataclass(frozen=True)
class Cifar:
    """One of the two datasets: file names, and keys inside them."""

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
    "cifar10", "cifar-10-batches-py", tuple(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta",
    b"labels", b"label_names", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616),
)  # fmt: skip
CIFAR100 = Cifar(
    "cifar100", "cifar-100-python", ("train",), "test", "meta",
    b"fine_labels", b"fine_label_names", (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762),
)  # fmt: skip


class PlainUnpickler(pickle.Unpickler):
    """Builds arrays and plain values; any other global in the pickle is refused before it is imported."""

    def find_class(self, module: str, name: str):
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it contains code ({module}.{name})")
        return ALLOWED[module, name]


def cifar(data_dir: str, which: Cifar) -> DatasetIndex:
    """50,000 + 10,000 images of 32 px, held in memory (180 MB)."""
    folder = _find(data_dir, which)
    names = tuple(str(name, "utf-8") for name in _load(folder / which.meta, which)[which.class_names])
    return DatasetIndex(
        name=which.name,
        classes=names,
        train=_split([_load(folder / name, which) for name in which.train], which, len(names)),
        val=_split([_load(folder / which.val, which)], which, len(names)),
        mean=which.mean,
        std=which.std,
        native_size=32,
    )


def _split(batches: list[dict], which: Cifar, num_classes: int) -> ArraySplit:
    rows = np.concatenate([batch[b"data"] for batch in batches])  # (n, 3072) uint8, channel by channel
    labels = np.concatenate([np.asarray(batch[which.labels], np.int64) for batch in batches])
    if rows.dtype != np.uint8 or rows.shape != (len(labels), 3072) or labels.min() < 0 or labels.max() >= num_classes:
        raise DataError(f"{which.folder}: {rows.shape} {rows.dtype} values for {len(labels)} labels", _again(which))
    images = rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return ArraySplit(np.ascontiguousarray(images), labels)


def _find(data_dir: str, which: Cifar) -> Path:
    for folder in (Path(data_dir, which.folder), Path(data_dir)):
        if (folder / which.meta).is_file():
            return folder
    raise DataError(
        f"no {which.folder}/ with a file {which.meta} in {os.path.abspath(data_dir)}",
        f"python download_imagenet.py --method simple --dataset {which.name} --data-dir {data_dir}",
    )


def _load(path: Path, which: Cifar) -> dict:
    try:
        content = PlainUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        return {key if isinstance(key, bytes) else str(key).encode(): value for key, value in content.items()}
    except (OSError, EOFError, pickle.UnpicklingError, ValueError, TypeError, KeyError, AttributeError, IndexError,
            MemoryError, OverflowError) as error:  # fmt: skip
        raise DataError(f"cannot read {path}: {error}", _again(which)) from error


def _again(which: Cifar) -> str:
    return f"fetch the archive again: python download_imagenet.py --method simple --dataset {which.name}"
