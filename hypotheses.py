"""Hypotheses as decision rules, computed from predictions: supported, contradicted, inconclusive or not tested.

(a) INT8 keeps accuracy, (b) 4 bits cost the worst group more, (c) group-balanced calibration narrows the equalized-odds
difference, (d) larger models lose less at 4 bits, (e) smaller groups lose more. Each rule is a function below.

What the intervals cover. All models of a data set are measured on the same test images, so images are resampled jointly
for all of them (a paired bootstrap, stratified by group: the group sizes are those of the test set). The intervals are
over images, given these models, seeds and groups: they do not say what other training seeds or other architectures
would have done. Rules that speak of models or groups in general (d, e) therefore ask for a permutation test over the
models or groups as well. Both must agree before a rule says anything but "inconclusive".

The worst group is chosen on one half of the images and measured on the other, both ways, and averaged (cross-fitting):
choosing and measuring on the same images would make it look worse than it is. The chosen groups are held fixed when
images are resampled. A max - min gap is biased upward by the same mechanism; the gap rule (c) compares two such gaps on
the same images, and its test swaps the two models' predictions image by image, which is valid however close the groups
are. Its interval is a description of spread.

Effects are in percentage points. `level` is 1 - alpha; a rule about equivalence (a) uses the interval of level 1 - 2
alpha, which is the two one-sided tests (TOST) procedure.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from joint_bootstrap import JointBootstrap, TestSet, equal_weights, interval_ends, nan_mean, percentile_interval
from result_rows import model_label, plain_counterparts, with_labels
from store import seed_for

EQUIVALENCE_MARGIN = 1.0  # (a): percentage points of accuracy
SIZE_RATIO = 1.2  # (d, e): the largest is at least so much larger than the smallest, else there is nothing to compare
MAX_PERMUTATIONS = 5040  # all of them up to 7 models or groups, else so many random ones
VERDICTS = ("supported", "contradicted", "inconclusive", "not tested")
COLUMNS = (
    "id", "statement", "verdict", "effect", "ci_low", "ci_high", "ci_level", "threshold_low", "threshold_high", "p",
    "test", "unit", "n_images", "n_models", "n_comparisons", "sentence", "rule", "reason", "parts",
)  # fmt: skip
CHANGE_COLUMNS = (
    "dataset", "model", "setting", "setting_order", "width", "n_seeds", "n_images", "accuracy", "change", "ci_low",
    "ci_high",
)  # fmt: skip


def evaluate(rows: pd.DataFrame, test_sets: Mapping[str, TestSet], replicates: int, level: float) -> pd.DataFrame:
    """One row a hypothesis, columns `COLUMNS`. `rows` are the finished cells; their predictions are in `test_sets`."""
    study = JointBootstrap(with_labels(rows).reset_index(drop=True), test_sets, replicates, level)
    rules = (_int8_is_lossless, _four_bits_cost_the_worst_group, _balanced_calibration, _larger_models, _smaller_groups)
    return pd.DataFrame([rule(study) for rule in rules], columns=list(COLUMNS))


def accuracy_changes(
    rows: pd.DataFrame, test_sets: Mapping[str, TestSet], replicates: int, level: float
) -> pd.DataFrame:
    """Accuracy against FP32 of each (data set, model, setting), mean over its seeds, in points, with paired intervals.

    Columns: dataset, model, setting, setting_order, width, n_seeds, n_images, accuracy (share), change, ci_low,
    ci_high.
    """
    study = JointBootstrap(with_labels(rows).reset_index(drop=True), test_sets, replicates, level)
    pairs = study.pairs(study.rows)
    if pairs.empty:
        return pd.DataFrame(columns=list(CHANGE_COLUMNS))
    observed_P, replicates_BP = study.changes(pairs, "accuracy_changes")
    found = []
    keys = ["dataset", "model", "setting", "setting_order", "width"]
    for key, block in pairs.groupby(keys, sort=False):
        at = block.index.to_numpy()
        low, high = percentile_interval(replicates_BP[:, at].mean(axis=1), level)
        test_set = test_sets[key[0]]
        accuracy = np.mean([test_set.correct(cell).mean() for cell in block["cell"]])
        found.append(
            {
                **dict(zip(keys, key, strict=True)),
                "n_seeds": block["seed"].nunique(),
                "n_images": test_set.n,
                "accuracy": float(accuracy),
                "change": float(observed_P[at].mean()),
                "ci_low": low,
                "ci_high": high,
            }
        )
    return pd.DataFrame(found)


# ------------------------------------------------------------------------------------------------------------ the rules


def _int8_is_lossless(study: JointBootstrap) -> dict:
    margin = EQUIVALENCE_MARGIN
    answer = _blank(
        "int8_accuracy",
        f"INT8 keeps accuracy within {margin:g} point of FP32",
        f"mean change in accuracy over models, W8A8 static; supported if its {study.equivalence_level:.0%} interval "
        "lies within "
        f"±{margin:g}, contradicted if it lies outside",
        "points of accuracy",
        (-margin, margin),
    )
    pairs = study.main_pairs("W8A8")
    if pairs.empty:
        return _not_tested(answer, "no finished W8A8 cell with its FP32 cell")
    observed_P, replicates_BP = study.changes(pairs, "int8_accuracy")
    weights_P = equal_weights(pairs)
    effect, values_B = float(observed_P @ weights_P), replicates_BP @ weights_P
    low, high = percentile_interval(values_B, study.equivalence_level)
    verdict = "supported" if -margin < low and high < margin else "inconclusive"
    if high < -margin or low > margin:
        verdict = "contradicted"
    p = max(_share_at_least(values_B, margin), _share_at_least(-values_B, margin))
    parts = _parts_by_model(study, pairs, observed_P, replicates_BP, study.equivalence_level)
    outside = [part["label"] for part in parts if not (-margin < part["ci_low"] and part["ci_high"] < margin)]
    sentence = (
        f"Over {_count(len(parts), 'model')}, {pairs['setting'].iloc[0]} changes accuracy by {_points(effect)} points "
        "on average "
        f"({_ci(low, high, study.equivalence_level)})"
    )
    if outside:
        verb = "is" if len(outside) == 1 else "are"
        sentence += f"; taken alone, {_and(outside)} {verb} not shown to stay within ±{margin:g}."
    else:
        sentence += f"; each model taken alone stays within ±{margin:g} too."
    return _decided(
        answer,
        verdict,
        effect,
        low,
        high,
        study.equivalence_level,
        p,
        "TOST, paired bootstrap over images",
        pairs,
        study,
        sentence,
        parts,
    )


def _four_bits_cost_the_worst_group(study: JointBootstrap) -> dict:
    answer = _blank(
        "worst_group_at_4_bits",
        "4 bits cost the worst group more than the average",
        "loss of accuracy at W4A4 static of the group with the lowest FP32 accuracy, minus the loss over all images, "
        "mean over "
        "models; group chosen on one half of the images, measured on the other, both ways; supported or contradicted "
        "if the "
        "interval excludes 0",
        "points of accuracy",
        (0.0, 0.0),
    )
    pairs = study.main_pairs("W4A4")
    if pairs.empty:
        return _not_tested(answer, "no finished W4A4 cell with its FP32 cell")
    too_few = [name for name in pairs["dataset"].unique() if len(study.eligible_groups(name)) < 2]
    if too_few:
        return _not_tested(answer, f"fewer than two groups are large enough in {_and(too_few)}")
    observed_P, replicates_BP, chosen = study.worst_group_excess(pairs, "worst_group_at_4_bits")
    weights_P = equal_weights(pairs)
    effect, values_B = float(observed_P @ weights_P), replicates_BP @ weights_P
    low, high = percentile_interval(values_B, study.level)
    parts = _parts_by_model(study, pairs, observed_P, replicates_BP, study.level)
    p = min(1.0, 2 * min(_share_at_least(values_B, 0.0), _share_at_least(-values_B, 0.0)))
    more = "more" if effect >= 0 else "less"
    sentence = (
        f"At {pairs['setting'].iloc[0]} the group with the lowest FP32 accuracy ({_and(chosen)}) loses "
        f"{abs(effect):.2f} points "
        f"{more} than the average image (difference {_points(effect)}, {_ci(low, high, study.level)}), over "
        f"{_count(len(parts), 'model')}{_zero(low, high)}."
    )
    return _decided(
        answer,
        _sign_verdict(low, high, +1),
        effect,
        low,
        high,
        study.level,
        p,
        "paired bootstrap over images, cross-fitted",
        pairs,
        study,
        sentence,
        parts,
    )


def _balanced_calibration(study: JointBootstrap) -> dict:
    metric = "equalized_odds_difference"
    answer = _blank(
        "balanced_calibration",
        "Group-balanced calibration reduces the equalized-odds difference",
        "equalized-odds difference with balanced calibration minus that with plain calibration at the same model, seed "
        "and "
        "widths, mean over pairs in which neither model has collapsed to one class; supported or contradicted if the "
        "interval excludes 0 and the paired permutation test "
        "agrees",
        "points of equalized-odds difference",
        (0.0, 0.0),
    )
    mitigated = study.rows[study.rows["strategy"] == "bias_aware_calibration"]
    counterparts = plain_counterparts(study.rows)
    pairs = mitigated[mitigated["cell"].isin(list(counterparts))].reset_index(drop=True)
    if pairs.empty:
        return _not_tested(answer, "no finished bias_aware_calibration cell with a plain counterpart")
    pairs = pairs.assign(reference=pairs["cell"].map(counterparts))
    collapsed = [
        any(study.test_sets[pair.dataset].is_collapsed(cell) for cell in (pair.cell, pair.reference))
        for pair in pairs.itertuples()
    ]
    n_collapsed, pairs = sum(collapsed), pairs[[not flag for flag in collapsed]].reset_index(drop=True)
    if pairs.empty:
        return _not_tested(answer, "in every pair a model gives one class to nearly every image, which has no gap")
    observed_P, replicates_BP, permuted_BP = study.gap_changes(pairs, metric, "balanced_calibration")
    defined = ~np.isnan(observed_P)
    if not defined.any():
        return _not_tested(
            answer, "the equalized-odds difference is undefined in every pair (too few groups, or no positives)"
        )
    left_out = int((~defined).sum())
    pairs, observed_P = pairs[defined].reset_index(drop=True), observed_P[defined]
    replicates_BP, permuted_BP = replicates_BP[:, defined], permuted_BP[:, defined]
    weights_P = equal_weights(pairs)
    effect, values_B = float(observed_P @ weights_P), nan_mean(replicates_BP, weights_P)
    null_B = nan_mean(permuted_BP, weights_P)
    low, high = percentile_interval(values_B, study.level)
    p_lower, p_upper = _share_at_least(-null_B, -effect), _share_at_least(null_B, effect)
    alpha = 1 - study.level
    verdict = _sign_verdict(low, high, -1)
    if (verdict == "supported" and p_lower > alpha) or (verdict == "contradicted" and p_upper > alpha):
        verdict = "inconclusive"
    parts = []
    for width, block in sorted(pairs.groupby("width"), key=lambda item: item[1]["setting_order"].min()):
        at, weights = block.index.to_numpy(), equal_weights(block)
        part_low, part_high = percentile_interval(nan_mean(replicates_BP[:, at], weights), study.level)
        parts.append(
            {"label": width, "effect": float(observed_P[at] @ weights), "ci_low": part_low, "ci_high": part_high}
        )
    p = min(1.0, 2 * min(p_lower, p_upper))
    sentence = (
        f"Over {_count(len(pairs), 'pair')} ({_and([part['label'] for part in parts])}), balanced calibration changes "
        "the "
        f"equalized-odds difference by {_points(effect)} points against plain calibration "
        f"({_ci(low, high, study.level)}, paired "
        f"permutation p = {_p(p)}){_zero(low, high)}."
    )
    if n_collapsed:
        sentence += (
            f" Not counted, since a model in it gives one class to nearly every image and so has no gap: "
            f"{_count(n_collapsed, 'further pair')}."
        )
    if left_out:
        sentence += f" It is undefined in {_count(left_out, 'further pair')}."
    return _decided(
        answer,
        verdict,
        effect,
        low,
        high,
        study.level,
        p,
        "paired permutation over images",
        pairs,
        study,
        sentence,
        parts,
    )


def _larger_models(study: JointBootstrap) -> dict:
    answer = _blank(
        "larger_models_at_4_bits",
        "Larger models lose less accuracy at 4 bits",
        "slope of the accuracy loss at W4A4 static on log2 of the FP32 size, over models; supported or contradicted if "
        "the "
        "interval over images excludes 0 and a permutation of the sizes among the models agrees",
        "points of loss per doubling of size",
        (0.0, 0.0),
    )
    pairs = study.main_pairs("W4A4")
    if pairs.empty:
        return _not_tested(answer, "no finished W4A4 cell with its FP32 cell")
    fp32 = study.rows.set_index("cell")["size_mb"].astype(float)
    pairs = pairs.assign(fp32_size=pairs["baseline_cell"].map(fp32))
    pairs = pairs[pairs["fp32_size"] > 0].reset_index(drop=True)
    models = list(pairs["model"].unique())
    needed = _fewest(study.level)
    if len(models) < needed:
        return _not_tested(answer, f"needs at least {needed} models with a known FP32 size, there are {len(models)}")
    size_M = pairs.groupby("model", sort=False)["fp32_size"].mean().to_numpy()
    if size_M.max() / size_M.min() < SIZE_RATIO:
        return _not_tested(answer, "the models are about the same size")
    observed_P, replicates_BP = study.changes(pairs, "larger_models_at_4_bits")
    # one column a model: the mean over its data sets and seeds, as a loss
    of_model_PM = np.stack([equal_weights(pairs, pairs["model"] == model) for model in models], axis=1)
    loss_M, loss_BM = -observed_P @ of_model_PM, -replicates_BP @ of_model_PM
    x_M = np.log2(size_M)
    effect, values_B = float(loss_M @ _slope_weights(x_M)), loss_BM @ _slope_weights(x_M)
    low, high = percentile_interval(values_B, study.level)
    null = np.array([loss_M @ _slope_weights(x) for x in _permutations(x_M, "larger_models")])
    verdict, p = _with_permutation(_sign_verdict(low, high, -1), effect, null, study.level)
    parts = [
        {
            "label": f"{model_label(model)} ({size:.3g} MB)",
            "effect": float(loss_M[m]),
            **interval_ends(loss_BM[:, m], study.level),
        }
        for m, (model, size) in enumerate(zip(models, size_M, strict=True))
    ]
    sentence = (
        f"Over {_count(len(models), 'model')} from {size_M.min():.3g} to {size_M.max():.3g} MB, the accuracy lost at "
        f"{pairs['setting'].iloc[0]} changes by {_points(effect)} points per doubling of the FP32 size "
        f"({_ci(low, high, study.level)} over images; permutation over models p = {_p(p)}){_zero(low, high)}."
    )
    return _decided(
        answer,
        verdict,
        effect,
        low,
        high,
        study.level,
        p,
        "permutation of sizes over models, and bootstrap over images",
        pairs,
        study,
        sentence,
        parts,
    )


def _smaller_groups(study: JointBootstrap) -> dict:
    answer = _blank(
        "smaller_groups_at_4_bits",
        "Smaller groups lose more accuracy at 4 bits",
        "slope of the accuracy loss at W4A4 static on -log2 of the group's share of the test set, over the "
        "intersectional groups "
        "that are large enough, mean over models; supported or contradicted if the interval over images excludes 0 and "
        "a "
        "permutation of the sizes among the groups agrees",
        "points of loss per halving of size",
        (0.0, 0.0),
    )
    pairs = study.main_pairs("W4A4")
    if pairs.empty:
        return _not_tested(answer, "no finished W4A4 cell with its FP32 cell")
    needed = _fewest(study.level)
    usable, reasons = [], []
    for name in pairs["dataset"].unique():
        test_set = study.test_sets[name]
        size_G = np.bincount(test_set.intersection_N)[
            test_set.eligible(test_set.intersection_N, test_set.intersection_names)
        ]
        if len(size_G) < needed:
            reasons.append(f"{name} has {_count(len(size_G), 'large enough group')}, at least {needed} are needed")
        elif size_G.max() / size_G.min() < SIZE_RATIO:
            reasons.append(f"the groups of {name} are about the same size")
        else:
            usable.append(name)
    if not usable:
        return _not_tested(answer, "; ".join(reasons))
    pairs = pairs[pairs["dataset"].isin(usable)].reset_index(drop=True)
    slopes, slopes_B, nulls, parts = [], [], [], []
    for name in usable:
        test_set, block = study.test_sets[name], pairs[pairs["dataset"] == name].reset_index(drop=True)
        groups = test_set.eligible(test_set.intersection_N, test_set.intersection_names)
        observed_PG, replicates_BPG = study.group_changes(block, test_set.intersection_N, "smaller_groups_at_4_bits")
        weights_P = equal_weights(block)
        loss_G = -np.einsum("pg,p->g", observed_PG, weights_P)[groups]
        loss_BG = -np.einsum("bpg,p->bg", replicates_BPG, weights_P)[:, groups]
        size_G = np.bincount(test_set.intersection_N)[groups]
        x_G = -np.log2(size_G / test_set.n)
        slopes.append(loss_G @ _slope_weights(x_G))
        slopes_B.append(loss_BG @ _slope_weights(x_G))
        nulls.append([loss_G @ _slope_weights(x) for x in _permutations(x_G, "smaller_groups", name)])
        prefix = f"{name}: " if len(usable) > 1 else ""
        parts += [
            {
                "label": f"{prefix}{test_set.intersection_names[g]} (n = {size})",
                "effect": float(loss_G[i]),
                **interval_ends(loss_BG[:, i], study.level),
            }
            for i, (g, size) in enumerate(zip(groups, size_G, strict=True))
        ]
    effect, values_B = float(np.mean(slopes)), np.mean(slopes_B, axis=0)
    low, high = percentile_interval(values_B, study.level)
    null = np.array(nulls[0])
    if len(nulls) > 1:  # data sets are permuted independently of each other
        generator = np.random.default_rng(seed_for("analysis", "smaller_groups", "combine"))
        null = np.mean([generator.choice(values, MAX_PERMUTATIONS) for values in nulls], axis=0)
    verdict, p = _with_permutation(_sign_verdict(low, high, +1), effect, null, study.level)
    sentence = (
        f"Over {_count(len(parts), 'group')} and {_count(pairs['model'].nunique(), 'model')}, the accuracy lost at "
        f"{pairs['setting'].iloc[0]} changes by {_points(effect)} points per halving of the group's size "
        f"({_ci(low, high, study.level)} over images; permutation over groups p = {_p(p)}){_zero(low, high)}."
    )
    if reasons:
        sentence += f" Left out: {'; '.join(reasons)}."
    return _decided(
        answer,
        verdict,
        effect,
        low,
        high,
        study.level,
        p,
        "permutation of sizes over groups, and bootstrap over images",
        pairs,
        study,
        sentence,
        parts,
    )


# ------------------------------------------------------------------------------------------------------------ decisions


def _share_at_least(values_B: np.ndarray, bound: float) -> float:
    """A Monte-Carlo p-value: the share of values >= bound, the observation counted among them so that it is never 0."""
    values_B = values_B[~np.isnan(values_B)]
    return float((1 + np.sum(values_B >= bound - 1e-12)) / (1 + len(values_B)))


def _slope_weights(x: np.ndarray) -> np.ndarray:
    """Weights w with w @ y = the least-squares slope of y on x."""
    centred = x - x.mean()
    return centred / np.sum(centred**2)


def _permutations(x: np.ndarray, *names: str) -> np.ndarray:
    """All permutations of x where they are few, else random ones."""
    if math.factorial(len(x)) <= MAX_PERMUTATIONS:
        return x[np.array(list(itertools.permutations(range(len(x)))))]
    generator = np.random.default_rng(seed_for("analysis", "permutations", *names))
    return np.stack([x, *(generator.permutation(x) for _ in range(MAX_PERMUTATIONS - 1))])


def _fewest(level: float) -> int:
    """The smallest number of models or groups whose permutation test can reach p <= alpha: 4 at alpha = 0.05."""
    return next(k for k in range(2, 20) if 1 / math.factorial(k) <= 1 - level + 1e-12)


def _sign_verdict(low: float, high: float, sign: int) -> str:
    """Whether an interval lies on the side of 0 that the hypothesis names (sign +1: above)."""
    if low > 0:
        return "supported" if sign > 0 else "contradicted"
    if high < 0:
        return "supported" if sign < 0 else "contradicted"
    return "inconclusive"


def _with_permutation(verdict: str, effect: float, null: np.ndarray, level: float) -> tuple[str, float]:
    """The verdict if the one-sided permutation test in the direction of the effect agrees; and the two-sided p."""
    tail = np.mean(null >= effect - 1e-12) if effect >= 0 else np.mean(null <= effect + 1e-12)
    two_sided = min(1.0, float(np.mean(np.abs(null) >= abs(effect) - 1e-12)))
    return (verdict if tail <= 1 - level + 1e-12 else "inconclusive"), two_sided


def _parts_by_model(study: JointBootstrap, pairs: pd.DataFrame, observed_P, replicates_BP, level: float) -> list[dict]:
    parts = []
    several = pairs["dataset"].nunique() > 1
    for (dataset, model), block in pairs.groupby(["dataset", "model"], sort=False):
        at = block.index.to_numpy()
        parts.append(
            {
                "label": model_label(model) + (f", {dataset}" if several else ""),
                "effect": float(observed_P[at].mean()),
                **interval_ends(replicates_BP[:, at].mean(axis=1), level),
            }
        )
    return parts


# ------------------------------------------------------------------------------------------------------------ sentences


def _blank(name: str, statement: str, rule: str, unit: str, threshold: tuple[float, float]) -> dict:
    low, high = threshold
    return {
        "id": name,
        "statement": statement,
        "rule": rule,
        "unit": unit,
        "threshold_low": low,
        "threshold_high": high,
        "effect": math.nan,
        "ci_low": math.nan,
        "ci_high": math.nan,
        "ci_level": math.nan,
        "p": math.nan,
        "test": "",
        "n_images": 0,
        "n_models": 0,
        "n_comparisons": 0,
        "sentence": "",
        "reason": "",
        "parts": [],
    }


def _not_tested(answer: dict, reason: str) -> dict:
    return {**answer, "verdict": "not tested", "reason": reason, "sentence": f"Not tested: {reason}."}


def _decided(
    answer: dict,
    verdict: str,
    effect: float,
    low: float,
    high: float,
    level: float,
    p: float,
    test: str,
    pairs: pd.DataFrame,
    study: JointBootstrap,
    sentence: str,
    parts: list[dict],
) -> dict:
    return {
        **answer,
        "verdict": verdict,
        "effect": effect,
        "ci_low": low,
        "ci_high": high,
        "ci_level": level,
        "p": p,
        "test": test,
        "n_images": sum(study.test_sets[name].n for name in pairs["dataset"].unique()),
        "n_models": int(pairs["model"].nunique()),
        "n_comparisons": len(pairs),
        "sentence": sentence,
        "parts": parts,
    }


def _points(value: float) -> str:
    return f"{value:+.2f}"


def _ci(low: float, high: float, level: float) -> str:
    return f"{level * 100:.4g} % interval {low:+.2f} to {high:+.2f}"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _zero(low: float, high: float) -> str:
    return "; the interval includes zero" if low <= 0 <= high else ""


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" + ("" if n == 1 else "s")


def _and(names: Sequence[str]) -> str:
    names = [str(name) for name in names]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else "none"
