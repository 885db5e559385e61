import base64
import re

import numpy as np
import pandas as pd
import pytest

import report
from report import (
    Study,
    TableSection,
    best_settings,
    best_table,
    deployment_table,
    latex_escape,
    markdown_escape,
    number,
    repair_table,
    report_html,
    result_table,
    summary_markdown,
    to_csv,
    to_html,
    to_latex,
    to_markdown,
)

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


# ------------------------------------------------------------------------------------------------------------- escaping


def test_latex_escapes_every_special_character():
    assert latex_escape("a_b%&#$") == r"a\_b\%\&\#\$"
    assert latex_escape("{x}^2~\\y<>|") == (
        r"\{x\}\textasciicircum{}2\textasciitilde{}\textbackslash{}y\textless{}\textgreater{}\textbar{}"
    )


def test_markdown_keeps_a_table_cell_one_cell_and_starts_no_html_or_link():
    assert markdown_escape("a|b\nc") == r"a\|b c"
    assert markdown_escape(EVIL) == r"\<script>alert('x')\</script>"
    assert markdown_escape("[a](javascript:b)") == r"[a\](javascript:b)"
    assert markdown_escape("bias_aware *x* _y_") == r"bias_aware \*x\* \_y\_"


def test_html_escapes_strings_from_data():
    html = to_html(pd.DataFrame({"<b>": [EVIL, "a & b"]}))
    assert (
        "<script>" not in html
        and "&lt;script&gt;" in html
        and "a &amp; b" in html
        and '<th scope="col">&lt;b&gt;' in html
    )


# --------------------------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize(
    ("value", "digits", "options", "text"),
    [
        (np.nan, 1, {}, "–"),
        (None, 1, {}, "–"),
        (-0.04, 1, {"sign": True}, "0.0"),
        (1.25, 2, {"sign": True}, "+1.25"),
        (94.04, 3, {"significant": True}, "94.0"),
        (0.18774, 3, {"significant": True}, "0.188"),
        (1234.5, 3, {"significant": True}, "1234"),
    ],
)
def test_numbers_for_print(value, digits, options, text):
    assert number(value, digits, **options) == text


def test_result_table_gives_percent_and_a_dash_for_what_was_not_measured():
    table = result_table(result_rows())
    assert table["setting"].tolist() == ["FP32", "W8A8 static (mse)", "W4A4 static (mse)"]
    assert table["accuracy %"].tolist() == ["91.2", "90.0", "–"]
    assert table["change"].tolist() == ["–", "-1.2", "–"]
    assert table["equalized odds diff."].tolist() == ["–", "5.0", "–"]
    assert table["status"].tolist() == ["done", "done", "failed"]


def test_the_same_numbers_are_in_every_format():
    table = result_table(result_rows())
    for text in (to_csv(table), to_markdown(table), to_latex(table), to_html(table)):
        for value in ("91.2", "-1.2", "23.6", "W8A8 static (mse)"):
            assert value in text


def test_latex_is_booktabs_with_one_row_a_line():
    table = pd.DataFrame({"model_name": ["a_b%&", "c"], "accuracy %": ["91.2", "–"]})
    assert to_latex(table, "50 % of_it", "tab:x_y") == "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            r"\caption{50 \% of\_it}",
            r"\label{tab:x-y}",
            r"\begin{tabular}{lr}",
            r"\toprule",
            r"model\_name & accuracy \% \\",
            r"\midrule",
            r"a\_b\%\& & 91.2 \\",
            r"c & -- \\",
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def test_long_latex_tables_may_break_over_pages():
    text = to_latex(pd.DataFrame({"n": [str(i) for i in range(40)]}), "Long")
    assert text.startswith(r"\begin{longtable}{r}") and r"\endhead" in text and text.count(r"\\") == 42


def test_best_setting_of_a_width_is_the_most_accurate_one():
    accuracy = study().changes
    worse = accuracy.assign(setting="W8A8 dynamic", accuracy=0.88)
    best = best_settings(pd.concat([worse, accuracy], ignore_index=True), result_rows())
    assert best["setting"].tolist() == ["W8A8 static (mse)"] and best["n_settings"].tolist() == [2]
    assert best["worst_group_accuracy"].tolist() == [0.84] and best["size_mb"].tolist() == [23.6]


# --------------------------------------------------------------------------------------------------- summary and report


