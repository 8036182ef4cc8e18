"""The results of a study: the final scores of its runs, differences between variants, and their noise.

A score is always that of the last epoch, so that no epoch is selected by the score that is reported. With
--holdout it is that of the official validation images, which nothing but this score has seen.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
from scipy.special import fdtrc

from ablation_runs import statistics
from ablation_runs.statistics import Difference
from ablation_runs.study import FINAL, Study, data_flags
from analysis import scores as hit_files
from harness.log import read_metrics

# The weights that a column scores; "bn": with BatchNorm statistics re-estimated after training.
HITS = {"val_top1": "raw", "ema_val_top1": "ema", "ema_bn_val_top1": "ema bn"}
PAIRINGS = 200  # of the runs of an A/A study


@dataclass
class Result:
    """The files of one run; `status` is 'done', 'diverged', 'failed' or 'unfinished'."""

    variant: str
    seed: int
    status: str
    rows: list[dict]  # of metrics.jsonl
    env: dict = field(default_factory=dict)
    directory: Path | None = None
    hits: dict[str, np.ndarray] = field(default_factory=dict)  # weights -> which images are right (n,)
    record: dict = field(default_factory=dict)  # run.json

    def score(self, column: str) -> float | None:
        """Return the final value of a column; None if the run is unfinished or the column empty (EMA off).

        A diverged run scores what random predictions do: left out, it would make its variant look better.
        "gap" is the training minus the validation top-1 of the raw weights, in points.
        """
        if column == "gap":
            train, val = self.logged("train_top1"), self.score("val_top1")
            return train - val if train is not None and val is not None else None
        if self.status == "diverged" and column in HITS:
            return chance([self]) if self.has_scores(column) else None  # its weights are worth no more
        if self.status == "done" and HITS.get(column) in self.hits:
            return 100 * float(self.hits[HITS[column]].mean())
        return self.logged(column)

    def has_scores(self, column: str) -> bool:
        """Return whether a run with these flags is scored in `column`."""
        if column.startswith("ema_bn") and "--recalibrate-bn" not in self.record.get("scoring", ()):
            return False
        return not column.startswith("ema") or "--no-ema" not in self.record.get("flags", ())

    def logged(self, column: str) -> float | None:
        """Return the last epoch's value of a column: with --holdout, on the held-out images."""
        return self.rows[-1].get(column) if self.status == "done" and self.rows else None

    @property
    def held_out(self) -> bool:
        return any(word.startswith("--holdout") for word in self.record.get("flags", ()))

    @property
    def num_val(self) -> int | None:
        """Number of the images that the final score is a share of."""
        return len(next(iter(self.hits.values()))) if self.hits else self.env.get("num_val")

    @property
    def command(self) -> str:
        """What repeats the run and its score by hand, in the root of the repository, to the bit."""
        words = self.record.get("flags", [])
        named = [word.removeprefix("--dataset=") for word in words if word.startswith("--dataset=")]
        dataset = named[0] if named else "imagenet"
        data = data_flags(words, dataset, f"data/{dataset}")
        commands = [["train.py", *data, *(word for word in words if not word.startswith("--data-dir="))]]
        if self.hits:
            checkpoint = f"checkpoints/last_{self.env.get('checkpoint')}"
            commands.append(["validate.py", checkpoint, *data, *self.record.get("scoring", ())])
        return " && ".join(f"{self.threads}python {shlex.join(command)}" for command in commands)

    @property
    def threads(self) -> str:
        """The number of torch's threads as a variable before a command, if it is not that of the cores."""
        threads = self.env.get("threads")
        return f"OMP_NUM_THREADS={threads} " if threads and threads != self.env.get("cores") else ""

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
    hits = hit_files.read_hits(path / FINAL / "hits.npz")
    return Result(variant, seed, record.get("status", "unfinished"), rows, env, path, hits, record)


def of_variant(runs: list[Result], variant: str) -> list[Result]:
    return [run for run in runs if run.variant == variant]


def by_seed(runs: list[Result], variant: str, column: str) -> dict[int, float]:
    """Return {seed: final score} of the finished and the diverged runs of `variant`."""
    scores = {run.seed: run.score(column) for run in of_variant(runs, variant)}
    return {seed: score for seed, score in scores.items() if score is not None}


def differences(runs: list[Result], study: Study, column: str) -> tuple[list[str], np.ndarray]:
    """Return the variants that share a seed with the first one, and their differences to it in points.

    Pairing by seed removes what a seed does to both: initial weights, order, augmentation. The array is
    (variants, seeds), with NaN where one of the pair is missing.
    """
    first, *others = ({**by_seed(runs, variant, column)} for variant in study.variants)
    rows = [[own.get(seed, np.nan) - first[seed] for seed in sorted(first)] for own in others]
    found = np.array(rows, float).reshape(len(others), len(first))
    shared = np.isfinite(found).any(1)
    return [name for name, known in zip([*study.variants][1:], shared, strict=True) if known], found[shared]


