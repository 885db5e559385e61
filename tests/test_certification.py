"""Certification: limits that hold their level, small groups, extreme rates and ties included; shown by enumeration and
by simulation at the edge of the hypothesis."""

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import xlogy
from scipy.stats import binom, norm

from group_counts import group_metrics, paired_count_table
from significance import certification
from significance.certification import (
    DROP,
    GAPS,
    gap_bounds,
    smallest_certifiable,
    worst_group_accuracy_bounds,
    worst_group_drop_bounds,
)
from significance.rate_limits import difference_limits, paired_difference_limits, proportion_limits, tango_score

TRIALS = 4000
ERROR = 5 * np.sqrt(0.05 * 0.95 / TRIALS)  # five standard errors of 5 % in TRIALS


def selected_table(selected_G, n_G):
    """(G, 2, 2) counts of which only the selection rates matter."""
    selected_G, n_G = np.asarray(selected_G), np.asarray(n_G)
    counts = np.zeros((len(n_G), 2, 2), int)
    counts[:, 1, 1], counts[:, 1, 0] = selected_G, n_G - selected_G
    return counts


def paired_table(broken_G, mended_G, n_G):
    counts = np.zeros((len(n_G), 2, 2, 2), int)
    counts[:, 1, 1, 0], counts[:, 1, 0, 1] = broken_G, mended_G
    counts[:, 1, 1, 1] = np.asarray(n_G) - broken_G - mended_G
    return counts


def gap_limits(hits_BG, n_G, level=0.95):
    """(low, high), each (B,), as gap_bounds has them: test_a_batch_is_what_gap_bounds_says."""
    hits_BG = np.asarray(hits_BG, float)
    groups = np.arange(hits_BG.shape[-1])
    comparison = certification._Comparison(hits_BG, np.broadcast_to(n_G, hits_BG.shape).astype(float), groups)
    ways = len(groups) * (len(groups) - 1)
    high = certification._largest_difference(comparison, level)[1].max(axis=-1)
    low = certification._largest_difference(comparison, 1 - (1 - level) / ways)[0].max(axis=-1)
    return np.maximum(low, 0), high


# --- one proportion and two -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 5, 20, 50, 500])
def test_limits_of_a_proportion_are_exact(n):
    successes, p = np.arange(n + 1), np.linspace(0, 1, 201)
    low, high = proportion_limits(successes, n, 0.95)
    mass = binom.pmf(successes[:, None], n, p)
    for is_wrong in (high[:, None] < p, low[:, None] > p):
        assert (mass * is_wrong).sum(axis=0).max() <= 0.05 + 1e-12
    # and no wider than that: with the limit as truth, what was seen or less has exactly 5 %
    assert binom.cdf(successes[:-1], n, high[:-1]) == pytest.approx(0.05, abs=1e-9)


@pytest.mark.parametrize("n_1, n_2", [(5, 5), (20, 20), (50, 50), (20, 200), (500, 20), (200, 200), (500, 500)])
@pytest.mark.parametrize("bound", [0.02, 0.05, 0.1, 0.2])
def test_a_true_difference_at_the_bound_is_accepted_at_most_one_time_in_twenty(n_1, n_2, bound):
    """Exact, worst case over the nuisance rate; 5.3 % is what the module's docstring promises."""
    high = difference_limits(np.arange(n_1 + 1)[:, None], n_1, np.arange(n_2 + 1), n_2, 0.95)[1]
    p_2 = np.linspace(0, 1 - bound, 51)
    mass_1 = binom.pmf(np.arange(n_1 + 1), n_1, p_2[:, None] + bound)
    mass_2 = binom.pmf(np.arange(n_2 + 1), n_2, p_2[:, None])
    size = np.einsum("ki,ij,kj->k", mass_1, (high <= bound).astype(float), mass_2).max()
    assert size <= 0.053
    if min(n_1, n_2) >= 200:
        assert size >= 0.045


