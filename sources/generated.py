"""Datasets that need no download: scikit-learn's digits and generated images. Nothing in --data-dir is read here."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from base.errors import UsageError
from sources.index import ArraySplit, DatasetIndex, Split, stratified_split

# Of the 1,797 images, pixels in [0, 1]; tests/test_layouts.py measures them.
DIGITS_MEAN, DIGITS_STD = 0.3053, 0.3759


def digits() -> DatasetIndex:
    """1,797 real scans of handwritten digits, 8 x 8, a fifth of every class for validation.

    Source: the test set of https://archive.ics.uci.edu/dataset/80, bundled with scikit-learn.
    """
    # The file that load_digits reads; importing scikit-learn for it takes longer than everything else before training.
    package = importlib.util.find_spec("sklearn")
    if package is None:
        raise UsageError("--dataset digits is bundled with scikit-learn", "pip install scikit-learn")
    rows = np.loadtxt(
        Path(package.origin).parent / "datasets/data/digits.csv.gz", delimiter=",", dtype=np.int64
    )
    pixels, labels = rows[:, :64].reshape(-1, 8, 8), rows[:, 64]
    grey = np.rint(pixels * (255 / 16)).astype(np.uint8)  # the scans have 17 levels, 0 ... 16
    images = np.repeat(grey[..., None], 3, axis=-1)
    train, val = stratified_split(labels, val_fraction=0.2, seed=0)
    return DatasetIndex(
        name="digits",
        classes=tuple("0123456789"),
        train=ArraySplit(images[train], labels[train]),
        val=ArraySplit(images[val], labels[val]),
        mean=(DIGITS_MEAN,) * 3,
        std=(DIGITS_STD,) * 3,
        native_size=8,
    )


# What one process can hold: labels are kept, pixels are computed.
MOST_SYNTHETIC = {"classes": 100_000, "train": 100_000_000, "val": 100_000_000, "size": 4096}


@dataclass(frozen=True)
class SyntheticSize:
    """How much of the synthetic dataset there is; `parse` reads it from the dataset's name."""

    classes: int = 10
    train: int = 2000
    val: int = 500
    size: int = 64  # px

    @classmethod
    def parse(cls, dataset: str) -> SyntheticSize:
        """`synthetic`, or with any of `synthetic:classes=1000,train=1281167,val=50000,size=224`."""
        given: dict[str, int] = {}
        for item in filter(None, dataset.partition(":")[2].split(",")):
            name, _, number = item.partition("=")
            most = MOST_SYNTHETIC.get(name, 0)
            # Ten digits at most: int() of thousands of them is refused by Python in words of its own.
            if name in given or not (number.isdecimal() and len(number) < 10 and 1 <= int(number) <= most):
                limits = ", ".join(f"{name} up to {most:,}" for name, most in MOST_SYNTHETIC.items())
                raise UsageError(
                    f"--dataset {dataset[:80]}: {item[:40]!r} is no size of the synthetic dataset",
                    f"write synthetic, or any of synthetic:classes=10,train=2000,val=500,size=64; {limits}",
                )
            given[name] = int(number)
        return cls(**given)


class SyntheticSplit(Split):
    """Images computed when they are read, each from (stream, id): any number of them costs no memory.

    A class is a mean colour and two coloured gratings; a sample draws their phases, a brightness and
    noise. So a class is seen in colours and frequencies, which no flip or crop takes away.
    """

    def __init__(self, num_classes: int, count: int, size: int, stream: int):
        self.num_classes, self.size, self.stream = num_classes, size, stream
        self.labels = np.arange(count, dtype=np.int64) % num_classes

    def read(self, ids: Sequence[int]) -> list[bytes | np.ndarray]:
        return [self._image(int(i)) for i in ids]

    def digest(self) -> str:
        return hashlib.sha256(
            repr((self.num_classes, len(self), self.size, self.stream)).encode()
        ).hexdigest()

    def _image(self, i: int) -> np.ndarray:
        """Sample `i`: (size, size, 3) uint8."""
        of_class = np.random.Generator(np.random.Philox(key=[self.labels[i], 0]))
        of_sample = np.random.Generator(np.random.Philox(key=[i, 1 + self.stream]))
        base = of_class.uniform(80, 176, 3) + of_sample.uniform(-16, 16)
        colours = of_class.uniform(-48, 48, (2, 3))
        cycles = of_class.uniform(1, 6, (2, 2))  # across the image, along y and x
        turns = of_sample.uniform(0, 1, 2)
        place = np.arange(self.size, dtype=np.float32) / self.size
        image = np.broadcast_to(base.astype(np.float32), (self.size, self.size, 3))
        for colour, (along_y, along_x), turn in zip(colours, cycles, turns, strict=True):
            y, x = 2 * np.pi * (along_y * place + turn), 2 * np.pi * along_x * place
            # cos(y + x), without a cosine per pixel
            wave = np.outer(np.cos(y), np.cos(x)) - np.outer(np.sin(y), np.sin(x))
            image = image + wave.astype(np.float32)[..., None] * colour.astype(np.float32)
        noise = of_sample.integers(-12, 13, image.shape, dtype=np.int8)
        return np.clip(image + noise, 0, 255).astype(np.uint8)


def synthetic(dataset: str = "synthetic") -> DatasetIndex:
    """Learnable generated images; how many and how large is said by the name (see `SyntheticSize.parse`)."""
    how = SyntheticSize.parse(dataset)
    return DatasetIndex(
        name="synthetic",
        classes=tuple(f"pattern{k:0{len(str(how.classes - 1))}d}" for k in range(how.classes)),
        train=SyntheticSplit(how.classes, how.train, how.size, stream=0),
        val=SyntheticSplit(how.classes, how.val, how.size, stream=1),
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        native_size=how.size,
    )
