"""Random command lines and damaged files end in a result, or in an error that says what to do: `make fuzz`.

The fixed cases, which are part of `make test`, went wrong once.
"""

import os
from pathlib import Path

import fuzzing
import pytest
from fuzzing import FOLDERS, HALF, TINY, Case, checkpoint_case, file_case

SEED, ONLY = int(os.environ.get("FUZZ_SEED", 0)), os.environ.get("FUZZ_CASE", "")
COUNTS = {"lines": 500, "checkpoints": 500, "files": 200}
REFUSED = (2, 3, 4, 6)


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "files"
    folder.mkdir()
    return fuzzing.make_files(folder)


def check(cases: list[Case], files: Path, root: Path) -> None:
    found = fuzzing.run_all(cases, files, root)
    by_count = sorted(found.items(), key=lambda item: -len(item[1]))
    lines = [f"{len(where)} x {what}: {where[0]}" for what, where in by_count]
    title = f"{len(found)} kinds of failure in {len(cases)} cases, folders in {root}"
    assert not found, "\n".join([title, *lines])


@pytest.mark.fuzz
@pytest.mark.parametrize("kind", COUNTS)
def test_random_cases(kind, files, tmp_path):
    check(fuzzing.cases(kind, SEED, COUNTS[kind], files, ONLY), files, tmp_path)


def spoiled(target: str, act):
    return lambda folder: act(folder / target)


