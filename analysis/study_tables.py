"""The tables of a study, as a reader shall see them: every value is text for print, the same in every format.

What is averaged, and against what it is compared, is said with each function and in the notes beside the tables.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from analysis.result_rows import main_settings, model_label, plain_counterparts, with_labels
from analysis.tables import MISSING, number, with_interval, with_margin
from store import INTERSECTION

PERCENT_COLUMNS = {
    "worst_group_accuracy": "worst group %",
    "accuracy_gap": "accuracy gap",
    "equalized_odds_difference": "equalized odds diff.",
    "demographic_parity_difference": "dem. parity diff.",
}
BEST_NOTE = (
    "The most accurate finished setting of each model and width, of so many. It is chosen on the same test images, so "
    "its accuracy is a little optimistic. Change: accuracy minus that of FP32, in points."
)
MEANS_NOTE = (
    "Means over the seeds that finished, each seed's accuracy beside them (of worst groups: the mean of each seed's "
    "worst one). The intervals are over test images, given these seeds."
)
RESULTS_NOTE = "Every finished and failed cell. Change: accuracy minus that of FP32, in points."
DEPLOYED_NOTE = (
    "Each file run by its engine on the whole test split. Agreement is the share of images on which the engine "
    "predicts the simulation's class; faster and smaller are against the FP32 model in the same engine."
)
SAME_BYTES = 1.02  # a file that is so many times as large counts as one of the same size: ONNX beside packed tensors
REPAIR_NOTE = (
    "Repairs beside plain quantization of the same bits, and beside the best plain post-training quantization whose "
    "file is no larger: change of the worst group's accuracy in points."
)
GROUPS_NOTE = (
    "Accuracy in %, group by group, the mean over seeds. Nothing is in bold: groups are not tested for a best."
)


def bold_note(level: float) -> str:
    """What ± and bold mean; part of the caption of each table that has them."""
    return (
        f"± is half the width of the {level * 100:.4g} % interval over test images. Bold: significantly the most "
        "accurate setting of its data set, model and width, better than every other one there on the same images by "
        f"McNemar's mid-p test, Holm-corrected over these comparisons, each p ≤ {1 - level:.2g} (over several seeds "
        "the test flips the signs of the images' differences summed over seeds). No bold: the data do not tell the "
        "best from the others. Worst groups and gaps are never bold and have no ±: extremes of several groups are "
        "biased."
    )


def result_table(rows: pd.DataFrame, significance: pd.DataFrame | None = None) -> pd.DataFrame:
    """Rows as a reader wants them: names spelt out, shares in %, missing values as a dash, one row a cell.

    Accuracy has half the width of its interval beside it; the change against FP32 the paired interval of significance
    (columns of significance.csv), where it is given.
    """
    rows = with_labels(rows)
    severals = [name for name in ("dataset", "seed") if rows[name].nunique() > 1]
    table = pd.DataFrame({name.replace("dataset", "data set"): rows[name].astype(str) for name in severals})
    table["model"] = [model_label(name) for name in rows["model"]]
    table["setting"] = rows["setting"].to_numpy()
    ends = [_floats(rows, f"accuracy_ci_{end}") for end in ("low", "high")]
    table["accuracy %"] = [
        with_margin(100 * value, 100 * low, 100 * high, 1)
        for value, low, high in zip(_floats(rows, "accuracy"), *ends, strict=True)
    ]
    intervals = _change_intervals(significance)
    table["change"] = [
        with_interval(100 * value, *intervals.get(cell, (math.nan, math.nan)), 1)
        for cell, value in zip(rows["cell"], _floats(rows, "delta_accuracy"), strict=True)
    ]
    for name, heading in PERCENT_COLUMNS.items():
        table[heading] = [number(100 * value, 1) for value in _floats(rows, name)]
    table["worst group"] = [MISSING if pd.isna(name) else str(name) for name in rows["worst_group"]]
    table["MB"] = [number(value, 3, significant=True) for value in _floats(rows, "size_mb")]
    if any(not math.isnan(value) for value in _floats(rows, "latency_ms_b1")):
        table["ms"] = [number(value, 3, significant=True) for value in _floats(rows, "latency_ms_b1")]
    table["status"] = rows["status"].astype(str).to_numpy()
    return table.reset_index(drop=True)


def result_values(rows: pd.DataFrame) -> dict[str, list[float]]:
    """The numbers behind the columns of `result_table`, unrounded, to sort by; as they stand in it."""
    names = {"accuracy %": "accuracy", "change": "delta_accuracy", "MB": "size_mb", "ms": "latency_ms_b1"}
    names |= {heading: name for name, heading in PERCENT_COLUMNS.items()}
    return {heading: _floats(rows, name) for heading, name in names.items()}


def bold_results(rows: pd.DataFrame, tests: pd.DataFrame) -> set[tuple[int, str]]:
    """The accuracies of `result_table` that are significantly the best of their block (winners.py)."""
    best = set(tests.loc[tests["is_best"].astype(bool), "cell"].dropna())
    return {(position, "accuracy %") for position, cell in enumerate(rows["cell"]) if cell in best}


def bold_configurations(configs: pd.DataFrame, tests: pd.DataFrame) -> set[tuple[int, str]]:
    """Likewise of a table with one row a configuration: significantly the best over all seeds."""
    keys = ["dataset", "model", "setting"]
    over_seeds = tests[tests["is_best"].astype(bool) & tests["seed"].isna()]
    best = set(over_seeds[keys].itertuples(index=False, name=None))
    rows = configs[keys].itertuples(index=False, name=None)
    return {(position, "accuracy %") for position, key in enumerate(rows) if key in best}


def means_table(configs: pd.DataFrame, intervals: pd.DataFrame, rows: pd.DataFrame, level: float) -> pd.DataFrame:
    """Configurations for print, with the accuracy of each seed; empty where none has several.

    `intervals` are those of `configurations.accuracy_intervals`.
    """
    if not (configs["n_seeds"] > 1).any():
        return pd.DataFrame()
    accuracy = rows.set_index("cell")["accuracy"]
    table = pd.DataFrame(index=configs.index)
    if configs["dataset"].nunique() > 1:
        table["data set"] = configs["dataset"].astype(str)
    table["model"] = [model_label(name) for name in configs["model"]]
    table["setting"] = configs["setting"]
    table["seeds"] = [str(n) for n in configs["n_seeds"]]
    table["accuracy %"] = _accuracies(configs, configs["accuracy"], intervals)
    table["each seed"] = [", ".join(number(100 * accuracy[cell], 1) for cell in cells) for cells in configs["cells"]]
    table[f"change [{level * 100:.4g} % CI]"] = [
        with_interval(row.change, row.ci_low, row.ci_high, 1) for row in configs.itertuples()
    ]
    return _with_means(table, configs).reset_index(drop=True)


def best_settings(changes: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """The most accurate setting of each (data set, model, width) in `hypotheses.accuracy_changes`.

    It is chosen on the test images that it is measured on, so its accuracy is a little optimistic.
    """
    means = ["worst_group_accuracy", "accuracy_gap", "equalized_odds_difference", "size_mb"]
    if changes.empty:
        return pd.DataFrame(columns=[*changes.columns, *means, "n_settings"])
    done = with_labels(rows)
    done = done[done["status"] == "done"]
    keys = ["dataset", "model", "setting"]
    averages = done.assign(**{name: _floats(done, name) for name in means}).groupby(keys, sort=False)[means].mean()
    orders = changes.groupby(["dataset", "model", "width"], sort=False)
    best = changes.loc[orders["accuracy"].idxmax()].assign(n_settings=orders.size().to_numpy())
    ranks = changes.groupby("width")["setting_order"].min()
    models = {key: i for i, key in enumerate(dict.fromkeys(zip(changes["dataset"], changes["model"], strict=True)))}
    best["_model"] = [models[key] for key in zip(best["dataset"], best["model"], strict=True)]
    best["_width"] = best["width"].map(ranks)
    best = best.sort_values(["_model", "_width"], kind="stable").drop(columns=["_model", "_width"])
    return best.join(averages, on=keys).reset_index(drop=True)


def best_table(best: pd.DataFrame, level: float, intervals: pd.DataFrame | None = None) -> pd.DataFrame:
    """`best_settings` for print; `intervals` are those of `configurations.accuracy_intervals`."""
    table = pd.DataFrame(index=best.index)
    if best["dataset"].nunique() > 1:
        table["data set"] = best["dataset"].astype(str)
    table["model"] = [model_label(name) for name in best["model"]]
    table["width"] = best["width"]
    table["best setting"] = best["setting"]
    table["of"] = [str(n) for n in best["n_settings"]]
    table["accuracy %"] = _accuracies(best, 100 * best["accuracy"], intervals)
    table[f"change [{level * 100:.4g} % CI]"] = [
        with_interval(row.change, row.ci_low, row.ci_high, 1) for row in best.itertuples()
    ]
    shares = [name for name in PERCENT_COLUMNS if name in best]
    return _with_means(table, best.assign(**{name: 100 * best[name].astype(float) for name in shares}))


def deployment_table(rows: pd.DataFrame, deployment: pd.DataFrame) -> pd.DataFrame:
    """What engines made of the models (deployment_results.csv), beside the simulation; empty where none has run."""
    rows = with_labels(rows[rows["status"] == "done"])
    found = deployment[deployment["status"] == "done"].merge(
        rows[["cell", "model", "dataset", "seed", "setting", "baseline_cell", "accuracy", "worst_group_accuracy"]],
        on="cell",
    )
    if found.empty:
        return pd.DataFrame()
    fp32 = found[found["baseline_cell"].isna()].set_index(["cell", "engine"])
    reference = fp32.reindex(pd.MultiIndex.from_arrays([found["baseline_cell"], found["engine"]]))
    severals = [name for name in ("dataset", "seed") if found[name].nunique() > 1]
    table = pd.DataFrame({name.replace("dataset", "data set"): found[name].astype(str) for name in severals})
    table["model"] = [model_label(name) for name in found["model"]]
    table["setting"] = found["setting"].to_numpy()
    table["engine"] = found["engine"].to_numpy()
    table["MB"] = [number(value, 3, significant=True) for value in found["size_mb"]]
    table["times smaller"] = [number(value, 1) for value in reference["size_mb"].to_numpy() / found["size_mb"]]
    for column, heading in (("latency_ms_b1", "1 image"), ("latency_ms_b32", "32 images")):
        times = found[column].astype(float) if column in found else pd.Series(np.nan, found.index)
        before = reference[column].astype(float).to_numpy() if column in found else np.nan
        table[f"ms, {heading}"] = [number(value, 3, significant=True) for value in times]
        table[f"times faster, {heading}"] = [number(value, 1) for value in before / times]
    table["agreement %"] = [number(100 * value, 1) for value in found["agreement"]]
    for column, heading in (("accuracy", "accuracy %"), ("worst_group_accuracy", "worst group %")):
        table[f"{heading}, simulated"] = [number(100 * value, 1) for value in found[column]]
        table[f"{heading}, deployed"] = [number(100 * value, 1) for value in found[f"deployed_{column}"]]
    return table.reset_index(drop=True)


def repair_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Each repair beside plain quantization: at the same bits (its counterpart; where no plain cell has its rounding
    and the like, static quantization as it is), and the best of those whose file is no larger (to 2 %), by worst-group
    accuracy; empty where there is no repair. The best plain one is chosen on the same test images, which favours it.
    Changes are of worst-group accuracy, in points."""
    rows = with_labels(rows[rows["status"] == "done"])
    repaired = rows[rows["strategy"].notna()].sort_values(["dataset", "model", "seed", "setting_order"], kind="stable")
    plain = rows[rows["strategy"].isna() & ~rows["method"].isin(["none", "qat"])]
    if repaired.empty:
        return pd.DataFrame()
    pairs = plain_counterparts(rows)
    by_cell = rows.set_index("cell")
    lines = []
    for row in repaired.to_dict("records"):
        is_of_it = (
            (plain["dataset"] == row["dataset"]) & (plain["model"] == row["model"]) & (plain["seed"] == row["seed"])
        )
        among = plain[is_of_it]
        same_bits = among[(among["width"] == row["width"]) & (among["method"] == "ptq_static")].head(1)
        bits = (
            by_cell.loc[pairs[row["cell"]]] if row["cell"] in pairs else same_bits.iloc[0] if len(same_bits) else None
        )
        small = among[among["size_mb"] <= SAME_BYTES * row["size_mb"]].dropna(subset=["worst_group_accuracy"])
        best = small.loc[small["worst_group_accuracy"].idxmax()] if len(small) else None
        worst = row["worst_group_accuracy"]
        line = {name: str(row[name]) for name in ("dataset", "seed") if rows[name].nunique() > 1}
        line |= {"model": model_label(row["model"]), "setting": row["setting"]}
        line |= {"MB": number(row["size_mb"], 3, significant=True), "accuracy %": number(100 * row["accuracy"], 1)}
        line["worst group %"] = number(100 * worst, 1)
        for reference, heading in ((bits, "same bits"), (best, "same bytes")):
            change = np.nan if reference is None else 100 * (worst - reference["worst_group_accuracy"])
            line[f"against {heading}"] = number(change, 1)
        line["plain of the same bits"] = "" if bits is None else bits["setting"]
        line["best plain of the same bytes"] = "" if best is None else best["setting"]
        line["calibration s"] = number(row.get("calibration_seconds"), 1)
        line["training s"] = number(row.get("training_seconds"), 1)
        lines.append(line)
    return pd.DataFrame(lines)


