"""The tables that figures are drawn from, of studies of any size, made up; nothing is trained or measured."""

import itertools
import json

import numpy as np
import pandas as pd

from analysis.group_calibration import reliability
from group_counts import METRICS, wilson_interval

GROUPS = {
    "White": 2085, "Latino_Hispanic": 1623, "Indian": 1516, "East Asian": 1550, "Black": 1556, "Southeast Asian": 1415,
    "Middle Eastern": 1209,
}  # fmt: skip
MODELS = ("resnet50", "mobilenet_v2", "squeezenet1_1", "efficientnet_b0", "vit_small_patch16_224")
STRATEGIES = ("bias_aware_calibration", "minimax_ranges", "fair_reconstruction", "group_dro", "threshold_adjustment",
              "distillation")  # fmt: skip


def cells(
    n_models=5, seeds=(0, 1, 2), widths=(8, 4, 3, 2), observers=("mse", "minmax"), strategies=STRATEGIES,
    datasets=("fairface",),
):  # fmt: skip
    """One dict a cell: identity and cost, FP32 first in each (data set, model, seed)."""
    models = [*MODELS[:n_models], *(f"model_{i}.variant" for i in range(len(MODELS), n_models))]
    kinds = [("ptq_static", None, bits, {"observer": name}) for bits in widths for name in observers]
    kinds += [("ptq_dynamic", None, bits, {}) for bits in widths if bits >= 4]
    kinds += [("qat", None, bits, {"observer": "mse"}) for bits in widths]
    kinds += [("mixed_precision", None, 4, {"observer": "mse"})]
    kinds += [("ptq_static", strategy, bits, {"observer": "mse"}) for strategy in strategies for bits in widths]
    found = []
    for dataset, model, seed in itertools.product(datasets, models, seeds):
        common = {"dataset": dataset, "model": model, "seed": seed, "status": "done", "error": None}
        fp32 = f"{dataset}-{model}-s{seed}-fp32"
        found.append(
            {
                **common, "cell": fp32, "phase": "baseline", "method": "none", "strategy": None, "weight_bits": np.nan,
                "activation_bits": np.nan, "options": None, "baseline_cell": None, "calibration_seconds": np.nan,
                "training_seconds": 300.0, "size_mb": 8.0 * (1 + models.index(model)),
            }
        )  # fmt: skip
        for method, strategy, bits, options in kinds:
            is_trained = method == "qat" or strategy in ("group_dro", "distillation")
            found.append(
                {
                    **common, "cell": f"{fp32[:-4]}{method}-{strategy}-{bits}-{options.get('observer')}",
                    "phase": "mitigation" if strategy else "quantization", "method": method, "strategy": strategy,
                    "weight_bits": bits, "activation_bits": bits, "options": json.dumps(options) if options else None,
                    "baseline_cell": fp32, "calibration_seconds": 2.0 + 9 * (strategy == "fair_reconstruction"),
                    "training_seconds": 120.0 if is_trained else np.nan,
                    "size_mb": 8.0 * (1 + models.index(model)) * bits / 32 * (1.02 if strategy else 1.0),
                }
            )  # fmt: skip
    return pd.DataFrame(found)


