"""What a method costs and what it buys: seconds and bytes against worst-group accuracy gained over plain quantization.

*Plain quantization* of a cell is static post-training quantization to the same bits, of the same model and seed, in the
setting that most models have (`result_rows.main_settings`). Everything else at those bits is compared with it: other
observers and options, dynamic quantization, mixed precision, training, repairs. Seconds are those of calibration and
training of the quantized model, as measured; those of the FP32 model are spent either way.

The gain is the difference of the two worst-group accuracies, each of its own worst group, over images of eligible
groups, mean over seeds. Its interval is a percentile bootstrap over images, drawn jointly for both models and all
seeds. A minimum over groups is biased downward where groups are nearly equal, in both models alike; read the interval
as spread.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from analysis.result_rows import main_settings, with_labels
from significance.joint_bootstrap import TestSet, in_threads, percentile_interval
from store import seed_for

MOST_REPLICATES = 1000  # the ends of an interval in a figure need no more
COST_COLUMNS = (
    "dataset", "model", "setting", "setting_order", "method", "strategy", "width", "reference", "n_seeds", "seconds",
    "reference_seconds", "size_mb", "reference_size_mb", "gain", "ci_low", "ci_high",
)  # fmt: skip


def cost_benefit_table(
    rows: pd.DataFrame, test_sets: Mapping[str, TestSet], replicates: int, level: float
) -> pd.DataFrame:
    """One row a (data set, model, setting) that has a plain counterpart, columns `COST_COLUMNS`.

    `rows` are finished cells whose predictions are in `test_sets`. `gain` and its interval are in points, seconds and
    sizes the means over the seeds that both sides finished; NaN where not measured.
    """
    rows = with_labels(rows) if len(rows) else rows
    found, jobs = [], []
    mains = set(main_settings(rows)) if len(rows) else set()
    for dataset, of_set in rows.groupby("dataset", sort=False) if len(rows) else ():
        test_set = test_sets[dataset]
        static = of_set[(of_set["method"] == "ptq_static") & of_set["strategy"].isna()]
        static = static.assign(is_main=static["setting"].isin(mains)).sort_values(
            "is_main", ascending=False, kind="stable"
        )
        keys = ["model", "seed", "width"]
        plain = {key: block.iloc[0] for key, block in static.groupby(keys, sort=False)}
        others = of_set[of_set["weight_bits"].notna()]
        for (model, setting), block in others.groupby(["model", "setting"], sort=False):
            pairs = [(row, plain.get((row["model"], row["seed"], row["width"]))) for _, row in block.iterrows()]
            pairs = [(row, other) for row, other in pairs if other is not None and other["cell"] != row["cell"]]
            if not pairs:
                continue
            first = pairs[0][0]
            jobs.append((test_set, [(row["cell"], other["cell"]) for row, other in pairs], (dataset, model, setting)))
            found.append(
                {
                    "dataset": dataset, "model": model, "setting": setting, "setting_order": first["setting_order"],
                    "method": first["method"], "strategy": first["strategy"], "width": first["width"],
                    "reference": pairs[0][1]["setting"], "n_seeds": len(pairs),
                    "seconds": np.mean([_seconds(row) for row, _ in pairs]),
                    "reference_seconds": np.mean([_seconds(other) for _, other in pairs]),
                    "size_mb": np.mean([_number(row, "size_mb") for row, _ in pairs]),
                    "reference_size_mb": np.mean([_number(other, "size_mb") for _, other in pairs]),
                }
            )  # fmt: skip

    def gain_of(job: tuple) -> dict[str, float]:
        test_set, cells, names = job
        generator = np.random.default_rng(seed_for("analysis", "cost_benefit", *names))
        ends = worst_group_gain(test_set, cells, min(replicates, MOST_REPLICATES), level, generator)
        return dict(zip(("gain", "ci_low", "ci_high"), ends, strict=True))

    found = [line | gain for line, gain in zip(found, in_threads(gain_of, jobs), strict=True)]
    return pd.DataFrame(found, columns=list(COST_COLUMNS))


def worst_group_gain(
    test_set: TestSet, pairs: list[tuple[str, str]], replicates: int, level: float, generator: np.random.Generator
) -> tuple[float, float, float]:
    """Worst-group accuracy of the first minus that of the second of a pair, mean over pairs, in points; its interval.

    An image counts through its group and which of the models are right on it; so a replicate is one multinomial draw
    over the patterns that occur. NaN without an eligible group.
    """
    eligible = test_set.eligible(test_set.group_N, test_set.group_names)
    if not len(eligible):
        return np.nan, np.nan, np.nan
    cells = [cell for pair in pairs for cell in pair]
    kept = np.isin(test_set.group_N, eligible)
    right_NM = np.stack([test_set.correct(cell)[kept] for cell in cells], axis=1)
    patterns, counts_K = _patterns(np.column_stack([test_set.group_N[kept], right_NM]))
    is_group_KG = (patterns[:, :1] == eligible).astype(float)
    right_KM = patterns[:, 1:].astype(float)
    weights_KGM = is_group_KG[:, :, None] * right_KM[:, None, :]

    def gains(counts_BK: np.ndarray) -> np.ndarray:
        n_BG = counts_BK @ is_group_KG
        hits_BGM = np.tensordot(counts_BK, weights_KGM, axes=1)
        with np.errstate(invalid="ignore"):  # a replicate may lose a group
            worst_BM = np.nanmin(hits_BGM / n_BG[..., None], axis=1)
        return 100 * (worst_BM[:, 0::2] - worst_BM[:, 1::2]).mean(axis=1)

    observed = float(gains(counts_K[None].astype(float))[0])
    total = int(counts_K.sum())
    drawn_BK = generator.multinomial(total, counts_K / total, size=replicates).astype(float)
    low, high = percentile_interval(gains(drawn_BK), level)
    return observed, low, high


def _patterns(table_NM: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows that occur, in order, and how often: np.unique of rows, by their numbers where those fit in 64 bits."""
    widths = np.array([int(column.max()).bit_length() for column in table_NM.T])
    if widths.sum() > 62:
        return np.unique(table_NM, axis=0, return_counts=True)
    shifts = widths[::-1].cumsum()[::-1] - widths
    codes_K, counts_K = np.unique(table_NM.astype(np.int64) @ (1 << shifts), return_counts=True)
    return (codes_K[:, None] >> shifts) & ((1 << widths) - 1), counts_K


def _seconds(row: pd.Series) -> float:
    """Calibration and training together; a method without one of them has no such column, without both NaN."""
    parts = [_number(row, name) for name in ("calibration_seconds", "training_seconds")]
    return float(np.nansum(parts)) if np.isfinite(parts).any() else np.nan


def _number(row: pd.Series, name: str) -> float:
    value = row.get(name)
    return np.nan if value is None or pd.isna(value) else float(value)
