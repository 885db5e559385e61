"""Reading result rows: human names of models and settings, the order of settings, and which row compares with which.

A *setting* is what was done to a model: "FP32", "W8A8 static (mse)", "W4A4 static (mse) + balanced calibration". Rows
of several seeds share one setting. Figures, tables and hypotheses all name and pair rows through this module, so that
they agree.
"""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pandas as pd

from sections.quantization import RECONSTRUCTION_KEYS

MODEL_LABELS = {
    "resnet50": "ResNet-50",
    "mobilenet_v2": "MobileNetV2",
    "squeezenet1_1": "SqueezeNet 1.1",
    "efficientnet_b0": "EfficientNet-B0",
    "vit_small_patch16_224": "ViT-S",
}
METHOD_LABELS = {
    "none": "",
    "ptq_static": "static",
    "ptq_dynamic": "dynamic",
    "qat": "QAT",
    "mixed_precision": "mixed precision",
}
STRATEGY_LABELS = {"bias_aware_calibration": "balanced calibration", "group_dro": "group DRO"}
OPTION_LABELS = {
    ("rounding", "adaround"): "AdaRound",
    ("equalize", True): "equalized",
    ("bias_correction", True): "bias corrected",
    ("weight_granularity", "per_tensor"): "per tensor",
    ("activation_scheme", "symmetric"): "symmetric",
    ("backend", "arm"): "ARM",
    ("backend", "tensorrt"): "TensorRT",
    ("reduce_range", True): "reduced range",
}
FP32 = "FP32"


def model_label(name: str) -> str:
    return MODEL_LABELS.get(name, str(name))


def strategy_label(name: str) -> str:
    return STRATEGY_LABELS.get(name, str(name).replace("_", " "))


def width_label(weight_bits, activation_bits) -> str:
    """8, 8 -> 'W8A8'; missing -> 'FP32'."""
    if pd.isna(weight_bits):
        return FP32
    return f"W{int(weight_bits)}A{int(activation_bits) if not pd.isna(activation_bits) else 32}"


def parse_options(text) -> dict:
    """The options of a row: {} where there are none. Text that is not JSON is shown as it is."""
    if text is None or (isinstance(text, float) and np.isnan(text)) or text == "":
        return {}
    try:
        value = json.loads(text)
    except (TypeError, json.JSONDecodeError):
        return {"options": str(text)}
    return value if isinstance(value, dict) else {"options": value}


def with_labels(rows: pd.DataFrame) -> pd.DataFrame:
    """A copy of the rows with columns `width`, `setting`, `setting_order` (FP32 first, then by falling width).

    The observer is always part of the label. Other options are named only where they differ between rows of the same
    method, strategy and observer.
    """
    rows = rows.copy()
    columns = {
        name: _column(rows, name) for name in ("method", "strategy", "weight_bits", "activation_bits", "options")
    }
    options = [parse_options(text) for text in columns["options"]]
    kinds = [
        (method, strategy if isinstance(strategy, str) else None, str(option.get("observer")))
        for method, strategy, option in zip(columns["method"], columns["strategy"], options, strict=True)
    ]
    seen: dict[tuple, set] = {}
    for kind, option in zip(kinds, options, strict=True):
        for key, value in option.items():
            seen.setdefault((kind, key), set()).add(json.dumps(value, sort_keys=True, default=str))
    having = Counter((kind, key) for kind, option in zip(kinds, options, strict=True) for key in option)
    of_kind = Counter(kinds)
    lacking = {(kind, key) for (kind, key), count in having.items() if count < of_kind[kind]}
    widths, settings, orders = [], [], []
    for i, (kind, option) in enumerate(zip(kinds, options, strict=True)):
        method, strategy, _ = kind
        weight_bits, activation_bits = columns["weight_bits"][i], columns["activation_bits"][i]
        told = [str(option["observer"])] if option.get("observer") is not None else []
        told += [
            _option_label(key, value)
            for key, value in sorted(option.items())
            if key != "observer"
            and value is not None
            # how rounding was learned is told only where it differs among the rows that learned it
            and (len(seen[kind, key]) > 1 or ((kind, key) in lacking and key not in RECONSTRUCTION_KEYS))
        ]
        width = width_label(weight_bits, activation_bits)
        label = " ".join(part for part in (width, METHOD_LABELS.get(method, str(method).replace("_", " "))) if part)
        label += f" ({', '.join(told)})" if told else ""
        label += f" + {strategy_label(strategy)}" if strategy else ""
        widths.append(width)
        settings.append(label)
        methods = list(METHOD_LABELS)
        orders.append(
            (
                -99.0 if pd.isna(weight_bits) else -float(weight_bits),
                -99.0 if pd.isna(activation_bits) else -float(activation_bits),
                strategy is not None,
                methods.index(method) if method in methods else len(methods),
                label,
            )
        )
    rank = {order: position for position, order in enumerate(sorted(set(orders)))}
    rows["width"], rows["setting"] = widths, settings
    rows["setting_order"] = [rank[order] for order in orders]
    return rows


