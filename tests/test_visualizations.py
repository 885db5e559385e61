import io
import itertools
import json

import numpy as np
import pandas as pd
import pytest
from fake_tables import costs, probabilities, tables

from analysis.hypotheses import COLUMNS
from analysis.result_rows import main_settings, plain_counterparts, with_labels
from figures.style import MAX_HEIGHT, MOST_PAGES, mean_ends, paged, styles
from visualizations import (
    accuracy_heatmap,
    all_pages,
    cost_benefit,
    fairness_heatmap,
    fairness_vs_bits,
    group_diagnostics,
    group_flip_rates,
    hypothesis_validation,
    layer_sensitivity,
    mitigation_comparison,
    pareto_frontier,
    pareto_mask,
    pareto_points,
    per_group_performance,
    probability_calibration,
)

MSE = '{"observer":"mse","weight_observer":"mse"}'
BALANCED = '{"balance":"intersection","observer":"mse","weight_observer":"mse"}'


def row(
    model="resnet50",
    bits=None,
    accuracy=0.9,
    *,
    dataset="synthetic",
    seed=0,
    strategy=None,
    method="ptq_static",
    **more,
):
    activation_bits = more.pop("activation_bits", bits)
    method = "none" if bits is None else method
    options = more.pop("options", None if bits is None else BALANCED if strategy else MSE)
    cell = f"{dataset}-{model}-s{seed}-{method}-{strategy}-w{bits}a{activation_bits}-{options}"
    values = {"worst_group_accuracy": accuracy - 0.05, "accuracy_gap": 0.06, "equalized_odds_difference": 0.08}
    return {
        "cell": cell, "dataset": dataset, "model": model, "seed": seed, "method": method, "strategy": strategy,
        "weight_bits": bits, "activation_bits": activation_bits, "options": options, "status": "done",
        "accuracy": accuracy, "accuracy_ci_low": accuracy - 0.02, "accuracy_ci_high": accuracy + 0.02,
        "size_mb": 40.0 * (bits or 32) / 32, **values, **more,
    }  # fmt: skip


def frame(*rows):
    return pd.DataFrame(list(rows))


def group(name, accuracy, n=100, bits=None, model="resnet50", seed=0, too_small=False, dataset="synthetic", **more):
    return {
        "cell": f"{dataset}-{model}-s{seed}-{bits}", "dataset": dataset, "model": model, "seed": seed,
        "method": "none" if bits is None else "ptq_static", "strategy": None, "weight_bits": bits,
        "activation_bits": bits, "options": None if bits is None else MSE, "attribute": "race", "group": name,
        "class": "smile", "n": n, "accuracy": accuracy, "too_small": too_small, **more,
    }  # fmt: skip


def drawn(figure):
    """Draw it for real: errors in layout or text appear only then."""
    figure.savefig(io.BytesIO(), format="png", dpi=40)
    return figure


def texts(figure):
    return [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]


def intervals(axes):
    """(low, high, at) of every interval drawn, sorted; vertical ones too."""
    found = []
    for collection in axes.collections:
        if collection.get_gid() == "intervals":
            for (x0, y0), (x1, y1) in (path.vertices for path in collection.get_paths()):
                found.append((x0, x1, y0) if y0 == y1 and x0 != x1 else (y0, y1, x0))
    return sorted(tuple(float(value) for value in entry) for entry in found)


def points(axes, markers="os^DvPX*"):
    """(x, y) of every mark that is drawn alone, sorted."""
    lines = [line for line in axes.lines if line.get_marker() in tuple(markers) and line.get_gid() is None]
    return sorted((float(x), float(y)) for line in lines for x, y in zip(*line.get_data(), strict=True))


# ------------------------------------------------------------------------------------------------------------- the rows


def test_labels_are_what_a_person_would_write():
    rows = with_labels(
        frame(
            row(),
            row(bits=8),
            row(bits=4, activation_bits=8, options='{"observer":"entropy","weight_observer":"mse"}'),
            row(bits=8, method="ptq_dynamic", options='{"weight_observer":"mse"}'),
            row(bits=4, strategy="bias_aware_calibration"),
        )
    )
    assert list(rows["setting"]) == [
        "FP32", "W8A8 static (mse)", "W4A8 static (entropy)", "W8A8 dynamic",
        "W4A4 static (mse) + balanced calibration",
    ]  # fmt: skip
    assert list(rows["setting_order"]) == [0, 1, 3, 2, 4]


def test_options_are_named_only_where_rows_differ_in_them():
    few, many = (f'{{"calibration_samples":{n},"observer":"mse"}}' for n in (64, 512))
    rows = with_labels(frame(row(bits=8, options=few), row(bits=8, options=many)))
    assert list(rows["setting"]) == [f"W8A8 static (mse, calibration_samples={n})" for n in (64, 512)]


def test_main_setting_of_a_width_is_the_one_most_cells_have():
    minmax = '{"observer":"minmax"}'
    rows = frame(
        row(), row(bits=8), row("vit", 8), row(bits=8, options=minmax), row(bits=8, method="ptq_dynamic", options=None),
        row(bits=4, options=minmax), row(bits=4, strategy="bias_aware_calibration"),
    )  # fmt: skip
    assert main_settings(with_labels(rows)) == ["FP32", "W8A8 static (mse)", "W4A4 static (minmax)"]


