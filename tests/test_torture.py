"""A hundred kills at random instants, with saves all the time: `make torture` runs this and all that is marked torture."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from inprocess import TINY
from runs import digest, finish, spawn

import checkpoint
import train
from metrics import read_metrics

KILLS = 100
OFTEN = ("--save-every", "0.001min")  # a save every 60 ms: about half of the kills come in the middle of one


@pytest.mark.torture
def test_a_hundred_kills_at_random_instants_lose_nothing(tmp_path):
    torch.set_num_threads(1)
    assert train.main([*TINY, "--save-dir", str(tmp_path / "straight")]) == 0
    wanted = [digest(tmp_path / "straight", kind) for kind in ("last", "best")]
    rng, log, kills, lives, midway, longest = random.Random(1), tmp_path / "log", 0, 0, 0, 4.0
    while kills < KILLS:
        save_dir, lives = tmp_path / f"run{lives}", lives + 1
        for _ in range(6):
            started = time.monotonic()
            process = spawn(
                *how(save_dir), *OFTEN, "--save-dir", save_dir, "--num-workers", rng.choice((0, 1)), output=log
            )
            process.join(rng.uniform(0.3, longest))
            if not process.is_alive():
                longest = time.monotonic() - started
                break
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
            midway += any(save_dir.glob("*.partial"))
            assert not [file for file in save_dir.glob("*.pt") if checkpoint.find_damage(file)]
        assert finish(spawn(*how(save_dir), "--save-dir", save_dir, "--num-workers", 0, output=log), 300) == 0, (
            log.read_text()
        )
        assert [digest(save_dir, kind) for kind in ("last", "best")] == wanted
        assert len(read_metrics(save_dir)) == 3 and not list(save_dir.glob("*.partial"))
    print(f"{kills} kills in {lives} runs, {midway} in the middle of writing a checkpoint: 0 lost, 0 unreadable")
    assert midway, "no kill hit a save"


def how(save_dir: Path) -> tuple[str, ...]:
    return ("--resume", "auto") if list(save_dir.glob("*.pt")) else (*TINY, "--overwrite")
