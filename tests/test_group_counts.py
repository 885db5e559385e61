"""The count table and its metrics: hand-computed values, the rules for undefined rates, and fairlearn and AIF360."""

import logging
import warnings
from fractions import Fraction

import fairlearn.metrics as fl
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import binomtest

from group_counts import (
    METRICS,
    count_table,
    eligible_groups,
    group_metrics,
    group_rates,
    group_table,
    groups_left_out,
    intersect,
    paired_count_table,
    wilson_interval,
    worst_group,
)

TOLERANCE = {"rtol": 0, "atol": 1e-12}
GAPS = METRICS[3:]

# Two groups of 10. Group 0: 4 positives of which 3 found, 6 negatives of which 1 selected.
#                   Group 1: 5 positives of which 2 found, 5 negatives of which 2 selected.
HAND = np.array([[[5, 1], [1, 3]], [[3, 2], [3, 2]]])


def tables(min_count=0, max_count=30, groups=(1, 5), classes=(2, 4)):
    """Random (G, L, P) tables with at least one sample."""

    def table_of(shape):
        n_groups, n_classes = shape
        return arrays(np.int64, (n_groups, n_classes, n_classes), elements=st.integers(min_count, max_count))

    return (
        st.tuples(st.integers(*groups), st.integers(*classes)).flatmap(table_of).filter(lambda table: table.sum() > 0)
    )


def rows_of(counts):
    """(group, label, prediction) rows that have this table."""
    return np.repeat(np.argwhere(np.ones_like(counts)), counts.ravel(), axis=0).T


def metric(counts, name, **options):
    return float(group_metrics(np.asarray(counts), **options)[name])


# --- tables -----------------------------------------------------------------------------------------------------------


def test_count_table_counts_each_cell():
    table = count_table([0, 0, 2, 2, 2], [1, 1, 0, 1, 1], [1, 0, 0, 1, 1], n_groups=3, n_classes=2)
    assert table.dtype == np.int64
    assert table.tolist() == [[[0, 0], [1, 1]], [[0, 0], [0, 0]], [[1, 0], [0, 2]]]


@settings(deadline=None)
@given(tables())
def test_count_table_of_the_rows_of_a_table_is_that_table(counts):
    np.testing.assert_array_equal(count_table(*rows_of(counts), *counts.shape[:2]), counts)


def test_count_table_of_nothing_is_zero():
    assert count_table([], [], [], 2, 3).tolist() == np.zeros((2, 3, 3)).tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0, 2], [0, 1], [0, 1], 2, 2), "group 2 at position 1 is outside 0..1"),
        (([0, -1], [0, 1], [0, 1], 2, 2), "group -1 at position 1 is outside 0..1"),
        (([0, 1], [0, 3], [0, 1], 2, 3), "label 3 at position 1 is outside 0..2"),
        (([0, 1], [0, 1], [5, 1], 2, 2), "prediction 5 at position 0 is outside 0..1"),
        (([0, 1], [0, 1], [0], 2, 2), "unequal lengths: group 2, label 2, prediction 1"),
        (([[0, 1]], [0, 1], [0, 1], 2, 2), r"group must be one-dimensional; its shape is \(1, 2\)"),
        (([0, 1], [0, 1], [0.2, 0.7], 2, 2), "prediction must hold integer codes, not float64"),
        ((["a", "b"], [0, 1], [0, 1], 2, 2), "group must hold integer codes, not <U1"),
        (([0], [0], [0], 0, 2), "n_groups must be at least 1"),
        (([0], [0], [0], 1, 1), "n_classes must be at least 2"),
    ],
)
def test_count_table_says_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        count_table(*arguments)


def test_paired_table_has_both_models_as_margins():
    generator = np.random.default_rng(0)
    group_N, label_N, first_N, second_N = (generator.integers(0, size, 200) for size in (4, 3, 3, 3))
    paired = paired_count_table(group_N, label_N, first_N, second_N, 4, 3)
    assert paired.shape == (4, 3, 3, 3)
    np.testing.assert_array_equal(paired.sum(axis=3), count_table(group_N, label_N, first_N, 4, 3))
    np.testing.assert_array_equal(paired.sum(axis=2), count_table(group_N, label_N, second_N, 4, 3))


