"""User errors have an exit code, one line with what is wrong, one with the fix, and nothing is written."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from runs import ROOT, cli, environment, finish, spawn

import train
from base import errors
from base.errors import UserError
from harness import rundir

SMALL = ("--arch", "resnet_tiny", "--resize-schedule", "16", "--epochs", "1", "--batch-size", "8",
         "--num-workers", "0", "--device", "cpu", "--amp", "off")  # fmt: skip


def refusal(tmp_path: Path, *arguments) -> UserError:
    """Return the error of train.py for these arguments; it must not have written anything."""
    save_dir, before = tmp_path / "run", snapshot(tmp_path)
    with pytest.raises(UserError) as caught:
        train.main([*map(str, (*SMALL, "--save-dir", save_dir, *arguments))])
    assert snapshot(tmp_path) == before, "something was written"
    error = caught.value
    assert error.what and error.fix and "\n" not in error.what
    return error


def snapshot(directory: Path) -> dict[str, bytes]:
    return {
        str(p): p.read_bytes() if p.is_file() and os.access(p, os.R_OK) else b"" for p in directory.rglob("*")
    }


def check(error: UserError, code: int, *words: str) -> None:
    said = f"{error.what}\n{error.fix}"
    assert error.exit_code == code, said
    assert all(word in said for word in words), said


# --- arguments, which are checked before the data ---

NUMBERS = ("--lr", "--weight-decay", "--momentum", "--ema-decay", "--drop-path-rate", "--mixup-alpha",
           "--cutmix-alpha", "--label-smoothing", "--clip-norm", "--l1")  # fmt: skip
WRONG_NUMBERS = [(flag, value) for flag in NUMBERS for value in ("nan", "inf", "-1", "x")]
WRONG_NUMBERS += [("--lr", "0"), ("--momentum", "1"), ("--ema-decay", "1"), ("--drop-path-rate", "1")]
WRONG_NUMBERS += [
    (flag, v)
    for flag in ("--batch-size", "--epochs", "--subset-size", "--accumulate")
    for v in ("0", "-1", "1.5")
]
WRONG_NUMBERS += [("--resize-schedule", v) for v in ("64,0", "-64", "64,x")]
WRONG_NUMBERS += [("--save-every", v) for v in ("0", "-5min", "0s")]
WRONG_NUMBERS += [
    ("--num-workers", "-1"),
    ("--num-workers", "100000"),
    ("--seed", "-1"),
    ("--label-smoothing", "1"),
]
WRONG_NUMBERS += [("--mixup-alpha", "0.001"), ("--cutmix-alpha", "0.009")]
WRONG_NUMBERS += [("--phase-epochs", "0"), ("--eval-every", "0"), ("--early-stop-patience", "0")]


@pytest.mark.parametrize("flag, value", WRONG_NUMBERS, ids=lambda value: value.strip("-"))
def test_a_number_out_of_range_is_refused_with_the_range(flag, value, tmp_path):
    check(refusal(tmp_path, f"{flag}={value}"), 2, flag, "must be a ", "number, ")


ARGUMENTS = [
    (("--no-such-flag",), 2, ["--no-such-flag", "--help"]),
    (("--drop-path", "0.1"), 2, ["--drop-path"]),  # never abbreviated
    (("--arch", "resnet51"), 2, ["resnet51", "resnet50"]),
    (("--augment", "flip,wrong"), 2, ["unknown augmentation 'wrong'"]),
    (("--augment", "padcrop"), 2, ["needs a size"]),
    (("--phase-mix", "on,maybe"), 2, ["neither on nor off"]),
    (("--augment", "rrc,padcrop:4"), 2, ["rrc and padcrop", "only one crop"]),
    (("--augment", "padcrop:100"), 2, ["padcrop:100 leaves nothing of an image of 16 px", "padcrop:15"]),
    (("--augment", "cutout:32"), 2, ["cutout:32 leaves nothing", "cutout:31"]),
    (("--augment", "randaugment:11"), 2, ["from 0 to 10"]),
    (("--augment", "none.yaml"), 2, ["none.yaml: there is no such file"]),
    (("--phase-augment", "padcrop:16"), 2, ["--phase-augment padcrop:16 leaves nothing", "16 px"]),
    (("--phase-augment", "full/full"), 2, ["--phase-augment has 2 entries", "--resize-schedule has 1"]),
    (("--augment", "jitter:101"), 2, ["from 1 to 100", "got 101"]),
    (("--ema-half-life", "1e308"), 2, ["--ema-half-life", "at most 1,000,000"]),  # a decay of 1
    (("--epochs", "9" * 5000), 2, ["--epochs", "1,000,000,000"]),
    (("--dataset", "synthetic:size=100000"), 2, ["'size=100000'", "size up to 4,096"]),
    (("--dataset", "synthetic:train=" + "9" * 5000), 2, ["train=999", "train up to 100,000,000"]),
    (("--dataset", "synthetic:size=8,size=16"), 2, ["'size=16' is not a size"]),
    (("--dataset", "synthetic:classes=-1"), 2, ["'classes=-1'"]),
    (("--dataset", "synthetic:colour=3"), 2, ["'colour=3'"]),
    (("--data-dir", "a\0b"), 2, ["--data-dir 'a\\x00b' contains a NUL"]),
    (("--init-from", "a\udcff"), 2, ["--init-from 'a\\udcff' contains a NUL or bytes"]),
    (("--resize-schedule", ","), 2, ["empty"]),
    (("--phase-batch-sizes", "8,8"), 2, ["2 entries", "--resize-schedule has 1"]),
    (("--subset-size", "20"), 2, ["--subset-size would do nothing", "--subset"]),
    (("--reset-head",), 2, ["--reset-head would do nothing"]),
    (("--nesterov",), 2, ["--nesterov would do nothing"]),
    (("--warmup-epochs", "2"), 2, ["--warmup-epochs would do nothing"]),
    (("--cycles", "2"), 2, ["--cycles would do nothing"]),
    (("--no-ema", "--ema-decay", "0.9"), 2, ["EMA is off"]),
    (("--allow-change", "lr"), 2, ["it needs --resume"]),
    (("--resume", "auto", "--overwrite"), 2, ["contradict"]),
    (("--config", "no_such.yaml"), 2, ["no_such.yaml", "recipes/ holds"]),
    (("--dataset", "no-such"), 2, ["no-such"]),
    (("--device", "gpu9"), 2, ["gpu9", "use auto, cpu"]),
    (("--amp", "fp16"), 2, ["fp16 needs a GPU"]),
    (("--sync-bn",), 2, ["--sync-bn would do nothing", "one process"]),
    (("--arch", "vit_b_16", "--resize-schedule", "16,32"), 2, ["vit_b_16"]),
    (("--batch-size", "100"), 2, ["batch size 100 at 16 px", "72 training images", "--batch-size 72"]),
    (("--batch-size", "1"), 2, ["phase 1: batch size 1 at 16 px", "one value per channel", "--batch-size 2"]),
    (("--batch-size", "1", "--dry-run"), 2, ["phase 1: batch size 1 at 16 px"]),
    (("--resume", "missing.pt"), 4, ["no checkpoint at missing.pt"]),
    (("--init-from", "missing.pt"), 4, ["no checkpoint at missing.pt"]),
]


@pytest.mark.parametrize(
    "arguments, code, words", ARGUMENTS, ids=lambda v: " ".join(v) if isinstance(v, tuple) else ""
)
def test_an_argument_that_cannot_work_is_refused(arguments, code, words, photos, tmp_path):
    check(refusal(tmp_path, "--data-dir", photos, *arguments), code, *words)


@pytest.mark.parametrize("text, words", [
    ("lr: [1", ["is not YAML"]), ("- a", ["holds no flags"]), ("lrr: 1", ["'lrr'"]),
    ("lr: fast", ["--lr", "fast"]), ("epochs: 1.5", ["--epochs"]),
])  # fmt: skip
def test_a_config_file_meets_the_same_checks(text, words, tmp_path):
    (tmp_path / "flags.yaml").write_text(text)
    check(refusal(tmp_path, "--config", tmp_path / "flags.yaml"), 2, *words)


# --- data ---


def no_directory(root: Path) -> None:
    shutil.rmtree(root)


def no_train(root: Path) -> None:
    shutil.rmtree(root / "train")


def no_val(root: Path) -> None:
    shutil.rmtree(root / "val")


def empty_class(root: Path) -> None:
    for image in (root / "train" / "dog").iterdir():
        image.unlink()


def missing_in_train(root: Path) -> None:
    shutil.rmtree(root / "train" / "dog")


def missing_in_val(root: Path) -> None:
    shutil.rmtree(root / "val" / "dog")


def flat_val(root: Path) -> None:
    for k, image in enumerate(sorted((root / "val").glob("*/*"))):
        image.rename(root / "val" / f"ILSVRC2012_val_{k:08d}.JPEG")
    for folder in (root / "val").glob("*/"):
        folder.rmdir()


def a_file(root: Path) -> None:
    shutil.rmtree(root)
    root.write_text("x")


@pytest.mark.parametrize("spoil, words", [
    (no_directory, ["data"]), (no_train, ["train"]), (no_val, ["val"]), (empty_class, ["dog"]),
    (missing_in_train, ["dog"]), (missing_in_val, ["dog"]), (flat_val, ["val"]), (a_file, ["is a file, not"]),
])  # fmt: skip
def test_data_that_is_not_laid_out_as_expected_is_refused(spoil, words, photos, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(photos, data)
    spoil(data)
    check(refusal(tmp_path, "--data-dir", data), 3, str(data), *words)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", "half", "all but 3 bytes"])
def test_a_bad_image_ends_the_run_and_is_named(split, content, photos, tmp_path):
    bad = spoiled(photos, tmp_path / "data", split, content)
    with pytest.raises(UserError) as caught:
        train.main([*SMALL, "--data-dir", str(tmp_path / "data"), "--save-dir", str(tmp_path / "run")])
    check(caught.value, 3, bad)


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_bad_image_in_a_worker_ends_the_run_and_is_named(split, photos, tmp_path):
    bad, log = spoiled(photos, tmp_path / "data", split, b""), tmp_path / "log"
    flags = (*SMALL, "--data-dir", tmp_path / "data", "--save-dir", tmp_path / "run", "--num-workers", 2)
    assert finish(spawn(*flags, output=log)) == 3
    assert bad in log.read_text() and "Traceback" not in log.read_text()


def spoiled(photos: Path, data: Path, split: str, content: bytes | str) -> str:
    """A copy of the photos with one bad image; its name."""
    shutil.copytree(photos, data)
    bad = next((data / split / "dog").iterdir())
    whole = bad.read_bytes()
    bad.write_bytes({"half": whole[: len(whole) // 2], "all but 3 bytes": whole[:-3]}.get(content, content))
    return bad.name


# --- directories and machine ---


def test_a_save_dir_that_is_a_file_is_refused(photos, tmp_path):
    (tmp_path / "run").write_text("a file")
    check(refusal(tmp_path, "--data-dir", photos), 6, "--save-dir", "is a file")
    check(refusal(tmp_path, "--data-dir", photos, "--save-dir", tmp_path / "run" / "below"), 6, "is a file")


def test_a_read_only_save_dir(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *args: False)  # root may write anywhere
    check(refusal(tmp_path, "--data-dir", photos), 6, "--save-dir", "read-only", "writable")


def test_a_disk_that_is_full_at_the_start(tmp_path, monkeypatch):
    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError) as caught:
        rundir.acquire(rundir.scan(str(tmp_path / "run")), overwrite=False)
    check(caught.value, 6, "No space left", str(tmp_path / "run"))
    assert {p.name for p in (tmp_path / "run").iterdir()} <= {".lock"}


def test_only_a_directory_still_in_use_is_refused(photos, tmp_path):
    save_dir = tmp_path / "run"
    lock = rundir.acquire(rundir.scan(str(save_dir)), overwrite=False)
    for flags in ((), ("--overwrite",), ("--resume", "auto")):
        with pytest.raises(UserError) as caught:
            train.main([*SMALL, "--data-dir", str(photos), "--save-dir", str(save_dir), *flags])
        check(caught.value, 2, "in use by pid", str(os.getpid()), str(save_dir))
    lock.release()  # as the kernel does for a process that was killed
    assert (
        train.main([*SMALL, "--data-dir", str(photos), "--save-dir", str(save_dir), "--stop-after", "1"]) == 0
    )


def test_a_plain_second_run_and_one_refused_for_another_reason_leave_the_first_alone(photos, tmp_path):
    assert (
        train.main(
            [*SMALL, "--data-dir", str(photos), "--save-dir", str(tmp_path / "run"), "--stop-after", "1"]
        )
        == 0
    )
    check(refusal(tmp_path, "--data-dir", photos), 2, "already holds a run", "--resume auto", "--overwrite")
    check(refusal(tmp_path, "--data-dir", photos, "--overwrite", "--batch-size", "100"), 2, "batch size 100")
    check(
        refusal(tmp_path, "--data-dir", photos, "--overwrite", "--init-from", "missing.pt"), 4, "missing.pt"
    )
    check(
        refusal(tmp_path, "--resume", "auto", "--epochs", "1", "--lr", "9"),
        4,
        "--lr was",
        "--allow-change lr",
    )


@pytest.mark.parametrize("variables, refused", [
    ({"RANK": "1"}, True), ({"WORLD_SIZE": "2"}, True), ({"RANK": "2", "WORLD_SIZE": "2"}, True),
    ({"RANK": "one", "WORLD_SIZE": "2"}, True), ({"LOCAL_RANK": "3"}, True), ({}, False),
    ({"WORLD_SIZE": "1"}, False), ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, False),
])  # fmt: skip
def test_half_of_torchruns_variables_are_refused(variables, refused, photos, tmp_path, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if refused:
        check(refusal(tmp_path, "--data-dir", photos), 2, "torchrun", *variables)
    else:
        check(refusal(tmp_path, "--data-dir", photos, "--batch-size", "100"), 2, "batch size 100")


def test_training_needs_no_network(photos, tmp_path, monkeypatch):
    def offline(*args):
        raise AssertionError(f"a connection to {args[1:]}")

    monkeypatch.setattr(socket.socket, "connect", offline)
    monkeypatch.setattr(socket, "getaddrinfo", offline)
    assert (
        train.main([*SMALL, "--data-dir", str(photos), "--save-dir", str(tmp_path), "--stop-after", "1"]) == 0
    )


# --- through the command line ---


def test_usage_and_help_are_quick_because_torch_is_not_imported(tmp_path):
    code = (
        "import sys\nimport train\nfrom base import errors\n"
        "sys.argv = ['train.py', *{arguments!r}]\n"
        "try:\n    code = errors.run(train.main)\n"
        "except SystemExit as exit:\n    code = exit.code\n"
        "print('code', code, 'torch' in sys.modules, 'numpy' in sys.modules)"
    )
    no_data = ["--data-dir", "nowhere", "--save-dir", str(tmp_path / "run")]
    for arguments, wanted in (
        (["--help"], "code 0 False False"),
        (["--lr", "-1"], "code 2 False False"),
        (["--nope"], "code 2 False False"),
        (["--nesterov"], "code 2 False"),
        (no_data, "code 3 False"),
    ):
        command = [sys.executable, "-c", code.format(arguments=arguments)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment())
        assert wanted in done.stdout.splitlines()[-1], (done.stdout[-300:], done.stderr)
    assert not (tmp_path / "run").exists()


def test_help_shows_ranges_choices_and_defaults(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        train.main(["--help"])
    said = capsys.readouterr().out
    assert (
        said.startswith("usage: python train.py [flags]\n")
        and max(map(len, said.split("examples:")[0].splitlines())) < 80
    )
    for words in (
        "(above 0; default: 0.0003)",
        "one of ce, bce",
        "(at least 1; default: 90)",
        "default: 64,128,224",
    ):
        assert words in " ".join(said.split())
    assert "None" not in said and "SUPPRESS" not in said
    assert "--lr LR " in said and "--arch NAME " in said and "--resume PATH|auto " in said
    assert "--ema, --no-ema " in said and "--plot " in said and "--no-plot" not in said


@pytest.mark.parametrize("text", ["1m", "1h", "2.5", "often"])
def test_an_interval_in_another_unit_is_told_which_there_are(text, tmp_path):
    check(refusal(tmp_path, "--save-every", text), 2, "--save-every", text, "write 2, 15min or 30s")


def test_an_error_is_two_lines_on_stderr_without_a_traceback(tmp_path):
    done = cli("--epochs", "0")
    assert done.returncode == 2 and done.stdout == ""
    first, second = done.stderr.splitlines()
    assert first.startswith("error: ") and second.startswith("fix: ")
    assert "Traceback" in cli("--epochs", "0", "--debug").stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "variables", [{"LANG": "C", "LC_ALL": "C"}, {"TZ": "Nowhere/Land"}, {"HOME": "/nonexistent"}]
)
def test_odd_paths_and_environments_do_not_matter(variables, photos, tmp_path):
    strange = tmp_path / "dätä \n$(touch x)"
    shutil.copytree(photos, strange)
    done = cli(*SMALL, "--data-dir", strange, "--save-dir", tmp_path / "run", **variables)
    assert done.returncode == 0, done.stderr
    (strange / "val" / "cat" / "cat_0.JPEG").write_bytes(b"")
    done = cli(*SMALL, "--data-dir", strange, "--save-dir", tmp_path / "run2", **variables)
    assert done.returncode == 3 and "cat_0.JPEG" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "x").exists()


def test_names_are_printed_so_that_any_terminal_survives_them(capsys):
    errors.report(errors.DataError("bad file \x1b[31mred\x07 \udcff\n.JPEG", "delete it"))
    said = capsys.readouterr().err
    assert "\x1b" not in said and "\x07" not in said and r"\x1b[31mred\x07" in said
