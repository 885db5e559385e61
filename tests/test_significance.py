"""Bootstrap intervals: the multinomial bootstrap is the row bootstrap, covers what it should, and pairs exactly."""

import numpy as np
import pytest
from scipy.stats import binom, bootstrap, ks_2samp

from group_counts import METRICS, count_table, group_metrics, group_rates, paired_count_table, wilson_interval
from significance import intervals as significance
from significance.intervals import bootstrap_intervals, paired_difference_intervals

HAND = np.array([[[50, 10], [10, 30]], [[30, 20], [30, 20]], [[8, 2], [3, 7]]])
LARGE_GAP = np.array([[[180, 20], [20, 180]], [[110, 90], [90, 110]]])  # group 0 better by 0.35, far from a tie


def replicate_tables(*arguments):
    """(B, G, L, P)"""
    return np.concatenate([np.moveaxis(b, -1, 0) for b in significance._resampled(*arguments)])


def rows_of(counts):
    return np.repeat(np.argwhere(np.ones_like(counts)), counts.ravel(), axis=0).T


def paired_table(n=600, seed=0, n_groups=3, changed=0.1):
    """A binary FP32 model that is right 85 % of the time, and a copy of which some predictions are flipped."""
    generator = np.random.default_rng(seed)
    group_N, label_N = generator.integers(0, n_groups, n), generator.integers(0, 2, n)
    fp32_N = np.where(generator.random(n) < 0.85, label_N, 1 - label_N)
    quantized_N = np.where(generator.random(n) < changed, 1 - fp32_N, fp32_N)
    return paired_count_table(group_N, label_N, fp32_N, quantized_N, n_groups, 2)


# --- one model --------------------------------------------------------------------------------------------------------


def test_multinomial_replicates_are_distributed_as_resampled_rows():
    generator = np.random.default_rng(5)
    group_N, label_N, prediction_N = rows_of(HAND)
    n, replicates = len(group_N), 2000
    rows = []
    for _ in range(replicates):
        chosen = generator.integers(0, n, n)
        rows.append(count_table(group_N[chosen], label_N[chosen], prediction_N[chosen], 3, 2))
    by_rows = group_metrics(np.stack(rows))
    by_cells = group_metrics(replicate_tables(HAND, replicates, generator))
    for name in METRICS:
        spread = by_rows[name].std()
        # Five standard errors of a difference of means, and of standard deviations, of 2000 draws.
        assert abs(by_rows[name].mean() - by_cells[name].mean()) < 5 * spread * np.sqrt(2 / replicates), name
        assert abs(by_rows[name].std() - by_cells[name].std()) < 5 * spread / np.sqrt(replicates), name
        assert ks_2samp(by_rows[name], by_cells[name]).pvalue > 1e-4, name


def test_replicates_have_the_moments_of_the_multinomial():
    replicates = 20_000
    tables = replicate_tables(HAND, replicates, np.random.default_rng(0))
    assert (tables.sum(axis=(1, 2, 3)) == HAND.sum()).all()
    p = HAND / HAND.sum()
    standard_error = np.sqrt(HAND.sum() * p * (1 - p) / replicates)
    assert (np.abs(tables.mean(axis=0) - HAND) < 5 * standard_error).all()
    flat, n = tables.reshape(replicates, -1), HAND.sum()
    covariance = n * (np.diag(p.ravel()) - np.outer(p.ravel(), p.ravel()))
    np.testing.assert_allclose(np.cov(flat.T), covariance, atol=0.05 * np.abs(covariance).max())


def test_an_empty_cell_stays_empty():
    counts = np.array([[[7, 0], [0, 3]], [[0, 0], [5, 0]]])
    tables = replicate_tables(counts, 500, np.random.default_rng(0))
    assert not tables[:, counts == 0].any()


def test_intervals_contain_the_observed_value_and_are_the_quantiles_of_the_replicates():
    intervals = bootstrap_intervals(LARGE_GAP, 1, replicates=800, generator=np.random.default_rng(3))
    tables = replicate_tables(LARGE_GAP, 800, np.random.default_rng(3))
    replicates, observed = group_metrics(tables), group_metrics(LARGE_GAP)
    assert tuple(intervals) == METRICS
    for name in ("accuracy", "accuracy_gap", "worst_group_accuracy", "equalized_odds_difference"):
        low, high = intervals[name]
        assert low < observed[name] < high
        np.testing.assert_allclose((low, high), np.quantile(replicates[name], [0.025, 0.975]), rtol=0, atol=1e-15)


