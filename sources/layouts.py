"""`open_dataset`: open any supported dataset by name, without decoding images or importing torch."""

from __future__ import annotations

import os
import shlex
from dataclasses import replace
from pathlib import Path

from base.errors import DataError, UsageError, did_you_mean, nearest_path
from base.flags import DATASETS
from base.idle import NO_FILES, WITH_CLASS_LIST
from sources import folders, imagenet
from sources.cifar import cifar
from sources.generated import digits, synthetic
from sources.hub import hub
from sources.index import DatasetIndex, first_classes, hold_out, take_subset

ON_DISK = ("imagenet", "imagenet100", "tiny-imagenet", "cifar100", "cifar10")
WITH_ARGUMENT = ("synthetic", "hf")  # written after a colon: hf:<name>
NO_DATA = (
    "name your images with --data-dir; or try python train.py --config digits (--dataset digits needs no "
    "files); or download some: python download_imagenet.py --dataset cifar10"
)
# Files and folders that identify a dataset, for the case that --dataset names another one.
SIGNS = {
    "tiny-imagenet": ("val/val_annotations.txt", "tiny-imagenet-200"),
    "cifar100": ("cifar-100-python", "cifar-100-python.tar.gz"),
    "cifar10": ("cifar-10-batches-py", "cifar-10-python.tar.gz"),
    "imagenet100": ("train.X1",),
    "imagenet": ("ILSVRC", "Data/CLS-LOC"),
}


def open_dataset(
    dataset: str,
    data_dir: str | os.PathLike,
    *,
    split: str = "official",
    class_list: str | os.PathLike | None = None,
    allow_class_mismatch: bool = False,
    classes: int | None = None,
    holdout: float = 0,
    subset_size: int | None = None,
) -> DatasetIndex:
    """Find `dataset` in `data_dir` and index it, within seconds and without opening any image.

    dataset: one of `flags.DATASETS`; sizes may follow `synthetic` (`synthetic:classes=9,train=500,size=32`).
        For every dataset on disk, `data_dir` may also be a packed copy (pack_dataset.py).
    split: `70-30` pools Tiny ImageNet's train and val and draws 30 % of each class for validation.
    class_list: a file with one class name per line; only those are used (`WITH_CLASS_LIST`).
    allow_class_mismatch: accept validation data that lacks some of the training classes.
    classes: use only the first so many classes.
    holdout: validate on so many training images, or this share of them, held out (`index.hold_out`).
    subset_size: use a fixed, class-balanced subset of this many training images (`index.take_subset`).
    Raises UsageError for unknown or impossible values, and DataError for missing, damaged or unexpected data.
    """
    kind, colon, _ = dataset.partition(":")
    if kind not in ON_DISK + NO_FILES or (colon and kind not in WITH_ARGUMENT):
        hint = f"--data-dir {dataset}? " if os.path.isdir(dataset) else ""
        hint = f"did you mean {hint}" if hint else did_you_mean(dataset, ON_DISK + NO_FILES)
        raise UsageError(f"--dataset {dataset}: unknown dataset", f"{hint}use one of {DATASETS}")
    if split != "official" and dataset != "tiny-imagenet":
        what = f"--split {split} does not apply to --dataset {dataset}"
        raise UsageError(what, "leave it out: it is for tiny-imagenet")
    if class_list and dataset not in WITH_CLASS_LIST:
        what = f"--class-list does not apply to --dataset {dataset}"
        raise UsageError(what, f"leave it out: it is for {', '.join(WITH_CLASS_LIST)}")
    if kind in ON_DISK:
        index = _on_disk(dataset, os.fspath(data_dir), split, class_list, allow_class_mismatch)
    elif kind == "hf":
        index = hub(dataset)
    else:
        index = digits() if kind == "digits" else synthetic(dataset)
    index = first_classes(index, classes) if classes else index
    index = hold_out(index, holdout) if holdout else index
    if not subset_size:
        return index
    if subset_size > (images := len(index.train)):
        note = f"note: all {images:,} training images are used: --subset-size is {subset_size:,}"
        index = replace(index, notes=(*index.notes, note))
    return take_subset(index, subset_size, whole_val=bool(holdout))


def _on_disk(
    dataset: str, data_dir: str, split: str, class_list: str | os.PathLike | None, allow_class_mismatch: bool
) -> DatasetIndex:
    """Index the dataset in `data_dir`."""
    check_dir(data_dir)
    if any(os.path.isfile(os.path.join(data_dir, name)) for name in ("manifest.json", "packing.json")):
        from sources.packed import open_packed  # needs pyarrow

        return open_packed(data_dir)
    try:
        if dataset.startswith("cifar"):
            return cifar(data_dir, dataset)
        wanted = imagenet.read_class_list(class_list) if class_list else None
        checks = {"allow_class_mismatch": allow_class_mismatch}
        if dataset == "tiny-imagenet":
            return imagenet.tiny_imagenet(data_dir, wanted, split, **checks)
        layout = imagenet.imagenet if dataset == "imagenet" else imagenet.imagenet100
        return layout(data_dir, wanted, **checks)
    except DataError as error:
        raise DataError(error.what, _recognise(dataset, Path(data_dir)) or error.fix) from error


def check_dir(data_dir: str) -> None:
    """Raise DataError if `data_dir` does not exist or is empty."""
    path = os.path.abspath(data_dir)
    if os.path.isfile(data_dir):
        raise DataError(f"{path} is a file, not a directory", "name the directory that holds the images")
    if not os.path.isdir(data_dir):
        fix = nearest_path(data_dir) or NO_DATA
        raise DataError(f"no data directory at {path}", fix)
    if not folders.scan(os.fsencode(data_dir)):
        raise DataError(f"the data directory {path} is empty", folders.ACCEPTED)


def _recognise(dataset: str, data_dir: Path) -> str | None:
    """Return the fix if `data_dir` holds another dataset than the one named, or only archives, else None."""
    for other, paths in SIGNS.items():
        part_of = (dataset, other) == ("imagenet100", "imagenet")
        if other != dataset and not part_of and any((data_dir / path).exists() for path in paths):
            return f"this looks like --dataset {other}"
    if any(data_dir.glob("ILSVRC2012_img_*.tar")) and not (data_dir / "train").is_dir():
        where = shlex.quote(os.fspath(data_dir))
        return f"unpack the archives: python download_imagenet.py --method manual --data-dir {where}"
    return None
