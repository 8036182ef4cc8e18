"""Reading a packed dataset: resized copies of every image, in Arrow shards that are memory-mapped.

On disk, next to `manifest.json`: one folder per stored side (`train-96/00000.arrow`, ...) and `val/`.
A shard is an Arrow IPC stream with the columns image {bytes, path} and label, so Hugging Face
`datasets` opens it too (`Dataset.from_file`). How the shards are made is in `sources.packing`.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from base.errors import DataError
from sources.index import DatasetIndex, Split

COLUMNS = pa.schema(
    [
        pa.field("image", pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])),
        pa.field("label", pa.int64()),
    ]
)
MANIFEST, UNFINISHED = "manifest.json", "packing.json"
FORMAT = 1
BATCH_ROWS = 256  # images in each record batch of a shard
# RandomResizedCrop cuts 0.73 of the side on average: from 1.15 times the size on, few crops are
# enlarged by much. Measured per stored side in benchmarks/README.md.
HEADROOM = 1.15
REPAIR = (
    "run pack_dataset.py again with the same arguments: it makes only the shards that are missing or damaged"
)


class PackedSplit(Split):
    """The stored copies of one split; `side` is the one that `read` takes (None: the files as they were).

    Shards are opened where they are first read. Their pages belong to the page cache, shared by all
    workers; what a process holds itself is the labels and a few hundred bytes per record batch.
    """

    def __init__(self, root: str, part: str, manifest: dict, labels: np.ndarray, side: int | None):
        self.root, self.part, self.manifest, self.labels, self.side = root, part, manifest, labels, side
        self.table = table_name(part, side)
        rows = [shard["rows"] for shard in manifest["tables"][self.table]]
        self.starts = np.concatenate([[0], np.cumsum(rows, dtype=np.int64)])
        self._open: dict[int, Shard] = {}

    def __getstate__(self):
        return {**self.__dict__, "_open": {}}

    def for_size(self, image_size: int) -> PackedSplit:
        """The copy to train at `image_size` px from: the smallest side with headroom, or the largest."""
        sides = self.manifest["sides"] if self.part == "train" else []
        if not sides:
            return self
        side = min((s for s in sides if s >= HEADROOM * image_size), default=max(sides))
        return self if side == self.side else self._at(side)

    def copies(self) -> list[PackedSplit]:
        """The split once per stored side."""
        return [self._at(side) for side in self.manifest["sides"]] if self.part == "train" else [self]

    def _at(self, side: int) -> PackedSplit:
        return PackedSplit(self.root, self.part, self.manifest, self.labels, side)

    def shard_path(self, k: int) -> str:
        return os.path.join(self.root, shard_file(self.table, k))

    def _shard(self, k: int) -> Shard:
        if k not in self._open:
            self._open[k] = Shard(self.shard_path(k), int(self.starts[k + 1] - self.starts[k]))
        return self._open[k]

    def _where(self, ids: Sequence[int]) -> Iterator[tuple[Shard, int]]:
        """(shard, row) of each id; one search for all of them."""
        ids = np.asarray(ids, np.int64)
        shards = self.starts.searchsorted(ids, "right") - 1
        for k in np.unique(shards).tolist():
            self._shard(k).check_size()
        for k, row in zip(shards.tolist(), (ids - self.starts[shards]).tolist(), strict=True):
            yield self._shard(k), row

    def read(self, ids: Sequence[int]) -> list[bytes | np.ndarray]:
        return [shard.image(row) for shard, row in self._where(ids)]

    def name(self, i: int) -> str:
        return next(shard.name(row) for shard, row in self._where([i]))

    def digest(self) -> str:
        """That of the split it was packed from: the same images and labels, whatever their size."""
        return self.manifest["parts"][self.part]["digest"]

    def damaged_shards(self) -> Iterator[tuple[str, str]]:
        """(path, what is wrong) for every shard whose bytes are not those that were written. Reads all."""
        for k, written in enumerate(self.manifest["tables"][self.table]):
            problem = check_file(self.shard_path(k), written["bytes"], written["crc32"])
            if problem:
                yield self.shard_path(k), problem


class Shard:
    """One memory-mapped Arrow stream."""

    def __init__(self, path: str, rows: int):
        self.path = path
        try:
            self.size = os.path.getsize(path)
            self.table = pa.ipc.open_stream(pa.memory_map(path)).read_all()
            if not self.table.schema.equals(COLUMNS):
                raise ValueError("it has other columns")
            self.table.validate(full=True)  # offsets of a damaged file may point anywhere
            if any(column.null_count for column in self.table.flatten().columns):
                raise ValueError("it lacks images or labels")
            chunks = [chunk.field("bytes") for chunk in self.table.column("image").chunks]
            if len(self.table) != rows or any(len(chunk) != BATCH_ROWS for chunk in chunks[:-1]):
                raise ValueError(f"it has {len(self.table)} images, the manifest says {rows}")
            # Slicing these buffers takes half a microsecond an image; `as_py` takes 9, `take` 80.
            self.offsets = [np.frombuffer(chunk.buffers()[1], np.int32)[chunk.offset :] for chunk in chunks]
            self.data = [memoryview(chunk.buffers()[2] or b"") for chunk in chunks]
        except (OSError, pa.ArrowException, KeyError, ValueError, OverflowError, MemoryError) as error:
            raise DataError(f"the shard {path} is damaged or missing: {error}", REPAIR) from error

    def check_size(self) -> None:
        """A file cut short under its mapping would end the process with SIGBUS."""
        problem = check_file(self.path, self.size)
        if problem:
            raise DataError(f"the shard {self.path} changed while it was read: {problem}", REPAIR)

    def image(self, row: int) -> bytes:
        batch, row = divmod(row, BATCH_ROWS)
        offsets = self.offsets[batch]
        return bytes(self.data[batch][offsets[row] : offsets[row + 1]])

    def name(self, row: int) -> str:
        batch, row = divmod(row, BATCH_ROWS)
        path = self.table.column("image").chunk(batch).field("path")[row].as_buffer()
        return (
            os.fsdecode(path.to_pybytes()) if path is not None else f"{self.path}#{batch * BATCH_ROWS + row}"
        )


def table_name(part: str, side: int | None) -> str:
    return part if side is None else f"{part}-{side}"


def shard_file(table: str, k: int) -> str:
    """Relative path of shard `k`."""
    return os.path.join(table, f"{k:05d}.arrow")


def check_file(path: str, size: int, crc32: int | None = None) -> str | None:
    """What is wrong with the file, or None. Its content is read only where a checksum is given."""
    try:
        found = os.path.getsize(path)
        if found != size:
            return f"it has {found:,} bytes instead of {size:,}"
        if crc32 is not None and file_crc32(path) != crc32:
            return "its checksum is wrong"
    except OSError as error:
        return error.strerror or str(error)
    return None


def file_crc32(path: str) -> int:
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return value


def read_json(path: str, finished: bool = True) -> dict:
    """manifest.json, or packing.json while it is not `finished`."""
    from base import schemas

    if finished:
        return schemas.read_packing(path, schemas.Manifest, FORMAT, REPAIR)
    return schemas.read_packing(path, schemas.Plan, FORMAT, REPAIR)


def open_packed(root: str | os.PathLike) -> DatasetIndex:
    """The dataset packed in `root`, with its original classes and names.

    Every shard's presence and size are checked here, its checksum by `pack_dataset.py --verify`.
    Raises DataError for a packing that is unfinished, damaged, or not one at all.
    """
    root = os.fspath(root)
    if not os.path.isfile(os.path.join(root, MANIFEST)):
        state = (
            "is not finished" if os.path.isfile(os.path.join(root, UNFINISHED)) else "has no manifest.json"
        )
        raise DataError(f"the packed dataset {os.path.abspath(root)} {state}", REPAIR)
    manifest = read_json(os.path.join(root, MANIFEST))
    for table, shards in manifest["tables"].items():
        for k, shard in enumerate(shards):
            problem = check_file(os.path.join(root, shard_file(table, k)), shard["bytes"])
            if problem:
                raise DataError(
                    f"the shard {os.path.join(root, shard_file(table, k))} is damaged: {problem}", REPAIR
                )
    # Which copy is read is a question of the training size; until it is asked, the largest.
    largest = max(manifest["sides"])
    return DatasetIndex(
        name=manifest["name"],
        classes=tuple(manifest["classes"]),
        train=PackedSplit(root, "train", manifest, _labels(root, "train", manifest), largest),
        val=PackedSplit(root, "val", manifest, _labels(root, "val", manifest), None),
        mean=tuple(manifest["mean"]),
        std=tuple(manifest["std"]),
        native_size=manifest["native_size"],
        class_names=tuple(manifest["class_names"]) if manifest["class_names"] else None,
    )


def _labels(root: str, part: str, manifest: dict) -> np.ndarray:
    """(n,) int64 from the file beside the manifest: opening 300 shards for them would take a second."""
    path, known = os.path.join(root, f"{part}-labels.npy"), manifest["parts"][part]
    problem = check_file(path, known["labels_bytes"], known["labels_crc32"])
    if problem:
        raise DataError(f"the labels {path} are damaged: {problem}", REPAIR)
    try:
        # Mapped, so that no header can ask for more memory than there are bytes.
        labels = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, MemoryError, OverflowError) as error:
        raise DataError(f"the labels {path} are damaged: {error}", REPAIR) from None
    wrong = labels.dtype.kind not in "iu" or labels.shape != (known["images"],)
    if wrong or (len(labels) and not 0 <= labels.min() <= labels.max() < len(manifest["classes"])):
        raise DataError(
            f"the labels {path} are not {known['images']} of {len(manifest['classes'])} classes", REPAIR
        )
    return np.array(labels, np.int64)
