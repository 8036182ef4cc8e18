"""What to run first on a GPU, most valuable first: tests, speed of the step and the loader, real trainings.

It needs no network; the data come from archives that `benchmarks.first_minute_data` makes elsewhere. Each
part is a process with a time limit, so one that crashes or hangs leaves the others. What is finished at
this commit is skipped: run the same command again to go on.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from base import errors, files, flags, process
from base.process import ROOT
from base.progress import duration

MINUTES = {  # in order of value; benchmarks/first_minute_parts.py says what each does
    "environment": 0.5,
    "gpu-tests": 2,
    "step": 6,
    "syncs": 1,
    "large-batches": 2.5,
    "loader": 3,
    "whole-run": 3,
    "cifar10": 2,
    "cifar100": 4,
    "tiny-imagenet": 6,
}
HALF_HOUR = sum(MINUTES.values())
UNFINISHED = ("stopped", "no time")  # as is to be expected of the last parts, except in a rehearsal
TRAININGS = ("cifar10", "cifar100", "tiny-imagenet")
REHEARSAL = 5.0  # minutes
FLOOR = 60.0  # seconds that a part gets in any case, if they are left
LEAST = 5.0  # seconds worth starting a part for
GRACE = 20.0  # seconds to save after SIGTERM
POLL, LINE_EVERY = 0.2, 20.0  # seconds
EPILOG = """examples:
  python -m benchmarks.first_minute all --out results/gpu --data DIR
  python -m benchmarks.first_minute step syncs --out results/gpu --minutes 9
  python -m benchmarks.first_minute all --out /tmp/rehearsal --rehearse           tiny sizes, on a CPU
  python -m benchmarks.tables results/gpu                                        what was measured, as tables

