"""The data of `benchmarks.first_minute`, as archives of at most 45 MB: for a machine that has no network.

`python -m benchmarks.first_minute_data --out DIR --cifar10 data/cifar10 --photos data/imagenet ...` writes
NAME-1.tar, NAME-2.tar and so on. The first archive of a dataset holds its validation images, and all of
them hold training images of every class: with some of the archives, a run trains on some of the images.
"""

from __future__ import annotations

import io
import itertools
import math
import os
import pickle
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from base import errors, files, flags, process
from base.errors import DataError, UsageError

LIMIT = 45_000_000  # bytes of an archive
RECORD = 20 * 512  # a tar file's length is a multiple of it
CHUNKS = 10  # CIFAR: members that the training images of a class are spread over
FILES = 1000  # Tiny ImageNet: images of a member
LOSSLESS = 101
DATASETS = {
    "cifar10": "CIFAR-10: as published, or train/<class>/*.png and test/<class>/*.png.",
    "cifar100": "CIFAR-100, likewise.",
    "tiny-imagenet": "Tiny ImageNet as published; its files are stored unchanged.",
    "photos": "Full-size photographs as train/<class>/*: as many as fit one archive, unchanged.",
}
Member = tuple[str, bytes]  # name and content


def build_parser() -> flags.Parser:
    parser = flags.Parser(prog="python -m benchmarks.first_minute_data", description=__doc__)
    quality = "JPEG quality of CIFAR's training images; 101 stores them, like the test images, without loss."
    parser.add_argument("--out", required=True, metavar="DIR", help="Archives are written here.")
    for name, text in DATASETS.items():
        parser.add_argument(f"--{name}", default="", metavar="DIR", help=text)
    values = flags.number(int, 50, LOSSLESS)
    parser.add_argument("--quality", type=values, default=88, metavar="Q", help=quality)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    given = {name: getattr(args, name.replace("-", "_")) for name in DATASETS}
    if not any(given.values()):
        raise UsageError("no dataset was named", "give at least one of --" + ", --".join(DATASETS))
    for name, folder in given.items():
        if folder:
            for path in pack(name, Path(folder), Path(args.out), args.quality):
                print(f"{path}: {os.path.getsize(path) / 1e6:.1f} MB", flush=True)
    return 0


def pack(name: str, folder: Path, out: Path, quality: int = 88) -> list[Path]:
    """Write the archives of the dataset `name` from its copy in `folder`; return their paths."""
    if name.startswith("cifar"):
        return write_archives(out, name, cifar_members(name, folder, quality))
    if name == "tiny-imagenet":
        return write_archives(out, name, tiny_imagenet_members(folder))
    return write_archives(out, name, photo_members(folder))


def write_archives(out: Path, name: str, members: Iterable[Member]) -> list[Path]:
    """Fill one archive after the other, each up to LIMIT; return their paths."""
    out.mkdir(parents=True, exist_ok=True)
    for path in out.glob(f"{name}-*.tar"):
        path.unlink()
    paths = []
    for group in groups(members):
        paths.append(out / f"{name}-{len(paths) + 1}.tar")
        with tarfile.open(paths[-1], "w", format=tarfile.USTAR_FORMAT) as archive:
            for member, content in group:
                info = tarfile.TarInfo(member)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    if not paths:
        raise DataError(f"no images for {name}", "see --help for the layout that is read")
    return paths


def groups(members: Iterable[Member]) -> Iterator[list[Member]]:
    """Yield as many members at a time as fit one archive."""
    group, left = [], LIMIT - RECORD
    for member, content in members:
        size = 512 + math.ceil(len(content) / 512) * 512  # a header, and whole blocks
        if group and size > left:
            yield group
            group, left = [], LIMIT - RECORD
        group.append((member, content))
        left -= size
    if group:
        yield group


# --- CIFAR: the images of a class side by side in one picture, which is smaller than a file for each ------


def cifar_members(name: str, folder: Path, quality: int) -> Iterator[Member]:
    """Yield the test images of each class, then the first of CHUNKS parts of each class for training, ..."""
    parts = cifar_images(name, folder)
    for class_name, images in parts["test"].items():
        yield f"test/{class_name}.webp", encoded(images, LOSSLESS)
    suffix = "webp" if quality == LOSSLESS else "jpg"
    for k in range(CHUNKS):
        for class_name, images in parts["train"].items():
            yield f"train/{class_name}.{k}.{suffix}", encoded(np.array_split(images, CHUNKS)[k], quality)


