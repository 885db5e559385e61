"""The cheapest repair that is certified to keep the fairness bounds: `FairnessAwareQuantizer`.

    quantizer = FairnessAwareQuantizer(bit_width=8, max_dp_gap=0.05, sensitive_attributes=["gender", "race"])
    qmodel = quantizer.quantize(model=model, calibration_data=loader, fairness_constraint=True)
    quantizer.satisfied, quantizer.final_dp_gap, quantizer.certificate, print(quantizer.summary())

A ladder of repairs is climbed from the cheapest to the dearest (`LADDER`). Each is made with the calibration images and
measured on the selection images. One whose upper limits (certification.py), at the level that its certification would
be held to, keep every bound there is measured on the certification images, which no repair and no choice has seen; if
the limits keep every bound there too it is certified and returned. Otherwise the climb goes on, and at its end the
candidates whose estimates, if not their limits, kept the bounds on the selection images have their turn, the one with
most room first.

Why that is a certificate: the three sets of images are disjoint. The bounds must all hold, which needs no correction
(an intersection-union test). Which models are tried, and in which order, is settled by the first two sets; the third
only says where to stop. Since it may be looked at several times, the k-th attempt is made at error probability
alpha / 2^k, alpha = 1 - confidence; the sum over all attempts is below alpha, as far as each limit holds its level
(certification.py says how far: to a few tenths of a percent at 95 %, less well far above). It is a statement about the
population that the certification images are a sample of, about groups of at least `min_group_size` of them, and about
no others.
"""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from evaluation import EvaluationError, Predictions, as_batch, model_size_mb, predict
from group_counts import paired_count_table
from quantizers import methods
from quantizers.numerics import QuantizationError, QuantizationWarning, check_bits
from sections.base import suggest
from significance.certification import (
    DROP,
    GAPS,
    MIN_GROUP_SIZE,
    gap_bounds,
    smallest_certifiable,
    worst_group_drop_bounds,
)
from store import seed_for
from training import TrainingError

Rung = tuple[str, Mapping[str, Any]]

LADDER: tuple[Rung, ...] = (  # from the cheapest to the dearest; those that train need train_data
    ("ptq_static", {}),
    ("bias_aware_calibration", {}),
    ("group_weighted_observers", {}),
    ("minimax_ranges", {}),
    ("fair_bias_correction", {}),
    ("output_calibration", {}),
    ("sensitive_channels", {}),
    ("sensitive_layers", {}),
    ("fair_mixed_precision", {}),
    ("ptq_static", {"rounding": "adaround"}),
    ("output_calibration", {"rounding": "adaround"}),
    ("fair_reconstruction", {}),
    ("sensitive_layers", {"rounding": "adaround", "extra_operations": 1.0}),
    ("qat", {}),
    ("balanced_finetuning", {"rounding": "adaround"}),
    ("group_dro", {"rounding": "adaround"}),
    ("distillation", {"rounding": "adaround"}),
    ("fairness_finetuning", {"rounding": "adaround"}),
)
GROUP_THRESHOLDS: Rung = ("threshold_adjustment", {})  # reads the group of every image: only where that is allowed
TRAINED = ("qat", "balanced_finetuning", "reweighing", "group_dro", "distillation", "fairness_finetuning")
WIDTHS = ("bit_width", "activation_bits")  # what a rung may say beside its method's options

DP = "demographic_parity_difference"
PARTS = ("calibration", "selection", "certification")  # shares of the calibration loader's images: the same for each
BATCH = 64


class FairnessConstraintError(QuantizationError):
    """No repair was certified to keep the bounds. `model` is the closest one, `report` the table of what was tried."""

    def __init__(self, message: str, model: nn.Module, report: pd.DataFrame):
        super().__init__(message)
        self.model = model
        self.report = report


@dataclass(frozen=True)
class Constraint:
    """`metric` over the groups of `attributes` (several: their intersection) is at most `bound`."""

    metric: str
    attributes: tuple[str, ...]
    bound: float

    @property
    def over(self) -> str:
        return " x ".join(self.attributes)

    def __str__(self) -> str:
        return f"{self.metric} over {self.over} <= {self.bound:g}"


