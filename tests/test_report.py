import base64
import gzip
import hashlib
import html
import json
import re
import struct

import numpy as np
import pandas as pd
import pytest
from fake_report import EVIL, many_rows, result_rows, study

from analysis.configurations import configurations
from analysis.study_tables import (
    DEPLOYED_NOTE,
    best_settings,
    best_table,
    bold_configurations,
    bold_results,
    deployment_table,
    group_accuracy,
    means_table,
    repair_table,
    result_table,
    result_values,
)
from analysis.tables import MISSING, TableSection, markdown_escape
from report import report_html, summary_markdown
from report_page import to_json

# --------------------------------------------------------------------------------------------------------------- tables


def test_result_table_gives_percent_intervals_and_a_dash_for_what_was_not_measured():
    rows = result_rows().assign(accuracy_ci_low=[0.9, 0.88, np.nan], accuracy_ci_high=[0.92, 0.925, np.nan])
    entry = {
        "comparison": "fp32",
        "metric": "accuracy",
        "group": "all",
        "cell": "q8",
        "ci_low": -0.02,
        "ci_high": 0.001,
    }
    others = [{**entry, **other, "ci_low": -0.5} for other in ({"comparison": "plain"}, {"group": "female"})]
    others.append({**entry, "metric": "accuracy_gap", "ci_low": -0.5})
    significance = pd.DataFrame([*others, entry])
    table = result_table(rows, significance)
    assert table["setting"].tolist() == ["FP32", "W8A8 static (mse)", "W4A4 static (mse)"]
    assert table["accuracy %"].tolist() == ["91.2 ± 1.0", "90.0 ± 2.2", "–"]
    assert table["change"].tolist() == ["–", "-1.2 [-2.0, +0.1]", "–"]
    assert table["equalized odds diff."].tolist() == ["–", "5.0", "–"]
    assert table["status"].tolist() == ["done", "done", "failed"]
    assert "ms" not in table and "seed" not in table
    assert result_table(rows)["change"].tolist() == ["–", "-1.2", "–"]


def test_what_a_table_is_sorted_by_is_what_it_shows():
    rows = result_rows()
    table, values = result_table(rows), result_values(rows)
    for name, numbers in values.items():
        scale = 1 if name in ("MB", "ms") else 100
        if name in table:
            shown = [float(text) if text != MISSING else np.nan for text in table[name]]
            assert np.allclose(shown, scale * np.array(numbers), atol=0.051, equal_nan=True), name


def test_infinite_and_unreadable_values_are_missing():
    rows = result_rows().assign(accuracy=[np.inf, -np.inf, np.nan], size_mb=["much", 2.0, None])
    table = result_table(rows)
    assert table["accuracy %"].tolist() == ["–"] * 3 and table["MB"].tolist() == ["–", "2.00", "–"]
    assert configurations(rows)["accuracy"].isna().all()


def test_best_setting_of_a_width_is_the_most_accurate_one():
    accuracy = study().changes
    worse = accuracy.assign(setting="W8A8 dynamic", accuracy=0.88)
    best = best_settings(pd.concat([worse, accuracy], ignore_index=True), result_rows())
    assert best["setting"].tolist() == ["W8A8 static (mse)"] and best["n_settings"].tolist() == [2]
    assert best["worst_group_accuracy"].tolist() == [0.84] and best["size_mb"].tolist() == [23.6]
    shown = best_table(best, 0.95)
    assert shown["worst group %"].tolist() == ["84.0"] and shown["accuracy %"].tolist() == ["90.0"]
    assert best_table(best_settings(accuracy.iloc[:0], result_rows()), 0.95).empty


def test_bold_stands_where_the_test_says_and_nowhere_else():
    tests = pd.DataFrame(
        [
            {"dataset": "synthetic", "model": "resnet50", "setting": "W8A8 static (mse)", "seed": seed, "cell": cell,
             "is_best": is_best}
            for seed, cell, is_best in ((0, "q8", True), (np.nan, None, True), (0, "base", False))
        ]
    )  # fmt: skip
    assert bold_results(result_rows(), tests) == {(1, "accuracy %")}
    assert bold_configurations(configurations(result_rows()), tests) == {(1, "accuracy %")}
    assert bold_configurations(configurations(result_rows()), tests[tests["seed"].notna()]) == set()
    told = study(best_tests=tests)
    assert "<strong>90.0</strong>" in report_html(told, {}) and "<strong>90.0</strong>" not in report_html(study(), {})


def test_means_over_seeds_show_each_seed_and_are_left_out_for_one_seed():
    one = result_rows().iloc[:2]
    two = pd.concat([one, one.assign(seed=1, cell=["base1", "q81"], accuracy=[0.9, 0.8])], ignore_index=True)
    nothing = pd.DataFrame(columns=["dataset", "model", "setting", "accuracy_ci_low", "accuracy_ci_high"])
    assert means_table(configurations(one), nothing, one, 0.95).empty
    table = means_table(configurations(two), nothing, two, 0.95)
    assert table["seeds"].tolist() == ["2", "2"] and table["each seed"].tolist() == ["91.2, 90.0", "90.0, 80.0"]
    assert table["accuracy %"].tolist() == ["90.6", "85.0"]


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
        "ResNet-50 at FP32: accuracy 91.2 %",
        "accuracy at most 1 point below the most accurate FP32 model (held by 1)",
        "packages numpy: 2.4",
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
    assert EVIL not in html and "&lt;script&gt;alert(" in html
    assert not re.findall(r'(?:src|href)="(?!data:image/png|#)', html) and "url(" not in html and "@import" not in html
    assert "prefers-color-scheme: dark" in html and 'name="viewport"' in html
    for part in ("q4_failed", "q2_missing", "old_cell", "packages numpy", "2.4", "Accuracy falls by 1.23 points."):
        assert part in html, part


