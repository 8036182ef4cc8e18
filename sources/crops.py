"""Evaluation crops stored as pixels, so that scoring copies them instead of decoding every image again.

The crops of a split at one size are a folder `eval-<size>-<fingerprint>` of shards: `00000.npy` holds
(rows, size, size, 3) uint8, `00000.json` its checksum and the images that cannot be decoded. The fingerprint
covers the images, the size and the crop, so no crops are mistaken for others. A shard gets its name when it
is complete, so an interrupted writing continues with the missing shards.
"""

from __future__ import annotations

import glob
import hashlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np

from base import files
from base.errors import DataError
from base.files import check_file, file_crc32
from sources.decode import BadImage, decode
from sources.images import EvalTransform
from sources.index import Split, SubsetSplit, read_samples

VERSION = 1  # of the pixels; it is part of the fingerprint
SHARD_ROWS = 512
HEADER_BYTES = 128  # of a .npy file
REPAIR = "delete this file, then run pack_dataset.py again with the same arguments, or use --cache-eval"


class Crops:
    """The evaluation crops of `split` at `image_size` px in a folder of `root`, whether written or not."""

    def __init__(
        self, root: str | os.PathLike, split: Split, image_size: int, crop: float, exif: bool = False
    ):
        self.split, self.transform = split, EvalTransform(image_size, crop, exif)
        self.image_size, self.crop = image_size, crop
        key = f"{VERSION} {image_size} {crop!r} {split.content()}" + " exif" * exif
        name = f"eval-{image_size}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        self.folder = os.path.join(root, name)
        self.shards = [range(len(split))[at : at + SHARD_ROWS] for at in range(0, len(split), SHARD_ROWS)]
        self._open: dict[int, np.ndarray] = {}

    def __getstate__(self):
        return {**self.__dict__, "_open": {}}

    def path(self, k: int) -> str:
        return os.path.join(self.folder, f"{k:05d}.npy")

    def shard_bytes(self, k: int) -> int:
        return HEADER_BYTES + len(self.shards[k]) * self.image_size**2 * 3

    def bytes(self) -> int:
        return sum(self.shard_bytes(k) for k in range(len(self.shards)))

    def missing(self) -> list[int]:
        """Return the numbers of the shards that are not there, or not whole."""
        return [k for k in range(len(self.shards)) if self.is_missing(k)]

    def is_missing(self, k: int) -> bool:
        path = self.path(k)
        return bool(check_file(path, self.shard_bytes(k))) or not os.path.isfile(_record_path(path))

    def bad(self) -> dict[int, dict]:
        """Return {id: {name, reason}} of the images that could not be decoded, whose crops are black."""
        records = [_record(self.path(k)) for k in range(len(self.shards))]
        return {image["id"]: image for record in records for image in record["skipped"]}

    def read(self, ids: Sequence[int], out: np.ndarray) -> None:
        """Copy the crops of samples `ids` into `out` (n, image_size, image_size, 3) uint8."""
        shards, rows = np.divmod(np.asarray(ids, np.int64), SHARD_ROWS)
        for k in np.unique(shards).tolist():
            # Reading a mapped file past its end would kill the process (SIGBUS).
            if problem := check_file(self.path(k), self.shard_bytes(k)):
                raise DataError(f"the crops {self.path(k)} changed while they were in use: {problem}", REPAIR)
        for at, (k, row) in enumerate(zip(shards.tolist(), rows.tolist(), strict=True)):
            out[at] = self._shard(k)[row]

    def _shard(self, k: int) -> np.ndarray:
        if k not in self._open:
            shape = (len(self.shards[k]), self.image_size, self.image_size, 3)
            try:
                with open(self.path(k), "rb") as file:
                    if file.read(HEADER_BYTES) != _header(shape):
                        raise ValueError(f"its header is not that of an array of shape {shape}")
                self._open[k] = np.asarray(np.memmap(self.path(k), np.uint8, "r", HEADER_BYTES, shape))
            except (OSError, ValueError) as error:
                raise DataError(f"the crops {self.path(k)} are damaged: {error}", REPAIR) from None
        return self._open[k]


