"""Hypotheses as decision rules, computed from predictions: supported, contradicted, inconclusive or not tested.

A hypothesis is one claim or several, written in the config (`analysis.hypotheses`; the default ones are
HYPOTHESES): which cells are compared with which, in which metric, and above or below what the effect shall lie.
contrasts.py says how the effects are computed; here they are decided upon.

What the intervals cover. All models of a data set are measured on the same test images, so images are resampled jointly
for all of them (a paired bootstrap, stratified by group: the group sizes are those of the test set). The intervals are
over images, given these models, seeds and groups: they do not say what other training seeds or other architectures
would have done. Claims that speak of models, groups or trainings in general (`by`) therefore ask for a permutation test
over them as well, and gaps between groups for one that swaps the two models' predictions image by image. Both must
agree before a rule says anything but "inconclusive". Gaps of models that give one class to nearly every image are left
out: they say nothing about fairness.

No difference seen is not no difference: where two models give the same answers to the few images there are, every
replicate is 0. So each rate is resampled as if two images more had been gained and two more lost, in all models at once
(the two successes and two failures of Agresti & Coull 1998, among the discordant pairs as in Bonett & Price 2012): of
20,000 images that is nothing, of 100 it keeps the interval as wide as 100 images deserve.

Decisions, at the claim's level 1 - alpha:

one bound       supported where the interval of that level lies on the claim's side of the bound, contradicted where it
                lies on the other side
two bounds      the same with the interval of level 1 - 2 alpha: the two one-sided tests (TOST) of equivalence
several claims  supported where all are (an intersection-union test), contradicted where one is

`p` is that of the side on which the effect lies: of "the effect is not as claimed" (two-sided for one bound; the larger
one of TOST; the largest of several claims), or, where it lies outside, of "it is as claimed" (for several claims the
smallest times their number). Where a permutation must agree with the interval it is the larger of both p. `p_holm` is
Holm's correction over the hypotheses that were tested; a decision that does not survive it says so in its sentence.

Seconds (`seconds_ratio`) decide by their geometric mean over the pairs alone, and their numbers go into costs.csv, not
into the verdicts: the same work takes another time when it is done again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from analysis.contrasts import (
    Effects,
    Pool,
    Ticket,
    Untestable,
    ask_for_pairs,
    describe_reference,
    pairs_of,
    study_of,
    undefined,
)
from analysis.result_rows import model_label, with_labels
from analysis.wording import (
    and_list,
    bound_inside,
    bound_text,
    cells_of,
    count,
    interval_text,
    lead,
    left_out,
    noun,
    p_text,
    points,
    rule,
    test_name,
    unit,
)
from sections.analysis import GAP_METRICS, Claim, Hypothesis
from significance.intervals import holm
from significance.joint_bootstrap import (
    JointBootstrap,
    TestSet,
    equal_weights,
    interval_ends,
    nan_mean,
    percentile_interval,
)
from store import seed_for

SIZE_RATIO = 1.2  # by size: the largest is at least so much larger than the smallest, else there is nothing to compare
UNSEEN = 2  # images more gained, and as many lost, in each rate
MAX_PERMUTATIONS = 5040  # all of them where they are no more, else so many random ones
VERDICTS = ("supported", "contradicted", "inconclusive", "not tested")
COLUMNS = (
    "id", "statement", "verdict", "effect", "ci_low", "ci_high", "ci_level", "threshold_low", "threshold_high", "p",
    "p_holm", "test", "unit", "n_images", "n_models", "n_seeds", "n_comparisons", "sentence", "rule", "reason", "parts",
    "config",
)  # fmt: skip
COST_COLUMNS = (
    "hypothesis", "dataset", "model", "seed", "cell", "reference", "seconds", "reference_seconds", "seconds_ratio",
)  # fmt: skip
CHANGE_COLUMNS = (
    "dataset", "model", "setting", "setting_order", "width", "n_seeds", "n_images", "accuracy", "change", "ci_low",
    "ci_high",
)  # fmt: skip


@dataclass
class Asked:
    """A claim whose sums over images have been asked for."""

    claim: Claim
    pairs: pd.DataFrame
    ticket: Ticket | None = None
    n_undefined: int = 0
    n_collapsed: int = 0
    details: dict = field(default_factory=dict)


@dataclass
class Found:
    """What the data say about one claim."""

    verdict: str
    pairs: pd.DataFrame
    sentence: str = ""
    reason: str = ""
    effect: float = math.nan
    low: float = math.nan
    high: float = math.nan
    level: float = math.nan
    p_for: float = math.nan  # of "the effect is not as claimed"
    p_against: float = math.nan  # of "the effect is as claimed"
    parts: list[dict] = field(default_factory=list)


def evaluate(
    rows: pd.DataFrame,
    test_sets: Mapping[str, TestSet],
    hypotheses: Sequence[Hypothesis],
    replicates: int,
    level: float,
) -> pd.DataFrame:
    """One row a hypothesis, columns `COLUMNS`. `rows` are the finished cells; their predictions are in `test_sets`."""
    study = study_of(rows, test_sets, replicates, level)
    effects = {name: Effects(test_set) for name, test_set in test_sets.items()}
    pool = Pool(study)
    asked = [[_ask(study, effects, pool, claim) for claim in hypothesis.claims] for hypothesis in hypotheses]
    pool.draw()
    found = []
    for hypothesis, claims in zip(hypotheses, asked, strict=True):
        found.append(_row(study, hypothesis, [_find(study, hypothesis.id, each) for each in claims]))
    return _corrected(pd.DataFrame(found, columns=list(COLUMNS)), level)


def costs(rows: pd.DataFrame, test_sets: Mapping[str, TestSet], hypotheses: Sequence[Hypothesis]) -> pd.DataFrame:
    """Seconds of the pairs that claims about seconds_ratio compare: one row a pair, columns `COST_COLUMNS`."""
    study = study_of(rows, test_sets, 0, 0.95)
    tables = []
    for hypothesis in hypotheses:
        for claim in hypothesis.claims:
            if claim.metric == "seconds_ratio":
                try:
                    pairs = _with_seconds(study, pairs_of(study, claim))
                except Untestable:
                    continue
                tables.append(pairs.assign(hypothesis=hypothesis.id)[list(COST_COLUMNS)])
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=list(COST_COLUMNS))


def accuracy_changes(
    rows: pd.DataFrame, test_sets: Mapping[str, TestSet], replicates: int, level: float
) -> pd.DataFrame:
    """Accuracy against FP32 of each (data set, model, setting), mean over its seeds, in points, with paired intervals.
    They have the unseen images of the module's docstring, so that those of few images are not points.

    Columns: dataset, model, setting, setting_order, width, n_seeds, n_images, accuracy (share), change, ci_low,
    ci_high.
    """
    study = JointBootstrap(with_labels(rows).reset_index(drop=True), test_sets, replicates, level)
    pairs = study.pairs(study.rows)
    if pairs.empty:
        return pd.DataFrame(columns=list(CHANGE_COLUMNS))
    observed_P, replicates_BP = study.changes(pairs)
    found = []
    keys = ["dataset", "model", "setting", "setting_order", "width"]
    for key, block in pairs.groupby(keys, sort=False):
        at = block.index.to_numpy()
        test_set = test_sets[key[0]]
        unseen_B = 100 / test_set.n * _unseen_images(1, replicates, *map(str, key))
        low, high = percentile_interval(replicates_BP[:, at].mean(axis=1) + unseen_B, level)
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


# --------------------------------------------------------------------------------------------- what a claim needs drawn


def _ask(study: JointBootstrap, effects: Mapping[str, Effects], pool: Pool, claim: Claim) -> Asked | Found:
    """The claim with its sums asked for; why it is not tested, where it cannot be."""
    try:
        pairs = pairs_of(study, claim)
        n_collapsed = 0
        if claim.metric in GAP_METRICS:
            collapsed = [
                any(study.test_sets[pair.dataset].is_collapsed(cell) for cell in (pair.cell, pair.reference))
                for pair in pairs.itertuples()
            ]
            n_collapsed, pairs = sum(collapsed), pairs[[not flag for flag in collapsed]].reset_index(drop=True)
            if pairs.empty:
                raise Untestable("in every pair a model gives one class to nearly every image, which has no gap")
        asked = Asked(claim, pairs, n_collapsed=n_collapsed, details={"effects": effects})
        if claim.metric == "seconds_ratio":
            asked.pairs = _with_seconds(study, pairs)
        elif claim.by == "group_size":
            _ask_by_group_size(study, pool, asked)
        elif not _is_swapped(claim):
            asked.pairs, asked.ticket, asked.n_undefined = ask_for_pairs(pool, effects, pairs, claim.metric)
            if claim.by == "model_size":
                _check_model_sizes(study, asked)
            if claim.by == "architecture":
                _check_blocks(study, asked)
        return asked
    except Untestable as why:
        return Found("not tested", pd.DataFrame(), reason=str(why))


def _is_swapped(claim: Claim) -> bool:
    """Whether the permutation test is that of the two models' predictions."""
    return claim.is_permuted and claim.by is None


