"""The statistics of the studies, against closed forms, naive loops, scipy, and data with known answers."""

from itertools import product

import numpy as np
import pytest
from scipy import stats

from ablation_runs import statistics
from ablation_runs.statistics import BETTER, TOO_FEW, UNDECIDED, WORSE

RNG = np.random.default_rng(0)
START = RNG.bit_generator.state


@pytest.fixture(autouse=True)
def the_same_numbers_in_every_order_of_the_tests():
    RNG.bit_generator.state = START


def naive_max_t(differences):
    """Step-down max-t (Westfall & Young 1993, algorithm 4.1 in Ge, Dudoit & Speed 2003), loop by loop."""
    differences = [list(row) for row in differences]

    def t(row):
        mean = sum(row) / len(row)
        variance = sum((x - mean) ** 2 for x in row) / (len(row) - 1)
        return abs(mean) / (variance / len(row)) ** 0.5

    observed = [t(row) for row in differences]
    order = sorted(range(len(differences)), key=lambda k: -observed[k])
    adjusted, highest = {}, 0.0
    for rank, k in enumerate(order):
        as_clear, flips = 0, list(product((1, -1), repeat=len(differences[0])))
        for flip in flips:
            rivals = [t([s * x for s, x in zip(flip, differences[j], strict=True)]) for j in order[rank:]]
            as_clear += max(rivals) >= observed[k] * (1 - 1e-9)
        highest = adjusted[k] = max(highest, as_clear / len(flips))
    return [adjusted[k] for k in range(len(differences))]


@pytest.mark.parametrize("effects", [(0.2, 1.5, 3.0), (0.8, 0.8, 0.8), (0, 0, 1)])
def test_max_t_is_the_naive_enumeration_of_all_joint_flips(effects):
    for _ in range(10):  # of near ties, the less clear one must not get the smaller p
        shared = RNG.normal(0, 1, 6)
        differences = RNG.normal(0, 1, (3, 6)) - shared + np.array(effects)[:, None]
        assert statistics.max_t(differences) == pytest.approx(naive_max_t(differences))