def test_intersect_is_the_full_product():
    codes_N, names = intersect(
        {"gender": np.array([0, 1, 1]), "race": np.array([2, 0, 2])}, {"gender": ["f", "m"], "race": ["a", "b", "c"]}
    )
    assert names == ["f & a", "f & b", "f & c", "m & a", "m & b", "m & c"]
    assert [names[code] for code in codes_N] == ["f & c", "m & a", "m & c"]


def test_intersect_of_one_attribute_is_that_attribute():
    codes_N, names = intersect({"gender": np.array([1, 0])}, {"gender": ["f", "m"], "unused": ["x"]})
    assert codes_N.tolist() == [1, 0]
    assert names == ["f", "m"]


@pytest.mark.parametrize(
    ("sensitive", "names", "message"),
    [
        ({}, {}, "at least one"),
        ({"age": [0]}, {"gender": ["f"]}, "no group names given for sensitive attribute 'age'"),
        ({"age": [0, 1], "race": [0]}, {"age": ["y", "o"], "race": ["a"]}, "unequal lengths"),
        ({"age": [0, 2]}, {"age": ["y", "o"]}, "sensitive attribute 'age' 2 at position 1 is outside 0..1"),
    ],
)
def test_intersect_says_what_is_wrong(sensitive, names, message):
    with pytest.raises(ValueError, match=message):
        intersect(sensitive, names)


# --- values computed by hand ------------------------------------------------------------------------------------------


def test_rates_by_hand():
    rates = group_rates(HAND)
    assert {name: value.tolist() for name, value in rates.items()} == {
        "n": [10, 10],
        "positives": [4, 5],
        "base_rate": [0.4, 0.5],
        "accuracy": [0.8, 0.5],
        "selection_rate": [0.4, 0.4],
        "true_positive_rate": [3 / 4, 2 / 5],
        "false_positive_rate": [1 / 6, 2 / 5],
        "true_negative_rate": [5 / 6, 3 / 5],
        "false_negative_rate": [1 / 4, 3 / 5],
        "positive_predictive_value": [3 / 4, 2 / 4],
        "negative_predictive_value": [5 / 6, 3 / 6],
    }


def test_metrics_by_hand():
    tpr_range, fpr_range = 3 / 4 - 2 / 5, 2 / 5 - 1 / 6
    expected = {
        "accuracy": 13 / 20,
        "balanced_accuracy": (8 / 11 + 5 / 9) / 2,
        "worst_group_accuracy": 0.5,
        "accuracy_gap": 0.3,
        "demographic_parity_difference": 0.0,
        "disparate_impact": 1.0,
        "equalized_odds_difference": tpr_range,
        "equalized_odds_mean": (tpr_range + fpr_range) / 2,
        "equal_opportunity_difference": tpr_range,
        "predictive_equality_difference": fpr_range,
        "predictive_parity_difference": 0.25,
    }
    measured = group_metrics(HAND)
    assert tuple(measured) == METRICS == tuple(expected)
    for name, value in measured.items():
        assert value.shape == ()
        assert float(value) == pytest.approx(expected[name], abs=1e-15), name


def test_disparate_impact_by_hand():
    # Selection rates 2/10, 8/10, 5/10.
    counts = np.array([[[8, 2], [0, 0]], [[2, 8], [0, 0]], [[5, 5], [0, 0]]])
    assert metric(counts, "disparate_impact") == 0.25
    assert metric(counts, "demographic_parity_difference") == pytest.approx(0.6)


def test_equalized_odds_is_the_false_positive_range_where_that_is_larger():
    counts = np.array([[[9, 1], [5, 5]], [[1, 9], [5, 5]]])
    assert metric(counts, "equalized_odds_difference") == pytest.approx(0.8)
    assert metric(counts, "equalized_odds_mean") == pytest.approx(0.4)


