"""Read datasets from the Hugging Face Hub through `datasets`, which only this module imports."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from base.errors import DataError, UsageError
from sources.index import DatasetIndex, Split, safe_name

VALIDATION = ("validation", "valid", "val", "test")  # the first of these that has labels is used


class HubSplit(Split):
    """A memory-mapped table of `datasets`, whose column `image` holds encoded files."""

    def __init__(self, table, image: str, labels: np.ndarray, title: str):
        from datasets import Image

        # `sources.decode` decodes the files, not `datasets`.
        self.table = table.select_columns([image]).cast_column(image, Image(decode=False))
        self.image, self.labels, self.title = image, labels, title

    def name(self, i: int) -> str:
        return f"{self.title}#{i}"

    def read(self, ids: Sequence[int]) -> list[bytes | np.ndarray]:
        rows = self.table[[int(i) for i in ids]][self.image]
        return [_file(row) for row in rows]

    def digest(self) -> str:
        return hashlib.sha256(self.labels.astype("<i8").tobytes() + self.title.encode()).hexdigest()


def _file(row: dict | None) -> bytes:
    """Return an encoded image; of a row without one b"", which is a bad image."""
    if not row or not (row["bytes"] or row["path"]):
        return b""
    return row["bytes"] or Path(row["path"]).read_bytes()


def hub(dataset: str) -> DatasetIndex:
    """Index `hf:<name>` or `hf:<name>:<configuration>`: a dataset of the Hub, or a local folder like one.

    The first use downloads it into Hugging Face's cache, with the token that `hf auth login` saved.
    """
    _, _, name = dataset.partition(":")
    name, *configuration = name.split(":")
    if not name or len(configuration) > 1:
        fix = "write hf:<owner>/<name> or hf:<name>:<configuration>"
        raise UsageError(f"--dataset {dataset} does not name a dataset", fix)
    tables = _load(name, configuration)
    if "train" not in tables:
        what = f"{dataset} has no training split (it has {', '.join(tables)})"
        raise DataError(what, "choose another dataset")
    image, label = _columns(dataset, tables["train"].features)
    if not getattr(tables["train"].features[label], "dtype", "").startswith(("int", "uint")):
        raise DataError(f"the labels of {dataset} are not class numbers", "choose another dataset")

    def labels(part: str) -> np.ndarray:  # without [:], datasets 4 would read each row by itself
        return np.asarray([-1 if k is None else k for k in tables[part][label][:]], np.int64)

    parts = (part for part in VALIDATION if part in tables and min(labels(part), default=-1) >= 0)
    validation = next(parts, None)
    if validation is None:
        what = f"{dataset} has no labelled validation split"
        raise DataError(what, f"choose a dataset with one of {', '.join(VALIDATION)}")
    train, val = (HubSplit(tables[p], image, labels(p), f"{name}/{p}") for p in ("train", validation))
    classes = getattr(tables["train"].features[label], "names", None) or range(train.labels.max() + 1)
    for split in (train, val):
        if len(wrong := split.labels[(split.labels < 0) | (split.labels >= len(classes))]):
            what = f"column {label} of {split.title} holds {wrong[0]}, none of the {len(classes)} classes"
            raise DataError(what, "choose another dataset, or a copy of this one without such rows")
    exif = "imagenet" not in name.lower()
    return DatasetIndex(safe_name(name), tuple(map(str, classes)), train, val, exif=exif)


def _load(name: str, configuration: list[str]):
    try:
        import datasets
    except ImportError as error:
        raise UsageError(f"--dataset hf:{name} needs the datasets package", "pip install datasets") from error
    if not os.isatty(2):
        datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(name, *configuration)
    except Exception as error:  # a dozen types from four packages: offline, gated, unknown name, ...
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise DataError(
            f"Hugging Face datasets cannot load {name}: {reason}",
            "check the name and the network; for a gated dataset, accept its terms and run `hf auth login`",
        ) from error


def _columns(dataset: str, features) -> tuple[str, str]:
    """Return the names of the image column and of the label column."""
    images = [key for key, kind in features.items() if type(kind).__name__ == "Image"]
    labels = [key for key, kind in features.items() if type(kind).__name__ == "ClassLabel"]
    labels += [key for key in ("label", "labels", "fine_label") if key in features]
    if not images or not labels:
        what = f"{dataset} is not an image classification dataset (its columns: {', '.join(features)})"
        raise DataError(what, "choose a dataset with an image column and a class label column")
    return images[0], labels[0]
