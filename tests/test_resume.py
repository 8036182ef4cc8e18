"""A run stopped anywhere and resumed equals the run that was never stopped, bit for bit."""

import itertools
import os
import random
import shutil
import signal
import time

import pytest
import torch
from conftest import ROOT
from runs import TINY, digest, finish, payload, spawn

import pack_dataset
import train
from base.errors import CheckpointError
from harness import checkpoint

BF16 = [*TINY, "--amp", "bf16", "--resize-schedule", "32,40,48"]  # see build.open_runtime for why not 16 px
STEPS = 11  # of the TINY run on 72 images: 3 + 4 + 4


def run(*args) -> None:
    assert train.main([*map(str, args)]) == 0


@pytest.fixture(scope="module")
def straight(photos, tmp_path_factory):
    """The undisturbed run, in fp32 and in bf16: precision -> its digest."""
    torch.set_num_threads(1)
    digests = {}
    for amp, flags in (("off", TINY), ("bf16", BF16)):
        save_dir = tmp_path_factory.mktemp(f"straight-{amp}")
        run("--data-dir", photos, *flags, "--save-dir", save_dir, "--num-workers", 0)
        digests[amp] = digest(save_dir)
    assert payload(save_dir)["step"] == STEPS
    return digests


@pytest.mark.parametrize("stops", [(1, 4, 7, 10), (2, 5, 8, 11), (3, 6, 9)])
def test_a_run_stopped_after_any_step_and_resumed_with_other_workers(stops, straight, photos, tmp_path):
    for k, stop in enumerate(stops):
        start = ("--resume", "auto") if k else ("--data-dir", photos, *TINY)
        run(*start, "--save-dir", tmp_path, "--num-workers", (stop + k) % 3, "--stop-after", stop)
        assert payload(tmp_path)["step"] == stop
        # At an epoch's end it is not yet scored.
        assert len(payload(tmp_path)["rows"]) == sum(stop > end for end in (3, 7, 11))
    run("--save-dir", tmp_path, "--resume", "auto", "--num-workers", 1)
    assert digest(tmp_path) == straight["off"]


@pytest.mark.parametrize("stop", [2, 7, 10])
def test_in_bf16_as_well(stop, straight, photos, tmp_path):
    run("--data-dir", photos, *BF16, "--save-dir", tmp_path, "--num-workers", 0, "--stop-after", stop)
    run("--save-dir", tmp_path, "--resume", "auto", "--num-workers", 0)
    assert digest(tmp_path) == straight["bf16"]


VARIANTS = {
    "packed": (),
    "randaugment": ("--augment", "rrc,flip,randaugment"),
    "trivialaugment": ("--augment", "rrc,trivialaugment"),
    "stem d": ("--stem", "d"),
    "lr-scale": ("--lr-scale", "sqrt"),
    "skip": ("--on-bad-image", "skip"),
    "sgd, plateau": ("--optimizer", "sgd", "--schedule", "plateau"),
    "triangular2 and plateau": ("--schedule", "triangular2", "--cycles", "1", "--plateau-patience", "0"),
    "phase-augment": ("--phase-augment", "none/rrc,flip/full"),
    "pipeline": ("--augment", f"rrc,{ROOT / 'recipes' / 'augment' / 'full.yaml'}"),
    "compile": ("--compile",),
}


@pytest.mark.torture
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_equals_the_undisturbed_one_with_any_other_flag(variant, photos, tmp_path):
    data, flags = photos, [*TINY, *VARIANTS[variant]]
    if variant == "compile":
        flags = [*TINY[:4], "--resize-schedule", "24", "--batch-size", "16", *TINY[10:], "--compile"]
    if variant == "phase-augment":  # --augment would be refused beside it
        at = flags.index("--augment")
        del flags[at : at + 2]
    if variant == "packed":
        data = tmp_path / "packed"
        assert (
            pack_dataset.main(["--data-dir", str(photos), "--out", str(data), "--stored-sides", "24,32"]) == 0
        )
    if variant == "skip":
        data = shutil.copytree(photos, tmp_path / "damaged")
        for path in sorted((data / "train").glob("*/*"))[::7]:
            path.write_bytes(path.read_bytes()[:200])
    run("--data-dir", data, *flags, "--save-dir", tmp_path / "straight", "--num-workers", 0)
    run("--data-dir", data, *flags, "--save-dir", tmp_path / "a", "--num-workers", 2, "--stop-after", 5)
    (last,) = (tmp_path / "a").glob("last_*.pt")
    run(
        "--save-dir", tmp_path / "b", "--resume", last, "--num-workers", 1, "--stop-after", 8
    )  # in another directory
    run("--save-dir", tmp_path / "b", "--resume", "auto", "--num-workers", 0)
    assert digest(tmp_path / "b") == digest(tmp_path / "straight")


