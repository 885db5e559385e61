"""Intervals for the metrics of a count table, and for the difference between two models on the same samples.

The bootstrap here is the nonparametric one (Efron 1979) in another guise. To resample N rows with replacement is to
draw a count table from the multinomial distribution with N trials and the observed cell frequencies, since a metric
sees the rows through their cells alone; drawing the table directly costs nothing per row.

Two kinds of interval, from the same replicates: "percentile", and "bca", bias-corrected and accelerated (Efron 1987),
whose ends are moved by how far the replicates' median is from the observed value and by the skewness that the
jackknife finds. Both are honest for metrics that vary smoothly with the table: accuracy, a fixed group's rate, a gap
whose extreme groups are clear of the others. Neither is where

* a group has few samples or a rate is near 0 or 1: a rate of which nothing was seen has the interval [0, 0].
  rate_limits.py has the intervals that hold there;
* a maximum or minimum is near a tie: a max - min gap is biased upward, the worst group's accuracy downward, a bootstrap
  adds that bias a second time, and the interval of a gap that is truly 0 excludes 0. Read those of gaps as a
  description of spread, and test with a permutation or max-T test (statistical_tests.py).
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
from scipy.special import ndtr, ndtri

from group_counts import METRICS, eligible_groups, group_rates
from group_counts import paired_count_table as paired_count_table
from group_counts import wilson_interval as wilson_interval
from significance.batched_metrics import table_metrics
from significance.statistical_tests import holm as holm
from significance.statistical_tests import mcnemar_midp as mcnemar_midp

CHUNK_CELLS = 2_000_000  # cells of the replicate tables held at once: 16 MB of counts, a few times that in rates
GROUP_RATES = (
    "accuracy", "selection_rate", "true_positive_rate", "false_positive_rate", "positive_predictive_value",
)  # fmt: skip

Interval = tuple[float, float]
Method = Literal["percentile", "bca"]


class Intervals(NamedTuple):
    """Of one model: its metrics, and the rates of every group, however small."""

    metrics: dict[str, Interval]  # one per name of METRICS
    groups: dict[str, np.ndarray]  # one per name of GROUP_RATES: (G, 2) low, high


class PairedDifferences(NamedTuple):
    """Quantized - FP32 on the same samples: what was observed, and its interval."""

    observed: dict[str, float]  # one per name of METRICS
    intervals: dict[str, Interval]  # one per name of METRICS
    group_accuracy_G: np.ndarray  # (G,) difference in each group's accuracy, NaN for an empty group
    group_accuracy_intervals_G2: np.ndarray  # (G, 2) low, high


def bootstrap_intervals(
    counts: np.ndarray,
    min_group_size: int,
    replicates: int = 10_000,
    level: float = 0.95,
    *,
    method: Method = "percentile",
    generator: np.random.Generator,
) -> dict[str, Interval]:
    """Bootstrap interval (low, high) of every metric of METRICS, from one (G, L, P) table.

    The eligible groups are those of the observed table in every replicate. A group may lose its last positive in a
    replicate; it then leaves that replicate's gap, and a replicate whose metric is NaN is ignored. An interval is
    (NaN, NaN) where the observed metric is NaN. An empty table is a ValueError. The result depends on the state of
    ``generator`` and on nothing else (memory is bounded by working in chunks, which does not change the draws).
    """
    counts = np.asarray(counts)
    eligible_G = eligible_groups(counts, min_group_size)
    ends_M2 = _intervals(counts, lambda tables: table_metrics(tables, eligible_G), replicates, level, method, generator)
    return _by_metric(ends_M2)


def all_intervals(
    counts: np.ndarray,
    min_group_size: int,
    replicates: int = 10_000,
    level: float = 0.95,
    *,
    method: Method = "percentile",
    generator: np.random.Generator,
) -> Intervals:
    """As `bootstrap_intervals` (the same replicates), and the rates of every group (class 1 against the rest)."""
    counts = np.asarray(counts)
    eligible_G = eligible_groups(counts, min_group_size)

    def statistics(tables_GLPB: np.ndarray) -> np.ndarray:
        rates = _group_rates(tables_GLPB)
        return np.concatenate([table_metrics(tables_GLPB, eligible_G), rates.reshape(-1, rates.shape[-1])])

    ends_S2 = _intervals(counts, statistics, replicates, level, method, generator)
    of_groups = ends_S2[len(METRICS) :].reshape(len(GROUP_RATES), len(counts), 2)
    return Intervals(_by_metric(ends_S2), dict(zip(GROUP_RATES, of_groups, strict=True)))


def paired_difference_intervals(
    counts_GLFQ: np.ndarray,
    min_group_size: int,
    replicates: int = 10_000,
    level: float = 0.95,
    *,
    method: Method = "percentile",
    generator: np.random.Generator,
) -> PairedDifferences:
    """Quantized - FP32 of every metric and of every group's accuracy, with bootstrap intervals.

    ``counts_GLFQ`` is the table of `paired_count_table`: (group, label, FP32 prediction, quantized prediction).
    Resampling it keeps the pairs together, so what the two models have in common cancels: identical predictions give
    exactly (0, 0). The groups compared are the same in both models and all replicates; NaN is as in
    `bootstrap_intervals`, a difference being NaN where either side is. The differences of the groups' accuracies are
    given for every group, however small (`rate_limits.paired_difference_interval` is the one that holds there).
    """
    counts_GLFQ = np.asarray(counts_GLFQ)
    if counts_GLFQ.ndim != 4 or len(set(counts_GLFQ.shape[1:])) != 1:
        raise ValueError(
            "paired counts must have shape (group, label, FP32 prediction, quantized prediction) with equally many "
            f"labels and predictions, not {counts_GLFQ.shape}"
        )
    eligible_G = eligible_groups(counts_GLFQ.sum(axis=-1), min_group_size)
    observed_D = paired_differences(counts_GLFQ[..., None], eligible_G)[:, 0]
    ends_D2 = _intervals(
        counts_GLFQ, lambda tables: paired_differences(tables, eligible_G), replicates, level, method, generator
    )
    return PairedDifferences(
        observed={name: float(observed_D[m]) for m, name in enumerate(METRICS)},
        intervals=_by_metric(ends_D2),
        group_accuracy_G=observed_D[len(METRICS) :],
        group_accuracy_intervals_G2=ends_D2[len(METRICS) :],
    )


def paired_differences(counts_GLFQB: np.ndarray, eligible_G: np.ndarray) -> np.ndarray:
    """(M + G, B): quantized - FP32 of the M metrics, then of the accuracy of the G groups; batch in the last axis."""
    fp32_GLPB, quantized_GLPB = counts_GLFQB.sum(axis=3), counts_GLFQB.sum(axis=2)
    metrics_MB = table_metrics(quantized_GLPB, eligible_G) - table_metrics(fp32_GLPB, eligible_G)
    # One division of the difference in hits: exactly 0 when as many samples were gained as lost.
    gained_GB = np.einsum("gllb->gb", quantized_GLPB) - np.einsum("gllb->gb", fp32_GLPB)
    with np.errstate(invalid="ignore"):
        accuracy_GB = gained_GB / fp32_GLPB.sum(axis=(1, 2))
    return np.concatenate([metrics_MB, accuracy_GB])


def interval_ends(
    values_VB: np.ndarray,
    level: float,
    method: Method = "percentile",
    observed_V: np.ndarray | None = None,
    acceleration_V: np.ndarray | None = None,
) -> np.ndarray:
    """(V, 2) low and high of the replicates that are not NaN; NaN where all are. "bca" needs the observed values, of
    the same precision as the replicates, and the `acceleration` of each. Sorts `values_VB` in place."""
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, not {level}")
    if method not in ("percentile", "bca"):
        raise ValueError(f"unknown method {method!r}; choose from percentile, bca")
    values_VB.sort(axis=1)  # NaN at the end
    defined_V = values_VB.shape[1] - np.isnan(values_VB).sum(axis=1)
    shares_V2 = np.broadcast_to([(1 - level) / 2, (1 + level) / 2], (len(values_VB), 2))
    if method == "bca":
        shares_V2 = _bca_shares(values_VB, defined_V, shares_V2, observed_V, acceleration_V)
    place_V2 = np.clip(shares_V2, 0, 1) * (np.maximum(defined_V, 1) - 1)[:, None]
    below_V2 = np.where(np.isnan(place_V2), 0, np.floor(place_V2)).astype(np.int64)
    above_V2 = np.minimum(below_V2 + 1, np.maximum(defined_V, 1)[:, None] - 1)
    low_V2, high_V2 = (np.take_along_axis(values_VB, at, axis=1).astype(float) for at in (below_V2, above_V2))
    ends_V2 = low_V2 + (place_V2 - below_V2) * (high_V2 - low_V2)
    return np.where(defined_V[:, None] > 0, ends_V2, np.nan)


def acceleration(left_out_VC: np.ndarray, counts_C: np.ndarray) -> np.ndarray:
    """(V,) skewness of the jackknife over 6 (Efron 1987, eq. 6.6): the values with one sample of each of C kinds left
    out, `counts_C` samples being of that kind. A kind without which a value is undefined does not count."""
    weights_VC = np.where(np.isnan(left_out_VC), 0.0, counts_C)
    with np.errstate(invalid="ignore", divide="ignore"):
        values_VC = np.nan_to_num(left_out_VC)
        mean_V1 = (weights_VC * values_VC).sum(axis=1, keepdims=True) / weights_VC.sum(axis=1, keepdims=True)
        from_mean_VC = mean_V1 - values_VC
        squares_V, cubes_V = ((weights_VC * from_mean_VC**power).sum(axis=1) for power in (2, 3))
        return np.where(squares_V > 1e-20, cubes_V / (6 * squares_V**1.5), 0.0)


def left_out_tables(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The table with one sample of each filled cell left out (*shape, C), and how many samples that cell has (C,)."""
    filled = np.flatnonzero(counts)
    tables = np.repeat(counts.reshape(-1, 1), len(filled), axis=1)
    tables[filled, np.arange(len(filled))] -= 1
    return tables.reshape(*counts.shape, len(filled)), counts.ravel()[filled]