class PartOfCrops:
    """The crops of some samples of a split: those of `SubsetSplit(whole.split, ids)`."""

    def __init__(self, whole: Crops, ids: np.ndarray):
        self.whole, self.ids = whole, ids

    def bad(self) -> dict[int, dict]:
        found = self.whole.bad()
        return {at: found[i] for at, i in enumerate(self.ids.tolist()) if i in found}

    def read(self, ids: Sequence[int], out: np.ndarray) -> None:
        self.whole.read(self.ids[ids], out)


def find(
    root: str | os.PathLike, split: Split, image_size: int, crop: float, exif: bool = False
) -> Crops | PartOfCrops | None:
    """Return the crops of `split` in `root`; None if they are not there, or not completely."""
    found = Crops(root, split, image_size, crop, exif)
    if not found.missing():
        return found
    if isinstance(split, SubsetSplit) and (whole := find(root, split.base, image_size, crop, exif)):
        return PartOfCrops(whole, split.ids)
    return None


def missing(sets: Sequence[Sequence[Crops]]) -> list[tuple[int, int]]:
    """Return (position in `sets`, shard) of all shards that are missing at some size, for `write`."""
    return [(n, k) for n, crops in enumerate(sets) for k in sorted({k for c in crops for k in c.missing()})]


def missing_bytes(sets: Sequence[Sequence[Crops]]) -> dict[str, int]:
    """Return the bytes that the missing shards will take, by size."""
    sizes: dict[str, int] = {}
    for crops in (crops for of_split in sets for crops in of_split):
        name = f"eval-{crops.image_size}"
        sizes[name] = sizes.get(name, 0) + sum(crops.shard_bytes(k) for k in crops.missing())
    return sizes


def write(sets: Sequence[Sequence[Crops]], job: tuple[int, int], on_bad_image: str = "fail") -> None:
    """Write the shard `job` of `missing` at all sizes; each image is decoded once.

    With on_bad_image="skip", an image that cannot be decoded is recorded; otherwise it raises BadImage.
    """
    n, k = job
    wanted = [crops for crops in sets[n] if crops.is_missing(k)]
    split, exif, bad = sets[n][0].split, sets[n][0].transform.exif, []
    with ExitStack() as stack:
        writers = [stack.enter_context(_writer(crops, k, bad)) for crops in wanted]
        for i in sets[n][0].shards[k]:
            try:
                pixels = decode(read_samples(split, [i])[0], split.name(i), exif=exif)
            except BadImage as error:
                if on_bad_image == "fail":
                    raise
                bad.append({"id": i, "name": error.name, "reason": error.reason})
                pixels = np.zeros((1, 1, 3), np.uint8)
            for write_crop in writers:
                write_crop(pixels)


@contextmanager
def _writer(crops: Crops, k: int, bad: list[dict]) -> Iterator[Callable[[np.ndarray], None]]:
    """Yield the function that writes the crop of the next image; the shard gets its name at the end."""
    size = crops.image_size
    with files.durable(crops.path(k)) as file:
        file.write(_header((len(crops.shards[k]), size, size, 3)))
        yield lambda pixels: file.write(crops.transform(pixels).tobytes())
        file.flush()
        record = {"crc32": file_crc32(file.name), "skipped": bad}
        files.write_json(_record_path(crops.path(k)), record)


def _header(shape: tuple[int, ...]) -> bytes:
    """Return the header of a .npy file of uint8: HEADER_BYTES bytes."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return file.getvalue()


def damaged(root: str | os.PathLike) -> Iterator[tuple[str, str]]:
    """Read all crops in `root`; yield (path, reason) for each shard whose bytes are not those written."""
    for path in sorted(glob.glob(os.path.join(glob.escape(root), "eval-*", "*.npy"))):
        try:
            if file_crc32(path) != _record(path)["crc32"]:
                yield path, "its checksum is wrong"
        except (OSError, DataError) as error:
            yield path, str(error).partition("\n")[0]


def _record_path(path: str) -> str:
    return path.removesuffix(".npy") + ".json"


def _record(path: str) -> dict:
    """Return the record of the shard `path`. Raises DataError."""
    from base import schemas

    return schemas.read_json(_record_path(path), schemas.CropRecord, REPAIR)