def _level(study: JointBootstrap, claim: Claim) -> float:
    """Of the interval that decides."""
    level = claim.level or study.level
    return round(1 - 2 * (1 - level), 10) if None not in (claim.above, claim.below) else level


def _alpha(study: JointBootstrap, claim: Claim) -> float:
    return 1 - (claim.level or study.level)


def _with_seconds(study: JointBootstrap, pairs: pd.DataFrame) -> pd.DataFrame:
    """The pairs with the seconds of both cells; those without a time are left out."""
    columns = [study.rows[name] for name in ("calibration_seconds", "training_seconds") if name in study.rows]
    if not columns:
        raise Untestable("the rows have no seconds of calibration or training")
    seconds = pd.concat(columns, axis=1).astype(float).sum(axis=1, min_count=1)
    of_cell = dict(zip(study.rows["cell"], seconds, strict=True))
    pairs = pairs.assign(seconds=pairs["cell"].map(of_cell), reference_seconds=pairs["reference"].map(of_cell))
    pairs = pairs[(pairs["seconds"] > 0) & (pairs["reference_seconds"] > 0)].reset_index(drop=True)
    if pairs.empty:
        raise Untestable("no pair of cells has seconds of calibration or training")
    return pairs.assign(seconds_ratio=pairs["seconds"] / pairs["reference_seconds"])


