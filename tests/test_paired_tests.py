"""The tables of paired comparisons, and the joint resampling beneath them, against counts made by hand."""

import io

import numpy as np
import pandas as pd
import pytest
from fake_study import small_config, write_study

from analysis.contrasts import Effects
from analysis.paired_tests import (
    FLIP_COLUMNS,
    PERMUTATIONS_IN_ALL,
    SIGNIFICANCE_COLUMNS,
    flip_table,
    intersection_significance,
    paired_significance,
    permutations,
    seed_effects,
    worst_group_changes,
)
from analysis.result_rows import with_labels
from group_counts import METRICS, count_table, group_metrics, paired_count_table
from phases.analysis import load_test_set, planned_rows
from significance.intervals import paired_difference_intervals
from significance.joint_bootstrap import JointBootstrap, ReplicateTables, TestSet, image_weights, resampled_metrics
from significance.rate_limits import midp_interval
from significance.statistical_tests import cohens_d, fair_coins, flip_permutation_test, hedges_g, holm, swap_test


def finished(tmp_path, config, **truth):
    store, planned = write_study(tmp_path, config, **truth)
    rows, _, _ = planned_rows(store, {phase: [cell.id for cell in cells] for phase, cells in planned.items()})
    return rows, {"synthetic": load_test_set(config, store, "synthetic", rows, store.read_group_table())}


def random_test_set(n=400, n_classes=2, seed=0, cells=("a", "b", "c")):
    rng = np.random.default_rng(seed)
    group, other, label = rng.integers(0, 3, n), rng.integers(0, 2, n), rng.integers(0, n_classes, n)
    predictions = {
        cell: np.where(rng.random(n) < 0.7, label, rng.integers(0, n_classes, n)).astype(np.int16) for cell in cells
    }
    crossed = group * 2 + other
    names, crossed_names = ["x", "y", "z"], [str(code) for code in range(6)]
    return TestSet("d", "race", label, group, names, crossed, crossed_names, n_classes, 20, predictions)


# --- the tables -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unequal(tmp_path_factory):
    """At 4 bits 10 % of the right answers of female and 30 % of those of male are lost, at 8 bits none."""
    loss = lambda cell, g: {8: 0.0, 4: 0.1 if g < 2 else 0.3}[cell.weight_bits] if not cell.strategy else 0.0  # noqa: E731
    return finished(tmp_path_factory.mktemp("unequal"), small_config(models=("resnet50",)), loss=loss)


def test_flips_by_hand(unequal):
    rows, test_sets = unequal
    table = flip_table(rows, test_sets, 0.95)
    assert tuple(table.columns) == FLIP_COLUMNS
    four = table[(table["weight_bits"] == 4) & table["strategy"].isna()].set_index(["attribute", "group"])
    # right at FP32: 378 + 324 female, 270 + 108 male; lost 38 + 32 and 81 + 32 of 780 and 420
    for key, n, lost in (
        (("gender", "all"), 1200, 183), (("gender", "female"), 780, 70), (("gender", "male"), 420, 113),
        (("intersection", "male & dark"), 120, 32),
    ):  # fmt: skip
        row = four.loc[key]
        assert row[["n", "flips", "harmful", "beneficial"]].tolist() == [n, lost, lost, 0]
        assert row[["flip_rate", "harmful_rate", "beneficial_rate"]].tolist() == [lost / n, lost / n, 0]
        assert row[["ci_low", "ci_high"]].tolist() == pytest.approx(np.array(midp_interval(lost, n)))
        assert row["beneficial_ci_low"] == 0 < row["beneficial_ci_high"] < 0.04
    assert set(four.index) == {
        *(("gender", group) for group in ("all", "female", "male")),
        *(("intersection", f"{gender} & {skin}") for gender in ("female", "male") for skin in ("light", "dark")),
    }
    assert {"setting", "width"} <= set(with_labels(table).columns)


