"""Confidence statements about fairness bounds: "the gap is at most 0.05", said wrongly no more often than promised.

    bound = gap_bounds(counts_GLP, "demographic_parity_difference", level=0.95, min_group_size=20)
    bound.high <= 0.05      # certified: were the true gap 0.05 or more, this would happen at most 5 % of the time

A gap is a maximum over pairs of groups, which a percentile bootstrap gets wrong near ties. The statement here is an
intersection-union test (Berger, Technometrics 1982): "some pair of groups differs by the bound or more" is rejected
only if it is rejected for every pair, each at the full level; no correction is due, and near ties it is only
conservative. So `high` is the largest one-sided upper limit. In the other direction, `low`, the pairs are corrected by
Bonferroni.

What holds the level for small groups and rates near 0 and 1 was decided by exact enumeration (worst case over the
nuisance rate, level 0.95, groups of 5 to 500 images; tests/test_certification.py repeats it):

difference of two groups    Newcombe's combination of one-sample limits (Statistics in Medicine 1998, method 10;
                            "MOVER", Zou & Donner 2008), of Clopper & Pearson's exact limits: wrong at most 5.3 % of the
                            time for bounds to 0.2, 5.5 % to 0.5. With Wilson's limits, as Newcombe has it, 13 %;
                            Miettinen & Nurminen's score limits 11 %. At level 0.9875, where 1.25 % may be wrong: 1.3 %
                            for groups of one size, but to 2.1 % where one has 20 images and the other 500
paired difference, a drop   Tango's score limits (Statistics in Medicine 1998), the difference moved by one image
                            against the claim as in Edwards' correction of McNemar's test: at most 5.1 %; without 6.9 %
accuracy of one group       Clopper & Pearson's exact limits (Biometrika 1934); Wilson's are wrong 8 % of the time where
                            a group of 20 has no error

The images must be independent of how the model was made and chosen. Shapes as in group_counts; 0/0 is NaN, and a NaN
limit certifies nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from group_counts import eligible_groups, group_metrics
from significance.rate_limits import difference_limits, paired_difference_limits, proportion_limits

GAPS = (
    "demographic_parity_difference",
    "equal_opportunity_difference",
    "predictive_equality_difference",
    "equalized_odds_difference",
    "predictive_parity_difference",
    "accuracy_gap",
)
DROP = "worst_group_drop"
MIN_GROUP_SIZE = 20  # below it no limit says much


@dataclass(frozen=True)
class GapBound:
    """What is known of a gap: `observed`, and one-sided limits, each at `level`.

    `pair`: the two groups (indices) that decide `high`; `n`: images in the groups compared. Not compared were the
    groups `left_out`, smaller than min_group_size, and `undefined`, large enough but without, say, positives: nothing
    is said about them. Likewise the classes `classes_left_out`, of more than two. `reason` says why all is NaN.
    """

    observed: float
    low: float
    high: float
    pair: tuple[int, int] | None
    n: int
    level: float
    left_out: tuple[int, ...]
    undefined: tuple[int, ...] = ()
    classes_left_out: tuple[int, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class GroupBound:
    """What is known of the worst group's drop or accuracy, as GapBound; `group` (an index) is observed to be worst."""

    observed: float
    low: float
    high: float
    group: int | None
    n: int
    level: float
    left_out: tuple[int, ...]
    reason: str = ""


DropBound = AccuracyBound = GroupBound


# --- of a whole table -------------------------------------------------------------------------------------------------