def test_summary_says_what_was_found_and_what_is_absent():
    text = summary_markdown(study())
    for part in (
        "Accuracy falls by 1.23 points.",
        "**INT8 is fine: contradicted.**",
        "-1.2 [-2.0, -0.4]",
        "predicting smile: 1000 test images",
        "4 cells planned (1 baseline, 3 quantization): 2 done, 1 failed, 1 without a result.",
        "q4_failed",
        "q2_missing",
        "python main.py --phase quantization",
        "old_cell",
        "below the minimum size",
        "One seed only",
        "a.png",
    ):
        assert part in text, part
    assert "<script" not in text.replace(r"\<script", "")


def test_summary_counts_each_image_once_with_several_classes():
    data = pd.concat([study().data.assign(**{"class": name}) for name in ("a", "b", "c")], ignore_index=True)
    assert "1000 test images" in summary_markdown(study(data=data))


def test_report_is_one_offline_page_with_everything_escaped():
    png = b"\x89PNG fake"
    html = report_html(study(), {"a.png": png})
    assert base64.b64encode(png).decode() in html
    assert "<script" not in html and "&lt;script&gt;" in html
    assert not re.findall(r'(?:src|href)="(?!data:image/png|#)', html) and "url(" not in html and "@import" not in html
    assert "prefers-color-scheme: dark" in html and 'name="viewport"' in html
    for part in ("q4_failed", "q2_missing", "old_cell", "packages numpy", "2.4", "Accuracy falls by 1.23 points."):
        assert part in html, part


def test_report_without_any_quantized_cell_says_so():
    bare = study(rows=result_rows().iloc[:1], sections=[], missing=[], leftovers=[])
    html, text = report_html(bare, {}), summary_markdown(bare)
    assert "No finished quantized cell." in html and "No finished quantized cell." in text
    assert "Failed and missing" not in html


def test_group_accuracy_is_the_mean_over_seeds_of_each_group():
    """Two seeds, FP32 and W4A4, by hand; the intersection is left out, a group without an image has a dash."""
    rows, groups = [], []
    accuracy = {("fp", 0): 0.9, ("fp", 1): 0.8, ("q", 0): 0.7, ("q", 1): 0.5}
    for (kind, seed), value in accuracy.items():
        quantized = kind == "q"
        rows.append(
            {
                "cell": f"{kind}{seed}",
                "dataset": "d",
                "model": "m",
                "seed": seed,
                "method": "ptq_static" if quantized else "none",
                "strategy": None,
                "weight_bits": 4.0 if quantized else float("nan"),
                "activation_bits": 4.0 if quantized else float("nan"),
                "options": '{"observer":"mse"}' if quantized else None,
                "status": "done",
                "n_test": 10,
                "accuracy": value,
            }
        )
        for attribute, group, n, rate in (
            ("sex", "a", 6, value + 0.1),
            ("sex", "b", 0, float("nan")),
            ("intersection", "a & x", 6, value),
        ):
            groups.append({"cell": f"{kind}{seed}", "attribute": attribute, "group": group, "n": n, "accuracy": rate})
    tables = report.group_accuracy(pd.DataFrame(rows), pd.DataFrame(groups))
    assert list(tables) == [("d", "m")]
    table = tables["d", "m"]
    assert table.columns.tolist() == ["attribute", "group", "n", "FP32", "W4A4"]
    assert table[["attribute", "group", "n"]].values.tolist() == [["all", "", 10], ["sex", "a", 6], ["sex", "b", 0]]
    assert table["FP32"].tolist() == ["85.0", "95.0", report.MISSING]
    assert table["W4A4"].tolist() == ["60.0", "70.0", report.MISSING]


# ------------------------------------------------------------------------------------------------------------ deployed


def deployed() -> pd.DataFrame:
    """The table of an FP32 model and a quantized one in two engines, one of which failed for the quantized one."""
    rows = pd.DataFrame(
        [
            {
                "cell": cell,
                "model": "resnet50",
                "dataset": "synthetic",
                "seed": 0,
                "status": "done",
                "method": method,
                "strategy": None,
                "weight_bits": bits,
                "activation_bits": bits,
                "options": options,
                "baseline_cell": baseline,
                "accuracy": accuracy,
                "worst_group_accuracy": accuracy - 0.1,
            }
            for cell, method, bits, options, baseline, accuracy in (
                ("fp32", "none", np.nan, None, None, 0.9),
                ("q8", "ptq_static", 8, '{"observer":"mse"}', "fp32", 0.85),
            )
        ]
    )
    engine = {"status": "done", "agreement": 1.0, "deployed_accuracy": 0.9, "deployed_worst_group_accuracy": 0.8}
    found = pd.DataFrame(
        [
            {**engine, "cell": "fp32", "engine": "onnxruntime", "size_mb": 40.0, "latency_ms_b1": 8.0,
             "latency_ms_b32": 100.0},
            {**engine, "cell": "fp32", "engine": "openvino", "size_mb": 40.0, "latency_ms_b1": 6.0,
             "latency_ms_b32": 90.0},
            {**engine, "cell": "q8", "engine": "onnxruntime", "size_mb": 10.0, "latency_ms_b1": 2.0,
             "latency_ms_b32": 40.0, "agreement": 0.995, "deployed_accuracy": 0.849},
            {"status": "failed", "cell": "q8", "engine": "openvino"},
            {**engine, "cell": "not planned", "engine": "onnxruntime", "size_mb": 1.0},
        ]
    )  # fmt: skip
    return deployment_table(rows, found)


