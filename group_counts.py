"""The (group, label, prediction) count table, and every group metric computed from it.

A classifier's predictions on a data set, as far as accuracy and group fairness go, are one table of counts:
``counts[g, l, p]`` is the number of samples of group g with true label l that were given label p. All metrics here are
pure functions of that table and accept any leading batch dimensions, so a bootstrap of B tables is one call.

Shapes: G groups, L true labels, P predictions (L == P), K classes looked at one-vs-rest, N samples.

Three rules hold everywhere:

* An undefined rate, 0/0, is NaN, never 0. (fairlearn turns it into 0, so that perfect predictions on a group without
  positives have an equal-opportunity difference of 1; AIF360 does so for the predictive values.)
* A gap is taken over the groups that are *eligible* (large enough) and whose rate is defined; with fewer than two such
  groups there is nothing to compare and it is NaN.
* With two classes, class 1 is the positive one. With more, every class is looked at one-vs-rest and the worst class is
  reported: the largest difference, the smallest ratio. A class for which no two eligible groups define the metric is
  left out.
"""

from collections.abc import Mapping, Sequence
from statistics import NormalDist

import numpy as np

METRICS = (
    "accuracy",
    "balanced_accuracy",
    "worst_group_accuracy",
    "accuracy_gap",
    "demographic_parity_difference",
    "disparate_impact",
    "equalized_odds_difference",
    "equalized_odds_mean",
    "equal_opportunity_difference",
    "predictive_equality_difference",
    "predictive_parity_difference",
)


# --- from samples to a table ------------------------------------------------------------------------------------------


def count_table(group_N, label_N, prediction_N, n_groups: int, n_classes: int) -> np.ndarray:
    """Count the samples of each (group, true label, predicted label): a (G, L, P) int64 array.

    The three arguments are 1-D arrays of one length holding integers (or booleans), groups in ``0..n_groups-1`` and
    labels in ``0..n_classes-1``. A group or class that no sample has is a row of zeros. Anything else is a ValueError
    that names the argument, the first bad value and its position.
    """
    return _count(
        {"group": (group_N, n_groups), "label": (label_N, n_classes), "prediction": (prediction_N, n_classes)}
    )


def paired_count_table(
    group_N, label_N, first_prediction_N, second_prediction_N, n_groups: int, n_classes: int
) -> np.ndarray:
    """Count the samples of each (group, true label, prediction of one model, of another): (G, L, P, P) int64.

    Summed over its last axis it is the count table of the first model, over the one before that of the second. What
    is valid and what raises is as for `count_table`.
    """
    return _count(
        {
            "group": (group_N, n_groups),
            "label": (label_N, n_classes),
            "first prediction": (first_prediction_N, n_classes),
            "second prediction": (second_prediction_N, n_classes),
        }
    )


def intersect(sensitive: Mapping[str, np.ndarray], names: Mapping[str, Sequence[str]]) -> tuple[np.ndarray, list[str]]:
    """Cross several sensitive attributes into one.

    ``sensitive`` maps each attribute to its (N,) integer codes and ``names`` maps it to the names of those codes.
    Returns the (N,) int64 codes of the intersection and the names of *all* its groups, those without a sample
    included: the full product in the order of ``sensitive``, last attribute fastest, names joined by " & ". One
    attribute alone comes back as it is. Attributes without names, unequal lengths and codes without a name are
    ValueErrors.
    """
    if not sensitive:
        raise ValueError("intersect needs at least one sensitive attribute")
    nameless = [attribute for attribute in sensitive if attribute not in names]
    if nameless:
        raise ValueError(f"no group names given for sensitive attribute {', '.join(map(repr, nameless))}")
    sizes = [len(names[attribute]) for attribute in sensitive]
    codes_AN = _checked_codes(
        {
            f"sensitive attribute {attribute!r}": (codes_N, size)
            for (attribute, codes_N), size in zip(sensitive.items(), sizes, strict=True)
        }
    )
    group_names = [""]
    for position, attribute in enumerate(sensitive):
        separator = " & " if position else ""
        group_names = [f"{left}{separator}{right}" for left in group_names for right in names[attribute]]
    return np.ravel_multi_index(codes_AN, sizes).astype(np.int64), group_names