@pytest.mark.parametrize("metric", ["accuracy", "accuracy_gap", "worst_group_accuracy"])
def test_bca_is_scipys(metric):
    """Near a tie, where the replicates are far from centred on what was observed: the percentile ends are elsewhere."""
    counts = np.array([[[40, 4], [3, 33]], [[30, 5], [6, 29]], [[26, 5], [6, 33]]])
    rows_3N = rows_of(counts)

    def statistic(*rows) -> float:
        return float(group_metrics(count_table(*rows, 3, 2))[metric])

    reference = bootstrap(
        tuple(rows_3N), statistic, paired=True, vectorized=False, n_resamples=3000, method="BCa", rng=0
    ).confidence_interval
    low, high = bootstrap_intervals(counts, 1, 20_000, method="bca", generator=np.random.default_rng(0))[metric]
    assert (low, high) == pytest.approx((reference.low, reference.high), abs=0.06 * (high - low))
    if metric != "accuracy":
        percentile = bootstrap_intervals(counts, 1, 20_000, generator=np.random.default_rng(0))[metric]
        assert np.abs(np.array(percentile) - (low, high)).max() > 0.1 * (high - low)


def test_acceleration_of_a_rate_is_a_sixth_of_its_skewness():
    counts = np.array([9, 91])  # wrong, right
    left_out, n_C = significance.left_out_tables(counts)
    found = significance.acceleration((left_out[1] / left_out.sum(axis=0))[None], n_C)
    assert found == pytest.approx((1 - 2 * 0.91) / (6 * np.sqrt(100 * 0.91 * 0.09)))


def test_all_intervals_are_those_of_the_metrics_and_the_quantiles_of_the_groups_rates():
    everything = significance.all_intervals(HAND, 1, 500, generator=np.random.default_rng(4))
    assert everything.metrics == bootstrap_intervals(HAND, 1, 500, generator=np.random.default_rng(4))
    rates = group_rates(replicate_tables(HAND, 500, np.random.default_rng(4)))
    for name in significance.GROUP_RATES:
        np.testing.assert_allclose(everything.groups[name], np.quantile(rates[name], [0.025, 0.975], axis=0).T)


def test_a_higher_level_is_a_wider_interval():
    width = {}
    for level in (0.5, 0.9, 0.99):
        low, high = bootstrap_intervals(HAND, 1, 500, level, generator=np.random.default_rng(0))["accuracy"]
        width[level] = high - low
    assert width[0.5] < width[0.9] < width[0.99]


@pytest.mark.parametrize("cells", [1, 100, 1201])
def test_chunking_does_not_change_the_intervals(monkeypatch, cells):
    whole = bootstrap_intervals(HAND, 1, 300, generator=np.random.default_rng(1))
    paired = paired_difference_intervals(paired_table(), 1, 300, generator=np.random.default_rng(1))
    monkeypatch.setattr(significance, "CHUNK_CELLS", cells)
    assert bootstrap_intervals(HAND, 1, 300, generator=np.random.default_rng(1)) == whole
    again = paired_difference_intervals(paired_table(), 1, 300, generator=np.random.default_rng(1))
    assert again.intervals == paired.intervals


def test_the_groups_are_those_of_the_observed_table_in_every_replicate():
    # The small group has exactly min_group_size samples and no prediction right: in half of the replicates it has
    # fewer, and if it then left the gap, the gap would fall from 1 to 0.
    counts = np.array([[[100, 0], [0, 100]], [[100, 0], [0, 100]], [[0, 10], [10, 0]]])
    low, high = bootstrap_intervals(counts, 20, 400, generator=np.random.default_rng(0))["accuracy_gap"]
    assert (low, high) == (1.0, 1.0)
    # And one sample below it never enters, though in half of the replicates it is large enough.
    low, high = bootstrap_intervals(counts, 21, 400, generator=np.random.default_rng(0))["accuracy_gap"]
    assert (low, high) == (0.0, 0.0)


@pytest.mark.parametrize(
    "counts",
    [
        HAND[:1],  # one group: no gaps
        np.array([[[9, 3], [2, 8]], [[9, 3], [0, 0]]]),  # one group with positives: no TPR range, no equalized odds
        np.array([[[9, 0], [2, 0]], [[9, 0], [5, 0]]]),  # nothing selected: no disparate impact, no PPV
    ],
)
def test_an_interval_is_undefined_where_the_metric_is(counts):
    observed = group_metrics(counts)
    assert any(np.isnan(value) for value in observed.values())
    intervals = bootstrap_intervals(counts, 1, 100, generator=np.random.default_rng(0))
    paired = np.einsum("glp,pq->glpq", counts, np.eye(2, dtype=int))
    differences = paired_difference_intervals(paired, 1, 100, generator=np.random.default_rng(0)).intervals
    for name, value in observed.items():
        assert np.isnan(intervals[name]).tolist() == np.isnan(differences[name]).tolist() == [np.isnan(value)] * 2, name