def group_accuracy(rows: pd.DataFrame, groups: pd.DataFrame) -> dict[tuple[str, str], pd.DataFrame]:
    """(data set, model) -> accuracy in % of all images and of each group of each attribute, a column a setting.

    The columns are FP32, the main plain setting of each width, and what strategies make of it; the mean over seeds. A
    group without an image has no accuracy. `groups` are the rows of group_results.csv.
    """
    rows = with_labels(rows[rows["status"] == "done"])
    tables = {}
    for key, block in rows.groupby(["dataset", "model"], sort=False):
        main = main_settings(block)
        shown = block[block["setting"].isin(main) | block["strategy"].notna()].sort_values(
            "setting_order", kind="stable"
        )
        of_model = groups[groups["cell"].isin(shown["cell"])].merge(shown[["cell", "setting"]], on="cell")
        columns: dict[str, dict[tuple[str, str], float]] = {}
        counts: dict[tuple[str, str], int] = {("all", ""): int(shown["n_test"].iloc[0])}
        for setting in dict.fromkeys(shown["setting"]):
            cells = of_model[of_model["setting"] == setting].drop_duplicates(["cell", "attribute", "group"])
            accuracy = cells.groupby(["attribute", "group"], sort=False)["accuracy"].mean()
            columns[setting] = {("all", ""): shown.loc[shown["setting"] == setting, "accuracy"].mean(), **accuracy}
            counts |= cells.groupby(["attribute", "group"], sort=False)["n"].first().astype(int).to_dict()
        places = [place for place in counts if place[0] != INTERSECTION]
        table = pd.DataFrame({"attribute": [a for a, _ in places], "group": [g for _, g in places]})
        table["n"] = [counts[place] for place in places]
        short = [_short_setting(setting) for setting in columns]
        for (setting, values), name in zip(columns.items(), short, strict=True):
            table[name if short.count(name) == 1 else setting] = [
                number(100 * values.get(place, math.nan), 1) for place in places
            ]
        tables[key] = table
    return tables


