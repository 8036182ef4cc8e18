"""The loader and storage benchmarks run and measure what they claim."""

import multiprocessing
import time

import numpy as np
import pytest
from test_images import encoded, photo
from test_packed import make_folders

from base.errors import DataError, UsageError
from benchmarks import loader, loader_peers, records, storage
from sources.images import EvalTransform

SETTING = loader_peers.Setting(size=16, augmentation="basic", workers=1, batches=2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("photographs"), classes=2, per_class=20)


@pytest.fixture(scope="module")
def data(folders, tmp_path_factory):
    return loader.prepare(str(folders), 10, (24,), tmp_path_factory.mktemp("work"))


@pytest.mark.slow
def test_the_loader_benchmark_writes_rows_a_table_and_a_picture(folders, tmp_path, capsys):
    out, arguments = tmp_path / "out", ["--sizes", "16", "--workers", "1", "--stored-sides", "24"]
    arguments += ["--augmentations", "full", "evaluation", "--batches", "1", "--passes", "1"]
    assert loader.main(["--data-dir", str(folders), "--out", str(out), *arguments]) == 0
    rows = records.load(out, "loader")
    assert [(row["augmentation"], row["loader"]) for row in rows] == [
        ("full", "packed"),
        ("full", "packed, raw"),
        ("full", "full-size"),
        ("full", "packed, Albumentations"),
        ("full", "torchvision, PIL"),
        ("full", "torchvision, decode_jpeg"),
        ("evaluation", "packed"),
        ("evaluation", "full-size"),
    ]
    assert all(row["cpu_us"] > 0 and row["images_per_second"] > 0 for row in rows)
    printed = capsys.readouterr().out
    assert all(
        printed.count(records.line(row, loader.COLUMNS)) == 2 for row in rows
    )  # as it came, and in the table
    assert (out / "loader.png").stat().st_size > 5000
    assert loader.main(["--out", str(out), "--table"]) == 0
    assert capsys.readouterr().out.splitlines()[:-1] == records.table(rows, loader.COLUMNS).splitlines()


def test_the_data_need_only_train_folders_and_are_limited(data):
    for index in data.indices.values():
        assert len(index.train) == len(index.val) == 10
        assert index.train.labels.tolist() == [0] * 5 + [1] * 5
    with pytest.raises(DataError, match="cannot list"):
        loader.link(str(data.folder / "none"), 10, data.folder)
    with pytest.raises(UsageError, match="no --data-dir"):
        loader.main([])


@pytest.mark.parametrize("augmentation", loader.AUGMENTATIONS)
def test_every_loader_makes_the_batches_of_a_pass_and_keeps_its_workers(data, augmentation):
    setting = loader_peers.Setting(16, augmentation, workers=2, batches=3)
    for name, start in loader_peers.loaders(data, setting).items():
        try:
            started = start()
        except ImportError:
            assert name == "timm" or name.startswith(("FFCV", "DALI"))
            continue
        for _ in range(2):
            batches = list(started)
            assert [len(batch[1]) for batch in batches] == [loader_peers.BATCH] * 3
            assert 16 in batches[0][0][0].shape or name == "DALI"
        workers = multiprocessing.active_children()
        assert len(workers) == (0 if name == "DALI" else 2)
        del started, batches
        assert not multiprocessing.active_children()


def test_the_evaluation_rows_read_the_evaluation_crops(data):
    setting = loader_peers.Setting(16, "evaluation", workers=1, batches=1)
    for name in ("packed", "full-size"):
        index = data.indices[name]
        images = next(iter(loader_peers.ours(index, setting)))[0].numpy()
        expected = [EvalTransform(16)(image) for image in index.val.read(range(10))]
        assert np.array_equal(images[:10], expected) and np.array_equal(images[10:20], expected)


def test_a_pass_counts_its_images_its_seconds_and_the_cpu_time_of_all_processes(monkeypatch):
    clock, cpu = iter([10.0, 12.0]), iter([1.0, 1.5])
    monkeypatch.setattr(loader.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(loader, "cpu_seconds", lambda: next(cpu))
    assert loader.one_pass([(None, [0] * 100)] * 4) == (0.5 / 400 * 1e6, 200.0)


def test_cpu_time_is_counted_in_workers_and_threads():
    def burn(ready, stop):
        started = time.process_time()
        while time.process_time() - started < 0.3:
            pass
        ready.set()
        stop.wait()

    context = multiprocessing.get_context("fork")
    ready, stop = context.Event(), context.Event()
    before = loader.cpu_seconds()
    worker = context.Process(target=burn, args=(ready, stop), daemon=True)
    worker.start()
    ready.wait()
    assert 0.3 <= loader.cpu_seconds() - before < 0.6
    stop.set()
    worker.join()


def test_the_loaders_take_turns_after_a_pass_to_warm_up(monkeypatch):
    order = []
    monkeypatch.setattr(loader, "one_pass", lambda name: order.append(name) or (len(order), 1.0))
    ours, theirs = loader.in_turns(("a", "b"), passes=3)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"
    assert [cpu for cpu, _ in ours] == [3, 6, 7] and [cpu for cpu, _ in theirs] == [4, 5, 8]


def test_a_row_has_the_best_the_median_and_medians_of_ratios():
    packed = [(100.0, 1000.0), (110.0, 900.0), (150.0, 500.0)]
    other = [(450.0, 250.0), (400.0, 100.0), (330.0, 450.0)]
    row = loader.row_of(other, packed)
    assert (row["cpu_us"], row["cpu_us_median"], row["packed_cpu_us"]) == (330, 400, 100)
    assert row["images_per_second"] == 250
    assert row["packed_saves_cpu"] == 3.64  # of 4.5, 3.64 and 2.2
    assert row["packed_is_faster"] == 4  # of 4, 9 and 1.1


def test_a_killed_benchmark_measures_only_what_is_missing(tmp_path, monkeypatch, capsys):
    def absent():
        raise ImportError("No module named 'peer'")

    started = []
    monkeypatch.setattr(loader, "in_turns", lambda pair, passes: started.append(pair[1]) or [[(2, 3)]] * 2)
    starts = {"packed": lambda: "p", "a": lambda: "a", "b": absent, "c": absent, "d": lambda: "d"}
    done, missing = set(), set()
    rows = list(loader.compare(starts, SETTING, 1, done, missing))
    assert [row["loader"] for row in rows] == ["packed", "a", "packed", "d"]  # main adds to `done` between
    assert capsys.readouterr().out == "b: skipped (No module named 'peer')\n"
    done = {row["row"] for row in rows if row["loader"] != "d"}
    assert [row["loader"] for row in loader.compare(starts, SETTING, 1, done, missing)] == ["d"]
    assert started == ["a", "d", "d"]
    assert rows[0]["row"] == "16 px, basic, 1 workers, packed" and rows[0]["batches"] == 2


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
    arguments = ["--images", "4", "--sizes", "16", "--ratios", "1.5", "2", "--out", str(tmp_path)]
    assert storage.main(["--data-dir", str(folders), *arguments]) == 0
    rows = records.load(tmp_path, "storage")
    assert [row["side"] for row in rows] == [24, 32]
    assert records.table(rows, storage.COLUMNS) in capsys.readouterr().out
    assert (tmp_path / "storage.png").stat().st_size > 5000
