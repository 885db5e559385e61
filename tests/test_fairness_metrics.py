"""The public fairness functions: of arrays, of predictions with names, and of a model with a loader."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import evaluation
import fairness_metrics
from fairness_metrics import SHORT_NAMES, compute_fairness_metrics, metrics_of_predictions
from group_counts import METRICS, count_table, group_metrics

# Group f: labels 1 1 0 0, predictions 1 0 0 0. Group m: labels 1 1 0 0, predictions 1 1 1 0.
Y_TRUE = np.array([1, 1, 0, 0, 1, 1, 0, 0])
Y_PRED = np.array([1, 0, 0, 0, 1, 1, 1, 0])
GENDER = np.array(["f", "f", "f", "f", "m", "m", "m", "m"])
EXPECTED = {
    "worst_group_accuracy": 0.75,
    "accuracy_gap": 0.0,
    "demographic_parity_difference": 0.5,  # 1/4 and 3/4
    "disparate_impact": 1 / 3,
    "equalized_odds_difference": 0.5,  # TPR 1/2 and 1, FPR 0 and 1/2
    "equalized_odds_mean": 0.5,
    "equal_opportunity_difference": 0.5,
    "predictive_equality_difference": 0.5,
    "predictive_parity_difference": 1 / 3,  # 1 and 2/3
}


# --- of arrays --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXPECTED)
def test_each_function_by_hand(name):
    value = getattr(fairness_metrics, name)(Y_TRUE, Y_PRED, GENDER)
    assert isinstance(value, float)
    assert value == pytest.approx(EXPECTED[name], abs=1e-15)


# One sample with the larger range in the true positive rate, one with it in the false positive rate: equalized odds is
# the one, then the other, and beside that no two metrics have the same value.
@pytest.mark.parametrize(("seed", "larger"), [(0, "equal_opportunity"), (4, "predictive_equality")])
@pytest.mark.parametrize("name", EXPECTED)
def test_each_function_is_the_metric_of_its_name(name, seed, larger):
    generator = np.random.default_rng(seed)
    group_N, y_true, y_pred = (generator.integers(0, size, 97) for size in (3, 2, 2))
    expected = {
        key: float(value) for key, value in group_metrics(count_table(group_N, y_true, y_pred, 3, 2), 30).items()
    }
    assert expected["equalized_odds_difference"] == expected[f"{larger}_difference"]
    assert len(set(expected.values())) == len(METRICS) - 1
    assert getattr(fairness_metrics, name)(y_true, y_pred, group_N, min_group_size=30) == expected[name]


@pytest.mark.parametrize(
    "convert",
    [
        list,
        pd.Series,
        lambda a: pd.Series(a, index=range(100, 108)),
        lambda a: a.astype(bool) if a.dtype.kind == "i" else a,
        lambda a: a.astype(float) if a.dtype.kind == "i" else a.astype(object),
        lambda a: a.astype(np.uint8) if a.dtype.kind == "i" else np.where(a == "f", -1, 1),
    ],
)
def test_lists_series_booleans_whole_floats_and_any_group_values_are_taken(convert):
    arguments = (convert(Y_TRUE), convert(Y_PRED), convert(GENDER))
    assert fairness_metrics.disparate_impact(*arguments) == pytest.approx(1 / 3)


def test_small_groups_are_left_out():
    y_true, y_pred, group = [*Y_TRUE, 1, 1], [*Y_PRED, 0, 0], [*GENDER, "x", "x"]
    assert fairness_metrics.worst_group_accuracy(y_true, y_pred, group) == 0.0
    assert fairness_metrics.worst_group_accuracy(y_true, y_pred, group, min_group_size=3) == 0.75
    assert np.isnan(fairness_metrics.accuracy_gap(y_true, y_pred, group, min_group_size=5))


def test_n_classes_says_that_two_observed_classes_are_of_three():
    y_true, y_pred, group = [0, 0, 1, 0, 0, 1], [0, 1, 1, 0, 0, 1], [0, 0, 0, 1, 1, 1]
    # The true positive rates of class 1 are 1 and 1, those of class 0 are 1/2 and 1.
    assert fairness_metrics.equal_opportunity_difference(y_true, y_pred, group) == 0.0
    assert fairness_metrics.equal_opportunity_difference(y_true, y_pred, group, n_classes=3) == 0.5


@pytest.mark.parametrize(
    ("y_true", "y_pred", "sensitive", "message"),
    [
        ([0, 1], [0.2, 0.8], ["a", "b"], "y_pred must hold class labels 0, 1, …; it holds fractions"),
        ([0, np.nan], [0, 1], ["a", "b"], "y_true must hold class labels 0, 1, …; it holds fractions or missing"),
        ([-1, 1], [1, 1], ["a", "b"], "y_true must hold class labels 0, 1, …; it holds -1"),
        (["no", "yes"], [1, 1], ["a", "b"], "y_true must hold class labels 0, 1, …; it holds <U3"),
        ([0, 1], [[0, 1]], ["a", "b"], r"y_pred must be a non-empty one-dimensional array; its shape is \(1, 2\)"),
        ([], [], [], "y_true must be a non-empty"),
        ([0, 1], [0, 1], ["a", None], "sensitive has 1 missing values; the first is at 1"),
        ([0, 1], [0, 1], [np.nan, 1.0], "sensitive has 1 missing values; the first is at 0"),
        ([0, 1], [0, 1], pd.Series([pd.NA, 1], dtype="Int64"), "sensitive has 1 missing values"),
        ([0, 1], [0, 1], np.array(["a", 1], dtype=object), "sensitive mixes values"),
        ([0, 1], [0, 1], ["a"], "unequal lengths: group 1, label 2, prediction 2"),
    ],
)
def test_bad_arrays_are_refused_with_a_reason(y_true, y_pred, sensitive, message):
    with pytest.raises(ValueError, match=message):
        fairness_metrics.demographic_parity_difference(y_true, y_pred, sensitive)


# --- of predictions with names ----------------------------------------------------------------------------------------


def test_metrics_of_predictions():
    result = metrics_of_predictions(Y_TRUE, Y_PRED, (GENDER == "m").astype(int), ["f", "m", "other"], ["no", "yes"])
    assert list(result) == [*METRICS, "worst_group", "groups_left_out", "groups"]
    assert {name: result[name] for name in EXPECTED} == pytest.approx(EXPECTED)
    assert all(type(result[name]) is float for name in METRICS)
    assert (result["accuracy"], result["worst_group"], result["groups_left_out"]) == (0.75, "f", 1)
    assert [(row["group"], row["class"], row["n"]) for row in result["groups"]] == [
        ("f", "yes", 4),
        ("m", "yes", 4),
        ("other", "yes", 0),
    ]


def test_metrics_of_predictions_when_every_group_is_too_small():
    result = metrics_of_predictions(Y_TRUE, Y_PRED, np.zeros(8, int), ["f"], ["no", "yes"], min_group_size=9)
    assert result["worst_group"] is None
    assert np.isnan(result["worst_group_accuracy"])
    assert result["groups_left_out"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], [], [], ["f"], ["no", "yes"]), "no samples"),
        (([0], [2], [0], ["f"], ["no", "yes"]), "prediction 2 at position 0 is outside 0..1"),
        (([0], [1], [3], ["f", "m"], ["no", "yes"]), "group 3 at position 0 is outside 0..1"),
    ],
)
def test_bad_predictions_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        metrics_of_predictions(*arguments)


# --- of a model with a loader -----------------------------------------------------------------------------------------


class FirstPixel(nn.Module):
    """A model whose logits are the first pixel of the image, so that a test can say what it predicts."""

    def __init__(self, n_logits=2):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(n_logits))

    def forward(self, x_NCHW):
        return x_NCHW[:, : len(self.weight), 0, 0] @ self.weight


def loader_of(logits_NK, y_true=Y_TRUE, **sensitive):
    """Batches of three, as the data sets here give them, whose images hold the logits."""
    sensitive = sensitive or {"gender": (GENDER == "m").astype(int), "age": np.array([0, 0, 2, 2, 0, 0, 0, 0])}
    images = torch.zeros(len(y_true), 3, 4, 4)
    images[:, : logits_NK.shape[1], 0, 0] = torch.as_tensor(logits_NK, dtype=torch.float32)
    return [
        {
            "image": images[start : start + 3],
            "label": torch.as_tensor(y_true[start : start + 3]),
            "sensitive": {name: torch.as_tensor(codes[start : start + 3]) for name, codes in sensitive.items()},
        }
        for start in range(0, len(y_true), 3)
    ]


LOGITS = np.eye(2)[Y_PRED]


def test_compute_fairness_metrics_of_one_attribute():
    metrics = compute_fairness_metrics(FirstPixel(), loader_of(LOGITS))
    assert {name: metrics[name] for name in EXPECTED} == pytest.approx(EXPECTED)
    assert metrics["demographic_parity"] == metrics["demographic_parity_difference"] == 0.5
    assert metrics["equalized_odds"] == metrics["equalized_odds_difference"] == 0.5
    assert metrics["equal_opportunity"] == metrics["equal_opportunity_difference"] == 0.5
    assert (metrics["accuracy"], metrics["n"]) == (0.75, 8)
    assert metrics["model_size_mb"] == evaluation.model_size_mb(FirstPixel()) > 0
    assert (metrics["worst_group"], metrics["groups_left_out"]) == ("0", 0)
    assert [row["group"] for row in metrics["groups"]] == ["0", "1"]
    assert metrics["by_attribute"]["gender"]["disparate_impact"] == metrics["disparate_impact"]
    with pytest.raises(KeyError):
        metrics["demographic_partiy"]


def test_each_short_name_is_the_difference_it_is_short_for():
    # TPR 1 and 1, FPR 0 and 1/2, selection rates 1/2 and 3/4.
    metrics = compute_fairness_metrics(FirstPixel(), loader_of(np.eye(2)[[1, 1, 0, 0, 1, 1, 1, 0]]))
    assert [metrics[name] for name in ("demographic_parity", "equalized_odds", "equal_opportunity")] == [0.25, 0.5, 0.0]


def test_several_attributes_give_each_of_them_and_their_intersection():
    metrics = compute_fairness_metrics(FirstPixel(), loader_of(LOGITS), ["gender", "age"])
    assert list(metrics["by_attribute"]) == ["gender", "age"]
    assert metrics["by_attribute"]["gender"]["demographic_parity"] == 0.5
    assert [row["group"] for row in metrics["by_attribute"]["age"]["groups"]] == ["0", "2"]
    assert [(row["group"], row["n"]) for row in metrics["groups"]] == [
        ("0 & 0", 2),
        ("0 & 2", 2),
        ("1 & 0", 4),
        ("1 & 2", 0),
    ]
    assert metrics["worst_group"] == "0 & 0"  # accuracy 1/2
    assert metrics["worst_group_accuracy"] == 0.5
    assert metrics["groups_left_out"] == 1
    assert metrics["demographic_parity"] == 0.75  # 1/2, 0, 3/4
    assert metrics["n"] == 8


def test_every_documented_key_is_there():
    expected = {*METRICS, *SHORT_NAMES, "worst_group", "groups_left_out", "groups", "n"}
    for attributes in ("gender", ["gender"], ["gender", "age"]):
        metrics = compute_fairness_metrics(FirstPixel(), loader_of(LOGITS), attributes)
        assert set(metrics) == expected | {"model_size_mb", "by_attribute"}
        assert all(set(result) == expected for result in metrics["by_attribute"].values())


def test_min_group_size_reaches_the_metrics():
    metrics = compute_fairness_metrics(FirstPixel(), loader_of(LOGITS), "age", min_group_size=3)
    assert metrics["groups_left_out"] == 1
    assert np.isnan(metrics["accuracy_gap"])
    assert [row["too_small"] for row in metrics["groups"]] == [False, True]


def test_an_attribute_with_one_group_has_no_gaps():
    metrics = compute_fairness_metrics(FirstPixel(), loader_of(LOGITS, gender=np.ones(8, int)))
    assert all(np.isnan(metrics[name]) for name in (*SHORT_NAMES, "disparate_impact", "accuracy_gap"))
    assert (metrics["worst_group"], metrics["worst_group_accuracy"]) == ("1", 0.75)


def test_a_single_logit_is_a_threshold_at_zero():
    logits_N1 = np.where(Y_PRED == 1, 0.3, -0.2)[:, None]
    metrics = compute_fairness_metrics(FirstPixel(1), loader_of(logits_N1))
    assert metrics["accuracy"] == 0.75
    assert metrics["disparate_impact"] == pytest.approx(1 / 3)


def test_the_classes_are_the_models_not_those_that_occur():
    logits_NK = np.eye(3)[Y_PRED]  # a three-class model that never says 2
    metrics = compute_fairness_metrics(FirstPixel(3), loader_of(logits_NK))
    assert [row["class"] for row in metrics["groups"]] == ["0", "1", "2"] * 2


def test_tuples_are_batches_too():
    loader = loader_of(LOGITS)
    tuples = [(batch["image"], batch["label"], batch["sensitive"]) for batch in loader]
    assert compute_fairness_metrics(FirstPixel(), tuples) == compute_fairness_metrics(FirstPixel(), loader)


def test_the_model_is_left_as_it_was():
    model = FirstPixel().train()
    before = model.weight.detach().clone()
    compute_fairness_metrics(model, loader_of(LOGITS))
    assert model.training
    assert model.weight.grad is None
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize(
    ("loader", "attribute", "message"),
    [
        (loader_of(LOGITS), "gendr", "unknown sensitive attribute 'gendr'; the loader has 'gender', 'age'"),
        (loader_of(LOGITS), ["gender", "race"], "unknown sensitive attribute 'race'"),
        ([(batch["image"], batch["label"]) for batch in loader_of(LOGITS)], "gender", "the loader has none"),
        (loader_of(LOGITS), [], "sensitive_attr is empty"),
        (loader_of(LOGITS), ["age", "age"], "names an attribute twice"),
        ([], "gender", "the loader is empty"),
        (loader_of(LOGITS, Y_TRUE + 1), "gender", "label 2 at position 0 is outside 0..1"),
    ],
)
def test_what_cannot_be_measured_is_refused(loader, attribute, message):
    with pytest.raises(ValueError, match=message):
        compute_fairness_metrics(FirstPixel(), loader, attribute)


def test_a_model_without_usable_logits_is_refused():
    with pytest.raises(evaluation.EvaluationError, match="8 of 8"):
        compute_fairness_metrics(FirstPixel(), loader_of(np.full((8, 2), np.nan)))