def test_difference_limits_by_hand():
    # 0 of 10 against 0 of 10: p_1 - p_2 is at most Clopper-Pearson's 1 - 0.05^(1/10) of the first alone.
    low, high = difference_limits(0, 10, 0, 10, 0.95)
    assert (low, high) == pytest.approx((-(1 - 0.05**0.1), 1 - 0.05**0.1))
    low, high = difference_limits(8, 10, 3, 10, 0.95)
    (low_1,), (high_1,) = proportion_limits([8], 10, 0.95)
    (low_2,), (high_2,) = proportion_limits([3], 10, 0.95)
    assert high == pytest.approx(0.5 + np.sqrt((high_1 - 0.8) ** 2 + (0.3 - low_2) ** 2))
    assert low == pytest.approx(0.5 - np.sqrt((0.8 - low_1) ** 2 + (high_2 - 0.3) ** 2))


# --- gaps -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [20, 50, 500])
@pytest.mark.parametrize("rate", [0.02, 0.5, 0.98])
@pytest.mark.parametrize("others", ["at the rate", "tied at both ends"])
def test_a_gap_at_the_bound_is_certified_at_most_one_time_in_twenty(n, rate, others):
    bound, rates = 0.1, {2: [rate, abs(rate - 0.1)]}
    rates[6] = rates[2] + [rates[2][k % 2] if others == "tied at both ends" else rate for k in range(4)]
    generator = np.random.default_rng(1)
    for n_groups, rate_G in rates.items():
        low, high = gap_limits(generator.binomial(n, rate_G, (TRIALS, n_groups)), n)
        gap = max(rate_G) - min(rate_G)
        assert np.mean(high <= gap) <= 0.05 + ERROR, (n_groups, gap)
        assert np.mean(low > gap) <= 0.05 + ERROR
        assert abs(gap - bound) < 0.05


@pytest.mark.parametrize("rate, gap", [(0.07, 0.05), (0.5, 0.1), (0.9, 0.1), (0.98, 0.05)])
def test_two_large_groups_are_not_told_less_than_they_could_be(rate, gap):
    """At the edge the test rejects nearly as often as it may, and with no gap it certifies 0.12 nearly always."""
    generator = np.random.default_rng(2)
    _, high = gap_limits(generator.binomial(500, [rate, rate - gap], (20_000, 2)), 500)
    assert 0.03 <= np.mean(high <= gap) <= 0.055
    _, high = gap_limits(generator.binomial(500, [rate, rate], (2000, 2)), 500)
    assert np.mean(high <= 0.12) > 0.95


def test_where_percentile_bootstrap_of_the_range_fails_the_low_limit_does_not():
    """Eight groups, no gap at all: the observed one is never 0, and is certified to be above 0 one time in twenty."""
    generator = np.random.default_rng(3)
    low, _ = gap_limits(generator.binomial(100, 0.3, (TRIALS, 8)), 100)
    assert np.mean(low > 0) <= 0.05 + ERROR
    low, _ = gap_limits(generator.binomial(400, [0.3, 0.6], (500, 2)), 400)
    assert np.mean(low > 0.2) > 0.75  # and a large gap is seen


def test_levels_further_out_hold_too():
    """The k-th attempt at a certificate is made at 1 - 0.05 / 2^k; unequal small groups hold it less well, as said."""
    for k in (1, 2):
        alpha = 0.05 / 2**k
        for n_1, n_2, bound in ((20, 20, 0.1), (50, 50, 0.05), (20, 500, 0.1), (200, 200, 0.05)):
            high = difference_limits(np.arange(n_1 + 1)[:, None], n_1, np.arange(n_2 + 1), n_2, 1 - alpha)[1]
            p_2 = np.linspace(0, 1 - bound, 51)
            mass_1 = binom.pmf(np.arange(n_1 + 1), n_1, p_2[:, None] + bound)
            mass_2 = binom.pmf(np.arange(n_2 + 1), n_2, p_2[:, None])
            assert (
                np.einsum("ki,ij,kj->k", mass_1, (high <= bound).astype(float), mass_2).max()
                <= (1.1 if n_1 == n_2 else 1.8) * alpha
            )


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("metric", GAPS)
def test_what_is_observed_is_the_metric_and_lies_within_the_limits(metric, n_classes):
    generator = np.random.default_rng(4)
    for _ in range(20):
        counts = generator.poisson(8, (4, n_classes, n_classes))
        counts[3] = 1
        bound = gap_bounds(counts, metric, 0.9, min_group_size=12)
        assert bound.observed == group_metrics(counts, 12)[metric]
        assert 0 <= bound.low <= bound.observed <= bound.high
        assert 3 in bound.left_out and 3 not in bound.pair
        assert bound.n == counts[[g for g in range(4) if g not in bound.left_out]].sum()
        assert smallest_certifiable(counts, metric, 0.9, 12) > 0


