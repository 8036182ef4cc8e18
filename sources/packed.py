"""Read a packed dataset: resized copies of every image in memory-mapped Arrow shards.

The directory holds `manifest.json`, a folder of shards per stored side (`train-96/00000.arrow`, ...) and
`val/`. A shard is an Arrow IPC stream with the columns image {bytes, path} and label, which Hugging Face
`datasets` can open, too (`Dataset.from_file`). Raw pixels are PPM files: a line of text, then the bytes of
the image. `sources.packing` writes all of it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from base.errors import DataError
from base.files import check_file
from sources.index import DatasetIndex, Split

COLUMNS = pa.schema({"image": pa.struct({"bytes": pa.binary(), "path": pa.string()}), "label": pa.int64()})
MANIFEST, UNFINISHED = "manifest.json", "packing.json"
FORMAT = 1
BATCH_ROWS = 256  # images in each record batch of a shard
# RandomResizedCrop takes 0.73 of the side on average and enlarges smaller crops, which loses detail:
# benchmarks/README.md shows how much for each stored side.
HEADROOM = 1.25
REPACK = "delete this directory and pack the data again: without the manifest, nothing in it can be used"
RAW = re.compile(rb"P6\n(\d{1,5}) (\d{1,5})\n255\n")  # the header of a PPM file, as packing writes it
REPAIR = "delete damaged files, then run pack_dataset.py again with the same arguments to rewrite them"


class PackedSplit(Split):
    """One part of a packed dataset, read from the copy with short side `side` px (None: the original files).

    Shards are opened on first use. Their pages belong to the page cache, which all workers share; each
    process holds only the labels and a few hundred bytes per record batch.
    """

    def __init__(self, root: str, part: str, manifest: dict, labels: np.ndarray, side: int | None):
        self.root, self.part, self.manifest, self.labels, self.side = root, part, manifest, labels, side
        self.crop_root, self.table = root, table_name(part, side)
        rows = [shard["rows"] for shard in manifest["tables"][self.table]]
        self.starts = np.concatenate([[0], np.cumsum(rows, dtype=np.int64)])
        self._open: dict[int, Shard] = {}

    def __getstate__(self):
        return {**self.__dict__, "_open": {}}

    def for_size(self, image_size: int) -> PackedSplit:
        """Return the copy to train from at `image_size` px: the smallest with headroom, or the largest."""
        if self.part == "val":
            return self
        sides = self.manifest["sides"]
        side = min((s for s in sides if s >= HEADROOM * image_size), default=max(sides))
        return self if side == self.side else self.at_side(side)

    def copies(self) -> list[PackedSplit]:
        """Return this part once per stored side."""
        return [self.at_side(side) for side in self.manifest["sides"]] if self.part == "train" else [self]

    def at_side(self, side: int) -> PackedSplit:
        return PackedSplit(self.root, self.part, self.manifest, self.labels, side)

    def read(self, ids: Sequence[int]) -> list[bytes | np.ndarray]:
        return [shard.image(row) for shard, row in self._rows(ids)]

    def name(self, i: int) -> str:
        return next(shard.name(row) for shard, row in self._rows([i]))

    def names_of(self, ids: Sequence[int]) -> Iterator[str]:
        ids = np.asarray(ids, np.int64)
        shards = self.starts.searchsorted(ids, "right") - 1
        at, names = -1, []
        for k, row in zip(shards.tolist(), (ids - self.starts[shards]).tolist(), strict=True):
            if k != at:
                at, names = k, self._shard(k).names()
            yield names[row]

    def digest(self) -> str:
        """Return the digest of the split that was packed: equal for every stored side."""
        return self.manifest["parts"][self.part]["digest"]

    def content(self) -> str:
        if self.side is None:  # the original files
            return self.digest()
        raw = self.side in self.manifest.get("raw_sides", ())
        kind = "raw" if raw else f"JPEG quality {self.manifest['quality']}"
        return f"{self.digest()} at {self.side} px, {kind}"

    def damaged_shards(self) -> Iterator[tuple[str, str]]:
        """Read all shards; yield (path, reason) for each whose bytes are not those that were written."""
        for k, written in enumerate(self.manifest["tables"][self.table]):
            if problem := check_file(self.shard_path(k), written["bytes"], written["crc32"]):
                yield self.shard_path(k), problem

    def shard_path(self, k: int) -> str:
        return os.path.join(self.root, shard_file(self.table, k))

    def _rows(self, ids: Sequence[int]) -> Iterator[tuple[Shard, int]]:
        """Yield the (shard, row) of each id."""
        ids = np.asarray(ids, np.int64)
        shards = self.starts.searchsorted(ids, "right") - 1
        for k in np.unique(shards).tolist():
            self._shard(k).check_size()
        for k, row in zip(shards.tolist(), (ids - self.starts[shards]).tolist(), strict=True):
            yield self._shard(k), row

    def _shard(self, k: int) -> Shard:
        if k not in self._open:
            self._open[k] = Shard(self.shard_path(k), int(self.starts[k + 1] - self.starts[k]))
        return self._open[k]


class Shard:
    """A memory-mapped Arrow stream of `rows` images. Raises DataError if it is not one."""

    def __init__(self, path: str, rows: int):
        self.path = path
        try:
            self.size = os.path.getsize(path)
            self.table = pa.ipc.open_stream(pa.memory_map(path)).read_all()
            if not self.table.schema.equals(COLUMNS):
                raise ValueError("it has other columns")
            self.table.validate(full=True)  # offsets of a damaged file may point anywhere
            if any(column.null_count for column in self.table.flatten().columns):
                raise ValueError("images or labels are missing")
            chunks = [chunk.field("bytes") for chunk in self.table.column("image").chunks]
            if len(self.table) != rows or any(len(chunk) != BATCH_ROWS for chunk in chunks[:-1]):
                raise ValueError(f"it has {len(self.table)} images, the manifest says {rows}")
            # Slicing these buffers takes half a microsecond per image; `as_py` takes 9, `take` 80.
            self.offsets = [np.frombuffer(chunk.buffers()[1], np.int32)[chunk.offset :] for chunk in chunks]
            self.data = [memoryview(chunk.buffers()[2] or b"") for chunk in chunks]
        except (OSError, pa.ArrowException, KeyError, ValueError, OverflowError, MemoryError) as error:
            raise DataError(f"the shard {path} is damaged or missing: {error}", REPAIR) from error

    def check_size(self) -> None:
        """Raise DataError if the size has changed: reading past the end would kill the process (SIGBUS)."""
        if problem := check_file(self.path, self.size):
            raise DataError(f"the shard {self.path} changed while it was in use: {problem}", REPAIR)

    def image(self, row: int) -> bytes | np.ndarray:
        """Return the image's file; of raw pixels a view into the mapped shard, (H, W, 3) uint8."""
        batch, row = divmod(row, BATCH_ROWS)
        offsets = self.offsets[batch]
        data = self.data[batch][offsets[row] : offsets[row + 1]]
        if header := RAW.match(data):
            width, height = map(int, header.groups())
            if len(data) == header.end() + height * width * 3:
                return np.frombuffer(data, np.uint8, offset=header.end()).reshape(height, width, 3)
        return bytes(data)

    def name(self, row: int) -> str:
        batch, at = divmod(row, BATCH_ROWS)
        path = self.table.column("image").chunk(batch).field("path")[at].as_buffer()
        return os.fsdecode(path.to_pybytes())

    def names(self) -> list[str]:
        """Return all names: a hundred times as fast as one by one."""
        return self.table.flatten().column("image.path").to_pylist()


