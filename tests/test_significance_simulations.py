"""The statistics tested as statistics: on data whose truth is known, intervals cover as often as they say, and tests
reject a true null hypothesis as often as they say and no more. Where all outcomes can be listed they are (exact
coverage and size); the rest is simulated, 2,000 data sets each."""

import numpy as np
import pytest
from scipy.special import gammaln, xlogy
from scipy.stats import binom

from group_counts import METRICS, wilson_interval
from significance.certification import MIN_GROUP_SIZE
from significance.intervals import all_intervals, bootstrap_intervals, paired_difference_intervals
from significance.rate_limits import equivalence_p, midp_interval, paired_difference_interval, proportion_limits
from significance.statistical_tests import (
    benjamini_hochberg,
    detectable_change_of_rate,
    detectable_difference,
    flip_permutation_test,
    holm,
    max_t_losses,
    mcnemar_midp,
    swap_test,
)

SIMULATIONS = 2000
COVERAGE = (0.93, 0.97)  # of 95 % intervals
SIZE = (0.03, 0.06)  # of tests at 5 %: not too often, and not needlessly rarely (counts are discrete)
GAPS = ("accuracy_gap", "worst_group_accuracy", "equalized_odds_difference", "demographic_parity_difference")


def all_outcomes(n):
    """Gained and lost of every possible outcome of n pairs."""
    gained, lost = np.meshgrid(np.arange(n + 1), np.arange(n + 1), indexing="ij")
    possible = gained + lost <= n
    return gained[possible], lost[possible]


def chance(gained, lost, n, p_gained, p_lost):
    """Of each of those outcomes."""
    rest = n - gained - lost
    log = gammaln(n + 1) - gammaln(gained + 1) - gammaln(lost + 1) - gammaln(rest + 1)
    return np.exp(log + xlogy(gained, p_gained) + xlogy(lost, p_lost) + xlogy(rest, 1 - p_gained - p_lost))


def paired_truth(n_G, accuracy_G, lost_G, gained_G, base_rate=0.5):
    """(G, L, F, Q) expected counts: FP32 right with `accuracy`, of its right answers `lost`, of its wrong ones `gained`
    are turned round by quantization."""
    truth = np.zeros((len(n_G), 2, 2, 2))
    for g, (n, accuracy, lost, gained) in enumerate(zip(n_G, accuracy_G, lost_G, gained_G, strict=True)):
        for label, share in ((0, 1 - base_rate), (1, base_rate)):
            right, wrong = n * share * accuracy, n * share * (1 - accuracy)
            truth[g, label, label] = np.array([1 - lost, lost])[:: 1 if label == 0 else -1] * right
            truth[g, label, 1 - label] = np.array([gained, 1 - gained])[:: 1 if label == 0 else -1] * wrong
    return truth


def samples(truth, size, seed):
    """Tables with the group sizes of the truth."""
    rng = np.random.default_rng(seed)
    flat = truth.reshape(len(truth), -1)
    n_G = np.round(flat.sum(axis=1)).astype(int)
    drawn = [rng.multinomial(n, row / row.sum(), size=size) for n, row in zip(n_G, flat, strict=True)]
    return np.stack(drawn, axis=1).reshape(size, *truth.shape)


def gained_and_lost(tables):
    """(..., G) of tables (..., G, L, F, Q)"""
    gained = tables[..., 0, 1, 0] + tables[..., 1, 0, 1]
    return gained, tables[..., 0, 0, 1] + tables[..., 1, 1, 0]