def cifar_images(name: str, folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """Return {train or test: {class: its images (n, 32, 32, 3)}}."""
    from sources.decode import decode
    from sources.layouts import open_dataset

    index = open_dataset(name, folder)

    def by_class(split) -> dict[str, np.ndarray]:
        ids = {c: np.flatnonzero(split.labels == k) for k, c in enumerate(index.classes)}
        return {c: np.stack([decode(data) for data in split.read(own)]) for c, own in ids.items()}

    return {"train": by_class(index.train), "test": by_class(index.val)}


def encoded(images: np.ndarray, quality: int) -> bytes:
    """Encode (n, h, w, 3) uint8 as one picture, whose rows have as many images as divide n, up to 50."""
    n, h, w, _ = images.shape
    columns = max(k for k in range(1, 51) if n % k == 0)
    picture = images.reshape(-1, columns, h, w, 3).swapaxes(1, 2).reshape(-1, columns * w, 3)
    file = io.BytesIO()
    if quality == LOSSLESS:
        Image.fromarray(picture).save(file, "WEBP", lossless=True, method=3, quality=50)
    else:  # h and w are whole JPEG blocks, so that no image leaks into its neighbours
        Image.fromarray(picture).save(file, "JPEG", quality=quality, subsampling=0, progressive=True)
    return file.getvalue()


def decoded(content: bytes, side: int = 32) -> np.ndarray:
    """Return the images of a picture from `encoded`."""
    picture = np.asarray(Image.open(io.BytesIO(content), formats=("JPEG", "WEBP")))
    rows, columns = picture.shape[0] // side, picture.shape[1] // side
    return picture.reshape(rows, side, columns, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)


def unpack_cifar(name: str, archives: list[Path], target: Path) -> None:
    """Write the files that CIFAR is published as into `target`, from its archives."""
    from sources.cifar import CIFAR10, CIFAR100

    which = CIFAR10 if name == "cifar10" else CIFAR100
    found: dict[str, dict[str, list]] = {"train": {}, "test": {}}
    for member, content in members_of(archives):
        part, _, file = member.partition("/")
        found[part].setdefault(file.split(".", maxsplit=1)[0], []).append(decoded(content))
    classes, folder = sorted(found["test"]), target / which.folder
    folder.mkdir(parents=True)
    names = [class_name.encode() for class_name in classes]
    (folder / which.meta).write_bytes(pickle.dumps({which.class_names: names}, protocol=4))
    for part, places in (("train", which.train), ("test", (which.val,))):
        images = [np.concatenate(found[part][class_name]) for class_name in classes]
        labels = np.repeat(np.arange(len(classes)), [len(group) for group in images])
        rows = np.concatenate(images).transpose(0, 3, 1, 2).reshape(len(labels), -1)
        shares = (np.array_split(array, len(places)) for array in (labels, rows))
        for place, own, data in zip(places, *shares, strict=True):
            content = {b"data": np.ascontiguousarray(data), which.labels: own.tolist()}
            (folder / place).write_bytes(pickle.dumps(content, protocol=4))


# --- files that are stored as they are -------------------------------------------------------------


def tiny_imagenet_members(folder: Path) -> Iterator[Member]:
    """Yield val, then training images in groups of every class. Together, their headers compress well."""
    root = next((p for p in (folder, folder / "tiny-imagenet-200") if (p / "train").is_dir()), folder)
    val = [root / "val/val_annotations.txt", *sorted((root / "val/images").glob("*"))]
    places = sorted((root / "train").iterdir())
    train = list(in_turns(sorted((place / "images").iterdir()) for place in places))
    for part, paths in (("val", val), ("train", train)):
        for k in range(0, len(paths), FILES):
            file = io.BytesIO()
            with tarfile.open(fileobj=file, mode="w:xz", format=tarfile.USTAR_FORMAT) as group:
                for path in paths[k : k + FILES]:
                    group.add(path, path.relative_to(root).as_posix(), recursive=False)
            yield f"{part}-{k // FILES}.tar.xz", file.getvalue()


def photo_members(folder: Path) -> Iterator[Member]:
    """Yield an image of each class, then a second one of each, and so on, as many as fit one archive."""
    left = LIMIT - RECORD
    for path in in_turns(sorted(place.iterdir()) for place in sorted((folder / "train").iterdir())):
        left -= os.path.getsize(path) + 1024
        if left < 0:
            return
        yield path.relative_to(folder).as_posix(), path.read_bytes()


def in_turns(classes: Iterable[list[Path]]) -> Iterator[Path]:
    return (path for paths in itertools.zip_longest(*classes) for path in paths if path is not None)


def unpack_files(archives: list[Path], target: Path) -> None:
    """Write the files of all archives, each in a process of its own: there may be 100,000."""
    with ProcessPoolExecutor(process.cores()) as pool:
        list(pool.map(partial(unpack_archive, target=target), archives))


def unpack_archive(archive: Path, target: Path) -> None:
    for member, content in members_of([archive]):
        if member.endswith(".tar.xz"):
            with tarfile.open(fileobj=io.BytesIO(content)) as group:
                for info in filter(tarfile.TarInfo.isfile, group):
                    write_under(target, info.name, group.extractfile(info).read())
        else:
            write_under(target, member, content)


def write_under(target: Path, name: str, content: bytes) -> None:
    path = (target / name).resolve()
    if not path.is_relative_to(target.resolve()):
        raise DataError(f"an archive names a file outside its folder: {name}", "pack the archives again")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


# --- reading archives -------------------------------------------------------------------------------


def unpack(name: str, data_dir: Path, work_dir: Path) -> Path:
    """Unpack what `data_dir` holds of the dataset `name`, unless that is done; return its directory."""
    archives = sorted(data_dir.glob(f"{name}-*.tar"))
    if data_dir / f"{name}-1.tar" not in archives:
        what = f"no {name}-1.tar in {data_dir.resolve()}"
        raise DataError(what, "python -m benchmarks.first_minute_data --help says how to make it")
    target = work_dir / f"{name}-from-{len(archives)}"
    if not target.is_dir():
        partial = target.with_name(target.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was stopped
        if name.startswith("cifar"):
            unpack_cifar(name, archives, partial)
        else:
            unpack_files(archives, partial)
        partial.rename(target)
    return target


def members_of(archives: Iterable[Path]) -> Iterator[Member]:
    for path in archives:
        with tarfile.open(path) as archive:
            for info in archive:
                yield info.name, archive.extractfile(info).read()


# --- a rehearsal -------------------------------------------------------------------------------------


def make_rehearsal(out: Path) -> Path:
    """Write archives of a few generated images of each dataset to `out`, unless they are there; return it."""
    if not (out / "photos-1.tar").is_file():
        with tempfile.TemporaryDirectory() as scratch:
            for name in DATASETS:
                generate(name, Path(scratch, name))
                pack(name, Path(scratch, name), out)
    return out


def generate(name: str, folder: Path) -> None:
    """Write images of noise, three classes of them, in the layout of the dataset `name`."""
    rng = np.random.default_rng(0)
    large = {"photos": (120, "JPEG", ""), "tiny-imagenet": (64, "JPEG", "/images")}
    side, suffix, below = large.get(name, (32, "png", ""))
    places = {f"train/{c}{below}/{i}.{suffix}": c for c in ("ant", "bee", "cat") for i in range(40)}
    if name.startswith("cifar"):
        places |= {f"test/{c}/{i}.{suffix}": c for c in ("ant", "bee", "cat") for i in range(10)}
    if name == "tiny-imagenet":
        val = {f"val_{k}.JPEG": ("ant", "bee", "cat")[k % 3] for k in range(30)}
        places |= {f"val/images/{file}": c for file, c in val.items()}
        lines = "".join(f"{file}\t{c}\t0\t0\t1\t1\n" for file, c in val.items())
        files.write(folder / "val/val_annotations.txt", lines)
    for place, class_name in places.items():
        pixels = rng.integers(0, 90, (side, side, 3)) + 40 * ("ant", "bee", "cat").index(class_name)
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / place)


if __name__ == "__main__":
    sys.exit(errors.run(main))