def test_a_batch_is_what_gap_bounds_says():
    generator = np.random.default_rng(5)
    hits, n_G = generator.binomial(60, 0.4, (10, 5)), np.full(5, 60)
    low, high = gap_limits(hits, n_G)
    for b in range(10):
        bound = gap_bounds(selected_table(hits[b], n_G), "demographic_parity_difference")
        assert (bound.low, bound.high) == (low[b], high[b])


def test_the_pair_is_the_one_that_decides():
    # 30 images say less about group 2 than 1000 about the others, though group 1 is further from group 0.
    bound = gap_bounds(selected_table([500, 440, 14], [1000, 1000, 30]), "demographic_parity_difference")
    assert bound.observed == pytest.approx(0.06) or bound.observed == pytest.approx(0.5 - 14 / 30)
    assert bound.pair == (0, 2) and bound.high > 0.15
    without = gap_bounds(selected_table([500, 440, 14], [1000, 1000, 30]), "demographic_parity_difference", 0.95, 31)
    assert without.pair == (0, 1) and without.left_out == (2,) and without.high < 0.11


def test_equalized_odds_takes_the_worse_of_both_rates():
    counts = np.array([[[90, 10], [20, 80]], [[70, 30], [21, 79]]])
    both = gap_bounds(counts, "equalized_odds_difference")
    tpr, fpr = (gap_bounds(counts, f"{name}_difference") for name in ("equal_opportunity", "predictive_equality"))
    assert both.high == max(tpr.high, fpr.high) == fpr.high
    assert 0 < both.low < fpr.low  # Bonferroni over twice as many


def test_undefined_is_said_and_certifies_nothing():
    no_positives = np.array([[[30, 5], [0, 0]], [[20, 5], [2, 9]], [[20, 5], [3, 9]]])
    bound = gap_bounds(no_positives, "equal_opportunity_difference")
    assert bound.undefined == (0,) and bound.left_out == () and bound.pair == (1, 2)
    assert bound.n == no_positives[1:].sum()
    alone = gap_bounds(no_positives[:2], "equal_opportunity_difference")
    assert np.isnan([alone.observed, alone.low, alone.high]).all() and not alone.high <= 1
    assert "fewer than two groups of 20 images have positives" in alone.reason
    assert np.isnan(smallest_certifiable(no_positives[:2], "equal_opportunity_difference"))
    odds = gap_bounds(no_positives[:2], "equalized_odds_difference")
    assert np.isnan(odds.high)  # the false positive rates alone are not equalized odds
    small = gap_bounds(selected_table([1, 30], [1, 60]), "demographic_parity_difference")
    assert np.isnan(small.high) and small.reason == "fewer than two groups have 20 images (they have 1, 60)"
    third = np.zeros((2, 3, 3), int)
    third[:, 0, 0] = third[:, 1, 1] = 30
    assert gap_bounds(third, "equal_opportunity_difference").classes_left_out == (2,)


@pytest.mark.parametrize("metric", GAPS)
def test_the_smallest_certifiable_bound_is_the_limit_of_a_table_without_a_gap(metric):
    equal = np.array([[[40, 10], [20, 30]]] * 3)
    assert smallest_certifiable(equal, metric) == pytest.approx(gap_bounds(equal, metric).high)
    assert smallest_certifiable(100 * equal, metric) < 0.15 * smallest_certifiable(equal, metric)
    assert smallest_certifiable(equal, metric, 0.99) > smallest_certifiable(equal, metric, 0.95)


# --- drops and the worst group ----------------------------------------------------------------------------------------


