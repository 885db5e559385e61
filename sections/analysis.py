"""`analysis`: what is claimed before the data are seen, and what the report holds a model to."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic
from pydantic import Field, NonNegativeFloat

from sections.base import Section, checked_widths, distinct, suggest
from sections.mitigation import STRATEGIES

GAP_METRICS = (
    "accuracy_gap",
    "demographic_parity_difference",
    "equalized_odds_difference",
    "equalized_odds_mean",
    "equal_opportunity_difference",
    "predictive_equality_difference",
    "predictive_parity_difference",
)

CLAIM_METRICS = (
    "accuracy",
    "accuracy_loss",  # the same with the other sign
    "worst_group_accuracy",  # each model's own worst group
    "worst_group_excess_loss",  # loss of the reference's worst group, minus the loss of all images
    *GAP_METRICS,
    "seconds_ratio",  # seconds of calibration and training, as a multiple of the reference's
)


class Cells(Section):
    """Some cells of the sweep: `{method: ptq_static, bits: [4, W4A8]}`. A key left out is any, but for the strategy."""

    method: list[Literal["ptq_static", "ptq_dynamic", "qat", "mixed_precision"]] | None = None
    strategy: list[Literal[STRATEGIES]] | None = None  # None: plain cells, without one
    bits: list[int | str] | None = None
    model: list[str] | None = None
    dataset: list[Literal["celeba", "utkface", "fairface", "synthetic"]] | None = None
    options: dict[str, pydantic.JsonValue] = {}  # as in the rows' column of that name, such as {rounding: adaround}
    settings: Literal["main", "all"] = "main"  # of a method, strategy and width: the setting of most cells, or all

    @pydantic.field_validator("method", "strategy", "bits", "model", "dataset", mode="before")
    @classmethod
    def _one_or_many(cls, value):
        return value if value is None or isinstance(value, list) else [value]

    @pydantic.field_validator("bits")
    @classmethod
    def _widths(cls, value):
        return None if value is None else checked_widths(value)

    @pydantic.model_serializer(mode="wrap")
    def _without_defaults(self, handler):
        defaults = {"options": {}, "settings": "main"}
        return {key: value for key, value in handler(self).items() if value is not None and value != defaults.get(key)}


def _reference(value):
    """`against`: validated here, so that the errors of a mapping have its own path and not a union's."""
    if isinstance(value, dict):
        return Cells.model_validate(value)
    if isinstance(value, str) and value not in ("fp32", "plain"):
        raise ValueError(f"unknown value {value!r}; choose from fp32, plain, or cells such as {{method: ptq_static}}")
    return value


class Claim(Section):
    """What is claimed of a difference between cells, and the test that decides it (hypotheses.py has the methods).

    The claim is that the effect (cells - against, in percentage points) lies above one bound, below the other, or
    between both. `supported`: its interval does; `contradicted`: its interval lies outside.
    """

    metric: Literal[CLAIM_METRICS]
    cells: Cells
    # FP32; the plain cell of a mitigated one; or cells of the same model, seed and, where no bits are given, widths
    against: Annotated[str | Cells, pydantic.BeforeValidator(_reference)] = "fp32"
    # None: the mean over models; or the slope over doublings of the models' sizes, over halvings of the groups' sizes;
    # or how far the models' losses in one training predict those in another (a correlation)
    by: Literal["model_size", "group_size", "architecture"] | None = None
    above: float | None = None
    below: float | None = None
    # interval: a bootstrap over images alone; permutation: a permutation test must agree with it. None: permutation
    # where there is one, which is `by`, and gaps between groups whose only bound is 0
    test: Literal["interval", "permutation"] | None = None
    level: Annotated[float, Field(gt=0.5, lt=1.0)] | None = None  # None: analysis.confidence

    @property
    def is_permuted(self) -> bool:
        return self.test == "permutation" or (self.test is None and self._has_permutation)

    @property
    def _has_permutation(self) -> bool:
        return self.by is not None or (self.metric in GAP_METRICS and {self.above, self.below} == {None, 0.0})

    @pydantic.model_validator(mode="after")
    def _can_be_decided(self):
        if self.above is None and self.below is None:
            raise ValueError("give above, below or both: the bounds between which the effect shall lie")
        if self.above is not None and self.below is not None and not self.above < self.below:
            raise ValueError(f"above = {self.above:g} must be less than below = {self.below:g}")
        if self.test == "permutation" and not self._has_permutation:
            raise ValueError(
                "test permutation needs `by`, or a gap between groups with 0 as its only bound; use test: interval"
            )
        if self.metric == "predictive_parity_difference" and (self.by is not None or not self.is_permuted):
            raise ValueError(
                "metric predictive_parity_difference can only be tested by permutation, with 0 as its only bound"
            )
        if self.by == "group_size" and self.metric not in ("accuracy", "accuracy_loss"):
            raise ValueError(f"by group_size needs metric accuracy or accuracy_loss, not {self.metric}")
        if self.by == "architecture" and not self.is_permuted:
            raise ValueError("by architecture can only be tested by permutation")
        if self.metric == "seconds_ratio" and (self.by is not None or self.test is not None or self.against == "fp32"):
            raise ValueError("metric seconds_ratio takes neither by nor test, and is not against fp32")
        return self

    @pydantic.model_serializer(mode="wrap")
    def _without_missing(self, handler):
        return {key: value for key, value in handler(self).items() if value is not None and value != []}