def test_a_group_that_loses_more_is_named_and_one_that_does_not_is_not(unequal):
    rows, test_sets = unequal
    table = paired_significance(rows, test_sets, 999, 0.95)
    assert tuple(table.columns) == SIGNIFICANCE_COLUMNS
    four = table[(table["weight_bits"] == 4) & (table["comparison"] == "fp32") & table["strategy"].isna()]
    accuracy = four[four["metric"] == "accuracy"].set_index("group")
    assert accuracy.loc["male", "p_max_t"] == accuracy.loc["all", "p_max_t"] == 1 / 1000
    assert accuracy.loc["female", "p_max_t"] > 0.9
    assert (accuracy["p_bh"] <= accuracy["p_holm"]).all()
    metrics = four[four["group"] == "all"].set_index("metric")
    assert metrics.loc["accuracy_gap", "p_group"] == 1 / 1000 and metrics.loc["accuracy_gap", "p_swap"] == 1 / 1000
    assert metrics["p_mcnemar"].notna().sum() == 1 and metrics.loc["accuracy", "ci_method"] == "tango"
    # nothing changes at 8 bits: every permutation gives the same, all is within the margin of 1 point but for chance
    eight = table[(table["weight_bits"] == 8) & (table["comparison"] == "fp32") & table["strategy"].isna()]
    assert (eight["p_swap"].dropna() == 1).all() and (eight["p_max_t"].dropna() == 1).all()
    resampled = eight["ci_method"].isin(["bca", "percentile"])
    assert (eight.loc[resampled, ["effect", "ci_low", "ci_high"]] == 0).all(axis=None)
    worst = eight[eight["metric"] == "worst_group_accuracy"].iloc[0]
    assert worst["effect"] == 0 > worst["ci_low"] == -worst["ci_high"] > -0.02
    # 5 flips of 420 images, all one way, are the fewest that count; with power 0.8 that takes 6.7 (Poisson)
    assert eight.set_index("group").loc["male", "mde"] == pytest.approx(6.7 / 420, rel=0.02)


def test_intersections_have_rows_of_groups_only_and_corrections_of_their_own(unequal):
    rows, test_sets = unequal
    table = intersection_significance(rows, test_sets, 199, 0.95)
    assert set(table["group"]) == {f"{g} & {s}" for g in ("female", "male") for s in ("light", "dark")}
    assert set(table["attribute"]) == {"intersection"} and set(table["metric"]) == {"accuracy"}
    assert (table["p_holm"] >= table["p_mcnemar"]).all()


def test_intervals_of_metrics_are_those_of_a_bootstrap_of_the_pair_alone():
    """Up to Monte-Carlo error: the joint replicates of a pair are distributed as if it were alone, both models on the
    same images (of which they differ on 5 %)."""
    test_set, rng = random_test_set(n=1500), np.random.default_rng(0)
    first = test_set.predictions["a"]
    second = np.where(rng.random(test_set.n) < 0.05, 1 - first, first).astype(np.int16)
    test_set = TestSet(**{**vars(test_set), "predictions": {"a": first, "b": second}})
    table = paired_significance(two_cells(), {"d": test_set}, 4000, 0.95).set_index("metric")
    counts = paired_count_table(test_set.group_N, test_set.label_N, first, second, 3, 2)
    others = [name for name in METRICS[2:] if name != "worst_group_accuracy"]
    for method, names in (("bca", ["balanced_accuracy"]), ("percentile", others)):
        alone = paired_difference_intervals(counts, 20, 4000, method=method, generator=rng)
        for name in names:
            low, high = alone.intervals[name]
            row = table.loc[name]
            assert row["effect"] == pytest.approx(alone.observed[name]) and row["ci_method"] == method
            assert (row["ci_low"], row["ci_high"]) == pytest.approx((low, high), abs=0.08 * (high - low)), name


def two_cells():
    """Rows of an FP32 cell "a" and a quantized one "b"."""
    identity = {"dataset": "d", "model": "m", "seed": 0, "options": None, "strategy": None, "baseline_cell": "a"}
    return pd.DataFrame(
        [
            {**identity, "cell": "a", "method": "none", "weight_bits": np.nan, "activation_bits": np.nan},
            {**identity, "cell": "b", "method": "ptq_static", "weight_bits": 8, "activation_bits": 8},
        ]
    )