def test_deployed_models_are_compared_with_fp32_in_the_same_engine():
    table = deployed().set_index(["setting", "engine"])
    assert list(table.index) == [
        ("FP32", "onnxruntime"),
        ("FP32", "openvino"),
        ("W8A8 static (mse)", "onnxruntime"),
    ]
    quantized = table.loc[("W8A8 static (mse)", "onnxruntime")]
    assert quantized["times smaller"] == "4.0"
    assert quantized["times faster, 1 image"] == "4.0" and quantized["times faster, 32 images"] == "2.5"
    assert quantized["agreement %"] == "99.5"
    assert (quantized["accuracy %, simulated"], quantized["accuracy %, deployed"]) == ("85.0", "84.9")
    assert (table.loc["FP32"]["times faster, 1 image"] == "–").all()  # it is compared with nothing


def test_without_an_engine_there_is_no_section():
    rows = result_rows()
    nothing = pd.DataFrame(columns=["cell", "engine", "status"])
    assert deployment_table(rows.assign(baseline_cell=None), nothing).empty
    assert "## Deployed" not in summary_markdown(study())
    section = TableSection("deployed", "Deployed", report.DEPLOYED_NOTE, deployed())
    told = summary_markdown(study(sections=[section]))
    assert "## Deployed" in told and "| 99.5 |" in told
    assert 'id="deployed"' in report_html(study(sections=[section]), {})
    assert 'id="deployed"' not in report_html(study(), {})


def test_repairs_stand_beside_plain_quantization_of_the_same_bits_and_of_the_same_bytes():
    shared = {"dataset": "synthetic", "model": "resnet50", "seed": 0, "status": "done", "strategy": None,
              "accuracy": 0.9,
              "activation_bits": 4, "method": "ptq_static", "training_seconds": np.nan, "calibration_seconds": 2.0,
              "options": '{"observer":"mse"}'}  # fmt: skip
    rows = pd.DataFrame(
        [
            {**shared, "cell": "fp32", "method": "none", "weight_bits": np.nan, "activation_bits": np.nan,
             "size_mb": 40.0, "worst_group_accuracy": 0.9},
            {**shared, "cell": "w4", "weight_bits": 4, "size_mb": 5.0, "worst_group_accuracy": 0.70},
            {**shared, "cell": "w3", "weight_bits": 3, "size_mb": 3.8, "worst_group_accuracy": 0.75},
            {**shared, "cell": "mixed", "method": "mixed_precision", "weight_bits": 4, "size_mb": 5.05,
             "worst_group_accuracy": 0.78},
            {**shared, "cell": "w8", "weight_bits": 8, "size_mb": 10.0, "worst_group_accuracy": 0.89},
            {**shared, "cell": "r", "strategy": "sensitive_layers", "weight_bits": 4, "size_mb": 5.0,
             "worst_group_accuracy": 0.80},
            {**shared, "cell": "t", "strategy": "group_dro", "method": "qat", "weight_bits": 4, "size_mb": 3.8,
             "worst_group_accuracy": 0.81, "training_seconds": 30.0},
        ]
    )  # fmt: skip
    table = repair_table(rows).set_index("against same bits")
    layers, trained = (table.iloc[place] for place in (0, 1))
    assert [float(value) for value in table.index] == [10.0, 11.0]  # both against w4
    assert float(layers["against same bytes"]) == 2.0 and "mixed" in layers["best plain of the same bytes"]
    assert float(trained["against same bytes"]) == 6.0 and trained["best plain of the same bytes"].startswith("W3A4")
    assert (layers["training s"], trained["training s"]) == ("–", "30.0")
    assert repair_table(rows[rows["strategy"].isna()]).empty
