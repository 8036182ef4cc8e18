"""The pictures of a report: curves over the epochs, differences with intervals, heat maps of a grid."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np

from ablation_runs import results
from ablation_runs.results import Result
from ablation_runs.statistics import ALPHA, BETTER, EXPLORATORY, WORSE, p_value
from ablation_runs.study import Study
from analysis import figures
from base.flags import dashed

NAMES = ("curves", "learning_rates", "differences", "effects", "heat_maps")  # of the pictures, in order
LABELS = {
    "val_top1": "top-1 (%), raw weights",
    "ema_val_top1": "top-1 (%), EMA weights",
    "lr": "learning rate at the end of the epoch",
}


def draw(
    runs: list[Result], study: Study, preset: str, out: Path, formats: Sequence[str] = ("png",)
) -> list[Path]:
    """Write those pictures for which there are enough runs, in each format; return the paths of the first."""
    title = textwrap.fill(study.title(preset).replace("`", ""), 80)
    pictures = {"curves": curves(runs, study, study.metric, title)}
    if any({"lr", "schedule"} & flags.keys() for flags in study.variants.values()):
        pictures["learning_rates"] = curves(runs, study, "lr", title)
    pictures["differences"] = differences(runs, study, title)
    pictures["effects"] = effects(runs, study, title)
    pictures["heat_maps"] = heat_maps(runs, study, title)
    written = [
        [figures.save(picture, out / f"{name}.{kind}") for kind in formats]
        for name, picture in pictures.items()
        if picture
    ]
    return [first for first, *_ in written]


def curves(runs: list[Result], study: Study, column: str, title: str):
    """Draw a panel per variant with all variants in grey, or, for a grid, a panel per flag."""
    means = [curve(results.of_variant(runs, variant), column) for variant in study.variants]
    panels = {name: lines for name, lines in panel_lines(runs, study).items() if any(lines.values())}
    if not any(means) or not panels:
        return None
    chance = results.chance(runs) if column != "lr" else None
    rows = math.ceil(len(panels) / 4)
    columns = math.ceil(len(panels) / rows)
    fig = figures.figure(max(7, 2.8 * columns), 1.4 + 2.2 * rows, title)
    axes = fig.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axis, (name, lines) in zip(axes.flat, panels.items(), strict=False):
        for k, (epochs, mean, _, _) in enumerate(filter(None, means)):
            # Behind its own curve, each variant sees the baseline, black, and the others.
            first = k == 0 and not study.grid
            style = {"color": figures.BLACK, "lw": 1.2, "ls": "--"} if first else {"color": "0.8", "lw": 1}
            axis.plot(epochs, mean, zorder=2 if first else 1, **style)
        draw_lines(axis, lines, column)
        axis.set_title(name, fontsize=9)
        if chance:
            axis.axhline(chance, color=figures.BLACK, lw=1, ls=":")
    for axis in axes.flat[len(panels) - columns : len(panels)]:  # the lowest panel of each column
        axis.tick_params(labelbottom=True)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    axes[0, 0].locator_params(axis="x", integer=True)
    if column == "lr" and wide_range(means):
        axes[0, 0].set_yscale("log")
    words = {
        "grey: all variants" if study.grid else "grey: the other variants": len(means) > 1,
        f"dashed: {next(iter(study.variants))}": len(means) > 1 and not study.grid,
        "band: lowest to highest seed": not study.grid,
        "dotted: chance": bool(chance),
        "a run that stopped early keeps its last score": column != "lr" and stopped_early(runs),
    }
    key = textwrap.fill("; ".join(text for text, shown in words.items() if shown), 90)
    fig.supxlabel(f"epoch\n{key}", fontsize=9)
    held = "" if column == "lr" else "held-out " if any(run.held_out for run in runs) else "validation "
    fig.supylabel(held + LABELS[column], fontsize=9)
    return fig


def stopped_early(runs: list[Result]) -> bool:
    """Return whether a finished run has fewer epochs than another of its variant."""
    ends = {(run.variant, len(run.rows)) for run in runs if run.status == "done"}
    return len(ends) > len({variant for variant, _ in ends})


def wide_range(curves: list[tuple | None]) -> bool:
    """Return whether the highest values of the curves differ by a factor of ten or more."""
    peaks = [mean.max() for _, mean, _, _ in filter(None, curves)]
    return min(peaks) > 0 and max(peaks) >= 10 * min(peaks)


def panel_lines(runs: list[Result], study: Study) -> dict[str, dict[str, list[Result]]]:
    """Return {title of a panel: {label of a line: its runs}}."""
    if not study.grid:
        return {variant: {variant: results.of_variant(runs, variant)} for variant in study.variants}
    panels = {flag: {value: [] for value in study.grid_values(flag)} for flag in study.grid}
    for run in [run for run in runs if run.status == "done"]:
        for flag, lines in panels.items():
            lines[study.variants[run.variant][flag]].append(run)
    return {dashed(flag): lines for flag, lines in panels.items()}


def curve(runs: list[Result], column: str) -> tuple[np.ndarray, ...] | None:
    """Return epochs, and the mean, lowest and highest value of the finished runs in each; or None.

    A run that early stopping ended keeps its last score, but no learning rate.
    """
    begun = [run for run in runs if run.rows]
    chosen = [run for run in begun if run.status == "done"] or begun
    # None, in an epoch without validation, becomes NaN.
    series = [np.array([row.get(column) for row in run.rows], float) for run in chosen]
    epochs = max(map(len, series), default=0)
    values = np.full((len(series), epochs), np.nan)
    for row, own in zip(values, series, strict=True):
        row[: len(own)] = own
        row[len(own) :] = np.nan if column == "lr" else own[-1]
    known = np.isfinite(values)
    shown = np.flatnonzero(known.any(0) if column == "lr" else known.all(0))
    if not len(shown):
        return None
    values = values[:, shown]
    return shown + 1, np.nanmean(values, 0), np.nanmin(values, 0), np.nanmax(values, 0)


def draw_lines(axis, lines: dict[str, list[Result]], column: str) -> None:
    for k, (label, runs) in enumerate(lines.items()):
        if found := curve(runs, column):
            epochs, mean, low, high = found
            color = figures.LINES[k % len(figures.LINES)]
            axis.plot(epochs, mean, "o-", color=color, markersize=3, label=label)
            if len(lines) == 1:
                axis.fill_between(epochs, low, high, color=color, alpha=0.2, lw=0)
    if len(lines) > 1:
        axis.legend(fontsize=8)


def differences(runs: list[Result], study: Study, title: str):
    """Draw each variant's paired difference to the baseline with its intervals; None for a grid."""
    found = {} if study.grid else results.compare(runs, study, study.metric)
    if not found:
        return None
    fig = figures.figure(7.5 + 0.06 * max(map(len, found)), 2.2 + 0.36 * len(found), title)
    axis = fig.subplots()
    for k, (variant, d) in enumerate(found.items()):
        if both := results.seeds_and_images(runs, study, variant):
            axis.plot(both, [k, k], color=figures.SKY, lw=1.2)
        if d.interval:
            axis.plot(d.interval, [k, k], color=figures.BLUE, lw=3.5, solid_capstyle="butt")
        fill = figures.BLUE if d.verdict in (BETTER, WORSE) else "white"
        axis.plot(d.mean, k, "o", color=figures.BLUE, markerfacecolor=fill, markersize=7)
    axis.axvline(0, color=figures.BLACK, lw=1)
    axis.set_yticks(range(len(found)), [*found])
    axis.set_ylim(len(found) - 0.5, -0.5)
    for place, text, side in ((0, "← worse", "left"), (1, "better →", "right")):
        axis.text(place, 1.02, text, transform=axis.transAxes, ha=side, fontsize=9, color="0.3")
    score = LABELS[study.metric].replace(" (%)", "")
    axis.set_xlabel(
        f"difference from {next(iter(study.variants))}, points of {score}\n"
        "thick: 95 % interval over seeds; thin: over seeds and images; filled: better or worse",
        fontsize=9,
    )
    return fig


