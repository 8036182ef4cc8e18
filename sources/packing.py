"""Making a packed dataset: what to write, how much disk that takes, and one group of shards at a time.

A group is the shards of one range of images, one shard per stored side: each image is read and
decoded once. A shard has its final name only when it is whole and on disk, and a line in
`packing.jsonl` only after that; so a packing that was killed goes on where it was. Processes,
progress and flags are pack_dataset.py's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Sequence

import cv2
import numpy as np
import pyarrow as pa

from base.errors import DataError, UsageError
from sources.images import BadImage, decode
from sources.index import DatasetIndex, Split
from sources.packed import (
    BATCH_ROWS,
    COLUMNS,
    FORMAT,
    MANIFEST,
    REPAIR,
    UNFINISHED,
    check_file,
    file_crc32,
    read_json,
    shard_file,
    table_name,
)

RECORDS = "packing.jsonl"


@dataclasses.dataclass(frozen=True)
class Group:
    """The images `start` ... `stop` - 1 of a part, and the number of their shards."""

    part: str
    k: int
    start: int
    stop: int


def make_plan(index: DatasetIndex, sides: Sequence[int], quality: int) -> dict:
    """What a packing is, in plain values: two runs with the same plan write the same bytes."""
    return {
        "format": FORMAT,
        "name": index.name,
        "classes": list(index.classes),
        "class_names": list(index.class_names) if index.class_names else None,
        "mean": list(index.mean),
        "std": list(index.std),
        "native_size": index.native_size,
        "sides": sorted(sides),
        "quality": quality,
        "source": index.fingerprint(),
        "shard_rows": {"train": _shard_rows(len(index.train)), "val": _shard_rows(len(index.val))},
    }


def _shard_rows(n: int) -> int:
    """About 64 shards, so that every process has work; at most 4,096 images, some 180 MB at 320 px."""
    return min(4096, max(64, -(-n // 64)))


def tables_of(plan: dict, part: str) -> dict[str, int | None]:
    """{table: stored side}; validation is stored once, as it is."""
    sides: list[int | None] = list(plan["sides"]) if part == "train" else [None]
    return {table_name(part, side): side for side in sides}


def groups_of(plan: dict) -> list[Group]:
    groups = []
    for part in ("val", "train"):
        n, rows = plan["source"][f"num_{part}"], plan["shard_rows"][part]
        groups += [Group(part, k, start, min(start + rows, n)) for k, start in enumerate(range(0, n, rows))]
    return groups


# --- one image -----------------------------------------------------------------------------------


def stored(data: bytes | np.ndarray, pixels: np.ndarray, side: int | None, quality: int) -> bytes:
    """The image as it is stored with short side `side` px (None: as it is), its shape kept.

    It is never enlarged: an image that is small enough is stored as the file it was, and one that
    never was a file as a PNG, so that nothing is lost. `pixels` (H, W, 3) uint8 are `data` decoded.
    """
    height, width = pixels.shape[:2]
    if side is None or min(height, width) <= side:
        return data if isinstance(data, bytes) else _encode(".png", pixels, [])
    scale = side / min(height, width)
    size = (max(side, round(width * scale)), max(side, round(height * scale)))
    small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    return _encode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, quality])


def _encode(kind: str, pixels: np.ndarray, options: list[int]) -> bytes:
    return cv2.imencode(kind, cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), options)[1].tobytes()


def estimate(index: DatasetIndex, plan: dict, groups: Iterable[Group], samples: int = 48) -> dict[str, int]:
    """Bytes that each table of `groups` will take, from a few images spread over each part."""
    sizes: dict[str, int] = {}
    count = {"train": 0, "val": 0}
    for group in groups:
        count[group.part] += group.stop - group.start
    for part, n in count.items():
        split = getattr(index, part)
        ids = np.unique(np.linspace(0, len(split) - 1, samples).astype(int)) if n else []
        tables = tables_of(plan, part)
        found = {table: [] for table in tables}
        for data, i in zip(split.read(ids) if n else [], ids, strict=True):
            with contextlib.suppress(BadImage):
                pixels = decode(data, split.name(int(i)))
                for table, side in tables.items():
                    found[table].append(len(stored(data, pixels, side, plan["quality"])))
        for table, lengths in found.items():
            # 60 bytes an image for the name, label and offsets.
            sizes[table] = int(n * (np.mean(lengths) + 60)) if lengths else 0
    return sizes


# --- one group of shards -------------------------------------------------------------------------


def write_group(split: Split, plan: dict, group: Group, out: str, on_bad_image: str = "fail") -> dict:
    """Write the shards of `group` below `out`; returns its record, or what is bad about its images.

    With 'skip', bad images are left out and named in the record. With 'fail', a group with bad
    images is not written: the record then has "bad" alone.
    """
    tables = tables_of(plan, group.part)
    paths = {table: os.path.join(out, shard_file(table, group.k)) for table in tables}
    skipped: list[dict] = []
    try:
        rows = _write(split, plan, group, paths, skipped)
        if skipped and on_bad_image == "fail":
            return {"part": group.part, "k": group.k, "bad": skipped}
        shards = {}
        for table, path in paths.items():
            shards[table] = {
                "rows": rows,
                "bytes": os.path.getsize(path + ".tmp"),
                "crc32": file_crc32(path + ".tmp"),
            }
            os.replace(path + ".tmp", path)
        return {"part": group.part, "k": group.k, "shards": shards, "skipped": skipped}
    finally:
        for path in paths.values():
            with contextlib.suppress(FileNotFoundError):
                os.remove(path + ".tmp")


def _write(split: Split, plan: dict, group: Group, paths: dict[str, str], skipped: list[dict]) -> int:
    """Fill the temporary files; returns the number of images in each."""
    schema, tables, rows = _schema(plan["classes"]), tables_of(plan, group.part), 0
    with contextlib.ExitStack() as stack:
        writers = {}
        for table, path in paths.items():
            os.makedirs(os.path.dirname(path), exist_ok=True)
            file = stack.enter_context(open(path + ".tmp", "wb"))
            stack.callback(lambda file=file: (file.flush(), os.fsync(file.fileno())))
            writers[table] = stack.enter_context(pa.ipc.new_stream(file, schema))
        for batch in _batches(split, plan, group, tables, skipped):
            rows += len(batch["label"])
            for table, writer in writers.items():
                image = pa.StructArray.from_arrays(
                    [pa.array(batch[table], pa.binary()), _paths(batch["path"])],
                    fields=list(schema.field("image").type),
                )
                writer.write_batch(
                    pa.record_batch([image, pa.array(batch["label"], pa.int64())], schema=schema)
                )
    return rows


def _batches(split: Split, plan: dict, group: Group, tables: dict[str, int | None], skipped: list[dict]):
    """Columns of BATCH_ROWS good images each; fewer only in the last."""
    batch = {key: [] for key in (*tables, "path", "label")}
    for start in range(group.start, group.stop, BATCH_ROWS):
        ids = range(start, min(start + BATCH_ROWS, group.stop))
        for i, data in zip(ids, split.read(ids), strict=True):
            name = split.name(i)
            try:
                pixels = decode(data, name, thorough=True)
            except BadImage as error:
                skipped.append({"id": i, "name": error.name, "reason": error.reason})
                continue
            for table, side in tables.items():
                batch[table].append(stored(data, pixels, side, plan["quality"]))
            batch["path"].append(name)
            batch["label"].append(int(split.labels[i]))
            if len(batch["label"]) == BATCH_ROWS:
                yield batch
                batch = {key: [] for key in batch}
    if batch["label"]:
        yield batch


def _paths(names: list[str]) -> pa.Array:
    """Names as Arrow strings, which are UTF-8; file names need not be."""
    return pa.array([name.encode("utf-8", "backslashreplace").decode() for name in names], pa.string())


def _schema(classes: Sequence[str]) -> pa.Schema:
    names = [name.encode("utf-8", "backslashreplace").decode() for name in classes]
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    return COLUMNS.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})


# --- the state on disk ---------------------------------------------------------------------------


def start(out: str, plan: dict) -> dict[tuple[str, int], dict]:
    """Begin or go on in `out`: the records of the groups that are there already, whole.

    Raises DataError where `out` holds a packing of other data, UsageError for other settings.
    """
    finished = os.path.isfile(os.path.join(out, MANIFEST))
    before = os.path.join(out, MANIFEST if finished else UNFINISHED)
    if os.path.isfile(before):
        known = read_json(before, finished)
        _refuse_other(out, known, plan)
        records = _records_of(known) if finished else _read_records(os.path.join(out, RECORDS), known)
    elif os.listdir(out):
        raise UsageError(
            f"{os.path.abspath(out)} is not empty and not a packing", "give an empty or new --out"
        )
    else:
        records = []
        write_json(os.path.join(out, UNFINISHED), plan)
    return {(record["part"], record["k"]): record for record in records if _whole(out, record)}


def _refuse_other(out: str, known: dict, plan: dict) -> None:
    changed = [key for key in plan["source"] if known["source"].get(key) != plan["source"][key]]
    if changed:
        counts = ", ".join(
            f"{part} {known['source'].get(f'num_{part}'):,} images then, {plan['source'][f'num_{part}']:,} now"
            for part in ("train", "val")
        )
        raise DataError(
            f"the source has changed since the packing in {os.path.abspath(out)} began ({', '.join(changed)}; {counts})",
            "restore the source, or pack into another --out (and delete this one)",
        )
    for key in plan:
        if known.get(key) != plan[key]:
            raise UsageError(
                f"{os.path.abspath(out)} holds a packing with {key} {known.get(key)}, not {plan[key]}",
                "give the same values as then, or another --out",
            )


def _records_of(manifest: dict) -> list[dict]:
    records: dict[tuple[str, int], dict] = {}
    for part in ("train", "val"):
        for table in tables_of(manifest, part):
            for k, shard in enumerate(manifest["tables"][table]):
                record = records.setdefault((part, k), {"part": part, "k": k, "shards": {}, "skipped": []})
                record["shards"][table] = shard
        for image in manifest["parts"][part]["skipped"]:
            records[part, image["id"] // manifest["shard_rows"][part]]["skipped"].append(image)
    return list(records.values())


def _read_records(path: str, plan: dict) -> list[dict]:
    from base import schemas

    if not os.path.isfile(path):
        return []
    records, known = [], {(group.part, group.k) for group in groups_of(plan)}
    with open(path, "rb") as file:
        for line in file:
            with contextlib.suppress(
                DataError
            ):  # a line that a kill cut short, or no record: its shards are made again
                record = schemas.parse_json(line, schemas.Record, path, REPAIR)
                tables = tables_of(plan, record["part"])
                if (record["part"], record["k"]) in known and record["shards"].keys() == tables.keys():
                    records.append(record)
    return records


def _whole(out: str, record: dict) -> bool:
    return all(
        check_file(os.path.join(out, shard_file(table, record["k"])), shard["bytes"]) is None
        for table, shard in record["shards"].items()
    )


def add_record(out: str, record: dict) -> None:
    with open(os.path.join(out, RECORDS), "a", encoding="utf-8") as file:
        file.write("\n" + json.dumps(record) + "\n")  # the last line may have been cut


def finish(out: str, index: DatasetIndex, plan: dict, records: dict[tuple[str, int], dict]) -> dict:
    """Write the labels and, last, the manifest; returns it."""
    manifest = {**plan, "parts": {}, "tables": {}}
    for part in ("train", "val"):
        ordered = [records[key] for key in sorted(records) if key[0] == part]
        skipped = [image for record in ordered for image in record["skipped"]]
        split = getattr(index, part)
        labels = np.delete(split.labels, [image["id"] for image in skipped]).astype("<i4")
        path = os.path.join(out, f"{part}-labels.npy")
        _write_whole(path, lambda file, labels=labels: np.save(file, labels))
        digest = plan["source"][part]
        if skipped:
            digest = hashlib.sha256((digest + json.dumps(skipped)).encode()).hexdigest()
        manifest["parts"][part] = {
            "images": len(labels),
            "digest": digest,
            "labels_bytes": os.path.getsize(path),
            "labels_crc32": file_crc32(path),
            "skipped": skipped,
        }
        for table in tables_of(plan, part):
            manifest["tables"][table] = [record["shards"][table] for record in ordered]
    write_json(os.path.join(out, MANIFEST), manifest)
    for name in (UNFINISHED, RECORDS):
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(out, name))
    return manifest


def write_json(path: str, value: dict) -> None:
    _write_whole(path, lambda file: file.write(json.dumps(value, indent=1).encode()))


def _write_whole(path: str, write) -> None:
    """The file is the old one or the new one, never a part."""
    with open(path + ".tmp", "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".tmp", path)
