"""What a claim compares: the cells that it names, each with its reference, and the effect of each pair.

Every effect but one is a sum over the test images (`JointBootstrap.sums`): a model's accuracy, the accuracy of a group
that is fixed beforehand, a difference of two groups' rates. So all claims of a study are resampled by one product of
matrices, on the same images, and what they have in common is kept. The value of an image for a group's rate r is r / N
for every image and (hit - r) / n for the n images that the rate is of: its sum is r, and resampled it follows the
resampled rate to first order, whether or not n varies.

The worst group, and the two groups between which a gap is widest, are chosen on one half of the images and measured on
the other, both ways, and averaged (cross-fitting): choosing and measuring on the same images would make the worst group
look worse, and the gap wider, than it is. The chosen groups are held fixed when images are resampled. The exception is
a gap that is tested by permutation: there both models' gaps are plain max - min over all images, and the test swaps the
two models' predictions image by image, which is valid however close the groups are; the interval beside it is spread.

Effects are cell - reference, in percentage points.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from analysis.result_rows import parse_options, plain_counterparts, strategy_label, width_label, with_labels
from sections.analysis import Cells, Claim
from sections.base import parse_width
from significance.joint_bootstrap import JointBootstrap, TestSet, halves

COLUMNS = (
    "cell", "dataset", "model", "seed", "method", "strategy", "weight_bits", "activation_bits", "options", "width",
    "setting", "setting_order", "baseline_cell", "size_mb", "calibration_seconds", "training_seconds",
)  # fmt: skip

METHOD_NAMES = {
    "ptq_static": "static PTQ",
    "ptq_dynamic": "dynamic PTQ",
    "qat": "QAT",
    "mixed_precision": "mixed precision",
}


class Untestable(Exception):
    """Why a claim cannot be tested with the results at hand."""


# ----------------------------------------------------------------------------------------------------- cells and pairs


def study_of(rows: pd.DataFrame, test_sets: Mapping[str, TestSet], replicates: int, level: float) -> JointBootstrap:
    """The finished cells with labels, and of their columns those that are read here, as plain objects: rows of them are
    read one by one, which a frame of a hundred Arrow columns makes slow."""
    labelled = with_labels(rows)
    lean = labelled[[name for name in COLUMNS if name in labelled]].astype(object).reset_index(drop=True)
    return JointBootstrap(lean.where(lean.notna(), None), test_sets, replicates, level)


def select(rows: pd.DataFrame, cells: Cells) -> pd.DataFrame:
    """The rows (of `with_labels`) that `cells` names; with settings main, of each method, strategy and width those of
    the setting that most cells have (ties: the first in the order of the rows)."""
    chosen = rows[rows["method"] != "none"]
    chosen = chosen[chosen["strategy"].isna() if cells.strategy is None else chosen["strategy"].isin(cells.strategy)]
    if cells.bits is not None:
        chosen = chosen[chosen["width"].isin([width_label(*parse_width(width)) for width in cells.bits])]
    for column in ("method", "model", "dataset"):
        if getattr(cells, column) is not None:
            chosen = chosen[chosen[column].isin(getattr(cells, column))]
    for key, value in cells.options.items():
        chosen = chosen[[parse_options(text).get(key) == value for text in chosen["options"]]]
    if cells.settings == "all" or chosen.empty:
        return chosen
    kind = chosen["method"] + "|" + chosen["strategy"].fillna("") + "|" + chosen["width"]
    most = {}
    for name, block in chosen.groupby(kind, sort=False):
        counts = block["setting"].value_counts()
        most[name] = block.loc[block["setting"].map(counts) == counts.max(), "setting"].iloc[0]
    return chosen[chosen["setting"] == kind.map(most)]


def pairs_of(study: JointBootstrap, claim: Claim) -> pd.DataFrame:
    """The cells of a claim with a column `reference`: the cell that each is compared with. Untestable where none is."""
    rows = study.rows
    chosen = select(rows, claim.cells)
    if chosen.empty:
        raise Untestable(f"no finished cell of {describe(claim.cells)}")
    if claim.against == "fp32":
        reference = chosen["baseline_cell"]
    elif claim.against == "plain":
        reference = chosen["cell"].map(plain_counterparts(rows))
    else:
        reference = _matched(chosen, select(rows, claim.against), same_width=claim.against.bits is None)
    done = {cell for test_set in study.test_sets.values() for cell in test_set.predictions}
    is_pair = chosen["cell"].isin(done) & reference.isin(done) & (reference != chosen["cell"])
    if not is_pair.any():
        raise Untestable(f"no finished cell of {describe(claim.cells)} with {_its_reference(claim)}")
    return chosen.assign(reference=reference)[is_pair].reset_index(drop=True)


def _matched(rows: pd.DataFrame, candidates: pd.DataFrame, same_width: bool) -> pd.Series:
    """For each row the candidate of its data set, model and seed (and width) that shares most of its options."""
    keys = ["dataset", "model", "seed", *(["width"] if same_width else [])]
    by_key = {key: block.to_dict("records") for key, block in candidates.groupby(keys, sort=False)}
    found = []
    for row in rows.to_dict("records"):
        mine = parse_options(row["options"])
        best, most = None, -1
        for candidate in by_key.get(tuple(row[key] for key in keys), []):
            theirs = parse_options(candidate["options"])
            agreeing = sum(theirs.get(key) == value for key, value in mine.items())
            if candidate["cell"] != row["cell"] and agreeing > most:
                best, most = candidate["cell"], agreeing
        found.append(best)
    return pd.Series(found, index=rows.index, dtype=object)


def describe(cells: Cells) -> str:
    """'W4A4 static PTQ', 'balanced calibration of resnet50'."""
    words = [" and ".join(width_label(*parse_width(width)) for width in cells.bits)] if cells.bits else []
    words += [" or ".join(METHOD_NAMES[method] for method in cells.method)] if cells.method else []
    words += [" or ".join(strategy_label(name) for name in cells.strategy)] if cells.strategy else []
    words += [", ".join(f"{key} {value}" for key, value in cells.options.items())] if cells.options else []
    text = " ".join(words) or "plain quantization"
    text += f" of {', '.join(cells.model)}" if cells.model else ""
    return text + (f" on {', '.join(cells.dataset)}" if cells.dataset else "")


def describe_reference(claim: Claim) -> str:
    named = {"fp32": "FP32", "plain": "plain quantization"}
    return named[claim.against] if isinstance(claim.against, str) else describe(claim.against)


def _its_reference(claim: Claim) -> str:
    named = {"fp32": "its FP32 cell", "plain": "a plain counterpart"}
    if isinstance(claim.against, str):
        return named[claim.against]
    same = "" if claim.against.bits else " and widths"
    return f"a cell of {describe(claim.against)} of the same model, seed{same}"


# ------------------------------------------------------------------------------------------------ effects as image sums


class Effects:
    """Per-image values of the effects on one data set: (N,) arrays whose sum over the images is the effect in points.

    Worst groups and gaps are undefined where fewer groups are large enough than they need: None.
    """

    def __init__(self, test_set: TestSet):
        self.test_set = test_set
        self.n_groups = len(test_set.group_names)
        self.code_N = test_set.group_N + self.n_groups * halves(test_set)
        self.n_HG = np.bincount(self.code_N, minlength=2 * self.n_groups).reshape(2, self.n_groups)
        eligible = test_set.eligible(test_set.group_N, test_set.group_names)
        self.groups = eligible[(self.n_HG[:, eligible] > 0).all(axis=0)]
        self._of_cell: dict[tuple[str, str], np.ndarray | None] = {}

    def pair(self, cell: str, reference: str, metric: str) -> np.ndarray | None:
        if metric in ("accuracy", "accuracy_loss"):
            sign = 100 / self.test_set.n * (1 if metric == "accuracy" else -1)
            right_N, right_reference_N = (self.test_set.correct(name).astype(float) for name in (cell, reference))
            return sign * (right_N - right_reference_N)
        if metric == "worst_group_excess_loss":
            return self._excess_loss(cell, reference)
        ours_N, theirs_N = self.of_cell(cell, metric), self.of_cell(reference, metric)
        return None if ours_N is None or theirs_N is None else ours_N - theirs_N

    def of_cell(self, cell: str, metric: str) -> np.ndarray | None:
        """The cell's own worst-group accuracy, or gap."""
        key = (cell, metric)
        if key not in self._of_cell:
            make = self._worst_group_accuracy if metric == "worst_group_accuracy" else self._gap
            self._of_cell[key] = make(cell, metric)
        return self._of_cell[key]

    def one_image(self, metric: str) -> tuple[float, int]:
        """(what one more hit in a rate adds to the metric, in points; how many rates it is made of). Of a metric about
        groups that of the smallest half of a group, since any may be chosen."""
        if metric in ("accuracy", "accuracy_loss"):
            return 100 / self.test_set.n, 1
        if metric in ("worst_group_accuracy", "worst_group_excess_loss", "accuracy_gap"):
            n_HG = self.n_HG[:, self.groups]
            return 100 / 2 / int(n_HG.min()), 4 if metric == "accuracy_gap" else 2
        n = len(self.test_set.label_N)
        strata_N = self.code_N * self.test_set.n_classes + self.test_set.label_N
        counts = np.bincount(strata_N, minlength=2 * self.n_groups * self.test_set.n_classes)
        counts = counts.reshape(2, self.n_groups, self.test_set.n_classes)[:, self.groups]
        return 100 / 2 / int(counts[counts > 0].min(initial=n)), 4

    def worst_groups(self, cell: str) -> list[int]:
        """The group of the lowest accuracy on each half."""
        right_HG = np.bincount(self.code_N, weights=self.test_set.correct(cell), minlength=2 * self.n_groups).reshape(
            2, self.n_groups
        )
        rate_HG = right_HG[:, self.groups] / self.n_HG[:, self.groups]
        return [int(self.groups[g]) for g in rate_HG.argmin(axis=1)]

    def _worst_group_accuracy(self, cell: str, metric: str) -> np.ndarray | None:
        if not len(self.groups):
            return None
        right_N = self.test_set.correct(cell)
        value_N = np.zeros(self.test_set.n)
        for half, worst in enumerate(self.worst_groups(cell)):
            value_N += 100 / 2 * _rate(right_N, self.code_N == (1 - half) * self.n_groups + worst)
        return value_N

    def _excess_loss(self, cell: str, reference: str) -> np.ndarray | None:
        if len(self.groups) < 2:
            return None
        lost_N = self.test_set.correct(reference).astype(float) - self.test_set.correct(cell)
        value_N = np.zeros(self.test_set.n)
        for half, worst in enumerate(self.worst_groups(reference)):
            other = 1 - half
            value_N += 100 / 2 * _rate(lost_N, self.code_N == other * self.n_groups + worst)
            value_N -= 100 / 2 * _rate(lost_N, self.code_N // self.n_groups == other)
        return value_N

    def _gap(self, cell: str, metric: str) -> np.ndarray | None:
        """Difference between the two groups that are furthest apart on the other half."""
        value_N = np.zeros(self.test_set.n)
        for half in (0, 1):
            widest, chosen = -1.0, None
            for ranges in self._ranges(cell, metric):
                picked = [self._extremes(*rate, half) for rate in ranges]
                if any(ends is None for ends in picked):
                    continue  # with one of its rates undefined the criterion is not measured
                width = float(np.mean([ends[2] for ends in picked]))
                if width > widest:
                    widest, chosen = width, list(zip(ranges, picked, strict=True))
            if chosen is None:
                return None
            other = 1 - half
            for (hit_N, among_N), (low, high, _) in chosen:
                for group, sign in ((high, 1), (low, -1)):
                    member_N = (self.code_N == other * self.n_groups + group) & among_N
                    value_N += sign * 100 / 2 / len(chosen) * _rate(hit_N, member_N)
        return value_N

    def _ranges(self, cell: str, metric: str) -> list[list[tuple[np.ndarray, np.ndarray]]]:
        """What the gap is the largest of: each the mean of the ranges of rates (hits, among which images)."""
        test_set = self.test_set
        predicted_N, label_N = test_set.predictions[cell], test_set.label_N
        if metric == "accuracy_gap":
            return [[(predicted_N == label_N, np.ones(test_set.n, dtype=bool))]]
        classes = (1,) if test_set.n_classes == 2 else range(test_set.n_classes)
        selected = {k: (predicted_N == k, np.ones(test_set.n, dtype=bool)) for k in classes}
        true_positive = {k: (predicted_N == k, label_N == k) for k in classes}
        false_positive = {k: (predicted_N == k, label_N != k) for k in classes}
        single = {
            "demographic_parity_difference": selected,
            "equal_opportunity_difference": true_positive,
            "predictive_equality_difference": false_positive,
        }
        if metric in single:
            return [[single[metric][k]] for k in classes]
        both = [[true_positive[k], false_positive[k]] for k in classes]
        if metric == "equalized_odds_mean":
            return both
        is_defined = [all(self._extremes(*rate, half) for rate in rates for half in (0, 1)) for rates in both]
        return [[rate] for rates, defined in zip(both, is_defined, strict=True) if defined for rate in rates]

    def _extremes(self, hit_N: np.ndarray, among_N: np.ndarray, half: int) -> tuple[int, int, float] | None:
        """(group of the lowest rate, of the highest, their difference) on a half, over groups that have such images."""
        size = 2 * self.n_groups
        n_HG = np.bincount(self.code_N[among_N], minlength=size).reshape(2, self.n_groups)
        hits_G = np.bincount(self.code_N[among_N & hit_N], minlength=size).reshape(2, self.n_groups)[half]
        groups = self.groups[(n_HG[:, self.groups] > 0).all(axis=0)]
        if len(groups) < 2:
            return None
        rate = hits_G[groups] / n_HG[half, groups]
        low, high = int(rate.argmin()), int(rate.argmax())
        return int(groups[low]), int(groups[high]), float(rate[high] - rate[low])


def _rate(hit_N: np.ndarray, member_N: np.ndarray) -> np.ndarray:
    """(N,) values whose sum is the mean of `hit_N` over the members; see the module's docstring."""
    rate = float(hit_N[member_N].mean())
    return rate / len(member_N) + member_N * (hit_N - rate) / member_N.sum()


# --------------------------------------------------------------------------------------------- resampled all at once


@dataclass
class Ticket:
    """Columns that were asked for, and, once drawn, their sums: observed (C,) and resampled (B, C)."""

    columns: list[tuple[str, int, int]] = field(default_factory=list)  # (data set, first, past the last)
    observed_C: np.ndarray = field(default_factory=lambda: np.empty(0))
    replicates_BC: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))


