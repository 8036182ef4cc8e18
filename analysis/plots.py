"""Draw the learning curves, the learning rate and the steps of runs into PNG files.

`train.py --plot` starts this command while it trains, in a process of its own.
"""

from __future__ import annotations

import sys
from pathlib import Path

from base import flags
from base.errors import doing
from base.errors import run as run_command

EPILOG = """examples:
  python -m analysis.plots checkpoints/                    write curves, lr and steps.png to checkpoints/plots
  python -m analysis.plots runs/a runs/b --out pictures    one folder for each run, and compare.png"""


def build_parser() -> flags.Parser:
    parser = flags.build_parser("-m analysis.plots", "Draw the learning curves of one or more runs.", EPILOG)
    parser.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="Directory that train.py wrote.")
    parser.add_argument("--out", default="", metavar="DIR", help="Output directory (default: RUN_DIR/plots).")
    flags.DEBUG.add_to(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    doing(f"drawing {', '.join(args.run_dirs)}")
    from analysis import figures, learning_curves, runs, step_curves

    found = runs.read_runs(args.run_dirs)
    for run in found:
        folder = run.path / "plots"
        if args.out:
            folder = Path(args.out, run.name) if len(found) > 1 else Path(args.out)
        rate = learning_curves.single(run, learning_curves.LR, figures.shorten(run.name, 60))
        print(figures.save(learning_curves.curves(run), folder / "curves.png"))
        print(figures.save(rate, folder / "lr.png", dpi=160))
        if run.steps:
            print(figures.save(step_curves.curves(run), folder / "steps.png"))
    if len(found) > 1 and args.out:
        compared = learning_curves.compare(found, *learning_curves.COMPARISONS[0], width=9)
        print(figures.save(compared, Path(args.out) / "compare.png"))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