def test_three_classes_by_hand():
    # Every prediction is right except that group 1 has 4 of its 10 class-2 samples taken for class 0.
    counts = np.array([np.diag([10, 10, 10]), [[10, 0, 0], [0, 10, 0], [4, 0, 6]]])
    measured = {name: float(value) for name, value in group_metrics(counts).items()}
    assert measured["accuracy"] == pytest.approx(56 / 60)
    assert measured["balanced_accuracy"] == pytest.approx((1 + 1 + 16 / 20) / 3)
    assert measured["worst_group_accuracy"] == pytest.approx(26 / 30)
    assert measured["demographic_parity_difference"] == pytest.approx(4 / 30)  # class 0 and class 2
    assert measured["disparate_impact"] == pytest.approx(6 / 10)  # class 2; class 0 has 10/14
    assert measured["equal_opportunity_difference"] == pytest.approx(0.4)  # class 2
    assert measured["predictive_equality_difference"] == pytest.approx(4 / 20)  # class 0
    assert measured["equalized_odds_difference"] == pytest.approx(0.4)  # class 2: max(0.4, 0)
    assert measured["equalized_odds_mean"] == pytest.approx(0.2)  # class 2: (0.4 + 0) / 2, class 0: (0 + 0.2) / 2
    assert measured["predictive_parity_difference"] == pytest.approx(4 / 14)  # class 0


def test_worst_group_breaks_ties_by_lowest_index_and_passes_over_small_groups():
    small, half, full = [[0, 1], [0, 0]], [[1, 1], [1, 1]], [[2, 0], [0, 2]]
    assert worst_group(np.array([full, half, half]), 1) == 1
    assert worst_group(np.array([small, full, half]), 1) == 0
    assert worst_group(np.array([small, full, half]), 2) == 2
    assert worst_group(np.array([small, full, half]), 5) is None


def test_group_table_by_hand():
    rows = group_table(np.concatenate([HAND, np.zeros((1, 2, 2), int)]), ["a", "b", "c"], ["no", "yes"], 10)
    assert [row["group"] for row in rows] == ["a", "b", "c"]
    interval = binomtest(8, 10).proportion_ci(method="wilson")
    first = rows[0]
    assert (first["accuracy_ci_low"], first["accuracy_ci_high"]) == pytest.approx((interval.low, interval.high))
    assert {name: value for name, value in first.items() if not name.startswith("accuracy_ci")} == {
        "group": "a",
        "class": "yes",
        "n": 10,
        "positives": 4,
        "base_rate": 0.4,
        "accuracy": 0.8,
        "selection_rate": 0.4,
        "true_positive_rate": 0.75,
        "false_positive_rate": 1 / 6,
        "positive_predictive_value": 0.75,
        "too_small": False,
    }
    empty = rows[2]
    assert (empty["n"], empty["positives"], empty["too_small"]) == (0, 0, True)
    assert all(np.isnan(value) for value in empty.values() if isinstance(value, float))


def test_group_table_has_a_row_for_each_class_of_three():
    counts = np.array([[[1, 0, 0], [0, 2, 0], [1, 0, 2]]])
    rows = group_table(counts, ["a"], ["x", "y", "z"], 1)
    assert [(row["class"], row["positives"], row["true_positive_rate"]) for row in rows] == [
        ("x", 1, 1.0),
        ("y", 2, 1.0),
        ("z", 3, 2 / 3),
    ]
    assert {row["accuracy"] for row in rows} == {5 / 6}


@pytest.mark.parametrize(("groups", "classes"), [(["a"], ["x", "y"]), (["a", "b"], ["x", "y", "z"])])
def test_group_table_refuses_names_that_do_not_fit(groups, classes):
    with pytest.raises(ValueError, match="names for"):
        group_table(HAND, groups, classes, 1)


# --- undefined rates and small groups ---------------------------------------------------------------------------------


def test_undefined_rates_are_nan_not_zero():
    rates = group_rates(np.array([[[3, 0], [0, 0]], [[0, 0], [2, 0]], [[0, 0], [0, 0]]]))
    np.testing.assert_array_equal(rates["true_positive_rate"], [np.nan, 0, np.nan])
    np.testing.assert_array_equal(rates["false_positive_rate"], [0, np.nan, np.nan])
    np.testing.assert_array_equal(rates["positive_predictive_value"], [np.nan, np.nan, np.nan])
    np.testing.assert_array_equal(rates["selection_rate"], [0, 0, np.nan])
    np.testing.assert_array_equal(rates["n"], [3, 2, 0])


def test_a_group_without_positives_is_left_out_where_fairlearn_calls_it_zero():
    perfect = np.array([[[4, 0], [0, 0]], [[4, 0], [0, 4]], [[2, 0], [0, 2]]])
    group_N, label_N, prediction_N = rows_of(perfect)
    assert fl.equal_opportunity_difference(label_N, prediction_N, sensitive_features=group_N) == 1.0
    assert metric(perfect, "equal_opportunity_difference") == 0.0
    assert metric(perfect, "equalized_odds_difference") == 0.0


