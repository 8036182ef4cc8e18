"""ImageNet (ILSVRC 2012) as people have it on disk, subsets of it by a class list, and its classes' human names.

Trees: train/<class> + val/<class>; the same with a flat val/ and its labels nearby; the Kaggle tree
ILSVRC/Data/CLS-LOC/{train,val} + LOC_val_solution.csv or ILSVRC/Annotations; Kaggle's ImageNet-100 (train.X1 ...).
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from base.errors import DataError
from sources import folders
from sources.index import DatasetIndex

WORDNET_ID = re.compile(r"n\d{8}\b")
HERE = Path(__file__).parent
XML_BYTES = 1 << 20  # of an annotation; real ones have a few hundred
NUM_TRAIN, NUM_VAL, NUM_CLASSES = 1_281_167, 50_000, 1000
LABEL_PLACES = "LOC_val_solution.csv, Annotations/CLS-LOC/val/*.xml or ILSVRC2012_devkit_t12/data/"


def imagenet(data_dir: str, class_list: str | os.PathLike | None = None, **checks: bool) -> DatasetIndex:
    """Class folders, or the ILSVRC/Kaggle tree, whichever is found; with `class_list`, only those classes."""
    root = image_root(data_dir)
    wanted = read_class_list(class_list) if class_list else None
    return _index("imagenet_1k", data_dir, root, ("train",), ("val",), wanted, **checks)


def imagenet100(data_dir: str, class_list: str | os.PathLike | None = None, **checks: bool) -> DatasetIndex:
    """100 classes: Kaggle's copy (train.X1 ...), exactly such class folders, or a list of classes over ImageNet.

    Without `class_list`, ImageNet is cut down by imagenet100.txt (https://arxiv.org/abs/1906.05849), and
    a tree of up to 100 classes is taken as it is.
    """
    wanted = read_class_list(class_list) if class_list else None
    train_parts, val_parts = (
        sorted(p.name for p in Path(data_dir).glob(x) if p.is_dir()) for x in ("train.X*", "val.X*")
    )
    if train_parts:
        return _index("imagenet100", data_dir, data_dir, train_parts, val_parts or ["val"], wanted, **checks)
    root = image_root(data_dir)
    if wanted is None and folders.count_classes(os.path.join(root, "train")) > 100:
        wanted = read_class_list(HERE / "imagenet100.txt")
    return _index("imagenet100", data_dir, root, ("train",), ("val",), wanted, **checks)


def _index(
    name: str,
    data_dir: str,
    root: str,
    train_folders: Sequence[str],
    val_folders: Sequence[str],
    wanted: set[bytes] | None,
    **checks: bool,
) -> DatasetIndex:
    for folder in (*train_folders, *val_folders):
        if not os.path.isdir(os.path.join(root, folder)):
            raise DataError(f"no folder {folder}/ in {os.path.abspath(root)}", folders.ACCEPTED)
    train = folders.list_classes(root, *train_folders, only=wanted)
    if wanted is not None and set(wanted) - set(train.by_class):
        raise DataError(
            f"classes of the list that are not in {os.path.abspath(root)}: "
            + folders.every(sorted(set(wanted) - set(train.by_class))),
            "correct the list (one class folder's name per line), or complete the data",
        )
    if any(folders.count_classes(os.path.join(root, folder)) for folder in val_folders):
        val = folders.list_classes(root, *val_folders, only=wanted)
    else:
        labels = flat_val_labels(root, data_dir)
        val = folders.list_labelled(root, val_folders[0], labels, only=wanted)
    index = folders.from_listings(name, train, val, **checks)
    names = human_names(index.classes, *_above(root, data_dir))
    return replace(index, class_names=names, notes=(*index.notes, *_counts_note(index)))


def _counts_note(index: DatasetIndex) -> list[str]:
    """ImageNet's thousand classes, but not all of its images: worth a word, not an error."""
    if len(index.classes) != NUM_CLASSES or not WORDNET_ID.match(index.classes[0]):
        return []
    found = (("train", len(index.train), NUM_TRAIN), ("val", len(index.val), NUM_VAL))
    return [
        f"{name} has {n:,} of ImageNet's {official:,} images" for name, n, official in found if n != official
    ]


def image_root(data_dir: str) -> str:
    """The folder that holds train/ and val/: `data_dir`, or Data/CLS-LOC below it in the ILSVRC/Kaggle tree."""
    for below in ("", "Data/CLS-LOC", "ILSVRC/Data/CLS-LOC"):
        root = os.path.join(data_dir, *below.split("/")) if below else data_dir
        if os.path.isdir(os.path.join(root, "train")):
            return root
    raise DataError(f"no folder train/ in {os.path.abspath(data_dir)}", folders.ACCEPTED)


def _above(root: str, data_dir: str) -> list[Path]:
    """Where labels and names may lie: `data_dir`, `root`, and what the ILSVRC tree has above Data/CLS-LOC."""
    places, path = [Path(data_dir), Path(root)], Path(os.path.abspath(root))
    if path.parts[-2:] == ("Data", "CLS-LOC"):
        places += path.parents[1:3]  # ILSVRC/ and the folder around it
    return list(dict.fromkeys(places))


def flat_val_labels(root: str, data_dir: str) -> dict[bytes, bytes]:
    """{image name without ending: class} of a val/ without class folders, from wherever its labels lie."""
    for place in _above(root, data_dir):
        for path, found in _label_files(place):
            try:
                return dict(found)
            except Exception as error:  # hostile bytes make csv and scipy raise anything
                raise DataError(
                    f"cannot read the labels in {path}: {error or type(error).__name__}", "fetch them again"
                ) from error
    raise DataError(
        f"{os.path.abspath(root)}/val has no class folders (a flat val), and its labels are nowhere near",
        f"put {LABEL_PLACES} beside it, or let `python download_imagenet.py` file the images into class folders",
    )


def _label_files(place: Path) -> Iterator[tuple[Path, Iterator[tuple[bytes, bytes]]]]:
    path = place / "LOC_val_solution.csv"
    if path.is_file():
        yield path, _from_csv(path)
    path = place / "Annotations/CLS-LOC/val"
    if path.is_dir():
        yield path, _from_xml(path)
    for devkit in (place / "ILSVRC2012_devkit_t12/data", place / "devkit/data", place / "data"):
        if (devkit / "ILSVRC2012_validation_ground_truth.txt").is_file():
            yield devkit, devkit_labels(devkit)


def _from_csv(path: Path) -> Iterator[tuple[bytes, bytes]]:
    """Kaggle's ImageId,PredictionString: `ILSVRC2012_val_00048981,n03995372 85 1 499 272`."""
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            yield row["ImageId"].encode(), row["PredictionString"].split()[0].encode()


def _from_xml(folder: Path) -> Iterator[tuple[bytes, bytes]]:
    """One file per image; its objects are all of the image's class. No XML parser: 50,000 files, one tag each."""
    for path in folder.glob("*.xml"):
        with open(path, "rb") as file:
            found = re.search(rb"<name>\s*(n\d{8})\s*</name>", file.read(XML_BYTES))
        if found:
            yield os.fsencode(path.stem), found[1]


def devkit_labels(data: Path) -> Iterator[tuple[bytes, bytes]]:
    """The devkit's ground truth: line i is the class number of ILSVRC2012_val_<i>; meta.mat numbers the classes."""
    from scipy.io import loadmat

    synsets = loadmat(data / "meta.mat", squeeze_me=True)["synsets"]
    ids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]).encode() for row in synsets}
    numbers = (data / "ILSVRC2012_validation_ground_truth.txt").read_text().split()
    for i, number in enumerate(numbers, start=1):
        yield b"ILSVRC2012_val_%08d" % i, ids[int(number)]