def table_name(part: str, side: int | None) -> str:
    return part if side is None else f"{part}-{side}"


def shard_file(table: str, k: int) -> str:
    """Return the path of shard `k`, relative to the packed dataset."""
    return os.path.join(table, f"{k:05d}.arrow")


def read_plan(root: str, name: str) -> dict:
    """Read MANIFEST, or UNFINISHED, its substitute during packing. Raises DataError if it is damaged."""
    from base import schemas

    schema = schemas.Manifest if name == MANIFEST else schemas.Plan
    fix = REPACK if name == MANIFEST else REPAIR
    return schemas.read_packing(os.path.join(root, name), schema, FORMAT, fix)


def open_packed(root: str | os.PathLike) -> DatasetIndex:
    """Open the packed dataset in `root`, with its original classes and names.

    The presence and size of every shard are checked; `pack_dataset.py --verify` also checks their checksums.
    Raises DataError if it is unfinished or damaged, or if `root` is not a packed dataset.
    """
    root = os.fspath(root)
    if not os.path.isfile(os.path.join(root, MANIFEST)):
        unfinished = os.path.isfile(os.path.join(root, UNFINISHED))
        state = "is unfinished" if unfinished else f"has no {MANIFEST}"
        raise DataError(f"the packed dataset {os.path.abspath(root)} {state}", REPAIR)
    manifest = read_plan(root, MANIFEST)
    for table, shards in manifest["tables"].items():
        for k, shard in enumerate(shards):
            path = os.path.join(root, shard_file(table, k))
            if problem := check_file(path, shard["bytes"]):
                raise DataError(f"the shard {path} is damaged: {problem}", REPAIR)
    largest = max(manifest["sides"])  # until `for_size` chooses one
    return DatasetIndex(
        name=manifest["name"],
        classes=tuple(manifest["classes"]),
        train=PackedSplit(root, "train", manifest, _labels(root, "train", manifest), largest),
        val=PackedSplit(root, "val", manifest, _labels(root, "val", manifest), None),
        mean=tuple(manifest["mean"]),
        std=tuple(manifest["std"]),
        native_size=manifest["native_size"],
        exif=manifest.get("exif", False),
        class_names=tuple(manifest["class_names"]) if manifest["class_names"] else None,
        notes=_notes(manifest),
    )


def _notes(manifest: dict) -> tuple[str, ...]:
    """Return which copies are read at which sizes, if some are raw; those are better than JPEG, not equal."""
    if not (raw := manifest.get("raw_sides")):
        return ()
    copies = [f"{side} px (raw pixels)" if side in raw else f"{side} px (JPEG)" for side in manifest["sides"]]
    return (f"training reads the smallest copy of {HEADROOM} times its size or more: {', '.join(copies)}",)


def _labels(root: str, part: str, manifest: dict) -> np.ndarray:
    """Read (n,) int64 labels from their own file: opening 300 shards for them would take a second."""
    path, known = os.path.join(root, f"{part}-labels.npy"), manifest["parts"][part]
    images, classes = known["images"], len(manifest["classes"])
    try:
        if problem := check_file(path, known["labels_bytes"], known["labels_crc32"]):
            raise ValueError(problem)
        # Memory-mapped, so that a damaged header cannot ask for more memory than the file has bytes.
        labels = np.load(path, mmap_mode="r", allow_pickle=False)
        if labels.dtype.kind not in "iu" or labels.shape != (images,):
            raise ValueError(f"they are not {images:,} whole numbers")
        if images and not 0 <= labels.min() <= labels.max() < classes:
            raise ValueError(f"they are not all below the number of classes, {classes:,}")
    except (OSError, ValueError, EOFError, MemoryError, OverflowError) as error:
        raise DataError(f"the labels {path} are damaged: {error}", REPAIR) from None
    return np.array(labels, np.int64)
