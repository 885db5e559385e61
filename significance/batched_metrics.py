"""The metrics of group_counts for very many two-class tables at once, the batch in the last axes.

`group_metrics` is the definition and takes any number of classes. A bootstrap of hundreds of cells needs the metrics of
millions of tables; with the groups in the first axis every step is one pass over long rows, in whatever precision the
counts have (float32 holds a count exactly up to 2^24), and what the cells of a replicate share, the group sizes, is
stored once. tests/test_batched_metrics.py shows that both agree, undefined rates included.
"""

import numpy as np

from group_counts import METRICS, group_metrics


def binary_metrics(n_GL: np.ndarray, selected_GL: np.ndarray, eligible_G: np.ndarray) -> np.ndarray:
    """(M, ...) in the order of METRICS, from images (G, 2, ...) and positive predictions (G, 2, ...) of each (group,
    label); the trailing axes broadcast. `eligible_G` (G,) booleans, fixed for all tables."""
    n_G, n_eligible_G2 = n_GL.sum(axis=1), n_GL[eligible_G]
    false_alarms, hits = selected_GL[eligible_G, 0], selected_GL[eligible_G, 1]
    correct_G = n_GL[:, 0] - selected_GL[:, 0] + selected_GL[:, 1]
    selected = false_alarms + hits
    shape = correct_G.shape[1:]
    result = np.empty((len(METRICS), *shape), dtype=np.result_type(selected_GL, np.float32))
    values = dict(zip(METRICS, result, strict=True))
    with np.errstate(invalid="ignore", divide="ignore"):
        values["accuracy"][...] = correct_G.sum(axis=0) / n_G.sum(axis=0)
        n_2, selected_2 = n_GL.sum(axis=0), selected_GL.sum(axis=0)
        recalls = ((n_2[0] - selected_2[0]) / n_2[0], selected_2[1] / n_2[1])
        values["balanced_accuracy"][...] = _mean_of_defined(*recalls)
        lowest, highest = _extremes(correct_G[eligible_G], n_G[eligible_G], fewest=1)
        values["worst_group_accuracy"][...] = lowest
        values["accuracy_gap"][...] = highest - lowest if eligible_G.sum() >= 2 else np.nan
        if eligible_G.sum() >= 2 and not (n_G[eligible_G] > 0).all():  # a replicate in which one group alone is left
            is_one = (n_G[eligible_G] > 0).sum(axis=0) < 2
            values["accuracy_gap"][np.broadcast_to(is_one, shape)] = np.nan
        lowest, highest = _extremes(selected, n_G[eligible_G])
        values["demographic_parity_difference"][...] = highest - lowest
        values["disparate_impact"][...] = lowest / highest
        ranges = {}
        for name, numerator, denominator in (
            ("equal_opportunity_difference", hits, n_eligible_G2[:, 1]),
            ("predictive_equality_difference", false_alarms, n_eligible_G2[:, 0]),
            ("predictive_parity_difference", hits, selected),
        ):
            lowest, highest = _extremes(numerator, denominator)
            ranges[name] = values[name][...] = highest - lowest
    tpr_range, fpr_range = ranges["equal_opportunity_difference"], ranges["predictive_equality_difference"]
    values["equalized_odds_difference"][...] = np.maximum(tpr_range, fpr_range)
    values["equalized_odds_mean"][...] = (tpr_range + fpr_range) / 2
    return result


def table_metrics(counts_GLP: np.ndarray, eligible_G: np.ndarray) -> np.ndarray:
    """(M, ...) of tables (G, L, P, ...) with the batch in the last axes, of any number of classes."""
    if counts_GLP.shape[1] == 2:
        return binary_metrics(counts_GLP.sum(axis=2), counts_GLP[:, :, 1], eligible_G)
    values = group_metrics(np.moveaxis(counts_GLP, (0, 1, 2), (-3, -2, -1)), eligible=eligible_G)
    return np.stack([values[name] for name in METRICS])


def _extremes(numerator_G, denominator_G, fewest: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest defined ratio over the first axis; NaN where fewer than `fewest` are defined."""
    if len(denominator_G) < fewest:
        nothing = np.full(np.broadcast_shapes(numerator_G.shape, denominator_G.shape)[1:], np.nan, dtype=np.float32)
        return nothing, nothing
    rate_G = numerator_G / denominator_G
    is_defined_G = denominator_G > 0
    if is_defined_G.all():
        return rate_G.min(axis=0), rate_G.max(axis=0)
    lowest, highest = np.fmin.reduce(rate_G, axis=0), np.fmax.reduce(rate_G, axis=0)
    is_too_few = np.broadcast_to(is_defined_G.sum(axis=0) < fewest, lowest.shape)
    return np.where(is_too_few, np.nan, lowest), np.where(is_too_few, np.nan, highest)


def _mean_of_defined(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(first), second, np.where(np.isnan(second), first, (first + second) / 2))