def overview(studies: Sequence[tuple[Study, list[Result]]], reach: float = 17):
    """Draw the differences of all studies to their baselines, on one scale that ends at ± `reach` points."""
    found = [(study, results.compare(runs, study, study.metric)) for study, runs in studies if study.primary]
    fig = figures.figure(8, 1.2 + 0.24 * sum(len(compared) + 1.4 for _, compared in found))
    axis, place, variants = fig.subplots(), 0.0, {}
    for study, compared in found:
        weights = " (EMA weights)" * study.metric.startswith("ema")
        heading = f" {study.name}: difference from {next(iter(study.variants))}{weights}"
        axis.text(-reach, place, heading, weight="bold", fontsize=9, va="center")
        for variant, d in compared.items():
            place += 1
            variants[place] = variant
            color = {BETTER: figures.GREEN, WORSE: figures.VERMILLION}.get(d.verdict, "0.6")
            first, last = d.interval or (d.mean, d.mean)
            low, mean, high = np.clip([first, d.mean, last], -reach, reach)
            axis.plot([low, high], [place, place], color=color, lw=3.5, solid_capstyle="butt")
            for end, cut, arrow in ((low, first < low, "<"), (high, last > high, ">")):
                if cut and mean == d.mean:
                    axis.plot(end, place, arrow, color=color, markersize=5, clip_on=False)
            mark = "o" if mean == d.mean else "<" if d.mean < 0 else ">"
            fill = "white" if d.verdict == EXPLORATORY else color
            axis.plot(mean, place, mark, color=color, markerfacecolor=fill, markersize=6, clip_on=False)
            text = {"transform": axis.get_yaxis_transform(), "fontsize": 9, "va": "center"}
            axis.text(1.02, place, f"{d.mean:+.1f}", **text)
        place += 1.4
    axis.axvline(0, color=figures.BLACK, lw=1)
    axis.set_yticks([*variants], [*variants.values()], fontsize=9)
    axis.set(xlim=(-reach, reach), ylim=(place - 0.8, -0.8))
    axis.grid(False, axis="y")
    axis.set_xlabel(
        "difference of the top-1 accuracies, in points, with 95 % interval over seeds\n"
        "green: better; red: worse; grey: undecided; hollow: not a planned comparison; arrow: goes on",
        fontsize=9,
    )
    return fig


