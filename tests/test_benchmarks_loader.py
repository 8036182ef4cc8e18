"""The loader benchmarks run, and measure what they say."""

import json

import numpy as np
import pytest
from test_images import encoded, photo
from test_packed import make_folders

from base.errors import DataError, UsageError
from benchmarks import loader, memory, stages, stored_sides
from sources.packed import open_packed

KEYS = {"size", "loader", "augmentation", "workers", "images_per_second", "ratio_to_torchvision"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("photographs"), classes=2, per_class=20)


@pytest.mark.slow
def test_the_loader_benchmark_writes_rows_and_a_picture(folders, tmp_path, capsys):
    out = tmp_path / "loader.json"
    loader.main(["--data-dir", str(folders), "--sizes", "16", "--workers", "1", "--stored-sides", "24",
                 "--seconds", "0.1", "--json", str(out)])  # fmt: skip
    rows = json.loads(out.read_text())
    assert {row["loader"] for row in rows} >= {"packed", "full-size", "torchvision"}
    assert {row["augmentation"] for row in rows} == {"crop-flip", "full"}
    for row in rows:
        assert row.keys() == KEYS and row["images_per_second"] > 0
        base = next(
            r for r in rows if r["loader"] == "torchvision" and r["augmentation"] == row["augmentation"]
        )
        expected = row["images_per_second"] / base["images_per_second"]
        assert row["ratio_to_torchvision"] == pytest.approx(expected, rel=0.02)
    assert (tmp_path / "loader.png").stat().st_size > 5000
    assert "x torchvision" in capsys.readouterr().out


def test_the_data_need_only_train_and_are_limited(folders, tmp_path):
    (folders / "val").rename(folders / "unused")
    index = loader.gather(str(folders), 10, tmp_path / "scratch")
    assert len(index.train) == 10 and index.train.labels.tolist() == [0] * 5 + [1] * 5
    packed = loader.pack(index, (24,), tmp_path / "packed")
    assert len(packed.train) == 10
    for name, make in loader.loaders(index, packed, tmp_path / "scratch", 16, "crop-flip", 1).items():
        if name in ("packed", "full-size"):
            images, labels, replaced = next(make())
            assert images.shape == (loader.BATCH, 16, 16, 3) and len(labels) == loader.BATCH and not replaced


def test_a_rate_is_images_over_seconds(monkeypatch):
    clock = iter(np.arange(0, 100, 0.5))
    monkeypatch.setattr(loader.time, "perf_counter", lambda: next(clock))
    batches = iter([(None, [0] * 128)] * 100)
    rate, _ = loader.measure(batches, workers=1, seconds=3)
    assert rate == pytest.approx(
        128 * 5 / 3
    )  # the clock is read before each of 5 batches, half a second apart


def test_wrong_arguments_are_refused_at_once(folders, tmp_path):
    with pytest.raises(UsageError, match="no such folder"):
        loader.main(["--data-dir", str(folders), "--json", str(tmp_path / "none" / "x.json")])
    with pytest.raises(DataError, match="no folder train"):
        loader.main(["--data-dir", str(tmp_path), "--json", str(tmp_path / "x.json")])


def test_psnr_and_spectrum_of_known_images():
    grey = np.full((32, 32, 3), 100, np.uint8)
    assert stored_sides.psnr(grey, grey + 10) == pytest.approx(20 * np.log10(255 / 10))
    wave = 128 + 100 * np.cos(2 * np.pi * 5 * np.arange(32) / 32)
    power = stored_sides.spectrum(np.repeat(np.tile(wave, (32, 1))[:, :, None], 3, 2).astype(np.uint8))
    assert power.argmax() == 5 and power[4:7].sum() > 0.95 * power.sum()


def test_a_larger_stored_side_keeps_more(folders):
    photographs = [(encoded(p), p) for p in (photo(300, 400, seed) + np.uint8(0) for seed in range(4))]
    noise = np.random.default_rng(0).integers(0, 60, (4, 300, 400, 3), dtype=np.uint8)
    photographs = [
        (data, np.clip(p.astype(int) + n, 0, 255).astype(np.uint8))
        for (data, p), n in zip(photographs, noise, strict=True)
    ]
    rows = [stored_sides.measure(photographs, 32, side, 90)[0] for side in (32, 48, 96)]
    assert rows[0]["psnr"] < rows[1]["psnr"] < rows[2]["psnr"]
    assert rows[0]["kilobytes"] < rows[1]["kilobytes"] < rows[2]["kilobytes"]


def test_the_memory_benchmark(tmp_path, capsys):
    memory.make_tree(str(tmp_path), 300, classes=10)
    row = memory.measure("index", str(tmp_path), epochs=2, samples=200, workers=1)
    assert len(row["worker_mb"]) == 2 and min(row["worker_mb"]) > 0
    listed = memory.Tuples(str(tmp_path))
    assert len(listed) == 300 and len({listed.path(i) for i in range(300)}) == 300


def test_the_stages_add_up(folders, tmp_path):
    index = loader.gather(str(folders), 40, tmp_path / "scratch")
    loader.pack(index, (24,), tmp_path / "packed")
    row = stages.stages(open_packed(tmp_path / "packed"), 16)
    assert row["batch, crop and flip"] > row["decode"] > 0
