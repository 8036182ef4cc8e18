"""Class folders without train/ and val/: a fifth of each class is for validation, chosen by its names.

`split.json` beside the class folders keeps which, so that images stay in their part when others are added.
It is written when images are first used to train or to pack, and may be edited or deleted.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import replace
from pathlib import Path

from base import files
from base.errors import DataError, ResourceError
from sources import folders
from sources.index import DatasetIndex, FileSplit

FILE = "split.json"
SHARE, SEED = 0.2, 0
PARTS = re.compile(rb"(train|training|val|valid|validation|test)(\.X\d*)?|ILSVRC|Data")  # not classes
Known = dict[bytes, str]  # image -> "train" or "val"


def lacks_parts(data_dir: str) -> bool:
    """Return whether `data_dir` holds <class>/*.jpg: no train/ and val/, and not several datasets."""
    root, names = os.fsencode(data_dir), folders.class_names(data_dir)
    if any(PARTS.fullmatch(name) or os.path.isdir(os.path.join(root, name, b"train")) for name in names):
        return False
    inside = (entry.name for name in names for entry in folders.scan(os.path.join(root, name)))
    return any(folders.is_image(file) or folders.passed_over([file]) for file in inside)


def class_folders(name: str, data_dir: str, listing: folders.Listing) -> DatasetIndex:
    """Return the index, called `name`, of `listing`: the images in `data_dir`/<class>/. Raises DataError."""
    path, parts = Path(data_dir, FILE), {}
    listing.others = [other for other in listing.others if other != os.fsencode(FILE)]
    _check_classes(listing)
    known, train, val = _read(path), folders.Listing(listing.root), folders.Listing(listing.root)
    for key, images in listing.by_class.items():
        held = validation_images(images, known)
        train.by_class[key] = [image for image in images if image not in held]
        val.by_class[key] = sorted(held)
        parts |= {image: "val" if image in held else "train" for image in images}
    index = folders.from_listings(name, train, val)
    where = f"{path} lists them" if known else f"training or packing will list them in {path}"
    note = f"{name}: {len(train):,} images to train on, {len(val):,} to validate on; {where}"
    text = _text(known | parts) if parts.items() - known.items() else ""
    return replace(index, notes=(note, *folders.notes({name: listing})), split_file=(path, text))


def undivided(index: DatasetIndex) -> DatasetIndex:
    """Return `index` with all its images for validation, unless `split.json` or the folders divide them."""
    if not index.split_file or os.path.lexists(index.split_file[0]):
        return index
    parts = (index.train, index.val)
    images = sorted(
        pair for part in parts for pair in zip(part.labels, part.names_of(range(len(part))), strict=True)
    )
    val = FileSplit(index.val.whole.root, [name for _, name in images], [label for label, _ in images])
    why = f"they are not the run's, and no {FILE} divides them"
    note = f"{index.name}: all {len(val):,} images are for validation: {why}"
    return replace(index, val=val, notes=(note, *index.notes[1:]))


def _check_classes(listing: folders.Listing) -> None:
    """Raise DataError unless there are two classes or more, each with two images or more."""
    where, passed = os.path.abspath(os.fsdecode(listing.root)), folders.passed_over(listing.others)
    if len(listing.by_class) == 1:
        what = f"{where} has one class folder only, {folders.every(listing.classes)}"
        raise DataError(what, "put the images of each class into a folder of their own: <class>/*.jpg")
    if few := [key for key in listing.classes if len(listing.by_class[key]) < 2]:
        what = f"classes with fewer than two images in {where}: {folders.every(few)}"
        fix = "a class needs an image to train on and one to validate on: fill or remove these folders"
        raise DataError(what + f" ({passed})" * bool(passed), fix)


def validation_images(images: list[bytes], known: Known) -> set[bytes]:
    """Return those of a class's `images` that are for validation.

    A known image stays in its part. Of the others, in the order of a hash of their names, as many are for
    validation as are wanted to make it `SHARE` of the class. So nothing but this class's names matters.
    """
    wanted = max(1, round(SHARE * len(images)))
    held = {image for image in images if known.get(image) == "val"}
    new = sorted((image for image in images if image not in known), key=_hash)
    held.update(new[: max(0, wanted - len(held))])
    if known and not 0 < len(held) < len(images):  # one part was deleted: divide what is left
        return validation_images(images, {})
    return held


def _hash(image: bytes) -> bytes:
    return hashlib.sha256(b"%d %s" % (SEED, image)).digest()


def _read(path: Path) -> Known:
    """Return what `path` keeps; nothing if there is no such file. Raises DataError."""
    if not os.path.lexists(path):
        return {}
    from base import schemas

    fix = "repair it, or delete it to split all images again"
    if not path.is_file():  # a pipe would be waited for
        raise DataError(f"{path} is not a plain file", fix)
    content = schemas.read_json(path, schemas.SplitFile, fix)
    if twice := set(content["train"]) & set(content["val"]):
        raise DataError(f"{path} has {min(twice)!r} in train and in val", fix)
    return {os.fsencode(image): part for part in ("train", "val") for image in content[part]}


def _text(known: Known) -> str:
    names = {part: [os.fsdecode(n) for n in sorted(known) if known[n] == part] for part in ("train", "val")}
    return json.dumps(names, indent=1) + "\n"


def write_down(index: DatasetIndex) -> str:
    """Write `split.json` if images of `index` are not in it yet; return a note if that is impossible."""
    path, text = index.split_file or ("", "")
    if not text:
        return ""
    try:
        with files.durable(path) as file:
            file.write(text.encode())
    except ResourceError as error:
        return f"note: {error.what}, so when images are added, some may change between train and val"
    return ""