def effects(runs: list[Result], study: Study, title: str):
    """Draw a grid's flags from the strongest to the weakest: the mean score at each of their values."""
    ranked = results.effects(runs, study, study.metric)
    if not ranked:
        return None
    fig = figures.figure(7.5, 1.9 + 0.75 * len(ranked), f"{title}\nmain effects, the strongest first")
    axis = fig.subplots()
    names = []
    for k, effect in enumerate(ranked):
        decided = effect.p is not None and effect.p <= ALPHA
        names.append(dashed(effect.flag) + ("" if effect.p is None else f"\np {p_value(effect.p)}"))
        means = sorted(effect.means.values())
        fill = figures.BLUE if decided else "white"
        style = {"color": figures.BLUE, "markerfacecolor": fill, "markersize": 8}
        axis.plot(means, [k] * len(means), "o-", lw=2, **style)
        # Neighbours may be close: their labels take turns above and below the line, or share one.
        for j, group in enumerate(neighbours(means, ranked[0].span / 50)):
            shift = {"xytext": (0, 9 if j % 2 == 0 else -17), "textcoords": "offset points"}
            label = ", ".join(value for value, mean in effect.means.items() if mean in group)
            axis.annotate(label, (np.mean(group), k), ha="center", fontsize=8, **shift)
    axis.set_yticks(range(len(ranked)), names)
    axis.set_ylim(len(ranked) - 0.4, -0.6)
    axis.margins(x=0.08)
    axis.set_xlabel(f"mean {LABELS[study.metric]} (better →)\nfilled: beyond the noise", fontsize=9)
    return fig


def neighbours(ascending: list[float], reach: float) -> list[list[float]]:
    """Group numbers, each at most `reach` above the one before."""
    groups: list[list[float]] = []
    for number in ascending:
        if groups and number - groups[-1][-1] <= reach:
            groups[-1].append(number)
        else:
            groups.append([number])
    return groups


def heat_maps(runs: list[Result], study: Study, title: str):
    """Draw the mean score over every two flags of a grid, on one colour scale."""
    scores = results.grid_scores(runs, study, study.metric).mean(axis=-1) if study.grid else np.ma.array([])
    if not scores.count():
        return None
    pairs = list(combinations(range(len(study.grid)), 2))
    maps = [scores.mean(axis=tuple(set(range(scores.ndim)) - {*pair})) for pair in pairs]
    low, high = min(map(np.min, maps)), max(map(np.max, maps))
    title = f"{title}\nlast epoch, mean over seeds and the other flags"
    fig = figures.figure(1.5 + 3.2 * len(pairs), 3.6, title)
    axes = fig.subplots(1, len(pairs), squeeze=False)[0]
    for axis, pair, scores in zip(axes, pairs, maps, strict=True):
        down, across = (study.grid[k] for k in pair)
        image = axis.imshow(scores, cmap=figures.MAP, vmin=low, vmax=high, aspect="auto")
        axis.set(xlabel=dashed(across), ylabel=dashed(down))
        axis.set_xticks(range(scores.shape[1]), study.grid_values(across))
        axis.set_yticks(range(scores.shape[0]), study.grid_values(down))
        axis.grid(False)
        for (row, column), score in np.ndenumerate(scores):
            ink = "white" if score < (low + high) / 2 else "black"  # low values are dark in this colour map
            text = "" if np.ma.is_masked(score) else f"{score:.1f}"
            axis.text(column, row, text, ha="center", va="center", color=ink)
    fig.colorbar(image, ax=axes, label="top-1 (%)")
    return fig
