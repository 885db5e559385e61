"""Which configuration to ship: one rule, applied here for summary.md and by report_page/recommend.js in the page.

A *configuration* is a setting of a model on a data set, its values averaged over its finished seeds: a row of
configurations.py. The rule:

1. The candidates are the finished configurations of a data set, FP32 among them (in the page: of one model, if the
   reader picks one).
2. The *reference* is the most accurate FP32 configuration among them (of equal ones the first). A loss is the
   reference's value minus the candidate's, in points.
3. A candidate that holds every bound is eligible. Bounds include their ends; a bound on something that was not
   measured, or on a loss where there is no reference, is not held.
4. The eligible ones are ranked by the value preferred (the smallest file by default), then by higher worst-group
   accuracy, then by higher accuracy, then in the order of the plan; one whose preferred value was not measured is not
   ranked. The first one is recommended.

Values are those measured on the test images, so that the chosen one's are a little optimistic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import NamedTuple

import pandas as pd

from analysis.result_rows import model_label
from analysis.tables import number, with_interval

TOLERANCE = 1e-9  # so that a bound of 90 is held by what is printed as 90 and computed as 89.99999999999999
# the value preferred -> (column, whether more is better, in words)
PREFERENCES = {
    "size": ("size_mb", False, "the smallest file"),
    "latency": ("latency_ms_b1", False, "the lowest latency"),
    "worst_group": ("worst_group_accuracy", True, "the highest worst-group accuracy"),
    "accuracy": ("accuracy", True, "the highest accuracy"),
    "gap": ("accuracy_gap", False, "the smallest accuracy gap"),
}


@dataclass(frozen=True)
class Bounds:
    """What a configuration must hold; None is no bound. Accuracies and gaps in %, losses in points."""

    largest_loss: float | None = 1.0
    largest_worst_group_loss: float | None = 1.0
    smallest_accuracy: float | None = None
    largest_gap: float | None = None
    largest_size_mb: float | None = None
    largest_latency_ms: float | None = None
    prefer: str = "size"  # a key of PREFERENCES

    def limits(self) -> dict[str, float]:
        """The bounds that are set, in order."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "prefer"}
        return {name: value for name, value in values.items() if value is not None}


class Recommendation(NamedTuple):
    """Positions are those in the frame given."""

    order: list[int]  # the ranked ones, the recommended one first
    reference: int | None
    candidates: int
    held: dict[str, int]  # bound -> how many candidates hold it


def recommend(candidates: pd.DataFrame, bounds: Bounds) -> Recommendation:
    """The rule of this module for the configurations of one data set."""
    records = candidates.to_dict("records")
    column, more_is_better, _ = PREFERENCES[bounds.prefer]
    reference = None
    for position, row in enumerate(records):
        if row["is_fp32"] and not math.isnan(row["accuracy"]):
            better = reference is None or row["accuracy"] > records[reference]["accuracy"]
            reference = position if better else reference
    held = dict.fromkeys(bounds.limits(), 0)
    eligible = []
    for position, row in enumerate(records):
        answers = {
            name: _holds(name, bound, row, None if reference is None else records[reference])
            for name, bound in bounds.limits().items()
        }
        for name, answer in answers.items():
            held[name] += answer
        if all(answers.values()) and not math.isnan(row[column]):
            eligible.append(position)

    def rank(position: int) -> tuple:
        row = records[position]
        others = [math.inf if math.isnan(row[name]) else -row[name] for name in ("worst_group_accuracy", "accuracy")]
        return (-row[column] if more_is_better else row[column], *others, position)

    return Recommendation(sorted(eligible, key=rank), reference, len(records), held)


def _holds(name: str, bound: float, row: Mapping, reference: Mapping | None) -> bool:
    """Whether a candidate holds a bound; comparisons with NaN are false."""
    if name == "smallest_accuracy":
        return row["accuracy"] >= bound - TOLERANCE
    if name in ("largest_loss", "largest_worst_group_loss"):
        if reference is None:
            return False
        column = "accuracy" if name == "largest_loss" else "worst_group_accuracy"
        return reference[column] - row[column] <= bound + TOLERANCE
    column = {"largest_gap": "accuracy_gap", "largest_size_mb": "size_mb", "largest_latency_ms": "latency_ms_b1"}[name]
    return row[column] <= bound + TOLERANCE