def test_a_mitigated_cell_is_paired_with_the_plain_cell_of_its_observer_model_seed_and_width():
    right = row(bits=4)
    mitigated = row(bits=4, strategy="bias_aware_calibration")
    others = [
        row(bits=8), row("vit", 4), row(bits=4, seed=1), row(bits=4, options='{"observer":"minmax"}'),
        row(bits=4, activation_bits=8), row(bits=4, method="ptq_dynamic"),
    ]  # fmt: skip
    assert plain_counterparts(frame(*others, right, mitigated)) == {mitigated["cell"]: right["cell"]}
    assert plain_counterparts(frame(*others, mitigated)) == {}


@pytest.mark.parametrize("key, value", [("rounding", "adaround"), ("bias_correction", True), ("equalize", True)])
def test_what_learned_rounding_or_bias_correction_gives_is_not_a_repairs(key, value):
    """A cell with it has no counterpart without it; training from such a start has the QAT of its widths."""
    options = {"observer": "mse", key: value}
    plain, same = row(bits=4, options='{"observer":"mse"}'), row(bits=4, options=json.dumps(options))
    repaired = row(bits=4, strategy="fair_reconstruction", options=json.dumps({**options, "weighting": "balanced"}))
    assert plain_counterparts(frame(plain, repaired)) == {}
    assert plain_counterparts(frame(plain, same, repaired)) == {repaired["cell"]: same["cell"]}
    qat = row(bits=4, method="qat", options='{"observer":"mse"}')
    trained = row(bits=4, method="qat", strategy="group_dro", options=json.dumps(options))
    assert plain_counterparts(frame(qat, trained)) == ({} if key == "equalize" else {trained["cell"]: qat["cell"]})


# ---------------------------------------------------------------------------------------------------------- pareto_mask


def test_pareto_mask_of_a_case_worked_by_hand():
    size_accuracy = [[1, 0.8], [2, 0.9], [2, 0.85], [3, 0.9], [1, 0.8], [np.nan, 1.0], [4, 0.95]]
    assert pareto_mask(size_accuracy, [False, True]).tolist() == [True, True, False, False, True, False, True]


def test_pareto_mask_equals_brute_force_on_random_points_with_ties_and_nans():
    rng = np.random.default_rng(0)
    for trial in range(150):
        n, d = rng.integers(0, 14), rng.integers(1, 5)
        values = rng.integers(0, 4, size=(n, d)).astype(float)
        values[rng.random((n, d)) < 0.08] = np.nan
        maximize = rng.random(d) < 0.5
        signed = np.where(maximize, values, -values)

        def dominates(a, b):
            return not np.isnan(a).any() and (a >= b).all() and (a > b).any()

        expected = [
            not np.isnan(signed[i]).any() and not any(dominates(signed[j], signed[i]) for j in range(n))
            for i in range(n)
        ]
        assert pareto_mask(values, maximize).tolist() == expected, trial


def test_pareto_mask_refuses_directions_that_do_not_fit():
    with pytest.raises(ValueError, match=r"shape \(N, 3\)"):
        pareto_mask(np.zeros((4, 2)), [True, False, True])


# -------------------------------------------------------------------------------------------------------------- figures


def test_heatmap_shows_the_values_fp32_first_and_never_a_zero_for_a_missing_cell():
    failed = row("vit", 4, status="failed", accuracy=np.nan)
    rows = frame(row("vit", 8, 0.871), row("vit", None, 0.912), failed, row("resnet50", None, 0.934))
    axes = drawn(accuracy_heatmap(rows)).axes[0]
    # columns FP32, W8A8, W4A4; rows in the order of the rows: vit, resnet50
    image = axes.images[0].get_array()
    np.testing.assert_allclose(np.ma.filled(image, np.nan), [[91.2, 87.1, np.nan], [93.4, np.nan, np.nan]])
    cells = {text.get_position(): text.get_text() for text in axes.texts if text.get_ha() == "center"}
    assert cells[0, 0] == "91.2" and cells[1, 0] == "87.1" and cells[0, 1] == "93.4"
    assert cells[2, 0] == "×"  # failed
    assert (2, 1) not in cells and (1, 1) not in cells  # not there
    (hatched,) = [each for each in axes.collections if each.get_gid() == "hatched"]
    assert len(hatched.get_paths()) == 3
    assert [label.get_text() for label in axes.get_yticklabels()] == ["vit", "ResNet-50"]
    assert [text.get_text() for text in axes.texts if text.get_text()[0] in "FW"] == ["FP32", "W8A8", "W4A4"]


def test_heatmap_averages_seeds_and_says_so():
    figure = accuracy_heatmap(frame(row(seed=0, accuracy=0.9), row(seed=1, accuracy=0.8)))
    assert "85.0" in texts(figure)
    assert any("mean over 2 seeds" in text for text in texts(figure))


def test_heatmap_of_many_settings_goes_on_below_in_blocks_of_like_size():
    options = [f'{{"observer":"mse","calibration_samples":{n}}}' for n in range(50)]
    figure = drawn(accuracy_heatmap(frame(row(), *(row(bits=8, options=text) for text in options))))
    heatmaps = [axes for axes in figure.axes if axes.images]
    assert [axes.images[0].get_array().shape[1] for axes in heatmaps] == [17, 17, 17]


