"""A checkpoint on disk is complete or absent, refused or bit-identical; an older one always survives."""

import errno
import os
import random
import resource
import signal
import stat
import subprocess
import time
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
import torch
from inprocess import TINY, config_of, tiny_run
from malice import PAYLOADS, REASONS, SENTINEL, full, whole, write
from runs import ROOT, digest, exact, finish, spawn

import loop
import train
from base import flags, schemas
from base.errors import CheckpointError, ResourceError
from harness import checkpoint, rundir, session
from harness.log import read_metrics

CRASHES = {
    "before the file is opened": "_write_and_prove:1",
    "when it is open": "_on_cpu:1",
    "before it is flushed": "torch.save:1+",
    "before the renames": "_move_into_place:1",
    "between the renames": "_keep_as:1+",
    "after the renames": "_sync:1",
    "between a second name and its rename": "_second_name:1+",
}


def main(*arguments) -> int:
    return train.main([*map(str, arguments)])


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """A run of a little more than two epochs."""
    save_dir = tmp_path_factory.mktemp("stopped")
    assert main(*TINY, "--save-dir", save_dir, "--stop-after", 12) == 0
    return save_dir


@pytest.fixture
def run_dir(stopped, tmp_path) -> Path:
    """A copy of the run that a test may damage."""
    subprocess.run(["cp", "-a", f"{stopped}/.", tmp_path], check=True)
    return tmp_path


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> bytes:
    """A checkpoint like ours, small enough to be damaged a hundred times."""
    path = tmp_path_factory.mktemp("small") / "last_x.pt"
    checkpoint.save(path, whole())
    return path.read_bytes()


def last(directory: Path) -> Path:
    (path,) = directory.glob("last_*.pt")
    return path


def content_of(path: Path) -> str:
    return exact(checkpoint.load(path))


# --- writing ---


