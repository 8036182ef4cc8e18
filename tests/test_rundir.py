"""Which run may write to a save directory, what --overwrite deletes, and what if the directory vanishes."""

import errno
import json
import os
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from inprocess import TINY, tiny_run
from runs import ROOT, digest, environment, finish, payload, spawn

import loop
import train
from base import errors, flags
from base.errors import CheckpointError, ResourceError, UsageError, UserError
from harness import build, checkpoint, log, preflight, rundir, session

NAME = "resnet_tiny_digits.pt"


def run(*arguments) -> int:
    return train.main([*map(str, arguments)])


def snapshot(directory: Path) -> dict[str, bytes | None]:
    paths = [p for p in directory.rglob("*") if p.name != ".lock"]
    return {str(p.relative_to(directory)): p.read_bytes() if p.is_file() else None for p in paths}


def refused(code: int, *arguments, where: Path) -> UserError:
    before = snapshot(where)
    with pytest.raises(UserError) as caught:
        run(*arguments)
    assert caught.value.exit_code == code, caught.value
    assert snapshot(where) == before, "something was written"
    return caught.value


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """A run of six epochs of five steps, stopped in the last: its best epoch so far is the fifth."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    longer = ("--epochs", 6, "--resize-schedule", "8", "--phase-batch-sizes", "8", "--stop-after", 27)
    assert run(*TINY, *longer, "--save-dir", folder) == 0
    assert payload(folder)["best"]["epoch"] == 5 and (folder / f"best_{NAME}").exists()
    return folder


@pytest.fixture
def mine(stopped, tmp_path) -> Path:
    return shutil.copytree(stopped, tmp_path / "mine")


@pytest.fixture
def other(tmp_path) -> Path:
    assert run(*TINY, "--seed", "9", "--save-dir", tmp_path / "other", "--stop-after", "1") == 0
    return tmp_path / "other"


def env(directory: Path) -> dict:
    return json.loads((directory / "env.json").read_text())


def without_id(directory: Path) -> None:
    """Make the directory that of an older run, which had no id."""
    for path in directory.glob("*.pt"):
        content = checkpoint.load(path)
        del content["run"]
        path.unlink()
        checkpoint.save(path, content)
    (directory / "env.json").write_text(
        json.dumps({k: v for k, v in env(directory).items() if k not in ("run", "checkpoint")})
    )


# --- which run a directory belongs to ---


def test_a_run_resumed_in_its_directory_keeps_its_id(mine):
    before = env(mine)["run"]
    assert len(before) == 16 and {checkpoint.load(p)["run"] for p in mine.glob("*.pt")} == {before}
    run("--save-dir", mine, "--resume", mine / f"last_{NAME}", "--stop-after", "28")
    run("--save-dir", mine, "--resume", "auto")
    assert env(mine)["run"] == before and {checkpoint.load(p)["run"] for p in mine.glob("*.pt")} == {before}


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[]", b"[" * 60_000])
@pytest.mark.parametrize("name", ["config.json", "env.json"])
def test_a_malformed_record_counts_as_absent(name, content, mine):
    before = env(mine)["run"]
    (mine / name).write_bytes(content)
    run("--save-dir", mine, "--resume", "auto", "--stop-after", "28")
    assert env(mine)["run"] == payload(mine)["run"] == before


def test_a_run_that_was_killed_before_its_first_checkpoint_keeps_its_id(mine):
    before = env(mine)["run"]
    for path in mine.glob("*.pt"):
        path.unlink()
    run(*TINY, "--save-dir", mine, "--resume", "auto", "--stop-after", "1")
    assert env(mine)["run"] == before
    run(*TINY, "--save-dir", mine, "--overwrite", "--stop-after", "1")
    assert env(mine)["run"] != before


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again_with_its_flags(mine, capsys):
    for path in mine.glob("*.pt"):
        path.unlink()
    recorded = json.loads((mine / "config.json").read_text())
    assert run("--save-dir", mine, "--resume", "auto", "--seed", "5", "--stop-after", "1") == 0
    assert "no checkpoint" in capsys.readouterr().out
    again = json.loads((mine / "config.json").read_text())
    changed = {name for name in recorded if recorded[name] != again[name]}
    assert again["seed"] == 5 and again["arch"] == recorded["arch"] != "resnet50"
    assert changed <= {"seed", "resume", "stop_after", "save_dir"}
    for path in mine.glob("*.pt"):
        path.unlink()
    (mine / "config.json").write_text(json.dumps(recorded | {"lr": "fast"}))
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*, and malformed flags") as caught:
        run("--save-dir", mine, "--resume", "auto")
    assert "--overwrite" in caught.value.fix


def test_a_run_resumed_in_an_empty_directory_takes_its_best_along_and_ends_in_the_same_bits(mine, tmp_path):
    parent, fork = env(mine)["run"], tmp_path / "fork"
    best = digest(mine, "best")
    run("--save-dir", fork, "--resume", mine / f"last_{NAME}", "--stop-after", "28")
    assert env(fork)["parent"] == parent != env(fork)["run"]
    assert {checkpoint.load(p)["run"] for p in fork.glob("*.pt")} == {env(fork)["run"]}
    assert digest(fork, "best") == best
    run("--save-dir", fork, "--resume", "auto")
    assert env(fork)["parent"] == parent
    run("--save-dir", mine, "--resume", "auto")
    assert digest(fork) == digest(mine) and digest(fork, "best") == digest(mine, "best")


def test_a_fork_killed_right_after_it_was_made_can_be_resumed(mine, tmp_path, monkeypatch):
    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    step = payload(mine)["step"]
    monkeypatch.setattr(loop, "fit", killed)
    with pytest.raises(KeyboardInterrupt):
        run("--save-dir", tmp_path / "fork", "--resume", mine / f"last_{NAME}")
    assert payload(tmp_path / "fork")["step"] == step
    monkeypatch.undo()
    again = refused(2, "--save-dir", tmp_path / "fork", "--resume", mine / f"last_{NAME}", where=tmp_path)
    assert "--resume auto" in again.fix
    assert run("--save-dir", tmp_path / "fork", "--resume", "auto") == 0


def test_a_run_that_went_back_to_its_best_epoch_and_was_killed_does_not_return(mine, monkeypatch, capsys):
    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "start_phase", killed)
    with pytest.raises(KeyboardInterrupt):
        run("--save-dir", mine, "--resume", mine / f"best_{NAME}")
    monkeypatch.undo()
    steps = [checkpoint.load(mine / f"{kind}_{NAME}")["step"] for kind in ("last", "prev_last")]
    assert steps == [25, 27]
    run("--save-dir", mine, "--resume", "auto", "--stop-after", "26")
    assert f"resuming from {mine / f'last_{NAME}'}" in capsys.readouterr().out and payload(mine)["step"] == 26


def test_a_checkpoint_of_another_run_is_refused(mine, other, tmp_path):
    error = refused(2, "--resume", mine / f"last_{NAME}", "--save-dir", other, where=tmp_path)
    assert all(word in error.what for word in (env(mine)["run"], env(other)["run"], str(other)))


def test_a_copied_run_directory_counts_as_the_same_run(mine, tmp_path):
    copy = shutil.copytree(mine, tmp_path / "copy")
    run("--resume", mine / f"last_{NAME}", "--save-dir", copy, "--stop-after", "28")
    assert env(copy)["run"] == env(mine)["run"] and "parent" not in env(copy)


def test_a_run_without_an_id_resumes_in_its_own_directory_only(mine, other, tmp_path):
    without_id(mine)
    refused(2, "--resume", mine / f"last_{NAME}", "--save-dir", other, where=tmp_path)
    without_id(other)
    refused(2, "--resume", mine / f"last_{NAME}", "--save-dir", other, where=tmp_path)
    run("--save-dir", mine, "--resume", "auto", "--stop-after", "28")
    assert payload(mine)["run"] == env(mine)["run"]
    shutil.copy(mine / f"prev_last_{NAME}", mine / f"last_{NAME}")  # as if killed before its first save
    run("--save-dir", mine, "--resume", "auto")
    assert payload(mine)["step"] == 30


def test_auto_skips_checkpoints_copied_from_another_run(mine, other, capsys, tmp_path):
    shutil.copy(mine / f"last_{NAME}", other / "last_copied.pt")
    error = refused(2, "--save-dir", other, "--resume", other / "last_copied.pt", where=tmp_path)
    assert env(mine)["run"] in error.what
    run("--save-dir", other, "--resume", "auto", "--stop-after", "2")
    assert checkpoint.load(other / f"last_{NAME}")["step"] == 2
    assert "last_copied.pt: it belongs to another run" in capsys.readouterr().out


def test_a_foreign_best_is_not_carried_along(mine, other, tmp_path, capsys):
    content = checkpoint.load(mine / f"best_{NAME}")
    (mine / f"best_{NAME}").unlink()
    checkpoint.save(mine / f"best_{NAME}", {**content, "run": "0123456789abcdef"})
    run("--save-dir", tmp_path / "fork", "--resume", mine / f"last_{NAME}", "--stop-after", "28")
    assert not (tmp_path / "fork" / f"best_{NAME}").exists()
    assert "the best checkpoint (epoch 5) was not copied" in capsys.readouterr().out


def test_weights_that_someone_keeps_in_an_empty_directory_do_not_stop_a_run(tmp_path, capsys):
    (tmp_path / "resnet50.pt").write_bytes(b"weights of another program")
    run(*TINY, "--save-dir", tmp_path, "--resume", "auto", "--stop-after", "1")
    assert "skipping" not in capsys.readouterr().out and (tmp_path / f"last_{NAME}").is_file()


def test_a_finished_run_is_complete_in_its_directory(mine, tmp_path, capsys):
    run("--save-dir", mine, "--resume", "auto")
    run("--save-dir", tmp_path / "fork", "--resume", mine / f"last_{NAME}")
    assert f"6 epochs in {mine}" in capsys.readouterr().out and not (tmp_path / "fork").exists()


# --- what --overwrite deletes ---

FOREIGN = ("best_xxxx.pt", "weights.pt", "best_resnet_tiny_cifar10.pt", "plots/of_mine.png",
           "tensorboard/notes.txt", "results.partial", "other.pt.partial", "notes.txt")  # fmt: skip
OURS = ("plots/curves.png", "plots/lr.png", "plots/steps.png", "wandb_id", "trackio_id",
        *(f"tensorboard/{place}events.out.tfevents.1.host.1.0" for place in ("", "steps/")),
        f"prev_best_{NAME}", f"last_{NAME}.partial", "config.partial", "env.json.partial")  # fmt: skip


@pytest.mark.parametrize("has_id", [True, False])
def test_overwrite_deletes_exactly_the_former_run(has_id, mine):
    if not has_id:
        without_id(mine)
    for name in (*FOREIGN, *OURS):
        (mine / name).parent.mkdir(exist_ok=True)
        (mine / name).write_text(name)
    assert run(*TINY, "--save-dir", mine, "--overwrite", "--stop-after", "1") == 0
    left = snapshot(mine)
    assert all(left.pop(name) == name.encode() for name in FOREIGN)
    assert left.keys() == {
        *("plots", "tensorboard", "tensorboard/steps"),
        *("config.json", "env.json", "metrics.jsonl", "steps.jsonl", f"last_{NAME}"),
    }


@pytest.mark.parametrize("name", ["config.json", "env.json", "metrics.jsonl", "steps.jsonl", f"last_{NAME}"])
@pytest.mark.parametrize("flag", [(), ("--overwrite",)])
def test_files_that_are_not_of_a_run_are_not_overwritten(name, flag, tmp_path):
    (tmp_path / name).write_text('{"model_type": "bert"}')
    error = refused(2, *TINY, "--save-dir", tmp_path, *flag, where=tmp_path)
    assert name in error.what


def test_a_record_that_points_outside_deletes_nothing_there(mine, tmp_path):
    (tmp_path / "precious.pt").write_text("precious")
    (mine / "env.json").write_text(json.dumps(env(mine) | {"checkpoint": "x/../../precious.pt"}))
    assert all(rundir.checkpoint_files(name) == [] for name in ("../precious.pt", "/precious.pt", 5))
    assert not rundir.scan(str(mine)).checkpoints and (tmp_path / "precious.pt").exists()


def test_overwrite_deletes_nothing_before_disk_and_memory_are_checked(mine, monkeypatch):
    usage = SimpleNamespace(free=1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refused(6, *TINY, "--save-dir", mine, "--overwrite", where=mine)
    usage.free = 4 * preflight.checkpoint_bytes(tiny_run(mine))  # five are needed; those that go make room
    assert run(*TINY, "--save-dir", mine, "--overwrite", "--stop-after", "1") == 0


# --- names and locks ---


@pytest.mark.parametrize(
    "save_dir, code", [("", 2), ("a\0b", 2), ("x" * 300, 2), ("y/" + "x" * 300 + "/z", 2), ("x/" * 3000, 6)]
)
def test_a_save_dir_name_that_cannot_exist_is_refused(save_dir, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for more in ((), ("--overwrite",), ("--resume", "auto")):
        assert "--save-dir" in refused(code, *TINY, "--save-dir", save_dir, *more, where=tmp_path).what


def odd_lock(directory: Path, kind: str) -> None:
    lock = directory / ".lock"
    if kind == "directory":
        lock.mkdir()
    elif kind == "fifo":
        os.mkfifo(lock)
    else:
        (directory.parent / "target").write_text("precious")
        lock.symlink_to(directory.parent / "target")


@pytest.mark.parametrize("kind", ["directory", "fifo", "link"])
@pytest.mark.parametrize("when", ["before", "after the check"])
def test_a_lock_that_is_not_a_plain_file_is_refused(kind, when, tmp_path, monkeypatch):
    directory = tmp_path / "run"
    directory.mkdir()
    if when == "before":
        odd_lock(directory, kind)
    else:
        real = build.build
        monkeypatch.setattr(
            build, "build", lambda *args, **how: [real(*args, **how), odd_lock(directory, kind)][0]
        )
    with pytest.raises(ResourceError, match=r"\.lock|Too many levels|directory"):
        run(*TINY, "--save-dir", directory)
    assert {p.name for p in directory.iterdir()} == {".lock"}
    assert kind != "link" or (tmp_path / "target").read_text() == "precious"


def test_check_writes_nothing(tmp_path):
    lock = rundir.acquire(rundir.scan(str(tmp_path)), overwrite=False)
    signed = (tmp_path / ".lock").read_text()
    assert f"pid {os.getpid()}" in signed
    with pytest.raises(UsageError, match=f"in use by pid {os.getpid()}"):
        rundir.check(rundir.scan(str(tmp_path)), resuming=True, overwrite=False)
    lock.release()
    rundir.check(rundir.scan(str(tmp_path)), resuming=True, overwrite=False)
    assert (tmp_path / ".lock").read_text() == signed


@pytest.mark.parametrize("flag", [(), ("--overwrite",), ("--resume", "auto")])
def test_a_run_that_appeared_between_check_and_lock_is_not_replaced(flag, tmp_path, monkeypatch):
    real, left = build.build, []

    def meanwhile(*args, **how):
        if not left:
            left.append(1)
            run(*TINY, "--save-dir", tmp_path / "run", "--stop-after", "1")
            left.append(snapshot(tmp_path))
        return real(*args, **how)

    monkeypatch.setattr(build, "build", meanwhile)
    with pytest.raises(UsageError, match=r"another run changed .* while this one started"):
        run(*TINY, "--save-dir", tmp_path / "run", *flag)
    assert snapshot(tmp_path) == left[1]


@pytest.mark.parametrize("number", sorted(rundir.NO_LOCKS))
def test_runs_work_on_a_filesystem_without_locks(number, tmp_path, monkeypatch):
    import filelock._unix

    def no_locks(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(filelock._unix.fcntl, "flock", no_locks)
    rundir.acquire(rundir.scan(str(tmp_path)), overwrite=False).release()


# --- what disappears ---


@pytest.mark.parametrize(
    "place", ["harness.checkpoint.save", "harness.log.MetricLogger.log", "loop.evaluate"]
)
def test_a_directory_removed_during_a_run_is_named(place, tmp_path, monkeypatch):
    owner, _, name = place.rpartition(".")
    owner = pkgutil.resolve_name(owner)
    real = getattr(owner, name)

    def removed(*args, **how):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        return real(*args, **how)

    monkeypatch.setattr(owner, name, removed)
    monkeypatch.setattr(checkpoint.time, "sleep", lambda seconds: None)
    with pytest.raises(ResourceError, match="was removed") as caught:
        run(*TINY, "--save-dir", tmp_path / "run", "--tensorboard")
    assert str(tmp_path / "run") in caught.value.what and not (tmp_path / "run").exists()


FAULTS = [
    (FileNotFoundError(errno.ENOENT, "No such file", "data/x"), "data/x: No such file"),
    (PermissionError(errno.EACCES, "Permission denied", "data/x"), "data/x: Permission denied"),
    (OSError(errno.ENAMETOOLONG, "File name too long", "x"), "File name too long"),
    (OSError(errno.EIO, "Input/output error"), "Input/output error"),
    (MemoryError("Unable to allocate 70 GiB"), "out of memory: Unable to allocate 70 GiB"),
    (MemoryError(), "out of memory"),
]


@pytest.mark.parametrize("fault, words", FAULTS)
def test_errors_of_the_machine_are_two_lines_and_exit_code_6(fault, words, capsys):
    def main(argv):
        raise fault

    def main_with_debug(argv):
        errors.debug = True  # as the parser does
        raise fault

    assert errors.run(main) == 6
    said = capsys.readouterr().err
    assert words in said and "fix: " in said and "Traceback" not in said
    with pytest.raises(type(fault)):
        errors.run(main_with_debug)


@pytest.mark.parametrize(
    "bug", [TypeError("x"), OSError(errno.EBADF, "Bad file descriptor"), OSError("no number")]
)
def test_a_bug_still_has_a_traceback(bug):
    def main(argv):
        raise bug

    with pytest.raises(type(bug)):
        errors.run(main)


# --- trackers, timed saves, start-up ---


@pytest.mark.parametrize(
    "flag, package",
    [(("--tensorboard",), "tensorboard"), (("--wandb", "p"), "wandb"), (("--trackio", "p"), "trackio")],
)
@pytest.mark.parametrize(
    "code, cause",
    [
        ("import no_such_dependency", "No module named 'no_such_dependency'"),
        ("raise TypeError('Descriptors cannot be created')", "TypeError: Descriptors"),
    ],
)
def test_a_tracker_that_does_not_import_says_why_before_anything_is_written(
    flag, package, code, cause, tmp_path, monkeypatch
):
    (tmp_path / "lib" / package).mkdir(parents=True)
    (tmp_path / "lib" / package / "__init__.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path / "lib")
    for name in [
        n for n in sys.modules if n.split(".")[0] == package or n.startswith("torch.utils.tensorboard")
    ]:
        monkeypatch.delitem(sys.modules, name)
    error = refused(2, *TINY, "--save-dir", tmp_path / "run", *flag, where=tmp_path / "lib")
    assert cause in error.what and package in error.what and "--force-reinstall" in error.fix
    assert not (tmp_path / "run").exists()
    with pytest.raises(UsageError, match="pip install no_such_package"):
        log.optional("no_such_package", "--nothing")


@pytest.mark.parametrize("text, seconds", [("30s", 30), ("0.5s", 0.5), ("15min", 900)])
def test_saves_by_the_second_and_by_the_minute(text, seconds):
    every, unit = flags.save_interval(text)
    assert unit == "min" and 60 * every == pytest.approx(seconds)


def test_a_save_by_the_second_survives_a_resume(tmp_path):
    run(*TINY, "--save-dir", tmp_path, "--save-every", "7s", "--stop-after", "1")
    assert run("--save-dir", tmp_path, "--resume", "auto", "--stop-after", "2") == 0
    assert payload(tmp_path)["config"]["save_every"] == [7 / 60, "min"]


def test_a_run_imports_only_what_it_needs(tmp_path):
    arguments = [*TINY, "--save-dir", str(tmp_path), "--stop-after", "1"]
    code = (
        f"import sys, train\nassert train.main({arguments!r}) == 0\n"
        "print('loaded', *sorted({n.split('.')[0] for n in sys.modules} & set(sys.argv[1:])))"
    )
    needless = ["albumentations", "torchvision", "sklearn", "scipy", "pandas", "matplotlib", "pyarrow"]
    command = [sys.executable, "-c", code, *needless, "tensorboard", "datasets"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment())
    assert done.stdout.splitlines()[-1].strip() == "loaded", done.stderr


def test_of_two_simultaneous_starts_one_is_refused(tmp_path):
    started = [spawn(*TINY, "--save-dir", tmp_path / "run", output=tmp_path / f"log{k}") for k in (1, 2)]
    codes, logs = [finish(p) for p in started], [(tmp_path / f"log{k}").read_text() for k in (1, 2)]
    assert sorted(codes) == [0, 2], logs
    assert "Traceback" not in "".join(logs)


def test_the_recorded_command_can_be_typed_again(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--data-dir", "my photos"])
    env = session.environment_of(tiny_run(tmp_path), rundir.RunIdentity("a"))
    assert env["command"] == "train.py --data-dir 'my photos'"