class Hypothesis(Claim):
    """A claim with a name; with those of `also` it is supported where all are, contradicted where one is."""

    id: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")]
    statement: Annotated[str, Field(min_length=1)]
    also: list[Claim] = []

    @pydantic.model_validator(mode="after")
    def _times_are_beside_another(self):
        if self.metric == "seconds_ratio":
            raise ValueError("metric seconds_ratio stands in `also` only: times are not the same twice")
        return self

    @property
    def claims(self) -> list[Claim]:
        return [self, *self.also]

    @pydantic.model_serializer(mode="wrap")
    def _name_first(self, handler):
        values = {key: value for key, value in handler(self).items() if value is not None and value != []}
        return {"id": values.pop("id"), "statement": values.pop("statement"), **values}


def _hypothesis_item(value):
    """An item of `analysis.hypotheses`: the name of one of HYPOTHESES, or a mapping."""
    if not isinstance(value, str):
        return value
    known = {hypothesis.id: hypothesis for hypothesis in HYPOTHESES}
    if value not in known:
        raise ValueError(f"unknown hypothesis {value!r}{suggest(value, ['default', *known])}")
    return known[value]


class ReportBounds(Section):
    """What the recommended configuration holds (recommendation.py has the rule; the report's page lets a reader change
    them); None: no bound. Losses are against the most accurate FP32 model."""

    largest_loss: NonNegativeFloat | None = 1.0  # of accuracy, in points
    largest_worst_group_loss: NonNegativeFloat | None = 1.0  # of worst-group accuracy, in points
    smallest_accuracy: Annotated[float, Field(ge=0, le=100)] | None = None  # in %
    largest_gap: NonNegativeFloat | None = None  # between the best and the worst group's accuracy, in points
    largest_size_mb: NonNegativeFloat | None = None
    largest_latency_ms: NonNegativeFloat | None = None  # of one image
    prefer: Literal["size", "latency", "worst_group", "accuracy", "gap"] = "size"  # of those that hold every bound


ParetoDimension = Literal[
    "accuracy", "worst_group_accuracy", "accuracy_gap", "equalized_odds_difference", "demographic_parity_difference",
    "size_mb", "latency_ms_b1", "latency_ms_b32",
]  # fmt: skip