# --- from a table to rates and metrics --------------------------------------------------------------------------------


def group_rates(counts: np.ndarray, positive: int = 1) -> dict[str, np.ndarray]:
    """The rates of every group, class ``positive`` against the rest.

    ``counts`` is (..., G, L, P). Returns (..., G) float arrays under the names n, positives, base_rate, accuracy,
    selection_rate, true_positive_rate, false_positive_rate, true_negative_rate, false_negative_rate,
    positive_predictive_value and negative_predictive_value. ``accuracy`` is that of the prediction itself (over all
    classes), not of positive against the rest; with two classes they are the same. 0/0 is NaN.
    """
    counts = _checked_counts(counts)
    n_classes = counts.shape[-1]
    if not 0 <= positive < n_classes:
        raise ValueError(f"positive class {positive} is outside 0..{n_classes - 1}")
    n, positives, selected, hits = (a[..., 0] for a in _one_vs_rest(counts, slice(positive, positive + 1)))
    negatives = n - positives
    rejected = n - selected
    false_alarms = selected - hits
    correct_rejections = negatives - false_alarms
    return {
        "n": n.astype(float),
        "positives": positives.astype(float),
        "base_rate": _ratio(positives, n),
        "accuracy": _group_accuracy(counts),
        "selection_rate": _ratio(selected, n),
        "true_positive_rate": _ratio(hits, positives),
        "false_positive_rate": _ratio(false_alarms, negatives),
        "true_negative_rate": _ratio(correct_rejections, negatives),
        "false_negative_rate": _ratio(positives - hits, positives),
        "positive_predictive_value": _ratio(hits, selected),
        "negative_predictive_value": _ratio(correct_rejections, rejected),
    }


def eligible_groups(counts: np.ndarray, min_group_size: int) -> np.ndarray:
    """Which groups are large enough to enter a gap: (..., G) booleans, n >= ``min_group_size``.

    ``min_group_size`` is at least 1, so an empty group is never eligible.
    """
    if min_group_size < 1:
        raise ValueError(f"min_group_size must be at least 1, not {min_group_size}")
    return _checked_counts(counts).sum(axis=(-2, -1)) >= min_group_size


