"""Stored evaluation crops: the same batches as decoding, whatever was interrupted, damaged or left out."""

import os
import shutil
from functools import partial

import pytest
import torch
from test_packed import make_folders

import pack_dataset
from base.device import Runtime
from base.errors import DataError, UsageError
from dataloader import BatchDataset, StoredCrops, eval_loader
from sources import crops
from sources.index import take_subset, training_sample
from sources.layouts import open_dataset

SIZES = {8: 0.875, 24: 0.875}


def pack(data, out, *more) -> int:
    sides = ["--stored-sides", "16,32", "--workers", "1"]
    return pack_dataset.main(["--data-dir", str(data), "--out", str(out), *sides, *more])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("folders"))


@pytest.fixture(scope="module")
def packed(folders, tmp_path_factory):
    """One directory with crops, and one without."""
    root = tmp_path_factory.mktemp("packed")
    assert pack(folders, root / "with", "--eval-sizes", "8,24") == 0
    assert pack(folders, root / "without", "--eval-sizes", "none") == 0
    return root


@pytest.fixture
def out(packed, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(packed / "with", tmp_path / "copy")


def loaded(index, split, size=24, **options) -> tuple[type, list]:
    loader = eval_loader(split, index, image_size=size, batch_size=5, **options)
    return type(loader.dataset), [(images.clone(), labels) for images, labels in loader]


def same(found: tuple, expected: tuple) -> bool:
    assert (found[0], expected[0]) == (StoredCrops, BatchDataset)
    return all(
        torch.equal(a, b)
        for p, q in zip(found[1], expected[1], strict=True)
        for a, b in zip(p, q, strict=True)
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("part", [lambda index: index.val, training_sample], ids=["val", "sample"])
def test_batches_of_crops_equal_decoding_to_the_bit(packed, monkeypatch, part, size, workers):
    monkeypatch.setattr(crops, "SHARD_ROWS", 512)
    new, old = (open_dataset("imagenet", packed / name) for name in ("with", "without"))
    assert same(loaded(new, part(new), size, num_workers=workers), loaded(old, part(old), size))


def test_ranks_read_their_share(packed):
    index, old = (open_dataset("imagenet", packed / name) for name in ("with", "without"))
    for rank in range(2):
        runtime = Runtime(torch.device("cpu"), None, rank, world_size=2)
        assert same(loaded(index, index.val, runtime=runtime), loaded(old, old.val, runtime=runtime))


def test_a_subset_of_the_validation_images_reads_their_crops(packed):
    index, old = (take_subset(open_dataset("imagenet", packed / n), 40) for n in ("with", "without"))
    assert same(loaded(index, index.val), loaded(old, old.val))
    assert loaded(index, training_sample(index))[0] is BatchDataset  # other images than those stored


@pytest.mark.parametrize("options", [{"size": 16}, {"crop": 0.95}])
def test_other_sizes_and_crops_are_decoded(packed, options):
    index = open_dataset("imagenet", packed / "with")
    assert loaded(index, index.val, **options)[0] is BatchDataset


def test_crops_can_be_added_to_a_packed_directory(packed, tmp_path, capsys):
    out = shutil.copytree(packed / "without", tmp_path / "out")
    before = sorted(p.name for p in out.iterdir())
    assert (
        pack_dataset.main(
            ["--data-dir", str(out), "--out", str(out), "--eval-sizes", "24", "--eval-crop", "1"]
        )
        == 0
    )
    assert "eval-24" in capsys.readouterr().out
    assert sorted(p.name for p in out.iterdir() if not p.name.startswith("eval-24-")) == before
    index, old = open_dataset("imagenet", out), open_dataset("imagenet", packed / "without")
    assert same(loaded(index, index.val, crop=1.0), loaded(old, old.val, crop=1.0))


@pytest.mark.parametrize(
    "side, size", [(96, 64), (192, 128), (320, 224), (64, 32), (16, 8), (8, 8), (4096, 2848)]
)
def test_the_default_sizes_are_those_that_the_sides_are_for(side, size):
    assert pack_dataset.default_eval_size(side) == size


def test_sizes_that_cannot_be(tmp_path):
    for flag in (["--eval-sizes", "3"], ["--eval-crop", "0"], ["--eval-crop", "1.1"]):
        with pytest.raises(UsageError):
            pack_dataset.main(["--data-dir", "nowhere", "--out", str(tmp_path), *flag])


# --- interruption and damage -------------------------------------------------------------------------


def contents(out) -> dict:
    return {p.relative_to(out): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


def test_an_interrupted_writing_continues_with_the_missing_shards(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(crops, "SHARD_ROWS", 4)
    index = open_dataset("imagenet", folders)
    sets = crops.planned(tmp_path / "straight", (index.val, training_sample(index)), SIZES)
    for job in crops.missing(sets):
        crops.write(sets, job)
    sets = crops.planned(tmp_path / "killed", (index.val, training_sample(index)), SIZES)
    jobs = crops.missing(sets)
    assert jobs == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    crops.write(sets, jobs[0])
    monkeypatch.setattr(os, "replace", partial(fail_at, 3, os.replace))  # in the middle of the second shard
    with pytest.raises(SystemExit):
        crops.write(sets, jobs[1])
    monkeypatch.undo()
    monkeypatch.setattr(crops, "SHARD_ROWS", 4)
    assert not crops.find(tmp_path / "killed", index.val, 24, 0.875)
    for job in crops.missing(sets):
        crops.write(sets, job)
    assert contents(tmp_path / "killed") == contents(tmp_path / "straight")


def fail_at(count, replace, *paths):
    fail_at.calls = getattr(fail_at, "calls", 0) + 1
    if fail_at.calls == count:
        raise SystemExit
    replace(*paths)


def shards(out, size=24):
    return sorted(out.glob(f"eval-{size}-*/*.npy"))


def test_a_shard_that_is_cut_short_is_not_used_and_written_again(out, packed):
    for path in shards(out):
        path.write_bytes(path.read_bytes()[:-1])
    index = open_dataset("imagenet", out)
    assert loaded(index, index.val)[0] is BatchDataset
    assert pack_dataset.main(["--data-dir", str(out), "--out", str(out), "--eval-sizes", "8,24"]) == 0
    assert contents(out) == contents(packed / "with")


def test_flipped_bits_are_found_by_verify(out, capsys):
    for k, path in enumerate(shards(out)):
        data = bytearray(path.read_bytes())
        data[300 if k else 10] ^= 4
        path.write_bytes(data)
    with pytest.raises(DataError, match="2 bad"):
        pack_dataset.main(["--data-dir", str(out), "--verify", "--workers", "1"])
    assert capsys.readouterr().out.count("00000.npy: its checksum is wrong") == 2


def test_a_damaged_header_and_a_missing_record_are_errors_that_name_the_file(out):
    index = open_dataset("imagenet", out)
    path = crops.find(out, index.val, 24, 0.875).path(0)
    with open(path, "r+b") as file:
        file.seek(70)
        file.write(b"9")
    with pytest.raises(DataError, match=r"00000\.npy are damaged"):
        list(eval_loader(index.val, index, image_size=24, batch_size=5))
    os.unlink(path.replace(".npy", ".json"))
    with pytest.raises(DataError, match=r"00000\.json"):
        list(eval_loader(index.val, index, image_size=24, batch_size=5))


def test_a_shard_truncated_while_it_is_read_is_an_error_not_a_crash(out):
    index = open_dataset("imagenet", out)
    loader = eval_loader(index.val, index, image_size=24, batch_size=5)
    batches = iter(loader)
    next(batches)
    for path in shards(out):
        os.truncate(path, 0)
    with pytest.raises(DataError, match="changed while"):
        list(batches)


def test_bad_images_are_left_out_and_named_as_by_decoding(folders, tmp_path):
    data = shutil.copytree(folders, tmp_path / "data")
    for name in ("class 0", "class 2"):
        for path in sorted((data / "train" / name).iterdir())[:9]:
            path.write_bytes(b"<html>")
    index = open_dataset("imagenet", data)
    sample = training_sample(index)
    (sets,) = crops.planned(tmp_path / "crops", (sample,), SIZES)
    with pytest.raises(DataError, match=r"JPEG: not an image"):
        crops.write([sets], (0, 0))
    assert not list((tmp_path / "crops").glob("*/*"))
    crops.write([sets], (0, 0), "skip")
    options = {"image_size": 24, "batch_size": 5, "on_bad_image": "skip"}
    new = eval_loader(sample, index, **options, crop_root=str(tmp_path / "crops"))
    old = eval_loader(sample, index, **options)
    for (a, b), (c, d) in zip(new, old, strict=True):
        assert torch.equal(a, c) and torch.equal(b, d)
    assert isinstance(new.dataset, StoredCrops) and new.bad == old.bad and new.bad
    with pytest.raises(DataError, match=new.bad[0]):
        list(
            eval_loader(
                sample, index, **options | {"on_bad_image": "fail"}, crop_root=str(tmp_path / "crops")
            )
        )