def _check_model_sizes(study: JointBootstrap, asked: Asked) -> None:
    pairs = asked.pairs
    fp32_size = dict(zip(study.rows["cell"], study.rows["size_mb"].astype(float), strict=True))
    sizes = pairs["baseline_cell"].map(fp32_size)
    mean = sizes.where(sizes > 0).groupby(pairs["model"], sort=False).mean().dropna()
    needed = _fewest(1 - _alpha(study, asked.claim))
    if len(mean) < needed:
        raise Untestable(f"needs at least {needed} models with a known FP32 size, there are {len(mean)}")
    if mean.max() / mean.min() < SIZE_RATIO:
        raise Untestable("the models are about the same size")
    asked.details["size"] = mean


def _check_blocks(study: JointBootstrap, asked: Asked) -> None:
    """Blocks of the test of architectures: trainings, each a (data set, seed), that have the same models."""
    pairs = asked.pairs
    blocks = list(dict.fromkeys(zip(pairs["dataset"], pairs["seed"], strict=True)))
    if len(blocks) < 2:
        raise Untestable("one seed only: what an architecture does cannot be told from what its one training does")
    of_block = [
        set(pairs.loc[(pairs["dataset"] == dataset) & (pairs["seed"] == seed), "model"]) for dataset, seed in blocks
    ]
    models = [model for model in dict.fromkeys(pairs["model"]) if all(model in among for among in of_block)]
    orders = math.factorial(len(models)) ** (len(blocks) - 1)
    if len(models) < 2 or 1 / orders > _alpha(study, asked.claim) + 1e-12:
        raise Untestable(
            f"{count(len(models), 'model')} in {count(len(blocks), 'training')} each: too few orders for a "
            "permutation test"
        )
    asked.details |= {"blocks": blocks, "models": models}


def _ask_by_group_size(study: JointBootstrap, pool: Pool, asked: Asked) -> None:
    """One column a group: the mean over models of what it loses."""
    claim, pairs = asked.claim, asked.pairs
    needed = _fewest(1 - _alpha(study, claim))
    sign = 1 if claim.metric == "accuracy_loss" else -1
    usable, reasons, blocks = [], [], []
    for name in pairs["dataset"].unique():
        test_set = study.test_sets[name]
        groups = test_set.eligible(test_set.intersection_N, test_set.intersection_names)
        n_G = np.bincount(test_set.intersection_N)[groups]
        if len(groups) < needed:
            reasons.append(f"{name} has {count(len(groups), 'large enough group')}, at least {needed} are needed")
            continue
        if n_G.max() / n_G.min() < SIZE_RATIO:
            reasons.append(f"the groups of {name} are about the same size")
            continue
        block = pairs[pairs["dataset"] == name].reset_index(drop=True)
        loss_N = np.zeros(test_set.n)
        for row, weight in zip(block.itertuples(), equal_weights(block), strict=True):
            loss_N += weight * (test_set.correct(row.reference).astype(float) - test_set.correct(row.cell))
        member_NG = test_set.intersection_N[:, None] == groups
        blocks.append((name, 100 * sign * loss_N[:, None] * member_NG / n_G))
        usable.append((name, groups, n_G))
    if not usable:
        raise Untestable("; ".join(reasons))
    asked.pairs = pairs[pairs["dataset"].isin([name for name, _, _ in usable])].reset_index(drop=True)
    asked.ticket = pool.ask(blocks)
    asked.details |= {"usable": usable, "left_out": reasons}


