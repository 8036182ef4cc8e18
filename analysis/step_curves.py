"""Curves over the steps of a run, from steps.jsonl: loss, gradient norm, learning rate, speed and waiting.

A long run has more rows than a picture has pixels. They are put into about `BINS` bins: a line goes
through the mean of each bin, and a band from its lowest to its highest row shows every spike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from statistics import median
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator, StrMethodFormatter

from analysis import figures
from analysis.learning_curves import mark_phases
from analysis.runs import RunFiles

BINS = 400  # of a whole run
NOTE = (
    "A point is a row of steps.jsonl, or the mean of several if there are many. The band reaches from the "
    "lowest to the highest of these rows, and for the gradient norm to the largest norm of a single step. "
    "The first steps of an epoch wait for the loader to start. "
)
SMOOTHED = "The smoothed line is the mean of the neighbouring 4 % of the points, within a phase."


@dataclass(frozen=True)
class StepPanel:
    """One chart of a run: its title, its y axis and the column of steps.jsonl that it shows."""

    title: str
    unit: str
    column: str
    highest: str = ""  # the column that the band reaches up to, if it is another one
    log: bool = False
    smooth: bool = False
    height: float = 1.0  # relative to other panels


LOSS = StepPanel("Training loss", "loss (nats)", "train_loss", smooth=True, height=1.8)
NORM = StepPanel(
    "Gradient norm", "norm before clipping", "grad_norm", highest="grad_norm_max", log=True, height=1.5
)
LR = StepPanel("Learning rate by step", "learning rate", "lr")
SPEED = StepPanel("Speed by step", "images per second", "images_per_second")
WAIT = StepPanel("Waiting for data", "waiting (%)", "data_wait_percent")
SCALE = StepPanel("Loss scale", "scale of fp16", "loss_scale", log=True)


def charts(runs: Sequence[RunFiles]) -> list[Figure]:
    """Draw what a report shows: every panel of one run, or loss and norm of several runs."""
    if len(runs) == 1:
        return [single(runs[0], panel) for panel in panels(runs[0])]
    having = {panel: [run for run in runs if panel in panels(run)] for panel in (LOSS, NORM)}
    return [compare(found, panel) for panel, found in having.items() if found]


def panels(run: RunFiles) -> list[StepPanel]:
    """Return the panels for which the run has values."""
    every = (LOSS, NORM, LR, SPEED, WAIT, SCALE)
    return [panel for panel in every if any(row[panel.column] is not None for row in run.steps)]


def curves(run: RunFiles) -> Figure:
    """Draw the panels of a run below each other, over the same steps."""
    shown = panels(run)
    heights = [panel.height for panel in shown]
    fig = figures.figure(11, 1.2 + 1.6 * sum(heights), f"Steps of {figures.shorten(run.name, 60)}")
    grid = fig.subplots(len(shown), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for ax, panel in zip(grid, shown, strict=True):
        draw(ax, run, panel, labels=ax is grid[0])
        ax.set_title("")
        ax.set_xlabel("step" if ax is grid[-1] else "")
    fig.align_ylabels()
    return fig


def single(run: RunFiles, panel: StepPanel) -> Figure:
    """Draw one panel of a run."""
    fig = figures.figure(4.6, 3.4)
    draw(fig.subplots(), run, panel)
    return fig


def draw(ax, run: RunFiles, panel: StepPanel, labels: bool = True) -> None:
    """Draw a panel: its column over the steps, and the phases, with `labels` or without."""
    points = binned(run.steps, panel)
    smooth = panel.smooth and not np.array_equal(points.smooth, points.mean)
    colour = figures.SKY if smooth else figures.BLUE
    steps = f"{median(b - a for a, b in pairwise([0, *points.step])):,.0f} steps"
    ax.plot(points.step, points.mean, label=f"mean of {steps}", color=colour, linewidth=1)
    if np.any(points.highest > points.lowest):
        band = {"color": colour, "alpha": 0.25, "linewidth": 0, "label": "lowest to highest"}
        ax.fill_between(points.step, points.lowest, points.highest, **band)
    if smooth:
        ax.plot(points.step, points.smooth, label="smoothed", color=figures.VERMILLION, linewidth=1.4)
    last = run.steps[-1]["step"]
    if panel is NORM:
        mark_clipping(ax, run, last)
    label(ax, panel)
    mark_phases(ax, phases(run.steps), 0, last, labels)
    if panel in (LOSS, NORM):
        ax.margins(y=0.2 if panel is NORM else 0.05)  # room for the legend: a loss falls by itself
        ax.legend(loc="upper right", ncols=2)


class Points(NamedTuple):
    """What is drawn of a column: arrays of equal length, one value for each bin."""

    step: np.ndarray  # the last of the bin
    mean: np.ndarray
    lowest: np.ndarray
    highest: np.ndarray
    smooth: np.ndarray  # the mean, smoothed within its phase


def binned(rows: Sequence[dict], panel: StepPanel) -> Points:
    """Return a column of `rows` in about `BINS` bins of consecutive rows of one phase; without empty ones."""
    size, reach = -(-len(rows) // BINS), min(len(rows), BINS) // 50
    found = []
    for _, group in groupby(rows, key=sizes_of):
        phase, bins = list(group), []
        for part in np.array_split(np.array(phase), -(-len(phase) // size)):
            values = [row[panel.column] for row in part if row[panel.column] is not None]
            highest = [row[panel.highest or panel.column] or 0 for row in part]
            if values:
                mean, lowest = sum(values) / len(values), min(values)
                bins.append((part[-1]["step"], mean, lowest, max(*values, *highest)))
        if bins:
            columns = np.array(bins).T
            found.append(np.vstack([columns, smoothed(columns[1], reach)]))
    return Points(*np.hstack(found))


def smoothed(values: np.ndarray, reach: int) -> np.ndarray:
    """Return the mean of each value and its neighbours, `reach` on either side; fewer at the ends."""
    last = len(values) - 1
    sides = [min(reach, k, last - k) for k in range(len(values))]  # the same on both, or a slope is biased
    return np.array([values[k - side : k + side + 1].mean() for k, side in enumerate(sides)])


def sizes_of(row: dict) -> tuple:
    return row["image_size"], row["batch_size"]


def phases(rows: Sequence[dict]) -> list[tuple[int, int, int]]:
    """Return (step before its first, image size in px, batch size) of every phase."""
    ends = [k for k, (a, b) in enumerate(pairwise(rows), 1) if sizes_of(a) != sizes_of(b)]
    return [(rows[k - 1]["step"] if k else 0, *sizes_of(rows[k])) for k in (0, *ends)]


def mark_clipping(ax, run: RunFiles, last: int) -> None:
    """Draw the limit of the norm, and where steps were skipped."""
    limit = run.config.get("clip_norm") if run.config.get("clip_mode") == "norm" else None
    if isinstance(limit, int | float) and 0 < limit < math.inf:
        style = {"color": figures.VERMILLION, "linestyle": "--", "linewidth": 1.2}
        ax.hlines(limit, 0, last, label=f"clipped to {limit:g}", **style)
    if skipped := [row["step"] for row in run.steps if row["bad_steps"]]:
        style = {"marker": "x", "s": 18, "color": figures.BLACK, "transform": ax.get_xaxis_transform()}
        ax.scatter(skipped, [0.04] * len(skipped), label="skipped steps", zorder=5, **style)


def label(ax, panel: StepPanel, title: str = "") -> None:
    """Name the axes and write whole steps, and powers of ten as numbers, along them."""
    ax.set(title=title or panel.title, xlabel="step", ylabel=panel.unit)
    if panel.log:
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(LogFormatter())
        ax.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def compare(runs: Sequence[RunFiles], panel: StepPanel) -> Figure:
    """Draw one panel's smoothed column of each run."""
    fig = figures.figure(4.6, 3.0 + 0.2 * len(runs))
    ax = fig.subplots()
    for k, run in enumerate(runs):
        points = binned(run.steps, panel)
        ax.plot(points.step, points.smooth, label=figures.shorten(run.name, 40), **figures.line_style(k))
    label(ax, panel, f"{panel.title}, smoothed")
    fig.legend(loc="outside lower center")
    return fig