def test_equalized_odds_is_nan_where_one_of_its_ranges_is():
    # One group alone has positives: its TPR has nothing to be compared with. The FPR range is 1/2.
    counts = np.array([[[2, 2], [1, 3]], [[4, 0], [0, 0]]])
    assert np.isnan(metric(counts, "equal_opportunity_difference"))
    assert metric(counts, "predictive_equality_difference") == 0.5
    assert np.isnan(metric(counts, "equalized_odds_difference"))
    assert np.isnan(metric(counts, "equalized_odds_mean"))


def test_a_class_that_no_two_groups_define_is_left_out_of_the_worst_class():
    # Class 2 occurs in group 0 alone. Class 1: TPR 1/2 and 1, FPR 0 and 0. Class 0: TPR 1 and 1, FPR 1/4 and 0.
    counts = np.array([[[2, 0, 0], [1, 1, 0], [0, 0, 2]], [[2, 0, 0], [0, 2, 0], [0, 0, 0]]])
    assert metric(counts, "equal_opportunity_difference") == 0.5
    assert metric(counts, "equalized_odds_difference") == 0.5
    assert metric(counts, "equalized_odds_mean") == 0.25
    assert metric(counts, "predictive_parity_difference") == pytest.approx(1 / 3)  # class 0: 2/3 and 1


def test_nothing_selected_has_no_disparate_impact():
    counts = np.array([[[3, 0], [2, 0]], [[3, 0], [2, 0]]])
    assert np.isnan(metric(counts, "disparate_impact"))
    assert metric(counts, "demographic_parity_difference") == 0.0
    group_N, label_N, prediction_N = rows_of(counts)
    assert np.isnan(fl.demographic_parity_ratio(label_N, prediction_N, sensitive_features=group_N))


def test_nothing_selected_in_one_group_is_a_disparate_impact_of_zero():
    assert metric([[[3, 0], [2, 0]], [[3, 1], [2, 0]]], "disparate_impact") == 0.0


def test_one_group_has_no_gaps():
    measured = group_metrics(HAND[:1])
    assert all(np.isnan(measured[name]) for name in GAPS)
    assert float(measured["worst_group_accuracy"]) == float(measured["accuracy"]) == 0.8


def test_groups_that_are_too_small_leave_the_gaps_but_not_the_accuracy():
    tiny = np.array([[[0, 3], [0, 0]]])  # 3 samples, all wrong
    with_tiny = np.concatenate([HAND, tiny])
    measured, without = group_metrics(with_tiny, min_group_size=4), group_metrics(HAND)
    for name in (*GAPS, "worst_group_accuracy"):
        assert float(measured[name]) == float(without[name]), name
    assert float(measured["accuracy"]) == 13 / 23
    assert float(measured["balanced_accuracy"]) == pytest.approx((8 / 14 + 5 / 9) / 2)
    assert groups_left_out(with_tiny, 4) == 1
    assert groups_left_out(with_tiny, 3) == 0
    assert eligible_groups(with_tiny, 4).tolist() == [True, True, False]


def test_eligible_replaces_the_decision_by_size():
    with_tiny = np.concatenate([HAND, [[[0, 3], [0, 0]]]])
    measured = group_metrics(with_tiny, min_group_size=1, eligible=np.array([True, True, False]))
    assert float(measured["worst_group_accuracy"]) == 0.5
    with pytest.raises(ValueError, match="eligible has 2 groups"):
        group_metrics(with_tiny, eligible=np.array([True, True]))


def test_an_empty_table_is_nan_throughout():
    empty = np.zeros((2, 2, 2), int)
    assert all(np.isnan(value) for value in group_metrics(empty).values())
    assert worst_group(empty, 1) is None
    assert groups_left_out(empty, 1) == 2


