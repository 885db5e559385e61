"""Configurations: the settings of each model on each data set, averaged over the seeds that finished."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from analysis.result_rows import FP32, with_labels
from significance.joint_bootstrap import TestSet
from store import seed_for

PERCENTAGES = ("accuracy", "worst_group_accuracy", "accuracy_gap", "equalized_odds_difference")
MEASURES = (*PERCENTAGES, "size_mb", "latency_ms_b1", "latency_ms_b32")
SIMULATION = "torch"  # the engine of a row whose cell was not deployed
ENDS = ("accuracy_ci_low", "accuracy_ci_high")


def configurations(rows: pd.DataFrame, changes: pd.DataFrame | None = None) -> pd.DataFrame:
    """One row a (data set, model, setting) in the order of the plan, the mean over its finished seeds.

    Columns: dataset, model, setting, width, is_fp32, n_seeds, cells, `MEASURES` (shares in %; NaN where not measured),
    and change, ci_low, ci_high against FP32 of the same model in points, from `hypotheses.accuracy_changes`. Latencies
    are those of one engine, the one that most cells were deployed in; a simulation has none that anyone would ship.
    """
    done = with_labels(rows[rows["status"] == "done"]) if len(rows) else rows
    keys = ["dataset", "model", "setting"]
    columns = [*keys, "width", "is_fp32", "n_seeds", "cells", *MEASURES, "change", "ci_low", "ci_high"]
    if done.empty:
        return pd.DataFrame(columns=columns)
    for name in MEASURES:
        values = pd.to_numeric(done[name], errors="coerce") if name in done else pd.Series(np.nan, done.index)
        done[name] = values.astype(float).replace([np.inf, -np.inf], np.nan) * (100 if name in PERCENTAGES else 1)
    done.loc[~_has_comparable_latency(done), ["latency_ms_b1", "latency_ms_b32"]] = np.nan
    groups = done.groupby(keys, sort=False)
    found = groups[list(MEASURES)].mean()
    found["width"] = groups["width"].first()
    found["is_fp32"] = found.index.get_level_values("setting") == FP32
    found["n_seeds"] = groups["seed"].nunique()
    found["cells"] = groups["cell"].agg(list)
    if changes is not None and len(changes):
        found = found.join(changes.drop_duplicates(keys).set_index(keys)[["change", "ci_low", "ci_high"]])
    else:
        found[["change", "ci_low", "ci_high"]] = np.nan
    return found.reset_index()[columns]


def _has_comparable_latency(done: pd.DataFrame) -> pd.Series:
    if "engine" not in done:
        return pd.Series(True, done.index)
    deployed = done.loc[done["engine"].notna() & (done["engine"] != SIMULATION), "engine"]
    if len(deployed):
        return done["engine"] == deployed.mode().iloc[0]
    return done["weight_bits"].isna()  # FP32 in PyTorch


def accuracy_intervals(
    rows: pd.DataFrame, test_sets: Mapping[str, TestSet], replicates: int, level: float
) -> pd.DataFrame:
    """dataset, model, setting, accuracy_ci_low, accuracy_ci_high (shares) of each configuration's mean accuracy.

    Of one seed they are those of its row. Over several seeds images are resampled with their hits of all seeds
    together: the nonparametric bootstrap over images, given the seeds, drawn as counts of how many seeds are right.
    """
    done = with_labels(rows[rows["status"] == "done"])
    found = []
    for (dataset, model, setting), block in done.groupby(["dataset", "model", "setting"], sort=False):
        low, high = (block[name].iloc[0] if name in block else np.nan for name in ENDS)
        if len(block) > 1 and dataset in test_sets:
            hits_N = np.sum([test_sets[dataset].correct(cell) for cell in block["cell"]], axis=0)
            shares = np.bincount(hits_N, minlength=len(block) + 1) / len(hits_N)
            generator = np.random.default_rng(seed_for("analysis", "accuracy", dataset, model, setting))
            drawn_BS = generator.multinomial(len(hits_N), shares / shares.sum(), size=replicates)
            means_B = drawn_BS @ np.arange(len(block) + 1) / (len(block) * len(hits_N))
            low, high = np.quantile(means_B, [(1 - level) / 2, (1 + level) / 2])
        elif len(block) > 1:
            low, high = np.nan, np.nan
        found.append((dataset, model, setting, low, high))
    return pd.DataFrame(found, columns=["dataset", "model", "setting", *ENDS])