def test_one_comparison_is_scipys_permutation_test():
    values = RNG.normal(0.6, 1, 8)
    theirs = stats.permutation_test((values,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert statistics.max_t(values[None])[0] == pytest.approx(theirs.pvalue)


def test_random_flips_agree_with_all_of_them():
    values = RNG.normal(0.5, 1, (2, 13))
    exact = naive_max_t(values)
    assert len(statistics.sign_flips(13)) == statistics.DRAWS + 1
    assert statistics.max_t(values) == pytest.approx(exact, abs=0.015)
    assert (statistics.sign_flips(13)[0] == 1).all()  # so p is never zero


def test_six_seeds_decide_however_many_comparisons_there_are_and_five_never_do():
    clear = 3 + 0.1 * RNG.normal(0, 1, (20, 6))
    found = statistics.compare(clear)
    assert {d.verdict for d in found} == {BETTER} and {d.p for d in found} == {2 / 64}
    assert {d.verdict for d in statistics.compare(-clear)} == {WORSE}
    assert {d.verdict for d in statistics.compare(clear[:, :5])} == {TOO_FEW}
    # With Holm, the same twenty p-values of 2/64 would all have been lost.
    assert min(statistics.holm([2 / 64] * 20)) > 0.5


def test_missing_pairs_are_left_out_of_their_own_comparison_only():
    differences = RNG.normal(1, 0.3, (2, 8))
    differences[1, :3] = np.nan
    whole, short = statistics.compare(differences)
    assert (whole.n, short.n, short.verdict, short.p) == (8, 5, TOO_FEW, None)
    assert whole.mean == pytest.approx(differences[0].mean())
    assert short.mean == pytest.approx(differences[1, 3:].mean())


def test_a_verdict_needs_both_witnesses(monkeypatch):
    values = 1 + 0.1 * RNG.normal(0, 1, (1, 6))
    assert statistics.compare(values)[0].verdict == BETTER
    for name, doubt in (
        ("t_interval", lambda values, floor: (-0.1, 2.0)),
        ("max_t", lambda differences, floor: np.array([0.06])),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(statistics, name, doubt)
            assert statistics.compare(values)[0].verdict == UNDECIDED


def test_intervals_agree_with_scipy():
    values = RNG.exponential(1, 9)
    theirs = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert statistics.t_interval(values) == pytest.approx((theirs.low, theirs.high))


def test_the_interval_of_two_pairs_is_the_closed_form():
    # One degree of freedom is the Cauchy distribution: its quantile at 0.975 is tan(0.475 pi).
    low, high = statistics.t_interval(np.array([1.0, 4.0]))
    assert (high - low) / 2 == pytest.approx(np.tan(0.475 * np.pi) * 1.5)


def test_equal_differences_are_not_certainty():
    (same,) = statistics.compare(np.full((1, 6), 0.5), floor=0.5)
    assert same.interval[0] == pytest.approx(0.5 - stats.t.ppf(0.975, 5) * 0.5 / 6**0.5)
    assert statistics.compare(np.zeros((1, 6)))[0].verdict == UNDECIDED


@pytest.mark.parametrize("pairs", [6, 8])
def test_the_t_interval_covers_95_percent(pairs):
    drawn = RNG.normal(2, 1, (4000, pairs))
    covered = sum(low < 2 < high for low, high in map(statistics.t_interval, drawn))
    assert stats.binomtest(covered, 4000, 0.95).pvalue > 1e-4


def test_a_family_of_comparisons_is_wrong_at_most_once_in_twenty():
    """Five variants that do nothing, compared with one baseline, many times."""
    wrong = 0
    for _ in range(1500):
        runs = RNG.normal(0, 1, (6, 6)) + RNG.normal(0, 2, 6)  # a seed shifts all variants
        wrong += statistics.max_t(runs[1:] - runs[0]).min() <= statistics.ALPHA
    assert stats.binomtest(wrong, 1500, 0.05, alternative="greater").pvalue > 1e-3


@pytest.mark.parametrize(("seeds", "images"), [(0.3, 2.0), (1.0, 0.5), (0.05, 0.05)])
def test_the_crossed_interval_covers_95_percent(seeds, images):
    covered = 0
    for _ in range(800):
        of_seeds, of_images = RNG.normal(0, seeds, (6, 1)), RNG.normal(0, images, (1, 150))
        low, high = statistics.seeds_and_images(of_seeds + of_images + RNG.normal(0, 4, (6, 150)))
        covered += low < 0 < high
    assert 0.92 < covered / 800 < 0.985


def test_the_crossed_interval_is_that_of_a_crossed_bootstrap():
    differences = RNG.normal(0, 1, (40, 1)) + RNG.normal(0, 3, (1, 60)) + RNG.normal(0, 2, (40, 60))
    drawn = [differences[RNG.integers(0, 40, 40)][:, RNG.integers(0, 60, 60)].mean() for _ in range(2000)]
    low, high = statistics.seeds_and_images(differences)
    theirs = np.percentile(drawn, [2.5, 97.5])
    assert high - low == pytest.approx(theirs[1] - theirs[0], rel=0.15)


def test_without_noise_between_images_the_crossed_interval_is_that_of_the_seeds():
    by_seed = RNG.normal(1, 1, 6)
    both = statistics.seeds_and_images(np.repeat(by_seed[:, None], 50, axis=1))
    assert both == pytest.approx(statistics.t_interval(by_seed))
    assert statistics.seeds_and_images(np.zeros((6, 9))) == (0, 0)


def test_the_crossed_interval_is_never_narrower_than_that_of_the_seeds():
    for _ in range(200):  # many images that hardly differ: the freedom of their part is large
        differences = RNG.normal(0, 1, (6, 1)) + RNG.normal(0, 3, (6, 150))
        low, high = statistics.seeds_and_images(differences)
        first, last = statistics.t_interval(differences.mean(1))
        assert high - low >= last - first - 1e-9


def test_power_is_the_published_sample_size():
    # G*Power 3.1, two-sided paired t test at 5 % with 80 %: d = 0.5 needs 34 pairs, 0.2 needs 199.
    assert [statistics.pairs_needed(d, 1) for d in (0.5, 0.2, 10)] == [34, 199, 6]
    assert statistics.power(0.5, 1, 34) == pytest.approx(0.808, abs=5e-4)
    shift = 0.8 * 10**0.5
    bound = stats.t.ppf(0.975, 9)
    theirs = stats.nct.sf(bound, 9, shift) + stats.nct.cdf(-bound, 9, shift)
    assert statistics.power(0.8, 1, 10) == pytest.approx(theirs, abs=1e-4)


def test_power_is_what_a_simulation_counts():
    difference = statistics.detectable(2.0, 20, comparisons=3)
    drawn = RNG.normal(difference, 2.0, (4000, 20))
    seen = (stats.ttest_1samp(drawn, 0, axis=1).pvalue < 0.05 / 3).mean()
    assert seen == pytest.approx(0.8, abs=0.03)


def test_the_power_of_six_pairs_is_that_all_have_the_same_sign():
    # Six pairs decide only then; a t test would claim 80 % at 1.44 deviations.
    assert statistics.t_power(1.44, 1, 6) == pytest.approx(0.8, abs=0.01)
    assert statistics.power(1.44, 1, 6) == pytest.approx(stats.norm.cdf(1.44) ** 6, abs=0.05)
    assert statistics.power(0, 1, 6) <= 0.05 and statistics.power(9, 1, 6) == 1
    assert statistics.power(1.5, 1, 6, comparisons=5) < statistics.power(1.5, 1, 6)


def test_the_detectable_difference_is_decided_four_times_in_five():
    difference, wanted = statistics.detectable(2.0, 8, comparisons=3), 0
    for _ in range(200):
        scores = RNG.normal(0, 2.0 / 2**0.5, (4, 8))
        scores[1] += difference
        wanted += statistics.compare(scores[1:] - scores[0])[0].verdict == statistics.BETTER
    assert wanted / 200 == pytest.approx(0.8, abs=0.08)


def test_the_pooled_deviation_is_within_comparisons():
    rows = np.array([[1.0, 3.0, np.nan], [10.0, 10.0, 13.0], [5.0, np.nan, np.nan]])
    assert statistics.pooled_deviation(rows) == pytest.approx(((2 + 6) / 3) ** 0.5)
    assert statistics.pooled_deviation(rows[2:]) is None


def test_an_a_a_test_finds_few_differences_and_a_blind_method_would_find_many(monkeypatch):
    scores = RNG.normal(60, 1, 24)
    wrong = statistics.false_verdicts(scores, 6, 200)
    assert wrong <= 20 and statistics.false_verdicts(scores, 6, 200, comparisons=3) <= 20
    assert statistics.false_verdicts(scores, 6, 200) == wrong  # the same on every call
    monkeypatch.setattr(statistics, "MIN_PAIRS", 3)
    monkeypatch.setattr(statistics, "ALPHA", 0.3)
    monkeypatch.setattr(statistics, "LEVEL", 0.3)
    assert statistics.false_verdicts(scores, 6, 200) > 40


def test_holm_by_hand():
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([0.6, 0.9]) == [1.0, 1.0]
