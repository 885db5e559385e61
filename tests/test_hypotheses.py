"""The hypotheses find what was planted, in the direction that was planted, and say when they cannot know."""

import numpy as np
import pandas as pd
import pytest
from fake_study import small_config, write_study
from scipy.stats import binom

from analysis import hypotheses, literature, rankings
from analysis.contrasts import Effects, pairs_of, select, study_of
from config import Config
from phases.analysis import load_test_set, planned_rows
from sections.analysis import Cells, Claim, Hypothesis
from significance.intervals import holm
from significance.joint_bootstrap import TestSet, halves

FIVE = ("resnet50", "mobilenet_v2", "squeezenet1_1", "efficientnet_b0", "vit_small")  # 94, 9, 3, 16, 86 MB
DEFAULT = {hypothesis.id: hypothesis for hypothesis in Config().analysis.hypotheses}


def study(tmp_path, config, **truth):
    """(rows, test set) of a study written with a known truth."""
    store, planned = write_study(tmp_path, config, **truth)
    rows, _, _ = planned_rows(store, {phase: [cell.id for cell in cells] for phase, cells in planned.items()})
    done = rows[rows["status"] == "done"]
    return done, load_test_set(config, store, "synthetic", done, store.read_group_table())


def verdicts(tmp_path, config, **truth):
    """The hypotheses of a study written with a known truth, by id. (No figures: they have tests of their own.)"""
    rows, test_set = study(tmp_path, config, **truth)
    found = hypotheses.evaluate(rows, {"synthetic": test_set}, config.analysis.hypotheses, 300, 0.95)
    return {row["id"]: row for row in found.to_dict("records")}


def only(name, rows, test_set, replicates=200):
    """One default hypothesis alone."""
    (row,) = hypotheses.evaluate(rows, {test_set.dataset: test_set}, [DEFAULT[name]], replicates, 0.95).to_dict(
        "records"
    )
    return row


def with_predictions(test_set, predictions):
    return TestSet(**{**vars(test_set), "predictions": predictions})


# ------------------------------------------------------------------------------------------------------- the hypotheses


@pytest.mark.parametrize(
    ("loss8", "verdict"), [(0.0, "supported"), (0.003, "supported"), (0.01, "inconclusive"), (0.05, "contradicted")]
)
def test_int8_rule(tmp_path, loss8, verdict):
    loss = lambda cell, g: {8: loss8, 4: 0.1}[cell.weight_bits]  # noqa: E731
    found = verdicts(tmp_path, small_config(), loss=loss)["H5-int8"]
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
        found = verdicts(tmp_path / name, small_config(), loss=loss, fp32_error=error)["H9-worst-group"]
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
        found = only("H9-worst-group", rows, test_set, 100)
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
        found = verdicts(tmp_path / name, small_config(), loss=loss)["H3-balanced-calibration"]
        assert found["verdict"] == verdict, name
        assert np.sign(found["effect"]) == {"helps": -1, "same": 0, "harms": 1}[name]
        assert found["n_comparisons"] == 4  # two models, W8A8 and W4A4


def test_balanced_calibration_is_not_supported_by_noise(tmp_path):
    """Mitigated cells lose other images than the plain ones, as many in every group: no true difference."""
    rows, test_set = study(tmp_path, small_config(), loss=lambda cell, g: 0.0)
    rng = np.random.default_rng(1)
    refused = []
    for _ in range(20):
        flipped = {
            cell: np.where(rng.random(test_set.n) < 0.15, 1 - test_set.label_N, test_set.label_N)
            for cell in test_set.predictions
        }
        found = only("H3-balanced-calibration", rows, with_predictions(test_set, flipped))
        refused.append(found["verdict"] != "inconclusive")
    # a 5 % test of 20 nulls: more than 4 has probability 0.0026
    assert sum(refused) <= 4


