"""Write report_card.md: what a run reached, what it cost and how to repeat it, or the mean of its seeds."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

from base import files, flags
from base.errors import UsageError, run
from base.progress import duration

EPILOG = """examples:
  python -m analysis.report_card checkpoints/ --gpu-price 2.50
  python -m analysis.report_card runs/seed0 runs/seed1 runs/seed2 --out report_card.md"""
NOTE = """Accuracy of the best epoch, in validation during training. Time of all epochs with their validation,
without start-up and without the steps that a kill lost; price: {cost}."""
COLUMNS = ("run", "seed", "epochs", "raw top-1 %", "EMA top-1 %", "time", "GPU hours", "price")


def build_parser() -> flags.Parser:
    parser = flags.build_parser(
        "-m analysis.report_card", "Write the card of a run, or of its seeds.", EPILOG
    )
    add = parser.add_argument
    add("run_dirs", nargs="+", metavar="RUN_DIR", help="Directory that train.py wrote.")
    add("--out", default="", metavar="FILE", help="File to write; by default report_card.md in the RUN_DIR.")
    price = "Price of one GPU for an hour."
    add("--gpu-price", type=flags.from_zero, default=None, metavar="RATE", help=price)
    flags.DEBUG.add_to(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if len(args.run_dirs) > 1 and not args.out:
        raise UsageError("a card of several runs needs a file to write to", "give --out FILE.md")
    if args.out:
        files.check_output(args.out, "--out")
    from analysis import runs

    text = card(runs.read_runs(args.run_dirs), args.gpu_price)
    out = files.followed(args.out) or Path(args.run_dirs[0], "report_card.md")
    print(files.write(out, text))
    return 0


def card(runs: list, price: float | None) -> str:
    """Return Markdown about `runs` (RunFiles), which differ in their seeds; `price` is that of a GPU hour.

    Raises UsageError if they differ in another flag: their mean would mean nothing.
    """
    from analysis.runs import command, differing_data

    for other in runs[1:]:
        names = sorted((runs[0].config.keys() | other.config.keys()) - flags.SAME_TRAINING - {"seed"})
        differ = [flags.dashed(name) for name in names if runs[0].config.get(name) != other.config.get(name)]
        differ += differing_data([runs[0], other])
        if differ:
            what = f"{other.name} and {runs[0].name} differ in {', '.join(differ)}"
            raise UsageError(what, "give the runs of one training, which differ in --seed only")
    seeds = [run.config["seed"] for run in runs if "seed" in run.config]
    if len(set(seeds)) < len(seeds):
        raise UsageError("two of the runs have the same --seed", "give runs of one training with other seeds")
    config, env = runs[0].config, runs[0].env
    rows = [row(run, price) for run in runs]
    cost = "not given" if price is None else f"{price:g} for a GPU hour"
    how = {
        "hardware": f"{env.get('world_size', 1)} x {env.get('device', '?')}, {env.get('precision', '?')}",
        "cores": env.get("cores", "?"),
        "torch": env.get("torch", "?"),
        "CUDA": env.get("cuda") or "none",
        "commit": env.get("commit") or "unknown",
        "images": f"{env.get('num_train', 0):,} + {env.get('num_val', 0):,}",
        "classes": f"{env.get('num_classes', 0):,}",
    }
    parts = [
        f"# {config.get('arch', 'a network')} on {runs[0].dataset or 'unknown data'}",
        files.markdown_table(COLUMNS, rows + ([mean_of(rows)] if len(rows) > 1 else [])),
        NOTE.format(cost=cost),
        *filter(None, map(validation, runs)),
        "## How",
        "\n".join(f"- {name}: {value}" for name, value in how.items()),
        *(f"```\n{command(run.config)}\n```" for run in runs),
    ]
    return "\n\n".join(parts) + "\n"


def row(run, price: float | None) -> list[str]:
    best, config = run.best or {}, run.config
    gpu_hours = run.hours * run.env.get("world_size", 1) if run.env.get("cuda") else 0.0
    top1 = [best.get(column) for column in ("val_top1", "ema_val_top1")]
    return [
        run.name,
        str(config.get("seed", "?")),
        f"{len(run.rows)} of {config.get('epochs', '?')}",
        *("-" if value is None else f"{value:.2f}" for value in top1),
        duration(3600 * run.hours),
        f"{gpu_hours:.2f}",
        "-" if price is None else f"{price * gpu_hours:.2f}",
    ]


def mean_of(rows: list[list[str]]) -> list[str]:
    """Return the row with mean ± standard deviation of the accuracies, and the sum of the costs."""
    columns = list(zip(*rows, strict=True))
    known = [[float(value) for value in column if value != "-"] for column in columns[3:5] + columns[6:]]
    means = [
        f"{statistics.mean(v):.2f} ± {statistics.stdev(v):.2f}" if len(v) > 1 else "-" for v in known[:2]
    ]
    sums = [f"{sum(values):.2f}" if values else "-" for values in known[2:]]
    return [f"mean ± s.d., sum of {len(rows)}", "", "", *means, "", *sums]


def validation(run) -> str:
    """Return the table that validate.py wrote, which may hold several image sizes; '' without one."""
    from analysis.runs import VALIDATED, validated

    if not (scores := run.validation):
        return ""
    of = f"{scores.get('checkpoint', 'a checkpoint')} of {run.name}"
    table = files.markdown_table(tuple(VALIDATED.values()), validated(scores))
    return f"Validation of {of} by validate.py:\n\n{table}"


if __name__ == "__main__":
    sys.exit(run(main))