def test_effect_sizes_over_seeds_by_hand(tmp_path):
    assert cohens_d([1, 3], [5, 9]) == pytest.approx(-5 / np.sqrt(5))  # variances 2 and 8
    assert hedges_g([1, 3], [5, 9]) == pytest.approx(-5 / np.sqrt(5) * 0.5642, rel=1e-3)  # Hedges 1981: J(2) = 0.5642
    assert np.isnan(cohens_d([1], [2, 3])) and np.isnan(cohens_d([1, 1], [2, 2])) and np.isnan(hedges_g([1], [2]))
    rows, _ = finished(tmp_path, small_config(models=("resnet50",), seeds=(0, 1)))
    table = seed_effects(rows)
    assert set(table["n_seeds"]) == {2} and set(table["metric"]) <= set(METRICS)
    assert seed_effects(rows[rows["seed"] == 0]).empty


# --- the worst group --------------------------------------------------------------------------------------------------


def test_the_worst_group_is_chosen_on_other_images_than_those_it_is_measured_on():
    test_set = random_test_set(n=1200)
    pairs = two_cells().assign(reference_cell="a").iloc[[1]]
    effects = Effects(test_set)
    expected = effects.pair("b", "a", "worst_group_accuracy").sum() / 100
    ((effect, low, high),) = worst_group_changes(pairs, test_set, 0.95)
    assert effect == pytest.approx(expected) and low < effect < high
    row = paired_significance(two_cells(), {"d": test_set}, 99, 0.95).set_index("metric").loc["worst_group_accuracy"]
    assert row[["effect", "ci_low", "ci_high"]].tolist() == [effect, low, high]
    assert row["chosen_on"] == "other half" and row["ci_method"] == "mover"


def many_pairs(group_N, before_PN, after_PN):
    """Simulated pairs of models as pairs of cells of one test set: (P, 3) change of the worst group, low, high."""
    label_N = np.arange(len(group_N)) % 2
    right = {f"a{p}": hit_N for p, hit_N in enumerate(before_PN)} | {f"b{p}": hit_N for p, hit_N in enumerate(after_PN)}
    predictions = {cell: np.where(hit_N, label_N, 1 - label_N).astype(np.int16) for cell, hit_N in right.items()}
    names = [str(g) for g in range(group_N.max() + 1)]
    test_set = TestSet("d", "race", label_N, group_N, names, group_N, names, 2, 10, predictions)
    numbers = range(len(before_PN))
    pairs = pd.DataFrame({"cell": [f"b{p}" for p in numbers], "reference_cell": [f"a{p}" for p in numbers]})
    return worst_group_changes(pairs, test_set, 0.95)


def test_the_worst_groups_change_is_neither_biased_nor_overconfident_where_groups_tie():
    """FP32 has one clear worst group; quantized, all ten tie. The change of the lowest accuracy is +0.10. Chosen and
    measured on the same images the lowest of ten ties comes out low; cross-fitted it does not."""
    rng, group = np.random.default_rng(3), np.repeat(np.arange(10), 100)
    before = rng.random((600, 1000)) < np.where(group == 0, 0.7, 0.95)
    after = rng.random((600, 1000)) < 0.8
    effect, low, high = many_pairs(group, before, after).T
    lowest = [hits.reshape(600, 10, 100).mean(axis=2).min(axis=1) for hits in (after, before)]
    assert np.mean(lowest[0] - lowest[1]) < 0.1 - 0.05  # more than five points of bias
    assert np.mean(effect) == pytest.approx(0.1, abs=4 * effect.std() / np.sqrt(600))
    assert 0.925 <= np.mean((low <= 0.1) & (high >= 0.1)) <= 0.985


@pytest.mark.parametrize(("n", "accuracy"), [(30, 0.97), (60, 0.9), (400, 0.8)])
def test_the_interval_of_the_worst_groups_change_covers(n, accuracy):
    """One group clearly the worst in both models, of which a tenth of the answers differ: Tango's limits on each half,
    combined."""
    rng, group = np.random.default_rng(n), np.repeat([0, 1, 2], n)
    before = rng.random((1000, 3 * n)) < np.where(group == 0, accuracy - 0.3, accuracy)
    after = before ^ (rng.random(before.shape) < 0.1)
    truth = 0.1 * (1 - 2 * (accuracy - 0.3))
    _, low, high = many_pairs(group, before, after).T
    assert 0.93 <= np.mean((low <= truth) & (truth <= high)) <= 0.985


