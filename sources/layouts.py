"""Every dataset layout we accept: `index` finds what lies in a folder. Decoding is elsewhere; no torch."""

from __future__ import annotations

import os

from errors import DataError, UsageError
from sources import folders, generated
from sources.index import DatasetIndex

DATASETS = ("imagenet", "folders", "digits", "synthetic")

ACCEPTED = (
    "lay it out as train/<class>/*.JPEG and val/<class>/*.JPEG, or give the folder of a dataset as it was "
    "published with its --dataset (README, 'Datasets', shows every tree)"
)


def index(
    dataset: str,
    data_dir: str | os.PathLike,
    *,
    split: str = "official",
    class_list: str | os.PathLike | None = None,
    allow_class_mismatch: bool = False,
) -> DatasetIndex:
    """Find `dataset` in `data_dir`, within seconds and without opening any image.

    dataset: one of DATASETS, where `synthetic` takes a size (`synthetic:classes=100,train=50000`)
    allow_class_mismatch: accept validation data that lacks some of the training classes
    Raises UsageError for a name nobody knows and DataError for data that is not as expected.
    """
    data_dir = os.fspath(data_dir)
    if dataset.partition(":")[0] == "synthetic":
        return generated.synthetic(dataset)
    if dataset == "digits":
        return generated.digits()
    if dataset not in DATASETS:
        raise UsageError(f"--dataset {dataset}: not a dataset we know", f"one of {', '.join(DATASETS)}")
    check_dir(data_dir)
    name = {"imagenet": "imagenet_1k"}.get(dataset, dataset)
    return class_folders(data_dir, name, allow_class_mismatch=allow_class_mismatch)


def check_dir(data_dir: str) -> None:
    """Stop here when there is nothing at all in `data_dir`."""
    where = os.path.abspath(data_dir)
    if not os.path.isdir(data_dir):
        raise DataError(f"no data directory at {where}", f"check --data-dir; {ACCEPTED}")
    with os.scandir(data_dir) as entries:
        if next(entries, None) is None:
            raise DataError(f"the data directory {where} is empty", ACCEPTED)


def class_folders(
    data_dir: str, name: str, train: tuple[str, ...] = ("train",), val: tuple[str, ...] = ("val",), **checks: bool
) -> DatasetIndex:
    """train/<class>/... and val/<class>/..., where a class may lie in several folders (train.X1, train.X2)."""
    for folder in (*train, *val):
        if not os.path.isdir(os.path.join(data_dir, folder)):
            raise DataError(f"no folder {folder}/ in {os.path.abspath(data_dir)}", ACCEPTED)
    return from_listings(name, folders.list_classes(data_dir, *train), folders.list_classes(data_dir, *val), **checks)


def from_listings(
    name: str, train: folders.Listing, val: folders.Listing, *, allow_class_mismatch: bool = False, **extra
) -> DatasetIndex:
    """An index whose classes are the training folders; validation is mapped by them."""
    where = os.path.abspath(os.fsdecode(train.root))
    if not train.by_class:
        raise DataError(f"no class folders for training in {where}", ACCEPTED)
    if train.empty():
        raise DataError(
            f"classes without a single training image in {where}: {_all(train.empty())}",
            f"fill or remove these folders (images end in {_all(folders.IMAGE_ENDINGS)})",
        )
    classes = train.classes
    filled = {key for key in val.by_class if val.by_class[key]}
    unknown, missing = sorted(set(val.by_class) - set(classes)), [key for key in classes if key not in filled]
    if not filled:
        raise DataError(f"no validation images in class folders in {where}", ACCEPTED)
    if unknown or (missing and not allow_class_mismatch):
        raise DataError(
            f"training and validation classes differ in {where}: "
            + "; ".join(
                f"{what}: {_all(keys)}" for what, keys in (("only in train", missing), ("only in val", unknown)) if keys
            ),
            "give both the same class folders" if unknown else "complete val, or pass --allow-class-mismatch",
        )
    return DatasetIndex(
        name=name,
        classes=tuple(os.fsdecode(key) for key in classes),
        train=train.split(classes),
        val=val.split(classes),
        notes=tuple(train.notes("train") + val.notes("val")),
        **extra,
    )


def _all(names: list[bytes] | tuple[bytes, ...]) -> str:
    return ", ".join(os.fsdecode(name) for name in names)
