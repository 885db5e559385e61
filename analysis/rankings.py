"""Which architecture is the most resilient, and which setting keeps most of the worst group's accuracy for its bytes.

All models of a data set are resampled on the same images (joint_bootstrap.py), and the worst group of each is chosen on
one half of the images and measured on the other (contrasts.py). As there, intervals are over images, given the trained
models: other seeds may rank otherwise.

A model's rank has a confidence set, not only a place: model j is told apart from model k where the interval of the
difference of their losses excludes 0, for all pairs of models at once (the max-T quantile of the studentized
differences over the replicates). The set reaches from 1 + the number of models that lose surely less to the number of
models minus those that lose surely more; it holds all true ranks with the level's probability (Mogstad, Romano, Shaikh
& Wilhelm: Inference for Ranks, Review of Economic Studies 2024). Counting ranks in the replicates would not: it is
overconfident near ties.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from analysis import tables
from analysis.contrasts import Effects, Pool, select, study_of
from analysis.result_rows import FP32, main_settings, model_label
from sections.analysis import Cells
from significance.joint_bootstrap import TestSet, percentile_interval

LOSSES = {"accuracy": "accuracy", "worst_group_accuracy": "worst group"}
RESILIENCE_COLUMNS = (
    "dataset", "width", "setting", "metric", "model", "n_seeds", "size_mb", "loss", "ci_low", "ci_high", "rank",
    "rank_low", "rank_high", "not_told_apart_from",
)  # fmt: skip
RETENTION_COLUMNS = (
    "dataset", "model", "setting", "width", "is_main", "n_seeds", "fp32_mb", "size_mb", "saved_mb", "kept",
    "kept_ci_low", "kept_ci_high", "kept_per_mb", "kept_per_mb_ci_low", "kept_per_mb_ci_high",
)  # fmt: skip
RESILIENCE_NOTE = (
    "Points of accuracy lost against FP32 at the main setting of each width, over all images and in the worst group "
    "(of each model its own, chosen on one half of the images and measured on the other). The ranks in brackets are "
    "those that the data leave possible, for all models at once; models whose ranks overlap are not told apart."
)
RETENTION_NOTE = (
    "Share of the FP32 model's worst-group accuracy that the quantized one keeps, and that share for each megabyte "
    "saved (10^6 bytes). Small models save few megabytes, so that theirs are dear: compare settings of one model."
)


def measure(
    rows: pd.DataFrame, test_sets: Mapping[str, TestSet], replicates: int, level: float
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(resilience, retention): columns `RESILIENCE_COLUMNS` and `RETENTION_COLUMNS`; `rows` are the finished cells."""
    study = study_of(rows, test_sets, replicates, level)
    main = [setting for setting in main_settings(study.rows) if setting != FP32]
    strategies = [name for name in dict.fromkeys(study.rows["strategy"]) if name is not None]
    kinds = [Cells(), *(Cells(strategy=[name]) for name in strategies)]  # the main settings of each
    shown = study.pairs(pd.concat([select(study.rows, cells) for cells in kinds]))
    if shown.empty:
        return pd.DataFrame(columns=list(RESILIENCE_COLUMNS)), pd.DataFrame(columns=list(RETENTION_COLUMNS))
    pool = Pool(study)
    tickets = {}
    for dataset, block in shown.groupby("dataset", sort=False):
        effects = Effects(test_sets[dataset])
        cells = list(dict.fromkeys([*block["baseline_cell"], *block["cell"]]))
        blocks, columns = [], []
        for metric in LOSSES:
            values = [_of_cell(effects, cell, metric) for cell in cells]
            if all(value is not None for value in values):
                blocks.append((dataset, np.stack(values, axis=1)))
                columns += [(metric, cell) for cell in cells]
        tickets[dataset] = pool.ask(blocks), {key: i for i, key in enumerate(columns)}
    pool.draw()
    sizes = dict(zip(study.rows["cell"], study.rows["size_mb"].astype(float), strict=True))
    resilience, retention = [], []
    for dataset, block in shown.groupby("dataset", sort=False):
        ticket, column = tickets[dataset]
        for setting in main:
            chosen = block[block["setting"] == setting]
            for metric in LOSSES:
                if len(chosen) and (metric, chosen["cell"].iloc[0]) in column:
                    resilience += _resilience(chosen, metric, ticket, column, sizes, level)
        if ("worst_group_accuracy", block["cell"].iloc[0]) in column:
            for (_, setting), chosen in block.groupby(["model", "setting"], sort=False):
                line = _retention(chosen, ticket, column, sizes, level)
                retention.append({**line, "is_main": setting in main})
    return (
        pd.DataFrame(resilience, columns=list(RESILIENCE_COLUMNS)),
        pd.DataFrame(retention, columns=list(RETENTION_COLUMNS)),
    )


