"""Write one self-contained HTML page about a run, several runs or a study, to read offline or send on."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from base import files, flags
from base.errors import DataError, UsageError, tell
from base.errors import run as run_command
from base.process import ROOT

POLL = 1  # seconds between two looks at a run that is watched
QUIET = 60  # seconds without a new epoch after which to see whether it still trains
EPILOG = """examples:
  python -m analysis.report checkpoints/                        write checkpoints/report.html
  python -m analysis.report runs/a runs/b --out compared.html   side by side, with the flags that differ
  python -m analysis.report ablation_runs/results/ema-cpu --out study.html
  python -m analysis.report checkpoints/ --watch                in a second terminal, while train.py runs
  python -m analysis.report --list runs/                        a table: score, hours, flags that differ"""


def build_parser() -> flags.Parser:
    parser = flags.build_parser("-m analysis.report", "Write an HTML report of runs or studies.", EPILOG)
    add = parser.add_argument
    run_dirs = "Directory that train.py or ablation_runs.report wrote."
    add("run_dirs", nargs="*", metavar="RUN_DIR", help=run_dirs)
    add("--out", default="", metavar="FILE", help="Page to write; by default report.html in the RUN_DIR.")
    add("--list", default="", metavar="DIR", help="Print a table of the runs below DIR and write nothing.")
    watch = "Write the page after each epoch, until the last; it reloads itself. Draws no pictures."
    add("--watch", action="store_true", help=watch)
    pictures = "First score the checkpoint and draw missing pictures, if its data can be read."
    add("--pictures", action=flags.Switch, default=True, help=pictures)
    data_dir = "Dataset directory; by default the one used in training."
    add("--data-dir", default="", metavar="DIR", help=data_dir)
    add("--device", default="auto", metavar="NAME", help="Device: auto, cpu, cuda, cuda:1 or mps.")
    flags.DEBUG.add_to(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if bool(args.list) == bool(args.run_dirs):
        raise UsageError("name the runs to report, or --list DIR", "python -m analysis.report checkpoints/")
    if len(args.run_dirs) > 1 and not args.out:
        raise UsageError("a report of several runs needs a file to write to", "give --out FILE.html")
    if args.list and args.watch:
        raise UsageError("--list prints a table once", "leave --watch out, or name the runs to watch")
    from analysis import runs

    if args.list:
        if not (found := runs.find_runs(args.list)):
            raise DataError(f"no run below {args.list}", "name a directory that holds runs of train.py")
        print(runs.listing(runs.read_runs(found)))
        return 0

    from analysis import chapters

    paths = list(dict.fromkeys(map(Path, args.run_dirs)))
    studies = [path for path in map(checked, paths) if (path / "summary.md").is_file()]
    run_dirs = [path for path in paths if path not in studies]
    out = files.followed(args.out) or str(paths[0] / "report.html")
    files.check_output(args.out or out, "--out")  # before the pictures are made

    def write(final: bool = not args.watch) -> bool:
        """Write the page; return whether all runs are complete.

        final: no page of the same runs will follow
        """
        found = runs.read_runs(run_dirs)
        drawn = found if args.pictures and not args.watch else []
        notes = {run.name: make_missing(run, args.data_dir, args.device) for run in drawn}
        complete = all(run.complete for run in found)
        reload = not (final or complete)
        print(files.write(out, chapters.document(found, studies, notes, reload)), flush=True)
        return complete

    if args.watch:
        watch(run_dirs, write)
    else:
        write()
    return 0


def watch(run_dirs: list[Path], write: Callable[..., bool]) -> None:
    """Call `write` now and after every epoch of a run, until it returns True or no run trains any more."""
    from harness import rundir

    seen, since = [], time.monotonic()
    while True:
        # Of a file that is being replaced, the next look sees more.
        now = [
            path.stat().st_mtime_ns if (path := folder / "metrics.jsonl").exists() else 0
            for folder in run_dirs
        ]
        if now != seen:
            seen, since = now, time.monotonic()
            try:
                if write():
                    return
            except DataError as error:
                tell(f"waiting: {error.what}")
        elif time.monotonic() - since > QUIET:
            since = time.monotonic()
            if not any(map(rundir.in_use, run_dirs)):
                with suppress(DataError):  # it may have ended before its first epoch did
                    write(final=True)
                tell("no run is training there: use train.py --resume auto, then --watch again")
                return
        time.sleep(POLL)


def checked(path: Path) -> Path:
    """Return `path`. Raises DataError, with the directories there, unless it holds a run or a study."""
    if any((path / name).is_file() for name in ("metrics.jsonl", "summary.md")):
        return path
    where, what = (path, "neither a run nor a study in") if path.is_dir() else (path.parent, "no directory")
    found = sorted(p.name for p in where.iterdir() if p.is_dir()) if where.is_dir() else []
    known = f"{where} holds {', '.join(found[:12])}" if found else "name a directory of train.py"
    raise DataError(f"{what} {path}", known)


def make_missing(run, data_dir: str, device: str) -> list[str]:
    """Run the commands whose output is missing or older than the checkpoint; return what failed and why."""
    checkpoint = run.checkpoint()
    if checkpoint is None:
        return ["There is no checkpoint, so nothing was scored or drawn."]
    arguments = [str(checkpoint.resolve()), "--device", device]
    arguments += ["--data-dir", str(Path(data_dir).resolve())] if data_dir else []
    notes = []
    for file, command in {
        "validation/scores.json": ["-m", "validate"],
        "plots/misclassified.png": ["-m", "analysis.misclassified"],
        "plots/gradcam.png": ["-m", "analysis.gradcam"],
    }.items():
        path = run.path / file
        if is_newer(path, checkpoint):
            continue
        if reason := call([*command, *arguments]):
            notes.append(f"No {path.name}: {reason}.")
        elif command[-1] == "validate" and not is_newer(path, checkpoint):  # it wrote the scores elsewhere
            where = run.path / "validation_other_data"
            notes.append(f"The data are not those of the run; their scores are in {where}.")
            tell(f"note: {notes[-1]}")
    return notes


def is_newer(path: Path, checkpoint: Path) -> bool:
    return path.is_file() and path.stat().st_mtime >= checkpoint.stat().st_mtime


def call(command: list[str]) -> str:
    """Run one of our commands in a process of its own; return why it failed, or ''."""
    tell(f"python {' '.join(command)}")
    # Relative data paths in a checkpoint are relative to where the user stands: no change of directory.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    if not done.returncode:
        return ""
    lines = done.stderr.splitlines() or ["no reason given"]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines)[-1]


if __name__ == "__main__":
    sys.exit(run_command(main))
