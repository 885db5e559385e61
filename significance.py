"""Intervals for the metrics of a count table, and for the difference between two models on the same samples.

The bootstrap here is the nonparametric one (Efron 1979) in another guise. To resample N rows with replacement is to
draw a count table from the multinomial distribution with N trials and the observed cell frequencies, since a metric
sees the rows through their cells alone; drawing the table directly costs nothing per row.

Percentile intervals are honest for metrics that vary smoothly with the table: accuracy, a fixed group's rate, a gap
whose extreme groups are clear of the others. They are not for a maximum or minimum near a tie: a max - min gap is
biased upward, the worst group's accuracy downward, a bootstrap adds that bias a second time, and the interval of a gap
that is truly 0 excludes 0. Read those of gaps as a description of spread and test with a permutation or max-T test.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from scipy.stats import binom

from group_counts import METRICS, eligible_groups, group_metrics
from group_counts import paired_count_table as paired_count_table
from group_counts import wilson_interval as wilson_interval

CHUNK_CELLS = 2_000_000  # cells of the replicate tables held at once: 16 MB of counts, a few times that in rates

Interval = tuple[float, float]


class PairedDifferences(NamedTuple):
    """Quantized - FP32 on the same samples: what was observed, and its interval."""

    observed: dict[str, float]  # one per name of METRICS
    intervals: dict[str, Interval]  # one per name of METRICS
    group_accuracy_G: np.ndarray  # (G,) difference in each group's accuracy, NaN for an empty group
    group_accuracy_intervals_G2: np.ndarray  # (G, 2) low, high


def bootstrap_intervals(
    counts: np.ndarray,
    min_group_size: int,
    replicates: int = 1000,
    level: float = 0.95,
    *,
    generator: np.random.Generator,
) -> dict[str, Interval]:
    """Percentile bootstrap interval (low, high) of every metric of METRICS, from one (G, L, P) table.

    The eligible groups are those of the observed table in every replicate. A group may lose its last positive in a
    replicate; it then leaves that replicate's gap, and a replicate whose metric is NaN is ignored. An interval is
    (NaN, NaN) where the observed metric is NaN. An empty table is a ValueError. The result depends on the state of
    ``generator`` and on nothing else (memory is bounded by working in chunks, which does not change the draws).
    """
    counts = np.asarray(counts)
    eligible_G = eligible_groups(counts, min_group_size)
    chunks = [group_metrics(b, eligible=eligible_G) for b in _resampled(counts, replicates, generator)]
    values_BM = np.concatenate([np.stack([chunk[name] for name in METRICS], axis=-1) for chunk in chunks])
    low_M, high_M = _percentile_interval(values_BM, level)
    return {name: (float(low_M[m]), float(high_M[m])) for m, name in enumerate(METRICS)}


def paired_difference_intervals(
    counts_GLFQ: np.ndarray,
    min_group_size: int,
    replicates: int = 1000,
    level: float = 0.95,
    *,
    generator: np.random.Generator,
) -> PairedDifferences:
    """Quantized - FP32 of every metric and of every group's accuracy, with percentile bootstrap intervals.

    ``counts_GLFQ`` is the table of `paired_count_table`: (group, label, FP32 prediction, quantized prediction).
    Resampling it keeps the pairs together, so what the two models have in common cancels: identical predictions give
    exactly (0, 0). The groups compared are the same in both models and all replicates; NaN is as in
    `bootstrap_intervals`, a difference being NaN where either side is. The differences of the groups' accuracies are
    given for every group, however small.
    """
    counts_GLFQ = np.asarray(counts_GLFQ)
    if counts_GLFQ.ndim != 4 or len(set(counts_GLFQ.shape[1:])) != 1:
        raise ValueError(
            "paired counts must have shape (group, label, FP32 prediction, quantized prediction) with equally many "
            f"labels and predictions, not {counts_GLFQ.shape}"
        )
    eligible_G = eligible_groups(counts_GLFQ.sum(axis=-1), min_group_size)
    observed_D = _paired_differences(counts_GLFQ, eligible_G)
    values_BD = np.concatenate(
        [_paired_differences(b, eligible_G) for b in _resampled(counts_GLFQ, replicates, generator)]
    )
    low_D, high_D = _percentile_interval(values_BD, level)
    first_group = len(METRICS)
    return PairedDifferences(
        observed={name: float(observed_D[m]) for m, name in enumerate(METRICS)},
        intervals={name: (float(low_D[m]), float(high_D[m])) for m, name in enumerate(METRICS)},
        group_accuracy_G=observed_D[first_group:],
        group_accuracy_intervals_G2=np.stack([low_D[first_group:], high_D[first_group:]], axis=-1),
    )


def mcnemar_midp(gained: int, lost: int) -> float:
    """Two-sided mid-p of McNemar's exact test: of `gained + lost` discordant pairs, half are expected either way."""
    n, fewer = gained + lost, min(gained, lost)
    return float(min(1.0, 2 * binom.cdf(fewer, n, 0.5) - binom.pmf(fewer, n, 0.5)))


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's step-down adjustment (Holm 1979): reject where it is <= alpha and the family-wise error is <= alpha."""
    p = np.asarray(p, dtype=float)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, stepped)
    return adjusted


# --- helpers ----------------------------------------------------------------------------------------------------------


def _paired_differences(counts_GLFQ: np.ndarray, eligible_G: np.ndarray) -> np.ndarray:
    """(..., M + G): quantized - FP32 of the M metrics, then of the accuracy of the G groups."""
    fp32_GLP, quantized_GLP = counts_GLFQ.sum(axis=-1), counts_GLFQ.sum(axis=-2)
    fp32 = group_metrics(fp32_GLP, eligible=eligible_G)
    quantized = group_metrics(quantized_GLP, eligible=eligible_G)
    metrics_M = np.stack([quantized[name] - fp32[name] for name in METRICS], axis=-1)
    # One division of the difference in hits: exactly 0 when as many samples were gained as lost.
    gained_G = np.trace(quantized_GLP, axis1=-2, axis2=-1) - np.trace(fp32_GLP, axis1=-2, axis2=-1)
    with np.errstate(invalid="ignore"):
        accuracy_G = gained_G / fp32_GLP.sum(axis=(-2, -1))
    return np.concatenate([metrics_M, accuracy_G], axis=-1)


def _resampled(counts: np.ndarray, replicates: int, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """Chunks (b, *counts.shape) of ``replicates`` tables drawn from the multinomial of ``counts``."""
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
        tables = np.zeros((b, counts.size), dtype=np.int64)
        tables[:, filled] = generator.multinomial(total, frequencies, size=b)
        yield tables.reshape(b, *counts.shape)


def _percentile_interval(values_BM: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """(low, high), each (M,), of the replicates that are not NaN; NaN where all are.

    All are where the observed metric is: a denominator that is 0 in the table is 0 in every replicate of it.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, not {level}")
    low_M, high_M = np.full((2, values_BM.shape[1]), np.nan)
    for m, values_B in enumerate(values_BM.T):
        defined_B = values_B[~np.isnan(values_B)]
        if defined_B.size:
            low_M[m], high_M[m] = np.quantile(defined_B, [(1 - level) / 2, (1 + level) / 2])
    return low_M, high_M