def test_no_script_runs_but_those_that_the_policy_names():
    html = report_html(study(), {})
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', html)[1].replace("&#39;", "'")
    scripts = re.findall(r"<script(?: type=\"([^\"]*)\" id=\"[^\"]*\")?>(.*?)</script>", html, re.DOTALL)
    assert len(scripts) == html.count("<script")
    run = [text for kind, text in scripts if not kind]
    packed = next(text for kind, text in scripts if kind == "text/plain")
    run.append(gzip.decompress(base64.b64decode(packed)).decode())
    hashes = {f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in run}
    directives = dict(part.split(" ", 1) for part in policy.split("; "))
    assert set(directives["script-src"].split()) == hashes and len(hashes) == 3
    assert directives["default-src"] == "'none'" and directives["img-src"] == "data:"


@pytest.mark.parametrize("text", ["</script><script>alert(1)</script>", "<!--<script>", "a\u2028b\u2029c", "]]>&amp;"])
def test_data_in_a_script_element_ends_nothing_and_says_the_same(text):
    written = to_json({text: [text, np.float64("nan"), float("inf"), np.int64(3), np.bool_(True), None]})
    assert not set("<>&\u2028\u2029") & set(written)
    assert json.loads(written) == {text: [text, None, None, 3, True, None]}


def test_the_verdicts_stand_beside_their_p_values_and_numbers():
    numbers = {"p": 0.0004, "p_holm": 0.01234, "n_comparisons": 4, "n_models": 2, "n_seeds": 1, "n_images": 1200}
    told = study(hypotheses=study().hypotheses.assign(**numbers))
    text = "p = 0.012 (Holm-corrected over the hypotheses), p < 0.001 (not corrected), 4 comparisons, 2 models, 1 seed"
    assert f"{text}, 1200 test images." in html.unescape(report_html(told, {}))
    assert markdown_escape(f"{text}, 1200 test images.") in summary_markdown(told)
    for without in (study(), study(hypotheses=study().hypotheses.assign(p_holm=np.nan))):
        assert "Holm-corrected over the hypotheses" not in report_html(without, {}) + summary_markdown(without)
    untested = study(hypotheses=study().hypotheses.assign(verdict="not tested", **numbers | {"n_images": 0}))
    assert "seed, 0 test images" not in report_html(untested, {}) + summary_markdown(untested)


def test_figures_have_alternative_text_and_their_size():
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII", 13, b"IHDR", 1400, 900)
    html = report_html(study(figures=[("a.png", 'A "figure"')]), {"a.png": png})
    assert 'alt="Figure a.png: A &#34;figure&#34;"' in html and 'width="1400" height="900"' in html


def test_ten_thousand_cells_give_a_page_of_sensible_size_and_a_short_summary():
    rows = many_rows(10_000)
    many = study(rows=rows, changes=study().changes.iloc[:0], missing=[("quantization", f"m{i}") for i in range(500)])
    html, text = report_html(many, {}), summary_markdown(many)
    assert html.count("<tr>") > 10_000 and len(html) < 12e6
    assert "and 400 more; report.html names all" in text and "m499" in html and len(text) < 40_000


def test_a_long_section_is_cut_in_the_summary_and_said():
    section = TableSection("long", "Long", "", pd.DataFrame({"n": [f"row {i}" for i in range(60)]}))
    text = summary_markdown(study(sections=[section]))
    assert "row 39" in text and "row 40" not in text and "And 20 more rows, in tables/long.md." in text
    assert "row 59" in report_html(study(sections=[section]), {})


def test_report_without_any_quantized_cell_says_so():
    bare = study(rows=result_rows().iloc[:1], sections=[], missing=[], leftovers=[])
    html, text = report_html(bare, {}), summary_markdown(bare)
    assert "No finished quantized cell." in html and "No finished quantized cell." in text
    assert "Failed and missing" not in html
    assert "Recommended" in html  # FP32 can be shipped


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
    tables = group_accuracy(pd.DataFrame(rows), pd.DataFrame(groups))
    assert list(tables) == [("d", "m")]
    table = tables["d", "m"]
    assert table.columns.tolist() == ["attribute", "group", "n", "FP32", "W4A4"]
    assert table[["attribute", "group", "n"]].values.tolist() == [["all", "", 10], ["sex", "a", 6], ["sex", "b", 0]]
    assert table["FP32"].tolist() == ["85.0", "95.0", MISSING]
    assert table["W4A4"].tolist() == ["60.0", "70.0", MISSING]


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
    section = TableSection("deployed", "Deployed", DEPLOYED_NOTE, deployed())
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
    assert layers["plain of the same bits"] == trained["plain of the same bits"] == "W4A4 static (mse)"
    assert (layers["training s"], trained["training s"]) == ("–", "30.0")
    assert repair_table(rows[rows["strategy"].isna()]).empty
