"""What kills cost: useful steps a second of a run that is killed again and again, beside the undisturbed run.

`python -m benchmarks.goodput --out DIR` trains a small model for about ten minutes: undisturbed, then
killed (SIGKILL to the whole process group) at random times, once a minute on average, and restarted at
once with --resume auto until it is through, then undisturbed again, to show how far the machine itself
drifted. Every step and every save is logged with its time by the training process, in one hook of this
file. Linux only. `--table DIR` prints the table of docs/reliability.md from DIR/goodput.json.
"""

from __future__ import annotations

import hashlib
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
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

from base import flags

ROOT = Path(__file__).resolve().parent.parent
EPOCHS, BATCH, CALIBRATION = 5, 32, 20.0  # seconds
RUN = [
    *("--arch", "resnet_tiny", "--resize-schedule", "32", "--batch-size", str(BATCH), "--lr", "1e-3"),
    *("--num-workers", "1", "--device", "cpu", "--amp", "off", "--eval-every", str(EPOCHS)),
]
TIMING = {"images_per_second", "data_wait_percent", "seconds"}  # columns of a row that no two runs share


def build_parser() -> flags.Parser:
    parser = flags.Parser(prog="python -m benchmarks.goodput", description=__doc__.split("\n\n")[0])
    add, positive = parser.add_argument, flags.number(float, 0, open_low=True)
    add("--minutes", type=positive, default=10.0, metavar="M", help="length of the undisturbed run, about")
    add(
        "--mean-between-kills",
        type=positive,
        default=60.0,
        metavar="SECONDS",
        help="exponentially distributed",
    )
    add("--save-every", type=positive, default=2.0, metavar="SECONDS", help="between saves")
    add("--seed", type=flags.number(int, 0), default=0, metavar="N", help="of the times of the kills")
    add(
        "--out", default="goodput", metavar="DIR", help="goodput.json, the runs and their logs; emptied first"
    )
    add("--table", default="", metavar="DIR", help="print the table of DIR/goodput.json and leave")
    return parser


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--child"]:
        child(Path(argv[1]), argv[2:])
    args = build_parser().parse_args(argv)
    if args.table:
        print(table(json.loads((Path(args.table) / "goodput.json").read_text())))
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the run is ended on the way out
    out = Path(args.out)
    for name in ("calibration", "first", "killed", "last"):
        shutil.rmtree(out / name, ignore_errors=True)
    settings = [*RUN, "--epochs", str(EPOCHS), "--save-every", f"{args.save_every / 60:.6f}min"]
    live([*settings, *data(10_000)], out / "calibration", 0, CALIBRATION)
    steps, _ = read_log(out / "calibration" / "life000.log")
    rate = (len(steps) - 1) / (steps[-1][1] - steps[0][1])
    plan = [*settings, *data(max(1, round(args.minutes * 60 * rate / EPOCHS)))]
    print(f"{rate:.0f} steps a second: the run takes {' '.join(plan)}", flush=True)
    first = undisturbed(plan, out / "first")
    disturbed = killed(plan, out / "killed", args.mean_between_kills, random.Random(args.seed))
    last = undisturbed(plan, out / "last")
    result = summary(first, disturbed, last, args.mean_between_kills)
    result |= {"minutes": args.minutes, "seed": args.seed, "command": plan}
    result["different"] = sorted(
        {d for name in ("killed", "last") for d in differences(out / "first", out / name)}
    )
    (out / "goodput.json").write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))
    return 0


def data(steps_per_epoch: int) -> list[str]:
    return ["--dataset", f"synthetic:train={steps_per_epoch * BATCH},val=500,size=32"]


def child(log: Path, argv: list[str]) -> None:
    """train.py, which logs each step and save as it is done, and dies with its parent."""
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    import loop

    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    between, save = loop.Between.__call__, loop.save

    def logged_between(self, *args):
        os.write(file, f"step {self.run.state.step} {time.monotonic()}\n".encode())
        between(self, *args)

    def logged_save(*args):
        began = time.monotonic()
        save(*args)
        os.write(file, f"save {began} {time.monotonic()}\n".encode())

    loop.Between.__call__, loop.save = logged_between, logged_save
    sys.argv = ["train.py", *argv]
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


def live(argv: list[str], directory: Path, number: int, seconds: float | None) -> dict:
    """One process of a run, from its start to its end or to its violent death after `seconds`."""
    directory.mkdir(parents=True, exist_ok=True)
    log, words = directory / f"life{number:03}.log", directory / "output.txt"
    command = [sys.executable, "-m", "benchmarks.goodput", "--child", str(log.resolve()), *argv]
    command += ["--save-dir", str((directory / "run").resolve())]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    began, died = time.monotonic(), False
    with words.open("ab") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code, died = 0, True
        finally:  # also on Ctrl-C: nothing is left running
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code:
        raise SystemExit(f"the run ended with exit code {code}: {words}")
    steps, saves = read_log(log)
    return {"began": began, "ended": time.monotonic(), "killed": died, "steps": steps, "saves": saves}


