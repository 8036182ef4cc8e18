"""The results of a study: the final scores of its runs, differences between variants, and their noise.

A score is always that of the last epoch, so that no epoch is selected by the score that is reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

import numpy as np
from scipy.special import fdtrc, stdtr, stdtrit

from ablation_runs.study import Study
from harness.log import read_metrics

LEVEL = 0.95
BETTER, WORSE, NOISE, UNKNOWN = "better", "worse", "within the noise", "unknown"


@dataclass
class Result:
    """The files of one run; `status` is 'done', 'diverged', 'failed' or 'unfinished'."""

    variant: str
    seed: int
    status: str
    rows: list[dict]  # of metrics.jsonl
    env: dict = field(default_factory=dict)
    directory: Path | None = None

    def score(self, column: str) -> float | None:
        """Return a column of the last epoch; None if the run is unfinished or the column empty (EMA off).

        "gap" is the training minus the validation top-1 of the raw weights, in points.
        """
        if self.status != "done" or not self.rows:
            return None
        last = self.rows[-1]
        if column != "gap":
            return last.get(column)
        known = last["train_top1"] is not None and last["val_top1"] is not None
        return last["train_top1"] - last["val_top1"] if known else None

    @property
    def minutes(self) -> float:
        """Time spent in training and validation, without start-up."""
        return sum(row["seconds"] or 0 for row in self.rows) / 60

    @property
    def images_per_second(self) -> float | None:
        """Median training throughput over the epochs."""
        rates = [row["images_per_second"] for row in self.rows if row.get("images_per_second")]
        return float(np.median(rates)) if rates else None


def load(directory: Path, study: Study) -> list[Result]:
    """Return the runs of `study` in `directory`, ordered by variant and seed."""
    runs = []
    for variant in study.variants:
        paths = {path.name.rpartition("-seed")[2]: path for path in directory.glob(f"{variant}-seed*")}
        runs += [read_run(paths[seed], variant) for seed in sorted(filter(str.isdecimal, paths), key=int)]
    return runs


def read_run(path: Path, variant: str) -> Result:
    from base import schemas

    fix = "delete it, or run the study again"
    record = schemas.read_json(path / "run.json", schemas.StudyRun, fix, missing={})
    env = schemas.read_json(path / "env.json", schemas.Env, fix, missing={})
    rows = read_metrics(path) if (path / "metrics.jsonl").is_file() else []
    seed = int(path.name.rpartition("-seed")[2])
    return Result(variant, seed, record.get("status", "unfinished"), rows, env, path)


def of_variant(runs: list[Result], variant: str) -> list[Result]:
    return [run for run in runs if run.variant == variant]


def by_seed(runs: list[Result], variant: str, column: str) -> dict[int, float]:
    """Return {seed: final score} of the finished runs of `variant`."""
    scores = {run.seed: run.score(column) for run in of_variant(runs, variant)}
    return {seed: score for seed, score in scores.items() if score is not None}


@dataclass(frozen=True)
class Difference:
    """Mean of `n` paired differences, its t interval at LEVEL, and the p-value of "no difference".

    A single pair has neither an interval nor a p-value.
    """

    mean: float
    low: float | None
    high: float | None
    p: float | None
    n: int
    verdict: str = UNKNOWN  # BETTER, WORSE or NOISE, from `compare`


def compare(runs: list[Result], study: Study, column: str) -> dict[str, Difference | None]:
    """Compare every variant with the first one; verdicts follow Holm's correction for their number."""
    baseline, *others = study.variants
    scores, resolution = by_seed(runs, baseline, column), one_image(runs)
    found = {variant: paired(by_seed(runs, variant, column), scores, resolution) for variant in others}
    tested = [variant for variant, d in found.items() if d and d.p is not None]
    for variant, p in zip(tested, holm([found[variant].p for variant in tested]), strict=True):
        direction = BETTER if found[variant].mean > 0 else WORSE
        found[variant] = replace(found[variant], verdict=direction if p < 1 - LEVEL else NOISE)
    return found


def paired(
    scores: dict[int, float], baseline: dict[int, float], resolution: float = 0.0
) -> Difference | None:
    """Compare two {seed: score} over the seeds they share; None if there is no such seed.

    Pairing removes what a seed does to both: initial weights, order, augmentation. The standard deviation is
    taken as at least `resolution` (one validation image), because three seeds that happen to differ by the
    same number of images do not prove that there is no noise.
    """
    seeds = sorted(scores.keys() & baseline.keys())
    if not seeds:
        return None
    differences = np.array([scores[seed] - baseline[seed] for seed in seeds])
    mean, n = float(differences.mean()), len(seeds)
    if n == 1:
        return Difference(mean, None, None, None, 1)
    error = max(float(differences.std(ddof=1)), resolution) / np.sqrt(n)
    if error == 0:
        return Difference(mean, mean, mean, 1.0 if mean == 0 else 0.0, n)
    half = float(stdtrit(n - 1, (1 + LEVEL) / 2) * error)
    return Difference(mean, mean - half, mean + half, float(2 * stdtr(n - 1, -abs(mean) / error)), n)


