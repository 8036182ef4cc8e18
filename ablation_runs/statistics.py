"""The statistics of a study: paired differences, intervals, a permutation test, and power.

Every function takes numbers and knows nothing about runs. A row of `differences` (k, n) is one comparison,
a column one seed; NaN stands for a pair that is missing.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import optimize, special, stats

LEVEL, POWER = 0.95, 0.8
ALPHA = 1 - LEVEL
MIN_PAIRS = 6  # of five pairs, even the clearest has p = 2 / 2^5 = 0.06
EXACT_PAIRS, DRAWS = 12, 9999  # all 2^n sign flips up to n = 12, else so many random ones
QUANTILES = (np.arange(2000) + 0.5) / 2000
SIMULATED_PAIRS, SIMULATIONS = 9, 500  # up to so many pairs, power is counted in simulated studies
BETTER, WORSE, UNDECIDED = "better", "worse", "undecided"
TOO_FEW, EXPLORATORY = f"fewer than {MIN_PAIRS} pairs", "not a primary comparison"


@dataclass(frozen=True)
class Difference:
    """The mean of `n` paired differences with its t interval at LEVEL; None for a single pair."""

    mean: float
    n: int
    interval: tuple[float, float] | None = None
    p: float | None = None  # of sign flips, adjusted for all comparisons that were tested together
    verdict: str = TOO_FEW


def compare(differences: np.ndarray, floor: float = 0.0) -> list[Difference]:
    """Return the `Difference` of each row of `differences` (k, n); its verdict needs two tests that agree.

    A row is BETTER or WORSE if it has MIN_PAIRS pairs, its adjusted p is at most ALPHA, and its interval
    excludes zero. floor: the smallest standard deviation that is believed, one validation image.
    """
    differences = np.asarray(differences, float)
    counts = np.isfinite(differences).sum(1)
    tested = np.flatnonzero(counts >= MIN_PAIRS)
    p = dict(zip(tested.tolist(), max_t(differences[tested], floor).tolist(), strict=True))
    return [_judged(row[np.isfinite(row)], p.get(k), floor) for k, row in enumerate(differences)]


def _judged(values: np.ndarray, p: float | None, floor: float) -> Difference:
    mean, n = float(values.mean()), len(values)
    if n < 2:
        return Difference(mean, n)
    interval = t_interval(values, floor)
    if p is None:
        return Difference(mean, n, interval)
    agree = p <= ALPHA and interval[0] * interval[1] > 0
    return Difference(mean, n, interval, p, (BETTER if mean > 0 else WORSE) if agree else UNDECIDED)


def t_interval(values: np.ndarray, floor: float = 0.0) -> tuple[float, float]:
    """Return Student's interval of the mean. The standard deviation is taken as at least `floor`."""
    error = max(float(values.std(ddof=1)), floor) / np.sqrt(len(values))
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1)) * error
    return float(values.mean()) - half, float(values.mean()) + half


def max_t(differences: np.ndarray, floor: float = 0.0) -> np.ndarray:
    """Return the p-values (k,) of "no difference", adjusted for k comparisons (Westfall & Young, 1993).

    Under that hypothesis a seed's difference is as likely to have the other sign. A flip reverses it in all
    comparisons at once, which keeps their dependence: six seeds can decide, however many comparisons there
    are. Step-down: a comparison competes only with those that are less clear than itself. For one difference
    it is enough that the two variants could be exchanged; several with one baseline need symmetric scores.
    """
    observed = _t(differences, np.ones((1, differences.shape[1])), floor)[:, 0]
    order = np.argsort(observed)
    flipped = _t(differences[order], sign_flips(differences.shape[1]), floor)
    rivals = np.maximum.accumulate(flipped, axis=0)
    p = (rivals >= observed[order, None] * (1 - 1e-9)).mean(1)
    adjusted = np.empty(len(p))
    adjusted[order] = np.maximum.accumulate(p[::-1])[::-1]
    return adjusted


def _t(differences: np.ndarray, flips: np.ndarray, floor: float) -> np.ndarray:
    """Return |t| (k, m) of `differences` (k, n) under each of the sign `flips` (m, n)."""
    counts = np.isfinite(differences).sum(1)[:, None]
    known = np.nan_to_num(differences)
    means = known @ flips.T / counts
    # A flip leaves the sum of squares as it is.
    variances = ((known**2).sum(1)[:, None] / counts - means**2) * counts / np.maximum(counts - 1, 1)
    deviations = np.maximum(np.sqrt(variances.clip(0)), max(floor, 1e-12))
    return np.abs(means) / deviations * np.sqrt(counts)


def sign_flips(pairs: int) -> np.ndarray:
    """Return all sign flips (2^n, n) of up to EXACT_PAIRS pairs, else DRAWS random ones and the identity."""
    if pairs <= EXACT_PAIRS:
        return 2.0 * (np.arange(2**pairs)[:, None] >> np.arange(pairs) & 1) - 1
    drawn = np.random.default_rng(0).choice([-1.0, 1.0], (DRAWS, pairs))
    return np.vstack([np.ones(pairs), drawn])