def rank_sets(loss_M: np.ndarray, loss_BM: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(lowest, highest) rank that the data leave possible, (M,) each, and (M, M) which two are told apart.

    The least loss is rank 1. Two models that differ by the same amount in every replicate are told apart exactly where
    they differ.
    """
    difference_MM = loss_M[:, None] - loss_M[None, :]
    first, second = np.triu_indices(len(loss_M), k=1)
    values_BD = loss_BM[:, first] - loss_BM[:, second]
    observed_D = difference_MM[first, second]
    error_D = values_BD.std(axis=0)
    varies = error_D > 1e-9
    told_D = np.abs(observed_D) > 1e-9
    if varies.any():
        t_BD = np.abs(values_BD[:, varies] - observed_D[varies]) / error_D[varies]
        critical = np.quantile(t_BD.max(axis=1), level)
        told_D[varies] = np.abs(observed_D[varies]) > critical * error_D[varies]
    told_MM = np.zeros(difference_MM.shape, dtype=bool)
    told_MM[first, second] = told_MM[second, first] = told_D
    surely_better_M = (told_MM & (difference_MM > 0)).sum(axis=1)  # models that lose surely less than this one
    surely_worse_M = (told_MM & (difference_MM < 0)).sum(axis=1)
    return 1 + surely_better_M, len(loss_M) - surely_worse_M, told_MM


def resilience_table(resilience: pd.DataFrame, level: float) -> pd.DataFrame:
    """`resilience` for print: one line a (data set, width, model), the most resilient first."""
    if resilience.empty:
        return pd.DataFrame()
    table = []
    for (dataset, width, model), block in resilience.groupby(["dataset", "width", "model"], sort=False):
        by_metric = block.set_index("metric")
        line = {"data set": dataset} if resilience["dataset"].nunique() > 1 else {}
        line |= {"width": width, "model": model_label(model)}
        line["FP32 MB"] = tables.number(block["size_mb"].iloc[0], 3, significant=True)
        for metric, name in LOSSES.items():
            row = by_metric.loc[metric] if metric in by_metric.index else None
            if row is None:
                line |= {f"{name} lost [{level * 100:.4g} % CI]": tables.MISSING, f"rank, {name}": tables.MISSING}
                continue
            line[f"{name} lost [{level * 100:.4g} % CI]"] = _with_interval(
                row["loss"], row["ci_low"], row["ci_high"], 2
            )
            line[f"rank, {name}"] = f"{row['rank']} [{row['rank_low']}, {row['rank_high']}]"
            if metric == "accuracy":
                others = [model_label(name) for name in row["not_told_apart_from"].split(";") if name]
                line["not told apart from (accuracy)"] = ", ".join(others) or "none"
        table.append(line)
    return pd.DataFrame(table)


def retention_table(retention: pd.DataFrame, level: float) -> pd.DataFrame:
    """The main settings of `retention` for print."""
    shown = retention[retention["is_main"].astype(bool)].reset_index(drop=True)
    if shown.empty:
        return pd.DataFrame()
    table = pd.DataFrame()
    if shown["dataset"].nunique() > 1:
        table["data set"] = shown["dataset"]
    table["model"] = [model_label(name) for name in shown["model"]]
    table["setting"] = shown["setting"]
    table["MB"] = [tables.number(value, 3, significant=True) for value in shown["size_mb"]]
    table["MB saved"] = [tables.number(value, 3, significant=True) for value in shown["saved_mb"]]
    table[f"worst group kept % [{level * 100:.4g} % CI]"] = [
        _with_interval(100 * row.kept, 100 * row.kept_ci_low, 100 * row.kept_ci_high, 1) for row in shown.itertuples()
    ]
    table[f"kept % per MB saved [{level * 100:.4g} % CI]"] = [
        _with_interval(100 * row.kept_per_mb, 100 * row.kept_per_mb_ci_low, 100 * row.kept_per_mb_ci_high, 2)
        for row in shown.itertuples()
    ]
    return table


# -------------------------------------------------------------------------------------------------------------- helpers


def _of_cell(effects: Effects, cell: str, metric: str) -> np.ndarray | None:
    if metric == "accuracy":
        return 100 / effects.test_set.n * effects.test_set.correct(cell)
    return effects.of_cell(cell, metric)


def _resilience(rows: pd.DataFrame, metric: str, ticket, column: dict, sizes: dict, level: float) -> list[dict]:
    """The models at one width, the least loss first."""
    models = list(dict.fromkeys(rows["model"]))
    loss_M, loss_BM = np.empty(len(models)), np.empty((len(ticket.replicates_BC), len(models)))
    for m, model in enumerate(models):
        of_model = rows[rows["model"] == model]
        before = [column[metric, cell] for cell in of_model["baseline_cell"]]
        after = [column[metric, cell] for cell in of_model["cell"]]
        loss_M[m] = (ticket.observed_C[before] - ticket.observed_C[after]).mean()
        loss_BM[:, m] = (ticket.replicates_BC[:, before] - ticket.replicates_BC[:, after]).mean(axis=1)
    rank_low_M, rank_high_M, told_MM = rank_sets(loss_M, loss_BM, level)
    lines = []
    for m in np.argsort(loss_M, kind="stable"):
        of_model = rows[rows["model"] == models[m]]
        low, high = percentile_interval(loss_BM[:, m], level)
        others = [models[k] for k in range(len(models)) if k != m and not told_MM[m, k]]
        lines.append(
            {
                **{name: of_model[name].iloc[0] for name in ("dataset", "width", "setting")},
                "metric": metric,
                "model": models[m],
                "n_seeds": of_model["seed"].nunique(),
                "size_mb": float(np.mean([sizes[cell] for cell in of_model["baseline_cell"]])),
                "loss": float(loss_M[m]),
                "ci_low": low,
                "ci_high": high,
                "rank": 1 + int(np.sum(loss_M < loss_M[m] - 1e-9)),
                "rank_low": int(rank_low_M[m]),
                "rank_high": int(rank_high_M[m]),
                "not_told_apart_from": ";".join(others),
            }
        )
    return lines


def _retention(rows: pd.DataFrame, ticket, column: dict, sizes: dict, level: float) -> dict:
    """One model and setting: the ratio of the means over seeds."""
    metric = "worst_group_accuracy"
    before = [column[metric, cell] for cell in rows["baseline_cell"]]
    after = [column[metric, cell] for cell in rows["cell"]]
    with np.errstate(invalid="ignore", divide="ignore"):
        kept = np.divide(ticket.observed_C[after].mean(), ticket.observed_C[before].mean())
        kept_B = ticket.replicates_BC[:, after].mean(axis=1) / ticket.replicates_BC[:, before].mean(axis=1)
    kept = float(kept) if np.isfinite(kept) else np.nan
    low, high = percentile_interval(kept_B[np.isfinite(kept_B)], level)
    fp32_mb = float(np.mean([sizes[cell] for cell in rows["baseline_cell"]]))
    size_mb = float(np.mean([sizes[cell] for cell in rows["cell"]]))
    saved = fp32_mb - size_mb
    per_mb = 1 / saved if saved > 0 else np.nan
    return {
        **{name: rows[name].iloc[0] for name in ("dataset", "model", "setting", "width")},
        "n_seeds": rows["seed"].nunique(),
        "fp32_mb": fp32_mb,
        "size_mb": size_mb,
        "saved_mb": saved,
        "kept": kept,
        "kept_ci_low": low,
        "kept_ci_high": high,
        "kept_per_mb": kept * per_mb,
        "kept_per_mb_ci_low": low * per_mb,
        "kept_per_mb_ci_high": high * per_mb,
    }


def _with_interval(value: float, low: float, high: float, digits: int) -> str:
    if pd.isna(value):
        return tables.MISSING
    ends = ", ".join(tables.number(end, digits, sign=low < 0) for end in (low, high))
    return f"{tables.number(value, digits, sign=low < 0)} [{ends}]"
