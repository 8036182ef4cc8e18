"""Learning curves and the learning rate of a run, drawn from its files.

`train.py --plot` calls this after every epoch, in a process of its own. Pictures of a model are made
by the other commands of this folder.
"""

from __future__ import annotations

import sys
from pathlib import Path

from base import flags
from base.errors import run

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
    from analysis.runs import read_runs

    runs = read_runs(args.run_dirs)
    for run_files in runs:
        folder = (
            (Path(args.out) / (run_files.name if len(runs) > 1 else ""))
            if args.out
            else run_files.path / "plots"
        )
        for name, draw in (("curves.png", curves), ("lr.png", learning_rate)):
            print(figures.save(draw(run_files), folder / name))
    if len(runs) > 1 and args.out:
        print(figures.save(compare(runs), Path(args.out) / "compare.png"))
    return 0


def curves(run_files):
    """Loss and top-1 over the epochs: training, raw weights, averaged weights."""
    from analysis import figures
    from analysis.runs import series

    made = figures.figure(11, 4.6, f"Learning curves of {figures.shorten(run_files.name, 60)}")
    loss, top1 = figures.axes(made, 1, 2)[0]
    mark = {"marker": "o", "markersize": 3}
    for axis, kinds in (
        (
            loss,
            (
                ("train_loss", "training, mixed targets", figures.ORANGE, ":"),
                ("val_loss", "validation, raw weights", figures.BLUE, "--"),
                ("ema_val_loss", "validation, EMA weights", figures.VERMILLION, "-"),
            ),
        ),
        (
            top1,
            (
                ("train_top1", "training sample, no augmentation", figures.ORANGE, ":"),
                ("val_top1", "validation, raw weights", figures.BLUE, "--"),
                ("ema_val_top1", "validation, EMA weights", figures.VERMILLION, "-"),
            ),
        ),
    ):
        for column, label, colour, dash in kinds:
            epochs, values = series(run_files.rows, column)
            if epochs:
                axis.plot(epochs, values, dash, color=colour, label=label, **mark)
        mark_phases(axis, run_files.rows)
        axis.set_xlabel("epoch")
    loss.set(ylabel="cross-entropy (nats)", title="Loss")
    top1.set(ylabel="top-1 accuracy (%)", title="Top-1")
    mark_best(top1, run_files)
    loss.legend(fontsize=8, loc="lower left")
    top1.legend(fontsize=8, loc="lower right")
    return made


def mark_phases(axis, rows: list[dict]) -> None:
    """A line where each phase begins, and its image and batch size along the top."""
    from matplotlib.ticker import MaxNLocator

    from analysis.runs import phases

    first_epoch, last_epoch, found = rows[0]["epoch"], rows[-1]["epoch"], phases(rows)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlim(first_epoch - 0.5, last_epoch + 0.5)
    axis.margins(y=0.14)
    ends = [first for first, _, _ in found[1:]] + [last_epoch + 1]
    for (first, size, batch), end in zip(found, ends, strict=True):
        if first > first_epoch:
            axis.axvline(first - 0.5, color="0.4", linewidth=1, linestyle=(0, (4, 3)))
        narrow = (end - first) / (last_epoch + 1 - first_epoch) < 0.13
        axis.annotate(
            f"{size} px, batch {batch}" if narrow else f"{size} px\nbatch {batch}",
            (first - 0.5, 1),
            xycoords=("data", "axes fraction"),
            xytext=(3, -1),
            textcoords="offset points",
            fontsize=7,
            va="top",
            color="0.25",
            rotation=90 if narrow else 0,
        )


def mark_best(axis, run_files) -> None:
    from analysis import figures

    if run_files.best is None:
        return
    score, epoch = run_files.best_top1, run_files.best["epoch"]
    axis.plot(
        [epoch],
        [score],
        "*",
        color=figures.BLACK,
        markersize=12,
        zorder=5,
        label=f"best: {score:.2f} % at epoch {epoch}",
    )


def learning_rate(run_files):
    """The learning rate at the end of each epoch."""
    from analysis import figures
    from analysis.runs import series

    made = figures.figure(7, 3.8)
    axis = figures.axes(made, 1, 1)[0, 0]
    axis.plot(*series(run_files.rows, "lr"), "o-", color=figures.BLUE, markersize=3)
    mark_phases(axis, run_files.rows)
    axis.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))
    axis.set(
        xlabel="epoch",
        ylabel="learning rate at the end of the epoch",
        title=f"Learning rate of {figures.shorten(run_files.name, 60)}",
    )
    return made


def compare(runs):
    """Validation top-1 of several runs in one picture."""
    from analysis import figures
    from analysis.runs import series

    made = figures.figure(9, 5)
    axis = figures.axes(made, 1, 1)[0, 0]
    for k, run_files in enumerate(runs):
        epochs, values = series(run_files.rows, run_files.score)
        best = f" (best {run_files.best_top1:.2f} %)" if run_files.best else ""
        label = figures.shorten(run_files.name, 40) + best
        axis.plot(epochs, values, linewidth=1.8, label=label, **figures.line_style(k))
    axis.set(
        xlabel="epoch",
        ylabel="top-1 accuracy (%)",
        title="Validation top-1 (EMA weights where a run keeps them)",
    )
    axis.locator_params(axis="x", integer=True)
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return made


if __name__ == "__main__":
    sys.exit(run(main))