# --- helpers ----------------------------------------------------------------------------------------------------------


def _intervals(counts: np.ndarray, statistics, replicates: int, level: float, method: Method, generator) -> np.ndarray:
    """(S, 2) ends for the S `statistics` of tables (*shape, B)."""
    values_SB = np.concatenate([statistics(b) for b in _resampled(counts, replicates, generator)], axis=1)
    if method != "bca":
        return interval_ends(values_SB, level, method)
    left_out, n_C = left_out_tables(counts)
    observed_S = statistics(counts[..., None])[:, 0]
    return interval_ends(values_SB, level, method, observed_S, acceleration(statistics(left_out), n_C))


def _bca_shares(values_VB, defined_V, shares_V2, observed_V, acceleration_V) -> np.ndarray:
    """At which quantiles of the replicates the interval ends (Efron & Tibshirani 1993, eq. 14.10)."""
    below_V = (values_VB < observed_V[:, None]).sum(axis=1)
    tied_V = (values_VB == observed_V[:, None]).sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        share_V = (below_V + tied_V / 2) / defined_V
        z_V = ndtri(np.clip(share_V, 0.5 / defined_V, 1 - 0.5 / defined_V))[:, None]
        moved_V2 = z_V + ndtri(shares_V2)
        return ndtr(z_V + moved_V2 / np.maximum(1 - acceleration_V[:, None] * moved_V2, 1e-3))