@dataclass(frozen=True)
class Measured:
    """A constraint's value on some images, with its limits at `level`; see certification.GapBound."""

    constraint: Constraint
    observed: float
    low: float
    high: float
    level: float
    n: int
    left_out: dict[str, int]  # images of the groups that nothing is said about; of some there are none here
    classes_left_out: tuple[int, ...]  # likewise; of more than two
    smallest_certifiable: float
    reason: str

    @property
    def is_kept(self) -> bool:
        return self.high <= self.constraint.bound  # NaN keeps nothing

    @property
    def is_near(self) -> bool:
        return self.observed <= self.constraint.bound

    @property
    def excess(self) -> float:
        return np.inf if np.isnan(self.high) else self.high - self.constraint.bound

    def as_dict(self, is_certificate: bool = True) -> dict[str, Any]:
        """`is_certificate` False: of a look at the certification images that was not one of those paid for."""
        return {
            "metric": self.constraint.metric,
            "attribute": self.constraint.over,
            "bound": self.constraint.bound,
            "observed": self.observed,
            "low": self.low,
            "high": self.high,
            "level": self.level,
            "n": self.n,
            "groups_left_out": self.left_out,
            "classes_left_out": list(self.classes_left_out),
            "smallest_certifiable": self.smallest_certifiable,
            "is_certified": is_certificate and self.is_kept,
            "reason": self.reason,
        }


@dataclass
class Candidate:
    """A model that was made, and what is known of it."""

    row: dict[str, Any]
    model: nn.Module
    selection: list[Measured]
    certification: list[Measured] | None = None
    is_attempted: bool = False  # the certification was one of the looks that the confidence is divided among
    has_failed: bool = False  # to predict the certification images

    @property
    def is_kept(self) -> bool:
        return all(measured.is_kept for measured in self.selection)

    @property
    def is_near(self) -> bool:
        return all(measured.is_near for measured in self.selection)

    @property
    def excess(self) -> float:
        """Of the upper limits over their bounds, the largest."""
        return max(measured.excess for measured in self.selection)

    @property
    def distance(self) -> float:
        """Of the estimates over their bounds, the largest."""
        over = [measured.observed - measured.constraint.bound for measured in self.selection]
        return np.inf if np.isnan(over).any() else max(over)


class _Unpredictable(Exception):
    """A model that cannot predict images: its logits are not finite, or it has no threshold for a group."""