def test_a_save_is_written_flushed_synced_and_only_then_renamed_beside_itself(tmp_path, monkeypatch):
    done, path = [], tmp_path / "last_x.pt"
    checkpoint.save(path, whole())

    def record(name: str, words):
        real = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *args, **kw: (done.append((name, words(*args))), real(*args, **kw))[1]
        )

    record("fsync", lambda fd: os.readlink(f"/proc/self/fd/{fd}"))
    record("replace", lambda a, b: (str(a), str(b)))
    real_find = checkpoint.find_damage
    monkeypatch.setattr(
        checkpoint, "find_damage", lambda p, *only: (done.append(("read", str(p))), real_find(p))[1]
    )
    checkpoint.save(path, whole(step=4))
    partial, older = f"{path}.partial", f"{path.with_name('prev_last_x.pt')}"
    assert done == [
        ("fsync", partial),
        ("read", partial),
        ("read", str(path)),
        ("replace", (f"{older}.partial", older)),
        ("replace", (partial, str(path))),
        ("fsync", str(tmp_path)),
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last_x.pt", "prev_last_x.pt"]
    assert checkpoint.load(path)["step"] == 4 and checkpoint.load(older)["step"] == 3


def test_everything_is_in_the_file_before_it_is_synced(tmp_path, monkeypatch):
    sizes, real = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (sizes.append(os.fstat(fd).st_size), real(fd))[1])
    checkpoint.save(tmp_path / "x.pt", whole())
    assert sizes[0] == (tmp_path / "x.pt").stat().st_size


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_a_checkpoint_has_the_permissions_of_umask(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        checkpoint.save(tmp_path / "x.pt", whole())
    finally:
        os.umask(before)
    assert (tmp_path / "x.pt").stat().st_mode & 0o777 == mode


@pytest.fixture
def no_links(monkeypatch):
    monkeypatch.setattr(
        os, "link", lambda *args: (_ for _ in ()).throw(OSError(errno.EPERM, "no links here"))
    )


def test_without_hard_links_it_works_by_renaming_and_copying(tmp_path, no_links):
    for step in (1, 2):
        checkpoint.save(tmp_path / "last_x.pt", whole(step=step))
        checkpoint.link(tmp_path / "last_x.pt", tmp_path / "best_x.pt")
    steps = {path.name: checkpoint.load(path)["step"] for path in tmp_path.iterdir()}
    assert steps == {"last_x.pt": 2, "best_x.pt": 2, "prev_last_x.pt": 1, "prev_best_x.pt": 1}


def test_without_hard_links_a_complete_run_is_not_saved_again(tmp_path, no_links, capsys):
    main(*TINY, "--save-dir", tmp_path)  # its last epoch is its best
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.pt")}
    main("--resume", "auto", "--save-dir", tmp_path)
    assert "This run is complete" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.pt")} == before


def test_a_damaged_file_never_replaces_the_intact_one_before_it(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path / "last_x.pt", whole(step=step))
    (tmp_path / "last_x.pt").write_bytes(b"rubbish")
    checkpoint.save(tmp_path / "last_x.pt", whole(step=3))
    assert checkpoint.load(tmp_path / "prev_last_x.pt")["step"] == 1
    assert checkpoint.load(tmp_path / "last_x.pt")["step"] == 3


def test_a_name_that_occurs_twice_leaves_nothing_behind(tmp_path):
    checkpoint.save(tmp_path / "last_x.pt", whole())
    for _ in range(3):
        checkpoint.link(tmp_path / "last_x.pt", tmp_path / "best_x.pt")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best_x.pt", "last_x.pt", "prev_best_x.pt"]


# --- full disks ---


@pytest.fixture
def full_disk(tmp_path, monkeypatch):
    """A directory with two checkpoints, with retries turned off: (path, bytes of both)."""
    path, slept = tmp_path / "last_x.pt", []
    for step in (1, 2):
        checkpoint.save(path, whole(step=step))
    monkeypatch.setattr(time, "sleep", slept.append)
    yield path, {p: p.read_bytes() for p in tmp_path.iterdir()}
    assert len(slept) == 2 and slept[0] < slept[1]


def refused_and_untouched(path: Path, before: dict[Path, bytes]) -> ResourceError:
    with pytest.raises(ResourceError) as caught:
        checkpoint.save(path, whole(step=3, model={"w": torch.zeros(50_000)}))
    assert {p: p.read_bytes() for p in path.parent.iterdir()} == before
    assert caught.value.exit_code == 6 and str(path) in caught.value.what and "MiB free" in caught.value.what
    return caught.value


def test_a_file_size_limit_leaves_the_older_checkpoints_as_they_were(full_disk):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        error = refused_and_untouched(*full_disk)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in error.what


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_an_error_of_the_disk_leaves_the_older_checkpoints_as_they_were(full_disk, monkeypatch, number, call):
    def fail(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, fail)
    assert os.strerror(number) in refused_and_untouched(*full_disk).what


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
@pytest.mark.parametrize("kind", [stat.S_ISDIR, stat.S_ISREG])
def test_directories_that_cannot_be_synced_are_left_alone_but_files_must_be(
    kind, number, tmp_path, monkeypatch
):
    def fail(descriptor):
        if kind(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with nullcontext() if kind is stat.S_ISDIR else pytest.raises(ResourceError):
        checkpoint.save(tmp_path / "last_x.pt", whole())
    assert (tmp_path / "last_x.pt").exists() == (kind is stat.S_ISDIR)


def test_a_disk_that_recovers_costs_a_retry_and_nothing_else(full_disk, monkeypatch):
    path, _ = full_disk
    real, left = os.fsync, [OSError(errno.EIO, "hiccup"), OSError(errno.EIO, "hiccup")]

    def flaky(fd):
        if left:
            raise left.pop()
        real(fd)

    monkeypatch.setattr(os, "fsync", flaky)
    checkpoint.save(path, whole(step=3))
    assert checkpoint.load(path)["step"] == 3


def test_a_file_that_cannot_be_read_back_does_not_become_a_checkpoint(full_disk, monkeypatch):
    path, before = full_disk
    monkeypatch.setattr(
        checkpoint, "find_damage", lambda p: "checksum wrong" if p.suffix == ".partial" else ""
    )
    refused_and_untouched(path, before)


# --- damage ---


def flipped(content: bytes, rng: random.Random) -> bytes:
    position = rng.randrange(len(content))
    return content[:position] + bytes([content[position] ^ 1 << rng.randrange(8)]) + content[position + 1 :]


def refused_or_identical(path: Path, content: bytes, wanted: str) -> bool:
    """Return whether the file is refused. If not (padding, a date), its content must be unchanged."""
    path.write_bytes(content)
    try:
        assert content_of(path) == wanted
    except CheckpointError as error:
        assert error.exit_code == 4 and str(path) in error.what
        return True
    return False


@pytest.mark.parametrize("count", [60, pytest.param(400, marks=pytest.mark.torture)])
def test_a_flipped_bit_is_refused_or_harmless(small, tmp_path, count):
    path, rng = tmp_path / "last_x.pt", random.Random(count)
    path.write_bytes(small)
    wanted = content_of(path)
    refused = sum(refused_or_identical(path, flipped(small, rng), wanted) for _ in range(count))
    print(f"{count} flipped bits: {refused} refused, {count - refused} harmless, 0 read as something else")
    assert refused > count / 2


@pytest.mark.torture
def test_every_bit_of_a_small_checkpoint_is_refused_or_harmless(small, tmp_path):
    """This includes the archive's own records, which torch's reader trusts without a checksum."""
    path = tmp_path / "last_x.pt"
    path.write_bytes(small)
    wanted, refused = content_of(path), 0
    for place in range(len(small) * 8):
        damaged = bytearray(small)
        damaged[place // 8] ^= 1 << place % 8
        refused += refused_or_identical(path, bytes(damaged), wanted)
    print(f"{len(small) * 8} bits flipped, one at a time: {refused} refused, the others harmless")


def test_an_entry_that_a_flipped_bit_makes_a_directory_is_refused(small, tmp_path):
    """torch would return uninitialized memory as a weight."""
    place = (
        small.rindex(b"archive/data/1") - 8
    )  # the external attributes of its record in the central directory
    (tmp_path / "last_x.pt").write_bytes(small[:place] + bytes([small[place] ^ 0x10]) + small[place + 1 :])
    with pytest.raises(CheckpointError, match="it holds a directory"):
        checkpoint.load(tmp_path / "last_x.pt")


def test_a_flipped_bit_of_a_weight_is_refused(small, tmp_path):
    """torch alone loads it without an error."""
    place = small.index(torch.arange(300.0).numpy().tobytes())
    path = tmp_path / "last_x.pt"
    for offset in (place, place + 701, place + 1199):
        path.write_bytes(small[:offset] + bytes([small[offset] ^ 1]) + small[offset + 1 :])
        torch.load(path, weights_only=True)
        with pytest.raises(CheckpointError, match=r"damaged or incomplete.*CRC"):
            checkpoint.load(path)


def test_a_truncated_file_is_refused(small, tmp_path):
    path = tmp_path / "last_x.pt"
    for k in range(20):
        path.write_bytes(small[: len(small) * k // 20])
        with pytest.raises(CheckpointError, match="damaged or incomplete"):
            checkpoint.load(path)


@pytest.mark.parametrize("name, content, words", [
    ("empty.pt", b"", "it is empty"), ("text.pt", b"<html>login</html>", "not a complete file"),
    ("missing.pt", None, "no checkpoint at"), ("folder.pt", "folder", "which is a directory"),
])  # fmt: skip
def test_a_path_that_is_not_a_checkpoint_lists_those_beside_it(run_dir, capsys, name, content, words):
    path, before = run_dir / name, sorted(run_dir.glob("*_*.pt"))
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=words) as caught:
        main("--resume", path, "--save-dir", run_dir)
    assert (
        caught.value.exit_code == 4 and str(path) in caught.value.what and before[0].name in caught.value.fix
    )


def test_a_directory_is_no_checkpoint_but_names_those_in_it(run_dir, tmp_path):
    with pytest.raises(CheckpointError, match="which is a directory") as caught:
        main("--resume", run_dir, "--save-dir", tmp_path)
    assert caught.value.fix.startswith(f"use --resume auto --save-dir {run_dir}, or ")
    assert str(last(run_dir)) in caught.value.fix


# --- malice ---


@pytest.mark.parametrize("name", sorted(PAYLOADS))
def test_a_malicious_file_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, before = write(name, tmp_path / "last_x.pt"), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=REASONS.get(name, "it contains code")) as caught:
        checkpoint.load_model(path)
    assert caught.value.exit_code == 4 and caught.value.fix
    with suppress(CheckpointError):  # two are intact but hold no model: restoring them fails
        checkpoint.newest(tmp_path)
    assert not list(tmp_path.glob(f"*{SENTINEL}*"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB: under 1 GiB more


def test_there_are_thirty_malicious_files_and_the_sentinel_would_be_seen(tmp_path, monkeypatch):
    assert len(PAYLOADS) >= 30
    (tmp_path / "x.pt").write_bytes(full())
    assert checkpoint.load_model(tmp_path / "x.pt")[1]["step"] == 3  # or what is changed in it proves nothing
    monkeypatch.chdir(tmp_path)
    torch.load(write("os.system", tmp_path / "x.pt"), weights_only=False)
    assert (tmp_path / SENTINEL).exists()


def test_train_reports_a_file_that_contains_code(tmp_path):
    path = write("os.system", tmp_path / "last_x.pt")
    with pytest.raises(CheckpointError, match=r"contains code.*system"):
        main("--resume", path, "--save-dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- other files ---


@pytest.mark.parametrize("key", sorted(whole()))
def test_a_missing_or_malformed_part_is_named(key, tmp_path):
    for changed, words in (({}, f"lacks {key}"), ({key: 1.5}, f": {key} should be .*, not 1.5")):
        content = {k: v for k, v in whole().items() if k != key} | changed
        torch.save({"schema": 1, **content}, tmp_path / "x.pt")
        with pytest.raises(CheckpointError, match=words):
            checkpoint.load(tmp_path / "x.pt")


def test_a_newer_schema_asks_for_newer_code_and_names_its_new_fields(tmp_path):
    torch.save({"schema": checkpoint.SCHEMA + 1, "step": 1, "new\x1b": 1}, tmp_path / "x.pt")
    with pytest.raises(
        CheckpointError, match=r"schema 2 and has unknown fields: new\\x1b; this code reads up to 1"
    ) as caught:
        checkpoint.load(tmp_path / "x.pt")
    assert "update" in caught.value.fix


WRAPPED = [
    lambda weights: weights,
    lambda weights: {"model_state_dict": weights, "epoch": 3, "accuracy": 0.5},
    lambda weights: {f"module.{k}": v for k, v in weights.items()},
    lambda weights: {"state_dict": {f"_orig_mod.{k}": v for k, v in weights.items()}},
]


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_weights_alone_start_a_run_but_do_not_resume_one(wrapped, run_dir, tmp_path):
    weights = checkpoint.load(last(run_dir))["model"]
    torch.save(wrapped(weights), tmp_path / "weights.bin")
    with pytest.raises(CheckpointError, match="weights only") as caught:
        main("--resume", tmp_path / "weights.bin", "--save-dir", tmp_path / "new")
    assert "--init-from" in caught.value.fix
    where = ("--init-from", tmp_path / "weights.bin", "--save-dir", tmp_path / "new")
    main(*TINY, *where, "--stop-after", 1, "--lr", 1e-30)
    started = checkpoint.load(last(tmp_path / "new"))["model"]
    assert all(
        torch.equal(started[k], v) for k, v in weights.items() if "running" not in k and "num_" not in k
    )


@pytest.mark.parametrize("flags, words", [
    (("--arch", "resnet18"), "--arch was resnet_tiny, now resnet18"),
    (("--use-blurpool",), "--use-blurpool was False, now True"),
    (("--lr", "0.5", "--seed", "9"), "--lr was .*; --seed was"),
    (("--arch", "resnet18", "--allow-change", "arch"), "another model: arch resnet_tiny then, resnet18 now"),
    (("--width", "16", "--allow-change", "width"), "another model: width None then, 16 now"),
    (("--subset-size", "30", "--allow-change", "subset_size"), "not the data that the run was trained on"),
    (("--epochs", "4"), "--epochs was 3, now 4"),
])  # fmt: skip
def test_a_checkpoint_of_another_run_is_refused_and_left_alone(flags, words, run_dir):
    before = {p.name: p.read_bytes() for p in run_dir.glob("*.*")}
    with pytest.raises(CheckpointError, match=words):
        main("--resume", "auto", "--save-dir", run_dir, *flags)
    assert {p.name: p.read_bytes() for p in run_dir.glob("*.*")} == before


def test_another_plan_with_as_many_steps_starts_at_the_next_epoch(tmp_path):
    plan = ("--epochs", "4", "--resize-schedule", "8,16", "--phase-batch-sizes")
    where = ("--save-dir", tmp_path)
    main(*TINY, *where, *plan, "5,10", "--stop-after", "1")
    epoch = checkpoint.load(last(tmp_path))["total_steps"] // 6  # of 2, 2, 1 and 1 such parts
    main("--resume", "auto", *where, "--stop-after", 2 * epoch + 1)
    main("--resume", "auto", *where, "--phase-batch-sizes", "10,5", "--allow-change", "phase_batch_sizes")
    found = checkpoint.load(last(tmp_path))
    assert found["step"] == 6 * epoch and len(found["rows"]) == 4


@pytest.mark.parametrize(
    ("flag", "value"), [("backbone_lr", "0.1"), ("optimizer", "muon"), ("optimizer", "lamb")]
)
def test_another_optimizer_or_other_groups_can_be_accepted(flag, value, run_dir, capsys):
    change = (f"--{flag.replace('_', '-')}", value, "--allow-change", flag)
    assert main("--resume", "auto", "--save-dir", run_dir, *change) == 0
    assert "its state starts empty" in capsys.readouterr().out
    assert len(checkpoint.load(last(run_dir))["rows"]) == 3


def test_a_best_epoch_of_an_older_plan_with_a_smaller_last_size_does_not_count(tmp_path, capsys):
    one_size = ("--resize-schedule", "8", "--phase-batch-sizes", "8", "--epochs", "3", "--no-ema")
    main(*TINY, *one_size, "--save-dir", tmp_path)
    best = checkpoint.load(next(tmp_path.glob("best_*")))
    assert best["best"]["epoch"] == 3 and best["eval"]["image_size"] == 8
    larger = (
        "--resize-schedule",
        "8,16",
        "--phase-epochs",
        "3,2",
        "--phase-batch-sizes",
        "8,8",
        "--epochs",
        "5",
    )
    names = "resize_schedule,phase_epochs,phase_batch_sizes,epochs"
    capsys.readouterr()
    main("--resume", "auto", "--save-dir", tmp_path, *larger, "--allow-change", names)
    assert "epoch 3, the best so far, does not count under the new plan" in capsys.readouterr().out
    best = checkpoint.load(next(tmp_path.glob("best_*")))
    assert best["best"]["epoch"] > 3 and best["eval"]["image_size"] == 16


def test_drops_of_the_plateau_rule_end_with_it(tmp_path):
    run = tiny_run(tmp_path, "--schedule", "plateau", "--epochs", "9")
    for loss in (1.0, *[2.0] * 5):
        run.state.schedule.observe(loss)
    saved = run.state.schedule.state_dict()
    assert saved["drops"] == 1
    constant = tiny_run(tmp_path, "--schedule", "constant", "--epochs", "9", "--lr", "0.5").state.schedule
    constant.load_state_dict(saved)
    assert constant.lr == 0.5
    again = tiny_run(tmp_path, "--schedule", "plateau", "--epochs", "9", "--lr", "0.5").state.schedule
    again.load_state_dict(saved)
    assert again.lr == pytest.approx(0.05)


def test_the_warm_up_of_a_schedule_that_a_resumed_run_changes_to_fits_its_epochs(tmp_path):
    saved = flags.plain(config_of("--epochs", "6"))
    typed = flags.parse(train.build_parser(), ["--schedule", "cosine", "--allow-change", "schedule"])
    assert rundir.resumed_config(*typed, saved).warmup_epochs == 3
    cosine = flags.plain(config_of("--epochs", "6", "--schedule", "cosine", "--warmup-epochs", "5"))
    typed = flags.parse(train.build_parser(), ["--num-workers", "1"])
    assert rundir.resumed_config(*typed, cosine).warmup_epochs == 5  # as it was typed
    typed = flags.parse(train.build_parser(), ["--epochs", "4", "--allow-change", "epochs"])
    assert rundir.resumed_config(*typed, cosine).warmup_epochs == 2


def test_a_file_of_a_flag_that_changed_is_noticed(tmp_path):
    weights, out = tmp_path / "weights.txt", tmp_path / "run"
    weights.write_text("\n".join(f"{k} 1" for k in range(10)))
    main(*TINY, "--class-weights", weights, "--save-dir", out, "--stop-after", "1")
    weights.write_text("\n".join(f"{k} {k}" for k in range(10)))
    with pytest.raises(CheckpointError, match="the file of --class-weights has changed") as caught:
        main("--resume", "auto", "--save-dir", out, "--stop-after", "2")
    assert "--allow-change class_weights" in caught.value.fix
    # As it is in the error, and as one types flags.
    for stop, name in ((2, "class_weights"), (3, "class-weights")):
        weights.write_text("\n".join(f"{k} {k + stop}" for k in range(10)))
        assert not main("--resume", "auto", "--save-dir", out, "--allow-change", name, "--stop-after", stop)


class OnDevice(torch.Tensor):
    """A tensor that claims to be on another device until `cpu` is called."""

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_tensors_are_saved_from_the_cpu(tmp_path):
    """Plain `torch.load` could not read tensors of a GPU on a machine without one."""
    weights = {"w": torch.arange(3.0).as_subclass(OnDevice)}
    checkpoint.save(tmp_path / "x.pt", whole(model=weights))
    checkpoint.write(tmp_path / "w.pt", weights)
    for found in (
        checkpoint.load(tmp_path / "x.pt")["model"],
        torch.load(tmp_path / "w.pt", weights_only=True),
    ):
        assert type(found["w"]) is torch.Tensor and found["w"].tolist() == [0, 1, 2]


def test_malformed_flags_in_a_checkpoint_are_refused(run_dir):
    for name, value in (
        ("epochs", "many"),
        ("lr", float("nan")),
        ("arch", "no_such"),
        ("ema", "yes"),
        ("subset", [1]),
    ):
        saved = checkpoint.load(last(run_dir))
        saved.pop("schema")
        saved["config"][name] = value
        checkpoint.save(run_dir / "odd.bin", saved)
        with pytest.raises(CheckpointError, match="malformed flags"):
            main("--resume", run_dir / "odd.bin", "--save-dir", run_dir)


def test_a_run_that_is_past_stop_after_takes_no_step(run_dir, capsys):
    assert main("--resume", "auto", "--save-dir", run_dir, "--stop-after", 1) == 0
    assert "Stopped at step 12." in capsys.readouterr().out and checkpoint.load(last(run_dir))["step"] == 12


def test_a_decay_that_its_ramp_does_not_reach_is_noted(tmp_path):
    # After 15 steps the ramp is at 16 / 25. The default decay is not noted.
    for noted, *arguments in ((1, 0.7), (0, 0.7, "--no-ema-ramp"), (0, 0.6), (0, 0.9999)):
        run = tiny_run(tmp_path, "--ema-decay", *arguments)
        said = session.introduction(run, config_of("--ema-decay", *arguments))
        assert ("--ema-decay is not used: the ramp only reaches 0.6400 in 15 steps" in said) == bool(noted)
        assert ("--ema-decay" in said) == bool(noted)


def test_a_stop_beyond_the_last_step_is_noted(tmp_path):
    for stop in (15, 16):  # of 15
        said = session.introduction(tiny_run(tmp_path, "--stop-after", stop), config_of())
        assert ("note: --stop-after 16 is not used: the run has 15 steps" in said) == (stop == 16)


# --- which checkpoint is resumed ---


def test_auto_skips_damaged_files_and_says_why(run_dir, capsys):
    last(run_dir).write_bytes(last(run_dir).read_bytes()[:-100])
    (older,) = run_dir.glob("prev_last_*.pt")
    step = checkpoint.load(older)["step"]
    assert main("--resume", "auto", "--save-dir", run_dir, "--stop-after", 12) == 0
    out = capsys.readouterr().out
    assert (
        f"skipping damaged or incomplete checkpoint {last(run_dir)}" in out
        and f"resuming from {older}" in out
    )
    assert step < 12 and checkpoint.load(last(run_dir))["step"] == 12
    assert checkpoint.load(older)["step"] == step  # the damaged one did not take its place


def test_only_the_chosen_one_of_many_checkpoints_is_read_completely(tmp_path, monkeypatch):
    for name, step in (("last_x", 5), ("prev_last_x", 4), ("best_x", 3), ("prev_best_x", 6)):
        checkpoint.save(tmp_path / f"{name}.pt", whole(step=step))
    damaged = tmp_path / "last_x.pt"
    content = damaged.read_bytes()
    place = content.index(torch.arange(300.0).numpy().tobytes())
    damaged.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    read_completely, real = [], checkpoint.find_damage
    monkeypatch.setattr(
        checkpoint,
        "find_damage",
        lambda path, *only: (read_completely.append(path.name) if only == ("",) else 0, real(path, *only))[1],
    )
    path, payload, skipped = checkpoint.newest(tmp_path)
    assert (path.name, payload["step"]) == ("prev_best_x.pt", 6)
    assert read_completely == ["last_x.pt", "prev_best_x.pt"]
    assert len(skipped) == 1 and "CRC" in skipped[0]


def test_a_resumed_run_does_not_keep_what_it_read(run_dir, monkeypatch):
    kept = []
    monkeypatch.setattr(rundir, "restore", lambda run, saved, config: kept.append(saved))
    monkeypatch.setattr(loop, "fit", lambda run, log: kept.append(dict(kept[0])))
    main("--resume", "auto", "--save-dir", run_dir)
    assert kept == [{}, {}]


def test_auto_never_starts_from_scratch_over_damaged_files(run_dir):
    for path in run_dir.glob("*.pt"):
        path.write_bytes(b"rubbish")
    before = {p.name: p.read_bytes() for p in run_dir.glob("*.*")}
    with pytest.raises(CheckpointError, match="no intact checkpoint") as caught:
        main("--resume", "auto", "--save-dir", run_dir, *TINY)
    assert caught.value.exit_code == 4
    assert {p.name: p.read_bytes() for p in run_dir.glob("*.*")} == before


def test_a_damaged_path_is_refused_although_another_checkpoint_is_intact(run_dir):
    path = last(run_dir)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="damaged"):
        main("--resume", path, "--save-dir", run_dir)


# --- the best checkpoint ---


def row(epoch: int, score: float) -> dict:
    numbers = {"val_top1": 0.0, "lr": 0.1, "data_wait_percent": 0, "seconds": 1}
    return dict.fromkeys(schemas.COLUMNS) | numbers | {"epoch": epoch, "ema_val_top1": score}


@pytest.mark.parametrize("scores, best", [
    ([90, 80, 70], 1), ([50, 50, 50], 1), ([float("nan"), 10, 5], 2), ([float("inf"), 10, float("nan")], 2),
    ([float("nan")] * 3, 0),
])  # fmt: skip
def test_the_best_is_the_first_with_the_highest_finite_score(scores, best, tmp_path):
    run = tiny_run(tmp_path, "--epochs", 9, "--phase-epochs", "1,1,7")
    for epoch, score in enumerate(scores, 7):
        row_ = row(epoch, score)
        row_["best"] = loop.update_best(run, row_)
        run.state.rows.append(row_)
    assert run.state.best["epoch"] == (best + 6 if best else 0)
    assert [r["epoch"] for r in run.state.rows if r["best"]][-1:] == [best + 6][: bool(best)]


def test_the_best_survives_a_resume_with_worse_epochs(tmp_path, monkeypatch):
    flags = ("--epochs", "6", "--phase-epochs", "1,1,4")
    scores = {5: 90.0, 6: 10.0}
    real = loop.score

    def scored(run, phase):
        row, bad = real(run, phase)
        return row | {"ema_val_top1": scores.get(len(run.state.rows) + 1, 0.0)}, bad

    monkeypatch.setattr(loop, "score", scored)
    per_epoch = 5
    main(*TINY, *flags, "--save-dir", tmp_path, "--stop-after", 5 * per_epoch + 1)
    (best,) = tmp_path.glob("best_*.pt")
    before = best.read_bytes()
    main("--resume", "auto", "--save-dir", tmp_path)
    assert best.read_bytes() == before and len(checkpoint.load(best)["rows"]) == 5
    assert checkpoint.load(last(tmp_path))["best"]["epoch"] == 5


def test_a_run_resumed_elsewhere_takes_its_best_checkpoint_along(run_dir, tmp_path):
    main("--resume", "auto", "--save-dir", run_dir)
    whole = digest(run_dir, "best")
    (best,) = run_dir.glob("best_*.pt")
    elsewhere = tmp_path / "elsewhere"
    main("--resume", best, "--save-dir", elsewhere)
    assert digest(elsewhere, "best") == whole == digest(elsewhere, "last")


# --- killed while saving, through the command line ---


@pytest.mark.parametrize(
    "when", [w if "between" in w else pytest.param(w, marks=pytest.mark.torture) for w in CRASHES]
)
def test_a_run_killed_while_saving_and_resumed_ends_in_the_same_bits(when, tmp_path):
    straight, killed, log = tmp_path / "straight", tmp_path / "killed", tmp_path / "log"
    main(*TINY, "--save-dir", straight)
    main(*TINY, "--save-dir", killed, "--stop-after", 4)
    kill = {"AT": f"harness.checkpoint.{CRASHES[when]}", "SIGNALS": str(signal.SIGKILL.value)}
    assert finish(spawn("--resume", "auto", "--save-dir", killed, output=log, **kill)) == -signal.SIGKILL
    assert finish(spawn("--resume", "auto", "--save-dir", killed, output=log)) == 0, log.read_text()
    for kind in ("last", "best"):
        assert digest(killed, kind) == digest(straight, kind)
    assert len(read_metrics(killed)) == 3
    assert not list(killed.glob("*.partial"))


# --- older schemas ---


@pytest.mark.parametrize(
    "path", sorted((ROOT / "tests" / "fixtures").glob("checkpoint_v*.pt")), ids=lambda p: p.stem
)
def test_a_checkpoint_of_every_schema_ever_released_loads_and_resumes(path, tmp_path):
    model, payload = checkpoint.load_model(path)
    assert payload["step"] == 12 and payload["eval"]["classes"]
    assert torch.isfinite(model(torch.zeros(1, 3, 24, 24))).all()
    assert main("--resume", path, "--save-dir", tmp_path) == 0
    assert len(checkpoint.load(last(tmp_path))["rows"]) == 3


def test_there_is_a_fixture_for_this_schema():
    assert (ROOT / "tests" / "fixtures" / f"checkpoint_v{checkpoint.SCHEMA}.pt").exists()