def test_no_warning_leaves_an_undefined_table():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group_metrics(np.zeros((4, 3, 3, 3), int))
        group_rates(np.zeros((4, 3, 3, 3), int))
        group_table(np.zeros((3, 3, 3), int), "abc", "xyz", 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: group_metrics(np.zeros((2, 2))), "counts must have shape"),
        (lambda: group_metrics(np.zeros((2, 2, 3))), "counts must have shape"),
        (lambda: group_metrics(np.zeros((2, 1, 1))), "two classes"),
        (lambda: group_metrics(HAND, min_group_size=0), "min_group_size must be at least 1"),
        (lambda: group_rates(HAND, positive=2), "positive class 2 is outside 0..1"),
        (lambda: worst_group(np.stack([HAND, HAND]), 1), "not a batch"),
        (lambda: groups_left_out(np.stack([HAND, HAND]), 1), "not a batch"),
    ],
)
def test_bad_tables_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- properties -------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(tables(), st.integers(1, 40), st.randoms(use_true_random=False))
def test_the_order_of_the_groups_does_not_matter(counts, min_group_size, random):
    order = list(range(len(counts)))
    random.shuffle(order)
    shuffled = group_metrics(counts[order], min_group_size)
    for name, value in group_metrics(counts, min_group_size).items():
        np.testing.assert_allclose(shuffled[name], value, **TOLERANCE, err_msg=name)


@settings(deadline=None)
@given(tables(classes=(3, 4)), st.randoms(use_true_random=False))
def test_the_order_of_three_or_more_classes_does_not_matter(counts, random):
    order = list(range(counts.shape[-1]))
    random.shuffle(order)
    shuffled = group_metrics(counts[:, order][:, :, order])
    for name, value in group_metrics(counts).items():
        np.testing.assert_allclose(shuffled[name], value, **TOLERANCE, err_msg=name)


@settings(deadline=None)
@given(tables(), st.integers(1, 40))
def test_an_empty_group_changes_nothing(counts, min_group_size):
    more = np.concatenate([counts, np.zeros_like(counts[:1])])
    for name, value in group_metrics(counts, min_group_size).items():
        np.testing.assert_array_equal(group_metrics(more, min_group_size)[name], value, err_msg=name)


@settings(deadline=None)
@given(tables(), st.integers(1, 40))
def test_metrics_are_nan_or_between_zero_and_one(counts, min_group_size):
    for name, value in group_metrics(counts, min_group_size).items():
        assert np.isnan(value) or 0 <= value <= 1, name


@settings(deadline=None)
@given(tables(), st.integers(1, 40))
def test_worst_group_has_the_worst_group_accuracy(counts, min_group_size):
    worst, accuracy = (
        worst_group(counts, min_group_size),
        metric(counts, "worst_group_accuracy", min_group_size=min_group_size),
    )
    if worst is None:
        assert np.isnan(accuracy)
    else:
        assert group_rates(counts)["accuracy"][worst] == accuracy


@pytest.mark.parametrize("n_classes", [2, 3])
def test_batch_dimensions_equal_a_loop(n_classes):
    batch = np.random.default_rng(1).poisson(0.7, (3, 4, 5, n_classes, n_classes))  # many empty cells: many NaN
    together, rates = group_metrics(batch, min_group_size=3), group_rates(batch, positive=n_classes - 1)
    for index in np.ndindex(3, 4):
        for name, value in group_metrics(batch[index], min_group_size=3).items():
            np.testing.assert_array_equal(together[name][index], value, err_msg=name)
        for name, value in group_rates(batch[index], positive=n_classes - 1).items():
            np.testing.assert_array_equal(rates[name][index], value, err_msg=name)


def worst_over_classes_by_definition(counts, min_group_size):
    """The metrics written as loops over groups and classes in exact arithmetic: an independent second version."""
    n_groups, n_classes, _ = counts.shape
    large = [g for g in range(n_groups) if counts[g].sum() >= min_group_size]

    def ratio(a, b):
        return None if b == 0 else Fraction(int(a), int(b))

    def gap(rates):
        rates = [rate for rate in rates if rate is not None]
        return max(rates) - min(rates) if len(rates) > 1 else None

    found = {name: [] for name in GAPS}
    found["accuracy_gap"] = [gap([ratio(np.trace(counts[g]), counts[g].sum()) for g in large])]
    for c in [1] if n_classes == 2 else range(n_classes):
        selection, tpr, fpr, ppv = [], [], [], []
        for g in large:
            rest = [k for k in range(n_classes) if k != c]
            tp, fn = counts[g, c, c], counts[g, c, rest].sum()
            fp, tn = counts[g, rest, c].sum(), counts[g][np.ix_(rest, rest)].sum()
            selection.append(ratio(tp + fp, tp + fp + fn + tn))
            tpr.append(ratio(tp, tp + fn))
            fpr.append(ratio(fp, fp + tn))
            ppv.append(ratio(tp, tp + fp))
        found["demographic_parity_difference"].append(gap(selection))
        is_ratio = len(selection) > 1 and max(selection) > 0
        found["disparate_impact"].append(min(selection) / max(selection) if is_ratio else None)
        found["equal_opportunity_difference"].append(gap(tpr))
        found["predictive_equality_difference"].append(gap(fpr))
        found["predictive_parity_difference"].append(gap(ppv))
        both = None not in (gap(tpr), gap(fpr))
        found["equalized_odds_difference"].append(max(gap(tpr), gap(fpr)) if both else None)
        found["equalized_odds_mean"].append((gap(tpr) + gap(fpr)) / 2 if both else None)
    worst = {}
    for name, values in found.items():
        values = [value for value in values if value is not None]
        worst[name] = float((min if name == "disparate_impact" else max)(values)) if values else np.nan
    return worst


