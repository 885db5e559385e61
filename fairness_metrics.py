"""Group fairness of a classifier: of arrays of predictions, and of a model with a data loader.

    metrics = compute_fairness_metrics(model, test_loader, sensitive_attr="gender")
    metrics["demographic_parity"], metrics["worst_group"], metrics["model_size_mb"]

The arithmetic, and the exact rules for undefined rates, small groups and more than two classes, are in
group_counts.py. In short: an undefined rate is NaN and never 0; a gap is over the groups of at least
``min_group_size`` samples whose rate is defined, NaN with fewer than two of them; with two classes, class 1 is the
positive one; with more, each class is taken against the rest and the worst class is reported.

On tables without a zero denominator these are the values of fairlearn (`demographic_parity_difference`,
`demographic_parity_ratio`, `equalized_odds_difference` with agg "worst_case" and "mean",
`equal_opportunity_difference`) and, for two groups, the absolute values of AIF360's `ClassificationMetric`. With a zero
denominator, these leave the group out of that gap; fairlearn takes 0/0 as 0, and AIF360 as 0 in predictive values and
accuracy and as NaN in true and false positive rates.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from evaluation import model_size_mb, predict, predicted_classes
from group_counts import METRICS, count_table, group_metrics, group_table, groups_left_out, intersect, worst_group

# The names a notebook uses, beside the full ones.
SHORT_NAMES = {
    "demographic_parity": "demographic_parity_difference",
    "equalized_odds": "equalized_odds_difference",
    "equal_opportunity": "equal_opportunity_difference",
}


# --- of a model with a loader -----------------------------------------------------------------------------------------


def compute_fairness_metrics(
    model, loader, sensitive_attr: str | Sequence[str] = "gender", *, min_group_size: int = 1, device=None
) -> dict:
    """Accuracy, group fairness and size of a model, measured on every sample of a loader.

    ``loader`` yields batches ``{"image": (N, 3, H, W), "label": (N,), "sensitive": {name: (N,) integers}}`` (or tuples
    of the three). The prediction is the class of the highest logit; a model with a single logit predicts class 1 where
    that logit is above 0. Each distinct value of a sensitive attribute is a group, named by that value, since a loader
    carries no other names.

    Returns a dict with

    * every name of `group_counts.METRICS`, and the short names demographic_parity, equalized_odds and
      equal_opportunity for the differences of the same name;
    * worst_group (its name, None if all are too small), groups_left_out (how many are too small), groups (one dict a
      group: n, positives, rates; see `group_counts.group_table`), n (samples);
    * model_size_mb;
    * by_attribute: for each attribute the same, without model_size_mb. With several attributes the numbers at the top
      are those of their intersection (groups such as "0 & 3", all combinations of the values present), with one they
      are that attribute's.

    An attribute that has a single group has nothing to be compared with: its gaps and its disparate impact are NaN.
    ValueError: no sensitive attribute, one named twice, or one the loader does not have (the message names those it
    has); an empty loader; labels outside the model's classes. evaluation.EvaluationError: logits that are not finite.
    For metric ranges and sources see the functions below.
    """
    attributes = [sensitive_attr] if isinstance(sensitive_attr, str) else list(sensitive_attr)
    if not attributes:
        raise ValueError("sensitive_attr is empty: name at least one sensitive attribute")
    if len(set(attributes)) < len(attributes):
        raise ValueError(f"sensitive_attr names an attribute twice: {', '.join(map(repr, attributes))}")

    predictions = predict(model, loader, device=device)
    unknown = [attribute for attribute in attributes if attribute not in predictions.sensitive]
    if unknown:
        raise ValueError(
            f"unknown sensitive attribute {', '.join(map(repr, unknown))}; "
            f"the loader has {', '.join(map(repr, predictions.sensitive)) or 'none'}"
        )
    y_pred, n_classes = _predicted_classes(predictions.logits)
    class_names = [str(k) for k in range(n_classes)]
    codes, names = {}, {}
    for attribute in attributes:
        codes[attribute], names[attribute] = _groups(predictions.sensitive[attribute], attribute)

    def measured(group_codes, group_names) -> dict:
        metrics = metrics_of_predictions(
            predictions.y_true, y_pred, group_codes, group_names, class_names, min_group_size=min_group_size
        )
        return metrics | {short: metrics[name] for short, name in SHORT_NAMES.items()} | {"n": len(y_pred)}

    by_attribute = {attribute: measured(codes[attribute], names[attribute]) for attribute in attributes}
    overall = by_attribute[attributes[0]] if len(attributes) == 1 else measured(*intersect(codes, names))
    return {**overall, "model_size_mb": model_size_mb(model), "by_attribute": by_attribute}


def metrics_of_predictions(
    y_true,
    y_pred,
    group_codes,
    group_names: Sequence[str],
    class_names: Sequence[str],
    *,
    min_group_size: int = 1,
) -> dict:
    """All metrics of predicted classes: a dict of plain Python values.

    ``y_true``, ``y_pred`` (labels, indices into ``class_names``) and ``group_codes`` (indices into ``group_names``)
    are (N,) integers. Returns every name of `group_counts.METRICS` as a float (NaN where undefined), and worst_group
    (name or None), groups_left_out and groups (`group_counts.group_table`). A ValueError says which array has a
    wrong length, type or value; no samples is one too.
    """
    counts = count_table(group_codes, y_true, y_pred, len(group_names), len(class_names))
    if not counts.any():
        raise ValueError("there are no samples to measure")
    metrics: dict = {name: float(value) for name, value in group_metrics(counts, min_group_size).items()}
    worst = worst_group(counts, min_group_size)
    metrics["worst_group"] = None if worst is None else str(group_names[worst])
    metrics["groups_left_out"] = groups_left_out(counts, min_group_size)
    metrics["groups"] = group_table(counts, group_names, class_names, min_group_size)
    return metrics


# --- of arrays --------------------------------------------------------------------------------------------------------
#
# y_true, y_pred: (N,) labels 0..K-1, as integers, booleans or whole floats. sensitive: (N,) integers or strings, each
# distinct value a group. n_classes: K where it is known; otherwise the largest label + 1, at least 2 (which is another
# number only if the highest classes occur neither as label nor as prediction). All raise ValueError for anything else
# (probabilities, missing values, unequal lengths, no samples), and are NaN where fewer than two groups can be compared.


def demographic_parity_difference(
    y_true, y_pred, sensitive, *, min_group_size: int = 1, n_classes: int | None = None
) -> float:
    """Largest difference between two groups in P(prediction = 1), in [0, 1]; 0 is parity.

    Also called statistical parity: Dwork et al., "Fairness through awareness" (2012); Calders & Verwer (2010). The
    labels are not used beyond being checked.
    """
    return _metric("demographic_parity_difference", y_true, y_pred, sensitive, min_group_size, n_classes)


def disparate_impact(y_true, y_pred, sensitive, *, min_group_size: int = 1, n_classes: int | None = None) -> float:
    """Smallest ratio between two groups' P(prediction = 1), in [0, 1]; 1 is parity, below 0.8 fails the 80 % rule.

    Feldman et al., "Certifying and removing disparate impact" (2015), who divide the protected group's rate by the
    other's; min / max needs no choice of a protected group and is the smaller of the ratio and its inverse. NaN where
    nothing is selected in any group.
    """
    return _metric("disparate_impact", y_true, y_pred, sensitive, min_group_size, n_classes)


def equalized_odds_difference(
    y_true, y_pred, sensitive, *, min_group_size: int = 1, n_classes: int | None = None
) -> float:
    """The larger of the groups' range of true positive rate and range of false positive rate, in [0, 1].

    Hardt, Price & Srebro, "Equality of opportunity in supervised learning" (2016). NaN where either range is: one
    alone is only a lower bound.
    """
    return _metric("equalized_odds_difference", y_true, y_pred, sensitive, min_group_size, n_classes)


def equalized_odds_mean(y_true, y_pred, sensitive, *, min_group_size: int = 1, n_classes: int | None = None) -> float:
    """The mean of the groups' range of true positive rate and range of false positive rate, in [0, 1].

    For two groups the average absolute odds difference of AIF360 (Bellamy et al., 2018). NaN where either range is.
    """
    return _metric("equalized_odds_mean", y_true, y_pred, sensitive, min_group_size, n_classes)


def equal_opportunity_difference(
    y_true, y_pred, sensitive, *, min_group_size: int = 1, n_classes: int | None = None
) -> float:
    """Largest difference between two groups in P(prediction = 1 | label = 1), in [0, 1].

    Hardt, Price & Srebro (2016), section 2. Groups without positives are left out.
    """
    return _metric("equal_opportunity_difference", y_true, y_pred, sensitive, min_group_size, n_classes)


def predictive_equality_difference(
    y_true, y_pred, sensitive, *, min_group_size: int = 1, n_classes: int | None = None
) -> float:
    """Largest difference between two groups in P(prediction = 1 | label = 0), in [0, 1].

    Corbett-Davies et al., "Algorithmic decision making and the cost of fairness" (2017). Groups without negatives are
    left out.
    """
    return _metric("predictive_equality_difference", y_true, y_pred, sensitive, min_group_size, n_classes)


def predictive_parity_difference(
    y_true, y_pred, sensitive, *, min_group_size: int = 1, n_classes: int | None = None
) -> float:
    """Largest difference between two groups in P(label = 1 | prediction = 1), in [0, 1].

    Chouldechova, "Fair prediction with disparate impact" (2017). Groups in which nothing is selected are left out.
    """
    return _metric("predictive_parity_difference", y_true, y_pred, sensitive, min_group_size, n_classes)


def accuracy_gap(y_true, y_pred, sensitive, *, min_group_size: int = 1, n_classes: int | None = None) -> float:
    """Largest difference between two groups in accuracy (over all classes), in [0, 1].

    Overall accuracy equality: Berk et al. (2018); the comparison made by Buolamwini & Gebru, "Gender shades" (2018).
    """
    return _metric("accuracy_gap", y_true, y_pred, sensitive, min_group_size, n_classes)


def worst_group_accuracy(y_true, y_pred, sensitive, *, min_group_size: int = 1, n_classes: int | None = None) -> float:
    """Lowest accuracy of a group (over all classes), in [0, 1]; a single group is enough.

    Sagawa et al., "Distributionally robust neural networks for group shifts" (2020). Groups here are the values of
    ``sensitive``; pass attribute and label combined to have theirs.
    """
    return _metric("worst_group_accuracy", y_true, y_pred, sensitive, min_group_size, n_classes)


# --- helpers ----------------------------------------------------------------------------------------------------------


def _metric(name: str, y_true, y_pred, sensitive, min_group_size: int, n_classes: int | None) -> float:
    assert name in METRICS
    y_true, y_pred = _labels(y_true, "y_true"), _labels(y_pred, "y_pred")
    group_codes, group_names = _groups(sensitive, "sensitive")
    if n_classes is None:
        n_classes = max(2, 1 + int(max(y_true.max(), y_pred.max())))
    counts = count_table(group_codes, y_true, y_pred, len(group_names), n_classes)
    return float(group_metrics(counts, min_group_size)[name])


def _labels(labels, name: str) -> np.ndarray:
    """Labels as a 1-D integer array; whole floats are taken, since a notebook's labels often are."""
    labels_N = np.asarray(labels)
    if labels_N.ndim != 1 or not labels_N.size:
        raise ValueError(f"{name} must be a non-empty one-dimensional array; its shape is {labels_N.shape}")
    if labels_N.dtype.kind == "f":
        if not np.all(np.isfinite(labels_N) & (labels_N == np.round(labels_N))):
            raise ValueError(f"{name} must hold class labels 0, 1, …; it holds fractions or missing values")
        labels_N = labels_N.astype(np.int64)
    if labels_N.dtype.kind not in "biu" or labels_N.min() < 0:
        what = f"{labels_N.min()}" if labels_N.dtype.kind == "i" else f"{labels_N.dtype}"
        raise ValueError(f"{name} must hold class labels 0, 1, …; it holds {what}")
    return labels_N


def _groups(sensitive, name: str) -> tuple[np.ndarray, list[str]]:
    """(N,) codes and the names of the distinct values, in sorted order."""
    values_N = np.asarray(sensitive)
    if values_N.ndim != 1 or not values_N.size:
        raise ValueError(f"{name} must be a non-empty one-dimensional array; its shape is {values_N.shape}")
    is_missing_N = pd.isna(values_N)
    if is_missing_N.any():
        raise ValueError(
            f"{name} has {int(is_missing_N.sum())} missing values; the first is at {is_missing_N.argmax()}"
        )
    try:
        distinct, codes_N = np.unique(values_N, return_inverse=True)
    except TypeError as error:
        raise ValueError(f"{name} mixes values that cannot be ordered (numbers and strings?): {error}") from error
    return codes_N, [str(value) for value in distinct.tolist()]


def _predicted_classes(logits_NK: np.ndarray) -> tuple[np.ndarray, int]:
    """Predicted class of each sample and the number of classes."""
    return predicted_classes(logits_NK), max(2, logits_NK.shape[1])
