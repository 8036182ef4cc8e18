"""Report a study from the files of its runs: tables, pictures, and a conclusion that respects the noise."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from pathlib import Path

from ablation_runs import studies
from ablation_runs.run import RUNS
from ablation_runs.study import FINAL, PRESETS, Study
from base import errors, files, flags
from base.errors import DataError, UsageError

PUBLISHED = Path(__file__).resolve().parent / "results"
FORMATS = ("png", "svg", "pdf")
PRIVATE = ("data_dir", "save_dir", "resume", "config", "init_from", "class_list")  # paths on this machine


def build_parser() -> flags.Parser:
    parser = flags.build_parser("-m ablation_runs.report", __doc__)
    add = parser.add_argument
    add("study", metavar="STUDY", help="Name of the study; `python -m ablation_runs.run --list` lists them.")
    add("--preset", default="full", choices=PRESETS, help="Preset of the runs.")
    add("--smoke", dest="preset", action="store_const", const="smoke", help="Short for --preset smoke.")
    add("--runs", default=RUNS, metavar="DIR", help="Directory of the runs: --out of ablation_runs.run.")
    add("--out", default="", metavar="DIR", help="Output directory; if empty, beside the runs.")
    formats = "Formats of the pictures: png, svg, pdf."
    add("--formats", type=flags.listing(str), default="png", metavar="NAME,...", help=formats)
    add("--publish", action="store_true", help="Write the report and small files to ablation_runs/results/.")
    flags.DEBUG.add_to(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    study = studies.find(args.study)
    if unknown := set(args.formats) - {*FORMATS}:
        raise UsageError(f"--formats {', '.join(sorted(unknown))}", f"choose from {', '.join(FORMATS)}")
    if not args.formats:
        raise UsageError("--formats is empty", f"choose from {', '.join(FORMATS)}")
    if args.publish and args.out:
        what = "--out would do nothing: --publish has a directory of its own"
        raise UsageError(what, "leave one of them out")
    directory = Path(args.runs) / study.directory(args.preset)
    errors.doing(f"reading the runs in {directory}")
    out = PUBLISHED / study.directory(args.preset) if args.publish else Path(args.out or directory)
    formats = tuple(sorted(args.formats, key=FORMATS.index))  # summary.md shows the first
    print(write(study, args.preset, directory, out, formats))
    if args.publish:
        publish(directory, out, study)
    errors.tell(f"wrote summary.md, tables (csv, tex) and pictures to {out}")
    return 0


def write(study: Study, preset: str, directory: Path, out: Path, formats: tuple[str, ...] = ("png",)) -> str:
    """Write summary.md, the tables and the pictures to `out`; return the markdown.

    Raises DataError if `directory` has no run of the study.
    """
    from ablation_runs import plots, results, summary

    runs = results.load(directory, study)
    if not runs:
        scaled = "" if preset == "full" else f" --preset {preset}"
        fix = f"python -m ablation_runs.run {study.name}{scaled} --out {shlex.quote(str(directory.parent))}"
        raise DataError(f"no runs of {study.name} in {directory}", fix)
    pictures = plots.draw(runs, study, preset, out, formats)
    text = summary.markdown(study, preset, runs, [path.name for path in pictures])
    for table in summary.tables(study, preset, runs):
        files.write(out / f"{table.name}.csv", table.csv())
        files.write(out / f"{table.name}.tex", table.latex())
    files.write(out / "summary.md", text + "\n")
    files.write(out / "summary.csv", summary.csv_table(runs))
    return text


def publish(directory: Path, out: Path, study: Study) -> None:
    """Copy each run's small files to `out`, without the paths of this machine."""
    from ablation_runs import results
    from base import schemas

    fix = "delete it, or run the study again"
    for run in results.load(directory, study):
        target = out / run.directory.name
        target.mkdir(parents=True, exist_ok=True)
        words = [re.sub(r"(?<=[=,])/[^,]*/", "", word) for word in run.record.get("flags", ())]
        files.write_json(target / "run.json", run.record | {"flags": words})
        for name in ("metrics.jsonl", f"{FINAL}/hits.npz"):
            if (run.directory / name).is_file():
                (target / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(run.directory / name, target / name)
        config = schemas.read_json(run.directory / "config.json", schemas.Config, fix, missing={})
        for name, content, left_out in (("config", config, PRIVATE), ("env", run.env, ("command",))):
            if content:
                kept = {key: value for key, value in content.items() if key not in left_out}
                files.write_json(target / f"{name}.json", kept)


if __name__ == "__main__":
    sys.exit(errors.run(main))