# ------------------------------------------------------------------------------------------------------------ sentences


BOUND_LABELS = {  # bound -> (before the number, after it)
    "largest_loss": ("accuracy at most ", " below the most accurate FP32 model"),
    "largest_worst_group_loss": ("worst-group accuracy at most ", " below that model's"),
    "smallest_accuracy": ("accuracy at least ", " %"),
    "largest_gap": ("accuracy gap at most ", " points"),
    "largest_size_mb": ("file at most ", " MB"),
    "largest_latency_ms": ("latency of one image at most ", " ms"),
}
RULE = (
    "Recommended is, of the finished configurations (FP32 among them) that hold every bound, the one of the smallest "
    "file, or of what else is preferred; of equal ones that of the higher worst-group accuracy, then accuracy. Losses "
    "are counted against the most accurate FP32 model. A bound on something that was not measured is not held. Values "
    "are means over seeds on the test images by which the configuration is chosen, so they are a little optimistic."
)


def bound_text(name: str, bound: float) -> str:
    before, after = BOUND_LABELS[name]
    loss = name in ("largest_loss", "largest_worst_group_loss")
    unit = (" point" if bound == 1 else " points") if loss else ""
    return f"{before}{bound:g}{unit}{after}"


def recommendation_sentences(configs: pd.DataFrame, bounds: Bounds) -> list[str]:
    """What is recommended for each data set, in sentences."""
    sentences = []
    for dataset, block in configs.groupby("dataset", sort=False):
        lead = f"{dataset}: " if configs["dataset"].nunique() > 1 else ""
        sentences.append(lead + _sentence(block.reset_index(drop=True), bounds))
    return sentences


def _sentence(block: pd.DataFrame, bounds: Bounds) -> str:
    found = recommend(block, bounds)
    told = [f"{bound_text(name, bound)} (held by {found.held[name]})" for name, bound in bounds.limits().items()]
    asked = f"Bounds: {'; '.join(told)}." if told else "No bound is set."
    reference = None if found.reference is None else block.iloc[found.reference]
    against = "There is no finished FP32 model to count losses against."
    if reference is not None:
        against = (
            f"The most accurate FP32 model is {model_label(reference['model'])} ({number(reference['accuracy'], 1)} %, "
            f"worst group {number(reference['worst_group_accuracy'], 1)} %)."
        )
    if not found.order:
        return f"None of the {found.candidates} finished configurations holds every bound. {asked} {against}"
    row = block.iloc[found.order[0]]
    facts = [f"accuracy {number(row['accuracy'], 1)} %", f"worst group {number(row['worst_group_accuracy'], 1)} %"]
    facts += [f"accuracy gap {number(row['accuracy_gap'], 1)} points"]
    facts += [f"{number(row['size_mb'], 3, significant=True)} MB"] if not math.isnan(row["size_mb"]) else []
    if not math.isnan(row["latency_ms_b1"]):
        facts.append(f"{number(row['latency_ms_b1'], 3, significant=True)} ms an image")
    change = ""
    if not math.isnan(row["change"]):
        interval = with_interval(row["change"], row["ci_low"], row["ci_high"], 2)
        change = f" Against FP32 of the same model its accuracy changes by {interval} points."
    among = f"finished configurations that hold{'s' if len(found.order) == 1 else ''} every bound"
    why = f"It has {PREFERENCES[bounds.prefer][2]} of the {len(found.order)} of {found.candidates} {among}."
    if len(found.order) == 1:
        why = f"It is the only one of {found.candidates} {among}."
    return f"{model_label(row['model'])} at {row['setting']}: {', '.join(facts)}. {why}{change} {asked} {against}"