# ---------------------------------------------------------------------------------------------- what the data say of it


def _find(study: JointBootstrap, name: str, asked: Asked | Found) -> Found:
    if isinstance(asked, Found):
        return asked
    try:
        if asked.claim.metric == "seconds_ratio":
            return _seconds(asked)
        if asked.claim.by is not None:
            by = {"model_size": _by_model_size, "group_size": _by_group_size, "architecture": _by_architecture}
            return by[asked.claim.by](study, name, asked)
        return _swapped(study, name, asked) if _is_swapped(asked.claim) else _mean_effect(study, asked)
    except Untestable as why:
        return Found("not tested", pd.DataFrame(), reason=str(why))


def _mean_effect(study: JointBootstrap, asked: Asked) -> Found:
    """The mean over models, decided by its interval."""
    claim, pairs, observed_P = asked.claim, asked.pairs, asked.ticket.observed_C
    replicates_BP, weights_P = asked.ticket.replicates_BC, equal_weights(asked.pairs)
    unseen_B = _unseen(asked, weights_P, study.replicates)
    found = _decide(study, claim, float(observed_P @ weights_P), replicates_BP @ weights_P + unseen_B, pairs)
    found.parts = _parts(
        pairs, observed_P, replicates_BP, found.level, lambda weights_P: _unseen(asked, weights_P, study.replicates)
    )
    chosen = _worst_groups(study, asked) if claim.metric == "worst_group_excess_loss" else ()
    alone = ""
    if None not in (claim.above, claim.below) and len(found.parts) > 1:
        between = f"between {bound_text(claim.above)} and {bound_text(claim.below)}"
        outside = [
            part["label"]
            for part in found.parts
            if not (claim.above < part["ci_low"] and part["ci_high"] < claim.below)
        ]
        verb = "is" if len(outside) == 1 else "are"
        alone = f"; each taken alone stays {between} too"
        if outside:
            alone = f"; taken alone, {and_list(outside)} {verb} not shown to stay {between}"
    found.sentence = f"{lead(claim, pairs, found.effect, chosen)} {_interval(asked, found, then=alone)}"
    return found


def _unseen(asked: Asked, weights_P: np.ndarray, replicates: int) -> np.ndarray:
    """(B,) what the images that might as well have been gained and lost add to the replicates of a weighted mean of
    pairs: see the module's docstring."""
    added_B = np.zeros(replicates)
    for dataset, block in asked.pairs.groupby("dataset", sort=False):
        unit, n_rates = asked.details["effects"][dataset].one_image(asked.claim.metric)
        images_B = _unseen_images(n_rates, replicates, dataset, asked.claim.metric)
        added_B += weights_P[block.index.to_numpy()].sum() * unit * images_B
    return added_B


def _unseen_images(n_rates: int, replicates: int, *names: str) -> np.ndarray:
    """(B,) of `UNSEEN` images gained and as many lost in each rate: those gained - those lost, resampled."""
    gained_B, lost_B = np.random.default_rng(seed_for("analysis", "unseen", *names)).poisson(
        UNSEEN * n_rates, (2, replicates)
    )
    return gained_B - lost_B


def _worst_groups(study: JointBootstrap, asked: Asked) -> list[str]:
    """Names of the groups that were chosen as the references' worst."""
    chosen = {
        str(study.test_sets[pair.dataset].group_names[g])
        for pair in asked.pairs.itertuples()
        for g in asked.details["effects"][pair.dataset].worst_groups(pair.reference)
    }
    return sorted(chosen)