class Pool:
    """Collects the columns of all claims, so that the images of each data set are drawn once."""

    def __init__(self, study: JointBootstrap):
        self.study = study
        self._waiting: dict[str, list[np.ndarray]] = {}
        self._tickets: list[Ticket] = []

    def ask(self, blocks: list[tuple[str, np.ndarray]]) -> Ticket:
        """`blocks`: (data set, values (N, C)); the columns of the ticket are theirs, in this order."""
        ticket = Ticket()
        for dataset, values_NC in blocks:
            waiting = self._waiting.setdefault(dataset, [])
            first = sum(values.shape[1] for values in waiting)
            waiting.append(values_NC)
            ticket.columns.append((dataset, first, first + values_NC.shape[1]))
        self._tickets.append(ticket)
        return ticket

    def draw(self) -> None:
        drawn = {
            dataset: self.study.sums(dataset, np.concatenate(waiting, axis=1))
            for dataset, waiting in self._waiting.items()
        }
        for ticket in self._tickets:
            parts = [(drawn[dataset], slice(first, last)) for dataset, first, last in ticket.columns]
            ticket.observed_C = np.concatenate([observed[at] for (observed, _), at in parts])
            ticket.replicates_BC = np.concatenate([replicates[:, at] for (_, replicates), at in parts], axis=1)
        self._waiting = {}