class FairnessAwareQuantizer:
    """Quantizes a model by the cheapest method that keeps the given fairness bounds, certified at `confidence`.

    Bounds, of which those given must all hold for each of `sensitive_attributes` (with `intersectional` also for their
    intersection): `max_dp_gap`, of the demographic parity difference; `max_gap`, of another `metric` of
    certification.GAPS; `max_worst_group_drop`, of the accuracy that the group which loses most loses against the given
    model. In (0, 1]: no number of images certifies 0.

    `bit_width` and `activation_bits` as in apply_quantization, `options` for the methods that have them.
    `size_budget_mb` (10^6 bytes, of the file) excludes what is larger. `ladder` replaces LADDER: method names, or
    (name, options) where options may hold bit_width and activation_bits too. `allow_group_thresholds` adds
    threshold_adjustment, whose model reads the group of every image it predicts. Groups under `min_group_size` images
    are reported, not certified, and so are groups that only the other images have.

    A certificate is about images like those that certify: new to the given model as well, which knows the images it was
    trained on, and used for one call. Whoever calls again with other arguments until one is certified has looked more
    often than `confidence` allows for; `ladder` is for that.
    `progress(what, share done)` is called now and then.

    After `quantize`: `satisfied`; `final_dp_gap`, the demographic parity difference on the certification images, the
    largest over the attributes (NaN where it is undefined for one); `certificate`, a dict for the bound with the least
    room, with all of them under "constraints"; `report`, a DataFrame with a row for FP32 and each rung; `summary()`.
    QuantizationError, one line, for arguments that are wrong or do not go together.
    """

    def __init__(
        self,
        bit_width: int = 8,
        activation_bits: int | None = None,
        max_dp_gap: float | None = None,
        sensitive_attributes: Sequence[str] = (),
        *,
        metric: str | None = None,
        max_gap: float | None = None,
        max_worst_group_drop: float | None = None,
        size_budget_mb: float | None = None,
        ladder: Sequence[str | Rung] | None = None,
        allow_group_thresholds: bool = False,
        confidence: float = 0.95,
        min_group_size: int = MIN_GROUP_SIZE,
        intersectional: bool = False,
        strict: bool = False,
        seed: int = 0,
        progress: Callable[[str, float], None] | None = None,
        **options: Any,
    ):
        self.bit_width = check_bits(bit_width, "bit_width")
        self.activation_bits = None if activation_bits is None else check_bits(activation_bits, "activation_bits")
        self.sensitive_attributes = _attributes(sensitive_attributes)
        self.constraints = self._constraints(max_dp_gap, metric, max_gap, max_worst_group_drop, intersectional)
        if size_budget_mb is not None and not size_budget_mb > 0:
            raise QuantizationError(f"size_budget_mb must be above 0, got {size_budget_mb}")
        if not 0.5 < confidence < 1:
            raise QuantizationError(f"confidence must lie between 0.5 and 1, got {confidence}")
        if isinstance(min_group_size, bool) or not isinstance(min_group_size, int) or min_group_size < 1:
            raise QuantizationError(f"min_group_size must be an integer of at least 1, got {min_group_size!r}")
        self.size_budget_mb = size_budget_mb
        self.confidence = confidence
        self.min_group_size = min_group_size
        self.strict = strict
        self.seed = seed
        self.options = options
        self.ladder = _ladder(ladder, allow_group_thresholds, options)
        self._progress = progress
        self._reset()

    # ------------------------------------------------------------------------------------------------------- the climb

    def quantize(
        self,
        model: nn.Module,
        calibration_data: Iterable,
        fairness_constraint: bool = True,
        *,
        train_data: Iterable | None = None,
        selection_data: Iterable | None = None,
        certification_data: Iterable | None = None,
    ) -> nn.Module:
        """A quantized copy of `model`, in eval mode; `satisfied` says whether it is certified to keep the bounds.

        Without `selection_data` or `certification_data` the images of `calibration_data` are divided: a third each for
        calibration, selection and certification (a half each where one of the two is given), within every (group,
        label), by the seed; they are held in memory meanwhile, and exact copies of an image are used once. Loaders that
        are given must give the same images in the same order each time. An image that two of the
        three have is refused, and so is one of `train_data` that selects or certifies (augmented ones are not
        recognised). `train_data` allows the rungs that train; the calibration images choose their best epoch.

        Nothing certified: the model closest to the bounds by the selection images is returned, or with `strict`
        FairnessConstraintError raised. `fairness_constraint=False`: the first rung that can be done, measured all the
        same. QuantizationError where the data lack an attribute, have one group of it, or too few images of two groups
        for any certificate; and where no rung could be done.
        """
        self._reset()
        data = self._divide(calibration_data, selection_data, certification_data, train_data)
        exact = {part: predict(model, data[part]) for part in PARTS[1:]}
        self._codes = _codes(data, exact, self.sensitive_attributes)
        self._check_groups(exact, fairness_constraint)
        if selection_data is not None or certification_data is not None:
            _check_apart(data)
        if train_data is not None and any(method in TRAINED for method, _ in self.ladder):
            for part in PARTS[1:]:
                _check_apart({part: data[part], "train": train_data})
        self._baseline(model, exact)

        self._attempts, chosen, candidates = 0, None, []
        for candidate in self._climb(model, data, exact, train_data):
            candidates.append(candidate)
            if not fairness_constraint:
                self._certify(candidate, data, exact, self.confidence)
                if candidate.has_failed:
                    continue
                chosen = candidate
                break
            if candidate.is_kept:
                self._attempts += 1
                if self._certify(candidate, data, exact, self._level(self._attempts)):
                    chosen = candidate
                    break
        for candidate in sorted(candidates, key=lambda candidate: candidate.excess):
            if chosen is None and candidate.is_near and candidate.certification is None and not candidate.has_failed:
                self._attempts += 1
                if self._certify(candidate, data, exact, self._level(self._attempts)):
                    chosen = candidate
        while chosen is None:
            able = [candidate for candidate in candidates if not candidate.has_failed]
            if not able:
                raise QuantizationError(f"no rung of the ladder could be done: {self._failures()}")
            chosen = min(able, key=lambda candidate: candidate.distance)  # the cheapest of equals
            if chosen.certification is None:
                self._certify(chosen, data, exact, self._level(self._attempts + 1), is_attempt=False)
            chosen = None if chosen.has_failed else chosen
        self._finish(chosen, data, exact, fairness_constraint)
        if fairness_constraint and self.strict and not self.satisfied:
            raise FairnessConstraintError(self.message, chosen.model, self.report)
        return chosen.model

    def summary(self) -> str:
        """What was tried and what came of it, as lines of text."""
        if self.report is None:
            return "nothing has been quantized yet"
        lines = [self.message, ""]
        for row in self._rows:
            options = ", ".join(f"{key}={value}" for key, value in row["options"].items())
            lines.append(f"{row['rung']:>2}  {row['method']}{f' ({options})' if options else ''}: {row['verdict']}")
        return "\n".join(lines)

    def _climb(self, model: nn.Module, data: dict, exact: dict[str, Predictions], train_data: Iterable | None):
        """The rungs that can be done, each measured on the selection images, as they are asked for."""
        for number, (method, own) in enumerate(self.ladder, 1):
            row = self._row(number, method, own)
            done = (number - 1) / len(self.ladder)
            self._say(f"rung {number} of {len(self.ladder)}: {method}", done)
            if method in TRAINED and train_data is None:
                row["verdict"] = "skipped: it trains, and there is no train_data"
                continue
            start = time.perf_counter()
            try:
                quantized = self._apply(model, method, own, data, train_data, done)
            except (QuantizationError, TrainingError, EvaluationError) as error:
                row |= {"seconds": time.perf_counter() - start, "verdict": f"failed: {error}"}
                continue
            size = model_size_mb(quantized)
            within = self.size_budget_mb is None or size <= self.size_budget_mb
            row |= {"seconds": time.perf_counter() - start, "size_mb": size, "within_budget": within}
            if not within:
                row["verdict"] = f"skipped: {size:.3g} MB are over the budget of {self.size_budget_mb:g} MB"
                continue
            try:
                predictions = self._predict(quantized, data["selection"], exact["selection"], "selection_data")
            except _Unpredictable as error:
                row["verdict"] = f"failed: {error}"
                continue
            level = self._level(self._attempts + 1)  # what its certification will be held to
            candidate = Candidate(row, quantized, self._measure(exact["selection"], predictions, level))
            row |= _columns("selection", candidate.selection) | {"selection_accuracy": predictions.accuracy}
            row["verdict"] = _selection_verdict(candidate)
            yield candidate
        self._say("done", 1.0)

    def _apply(
        self, model: nn.Module, method: str, own: Mapping, data: dict, train_data: Iterable | None, done: float
    ) -> nn.Module:
        known = methods.options_of(methods.METHODS[method])
        given = {key: value for key, value in self.options.items() if key in known}
        given |= {key: value for key, value in own.items() if key not in WIDTHS}
        if "seed" in known:
            given.setdefault("seed", self.seed)
        if "attributes" in known:
            given.setdefault("attributes", self.sensitive_attributes)
        progress = None
        if self._progress is not None:

            def progress(what: str, share: float) -> None:
                self._say(f"{method}: {what}", done + share / len(self.ladder))

        trains = {"train_data": train_data, "validation_data": data["calibration"]} if method in TRAINED else {}
        return methods.apply_quantization(
            model,
            method,
            own.get("bit_width", self.bit_width),
            data["calibration"],
            activation_bits=own.get("activation_bits", self.activation_bits),
            progress=progress,
            **trains,
            **given,
        )

    def _certify(self, candidate: Candidate, data: dict, exact: dict, level: float, is_attempt: bool = True) -> bool:
        """Measure on the certification images; whether every bound is kept."""
        try:
            predictions = self._predict(
                candidate.model, data["certification"], exact["certification"], "certification_data"
            )
        except _Unpredictable as error:
            candidate.row["verdict"] += f"; failed on the certification images: {error}"
            candidate.has_failed = True
            return False
        candidate.certification = self._measure(exact["certification"], predictions, level)
        candidate.is_attempted = is_attempt
        is_kept = is_attempt and all(measured.is_kept for measured in candidate.certification)
        candidate.row |= _columns("certification", candidate.certification)
        candidate.row |= {
            "certification_level": level,
            "certification_accuracy": predictions.accuracy,
            "final_dp_gap": self._dp_gap(exact["certification"], predictions),
        }
        worst = _worst(candidate.certification)
        if is_kept:
            candidate.row["verdict"] = f"certified at {_percent(level)}: {_sentence(worst)}"
        elif is_attempt:
            candidate.row["verdict"] += f"; not certified at {_percent(level)}: {_sentence(worst)}"
        else:
            candidate.row["verdict"] += f"; the closest, on the certification images: {_sentence(worst)}"
        return is_kept

    def _level(self, attempt: int) -> float:
        return 1 - (1 - self.confidence) / 2**attempt

    # ------------------------------------------------------------------------------------------------------ the results

    def _reset(self) -> None:
        self.satisfied: bool | None = None
        self.final_dp_gap: float | None = None
        self.certificate: dict[str, Any] | None = None
        self.report: pd.DataFrame | None = None
        self.message = ""
        self._rows: list[dict[str, Any]] = []

    def _row(self, rung: int, method: str, options: Mapping[str, Any]) -> dict[str, Any]:
        row: dict[str, Any] = {"rung": rung, "method": method, "options": dict(options)}
        row |= dict.fromkeys(("seconds", "size_mb"), np.nan) | {"within_budget": None}
        for part in PARTS[1:]:
            row[f"{part}_constraint"] = ""
            row |= dict.fromkeys((f"{part}_{what}" for what in ("estimate", "low", "high", "accuracy")), np.nan)
        row |= {"certification_level": np.nan, "final_dp_gap": np.nan, "verdict": ""}
        self._rows.append(row)
        return row

    def _baseline(self, model: nn.Module, exact: dict[str, Predictions]) -> None:
        row = self._row(0, "fp32", {})
        row["size_mb"] = model_size_mb(model)
        for part in PARTS[1:]:
            measured = self._measure(exact[part], exact[part], self.confidence)
            row |= _columns(part, measured) | {f"{part}_accuracy": exact[part].accuracy}
        row["certification_level"] = self.confidence
        row["final_dp_gap"] = self._dp_gap(exact["certification"], exact["certification"])
        missed = [m for m in measured if m.observed > m.constraint.bound]
        row["verdict"] = (
            f"FP32 itself misses the bound: {_sentence(_worst(missed))}" if missed else "FP32 is within the bounds"
        )

    def _finish(self, chosen: Candidate, data: dict, exact: dict, fairness_constraint: bool) -> None:
        self.final_dp_gap = chosen.row["final_dp_gap"]
        self.satisfied = chosen.row["verdict"].startswith("certified")
        worst = _worst(chosen.certification)
        is_one = chosen.is_attempted
        self.certificate = worst.as_dict(is_one) | {"constraints": [m.as_dict(is_one) for m in chosen.certification]}
        self.report = pd.DataFrame(self._rows)
        name = f"{chosen.row['method']} (rung {chosen.row['rung']} of {len(self.ladder)})"
        if self.satisfied:
            self.message = f"{name} is certified at {_percent(worst.level)}: {_sentence(worst)}"
        else:
            self.message = (
                f"{'not one of the repairs is' if fairness_constraint else f'{name} is not'} certified; "
                f"{'the closest by the selection images, ' if fairness_constraint else ''}{name}: {_sentence(worst)}"
            )
            out_of_reach = [m for m in chosen.certification if not m.smallest_certifiable <= m.constraint.bound]
            if out_of_reach:
                most = max(out_of_reach, key=lambda m: m.smallest_certifiable - m.constraint.bound)
                self.message += (
                    f". With {most.n} certification images no bound of {most.constraint.metric} over "
                    f"{most.constraint.over} below {most.smallest_certifiable:.3g} can be certified, were there no gap "
                    "at all: more images are needed"
                )
            if self._rows[0]["verdict"].startswith("FP32 itself"):
                self.message += f". {self._rows[0]['verdict']}"
        for m in chosen.certification:
            if m.left_out:
                groups = ", ".join(f"{group} ({n} images)" for group, n in m.left_out.items())
                self.message += f". Nothing is said of {m.constraint.over} {groups}"
            if m.classes_left_out:
                classes = ", ".join(map(str, m.classes_left_out))
                self.message += (
                    f". Nothing is said of {m.constraint.metric} over {m.constraint.over} of class {classes}"
                )

    def _failures(self) -> str:
        return "; ".join(f"{row['method']} {row['verdict']}" for row in self._rows[1:])

    def _say(self, what: str, share: float) -> None:
        if self._progress is not None:
            self._progress(what, min(1.0, share))

    # ------------------------------------------------------------------------------------------------------ measurement

    def _constraints(self, max_dp_gap, metric, max_gap, max_worst_group_drop, intersectional) -> list[Constraint]:
        if (metric is None) != (max_gap is None):
            raise QuantizationError("metric and max_gap go together: which gap, and how large it may be")
        if metric is not None and metric not in GAPS:
            raise QuantizationError(f"metric: unknown gap {metric!r}{suggest(metric, GAPS)}")
        if metric == DP and max_dp_gap is not None:
            raise QuantizationError(f"max_dp_gap and metric={DP!r} bound the same gap: give one of them")
        bounds = {DP: ("max_dp_gap", max_dp_gap), metric: ("max_gap", max_gap)} if metric != DP else {}
        bounds |= {DP: ("max_gap", max_gap)} if metric == DP else {}
        bounds |= {DROP: ("max_worst_group_drop", max_worst_group_drop)}
        given = {key: bound for key, (_, bound) in bounds.items() if bound is not None}
        for argument, bound in bounds.values():
            is_number = isinstance(bound, (int, float)) and not isinstance(bound, bool)
            if bound is not None and not (is_number and 0 < bound <= 1):
                raise QuantizationError(f"{argument} must lie in (0, 1], got {bound!r}")
        if not given:
            raise QuantizationError("give a bound: max_dp_gap, metric with max_gap, or max_worst_group_drop")
        if intersectional and len(self.sensitive_attributes) < 2:
            raise QuantizationError("intersectional=True needs two or more sensitive_attributes")
        over = [(attribute,) for attribute in self.sensitive_attributes]
        over += [tuple(self.sensitive_attributes)] if intersectional else []
        return [Constraint(key, attributes, float(bound)) for key, bound in given.items() for attributes in over]

    def _measure(self, exact: Predictions, quantized: Predictions, level: float) -> list[Measured]:
        return [self._measure_one(constraint, exact, quantized, level) for constraint in self.constraints]

    def _measure_one(
        self, constraint: Constraint, exact: Predictions, quantized: Predictions, level: float
    ) -> Measured:
        paired, names = _paired_counts(exact, quantized, constraint.attributes)
        is_drop = constraint.metric == DROP
        counts = paired if is_drop else paired.sum(axis=2)
        if is_drop:
            bound = worst_group_drop_bounds(paired, level, self.min_group_size)
        else:
            bound = gap_bounds(counts, constraint.metric, level, self.min_group_size)
        sizes = paired.sum(axis=(1, 2, 3))
        silent = sorted({*bound.left_out, *getattr(bound, "undefined", ())})
        left_out = {names[g]: int(sizes[g]) for g in silent}
        left_out |= dict.fromkeys((name for name in self._known(constraint.attributes) if name not in names), 0)
        return Measured(
            constraint,
            bound.observed,
            bound.low,
            bound.high,
            level,
            bound.n,
            left_out,
            getattr(bound, "classes_left_out", ()),
            smallest_certifiable(counts, constraint.metric, level, self.min_group_size),
            bound.reason,
        )

    def _known(self, attributes: Sequence[str]) -> list[str]:
        """The names of the groups that any of the images have."""
        columns = [self._codes[name] for name in attributes]
        return [_group_name(code) for code in np.unique(np.stack(columns, axis=1), axis=0).tolist()]

    def _dp_gap(self, exact: Predictions, quantized: Predictions) -> float:
        over = dict.fromkeys(constraint.attributes for constraint in self.constraints)
        gaps = [
            gap_bounds(_paired_counts(exact, quantized, attributes)[0].sum(axis=2), DP, 0.95, self.min_group_size)
            for attributes in over
        ]
        return float(np.max([gap.observed for gap in gaps]))  # NaN if one is

    def _predict(self, model: nn.Module, loader: Iterable, exact: Predictions, argument: str) -> Predictions:
        try:
            predictions = predict(model, loader)
        except (QuantizationError, EvaluationError) as error:
            raise _Unpredictable(str(error)) from error
        same = np.array_equal(predictions.y_true, exact.y_true) and all(
            np.array_equal(predictions.sensitive[name], exact.sensitive[name]) for name in self.sensitive_attributes
        )
        if not same:
            raise QuantizationError(
                f"{argument} gives other images each time, or in another order: turn shuffling and sampling off"
            )
        return predictions

    def _check_groups(self, exact: dict[str, Predictions], fairness_constraint: bool) -> None:
        """QuantizationError where the data have no two groups to compare, whatever is predicted."""
        for part, predictions in exact.items():
            for name in self.sensitive_attributes:
                if name not in predictions.sensitive:
                    has = ", ".join(predictions.sensitive) or "none"
                    raise QuantizationError(
                        f"{part} data have no sensitive attribute {name!r} (they have: {has}): "
                        'give batches {"image", "label", "sensitive": {name: codes}}'
                    )
                values, counts = np.unique(predictions.sensitive[name], return_counts=True)
                images = ", ".join(f"{value}: {n}" for value, n in zip(values, counts, strict=True))
                if len(values) < 2:
                    raise QuantizationError(
                        f"{part} data: sensitive attribute {name!r} has one group ({images} images); it takes two"
                    )
            if not fairness_constraint:
                continue
            for measured in self._measure(predictions, predictions, self.confidence):
                constraint = measured.constraint
                if measured.reason and constraint.metric != "predictive_parity_difference":  # which predictions decide
                    raise QuantizationError(
                        f"{part} data: {constraint.metric} over {constraint.over!r} cannot be certified: "
                        f"{measured.reason}; give more images or another min_group_size"
                    )

    # ------------------------------------------------------------------------------------------------------------- data

    def _divide(self, calibration, selection, certification, train) -> dict[str, Iterable]:
        """The data of each part. Loaders that were not given are parts of the calibration loader's images."""
        given = {"calibration": calibration, "selection": selection, "certification": certification, "train": train}
        for part in PARTS[1:]:
            for other, loader in given.items():
                if part != other and loader is not None and loader is given[part]:
                    raise QuantizationError(
                        f"{part}_data and {other}_data are the same loader: what chooses a repair cannot certify it"
                    )
        if train is not None and train is calibration and (selection is None or certification is None):
            raise QuantizationError(
                "train_data and calibration_data are the same loader, whose images are also what certifies: give other "
                "images to train on, or selection_data and certification_data"
            )
        if calibration is None:
            raise QuantizationError("quantize needs calibration_data: an iterable of batches of images and groups")
        calibration = given["calibration"] = _repeatable(calibration)
        missing = [part for part in PARTS[1:] if given[part] is None]
        data = {part: _repeatable(given[part]) for part in PARTS if given[part] is not None}
        if missing:
            gathered = _gather(calibration, self.sensitive_attributes)
            places = _stratified(gathered, 1 + len(missing), seed_for(self.seed, "fairness_aware", "split"))
            data |= {
                part: _batches(gathered, place) for part, place in zip(("calibration", *missing), places, strict=True)
            }
        return data


