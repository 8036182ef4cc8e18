"""Packed datasets: what is stored, what is read back, and how damage is reported."""

import hashlib
import json
import multiprocessing
import os
import pickle
import shutil

import cv2
import numpy as np
import pyarrow as pa
import pytest
from test_images import encoded, photo

import pack_dataset
from base.errors import DataError, UsageError
from base.files import file_crc32
from base.flags import parse_augment
from sources import packed, packing
from sources.decode import decode
from sources.images import TrainTransform
from sources.index import ArraySplit, DatasetIndex, SubsetSplit
from sources.layouts import open_dataset
from sources.packed import open_packed

SIDES = (16, 32)


def make_folders(root, classes=3, per_class=30, val_per_class=4):
    """Class folders of real JPEGs, of different shapes, some smaller than the smallest stored side."""
    for c in range(classes):
        for part, n in (("train", per_class), ("val", val_per_class)):
            folder = root / part / f"class {c}"
            folder.mkdir(parents=True)
            for i in range(n):
                height, width = [(40, 60), (60, 40), (12, 20), (33, 33)][i % 4]
                (folder / f"{part}_{i:02d}.JPEG").write_bytes(encoded(photo(height, width, seed=100 * c + i)))
    return root


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("folders"))


@pytest.fixture(scope="module")
def packed_once(folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "out"
    assert pack_dataset.main(["--data-dir", str(folders), "--out", str(out), "--stored-sides", "16,32"]) == 0
    return out


@pytest.fixture
def out(packed_once, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(packed_once, tmp_path / "copy")


def test_a_packed_dataset_equals_its_source(folders, packed_once):
    source, copy = open_dataset("imagenet", str(folders)), open_dataset("imagenet", str(packed_once))
    assert (copy.name, copy.classes, copy.mean, copy.std) == (
        source.name,
        source.classes,
        source.mean,
        source.std,
    )
    assert copy.fingerprint() == source.fingerprint()
    for mine, theirs in ((copy.train, source.train), (copy.val, source.val)):
        assert np.array_equal(mine.labels, theirs.labels) and mine.labels.dtype == np.int64
        assert [mine.name(i) for i in range(len(mine))] == [theirs.name(i) for i in range(len(theirs))]
    everything = range(len(source.val))
    assert copy.val.read(everything) == source.val.read(everything)  # at full quality


@pytest.mark.parametrize("side", SIDES)
def test_each_copy_is_the_image_with_that_short_side(folders, packed_once, side):
    source = open_dataset("imagenet", str(folders)).train
    copy = next(split for split in open_packed(packed_once).train.copies() if split.side == side)
    ids = np.random.default_rng(0).permutation(len(source))[:40]
    for original, small in zip(source.read(ids), copy.read(ids), strict=True):
        before, after = decode(original), decode(small)
        if min(before.shape[:2]) <= side:
            assert small == original  # never enlarged, never encoded twice
            continue
        scale = side / min(before.shape[:2])
        assert after.shape[:2] == tuple(round(n * scale) for n in before.shape[:2])
        assert np.abs(after.mean((0, 1)) - before.mean((0, 1))).max() < 3


def test_the_copy_for_a_size_has_headroom(packed_once):
    train = open_packed(packed_once).train
    # 12 x 1.25 = 15, 13 x 1.25 = 16.25, 25 x 1.25 = 31.25; beyond the largest there is only the largest.
    assert [train.for_size(size).side for size in (8, 12, 13, 25, 26, 64)] == [16, 16, 32, 32, 32, 32]
    assert train.for_size(8).labels is train.labels
    val = open_packed(packed_once).val
    assert val.for_size(8) is val


def test_the_default_sides_serve_the_default_sizes():
    split = packed.PackedSplit.__new__(packed.PackedSplit)
    split.part, split.manifest, split.side = "train", {"sides": [96, 192, 320]}, None
    split.at_side = lambda side: side
    assert [split.for_size(size) for size in (64, 128, 160, 192, 224)] == [96, 192, 320, 320, 320]


def _read_in_child(split, ids, queue):
    queue.put(split.read(ids))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_the_same(packed_once, method):
    split = open_packed(packed_once).train.for_size(8)
    expected = split.read([5, 80, 5])
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=_read_in_child, args=(split, [5, 80, 5], queue))
    child.start()
    assert queue.get(timeout=60) == expected
    child.join()


def test_a_pickled_split_carries_no_images(packed_once):
    split = open_packed(packed_once).train
    split.read(range(len(split)))
    assert len(split._open) > 1
    copy = pickle.loads(pickle.dumps(split))  # noqa: S301
    assert not copy._open and copy.read([3]) == split.read([3])


def test_hugging_face_datasets_opens_a_shard(packed_once):
    datasets = pytest.importorskip("datasets")
    split = open_packed(packed_once).train.for_size(8)
    table = datasets.Dataset.from_file(split.shard_path(0))
    assert table.features["label"].names == ["class 0", "class 1", "class 2"]
    row = table[7]
    assert (
        np.array_equal(np.asarray(row["image"]), decode(split.read([7])[0]))
        and row["label"] == split.labels[7]
    )


def test_pixels_are_stored_without_loss(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (70, 8, 8, 3), dtype=np.uint8)
    labels = rng.integers(0, 3, 70)
    split = ArraySplit(pixels, labels)
    source = DatasetIndex("tiny", ("a", "b", "c"), split, split, native_size=8)
    assert (
        pack_dataset.pack(source, str(tmp_path / "out"), packing.make_plan(source, (16,), 90), 1, "fail", {})
        == 0
    )
    copy = open_packed(tmp_path / "out")
    assert copy.native_size == 8
    assert all(
        np.array_equal(decode(data), image)
        for data, image in zip(copy.train.read(range(70)), pixels, strict=True)
    )


# --- raw pixels --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def raw_once(folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("raw") / "out"
    more = ["--stored-sides", "16,32", "--raw-sides", "16"]
    assert pack_dataset.main(["--data-dir", str(folders), "--out", str(out), *more]) == 0
    return out


def test_raw_copies_are_the_pixels_that_jpeg_copies_are_encoded_from(folders, raw_once, packed_once):
    source, raw, jpeg = (open_dataset("imagenet", str(d)).train for d in (folders, raw_once, packed_once))
    ids = np.random.default_rng(0).permutation(len(source))
    triples = zip(*(split.read(ids) for split in (source, raw.for_size(8), jpeg.for_size(8))), strict=True)
    for original, pixels, small in triples:
        before = decode(original)
        height, width = before.shape[:2]
        expected = before
        if min(height, width) > 16:
            size = [round(n * 16 / min(height, width)) for n in (width, height)]
            expected = cv2.resize(before, size, interpolation=cv2.INTER_AREA)
            options = [cv2.IMWRITE_JPEG_QUALITY, 90]
            assert cv2.imencode(".jpg", pixels[:, :, ::-1], options)[1].tobytes() == small
        assert np.array_equal(pixels, expected)
        assert not pixels.flags.owndata and not pixels.flags.writeable  # a view into the mapped file
    assert raw.for_size(16).read(ids[:9]) == jpeg.for_size(16).read(ids[:9])  # side 32 is JPEG in both
    assert raw.digest() == jpeg.digest() and raw.content() == jpeg.content()
    assert raw.for_size(8).content() != jpeg.for_size(8).content()


def test_the_copies_of_a_raw_dataset_are_said(raw_once, packed_once):
    (note,) = open_packed(raw_once).notes
    assert note.endswith("1.25 times its size or more: 16 px (raw pixels), 32 px (JPEG)")
    assert not open_packed(packed_once).notes
    assert "raw_sides" not in json.loads((packed_once / "manifest.json").read_text())


@pytest.mark.parametrize("steps", ["full", "padcrop:2,flip", "none", "rrc,randaugment", "jitter,dropout"])
def test_augmentation_of_a_mapped_image_equals_that_of_a_copy(raw_once, steps):
    split = open_packed(raw_once).train.for_size(12)
    transform = TrainTransform(parse_augment(steps), 12, (0.5,) * 3)
    before = split.read(range(len(split)))
    copies = [image.copy() for image in before]
    for i, (image, copy) in enumerate(zip(before, copies, strict=True)):
        assert np.array_equal(transform(image, (0, 1, i)), transform(copy.copy(), (0, 1, i)))
        assert np.array_equal(image, copy)


def test_hugging_face_datasets_opens_raw_pixels(raw_once):
    datasets = pytest.importorskip("datasets")
    split = open_packed(raw_once).train.for_size(8)
    row = datasets.Dataset.from_file(split.shard_path(0))[7]
    assert np.array_equal(np.asarray(row["image"]), split.read([7])[0]) and row["label"] == split.labels[7]


def test_raw_data_is_verified_and_its_settings_are_kept(folders, raw_once, tmp_path, capsys):
    out = shutil.copytree(raw_once, tmp_path / "copy")
    with pytest.raises(UsageError, match=r"packed with raw_sides \[16\], not \[\]"):
        pack_dataset.main(["--data-dir", str(folders), "--out", str(out), "--stored-sides", "16,32"])
    path = out / "train-16" / "00000.arrow"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="1 damaged file "):
        pack_dataset.main(["--data-dir", str(out), "--verify", "--workers", "1"])
    assert "train-16/00000.arrow: its checksum is wrong" in capsys.readouterr().out


