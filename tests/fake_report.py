"""A study as plain data for the tests of the report: small, with every kind of row and hostile strings; or large."""

import numpy as np
import pandas as pd

from analysis.study_tables import best_settings, best_table
from analysis.tables import TableSection
from report import Study

EVIL = "<script>alert('x')</script>"


def result_rows():
    shared = {"dataset": "synthetic", "seed": 0, "strategy": None, "error": None, "worst_group": "female"}
    return pd.DataFrame(
        [
            {
                **shared,
                "cell": "base",
                "phase": "baseline",
                "model": "resnet50",
                "method": "none",
                "weight_bits": None,
                "activation_bits": None,
                "options": None,
                "status": "done",
                "accuracy": 0.9123,
                "worst_group_accuracy": 0.85,
                "accuracy_gap": 0.1,
                "equalized_odds_difference": np.nan,
                "delta_accuracy": np.nan,
                "size_mb": 94.04,
            },
            {
                **shared,
                "cell": "q8",
                "phase": "quantization",
                "model": "resnet50",
                "method": "ptq_static",
                "weight_bits": 8,
                "activation_bits": 8,
                "options": '{"observer":"mse"}',
                "status": "done",
                "accuracy": 0.9,
                "delta_accuracy": -0.0123,
                "worst_group_accuracy": 0.84,
                "accuracy_gap": 0.1,
                "equalized_odds_difference": 0.05,
                "size_mb": 23.6,
            },
            {
                **shared,
                "cell": "q4_failed",
                "phase": "quantization",
                "model": "resnet50",
                "method": "ptq_static",
                "weight_bits": 4,
                "activation_bits": 4,
                "options": '{"observer":"mse"}',
                "status": "failed",
                "error": EVIL,
                "worst_group": None,
            },
        ]
    )


def study(**changes):
    rows = result_rows()
    accuracy = pd.DataFrame(
        [
            {
                "dataset": "synthetic",
                "model": "resnet50",
                "setting": "W8A8 static (mse)",
                "setting_order": 1,
                "width": "W8A8",
                "n_seeds": 1,
                "n_images": 1000,
                "accuracy": 0.9,
                "change": -1.23,
                "ci_low": -2.0,
                "ci_high": -0.4,
            }
        ]
    )
    data = pd.DataFrame(
        [
            {
                "dataset": "synthetic",
                "attribute": "race",
                "group": name,
                "class": "smile",
                "n": n,
                "base_rate": rate,
                "too_small": n < 20,
            }
            for name, n, rate in ((EVIL, 990, 0.5), ("tiny", 10, 0.3))
        ]
    )
    verdicts = pd.DataFrame(
        [{"statement": "INT8 is fine", "verdict": "contradicted", "sentence": f"It is not {EVIL}.", "rule": "a rule"}]
    )
    values = {
        "rows": rows,
        "data": data,
        "changes": accuracy,
        "sections": [TableSection("best", "Best", "", best_table(best_settings(accuracy, rows), 0.95))],
        "hypotheses": verdicts,
        "findings": ["Accuracy falls by 1.23 points."],
        "planned": {"baseline": 1, "quantization": 3},
        "missing": [("quantization", "q2_missing")],
        "leftovers": ["old_cell"],
        "replicates": 1000,
        "seeds": [0],
        "targets": {"synthetic": "smile"},
        "figures": [("a.png", "A figure")],
        "environment": {"packages": {"numpy": "2.4"}},
    }
    return Study(**{**values, **changes})


def many_rows(n):
    """n finished rows of two models and n/2 settings, their values a pattern: row i has accuracy 90 - i/1000 %."""
    share = 0.9 - np.arange(n) / 100_000
    rows = pd.DataFrame({"cell": [f"c{i}" for i in range(n)]})
    rows["model"] = ["resnet50", "mobilenet_v2"] * (n // 2)
    rows["options"] = [f'{{"observer":"mse","grid":{i // 2}}}' for i in range(n)]
    rows = rows.assign(
        phase="quantization", dataset="synthetic", seed=0, method="ptq_static", strategy=None, error=None,
        status="done", worst_group="female", weight_bits=4.0, activation_bits=4.0, accuracy=share,
        delta_accuracy=share - 0.905, accuracy_ci_low=share - 0.01, accuracy_ci_high=share + 0.01,
        worst_group_accuracy=share - 0.05, accuracy_gap=0.07, equalized_odds_difference=0.06,
        demographic_parity_difference=0.05, size_mb=1 + (np.arange(n) * 7919 % n) / 100,
    )  # fmt: skip
    base = {"cell": "base", "phase": "baseline", "model": "resnet50", "method": "none", "accuracy": 0.905}
    base |= {"weight_bits": None, "activation_bits": None, "options": None, "delta_accuracy": np.nan, "size_mb": 94.0}
    return pd.concat([pd.DataFrame([{**rows.iloc[0].to_dict(), **base}]), rows.iloc[1:]], ignore_index=True)