@settings(max_examples=200, deadline=None)
@given(tables(max_count=4), st.integers(1, 12))
def test_gaps_equal_their_definition_written_as_loops(counts, min_group_size):
    measured = group_metrics(counts, min_group_size)
    for name, value in worst_over_classes_by_definition(counts, min_group_size).items():
        np.testing.assert_allclose(measured[name], value, **TOLERANCE, err_msg=name)


@pytest.mark.parametrize("level", [0.9, 0.95, 0.99])
def test_wilson_interval_equals_scipy(level):
    for n in (1, 2, 7, 50, 1000):
        for successes in {0, 1, n // 3, n - 1, n}:
            expected = binomtest(successes, n).proportion_ci(level, method="wilson")
            measured = [float(bound) for bound in wilson_interval(successes, n, level)]
            assert measured == pytest.approx([expected.low, expected.high], abs=1e-12)
            assert 0 <= measured[0] <= successes / n <= measured[1] <= 1


def test_wilson_interval_of_nothing_is_nan_and_bad_input_is_refused():
    low, high = wilson_interval([0, 5], [0, 10])
    assert np.isnan(low).tolist() == np.isnan(high).tolist() == [True, False]
    with pytest.raises(ValueError, match="successes"):
        wilson_interval(3, 2)
    with pytest.raises(ValueError, match="level"):
        wilson_interval(1, 2, level=95)


# --- other libraries --------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(tables(min_count=1, groups=(2, 4), classes=(2, 2)))
def test_equals_fairlearn_without_a_zero_denominator(counts):
    group_N, label_N, prediction_N = rows_of(counts)
    theirs = {
        "demographic_parity_difference": fl.demographic_parity_difference,
        "disparate_impact": fl.demographic_parity_ratio,
        "equalized_odds_difference": fl.equalized_odds_difference,
        "equalized_odds_mean": lambda *args, **kw: fl.equalized_odds_difference(*args, **kw, agg="mean"),
        "equal_opportunity_difference": fl.equal_opportunity_difference,
    }
    measured = group_metrics(counts)
    for name, function in theirs.items():
        value = function(label_N, prediction_N, sensitive_features=group_N)
        np.testing.assert_allclose(measured[name], value, **TOLERANCE, err_msg=name)


@settings(max_examples=25, deadline=None)
@given(tables(min_count=1, groups=(1, 4), classes=(2, 2)))
def test_rates_equal_a_fairlearn_metric_frame(counts):
    group_N, label_N, prediction_N = rows_of(counts)
    theirs = {
        "n": fl.count,
        "selection_rate": fl.selection_rate,
        "true_positive_rate": fl.true_positive_rate,
        "false_positive_rate": fl.false_positive_rate,
        "true_negative_rate": fl.true_negative_rate,
        "false_negative_rate": fl.false_negative_rate,
    }
    frame = fl.MetricFrame(metrics=theirs, y_true=label_N, y_pred=prediction_N, sensitive_features=group_N)
    rates = group_rates(counts)
    for name in theirs:
        np.testing.assert_allclose(rates[name], frame.by_group[name], **TOLERANCE, err_msg=name)


@settings(max_examples=12, deadline=None)
@given(tables(min_count=1, groups=(2, 3), classes=(3, 4)))
def test_worst_class_equals_the_worst_of_fairlearn_one_vs_rest(counts):
    group_N, label_N, prediction_N = rows_of(counts)

    def each_class(function):
        for positive in range(counts.shape[-1]):
            yield function(label_N == positive, prediction_N == positive, sensitive_features=group_N)

    measured = group_metrics(counts)
    for name, expected in {
        "demographic_parity_difference": max(each_class(fl.demographic_parity_difference)),
        "disparate_impact": min(each_class(fl.demographic_parity_ratio)),
        "equalized_odds_difference": max(each_class(fl.equalized_odds_difference)),
        "equal_opportunity_difference": max(each_class(fl.equal_opportunity_difference)),
    }.items():
        np.testing.assert_allclose(measured[name], expected, **TOLERANCE, err_msg=name)


@pytest.fixture(scope="module")
def aif360_metric():
    """Function from a two-group table to AIF360's ClassificationMetric (group 1 privileged)."""
    pytest.importorskip("aif360")
    logging.disable(logging.WARNING)  # on import it warns of every optional package that is not installed
    try:
        from aif360.datasets import BinaryLabelDataset
        from aif360.metrics import ClassificationMetric
    finally:
        logging.disable(logging.NOTSET)

    def dataset(label_N, group_N):
        return BinaryLabelDataset(
            df=pd.DataFrame({"label": label_N, "group": group_N}).astype(float),
            label_names=["label"],
            protected_attribute_names=["group"],
            favorable_label=1.0,
            unfavorable_label=0.0,
        )

    def classification_metric(counts):
        group_N, label_N, prediction_N = rows_of(counts)
        return ClassificationMetric(
            dataset(label_N, group_N),
            dataset(prediction_N, group_N),
            unprivileged_groups=[{"group": 0.0}],
            privileged_groups=[{"group": 1.0}],
        )

    return classification_metric


@settings(max_examples=25, deadline=None)
@given(counts=tables(min_count=1, groups=(2, 2), classes=(2, 2)))
def test_equals_aif360_without_a_zero_denominator(aif360_metric, counts):
    theirs = aif360_metric(counts)
    ratio = theirs.disparate_impact()  # unprivileged / privileged: ours is that or its inverse
    expected = {
        "accuracy": theirs.accuracy(),
        "accuracy_gap": abs(theirs.error_rate_difference()),
        "demographic_parity_difference": abs(theirs.statistical_parity_difference()),
        "disparate_impact": min(ratio, 1 / ratio),
        "equalized_odds_difference": theirs.equalized_odds_difference(),
        "equalized_odds_mean": theirs.average_abs_odds_difference(),
        "equal_opportunity_difference": abs(theirs.equal_opportunity_difference()),
        "predictive_equality_difference": abs(theirs.false_positive_rate_difference()),
        "predictive_parity_difference": abs(theirs.false_discovery_rate_difference()),
    }
    measured = group_metrics(counts)
    for name, value in expected.items():
        np.testing.assert_allclose(measured[name], value, **TOLERANCE, err_msg=name)
    rates = group_rates(counts)
    for group, is_privileged in ((0, False), (1, True)):
        for name, value in {
            "base_rate": theirs.base_rate(is_privileged),
            "true_positive_rate": theirs.true_positive_rate(is_privileged),
            "false_positive_rate": theirs.false_positive_rate(is_privileged),
            "positive_predictive_value": theirs.positive_predictive_value(is_privileged),
            "negative_predictive_value": theirs.negative_predictive_value(is_privileged),
        }.items():
            np.testing.assert_allclose(rates[name][group], value, **TOLERANCE, err_msg=name)


def test_where_aif360_differs_with_a_zero_denominator(aif360_metric):
    # Group 0 has no positives and none selected; every prediction is right.
    perfect = np.array([[[4, 0], [0, 0]], [[4, 0], [0, 4]]])
    theirs = aif360_metric(perfect)
    with np.errstate(invalid="ignore"):
        assert np.isnan(theirs.equal_opportunity_difference())  # as ours
        assert theirs.positive_predictive_value(False) == 0.0
        # Python's max(0.0, nan) is 0.0: the undefined range drops out because of the order of the arguments.
        assert theirs.equalized_odds_difference() == 0.0
    assert np.isnan(metric(perfect, "equal_opportunity_difference"))
    assert np.isnan(group_rates(perfect)["positive_predictive_value"][0])
    assert np.isnan(metric(perfect, "predictive_parity_difference"))
    assert np.isnan(metric(perfect, "equalized_odds_difference"))