def ask_for_pairs(
    pool: Pool, effects: Mapping[str, Effects], pairs: pd.DataFrame, metric: str
) -> tuple[pd.DataFrame, Ticket, int]:
    """The pairs whose effect is defined, in the order of the ticket's columns; the ticket; how many are undefined."""
    kept, blocks = [], []
    for dataset, block in pairs.groupby("dataset", sort=False):
        found = [
            (row, effects[dataset].pair(row["cell"], row["reference"], metric)) for row in block.to_dict("records")
        ]
        found = [(row, value_N) for row, value_N in found if value_N is not None]
        if found:
            kept += [row for row, _ in found]
            blocks.append((dataset, np.stack([value_N for _, value_N in found], axis=1)))
    if not kept:
        raise Untestable(undefined(metric, pool.study, pairs))
    return pd.DataFrame(kept), pool.ask(blocks), len(pairs) - len(kept)


def undefined(metric: str, study: JointBootstrap, pairs: pd.DataFrame) -> str:
    """Why the metric is undefined in all of the pairs."""
    name = metric.replace("_", " ")
    few = [name for name in pairs["dataset"].unique() if len(study.eligible_groups(name)) < 2]
    if few:
        return f"fewer than two groups are large enough in {' and '.join(few)}"
    return f"the {name} is undefined in every pair (too few groups that have positives and negatives)"