--out gets one file of rows per benchmark, summary.json and log.txt; --work gets unpacked data and runs."""


def build_parser() -> flags.Parser:
    parser = flags.Parser(prog="python -m benchmarks.first_minute", description=__doc__, epilog=EPILOG)
    add, minutes = parser.add_argument, flags.number(float, 0, open_low=True)
    total = f"Time for all parts; one leaves what it does not need to the others (default: {HALF_HOUR:g})."
    add("parts", nargs="+", choices=("all", *MINUTES), metavar="PART", help="Parts to run.")
    add("--out", required=True, metavar="DIR", help="Results.")
    add("--work", default="", metavar="DIR", help="Large files, kept to go on from (default: OUT-work).")
    add("--data", default="data/first_minute", metavar="DIR", help="Archives of the data.")
    add("--minutes", type=minutes, default=None, metavar="M", help=total)
    add("--rehearse", action="store_true", help="Everything at tiny sizes on a CPU, in five minutes.")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    names = [name for name in MINUTES if name in args.parts or "all" in args.parts]
    out = Path(args.out).absolute()
    work = Path(args.work).absolute() if args.work else out.with_name(out.name + "-work")
    data = Path(args.data).absolute()
    os.environ["PYTHONUNBUFFERED"] = "1"  # so that the log is complete if a part is killed
    if args.rehearse:
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        from benchmarks.first_minute_data import make_rehearsal

        data = make_rehearsal(work / "archives")
    work.mkdir(parents=True, exist_ok=True)
    minutes = args.minutes or (REHEARSAL if args.rehearse else sum(MINUTES[name] for name in names))

    def command(name: str) -> list[str]:
        words = ["-m", "benchmarks.first_minute_parts", name]
        words += ["--out", str(out), "--work", str(work), "--data", str(data)]
        return [sys.executable, *words, *(["--rehearse"] if args.rehearse else [])]

    with stop_signals():
        summary = run_parts(names, 60 * minutes, command, out, lambda name: record_epochs(name, out, work))
    bad = [name for name in names if summary[name]["status"] in ("failed", *(UNFINISHED * args.rehearse))]
    print(f"not done: {', '.join(bad)}; see {out / 'log.txt'}" if bad else f"results: {out}")
    return 1 if bad else 0


# --- running parts -----------------------------------------------------------------------------------


def run_parts(
    names: list[str],
    seconds: float,
    command: Callable[[str], list[str]],
    out: Path,
    collect: Callable[[str], None],
) -> dict[str, dict]:
    """Run the parts that are not done, within `seconds`; return the summary, which is also in a file.

    command: from the name of a part
    collect: called now and then while a part runs, and after it
    """
    out.mkdir(parents=True, exist_ok=True)
    summary, commit, deadline = {}, process.commit(), time.monotonic() + seconds
    with suppress(OSError, ValueError):  # there is none yet, or it is damaged
        summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    for k, name in enumerate(names):
        before = summary.get(name, {})
        if before.get("status") == "done" and before["commit"] == commit:
            print(f"{name}: done before", flush=True)
            continue
        # Each part gets its share of the time that is left, so what one does not need goes to the others.
        left = deadline - time.monotonic()
        limit = min(left, max(FLOOR, left * MINUTES[name] / sum(MINUTES[n] for n in names[k:])))
        if limit < LEAST:
            status, code, took = "no time", None, 0.0
        else:
            status, code, took = attempt(name, command(name), limit, out / "log.txt", collect)
        found = {"status": status, "exit_code": code, "seconds": round(took, 1), "limit": round(limit)}
        summary[name] = found | {"commit": commit}
        files.write_json(out / "summary.json", summary)
        print(f"{name}: {status} after {duration(took)}", flush=True)
    return summary


def attempt(name: str, command: list[str], limit: float, log: Path, collect) -> tuple[str, int | None, float]:
    """Run `command` for at most `limit` seconds, its output appended to `log`.

    Return "done", "stopped" (at the limit) or "failed"; its exit code; and the seconds it took.
    """
    print(f"{name}: at most {duration(limit)}", flush=True)
    started = line_due = time.monotonic()
    with open(log, "ab") as output:
        output.write(f"\n=== {name}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode())
        output.flush()
        # In a session of its own, it can be stopped with all that it started.
        streams = {"stdout": output, "stderr": subprocess.STDOUT}
        child = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **streams)
        try:
            while (code := child.poll()) is None and time.monotonic() - started < limit:
                time.sleep(POLL)
                if time.monotonic() - line_due >= LINE_EVERY:
                    line_due = time.monotonic()
                    print(f"{name}: {duration(line_due - started)}  {last_line(log)}", flush=True)
                    collect(name)
        finally:
            end_group(child)
            collect(name)
    took = time.monotonic() - started
    return ("stopped" if code is None else "failed" if code else "done"), code, took


def last_line(log: Path) -> str:
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 2000))
        lines = file.read().decode(errors="replace").strip().splitlines()
    return lines[-1][:100] if lines else ""


def end_group(child: subprocess.Popen) -> None:
    """End what is left of the child's processes: SIGTERM, on which train.py saves, then SIGKILL."""
    deadline = time.monotonic() + GRACE
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)
        while time.monotonic() < deadline:
            child.poll()  # so that it does not stay as a zombie
            os.killpg(child.pid, 0)
            time.sleep(POLL)
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


@contextmanager
def stop_signals() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the part that runs before they end this process."""

    def stop(number: int, frame) -> None:
        raise errors.Stopped(number, "stopped; run the same command again to go on")

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def record_epochs(part: str, out: Path, work: Path) -> None:
    """Append a row for each new epoch of the part's trainings, of unfinished ones too."""
    if part not in TRAININGS:
        return
    from base import schemas
    from benchmarks import records
    from benchmarks.first_minute_parts import device_name
    from harness.log import read_metrics

    known = records.finished(out, "first_minute")
    for path in sorted((work / part).rglob("metrics.jsonl")):
        run = path.parent
        config = schemas.read_json(run / "config.json", dict, "delete the run")
        own = {"benchmark": "first_minute", "part": part, "run": run.name, "arch": config["arch"]}
        own |= {"data": Path(config["data_dir"]).name, "epochs": config["epochs"]}
        for row in read_metrics(run):
            name = f"{part}: {run.name}, epoch {row['epoch']}"
            if name not in known:
                records.append(out, own | {"row": name} | row | records.environment(device_name()))


if __name__ == "__main__":
    sys.exit(errors.run(main))
