"""Learning curves: accuracy, loss, learning rate and speed over the epochs, for plots/ and for the report.

Each panel is drawn by one function, so that the PNG and the page show the same picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis import figures
from analysis.runs import RunFiles, phases, series


@dataclass(frozen=True)
class Panel:
    """One chart of a run: its title, its y axis and the columns of metrics.jsonl that it shows."""

    title: str
    unit: str
    columns: dict[str, str]  # column -> label in the legend


RAW, EMA = "validation, raw weights", "validation, EMA weights"
TOP1_LINES = {"train_top1": "training sample, no augmentation", "val_top1": RAW, "ema_val_top1": EMA}
LOSS_LINES = {"train_loss": "training batches", "val_loss": RAW, "ema_val_loss": EMA}
TOP1 = Panel("Top-1 accuracy", "top-1 accuracy (%)", TOP1_LINES)
LOSS = Panel("Loss", "cross-entropy (nats)", LOSS_LINES)
LR = Panel("Learning rate", "rate at the end of the epoch", {"lr": "learning rate"})
SPEED = Panel("Training speed", "images per second", {"images_per_second": "images per second"})
MOST_DOTS = 30  # on a line
STYLES = {"train": (figures.ORANGE, ":"), "val": (figures.BLUE, "--"), "ema": (figures.VERMILLION, "-")}

# Charts of several runs: title, y axis and the column to draw of each run.
COMPARISONS: tuple[tuple[str, str, Callable[[RunFiles], str]], ...] = (
    ("Validation top-1 (EMA weights if kept)", "top-1 accuracy (%)", lambda run: run.score),
    ("Validation loss (same weights)", "cross-entropy (nats)", lambda run: run.score.replace("top1", "loss")),
    ("Loss of the training batches", "loss, as --loss defines it", lambda run: "train_loss"),
    ("Learning rate", "rate at the end of the epoch", lambda run: "lr"),
)


def charts(runs: Sequence[RunFiles]) -> list[Figure]:
    """Draw what a report shows: every panel of one run, or one curve of each of several runs."""
    if len(runs) == 1:
        return [single(runs[0], panel) for panel in (TOP1, LOSS, LR, SPEED)]
    return [compare(runs, *comparison) for comparison in COMPARISONS]


def curves(run: RunFiles) -> Figure:
    """Draw the loss and the accuracy of a run side by side."""
    subject = " on ".join(filter(None, (run.config.get("arch"), run.dataset)))
    fig = figures.figure(
        11, 4.9, f"Learning curves of {figures.shorten(run.name, 60)} {subject and f'({subject})'}"
    )
    for ax, panel in zip(fig.subplots(1, 2), (LOSS, TOP1), strict=True):
        draw(ax, run, panel)
    return fig


def single(run: RunFiles, panel: Panel, title: str = "") -> Figure:
    """Draw one panel of a run."""
    fig = figures.figure(4.6, 3.4 + 0.4 * (len(panel.columns) > 1), title)
    draw(fig.subplots(), run, panel)
    return fig


def draw(ax, run: RunFiles, panel: Panel) -> None:
    """Draw a panel: its columns over the epochs, the phases and, in the accuracy, the best epoch."""
    lines = []
    for column, label in panel.columns.items():
        epochs, values = series(run.rows, column)
        colour, dash = STYLES.get(column.split("_")[0], (figures.BLUE, "-"))
        if epochs:
            style = {"color": colour, "linestyle": dash, "markersize": 3}
            dots = "o" if len(epochs) <= MOST_DOTS else ""  # more would hide the dashes
            own = ax
            if column == "train_loss" and run.config.get("loss") == "bce":
                # It falls from 0.7 to 0.01 or so, beside a cross-entropy of 7.
                own = ax.twinx()
                own.set_ylabel("binary cross-entropy, mean over classes", color=colour)
            lines += own.plot(epochs, values, label=label, marker=dots, **style)
    if panel is TOP1 and run.best:
        label = f"best: {run.best_top1:.2f} % at epoch {run.best['epoch']}"
        star = {"marker": "*", "color": figures.BLACK, "s": 120, "zorder": 5}
        lines.append(ax.scatter(run.best["epoch"], run.best_top1, **star, label=label))
    ax.set(title=panel.title, xlabel="epoch", ylabel=panel.unit)
    first, last = run.rows[0]["epoch"] - 0.5, run.rows[-1]["epoch"] + 0.5
    mark_phases(ax, [(epoch - 0.5, *what) for epoch, *what in phases(run.rows)], first, last)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(panel.columns) > 1 and lines:  # below, where the legend covers nothing
        ax.legend(handles=lines, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)


def mark_phases(
    ax, begins: Sequence[tuple[float, int, int]], first: float, last: float, labels: bool = True
) -> None:
    """Draw a line where each phase begins, with its image size and batch size above the chart.

    begins: (x, image size in px, batch size) of each phase
    first:  the left end of the x axis, and `last` its right end
    """
    ax.set_xlim(first, last)
    # The width of a label as a share of the axis, and where each line of labels ends.
    width, ends = 0.64 / (ax.get_position().width * ax.figure.get_figwidth()), []
    for begin, size, batch in begins:
        if begin > first:
            ax.axvline(begin, color="0.4", linewidth=1, linestyle=(0, (4, 3)))
        if not labels:
            continue
        # A label that would leave the chart is moved to the left, one that would cover another, up.
        left = min((begin - first) / (last - first), 1 - width)
        line = next((k for k, end in enumerate(ends) if end <= left), len(ends))
        ends[line : line + 1] = [left + width]
        place = {"xycoords": "axes fraction", "xytext": (2, 3 + 22 * line), "textcoords": "offset points"}
        ax.annotate(f"{size} px\nbatch {batch}", (left, 1), fontsize=8, color="0.25", **place)
    ax.set_title(ax.get_title(), pad=6 + 22 * len(ends))


def compare(
    runs: Sequence[RunFiles], title: str, unit: str, column_of: Callable[[RunFiles], str], width: float = 4.6
) -> Figure:
    """Draw one column of each run; the legend below gives the best score."""
    columns = int(width // 4)
    fig = figures.figure(width, 0.65 * width + 0.2 * -(-len(runs) // columns))
    ax = fig.subplots()
    for k, run in enumerate(runs):
        epochs, values = series(run.rows, column_of(run))
        best = f" (best {run.best_top1:.2f} %)" if run.best else ""
        label = figures.shorten(run.name, 40) + best
        ax.plot(epochs, values, label=label, marker="o", markersize=3, **figures.line_style(k))
    ax.set(title=title, xlabel="epoch", ylabel=unit)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    fig.legend(loc="outside lower center", ncols=columns)
    return fig
