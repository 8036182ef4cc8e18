"""Datasets that need no download: scikit-learn's digits and computed images. Neither reads --data-dir."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from base.errors import UsageError
from sources.index import ArraySplit, DatasetIndex, Split, stratified_split

# Of all 1,797 images with pixels in [0, 1]; a test measures them.
DIGITS_MEAN, DIGITS_STD = 0.3053, 0.3759
SYNTHETIC = {"classes": 10, "train": 2000, "val": 500, "size": 64}  # defaults
# The labels of all images are kept in memory.
MAX_SYNTHETIC = {"classes": 100_000, "train": 100_000_000, "val": 100_000_000, "size": 4096}


def digits() -> DatasetIndex:
    """Index 1,797 real scans of handwritten digits, 8 x 8 px; a fifth of each class is held out.

    They are the test set of https://archive.ics.uci.edu/dataset/80, which comes with scikit-learn.
    """
    # Read load_digits' file directly: importing scikit-learn takes longer than all other preparations.
    package = importlib.util.find_spec("sklearn")
    if package is None:
        raise UsageError("--dataset digits comes with scikit-learn", "pip install scikit-learn")
    path = Path(package.origin).parent / "datasets/data/digits.csv.gz"
    rows = np.loadtxt(path, delimiter=",", dtype=np.int64)
    pixels, labels = rows[:, :64].reshape(-1, 8, 8, 1), rows[:, 64]
    grey = np.rint(pixels * (255 / 16)).astype(np.uint8)  # the scans have 17 levels, 0 ... 16
    images = np.repeat(grey, 3, axis=-1)
    train, val = (ArraySplit(images[i], labels[i]) for i in stratified_split(labels, 0.2, seed=0))
    mean, std = (DIGITS_MEAN,) * 3, (DIGITS_STD,) * 3
    return DatasetIndex("digits", tuple("0123456789"), train, val, mean, std, native_size=8)


def synthetic(dataset: str = "synthetic") -> DatasetIndex:
    """Index generated images that can be learned; `synthetic_sizes` explains what `dataset` may say."""
    sizes = synthetic_sizes(dataset)
    classes, size = sizes["classes"], sizes["size"]
    return DatasetIndex(
        name="synthetic",
        classes=tuple(f"pattern{k:0{len(str(classes - 1))}d}" for k in range(classes)),
        train=SyntheticSplit(classes, sizes["train"], size, stream=0),
        val=SyntheticSplit(classes, sizes["val"], size, stream=1),
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        native_size=size,
    )


def synthetic_sizes(dataset: str) -> dict[str, int]:
    """Parse `synthetic`, or any of `synthetic:classes=1000,train=1281167,val=50000,size=224` (px)."""
    sizes: dict[str, int] = {}
    for item in filter(None, dataset.partition(":")[2].split(",")):
        name, _, number = item.partition("=")
        # At most nine digits: Python's int() refuses thousands of them with an error of its own.
        valid = name in MAX_SYNTHETIC and name not in sizes and number.isdecimal() and len(number) < 10
        if not valid or not 1 <= int(number) <= MAX_SYNTHETIC[name]:
            limits = ", ".join(f"{name} up to {most:,}" for name, most in MAX_SYNTHETIC.items())
            raise UsageError(
                f"--dataset {dataset[:80]}: {item[:40]!r} is not a size of the synthetic dataset",
                f"write synthetic, or any of synthetic:classes=10,train=2000,val=500,size=64; {limits}",
            )
        sizes[name] = int(number)
    return SYNTHETIC | sizes


class SyntheticSplit(Split):
    """Images computed as they are read, each from (stream, id); only their labels take memory.

    A class is a mean colour and two coloured gratings; a sample draws their phases, a brightness and noise.
    So the class shows in colours and frequencies, which survive flips and crops.
    """

    def __init__(self, num_classes: int, count: int, size: int, stream: int):
        self.num_classes, self.size, self.stream = num_classes, size, stream
        self.labels = np.arange(count, dtype=np.int64) % num_classes

    def read(self, ids: Sequence[int]) -> list[bytes | np.ndarray]:
        return [self._image(int(i)) for i in ids]

    def digest(self) -> str:
        parameters = (self.num_classes, len(self), self.size, self.stream)
        return hashlib.sha256(repr(parameters).encode()).hexdigest()

    def _image(self, i: int) -> np.ndarray:
        """Compute sample `i`: (size, size, 3) uint8."""
        of_class = np.random.Generator(np.random.Philox(key=[self.labels[i], 0]))
        of_sample = np.random.Generator(np.random.Philox(key=[i, 1 + self.stream]))
        base = of_class.uniform(80, 176, 3) + of_sample.uniform(-16, 16)
        colours = of_class.uniform(-48, 48, (2, 3))
        cycles = of_class.uniform(1, 6, (2, 2))  # across the image, along y and x
        phases = of_sample.uniform(0, 1, 2)
        place = np.arange(self.size, dtype=np.float32) / self.size
        image = np.broadcast_to(base.astype(np.float32), (self.size, self.size, 3))
        for colour, (along_y, along_x), phase in zip(colours, cycles, phases, strict=True):
            y, x = 2 * np.pi * (along_y * place + phase), 2 * np.pi * along_x * place
            # cos(y + x), without a cosine per pixel
            wave = np.outer(np.cos(y), np.cos(x)) - np.outer(np.sin(y), np.sin(x))
            image = image + wave.astype(np.float32)[..., None] * colour.astype(np.float32)
        noise = of_sample.integers(-12, 13, image.shape, dtype=np.int8)
        return np.clip(image + noise, 0, 255).astype(np.uint8)