def test_fairness_heatmap_colours_by_better_and_worse_and_shows_what_is_sure():
    """Worst group -3 and +2 points, gap +1 and -2: worse and better in both."""
    eight = row(bits=8, delta_worst_group_accuracy=0.02, delta_accuracy_gap=-0.02)
    four = row(bits=4, delta_worst_group_accuracy=-0.03, delta_accuracy_gap=0.01)
    rows = frame(row(), eight, four, row("vit", 4, status="failed"))
    differences = pd.DataFrame(
        [
            {"comparison": "fp32", "metric": metric, "group": "all", "p_holm": p, "ci_low": 0.01, "ci_high": 0.02}
            | {"cell": cell["cell"]}
            for cell, metric, p in (
                (eight, "worst_group_accuracy", 0.11), (four, "worst_group_accuracy", 0.1),
                (eight, "accuracy_gap", np.nan), (four, "accuracy_gap", 0.4),
            )
        ]
    )  # fmt: skip
    figure = drawn(fairness_heatmap(rows, differences, level=0.9))
    worst, gap = figure.axes[:2]
    colours = [np.ma.filled(axes.images[0].get_array(), np.nan) for axes in (worst, gap)]
    np.testing.assert_allclose(colours, [[[2, -3], [np.nan, np.nan]], [[2, -1], [np.nan, np.nan]]])
    written = {axes: {t.get_position(): t for t in axes.texts if t.get_position()[1] >= 0} for axes in (worst, gap)}
    assert [written[worst][x, 0].get_text() for x in (0, 1)] == ["+2.0", "−3.0"]
    assert [written[gap][x, 0].get_text() for x in (0, 1)] == ["−2.0", "+1.0"]
    bold = [written[axes][x, 0].get_fontweight() == "bold" for axes in (worst, gap) for x in (0, 1)]
    assert bold == [False, True, False, False]
    assert written[worst][1, 1].get_text() == "×" and (0, 1) not in written[worst]
    norm = worst.images[0].norm
    assert norm(0.0) == 0.5 and norm.vmin == -norm.vmax  # diverging about 0
    assert [label.get_text() for label in worst.get_yticklabels()] == ["ResNet-50 (85.0)", "vit"]  # FP32's worst group
    assert any("Holm-corrected p ≤ 0.1)" in text for text in texts(figure))


def test_fairness_heatmap_writes_no_signed_zero():
    rows = frame(row(), row(bits=8, delta_worst_group_accuracy=-0.0001, delta_accuracy_gap=0.0001))
    shown = texts(fairness_heatmap(rows))
    assert "0.0" in shown and not {"−0.0", "+0.0", "-0.0"} & set(shown)


def test_per_group_draws_each_accuracy_with_its_wilson_interval():
    groups = pd.DataFrame([group("A", 0.9), group("B", 0.8), group("A", 0.7, bits=8), group("B", 0.5, bits=8)])
    axes = drawn(per_group_performance(groups)).axes[0]
    assert [x for x, _ in points(axes)] == pytest.approx([50, 70, 80, 90])
    # Wilson, 50 of 100: centre 1/2, half width z/(2 sqrt(n + z^2)) = 0.0961680
    assert intervals(axes)[0] == pytest.approx((50 - 9.6168, 50 + 9.6168, 1.32), abs=1e-3)
    assert len(intervals(axes)) == 4
    assert [label.get_text() for label in axes.get_yticklabels()] == ["A (100)", "B (100)"]
    wider = drawn(per_group_performance(groups, level=0.99)).axes[0]
    assert intervals(wider)[0][0] < intervals(axes)[0][0] - 1


def test_per_group_leaves_out_empty_groups_and_marks_small_ones():
    groups = pd.DataFrame([group("A", 0.9), group("tiny", 0.5, n=4, too_small=True), group("none", np.nan, n=0)])
    axes = drawn(per_group_performance(groups)).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["A (100)", "tiny (4)*"]
    assert {line.get_markerfacecolor() for line in axes.lines if line.get_ydata()[0] == 1} == {"w"}


def test_per_group_draws_each_seed_and_the_mean_and_no_accuracy_that_is_undefined():
    groups = pd.DataFrame(
        [group("A", 0.9, seed=0), group("A", 0.7, seed=1), group("B", np.nan), group("B", np.nan, seed=1)]
    )
    axes = per_group_performance(groups).axes[0]
    assert [x for x, _ in points(axes, "|")] == pytest.approx([70, 90])
    assert points(axes) == [(pytest.approx(80), 0)]
    assert len(intervals(axes)) == 1


def test_per_group_has_a_panel_for_each_method_beside_fp32():
    groups = [group("A", 0.9), group("A", 0.8, bits=8), group("A", 0.6, bits=4)]
    qat = group("A", 0.7, bits=4) | {"cell": "qat", "method": "qat"}
    figure = drawn(per_group_performance(pd.DataFrame([*groups, qat])))
    static, trained = figure.axes
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["ResNet-50\nstatic", "\nQAT"]
    assert [x for x, _ in points(static)] == pytest.approx([60, 80, 90])
    assert [x for x, _ in points(trained)] == pytest.approx([70, 90])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["FP32", "W8A8", "W4A4"]


def flip(name, rate, n=100, bits=8, seed=0, low=None):
    return {
        "cell": f"c{bits}-{seed}", "dataset": "faces", "model": "vit", "seed": seed, "method": "ptq_static",
        "strategy": None, "weight_bits": bits, "activation_bits": bits, "options": MSE, "group": name, "n": n,
        "flip_rate": rate, "ci_low": rate - 0.01 if low is None else low, "ci_high": rate + 0.02,
    }  # fmt: skip


