"""benchmarks.first_minute: parts, limits, what a crash leaves; the archives; the tables."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import train
from base import flags
from base.errors import DataError, Stopped
from benchmarks import first_minute, first_minute_data, first_minute_parts, records, tables
from sources.layouts import open_dataset

# --- running parts ---------------------------------------------------------------------------------


def script(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def run_parts(out, codes, seconds=60.0, collect=lambda name: None):
    """Run parts whose process executes {part: code}; return the summary."""
    return first_minute.run_parts(list(codes), seconds, lambda name: script(codes[name]), out, collect)


def test_the_parts_fill_half_an_hour_in_order_of_value():
    assert list(first_minute.MINUTES) == list(first_minute_parts.PARTS)
    assert sum(first_minute.MINUTES.values()) == 30
    trainings = tuple(name for name, part in first_minute_parts.PARTS.items() if hasattr(part, "func"))
    assert trainings == first_minute.TRAININGS == tuple(first_minute_parts.TRAININGS)


def test_a_crash_leaves_the_other_parts_and_its_output(tmp_path):
    codes = {"environment": "print('fine')", "step": "raise ValueError('broken')", "syncs": "print('end')"}
    summary = run_parts(tmp_path, codes)
    assert [part["status"] for part in summary.values()] == ["done", "failed", "done"]
    assert summary["step"]["exit_code"] == 1
    log = (tmp_path / "log.txt").read_text()
    assert (
        log.index("=== environment")
        < log.index("fine")
        < log.index("ValueError: broken")
        < log.index("end\n")
    )
    assert json.loads((tmp_path / "summary.json").read_text()) == summary


def test_what_is_done_is_skipped_and_the_rest_is_tried_again(tmp_path, monkeypatch):
    marks = tmp_path / "marks"
    mark = f"open({str(marks)!r}, 'a').write("
    run_parts(tmp_path, {"environment": mark + "'e')", "step": mark + "'s'); exit(3)"})
    run_parts(tmp_path, {"environment": mark + "'e')", "step": mark + "'s')"})
    assert marks.read_text() == "ess"
    monkeypatch.setattr(first_minute.process, "commit", lambda: "another")
    run_parts(tmp_path, {"environment": mark + "'e')"})
    assert marks.read_text() == "esse"


def test_a_part_that_hangs_is_ended_with_all_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr(first_minute, "GRACE", 0.5)
    pid = tmp_path / "pid"
    child = f"import os, signal, time; signal.signal(15, signal.SIG_IGN); open({str(pid)!r}, 'w')"
    child += ".write(str(os.getpid())); time.sleep(600)"
    hang = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    collected = []
    found = first_minute.attempt("step", script(hang), 4, tmp_path / "log.txt", collected.append)
    assert found[:2] == ("stopped", None) and collected == ["step"]
    with pytest.raises(ProcessLookupError):
        for _ in range(50):  # until the system has removed it
            os.kill(int(pid.read_text()), 0)
            time.sleep(0.1)


def test_time_that_a_part_leaves_goes_to_those_after_it(tmp_path):
    codes = dict.fromkeys(("step", "loader", "whole-run"), "pass")
    summary = run_parts(tmp_path, codes, 1200)
    assert summary["step"]["limit"] == pytest.approx(600, abs=1)  # 6 of 12 minutes
    assert summary["loader"]["limit"] == pytest.approx(600, abs=10)  # half of what is left
    assert summary["whole-run"]["limit"] == pytest.approx(1200, abs=20)
    assert run_parts(tmp_path / "short", codes, 70)["step"]["limit"] == 60  # the least that a part is given
    late = run_parts(tmp_path / "late", codes, 4)
    assert [part["status"] for part in late.values()] == ["no time"] * 3


def test_ctrl_c_ends_the_part_first(tmp_path):
    pid, handler = tmp_path / "pid", signal.getsignal(signal.SIGINT)
    sleeper = script(f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(600)")

    monitor = f"import os, signal, time\nwhile not os.path.exists({str(pid)!r}): time.sleep(0.05)\n"
    monitor += f"time.sleep(0.2); os.kill({os.getpid()}, signal.SIGINT)"
    with subprocess.Popen(script(monitor)), pytest.raises(Stopped), first_minute.stop_signals():
        first_minute.attempt("step", sleeper, 60, tmp_path / "log.txt", lambda name: None)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    assert signal.getsignal(signal.SIGINT) == handler


def test_the_epochs_of_a_stopped_training_are_rows(tmp_path):
    words = (
        "--dataset digits --subset --subset-size 40 --arch resnet_tiny --resize-schedule 8 --batch-size 8 "
    )
    words += "--epochs 3 --stop-after 12 --num-workers 0 --device cpu --amp off --augment none"
    run = tmp_path / "work" / "cifar10" / "resnet34"
    train.main([*words.split(), "--save-dir", str(run)])
    for _ in range(2):  # the second time, nothing is new
        first_minute.record_epochs("cifar10", tmp_path / "out", tmp_path / "work")
        first_minute.record_epochs("step", tmp_path / "out", tmp_path / "work")
    lines = (tmp_path / "out" / "first_minute.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["epoch"] for row in rows] == [1, 2] and rows[0]["epochs"] == 3
    assert rows[1]["row"] == "cifar10: resnet34, epoch 2" and rows[1]["val_top1"] is not None


# --- parts -------------------------------------------------------------------------------------------


@pytest.fixture
def setting(tmp_path):
    return first_minute_parts.Setting(tmp_path / "out", tmp_path, tmp_path, rehearse=True)


@pytest.mark.parametrize("name", first_minute_parts.TRAININGS)
@pytest.mark.parametrize("more", ["--device cuda", first_minute_parts.SHORT])
def test_the_flags_of_the_trainings_go_together(name, more):
    words = ["--dataset", name, *first_minute_parts.TRAININGS[name].split(), *more.split()]
    config, typed = flags.parse(flags.train_parser(), words)
    flags.check_train(config, typed)
    assert len(config.phase_batch_sizes or [config.batch_size]) == len(config.resize_schedule)


def test_synchronizations_are_counted_by_line_of_this_project():
    with first_minute_parts.synchronizations() as places:
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation (Triggered internally at x.cpp)")
        warnings.warn("something else")
    assert list(places.values()) == [3]
    assert next(iter(places)).startswith("tests/test_first_minute.py:")


def test_failed_gpu_tests_are_rows(setting, monkeypatch):
    cases = "<testcase classname='a' name='b'/><testcase classname='a' name='c'><skipped/></testcase>"
    cases += "<testcase classname='a' name='d'><failure message='1 != 2'>long</failure></testcase>"
    report = setting.work / "gpu-tests.xml"
    monkeypatch.setattr(first_minute_parts, "run", lambda *words: report.write_text(f"<x>{cases}</x>") and 1)
    first_minute_parts.gpu_tests(setting)
    failure, counts = records.load(setting.out, "first_minute")
    assert (failure["row"], failure["message"]) == ("gpu-tests: a::d", "1 != 2")
    assert [counts[name] for name in ("passed", "failed", "skipped")] == [1, 1, 1]


def test_a_variant_that_fails_leaves_the_others(setting, monkeypatch):
    tried = []
    monkeypatch.setattr(
        first_minute_parts, "run", lambda *words: tried.append(words) or int("compile" in words)
    )
    with pytest.raises(SystemExit):
        first_minute_parts.step(first_minute_parts.Setting(setting.out, setting.work, setting.data))
    assert len(tried) == 4 and "cuda-graphs" in tried[1]


def test_a_batch_that_does_not_fit_ends_its_size_only(setting, monkeypatch):
    monkeypatch.setattr(first_minute_parts, "LARGE", ((64, 8), (128, 8), (64, 16), (128, 16)))
    tried = []

    def run(*words):
        tried.append((words[words.index("--sizes") + 1], words[words.index("--batch-sizes") + 1]))
        return 6 if tried[-1] == (64, 8) else 0

    monkeypatch.setattr(first_minute_parts, "run", run)
    first_minute_parts.large_batches(first_minute_parts.Setting(setting.out, setting.work, setting.data))
    assert tried == [(64, 8), (128, 8), (128, 16)]
    (row,) = records.load(setting.out)
    assert row["row"] == "large-batches: 64 px, batch 8" and row["fits"] == 0


# --- the data ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("originals")
    for name in first_minute_data.DATASETS:
        first_minute_data.generate(name, root / name)
    return root


def packed_and_opened(name, originals, tmp_path, quality=88):
    paths = first_minute_data.pack(name, originals / name, tmp_path / "archives", quality)
    return paths, open_dataset(name, first_minute_data.unpack(name, tmp_path / "archives", tmp_path))


def pixels_of(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*"))])


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_keeps_its_test_images_and_nearly_its_training_images(name, originals, tmp_path):
    paths, index = packed_and_opened(name, originals, tmp_path)
    assert [path.name for path in paths] == [f"{name}-1.tar"] and index.classes == ("ant", "bee", "cat")
    for k, class_name in enumerate(index.classes):
        test, trained = (pixels_of(originals / name / part / class_name) for part in ("test", "train"))
        assert np.array_equal(np.stack(index.val.images)[index.val.labels == k], test)
        error = np.stack(index.train.images)[index.train.labels == k].astype(int) - trained
        assert error.shape == trained.shape and 0 < np.abs(error).mean() < 8


def test_without_loss_a_copy_as_published_is_the_same_data(originals, tmp_path):
    _, one = packed_and_opened("cifar10", originals, tmp_path, first_minute_data.LOSSLESS)
    again = tmp_path / "again"
    first_minute_data.pack("cifar10", tmp_path / "cifar10-from-1", again, first_minute_data.LOSSLESS)
    two = open_dataset("cifar10", first_minute_data.unpack("cifar10", again, again))
    for part in ("train", "val"):
        assert np.array_equal(getattr(one, part).images, getattr(two, part).images)
        assert np.array_equal(getattr(one, part).labels, getattr(two, part).labels)


def test_images_stay_apart_in_their_picture():
    images = np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)
    images[7] = 255
    shown = first_minute_data.decoded(first_minute_data.encoded(images, 90))
    assert shown[7].min() == 255 and shown.shape == images.shape
    lossless = first_minute_data.encoded(images, first_minute_data.LOSSLESS)
    assert np.array_equal(first_minute_data.decoded(lossless), images)


def test_some_archives_are_a_part_of_the_data_with_all_classes(originals, tmp_path, monkeypatch):
    monkeypatch.setattr(first_minute_data, "LIMIT", 100_000)
    monkeypatch.setattr(first_minute_data, "FILES", 15)
    paths, whole = packed_and_opened("tiny-imagenet", originals, tmp_path)
    assert len(paths) > 2 and all(path.stat().st_size <= 100_000 for path in paths)
    assert (len(whole.train), len(whole.val)) == (120, 30)
    for path in paths[2:]:
        path.unlink()
    part = open_dataset(
        "tiny-imagenet", first_minute_data.unpack("tiny-imagenet", tmp_path / "archives", tmp_path)
    )
    counts = np.bincount(part.train.labels)
    assert len(part.val) == 30 and len(counts) == 3 and counts.min() > 0 and counts.max() < 40
    name = part.train.name(0)
    unchanged = (originals / "tiny-imagenet" / name).read_bytes()
    assert part.train.read([0])[0] == unchanged
    paths[0].unlink()
    with pytest.raises(DataError, match=r"no tiny-imagenet-1\.tar"):
        first_minute_data.unpack("tiny-imagenet", tmp_path / "archives", tmp_path)


def test_photos_fill_one_archive_class_by_class(originals, tmp_path, monkeypatch):
    monkeypatch.setattr(first_minute_data, "LIMIT", 200_000)
    (path,) = first_minute_data.pack("photos", originals / "photos", tmp_path)
    folder = first_minute_data.unpack("photos", tmp_path, tmp_path)
    counts = [len(list(place.iterdir())) for place in (folder / "train").iterdir()]
    assert path.stat().st_size <= 200_000 and len(counts) == 3 and max(counts) - min(counts) <= 1


# --- the tables --------------------------------------------------------------------------------------

GPU = {"machine": "NVIDIA X, 16 cores", "commit": "abc1234", "load": 1.0, "torch": "2.11.0", "cuda": "13.0"}
GPU |= {"gpu_machine": True}


def step_row(loop="project", variant="", **more):
    row = {"benchmark": "step", "row": f"{loop} {variant} {more}", "loop": loop, "variant": variant}
    return row | {"narrow": False, "size": 64, "batch_size": 256, "images_per_second": 9123.4} | more | GPU


def test_the_committed_tables_are_those_of_the_committed_rows():
    rows = tables.load(tables.result_directories())
    for page in tables.PAGES:
        text = page.read_text(encoding="utf-8")
        assert tables.fill(text, rows) == text, page
        assert text.count("<!-- table:") == text.count("<!-- end of table -->") > 0


def test_a_table_is_filled_and_filled_again():
    rows = [
        step_row("bare"),
        step_row(times_bare=1.0312, kernels=855.0, waits=0.0),
        step_row(batch_size=4096),
    ]
    page = "a\n<!-- table: gpu-step -->\nold | text\n<!-- end of table -->\nb\n"
    once = tables.fill(page, rows)
    assert once.startswith("a\n<!-- table: gpu-step -->\n| px | batch | loop | images/s |")
    assert "| 64 | 256 | project | 9,123 | - | 1.03 | - | - | 855 | - | 0 |" in once and "4,096" not in once
    assert "NVIDIA X, 16 cores, torch 2.11.0, commit abc1234." in once and once.endswith("of table -->\nb\n")
    assert tables.fill(once, rows) == once
    rows[0]["commit"] = "another"  # and so, maybe, another machine of this kind
    assert "| px | batch | loop | x bare |" in tables.fill(page, rows)
    assert "*Not measured yet*: `python -m benchmarks.first_minute step" in tables.fill(once, [])


def test_a_table_that_does_not_exist_is_refused():
    with pytest.raises(DataError, match="there is no table 'speed'"):
        tables.fill("<!-- table: speed -->\n<!-- end of table -->", [])


def test_every_table_can_be_filled():
    first = {"benchmark": "first_minute"} | GPU
    epoch = {"part": "cifar10", "run": "resnet34", "arch": "resnet34", "epochs": 2, "image_size": 32}
    epoch |= {"val_top1": 95.1, "train_top1": 99.0, "seconds": 30.0, "images_per_second": 15000.0}
    loaded = {"benchmark": "loader", "augmentation": "full", "size": 64, "loader": "packed"} | GPU
    loaded |= {"cpu_us": 123.4}
    rows = [
        first | {"row": "e", "part": "environment", "device": "NVIDIA X", "cores": 16},
        first | {"row": "g", "part": "gpu-tests", "passed": 20, "failed": 0, "skipped": 3},
        first | {"row": "f", "part": "gpu-tests", "failed": 1, "message": "one of them"},
        first | {"row": "l", "part": "large-batches", "size": 64, "batch_size": 9999, "fits": 0},
        first | {"row": "s", "part": "syncs", "run": "step", "place": "all"}
        | {"count": 0, "steps": 20, "per_step": 0.0},
        *(first | {"row": f"w{px}", "part": "whole-run", "run": "defaults", "size": px, "batch_size": 256}
          | {"images_per_second": 12_811.67, "data_wait_percent": 0.5, "epochs_of_90": n}
          for px, n in ((64, 36), (128, 18))),
        *(first | epoch | {"row": f"c{k}", "epoch": k} for k in (1, 2)),
        first | epoch | {"row": "d", "epoch": 1, "run": "other"},
        step_row(), step_row(variant="compile", images_per_second=12000.0), step_row(batch_size=1024),
        *(loaded | {"row": f"w{n}", "workers": n, "images_per_second": 5000.0 * n} for n in (1, 16)),
        *({"benchmark": "parity", "row": f"{loop}{seed}", "loop": loop, "seed": seed, "val_top1": top1}
          | {"cpu_seconds": 99.0} | GPU for loop, seed, top1 in
          (("project", 1, 61.0), ("project", 2, 62.0), ("plain loop", 1, 60.5), ("plain loop", 2, 62.0))),
        {"benchmark": "parity", "row": "alone", "loop": "project", "seed": 3, "val_top1": 9.0} | GPU,
        {"benchmark": "headline", "row": "h", "dataset": "cifar10", "loop": "project", "seed": 0}
        | {"epochs": 30, "val_top1": 92.0, "seconds": 3000.0, "cpu_seconds": 6000.0} | GPU,
    ]  # fmt: skip
    found = {name: tables.filled(name, rows) for name in tables.TABLES}
    assert not [name for name, table in found.items() if "Not measured" in table]
    assert "| 20 | 0 | 3 |" in found["gpu-tests"]
    assert "| 64 | 9,999 | does not fit | - | - | - |" in found["gpu-large-batches"]
    assert "| 64 | packed | 5,000 | 80,000 | 12,000 |" in found["gpu-loader"]
    assert "| packed | - | 123 | - |" in found["loader-cpu"]
    # An epoch of 1,281,167 images takes 100 seconds at this rate.
    assert "| defaults | 64 | 256 | 12,812 | 0.5 | 36 | 1.00 | 1.00 |" in found["gpu-whole-run"]
    assert "| defaults | 128 | 256 | 12,812 | 0.5 | 18 | 0.50 | 1.50 |" in found["gpu-whole-run"]
    assert "| cifar10 | resnet34 | resnet34 | 2 | 32 | 95.1 | 99.0 | 1 | 15,000 |" in found["gpu-trainings"]
    assert "1 of 2, stopped" in found["gpu-trainings"]
    assert "machine" not in found["gpu-trainings"].splitlines()[0]
    elsewhere = [*rows, first | epoch | {"row": "c1", "epoch": 1, "machine": "NVIDIA Y, 8 cores"}]
    assert "| NVIDIA Y | cifar10 | resnet34 |" in tables.filled("gpu-trainings", elsewhere)
    assert "| project | 2 | 61.50 ± 0.71 | 99.0 |" in found["parity"]
    # A mean of 0.25 and a standard error of 0.25, times 12.7, the t quantile of one degree of freedom.
    assert "| difference, 95 % interval | 2 | +0.25 [-2.93, +3.43] | - |" in found["parity"]
    assert "| cifar10 | project | 0 | 30 | 92.00 | 50.0 | 100 |" in found["headline"]


def test_rows_of_a_cpu_and_of_the_narrow_network_are_left_out(tmp_path):
    records.append(tmp_path / "cpu", step_row() | {"cuda": None})
    for row in (
        step_row(),
        step_row(narrow=True),
        {"benchmark": "loader", "row": "l"} | GPU | {"cuda": None},
    ):
        records.append(tmp_path / "gpu", row)
    rows = tables.of_gpus(tables.load([tmp_path / "cpu", tmp_path / "gpu"]))
    assert [row["benchmark"] for row in rows] == ["loader", "step"]