# --- the ladder -------------------------------------------------------------------------------------------------------


def _attributes(names: Sequence[str] | str) -> list[str]:
    names = [names] if isinstance(names, str) else list(names)
    if not names:
        raise QuantizationError("sensitive_attributes is empty: name at least one")
    if len(set(names)) < len(names):
        raise QuantizationError(f"sensitive_attributes names one twice: {', '.join(map(str, names))}")
    return names


def _ladder(ladder: Sequence[str | Rung] | None, allow_group_thresholds: bool, options: Mapping) -> list[Rung]:
    """The rungs, checked; the default ones that are in the table of methods."""
    if ladder is None:
        rungs = [*LADDER, *([GROUP_THRESHOLDS] if allow_group_thresholds else [])]
        rungs = [rung for rung in rungs if rung[0] in methods.METHODS]
    else:
        rungs = [(rung, {}) if isinstance(rung, str) else (rung[0], dict(rung[1])) for rung in ladder]
    if not rungs:
        raise QuantizationError("ladder is empty: give at least one method")
    for method, own in rungs:
        if method not in methods.METHODS:
            raise QuantizationError(f"ladder: unknown method {method!r}{suggest(method, methods.METHODS)}")
        if method == GROUP_THRESHOLDS[0] and not allow_group_thresholds:
            raise QuantizationError(f"ladder: {method} reads the group of every image: allow_group_thresholds=True")
        known = methods.options_of(methods.METHODS[method])
        for key in own:
            if key not in (*WIDTHS, *known):
                raise QuantizationError(f"ladder: {method} has no option {key!r}{suggest(key, (*WIDTHS, *known))}")
        for key in WIDTHS:
            if own.get(key) is not None:
                check_bits(own[key], f"ladder: {method}: {key}")
    everything = dict.fromkeys(key for method, _ in rungs for key in methods.options_of(methods.METHODS[method]))
    for key in options:
        if key not in everything:
            raise QuantizationError(f"no method of the ladder has an option {key!r}{suggest(key, everything)}")
    return rungs