@pytest.mark.parametrize(
    "header",
    [b"P6\n3 2\n254\n", b"P6\n3 3\n255\n", b"P6\n# a\n3 2\n255\n", b"P6\n0 2\n255\n", b"P5\n3 2\n255\n"],
)
def test_other_ppm_files_are_left_to_pillow(header, tmp_path):
    table = pa.table(
        {"image": [{"bytes": header + bytes(range(18)), "path": "a"}], "label": [0]}, schema=packed.COLUMNS
    )
    with pa.ipc.new_stream(tmp_path / "00000.arrow", table.schema) as writer:
        writer.write_table(table)
    assert packed.Shard(str(tmp_path / "00000.arrow"), 1).image(0) == header + bytes(range(18))


# --- damage ----------------------------------------------------------------------------------------


def test_a_truncated_shard_is_named_when_the_dataset_is_opened(out):
    path = out / "train-32" / "00001.arrow"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"train-32/00001\.arrow is damaged: it has [\d,]+ bytes") as caught:
        open_packed(out)
    assert "pack_dataset.py" in caught.value.fix


def test_a_missing_shard_is_named(out):
    (out / "val" / "00000.arrow").unlink()
    with pytest.raises(DataError, match=r"val/00000\.arrow"):
        open_packed(out)


def test_flipped_bits_are_found_by_verify_and_its_fix_works(folders, out, capsys):
    path = out / "train-16" / "00000.arrow"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x40
    path.write_bytes(data)
    open_packed(out)  # sizes alone cannot tell
    with pytest.raises(DataError, match="1 damaged file ") as caught:
        pack_dataset.main(["--data-dir", str(out), "--verify", "--workers", "1"])
    assert "00000.arrow: its checksum is wrong" in capsys.readouterr().out
    assert caught.value.fix.startswith("delete damaged files, then run pack_dataset.py again")
    path.unlink()
    assert pack_dataset.main(["--data-dir", str(folders), "--out", str(out), "--stored-sides", "16,32"]) == 0
    assert pack_dataset.main(["--data-dir", str(out), "--verify", "--workers", "1"]) == 0


