"""Datasets read through Hugging Face `datasets`, which is imported only here and only on use."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence

import numpy as np

from base.errors import DataError, UsageError
from sources.index import DatasetIndex, Split

VALIDATION = ("validation", "valid", "val", "test")  # the first that has labels


class HubSplit(Split):
    """A table whose image column holds encoded files; memory-mapped by `datasets`."""

    def __init__(self, table, image: str, labels: np.ndarray, name: str):
        self.table, self.image, self.labels, self.title = table, image, labels, name

    def name(self, i: int) -> str:
        return f"{self.title}#{i}"

    def read(self, ids: Sequence[int]) -> list[bytes | np.ndarray]:
        rows = self.table[[int(i) for i in ids]][self.image]
        return [row["bytes"] or _read(row["path"]) for row in rows]

    def digest(self) -> str:
        return hashlib.sha256(self.labels.astype("<i8").tobytes() + self.title.encode()).hexdigest()


def hub(dataset: str) -> DatasetIndex:
    """`hf:<name>` or `hf:<name>:<configuration>`: any image classification dataset of the hub, or a local folder of it.

    It is downloaded on the first use, into Hugging Face's own cache, with the token `hf auth login` left.
    """
    _, name, *configuration = dataset.split(":")
    tables = _load(name, configuration)
    if "train" not in tables:
        raise DataError(
            f"{dataset} has no training split (it has {', '.join(tables)})", "choose another dataset"
        )
    image, label = _columns(dataset, tables["train"].features)
    names = getattr(tables["train"].features[label], "names", None)
    val = next(
        (key for key in VALIDATION if key in tables and min(tables[key][label], default=-1) >= 0), None
    )
    if val is None:
        raise DataError(
            f"{dataset} has no labelled validation split", f"it needs one of {', '.join(VALIDATION)}"
        )
    train = np.asarray(tables["train"][label], np.int64)
    classes = tuple(names) if names else tuple(str(k) for k in range(int(train.max()) + 1))
    return DatasetIndex(
        name=name.strip("/").rpartition("/")[2],
        classes=classes,
        train=HubSplit(_encoded(tables["train"], image), image, train, f"{name}/train"),
        val=HubSplit(
            _encoded(tables[val], image), image, np.asarray(tables[val][label], np.int64), f"{name}/{val}"
        ),
    )


def _load(name: str, configuration: list[str]):
    if not name or len(configuration) > 1:
        raise UsageError(
            f"--dataset hf:{name}: not a name", "write hf:<owner>/<name> or hf:<name>:<configuration>"
        )
    try:
        import datasets
    except ImportError as error:
        raise UsageError(f"--dataset hf:{name} needs the datasets package", "pip install datasets") from error
    if not os.isatty(2):
        datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(name, *configuration)
    except (
        Exception
    ) as error:  # a dozen kinds from four packages: offline, gated, no such name, no such configuration
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise DataError(
            f"Hugging Face datasets cannot load {name}: {reason}",
            "check the name and the network; a gated dataset needs its terms accepted there and `hf auth login`",
        ) from error


def _columns(dataset: str, features) -> tuple[str, str]:
    """The names of the image column and of the label column."""
    images = [key for key, kind in features.items() if type(kind).__name__ == "Image"]
    labels = [key for key, kind in features.items() if type(kind).__name__ == "ClassLabel"]
    labels += [key for key in ("label", "labels", "fine_label") if key in features and key not in labels]
    if not images or not labels:
        raise DataError(
            f"{dataset} is not an image classification dataset (its columns: {', '.join(features)})",
            "it needs an image column and a class label column",
        )
    return images[0], labels[0]


def _encoded(table, image: str):
    """The table with its images left as files: decoding is ours."""
    from datasets import Image

    return table.select_columns([image]).cast_column(image, Image(decode=False))


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()