class Analysis(Section):
    bootstrap_replicates: Annotated[int, Field(ge=100)] = 10_000
    confidence: Annotated[float, Field(gt=0.5, lt=1.0)] = 0.95
    equivalence_margin: Annotated[float, Field(gt=0, lt=100)] = 1.0  # points of accuracy: "as good as FP32" (TOST)
    attribute: str | None = None  # the sensitive attribute of the group metrics; None: the data set's first
    # what is claimed before the data are seen: `default` (all of HYPOTHESES), the name of one of them, or your own
    hypotheses: list[Annotated[Hypothesis, pydantic.BeforeValidator(_hypothesis_item)]] = Field(
        default_factory=lambda: list(HYPOTHESES)
    )

    @pydantic.field_validator("hypotheses", mode="before")
    @classmethod
    def _defaults_by_name(cls, value):
        items = value if isinstance(value, list) else [value]
        return [each for item in items for each in (HYPOTHESES if item == "default" else [item])]

    @pydantic.field_validator("hypotheses")
    @classmethod
    def _no_twins_by_id(cls, value):
        distinct([hypothesis.id for hypothesis in value])
        return value

    bounds: ReportBounds = ReportBounds()

    # what a setting must not be beaten in to be on the Pareto front
    pareto: list[ParetoDimension] = Field(default=["accuracy", "accuracy_gap", "size_mb"], min_length=2)
    vector_format: Literal["pdf", "svg"] = "pdf"  # of the figures, beside PNG

    @pydantic.field_validator("pareto")
    @classmethod
    def _no_twins(cls, value):
        return distinct(value)


STATIC_4_BITS = Cells(method=["ptq_static"], bits=[4])

HYPOTHESES = (
    Hypothesis(
        id="H1-larger-models",
        statement="Larger models are more resilient: they lose less accuracy at 4 bits",
        metric="accuracy_loss",
        cells=STATIC_4_BITS,
        by="model_size",
        below=0.0,
    ),
    Hypothesis(
        id="H2-qat-gain",
        statement="At 4 bits QAT gains modestly over PTQ, at a multiple of the cost",
        metric="accuracy",
        cells=Cells(method=["qat"], bits=[4]),
        against=STATIC_4_BITS,
        above=0.0,
        below=5.0,
        also=[
            Claim(metric="seconds_ratio", cells=Cells(method=["qat"], bits=[4]), against=STATIC_4_BITS, above=2.0),
        ],
    ),
    Hypothesis(
        id="H3-balanced-calibration",
        statement="Group-balanced calibration reduces the equalized-odds difference",
        metric="equalized_odds_difference",
        cells=Cells(strategy=["bias_aware_calibration"], settings="all"),
        against="plain",
        below=0.0,
    ),
    Hypothesis(
        id="H4-mixed-precision",
        statement="Mixed precision preserves fairness: the accuracy gap widens by less than a point",
        metric="accuracy_gap",
        cells=Cells(method=["mixed_precision"]),
        below=1.0,
    ),
    Hypothesis(
        id="H5-int8",
        statement="INT8 is the sweet spot: within a point of FP32, and 4 bits cost more than a point",
        metric="accuracy",
        cells=Cells(method=["ptq_static"], bits=[8]),
        above=-1.0,
        below=1.0,
        also=[
            Claim(metric="accuracy", cells=STATIC_4_BITS, against=Cells(method=["ptq_static"], bits=[8]), below=-1.0),
        ],
    ),
    Hypothesis(
        id="H6-architecture",
        statement="The architecture predicts what 4 bits cost: trainings of one lose alike",
        metric="accuracy_loss",
        cells=STATIC_4_BITS,
        by="architecture",
        above=0.0,
    ),
    Hypothesis(
        id="H7-small-groups",
        statement="Quantization hits small groups hardest: they lose more accuracy at 4 bits",
        metric="accuracy_loss",
        cells=STATIC_4_BITS,
        by="group_size",
        above=0.0,
    ),
    Hypothesis(
        id="H8-qat-fairness",
        statement="QAT is less fair than PTQ at the same bits: its accuracy gap is wider",
        metric="accuracy_gap",
        cells=Cells(method=["qat"]),
        against=Cells(method=["ptq_static"]),
        above=0.0,
    ),
    Hypothesis(
        id="H9-worst-group",
        statement="4 bits cost the worst group more than the average",
        metric="worst_group_excess_loss",
        cells=STATIC_4_BITS,
        above=0.0,
    ),
)
