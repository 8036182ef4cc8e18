"""Find ImageNet (ILSVRC 2012), ImageNet-100 and Tiny ImageNet in the layouts they are published in.

ImageNet: train/<class> and val/<class>; the same with a flat val/ and its labels nearby; Kaggle's tree
ILSVRC/Data/CLS-LOC/{train,val} with LOC_val_solution.csv or ILSVRC/Annotations.
"""

from __future__ import annotations

import csv
import os
import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from base.errors import DataError
from sources import folders, splits
from sources.index import DatasetIndex, FileSplit, safe_name, stratified_split

Labels = Iterator[tuple[bytes, bytes]]  # (image name without extension, class)
Parts = dict[str, list[str]]  # "train" and "val" -> the folders that hold its class folders

PARTS: Parts = {"train": ["train"], "val": ["val"]}
WORDNET_ID = re.compile(r"n\d{8}\b")
HERE = Path(__file__).parent
OTHER_VALS = ("valid", "validation", "Val", "test")  # what others call val/
XML_BYTES = 1 << 20  # limit of what is read of an annotation; real ones have a few hundred bytes
NUM_TRAIN, NUM_VAL, NUM_CLASSES = 1_281_167, 50_000, 1000
LABEL_PLACES = "LOC_val_solution.csv, Annotations/CLS-LOC/val/*.xml or ILSVRC2012_devkit_t12/data/"
TINY_MEAN, TINY_STD = (0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)  # of the training images


def imagenet(data_dir: str, wanted: set[bytes] | None, **checks: bool) -> DatasetIndex:
    """Index class folders or the ILSVRC/Kaggle tree; only the `wanted` classes, if given.

    Classes that are not WordNet ids are somebody's own, under the name of their folder.
    """
    folder = Path(os.path.abspath(data_dir))
    name = safe_name(folder.parent if folder.name == "train" else folder)
    if splits.lacks_parts(data_dir):
        index = splits.class_folders(name, data_dir, _listed(data_dir, [""], wanted))
        index = replace(index, class_names=human_names(index.classes, folder), exif=_are_own(index.classes))
        if checks.get("allow_class_mismatch"):
            note = "note: --allow-class-mismatch is not used: a part of every class is for validation"
            index = replace(index, notes=(*index.notes, note))
    else:
        index = _index(name, data_dir, image_root(data_dir), PARTS, wanted, **checks)
    return index if index.exif else replace(index, name="imagenet_1k")


def imagenet100(data_dir: str, wanted: set[bytes] | None, **checks: bool) -> DatasetIndex:
    """Index 100 classes: Kaggle's copy (train.X1 ...), class folders, or a list of classes of ImageNet.

    Without `wanted`, ImageNet is cut down by imagenet100.txt (https://arxiv.org/abs/1906.05849), and
    a tree of up to 100 classes is used as it is.
    """
    train, val = (sorted(p.name for p in Path(data_dir).glob(f"{part}.X*") if p.is_dir()) for part in PARTS)
    if train:
        parts = {"train": train, "val": val or ["val"]}
        return _index("imagenet100", data_dir, data_dir, parts, wanted, **checks)
    root = image_root(data_dir)
    if wanted is None and len(folders.class_names(os.path.join(root, "train"))) > 100:
        wanted = read_class_list(HERE / "imagenet100.txt")
    return _index("imagenet100", data_dir, root, PARTS, wanted, **checks)


def tiny_imagenet(data_dir: str, wanted: set[bytes] | None, split: str, **checks: bool) -> DatasetIndex:
    """Index Tiny ImageNet: train/<class>/images/, and val/images/ with val_annotations.txt or val/<class>/.

    It has 200 classes with 500 + 50 images of 64 px. Split `70-30` redistributes them as 77,000 + 33,000.
    """
    root = next((p for p in (data_dir, f"{data_dir}/tiny-imagenet-200") if os.path.isdir(f"{p}/train")), None)
    if root is None or not os.path.isdir(f"{root}/val"):
        raise DataError(
            f"no Tiny ImageNet in {os.path.abspath(data_dir)} (train/ and val/, or tiny-imagenet-200/)",
            "python download_imagenet.py --method simple --dataset tiny-imagenet --data-dir "
            + shlex.quote(os.fspath(data_dir)),
        )
    train = _listed(root, ["train"], wanted)
    train.others = [name for name in train.others if not name.endswith(b"_boxes.txt")]  # published with it
    annotations = Path(root, "val", "val_annotations.txt")
    if annotations.is_file() and os.path.isdir(f"{root}/val/images"):
        rows = [line.split(b"\t") for line in annotations.read_bytes().splitlines()]  # name, class, box
        labels = {os.path.splitext(row[0])[0]: row[1].strip() for row in rows if len(row) > 1}
        val = folders.list_labelled(root, "val/images", labels, only=wanted)
    else:
        val = folders.list_classes(root, "val", only=wanted)
    normalization = {"mean": TINY_MEAN, "std": TINY_STD, "native_size": 64}
    index = folders.from_listings("tiny-imagenet", train, val, **normalization, **checks)
    index = replace(index, class_names=human_names(index.classes, Path(root)))
    return _redistributed(index, 0.3) if split == "70-30" else index


