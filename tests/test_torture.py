"""A hundred kills at random times during constant saving: part of `make torture`."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from inprocess import TINY
from runs import digest, finish, spawn

import train
from harness import checkpoint
from harness.log import read_metrics

KILLS = 100
OFTEN = ("--save-every", "0.001min")  # a save every 60 ms: about half of the kills interrupt one


@pytest.mark.torture
def test_a_hundred_kills_at_random_times_lose_nothing(tmp_path):
    torch.set_num_threads(1)
    assert train.main([*TINY, "--save-dir", str(tmp_path / "straight")]) == 0
    wanted = [digest(tmp_path / "straight", kind) for kind in ("last", "best")]
    rng, log, kills, lives, saved, midway, longest = random.Random(1), tmp_path / "log", 0, 0, 0, 0, 3.0
    while kills < KILLS:
        save_dir, lives = tmp_path / f"run{lives}", lives + 1
        for _ in range(6):
            workers = ("--num-workers", rng.choice((0, 1)))
            process = spawn(*mode(save_dir), *OFTEN, "--save-dir", save_dir, *workers, output=log)
            if rng.random() < 0.9:  # most of the others hit the start
                wait_for_training(process, save_dir)
            process.join(rng.uniform(0, longest))
            if not process.is_alive():
                longest *= 0.8  # it was done: aim earlier
                break
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:  # it has no group of its own yet
                process.kill()
            process.join()
            longest, kills = longest * 1.05, kills + 1
            midway += any(save_dir.glob("*.partial"))
            saved += bool(list(save_dir.glob("*.pt")))
            assert not [file for file in save_dir.glob("*.pt") if checkpoint.find_damage(file)]
        process = spawn(*mode(save_dir), "--save-dir", save_dir, "--num-workers", 0, output=log)
        assert finish(process, 300) == 0, log.read_text()
        assert [digest(save_dir, kind) for kind in ("last", "best")] == wanted
        assert len(read_metrics(save_dir)) == 3 and not list(save_dir.glob("*.partial"))
    print(
        f"{kills} kills in {lives} runs, {saved} with a checkpoint there, {midway} in the middle of writing "
        "one: 0 lost, 0 unreadable"
    )
    assert midway > 5 and saved > KILLS / 2, "too few kills hit a save"


def wait_for_training(process, save_dir: Path) -> None:
    """Wait until the run has written metrics.jsonl, which it does just before the first step."""
    before, deadline = inode(save_dir), time.monotonic() + 60
    while process.is_alive() and inode(save_dir) == before and time.monotonic() < deadline:
        time.sleep(0.01)


def inode(save_dir: Path) -> int:
    path = save_dir / "metrics.jsonl"
    return path.stat().st_ino if path.exists() else 0


def mode(save_dir: Path) -> tuple[str, ...]:
    return ("--resume", "auto") if list(save_dir.glob("*.pt")) else (*TINY, "--overwrite")
