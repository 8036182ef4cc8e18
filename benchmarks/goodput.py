"""What kills cost: the useful steps per second of a run that is killed again and again.

`python -m benchmarks.goodput --out DIR` trains a small model three times, for about ten minutes each:
undisturbed; then killed at random times (SIGKILL to the process group, once a minute on average) and
restarted at once with --resume auto until it is done; then undisturbed again, to show how far the machine
drifted. Linux only.
`--table DIR` prints the table of docs/reliability.md.
"""

from __future__ import annotations

import json
import math
import os
import random
import runpy
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

from base import errors, files, flags
from base.process import ROOT
from benchmarks.bitflips import bits

EPOCHS, BATCH = 5, 32
CALIBRATION = 20.0  # seconds of the run that measures the speed of a step
RUN = (
    f"--arch resnet_tiny --resize-schedule 32 --batch-size {BATCH} --epochs {EPOCHS} --eval-every {EPOCHS} "
    "--lr 1e-3 --num-workers 1 --device cpu --amp off"
).split()
DATA = "--dataset=synthetic:train={},val=500,size=32"
PARTS = ("model", "ema", "optimizer", "schedule", "scaler", "step", "best", "rows")  # of a checkpoint
TIMING = {"images_per_second", "data_wait_percent", "seconds"}  # columns that differ between any two runs


def build_parser() -> flags.Parser:
    parser = flags.Parser(prog="python -m benchmarks.goodput", description=__doc__.split("\n\n")[0])
    add, positive, whole = parser.add_argument, flags.number(float, 0, open_low=True), flags.number(int, 0)
    mean = "Mean time between kills, exponentially distributed."
    out = "Output directory for goodput.json, the runs and their logs; previous runs in it are deleted."
    add("--minutes", type=positive, default=10.0, metavar="M", help="Approximate minutes per run.")
    add("--mean-between-kills", type=positive, default=60.0, metavar="SECONDS", help=mean)
    add("--save-every", type=positive, default=2.0, metavar="SECONDS", help="Time between saves.")
    add("--seed", type=whole, default=0, metavar="N", help="Random seed of the kills.")
    add("--out", default="goodput", metavar="DIR", help=out)
    add("--table", default="", metavar="DIR", help="Only print the table of DIR/goodput.json.")
    return parser


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--child"]:
        child(Path(argv[1]), argv[2:])
    args = build_parser().parse_args(argv)
    if args.table:
        print(table(json.loads((Path(args.table) / "goodput.json").read_text())))
        return 0
    for number in (signal.SIGINT, signal.SIGTERM):  # so that the active run is killed too
        signal.signal(number, signal.default_int_handler)
    errors.doing("timing the steps of a short run")
    out = Path(args.out)
    for name in ("calibration", "first", "killed", "last"):
        shutil.rmtree(out / name, ignore_errors=True)
    settings = [*RUN, "--save-every", f"{args.save_every / 60:.6f}min"]
    steps = live([*settings, DATA.format(10_000 * BATCH)], out / "calibration", 0, CALIBRATION)["steps"]
    rate = (len(steps) - 1) / (steps[-1][1] - steps[0][1])
    command = [*settings, DATA.format(max(1, round(args.minutes * 60 * rate / EPOCHS)) * BATCH)]
    print(f"{rate:.0f} steps a second: the run uses {' '.join(command)}", flush=True)
    rng, mean = random.Random(args.seed), args.mean_between_kills
    first = lives_of(command, out / "first", lambda: None)
    disturbed = lives_of(command, out / "killed", lambda: rng.expovariate(1 / mean))
    last = lives_of(command, out / "last", lambda: None)
    ends = [last_checkpoint(out / name) for name in ("first", "killed", "last")]
    different = [part for part in PARTS if len({end[part] for end in ends}) > 1]
    result = summary(first, disturbed, last, mean)
    result |= {"minutes": args.minutes, "seed": args.seed, "command": command, "different": different}
    files.write_json(out / "goodput.json", result)
    print(table(result))
    return 0


def child(log: Path, argv: list[str]) -> None:
    """Run train.py, log each step and each save, and die with the parent process."""
    from harness.interrupts import die_with_parent

    die_with_parent()
    import loop

    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    save_or_stop, save = loop.save_or_stop, loop.save

    def logged_step(run):
        os.write(file, f"step {run.state.step} {time.monotonic()}\n".encode())
        save_or_stop(run)

    def logged_save(*args):
        began = time.monotonic()
        save(*args)
        os.write(file, f"save {began} {time.monotonic()}\n".encode())

    loop.save_or_stop, loop.save = logged_step, logged_save
    sys.argv = ["train.py", *argv]
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


def lives_of(command: list[str], directory: Path, lifetime: Callable[[], float | None]) -> list[dict]:
    """Train until the run is done, killing it after `lifetime()` seconds each time; return its lives."""
    lives = []
    while not lives or lives[-1]["killed"]:
        has_checkpoint = any((directory / "run").glob("*.pt"))
        argv = ["--resume", "auto"] if has_checkpoint else [*command, "--overwrite"]
        life = live(argv, directory, len(lives), lifetime())
        lives.append(life)
        reached = f"step {life['steps'][-1][0]}" if life["steps"] else "no step"
        seconds, end = life["ended"] - life["began"], "killed" if life["killed"] else "done"
        print(f"{directory.name}, life {len(lives):>3}: {seconds:6.1f} s, to {reached}, {end}", flush=True)
    return lives