def test_flip_rates_are_drawn_with_the_intervals_that_are_given():
    flips = [
        flip("all", 0.05, n=200),
        flip("A", 0.02),
        flip("B", 0.08),
        flip("A", 0.3, bits=4),
        flip("none", np.nan, n=0),
    ]
    axes = drawn(group_flip_rates(pd.DataFrame(flips))).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["all (200)", "A (100)", "B (100)"]
    assert [x for x, _ in points(axes)] == pytest.approx([2, 5, 8, 30])
    assert [entry[:2] for entry in intervals(axes)] == [pytest.approx(e) for e in ((1, 4), (4, 7), (7, 10), (29, 32))]


def test_flip_rates_of_several_seeds_are_means_and_an_unknown_end_leaves_the_interval_out():
    flips = [flip("A", 0.1), flip("A", 0.2, seed=1), flip("B", 0.1), flip("B", 0.1, seed=1, low=np.nan)]
    axes = drawn(group_flip_rates(pd.DataFrame(flips))).axes[0]
    assert points(axes) == [(pytest.approx(10), 1), (pytest.approx(15), 0)]
    assert [x for x, _ in points(axes, "|")] == pytest.approx([10, 10, 10, 20])
    assert [entry[:2] for entry in intervals(axes)] == [pytest.approx((14, 17))]  # means of 9, 19 and of 12, 22
    for empty in (pd.DataFrame(flips)[:0], pd.DataFrame(flips).assign(n=0)):
        assert "Nothing to show" in texts(group_flip_rates(empty))[0]


def test_mitigation_compares_the_right_pairs():
    rows = frame(
        row(), row(bits=8, accuracy=0.88), row(bits=4, accuracy=0.7),
        row(bits=8, accuracy=0.89, strategy="bias_aware_calibration"),
        row(bits=4, accuracy=0.75, strategy="bias_aware_calibration"),
    )  # fmt: skip
    axes = drawn(mitigation_comparison(rows)).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["ResNet-50  W8A8", "ResNet-50  W4A4"]
    (plain,) = [each for each in axes.collections if each.get_gid() == "plain"]
    assert [path.vertices[:, 0].tolist() for path in plain.get_paths()] == [
        pytest.approx([88, 88]),
        pytest.approx([70, 70]),
    ]
    found = [(x, round(y)) for x, y in points(axes)]
    assert found == [(pytest.approx(70), 1), (pytest.approx(75), 1), (pytest.approx(88), 0), (pytest.approx(89), 0)]
    assert [entry[:2] for entry in intervals(axes)] == [
        pytest.approx((value - 2, value + 2)) for value in (70, 75, 88, 89)
    ]


def test_mitigation_of_several_seeds_has_intervals_too():
    rows = frame(*(row(bits=8, accuracy=a, seed=s, strategy=strategy) for strategy in (None, "bias_aware_calibration")
                   for s, a in enumerate((0.8, 0.9))))  # fmt: skip
    axes = drawn(mitigation_comparison(rows)).axes[0]
    assert [entry[:2] for entry in intervals(axes)] == [pytest.approx((83, 87))] * 2


def test_mitigation_without_mitigated_rows_says_so():
    assert any("no mitigated cell" in text for text in texts(drawn(mitigation_comparison(frame(row(), row(bits=8))))))


def hypothesis(**values):
    blank = dict.fromkeys(COLUMNS, np.nan) | {"statement": "A", "verdict": "supported", "unit": "points", "reason": ""}
    return {**blank, "threshold_low": 0.0, "threshold_high": 0.0, "ci_level": 0.95, "parts": [], **values}


def test_hypotheses_show_effect_interval_threshold_and_verdict():
    part = {"label": "ResNet-50", "effect": -0.5, "ci_low": -0.8, "ci_high": -0.2}
    told = hypothesis(
        effect=-0.4, ci_low=-0.7, ci_high=-0.1, threshold_low=-1.0, threshold_high=1.0, parts=[part], p=0.0001,
        p_holm=0.0321,
    )  # fmt: skip
    absent = hypothesis(statement="B", verdict="not tested", reason="no W4A4 cell")
    figure = drawn(hypothesis_validation(pd.DataFrame([told, absent])))
    (axes,) = figure.axes  # the one not tested has no axis
    assert intervals(axes) == [(-0.8, -0.2, 1.0), (-0.7, -0.1, 0.0)]
    assert points(axes, "Do") == [(-0.5, 1.0), (-0.4, 0.0)]
    lines = [list(line.get_xdata()) for line in axes.lines]
    assert {-1.0, 1.0} <= {line[0] for line in lines if len(line) == 2 and line[0] == line[1]}
    shown = texts(figure)
    assert {"supported", "not tested", "no W4A4 cell"} <= set(shown)
    assert any("95 %: -0.70 to -0.10\np < 0.001\ncorrected p = 0.032" in text for text in shown)


def test_hypotheses_of_any_number_are_on_pages_each_once():
    many = pd.DataFrame([hypothesis(statement=f"number {i}", effect=0.1, ci_low=0.0, ci_high=0.2) for i in range(30)])
    pages = list(all_pages(hypothesis_validation, many))
    shown = [text for page in pages for text in texts(page) if text.startswith("number ")]
    assert shown == [f"number {i}" for i in range(30)] and len(pages) > 1
    assert all(page.get_figheight() <= MAX_HEIGHT for page in pages)


