"""Goodput: the best possible against a simulation of the kills, reading the log, and a run in miniature."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from runs import ROOT

from benchmarks import goodput


@pytest.mark.parametrize(("save", "restart", "mean"), [(2, 3, 60), (10, 5, 30), (0.5, 0.1, 1)])
def test_the_best_possible_agrees_with_a_simulation_of_kills(save, restart, mean):
    rng, intervals, clock, to_do = random.Random(0), 100_000, 0.0, float(save)
    next_kill = rng.expovariate(1 / mean)
    for _ in range(intervals):
        while clock + to_do > next_kill:  # the work since the last save is lost, and a restart costs R
            clock, to_do = next_kill, restart + save
            next_kill += rng.expovariate(1 / mean)
        clock, to_do = clock + to_do, save
    assert goodput.best_possible(save, restart, mean) == pytest.approx(intervals * save / clock, abs=0.005)


def life(began: float, steps: range, killed: bool) -> dict:
    """Return a life: two seconds of start, ten steps a second, a save of 10 ms after every tenth step."""
    done = [(step, began + 2 + 0.1 * (i + 1)) for i, step in enumerate(steps)]
    saves = [(at, at + 0.01) for step, at in done if step % 10 == 0]
    return {"began": began, "ended": done[-1][1], "killed": killed, "steps": done, "saves": saves}


def test_the_figures_of_known_lives():
    straight = [life(0, range(1, 101), False)]  # 12 s
    killed = [life(0, range(1, 46), True), life(6.5, range(41, 101), False)]  # 5 steps done twice
    found = goodput.summary(straight, killed, straight, mean=60)
    assert found["kills"] == 1 and found["steps_redone"] == 5 and found["steps"] == 100
    assert found["save_interval"] == pytest.approx(1) and found["save_seconds"] == pytest.approx(0.01)
    assert found["restart_seconds"] == pytest.approx(2)
    assert found["goodput"] == pytest.approx(12 / 14.5)
    assert found["goodput_by_own_speed"] == pytest.approx(100 / 14.5 / 10)
    assert found["achieved_mean_between_kills"] == pytest.approx(14.5)
    assert found["points_below"] == pytest.approx(100 * (goodput.best_possible(1, 2, 60) - 12 / 14.5))
    assert "1 kills, 5 steps done twice" in goodput.table(found | {"different": []})


def test_a_line_cut_short_by_a_kill_is_skipped(tmp_path):
    (tmp_path / "log").write_text("step 1 10.5\nsave 10.5 10.75\nstep 2 11.0\nstep 3")
    assert goodput.read_log(tmp_path / "log") == ([(1, 10.5), (2, 11.0)], [(10.5, 10.75)])
    assert goodput.read_log(tmp_path / "none") == ([], [])


@pytest.mark.torture
def test_a_run_in_miniature_ends_in_the_same_bits(tmp_path):
    arguments = ["--minutes", "0.5", "--mean-between-kills", "15", "--save-every", "1"]
    assert goodput.main([*arguments, "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "goodput.json").read_text())
    assert result["different"] == [] and result["kills"] > 0 and 0 < result["goodput"] < 1


@pytest.mark.torture
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_running_when_it_is_interrupted(tmp_path, number):
    command = [sys.executable, "-m", "benchmarks.goodput", "--out", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: (tmp_path / "calibration" / "life000.log").exists())
    assert running(tmp_path)
    process.send_signal(number)
    process.wait(60)
    wait_until(lambda: not running(tmp_path))


def running(directory: Path) -> list[int]:
    """Return the processes with `directory` on their command line."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = file.read_bytes()
        except OSError:
            continue  # it has just ended
        if b"--child" in words and str(directory).encode() in words:
            found.append(int(file.parent.name))
    return found


def wait_until(true) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_equal_numbers_of_different_bits_are_distinguished():
    zero, other = torch.zeros(2), torch.tensor([0.0, -0.0])
    assert (
        goodput.bits({"a": [zero, 1]})
        == goodput.bits({"a": [zero.clone(), 1]})
        != goodput.bits({"a": [other, 1]})
    )