def holm(values: Sequence[float]) -> list[float]:
    """Return the p-values corrected for multiple tests (Holm, 1979)."""
    order, adjusted, highest = np.argsort(values), [0.0] * len(values), 0.0
    for rank, k in enumerate(order):
        highest = max(highest, min(1.0, (len(values) - rank) * values[k]))
        adjusted[k] = highest
    return adjusted


def ema_gain(runs: list[Result], variant: str) -> Difference | None:
    """Return the EMA minus the raw top-1 of the same runs; None without an EMA."""
    return paired(by_seed(runs, variant, "ema_val_top1"), by_seed(runs, variant, "val_top1"), one_image(runs))


def one_image(runs: list[Result]) -> float:
    """Return the points that one validation image is worth; 0 if the number of images is unknown."""
    counts = [run.env["num_val"] for run in runs if run.env.get("num_val")]
    return 100 / min(counts) if counts else 0.0


def chance(runs: list[Result]) -> float | None:
    """Return the top-1 of random predictions, in percent; None if the number of classes is unknown."""
    counts = [run.env["num_classes"] for run in runs if run.env.get("num_classes")]
    return 100 / max(counts) if counts else None


def at_chance(runs: list[Result], study: Study) -> list[str]:
    """Return the variants whose interval ends below twice the chance score."""
    found = []
    for variant in study.variants if chance(runs) else ():
        scores = by_seed(runs, variant, study.metric)
        score = paired(scores, dict.fromkeys(scores, 0.0), one_image(runs))
        if score and score.high is not None and score.high < 2 * chance(runs):
            found.append(variant)
    return found


def grid_scores(runs: list[Result], study: Study, column: str) -> np.ma.MaskedArray:
    """Return a grid's final scores with an axis per flag and one for the seeds; missing scores are masked."""
    scores = {}
    for variant, own in study.variants.items():
        scores[tuple(own[flag] for flag in study.grid)] = list(by_seed(runs, variant, column).values())
    values = [study.grid_values(flag) for flag in study.grid]
    seeds = max(map(len, scores.values()))
    cells = [scores[cell] + [np.nan] * (seeds - len(scores[cell])) for cell in product(*values)]
    return np.ma.masked_invalid(np.array(cells, float).reshape(*map(len, values), seeds))


@dataclass(frozen=True)
class Effect:
    """The main effect of one flag of a grid: its mean scores, and whether they differ beyond the noise."""

    flag: str
    means: dict[str, float]  # value of the flag -> mean score
    share: float  # of the variance of all runs, 0 to 1
    p: float | None  # of an F test against the spread over seeds, Holm-corrected; None with one seed

    @property
    def span(self) -> float:
        """Difference between the best and the worst mean, in points."""
        return max(self.means.values()) - min(self.means.values())


def effects(runs: list[Result], study: Study, column: str) -> list[Effect]:
    """Rank a grid's flags by their main effects (analysis of variance against the spread over seeds).

    Empty for an incomplete grid: the sums of squares add up only if every combination has the same number of
    finished runs.
    """
    if not study.grid or not (scores := grid_scores(runs, study, column)).size or scores.mask.any():
        return []
    scores, seeds = scores.data, scores.shape[-1]
    total = ((scores - scores.mean()) ** 2).sum()
    within, within_df = scores.var(axis=-1).sum() * seeds, scores.size - scores.size // seeds
    found = []
    for k, flag in enumerate(study.grid):
        means = scores.mean(axis=tuple(axis for axis in range(scores.ndim) if axis != k))
        between, between_df, p = means.var() * scores.size, len(means) - 1, None
        if within_df and within > 0 and between_df:
            p = float(fdtrc(between_df, within_df, (between / between_df) / (within / within_df)))
        values = dict(zip(study.grid_values(flag), means.tolist(), strict=True))
        found.append(Effect(flag, values, float(between / total) if total else 0.0, p))
    if all(effect.p is not None for effect in found):
        adjusted = holm([effect.p for effect in found])
        found = [replace(effect, p=p) for effect, p in zip(found, adjusted, strict=True)]
    return sorted(found, key=lambda effect: -effect.share)
