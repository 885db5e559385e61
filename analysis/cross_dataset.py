"""Does what quantization does to whom transfer to another data set? From saved predictions: numbers and sentences.

Models that were measured on a second data set (`evaluation.also_on`) are compared with their FP32 model on both: at
home, on the test images of the data set that they were trained on, and abroad. Groups are those that both sets have,
under common names. Changes are paired (the same images), the mean over seeds of what each image gained or lost, with
percentile bootstrap intervals over images; the two sets share no image, so that the difference of their changes has an
interval from independent draws.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd

from analysis import tables
from analysis.result_rows import FP32, main_settings, model_label, with_labels
from analysis.usable import NoUsablePredictions, UsablePredictions, usable_predictions
from config import Config
from group_mapping import Correspondence, correspondence
from significance.joint_bootstrap import TestSet
from store import Store, seed_for

ALL = "all"  # the group of all images
COLUMNS = (
    "trained_on", "evaluated_on", "model", "width", "setting", "setting_order", "is_main", "strategy", "n_seeds",
    "attribute", "group", "too_small", "n_home", "n_abroad", "accuracy_home", "accuracy_abroad", "change_home",
    "change_home_low", "change_home_high", "change_abroad", "change_abroad_low", "change_abroad_high", "difference",
    "difference_low", "difference_high",
)  # fmt: skip
NOTE = (
    "Models measured on another data set too, with the groups that both have. Home: the test images of the data set "
    "that a model was trained on; abroad: those of the other one. Changes are accuracy minus FP32's, in points. The "
    "group hit hardest is chosen by its change at home, which is overstated by that; its change abroad is not. A model "
    "that does little better than guessing abroad has little to lose there."
)


def measure_transfer(
    rows: pd.DataFrame, test_sets: Mapping[str, TestSet], config: Config, store: Store
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(a row for each pair of data sets, model, setting and group, columns `COLUMNS`; what is absent).

    `rows` are finished cells. Shares are shares, changes are in shares too. What is absent has the columns of
    missing.csv: cells that were not measured on a data set that the config wants, and files that cannot be used.
    """
    rows = with_labels(rows)
    found: list[dict] = []
    absent: list[tuple[str, str, str, str]] = []
    for trained_on, test_set in test_sets.items():
        of_set = rows[rows["dataset"] == trained_on]
        for evaluated_on in config.evaluation.also_on:
            if evaluated_on == trained_on:
                continue
            measured = _measured_cells(store, evaluated_on)
            phases = dict(zip(of_set["cell"], of_set["phase"], strict=True))
            names = {f"{cell}@{evaluated_on}": cell for cell in phases if measured.get(cell) == "done"}
            absent += [
                (phase, cell, "elsewhere", f"not measured on {evaluated_on}; python main.py --phase {phase}")
                for cell, phase in phases.items()
                if measured.get(cell) not in ("done", "skipped")
            ]
            try:
                abroad = usable_predictions(store, list(names)) if names else None
            except NoUsablePredictions as error:
                unusable, abroad = error.why, None
            else:
                unusable = {} if abroad is None else abroad.unusable
            absent += [(phases[names[name]], names[name], "unusable elsewhere", why) for name, why in unusable.items()]
            if abroad is not None:
                mapping = correspondence(config, trained_on, evaluated_on)
                found += _compared(of_set, test_set, abroad, mapping, config)
    return pd.DataFrame(found, columns=list(COLUMNS)), pd.DataFrame(absent, columns=["phase", "cell", "status", "why"])