def _swapped(study: JointBootstrap, name: str, asked: Asked) -> Found:
    """A gap's mean over pairs, decided by its interval and by swapping predictions."""
    claim, pairs = asked.claim, asked.pairs
    observed_P, replicates_BP, permuted_BP = study.gap_changes(pairs, claim.metric, name)
    defined = ~np.isnan(observed_P)
    if not defined.any():
        raise Untestable(undefined(claim.metric, study, pairs))
    asked.n_undefined = int((~defined).sum())
    pairs, observed_P = pairs[defined].reset_index(drop=True), observed_P[defined]
    asked.pairs = pairs
    replicates_BP, weights_P = replicates_BP[:, defined], equal_weights(pairs)
    null_B = nan_mean(permuted_BP[:, defined], weights_P)
    found = _decide(study, claim, float(observed_P @ weights_P), nan_mean(replicates_BP, weights_P), pairs)
    p_lower, p_upper = _share_at_least(-null_B, -found.effect), _share_at_least(null_B, found.effect)
    _agree(study, claim, found, p_lower, p_upper, min(1.0, 2 * min(p_lower, p_upper)))
    found.parts = _parts(pairs, observed_P, replicates_BP, found.level)
    p = f", paired permutation p = {p_text(min(found.p_for, found.p_against))}"
    found.sentence = f"{lead(claim, pairs, found.effect)} {_interval(asked, found, p)}"
    return found


def _by_model_size(study: JointBootstrap, name: str, asked: Asked) -> Found:
    """The slope of the models' effects on log2 of their FP32 size."""
    claim, pairs, size = asked.claim, asked.pairs, asked.details["size"]
    of_model_PM = np.stack([equal_weights(pairs, pairs["model"] == model) for model in size.index], axis=1)
    effect_M, effect_BM = asked.ticket.observed_C @ of_model_PM, asked.ticket.replicates_BC @ of_model_PM
    x_M = np.log2(size.to_numpy())
    found = _decide(study, claim, float(effect_M @ _slope_weights(x_M)), effect_BM @ _slope_weights(x_M), pairs)
    null = np.array([effect_M @ _slope_weights(x) for x in _permutations(x_M, name)])
    p = _agree_by_permutation(study, claim, found, null)
    found.parts = [
        {
            "label": f"{model_label(model)} ({mb:.3g} MB)",
            "effect": float(effect_M[m]),
            **interval_ends(effect_BM[:, m], found.level),
        }
        for m, (model, mb) in enumerate(size.items())
    ]
    found.sentence = (
        f"Over {count(len(size), 'model')} from {size.min():.3g} to {size.max():.3g} MB, the {noun(claim)} at "
        f"{cells_of(pairs, claim)} changes by {points(found.effect)} points per doubling of the FP32 size "
        f"{_interval(asked, found, ' over images' + p)}"
    )
    return found


def _by_group_size(study: JointBootstrap, name: str, asked: Asked) -> Found:
    """The mean over data sets of the slope of the groups' effects on -log2 of their share."""
    claim, usable, level = asked.claim, asked.details["usable"], _level(study, asked.claim)
    slopes, slopes_B, nulls, parts, first = [], [], [], [], 0
    for dataset, groups, n_G in usable:
        test_set = study.test_sets[dataset]
        at = slice(first, first + len(groups))
        first += len(groups)
        effect_G, effect_BG = asked.ticket.observed_C[at], asked.ticket.replicates_BC[:, at]
        x_G = -np.log2(n_G / test_set.n)
        slopes.append(effect_G @ _slope_weights(x_G))
        slopes_B.append(effect_BG @ _slope_weights(x_G))
        nulls.append([effect_G @ _slope_weights(x) for x in _permutations(x_G, name, dataset)])
        prefix = f"{dataset}: " if len(usable) > 1 else ""
        parts += [
            {
                "label": f"{prefix}{test_set.intersection_names[g]} (n = {n})",
                "effect": float(effect_G[i]),
                **interval_ends(effect_BG[:, i], level),
            }
            for i, (g, n) in enumerate(zip(groups, n_G, strict=True))
        ]
    found = _decide(study, claim, float(np.mean(slopes)), np.mean(slopes_B, axis=0), asked.pairs)
    null = np.array(nulls[0])
    if len(nulls) > 1:  # data sets are permuted independently of each other
        generator = np.random.default_rng(seed_for("analysis", name, "combine"))
        null = np.mean([generator.choice(values, MAX_PERMUTATIONS) for values in nulls], axis=0)
        null = np.append(null, found.effect)  # the observed order is one of them: p is never 0
    p = _agree_by_permutation(study, claim, found, null)
    found.parts = parts
    found.sentence = (
        f"Over {count(len(parts), 'group')} and {count(asked.pairs['model'].nunique(), 'model')}, the {noun(claim)} at "
        f"{cells_of(asked.pairs, claim)} changes by {points(found.effect)} points per halving of the group's size "
        f"{_interval(asked, found, ' over images' + p)}"
    )
    if asked.details["left_out"]:
        found.sentence += f" Left out: {'; '.join(asked.details['left_out'])}."
    return found