def _by_metric(ends_S2: np.ndarray) -> dict[str, Interval]:
    return {name: (float(ends_S2[m, 0]), float(ends_S2[m, 1])) for m, name in enumerate(METRICS)}


def _group_rates(tables_GLPB: np.ndarray) -> np.ndarray:
    """(R, G, B) the rates of GROUP_RATES."""
    if tables_GLPB.shape[1] > 2:
        rates = group_rates(np.moveaxis(tables_GLPB, -1, 0))
        return np.stack([rates[name].T for name in GROUP_RATES])
    n_GL, (false_alarms_G, hits_G) = tables_GLPB.sum(axis=2), (tables_GLPB[:, label, 1] for label in (0, 1))
    negatives_G, positives_G = n_GL[:, 0], n_GL[:, 1]
    n_G, selected_G = negatives_G + positives_G, false_alarms_G + hits_G
    with np.errstate(invalid="ignore"):
        return np.stack(
            [
                (negatives_G - false_alarms_G + hits_G) / n_G,
                selected_G / n_G,
                hits_G / positives_G,
                false_alarms_G / negatives_G,
                hits_G / selected_G,
            ]
        )


def _resampled(counts: np.ndarray, replicates: int, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """Chunks (*counts.shape, b) of ``replicates`` tables drawn from the multinomial of ``counts``."""
    if replicates < 1:
        raise ValueError(f"replicates must be at least 1, not {replicates}")
    total = int(counts.sum())
    if total == 0:
        raise ValueError("the count table is empty: there is nothing to resample")
    # Only the cells that hold something are drawn. It is quicker, and the remainder that numpy gives to the last cell
    # when the frequencies sum to 1 - 1e-16 can never fall into a cell that is empty.
    filled = np.flatnonzero(counts)
    frequencies = counts.ravel()[filled] / total
    per_chunk = max(1, CHUNK_CELLS // counts.size)
    for start in range(0, replicates, per_chunk):
        b = min(per_chunk, replicates - start)
        tables = np.zeros((counts.size, b))
        tables[filled] = generator.multinomial(total, frequencies, size=b).T
        yield tables.reshape(*counts.shape, b)