# --- the replicates ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_classes", [2, 3])
def test_tables_of_weighted_images_are_the_tables_of_images_repeated_so_often(n_classes):
    test_set = random_test_set(n_classes=n_classes)
    weights_BN = np.random.default_rng(1).integers(0, 4, (5, test_set.n)).astype(np.uint8)
    tables = ReplicateTables(test_set, ["a", "c"], test_set.group_N, 3).count(weights_BN)
    for b, weights_N in enumerate(weights_BN):
        for c, cell in enumerate(("a", "c")):
            repeated = [
                np.repeat(codes, weights_N)
                for codes in (test_set.group_N, test_set.label_N, test_set.predictions[cell])
            ]
            np.testing.assert_array_equal(tables[..., b, c], count_table(*repeated, 3, n_classes))


def test_images_are_drawn_with_replacement_within_each_intersection():
    test_set = random_test_set(n=300)
    weights_BN = image_weights(test_set, 1000).astype(float)
    sizes = np.bincount(test_set.intersection_N)
    for code, size in enumerate(sizes):
        assert (weights_BN[:, test_set.intersection_N == code].sum(axis=1) == size).all()
    # each weight is binomial(size, 1 / size)
    variance = 1 - 1 / sizes[test_set.intersection_N]
    assert weights_BN.mean(axis=0) == pytest.approx(np.ones(300), abs=5 / np.sqrt(1000))
    assert weights_BN.var(axis=0).mean() == pytest.approx(variance.mean(), rel=0.02)


def test_replicates_do_not_depend_on_the_number_of_threads(monkeypatch):
    test_set, eligible_G = random_test_set(), np.ones(3, bool)
    found = []
    for threads in ("1", "3"):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        found.append(resampled_metrics(test_set, ["a", "b"], 600, eligible_G))
    np.testing.assert_array_equal(found[0][1], found[1][1])
    for c, cell in enumerate(("a", "b")):
        counts = count_table(test_set.group_N, test_set.label_N, test_set.predictions[cell], 3, 2)
        expected = [group_metrics(counts)[name] for name in METRICS]
        np.testing.assert_allclose(found[0][0][:, c], expected, atol=1e-6)


def test_changes_of_groups_add_up_to_the_change_of_all_in_every_replicate():
    test_set = random_test_set()
    study = JointBootstrap(with_labels(two_cells()), {"d": test_set}, 300, 0.95)
    pairs = study.pairs(study.rows)
    observed_P, all_BP = study.changes(pairs)
    won_N = 100.0 * (test_set.correct("b").astype(int) - test_set.correct("a"))
    is_of_NG = np.eye(3)[test_set.group_N]
    of_group_G, of_group_BG = study.sums("d", won_N[:, None] * is_of_NG / test_set.n)
    assert of_group_G.sum() == pytest.approx(observed_P[0])
    np.testing.assert_allclose(of_group_BG.sum(axis=1), all_BP[:, 0], atol=1e-4)
    won = test_set.correct("b").mean() - test_set.correct("a").mean()
    assert observed_P[0] == pytest.approx(100 * won)


# --- permutations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 7, 64, 100, 1500])
def test_coins_are_binomial(n):
    drawn = fair_coins(n, 20_000, np.random.default_rng(n))
    assert drawn.min() >= 0 and drawn.max() <= n
    assert drawn.mean() == pytest.approx(n / 2, abs=5 * np.sqrt(n / 4 / 20_000))
    assert drawn.var() == pytest.approx(n / 4, rel=0.05)