def test_a_collapsed_model_is_no_evidence_about_gaps(tmp_path):
    """Plain W4A4 models that give one class to everything have no gap; a repair that brings it back is not worse."""
    config = small_config()
    rows, test_set = study(tmp_path, config, loss=lambda cell, g: 0.3 if g == 0 and cell.strategy else 0.0)
    plain = rows.loc[rows["strategy"].isna() & (rows["weight_bits"] == 4), "cell"]
    collapsed = {cell: np.ones_like(test_set.label_N) for cell in plain}
    other = with_predictions(test_set, {**test_set.predictions, **collapsed})

    def found(test_set, n_pairs):
        sentence = only("H3-balanced-calibration", rows, test_set)["sentence"]
        assert f"Over {n_pairs} pairs" in sentence
        return sentence

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
        found = verdicts(tmp_path / name, small_config(models=FIVE), loss=loss)["H1-larger-models"]
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
        found = verdicts(tmp_path / name, small_config(), loss=loss, shares=shares)["H7-small-groups"]
        assert found["verdict"] == verdict, name


def int8_of(n, lost):
    """The first claim of H5 alone, of a model that loses so many of n answers at 8 bits."""
    label, group = np.arange(n) % 2, np.arange(n) // 2 % 2
    after = label.copy()
    after[:lost] = 1 - label[:lost]
    names = ["x", "y"]
    predictions = {"a": label.astype(np.int16), "b": after.astype(np.int16)}
    test_set = TestSet("d", "g", label, group, names, group, names, 2, 20, predictions)
    identity = {"dataset": "d", "model": "m", "seed": 0, "options": None, "strategy": None, "size_mb": 1.0}
    rows = pd.DataFrame(
        [
            identity
            | {"cell": "a", "method": "none", "weight_bits": None, "activation_bits": None, "baseline_cell": "a"},
            identity
            | {"cell": "b", "method": "ptq_static", "weight_bits": 8, "activation_bits": 8, "baseline_cell": "a"},
        ]
    ).assign(status="done")
    gap = {"id": "gap", "statement": "the gap stays", "metric": "accuracy_gap", "cells": Cells(), "below": 1.0}
    claims = [DEFAULT["H5-int8"].model_copy(update={"also": []}), Hypothesis(**gap)]
    return hypotheses.evaluate(rows, {"d": test_set}, claims, 2000, 0.95).to_dict("records")


def test_no_difference_in_few_images_is_not_equivalence():
    """0 flips of 100 images are compatible with a loss of 3 points (the rule of three), 0 of 5,000 are not."""
    few, few_gap = int8_of(100, 0)
    assert few["effect"] == 0 and few["verdict"] == "inconclusive" and few["p"] > 0.05
    assert few["ci_low"] < -1 and few["ci_high"] > 1 and few["parts"][0]["ci_low"] == few["ci_low"]
    assert few_gap["verdict"] == "inconclusive"
    many, many_gap = int8_of(20_000, 0)
    assert many["verdict"] == many_gap["verdict"] == "supported"
    assert -0.03 < many["ci_low"] < 0 < many["ci_high"] < 0.03