def test_tango_as_published():
    """Tango (1998), section 6.1: 43 pairs agree, one does not; Z = 1.709 at a margin of 0.1, lower limit -0.096. Airway
    hyper-responsiveness (Bentur et al. 2009) in Fagerland, Lydersen & Laake (2014): -0.517 to -0.026."""
    assert -tango_score(1, 0, 44, 0.1) == pytest.approx(1.709, abs=5e-4)
    assert -paired_difference_limits(1, 0, 44, 0.95, 0)[1] == pytest.approx(-0.096, abs=5e-4)
    low, high = paired_difference_limits(1, 7, 21, 0.975, continuity=0)
    assert (low, high) == pytest.approx((-0.517, -0.026), abs=5e-4)
    # R's PropCIs::scoreci.mp(25, 28, 618, 0.90)
    low, high = paired_difference_limits(28, 25, 618, 0.95, continuity=0)
    assert (low, high) == pytest.approx((-0.0148, 0.0247), abs=5e-5)


@pytest.mark.parametrize("b, c, n, d", [(12, 2, 50, 0.1), (3, 9, 200, 0.02), (0, 4, 30, 0.3), (7, 0, 40, 0.05)])
def test_tangos_score_uses_the_constrained_maximum_of_the_likelihood(b, c, n, d):
    def loss(q):
        return -(xlogy(b, q + d) + xlogy(c, q) + xlogy(n - b - c, 1 - 2 * q - d))

    q = minimize_scalar(loss, bounds=(0, (1 - d) / 2), method="bounded", options={"xatol": 1e-12}).x
    expected = (b - c - n * d) / np.sqrt(n * (2 * q + d * (1 - d)))
    assert tango_score(b, c, n, d) == pytest.approx(expected, abs=1e-4)


def test_paired_limits_are_where_the_score_is_z_and_mirror():
    b, c, n = (np.array(x) for x in ([12, 0, 3, 20], [2, 0, 9, 0], [50, 40, 200, 20]))
    low, high = paired_difference_limits(b, c, n, 0.95)
    z = norm.isf(0.05)
    assert tango_score(b, c, n, high, 1.0)[:3] == pytest.approx(-z, abs=1e-9)
    assert high[3] == 1
    back_low, back_high = paired_difference_limits(c, b, n, 0.95)
    assert (back_low == -high).all() and (back_high == -low).all()
    assert ((low <= (b - c) / n) & ((b - c) / n <= high)).all()
    assert np.isnan(paired_difference_limits(0, 0, 0, 0.95)).all()


@pytest.mark.parametrize("n", [20, 50, 200])
@pytest.mark.parametrize("drop", [0.0, 0.02, 0.05, 0.1])
def test_a_drop_at_the_bound_is_accepted_at_most_one_time_in_twenty(n, drop):
    """Exact over all trinomial tables, worst case over how much is mended; 5.1 % is what the docstring promises."""
    broken, mended = np.arange(n + 1)[:, None], np.arange(n + 1)[None]
    is_table = broken + mended <= n
    accepted = is_table & (paired_difference_limits(broken, np.where(is_table, mended, 0), n, 0.95)[1] <= drop)
    sizes = []
    for mend in np.concatenate([[0, 0.002, 0.01], np.linspace(0.03, (1 - drop) / 2, 12)]):
        mass = binom.pmf(broken, n, mend + drop) * binom.pmf(
            mended, np.where(is_table, n - broken, 0), min(1.0, mend / (1 - mend - drop))
        )
        sizes.append((mass * accepted).sum())
    assert max(sizes) <= 0.051
    assert max(sizes) >= 0.025


@pytest.mark.parametrize("n", [20, 50, 500])
@pytest.mark.parametrize("n_groups", [1, 2, 6])
def test_the_worst_drop_near_ties(n, n_groups):
    """All groups drop by the same: certified at most 5 %, and never said to be more than it is above 5 %."""
    generator = np.random.default_rng(6)
    drop, mend = 0.06, 0.02
    tables = generator.multinomial(n, [drop + mend, mend, 1 - drop - 2 * mend], (TRIALS, n_groups))
    _, high = paired_difference_limits(tables[..., 0], tables[..., 1], n, 0.95)
    assert np.mean(high.max(axis=1) <= drop) <= 0.05 + ERROR
    low, _ = paired_difference_limits(tables[..., 0], tables[..., 1], n, 1 - 0.05 / n_groups)
    assert np.mean(low.max(axis=1) > drop) <= 0.05 + ERROR