# --- what is said -----------------------------------------------------------------------------------------------------


def _worst(measured: Sequence[Measured]) -> Measured:
    """The one with least room below its bound."""
    return max(measured, key=lambda one: one.excess)


def _columns(part: str, measured: Sequence[Measured]) -> dict[str, Any]:
    worst = _worst(measured)
    return {
        f"{part}_constraint": str(worst.constraint),
        f"{part}_estimate": worst.observed,
        f"{part}_low": worst.low,
        f"{part}_high": worst.high,
    }


def _sentence(measured: Measured) -> str:
    what = f"{measured.constraint.metric} over {measured.constraint.over}"
    if measured.reason:
        return f"{what} cannot be told: {measured.reason}"
    return (
        f"{what} is {measured.observed:.3g}, at most {measured.high:.3g} "
        f"(bound {measured.constraint.bound:g}, {measured.n} images)"
    )


def _percent(level: float) -> str:
    return f"{100 * level:.6g} %"


def _selection_verdict(candidate: Candidate) -> str:
    worst = _worst(candidate.selection)
    if candidate.is_kept:
        return f"kept on the selection images: {_sentence(worst)}"
    if candidate.is_near:
        return f"within the bounds on the selection images, but not surely: {_sentence(worst)}"
    return f"not kept on the selection images: {_sentence(worst)}"


