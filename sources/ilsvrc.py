"""From ILSVRC's archives to class folders: names, labels, filing, counts. How an archive is read is in `unpack`."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from base.errors import DataError
from sources import folders
from sources.archives.unpack import FOLDER, PLAIN, REMARK, Member, tar_members, unexpected
from sources.imagenet import flat_val_labels

VAL_IMAGE = re.compile(r"(?:val/)?(ILSVRC2012_val_\d{8})\.JPEG")
DEVKIT_FOLDER = "ILSVRC2012_devkit_t12"


def train_members(members: Iterator[Member]) -> Iterator[Member]:
    """The images of ILSVRC2012_img_train.tar, a tar file of one tar file per class, as <class>/<image>."""
    for outer in members:
        if outer.kind in (FOLDER, REMARK):
            continue
        if outer.kind != PLAIN or not re.fullmatch(r"n\d{8}\.tar", outer.name):
            raise unexpected(outer.name)
        for image in tar_members(outer):
            image.name = f"{outer.name[:9]}/{image.name}"
            yield image


def train_place(name: str) -> str:
    """Where a training image belongs: <class>/<class>_<number>.JPEG, and nowhere else."""
    if not re.fullmatch(r"(n\d{8})/\1_\d+\.JPEG", name):
        raise unexpected(name)
    return name


def val_place(labels: dict[bytes, bytes]) -> Callable[[str], str]:
    """Where a validation image belongs: in its class's folder."""

    def place(name: str) -> str:
        found = VAL_IMAGE.fullmatch(name)
        label = labels.get(found[1].encode(), b"").decode() if found else ""
        if not re.fullmatch(r"n\d{8}", label):  # the label becomes a folder's name
            raise unexpected(name)
        return f"{label}/{found[1]}.JPEG"

    return place


def devkit_place(name: str) -> str | None:
    """Of the development kit only the validation labels are of use."""
    inside = name.removeprefix("./").removeprefix(DEVKIT_FOLDER + "/")
    return inside if inside in ("data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt") else None


def has_val_labels(data_dir: Path) -> bool:
    try:
        return bool(val_labels(data_dir))
    except DataError:
        return False


def val_labels(data_dir: Path) -> dict[bytes, bytes]:
    """{image name without ending: class}, from the development kit, Kaggle's list or the annotations in `data_dir`."""
    return flat_val_labels(os.fspath(data_dir), os.fspath(data_dir))


def val_state(data_dir: Path) -> str:
    """Of val/: "absent", "flat" (images without class folders, or being filed), or "arranged"."""
    if (data_dir / "val.flat").exists():
        return "flat"
    if not (data_dir / "val").exists():
        return "absent"
    return "arranged" if folders.count_classes(data_dir / "val") else "flat"


def file_flat_val(data_dir: Path, labels: dict[bytes, bytes]) -> None:
    """Move the images of a flat val/ into class folders. Stopped anywhere, the next call goes on.

    While it runs there is no val/, only val.flat/ and val.filed/: half a validation set never looks whole.
    """
    final, flat, filed = data_dir / "val", data_dir / "val.flat", data_dir / "val.filed"
    source = flat if flat.exists() else final
    moves = folders.list_labelled(source, "", labels).by_class  # every image has a label, or nothing is moved
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
    except OSError:  # .DS_Store and the like are left in it
        os.rename(flat, data_dir / "val.leftovers")


def check_counts(data_dir: Path, train_images: int, val_images: int, classes: int) -> None:
    """All of ImageNet is there, or a DataError that names every difference."""
    train, val = folders.list_classes(data_dir, "train"), folders.list_classes(data_dir, "val")
    per_class = val_images // classes
    wrong = []
    for what, listing, images in (("train", train, train_images), ("val", val, val_images)):
        if len(listing) != images or len(listing.by_class) != classes:
            wrong.append(
                f"{what}/ has {len(listing):,} images of {len(listing.by_class):,} classes, "
                f"{images:,} of {classes:,} expected"
            )
    uneven = [name for name in val.classes if len(val.by_class[name]) != per_class]
    if uneven:
        wrong.append(f"val classes without exactly {per_class} images: {folders.some(uneven)}")
    differ = sorted(set(train.by_class) ^ set(val.by_class))
    if differ:
        wrong.append(f"classes in only one of train/ and val/: {folders.some(differ)}")
    if wrong:
        raise DataError(
            f"{data_dir}: " + "; ".join(wrong),
            "remove the folder that is not right and run this again: it is unpacked anew",
        )