def test_pareto_points_are_those_that_no_other_one_dominates_in_all_dimensions():
    """Brute force on random rows with ties, two data sets, undefined gaps and cells without a size."""
    rng = np.random.default_rng(1)
    rows = frame(
        *(
            row(
                f"m{i % 7}", 8, rng.choice([0.6, 0.7, 0.8]), options=f'{{"observer":"{i}"}}',
                size_mb=rng.choice([1, 2, 3, np.nan]), accuracy_gap=rng.choice([0.1, 0.2, np.nan]),
                dataset=("faces", "more")[i % 2],
            )
            for i in range(120)
        )
    )  # fmt: skip
    found = pareto_points(rows, ["accuracy", "accuracy_gap", "size_mb"])
    assert 0 < found["on_front_all"].sum() < len(found)
    for _, block in found.groupby("dataset"):
        values = block[["accuracy", "accuracy_gap", "size_mb"]].to_numpy() * [-1, 1, 1]
        for i, value in enumerate(values):
            beaten = any((other <= value).all() and (other < value).any() for other in values)  # NaN compares false
            assert block["on_front_all"].iloc[i] == (not beaten and not np.isnan(value).any())
    # equal settings are on the front together
    assert found[found["on_front_all"]].duplicated(["dataset", "accuracy", "accuracy_gap", "size_mb"]).any()


def test_pareto_means_need_all_seeds_and_unknown_dimensions_are_refused():
    rows = frame(row(bits=8, seed=0, accuracy_gap=0.1), row(bits=8, seed=1, accuracy_gap=np.nan))
    (point,) = pareto_points(rows).to_dict("records")
    assert np.isnan(point["accuracy_gap"]) and point["accuracy"] == pytest.approx(0.9) and point["n_seeds"] == 2
    assert not point["on_front_all"] and point["on_front_accuracy"]
    with pytest.raises(ValueError, match=r"unknown dimension beauty; choose from accuracy, "):
        pareto_points(rows, ["accuracy", "beauty"])


def test_pareto_rings_exactly_the_non_dominated_settings_with_their_intervals():
    rows = frame(
        row(accuracy=0.9),
        row(bits=8, accuracy=0.9),
        row(bits=4, accuracy=0.7),
        row(bits=4, accuracy=0.75, activation_bits=8),
        row(bits=2, accuracy=np.nan),
    )
    found = pareto_points(rows).set_index("setting")
    front = {"FP32": False, "W8A8 static (mse)": True, "W4A4 static (mse)": False, "W4A8 static (mse)": True}
    assert found["on_front_accuracy"].to_dict() == front and found["on_front_all"].to_dict() == front
    accuracy, gap = drawn(pareto_frontier(rows)).axes
    for axes, values in ((accuracy, [75, 90]), (gap, [6, 6])):
        (ring,) = [line for line in axes.lines if line.get_gid() == "front"]
        assert list(ring.get_xdata()) == [5.0, 10.0] and list(ring.get_ydata()) == pytest.approx(values)
    assert [entry[:2] for entry in intervals(accuracy)] == [pytest.approx((73, 77)), pytest.approx((88, 92))]
    assert intervals(gap) == []  # the rows have none
    numbers = {text.get_text(): text.xy for text in accuracy.texts}
    assert numbers == {"1": (5.0, pytest.approx(75)), "2": (10.0, pytest.approx(90))}


def test_pareto_with_latency_and_what_was_not_measured():
    rows = frame(
        row(latency_ms_b1=5.0), row(bits=8, latency_ms_b1=2.0), row(bits=4, accuracy=0.95, latency_ms_b1=np.nan)
    )
    figure = drawn(pareto_frontier(rows, ["accuracy", "latency_ms_b1"]))
    (axes,) = figure.axes
    (ring,) = [line for line in axes.lines if line.get_gid() == "front"]
    assert axes.get_xlabel() == "latency, 1 image (ms)" and list(ring.get_xdata()) == [2.0]
    missing = texts(drawn(pareto_frontier(frame(row()), ["accuracy", "latency_ms_b32"])))
    assert missing == ["Nothing to show: no finished cell was measured in all of accuracy × latency, 32 images"]


def test_fairness_vs_bits_draws_the_metric_in_order_of_width_with_intervals():
    ends = {"equalized_odds_difference_ci_low": 0.05, "equalized_odds_difference_ci_high": 0.35}
    rows = frame(row(bits=4, equalized_odds_difference=0.3), row(equalized_odds_difference=0.1, **ends), row("vit", 8))
    axes = drawn(fairness_vs_bits(rows)).axes[0]
    line = next(line for line in axes.lines if line.get_label() == "ResNet-50")
    assert list(line.get_ydata()) == pytest.approx([10, 30])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["FP32", "W8A8", "W4A4"]
    assert [entry[:2] for entry in intervals(axes)] == [pytest.approx((5, 35))]


def test_fairness_vs_bits_of_many_models_shows_each_and_their_median():
    rows = frame(*(row(f"m{i}", bits, equalized_odds_difference=i / 100) for i in range(11) for bits in (None, 8)))
    axes = drawn(fairness_vs_bits(rows)).axes[0]
    (each,) = [collection for collection in axes.collections if collection.get_gid() == "models"]
    assert len(each.get_paths()) == 11
    assert [list(line.get_ydata()) for line in axes.lines] == [pytest.approx([5, 5])]


def cost(kind, gain, seconds=10.0, size=1.0, width="W8A8", model="vit", **more):
    return {
        "dataset": "faces", "model": model, "setting": kind, "setting_order": 1, "method": "ptq_static",
        "strategy": kind, "width": width, "reference": "plain", "n_seeds": 1, "seconds": seconds,
        "reference_seconds": 4.0, "size_mb": size, "reference_size_mb": 1.0, "gain": gain,
        "ci_low": gain - 1, "ci_high": gain + 1, **more,
    }  # fmt: skip