def tables(**sizes) -> dict[str, pd.DataFrame]:
    """rows, groups, flips, significance, costs of `cells(**sizes)`: accuracies fall with the bits, most in the small
    groups; a few cells failed and a few are absent."""
    rows = cells(**sizes)
    rng = np.random.default_rng(7)
    n_G = np.array(list(GROUPS.values()), dtype=float)
    bits = rows["weight_bits"].fillna(32).to_numpy()
    model = rows["model"].astype("category").cat.codes.to_numpy()
    base_CG = 0.82 + 0.02 * np.sin(model)[:, None] + 0.04 * np.linspace(1, -1, len(n_G))
    lost = np.select([bits >= 8, bits == 4, bits == 3], [0.003, 0.04, 0.12], 0.3) * (bits < 32)
    lost = lost * np.where(rows["strategy"].notna() | (rows["method"] == "qat"), 0.6, 1.0)
    unlike = 1 + 0.5 * np.linspace(-1, 1, len(n_G))
    accuracy_CG = np.clip(base_CG - lost[:, None] * unlike + rng.normal(0, 0.006, base_CG.shape), 0.05, 0.99)
    accuracy_CG = np.round(accuracy_CG * n_G) / n_G
    rows["accuracy"] = accuracy_CG @ n_G / n_G.sum()
    rows["worst_group_accuracy"], rows["accuracy_gap"] = accuracy_CG.min(axis=1), np.ptp(accuracy_CG, axis=1)
    rows["equalized_odds_difference"] = 0.8 * rows["accuracy_gap"] + 0.01
    rows["demographic_parity_difference"] = 0.5 * rows["accuracy_gap"]
    for metric, half in (("accuracy", 0.007), ("worst_group_accuracy", 0.02), ("accuracy_gap", 0.02),
                         ("equalized_odds_difference", 0.025)):  # fmt: skip
        rows[f"{metric}_ci_low"], rows[f"{metric}_ci_high"] = rows[metric] - half, rows[metric] + half
    at = rows.set_index("cell")
    for metric in ("accuracy", "worst_group_accuracy", "accuracy_gap", "equalized_odds_difference"):
        rows[f"delta_{metric}"] = rows[metric] - rows["baseline_cell"].map(at[metric])
    quantized = np.flatnonzero(rows["baseline_cell"].notna())
    failed = rng.choice(quantized, max(1, len(quantized) // 60), replace=False)
    values = [name for name in rows if name.startswith(("accuracy", "worst", "equal", "demo", "delta", "size"))]
    rows.loc[failed, values] = np.nan
    rows.loc[failed, ["status", "error"]] = ["failed", "RuntimeError: broke"]
    absent = rng.choice(np.setdiff1d(quantized, failed), max(1, len(quantized) // 60), replace=False)

    identity = ["cell", "dataset", "model", "seed", "method", "strategy", "weight_bits", "activation_bits", "options"]
    is_done = (rows["status"] == "done").to_numpy(copy=True)
    is_done[absent] = False
    done = rows[is_done]
    groups = done[identity].loc[done.index.repeat(len(n_G))].reset_index(drop=True)
    groups = groups.assign(
        attribute="race", group=list(GROUPS) * len(done), **{"class": "male"}, n=np.tile(n_G, len(done)).astype(int),
        accuracy=accuracy_CG[is_done].ravel(), too_small=False,
    )  # fmt: skip
    flipped = groups[groups["method"] != "none"].drop(columns=["attribute", "class", "accuracy", "too_small"])
    share = lost[is_done][:, None] * unlike + 0.004
    flipped = flipped.assign(flip_rate=share[(done["method"] != "none").to_numpy()].ravel())
    every = flipped.groupby("cell", sort=False).first().reset_index().assign(group="all", n=int(n_G.sum()))
    flips = pd.concat([every, flipped], ignore_index=True)
    flips["ci_low"], flips["ci_high"] = wilson_interval(flips["flip_rate"] * flips["n"], flips["n"])

    rows = rows.drop(index=absent).reset_index(drop=True)
    done = rows[(rows["status"] == "done") & rows["baseline_cell"].notna()]
    parts = []
    for metric in ("accuracy", "worst_group_accuracy", "accuracy_gap"):
        change = done[f"delta_{metric}"]
        parts.append(
            done[identity].assign(
                comparison="fp32", metric=metric, group="all", effect=change, ci_low=change - 0.012,
                ci_high=change + 0.012, p_holm=np.where(change.abs() > 0.012, 0.01, 1.0),
            )
        )  # fmt: skip
    assert set(part["metric"].iloc[0] for part in parts) <= set(METRICS)
    return {"rows": rows, "groups": groups, "flips": flips, "significance": pd.concat(parts, ignore_index=True)}


def probabilities(rows: pd.DataFrame, n=900) -> pd.DataFrame:
    """Reliability of made-up logits of the given cells: the fewer bits, the less honest."""
    tables = []
    rng = np.random.default_rng(3)
    group_N = rng.choice(len(GROUPS), n, p=np.array(list(GROUPS.values())) / sum(GROUPS.values()))
    for row in rows.itertuples():
        bits = 32 if np.isnan(row.weight_bits) else row.weight_bits
        margin_N = rng.gamma(2.0, 1.2, n)
        label_N = rng.integers(0, 2, n)
        right_N = rng.random(n) < 1 / (1 + np.exp(-margin_N * min(1.0, bits / 8)))
        logits_NK = np.zeros((n, 2))
        logits_NK[np.arange(n), np.where(right_N, label_N, 1 - label_N)] = margin_N
        tables.append(reliability(logits_NK, label_N, group_N, list(GROUPS)).assign(cell=row.cell))
    return pd.concat(tables, ignore_index=True)


def costs(rows: pd.DataFrame) -> pd.DataFrame:
    """As `cost_benefit.cost_benefit_table` would give, from the rows' values alone."""
    from analysis.result_rows import with_labels

    rows = with_labels(rows[rows["status"] == "done"])
    plain = rows[
        (rows["method"] == "ptq_static") & rows["strategy"].isna() & rows["options"].str.contains("mse", na=False)
    ]
    key = ["dataset", "model", "seed", "width"]
    both = rows[rows["weight_bits"].notna()].merge(plain, on=key, suffixes=("", "_plain"))
    both = both[both["cell"] != both["cell_plain"]]
    both = both.assign(
        seconds=both["calibration_seconds"].fillna(0) + both["training_seconds"].fillna(0),
        reference_seconds=both["calibration_seconds_plain"], reference=both["setting_plain"],
        reference_size_mb=both["size_mb_plain"],
        gain=100 * (both["worst_group_accuracy"] - both["worst_group_accuracy_plain"]),
    )  # fmt: skip
    names = ["dataset", "model", "setting"]
    found = both.groupby(names, sort=False).agg(
        setting_order=("setting_order", "first"), method=("method", "first"), strategy=("strategy", "first"),
        width=("width", "first"), reference=("reference", "first"), n_seeds=("cell", "size"),
        seconds=("seconds", "mean"),
        reference_seconds=("reference_seconds", "mean"), size_mb=("size_mb", "mean"),
        reference_size_mb=("reference_size_mb", "mean"), gain=("gain", "mean"),
    )  # fmt: skip
    return found.reset_index().assign(ci_low=lambda t: t["gain"] - 1.2, ci_high=lambda t: t["gain"] + 1.2)