def _option_label(key: str, value) -> str:
    if isinstance(value, dict):  # the settings of a training's start
        return ", ".join(f"{name}={each}" for name, each in sorted(value.items()))
    return f"{key}={value}" if isinstance(value, list) else OPTION_LABELS.get((key, value), f"{key}={value}")


def main_settings(rows: pd.DataFrame) -> list[str]:
    """FP32 and, for each width, the plain static setting (else the first plain one) that most cells have, in order.

    `rows` are those of `with_labels`.
    """
    plain = rows[rows["strategy"].isna() & (rows["method"] != "none")]
    chosen = [FP32] if (rows["setting"] == FP32).any() else []
    for _, block in sorted(plain.groupby("width"), key=lambda item: item[1]["setting_order"].min()):
        static = block[block["method"] == "ptq_static"]
        block = static if len(static) else block
        counts = block["setting"].value_counts()
        candidates = block[block["setting"].map(counts) == counts.max()]
        chosen.append(candidates["setting"].iloc[0])  # ties: the first in the order of the plan
    return chosen


RECIPE = (
    "observer", "weight_observer", "weight_granularity", "activation_scheme", "equalize", "bias_correction", "rounding",
    "backend", "reduce_range",
)  # fmt: skip
# training decides on its own what becomes of these
RECIPE_OF_TRAINED = tuple(key for key in RECIPE if key not in ("bias_correction", "rounding"))


def plain_counterparts(rows: pd.DataFrame) -> dict[str, str]:
    """Mitigated cell -> the cell without the strategy at the same data set, model, seed, widths and method.

    What changes a model without any group must agree (RECIPE); among several candidates the one that shares most other
    options. A mitigated cell without such a counterpart is absent from the answer: what learned rounding gives, say, is
    not a repair's.
    """
    pairs = {}
    plain = rows[rows["strategy"].isna()]
    by_key: dict[tuple, list] = {}
    for row in plain.itertuples():
        by_key.setdefault(_pair_key(row), []).append(row)
    for row in rows[rows["strategy"].notna()].itertuples():
        mine = parse_options(row.options)
        best, most = None, None
        for candidate in by_key.get(_pair_key(row), []):
            theirs = parse_options(candidate.options)
            recipe = RECIPE_OF_TRAINED if row.method == "qat" else RECIPE
            if any(mine.get(key) != theirs.get(key) for key in recipe):
                continue
            agreeing = sum(theirs.get(key) == value for key, value in mine.items())
            if most is None or agreeing > most:
                best, most = candidate.cell, agreeing
        if best is not None:
            pairs[row.cell] = best
    return pairs


def _pair_key(row) -> tuple:
    return row.dataset, row.model, row.seed, row.method, width_label(row.weight_bits, row.activation_bits)


def _column(rows: pd.DataFrame, name: str) -> list:
    return rows[name].tolist() if name in rows else [np.nan] * len(rows)
