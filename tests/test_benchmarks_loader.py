"""The loader and storage benchmarks run and measure what they claim."""

import json

import numpy as np
import pytest
from test_images import encoded, photo
from test_packed import make_folders

from base.errors import DataError
from benchmarks import loader, storage

KEYS = {
    "size",
    "loader",
    "augmentation",
    "workers",
    "images_per_second",
    "ratio_to_torchvision",
    "cpu_us_per_image",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("photographs"), classes=2, per_class=20)


@pytest.mark.slow
def test_the_loader_benchmark_writes_rows_and_a_picture(folders, tmp_path, capsys):
    out = tmp_path / "new" / "loader.json"
    loader.main(
        [
            "--data-dir",
            str(folders),
            "--sizes",
            "16",
            "--workers",
            "1",
            "--stored-sides",
            "24",
            "--seconds",
            "0.1",
            "--json",
            str(out),
        ]
    )
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
    assert out.with_suffix(".png").stat().st_size > 5000
    assert "x torchvision" in capsys.readouterr().out


def test_the_data_need_only_train_folders_and_are_limited(folders, tmp_path):
    (folders / "val").rename(folders / "unused")
    index = loader.gather(str(folders), 10, tmp_path / "scratch")
    assert len(index.train) == 10 and index.train.labels.tolist() == [0] * 5 + [1] * 5
    packed = loader.pack(index, (24,), tmp_path / "packed")
    assert len(packed.train) == 10
    for name, start in loader.loaders(index, packed, tmp_path / "scratch", 16, "crop-flip", 1).items():
        if name in ("packed", "full-size"):
            images, labels, replaced = next(start())
            assert images.shape == (loader.BATCH, 16, 16, 3) and len(labels) == loader.BATCH and not replaced


def test_a_rate_is_images_over_seconds(monkeypatch):
    clock = iter(np.arange(0, 100, 0.5))
    monkeypatch.setattr(loader.time, "perf_counter", lambda: next(clock))
    batches = iter([(None, [0] * 128)] * 100)
    rate, _ = loader.measure(batches, workers=1, seconds=3)
    assert rate == pytest.approx(
        128 * 5 / 3
    )  # the clock is read before each of 5 batches, half a second apart


def test_the_rows_are_medians_of_measurements_in_turns(monkeypatch):
    order = []
    results = iter([(10.0, 5.0), (100.0, 1.0), (12.0, 7.0), (90.0, 3.0), (11.0, 6.0), (220.0, 2.0)])
    monkeypatch.setattr(loader, "measure", lambda batches, *_: order.append(batches) or next(results))
    rows = loader.compare({"torchvision": lambda: "t", "packed": lambda: "p"}, workers=1, seconds=1)
    assert "".join(order) == "tptptp"
    assert [(r["images_per_second"], r["cpu_us_per_image"]) for r in rows] == [(11, 6), (100, 2)]
    assert rows[1]["ratio_to_torchvision"] == 9.09


def test_a_folder_without_train_is_refused(tmp_path):
    with pytest.raises(DataError, match="cannot list"):
        loader.main(["--data-dir", str(tmp_path), "--json", str(tmp_path / "x.json")])


def test_psnr_and_spectrum_of_known_images():
    grey = np.full((32, 32, 3), 100, np.uint8)
    assert storage.psnr(grey, grey + 10) == pytest.approx(20 * np.log10(255 / 10))
    wave = 128 + 100 * np.cos(2 * np.pi * 5 * np.arange(32) / 32)
    power = storage.spectrum(np.repeat(np.tile(wave, (32, 1))[:, :, None], 3, 2).astype(np.uint8))
    assert power.argmax() == 5 and power[4:7].sum() > 0.95 * power.sum()


def test_a_larger_stored_side_keeps_more():
    photographs = [(encoded(p), p) for p in (photo(300, 400, seed) + np.uint8(0) for seed in range(4))]
    noise = np.random.default_rng(0).integers(0, 60, (4, 300, 400, 3), dtype=np.uint8)
    photographs = [
        (data, np.clip(p.astype(int) + n, 0, 255).astype(np.uint8))
        for (data, p), n in zip(photographs, noise, strict=True)
    ]
    rows = [storage.measure(photographs, 32, side, 90)[0] for side in (32, 48, 96)]
    assert rows[0]["psnr"] < rows[1]["psnr"] < rows[2]["psnr"]
    assert rows[0]["kilobytes"] < rows[1]["kilobytes"] < rows[2]["kilobytes"]


def test_the_storage_benchmark_writes_rows_and_a_picture(folders, tmp_path, capsys):
    out = tmp_path / "storage.json"
    arguments = ["--images", "4", "--sizes", "16", "--ratios", "1.5", "2", "--json", str(out)]
    assert storage.main(["--data-dir", str(folders), *arguments]) == 0
    assert [row["side"] for row in json.loads(out.read_text())] == [24, 32]
    assert out.with_suffix(".png").stat().st_size > 5000
