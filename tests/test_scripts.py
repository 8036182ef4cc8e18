"""The scripts for a night and for a laptop, from data to the card of the run; and the card itself."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess

import pytest
from runs import ROOT, environment
from test_report import make_run

from analysis import report_card
from base.errors import UsageError

SCRIPTS = sorted((ROOT / "scripts").glob("*.sh"))


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="needs shellcheck")
def test_shellcheck_finds_nothing():
    subprocess.run(["shellcheck", *SCRIPTS], check=True)


def test_overnight_says_how_to_use_it():
    done = subprocess.run([ROOT / "scripts" / "overnight.sh"], capture_output=True, text=True)
    assert done.returncode == 2 and "scripts/overnight.sh data/imagenet runs/night" in done.stderr


@pytest.mark.skipif(not (ROOT / ".venv").exists(), reason="needs make setup")
def test_overnight_ends_where_the_data_cannot_be_packed(tmp_path):
    (tmp_path / "data").mkdir()
    command = [ROOT / "scripts" / "overnight.sh", tmp_path / "data", tmp_path / "run"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment())
    assert done.returncode == 3 and done.stderr.count("fix:") == 1, done.stderr  # one command was started


PYTHON = """#!/bin/bash
echo "$@" >> called
if [[ $1 == pack_dataset.py ]]; then mkdir -p data-packed && touch data-packed/manifest.json; exit "$CODE"; fi
exit 5"""  # which ends the script at the training


@pytest.fixture
def called(tmp_path):
    """Return a function that starts overnight.sh with a stand-in for Python: (the commands, what it said)."""
    (tmp_path / "train.py").touch()
    (tmp_path / "Makefile").write_text("setup: ;")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)

    def start(data: str, code: int = 0, flags: str = "--stored-sides 96") -> tuple[list[str], str]:
        command = [ROOT / "scripts" / "overnight.sh", data, "run", "--lr", "1"]
        variables = environment(CODE=str(code), PACK_FLAGS=flags)
        done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
        assert done.returncode == (code or 5), done.stderr
        lines = (tmp_path / "called").read_text().splitlines()
        (tmp_path / "called").unlink()
        return lines, done.stderr

    return start


def test_overnight_packs_until_the_packing_is_complete_and_then_needs_the_images_no_more(called, tmp_path):
    def scripts(**options) -> list[str]:
        return [line.split()[0] for line in called("./data/", **options)[0]]

    (tmp_path / "data").mkdir()
    assert scripts(code=3) == ["pack_dataset.py"]  # killed while it stored evaluation crops
    assert scripts() == ["pack_dataset.py", "train.py"]
    assert scripts() == ["train.py"]
    assert scripts(flags="--eval-sizes 64") == ["pack_dataset.py", "train.py"]
    (tmp_path / "data").rmdir()
    assert scripts() == ["train.py"]


def test_overnight_says_that_images_were_added_after_the_packing(called, tmp_path):
    (tmp_path / "photos" / "train" / "cat").mkdir(parents=True)
    (tmp_path / "data").symlink_to("photos")
    assert "note" not in called("data")[1]
    (tmp_path / "data" / "split.json").touch()  # which train.py may have written
    assert "note" not in called("data")[1]
    later = (tmp_path / "data-packed" / "manifest.json").stat().st_mtime + 1
    os.utime(tmp_path / "photos" / "train" / "cat", (later, later))
    lines, said = called("data")
    assert "note: folders in data changed" in said and len(lines) == 1


@pytest.mark.parametrize("name", ["digits", "synthetic:size=32", "hf:owner/photos"])
def test_overnight_downloads_nothing_for_data_that_train_fetches_or_makes(name, called):
    assert called(name)[0] == [f"train.py --dataset {name} --lr 1 --save-dir run --resume auto"]


def laptop(run_dir) -> subprocess.Popen:
    """Start laptop.sh with settings that take seconds, in a process group of its own."""
    flags = shlex.split(
        "digits --arch resnet_tiny --subset --subset-size 120 --epochs 3 --resize-schedule 16,24,32 "
        "--phase-batch-sizes 20,20,20 --phase-epochs 1,1,1 --num-workers 0 --device cpu"
    )
    variables = environment(RUN=str(run_dir), SIZES="32,40", GPU_PRICE="2")
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
    command = [ROOT / "scripts" / "laptop.sh", *flags]
    return subprocess.Popen(command, env=variables, start_new_session=True, **options)


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".venv").exists(), reason="needs make setup")
def test_overnight_packs_trains_reports_and_goes_on_after_a_kill(photos, tmp_path):
    data, run_dir = shutil.copytree(photos, tmp_path / "photos"), tmp_path / "run"
    words = "--arch resnet_tiny --epochs 3 --resize-schedule 16 --batch-size 24 --lr 1e-3 --num-workers 0"
    command = [ROOT / "scripts" / "overnight.sh", data, run_dir, *words.split(), "--device", "cpu"]
    variables = environment(PACK_FLAGS="--stored-sides 16 --workers 1", SIZES="16,24")
    options = {"cwd": ROOT, "env": variables, "text": True, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, start_new_session=True, **options) as process:
        next(line for line in process.stdout if " 1/3 " in line)
        os.killpg(process.pid, signal.SIGKILL)
    done = subprocess.run(command, **options)
    assert done.returncode == 0 and "resuming from" in done.stdout, done.stdout
    assert (tmp_path / "photos-packed" / "manifest.json").is_file()
    assert "| 24 | ema |" in (run_dir / "report_card.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_laptop_goes_from_digits_to_the_card_and_on_after_a_kill(tmp_path):
    run_dir = tmp_path / "run"
    with laptop(run_dir) as process:
        next(line for line in process.stdout if " 1/3   16 " in line)
        os.killpg(process.pid, signal.SIGKILL)
    for resumed in ("resuming from", "complete"):
        with laptop(run_dir) as process:
            text = process.stdout.read()
        assert process.returncode == 0 and resumed in text, text
        card = (run_dir / "report_card.md").read_text(encoding="utf-8")
        assert "# resnet_tiny on digits" in card and "| 3 of 3 |" in card and "| 32 | ema |" in card
        assert (run_dir / "report.html").is_file()
        assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == 3
    assert "most confused" not in text  # scored once, by the run before


def test_a_card_says_what_a_run_reached_and_cost(tmp_path):
    run = make_run(tmp_path / "a|b")
    env = {"cuda": "13.0", "world_size": 4, "device": "H100", "precision": "bf16", "commit": "abc1234"}
    (run / "env.json").write_text(json.dumps(env | {"num_train": 1281167, "command": "train.py --lr 1"}))
    scores = json.loads((run / "validation" / "scores.json").read_text())
    scores["results"].append(scores["results"][0] | {"loss": None, "tta": "flip"})  # NaN
    (run / "validation" / "scores.json").write_text(json.dumps(scores))
    assert report_card.main([str(run), "--gpu-price", "2.5"]) == 0
    text = (run / "report_card.md").read_text(encoding="utf-8")
    # The best epoch of four, each of half an hour, on four GPUs.
    assert "| a\\|b | ? | 4 of 4 | 43.00 | 44.25 | 2h00m | 8.00 | 20.00 |" in text
    assert "| 48 | ema | trained | none | - | 44.25 | 81.00 | 1.4000 |" in text
    assert "| flip | - | 44.25 | 81.00 | - |" in text
    for expected in (
        "# resnet18 on owl",
        "4 x H100, bf16",
        "abc1234",
        "1,281,167",
        "python train.py --dataset=owl --arch=resnet18 --epochs=4 --lr=0.1",  # not the command of a resume
        "2.5 for a GPU hour",
    ):
        assert expected in text, expected


def test_a_card_of_seeds_has_their_mean(tmp_path):
    dirs = []
    for seed in range(2):
        dirs.append(make_run(tmp_path / f"seed{seed}"))
        rows = [json.loads(line) for line in (dirs[-1] / "metrics.jsonl").read_text().splitlines()]
        rows[2] |= {"val_top1": 50.0 + 2 * seed, "ema_val_top1": None}
        (dirs[-1] / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "card.md"
    out.symlink_to("linked.md")
    assert report_card.main([*map(str, dirs), "--out", str(out)]) == 0
    assert out.is_symlink()
    # 50 and 52: mean 51, standard deviation sqrt(2). Without CUDA there are no GPU hours.
    assert "| mean ± s.d., sum of 2 |  |  | 51.00 ± 1.41 | - |  | 0.00 | - |" in out.read_text(
        encoding="utf-8"
    )
    with pytest.raises(UsageError, match="needs a file"):
        report_card.main([*map(str, dirs)])
    config = json.loads((dirs[1] / "config.json").read_text())
    for changed, words in (
        ({"lr": 7.0, "seed": 3}, "seed1 and seed0 differ in --lr\n"),
        ({"init_from": "weights.pt", "seed": 3}, "seed1 and seed0 differ in --init-from\n"),
        ({"data_dir": "a copy", "seed": 3}, None),
    ):
        (dirs[1] / "config.json").write_text(json.dumps(config | changed))
        for order in (dirs, dirs[::-1]) if words else ():
            with pytest.raises(UsageError, match=words.split(" differ")[1]):
                report_card.main([*map(str, order), "--out", str(out)])
    (dirs[1] / "env.json").write_text(json.dumps({"dataset": "other photos"}))
    with pytest.raises(UsageError, match="differ in dataset"):
        report_card.main([*map(str, dirs), "--out", str(out)])
    (dirs[1] / "env.json").unlink()
    for run in dirs:
        (run / "config.json").write_text(json.dumps(config | {"seed": 3}))
    with pytest.raises(UsageError, match="the same --seed"):
        report_card.main([*map(str, dirs), "--out", str(out)])