def transfer_table(frame: pd.DataFrame, level: float) -> pd.DataFrame:
    """FP32, the main setting of each width and the repairs, for print."""
    lines = []
    shown = frame[frame["is_main"] | frame["strategy"].notna()]
    several = len(shown.drop_duplicates(["trained_on", "evaluated_on"])) > 1
    interval = f"[{level * 100:.4g} % CI]"
    for keys, block in shown.groupby(["trained_on", "evaluated_on", "model", "setting"], sort=False):
        trained_on, evaluated_on, model, setting = keys
        everyone = block[block["group"] == ALL].iloc[0]
        groups = block[(block["group"] != ALL) & ~block["too_small"]]
        line = {"trained on": trained_on, "measured on": evaluated_on} if several else {}
        line |= {"model": model_label(model), "setting": setting}
        for side in ("home", "abroad"):
            line[f"accuracy %, {side}"] = tables.number(100 * everyone[f"accuracy_{side}"], 1)
        for side in ("home", "abroad"):
            accuracy = groups[f"accuracy_{side}"]
            worst = None if accuracy.dropna().empty else groups.loc[accuracy.idxmin()]
            value = math.nan if worst is None else 100 * worst[f"accuracy_{side}"]
            line[f"worst group %, {side}"] = tables.number(value, 1)
            line[f"worst group, {side}"] = tables.MISSING if worst is None else str(worst["group"])
        hardest = None if groups["change_home"].dropna().empty else groups.loc[groups["change_home"].idxmin()]
        for side in ("home", "abroad"):
            line[f"change, {side} {interval}"] = _change(everyone, side)
        line["hit hardest at home"] = tables.MISSING if hardest is None else str(hardest["group"])
        for side in ("home", "abroad"):
            line[f"its change, {side} {interval}"] = tables.MISSING if hardest is None else _change(hardest, side)
        lines.append(line)
    return pd.DataFrame(lines)


def transfer_sentences(frame: pd.DataFrame, level: float) -> list[str]:
    """One for each pair of data sets and main setting, from the values of the frame."""
    sentences = []
    quantized = frame[frame["is_main"] & frame["change_home"].notna() & frame["change_abroad"].notna()]
    keys = ["trained_on", "evaluated_on", "setting"]
    for (trained_on, evaluated_on, setting), block in quantized.groupby(keys, sort=False):
        everyone = block[block["group"] == ALL]
        groups = block[(block["group"] != ALL) & ~block["too_small"]]
        if everyone.empty or groups.empty:
            continue
        fp32 = frame[(frame["width"] == FP32) & (frame["group"] == ALL) & (frame["trained_on"] == trained_on)]
        fp32 = fp32[(fp32["evaluated_on"] == evaluated_on) & fp32["model"].isin(everyone["model"])]
        levels = [_span(100 * fp32[f"accuracy_{side}"], sign=False) for side in ("home", "abroad")]
        differing = int(((groups["difference_low"] > 0) | (groups["difference_high"] < 0)).sum())
        changes = [_span(100 * everyone[f"change_{side}"]) for side in ("home", "abroad")]
        sentences.append(
            f"Models trained on {trained_on}: {setting} changes accuracy by {changes[0]} points there and by "
            f"{changes[1]} on {evaluated_on} (FP32: {levels[0]} % and {levels[1]} %); of {len(groups)} changes of a "
            f"group, {differing} differ between the two data sets with a {level * 100:.4g} % interval that excludes "
            f"zero (by chance alone, about {(1 - level) * len(groups):.1f} would)."
        )
    return sentences


# ---------------------------------------------------------------------------------------------------------- the numbers


def _measured_cells(store: Store, evaluated_on: str) -> dict[str, str]:
    """Cell -> the status of its evaluation on that data set."""
    table = store.read_extra_table("cross_dataset")
    if table is None:
        return {}
    table = table[table["evaluated_on"] == evaluated_on]
    return dict(zip(table["cell"], table["status"], strict=True))


