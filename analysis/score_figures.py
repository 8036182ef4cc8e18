"""Pictures of scores: the confusion matrix and the reliability diagram."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from analysis import figures
from analysis.scores import Calibration, Pair

MAX_PAIRS = 15  # listed beside the matrix
MAX_NAMES = 40  # along an axis
MAX_CELLS = 250  # along a side; with more classes, neighbours share a cell
MAX_COUNTS = 16  # classes up to which the cells carry their counts


def confusion(matrix: np.ndarray, names: Sequence[str], pairs: Sequence[Pair], title: str) -> Figure:
    """Draw counts (K, K) by true class, with the most confused pairs beside them; K from 2 to thousands.

    Classes that have no images and are never predicted are left out.
    """
    present = np.flatnonzero(matrix.any(0) | matrix.any(1))
    matrix = matrix[np.ix_(present, present)]
    per_cell = -(-len(present) // MAX_CELLS)
    starts = range(0, len(present), per_cell)
    counts = np.add.reduceat(np.add.reduceat(matrix, starts, 0), starts, 1)
    support = counts.sum(1, keepdims=True)
    percent = 100 * np.divide(counts, support, out=np.zeros(counts.shape), where=support > 0)
    fig = figures.figure(14, 8.2, title)
    axis, bars = fig.subplots(1, 2, width_ratios=(1.75, 1))
    # A square-root scale: mistakes are a few percent, the diagonal is nearly 100.
    image = axis.imshow(percent, cmap=figures.MAP, norm=PowerNorm(0.5, 0, 100), aspect="equal")
    axis.grid(False)
    step = -(-len(starts) // MAX_NAMES)
    ticks = range(0, len(starts), step)
    labels = [figures.shorten(names[present[starts[k]]], 16) for k in ticks]
    axis.set_xticks(ticks, labels, rotation=90, fontsize=8)
    axis.set_yticks(ticks, labels, fontsize=8)
    note = "" if step * per_cell == 1 else f" (one class in {step * per_cell} is named)"
    axis.set(xlabel="prediction" + note, ylabel="truth" + note)
    if per_cell > 1:
        axis.set_title(f"{per_cell} × {per_cell} classes per cell")
    if len(present) <= MAX_COUNTS:
        _write_counts(axis, matrix, percent)
    ticks = (0, 1, 5, 10, 25, 50, 75, 100)
    fig.colorbar(image, ax=axis, label="share of the true class (%)", ticks=ticks, shrink=0.75)
    _draw_pairs(bars, names, pairs)
    return fig


def _write_counts(axis, matrix: np.ndarray, percent: np.ndarray) -> None:
    for (row, column), count in np.ndenumerate(matrix):
        if count:
            color = "black" if percent[row, column] > 30 else "white"
            axis.text(column, row, str(count), ha="center", va="center", fontsize=8, color=color)


def _draw_pairs(axis, names: Sequence[str], pairs: Sequence[Pair]) -> None:
    """Draw a bar for each of the most confused pairs; single mistakes are left out, they say little."""
    shown = [pair for pair in pairs if pair.times > 1][:MAX_PAIRS]
    if not shown:
        axis.set_title("no pair was confused twice" if pairs else "no mistakes")
        axis.axis("off")
        return
    axis.set_title("most confused pairs")
    short = [figures.shorten(name, 20) for name in names]
    rows = np.arange(len(shown))
    drawn = axis.barh(rows, [100 * pair.share for pair in shown], color=figures.BLUE)
    axis.bar_label(drawn, [f" {pair.times}×" for pair in shown], fontsize=8)
    axis.set_yticks(rows, [f"{short[pair.truth]} → {short[pair.prediction]}" for pair in shown], fontsize=8)
    axis.set_ylim(MAX_PAIRS - 0.4, -0.6)
    axis.set(xlabel="share of the true class (%)")
    axis.grid(axis="y", visible=False)
    axis.margins(x=0.15)


def reliability(calibration: Calibration, title: str) -> Figure:
    """Draw accuracy over confidence, and how often each confidence occurs."""
    fig = figures.figure(6.4, 6.6, title)
    top, bottom = fig.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    left, width = 100 * calibration.edges[:-1], 100 * np.diff(calibration.edges)
    bars = {"width": width, "align": "edge", "edgecolor": "white"}
    accuracy = 100 * np.nan_to_num(calibration.accuracy)
    top.bar(left, accuracy, color=figures.SKY, label="accuracy of the predictions", **bars)
    used = calibration.count > 0
    points = {"color": figures.BLUE, "clip_on": False, "zorder": 3, "label": "at their mean confidence"}
    top.plot(100 * calibration.confidence[used], accuracy[used], "o", **points)
    top.plot([0, 100], [0, 100], "--", color=figures.BLACK, label="perfect calibration")
    top.set(ylabel="accuracy (%)", xlim=(0, 100), ylim=(0, 100))
    top.set_title(f"expected calibration error {100 * calibration.ece:.1f} %")
    fig.legend(loc="outside lower center", ncols=3, fontsize=8)
    share = 100 * calibration.count / max(1, calibration.count.sum())
    bottom.bar(left, share, color=figures.ORANGE, **bars)
    bottom.set(xlabel="confidence: probability of the predicted class (%)", ylabel="images (%)")
    return fig
