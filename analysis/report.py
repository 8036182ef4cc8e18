"""Write one self-contained HTML page about a run, several runs or a study, to read offline or send on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from base import flags
from base.errors import DataError, UsageError, run, tell

ROOT = Path(__file__).resolve().parent.parent
EPILOG = """examples:
  python -m analysis.report checkpoints/                        write checkpoints/report.html
  python -m analysis.report runs/a runs/b --out compared.html   side by side, with the flags that differ
  python -m analysis.report ablation_runs/results/ema-cpu --out study.html
  python -m analysis.report --list runs/                        a table: score, hours, flags that differ"""


def build_parser() -> flags.Parser:
    parser = flags.build_parser("-m analysis.report", "Write an HTML report of runs or studies.", EPILOG)
    add = parser.add_argument
    add(
        "run_dirs",
        nargs="*",
        metavar="RUN_DIR",
        help="Directory that train.py or ablation_runs.report wrote.",
    )
    add("--out", default="", metavar="FILE", help="Page to write. Default: report.html in the only RUN_DIR.")
    add("--list", default="", metavar="DIR", help="Print a table of the runs below DIR and write nothing.")
    pictures = "First score the checkpoint and draw the pictures that are missing, if its data can be read."
    add("--pictures", action=flags.Switch, default=True, help=pictures)
    add("--data-dir", default="", metavar="DIR", help="Dataset directory. Default: the one of the training.")
    add("--device", default="auto", metavar="NAME", help="Device: auto, cpu, cuda, cuda:1 or mps.")
    flags.DEBUG.add_to(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if bool(args.list) == bool(args.run_dirs):
        raise UsageError("name the runs to report, or --list DIR", "python -m analysis.report checkpoints/")
    if len(args.run_dirs) > 1 and not args.out:
        raise UsageError("a report of several runs needs a file to write to", "give --out FILE.html")
    from analysis.runs import find_runs, read_runs
    from base import files

    if args.list:
        if not (found := find_runs(args.list)):
            raise DataError(f"no run below {args.list}", "name a directory that holds runs of train.py")
        print(listing(read_runs(found)))
        return 0
    paths = list(dict.fromkeys(map(Path, args.run_dirs)))
    for path in paths:
        check_exists(path)
    studies = [path for path in paths if (path / "summary.md").is_file()]
    runs = read_runs([path for path in paths if path not in studies])
    notes = {}
    if args.pictures:
        notes = {one.name: make_missing(one, args.data_dir, args.device) for one in runs}
    out = args.out or paths[0] / "report.html"
    print(files.write(out, document(runs, studies, notes)))
    return 0


def check_exists(path: Path) -> None:
    if not path.is_dir():
        beside = sorted(p.name for p in path.parent.iterdir() if p.is_dir()) if path.parent.is_dir() else []
        known = f"{path.parent} holds {', '.join(beside[:12])}" if beside else "name a directory of train.py"
        raise DataError(f"no directory {path}", known)


def listing(runs) -> str:
    """Return the runs as an aligned text table with the flags in which each is not like most others."""
    from analysis.runs import SCORE_COLUMNS, unusual_flags

    rows = [[*SCORE_COLUMNS, "flags that differ"]]
    for one, unusual in zip(runs, unusual_flags(runs), strict=True):
        rows.append([*one.scores(), " ".join(flags.to_argv(unusual))])
    widths = [max(len(row[k]) for row in rows) for k in range(len(SCORE_COLUMNS))]
    return "\n".join("  ".join([*map(str.ljust, row, widths), row[-1]]).rstrip() for row in rows)


def make_missing(found, data_dir: str, device: str) -> list[str]:
    """Start the commands whose output is missing or older than the checkpoint; return what failed and why."""
    checkpoint = found.checkpoint()
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
        path = found.path / file
        if path.is_file() and path.stat().st_mtime >= checkpoint.stat().st_mtime:
            continue
        if reason := call([*command, *arguments]):
            notes.append(f"No {path.name}: {reason}.")
    return notes


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


def document(runs, studies: list[Path], notes: dict[str, list[str]]) -> str:
    """Return the page. notes: by the name of a run, what could not be drawn."""
    from analysis import chapters, page

    def pictures(found) -> page.Markup:
        failed = [page.tag("p", note, class_="soft") for note in notes.get(found.name, [])]
        return page.join([chapters.galleries(found), *failed])

    sections = [chapters.study(folder, k) for k, folder in enumerate(studies)]
    if runs:
        sections += [
            chapters.overview(runs),
            chapters.curves(runs),
            chapters.each_run("Validation", "validation", runs, chapters.validation),
            chapters.each_run("Pictures", "pictures", runs, pictures),
            chapters.each_run("Environment and flags", "environment", runs, chapters.environment),
        ]
    names = [found.name for found in runs] + [folder.name for folder in studies]
    title = f"Training report: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
    lead = f"{len(runs)} run{'s' * (len(runs) != 1)}" if runs else "From the files of the study's runs"
    return page.page(title, lead, sections)


if __name__ == "__main__":
    sys.exit(run(main))
