"""What a study's runs say: their scores at the last epoch, differences between variants, and their noise.

Runs are read from their files; nothing is written or drawn here. Scores are those of the last
epoch: nothing is selected on the score that is reported.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from scipy.special import fdtrc, stdtr, stdtrit

from ablation_runs.study import Study
from harness.log import read_metrics

LEVEL = 0.95
BETTER, WORSE, NOISE, UNKNOWN = "better", "worse", "inside the noise", "unknown"


@dataclass
class Result:
    """One run: `rows` is its metrics.jsonl, `status` how it ended ('done', 'diverged', 'failed', 'unfinished')."""

    variant: str
    seed: int
    status: str
    rows: list[dict]
    env: dict = field(default_factory=dict)
    directory: Path | None = None

    def score(self, column: str) -> float | None:
        """A column of the last epoch; `gap` is training minus validation top-1 of the raw weights, in points.

        None where the run did not finish, or has no such column (EMA off).
        """
        if self.status != "done" or not self.rows:
            return None
        last = self.rows[-1]
        if column == "gap":
            known = last["train_top1"] is not None and last["val_top1"] is not None
            return last["train_top1"] - last["val_top1"] if known else None
        return last.get(column)

    @property
    def minutes(self) -> float:
        """Training and validation, without start-up; as much as there was of it."""
        return sum(row["seconds"] or 0 for row in self.rows) / 60

    @property
    def images_per_second(self) -> float | None:
        """Training throughput: the median epoch's."""
        rates = [row["images_per_second"] for row in self.rows if row.get("images_per_second")]
        return float(np.median(rates)) if rates else None


def load(directory: Path, study: Study) -> list[Result]:
    """The runs of `study` under `directory`, in the study's order; empty where there are none."""
    found = []
    for variant in study.variants:
        folders = (
            path
            for path in directory.glob(f"{variant.name}-seed*")
            if path.name.rpartition("-seed")[2].isdecimal()
        )
        for path in sorted(folders, key=lambda path: int(path.name.rpartition("-seed")[2])):
            found.append(read_run(path, variant.name))
    return found


def read_run(path: Path, variant: str) -> Result:
    from base import schemas

    record, env = (
        schemas.read_json(path / name, schema, "delete it, or run the study again", missing={})
        for name, schema in (("run.json", schemas.StudyRun), ("env.json", schemas.Env))
    )
    rows = read_metrics(path) if (path / "metrics.jsonl").is_file() else []
    seed = int(path.name.rpartition("-seed")[2])
    return Result(variant, seed, record.get("status", "unfinished"), rows, env, path)


def scores(results: Iterable[Result], variant: str, column: str) -> dict[int, float]:
    """{seed: score} of a variant's finished runs."""
    found = {r.seed: r.score(column) for r in results if r.variant == variant}
    return {seed: score for seed, score in found.items() if score is not None}


@dataclass(frozen=True)
class Difference:
    """Mean of `n` paired differences, its t interval at LEVEL, and the p value of no difference at all.

    With one pair there is neither interval nor p.
    """

    mean: float
    low: float | None
    high: float | None
    p: float | None
    n: int


def paired(scores: dict[int, float], base: dict[int, float], resolution: float = 0.0) -> Difference | None:
    """`scores` minus `base`, seed by seed: {seed: value} each, only seeds that both have; None without any.

    Pairing takes out what a seed does to both: initial weights, order, augmentation. The spread is
    taken as no smaller than `resolution` (one validation image): three seeds that happen to differ by
    the same number of images have not shown that there is no noise.
    """
    seeds = sorted(scores.keys() & base.keys())
    if not seeds:
        return None
    differences = np.array([scores[seed] - base[seed] for seed in seeds])
    mean, n = float(differences.mean()), len(seeds)
    if n == 1:
        return Difference(mean, None, None, None, 1)
    error = max(float(differences.std(ddof=1)), resolution) / np.sqrt(n)
    if error == 0:
        return Difference(mean, mean, mean, 1.0 if mean == 0 else 0.0, n)
    half = float(stdtrit(n - 1, (1 + LEVEL) / 2) * error)
    return Difference(mean, mean - half, mean + half, float(2 * stdtr(n - 1, -abs(mean) / error)), n)


def holm(values: Sequence[float]) -> list[float]:
    """p values adjusted for being several (Holm, 1979): one of k is as small by chance k times as often."""
    order, adjusted, highest = np.argsort(values), [0.0] * len(values), 0.0
    for rank, k in enumerate(order):
        highest = max(highest, min(1.0, (len(values) - rank) * values[k]))
        adjusted[k] = highest
    return adjusted