def test_undefined_replicates_are_ignored():
    # One positive in group 1: about 37 % of the replicates have none, and then no equal-opportunity difference.
    counts = np.array([[[20, 0], [10, 10]], [[20, 0], [0, 1]]])
    tables = replicate_tables(counts, 500, np.random.default_rng(0))
    is_undefined_B = np.isnan(group_metrics(tables)["equal_opportunity_difference"])
    assert 0.25 < is_undefined_B.mean() < 0.5
    low, high = bootstrap_intervals(counts, 1, 500, generator=np.random.default_rng(0))["equal_opportunity_difference"]
    assert 0 < low < 0.5 < high < 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"replicates": 0}, "replicates must be at least 1"),
        ({"level": 95}, "level must be between 0 and 1"),
        ({"min_group_size": 0}, "min_group_size must be at least 1"),
        ({"counts": np.zeros((2, 2, 2), int)}, "nothing to resample"),
    ],
)
def test_bad_input_is_refused(options, message):
    arguments = {"counts": HAND, "min_group_size": 1, "replicates": 10} | options
    with pytest.raises(ValueError, match=message):
        bootstrap_intervals(**arguments, generator=np.random.default_rng(0))


def test_coverage_of_rates_of_fixed_groups():
    """95 % intervals of an accuracy, and of a gap far from a tie, hold the truth about 95 % of the time."""
    truth, n = LARGE_GAP / LARGE_GAP.sum(), int(LARGE_GAP.sum())
    expected = group_metrics(LARGE_GAP)
    names = ("accuracy", "worst_group_accuracy", "accuracy_gap")
    generator, trials = np.random.default_rng(11), 400
    covered = dict.fromkeys(names, 0)
    for _ in range(trials):
        sample = generator.multinomial(n, truth.ravel()).reshape(truth.shape)
        intervals = bootstrap_intervals(sample, 1, 300, generator=generator)
        for name in names:
            low, high = intervals[name]
            covered[name] += low <= expected[name] <= high
    for name in names:
        # Binomial(400, 0.95) leaves 0.91..0.985 less than once in a thousand; 300 replicates cost about 0.5 %.
        assert 0.91 < covered[name] / trials < 0.985, (name, covered[name] / trials)


def test_exact_coverage_of_wilson_is_near_the_level_for_small_groups():
    for n in (10, 30, 100):
        successes = np.arange(n + 1)
        low, high = wilson_interval(successes, n)
        proportions = np.linspace(0.05, 0.95, 181)
        is_covered = (low[:, None] <= proportions) & (proportions <= high[:, None])
        coverage = (binom.pmf(successes[:, None], n, proportions) * is_covered).sum(axis=0)
        assert 0.94 < coverage.mean() < 0.965
        assert coverage.min() > 0.83  # Agresti & Coull (1998): the dips are shallow. Wald falls below 0.4 at n = 10.


# --- two models -------------------------------------------------------------------------------------------------------


def test_observed_differences_are_those_of_the_two_tables():
    counts = paired_table()
    result = paired_difference_intervals(counts, 1, 50, generator=np.random.default_rng(0))
    fp32, quantized = group_metrics(counts.sum(axis=3)), group_metrics(counts.sum(axis=2))
    assert tuple(result.observed) == tuple(result.intervals) == METRICS
    for name in METRICS:
        assert result.observed[name] == float(quantized[name] - fp32[name])


def test_group_differences_by_hand():
    # Group 0: 10 negatives of which quantization breaks 2; group 1: 10 of which it mends 1; group 2 is empty.
    counts = np.zeros((3, 2, 2, 2), int)
    counts[0, 0] = [[8, 2], [0, 0]]
    counts[1, 0] = [[7, 0], [1, 2]]
    result = paired_difference_intervals(counts, 1, 400, generator=np.random.default_rng(0))
    np.testing.assert_array_equal(result.group_accuracy_G, [-0.2, 0.1, np.nan])
    low_G, high_G = result.group_accuracy_intervals_G2.T
    assert low_G[0] < -0.2 < high_G[0] <= 0
    assert 0 <= low_G[1] < 0.1 < high_G[1]
    assert np.isnan([low_G[2], high_G[2]]).all()
    assert result.observed["accuracy"] == pytest.approx(-1 / 20)
    assert result.observed["accuracy_gap"] == pytest.approx(-0.3)  # from 1.0 - 0.7 to 0.8 - 0.8