def _short_setting(setting: str) -> str:
    """'W8A8 static (mse) + balanced calibration' -> 'W8A8 + balanced calibration'."""
    plain, plus, strategy = setting.partition(" + ")
    return plain.partition(" ")[0] + plus + strategy


def data_table(block: pd.DataFrame) -> pd.DataFrame:
    """Groups of the test set for print. With several classes the base rate is that of each class."""
    classes = block["class"].nunique() > 1
    return pd.DataFrame(
        {
            "attribute": block["attribute"],
            "group": block["group"],
            **({"class": block["class"]} if classes else {}),
            "n": [f"{int(n)}" for n in block["n"]],
            "base rate %": [number(100 * rate, 1) for rate in block["base_rate"]],
            "note": ["below the minimum size: left out of gaps" if small else "" for small in block["too_small"]],
        }
    )


# -------------------------------------------------------------------------------------------------------------- helpers


def _accuracies(configs: pd.DataFrame, percent: pd.Series, intervals: pd.DataFrame | None) -> list[str]:
    if intervals is None:
        return [number(value, 1) for value in percent]
    keys = ["dataset", "model", "setting"]
    ends = configs[keys].merge(intervals, on=keys, how="left")
    lows, highs = (100 * ends[f"accuracy_ci_{end}"].astype(float) for end in ("low", "high"))
    return [with_margin(*values, 1) for values in zip(percent, lows, highs, strict=True)]


def _with_means(table: pd.DataFrame, means: pd.DataFrame) -> pd.DataFrame:
    """With columns of what was averaged, percentages given in %."""
    for name, heading in PERCENT_COLUMNS.items():
        if name in means:
            table[heading] = [number(value, 1) for value in means[name]]
    table["MB"] = [number(value, 3, significant=True) for value in means["size_mb"]]
    return table


def _change_intervals(significance: pd.DataFrame | None) -> dict[str, tuple[float, float]]:
    """Cell -> the ends of the interval of its change in accuracy against FP32, in points."""
    if significance is None or significance.empty:
        return {}
    chosen = significance[
        (significance["comparison"] == "fp32")
        & (significance["metric"] == "accuracy")
        & (significance["group"] == "all")
    ].drop_duplicates("cell")
    return {row.cell: (100 * row.ci_low, 100 * row.ci_high) for row in chosen.itertuples()}


def _floats(rows: pd.DataFrame, name: str) -> list[float]:
    """A column as finite numbers; NaN where it is missing, not a number or infinite."""
    if name not in rows:
        return [math.nan] * len(rows)
    values = pd.to_numeric(rows[name], errors="coerce").astype(float)
    return values.where(np.isfinite(values)).tolist()