# --- data -------------------------------------------------------------------------------------------------------------


def _paired_counts(
    exact: Predictions, quantized: Predictions, attributes: Sequence[str]
) -> tuple[np.ndarray, list[str]]:
    """(G, L, P, P) counts over the groups that occur, and their names."""
    codes = np.stack([exact.sensitive[name] for name in attributes], axis=1)
    present, group_N = np.unique(codes, axis=0, return_inverse=True)
    n_classes = max(2, exact.logits.shape[1], 1 + int(exact.y_true.max()))
    counts = paired_count_table(
        group_N.reshape(-1), exact.y_true, exact.y_pred, quantized.y_pred, len(present), n_classes
    )
    return counts, [_group_name(code) for code in present.tolist()]


def _group_name(code: Sequence[int]) -> str:
    return " & ".join(map(str, code))


def _codes(data: Mapping[str, Iterable], exact: dict[str, Predictions], attributes: Sequence[str]) -> dict:
    """The groups of all images by attribute, of the calibration images where they have them."""
    found = {name: [part.sensitive[name] for part in exact.values() if name in part.sensitive] for name in attributes}
    for batch in map(as_batch, data["calibration"]):
        if all(name in batch["sensitive"] for name in attributes):
            for name in attributes:
                found[name].append(torch.as_tensor(batch["sensitive"][name]).cpu().numpy().reshape(-1))
    return {name: np.concatenate(codes) if codes else np.empty(0, dtype=np.int64) for name, codes in found.items()}