@dataclass(frozen=True)
class Verdict:
    """A variant against the base: the difference, and what may be said about it."""

    variant: str
    difference: Difference | None
    word: str  # BETTER, WORSE, NOISE, or UNKNOWN: one seed or none


def verdicts(results: list[Result], study: Study, column: str) -> list[Verdict]:
    """Every other variant against the first one, after Holm's adjustment for their number."""
    base, resolution = scores(results, study.variants[0].name, column), one_image(results)
    found = {v.name: paired(scores(results, v.name, column), base, resolution) for v in study.variants[1:]}
    tested = [name for name, difference in found.items() if difference and difference.p is not None]
    adjusted = dict(zip(tested, holm([found[name].p for name in tested]), strict=True))
    return [
        Verdict(name, difference, word_for(difference, adjusted.get(name)))
        for name, difference in found.items()
    ]


def word_for(difference: Difference | None, p: float | None) -> str:
    if difference is None or p is None:
        return UNKNOWN
    if p >= 1 - LEVEL:
        return NOISE
    return BETTER if difference.mean > 0 else WORSE


def ema_gain(results: list[Result], variant: str) -> Difference | None:
    """Averaged minus raw weights of the same runs; None where there was no average."""
    return paired(
        scores(results, variant, "ema_val_top1"), scores(results, variant, "val_top1"), one_image(results)
    )


def one_image(results: list[Result]) -> float:
    """What one validation image is worth, in points; 0 where the runs do not say how many there were."""
    counts = [r.env["num_val"] for r in results if r.env.get("num_val")]
    return 100 / min(counts) if counts else 0.0


def chance(results: list[Result]) -> float | None:
    """Top-1 of guessing, in percent; None where the runs do not say how many classes there were."""
    counts = {r.env["num_classes"] for r in results if r.env.get("num_classes")}
    return 100 / max(counts) if counts else None


def at_chance(results: list[Result], study: Study) -> list[str]:
    """Variants whose score stays below twice chance even at the upper end of its interval over seeds."""
    level, found = chance(results), []
    for variant in study.variants if level else ():
        score = paired(
            own := scores(results, variant.name, study.score), dict.fromkeys(own, 0.0), one_image(results)
        )
        if score and score.high is not None and score.high < 2 * level:
            found.append(variant.name)
    return found


@dataclass(frozen=True)
class Effect:
    """One parameter of a grid: the mean score at each of its values, and whether that is more than noise."""

    parameter: str
    means: dict[str, float]
    share: float  # of the variance of all runs, 0 to 1
    p: float | None  # of an F test against the spread over seeds, after Holm; None with one seed

    @property
    def span(self) -> float:
        """Points between its best and its worst value."""
        return max(self.means.values()) - min(self.means.values())


def effects(results: list[Result], study: Study, column: str) -> list[Effect]:
    """A grid's parameters, the one that moves the score most first.

    The main effects of an analysis of variance, against the spread over seeds inside each
    combination. Only for complete grids: every combination with the same number of finished runs,
    else an empty list, because the sums of squares would no longer add up.
    """
    cells = {v.factors: list(scores(results, v.name, column).values()) for v in study.variants if v.factors}
    counts = {len(values) for values in cells.values()}
    if not cells or len(counts) != 1 or 0 in counts:
        return []
    everything = np.concatenate([np.asarray(values) for values in cells.values()])
    total = float(((everything - everything.mean()) ** 2).sum())
    within = sum(float(np.var(values)) * len(values) for values in cells.values())
    free = len(everything) - len(cells)
    found = [main_effect(cells, name, total, within, free) for name, _ in next(iter(cells))]
    if all(effect.p is not None for effect in found):
        adjusted = holm([effect.p for effect in found])
        found = [replace(effect, p=p) for effect, p in zip(found, adjusted, strict=True)]
    return sorted(found, key=lambda effect: -effect.share)


def main_effect(cells: dict, name: str, total: float, within: float, free: int) -> Effect:
    """`cells`: {((parameter, value), ...): scores}; `within`: squares inside them, `free` its degrees of freedom."""
    groups: dict[str, list[float]] = {}
    for factors, values in cells.items():
        groups.setdefault(dict(factors)[name], []).extend(values)
    mean = np.mean(np.concatenate(list(groups.values())))
    between = sum(len(group) * float((np.mean(group) - mean) ** 2) for group in groups.values())
    p = None
    if free and within > 0 and len(groups) > 1:
        p = float(fdtrc(len(groups) - 1, free, (between / (len(groups) - 1)) / (within / free)))
    means = {value: float(np.mean(group)) for value, group in groups.items()}
    return Effect(name, means, between / total if total else 0.0, p)