def gap_bounds(
    counts_GLP: np.ndarray, metric: str, level: float = 0.95, min_group_size: int = MIN_GROUP_SIZE
) -> GapBound:
    """Limits of one of `GAPS`. In at most 1 - level of samples the true gap is above `high`, likewise below `low`.

    Rates, eligible groups and classes are those of group_counts.group_metrics: class 1 of two, else the worst of all,
    equalized odds the worse of both rates. Fewer than two groups with a defined rate: NaN, and the `reason`.
    """
    _check(metric, GAPS, level)
    counts = _checked(counts_GLP, 3)
    eligible_G = eligible_groups(counts, min_group_size)
    comparisons, classes_left_out = _comparisons(counts, metric, eligible_G)
    left_out = tuple(np.flatnonzero(~eligible_G).tolist())
    if not comparisons:
        reason = _too_few(metric, counts, eligible_G, min_group_size)
        return GapBound(
            np.nan, np.nan, np.nan, None, 0, level, left_out, classes_left_out=classes_left_out, reason=reason
        )
    ways = 2 * sum(len(groups) * (len(groups) - 1) // 2 for groups in (c.groups for c in comparisons))
    high, low, pair = -np.inf, 0.0, None
    for comparison in comparisons:
        first, second = np.triu_indices(len(comparison.groups), 1)
        high_P = _largest_difference(comparison, level)[1]
        low_P = _largest_difference(comparison, 1 - (1 - level) / ways)[0]  # each pair, in either direction
        low = max(low, float(low_P.max()))
        if high_P.max() > high:
            high, place = float(high_P.max()), int(high_P.argmax())
            pair = (int(comparison.groups[first[place]]), int(comparison.groups[second[place]]))
    compared_G = np.zeros(len(counts), dtype=bool)
    compared_G[np.concatenate([c.groups for c in comparisons])] = True
    always_G = np.all([np.isin(np.arange(len(counts)), c.groups) for c in comparisons], axis=0)
    return GapBound(
        float(group_metrics(counts, min_group_size)[metric]),
        low,
        high,
        pair,
        int(counts[compared_G].sum()),
        level,
        left_out,
        tuple(np.flatnonzero(eligible_G & ~always_G).tolist()),
        classes_left_out,
    )


def worst_group_drop_bounds(
    paired_counts_GLFQ: np.ndarray, level: float = 0.95, min_group_size: int = MIN_GROUP_SIZE
) -> DropBound:
    """Limits of the largest drop of a group's accuracy, FP32 - quantized, in [-1, 1], from counts of (group, label,
    FP32 prediction, quantized prediction). Negative where quantization helped every group."""
    _check(DROP, (DROP,), level)
    counts = _checked(paired_counts_GLFQ, 4)
    broken_G, mended_G, n_G = _flips(counts)
    with np.errstate(invalid="ignore"):
        drop_G = (broken_G - mended_G) / n_G

    def limits(level: float) -> tuple[np.ndarray, np.ndarray]:
        return paired_difference_limits(broken_G, mended_G, n_G, level)

    return _worst(drop_G, limits, n_G, level, min_group_size, is_largest=True)


def worst_group_accuracy_bounds(
    counts_GLP: np.ndarray, level: float = 0.95, min_group_size: int = MIN_GROUP_SIZE
) -> AccuracyBound:
    """Limits of the lowest accuracy of a group. "No group is below x" is certified by `low` >= x."""
    _check("worst_group_accuracy", ("worst_group_accuracy",), level)
    counts = _checked(counts_GLP, 3)
    correct_G, n_G = np.trace(counts, axis1=-2, axis2=-1), counts.sum(axis=(-2, -1))
    with np.errstate(invalid="ignore"):
        accuracy_G = correct_G / n_G
    return _worst(
        accuracy_G, lambda level: proportion_limits(correct_G, n_G, level), n_G, level, min_group_size, is_largest=False
    )


def smallest_certifiable(
    counts: np.ndarray, metric: str, level: float = 0.95, min_group_size: int = MIN_GROUP_SIZE
) -> float:
    """The smallest bound that a table of these sizes could certify, were the observed gap exactly 0: `high` with every
    group at the pooled rate. For metric "worst_group_drop", of a paired table: with as many predictions mended as
    broken in every group, at the pooled rate of both. NaN where the metric is."""
    _check(metric, (*GAPS, DROP), level)
    counts = _checked(counts, 4 if metric == DROP else 3)
    if metric == DROP:
        broken_G, mended_G, n_G = _flips(counts)
        enters_G = n_G >= max(1, min_group_size)
        if not enters_G.any():
            return float("nan")
        half = (broken_G + mended_G)[enters_G].sum() / n_G[enters_G].sum() / 2
        n_G = n_G[enters_G]
        return float(paired_difference_limits(half * n_G, half * n_G, n_G, level)[1].max())
    comparisons, _ = _comparisons(counts, metric, eligible_groups(counts, min_group_size))
    highs = [
        _largest_difference(c._replace(hits=c.n * (c.hits.sum() / c.n.sum())), level)[1].max() for c in comparisons
    ]
    return float(max(highs, default=np.nan))


# --- helpers ----------------------------------------------------------------------------------------------------------


class _Comparison(NamedTuple):
    """One rate of the groups (indices) that define it."""

    hits: np.ndarray
    n: np.ndarray
    groups: np.ndarray


def _comparisons(counts: np.ndarray, metric: str, eligible_G: np.ndarray) -> tuple[list[_Comparison], tuple[int, ...]]:
    """The rates whose ranges the metric is the largest of, each of two groups at least; the classes without."""
    if metric == "accuracy_gap":
        return _defined([(np.trace(counts, axis1=-2, axis2=-1), counts.sum(axis=(-2, -1)))], eligible_G), ()
    found, without = [], []
    n_classes = counts.shape[-1]
    for positive in (1,) if n_classes == 2 else range(n_classes):
        n_G = counts.sum(axis=(-2, -1))
        positives_G, selected_G = counts[:, positive].sum(axis=-1), counts[:, :, positive].sum(axis=-1)
        hits_G = counts[:, positive, positive]
        rates = {
            "demographic_parity_difference": [(selected_G, n_G)],
            "equal_opportunity_difference": [(hits_G, positives_G)],
            "predictive_equality_difference": [(selected_G - hits_G, n_G - positives_G)],
            "predictive_parity_difference": [(hits_G, selected_G)],
        }
        rates["equalized_odds_difference"] = (
            rates["equal_opportunity_difference"] + rates["predictive_equality_difference"]
        )
        defined = _defined(rates[metric], eligible_G)
        if len(defined) == len(rates[metric]):  # one of the two rates of equalized odds is not equalized odds
            found += defined
        else:
            without.append(positive)
    return found, tuple(without)


def _defined(rates: list[tuple[np.ndarray, np.ndarray]], eligible_G: np.ndarray) -> list[_Comparison]:
    comparisons = []
    for hits_G, n_G in rates:
        groups = np.flatnonzero(eligible_G & (n_G > 0))
        if len(groups) >= 2:
            comparisons.append(_Comparison(hits_G[groups].astype(float), n_G[groups].astype(float), groups))
    return comparisons


def _largest_difference(comparison: _Comparison, level: float) -> tuple[np.ndarray, np.ndarray]:
    """For each pair of groups, limits of |r_i - r_j|: lower (at most one of the directions is positive) and upper.
    Counts may have leading batch dimensions."""
    first, second = np.triu_indices(len(comparison.groups), 1)
    hits, n = comparison.hits, comparison.n
    low, high = difference_limits(hits[..., first], n[..., first], hits[..., second], n[..., second], level)
    return np.maximum(low, -high), np.maximum(high, -low)


def _worst(value_G, limits, n_G, level: float, min_group_size: int, is_largest: bool) -> GroupBound:
    """Of the groups' values the worst. Towards the worse, the worst limit of any group, each at the full level; towards
    the better, the worst limit, Bonferroni."""
    if min_group_size < 1:
        raise ValueError(f"min_group_size must be at least 1, not {min_group_size}")
    enters_G = n_G >= min_group_size
    left_out = tuple(np.flatnonzero(~enters_G).tolist())
    if not enters_G.any():
        sizes = ", ".join(map(str, n_G.tolist()))
        reason = f"no group has {min_group_size} images (they have {sizes})"
        return GroupBound(np.nan, np.nan, np.nan, None, 0, level, left_out, reason)
    corrected = 1 - (1 - level) / enters_G.sum()
    worst = np.max if is_largest else np.min
    low = worst(limits(corrected if is_largest else level)[0][enters_G])
    high = worst(limits(level if is_largest else corrected)[1][enters_G])
    placed_G = np.where(enters_G, value_G if is_largest else -value_G, -np.inf)
    group = int(placed_G.argmax())
    return GroupBound(float(value_G[group]), float(low), float(high), group, int(n_G[enters_G].sum()), level, left_out)


def _flips(counts_GLFQ: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each group: right before and wrong after; wrong before and right after; all."""
    is_right = np.eye(counts_GLFQ.shape[-1], dtype=bool)  # (label, prediction)
    before, after = is_right[:, :, None], is_right[:, None, :]
    broken_G = (counts_GLFQ * (before & ~after)).sum(axis=(1, 2, 3))
    mended_G = (counts_GLFQ * (~before & after)).sum(axis=(1, 2, 3))
    return broken_G, mended_G, counts_GLFQ.sum(axis=(1, 2, 3))


def _too_few(metric: str, counts: np.ndarray, eligible_G: np.ndarray, min_group_size: int) -> str:
    sizes = ", ".join(map(str, counts.sum(axis=(-2, -1)).tolist()))
    if eligible_G.sum() < 2:
        return f"fewer than two groups have {min_group_size} images (they have {sizes})"
    needs = {
        "equal_opportunity_difference": "positives",
        "predictive_equality_difference": "negatives",
        "equalized_odds_difference": "positives, or two have negatives",
        "predictive_parity_difference": "positive predictions",
    }[metric]
    return f"fewer than two groups of {min_group_size} images have {needs} (images: {sizes})"


def _check(metric: str, known: tuple[str, ...], level: float) -> None:
    if metric not in known:
        raise ValueError(f"unknown metric {metric!r}; choose from {', '.join(known)}")
    if not 0.5 < level < 1:
        raise ValueError(f"level must be between 0.5 and 1, not {level}")


def _checked(counts, dimensions: int) -> np.ndarray:
    counts = np.asarray(counts)
    if counts.ndim != dimensions or len(set(counts.shape[1:])) != 1 or counts.shape[-1] < 2:
        axes = "group, label, prediction" if dimensions == 3 else "group, label, FP32 prediction, quantized prediction"
        raise ValueError(f"counts must have shape ({axes}), not {counts.shape}")
    return counts
