"""What is said of a claim: its rule, unit and test in words, and the sentence about what was found (hypotheses.py)."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from analysis.contrasts import describe, describe_reference
from sections.analysis import GAP_METRICS, Claim

UNITS = {"accuracy_loss": "points of accuracy lost", "worst_group_excess_loss": "points of accuracy lost"}


def lead(claim: Claim, pairs: pd.DataFrame, effect: float, worst_groups: Sequence[str] = ()) -> str:
    """'Over 2 models, W8A8 static (mse) changes accuracy by -0.31 points against FP32'."""
    cells, reference = cells_of(pairs, claim), describe_reference(claim)
    over = count(pairs["model"].nunique(), "model")
    if claim.metric in GAP_METRICS or pairs["width"].nunique() > 1:
        widths = sorted(
            pairs["width"].unique(), key=lambda width: pairs.loc[pairs["width"] == width, "setting_order"].min()
        )
        over = f"{count(len(pairs), 'pair')} ({and_list(widths)})"
    if claim.metric == "worst_group_excess_loss":
        return (
            f"At {cells} the group with the lowest {reference} accuracy ({and_list(worst_groups)}) loses "
            f"{abs(effect):.2f} points {'more' if effect >= 0 else 'less'} than the average image, over {over}"
        )
    if claim.metric == "accuracy_loss":
        return f"Over {over}, {cells} loses {points(effect)} points of accuracy against {reference}"
    return f"Over {over}, {cells} changes {_article(noun(claim))} by {points(effect)} points against {reference}"


def noun(claim: Claim) -> str:
    """The metric in words."""
    named = {
        "accuracy_loss": "accuracy lost",
        "worst_group_accuracy": "worst group's accuracy",
        "worst_group_excess_loss": "worst group's excess loss",
    }
    name = named.get(claim.metric, claim.metric.replace("_", " "))
    return name.replace("equalized odds", "equalized-odds")


def _article(noun: str) -> str:
    return noun if noun == "accuracy" else f"the {noun}"


def cells_of(pairs: pd.DataFrame, claim: Claim) -> str:
    """The setting where there is one, else what the claim says."""
    return pairs["setting"].iloc[0] if pairs["setting"].nunique() == 1 else describe(claim.cells)


def unit(claim: Claim) -> str:
    if claim.by == "architecture":
        return "correlation between trainings"
    if claim.by is None:
        return UNITS.get(claim.metric, f"points of {noun(claim)}")
    per = "doubling" if claim.by == "model_size" else "halving"
    what = "loss" if claim.metric == "accuracy_loss" else noun(claim)
    return f"points of {what} per {per} of size"


def test_name(claim: Claim) -> str:
    """What decides."""
    if claim.by is not None and claim.is_permuted:
        over = {"model_size": "sizes over models", "group_size": "sizes over groups", "architecture": "models"}
        return f"permutation of {over[claim.by]}, and bootstrap over images"
    if claim.is_permuted:
        return "paired permutation over images"
    fitted = ", cross-fitted" if claim.metric not in ("accuracy", "accuracy_loss") else ""
    return f"{'TOST, ' if None not in (claim.above, claim.below) else ''}paired bootstrap over images{fitted}"


def rule(claim: Claim, level: float) -> str:
    """The claim as a decision rule in words; `level` is that of the interval that decides."""
    what = f"{noun(claim)} of {describe(claim.cells)} against {describe_reference(claim)}"
    what = f"difference in {what}" if claim.metric != "accuracy_loss" else what
    over = {
        None: f"{what}, mean over models",
        "model_size": f"slope on log2 of the FP32 size, over models, of the {what}",
        "group_size": f"slope on -log2 of the share of the test set, over intersectional groups, of the {what}",
        "architecture": f"mean correlation over models, between trainings, of the {what}",
    }[claim.by]
    if claim.metric == "seconds_ratio":
        over = f"seconds of calibration and training of {describe(claim.cells)} over those of "
        over += f"{describe_reference(claim)}, geometric mean"
    bounds = " and ".join(
        f"{side} {bound:g}" for side, bound in (("above", claim.above), ("below", claim.below)) if bound is not None
    )
    if claim.metric == "seconds_ratio":
        return f"{over}: supported {bounds}, else contradicted"
    interval = f"its {level * 100:.4g} % interval"
    text = f"{over}: supported if {interval} lies {bounds}, contradicted if it lies outside"
    return text + (", and the permutation test agrees" if claim.is_permuted else "")


def left_out(n_collapsed: int, n_undefined: int) -> str:
    """Said of the pairs that do not count."""
    told = ""
    if n_collapsed:
        told += (
            " Not counted, since a model in it gives one class to nearly every image and so has no gap: "
            f"{count(n_collapsed, 'further pair')}."
        )
    if n_undefined:
        told += f" It is undefined in {count(n_undefined, 'further pair')}."
    return told


def bound_inside(claim: Claim, low: float, high: float) -> str:
    """Said where the one bound lies inside the interval."""
    if None not in (claim.above, claim.below):
        return ""
    bound = claim.below if claim.above is None else claim.above
    if not low <= bound <= high:
        return ""
    return f"; the interval includes {'zero' if bound == 0 else bound_text(bound)}"


def bound_text(value: float) -> str:
    return f"{value:+g}" if value else "0"


def points(value: float) -> str:
    return f"{value:+.2f}"


def interval_text(low: float, high: float, level: float) -> str:
    return f"{level * 100:.4g} % interval {low:+.2f} to {high:+.2f}"


def p_text(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def count(n: int, noun: str, of_many: str | None = None) -> str:
    return f"{n} {noun if n == 1 else of_many or noun + 's'}"


def and_list(names: Sequence[str]) -> str:
    names = [str(name) for name in names]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else "none"