def live(argv: list[str], directory: Path, number: int, seconds: float | None) -> dict:
    """Run one process of a run to its end, or kill it after `seconds`."""
    directory.mkdir(parents=True, exist_ok=True)
    log, output = directory / f"life{number:03}.log", directory / "output.txt"
    command = [sys.executable, "-m", "benchmarks.goodput", "--child", str(log.resolve()), *argv]
    command += ["--save-dir", str((directory / "run").resolve())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    began, died = time.monotonic(), False
    with output.open("ab") as file:
        streams = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **streams)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code, died = 0, True
        finally:  # also on Ctrl-C
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code:
        raise SystemExit(f"the run ended with exit code {code}: {output}")
    steps, saves = read_log(log)
    return {"began": began, "ended": time.monotonic(), "killed": died, "steps": steps, "saves": saves}


def read_log(path: Path) -> tuple[list[tuple[int, float]], list[tuple[float, float]]]:
    """Return (step, time of its end) of each step, and (begin, end) of each save; skip a line cut short."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    words = [line.split() for line in lines if line.endswith("\n")]
    steps = [(int(step), float(at)) for kind, step, at in words if kind == "step"]
    return steps, [(float(begin), float(end)) for kind, begin, end in words if kind == "save"]


def summary(first: list[dict], disturbed: list[dict], last: list[dict], mean: float) -> dict:
    """Return the figures of the table.

    S is the time from the start of one save to the start of the next, R that from a restart to its first
    step. Both are measured on the killed run, so that a drifting machine affects both sides of the ratio.
    """
    steps = first[0]["steps"][-1][0]
    undisturbed_rates = [useful(lives) for lives in (first, last)]
    gaps = [b - a for life in disturbed for (a, _), (b, _) in pairwise(life["saves"])]
    step_time = statistics.median(b - a for life in disturbed for (_, a), (_, b) in pairwise(life["steps"]))
    restarts = [life["steps"][0][1] - life["began"] - step_time for life in disturbed[1:] if life["steps"]]
    s, r = statistics.median(gaps), statistics.median(restarts or [0.0])
    goodput = useful(disturbed) / statistics.mean(undisturbed_rates)
    possible, kills = best_possible(s, r, mean), sum(life["killed"] for life in disturbed)
    stretches = [life["steps"] for life in disturbed if len(life["steps"]) > 1]
    own = sum(len(steps) - 1 for steps in stretches) / sum(steps[-1][1] - steps[0][1] for steps in stretches)
    # The number of so few kills is a matter of luck: also compare with the mean that was achieved.
    achieved = (disturbed[-1]["ended"] - disturbed[0]["began"]) / max(1, kills)
    return {
        "steps": steps,
        "undisturbed_steps_per_second": undisturbed_rates,
        "killed_steps_per_second": useful(disturbed),
        "goodput": goodput,
        "goodput_by_own_speed": useful(disturbed) / own,
        "best_possible": possible,
        "points_below": 100 * (possible - goodput),
        "best_possible_at_achieved_mean": best_possible(s, r, achieved),
        "achieved_mean_between_kills": achieved,
        "kills": kills,
        "steps_redone": sum(len(life["steps"]) for life in disturbed) - steps,
        "mean_between_kills": mean,
        "save_interval": s,
        "save_seconds": statistics.median(end - begin for life in disturbed for begin, end in life["saves"]),
        "restart_seconds": r,
    }


def useful(lives: list[dict]) -> float:
    """Return the steps per second from start to end of a run; repeated steps count once."""
    return lives[-1]["steps"][-1][0] / (lives[-1]["ended"] - lives[0]["began"])


def best_possible(save: float, restart: float, mean: float) -> float:
    """Return the useful share of time, given the seconds from save to save, per restart and between kills.

    With kills, an interval of `save` s takes mean * (exp(save / mean) - 1) * exp(restart / mean) on average.
    """
    return save / mean / math.expm1(save / mean) * math.exp(-restart / mean)


def last_checkpoint(directory: Path) -> dict[str, str]:
    """Return a hash of each part of a run's last checkpoint; timing columns are left out."""
    from harness import checkpoint

    (path,) = (directory / "run").glob("last_*.pt")
    content = checkpoint.read(path)
    content["rows"] = [{k: v for k, v in row.items() if k not in TIMING} for row in content["rows"]]
    return {name: bits(content[name]) for name in PARTS}


TABLE = """\
| | |
|---|---|
| undisturbed, before and after | {before:.2f} and {after:.2f} useful steps a second, {steps:,} steps |
| killed every {mean_between_kills:g} s on average | {killed_steps_per_second:.2f} useful steps a second, \
{kills} kills, {steps_redone:,} steps done twice |
| **goodput**: the ratio | **{goodput:.1f} %** |
| goodput relative to its own speed between kills, free of drift | {goodput_by_own_speed:.1f} % |
| best possible, and how far goodput is below it | {best_possible:.1f} %, {points_below:.1f} points |
| best possible with the kills as they came, one in {achieved_mean_between_kills:.0f} s | \
{best_possible_at_achieved_mean:.1f} % |
| S, from one save to the next | {save_interval:.2f} s; a save takes {save_milliseconds:.0f} ms, \
{saving:.1f} % of the time, also of the undisturbed run's |
| R, from a restart to its first step | {restart_seconds:.2f} s, median |
| last checkpoint: weights, average, optimizer, rows | {same} |"""


def table(result: dict) -> str:
    """Return the result as a table in Markdown."""
    shares = ("goodput", "goodput_by_own_speed", "best_possible", "best_possible_at_achieved_mean")
    values = result | {name: 100 * result[name] for name in shares}
    values["before"], values["after"] = result["undisturbed_steps_per_second"]
    values["save_milliseconds"] = 1000 * result["save_seconds"]
    values["saving"] = 100 * result["save_seconds"] / result["save_interval"]
    different = ", ".join(result["different"])
    return TABLE.format(**values, same=f"NOT the same: {different}" if different else "the same bits")


if __name__ == "__main__":
    sys.exit(errors.run(main))
