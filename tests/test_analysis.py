import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fake_study import NAMES, small_config, write_study
from PIL import Image

import hypotheses
from joint_bootstrap import TestSet
from phases.analysis import analyse, load_test_set, planned_rows, run
from phases.plan import plan
from significance import holm, mcnemar_midp
from store import MissingArtifactError, Store, StoreError

FIVE = ("resnet50", "mobilenet_v2", "squeezenet1_1", "efficientnet_b0", "vit_small")  # 94, 9, 3, 16, 86 MB
NAMED_FIGURES = (
    "accuracy_heatmap", "per_group_performance", "mitigation_comparison", "hypothesis_validation", "pareto_frontier",
)  # fmt: skip


def verdicts(tmp_path, config, **truth):
    """The hypotheses of a study written with a known truth, by id. (No figures: they have tests of their own.)"""
    store, planned = write_study(tmp_path, config, **truth)
    rows, _, _ = planned_rows(store, {phase: [cell.id for cell in cells] for phase, cells in planned.items()})
    done = rows[rows["status"] == "done"]
    test_sets = {"synthetic": load_test_set(config, store, "synthetic", done, store.read_group_table())}
    found = hypotheses.evaluate(done, test_sets, 300, 0.95)
    return {row["id"]: row for row in found.to_dict("records")}


