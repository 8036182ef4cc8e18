"""A study's pictures: curves with a band over seeds, differences with intervals, heat maps of grids."""

from __future__ import annotations

import textwrap
from itertools import combinations
from pathlib import Path

import numpy as np

from ablation_runs import results as reading
from ablation_runs.results import Result
from ablation_runs.study import Study
from analysis import figures

LABELS = {
    "val_top1": "validation top-1, raw weights (%)",
    "ema_val_top1": "validation top-1, averaged weights (%)",
}


def draw(results: list[Result], study: Study, preset: str, out: Path) -> list[Path]:
    """Write the pictures that the runs are enough for; returns their paths."""
    made = {
        "curves.png": curves(results, study, preset),
        "differences.png": differences(results, study, preset),
    }
    made |= heat_maps(results, study)
    return [figures.save(picture, out / name) for name, picture in made.items() if picture]


def curves(results: list[Result], study: Study, preset: str):
    """The compared score over the epochs: the mean over seeds, and a band from the worst to the best seed."""
    made = figures.figure(8, 4.6, heading(study, preset))
    axis = figures.axes(made, 1, 1)[0, 0]
    drawn = 0
    for k, variant in enumerate(study.variants):
        series = [
            [row.get(study.score) for row in r.rows] for r in results if r.variant == variant.name and r.rows
        ]
        epochs = min(map(len, series), default=0)
        table = np.array(
            [values[:epochs] for values in series], float
        )  # None becomes NaN: an epoch not scored
        shown = np.flatnonzero(np.isfinite(table).all(0)) if epochs else []
        if len(shown) == 0:
            continue
        style = figures.line_style(k)
        axis.plot(
            shown + 1,
            table[:, shown].mean(0),
            label=f"{variant.name} ({len(series)})",
            marker="o",
            markersize=3,
            **style,
        )
        axis.fill_between(
            shown + 1, table[:, shown].min(0), table[:, shown].max(0), color=style["color"], alpha=0.15, lw=0
        )
        drawn += 1
    if chance := reading.chance(results):
        axis.axhline(chance, color=figures.BLACK, lw=1, ls=":", label="chance")
    axis.set(xlabel="epoch", ylabel=LABELS[study.score])
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(title="variant (seeds); band: worst to best seed", fontsize=8, title_fontsize=8)
    return made if drawn else None


def differences(results: list[Result], study: Study, preset: str):
    """Each variant's paired difference to the base, with its interval; hollow: inside the noise."""
    verdicts = [v for v in reading.verdicts(results, study, study.score) if v.difference]
    if not verdicts:
        return None
    made = figures.figure(8, 1.9 + 0.36 * len(verdicts), heading(study, preset))
    axis = figures.axes(made, 1, 1)[0, 0]
    for k, verdict in enumerate(verdicts):
        d, certain = verdict.difference, verdict.word in (reading.BETTER, reading.WORSE)
        if d.low is not None:
            axis.plot([d.low, d.high], [k, k], color=figures.BLUE, lw=2)
        axis.plot(
            d.mean,
            k,
            "o",
            color=figures.BLUE,
            markerfacecolor=figures.BLUE if certain else "white",
            markersize=7,
        )
    axis.axvline(0, color=figures.BLACK, lw=1)
    axis.set_yticks(range(len(verdicts)), [v.variant for v in verdicts])
    axis.invert_yaxis()
    axis.set_ylim(len(verdicts) - 0.5, -0.5)
    axis.set_xlabel(
        f"points of top-1 against {study.variants[0].name}, 95 % interval over seeds (hollow: inside the noise)"
    )
    return made


def heat_maps(results: list[Result], study: Study) -> dict:
    """{file name: picture}, for every two parameters of a grid: the mean score over seeds and all other parameters."""
    cells = {
        v.factors: np.mean(list(found.values()))
        for v in study.variants
        if v.factors and (found := reading.scores(results, v.name, study.score))
    }
    if not cells:
        return {}
    values: dict[str, set[str]] = {}
    for variant in study.variants:
        for name, value in variant.factors:
            values.setdefault(name, set()).add(value)
    made = {}
    for down, across in combinations(values, 2):
        rows, columns = (sorted(values[name], key=float) for name in (down, across))
        means = [[mean_where(cells, {down: row, across: column}) for column in columns] for row in rows]
        made[f"heat_map_{down}_{across}.png"] = figures.heat_map(
            np.array(means),
            rows,
            columns,
            title=f"{study.name}: last epoch, mean over seeds and other parameters",
            unit="top-1 (%)",
            row_title=down,
            column_title=across,
        )
    return made


def mean_where(cells: dict, wanted: dict[str, str]) -> float:
    """The mean of the combinations that have these values; NaN where none has run."""
    found = [score for factors, score in cells.items() if wanted.items() <= dict(factors).items()]
    return float(np.mean(found)) if found else float("nan")


def heading(study: Study, preset: str) -> str:
    return textwrap.fill(study.title(preset).replace("`", ""), 80)
