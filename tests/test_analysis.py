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

from phases.analysis import analyse, run
from plan import plan
from significance.intervals import holm, mcnemar_midp
from store import MissingArtifactError, Store

NAMED_FIGURES = (
    "accuracy_heatmap", "per_group_performance", "mitigation_comparison", "hypothesis_validation", "pareto_frontier",
)  # fmt: skip


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
    # the cells that lose nothing differ by nothing; how little n images can exclude is Tango's z² / (n + z²)
    eight = table[(table["weight_bits"] == 8) & (table["metric"] == "accuracy")]
    assert (eight[["effect", "gained", "lost", "flips"]] == 0).all(axis=None) and (eight["p_holm"] == 1).all()
    z2 = 1.959964**2
    assert eight["ci_high"].to_numpy() == pytest.approx(z2 / (eight["n"] + z2), rel=1e-6)
    assert eight["ci_low"].to_numpy() == pytest.approx(-eight["ci_high"].to_numpy())
    # the worse of both groups is male: (1 - 420 x 0.01) / sqrt(420 x 0.01 x 0.99) = -1.569
    every = eight.loc[(eight["group"] == "all") & (eight["comparison"] == "fp32"), "tost_p_every_group"]
    assert every.to_numpy() == pytest.approx(0.0583, abs=2e-4)
    # mitigated - plain: all 146 are won back
    won = table[(table["comparison"] == "plain") & (table["weight_bits"] == 4) & (table["metric"] == "accuracy")]
    assert won.set_index("group").loc["all", ["gained", "lost"]].tolist() == [146, 0]


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
    effects = [None if np.isnan(effect) else effect for effect in found["effect"]]
    assert [row["effect"] for row in saved] == effects and any(effects)
    points = pd.read_csv(store.analysis / "pareto.csv")
    assert points["on_front_accuracy"].any() and points["size_mb"].notna().all()
    tables = {path.name for path in (store.analysis / "tables").iterdir()}
    ids = {"best", "hypotheses", "literature", "repairs", "resilience", "results", "retention"}
    ids |= {"groups-synthetic-resnet50", "groups-synthetic-mobilenet_v2"}
    assert tables == {f"{each}.{ending}" for each in ids for ending in ("csv", "md", "tex")}
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
    assert "<script>alert(" not in (store.analysis / "report.html").read_text()
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
    assert found.loc["H3-balanced-calibration", "verdict"] == "not tested"
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


def test_one_group_only_gives_no_gap_and_no_error(tmp_path, low_resolution):
    config = small_config("data.synthetic.sensitive=[skin, gender]", "data.min_group_size=500", models=("resnet50",))
    store, planned = write_study(tmp_path, config, shares=(0.9, 0.1, 0.0, 0.0))
    found = analyse(config, store, {phase: [cell.id for cell in cells] for phase, cells in planned.items()})
    found = found.set_index("id")
    assert found.loc["H9-worst-group", "reason"] == "fewer than two groups are large enough in synthetic"
    assert found.loc["H3-balanced-calibration", "verdict"] == "not tested"
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
    assert found.loc["H5-int8", "n_images"] == 2400
    lost = 100 * sum(round(0.1 * right) for right in (378, 324, 270, 108)) / 1200
    assert found.loc["H5-int8", "effect"] == pytest.approx(-lost / 2)  # the mean of both
    table = pd.read_csv(store.analysis / "significance.csv", keep_default_na=False, na_values=[""])
    plain = table[(table["comparison"] == "fp32") & (table["metric"] == "accuracy") & (table["group"] == "all")]
    assert (plain[plain["dataset"] == "synthetic"]["effect"] == 0).all()
    assert plain[plain["dataset"] == "celeba"]["effect"].to_numpy() == pytest.approx(-lost / 100)
    summary = (store.analysis / "summary.md").read_text()
    assert "**celeba**, predicting Smiling" in summary and "- synthetic: At FP32" in summary


def test_the_analysis_does_not_import_torch():
    code = "import sys; import phases.analysis; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, check=False).returncode == 0


def test_the_largest_loss_told_is_of_a_group_that_is_large_enough(tmp_path, low_resolution):
    """Three male images, all lost at 4 bits: no headline of 100 points."""
    loss = lambda cell, g: {8: 0.0, 4: 1.0 if g >= 2 else 0.05}[cell.weight_bits]  # noqa: E731
    config = small_config(models=("resnet50",))
    store, _ = write_study(tmp_path, config, loss=loss, fp32_error=0.0, shares=(0.5, 0.4975, 0.0025, 0.0))
    run(config, store)
    (told,) = [line for line in (store.analysis / "summary.md").read_text().splitlines() if "The largest loss" in line]
    assert "of 2 differences from FP32, 1 is a loss and 0 gains" in told
    assert "The largest loss is -5.0" in told and "(female, n = 1197, ResNet-50); being the largest of 1" in told
