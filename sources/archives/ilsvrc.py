"""ImageNet's published archives: where each image belongs, the validation labels, and the expected counts."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from base.errors import DataError
from sources import folders
from sources.archives.unpack import FILE, FOLDER, REMARK, Member, tar_members, unexpected

VAL_IMAGE = re.compile(r"(?:val/)?(ILSVRC2012_val_\d{8})\.JPEG")
DEVKIT_FOLDER = "ILSVRC2012_devkit_t12"
DEVKIT_LABELS = ("data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt")


def train_members(members: Iterator[Member]) -> Iterator[Member]:
    """Yield the images of ILSVRC2012_img_train.tar, which holds a tar file per class, as <class>/<image>."""
    for outer in members:
        if outer.kind in (FOLDER, REMARK):
            continue
        if outer.kind != FILE or not re.fullmatch(r"n\d{8}\.tar", outer.name):
            raise unexpected(outer.name)
        for image in tar_members(outer.stream, outer):
            image.name = f"{outer.name[:9]}/{image.name}"
            yield image


def train_place(name: str) -> str:
    """Return where a training image belongs: <class>/<class>_<number>.JPEG, and nowhere else."""
    if not re.fullmatch(r"(n\d{8})/\1_\d+\.JPEG", name):
        raise unexpected(name)
    return name


def val_place(labels: dict[bytes, bytes]) -> Callable[[str], str]:
    """Return a function that maps a validation image to its place: the folder of its class."""

    def place(name: str) -> str:
        found = VAL_IMAGE.fullmatch(name)
        label = labels.get(found[1].encode(), b"").decode() if found else ""
        if not re.fullmatch(r"n\d{8}", label):  # the label becomes the name of a folder
            raise unexpected(name)
        return f"{label}/{found[1]}.JPEG"

    return place


def devkit_place(name: str) -> str | None:
    """Return where a file of the development kit belongs, or None for all but the validation labels."""
    inside = name.removeprefix("./").removeprefix(DEVKIT_FOLDER + "/")
    return inside if inside in DEVKIT_LABELS else None


def val_state(data_dir: Path) -> str:
    """Return "absent", "flat" (not, or only partly, moved into class folders) or "filed" (all moved)."""
    if not (data_dir / "val").exists():
        return "flat" if (data_dir / "val.flat").exists() else "absent"
    return "filed" if folders.class_names(data_dir / "val") else "flat"


def file_flat_val(data_dir: Path, labels: dict[bytes, bytes]) -> None:
    """Move the images of a flat val/ into class folders, or continue an interrupted call.

    Until all are moved there is no val/, only val.flat/ and val.filed/, so that no part looks complete.
    Raises DataError, before any move, if a label is missing.
    """
    final, flat, filed = data_dir / "val", data_dir / "val.flat", data_dir / "val.filed"
    source = flat if flat.exists() else final
    moves = folders.list_labelled(source, "", labels).by_class
    if source is final:
        os.rename(final, flat)
    filed.mkdir(exist_ok=True)
    for label, names in moves.items():
        target = filed / os.fsdecode(label)
        target.mkdir(exist_ok=True)
        for name in names:
            os.rename(flat / os.fsdecode(name), target / os.fsdecode(os.path.basename(name)))
    os.rename(filed, final)
    try:
        flat.rmdir()
    except OSError:  # not empty: .DS_Store and the like
        os.rename(flat, data_dir / "val.leftovers")


def check_counts(data_dir: Path, train_images: int, val_images: int, classes: int) -> None:
    """Raise DataError, naming every difference, if `data_dir` does not hold all of ImageNet."""
    train, val = folders.list_classes(data_dir, "train"), folders.list_classes(data_dir, "val")
    problems = []
    for part, listing, images in (("train", train, train_images), ("val", val, val_images)):
        if len(listing) != images or len(listing.by_class) != classes:
            found = f"{len(listing):,} images of {len(listing.by_class):,} classes"
            problems.append(f"{part}/ has {found}, {images:,} of {classes:,} expected")
    per_class = val_images // classes
    uneven = [name for name in val.classes if len(val.by_class[name]) != per_class]
    if uneven:
        problems.append(f"val classes without exactly {per_class} images: {folders.some(uneven)}")
    differ = sorted(set(train.by_class) ^ set(val.by_class))
    if differ:
        problems.append(f"classes in only one of train/ and val/: {folders.some(differ)}")
    if problems:
        fix = "delete what is incomplete and run the same command again, or train on what is there"
        raise DataError(f"{data_dir}: {'; '.join(problems)}", fix)