# --- intervals that cover ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["percentile", "bca"])
@pytest.mark.parametrize(("n", "accuracy"), [(100, 0.65), (300, 0.8)])
def test_intervals_of_fixed_groups_rates_cover(method, n, accuracy):
    """Each group of a table of 100 groups is a simulation of its own: they are independent, given their sizes."""
    groups, rng = 100, np.random.default_rng(3)
    of_label = np.array([[accuracy, 1 - accuracy], [1 - accuracy, accuracy]]) / 2
    truth = np.tile(of_label.ravel() / groups, groups)
    covered = {"accuracy": 0, "selection_rate": 0, "true_positive_rate": 0}
    for _ in range(SIMULATIONS // groups):
        table = rng.multinomial(n * groups, truth).reshape(groups, 2, 2)
        found = all_intervals(table, 1, 500, method=method, generator=rng)
        for name, value in (("accuracy", accuracy), ("selection_rate", 0.5), ("true_positive_rate", accuracy)):
            low_G, high_G = found.groups[name].T
            covered[name] += int(((low_G <= value) & (value <= high_G)).sum())
    for name, count in covered.items():
        if name != "true_positive_rate" or n >= 300:  # a rate of n / 2 images
            assert COVERAGE[0] <= count / SIMULATIONS <= COVERAGE[1], (name, count)


@pytest.mark.parametrize("n", [50, 200, 1000])
@pytest.mark.parametrize("rate", [0.2, 0.5, 0.85])
def test_the_midp_interval_of_a_rate_covers(n, rate):
    low, high = midp_interval(np.arange(n + 1), n)
    covered = binom.pmf(np.arange(n + 1), n, rate) @ ((low <= rate) & (rate <= high))
    assert COVERAGE[0] <= covered <= COVERAGE[1]


@pytest.mark.parametrize(("n", "discordant"), [(50, 0.3), (100, 0.15), (200, 0.1), (200, 0.4)])
@pytest.mark.parametrize("lost_share", [0.5, 0.7, 0.9])
def test_the_interval_of_a_paired_difference_covers(n, discordant, lost_share):
    gained, lost = all_outcomes(n)
    p_lost = discordant * lost_share
    difference = discordant - 2 * p_lost
    low, high = paired_difference_interval(gained, lost, n)
    covered = chance(gained, lost, n, discordant - p_lost, p_lost) @ ((low <= difference) & (difference <= high))
    assert COVERAGE[0] <= covered <= COVERAGE[1]


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_bootstrap_intervals_of_paired_differences_cover(method):
    """Again each of many groups is a simulation. (Of 150 images instead of 400 the percentile interval covers 92 %.)"""
    groups, n, rng = 50, 400, np.random.default_rng(5)
    truth = paired_truth([n], [0.8], [0.15], [0.1])
    difference = -0.8 * 0.15 + 0.2 * 0.1
    covered = 0
    for _ in range(SIMULATIONS // groups):
        table = rng.multinomial(n * groups, np.tile(truth.ravel(), groups) / n / groups).reshape(groups, 2, 2, 2)
        found = paired_difference_intervals(table, 1, 500, method=method, generator=rng)
        low_G, high_G = found.group_accuracy_intervals_G2.T
        covered += int(((low_G <= difference) & (difference <= high_G)).sum())
    assert COVERAGE[0] <= covered / SIMULATIONS <= COVERAGE[1]


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_intervals_of_a_change_of_a_gap_far_from_a_tie_and_of_the_balanced_accuracy_cover(method):
    truth = paired_truth([300, 400], [0.9, 0.7], [0.05, 0.3], [0.1, 0.1])
    exact = paired_difference_intervals(np.round(truth * 1000).astype(int), 1, 1, generator=np.random.default_rng(0))
    rng, covered = np.random.default_rng(6), np.zeros(2)
    for table in samples(truth, 500, 7):
        found = paired_difference_intervals(table, 1, 300, method=method, generator=rng)
        for place, name in enumerate(("balanced_accuracy", "accuracy_gap")):
            low, high = found.intervals[name]
            covered[place] += low <= exact.observed[name] <= high
    # 500 simulations leave 0.92 to 0.975 less than once in 250
    assert (covered / 500 >= 0.92).all() and (covered / 500 <= 0.98).all(), covered


# --- small groups and extreme rates: which method holds ---------------------------------------------------------------


def lowest_coverage(low, high, n, rates):
    mass = binom.pmf(np.arange(n + 1)[:, None], n, rates)
    return (mass * ((low[:, None] <= rates + 1e-12) & (rates - 1e-12 <= high[:, None]))).sum(axis=0).min()


@pytest.mark.parametrize("n", [5, 20, 200])
def test_near_0_and_1_the_midp_interval_holds_and_others_do_not(n):
    """Exact. The percentile interval of k successes in n is that of the binomial distribution with rate k / n."""
    successes, rates = np.arange(n + 1), np.concatenate([np.linspace(0.002, 0.1, 99), np.linspace(0.9, 0.998, 99)])
    midp, wilson = midp_interval(successes, n), wilson_interval(successes, n)
    percentile = [binom.ppf(share, n, successes / n) / n for share in (0.025, 0.975)]
    assert lowest_coverage(*midp, n, rates) >= 0.915
    assert lowest_coverage(*proportion_limits(successes, n, 0.975), n, rates) >= 0.95
    assert lowest_coverage(*percentile, n, rates) < 0.35
    if n < 50:
        assert lowest_coverage(*wilson, n, rates) < 0.9


@pytest.mark.parametrize(("n", "of_percentile"), [(5, 0.2), (20, 0.4)])
def test_of_few_images_tangos_interval_holds_and_the_bootstraps_does_not(n, of_percentile):
    gained, lost = all_outcomes(n)
    rng = np.random.default_rng(0)
    outcome = np.stack([gained, lost, n - gained - lost], axis=1) / n
    tables = np.stack([rng.multinomial(n, p, size=500) for p in outcome])
    draws = np.sort((tables[..., 0] - tables[..., 1]) / n, axis=1)
    percentile = draws[:, 12], draws[:, 487]  # 2.5 and 97.5 %
    lowest = {"tango": 1.0, "percentile": 1.0}
    for discordant in (0.02, 0.05, 0.1, 0.3, 0.6):
        for lost_share in np.linspace(0.5, 1, 6):
            p_lost = discordant * lost_share
            difference = discordant - 2 * p_lost
            mass = chance(gained, lost, n, discordant - p_lost, p_lost)
            for name, (low, high) in {
                "tango": paired_difference_interval(gained, lost, n), "percentile": percentile,
            }.items():  # fmt: skip
                covered = mass @ ((low <= difference + 1e-12) & (difference - 1e-12 <= high))
                lowest[name] = min(lowest[name], covered)
    assert lowest["tango"] >= 0.925
    assert lowest["percentile"] < of_percentile


def test_the_interval_of_a_gap_that_is_zero_never_holds_it():
    """Why gaps are tested by permutation: four groups of the same accuracy, and a gap that a bootstrap finds every
    time."""
    truth = np.tile([[80, 20], [20, 80]], (4, 1, 1))
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(100):
        table = rng.multinomial(truth.sum(), truth.ravel() / truth.sum()).reshape(truth.shape)
        covered += bootstrap_intervals(table, 1, 200, generator=rng)["accuracy_gap"][0] <= 0
    assert covered == 0


# --- tests that reject as often as they say ---------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "discordant"), [(100, 0.2), (400, 0.1), (400, 0.5)])
def test_the_size_of_mcnemars_midp_is_near_its_level(n, discordant):
    gained, lost = all_outcomes(n)
    size = chance(gained, lost, n, discordant / 2, discordant / 2) @ (mcnemar_midp(gained, lost) <= 0.05)
    assert SIZE[0] <= size <= SIZE[1]


def rejections(test, truth, seed, simulations=SIMULATIONS):
    """Share of the samples of a truth in which each metric of GAPS has p <= 0.05."""
    rng = np.random.default_rng(seed)
    everyone_G = np.ones(len(truth), dtype=bool)
    counts = np.zeros(len(GAPS))
    for table in samples(truth, simulations, seed + 1):
        p = test(table, everyone_G, 199, generator=rng)
        counts += [p[name] <= 0.05 for name in GAPS]
    return dict(zip(GAPS, counts / simulations, strict=True))


def test_gaps_of_exchangeable_models_are_told_apart_by_swaps_as_often_as_by_chance():
    """Groups tie, where no bootstrap is valid; both models err at the same rates, on different images."""
    rate = rejections(swap_test, paired_truth([150] * 4, [0.8] * 4, [0.1] * 4, [0.4] * 4), 10)
    assert all(SIZE[0] <= value <= SIZE[1] for value in rate.values()), rate


def test_gaps_of_a_model_that_errs_more_are_left_to_the_group_permutation():
    """Quantization turns round 25 % of all right answers in every group alike: accuracy falls, groups are treated the
    same, and their gap grows by chance alone. The swap test takes that for an effect; permuting flips does not, FP32's
    own gap of 20 points notwithstanding."""
    truth = paired_truth([150] * 8, [0.95] * 8, [0.25] * 8, [0.05] * 8)
    assert rejections(swap_test, truth, 20, 500)["accuracy_gap"] > 0.12
    unequal = paired_truth([100, 150, 150, 300], [0.75, 0.9, 0.9, 0.95], [0.25] * 4, [0.05] * 4)
    rate = rejections(flip_permutation_test, unequal, 30)
    assert all(SIZE[0] <= value <= SIZE[1] for value in rate.values()), rate


def test_the_group_permutation_finds_a_group_that_is_hit_harder():
    truth = paired_truth([150] * 4, [0.9] * 4, [0.3, 0.1, 0.1, 0.1], [0.05] * 4)
    everyone_G, rng = np.ones(4, dtype=bool), np.random.default_rng(0)
    found = [
        flip_permutation_test(table, everyone_G, 199, generator=rng)["accuracy_gap"] <= 0.05
        for table in samples(truth, 100, 0)
    ]
    assert np.mean(found) > 0.9


@pytest.mark.parametrize(
    ("n_G", "lost_G", "gained_G"),
    [
        ([20, 50, 200, 800], [0.1] * 4, [0.2] * 4),
        ([60] * 10, [0.05] * 10, [0.1] * 10),
        ([100, 300, 300], [0.2, 0.05, 0.05], [0.8, 0.2, 0.2]),  # more flips in the first, as many gained as lost
    ],
)
def test_no_group_is_said_to_lose_more_when_none_does(n_G, lost_G, gained_G):
    truth = paired_truth(n_G, [0.8] * len(n_G), lost_G, gained_G)
    gained_PG, lost_PG = gained_and_lost(samples(truth, SIMULATIONS, 1))
    p_PG = max_t_losses(gained_PG, lost_PG, np.array(n_G), 999, generator=np.random.default_rng(2))
    size = (p_PG.min(axis=1) <= 0.05).mean()
    assert SIZE[0] <= size <= SIZE[1]


def test_max_t_finds_the_group_that_loses_more_and_holds_the_error_over_the_others():
    n_G = np.array([100, 200, 200, 400])
    truth = paired_truth(n_G, [0.9] * 4, [0.3, 0.05, 0.05, 0.05], [0.1] * 4)
    gained_PG, lost_PG = gained_and_lost(samples(truth, SIMULATIONS, 3))
    p_PG = max_t_losses(gained_PG, lost_PG, n_G, 999, generator=np.random.default_rng(4))
    assert (p_PG[:, 0] <= 0.05).mean() > 0.95
    assert (p_PG[:, 1:].min(axis=1) <= 0.05).mean() <= SIZE[1]


def test_max_t_of_one_pair_does_not_depend_on_the_other_pairs_beyond_chance():
    n_G = np.array([50, 150, 300])
    gained_PG, lost_PG = np.array([[1, 2, 3], [5, 9, 30]]), np.array([[6, 4, 5], [9, 30, 40]])
    both = max_t_losses(gained_PG, lost_PG, n_G, 4000, generator=np.random.default_rng(0))
    for p in (0, 1):
        alone = max_t_losses(gained_PG[[p]], lost_PG[[p]], n_G, 4000, generator=np.random.default_rng(1))
        assert alone[0] == pytest.approx(both[p], abs=5 * np.sqrt(2 * 0.25 / 4000))


@pytest.mark.parametrize("n", [50, 200])
@pytest.mark.parametrize("discordant", [0.05, 0.2])
def test_a_difference_at_the_margin_is_called_equivalent_at_most_6_percent_of_the_time(n, discordant):
    gained, lost = all_outcomes(n)
    for margin in (0.03, 0.05):
        is_equivalent = equivalence_p(gained, lost, n, margin) <= 0.05
        p_lost = (discordant + margin) / 2
        for first, second in ((gained, lost), (lost, gained)):
            assert chance(first, second, n, discordant - p_lost, p_lost) @ is_equivalent <= 0.06


def test_every_group_within_the_margin_is_said_rarely_when_one_is_at_it_and_often_when_all_are_well_inside():
    n, margin = np.array([1500, 2000, 3000]), 0.02
    rng = np.random.default_rng(0)

    def share(difference_G) -> float:
        lost_G = (0.03 + np.asarray(difference_G)) / 2
        drawn = rng.multinomial(n, np.stack([lost_G, 0.03 - lost_G, np.full(3, 0.97)], axis=1), (SIMULATIONS, 3))
        p = equivalence_p(drawn[..., 1], drawn[..., 0], n, margin)
        return float((p.max(axis=-1) <= 0.05).mean())

    assert share([margin, 0, 0]) <= SIZE[1]
    assert share([0, 0, 0]) > 0.9


# --- corrections ------------------------------------------------------------------------------------------------------


def test_corrections_hold_the_family_wise_error_and_the_false_discovery_rate():
    """30 groups of 200 images of which 10 truly lose 10 points."""
    rng = np.random.default_rng(0)
    lost_G = np.where(np.arange(30) < 10, 0.15, 0.05)
    drawn = np.stack([rng.multinomial(200, [lost, 0.05, 0.95 - lost], size=SIMULATIONS) for lost in lost_G], axis=1)
    p = mcnemar_midp(drawn[..., 1], drawn[..., 0])
    is_null = np.arange(30) >= 10
    by_holm = np.array([holm(row) for row in p]) <= 0.05
    by_bh = np.array([benjamini_hochberg(row) for row in p]) <= 0.05
    assert (p <= 0.05)[:, is_null].any(axis=1).mean() > 0.4  # without a correction
    assert by_holm[:, is_null].any(axis=1).mean() <= SIZE[1]
    false_share = by_bh[:, is_null].sum(axis=1) / np.maximum(by_bh.sum(axis=1), 1)
    assert 0.02 <= false_share.mean() <= 0.05
    assert by_bh[:, ~is_null].mean() > by_holm[:, ~is_null].mean() > 0.5


def test_corrections_are_those_of_statsmodels():
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    p = np.random.default_rng(0).beta(0.5, 2, 40)
    for ours, name in ((holm, "holm"), (benjamini_hochberg, "fdr_bh")):
        np.testing.assert_allclose(ours(p), multitest.multipletests(p, method=name)[1], rtol=1e-12)


# --- what could have been seen ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "discordant"), [(100, 0.2), (200, 0.1), (400, 0.3)])
def test_the_detectable_difference_is_found_with_power_80_percent(n, discordant):
    gained, lost = all_outcomes(n)
    difference = detectable_difference(n, discordant * n)
    p_lost = (discordant + difference) / 2
    power = chance(gained, lost, n, discordant - p_lost, p_lost) @ (mcnemar_midp(gained, lost) <= 0.05)
    assert 0.77 <= power <= 0.86


@pytest.mark.parametrize("n", [5, 20, 100])
def test_what_few_images_without_a_flip_could_have_shown(n):
    """Exactly the share at which 5 flips one way, the fewest that are significant (mid-p 1/32), have power 0.8."""
    difference = detectable_difference(n, 0)
    assert binom.sf(4, n, difference) == pytest.approx(0.8)
    assert mcnemar_midp(0, 4) > 0.05 >= mcnemar_midp(0, 5)
    assert np.isnan(detectable_difference(4, 0))


def test_the_detectable_change_of_a_rate_is_found_with_power_80_percent():
    for n, rate in ((20, 0.9), (100, 0.8), (1000, 0.95)):
        change = detectable_change_of_rate(n, rate)
        critical = np.arange(n + 1)[binom.cdf(np.arange(n + 1), n, rate) <= 0.025].max()
        assert binom.cdf(critical, n, rate - change) == pytest.approx(0.8)
    assert np.isnan(detectable_change_of_rate(3, 0.5))  # 0 of 3 has probability 1/8
    assert np.isnan(detectable_change_of_rate(0, 0.5))


def test_the_smallest_group_that_counts_can_show_something():
    assert detectable_difference(MIN_GROUP_SIZE, 0) < 0.35
    assert set(GAPS) <= set(METRICS)