def test_equivalence_is_claimed_at_most_as_often_as_its_level_says_at_the_margin():
    """At a true loss of one point, the margin: the chance of each number of lost answers, and what is said of it."""
    for n in (150, 300, 600):
        numbers = np.arange(0, 1 + n // 100)  # of more than that the effect itself is outside
        said = [int8_of(n, lost)[0]["verdict"] == "supported" for lost in numbers]
        assert binom.pmf(numbers, n, 0.01) @ said <= 0.06, n


def group_slopes(slope):
    """H7 of two data sets of six groups each: `slope` points more are lost at each halving of a group's size, of which
    the images have nothing to say (every group of 500 images or more)."""
    rng, frames, test_sets = np.random.default_rng(0), [], {}
    n_G = 500 * 2 ** np.arange(6)
    for name in ("one", "two"):
        group, label = np.repeat(np.arange(6), n_G), np.arange(n_G.sum()) % 2
        lost = np.concatenate([rng.permutation(n) < n * (0.1 - slope * np.log2(n / 500)) for n in n_G])
        predictions = {
            f"{name}-a": label.astype(np.int16),
            f"{name}-b": np.where(lost, 1 - label, label).astype(np.int16),
        }
        names = list("uvwxyz")
        test_sets[name] = TestSet(name, "race", label, group, names, group, names, 2, 20, predictions)
        identity = {"dataset": name, "model": "m", "seed": 0, "options": None, "strategy": None, "size_mb": 1.0}
        identity |= {"baseline_cell": f"{name}-a", "status": "done"}
        frames.append(identity | {"cell": f"{name}-a", "method": "none", "weight_bits": None, "activation_bits": None})
        frames.append(identity | {"cell": f"{name}-b", "method": "ptq_static", "weight_bits": 4, "activation_bits": 4})
    (row,) = hypotheses.evaluate(pd.DataFrame(frames), test_sets, [DEFAULT["H7-small-groups"]], 1000, 0.95).to_dict(
        "records"
    )
    return row


def test_permutations_over_groups_of_two_data_sets_count_what_was_observed():
    """Of 720 orders in each of two data sets only the observed one, in both, has so steep a slope: random ones do not
    find it. Were it not counted among them p would be 0."""
    row = group_slopes(0.01)
    assert row["verdict"] == "supported" and row["n_comparisons"] == 2
    assert row["p"] >= 1 / 5041


def test_p_is_that_of_the_interval_where_the_permutation_is_surer(monkeypatch):
    """Permutations of the groups say that the slope is real, the images leave it open: no small p beside that."""
    row = group_slopes(0.0004)
    assert row["verdict"] == "inconclusive" and row["ci_low"] < 0 < row["ci_high"]
    assert row["p"] > 0.05


def test_what_cannot_be_tested_says_why(tmp_path):
    config = small_config("quantization.bit_widths=[4]", "mitigation.strategies=[]")
    found = verdicts(tmp_path, config, shares=(0.25, 0.25, 0.25, 0.25))
    tested = {name for name, row in found.items() if row["verdict"] != "not tested"}
    assert tested == {"H9-worst-group"} and found["H9-worst-group"]["verdict"] == "inconclusive"
    reasons = {name: row["reason"] for name, row in found.items()}
    assert reasons["H1-larger-models"] == "needs at least 4 models with a known FP32 size, there are 2"
    assert reasons["H2-qat-gain"] == reasons["H8-qat-fairness"].replace("QAT", "W4A4 QAT")
    assert reasons["H2-qat-gain"] == "no finished cell of W4A4 QAT"
    assert reasons["H3-balanced-calibration"] == "no finished cell of balanced calibration"
    assert reasons["H5-int8"] == "no finished cell of W8A8 static PTQ"
    assert reasons["H6-architecture"].startswith("one seed only")
    assert reasons["H7-small-groups"] == "the groups of synthetic are about the same size"
    for name in set(found) - tested:
        row = found[name]
        assert row["sentence"] == f"Not tested: {row['reason']}." and np.isnan(row["p"]) and np.isnan(row["p_holm"])
        assert np.isnan(row["effect"]) and row["n_images"] == 0


def test_images_are_resampled_jointly_so_that_what_models_share_does_not_count_twice(tmp_path):
    """Ten copies of one model tell no more about the images than one does: the interval must not shrink."""
    rows, test_set = study(tmp_path, small_config(models=("resnet50",)))
    one = rows[rows["strategy"].isna()]
    copies, predictions = [], dict(test_set.predictions)
    for i in range(10):
        copy = one.assign(model=f"copy{i}", cell=one["cell"] + str(i), baseline_cell=one["baseline_cell"] + str(i))
        copies.append(copy)
        predictions |= {f"{cell}{i}": test_set.predictions[cell] for cell in one["cell"]}
    many = with_predictions(test_set, predictions)
    widths = []
    for frame, images in ((one, test_set), (pd.concat(copies, ignore_index=True), many)):
        found = only("H9-worst-group", frame, images, 500)
        widths.append(found["ci_high"] - found["ci_low"])
    assert widths[1] == pytest.approx(widths[0]) and widths[0] > 0.1


# ------------------------------------------------------------------------------------ claims of methods, and of several


QAT = ("quantization.methods=[ptq_static, qat]", "mitigation.strategies=[]")


def test_qat_gain_needs_a_modest_gain_and_the_cost(tmp_path):
    """At 4 bits PTQ loses 8 % of the images that FP32 has right; QAT so many as told, for so many seconds."""
    config = small_config(*QAT, "quantization.bit_widths=[4]")
    for name, qat, seconds, verdict in (
        ("modest", 0.05, 30.0, "supported"),
        ("cheap", 0.05, 15.0, "contradicted"),  # 1.5 times the seconds
        ("none", 0.11, 30.0, "contradicted"),
        ("large", 0.0, 30.0, "contradicted"),  # 7.2 points are no modest gain
        ("slight", 0.079, 30.0, "inconclusive"),
    ):
        truth = {"ptq_static": 0.08, "qat": qat}
        rows, test_set = study(tmp_path / name, config, loss=lambda cell, g, t=truth: t[cell.method])
        is_qat = rows["method"] == "qat"
        rows = rows.assign(calibration_seconds=10.0, training_seconds=np.where(is_qat, seconds - 10.0, np.nan))
        found = only("H2-qat-gain", rows, test_set)
        assert found["verdict"] == verdict, name
        right = (378, 324, 270, 108)
        gain = sum(round(0.08 * n) for n in right) - sum(round(qat * n) for n in right)
        assert found["effect"] == pytest.approx(100 * gain / 1200)
        assert ("takes not more than 2 times" in found["sentence"]) == (name == "cheap")
        assert "15" not in found["sentence"] and found["ci_level"] == pytest.approx(0.9)
        again = rows.assign(calibration_seconds=11.0)  # another time the same work takes longer
        assert str(only("H2-qat-gain", again, test_set)) == str(found)
        costs = hypotheses.costs(rows, {"synthetic": test_set}, [DEFAULT["H2-qat-gain"]])
        assert costs["seconds_ratio"].tolist() == pytest.approx([seconds / 10] * 2)
    without = rows.drop(columns=["calibration_seconds", "training_seconds"])
    assert only("H2-qat-gain", without, test_set)["reason"] == "the rows have no seconds of calibration or training"


def test_qat_fairness_flips_with_the_data_and_compares_the_same_widths(tmp_path):
    config = small_config(*QAT)
    for name, of_qat, of_ptq, verdict in (
        ("wider", 0.3, 0.05, "supported"), ("same", 0.1, 0.1, "inconclusive"), ("narrower", 0.05, 0.3, "contradicted"),
    ):  # fmt: skip
        loss = lambda cell, g, q=of_qat, p=of_ptq: {"qat": q, "ptq_static": p}[cell.method] if g >= 2 else 0.05  # noqa: E731
        found = verdicts(tmp_path / name, config, loss=loss)["H8-qat-fairness"]
        assert found["verdict"] == verdict, name
        assert found["n_comparisons"] == 4 and "(W8A8 and W4A4)" in found["sentence"]
    rows, test_set = study(tmp_path / "pairs", config)
    pairs = pairs_of(study_of(rows, {"synthetic": test_set}, 1, 0.95), DEFAULT["H8-qat-fairness"])
    assert all(row.width.lower() in row.reference and "ptq_static" in row.reference for row in pairs.itertuples())


def test_mixed_precision_preserves_the_gap_or_does_not(tmp_path):
    """The claim is that the gap widens by less than a point; male images are lost beyond those of female ones."""
    config = small_config("quantization.methods=[mixed_precision]", "mitigation.strategies=[]")
    error = lambda g: 0.05 if g < 2 else 0.15  # noqa: E731  so that the groups that are furthest apart are clear
    for name, of_male, verdict in (
        ("kept", 0.0, "supported"), ("edge", 0.011, "inconclusive"), ("lost", 0.06, "contradicted"),
    ):  # fmt: skip
        loss = lambda cell, g, m=of_male: m if g >= 2 else 0.0  # noqa: E731
        found = verdicts(tmp_path / name, config, loss=loss, fp32_error=error, n=9600)["H4-mixed-precision"]
        assert found["verdict"] == verdict, name
        assert found["threshold_low"] == found["threshold_high"] == 1.0
        lost = round(of_male * 2040) + round(of_male * 816)
        assert found["effect"] == pytest.approx(100 * lost / 3360, abs=0.05)  # of halves: within an image of it
        assert ("includes +1" in found["sentence"]) == (verdict == "inconclusive")


def test_int8_is_the_sweet_spot_only_if_four_bits_cost_more(tmp_path):
    found = verdicts(tmp_path / "free", small_config(), loss=lambda cell, g: 0.0)["H5-int8"]
    assert found["verdict"] == "contradicted"  # INT8 is as good as FP32, but so are 4 bits
    assert found["p"] == pytest.approx(2 * 2 / 301)  # Bonferroni for one of two claims; each no replicate of 300
    edge = lambda cell, g: {8: 0.0, 4: 0.013}[cell.weight_bits]  # noqa: E731  -1.25 points: is that more than one?
    found = verdicts(tmp_path / "edge", small_config(), loss=edge)["H5-int8"]
    assert found["verdict"] == "inconclusive" and found["p"] > 0.05  # the larger p of the two
    missing = small_config("quantization.bit_widths=[8]", "mitigation.strategies=[]")
    found = verdicts(tmp_path / "missing", missing, loss=lambda cell, g: 0.0)["H5-int8"]
    assert found["verdict"] == "not tested" and found["reason"] == "no finished cell of W4A4 static PTQ"
    found = verdicts(tmp_path / "fails", missing, loss=lambda cell, g: 0.1)["H5-int8"]
    assert found["verdict"] == "contradicted" and "Not tested in it: no finished cell of W4A4" in found["sentence"]


FOUR = ("resnet50", "mobilenet_v2", "squeezenet1_1", "efficientnet_b0")


def test_architecture_predicts_where_trainings_of_one_lose_alike(tmp_path):
    config = small_config("quantization.bit_widths=[4]", "mitigation.strategies=[]", models=FOUR, seeds=(0, 1, 2))
    by_model = dict(zip(FOUR, (0.05, 0.12, 0.2, 0.3), strict=True))
    alike = lambda cell, g: by_model[cell.model]  # noqa: E731
    # every order of the four losses in some training: what one seed loses says nothing about another
    shifted = lambda cell, g: tuple(by_model.values())[(FOUR.index(cell.model) * (1, 3, 2)[cell.seed] + cell.seed) % 4]  # noqa: E731
    found = verdicts(tmp_path / "alike", config, loss=alike)["H6-architecture"]
    assert found["verdict"] == "supported" and found["effect"] == pytest.approx(1.0)
    assert "permutation over models in each training p = 0.002" in found["sentence"]  # 1 of 4!^2 orders
    assert found["p"] == pytest.approx(2 / 301)  # no replicate of 300 on the other side: the larger p of the two
    assert found["n_seeds"] == 3 and "3 trainings of 4 models" in found["sentence"]
    found = verdicts(tmp_path / "shifted", config, loss=shifted)["H6-architecture"]
    assert found["verdict"] == "inconclusive" and found["effect"] < 0.3
    same = verdicts(tmp_path / "same", config, loss=lambda cell, g: 0.1)["H6-architecture"]
    assert same["reason"] == "in a training all models lose the same"
    two = small_config("quantization.bit_widths=[4]", "mitigation.strategies=[]", seeds=(0, 1))
    few = verdicts(tmp_path / "two", two, loss=lambda cell, g: 0.1)["H6-architecture"]
    assert few["reason"] == "2 models in 2 trainings each: too few orders for a permutation test"


def test_mean_correlation_is_the_mean_of_the_pairs_of_trainings():
    rng = np.random.default_rng(0)
    effect_KM = rng.normal(size=(4, 6))
    pairs = np.corrcoef(effect_KM)[np.triu_indices(4, k=1)]
    assert hypotheses._mean_correlation(effect_KM) == pytest.approx(pairs.mean())
    assert np.isnan(hypotheses._mean_correlation(np.array([[1.0, 1, 1], [1, 2, 3]])))


MINE = (
    "{id: mine, statement: Distillation at W4A4 does not widen the accuracy gap by more than 1 point, "
    "metric: accuracy_gap, cells: {strategy: distillation, bits: 4}, below: 1}"
)


def test_a_hypothesis_of_ones_own_in_yaml(tmp_path):
    strategies = "mitigation.strategies=[{strategy: distillation, bit_widths: [4]}]"
    config = small_config(strategies, f"analysis.hypotheses=[H9-worst-group, {MINE}]")
    error = lambda g: 0.05 if g < 2 else 0.15  # noqa: E731
    for name, of_male, verdict in (("kept", 0.0, "supported"), ("lost", 0.1, "contradicted")):
        loss = lambda cell, g, m=of_male: m if cell.strategy and g >= 2 else 0.0  # noqa: E731
        found = verdicts(tmp_path / name, config, loss=loss, fp32_error=error, n=9600)
        assert list(found) == ["H9-worst-group", "mine"] and found["mine"]["verdict"] == verdict
        row = found["mine"]
        assert "W4A4 QAT (mse) + distillation changes the accuracy gap" in row["sentence"]
        assert "against FP32" in row["sentence"] and row["config"]["cells"] == {
            "strategy": ["distillation"],
            "bits": [4],
        }
        assert row["rule"].startswith(
            "difference in accuracy gap of W4A4 distillation against FP32, mean over models: "
        )


def test_selectors_choose_the_cells_that_they_name(tmp_path):
    config = small_config(
        "quantization.methods=[ptq_static, {method: ptq_static, observer: [minmax], rounding: adaround}]",
        "mitigation.strategies=[]", models=("resnet50",),
    )  # fmt: skip
    rows, test_set = study(tmp_path, config)
    labelled = study_of(rows, {"synthetic": test_set}, 1, 0.95).rows

    def settings(**keys):
        return select(labelled, Cells(**keys))["setting"].tolist()

    assert settings() == ["W8A8 static (mse)", "W4A4 static (mse)"]  # the first of as many
    rare = labelled.drop(labelled.index[labelled["setting"] == "W8A8 static (mse)"])
    twice = pd.concat([rare, rare[rare["setting"] == "W4A4 static (minmax)"]])
    assert set(select(twice, Cells(bits=[4]))["setting"]) == {"W4A4 static (minmax)"}  # that most cells have
    assert settings(settings="all", bits=[4]) == ["W4A4 static (mse)", "W4A4 static (minmax)"]
    assert settings(options={"rounding": "adaround"}) == ["W8A8 static (minmax)", "W4A4 static (minmax)"]
    assert settings(bits=["W4A8"]) == settings(method=["qat"]) == settings(model=["mobilenet_v2"]) == []
    against = {"method": "ptq_static", "bits": 8}
    claim = Claim(metric="accuracy", cells=Cells(bits=[4], settings="all"), against=against, above=0.0)
    pairs = pairs_of(study_of(rows, {"synthetic": test_set}, 1, 0.95), claim)
    assert pairs["reference"].str.contains("w8a8-mse").all() and len(pairs) == 2
    # where several could be the reference it is the one that shares most options
    claim = Claim(metric="accuracy", cells=claim.cells, against={**against, "settings": "all"}, above=0.0)
    pairs = pairs_of(study_of(rows, {"synthetic": test_set}, 1, 0.95), claim)
    assert [("minmax" in row.cell, "minmax" in row.reference) for row in pairs.itertuples()] == [
        (False,) * 2,
        (True,) * 2,
    ]


# --------------------------------------------------------------------------------------------------- what is measured


def test_values_of_images_sum_to_the_rates_and_follow_them_when_resampled(tmp_path):
    """The columns against the definition: choose on one half, measure on the other, in every replicate."""
    error = lambda g: (0.05, 0.1, 0.15, 0.3)[g]  # noqa: E731
    rows, test_set = study(tmp_path, small_config(models=("resnet50",)), fp32_error=error)
    base, cell = rows["cell"].iloc[0], rows["cell"].iloc[2]
    effects, half_N = Effects(test_set), halves(test_set)
    rng = np.random.default_rng(0)
    weights_BN = np.stack(
        [np.bincount(rng.integers(0, test_set.n, test_set.n), minlength=test_set.n) for _ in range(200)]
    )

    def rate(hit_N, member_N, weights=None):
        weights = np.ones(test_set.n) if weights is None else weights
        return 100 * (weights * hit_N * member_N).sum(axis=-1) / (weights * member_N).sum(axis=-1)

    def chosen(name, pick, hit, among=True):
        return [
            pick([rate(hit, (half_N == half) & (test_set.group_N == g) & among) for g in (0, 1)]) for half in (0, 1)
        ]

    def both_ways(value):
        """value(half that is measured on, what was chosen on the other)."""
        return (value(1, 0) + value(0, 1)) / 2

    right, hits = test_set.correct(cell), test_set.predictions[cell] == 1
    worst = chosen(cell, np.argmin, right)
    of = lambda half, g: (half_N == half) & (test_set.group_N == g)  # noqa: E731
    positive = test_set.label_N == 1
    low, high = (chosen(cell, pick, hits, positive) for pick in (np.argmin, np.argmax))
    for metric, definition in (
        ("worst_group_accuracy", lambda w: both_ways(lambda on, by: rate(right, of(on, worst[by]), w))),
        (
            "equal_opportunity_difference",
            lambda w: both_ways(
                lambda on, by: rate(hits, of(on, high[by]) & positive, w) - rate(hits, of(on, low[by]) & positive, w)
            ),
        ),
    ):
        value_N = effects.of_cell(cell, metric)
        assert value_N.sum() == pytest.approx(definition(None))
        linear_B, exact_B = weights_BN @ value_N, definition(weights_BN)
        assert np.corrcoef(linear_B, exact_B)[0, 1] > 0.99 and linear_B.std() == pytest.approx(exact_B.std(), rel=0.05)
    assert effects.pair(cell, base, "accuracy").sum() == pytest.approx(
        100 * (right.mean() - test_set.correct(base).mean())
    )


def test_a_gap_of_equal_groups_is_not_biased_upward():
    """Eight equal groups of 80 %: max - min of their accuracies is about 8 points on average, cross-fitted it is 0; and
    the worst one's is 76, cross-fitted it is 80."""
    rng = np.random.default_rng(4)
    group = np.repeat(np.arange(8), 200)
    label, names = np.zeros(len(group), dtype=np.int64), [str(g) for g in range(8)]
    gaps, worst, naive = [], [], []
    for _ in range(60):
        predictions = {"q": (rng.random(len(group)) < 0.2).astype(np.int64)}
        test_set = TestSet("d", "race", label, group, names, group, names, 2, 20, predictions)
        gaps.append(Effects(test_set).of_cell("q", "accuracy_gap").sum())
        worst.append(Effects(test_set).of_cell("q", "worst_group_accuracy").sum())
        rates = np.bincount(group, weights=predictions["q"]) / 200
        naive.append(100 * (rates.max() - rates.min()))
    assert np.mean(naive) > 6 and abs(np.mean(gaps)) < 3 * np.std(gaps) / np.sqrt(60)
    assert abs(np.mean(worst) - 80) < 3 * np.std(worst) / np.sqrt(60) and np.std(worst) / np.sqrt(60) < 0.5


def test_holm_is_over_the_tested_hypotheses_and_said(tmp_path):
    found = verdicts(tmp_path, small_config(models=FIVE), loss=lambda cell, g: {
        8: 0.0, 4: dict(zip(FIVE, (0.05, 0.22, 0.3, 0.16, 0.08), strict=True))[cell.model]
    }[cell.weight_bits])  # fmt: skip
    tested = [row for row in found.values() if row["verdict"] != "not tested"]
    assert len(tested) == 5
    corrected = holm(np.array([row["p"] for row in tested]))
    assert [row["p_holm"] for row in tested] == pytest.approx(list(corrected))
    larger = found["H1-larger-models"]
    assert larger["verdict"] == "supported" and larger["p"] == pytest.approx(1 / 120)
    # 1/120 is the second of five: times 4 it is 0.033
    assert larger["p_holm"] == pytest.approx(4 / 120) and "Corrected" not in larger["sentence"]
    table = pd.DataFrame([{"p": p, "verdict": "supported", "sentence": "S."} for p in (0.04, 0.03)])
    said = hypotheses._corrected(table, 0.95)["sentence"]
    assert said.str.contains("Corrected for 2 hypotheses (Holm), p = 0.060", regex=False).all()


# ---------------------------------------------------------------------------------------------- rankings and literature


def test_resilience_ranks_what_was_planted_and_says_what_it_cannot_tell_apart(tmp_path):
    by_model = dict(zip(FOUR, (0.05, 0.055, 0.2, 0.3), strict=True))
    loss = lambda cell, g: {8: 0.0, 4: by_model[cell.model]}[cell.weight_bits]  # noqa: E731
    rows, test_set = study(tmp_path, small_config(models=FOUR), loss=loss)
    resilience, retention = rankings.measure(rows, {"synthetic": test_set}, 300, 0.95)
    of_4 = resilience[(resilience["width"] == "W4A4") & (resilience["metric"] == "accuracy")].set_index("model")
    assert of_4.index.tolist() == list(FOUR) and of_4["rank"].tolist() == [1, 2, 3, 4]
    lost = [100 * sum(round(share * n) for n in (378, 324, 270, 108)) / 1200 for share in by_model.values()]
    assert of_4["loss"].tolist() == pytest.approx(lost)
    assert of_4[["rank_low", "rank_high"]].to_numpy().tolist() == [[1, 2], [1, 2], [3, 3], [4, 4]]
    assert of_4["not_told_apart_from"].tolist() == ["mobilenet_v2", "resnet50", "", ""]
    of_8 = resilience[(resilience["width"] == "W8A8") & (resilience["metric"] == "accuracy")]
    assert (of_8["rank_low"] == 1).all() and (of_8["rank_high"] == 4).all() and (of_8["rank"] == 1).all()
    table = rankings.resilience_table(resilience, 0.95)
    assert len(table) == 8 and table["rank, accuracy"].tolist()[4:] == ["1 [1, 2]", "2 [1, 2]", "3 [3, 3]", "4 [4, 4]"]
    assert table.map(lambda value: isinstance(value, str)).all(axis=None)

    # retention: FP32 has 90 % in every group; at 4 bits a quarter of the groups' right images stays lost
    of_model = retention[retention["model"] == "squeezenet1_1"].set_index("width")
    assert of_model.loc["W8A8", "kept"].tolist() == pytest.approx([1.0, 1.0])  # plain, and balanced calibration
    main = of_model[of_model["is_main"]].loc["W4A4"]
    assert main["kept"] == pytest.approx(0.8, abs=0.02)
    assert main["kept_ci_low"] < main["kept"] < main["kept_ci_high"] < 0.9
    assert main["saved_mb"] == pytest.approx(3.0 * 28 / 32)
    assert main["kept_per_mb"] == pytest.approx(main["kept"] / (3.0 * 28 / 32))
    table = rankings.retention_table(retention, 0.95)
    assert table["setting"].tolist() == ["W8A8 static (mse)", "W4A4 static (mse)"] * 4
    assert table.map(lambda value: isinstance(value, str)).all(axis=None)


def test_rank_sets_hold_the_true_ranks():
    """Five losses, two of them equal, known to ±0.3: the sets hold all true ranks in at least 93 % of 300 studies."""
    truth = np.array([0.0, 0.5, 0.5, 1.0, 3.0])
    rng = np.random.default_rng(2)
    held, narrow = 0, 0
    for _ in range(300):
        loss_M = truth + 0.3 * rng.normal(size=5)
        low_M, high_M, _ = rankings.rank_sets(loss_M, loss_M + 0.3 * rng.normal(size=(500, 5)), 0.95)
        ranks = 1 + (truth[:, None] > truth).sum(axis=1)
        tied_high = 5 - (truth[:, None] < truth).sum(axis=1)
        held += bool((low_M <= ranks).all() and (high_M >= tied_high).all())
        narrow += low_M[4] == 5
    assert held >= 279 and narrow >= 290


def test_the_literature_stands_beside_what_was_found(tmp_path):
    found = verdicts(tmp_path, small_config(), fp32_error=lambda g: 0.2 if g >= 2 else 0.05, loss=lambda cell, g: {
        8: 0.0, 4: 0.3 if g >= 2 else 0.05
    }[cell.weight_bits])  # fmt: skip
    table = literature.literature_table(pd.DataFrame(found.values()))
    assert len(table) == len(literature.FINDINGS) and table.map(lambda value: isinstance(value, str)).all(axis=None)
    about_worst = [finding.agrees_with for finding in literature.FINDINGS if finding.hypothesis == "H9-worst-group"]
    beside = table.loc[table["our question"] == DEFAULT["H9-worst-group"].statement, "beside it"].tolist()
    assert beside == [{"supported": "agrees", "contradicted": "disagrees"}[stance] for stance in about_worst]
    assert {"agrees", "disagrees"} == set(beside)  # the literature contradicts itself
    of_qat = table[table["source"] == literature.LIU]
    assert (of_qat["ours"] == "not tested").all() and (of_qat["beside it"] == "–").all()
    assert (literature.literature_table(pd.DataFrame())["ours"] == "not asked").all()


def test_every_finding_names_a_default_hypothesis_and_its_source():
    for finding in literature.FINDINGS:
        assert finding.hypothesis in DEFAULT and finding.agrees_with in ("supported", "contradicted")
        assert "arXiv:" in finding.citation or "PMLR" in finding.citation
