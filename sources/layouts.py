"""Every dataset we accept: `open_dataset` finds it by name in a folder. Decoding is elsewhere, and so is torch."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from base.errors import DataError, UsageError
from sources import folders
from sources.index import DatasetIndex, FileSplit, stratified_split, take_subset

DATASETS = (
    "imagenet",
    "imagenet100",
    "tiny-imagenet",
    "cifar100",
    "cifar10",
    "digits",
    "synthetic",
    "hf:<name>",
)
# Of 64 px training images, pixels in [0, 1].
TINY_MEAN, TINY_STD = (0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)


def open_dataset(
    dataset: str,
    data_dir: str | os.PathLike,
    *,
    split: str = "official",
    class_list: str | os.PathLike | None = None,
    allow_class_mismatch: bool = False,
    subset_size: int | None = None,
) -> DatasetIndex:
    """Find `dataset` in `data_dir`, within seconds and without opening any image.

    dataset: one of DATASETS; `synthetic` takes a size (`synthetic:classes=100,train=50000,val=1000,size=64`).
        For all that lie on disk, `data_dir` may also be a packed copy (pack_dataset.py).
    split: `70-30` pools Tiny ImageNet's train and val and draws 30 % of each class for validation
    class_list: a file of class names, one a line; only those are read (imagenet, imagenet100)
    allow_class_mismatch: accept validation data that lacks some of the training classes
    subset_size: only a fixed, class-balanced draw of so many training images (`index.take_subset`)
    Raises UsageError for what nobody knows and DataError for data that is not as expected.
    """
    data_dir, kind = os.fspath(data_dir), dataset.partition(":")[0]
    if kind not in [name.partition(":")[0] for name in DATASETS] or (
        ":" in dataset and kind not in ("hf", "synthetic")
    ):
        raise UsageError(f"--dataset {dataset}: not a dataset we know", f"one of {', '.join(DATASETS)}")
    if split != "official" and dataset != "tiny-imagenet":
        raise UsageError(
            f"--split {split} with --dataset {dataset}", "only tiny-imagenet has more than one split"
        )
    if class_list and dataset not in ("imagenet", "imagenet100"):
        raise UsageError(
            f"--class-list with --dataset {dataset}", "class lists are for imagenet and imagenet100"
        )
    found = _whole(dataset, data_dir, split, class_list, allow_class_mismatch)
    if subset_size and subset_size > (images := len(found.train)):
        all_of_them = f"note: --subset-size {subset_size:,} of {images:,} training images: all are used"
        found = replace(found, notes=(*found.notes, all_of_them))
    return take_subset(found, subset_size) if subset_size else found


def _whole(
    dataset: str, data_dir: str, split: str, class_list: str | os.PathLike | None, allow_class_mismatch: bool
) -> DatasetIndex:
    if dataset.partition(":")[0] in ("digits", "synthetic", "hf"):
        return _without_folder(dataset)
    check_dir(data_dir)
    if os.path.isfile(os.path.join(data_dir, "manifest.json")):
        from sources.packed import open_packed

        return open_packed(data_dir)
    try:
        return _in_folder(dataset, data_dir, split, class_list, allow_class_mismatch)
    except DataError as error:
        raise DataError(error.what, recognise(dataset, Path(data_dir)) or error.fix) from error


def _without_folder(dataset: str) -> DatasetIndex:
    if dataset == "digits":
        from sources.generated import digits

        return digits()
    if dataset.startswith("hf:"):
        from sources.hub import hub

        return hub(dataset)
    from sources.generated import synthetic

    return synthetic(dataset)


def _in_folder(
    dataset: str, data_dir: str, split: str, class_list, allow_class_mismatch: bool
) -> DatasetIndex:
    if dataset in ("cifar10", "cifar100"):
        from sources.cifar import CIFAR10, CIFAR100, cifar

        return cifar(data_dir, CIFAR10 if dataset == "cifar10" else CIFAR100)
    if dataset == "tiny-imagenet":
        return tiny_imagenet(data_dir, split, allow_class_mismatch=allow_class_mismatch)
    from sources.imagenet import imagenet, imagenet100

    layout = imagenet100 if dataset == "imagenet100" else imagenet
    return layout(data_dir, class_list, allow_class_mismatch=allow_class_mismatch)


def check_dir(data_dir: str) -> None:
    """Stop here when there is nothing at all in `data_dir`."""
    where = os.path.abspath(data_dir)
    if not os.path.isdir(data_dir):
        raise DataError(f"no data directory at {where}", f"check --data-dir; {folders.ACCEPTED}")
    if not any(folders.scan(os.fsencode(data_dir))):
        raise DataError(f"the data directory {where} is empty", folders.ACCEPTED)


def tiny_imagenet(data_dir: str, split: str, **checks: bool) -> DatasetIndex:
    """Tiny ImageNet as published: train/<class>/images/, val/images/ + val_annotations.txt (or val/<class>/).

    200 classes of 500 + 50 images, 64 px; `70-30` makes 77,000 / 33,000 of them.
    """
    from sources.imagenet import human_names

    root = next(
        (p for p in (data_dir, os.path.join(data_dir, "tiny-imagenet-200")) if os.path.isdir(p + "/train")),
        None,
    )
    if root is None or not os.path.isdir(os.path.join(root, "val")):
        raise DataError(
            f"no Tiny ImageNet in {os.path.abspath(data_dir)} (train/ and val/, or tiny-imagenet-200/)",
            f"python download_imagenet.py --method simple --dataset tiny-imagenet --data-dir {data_dir}",
        )
    train = folders.list_classes(root, "train")
    train.others = [name for name in train.others if not name.endswith(b"_boxes.txt")]  # published with it
    annotations = os.path.join(root, "val", "val_annotations.txt")
    if os.path.isfile(annotations) and os.path.isdir(os.path.join(root, "val", "images")):
        val = folders.list_labelled(root, "val/images", _annotations(annotations))
    else:
        val = folders.list_classes(root, "val")
    extra = {"mean": TINY_MEAN, "std": TINY_STD, "native_size": 64}
    found = folders.from_listings("tiny-imagenet", train, val, **extra, **checks)
    names = human_names(found.classes, Path(root))
    return replace(pooled(found, 0.3) if split == "70-30" else found, class_names=names)


def _annotations(path: str) -> dict[bytes, bytes]:
    """val_annotations.txt: image name, class and box, separated by tabs -> {name without ending: class}."""
    with open(path, "rb") as file:
        rows = [line.split(b"\t") for line in file]
    return {os.path.splitext(row[0])[0]: row[1].strip() for row in rows if len(row) > 1}


def pooled(index: DatasetIndex, val_fraction: float) -> DatasetIndex:
    """Train and val as one pool, split anew: `val_fraction` of every class, drawn with a fixed seed."""
    names = [index.train.names[i] for i in range(len(index.train))] + [
        index.val.names[i] for i in range(len(index.val))
    ]
    labels = np.concatenate([index.train.labels, index.val.labels])
    parts = stratified_split(labels, val_fraction, seed=0)
    train, val = (FileSplit(index.train.root, [names[i] for i in ids], labels[ids]) for ids in parts)
    return replace(index, train=train, val=val)


def recognise(dataset: str, data_dir: Path) -> str | None:
    """The fix, where `data_dir` holds another dataset than the one that was named."""
    signs = {
        "tiny-imagenet": ("val/val_annotations.txt", "tiny-imagenet-200"),
        "cifar100": ("cifar-100-python", "cifar-100-python.tar.gz"),
        "cifar10": ("cifar-10-batches-py", "cifar-10-python.tar.gz"),
        "imagenet100": ("train.X1",),
        "imagenet": ("ILSVRC", "Data/CLS-LOC"),
    }
    for other, paths in signs.items():
        if other != dataset and any((data_dir / path).exists() for path in paths):
            return f"this looks like --dataset {other}"
    if any(data_dir.glob("ILSVRC2012_img_*.tar")):
        return f"unpack the archives: python download_imagenet.py --method manual --data-dir {data_dir}"
    return None


index = open_dataset  # the former name, until every caller has the new one