def _by_architecture(study: JointBootstrap, name: str, asked: Asked) -> Found:
    """Mean correlation, over pairs of trainings, of the models' effects; permuted: which model is which in a training.

    1: the models lose in the same proportions whatever the seed; 0: what one training of an architecture loses says
    nothing about another.
    """
    claim, pairs, level = asked.claim, asked.pairs, _level(study, asked.claim)
    blocks, models = asked.details["blocks"], asked.details["models"]
    weights_PKM = np.stack(
        [
            np.stack([_mean_weights(pairs, model=model, dataset=d, seed=seed) for model in models], axis=-1)
            for d, seed in blocks
        ],
        axis=1,
    )
    effect_KM = np.einsum("p,pkm->km", asked.ticket.observed_C, weights_PKM)
    effect_BKM = np.einsum("bp,pkm->bkm", asked.ticket.replicates_BC, weights_PKM, optimize=True)
    if np.isnan(_mean_correlation(effect_KM)):
        raise Untestable("in a training all models lose the same")
    found = _decide(study, claim, float(_mean_correlation(effect_KM)), _mean_correlation(effect_BKM), pairs)
    p = _agree_by_permutation(study, claim, found, _mean_correlation(_permuted_blocks(effect_KM, name)))
    found.parts = [
        {
            "label": model_label(model),
            "effect": float(effect_KM[:, m].mean()),
            **interval_ends(effect_BKM[:, :, m].mean(axis=1), level),
        }
        for m, model in enumerate(models)
    ]
    found.sentence = (
        f"Between {count(len(blocks), 'training')} of {count(len(models), 'model')}, the {noun(claim)} at "
        f"{cells_of(pairs, claim)} correlates by {points(found.effect)} {_interval(asked, found, ' over images' + p)}"
    )
    return found


def _seconds(asked: Asked) -> Found:
    claim, pairs = asked.claim, asked.pairs
    ratio = float(np.exp(np.log(pairs["seconds_ratio"]).mean()))
    is_claimed = (claim.above is None or ratio > claim.above) and (claim.below is None or ratio < claim.below)
    bounds = [f"more than {claim.above:g}"] if claim.above is not None else []
    bounds += [f"less than {claim.below:g}"] if claim.below is not None else []
    sentence = (
        f"In {count(len(pairs), 'pair')} it takes {'' if is_claimed else 'not '}{and_list(bounds)} times the "
        f"seconds of {describe_reference(claim)} (geometric mean; costs.csv has them)."
    )
    return Found("supported" if is_claimed else "contradicted", pairs, sentence)


def _interval(asked: Asked, found: Found, more: str = "", then: str = "") -> str:
    """The end of a sentence: the interval, the bound that it includes, and the pairs that do not count."""
    told = interval_text(found.low, found.high, found.level) + more
    includes = bound_inside(asked.claim, found.low, found.high)
    return f"({told}){includes}{then}.{left_out(asked.n_collapsed, asked.n_undefined)}"


# ------------------------------------------------------------------------------------------------------------ decisions


def _decide(study: JointBootstrap, claim: Claim, effect: float, values_B: np.ndarray, pairs: pd.DataFrame) -> Found:
    """What the interval alone says; the two p-values are those of its two one-sided tests."""
    level = _level(study, claim)
    low, high = percentile_interval(values_B, level)
    above = -math.inf if claim.above is None else claim.above
    below = math.inf if claim.below is None else claim.below
    verdict = "supported" if above < low and high < below else "inconclusive"
    if high < above or low > below:
        verdict = "contradicted"
    p_below_above = _share_at_least(-values_B, -above)  # of values at or under the lower bound
    p_above_below = _share_at_least(values_B, below)
    p_for = max(p for p, bound in ((p_below_above, above), (p_above_below, below)) if math.isfinite(bound))
    inside = [_share_at_least(values_B, above) if math.isfinite(above) else 1.0]
    inside += [_share_at_least(-values_B, -below) if math.isfinite(below) else 1.0]
    p_against = min(inside)
    if not (math.isfinite(above) and math.isfinite(below)):  # the interval of one bound is two-sided
        p_for, p_against = min(1.0, 2 * p_for), min(1.0, 2 * p_against)
    return Found(verdict, pairs, "", "", effect, low, high, level, p_for, p_against)