def test_many_names_are_those_that_are_read_one_by_one(out):
    train = open_packed(out).train
    ids = np.random.default_rng(0).permutation(len(train))[:70]
    part = SubsetSplit(train, ids)
    assert [*part.names_of(range(70))] == [train.name(i) for i in ids] == [*map(part.name, range(70))]
    sha = hashlib.sha256(part.labels.astype("<i8").tobytes())
    for i in ids:
        sha.update(train.name(i).encode() + b"\0")
    assert part.digest() == sha.hexdigest()  # as in the checkpoints of earlier versions


def test_a_damaged_shard_is_an_error_or_harmless_never_a_crash(out):
    path = out / "train-16" / "00000.arrow"
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for at in [*rng.integers(0, 3000, 60), *rng.integers(0, len(whole), 60)]:
        data = bytearray(whole)
        data[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
        split = open_packed(out).train.for_size(8)
        try:
            assert all(isinstance(image, bytes) for image in split.read(range(20)))
        except DataError as error:
            refused += "00000.arrow" in error.what
    assert refused > 5


def test_offsets_that_point_outside_are_refused(out):
    path = out / "train-16" / "00000.arrow"
    split = open_packed(out).train.for_size(8)
    offsets = split._shard(0).offsets[0].tobytes()
    data = bytearray(path.read_bytes())
    at = data.index(offsets) + 4 * 20
    data[at : at + 4] = (2**30).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"00000\.arrow is damaged"):
        open_packed(out).train.for_size(8).read([0])


