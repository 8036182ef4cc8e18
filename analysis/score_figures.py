"""Pictures of scores: the confusion matrix and the reliability diagram. A leaf, like `figures`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from analysis import figures

PAIRS = 15  # shown beside the matrix
NAMED = 40  # at most so many classes are named along an axis
CELLS = 250  # along a side; neighbours share a cell where there are more classes
COUNTED = 16  # up to so many classes the cells carry their numbers


def confusion(matrix: np.ndarray, names: Sequence[str], pairs: Sequence, title: str) -> Figure:
    """matrix (K, K) counts by true class, `pairs` the `scores.Pair`s to list beside it; K from 2 to thousands."""
    block = -(-len(names) // CELLS)
    starts = range(0, len(names), block)
    counts = np.add.reduceat(np.add.reduceat(matrix, starts, 0), starts, 1)
    support = counts.sum(1, keepdims=True)
    percent = 100 * np.divide(counts, support, out=np.zeros(counts.shape), where=support > 0)
    made = figures.figure(14, 8.2, title)
    axis, bars = figures.axes(made, 1, 2, width_ratios=(1.75, 1))[0]
    # A square-root scale: mistakes are a few percent, the diagonal is nearly 100.
    image = axis.imshow(percent, cmap=figures.MAP, norm=PowerNorm(0.5, 0, 100), aspect="equal")
    axis.grid(False)
    step = -(-len(starts) // NAMED)
    where = range(0, len(starts), step)
    short = [figures.shorten(names[starts[k]], 16) for k in where]
    axis.set_xticks(where, short, rotation=90, fontsize=8)
    axis.set_yticks(where, short, fontsize=8)
    every = "" if step * block == 1 else f" (one in {step * block} is named)"
    if block > 1:
        axis.set_title(f"{block} × {block} classes in a cell")
    axis.set(xlabel="guess" + every, ylabel="truth" + every)
    if len(names) <= COUNTED:
        _write_counts(axis, matrix, percent)
    made.colorbar(
        image, ax=axis, label="share of the true class (%)", ticks=(0, 1, 5, 10, 25, 50, 75, 100), shrink=0.75
    )
    _list_pairs(bars, names, pairs[:PAIRS])
    return made


def _write_counts(axis, matrix: np.ndarray, percent: np.ndarray) -> None:
    for (row, column), count in np.ndenumerate(matrix):
        if count:
            ink = "black" if percent[row, column] > 30 else "white"
            axis.text(column, row, str(count), ha="center", va="center", fontsize=8, color=ink)


def _list_pairs(axis, names: Sequence[str], pairs: Sequence) -> None:
    axis.set_title("most confused" if pairs else "no mistakes")
    if not pairs:
        axis.axis("off")
        return
    labels = [f"{figures.shorten(names[p.truth], 20)} → {figures.shorten(names[p.guess], 20)}" for p in pairs]
    where = np.arange(len(pairs))
    drawn = axis.barh(where, [100 * pair.share for pair in pairs], color=figures.BLUE)
    axis.bar_label(drawn, [f" {pair.times}×" for pair in pairs], fontsize=8)
    axis.set_yticks(where, labels, fontsize=8)
    axis.set_ylim(max(PAIRS, len(pairs)) - 0.4, -0.6)
    axis.set(xlabel="share of the true class (%)")
    axis.grid(axis="y", visible=False)
    axis.margins(x=0.15)


def reliability(calibration, title: str) -> Figure:
    """Accuracy over confidence, and how often each confidence occurs, of a `scores.Calibration`."""
    made = figures.figure(6.4, 6.6, title)
    top, bottom = figures.axes(made, 2, 1, height_ratios=(3, 1), sharex=True)[:, 0]
    edges = 100 * calibration.edges
    width, left = np.diff(edges), edges[:-1]
    top.bar(
        left,
        100 * np.nan_to_num(calibration.accuracy),
        width,
        align="edge",
        color=figures.SKY,
        edgecolor="white",
        label="accuracy of the guesses",
    )
    seen = calibration.count > 0
    top.plot(
        100 * calibration.confidence[seen],
        100 * calibration.accuracy[seen],
        "o",
        color=figures.BLUE,
        clip_on=False,
        zorder=3,
        label="at their mean confidence",
    )
    top.plot([0, 100], [0, 100], "--", color=figures.BLACK, label="perfectly calibrated")
    top.set(
        ylabel="accuracy (%)",
        ylim=(0, 100),
        xlim=(0, 100),
        title=f"expected calibration error {100 * calibration.ece:.1f} %",
    )
    made.legend(loc="outside lower center", ncols=3, fontsize=8)
    share = 100 * calibration.count / max(1, calibration.count.sum())
    bottom.bar(left, share, width, align="edge", color=figures.ORANGE, edgecolor="white")
    bottom.set(xlabel="confidence: probability of the guess (%)", ylabel="images (%)")
    return made