def read_class_list(path: str | os.PathLike) -> set[bytes]:
    """Class folder names, one a line; `#` starts a comment, and words after a WordNet id are ignored."""
    try:
        lines = [line.strip() for line in Path(path).read_text("utf-8", "surrogateescape").splitlines()]
    except OSError as error:
        raise DataError(
            f"cannot read the class list {path}: {error.strerror}", "check --class-list"
        ) from error
    names = [
        WORDNET_ID.match(line)[0] if WORDNET_ID.match(line) else line
        for line in lines
        if line and line[0] != "#"
    ]
    if len(names) < 2:
        raise DataError(
            f"the class list {path} names {len(names)} classes", "write one class folder's name per line"
        )
    return {os.fsencode(name) for name in names}


def human_names(classes: tuple[str, ...], *places: Path) -> tuple[str, ...] | None:
    """What people call WordNet ids: ImageNet's own 1,000 as shipped here, others from the data's own files.

    None when `classes` are not such ids.
    """
    if not any(map(WORDNET_ID.fullmatch, classes)):
        return None
    known = dict(
        line.split(" ", 1)
        for line in (HERE / "imagenet_names.txt").read_text().splitlines()
        if line[0] != "#"
    )
    if not known.keys() >= set(classes):
        for place in places:
            try:
                known = {**_names_in(place), **known}
            except (OSError, ValueError, AttributeError, RecursionError) as error:
                raise DataError(
                    f"cannot read the class names in {place}: {error}", "mend or remove the file"
                ) from error
    return tuple(known.get(name, name) for name in classes)


def _names_in(place: Path) -> dict[str, str]:
    """{id: first word} of words.txt (Tiny ImageNet), LOC_synset_mapping.txt or Labels.json (Kaggle)."""
    from base import schemas

    pairs: list[list[str]] = []
    if (place / "words.txt").is_file():
        pairs += [
            line.split("\t", 1) for line in (place / "words.txt").read_text("utf-8", "replace").splitlines()
        ]
    if (place / "LOC_synset_mapping.txt").is_file():
        pairs += [
            line.split(" ", 1) for line in (place / "LOC_synset_mapping.txt").read_text("utf-8").splitlines()
        ]
    if (place / "Labels.json").is_file():
        names = schemas.read_json(
            place / "Labels.json", schemas.LabelNames, "delete it: only names for people are in it"
        )
        pairs += [[key, str(words)] for key, words in names.items()]
    return {pair[0]: pair[1].split(",")[0].strip() for pair in pairs if len(pair) == 2}