def group_metrics(
    counts: np.ndarray, min_group_size: int = 1, eligible: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Every metric of `METRICS`: a dict, in that order, of arrays of the batch shape (0-d without batch dimensions).

    ``counts`` is (..., G, L, P). ``eligible`` ((..., G) booleans, broadcast) replaces the decision by
    ``min_group_size``: a bootstrap fixes the groups from the observed table, so that every replicate measures the same
    quantity.

    ==============================  ====================================================================================
    accuracy                        over every sample, those of groups that are not eligible included
    balanced_accuracy               mean recall over the classes present, over every sample
    worst_group_accuracy            lowest accuracy of an eligible group (one such group is enough)
    accuracy_gap                    max - min accuracy
    demographic_parity_difference   max - min selection rate
    disparate_impact                min / max selection rate; NaN where nothing is selected in any group
    equalized_odds_difference       the larger of the TPR range and the FPR range
    equalized_odds_mean             the mean of the TPR range and the FPR range
    equal_opportunity_difference    max - min true positive rate
    predictive_equality_difference  max - min false positive rate
    predictive_parity_difference    max - min positive predictive value
    ==============================  ====================================================================================

    All are in [0, 1] or NaN. The two equalized-odds metrics are NaN where either range is: a criterion on both rates
    has not been measured when one of them has not, and reporting the other range alone would be a lower bound that
    makes a data set with missing positives look fairer. With several classes that is decided class by class: only
    classes with both ranges count. The TPR range and the FPR range may be over different groups, each over those
    that define it.
    """
    counts = _checked_counts(counts)
    if eligible is None:
        eligible = eligible_groups(counts, min_group_size)
    eligible_GK = np.asarray(eligible, dtype=bool)[..., None]
    if eligible_GK.shape[-2] != counts.shape[-3]:
        raise ValueError(f"eligible has {eligible_GK.shape[-2]} groups and counts have {counts.shape[-3]}")

    # With two classes the gaps of class 0 are not those of class 1 (only their difference in selection rate is the
    # same), and the convention is that class 1 is the favourable one.
    n, positives, selected, hits = _one_vs_rest(counts, slice(1, 2) if counts.shape[-1] == 2 else slice(None))
    lowest_K, highest_K = _extremes(_ratio(selected, n), eligible_GK)
    tpr_range_K = _range(_ratio(hits, positives), eligible_GK)
    fpr_range_K = _range(_ratio(selected - hits, n - positives), eligible_GK)
    ppv_range_K = _range(_ratio(hits, selected), eligible_GK)
    accuracy_G1 = _group_accuracy(counts)[..., None]

    values = {
        "accuracy": _accuracy(counts),
        "balanced_accuracy": _balanced_accuracy(counts),
        "worst_group_accuracy": _lowest(accuracy_G1, eligible_GK)[..., 0],
        "accuracy_gap": _range(accuracy_G1, eligible_GK)[..., 0],
        # fmax and fmin skip the classes that are NaN, and give NaN when all of them are.
        "demographic_parity_difference": np.fmax.reduce(highest_K - lowest_K, axis=-1),
        "disparate_impact": np.fmin.reduce(_ratio(lowest_K, highest_K), axis=-1),
        "equalized_odds_difference": np.fmax.reduce(np.maximum(tpr_range_K, fpr_range_K), axis=-1),
        "equalized_odds_mean": np.fmax.reduce((tpr_range_K + fpr_range_K) / 2, axis=-1),
        "equal_opportunity_difference": np.fmax.reduce(tpr_range_K, axis=-1),
        "predictive_equality_difference": np.fmax.reduce(fpr_range_K, axis=-1),
        "predictive_parity_difference": np.fmax.reduce(ppv_range_K, axis=-1),
    }
    return {name: np.asarray(values[name]) for name in METRICS}


def worst_group(counts: np.ndarray, min_group_size: int) -> int | None:
    """Index of the eligible group with the lowest accuracy of one (G, L, P) table.

    Ties go to the lowest index; None if no group is eligible.
    """
    counts = _checked_counts(counts, batched=False)
    eligible_G = eligible_groups(counts, min_group_size)
    if not eligible_G.any():
        return None
    return int(np.argmin(np.where(eligible_G, _group_accuracy(counts), np.inf)))


def groups_left_out(counts: np.ndarray, min_group_size: int) -> int:
    """How many groups of one (G, L, P) table are too small for the gaps, empty ones included.

    A group that is large enough but has, say, no positives is not counted here: it is left out of the gaps that need a
    true positive rate and no others; `group_table` shows its NaN.
    """
    return int(np.sum(~eligible_groups(_checked_counts(counts, batched=False), min_group_size)))


def group_table(
    counts: np.ndarray, group_names: Sequence[str], class_names: Sequence[str], min_group_size: int
) -> list[dict]:
    """One (G, L, P) table as rows of plain Python values, the empty groups included.

    One row a group with two classes (the positive class being 1), one a (group, class) with more. Columns: group,
    class (name of the positive class), n, positives, base_rate, accuracy, accuracy_ci_low, accuracy_ci_high (Wilson,
    95 %), selection_rate, true_positive_rate, false_positive_rate, positive_predictive_value, too_small. Undefined
    rates are NaN.
    """
    counts = _checked_counts(counts, batched=False)
    n_groups, n_classes, _ = counts.shape
    if len(group_names) != n_groups:
        raise ValueError(f"{len(group_names)} group names for {n_groups} groups")
    if len(class_names) != n_classes:
        raise ValueError(f"{len(class_names)} class names for {n_classes} classes")
    eligible_G = eligible_groups(counts, min_group_size)
    correct_G = np.trace(counts, axis1=-2, axis2=-1)
    low_G, high_G = wilson_interval(correct_G, counts.sum(axis=(-2, -1)))
    classes = (1,) if n_classes == 2 else range(n_classes)
    rates_of_class = {positive: group_rates(counts, positive) for positive in classes}
    rows = []
    for g in range(n_groups):
        for positive in classes:
            rate = {name: float(rate_G[g]) for name, rate_G in rates_of_class[positive].items()}
            rows.append(
                {
                    "group": str(group_names[g]),
                    "class": str(class_names[positive]),
                    "n": int(rate["n"]),
                    "positives": int(rate["positives"]),
                    "base_rate": rate["base_rate"],
                    "accuracy": rate["accuracy"],
                    "accuracy_ci_low": float(low_G[g]),
                    "accuracy_ci_high": float(high_G[g]),
                    "selection_rate": rate["selection_rate"],
                    "true_positive_rate": rate["true_positive_rate"],
                    "false_positive_rate": rate["false_positive_rate"],
                    "positive_predictive_value": rate["positive_predictive_value"],
                    "too_small": not bool(eligible_G[g]),
                }
            )
    return rows


def wilson_interval(successes, n, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's score interval of a proportion (Wilson 1927), elementwise: (low, high), NaN where n is 0.

    Unlike the Wald interval it stays in [0, 1] and does not collapse to a point at 0 % or 100 %, which is where small
    groups often are.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, not {level}")
    successes, n = np.asarray(successes, dtype=float), np.asarray(n, dtype=float)
    if np.any(successes < 0) or np.any(successes > n):
        raise ValueError("successes must be between 0 and n")
    z = NormalDist().inv_cdf((1 + level) / 2)
    centre = _ratio(successes + z**2 / 2, n + z**2)
    half_width = _ratio(z * np.sqrt(_ratio(successes * (n - successes), n) + z**2 / 4), n + z**2)
    # At 0 and n successes the bound is 0 and 1 exactly; rounding must not leave 1e-17, or 1 - 1e-16, outside the rate.
    low = np.where(successes == 0, np.where(n == 0, np.nan, 0.0), centre - half_width)
    high = np.where(successes == n, np.where(n == 0, np.nan, 1.0), centre + half_width)
    return low, high


# --- helpers ----------------------------------------------------------------------------------------------------------


def _count(columns: Mapping[str, tuple[np.ndarray, int]]) -> np.ndarray:
    for name, (_, size) in columns.items():
        fewest = 1 if name == "group" else 2
        if size < fewest:
            what = "n_groups" if name == "group" else "n_classes"
            raise ValueError(f"{what} must be at least {fewest}, not {size}")
    shape = tuple(int(size) for _, size in columns.values())
    cells_N = np.ravel_multi_index(_checked_codes(columns), shape)
    return np.bincount(cells_N, minlength=int(np.prod(shape))).reshape(shape).astype(np.int64)


def _checked_codes(columns: Mapping[str, tuple[np.ndarray, int]]) -> tuple[np.ndarray, ...]:
    """The columns, each (name: (codes, how many codes there are)), as int64 arrays of one length."""
    checked = {}
    for name, (codes_N, size) in columns.items():
        codes_N = np.asarray(codes_N)
        if codes_N.ndim != 1:
            raise ValueError(f"{name} must be one-dimensional; its shape is {codes_N.shape}")
        if codes_N.size and codes_N.dtype.kind not in "biu":
            raise ValueError(f"{name} must hold integer codes, not {codes_N.dtype}")
        outside_N = (codes_N < 0) | (codes_N >= size) if codes_N.size else np.zeros(0, dtype=bool)
        if outside_N.any():
            first = int(np.argmax(outside_N))
            raise ValueError(f"{name} {codes_N[first]} at position {first} is outside 0..{size - 1}")
        checked[name] = codes_N.astype(np.int64)
    lengths = {name: len(codes_N) for name, codes_N in checked.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"unequal lengths: {', '.join(f'{name} {length}' for name, length in lengths.items())}")
    return tuple(checked.values())


def _checked_counts(counts, batched: bool = True) -> np.ndarray:
    counts = np.asarray(counts)
    if counts.ndim < 3 or counts.shape[-1] != counts.shape[-2]:
        raise ValueError(f"counts must have shape (..., group, label, prediction), not {counts.shape}")
    if counts.shape[-1] < 2 or counts.shape[-3] < 1:
        raise ValueError(f"counts need at least one group and two classes; their shape is {counts.shape}")
    if not batched and counts.ndim != 3:
        raise ValueError(f"one (group, label, prediction) table is expected, not a batch of shape {counts.shape}")
    return counts


def _one_vs_rest(counts: np.ndarray, classes: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Samples (..., G, 1); and positives, selected and true positives of each of ``classes``, (..., G, K)."""
    positives_GK = counts.sum(axis=-1)
    selected_GK = counts.sum(axis=-2)
    hits_GK = np.diagonal(counts, axis1=-2, axis2=-1)
    n_G1 = positives_GK.sum(axis=-1, keepdims=True)
    return n_G1, positives_GK[..., classes], selected_GK[..., classes], hits_GK[..., classes]


def _ratio(numerator, denominator) -> np.ndarray:
    """numerator / denominator with 0/0 = NaN. (Nothing here divides a non-zero count by zero.)"""
    with np.errstate(invalid="ignore"):
        return np.true_divide(numerator, denominator)


def _accuracy(counts: np.ndarray) -> np.ndarray:
    return _ratio(np.trace(counts, axis1=-2, axis2=-1).sum(axis=-1), counts.sum(axis=(-3, -2, -1)))


def _group_accuracy(counts: np.ndarray) -> np.ndarray:
    return _ratio(np.trace(counts, axis1=-2, axis2=-1), counts.sum(axis=(-2, -1)))


def _balanced_accuracy(counts: np.ndarray) -> np.ndarray:
    confusion_LP = counts.sum(axis=-3)
    recall_L = _ratio(np.diagonal(confusion_LP, axis1=-2, axis2=-1), confusion_LP.sum(axis=-1))
    is_present_L = ~np.isnan(recall_L)
    return _ratio(np.where(is_present_L, recall_L, 0.0).sum(axis=-1), is_present_L.sum(axis=-1))


def _extremes(rate_GK: np.ndarray, eligible_GK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest defined rate of an eligible group, (..., K); both NaN with fewer than two such groups."""
    enters_GK = eligible_GK & ~np.isnan(rate_GK)
    is_comparison_K = enters_GK.sum(axis=-2) >= 2
    lowest_K = np.where(enters_GK, rate_GK, np.inf).min(axis=-2)
    highest_K = np.where(enters_GK, rate_GK, -np.inf).max(axis=-2)
    return np.where(is_comparison_K, lowest_K, np.nan), np.where(is_comparison_K, highest_K, np.nan)


def _range(rate_GK: np.ndarray, eligible_GK: np.ndarray) -> np.ndarray:
    lowest_K, highest_K = _extremes(rate_GK, eligible_GK)
    return highest_K - lowest_K


def _lowest(rate_GK: np.ndarray, eligible_GK: np.ndarray) -> np.ndarray:
    """Lowest defined rate of an eligible group, (..., K); NaN without one."""
    lowest_K = np.where(eligible_GK & ~np.isnan(rate_GK), rate_GK, np.inf).min(axis=-2)
    return np.where(np.isinf(lowest_K), np.nan, lowest_K)