def test_cost_benefit_draws_gains_at_their_seconds_and_bytes_with_intervals():
    table = pd.DataFrame(
        [
            cost("a", 2.0, seconds=10.0, size=1.1), cost("a", 4.0, seconds=1000.0, size=1.3, model="m"),
            cost("b", -1.0, seconds=np.nan),
        ]
    )  # fmt: skip
    seconds, sizes = drawn(cost_benefit(table)).axes
    # each cell small and the mean large: seconds by the geometric mean; b has no seconds and is not drawn at 0
    assert points(seconds) == [(10, 2), (pytest.approx(100), 3), (1000, 4)]
    assert [(round(x, 6), y) for x, y in points(sizes)] == [(0, -1), (10, 2), (20, 3), (30, 4)]
    assert [entry[:2] for entry in intervals(sizes)] == [(-2, 0), (2, 4)]
    assert intervals(seconds) == [(2, 4, pytest.approx(100))]
    dashed = [line.get_xdata()[0] for axes in (seconds, sizes) for line in axes.lines if line.get_gid() == "plain"]
    assert dashed == [pytest.approx(4), 0]
    low, high = seconds.get_ylim()
    assert low < -2 and high > 5


def test_cost_benefit_has_a_row_a_width_and_says_when_there_is_nothing():
    table = pd.DataFrame([cost("a", 1.0, width=width, setting_order=i) for i, width in enumerate(("W8A8", "W4A4"))])
    titles = [axes.get_title(loc="left") for axes in drawn(cost_benefit(table)).axes]
    assert titles == ["W8A8, 1 model", "", "W4A4, 1 model", ""]
    for empty in (table[:0], table.assign(gain=np.nan)):
        assert "Nothing to show" in texts(cost_benefit(empty))[0]


def bins(cell, group, *entries):
    """(bin, n, confidence, accuracy), …"""
    return [
        {"cell": cell, "group": group, "bin": b, "bin_low": 0.5 + b / 4, "bin_high": 0.75 + b / 4, "n": n,
         "confidence": confidence, "accuracy": accuracy, "ci_low": 0.0, "ci_high": 1.0}
        for b, n, confidence, accuracy in entries
    ]  # fmt: skip


def test_reliability_pools_seeds_and_keeps_the_interval_of_one_seeds_images():
    rows = frame(row(seed=0), row(seed=1))
    one, two = rows["cell"]
    empty = (1, 0, np.nan, np.nan)
    table = pd.DataFrame([*bins(one, "all", (0, 50, 0.6, 0.4), empty), *bins(two, "all", (0, 150, 0.7, 0.6), empty)])
    axes = drawn(probability_calibration(table, rows)).axes[0]
    assert points(axes) == [(pytest.approx((50 * 0.6 + 150 * 0.7) / 200), pytest.approx(0.55))]
    # 110 of 200 over two seeds: the interval of 55 of 100, Wilson: 0.4524 to 0.6438
    assert intervals(axes) == [(pytest.approx(0.4524, abs=1e-4), pytest.approx(0.6438, abs=1e-4), pytest.approx(0.675))]
    # the mean of the seeds' errors: (20 + 10) / 2 points
    assert any(text.startswith("15.0 (") for text in texts(axes))
    assert "all (100)" in axes.get_title(loc="left")


def test_reliability_shows_each_group_of_fp32_and_the_main_settings_and_no_other_cell():
    rows = frame(row(), row(bits=8), row(bits=8, strategy="group_dro"), row(bits=4, method="ptq_dynamic"))
    table = pd.DataFrame(
        [entry for cell in rows["cell"][:3] for g in ("all", "A") for entry in bins(cell, g, (0, 9, 0.6, 0.5))]
    )
    figure = drawn(probability_calibration(table, rows))
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["all (9)", "A (9)"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["FP32", "W8A8 static (mse)"]
    assert "Nothing to show" in texts(probability_calibration(table[:0], rows))[0]


# ------------------------------------------------------------------------------------------------ what figures share


def test_a_mean_of_intervals_is_undefined_where_one_is():
    block = pd.DataFrame({"low": [1.0, 3.0], "high": [2.0, 6.0]})
    assert mean_ends(block, "low", "high") == (2.0, 4.0)
    assert np.isnan(mean_ends(block.assign(low=[1.0, np.nan]), "low", "high")).all()
    assert np.isnan(mean_ends(block, "low", "absent")).all()


def test_styles_are_told_apart():
    names = [f"strategy {i}" for i in range(42)]
    assert len(set(styles(["FP32", *names]).values())) == 43


def test_pages_hold_what_fits_in_order():
    assert paged("abcde", [4, 4, 4, 11, 1], 10) == [["a", "b"], ["c"], ["d"], ["e"]]


def test_a_page_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="page 2: this figure has pages 1 to 1"):
        accuracy_heatmap(frame(row()), page=2)


@pytest.fixture(scope="module", params=["models", "settings"])
def ten_thousand(request):
    """As many cells, of many models or of many settings, and the tables that figures are drawn from."""
    many = {
        "models": {"n_models": 50, "seeds": range(5)},
        "settings": {"seeds": (0,), "observers": ["mse", *map(str, range(492))]},
    }
    found = tables(**many[request.param])
    assert len(found["rows"]) > 9800
    rows = with_labels(found["rows"][found["rows"]["status"] == "done"])
    mains = rows[rows["setting"].isin(main_settings(rows)) & (rows["seed"] == 0)]
    return found | {"costs": costs(found["rows"]), "probabilities": probabilities(mains, 100)}