STRUCT = [{"bytes": b"x", "path": "a"}] * 90
OTHER_SHARDS = {
    "no image": pa.table({"picture": STRUCT}),
    "images that are text": pa.table({"image": ["x"] * 90}),
    "images with 64-bit offsets": pa.table(
        {"image": pa.array(STRUCT, pa.struct({"bytes": pa.large_binary(), "path": pa.string()}))}
    ),
    "images that are missing": pa.table({"image": [{"bytes": None, "path": "a"}] * 90}),
    "a name that is missing": pa.table(
        {"image": pa.array([{"bytes": b"x", "path": None}] * 90, packed.COLUMNS.field("image").type)}
    ),
    "other images": pa.table({"image": STRUCT[:7]}),
    "nothing": pa.table({}),
}


@pytest.mark.parametrize("table", OTHER_SHARDS.values(), ids=OTHER_SHARDS.keys())
def test_a_shard_with_other_columns_is_refused(table, packed_once, tmp_path):
    path = str(tmp_path / "00000.arrow")
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table)
    try:
        shard = packed.Shard(path, 90)
    except DataError as error:
        assert "00000.arrow is damaged" in error.what
    else:
        assert shard.image(3) == b"x" and shard.name(3).endswith("00000.arrow#3")


@pytest.mark.parametrize("labels", [
    np.full(90, 3), np.full(90, -1), np.zeros(89, np.int64), np.zeros(90), np.zeros((90, 1), np.int64),
    np.array(0), b"\x93NUMPY", b"",
])  # fmt: skip
def test_labels_that_do_not_fit_are_refused(labels, out):
    path = out / "train-labels.npy"
    path.write_bytes(labels) if isinstance(labels, bytes) else np.save(path, labels)
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["parts"]["train"] |= {"labels_bytes": path.stat().st_size, "labels_crc32": file_crc32(str(path))}
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"train-labels\.npy"):
        open_packed(out)


def test_a_shard_truncated_while_it_is_read_is_an_error_not_a_crash(out):
    split = open_packed(out).train.for_size(8)
    split.read([0])
    os.truncate(out / "train-16" / "00000.arrow", 0)
    child = os.fork()
    if child == 0:
        try:
            split.read([40])
        except DataError as error:
            os._exit(3 if "00000.arrow changed" in error.what else 4)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3


@pytest.mark.parametrize("damage", ["labels", "manifest", "format", "unfinished"])
def test_other_damage_has_clear_messages(out, damage):
    manifest = out / "manifest.json"
    if damage == "labels":
        labels = bytearray((out / "train-labels.npy").read_bytes())
        labels[-4] ^= 1
        (out / "train-labels.npy").write_bytes(labels)
    elif damage == "manifest":
        manifest.write_text(manifest.read_text()[:-30])
    elif damage == "format":
        manifest.write_text(json.dumps({"format": 99}))
    else:
        os.replace(manifest, out / "packing.json")
    words = {
        "labels": "train-labels.npy",
        "manifest": "manifest.json is unreadable",
        "format": "another version",
        "unfinished": "unfinished",
    }
    with pytest.raises(DataError, match=words[damage]):
        open_packed(out)


def test_the_estimate_is_near_what_is_written(folders, packed_once):
    source = open_dataset("imagenet", str(folders))
    plan = packing.make_plan(source, SIDES, 90)
    needed = packing.estimate(source, plan, packing.groups_of(plan))
    for table in ("train-16", "train-32", "val"):
        written = sum(f.stat().st_size for f in (packed_once / table).iterdir())
        assert needed[table] == pytest.approx(written, rel=0.25, abs=8000), table