def _agree(study: JointBootstrap, claim: Claim, found: Found, p_lower: float, p_upper: float, p: float) -> None:
    """Keep the verdict only if the one-sided permutation test on its side agrees; p becomes the larger of both."""
    side = p_upper if found.effect >= 0 else p_lower
    if side > _alpha(study, claim) + 1e-12:
        found.verdict = "inconclusive"
    above = -math.inf if claim.above is None else claim.above
    is_as_claimed = above < found.effect < (math.inf if claim.below is None else claim.below)
    if is_as_claimed:
        found.p_for, found.p_against = max(p, found.p_for), 1.0
    else:
        found.p_for, found.p_against = 1.0, max(p, found.p_against)


def _agree_by_permutation(study: JointBootstrap, claim: Claim, found: Found, null: np.ndarray) -> str:
    """The same for a permutation of models, groups or trainings; what the sentence says of it."""
    if not claim.is_permuted:
        return ""
    p_lower, p_upper = np.mean(null <= found.effect + 1e-12), np.mean(null >= found.effect - 1e-12)
    p = min(1.0, float(np.mean(np.abs(null) >= abs(found.effect) - 1e-12)))
    _agree(study, claim, found, float(p_lower), float(p_upper), p)
    over = {"model_size": "models", "group_size": "groups", "architecture": "models in each training"}[claim.by]
    return f"; permutation over {over} p = {p_text(p)}"


def _row(study: JointBootstrap, hypothesis: Hypothesis, found: list[Found]) -> dict:
    """A hypothesis from its claims; effect, interval and parts are those of the first."""
    first = found[0]
    untested = next((each for each in found if each.verdict == "not tested"), None)
    verdicts = [each.verdict for each in found]
    if first.verdict == "not tested" or (untested is not None and "contradicted" not in verdicts):
        verdict = "not tested"
    elif "contradicted" in verdicts:
        verdict = "contradicted"
    else:
        verdict = "supported" if set(verdicts) == {"supported"} else "inconclusive"
    with_p = [each for each in found if not math.isnan(each.p_for)]
    p = math.nan
    if verdict != "not tested" and with_p:
        is_claimed = all(each.p_for <= each.p_against for each in with_p)
        p = max(each.p_for for each in with_p)
        if not is_claimed:
            p = min(1.0, len(with_p) * min(each.p_against for each in with_p))
    reason = "" if untested is None else untested.reason
    pairs = first.pairs
    if verdict == "not tested":
        first, pairs, sentence = Found("not tested", pd.DataFrame()), None, f"Not tested: {reason}."
    else:
        sentence = " ".join(
            f"Not tested in it: {each.reason}." if each.verdict == "not tested" else each.sentence for each in found
        )
    claim = hypothesis
    return {
        "id": hypothesis.id,
        "statement": hypothesis.statement,
        "verdict": verdict,
        "effect": first.effect,
        "ci_low": first.low,
        "ci_high": first.high,
        "ci_level": first.level,
        "threshold_low": claim.below if claim.above is None else claim.above,
        "threshold_high": claim.above if claim.below is None else claim.below,
        "p": p,
        "p_holm": math.nan,
        "test": test_name(claim) if verdict != "not tested" else "",
        "unit": unit(claim),
        "n_images": 0 if pairs is None else sum(study.test_sets[name].n for name in pairs["dataset"].unique()),
        "n_models": 0 if pairs is None else int(pairs["model"].nunique()),
        "n_seeds": 0 if pairs is None else int(pairs["seed"].nunique()),
        "n_comparisons": 0 if pairs is None else len(pairs),
        "sentence": sentence,
        "rule": "; and ".join(rule(each, _level(study, each)) for each in hypothesis.claims),
        "reason": reason,
        "parts": first.parts,
        "config": hypothesis.model_dump(mode="json"),
    }


def _corrected(table: pd.DataFrame, level: float) -> pd.DataFrame:
    """With p_holm, and the decisions that do not survive it named in their sentences."""
    tested = table.index[table["p"].notna()]
    table.loc[tested, "p_holm"] = holm(table.loc[tested, "p"].to_numpy(dtype=float))
    for i in tested:
        if table.loc[i, "verdict"] in ("supported", "contradicted") and table.loc[i, "p_holm"] > 1 - level + 1e-12:
            table.loc[i, "sentence"] += (
                f" Corrected for {len(tested)} hypotheses (Holm), p = {p_text(table.loc[i, 'p_holm'])}: that much can "
                "be chance among so many."
            )
    return table


