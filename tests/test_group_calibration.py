import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom

from analysis.group_calibration import ALL, RELIABILITY_COLUMNS, calibration_errors, confidences, reliability
from group_counts import wilson_interval


def logits_of(confidence, predicted):
    """Two-class logits whose largest softmax probability is `confidence`."""
    margin = np.log(confidence / (1 - np.asarray(confidence, dtype=float)))
    logits = np.zeros((len(margin), 2))
    logits[np.arange(len(margin)), predicted] = margin
    return logits


def test_confidence_is_the_largest_softmax_probability():
    logits = np.array([[0.0, 0.0, 0.0], [np.log(2), 0.0, 0.0], [1000.0, 0.0, 0.0]])
    np.testing.assert_allclose(confidences(logits), [1 / 3, 1 / 2, 1.0])


def test_reliability_and_expected_calibration_error_worked_by_hand():
    """Two bins, [0.5, 0.75) and [0.75, 1]. Group a: 0.6 right, 0.7 wrong, 0.9 right; b: 0.8 wrong."""
    logits = logits_of([0.6, 0.7, 0.9, 0.8], [0, 1, 1, 0])
    table = reliability(logits, np.array([0, 0, 1, 1]), np.array([0, 0, 0, 1]), ["a", "b", "nobody"], bins=2)
    assert tuple(table) == RELIABILITY_COLUMNS
    assert list(table["group"]) == [ALL, ALL, "a", "a", "b", "b"]  # no rows of a group that has no image
    assert list(table["n"]) == [2, 2, 2, 1, 0, 1]
    np.testing.assert_allclose(table["confidence"], [0.65, 0.85, 0.65, 0.9, np.nan, 0.8])
    np.testing.assert_allclose(table["accuracy"], [0.5, 0.5, 0.5, 1.0, np.nan, 0.0])
    np.testing.assert_allclose(table["bin_low"][:2], [0.5, 0.75])
    low, high = wilson_interval([1, 1, 1, 1, 0, 0], [2, 2, 2, 1, 0, 1])
    np.testing.assert_allclose(table["ci_low"], low)
    np.testing.assert_allclose(table["ci_high"], high)
    errors = calibration_errors(table).set_index("group")
    # all: (2 * 0.15 + 2 * 0.35) / 4; a: (2 * 0.15 + 1 * 0.1) / 3; b: 0.8
    np.testing.assert_allclose(errors.loc[[ALL, "a", "b"], "expected_calibration_error"], [0.25, 0.4 / 3, 0.8])
    assert list(errors["n"]) == [4, 3, 1]


def test_by_chance_is_the_mean_absolute_deviation_of_a_binomial():
    """Two images of confidence 0.7, one bin: E|X - 1.4| / 2 = (0.09 * 1.4 + 0.42 * 0.4 + 0.49 * 0.6) / 2."""
    logits = logits_of([0.7, 0.7], [0, 0])
    table = reliability(logits, np.array([0, 1]), np.array([0, 0]), ["a"], bins=1)
    assert calibration_errors(table)["by_chance"].iloc[0] == pytest.approx((0.09 * 1.4 + 0.42 * 0.4 + 0.49 * 0.6) / 2)
    for n, p in ((7, 0.5), (40, 0.93), (5, 0.8)):  # n p an integer too
        hits = np.arange(n + 1)
        expected = float(binom.pmf(hits, n, p) @ np.abs(hits - n * p)) / n
        table = reliability(
            logits_of(np.full(n, p), np.zeros(n, int)), np.zeros(n, int), np.zeros(n, int), ["a"], bins=3
        )
        assert calibration_errors(table)["by_chance"].iloc[0] == pytest.approx(expected)


def test_a_calibrated_model_misses_the_diagonal_as_much_as_chance_says():
    """200 data sets of 40 images that are right with their confidence: the mean error is the mean of `by_chance`."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(200):
        confidence = rng.uniform(0.5, 1.0, 40)
        is_right = rng.random(40) < confidence
        logits = logits_of(confidence, np.zeros(40, int))
        table = reliability(logits, np.where(is_right, 0, 1), np.zeros(40, int), ["a"], bins=5)
        found.append(calibration_errors(table)[["expected_calibration_error", "by_chance"]].iloc[0])
    error, chance = np.mean(found, axis=0)
    assert error == pytest.approx(chance, rel=0.06)


def test_every_image_is_in_one_bin_whatever_rounding_does():
    edges = np.linspace(0.5, 1, 11)
    confidence = np.clip(edges, 0.5, 1 - 1e-15)
    table = reliability(logits_of(confidence, np.zeros(11, int)), np.zeros(11, int), np.zeros(11, int), ["a"])
    assert list(table[table["group"] == "a"]["n"]) == [1] * 9 + [2]  # an edge belongs to the bin above, 1 to the last
    equal = reliability(np.zeros((3, 7)), np.zeros(3, int), np.zeros(3, int), ["a"])
    assert list(equal[equal["group"] == ALL]["n"]) == [3] + [0] * 9


def test_errors_are_those_of_each_cell():
    one = reliability(logits_of([0.9], [0]), np.array([0]), np.array([0]), ["a"]).assign(cell="one")
    two = one.assign(cell="two", accuracy=0.0)
    errors = calibration_errors(pd.concat([one, two])).set_index(["cell", "group"])["expected_calibration_error"]
    assert errors["one", "a"] == pytest.approx(0.1) and errors["two", "a"] == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bins": 0}, "bins must be at least 1"),
        ({"label_N": np.zeros(3, int)}, r"logits must be \(N, K\)"),
        ({"logits_NK": np.array([[np.nan, 1.0], [0.0, 1.0]])}, "logits must be finite"),
    ],
)
def test_bad_input_is_refused(change, message):
    good = {"logits_NK": np.eye(2), "label_N": np.arange(2), "group_N": np.zeros(2, int), "group_names": ["a"]}
    with pytest.raises(ValueError, match=message):
        reliability(**(good | change))