def _redistributed(index: DatasetIndex, val_fraction: float) -> DatasetIndex:
    """Pool train and val, and draw `val_fraction` of every class for val with a fixed seed."""
    names = [*index.train.names, *index.val.names]
    labels = np.concatenate([index.train.labels, index.val.labels])
    parts = stratified_split(labels, val_fraction, seed=0)
    train, val = (FileSplit(index.train.root, [names[i] for i in ids], labels[ids]) for ids in parts)
    return replace(index, train=train, val=val)


def _index(
    name: str, data_dir: str, root: str, parts: Parts, wanted: set[bytes] | None, **checks: bool
) -> DatasetIndex:
    for folder in (*parts["train"], *parts["val"]):
        if not os.path.isdir(os.path.join(root, folder)):
            fix = _without_val(root) if folder == "val" else folders.ACCEPTED
            raise DataError(f"no folder {folder}/ in {os.path.abspath(root)}", fix)
    train = _listed(root, parts["train"], wanted)
    if any(folders.class_names(os.path.join(root, folder)) for folder in parts["val"]):
        val = folders.list_classes(root, *parts["val"], only=wanted)
    else:
        labels = flat_val_labels(root, data_dir)
        val = folders.list_labelled(root, parts["val"][0], labels, only=wanted)
    index = folders.from_listings(name, train, val, **checks)
    names = human_names(index.classes, *_places(root, data_dir))
    notes = (*index.notes, *_count_notes(index))
    return replace(index, class_names=names, notes=notes, exif=_are_own(index.classes))


def _are_own(classes: tuple[str, ...]) -> bool:
    """Return whether these are not classes of ImageNet, whose images are read as they are stored."""
    return not all(map(WORDNET_ID.fullmatch, classes))


def _listed(root: str, within: list[str], wanted: set[bytes] | None) -> folders.Listing:
    """List the classes in the folders `within` of `root`. Raises DataError if a wanted one is missing."""
    found = folders.list_classes(root, *within, only=wanted)
    if missing := (wanted or set()) - found.by_class.keys():
        raise DataError(
            f"listed classes that are not in {os.path.abspath(root)}: {folders.every(sorted(missing))}",
            "correct the list (one class folder's name per line), or complete the data",
        )
    return found


def _count_notes(index: DatasetIndex) -> list[str]:
    """Note missing images if the data have ImageNet's 1,000 classes; a part of ImageNet is not an error."""
    if len(index.classes) != NUM_CLASSES or not WORDNET_ID.match(index.classes[0]):
        return []
    found = (("train", len(index.train), NUM_TRAIN), ("val", len(index.val), NUM_VAL))
    return [f"{part} has {n:,} of ImageNet's {total:,} images" for part, n, total in found if n != total]


def image_root(data_dir: str) -> str:
    """Return the folder that holds train/ and val/: `data_dir`, or Data/CLS-LOC below it."""
    for below in ("", "Data/CLS-LOC", "ILSVRC/Data/CLS-LOC"):
        root = os.path.join(data_dir, below) if below else data_dir
        if os.path.isdir(os.path.join(root, "train")):
            return root
    found, fix = [], folders.ACCEPTED
    with suppress(DataError):  # of folders that may not be read
        names = folders.class_names(data_dir)
        inside = [os.path.join(data_dir, os.fsdecode(name)) for name in names]
        found = [path for path in inside if os.path.isdir(f"{path}/train") or splits.lacks_parts(path)]
        if parts := [name for name in names if splits.PARTS.fullmatch(name)]:
            fix = f"move {folders.every(parts)} away if the other folders are classes, or {fix}"
        elif len(found) > 1:
            these = folders.some(sorted(os.path.basename(os.fsencode(path)) for path in found))
            fix = f"if {these} are classes, move an image of one of them out of its subfolder; "
            fix += "if they are datasets, name one of them with --data-dir"
    fix = f"use --data-dir {shlex.quote(found[0])}" if len(found) == 1 else fix
    raise DataError(f"no folder train/ in {os.path.abspath(data_dir)}", fix)


def _without_val(root: str) -> str:
    """Return what to do about a `root` with a train/ but no val/."""
    for other in OTHER_VALS:
        if os.path.isdir(path := os.path.join(root, other)) and folders.class_names(path):
            return f"rename {other}/ to val/"
    train = os.path.join(root, "train")
    if splits.lacks_parts(train):
        return f"add it, or validate on a fifth of each class: --data-dir {shlex.quote(train)}"
    inside = [entry.name for entry in folders.scan(os.fsencode(train))]
    if len(folders.class_names(root)) > 1 and any(map(folders.is_image, inside)):
        return f"rename train/ if it is a class like the folders beside it; else {folders.ACCEPTED}"
    return folders.ACCEPTED


def _places(root: str | os.PathLike, data_dir: str | os.PathLike) -> list[Path]:
    """Return where labels and class names may be: `data_dir`, `root`, and the ILSVRC tree's upper folders."""
    places, path = [Path(data_dir), Path(root)], Path(os.path.abspath(root))
    if path.parts[-2:] == ("Data", "CLS-LOC"):
        places += path.parents[1:3]  # ILSVRC/ and its parent
    return list(dict.fromkeys(places))