def read_log(path: Path) -> tuple[list[tuple[int, float]], list[tuple[float, float]]]:
    """(step, time when it was done), and (beginning, end) of each save; a line cut short is passed over."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    words = [line.split() for line in lines if line.endswith("\n")]
    steps = [(int(step), float(at)) for kind, step, at in words if kind == "step"]
    return steps, [(float(begin), float(end)) for kind, begin, end in words if kind == "save"]


def undisturbed(plan: list[str], directory: Path) -> list[dict]:
    lives = [live(plan, directory, 0, None)]
    print(f"undisturbed: {useful(lives):.2f} steps a second", flush=True)
    return lives


def killed(plan: list[str], directory: Path, mean: float, rng: random.Random) -> list[dict]:
    """The lives of one run that is killed at random and restarted at once, until one life sees its end."""
    lives = []
    while not lives or lives[-1]["killed"]:
        there = list((directory / "run").glob("*.pt"))
        argv = ["--resume", "auto"] if there else [*plan, "--overwrite"]
        lives.append(live(argv, directory, len(lives), rng.expovariate(1 / mean)))
        life = lives[-1]
        reached = f"step {life['steps'][-1][0]}" if life["steps"] else "no step"
        print(
            f"life {len(lives):>3}: {life['ended'] - life['began']:6.1f} s, to {reached}"
            + (", killed" if life["killed"] else ", done"),
            flush=True,
        )
    return lives


def useful(lives: list[dict]) -> float:
    """Steps of the plan for each second from the first start to the end; a step done twice counts once."""
    return lives[-1]["steps"][-1][0] / (lives[-1]["ended"] - lives[0]["began"])


def best_possible(save: float, restart: float, mean: float) -> float:
    """The share of time that is not lost, with a save every `save` s, `restart` s a restart, a kill every `mean` s.

    An interval of `save` s, tried until it is not killed, takes mean * (exp(save / mean) - 1) * exp(restart / mean).
    """
    return save / mean / math.expm1(save / mean) * math.exp(-restart / mean)


def summary(first: list[dict], disturbed: list[dict], last: list[dict], mean: float) -> dict:
    """S: from one save's beginning to the next one's. R: from a restart until the work goes on, a step's time
    before its first step is done. Both from the killed run, so that a drifting machine drifts in both."""
    steps = first[0]["steps"][-1][0]
    undisturbed_rates = [useful(lives) for lives in (first, last)]
    a_step = statistics.median(b - a for life in disturbed for (_, a), (_, b) in pairwise(life["steps"]))
    restarts = [life["steps"][0][1] - life["began"] - a_step for life in disturbed[1:] if life["steps"]]
    gaps = [b - a for life in disturbed for (a, _), (b, _) in pairwise(life["saves"])]
    s, r = statistics.median(gaps), statistics.median(restarts or [0.0])
    a_save = statistics.median(end - begin for life in disturbed for begin, end in life["saves"])
    goodput = useful(disturbed) / statistics.mean(undisturbed_rates)
    possible, kills = best_possible(s, r, mean), sum(life["killed"] for life in disturbed)
    stretches = [life["steps"] for life in disturbed if len(life["steps"]) > 1]
    own = sum(len(steps) - 1 for steps in stretches) / sum(steps[-1][1] - steps[0][1] for steps in stretches)
    # Ten kills are few: luck is in their number, and not in the best possible at this mean.
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
        "save_seconds": a_save,
        "restart_seconds": r,
    }


def differences(one: Path, other: Path) -> list[str]:
    """The parts of two runs' last checkpoints that are not the same bits; rows without their timing columns."""
    from harness import checkpoint

    parts = []
    for directory in (one, other):
        (path,) = (directory / "run").glob("last_*.pt")
        content = checkpoint.read(path)
        content["rows"] = [{k: v for k, v in row.items() if k not in TIMING} for row in content["rows"]]
        names = ("model", "ema", "optimizer", "schedule", "scaler", "step", "best", "rows")
        parts.append({name: bits(content[name]) for name in names})
    return [name for name in parts[0] if parts[0][name] != parts[1][name]]


def bits(value) -> str:
    """A hash that two values share only where they are the same bit for bit."""
    if isinstance(value, dict):
        value = [*value.items()]
    if isinstance(value, list | tuple):
        content = "".join(map(bits, value)).encode()
    else:
        content = value.numpy().tobytes() if hasattr(value, "numpy") else repr(value).encode()
    return hashlib.sha256(content).hexdigest()


def table(r: dict) -> str:
    """The result as rows of Markdown."""
    before, after = r["undisturbed_steps_per_second"]
    rows = [
        (
            "undisturbed, before and after",
            f"{before:.2f} and {after:.2f} useful steps a second, {r['steps']:,} steps",
        ),
        (
            f"killed every {r['mean_between_kills']:g} s on average",
            f"{r['killed_steps_per_second']:.2f} useful steps a second, "
            f"{r['kills']} kills, {r['steps_redone']:,} steps done twice",
        ),
        ("**goodput**: the ratio", f"**{100 * r['goodput']:.1f} %**"),
        (
            "the same beside its own speed between kills, free of drift",
            f"{100 * r['goodput_by_own_speed']:.1f} %",
        ),
        (
            "best possible, and the ratio below it",
            f"{100 * r['best_possible']:.1f} %, {r['points_below']:.1f} points",
        ),
        (
            f"best possible with the kills as they came, one in {r['achieved_mean_between_kills']:.0f} s",
            f"{100 * r['best_possible_at_achieved_mean']:.1f} %",
        ),
        (
            "S, from one save to the next",
            f"{r['save_interval']:.2f} s; a save takes {1000 * r['save_seconds']:.0f} ms, "
            f"{100 * r['save_seconds'] / r['save_interval']:.1f} % of the time, also of the undisturbed run's",
        ),
        ("R, from a restart until it trains on", f"{r['restart_seconds']:.2f} s, median"),
        (
            "last checkpoint: weights, average, optimizer, rows",
            "the same bits" if not r["different"] else f"NOT the same: {', '.join(r['different'])}",
        ),
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


if __name__ == "__main__":
    sys.exit(main())
