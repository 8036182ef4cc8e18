"""Learning curves and the learning rate of a run, drawn from its files.

`train.py --plot` calls this after every epoch, in a process of its own. Pictures of a model are made
by the other commands of this folder.
"""

from __future__ import annotations

import sys
from pathlib import Path

import flags
from errors import DataError, run

EPILOG = """examples:
  python -m analysis.plots checkpoints/                       checkpoints/plots/curves.png and lr.png
  python -m analysis.plots runs/a runs/b --out pictures       a folder for each run, and compare.png"""


def build_parser() -> flags.Parser:
    parser = flags.build_parser("-m analysis.plots", "Draw the learning curves of one or more runs.", EPILOG)
    parser.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="a directory that train.py wrote")
    parser.add_argument("--out", default="", metavar="DIR", help="where to; default: RUN_DIR/plots")
    parser.add_argument("--debug", action="store_true", help="tracebacks for errors")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    from analysis import figures
    from metrics import read_metrics

    runs = {}
    for run_dir in map(Path, args.run_dirs):
        runs[run_dir] = read_metrics(run_dir)
        if not runs[run_dir]:
            raise DataError(f"{run_dir / 'metrics.jsonl'} has no epoch yet", "wait for the first epoch to end")
    names = run_names(list(runs))
    for run_dir, rows in runs.items():
        folder = (Path(args.out) / (names[run_dir] if len(runs) > 1 else "")) if args.out else run_dir / "plots"
        for name, draw in (("curves.png", curves), ("lr.png", learning_rate)):
            print(figures.save(draw(rows, names[run_dir]), folder / name))
    if len(runs) > 1 and args.out:
        compared = compare({names[run_dir]: rows for run_dir, rows in runs.items()})
        print(figures.save(compared, Path(args.out) / "compare.png"))
    return 0


def run_names(run_dirs: list[Path]) -> dict[Path, str]:
    """A short name for each run: its folder's, with as much of the path as tells all of them apart."""
    parts = {path: path.resolve().parts for path in run_dirs}
    for depth in range(1, max(map(len, parts.values())) + 1):
        names = {path: "-".join(part[-depth:]) for path, part in parts.items()}
        if len(set(names.values())) == len(names):
            break
    return names


def series(rows: list[dict], name: str) -> tuple[list[int], list[float]]:
    """Epochs and values of one column, where it has any: validation may run every few epochs only."""
    pairs = [(row["epoch"], row[name]) for row in rows if row.get(name) is not None]
    return [epoch for epoch, _ in pairs], [value for _, value in pairs]


def best_row(rows: list[dict]) -> dict | None:
    """The row of the best checkpoint; None while there is none."""
    return next((row for row in reversed(rows) if row.get("best")), None)


def best_score(row: dict) -> float | None:
    """The top-1 (percent) that made it the best: the EMA's where the run keeps one."""
    return row["val_top1"] if row.get("ema_val_top1") is None else row["ema_val_top1"]


def phases(rows: list[dict]) -> list[tuple[int, int, int]]:
    """(first epoch, image size in px, batch size) of every phase that has begun."""
    found: list[tuple[int, int, int]] = []
    for row in rows:
        if not found or found[-1][1:] != (row["image_size"], row["batch_size"]):
            found.append((row["epoch"], row["image_size"], row["batch_size"]))
    return found


def curves(rows: list[dict], name: str):
    """Loss and top-1 over the epochs: training, raw weights, averaged weights."""
    from analysis import figures

    made = figures.figure(11, 4.6, f"Learning curves of {figures.shorten(name, 60)}")
    loss, top1 = figures.axes(made, 1, 2)[0]
    mark = {"marker": "o", "markersize": 3}
    for axis, kinds in (
        (loss, (("train_loss", "training, mixed targets", figures.ORANGE, ":"),
                ("val_loss", "validation, raw weights", figures.BLUE, "--"),
                ("ema_val_loss", "validation, EMA weights", figures.VERMILLION, "-"))),
        (top1, (("train_top1", "training sample, no augmentation", figures.ORANGE, ":"),
                ("val_top1", "validation, raw weights", figures.BLUE, "--"),
                ("ema_val_top1", "validation, EMA weights", figures.VERMILLION, "-"))),
    ):  # fmt: skip
        for column, label, colour, dash in kinds:
            epochs, values = series(rows, column)
            if epochs:
                axis.plot(epochs, values, dash, color=colour, label=label, **mark)
        mark_phases(axis, rows)
        axis.set_xlabel("epoch")
    loss.set(ylabel="cross-entropy (nats)", title="Loss")
    top1.set(ylabel="top-1 accuracy (%)", title="Top-1")
    mark_best(top1, rows)
    loss.legend(fontsize=8, loc="lower left")
    top1.legend(fontsize=8, loc="lower right")
    return made


def mark_phases(axis, rows: list[dict]) -> None:
    """A line where each phase begins, and its image and batch size along the top."""
    from matplotlib.ticker import MaxNLocator

    first_epoch, last_epoch, found = rows[0]["epoch"], rows[-1]["epoch"], phases(rows)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlim(first_epoch - 0.5, last_epoch + 0.5)
    axis.margins(y=0.14)
    ends = [first for first, _, _ in found[1:]] + [last_epoch + 1]
    for (first, size, batch), end in zip(found, ends, strict=True):
        if first > first_epoch:
            axis.axvline(first - 0.5, color="0.4", linewidth=1, linestyle=(0, (4, 3)))
        narrow = (end - first) / (last_epoch + 1 - first_epoch) < 0.13
        axis.annotate(f"{size} px, batch {batch}" if narrow else f"{size} px\nbatch {batch}", (first - 0.5, 1),
                      xycoords=("data", "axes fraction"), xytext=(3, -1), textcoords="offset points", fontsize=7,
                      va="top", color="0.25", rotation=90 if narrow else 0)  # fmt: skip


def mark_best(axis, rows: list[dict]) -> None:
    from analysis import figures

    row = best_row(rows)
    if row is None:
        return
    score = best_score(row)
    axis.plot([row["epoch"]], [score], "*", color=figures.BLACK, markersize=12, zorder=5,
              label=f"best: {score:.2f} % at epoch {row['epoch']}")  # fmt: skip


def learning_rate(rows: list[dict], name: str):
    """The learning rate at the end of each epoch."""
    from analysis import figures

    made = figures.figure(7, 3.8)
    axis = figures.axes(made, 1, 1)[0, 0]
    epochs, values = series(rows, "lr")
    axis.plot(epochs, values, "o-", color=figures.BLUE, markersize=3)
    mark_phases(axis, rows)
    axis.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))
    axis.set(xlabel="epoch", ylabel="learning rate at the end of the epoch",
             title=f"Learning rate of {figures.shorten(name, 60)}")  # fmt: skip
    return made


def compare(runs: dict[str, list[dict]]):
    """Validation top-1 of several runs in one picture."""
    from analysis import figures

    made = figures.figure(9, 5)
    axis = figures.axes(made, 1, 1)[0, 0]
    for k, (name, rows) in enumerate(runs.items()):
        column = "ema_val_top1" if series(rows, "ema_val_top1")[0] else "val_top1"
        epochs, values = series(rows, column)
        row = best_row(rows)
        label = figures.shorten(name, 40) + (f" (best {best_score(row):.2f} %)" if row else "")
        axis.plot(epochs, values, linewidth=1.8, label=label, **figures.line_style(k))
    axis.set(xlabel="epoch", ylabel="top-1 accuracy (%)", title="Validation top-1 (EMA weights where a run keeps them)")
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return made


if __name__ == "__main__":
    sys.exit(run(main))