# --- labels of a flat val/ -------------------------------------------------------------------------


def flat_val_labels(root: str | os.PathLike, data_dir: str | os.PathLike) -> dict[bytes, bytes]:
    """Return {image name without extension: class} for a flat val/, from the label files around it."""
    for place in _places(root, data_dir):
        for path, read in _label_files(place):
            try:
                return dict(read(path))
            except Exception as error:  # hostile bytes make csv and scipy raise anything
                what = f"cannot read the labels in {path}: {str(error) or type(error).__name__}"
                raise DataError(what, "download them again") from error
    raise DataError(
        f"{os.path.abspath(root)}/val has no class folders, and the labels of its images were not found",
        f"add {LABEL_PLACES}, or move the images into class folders: "
        f"python download_imagenet.py --method manual --data-dir {shlex.quote(os.fspath(data_dir))}",
    )


def _label_files(place: Path) -> Iterator[tuple[Path, Callable[[Path], Labels]]]:
    """Yield each label file or folder in `place`, with the function that reads it."""
    if (path := place / "LOC_val_solution.csv").is_file():
        yield path, _from_csv
    if (path := place / "Annotations/CLS-LOC/val").is_dir():
        yield path, _from_xml
    for devkit in ("ILSVRC2012_devkit_t12/data", "devkit/data", "data"):
        if (place / devkit / "ILSVRC2012_validation_ground_truth.txt").is_file():
            yield place / devkit, devkit_labels


def _from_csv(path: Path) -> Labels:
    """Read Kaggle's ImageId,PredictionString: `ILSVRC2012_val_00048981,n03995372 85 1 499 272`."""
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            yield row["ImageId"].encode(), row["PredictionString"].split()[0].encode()


def _from_xml(folder: Path) -> Labels:
    """Read one annotation per image, whose objects all have the image's class.

    A regular expression is enough: only one tag of each of the 50,000 files matters.
    """
    for path in folder.glob("*.xml"):
        with open(path, "rb") as file:
            found = re.search(rb"<name>\s*(n\d{8})\s*</name>", file.read(XML_BYTES))
        if found:
            yield os.fsencode(path.stem), found[1]


def devkit_labels(data: Path) -> Labels:
    """Read the devkit: line i is the class number of ILSVRC2012_val_<i>, and meta.mat numbers the classes."""
    from scipy.io import loadmat

    synsets = loadmat(data / "meta.mat", squeeze_me=True)["synsets"]
    ids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]).encode() for row in synsets}
    numbers = (data / "ILSVRC2012_validation_ground_truth.txt").read_text().split()
    for i, number in enumerate(numbers, start=1):
        yield b"ILSVRC2012_val_%08d" % i, ids[int(number)]


# --- class lists and names -------------------------------------------------------------------------


def read_class_list(path: str | os.PathLike) -> set[bytes]:
    """Read class folder names, one per line. `#` starts a comment; words after a WordNet id are ignored."""
    try:
        lines = Path(path).read_text("utf-8-sig", "surrogateescape").splitlines()
    except OSError as error:
        what = f"cannot read the class list {path}: {error.strerror}"
        raise DataError(what, "check --class-list") from error
    names = [line.strip() for line in lines if line.strip() and line.strip()[0] != "#"]
    if len(names) < 2:
        what = f"the class list {path} names {len(names)} classes"
        raise DataError(what, "write the name of one class folder per line")
    ids = [WORDNET_ID.match(name) for name in names]
    return {os.fsencode(found[0] if found else name) for name, found in zip(names, ids, strict=True)}


def human_names(classes: tuple[str, ...], *places: Path) -> tuple[str, ...] | None:
    """Return the readable names of WordNet ids, or None if `classes` are not such ids.

    Those of ImageNet's thousand come with this project, others from the data's own files in `places`.
    """
    if not any(map(WORDNET_ID.fullmatch, classes)):
        return None
    names = ilsvrc_names()
    if not names.keys() >= set(classes):
        for place in places:
            try:
                names = {**_names_in(place), **names}
            except OSError as error:
                what = f"cannot read the class names in {place}: {error}"
                raise DataError(what, "repair or remove the file") from error
    return tuple(names.get(name, name) for name in classes)


def ilsvrc_names() -> dict[str, str]:
    """Return {WordNet id: readable name} of ImageNet's thousand classes, in label order."""
    lines = (HERE / "imagenet_names.txt").read_text().splitlines()
    return dict(line.split(" ", 1) for line in lines if line[0] != "#")


def _names_in(place: Path) -> dict[str, str]:
    """Return {id: name} from words.txt, as Tiny ImageNet has it; {} without the file."""
    if not (place / "words.txt").is_file():
        return {}
    pairs = [line.split("\t", 1) for line in (place / "words.txt").read_text("utf-8", "replace").splitlines()]
    return {pair[0]: pair[1].split(",")[0].strip() for pair in pairs if len(pair) == 2}