@pytest.mark.parametrize("n_classes", [2, 3])
def test_identical_predictions_differ_by_exactly_zero(n_classes):
    generator = np.random.default_rng(0)
    group_N, label_N, prediction_N = (generator.integers(0, size, 300) for size in (4, n_classes, n_classes))
    counts = paired_count_table(group_N, label_N, prediction_N, prediction_N, 4, n_classes)
    result = paired_difference_intervals(counts, 1, 200, generator=generator)
    assert set(result.observed.values()) == {0.0}
    assert set(result.intervals.values()) == {(0.0, 0.0)}
    assert not result.group_accuracy_G.any()
    assert not result.group_accuracy_intervals_G2.any()


def test_small_groups_enter_no_paired_gap_and_keep_their_own_difference():
    counts = np.zeros((3, 2, 2, 2), int)
    counts[0, 0], counts[1, 0] = [[80, 20], [0, 0]], [[60, 0], [0, 40]]
    counts[2, 0] = [[0, 5], [0, 0]]  # quantization breaks all five
    result = paired_difference_intervals(counts, 6, 300, generator=np.random.default_rng(0))
    assert result.observed["worst_group_accuracy"] == 0.0  # 0.6 before and after, in group 1
    assert result.group_accuracy_G[2] == -1.0
    assert result.group_accuracy_intervals_G2[2].tolist() == [-1.0, -1.0]


def test_swapping_the_models_turns_the_intervals_round():
    # Only up to Monte-Carlo error, since the swapped table is drawn in another order.
    counts = paired_table(n=2000)
    there = paired_difference_intervals(counts, 1, 2000, generator=np.random.default_rng(0))
    back = paired_difference_intervals(counts.swapaxes(2, 3), 1, 2000, generator=np.random.default_rng(1))
    for name in METRICS:
        assert there.observed[name] == -back.observed[name]
        (low, high), (back_low, back_high) = there.intervals[name], back.intervals[name]
        assert (low, high) == pytest.approx((-back_high, -back_low), abs=0.15 * (high - low))


def test_pairing_narrows_the_interval():
    """Var(difference) of paired proportions is (disagreements - difference^2) / n (McNemar), not a sum of variances."""
    counts = paired_table(n=2000, changed=0.03)
    result = paired_difference_intervals(counts, 1, 2000, generator=np.random.default_rng(0))
    low, high = result.intervals["accuracy"]
    disagreement = (counts.sum() - np.einsum("glpp->", counts)) / counts.sum()
    spread = np.sqrt((disagreement - result.observed["accuracy"] ** 2) / counts.sum())
    assert high - low == pytest.approx(2 * 1.96 * spread, rel=0.1)
    alone = [
        np.subtract(*bootstrap_intervals(table, 1, 500, generator=np.random.default_rng(0))["accuracy"][::-1])
        for table in (counts.sum(axis=3), counts.sum(axis=2))
    ]
    assert high - low < 0.5 * np.hypot(*alone)


def test_coverage_of_paired_group_differences():
    counts = paired_table(n=1000, changed=0.2)
    truth = counts / counts.sum()
    expected_G = paired_difference_intervals(counts, 1, 1, generator=np.random.default_rng(0)).group_accuracy_G
    generator, trials = np.random.default_rng(7), 300
    covered_G = np.zeros(len(expected_G))
    for _ in range(trials):
        sample = generator.multinomial(1000, truth.ravel()).reshape(truth.shape)
        result = paired_difference_intervals(sample, 1, 300, generator=generator)
        low_G, high_G = result.group_accuracy_intervals_G2.T
        covered_G += (low_G <= expected_G) & (expected_G <= high_G)
    # Binomial(900, 0.95) over the three groups, which are independent given their sizes.
    assert 0.92 < covered_G.sum() / (trials * len(expected_G)) < 0.975
    assert (covered_G / trials > 0.89).all()


def test_a_paired_table_of_the_wrong_shape_is_refused():
    with pytest.raises(ValueError, match="paired counts must have shape"):
        paired_difference_intervals(HAND, 1, 10, generator=np.random.default_rng(0))
