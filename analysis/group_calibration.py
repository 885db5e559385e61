"""Whether a model's probabilities are honest, group by group: reliability and expected calibration error.

Top-label calibration (Guo et al., ICML 2017): the confidence of an image is its largest softmax probability, and among
the images of confidence c a share c should be right. Bins are of equal width from 1/K, below which no largest
probability of K classes lies, to 1. Pure functions of arrays and tables.

The expected calibration error of few images is biased upward: a perfectly calibrated model misses the diagonal by
chance. That expectation is given beside it (`by_chance`), so that a small group is not called miscalibrated for being
small.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from group_counts import wilson_interval

ALL = "all"  # the name of the rows over every image
RELIABILITY_COLUMNS = (
    "group", "bin", "bin_low", "bin_high", "n", "confidence", "accuracy", "ci_low", "ci_high",
)  # fmt: skip


def confidences(logits_NK: np.ndarray) -> np.ndarray:
    """(N,) largest softmax probability of each row, in [1/K, 1]."""
    logits_NK = np.asarray(logits_NK, dtype=np.float64)
    shifted_NK = logits_NK - logits_NK.max(axis=1, keepdims=True)
    return 1.0 / np.exp(shifted_NK).sum(axis=1)


def reliability(
    logits_NK: np.ndarray,
    label_N: np.ndarray,
    group_N: np.ndarray,
    group_names: Sequence[str],
    bins: int = 10,
    level: float = 0.95,
) -> pd.DataFrame:
    """One row a (group, bin), `RELIABILITY_COLUMNS`, over all images first (group 'all'), then each group that has any.

    `confidence` and `accuracy` are means over the bin's images and the interval is Wilson's for the accuracy; of an
    empty bin they are NaN. A confidence on an inner edge belongs to the bin above, 1 to the last one. Logits that are
    not finite are a ValueError.
    """
    logits_NK, label_N, group_N = np.asarray(logits_NK), np.asarray(label_N), np.asarray(group_N)
    if bins < 1:
        raise ValueError(f"bins must be at least 1, not {bins}")
    if logits_NK.ndim != 2 or not len(logits_NK) == len(label_N) == len(group_N):
        raise ValueError(
            f"logits must be (N, K) with N labels and groups, not {logits_NK.shape} with {len(label_N)} and "
            f"{len(group_N)}"
        )
    if not np.isfinite(logits_NK).all():
        raise ValueError("logits must be finite")
    classes = logits_NK.shape[1]
    confidence_N = confidences(logits_NK)
    is_right_N = logits_NK.argmax(axis=1) == label_N
    edges = np.linspace(1 / classes, 1, bins + 1)
    # rounding may leave a confidence a hair below 1/K, or put an edge a hair above the value that it stands for
    bin_N = np.clip(np.searchsorted(edges - 1e-12, confidence_N, side="right") - 1, 0, bins - 1)
    rows = []
    members = [(ALL, np.ones(len(label_N), dtype=bool))]
    members += [(str(name), group_N == g) for g, name in enumerate(group_names)]
    for name, is_member_N in members:
        if not is_member_N.any():
            continue
        at = bin_N[is_member_N]
        n_B = np.bincount(at, minlength=bins)
        hits_B = np.bincount(at, weights=is_right_N[is_member_N], minlength=bins)
        total_B = np.bincount(at, weights=confidence_N[is_member_N], minlength=bins)
        low_B, high_B = wilson_interval(hits_B, n_B, level)
        with np.errstate(invalid="ignore"):
            confidence_B, accuracy_B = total_B / n_B, hits_B / n_B
        for b in range(bins):
            values = (
                name, b, edges[b], edges[b + 1], int(n_B[b]), confidence_B[b], accuracy_B[b], low_B[b], high_B[b],
            )  # fmt: skip
            rows.append(dict(zip(RELIABILITY_COLUMNS, values, strict=True)))
    return pd.DataFrame(rows, columns=list(RELIABILITY_COLUMNS))


def calibration_errors(table: pd.DataFrame) -> pd.DataFrame:
    """The expected calibration error of each group, and of each cell where the table has a column `cell`.

    Columns: (cell,) group, n, expected_calibration_error = sum over bins of n_b / n |accuracy_b - confidence_b|, and
    by_chance: what that sum is expected to be if every image of a bin is right with the bin's mean confidence.
    """
    from scipy.stats import binom

    keys = [name for name in ("cell", "group") if name in table]
    filled = table[table["n"] > 0]
    n, p = filled["n"].to_numpy(), filled["confidence"].to_numpy(dtype=float)
    # De Moivre: E|X - np| = 2 n p (1 - p) P(Bin(n - 1, p) = floor(np)), for X ~ Bin(n, p)
    deviation = 2 * n * p * (1 - p) * binom.pmf(np.floor(n * p), n - 1, p)
    missed = np.abs(filled["accuracy"].to_numpy(dtype=float) - p) * n
    sums = filled[keys].assign(n=n, missed=missed, deviation=np.where(p < 1, deviation, 0.0))
    sums = sums.groupby(keys, sort=False)[["n", "missed", "deviation"]].sum().reset_index()
    sums["expected_calibration_error"] = sums.pop("missed") / sums["n"]
    sums["by_chance"] = sums.pop("deviation") / sums["n"]
    return sums