def test_ten_thousand_cells_stay_within_pages_of_readable_size(ten_thousand):
    rows, is_many_models = ten_thousand["rows"], ten_thousand["rows"]["model"].nunique() > 10
    said = {}
    for draw, *arguments in (
        (accuracy_heatmap, rows), (fairness_heatmap, rows, ten_thousand["significance"]),
        (per_group_performance, ten_thousand["groups"]), (group_flip_rates, ten_thousand["flips"]),
        (mitigation_comparison, rows), (cost_benefit, ten_thousand["costs"]), (pareto_frontier, rows),
        (fairness_vs_bits, rows), (probability_calibration, ten_thousand["probabilities"], rows),
    ):  # fmt: skip
        figure = draw(*arguments)
        assert 1 <= figure.n_pages <= MOST_PAGES, draw
        assert figure.get_figheight() <= MAX_HEIGHT + 1e-9 and figure.get_figwidth() <= 7.0, draw
        written = figure.findobj(lambda artist: hasattr(artist, "get_fontsize") and bool(artist.get_text()))
        assert min(text.get_fontsize() for text in written) >= 5, draw
        said[draw] = " ".join(texts(figure)).replace("\n", " ").replace("\u00a0", " ")
        assert (f"page 1 of {figure.n_pages}" in said[draw]) == (figure.n_pages > 1), draw
    # what is averaged or left out is said
    if is_many_models:
        assert "the first 48 of 200 panels" in said[per_group_performance]
        assert "mean over models" in said[mitigation_comparison]
        assert "each of 50 models" in said[fairness_vs_bits]
    else:
        assert "the options of a method averaged" in said[accuracy_heatmap]
        assert "are numbered, one where they are close; all are in pareto.csv" in said[pareto_frontier]


@pytest.mark.parametrize("draw", [accuracy_heatmap, fairness_heatmap, mitigation_comparison])
def test_pages_show_every_row_once(draw):
    """Forty models, which take several pages, each in its place."""
    rows = tables(n_models=40, seeds=(0,), widths=(8, 4), observers=("mse",), strategies=("group_dro",))["rows"]
    pages = list(all_pages(draw, rows))
    assert len(pages) > 1 and [page.page for page in pages] == list(range(1, len(pages) + 1))
    labels = [
        label.get_text().partition("  ")[0].partition(" (")[0]
        for page in pages
        for axes in page.axes[: 1 if draw is mitigation_comparison else None]
        for label in axes.get_yticklabels()
        if label.get_text().startswith("model_")
    ]
    assert set(labels) == {f"model_{i}.variant" for i in range(5, 40)}
    assert len(set(labels.count(name) for name in labels)) == 1 or draw is mitigation_comparison


FIGURES = (accuracy_heatmap, fairness_heatmap, mitigation_comparison, pareto_frontier, fairness_vs_bits)


@pytest.mark.parametrize("figure_of", FIGURES, ids=lambda function: function.__name__)
def test_figures_survive_what_results_can_hold(figure_of):
    odd = row(r"a$\frac{$b_% model with a very, very long name", 4, strategy="some_new_strategy")
    plain = row(r"a$\frac{$b_% model with a very, very long name", 4)
    nan = {name: np.nan for name in ("accuracy", "worst_group_accuracy", "equalized_odds_difference", "size_mb")}
    many = [
        row(model, bits, 0.5 + 0.05 * bits, dataset=dataset, seed=seed, strategy=strategy)
        for model, bits, dataset, seed, strategy in itertools.product(
            [f"model{i}" for i in range(5)], (8, 4, 2), ("celeba", "fairface"), (0, 1), (None, "bias_aware_calibration")
        )
    ]
    cases = [
        frame(row()),
        frame(row(), row(bits=8, **nan)),
        frame(row(status="failed", **nan)),
        frame(plain, odd),
        frame(*many),
        frame(row()).iloc[:0],
    ]
    for case in cases:
        drawn(figure_of(case))


def test_per_group_survives_many_groups_long_names_and_nothing():
    names = [rf"group {i} $\bad{{$ very_long% attribute" for i in range(14)]
    many = [
        group(name, 0.5 + 0.03 * i, bits=bits, model=model, dataset=dataset)
        for i, name in enumerate(names)
        for bits, model, dataset in itertools.product((None, 8, 4, 2), ("m1", "m2"), ("celeba", "fairface"))
    ]
    for case in ([group("only", 0.9)], [group("A", np.nan)], many):
        drawn(per_group_performance(pd.DataFrame(case)))
    drawn(per_group_performance(pd.DataFrame(many).iloc[:0]))


def test_layer_sensitivity_marks_the_chosen_width_of_every_layer():
    layers, widths = ["a", "b", "c"], [2, 4, 8]
    table = pd.DataFrame(
        [
            {"cell": cell, "layer": layer, "bits": bits, "sensitivity": 10.0**-bits, "chosen_bits": chosen}
            for cell in ("one", "two", "of no finished cell")
            for layer, chosen in zip(layers, (8, 2, 4), strict=True)
            for bits in widths
        ]
    )
    rows = pd.DataFrame(
        {"cell": ["one", "two"], "dataset": ["faces"] * 2, "model": ["resnet50", "mine$"], "status": ["done"] * 2}
    )
    figure = layer_sensitivity(table, rows)
    panels = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title(loc="left") for axes in panels] == ["ResNet-50, 3 layers", r"mine\$, 3 layers"]
    for axes in panels:
        (marks,) = axes.lines
        assert list(marks.get_ydata()) == [2, 0, 1]
        np.testing.assert_allclose(axes.images[0].get_array(), np.tile([[-2], [-4], [-8]], 3))
    table["sensitivity"] = 0.0  # as of a model that loses nothing
    figure = layer_sensitivity(table, rows)
    figure.savefig(io.BytesIO(), format="png")
    for empty in (rows[:0], rows.assign(status="failed")):
        figure = layer_sensitivity(table, empty)
        assert "Nothing to show" in figure.texts[0].get_text()