def test_the_group_that_drops_most():
    counts = paired_table([1, 8, 4], [1, 2, 0], [100, 100, 4])
    bound = worst_group_drop_bounds(counts, 0.95, 20)
    assert bound.observed == pytest.approx(0.06) and bound.group == 1 and bound.left_out == (2,) and bound.n == 200
    assert bound.high == paired_difference_limits(8, 2, 100, 0.95)[1]
    assert bound.low == paired_difference_limits(8, 2, 100, 0.975)[0] < 0.06 < bound.high
    helped = worst_group_drop_bounds(paired_table([0, 0], [9, 9], [100, 100]), 0.95, 20)
    assert helped.observed == pytest.approx(-0.09) and helped.high < 0
    none = worst_group_drop_bounds(counts, 0.95, 101)
    assert np.isnan(none.high) and none.group is None and "no group has 101 images" in none.reason


def test_flips_between_two_wrong_classes_do_not_count():
    generator = np.random.default_rng(7)
    group, label, before, after = generator.integers(0, 3, (4, 400))
    counts = paired_count_table(group, label, before, after, 3, 3)
    bound = worst_group_drop_bounds(counts, 0.95, 20)
    drops = [np.mean((before == label)[group == g]) - np.mean((after == label)[group == g]) for g in range(3)]
    assert bound.observed == pytest.approx(max(drops)) and bound.group == int(np.argmax(drops))


def test_the_smallest_certifiable_drop_is_that_of_as_many_mended_as_broken():
    counts = paired_table([6, 2], [2, 6], [100, 100])
    assert smallest_certifiable(counts, DROP, 0.95, 20) == paired_difference_limits(4, 4, 100, 0.95)[1]
    unchanged = paired_table([0, 0], [0, 0], [100, 100])
    assert 0 < smallest_certifiable(unchanged, DROP, 0.95, 20) < 0.06


@pytest.mark.parametrize("n", [20, 500])
def test_the_worst_group_is_at_least_as_accurate_as_said(n):
    generator = np.random.default_rng(8)
    for accuracy in (0.5, 0.98):
        correct = generator.binomial(n, accuracy, (TRIALS, 5))
        low = proportion_limits(correct, n, 0.95)[0].min(axis=1)
        assert np.mean(low > accuracy) <= 0.05  # five tied groups: far less
        assert np.mean(proportion_limits(correct[:, :1], n, 0.95)[0] > accuracy) <= 0.05 + ERROR
        high = proportion_limits(correct, n, 0.99)[1].min(axis=1)
        assert np.mean(high < accuracy) <= 0.05 + ERROR
    bound = worst_group_accuracy_bounds(selected_table([95, 80], [100, 100]), 0.95, 20)
    assert (bound.observed, bound.group) == (0.8, 1)
    assert bound.low == proportion_limits(80, 100, 0.95)[0] and bound.high == proportion_limits(80, 100, 0.975)[1]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: gap_bounds(np.ones((2, 2, 2)), "disparate_impact"), "unknown metric 'disparate_impact'; choose from"),
        (lambda: gap_bounds(np.ones((2, 2, 2)), GAPS[0], level=95), "level must be between 0.5 and 1, not 95"),
        (lambda: gap_bounds(np.ones((2, 2, 2)), GAPS[0], 0.95, 0), "min_group_size must be at least 1"),
        (lambda: gap_bounds(np.ones((2, 2)), GAPS[0]), "counts must have shape"),
        (lambda: worst_group_drop_bounds(np.ones((2, 2, 2))), "FP32 prediction, quantized prediction"),
        (lambda: worst_group_drop_bounds(np.ones((2, 2, 2, 2)), 0.95, 0), "min_group_size must be at least 1"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
