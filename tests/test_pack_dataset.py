"""The packing command: continuing after a kill, refusals, bad images, disk space."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
from PIL import Image
from test_packed import make_folders

import pack_dataset
import train
from base.errors import DataError, ResourceError, UsageError
from base.files import NO_LOCKS
from harness import pool
from sources import packing
from sources.archives import tars
from sources.layouts import open_dataset
from sources.packed import open_packed

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def folders(tmp_path):
    return make_folders(tmp_path / "data", classes=3, per_class=80)


def pack(data, out, *more) -> int:
    return pack_dataset.main(
        ["--data-dir", str(data), "--out", str(out), "--stored-sides", "16,32", "--workers", "2", *more]
    )


def files(out) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


def command(data, out) -> list[str]:
    return [
        sys.executable,
        str(ROOT / "pack_dataset.py"),
        "--data-dir",
        str(data),
        "--out",
        str(out),
        "--stored-sides",
        "16,32",
        "--workers",
        "2",
    ]


def killed_then_finished(data, out, reached) -> bool:
    """Kill the real command once `reached(out)`, then complete it; return whether the kill came in time."""
    process = subprocess.Popen(command(data, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (out.is_dir() and reached(out)):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    killed = process.wait() == -signal.SIGKILL
    if killed and (out / "packing.json").exists():
        with pytest.raises(DataError, match="unfinished"):
            open_packed(out)
    assert pack(data, out) == 0
    return killed


def test_a_killed_packing_is_continued_to_the_same_bytes(folders, tmp_path):
    pack(folders, tmp_path / "straight")
    out = tmp_path / "killed"
    assert killed_then_finished(folders, out, lambda out: (out / "train-16" / "00000.arrow").exists())
    assert files(out) == files(tmp_path / "straight")


@pytest.mark.torture
def test_a_packing_killed_at_twenty_times_ends_in_the_same_bytes(folders, tmp_path):
    pack(folders, tmp_path / "straight")
    expected, killed = files(tmp_path / "straight"), 0
    started = time.monotonic()
    subprocess.run(command(folders, tmp_path / "timed"), check=True, stdout=subprocess.DEVNULL)
    whole = time.monotonic() - started
    for n in range(20):
        out, begin = tmp_path / f"kill{n}", None

        def reached(out, n=n):
            nonlocal begin
            begin = begin or time.monotonic()  # the directory has just appeared
            return time.monotonic() - begin > whole / 2 * n / 20

        killed += killed_then_finished(folders, out, reached)
        assert files(out) == expected, n
        shutil.rmtree(out)
    assert killed >= 10


def test_complete_groups_are_not_packed_again(folders, tmp_path, monkeypatch):
    out = tmp_path / "out"
    pack(folders, out)
    before = files(out)
    (out / "train-32" / "00001.arrow").unlink()
    calls, write = [], packing.write_group
    monkeypatch.setattr(
        packing, "write_group", lambda *a, **options: calls.append(a[2]) or write(*a, **options)
    )
    monkeypatch.setattr(pool, "in_processes", lambda work, jobs, *_, **__: ((job, work(job)) for job in jobs))
    pack(folders, out)
    assert [(group.part, group.k) for group in calls] == [("train", 1)]
    assert files(out) == before


def test_truncated_and_invalid_records_are_ignored(folders, tmp_path):
    plan = packing.make_plan(open_dataset("imagenet", str(folders)), (16, 32), 90)
    shard = {"rows": 1, "bytes": 2, "crc32": 3}
    val = {"part": "val", "k": 0, "shards": {"val": shard}, "skipped": []}
    train = {"part": "train", "k": 1, "shards": {"train-16": shard, "train-32": shard}, "skipped": []}
    odd = [{**val, "k": 99}, {**train, "shards": {"train-16": shard}}, {**val, "shards": {"../x": shard}}, 5]
    packing.add_record(str(tmp_path), val)
    with open(tmp_path / packing.RECORDS, "a") as file:
        file.write('\n{"part": "train", "k"')
    for record in (*odd, train):
        packing.add_record(str(tmp_path), record)
    assert packing._read_records(str(tmp_path), plan) == [val, train]


# --- refusals --------------------------------------------------------------------------------------


def test_a_source_that_changed_is_refused(folders, tmp_path):
    pack(folders, tmp_path / "out")
    next((folders / "train" / "class 1").iterdir()).unlink()
    with pytest.raises(DataError, match=r"has changed .*train 240 images then, 239 now"):
        pack(folders, tmp_path / "out")


def test_packing_with_other_settings_is_refused(folders, tmp_path):
    pack(folders, tmp_path / "out")
    with pytest.raises(UsageError, match="quality 90, not 80"):
        pack(folders, tmp_path / "out", "--quality", "80")


def test_packing_into_a_folder_with_other_files_is_refused(folders, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.doc").write_text("!")
    with pytest.raises(UsageError, match="neither empty nor a packed dataset"):
        pack(folders, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.doc"]


def test_a_packing_killed_before_its_first_file_can_be_continued(folders, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "packing.json.partial").write_text('{"form')
    assert pack(folders, tmp_path / "out") == 0
    assert not list((tmp_path / "out").glob("*.partial"))


def test_a_second_simultaneous_packing_is_refused(folders, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(pack_dataset.time, "sleep", lambda seconds: None)
    with (
        pack_dataset._locked(str(tmp_path / "out")),
        pytest.raises(UsageError, match="another process is packing"),
    ):
        pack(folders, tmp_path / "out")


@pytest.mark.parametrize("number", sorted(NO_LOCKS))
def test_packing_works_on_a_filesystem_without_locks(number, tmp_path, monkeypatch):
    import fcntl

    def no_locks(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pack_dataset._locked(str(tmp_path)):
        pass


@pytest.mark.parametrize(
    "arguments",
    [[], ["--out", "x", "--verify"], ["--out", "x", "--quality", "0"], ["--out", "x", "--stored-sides", "3"]],
)
def test_usage_errors(arguments):
    with pytest.raises(UsageError):
        pack_dataset.main(["--data-dir", "nowhere", *arguments])


@pytest.mark.parametrize(
    ("arguments", "idle"),
    [
        (
            ["--verify", "--quality", "80", "--stored-sides", "8"],
            "--stored-sides would do nothing.*--quality would",
        ),
        (["--out", "new", "--eval-sizes", "none", "--eval-crop", "0.9"], "--eval-crop would"),
        (["--out", "new", "--split", "70-30"], "--split would"),
        (["--out", "new", "--stored-sides", "8", "--raw-sides", "8", "--quality", "50"], "--quality would"),
        (["--out", "new", "--dataset", "digits", "--eval-crop", "0.9"], "--eval-crop would"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(folders, arguments, idle):
    with pytest.raises(UsageError, match=idle):
        pack_dataset.main(["--data-dir", str(folders), *arguments])


def test_flags_of_another_mode_are_refused(folders, tmp_path):
    pack(folders, tmp_path / "out", "--eval-sizes", "none")
    same = ["--data-dir", str(tmp_path / "out"), "--out", str(tmp_path / "out")]
    for idle in (
        ["--quality", "80"],
        ["--stored-sides", "8"],
        ["--allow-class-mismatch"],
        ["--eval-sizes", "none"],
    ):
        with pytest.raises(UsageError, match=f"{idle[0]} would do nothing"):
            pack_dataset.main([*same, *idle])
    assert pack_dataset.main(same) == 0  # crops for the sides that are stored, 16 and 32 px
    assert sorted(p.name.split("-")[1] for p in (tmp_path / "out").glob("eval-*")) == ["16", "16", "8", "8"]


def test_a_generated_dataset_is_not_taken_for_the_packed_directory(folders, tmp_path):
    pack(folders, tmp_path / "out", "--eval-sizes", "none")
    with pytest.raises(DataError, match="the source has changed"):
        pack_dataset.main(
            ["--dataset", "digits", "--data-dir", str(tmp_path / "out"), "--out", str(tmp_path / "out")]
        )


def test_small_copies_are_named_where_larger_ones_are_asked_for(folders, tmp_path, capsys):
    small = ["--stored-sides", "12", "--eval-sizes", "none"]
    assert pack_dataset.main(["--data-dir", str(folders), "--out", str(tmp_path / "small"), *small]) == 0
    larger = ["--stored-sides", "8,20", "--eval-sizes", "none"]
    assert (
        pack_dataset.main(["--data-dir", str(tmp_path / "small"), "--out", str(tmp_path / "large"), *larger])
        == 0
    )
    assert "small holds images of 12 px at most; they are not enlarged to 20 px" in capsys.readouterr().out
    training = ["--arch", "resnet_tiny", "--epochs", "1", "--num-workers", "0", "--device", "cpu"]
    training += ["--resize-schedule", "12,16", "--save-dir", str(tmp_path / "run"), "--stop-after", "1"]
    assert train.main(["--data-dir", str(tmp_path / "small"), *training]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [" from copies of 12 px" in line for line in said if line.startswith("epochs")] == [True]
    assert train.main(["--data-dir", str(folders), *training, "--overwrite"]) == 0
    assert "from copies" not in capsys.readouterr().out
    digits = ["--dataset", "digits", "--out", str(tmp_path / "digits"), "--stored-sides", "8"]
    assert pack_dataset.main(digits) == 0  # which have 8 px: nothing was lost
    assert train.main(["--data-dir", str(tmp_path / "digits"), *training, "--overwrite"]) == 0
    assert "from copies" not in capsys.readouterr().out


def test_tar_files_are_packed_with_all_classes(tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "present", lambda path: True)
    listed = tmp_path / "list.txt"
    listed.write_text("n01440764\n")
    arguments = ["--data-dir", str(tmp_path), "--out", str(tmp_path / "x"), "--class-list", str(listed)]
    with pytest.raises(UsageError, match="--class-list would do nothing"):
        pack_dataset.main([*arguments, "--dataset", "imagenet"])


def test_data_without_a_directory_is_packed_again_without_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert (
            pack_dataset.main(["--dataset", "synthetic:train=40,val=8,size=16,classes=2", "--out", "p"]) == 0
        )


def test_a_class_that_would_be_empty_is_refused(folders, tmp_path):
    for path in (folders / "train" / "class 1").iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match="all train images of class 1 are bad"):
        pack(folders, tmp_path / "out", "--on-bad-image", "skip")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_batch_too_large_for_arrow_is_explained(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "BATCH_BYTES", 1000)
    with pytest.raises(DataError, match=r"images from val/class 0/\S+ to .* take more than 2 GiB"):
        pack(folders, tmp_path / "out", "--workers", "1")


# --- bad images ------------------------------------------------------------------------------------


def test_bad_images_are_all_listed_and_nothing_is_lost(folders, tmp_path, capsys):
    cut = folders / "train" / "class 0" / "train_05.JPEG"
    cut.write_bytes(cut.read_bytes()[:200])
    (folders / "val" / "class 2" / "val_01.JPEG").write_text("<html>")
    Image.new("RGB", (85_000, 20)).save(folders / "train" / "class 1" / "wide.png")  # 68,000 px at 16 px
    out = tmp_path / "out"
    with pytest.raises(DataError, match="3 bad images"):
        pack(folders, out)
    listed = capsys.readouterr().out
    assert (
        all(name in listed for name in ("train_05.JPEG", "val_01.JPEG", "wide.png"))
        and not (out / "manifest.json").exists()
    )

    assert pack(folders, out, "--on-bad-image", "skip") == 0
    copy = open_packed(out)
    assert len(copy.train) == 239 and len(copy.val) == 11
    assert "3 bad images left out" in capsys.readouterr().out
    names = [copy.train.name(i) for i in range(239)]
    assert not any("class 0/train_05" in name for name in names)
    assert [int(name.split("class ")[1][0]) for name in names] == copy.train.labels.tolist()
    assert pack(folders, out, "--on-bad-image", "skip") == 0  # and again: complete


def test_packing_without_sides_is_refused(folders, tmp_path):
    with pytest.raises(UsageError, match="no sides to store"):
        pack(folders, tmp_path / "out", "--stored-sides", "")
    assert not (tmp_path / "out").exists()


def test_verify_lists_every_bad_image(folders, capsys):
    assert pack_dataset.main(["--data-dir", str(folders), "--verify", "--workers", "1"]) == 0
    assert "all 252 images decode" in capsys.readouterr().out
    (folders / "train" / "class 1" / "train_09.JPEG").write_bytes(b"")
    with pytest.raises(DataError, match="1 bad"):
        pack_dataset.main(["--data-dir", str(folders), "--verify", "--workers", "1"])
    assert "train_09.JPEG: the file is empty" in capsys.readouterr().out


def test_an_output_that_is_a_file_is_refused(folders, tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(ResourceError, match=r"cannot write to .*out: File exists") as caught:
        pack(folders, tmp_path / "out")
    assert caught.value.fix == "choose a writable directory with --out"


# --- disk ------------------------------------------------------------------------------------------


def test_too_small_a_disk_is_refused_before_anything_is_packed(folders, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(ResourceError, match="needs about"):
        pack(folders, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*/*.arrow"))
    monkeypatch.undo()
    assert pack(folders, tmp_path / "out", "--stored-sides", "16") == 0  # as its fix says


def test_a_disk_that_fills_up_leaves_no_partial_folder(folders, tmp_path):
    """Writes really fail, because the command's process has a limit on the size of files."""
    out = tmp_path / "out"
    limited = subprocess.run(
        command(folders, out),
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)),
    )
    assert limited.returncode == 6, limited.stderr
    assert (
        "cannot write" in limited.stderr
        and "make room" in limited.stderr
        and "Traceback" not in limited.stderr
    )
    assert not list(out.rglob("*.partial")) and not (out / "manifest.json").exists()
    assert pack(folders, out) == 0
    assert len(open_packed(out).train) == 240


def test_a_killed_worker_is_explained(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "write_group", _die)
    with pytest.raises(ResourceError, match="killed"):
        pack(folders, tmp_path / "out")


def _die(*_, **options):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_file_that_vanishes_is_named(folders, tmp_path, monkeypatch):
    gone = folders / "train" / "class 2" / "train_70.JPEG"
    monkeypatch.setattr(packing, "estimate", lambda *_: gone.unlink() or {})
    with pytest.raises(DataError, match=r"train_70\.JPEG"):
        pack(folders, tmp_path / "out")


def test_help_needs_neither_pyarrow_nor_torch():
    python, script = command("a", "b")[:2]
    called = [python, "-X", "importtime", script, "--help"]
    done = subprocess.run(called, capture_output=True, text=True)
    assert done.returncode == 0 and "--stored-sides" in done.stdout
    assert "argparse" in done.stderr and not re.search(r"\b(pyarrow|torch|numpy)\b", done.stderr)