@pytest.mark.torture
def test_a_clock_that_jumps_changes_no_bit(straight, photos, tmp_path, monkeypatch):
    jumps, later = itertools.cycle([0.0, 1e9, -1e9, 3.0]), itertools.count(0, 50_000)
    now, monotonic, precise = time.time, time.monotonic, time.perf_counter
    monkeypatch.setattr(time, "time", lambda: now() + next(jumps))
    monkeypatch.setattr(
        time, "monotonic", lambda: monotonic() + next(later)
    )  # a monotonic clock never goes back, but a laptop sleeps
    monkeypatch.setattr(time, "perf_counter", lambda: precise() + next(later))
    run(
        "--data-dir",
        photos,
        *TINY,
        "--save-dir",
        tmp_path,
        "--num-workers",
        0,
        "--save-every",
        "1min",
        "--stop-after",
        6,
    )
    run("--save-dir", tmp_path, "--resume", "auto", "--num-workers", 0)
    monkeypatch.undo()
    assert digest(tmp_path) == straight["off"]


@pytest.mark.torture
def test_data_that_changed_during_a_run_is_reported_and_refused(photos, tmp_path):
    data = shutil.copytree(photos, tmp_path / "data")
    run("--data-dir", data, *TINY, "--save-dir", tmp_path / "run", "--num-workers", 0, "--stop-after", 4)
    gone = sorted((data / "train").glob("*/*"))[3]
    before = gone.read_bytes()
    gone.unlink()
    with pytest.raises(CheckpointError, match="not the data that the run was trained on"):
        run("--save-dir", tmp_path / "run", "--resume", "auto", "--num-workers", 0)
    gone.write_bytes(before)
    run("--save-dir", tmp_path / "run", "--resume", "auto", "--num-workers", 0)
    run("--data-dir", data, *TINY, "--save-dir", tmp_path / "straight", "--num-workers", 0)
    assert digest(tmp_path / "run") == digest(tmp_path / "straight")


@pytest.mark.parametrize("part", ["ema", "optimizer", "step", "schedule", "epoch_sums"])
def test_a_state_that_is_not_restored_is_noticed(part, straight, photos, tmp_path):
    run("--data-dir", photos, *TINY, "--save-dir", tmp_path, "--num-workers", 0, "--stop-after", 5)
    (path,) = tmp_path.glob("last_*.pt")
    saved = checkpoint.load(path)
    if part == "ema":
        saved["ema"]["num_updates"] = 0
    elif part == "optimizer":
        saved["optimizer"]["state"][0]["exp_avg"].zero_()
    elif part == "step":
        saved["step"] -= 1
        saved["schedule"]["position"] -= 1
    elif part == "schedule":
        saved["schedule"]["position"] -= 1
    else:
        saved["epoch_sums"]["loss"] = 0.0
    saved.pop("schema")
    checkpoint.save(path, saved)
    if part == "schedule":
        with pytest.raises(CheckpointError, match="of its schedule"):
            run("--save-dir", tmp_path, "--resume", path, "--num-workers", 0)
        return
    run("--save-dir", tmp_path, "--resume", path, "--num-workers", 0)
    assert digest(tmp_path) != straight["off"]


def test_a_dozen_kills_at_random_times_lose_nothing(straight, photos, tmp_path):
    """SIGKILL to the whole process group: in start-up, steps, validation and saving."""
    rng, kills, log = random.Random(0), 0, tmp_path / "log"
    lengths = []
    while kills < 12:  # make torture has a hundred
        save_dir = tmp_path / f"run{len(lengths)}"
        for _ in range(4):  # a few kills in the life of one run, then let it end
            started = time.monotonic()
            fresh = not list(save_dir.glob("*.pt"))
            arguments = ("--data-dir", photos, *TINY) if fresh else ()
            overwrite = ("--overwrite",) if fresh else ("--resume", "auto")
            process = spawn(
                *arguments,
                "--save-dir",
                save_dir,
                "--num-workers",
                rng.choice((0, 1)),
                *overwrite,
                output=log,
            )
            process.join(rng.uniform(0.1, max(lengths, default=4.0)))
            if process.is_alive():
                os.killpg(process.pid, signal.SIGKILL)
                process.join()
                kills += 1
            else:
                lengths.append(time.monotonic() - started)
                break
        arguments = (
            ("--resume", "auto")
            if list(save_dir.glob("*.pt"))
            else ("--data-dir", photos, *TINY, "--overwrite")
        )
        assert finish(spawn(*arguments, "--save-dir", save_dir, "--num-workers", 0, output=log)) == 0, (
            log.read_text()
        )
        lengths.append(lengths[-1] if lengths else 3.0)
        assert digest(save_dir) == straight["off"], log.read_text()


def test_a_finished_run_says_so_and_touches_nothing(photos, tmp_path, capsys):
    run("--data-dir", photos, *TINY, "--save-dir", tmp_path, "--num-workers", 0)
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir() if p.name != ".lock"}
    run("--save-dir", tmp_path, "--resume", "auto")
    assert "complete" in capsys.readouterr().out
    assert before == {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir() if p.name != ".lock"}