def _compared(
    rows: pd.DataFrame, test_set: TestSet, abroad: UsablePredictions, mapping: Correspondence, config: Config
) -> Iterator[dict]:
    """A row for each model, setting and group."""
    common, evaluated_on = mapping.primary, mapping.evaluated_on
    rows = rows[[f"{cell}@{evaluated_on}" in abroad.predictions for cell in rows["cell"]]]
    main = set(main_settings(rows))
    sides = {
        "home": (test_set.label_N, common.home_codes[test_set.group_N], lambda cell: test_set.predictions[cell]),
        "abroad": (
            abroad.y_true,
            common.abroad_codes[abroad.sensitive[common.abroad]],
            lambda cell: abroad.predictions[f"{cell}@{evaluated_on}"],
        ),
    }
    correct = {
        side: {cell: predicted(cell) == label_N for cell in rows["cell"]}
        for side, (label_N, _, predicted) in sides.items()
    }
    sizes = {side: np.bincount(codes_N, minlength=len(common.groups)) for side, (_, codes_N, _) in sides.items()}
    rows = rows.sort_values("setting_order", kind="stable")
    models = {model: place for place, model in enumerate(dict.fromkeys(rows["model"]))}
    blocks = sorted(rows.groupby(["model", "setting"], sort=False), key=lambda item: models[item[0][0]])
    for (model, setting), block in blocks:
        first = block.iloc[0]
        pairs = [
            (cell, reference)
            for cell, reference in zip(block["cell"], block["baseline_cell"], strict=True)
            if reference in correct["home"] and reference != cell
        ]
        for place, group in enumerate((ALL, *common.groups)):
            row = {
                "trained_on": mapping.trained_on,
                "evaluated_on": evaluated_on,
                **{name: first[name] for name in ("width", "setting_order")},
                "model": model,
                "setting": setting,
                "is_main": setting in main,
                "strategy": first["strategy"] if isinstance(first["strategy"], str) else None,
                "n_seeds": block["seed"].nunique(),
                "attribute": common.name,
                "group": group,
                "too_small": False,
            }
            drawn = {}
            for side, (_, codes_N, _) in sides.items():
                is_in = np.ones(len(codes_N), dtype=bool) if group == ALL else codes_N == place - 1
                row[f"n_{side}"] = int(is_in.sum())
                right = [correct[side][cell][is_in] for cell in block["cell"]]
                row[f"accuracy_{side}"] = float(np.mean(right)) if is_in.any() else math.nan
                if group != ALL and sizes[side][place - 1] < config.data.min_group_size:
                    row["too_small"] = True
                if pairs and is_in.any():
                    generator = np.random.default_rng(
                        seed_for("cross-dataset", mapping.trained_on, evaluated_on, model, setting, group, side)
                    )
                    won_N = sum(
                        correct[side][cell][is_in].astype(np.int64) - correct[side][reference][is_in]
                        for cell, reference in pairs
                    )
                    row[f"change_{side}"], drawn[side] = _resampled_mean(
                        won_N, len(pairs), config.analysis.bootstrap_replicates, generator
                    )
                    row |= _ends(f"change_{side}", drawn[side], config.analysis.confidence)
            if len(drawn) == 2:
                row["difference"] = row["change_abroad"] - row["change_home"]
                row |= _ends("difference", drawn["abroad"] - drawn["home"], config.analysis.confidence)
            yield row


def _resampled_mean(
    won_N: np.ndarray, n_pairs: int, replicates: int, generator: np.random.Generator
) -> tuple[float, np.ndarray]:
    """The mean of won_N / n_pairs over images, and its bootstrap replicates (B,).

    Few values occur, and to resample images is to draw how many of them have each value.
    """
    values, counts = np.unique(won_N, return_counts=True)
    n = len(won_N)
    drawn_BV = generator.multinomial(n, counts / n, size=replicates)
    return float(won_N.sum() / (n * n_pairs)), drawn_BV @ values / (n * n_pairs)


def _ends(name: str, values_B: np.ndarray, level: float) -> dict[str, float]:
    low, high = np.quantile(values_B, [(1 - level) / 2, (1 + level) / 2])
    return {f"{name}_low": float(low), f"{name}_high": float(high)}


# -------------------------------------------------------------------------------------------------------------- helpers


def _change(row: pd.Series, side: str) -> str:
    value, low, high = (100 * row[f"change_{side}{end}"] for end in ("", "_low", "_high"))
    if pd.isna(value):
        return tables.MISSING
    value, low, high = (tables.number(each, 1, sign=True) for each in (value, low, high))
    return f"{value} [{low}, {high}]"


def _span(values: pd.Series, sign: bool = True) -> str:
    low, high = tables.number(values.min(), 1, sign=sign), tables.number(values.max(), 1, sign=sign)
    return low if low == high else f"{low} to {high}"