def _share_at_least(values_B: np.ndarray, bound: float) -> float:
    """A Monte-Carlo p-value: the share of values >= bound, the observation counted among them so that it is never 0."""
    values_B = values_B[~np.isnan(values_B)]
    return float((1 + np.sum(values_B >= bound - 1e-12)) / (1 + len(values_B)))


def _slope_weights(x: np.ndarray) -> np.ndarray:
    """Weights w with w @ y = the least-squares slope of y on x."""
    centred = x - x.mean()
    return centred / np.sum(centred**2)


def _mean_weights(pairs: pd.DataFrame, **where) -> np.ndarray:
    is_in = np.logical_and.reduce([pairs[name].to_numpy() == value for name, value in where.items()])
    return is_in / is_in.sum()


def _mean_correlation(effect_KM: np.ndarray) -> np.ndarray:
    """Mean over the pairs of blocks of Pearson's correlation over models: (..., K, M) -> (...); NaN without spread."""
    centred = effect_KM - effect_KM.mean(axis=-1, keepdims=True)
    norm = np.sqrt(np.sum(centred**2, axis=-1, keepdims=True))
    with np.errstate(invalid="ignore", divide="ignore"):
        unit = np.where(norm > 1e-9, centred / norm, np.nan)
    k = effect_KM.shape[-2]
    return (np.sum(np.sum(unit, axis=-2) ** 2, axis=-1) - k) / (k * (k - 1))


def _permuted_blocks(effect_KM: np.ndarray, name: str) -> np.ndarray:
    """(R, K, M): the models of every block but the first in other orders, all of them where they are few."""
    k, m = effect_KM.shape
    if math.factorial(m) ** (k - 1) <= MAX_PERMUTATIONS:
        orders = np.array(list(itertools.permutations(range(m))))
        chosen = np.array(list(itertools.product(range(len(orders)), repeat=k - 1)))
        order_RKM = orders[chosen]
    else:
        generator = np.random.default_rng(seed_for("analysis", "permutations", name))
        order_RKM = generator.permuted(np.tile(np.arange(m), (MAX_PERMUTATIONS, k - 1, 1)), axis=-1)
        order_RKM[0] = np.arange(m)
    moved = np.take_along_axis(np.broadcast_to(effect_KM[1:], (len(order_RKM), k - 1, m)), order_RKM, axis=-1)
    return np.concatenate([np.broadcast_to(effect_KM[:1], (len(moved), 1, m)), moved], axis=1)


def _permutations(x: np.ndarray, *names: str) -> np.ndarray:
    """All permutations of x where they are few, else random ones."""
    if math.factorial(len(x)) <= MAX_PERMUTATIONS:
        return x[np.array(list(itertools.permutations(range(len(x)))))]
    generator = np.random.default_rng(seed_for("analysis", "permutations", *names))
    return np.stack([x, *(generator.permutation(x) for _ in range(MAX_PERMUTATIONS - 1))])


def _fewest(level: float) -> int:
    """The smallest number of models or groups whose permutation test can reach p <= alpha: 4 at alpha = 0.05."""
    return next(k for k in range(2, 20) if 1 / math.factorial(k) <= 1 - level + 1e-12)


def _parts(pairs: pd.DataFrame, observed_P, replicates_BP, level: float, unseen=None) -> list[dict]:
    """Effect and interval of each model, or, where there are several, of each width; `unseen(weights_P)` is added to
    the replicates."""
    by_width = pairs["width"].nunique() > 1
    several = pairs["dataset"].nunique() > 1
    keys = ["width"] if by_width else ["dataset", "model"]
    blocks = list(pairs.groupby(keys, sort=False))
    if by_width:
        blocks.sort(key=lambda item: item[1]["setting_order"].min())
    parts = []
    for key, block in blocks:
        at, weights = block.index.to_numpy(), equal_weights(block)
        label = key[0] if by_width else model_label(key[1]) + (f", {key[0]}" if several else "")
        values_B = nan_mean(replicates_BP[:, at], weights)
        if unseen is not None:
            of_all_P = np.zeros(len(pairs))
            of_all_P[at] = weights
            values_B = values_B + unseen(of_all_P)
        parts.append({"label": label, "effect": float(observed_P[at] @ weights), **interval_ends(values_B, level)})
    return parts