def compare(runs: list[Result], study: Study, column: str) -> dict[str, Difference]:
    """Compare variants with the first one; only the study's primary comparisons get a verdict."""
    variants, found = differences(runs, study, column)
    primary = np.array([variant in study.primary for variant in variants], bool)
    floor, judged = one_image(runs), {}
    tested = iter(statistics.compare(found[primary], floor))
    for variant, row, is_primary in zip(variants, found, primary, strict=True):
        d = next(tested) if is_primary else statistics.compare(row[None], floor)[0]
        judged[variant] = d if is_primary else replace(d, p=None, verdict=statistics.EXPLORATORY)
    return judged


def seeds_and_images(runs: list[Result], study: Study, variant: str) -> tuple[float, float] | None:
    """Return the interval of the difference to the first variant over other seeds and other images."""
    own, first = (hits_by_seed(runs, name, study.metric) for name in (variant, next(iter(study.variants))))
    seeds = [seed for seed in own if seed in first and own[seed].shape == first[seed].shape]
    if len(seeds) < 2 or len({own[seed].shape for seed in seeds}) > 1:
        return None
    return statistics.seeds_and_images(np.array([100.0 * own[s] - 100.0 * first[s] for s in seeds]))


def hits_by_seed(runs: list[Result], variant: str, column: str) -> dict[int, np.ndarray]:
    done = [run for run in of_variant(runs, variant) if run.status == "done"]
    return {run.seed: run.hits[HITS[column]] for run in done if HITS[column] in run.hits}


@dataclass(frozen=True)
class Power:
    """What the seeds of a study can see; `comparisons` share the error rate."""

    deviation: float  # of a paired difference, in points
    comparisons: int
    seeds: int
    needed: int  # seeds, to see study.worth
    sees: float  # points


def power(runs: list[Result], study: Study, most: int | None = None) -> Power | None:
    """Return the power of the primary comparisons, from their first `most` seeds; None without two pairs."""
    variants, found = differences(runs, study, study.metric)
    found = found[[k for k, name in enumerate(variants) if name in study.primary], :most]
    spread = statistics.pooled_deviation(found)
    if spread is None:
        return None
    spread = max(spread, one_image(runs), 1e-9)
    seeds = int(np.isfinite(found).sum(1).max())
    needed = statistics.pairs_needed(study.worth, spread, len(found))
    return Power(spread, len(found), seeds, needed, statistics.detectable(spread, seeds, len(found)))


def gains(runs: list[Result], study: Study, column: str, over: str) -> dict[str, Difference]:
    """Return, for each variant with both, the score `column` minus the score `over` of the same runs.

    The variants are tested together.
    """
    seeds, rows = sorted({run.seed for run in runs}), {}
    for variant in study.variants:
        scores, others = (by_seed(runs, variant, name) for name in (column, over))
        row = [
            scores[seed] - others[seed] if {seed} <= scores.keys() & others.keys() else np.nan
            for seed in seeds
        ]
        if np.isfinite(row).any():
            rows[variant] = row
    judged = statistics.compare(np.array([*rows.values()]), one_image(runs)) if rows else []
    return dict(zip(rows, judged, strict=True))


def one_image(runs: list[Result]) -> float:
    """Return the points that one validation image is worth; 0 if the number of images is unknown."""
    scored = [run for run in runs if run.hits] or runs  # a diverged run has not been scored
    counts = [run.num_val for run in scored if run.num_val]
    return 100 / min(counts) if counts else 0.0


def chance(runs: list[Result]) -> float | None:
    """Return the top-1 of random predictions, in percent; None if the number of classes is unknown."""
    counts = [run.env["num_classes"] for run in runs if run.env.get("num_classes")]
    return 100 / max(counts) if counts else None


def at_chance(runs: list[Result], study: Study) -> list[str]:
    """Return the variants whose interval ends below twice the chance score."""
    found = []
    for variant in study.variants if chance(runs) else ():
        scores = np.array([*by_seed(runs, variant, study.metric).values()])
        if len(scores) > 1 and statistics.t_interval(scores, one_image(runs))[1] < 2 * chance(runs):
            found.append(variant)
    return found


@dataclass(frozen=True)
class FalseVerdicts:
    """An A/A test: in how many of `times` studies one variant was called better or worse than itself."""

    runs: int
    pairs: int
    comparisons: int  # tested together
    times: int
    decided: int


def false_verdicts(runs: list[Result], study: Study) -> list[FalseVerdicts]:
    """Pair the runs of a study of one variant at random; empty for other studies and for too few runs.

    First six pairs, then as many as there are; then six of each of several comparisons at once.
    """
    scores = [*by_seed(runs, next(iter(study.variants)), study.metric).values()]
    n, fewest = len(scores), statistics.MIN_PAIRS
    if len(study.variants) > 1 or n < 2 * fewest:
        return []
    found = []
    for pairs, comparisons in dict.fromkeys([(fewest, 1), (n // 2, 1), (fewest, n // fewest - 1)]):
        wrong = _count_false_verdicts(tuple(scores), pairs, PAIRINGS, one_image(runs), comparisons)
        found.append(FalseVerdicts(n, pairs, comparisons, PAIRINGS, wrong))
    return found


_count_false_verdicts = cache(statistics.false_verdicts)  # a second; a report asks several times


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
        adjusted = statistics.holm([effect.p for effect in found])
        found = [replace(effect, p=p) for effect, p in zip(found, adjusted, strict=True)]
    return sorted(found, key=lambda effect: -effect.share)
