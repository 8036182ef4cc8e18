"""One HTML file about one run, or several side by side: offline, self-contained, worth sending to a colleague."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from base import flags
from base.errors import DataError, UsageError, run, tell

ROOT = Path(__file__).resolve().parent.parent
EPILOG = """examples:
  python -m analysis.report checkpoints/                        checkpoints/report.html
  python -m analysis.report runs/a runs/b --out compared.html   side by side, with the flags that differ
  python -m analysis.report ablation_runs/results/STUDY --out study.html
  python -m analysis.report --list runs/                        a table of runs: flags that differ, best, hours"""


def build_parser() -> flags.Parser:
    parser = flags.build_parser("-m analysis.report", "Write an HTML report of runs or studies.", EPILOG)
    add = parser.add_argument
    add(
        "run_dirs",
        nargs="*",
        metavar="RUN_DIR",
        help="directories that train.py or ablation_runs.report wrote",
    )
    add("--out", default="", metavar="FILE", help="the page; empty: report.html in the only RUN_DIR")
    add("--list", default="", metavar="DIR", help="print a table of the runs below DIR, and write nothing")
    add(
        "--pictures",
        action=flags.Switch,
        default=True,
        help="score the checkpoint and draw what is missing, where its data can be reached",
    )
    add(
        "--data-dir",
        default="",
        metavar="DIR",
        help="where the data of the runs lies now; empty: where it lay then",
    )
    add("--device", default="auto", metavar="NAME", help="for the pictures: auto, cpu, cuda, cuda:1, mps")
    add("--debug", action="store_true", help="tracebacks for errors")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if bool(args.list) == bool(args.run_dirs):
        raise UsageError("name the runs to report, or --list DIR", "python -m analysis.report checkpoints/")
    if len(args.run_dirs) > 1 and not args.out:
        raise UsageError("several runs need a file to be written to", "name it with --out FILE.html")
    from analysis import runs as reading
    from base import files

    if args.list:
        print(listing(reading.read_runs(nonempty(reading.find_runs(args.list), args.list))))
        return 0
    paths = list(dict.fromkeys(map(Path, args.run_dirs)))
    studies = [path for path in paths if (path / "summary.md").is_file()]
    runs = reading.read_runs([path for path in paths if path not in studies])
    notes = (
        {found.name: complete(found, args.data_dir, args.device) for found in runs} if args.pictures else {}
    )
    out = Path(args.out) if args.out else paths[0] / "report.html"
    files.write(out, document(runs, studies, notes))
    print(out)
    return 0


def nonempty(found: list[Path], where: str) -> list[Path]:
    if not found:
        raise DataError(f"no run below {where}", "name a directory that holds directories train.py wrote")
    return found


def listing(runs) -> str:
    """The runs as an aligned text table; of the flags that differ, those in which a run is not like most."""
    from analysis.runs import SCORES, apart, scores

    rows = [[*SCORES, "flags that differ"]]
    for run_files, own in zip(runs, apart(runs), strict=True):
        rows.append(
            [*scores(run_files), " ".join(f"{flags.dashed(name)} {value}" for name, value in own.items())]
        )
    widths = [max(len(row[k]) for row in rows) for k in range(len(SCORES))]
    return "\n".join("  ".join([*map(str.ljust, row, widths), row[-1]]).rstrip() for row in rows)


def complete(found, data_dir: str, device: str) -> list[str]:
    """Write what the report shows and no command has written since the checkpoint; what could not be, and why."""
    checkpoint = found.checkpoint()
    if checkpoint is None:
        return ["There is no checkpoint, so nothing was scored or drawn."]
    data = ["--data-dir", str(Path(data_dir).resolve())] if data_dir else []
    plots, notes = found.path / "plots", []
    for file, command in (
        (found.path / "validation" / "scores.json", ["validate.py"]),
        (plots / "misclassified.png", ["-m", "analysis.misclassified"]),
        (plots / "gradcam.png", ["-m", "analysis.gradcam"]),
    ):
        if file.is_file() and file.stat().st_mtime >= checkpoint.stat().st_mtime:
            continue
        if command[-1].endswith(".py") and not (ROOT / command[-1]).is_file():
            continue
        reason = call([*command, str(checkpoint.resolve()), "--device", device, *data])
        notes += [f"No {file.name}: {reason}."] if reason else []
    return notes


def call(command: list[str]) -> str:
    """Run one of our commands; '' or why it failed. A process of its own: it must not cost the report."""
    tell(f"python {' '.join(command)}")
    # Relative data paths in a checkpoint are relative to where the user stands.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    script = [str(ROOT / command[0])] if command[0].endswith(".py") else command[:1]
    done = subprocess.run(
        [sys.executable, *script, *command[1:]], env=environment, capture_output=True, text=True
    )
    lines = [
        line for line in done.stderr.splitlines() if line.startswith("error: ")
    ] or done.stderr.splitlines()[-1:]
    return (lines or ["no reason given"])[-1].removeprefix("error: ") if done.returncode else ""


def document(runs, studies: list[Path], notes: dict[str, list[str]]) -> str:
    """The page as text."""
    from analysis import chapters, page

    sections = [chapters.study(folder, k) for k, folder in enumerate(studies)]
    if runs:
        sections += [chapters.overview(runs), chapters.curves(runs)]
        sections += [
            chapters.side_by_side(title, anchor, runs, what)
            for title, anchor, what in (
                ("Validation", "validation", chapters.validation),
                (
                    "Pictures",
                    "pictures",
                    lambda found: page.join(
                        [
                            chapters.galleries(found),
                            *(page.tag("p", note, class_="soft") for note in notes.get(found.name, [])),
                        ]
                    ),
                ),
                ("Environment and flags", "environment", chapters.environment),
            )
        ]
    names = [found.name for found in runs] + [folder.name for folder in studies]
    lead = f"{len(runs)} run{'s' * (len(runs) != 1)}" if runs else "From the files of the study's runs"
    return page.page(
        f"Training report: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}", lead, sections
    )


if __name__ == "__main__":
    sys.exit(run(main))