def snapshot(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ---------------------------------------------------------------------------------------------------------- the numbers


def test_mcnemar_midp_worked_by_hand():
    assert mcnemar_midp(0, 0) == 1.0
    assert mcnemar_midp(3, 3) == 1.0
    assert mcnemar_midp(0, 5) == pytest.approx(2 / 32 - 1 / 32)  # exact p 2/32, less P(0 of 5)
    assert mcnemar_midp(8, 2) == pytest.approx(2 * (1 + 10 + 45) / 1024 - 45 / 1024)
    assert mcnemar_midp(2, 8) == mcnemar_midp(8, 2)


def test_holm_worked_by_hand():
    # sorted 0.01 x 4, 0.02 x 3, 0.03 x 2, 0.5 x 1; never falling
    assert holm(np.array([0.03, 0.01, 0.5, 0.02])) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm(np.array([0.9, 0.8])) == pytest.approx([1.0, 1.0])
    assert holm(np.array([])).size == 0


def test_significance_holds_the_planted_effects(tmp_path, low_resolution):
    """1200 images, FP32 right on 90 % of each group; at 4 bits 10 % of female and 20 % of male ones are lost."""
    config = small_config(models=("resnet50",))
    loss = lambda cell, g: {8: 0.0, 4: 0.1 if g < 2 else 0.2}[cell.weight_bits] if not cell.strategy else 0.0  # noqa: E731
    store, _ = write_study(tmp_path, config, loss=loss)
    run(config, store)
    table = pd.read_csv(store.analysis / "significance.csv", keep_default_na=False, na_values=[""])
    # right at FP32: 378 + 324 female of 420 + 360, 270 + 108 male of 300 + 120; lost 38 + 32 and 54 + 22 (rounded)
    four = table[(table["weight_bits"] == 4) & (table["comparison"] == "fp32") & table["strategy"].isna()]
    accuracy = four[four["metric"] == "accuracy"].set_index("group")
    assert accuracy.loc["all", ["gained", "lost", "n"]].tolist() == [0, 146, 1200]
    assert accuracy.loc["all", "effect"] == pytest.approx(-146 / 1200)
    assert accuracy.loc["female", "effect"] == pytest.approx(-70 / 780)
    assert accuracy.loc["male", "effect"] == pytest.approx(-76 / 420)
    assert (accuracy["ci_low"] < accuracy["effect"]).all() and (accuracy["effect"] < accuracy["ci_high"]).all()
    assert (accuracy["ci_high"] < 0).all() and (accuracy["p_holm"] < 1e-6).all()
    gap = four[four["metric"] == "accuracy_gap"]["effect"].item()
    assert gap == pytest.approx(abs(702 / 780 - 70 / 780 - (378 / 420 - 76 / 420)))
    # the cells that lose nothing differ by nothing
    eight = table[(table["weight_bits"] == 8) & (table["metric"] == "accuracy")]
    assert (eight[["effect", "ci_low", "ci_high", "gained", "lost"]] == 0).all(axis=None) and (
        eight["p_holm"] == 1
    ).all()
    # mitigated - plain: all 146 are won back
    won = table[(table["comparison"] == "plain") & (table["weight_bits"] == 4) & (table["metric"] == "accuracy")]
    assert won.set_index("group").loc["all", ["gained", "lost"]].tolist() == [146, 0]


# ------------------------------------------------------------------------------------------------------- the hypotheses


@pytest.mark.parametrize(
    ("loss8", "verdict"), [(0.0, "supported"), (0.003, "supported"), (0.01, "inconclusive"), (0.05, "contradicted")]
)
def test_int8_rule(tmp_path, loss8, verdict):
    loss = lambda cell, g: {8: loss8, 4: 0.1}[cell.weight_bits]  # noqa: E731
    found = verdicts(tmp_path, small_config(), loss=loss)["int8_accuracy"]
    assert found["verdict"] == verdict
    lost = sum(round(loss8 * n) for n in (378, 324, 270, 108))
    assert found["effect"] == pytest.approx(-100 * lost / 1200)
    assert found["ci_low"] <= found["effect"] <= found["ci_high"]
    assert found["n_images"] == 1200 and found["n_models"] == 2 and found["ci_level"] == pytest.approx(0.9)


def test_worst_group_rule_finds_a_planted_effect_and_flips_with_the_data(tmp_path):
    error = lambda g: 0.2 if g >= 2 else 0.05  # noqa: E731  male is the worst group of every FP32 model
    for name, of_female, of_male, verdict in (
        ("more", 0.05, 0.3, "supported"), ("same", 0.1, 0.1, "inconclusive"), ("less", 0.3, 0.05, "contradicted"),
    ):  # fmt: skip
        loss = lambda cell, g, f=of_female, m=of_male: {8: 0.0, 4: m if g >= 2 else f}[cell.weight_bits]  # noqa: E731
        found = verdicts(tmp_path / name, small_config(), loss=loss, fp32_error=error)["worst_group_at_4_bits"]
        assert found["verdict"] == verdict, name
        assert "(male)" in found["sentence"]
        assert ("includes zero" in found["sentence"]) == (verdict == "inconclusive")
        if name == "more":
            # loss of male minus loss of all; each half holds its share of each to within a few images
            lost = [round(share * right) for share, right in ((0.05, 399), (0.05, 342), (0.3, 240), (0.3, 96))]
            expected = 100 * ((lost[2] + lost[3]) / 420 - sum(lost) / 1200)
            assert found["effect"] == pytest.approx(expected, abs=0.5)


def test_worst_group_of_equal_groups_is_not_biased_by_choosing_it():
    """Eight equal groups, FP32 and 4-bit errors independent: choosing and measuring the group on the same images would
    make its FP32 accuracy look about 4 points too low (1.42 standard deviations of 2.8), and its loss as much too
    small.
    """
    rng = np.random.default_rng(3)
    group = np.repeat(np.arange(8), 200)
    label = np.zeros(len(group), dtype=np.int64)
    shared = {"dataset": "d", "model": "m", "seed": 0, "strategy": None, "options": None, "size_mb": 1.0}
    rows = pd.DataFrame(
        [
            {**shared, "cell": "base", "method": "none", "weight_bits": np.nan, "activation_bits": np.nan},
            {
                **shared,
                "cell": "q",
                "method": "ptq_static",
                "weight_bits": 4,
                "activation_bits": 4,
                "baseline_cell": "base",
            },
        ]
    )
    effects, decided = [], 0
    for _ in range(60):
        predictions = {name: (rng.random(len(group)) < 0.2).astype(np.int64) for name in ("base", "q")}
        names = [str(g) for g in range(8)]
        test_set = TestSet("d", "race", label, group, names, group, names, 2, 20, predictions)
        found = hypotheses.evaluate(rows, {"d": test_set}, 100, 0.95).set_index("id").loc["worst_group_at_4_bits"]
        effects.append(found["effect"])
        decided += found["verdict"] != "inconclusive"
    assert abs(np.mean(effects)) < 1.5
    assert decided <= 9  # 60 nulls at 5 %: more has probability below 0.002


def test_balanced_calibration_rule_flips_with_the_data(tmp_path):
    for name, plain, balanced, verdict in (
        ("helps", 0.3, 0.05, "supported"), ("same", 0.1, 0.1, "inconclusive"), ("harms", 0.05, 0.3, "contradicted"),
    ):  # fmt: skip
        # what male loses beyond female's 5 % opens the equalized-odds difference
        loss = lambda cell, g, p=plain, b=balanced: (b if cell.strategy else p) if g >= 2 else 0.05  # noqa: E731
        found = verdicts(tmp_path / name, small_config(), loss=loss)["balanced_calibration"]
        assert found["verdict"] == verdict, name
        assert np.sign(found["effect"]) == {"helps": -1, "same": 0, "harms": 1}[name]
        assert found["n_comparisons"] == 4  # two models, W8A8 and W4A4


def test_balanced_calibration_is_not_supported_by_noise(tmp_path):
    """Mitigated cells lose other images than the plain ones, as many in every group: no true difference."""
    config = small_config()
    store, planned = write_study(tmp_path, config, loss=lambda cell, g: 0.0)
    rng = np.random.default_rng(1)
    rows, _, _ = planned_rows(store, {phase: [cell.id for cell in cells] for phase, cells in planned.items()})
    test_set = load_test_set(config, store, "synthetic", rows, store.read_group_table())
    refused = []
    for _ in range(20):
        flipped = {
            cell: np.where(rng.random(test_set.n) < 0.15, 1 - test_set.label_N, test_set.label_N)
            for cell in test_set.predictions
        }
        noisy = TestSet(**{**vars(test_set), "predictions": flipped})
        found = hypotheses.evaluate(rows, {"synthetic": noisy}, 200, 0.95).set_index("id")
        refused.append(found.loc["balanced_calibration", "verdict"] != "inconclusive")
    # a 5 % test of 20 nulls: more than 4 has probability 0.0026
    assert sum(refused) <= 4


def test_a_collapsed_model_is_no_evidence_about_gaps(tmp_path):
    """Plain W4A4 models that give one class to everything have no gap; a repair that brings it back is not worse."""
    config = small_config()
    store, planned = write_study(tmp_path, config, loss=lambda cell, g: 0.3 if g == 0 and cell.strategy else 0.0)
    rows, _, _ = planned_rows(store, {phase: [cell.id for cell in cells] for phase, cells in planned.items()})
    test_set = load_test_set(config, store, "synthetic", rows, store.read_group_table())
    plain = [c.id for c in planned["quantization"] if c.weight_bits == 4]
    collapsed = {cell: np.ones_like(test_set.label_N) for cell in plain}
    other = TestSet(**{**vars(test_set), "predictions": {**test_set.predictions, **collapsed}})

    def found(test_set, n_pairs):
        row = hypotheses.evaluate(rows, {"synthetic": test_set}, 200, 0.95).set_index("id").loc["balanced_calibration"]
        assert f"Over {n_pairs} pairs" in row["sentence"]
        return row["sentence"]

    assert "Not counted" not in found(test_set, 4)
    assert "Not counted" in found(other, 2) and "2 further pairs" in found(other, 2)


def test_larger_models_rule_needs_the_models_in_order(tmp_path):
    by_size = {"squeezenet1_1": 0.3, "mobilenet_v2": 0.22, "efficientnet_b0": 0.16, "vit_small": 0.08, "resnet50": 0.05}
    reverse = dict(zip(by_size, reversed(by_size.values()), strict=True))
    mixed = {"squeezenet1_1": 0.1, "mobilenet_v2": 0.3, "efficientnet_b0": 0.05, "vit_small": 0.12, "resnet50": 0.2}
    for name, truth, verdict in (
        ("falls", by_size, "supported"), ("rises", reverse, "contradicted"), ("mixed", mixed, "inconclusive"),
    ):  # fmt: skip
        loss = lambda cell, g, t=truth: {8: 0.0, 4: t[cell.model]}[cell.weight_bits]  # noqa: E731
        found = verdicts(tmp_path / name, small_config(models=FIVE), loss=loss)["larger_models_at_4_bits"]
        assert found["verdict"] == verdict, name
        if name == "falls":
            size = np.array([94.0, 9.0, 3.0, 16.0, 86.0])
            lost = [100 * sum(round(truth[model] * right) for right in (378, 324, 270, 108)) / 1200 for model in FIVE]
            assert found["effect"] == pytest.approx(np.polyfit(np.log2(size), lost, 1)[0])
            assert found["p"] == pytest.approx(1 / 120)  # the steepest of 5! orders


def test_smaller_groups_rule(tmp_path):
    shares = (0.4, 0.3, 0.2, 0.1)
    for name, of_group, verdict in (
        ("falls", (0.05, 0.1, 0.2, 0.35), "supported"),
        ("rises", (0.35, 0.2, 0.1, 0.05), "contradicted"),
        ("flat", (0.15, 0.15, 0.15, 0.15), "inconclusive"),
    ):
        loss = lambda cell, g, t=of_group: {8: 0.0, 4: t[g]}[cell.weight_bits]  # noqa: E731
        found = verdicts(tmp_path / name, small_config(), loss=loss, shares=shares)["smaller_groups_at_4_bits"]
        assert found["verdict"] == verdict, name


def test_what_cannot_be_tested_says_why(tmp_path):
    config = small_config("quantization.bit_widths=[4]", "mitigation.strategies=[]")
    found = verdicts(tmp_path, config, shares=(0.25, 0.25, 0.25, 0.25))
    assert {name: row["verdict"] for name, row in found.items()} == {
        "int8_accuracy": "not tested", "worst_group_at_4_bits": "inconclusive", "balanced_calibration": "not tested",
        "larger_models_at_4_bits": "not tested", "smaller_groups_at_4_bits": "not tested",
    }  # fmt: skip
    assert found["int8_accuracy"]["reason"] == "no finished W8A8 cell with its FP32 cell"
    assert "at least 4 models" in found["larger_models_at_4_bits"]["reason"]
    assert "about the same size" in found["smaller_groups_at_4_bits"]["reason"]


def test_images_are_resampled_jointly_so_that_what_models_share_does_not_count_twice(tmp_path):
    """Ten copies of one model tell no more about the images than one does: the interval must not shrink."""
    config = small_config(models=("resnet50",))
    store, planned = write_study(tmp_path, config)
    rows, _, _ = planned_rows(store, {phase: [cell.id for cell in cells] for phase, cells in planned.items()})
    test_set = load_test_set(config, store, "synthetic", rows, store.read_group_table())
    one = rows[rows["strategy"].isna()]
    copies, predictions = [], dict(test_set.predictions)
    for i in range(10):
        copy = one.assign(model=f"copy{i}", cell=one["cell"] + str(i), baseline_cell=one["baseline_cell"] + str(i))
        copies.append(copy)
        predictions |= {f"{cell}{i}": test_set.predictions[cell] for cell in one["cell"]}
    many = TestSet(**{**vars(test_set), "predictions": predictions})
    widths = []
    for frame, images in ((one, test_set), (pd.concat(copies, ignore_index=True), many)):
        changes = hypotheses.evaluate(frame, {"synthetic": images}, 500, 0.95).set_index("id")
        widths.append(changes.loc["worst_group_at_4_bits", "ci_high"] - changes.loc["worst_group_at_4_bits", "ci_low"])
    assert widths[1] == pytest.approx(widths[0])


# ----------------------------------------------------------------------------------------------------- the phase itself


@pytest.fixture
def low_resolution(monkeypatch):
    """For tests that do not look at the figures: none is drawn."""
    monkeypatch.setattr("phases.analysis.study_figures", lambda *_, **__: iter(()))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Two models, one cell failed, one missing, one left over, names that could break a page."""
    root = tmp_path_factory.mktemp("study")
    config = small_config()
    cells = plan(config)
    failed, missing = cells["quantization"][0].id, cells["quantization"][3].id
    names = {**NAMES, "gender": ["<script>alert(1)</script>", "a_b%&"]}
    store, _ = write_study(root, config, names=names, fail=(failed,), skip=(missing,))
    leftover = cells["mitigation"][0].id.replace("bias_aware", "other")
    table = pd.read_csv(store.results_path("mitigation"))
    table = pd.concat([table, table.iloc[:1].assign(cell=leftover, accuracy=0.123)])
    table.to_csv(store.results_path("mitigation"), index=False)
    found = run(config, store)
    return config, store, found, failed, missing, leftover


def test_every_named_artifact_is_there_and_readable(study):
    _, store, found, *_ = study
    for name in NAMED_FIGURES:
        with Image.open(store.analysis / f"{name}.png") as image:
            assert image.width == 1400 and np.asarray(image.convert("L")).std() > 5, name
    saved = json.loads((store.analysis / "hypotheses.json").read_text())
    assert [row["verdict"] for row in saved] == found["verdict"].tolist()
    assert saved[0]["effect"] == found["effect"].iloc[0]
    points = pd.read_csv(store.analysis / "pareto.csv")
    assert points["on_front_accuracy"].any() and points["size_mb"].notna().all()
    assert {path.name for path in (store.analysis / "tables").glob("*.tex")} == {
        "best.tex",
        "hypotheses.tex",
        "repairs.tex",
        "results.tex",
    }
    assert not list(store.analysis.rglob("*.tmp"))


def test_failed_missing_and_left_over_cells_are_named_and_the_left_over_one_is_not_counted(study):
    _, store, _, failed, missing, leftover = study
    summary, page = ((store.analysis / name).read_text() for name in ("summary.md", "report.html"))
    for text in (summary, page):
        assert failed in text and missing in text and leftover in text
        assert "1 failed, 1 without a result" in text
    for name in ("significance.csv", "pareto.csv"):
        assert leftover not in (store.analysis / name).read_text()
    assert "12.3" not in (store.analysis / "tables" / "results.csv").read_text()


def test_strings_from_data_cannot_break_the_page_the_summary_or_latex(study):
    _, store, *_ = study
    assert "<script" not in (store.analysis / "report.html").read_text()
    assert not re.search(r"(?<!\\)<script", (store.analysis / "summary.md").read_text())
    latex = (store.analysis / "tables" / "results.tex").read_text()
    assert r"\textless{}script" in latex or r"a\_b\%\&" in latex
    body = latex.partition(r"\midrule")[2].partition(r"\bottomrule")[0]
    assert not re.search(r"(?<!\\)[%_#]", body)


def test_the_same_input_gives_the_same_bytes(study, tmp_path):
    config, store, *_ = study
    again = Store(tmp_path / "copy")
    shutil.copytree(store.root, again.root, ignore=shutil.ignore_patterns("analysis"))
    run(config, again)
    first, second = snapshot(store.analysis), snapshot(again.analysis)
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


def test_progress_is_told(study, tmp_path, low_resolution):
    config, store, *_ = study
    again = Store(tmp_path / "copy")
    shutil.copytree(store.root, again.root)
    told = []
    run(config, again, lambda done, total, what: told.append((done, total, what)))
    assert [done for done, _, _ in told] == list(range(7)) and told[-1] == (6, 6, "done")


# ------------------------------------------------------------------------------------------------------------ bad input


def test_a_missing_table_names_the_command_that_makes_it(tmp_path, low_resolution):
    config = small_config()
    with pytest.raises(MissingArtifactError, match=r"baseline_results\.csv: missing.*--phase baseline"):
        run(config, Store(tmp_path))
    store, _ = write_study(tmp_path, config)
    store.results_path("quantization").unlink()
    with pytest.raises(MissingArtifactError, match=r"quantization_results\.csv: missing.*--phase quantization"):
        run(config, store)


def test_a_missing_mitigation_table_leaves_its_cells_missing(tmp_path, low_resolution):
    config = small_config()
    store, planned = write_study(tmp_path, config)
    store.results_path("mitigation").unlink()
    found = run(config, store).set_index("id")
    assert found.loc["balanced_calibration", "verdict"] == "not tested"
    summary = (store.analysis / "summary.md").read_text()
    assert all(cell.id in summary for cell in planned["mitigation"]) and "--phase mitigation" in summary


def test_all_cells_failed_is_an_error_and_baselines_alone_are_not(tmp_path, low_resolution):
    config = small_config("quantization.bit_widths=[8]", "mitigation.strategies=[]", models=("resnet50",))
    cells = plan(config)
    store, _ = write_study(tmp_path / "a", config, fail=[cell.id for phase in cells.values() for cell in phase])
    with pytest.raises(MissingArtifactError, match=r"no finished cell among the 2 planned"):
        run(config, store)
    store, _ = write_study(tmp_path / "b", config, fail=[cells["quantization"][0].id])
    assert set(run(config, store)["verdict"]) == {"not tested"}
    assert "No finished quantized cell." in (store.analysis / "summary.md").read_text()


def test_predictions_that_are_gone_truncated_or_of_other_images_are_refused_by_name(tmp_path):
    config = small_config(models=("resnet50",))
    store, planned = write_study(tmp_path, config)
    cell = planned["quantization"][0].id
    path = store.predictions_path(cell)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StoreError, match=f"{cell}.*not a readable predictions file"):
        run(config, store)
    path.unlink()
    with pytest.raises(MissingArtifactError, match=f"{cell}.*missing"):
        run(config, store)
    path.write_bytes(whole)
    saved = store.predictions(cell)
    other = type(saved)(saved.y_true, saved.logits, saved.sensitive, saved.index + 1)
    store.write_predictions(cell, other)
    with pytest.raises(StoreError, match=f"{cell}.*not of the same test images"):
        run(config, store)


def test_one_group_only_gives_no_gap_and_no_error(tmp_path, low_resolution):
    config = small_config("data.synthetic.sensitive=[skin, gender]", "data.min_group_size=500", models=("resnet50",))
    store, planned = write_study(tmp_path, config, shares=(0.9, 0.1, 0.0, 0.0))
    found = analyse(config, store, {phase: [cell.id for cell in cells] for phase, cells in planned.items()})
    found = found.set_index("id")
    assert found.loc["worst_group_at_4_bits", "reason"] == "fewer than two groups are large enough in synthetic"
    assert found.loc["balanced_calibration", "verdict"] == "not tested"
    table = pd.read_csv(store.analysis / "significance.csv", keep_default_na=False, na_values=[""])
    assert table[table["metric"] == "accuracy_gap"]["effect"].isna().all()


def test_seeds_are_pooled_given_the_seeds_and_said(tmp_path, low_resolution):
    config = small_config(models=("resnet50",), seeds=(0, 1))
    store, _ = write_study(tmp_path, config)
    run(config, store)
    summary = (store.analysis / "summary.md").read_text()
    assert "2 seeds: too few for statistics between seeds" in summary and "Seeds: 0, 1." in summary


def test_two_data_sets_are_told_apart(tmp_path, low_resolution):
    config = small_config("data.dataset=[synthetic, celeba]", "data.celeba.sensitive=[gender, skin]")
    loss = lambda cell, g: {"synthetic": 0.0, "celeba": 0.1}[cell.dataset]  # noqa: E731
    store, _ = write_study(tmp_path, config, loss=loss)
    found = run(config, store).set_index("id")
    assert found.loc["int8_accuracy", "n_images"] == 2400
    lost = 100 * sum(round(0.1 * right) for right in (378, 324, 270, 108)) / 1200
    assert found.loc["int8_accuracy", "effect"] == pytest.approx(-lost / 2)  # the mean of both
    table = pd.read_csv(store.analysis / "significance.csv", keep_default_na=False, na_values=[""])
    plain = table[(table["comparison"] == "fp32") & (table["metric"] == "accuracy") & (table["group"] == "all")]
    assert (plain[plain["dataset"] == "synthetic"]["effect"] == 0).all()
    assert plain[plain["dataset"] == "celeba"]["effect"].to_numpy() == pytest.approx(-lost / 100)
    summary = (store.analysis / "summary.md").read_text()
    assert "**celeba**, predicting Smiling" in summary and "- synthetic: At FP32" in summary


def test_the_analysis_does_not_import_torch():
    code = "import sys; import phases.analysis; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, check=False).returncode == 0
