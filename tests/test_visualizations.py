import io
import itertools

import numpy as np
import pandas as pd
import pytest

from hypotheses import COLUMNS
from result_rows import main_settings, plain_counterparts, with_labels
from visualizations import (
    accuracy_heatmap,
    fairness_vs_bits,
    group_diagnostics,
    hypothesis_validation,
    layer_sensitivity,
    mitigation_comparison,
    pareto_frontier,
    pareto_mask,
    pareto_points,
    per_group_performance,
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
    cells = {text.get_position(): text.get_text() for text in axes.texts}
    assert cells[0, 0] == "91.2" and cells[1, 0] == "87.1" and cells[0, 1] == "93.4"
    assert cells[2, 0] == "×"  # failed
    assert (2, 1) not in cells and (1, 1) not in cells  # not there
    assert len(axes.patches) == 3  # hatched
    assert [label.get_text() for label in axes.get_yticklabels()] == ["vit", "ResNet-50"]
    assert [cells[x, -0.75] for x in (0, 1, 2)] == ["FP32", "W8A8", "W4A4"]


def test_heatmap_averages_seeds_and_says_so():
    figure = accuracy_heatmap(frame(row(seed=0, accuracy=0.9), row(seed=1, accuracy=0.8)))
    assert "85.0" in texts(figure)
    assert any("mean over 2 seeds" in text for text in texts(figure))


def test_heatmap_of_many_settings_goes_on_below():
    options = [f'{{"observer":"mse","calibration_samples":{n}}}' for n in range(50)]
    figure = drawn(accuracy_heatmap(frame(row(), *(row(bits=8, options=text) for text in options))))
    heatmaps = [axes for axes in figure.axes if axes.images]
    assert [axes.images[0].get_array().shape[1] for axes in heatmaps] == [20, 20, 11]


def test_per_group_draws_each_accuracy_with_its_wilson_interval():
    groups = pd.DataFrame([group("A", 0.9), group("B", 0.8), group("A", 0.7, bits=8), group("B", 0.5, bits=8)])
    axes = drawn(per_group_performance(groups)).axes[0]
    points = sorted(line.get_xdata()[0] for line in axes.lines if len(line.get_xdata()) == 1)
    assert points == pytest.approx([50, 70, 80, 90])
    bars = [line.get_xdata() for line in axes.lines if len(line.get_xdata()) == 2 and line.get_linewidth() == 1.1]
    # Wilson, 50 of 100: centre 1/2, half width z/(2 sqrt(n + z^2)) = 0.0961680
    assert any(bar == pytest.approx([50 - 9.6168, 50 + 9.6168], abs=1e-3) for bar in bars)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["A (100)", "B (100)"]


def test_per_group_leaves_out_empty_groups_and_marks_small_ones():
    groups = pd.DataFrame([group("A", 0.9), group("tiny", 0.5, n=4, too_small=True), group("none", np.nan, n=0)])
    axes = drawn(per_group_performance(groups)).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["A (100)", "tiny (4)*"]


def test_per_group_draws_each_seed_and_the_mean():
    groups = pd.DataFrame([group("A", 0.9, seed=0), group("A", 0.7, seed=1)])
    axes = per_group_performance(groups).axes[0]
    assert sorted(x for line in axes.lines if line.get_marker() == "|" for x in line.get_xdata()) == pytest.approx(
        [70, 90]
    )
    assert any(line.get_marker() == "o" and line.get_xdata()[0] == pytest.approx(80) for line in axes.lines)


def test_mitigation_joins_the_right_pairs():
    rows = frame(
        row(), row(bits=8, accuracy=0.88), row(bits=4, accuracy=0.7),
        row(bits=8, accuracy=0.89, strategy="bias_aware_calibration"),
        row(bits=4, accuracy=0.75, strategy="bias_aware_calibration"),
    )  # fmt: skip
    figure = drawn(mitigation_comparison(rows))
    joins = [[point[0] for point in path.vertices] for c in figure.axes[0].collections for path in c.get_paths()]
    assert np.array(joins) == pytest.approx(np.array([[88, 89], [70, 75]]))
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["ResNet-50  W8A8", "ResNet-50  W4A4"]
    bars = [line.get_xdata() for line in figure.axes[0].lines if len(line.get_xdata()) == 2]
    assert any(bar == pytest.approx([68, 72]) for bar in bars)


def test_mitigation_without_mitigated_rows_says_so():
    assert any("no mitigated cell" in text for text in texts(drawn(mitigation_comparison(frame(row(), row(bits=8))))))


def hypothesis(**values):
    blank = dict.fromkeys(COLUMNS, np.nan) | {"statement": "A", "verdict": "supported", "unit": "points", "reason": ""}
    return {**blank, "threshold_low": 0.0, "threshold_high": 0.0, "ci_level": 0.95, "parts": [], **values}


def test_hypotheses_show_effect_interval_threshold_and_verdict():
    part = {"label": "ResNet-50", "effect": -0.5, "ci_low": -0.8, "ci_high": -0.2}
    told = hypothesis(
        effect=-0.4, ci_low=-0.7, ci_high=-0.1, threshold_low=-1.0, threshold_high=1.0, parts=[part], p=0.0001
    )
    absent = hypothesis(statement="B", verdict="not tested", reason="no W4A4 cell")
    figure = drawn(hypothesis_validation(pd.DataFrame([told, absent])))
    (axes,) = figure.axes  # the one not tested has no axis
    lines = [list(line.get_xdata()) for line in axes.lines]
    assert [-0.7, -0.1] in lines and [-0.4] in lines and [-0.8, -0.2] in lines
    assert {-1.0, 1.0} <= {line[0] for line in lines if len(line) == 2 and line[0] == line[1]}
    shown = texts(figure)
    assert {"supported", "not tested", "no W4A4 cell"} <= set(shown)
    assert any("95 %: -0.70 to -0.10" in text and "p < 0.001" in text for text in shown)


def test_pareto_rings_exactly_the_non_dominated_settings():
    rows = frame(
        row(accuracy=0.9),
        row(bits=8, accuracy=0.9),
        row(bits=4, accuracy=0.7),
        row(bits=4, accuracy=0.75, activation_bits=8),
        row(bits=2, accuracy=np.nan),
    )
    points = pareto_points(rows).set_index("setting")
    assert points["on_front_accuracy"].to_dict() == {
        "FP32": False, "W8A8 static (mse)": True, "W4A4 static (mse)": False, "W4A8 static (mse)": True,
    }  # fmt: skip
    figure = drawn(pareto_frontier(rows))
    (ring,) = [line for line in figure.axes[0].lines if line.get_gid() == "front"]
    assert list(ring.get_xdata()) == [5.0, 10.0] and list(ring.get_ydata()) == pytest.approx([75, 90])


def test_fairness_vs_bits_draws_the_metric_in_order_of_width():
    rows = frame(row(bits=4, equalized_odds_difference=0.3), row(equalized_odds_difference=0.1), row("vit", 8))
    axes = drawn(fairness_vs_bits(rows)).axes[0]
    line = next(line for line in axes.lines if line.get_label() == "ResNet-50")
    assert list(line.get_ydata()) == pytest.approx([10, 30])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["FP32", "W8A8", "W4A4"]


FIGURES = (accuracy_heatmap, mitigation_comparison, pareto_frontier, fairness_vs_bits)


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
    for tables in ((groups[:0], clipping, exemplars), (groups.assign(n=0), clipping, exemplars)):
        assert "Nothing to show" in group_diagnostics(*tables).texts[0].get_text()