def holm(values: Sequence[float]) -> list[float]:
    """Return p-values adjusted by Holm (1979), for tests without common pairs."""
    order, adjusted, highest = np.argsort(values), [0.0] * len(values), 0.0
    for rank, k in enumerate(order):
        highest = max(highest, min(1.0, (len(values) - rank) * values[k]))
        adjusted[k] = highest
    return adjusted


def seeds_and_images(differences: np.ndarray) -> tuple[float, float]:
    """Return the interval of the mean of `differences` (seeds, images) over other seeds and other images.

    Both are random and crossed: the variance of the mean is that of the seeds plus that of the images, each
    estimated from its mean square; degrees of freedom by Satterthwaite. A crossed bootstrap agrees, but is
    too narrow with few seeds. Never narrower than the interval over seeds alone.
    """
    seeds, images = differences.shape
    mean, by_seed, by_image = differences.mean(), differences.mean(1), differences.mean(0)
    rest = ((differences - by_seed[:, None] - by_image + mean) ** 2).sum() / ((seeds - 1) * (images - 1))
    of_seeds = by_seed.var(ddof=1) / seeds
    of_images = max(0.0, by_image.var(ddof=1) - rest / seeds) / images
    variance = of_seeds + of_images
    if variance == 0:
        return float(mean), float(mean)
    freedom = variance**2 / (of_seeds**2 / (seeds - 1) + of_images**2 / (images - 1))
    half = stats.t.ppf((1 + LEVEL) / 2, freedom) * np.sqrt(variance)
    half = float(max(half, stats.t.ppf((1 + LEVEL) / 2, seeds - 1) * np.sqrt(of_seeds)))
    return float(mean) - half, float(mean) + half


def p_value(p: float | None) -> str:
    """Return "= 0.031", "< 0.001", or "-" for none."""
    return "-" if p is None else f"= {p:.3f}" if p >= 0.001 else "< 0.001"


def pooled_deviation(differences: np.ndarray) -> float | None:
    """Return the standard deviation of a paired difference, pooled over comparisons (k, n), or None."""
    rows = [row[np.isfinite(row)] for row in np.asarray(differences, float)]
    rows = [row for row in rows if len(row) > 1]
    freedom = sum(len(row) - 1 for row in rows)
    return float(np.sqrt(sum(((row - row.mean()) ** 2).sum() for row in rows) / freedom)) if rows else None


def power(difference: float, deviation: float, pairs: int, comparisons: int = 1) -> float:
    """Return the probability that one of `comparisons` whose true difference is `difference` is decided.

    With few pairs the sign flips are the stricter test: six are decided only if all have the same sign.
    """
    if MIN_PAIRS <= pairs <= SIMULATED_PAIRS:
        return _simulated_power(abs(difference) / deviation, pairs, comparisons)
    return t_power(difference, deviation, pairs, comparisons)


@cache
def _simulated_power(effect: float, pairs: int, comparisons: int) -> float:
    """Count the decisions in studies of normal scores; `effect` is in deviations of a paired difference."""
    scores = np.random.default_rng(0).normal(0, 0.5**0.5, (SIMULATIONS, comparisons + 1, pairs))
    differences = scores[:, 1:] - scores[:, :1]
    differences[:, 0] += effect
    clear = stats.ttest_1samp(differences[:, 0], 0, axis=1).pvalue <= ALPHA
    return float(np.mean([max_t(study)[0] <= ALPHA for study in differences] & clear))


def t_power(difference: float, deviation: float, pairs: int, comparisons: int = 1) -> float:
    """Return the probability that a paired t test sees `difference`; ALPHA is shared by `comparisons`."""
    bound = stats.t.ppf(1 - ALPHA / comparisons / 2, pairs - 1)
    shift = abs(difference) / deviation * np.sqrt(pairs)
    # Averaged over the estimated deviation, because scipy's noncentral t is NaN for some shifts above 10.
    estimates = np.sqrt(stats.chi2.ppf(QUANTILES, pairs - 1) / (pairs - 1))
    return float((special.ndtr(shift - bound * estimates) + special.ndtr(-shift - bound * estimates)).mean())


def pairs_needed(difference: float, deviation: float, comparisons: int = 1, most: int = 9999) -> int:
    """Return how many pairs see `difference` with probability POWER: from MIN_PAIRS to `most`."""
    return MIN_PAIRS + bisect_left(
        range(MIN_PAIRS, most), True, key=lambda n: power(difference, deviation, n, comparisons) >= POWER
    )


def detectable(deviation: float, pairs: int, comparisons: int = 1) -> float:
    """Return the smallest difference that `pairs` pairs see with probability POWER."""
    found = optimize.brentq(lambda d: power(d, 1.0, pairs, comparisons) - POWER, 0.0, 1e4, xtol=1e-3)
    return deviation * found


def false_verdicts(
    scores: Sequence[float], pairs: int, times: int, floor: float = 0.0, comparisons: int = 1
) -> int:
    """Deal runs of one variant out to "variants" at random, `times` times; count the studies that decide.

    An A/A test: every decision is false. scores: one per run, at least (comparisons + 1) * pairs
    """
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(times):
        dealt = rng.permutation(scores)[: (comparisons + 1) * pairs].reshape(comparisons + 1, pairs)
        wrong += any(d.verdict in (BETTER, WORSE) for d in compare(dealt[1:] - dealt[0], floor))
    return wrong