def linked(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("../../neighbour")


def bad_images(path: Path) -> None:
    for image in sorted(path.iterdir())[:4]:
        image.write_bytes(b"no image")


NEW, STOP = ["--save-dir", "new"], ["--stop-after", "2"]
FRESH, OF_FOLDERS = [*TINY, *NEW, *STOP], [*FOLDERS, "data", *NEW, *STOP]
OTHER_OPTIMIZER = ["--optimizer", "sgd", "--allow-change", "optimizer"]
SKIPPING = [*OF_FOLDERS[:-2], "--on-bad-image", "skip"]
RESUMED, IN_EMPTY = ["--resume", "auto", "--save-dir", "half"], [*FRESH, "--save-dir", "empty"]
ANY, IDLE = Case.codes, (2,)
LINES = [  # flags for a run on digits, and the exit codes it may have
    ("--augment rrc,padcrop:100", ANY),
    ("--save-dir=\x1b[31mred", ANY),
    ("--resume=a\x1b[31m", REFUSED),
    ("--epochs " + "9" * 400, ANY),
    ("--cycles=" + "9" * 400 + " --schedule restarts", ANY),
    ("--dataset=--", REFUSED),
    ("--device xla", REFUSED),
    ("--save-dir run --overwrite", (0,)),
    ("--save-dir run --overwrite --phase-batch-sizes 99,99", IDLE),
]
CASES = [Case(words[:40], "train", [*FRESH, *words.split(" ")], codes=codes) for words, codes in LINES] + [
    Case("resumed into another run", "train", ["--resume", HALF, "--save-dir", "run"], codes=(2, 4)),
    Case("another optimizer", "train", ["--resume", HALF, *NEW, *OTHER_OPTIMIZER]),
    Case("skipped images", "train", SKIPPING, spoiled("data/train/cat", bad_images), (0,)),
    Case("a lock that is a link, resumed", "train", RESUMED, spoiled("half/.lock", linked)),
    Case("a lock that is a link", "train", IN_EMPTY, spoiled("empty/.lock", linked)),
    Case("a lock that is a directory", "train", IN_EMPTY, spoiled("empty/.lock", Path.mkdir)),
    Case("a lock that is a FIFO", "train", IN_EMPTY, spoiled("empty/.lock", os.mkfifo)),
    Case("two lines in a name", "predict", ["a\nfix: b", "data/val"], codes=REFUSED),
    Case("a text file as a picture", "predict", [HALF, "flags.yaml", "--device", "cpu"]),
    Case("no run", "analysis.plots", ["empty"], codes=REFUSED),
    Case("packed into its source", "pack_dataset", ["--data-dir", "data", "--out", "data", "--workers", "1"]),
]  # fmt: skip
CHECKPOINTS = [  # (what uses the checkpoint, the damaged place, the damage, the exit codes it may have)
    ("resume", "config/epochs", "huge", ANY),
    *[("validate", f"eval/{place}", how, ANY) for place, how in (
        ("image_size", "minus"), ("image_size", "large"), ("crop", "zero"), ("crop", "nan"), ("mean", "gone"),
        ("std", "cut"), ("classes/0", "escape"), ("class_names", "shared"), ("dataset", "five"))],
    *[("predict", f"eval/{place}", how, ANY) for place, how in (
        ("mean", "shared"), ("image_size", "text"), ("class_names", "cut"))],
    *[("resume auto", place, how, ANY) for place, how in (
        ("best/score", "text"), ("best/waited", "none"), ("best", "emptied"), ("rows/0", "five"),
        ("rows/0/epoch", "gone"), ("rows", "shared"), ("schedule/position", "minus"),
        ("ema/num_updates", "none"), ("ema/shadow/conv1.weight", "resized"), ("step", "huge"),
        ("step", "minus"), ("epoch_sums/waited", "none"), ("epoch_sums", "emptied"),
        ("fingerprint/num_train", "escape"), ("precision", "escape"),
        ("optimizer/param_groups/0/lr", "text"), ("optimizer/param_groups", "emptied"),
        ("model/conv1.weight", "meta"), ("optimizer/state/14/step", "meta"))],
    ("init", "model/conv1.weight", "billions", ANY), ("export", "model/conv1.weight", "sparse", ANY),
    ("analysis.gradcam", "eval/std", "none", ANY),
    ("analysis.misclassified", "eval/class_names", "renamed", ANY),
    *[(use, "eval/class_names/0", "surrogate", (4,)) for use in ("validate", "analysis.misclassified")],
    *[("export", "eval/dataset", how, ANY) for how in ("climbs", "escape")],
    ("torchvision", "best/epoch", "zero", IDLE),
]  # fmt: skip
FILES = [  # (file, the damage, the exit codes it may have)
    *[("flags.yaml", how, IDLE) for how in ("bad UTF-8", "deep list", "laughs", "huge number", "NUL")],
    ("flags.yaml", "off", (0,)),
    ("packed/manifest.json", [(("classes",), "gone")], (3,)),
    ("packed/manifest.json", [(("tables", "train-16", 0, "rows"), "minus")], (3,)),
    ("packed/manifest.json", [(("tables",), "none")], (3,)),
    ("packed/manifest.json", [(("classes", 0), "escape")], ANY),
    *[("packed/manifest.json", [(("name",), how)], ANY) for how in ("escape", "climbs")],
    ("packed/manifest.json", "deep map", (3,)),
    ("packed/train-16/00000.arrow", "cut", (3,)),
    ("packed/train-labels.npy", "zeros", (3,)),
    ("run/metrics.jsonl", "a five", ANY),
    *[("half/metrics.jsonl", how, ANY) for how in ("bad UTF-8", "deep list")],
    ("run/metrics.jsonl", [((0, "epoch"), "text")], ANY),
    ("run/steps.jsonl", "a five", ANY),
    ("run/steps.jsonl", [((0, "grad_norm"), "text")], ANY),
    ("run/config.json", "bad UTF-8", ANY),
    ("run/env.json", "deep map", ANY),
]


def test_command_lines(files, tmp_path):
    check(CASES, files, tmp_path)


def test_damaged_checkpoints(files, tmp_path):
    cases = []
    for use, place, how, codes in CHECKPOINTS:
        path = tuple(int(step) if step.isdigit() else step for step in place.split("/"))
        cases.append(checkpoint_case(use, use, [(path, how)], files, codes))
    check(cases, files, tmp_path)


def test_damaged_files(files, tmp_path):
    check([file_case("fixed", *case) for case in FILES], files, tmp_path)