def test_an_option_that_only_some_rows_have_is_named():
    """Learned rounding is another setting than rounding to nearest, whose rows do not mention rounding at all."""
    plain = '{"observer":"mse"}'
    learned = '{"observer":"mse","rounding":"adaround","reconstruction_unit":"block","equalize":true}'
    rows = pd.DataFrame(
        {"method": "ptq_static", "strategy": None, "weight_bits": 4, "activation_bits": 4, "options": [plain, learned]}
    )
    assert list(with_labels(rows)["setting"]) == ["W4A4 static (mse)", "W4A4 static (mse, equalized, AdaRound)"]


# ---------------------------------------------------------------------------------------------------------- diagnostics


def diagnosed(names, models=("fp32", "quantized"), **values):
    """The three tables of `diagnostics.diagnose`, as far as they are drawn."""
    groups = [
        {
            "model": model, "group": name, "n": 10 + i, "margin": i + 2.0 * (model == "fp32"), "margin_p10": -1.0,
            "gradient_norm": 0.5 + i, "gradient_noise": 0.25, "hessian_eigenvalue": 3.0 + i, "hessian_converged": True,
            **values,
        }
        for model in models
        for i, name in enumerate(names)
    ]  # fmt: skip
    clipping = [
        {"layer": layer, "group": name, "clipping_rate": rate + 0.1 * i}
        for layer, rate in (("a", 0.0), ("b", 0.02))
        for i, name in enumerate(names)
    ]
    exemplars = [
        {
            "group": name, "n": 10, "disagreements": 2, "share": 0.2 + 0.1 * i, "share_ci_low": 0.1,
            "share_ci_high": 0.6,
        }
        for i, name in enumerate(names)
    ]  # fmt: skip
    return pd.DataFrame(groups), pd.DataFrame(clipping), pd.DataFrame(exemplars)


def marks(axes, marker):
    """(x, y) of the single marks, in order of x."""
    return sorted((line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines if line.get_marker() == marker)


def test_group_diagnostics_draws_each_group_twice_and_what_quantization_did_to_it():
    figure = drawn(group_diagnostics(*diagnosed(["women", "men"])))
    assert figure.get_figwidth() == 3.4
    margin, gradient, curvature, clipping, exemplars = figure.axes
    np.testing.assert_allclose(marks(margin, "o"), [(-0.14, 2), (0.86, 3)])
    np.testing.assert_allclose(marks(margin, "s"), [(0.14, 0), (1.14, 1)])
    assert [y for _, y in marks(gradient, "s")] == [0.5, 1.5] and [y for _, y in marks(curvature, "o")] == [3.0, 4.0]
    np.testing.assert_allclose(marks(clipping, "s"), [(0, 1), (1, 11)])  # the means over the two quantizers, in %
    ticks = [list(line.get_ydata()) for line in clipping.lines if line.get_marker() == "_"]
    np.testing.assert_allclose(ticks, [[0, 2], [10, 12]])
    np.testing.assert_allclose(marks(exemplars, "s"), [(0, 20), (1, 30)])
    assert [label.get_text() for label in exemplars.get_xticklabels()] == ["women (10)", "men (11)"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["FP32", "quantized"]


def test_group_diagnostics_draws_hollow_what_is_uncertain_and_leaves_out_what_is_undefined():
    groups, clipping, exemplars = diagnosed(["women", "men", "none"])
    groups.loc[groups["group"] == "none", "n"] = 0
    groups.loc[0, "gradient_noise"] = 0.6  # above the norm, 0.5
    groups.loc[1, "hessian_converged"] = False
    groups.loc[4, ["margin", "hessian_eigenvalue"]] = np.nan
    figure = drawn(group_diagnostics(groups, clipping, exemplars))
    margin, gradient, curvature, *_ = figure.axes
    assert [label.get_text() for label in figure.axes[-1].get_xticklabels()] == ["women (10)", "men (11)"]
    assert len(marks(margin, "s")) == len(marks(curvature, "s")) == 1
    for axes, hollow in ((gradient, -0.14), (curvature, 0.86), (margin, None)):
        found = [line.get_xdata()[0] for line in axes.lines if line.get_markerfacecolor() == "w"]
        assert found == ([] if hollow is None else [hollow])
    assert figure.legends[0].get_texts()[-1].get_text() == "uncertain"


def test_group_diagnostics_survives_many_groups_one_model_and_nothing():
    names = [rf"group {i} $\bad{{$ very_long% attribute" for i in range(17)]
    assert drawn(group_diagnostics(*diagnosed(names))).get_figwidth() == 7.0
    groups, clipping, exemplars = diagnosed(["A"], models=("fp32",))
    assert len(drawn(group_diagnostics(groups, clipping[:0], exemplars[:0])).axes) == 3
    nan = dict.fromkeys(("margin", "margin_p10", "gradient_norm", "gradient_noise", "hessian_eigenvalue"), np.nan)
    drawn(group_diagnostics(*diagnosed(["A"], **nan)))
    for empty in ((groups[:0], clipping, exemplars), (groups.assign(n=0), clipping, exemplars)):
        assert "Nothing to show" in group_diagnostics(*empty).texts[0].get_text()