def _digest(image: torch.Tensor) -> bytes:
    return hashlib.blake2b(image.contiguous().numpy().tobytes(), digest_size=16).digest()


def _check_apart(data: Mapping[str, Iterable]) -> None:
    """QuantizationError where an image is in two parts: what chooses a repair cannot certify it."""
    part_of: dict[bytes, str] = {}
    shared: dict[tuple[str, str], int] = {}
    for part, loader in data.items():
        own = {_digest(x) for batch in map(as_batch, loader) for x in torch.as_tensor(batch["image"]).detach().cpu()}
        for digest in own:
            other = part_of.setdefault(digest, part)
            if other != part:
                shared[other, part] = shared.get((other, part), 0) + 1
    for (one, other), count in shared.items():
        raise QuantizationError(
            f"{count} images of {other}_data are in {one}_data too: what chooses a repair cannot certify it"
        )


@dataclass(frozen=True)
class _Gathered:
    images: torch.Tensor
    labels: torch.Tensor
    sensitive: dict[str, torch.Tensor] = field(default_factory=dict)


def _gather(loader: Iterable, attributes: Sequence[str]) -> _Gathered:
    """All images of a loader that differ, with their labels and groups."""
    images, labels, sensitive, seen, copies = [], [], {name: [] for name in attributes}, set(), 0
    for batch in map(as_batch, loader):
        missing = [name for name in attributes if name not in batch["sensitive"]]
        if missing:
            has = ", ".join(batch["sensitive"]) or "none"
            raise QuantizationError(
                f"calibration_data has no sensitive attribute {missing[0]!r} (it has: {has}): "
                'give batches {"image", "label", "sensitive": {name: codes}}'
            )
        pixels = torch.as_tensor(batch["image"]).detach().cpu()
        keep = []
        for place, image in enumerate(pixels):
            digest = _digest(image)
            if digest not in seen:
                seen.add(digest)
                keep.append(place)
        copies += len(pixels) - len(keep)
        images.append(pixels[keep])
        labels.append(torch.as_tensor(batch["label"]).cpu().reshape(-1)[keep])
        for name in attributes:
            sensitive[name].append(torch.as_tensor(batch["sensitive"][name]).cpu().reshape(-1)[keep])
    if not seen:
        raise QuantizationError("calibration_data is empty: give at least one batch of images")
    if copies:
        warnings.warn(
            f"calibration_data: {copies} images are exact copies of others and are left out, since a copy in the "
            "certification images would not be new",
            QuantizationWarning,
            stacklevel=4,
        )
    return _Gathered(
        torch.cat(images), torch.cat(labels), {name: torch.cat(codes) for name, codes in sensitive.items()}
    )


def _stratified(gathered: _Gathered, parts: int, seed: int) -> list[np.ndarray]:
    """The places of the images of each part, in order: the images of every (group, label) dealt out in turn."""
    columns = [codes.numpy() for codes in (*gathered.sensitive.values(), gathered.labels)]
    _, stratum_N = np.unique(np.stack(columns, axis=1), axis=0, return_inverse=True)
    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(len(gathered.labels))
    dealt = shuffled[np.argsort(stratum_N.reshape(-1)[shuffled], kind="stable")]  # a stratum after the other
    return [np.sort(dealt[part::parts]) for part in range(parts)]


def _batches(gathered: _Gathered, places: np.ndarray) -> list[dict[str, Any]]:
    if not len(places):
        raise QuantizationError(f"calibration_data: {len(gathered.labels)} images cannot be divided into three parts")
    return [
        {
            "image": gathered.images[at],
            "label": gathered.labels[at],
            "sensitive": {name: codes[at] for name, codes in gathered.sensitive.items()},
        }
        for at in torch.from_numpy(places).split(BATCH)
    ]


def _repeatable(loader: Iterable) -> Iterable:
    """The loader, or a list of what is left of an iterator."""
    return list(loader) if iter(loader) is loader else loader
