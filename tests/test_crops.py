"""Stored evaluation crops: the same batches as decoding, whatever was interrupted, damaged or left out."""

import json
import os
import shlex
import shutil
from collections import namedtuple
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_distributed
import torch
from inprocess import tiny_run
from runs import TIMING
from test_packed import make_folders

import dataloader
import pack_dataset
import train
from base.device import Runtime
from base.errors import DataError, ResourceError, UsageError
from dataloader import BatchDataset, StoredCrops, eval_loader
from harness import crop_cache, preflight
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


def planned(root, splits) -> list[list[crops.Crops]]:
    return [[crops.Crops(root, split, *size, exif=True) for size in SIZES.items()] for split in splits]


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
    sets = planned(tmp_path / "straight", (index.val, training_sample(index)))
    for job in crops.missing(sets):
        crops.write(sets, job)
    sets = planned(tmp_path / "killed", (index.val, training_sample(index)))
    jobs = crops.missing(sets)
    assert jobs == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    crops.write(sets, jobs[0])
    monkeypatch.setattr(os, "replace", partial(fail_at, 3, os.replace))  # in the middle of the second shard
    with pytest.raises(SystemExit):
        crops.write(sets, jobs[1])
    monkeypatch.undo()
    monkeypatch.setattr(crops, "SHARD_ROWS", 4)
    assert not crops.find(tmp_path / "killed", index.val, 24, 0.875, exif=True)
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
    with pytest.raises(DataError, match="2 damaged files"):
        pack_dataset.main(["--data-dir", str(out), "--verify", "--workers", "1"])
    assert capsys.readouterr().out.count("00000.npy: its checksum is wrong") == 2


def test_a_damaged_header_or_record_is_an_error_whose_fix_works(out, packed):
    index = open_dataset("imagenet", out)
    path = crops.find(out, index.val, 24, 0.875, exif=True).path(0)
    with open(path, "r+b") as file:
        file.seek(70)
        file.write(b"9")
    with pytest.raises(DataError, match=r"00000\.npy are damaged"):
        list(eval_loader(index.val, index, image_size=24, batch_size=5))
    record = Path(path.replace(".npy", ".json"))
    record.write_text("garbage")
    with pytest.raises(DataError, match=r"00000\.json") as caught:
        list(eval_loader(index.val, index, image_size=24, batch_size=5))
    assert "delete this file" in caught.value.fix
    record.unlink()
    assert loaded(index, index.val)[0] is BatchDataset
    assert pack_dataset.main(["--data-dir", str(out), "--out", str(out), "--eval-sizes", "8,24"]) == 0
    assert contents(out) == contents(packed / "with")


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
    (sets,) = planned(tmp_path / "crops", (sample,))
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


# --- train.py --cache-eval ---------------------------------------------------------------------------

SMALL = shlex.split(
    "--arch resnet_tiny --epochs 3 --resize-schedule 16,24,32 --phase-batch-sizes 24,16,16 --lr 1e-3 "
    "--augment none --device cpu --amp off --num-workers 0"
)


def train_run(data, out, *more) -> list[dict]:
    assert train.main([*SMALL, "--data-dir", str(data), "--save-dir", str(out), *more]) == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMING} for row in rows]


def test_a_run_with_cached_crops_has_the_same_scores_and_leaves_none(photos, tmp_path, capsys):
    expected = train_run(photos, tmp_path / "plain")
    capsys.readouterr()
    assert train_run(photos, tmp_path / "cached", "--cache-eval") == expected
    # 21 + 21 images of 16, 24 and 32 px
    assert "evaluation crops: 0.00 GB in" in capsys.readouterr().out
    assert not (tmp_path / "cached" / "eval_crops").exists()


def test_a_stopped_run_keeps_its_crops_and_decodes_nothing_when_it_is_resumed(photos, tmp_path, monkeypatch):
    expected = train_run(photos, tmp_path / "plain")
    assert train.main([*SMALL, "--data-dir", str(photos), "--save-dir", str(tmp_path / "a"), "--cache-eval",
                       "--stop-after", "1"]) == 0  # fmt: skip
    found = contents(tmp_path / "a" / "eval_crops")
    assert len(found) == 2 * 2 * 3  # shards and their records, of two splits at three sizes
    monkeypatch.setattr(crops, "write", None)
    monkeypatch.setattr(dataloader, "EvalTransform", None)
    assert train_run(photos, tmp_path / "a", "--resume", "auto") == expected  # the flag was saved