def test_permutation_p_values_by_hand():
    """Two groups of 4, all right at FP32; quantization breaks two in the first. Of the 28 ways to place the two flips,
    12 put both in one group: the gap changes by 0.5 there, by 0 else, and 0.5 is further from the mean, 0.21."""
    counts = np.zeros((2, 2, 2, 2), int)
    counts[0, 0, 0] = [2, 2]
    counts[1, 0, 0] = [4, 0]
    everyone_G, rng = np.ones(2, bool), np.random.default_rng(0)
    p = flip_permutation_test(counts, everyone_G, 20_000, generator=rng, enough=20_000)
    assert p["accuracy_gap"] == pytest.approx(12 / 28, abs=0.02)
    assert np.isnan(p["accuracy"]) and np.isnan(p["equal_opportunity_difference"])
    # of the four ways to swap two flips, both stay or both go: |change| 0.5; or one each: no change of the gap
    p = swap_test(counts, everyone_G, 20_000, generator=rng, enough=20_000)
    assert p["accuracy_gap"] == pytest.approx(1 / 2, abs=0.02)


def harder_hit(lost: int):
    """4 groups of 100 images of each label, all right at FP32; the first loses `lost` of each label, the others 5."""
    counts = np.zeros((4, 2, 2, 2), int)
    for g in range(4):
        flipped = lost if g == 0 else 5
        counts[g, 0, 0], counts[g, 1, 1] = [100 - flipped, flipped], [flipped, 100 - flipped]
    return counts


def test_permutations_stop_early_and_give_the_p_value_of_many():
    """Besag & Clifford: 100 as far out, over the number drawn. The relative error of p is a tenth, so 5 of them."""
    everyone_G, many = np.ones(4, bool), 20_000
    for lost in (7, 10):
        rng = np.random.default_rng(lost)
        expected = flip_permutation_test(harder_hit(lost), everyone_G, many, generator=rng, enough=many)["accuracy_gap"]
        drawn = [
            flip_permutation_test(harder_hit(lost), everyone_G, many, generator=rng)["accuracy_gap"] for _ in range(10)
        ]
        assert drawn == pytest.approx([expected] * 10, rel=0.5)
        assert np.mean(drawn) == pytest.approx(expected, rel=0.15)
        n_drawn = 100 / np.array(drawn)
        np.testing.assert_allclose(n_drawn, np.round(n_drawn), atol=1e-6)


def test_a_small_p_of_a_gap_can_survive_the_correction_over_hundreds():
    """All of a study of 475 comparisons hit one group: each must be able to stand after Holm."""
    most = permutations(475, 760, 10_000, 0.95)
    p = flip_permutation_test(harder_hit(30), np.ones(4, bool), most, generator=np.random.default_rng(0))
    assert p["accuracy_gap"] == 1 / (1 + most)
    assert holm(np.full(475, p["accuracy_gap"])).max() < 0.05
    assert permutations(2, 3, 10_000, 0.95) == 2000
    assert permutations(2, 3, 99, 0.95) == 99
    assert permutations(10_000, 15_000, 10_000, 0.95) == PERMUTATIONS_IN_ALL // 15_000  # a bounded time


@pytest.mark.parametrize("test", [swap_test, flip_permutation_test])
def test_permutations_of_three_classes_keep_what_they_should(test):
    test_set = random_test_set(n=600, n_classes=3)
    first, second = test_set.predictions["a"], test_set.predictions["b"]
    counts = paired_count_table(test_set.group_N, test_set.label_N, first, second, 3, 3)
    p = test(counts, np.ones(3, bool), 199, generator=np.random.default_rng(0))
    assert tuple(p) == METRICS
    assert all(1 / 200 <= value <= 1 for value in p.values() if not np.isnan(value))
    assert np.isnan(p["accuracy"]) == (test is flip_permutation_test)


def test_the_tables_read_back_as_written(unequal):
    rows, test_sets = unequal
    table = paired_significance(rows, test_sets, 199, 0.95)
    again = pd.read_csv(io.StringIO(table.to_csv(index=False)), keep_default_na=False, na_values=[""])
    assert again["effect"].to_numpy() == pytest.approx(table["effect"].to_numpy(), nan_ok=True)
    assert not again.duplicated(["cell", "comparison", "metric", "group"]).any()
