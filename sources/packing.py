"""Write a packed dataset: plan it, estimate its size, and write one group of shards at a time.

A group is a range of images with one shard per stored side, so each image is read and decoded once. A shard
takes its final name when it is complete and on disk; then a line in `packing.jsonl` records its group. An
interrupted packing continues with the groups that have no record. pack_dataset.py is the command.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace

import cv2
import numpy as np
import pyarrow as pa

from base import files
from base.errors import DataError, UsageError
from sources import packed
from sources.decode import BadImage, decode
from sources.index import DatasetIndex, Split, read_samples

RECORDS = "packing.jsonl"
BATCH_BYTES = 2**31  # that a column of a record batch can hold: its offsets are int32
Records = dict[tuple[str, int], dict]  # (part, k) of a group -> its record


# --- the plan ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """The images `ids` of a part, which are shard `k` of every stored side."""

    part: str
    k: int
    ids: range


def make_plan(index: DatasetIndex, sides: Sequence[int], quality: int, raw_sides: Sequence[int] = ()) -> dict:
    """Return the plan of a packing as plain values; equal plans write equal bytes.

    raw_sides: sides, among `sides` or not, that are stored as pixels, not as JPEG
    """
    # Older plans have neither of these.
    raw = {"raw_sides": sorted(raw_sides)} if raw_sides else {}
    exif = {"exif": True} if index.exif else {}
    return {
        "format": packed.FORMAT,
        "name": index.name,
        "classes": list(index.classes),
        "class_names": list(index.class_names) if index.class_names else None,
        "mean": list(index.mean),
        "std": list(index.std),
        "native_size": index.native_size,
        "sides": sorted({*sides, *raw_sides}),
        **raw,
        **exif,
        "quality": quality,
        "source": index.fingerprint(),
        "shard_rows": {"train": _shard_rows(len(index.train)), "val": _shard_rows(len(index.val))},
    }


def _shard_rows(images: int) -> int:
    """Return the images per shard: about 64 shards, for many processes; at most 4,096 (180 MB at 320 px)."""
    return min(4096, max(64, -(-images // 64)))


def as_begun(index: DatasetIndex, out: str) -> DatasetIndex:
    """Return `index` under the name, and with the orientation, with which packing into `out` began.

    Earlier versions called all class folders imagenet_1k, and turned no image.
    """
    for name in (packed.MANIFEST, packed.UNFINISHED):
        if os.path.isfile(os.path.join(out, name)):
            known = packed.read_plan(out, name)
            return replace(index, name=known["name"], exif=known.get("exif", False))
    return index


def tables_of(plan: dict, part: str) -> dict[str, int | None]:
    """Return {table: stored side}; None stands for the original files, which validation keeps."""
    sides = plan["sides"] if part == "train" else [None]
    return {packed.table_name(part, side): side for side in sides}


def groups_of(plan: dict) -> list[Group]:
    groups = []
    for part in ("val", "train"):
        images, rows = range(plan["source"][f"num_{part}"]), plan["shard_rows"][part]
        groups += [Group(part, k, images[first : first + rows]) for k, first in enumerate(images[::rows])]
    return groups


def estimate(index: DatasetIndex, plan: dict, groups: Sequence[Group], samples: int = 48) -> dict[str, int]:
    """Return the bytes that each table of `groups` will take, estimated from a few images of each part."""
    sizes = {}
    for part in ("train", "val"):
        images = sum(len(group.ids) for group in groups if group.part == part)
        split, tables = getattr(index, part), tables_of(plan, part)
        ids = np.unique(np.linspace(0, len(split) - 1, samples).astype(int)) if images else []
        lengths = {table: [] for table in tables}
        for i, data in zip(ids, read_samples(split, ids), strict=True):
            with suppress(BadImage):
                pixels = decode(data, split.name(i), exif=index.exif)
                for table, side in tables.items():
                    lengths[table].append(len(stored(data, pixels, side, plan)))
        for table, measured in lengths.items():
            # 60 bytes per image for the name, the label and the offsets.
            sizes[table] = int(images * (np.mean(measured) + 60)) if measured else 0
    return sizes


# --- one group of shards -------------------------------------------------------------------------


def write_group(index: DatasetIndex, plan: dict, group: Group, out: str, on_bad_image: str = "fail") -> dict:
    """Write the shards of `group` below `out`; return its record, which lists the bad images left out.

    With on_bad_image="fail", a group with bad images is not written; its record lists them as "bad".
    """
    split, tables, schema = getattr(index, group.part), tables_of(plan, group.part), _schema(plan["classes"])
    paths = {table: os.path.join(out, packed.shard_file(table, group.k)) for table in tables}
    rows, bad = 0, []
    try:
        with ExitStack() as stack:
            writers = {}
            for table, path in paths.items():
                file = stack.enter_context(files.durable(path))
                writers[table] = stack.enter_context(pa.ipc.new_stream(file, schema))
            for batch in _batches(split, plan, group, bad):
                rows += len(batch["label"])
                for table, writer in writers.items():
                    writer.write_batch(_record_batch(batch, table, schema))
            if bad and on_bad_image == "fail":
                raise BadImage(bad[0]["name"], bad[0]["reason"])  # the shards are discarded
    except BadImage:
        return {"part": group.part, "k": group.k, "bad": bad}
    shards = {
        table: {"rows": rows, "bytes": os.path.getsize(path), "crc32": files.file_crc32(path)}
        for table, path in paths.items()
    }
    return {"part": group.part, "k": group.k, "shards": shards, "skipped": bad}


def _batches(split: Split, plan: dict, group: Group, bad: list[dict]) -> Iterator[dict[str, list]]:
    """Yield columns of BATCH_ROWS good images, fewer only at the end; append the bad ones to `bad`."""
    tables = tables_of(plan, group.part)
    batch = {column: [] for column in (*tables, "path", "label")}
    for i in group.ids:
        data = read_samples(split, [i])[0]  # one at a time: 256 photos of a camera are a gigabyte
        try:
            pixels = decode(data, split.name(i), thorough=True, exif="exif" in plan)
            stored_as = {table: stored(data, pixels, side, plan) for table, side in tables.items()}
        except BadImage as error:
            bad.append({"id": i, "name": split.name(i), "reason": error.reason})
            continue
        for table, content in stored_as.items():
            batch[table].append(content)
        batch["path"].append(_utf8(split.name(i)))
        batch["label"].append(int(split.labels[i]))
        if len(batch["label"]) == packed.BATCH_ROWS:
            yield batch
            batch = {column: [] for column in batch}
    if batch["label"]:
        yield batch


def stored(data: bytes | np.ndarray, pixels: np.ndarray, side: int | None, plan: dict) -> bytes:
    """Return the image with short side `side` px (None: unchanged) as a file: JPEG, or PPM for a raw side.

    No image is enlarged: one that is small enough keeps its file, or becomes a PNG if it had none, so that
    nothing is lost. `pixels` (H, W, 3) uint8 are `data` decoded. Raises BadImage if the format is too small.
    """
    small = pixels if side is None else resized(pixels, side)
    if side in plan.get("raw_sides", ()):
        return b"P6\n%d %d\n255\n" % small.shape[1::-1] + small.tobytes()
    if small is pixels:
        return data if isinstance(data, bytes) else _encode(".png", pixels, [])
    return _encode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, plan["quality"]])


def resized(pixels: np.ndarray, side: int) -> np.ndarray:
    """Return (H, W, 3) `pixels` resized to a short side of `side` px; smaller ones as they are."""
    height, width = pixels.shape[:2]
    if min(height, width) <= side:
        return pixels
    scale = side / min(height, width)
    size = (max(side, round(width * scale)), max(side, round(height * scale)))
    return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)


def _encode(ending: str, pixels: np.ndarray, options: list[int]) -> bytes:
    done, content = cv2.imencode(ending, cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), options)
    if not done:  # JPEG ends at 65,500 px
        width, height = pixels.shape[1::-1]
        raise BadImage("", f"{width:,} x {height:,} px do not fit into a {ending[1:].upper()}")
    return content.tobytes()


def _record_batch(batch: dict[str, list], table: str, schema: pa.Schema) -> pa.RecordBatch:
    if sum(map(len, batch[table])) >= BATCH_BYTES:
        first, last = batch["path"][0], batch["path"][-1]
        images = f"the {len(batch['path'])} images from {first} to {last}"
        what = f"{images} take more than 2 GiB, too much for a batch"
        raise DataError(what, "make these image files smaller")
    columns = [pa.array(batch[table], pa.binary()), pa.array(batch["path"], pa.string())]
    image = pa.StructArray.from_arrays(columns, fields=list(schema.field("image").type))
    return pa.record_batch([image, pa.array(batch["label"], pa.int64())], schema=schema)


def _schema(classes: Sequence[str]) -> pa.Schema:
    names = [_utf8(name) for name in classes]
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    return packed.COLUMNS.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def _utf8(name: str) -> str:
    """Return a file name as valid UTF-8, which Arrow requires and file systems do not."""
    return name.encode("utf-8", "backslashreplace").decode()


# --- the state on disk ---------------------------------------------------------------------------


def start(out: str, plan: dict) -> Records:
    """Start packing into `out`, or continue; return the records of the groups whose shards are complete.

    Raises DataError if `out` was packed from other data, and UsageError if its settings were different.
    """
    if os.path.isfile(os.path.join(out, packed.MANIFEST)):
        known = packed.read_plan(out, packed.MANIFEST)
        records = _records_of(known)
    elif os.path.isfile(os.path.join(out, packed.UNFINISHED)):
        known = packed.read_plan(out, packed.UNFINISHED)
        records = _read_records(out, known)
        if not records:  # nothing is packed yet, perhaps because the disk was too small for these sides
            known = plan
            _write_json(os.path.join(out, packed.UNFINISHED), plan)
    elif set(os.listdir(out)) - {packed.UNFINISHED + ".partial"}:  # a killed process may have left it
        what = f"{os.path.abspath(out)} is neither empty nor a packed dataset"
        raise UsageError(what, "use an empty or new --out")
    else:
        known, records = plan, []
        _write_json(os.path.join(out, packed.UNFINISHED), plan)
    _refuse_other(out, known, plan)
    return {(record["part"], record["k"]): record for record in records if _is_complete(out, record)}


def _refuse_other(out: str, known: dict, plan: dict) -> None:
    where, before, now = os.path.abspath(out), known["source"], plan["source"]
    if changed := [key for key in now if before.get(key) != now[key]]:
        train = f"train {before['num_train']:,} images then, {now['num_train']:,} now"
        val = f"val {before['num_val']:,} images then, {now['num_val']:,} now"
        changes = f"{', '.join(changed)}; {train}, {val}"
        what = f"the source has changed since packing into {where} began ({changes})"
        raise DataError(what, "restore the source, or pack into another --out (and delete this one)")
    for key in {**plan, "raw_sides": []}:  # which only plans with such sides have
        if known.get(key, []) != plan.get(key, []):
            what = f"{where} is packed with {key} {known.get(key, [])}, not {plan.get(key, [])}"
            raise UsageError(what, "use the same value, or another --out")


def _records_of(manifest: dict) -> list[dict]:
    """Return the records that a manifest was made from."""
    records: Records = {}
    for part in ("train", "val"):
        for table in tables_of(manifest, part):
            for k, shard in enumerate(manifest["tables"][table]):
                record = records.setdefault((part, k), {"part": part, "k": k, "shards": {}, "skipped": []})
                record["shards"][table] = shard
        for image in manifest["parts"][part]["skipped"]:
            records[part, image["id"] // manifest["shard_rows"][part]]["skipped"].append(image)
    return list(records.values())


def _read_records(out: str, plan: dict) -> list[dict]:
    from base import schemas

    path = os.path.join(out, RECORDS)
    if not os.path.isfile(path):
        return []
    records, known = [], {(group.part, group.k) for group in groups_of(plan)}
    with open(path, "rb") as file:
        for line in file:
            with suppress(DataError):  # a line cut short by a kill: its group is written again
                record = schemas.parse_json(line, schemas.Record, path, packed.REPAIR)
                tables = tables_of(plan, record["part"])
                if (record["part"], record["k"]) in known and record["shards"].keys() == tables.keys():
                    records.append(record)
    return records


def _is_complete(out: str, record: dict) -> bool:
    paths = {packed.shard_file(table, record["k"]): shard for table, shard in record["shards"].items()}
    return not any(files.check_file(os.path.join(out, path), shard["bytes"]) for path, shard in paths.items())


def add_record(out: str, record: dict) -> None:
    with open(os.path.join(out, RECORDS), "a", encoding="utf-8") as file:
        file.write("\n" + json.dumps(record) + "\n")  # the last line may have been cut short


def finish(out: str, index: DatasetIndex, plan: dict, records: Records) -> dict:
    """Write the labels and, last, the manifest; return it."""
    manifest = {**plan, "parts": {}, "tables": {}}
    for part in ("train", "val"):
        ordered = [records[key] for key in sorted(records) if key[0] == part]
        skipped = [image for record in ordered for image in record["skipped"]]
        every = getattr(index, part).labels
        labels = np.delete(every, [image["id"] for image in skipped]).astype("<i4")
        if lost := sorted({*every.tolist()} - {*labels.tolist()}):
            what = f"all {part} images of {', '.join(index.classes[k] for k in lost[:3])} are bad"
            raise DataError(what, "replace them, then pack into a new --out")
        path = os.path.join(out, f"{part}-labels.npy")
        with files.durable(path) as file:
            np.save(file, labels)
        digest = plan["source"][part]
        if skipped:
            digest = hashlib.sha256((digest + json.dumps(skipped)).encode()).hexdigest()
        manifest["parts"][part] = {
            "images": len(labels),
            "digest": digest,
            "labels_bytes": os.path.getsize(path),
            "labels_crc32": files.file_crc32(path),
            "skipped": skipped,
        }
        for table in tables_of(plan, part):
            manifest["tables"][table] = [record["shards"][table] for record in ordered]
    _write_json(os.path.join(out, packed.MANIFEST), manifest)
    for name in (packed.UNFINISHED, RECORDS):
        with suppress(FileNotFoundError):
            os.remove(os.path.join(out, name))
    return manifest


def _write_json(path: str, value: dict) -> None:
    with files.durable(path) as file:
        file.write(json.dumps(value, indent=1).encode())