def test_a_run_killed_while_it_writes_crops_continues(photos, tmp_path, monkeypatch):
    expected, fill = train_run(photos, tmp_path / "plain"), crops.write

    def killed(sets, job, *rest):
        if job == (1, 0):
            os._exit(9)
        fill(sets, job, *rest)

    monkeypatch.setattr(crops, "write", killed)
    with pytest.raises(ResourceError, match=r"killed[^\n]*\nfix: use fewer --num-workers and use --resume"):
        train_run(photos, tmp_path / "a", "--cache-eval")
    monkeypatch.undo()
    assert len(list((tmp_path / "a" / "eval_crops").glob("*/*.npy"))) == 3
    assert train_run(photos, tmp_path / "a", "--cache-eval", "--resume", "auto") == expected


def test_cached_crops_that_would_do_nothing_are_noted(packed, tmp_path, capsys):
    data = ["--data-dir", str(packed / "with"), "--save-dir", str(tmp_path), "--stop-after", "1"]
    assert train.main([*SMALL, *data, "--cache-eval", "--eval-size", "24"]) == 0
    assert "note: --cache-eval does nothing here: the packed data has the crops" in capsys.readouterr().out
    assert train.main([*SMALL, *data, "--cache-eval", "--eval-size", "16", "--overwrite"]) == 0
    assert "does nothing" not in capsys.readouterr().out


@pytest.mark.parametrize(("flags", "saves"), [
    ("--epochs 1", False), ("--epochs 3", False), ("--epochs 3 --eval-size 16", True), ("--epochs 4", True),
    ("--epochs 4 --eval-every 4", False),
])  # fmt: skip
def test_cached_crops_that_would_be_read_once_are_noted(flags, saves, tmp_path, capsys):
    crop_cache.check_disk(tiny_run(tmp_path, "--cache-eval", *flags.split()))
    assert ("no image is scored twice" in capsys.readouterr().out) != saves


def test_too_small_a_disk_is_refused_before_the_run_begins(photos, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(crop_cache.shutil, "disk_usage", lambda path: usage(10**9, 0, 10))
    monkeypatch.setattr(preflight, "check_resources", lambda run, former: None)
    with pytest.raises(ResourceError, match="--cache-eval needs"):
        train_run(photos, tmp_path / "a", "--cache-eval")
    assert not (tmp_path / "a").exists()


def test_overwriting_deletes_the_crops_of_the_former_run(photos, tmp_path):
    args = [*SMALL, "--data-dir", str(photos), "--save-dir", str(tmp_path), "--stop-after", "1"]
    assert train.main([*args, "--cache-eval"]) == 0
    assert train.main([*args, "--overwrite"]) == 0
    assert not list(tmp_path.glob("eval_crops/*/*"))


def test_two_ranks_share_the_writing_and_score_as_one(photos, tmp_path):
    expected = train_run(photos, tmp_path / "plain", "--eval-size", "24")
    options = [
        *SMALL,
        "--data-dir",
        photos,
        "--cache-eval",
        "--eval-size",
        24,
        "--save-dir",
        tmp_path / "two",
    ]
    assert test_distributed.run(2, tmp_path / "log", *options) == [0, 0]
    rows = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    assert [row["image_size"] for row in rows] == [row["image_size"] for row in expected]
    assert not (tmp_path / "two" / "eval_crops").exists()


def test_a_rank_that_begins_late_leaves_no_crops_out(tmp_path, monkeypatch):
    monkeypatch.setattr(crops, "SHARD_ROWS", 2)
    run = tiny_run(tmp_path, "--cache-eval")
    assert len(crops.missing(crop_cache.planned(run))) > 3
    for rank in range(2):  # the second one begins when the first one has ended
        run.runtime = SimpleNamespace(rank=rank, world_size=2, is_main=rank == 0, barrier=lambda: None)
        crop_cache.fill(run)
    assert not crops.missing(crop_cache.planned(run))


def test_packed_data_without_crops_says_how_to_store_them(packed, tmp_path, capsys):
    more = ["--resize-schedule", "8,24,24", "--epochs", "3"]
    train_run(packed / "with", tmp_path / "a", *more)
    assert "decodes images" not in capsys.readouterr().out
    train_run(packed / "without", tmp_path / "b", *more, "--eval-crop", "0.9655172")
    (said,) = [line for line in capsys.readouterr().out.splitlines() if "decodes images" in line]
    where = packed / "without"
    assert said.endswith(
        f"python pack_dataset.py --data-dir {where} --out {where} --eval-sizes 8,24 --eval-crop 0.9655172"
    )


def test_held_out_images_are_not_said_to_be_stored_by_packing(packed, tmp_path, capsys):
    train_run(packed / "without", tmp_path, "--holdout", "0.3", "--stop-after", "1")
    assert "decodes images" not in capsys.readouterr().out
