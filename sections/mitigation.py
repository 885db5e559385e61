"""`mitigation`: the repairs, their settings, and the entries that sweep them; which cells are diagnosed."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic
from pydantic import ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt

from sections.base import Bits, Section, Share, checked_patterns, checked_widths, shortened, suggest
from sections.quantization import SAMPLED, MixedPrecision, Observer, PTQStatic

# of the mitigation phase: without training, then with some
PTQ_STRATEGIES = (
    "bias_aware_calibration",
    "group_weighted_observers",
    "minimax_ranges",
    "fair_bias_correction",
    "fair_reconstruction",
    "sensitive_channels",
    "sensitive_layers",
    "fair_mixed_precision",
    "output_calibration",
)

NOT_CALIBRATED = ("fair_mixed_precision", "output_calibration")  # what output_calibration does not start from
TRAINED_STRATEGIES = ("balanced_finetuning", "reweighing", "fairness_finetuning", "group_dro", "distillation")
STRATEGIES = (*PTQ_STRATEGIES, "threshold_adjustment", *TRAINED_STRATEGIES)


class Repair(Section):
    """What all repairs share. What a repair leaves out (None) is as in quantization.ptq_static."""

    method: Literal["ptq_static", "mixed_precision", "qat"]
    bit_widths: list[int | str] | None = None  # None: quantization.bit_widths
    balance: Literal["intersection", "attribute"] = "intersection"  # groups: of all the attributes, or of the first
    calibration_samples: PositiveInt | None = None

    @pydantic.field_validator("bit_widths", mode="before")
    @classmethod
    def _one_or_many(cls, value):
        return value if value is None or isinstance(value, list) else [value]

    @pydantic.field_validator("bit_widths")
    @classmethod
    def _widths(cls, value):
        return None if value is None else checked_widths(value)


class PTQRepair(Repair):
    """A repair without training: static quantization with one thing done otherwise."""

    method: Literal["ptq_static"] = "ptq_static"
    observer: Observer | None = None
    rounding: Literal["nearest", "adaround"] | None = None
    reconstruction_iterations: PositiveInt | None = None
    bias_correction: bool | None = None


Weighting = Literal["balanced", "worst_group"]  # every group counts the same, or the worst one half of all
Drift = Literal["kl", "loss"]  # what a group loses: divergence from FP32's predictions, or rise of the cross entropy


class BiasAwareCalibration(PTQRepair):
    """Calibration on a set in which every group of the sensitive attributes counts the same."""


class GroupWeightedObservers(PTQRepair):
    """Calibration on a set as it comes, each group's statistics with the same weight."""


class MinimaxRanges(PTQRepair):
    """Activation ranges of the least error in the worst group."""


class FairBiasCorrection(PTQRepair):
    """Bias correction of the mean error over reweighted groups."""

    weighting: Weighting = "worst_group"
    drift_metric: Drift = "kl"


class FairReconstruction(PTQRepair):
    """Learned rounding on an error over reweighted groups."""

    weighting: Weighting = "worst_group"
    drift_metric: Drift = "kl"


class SensitiveChannels(PTQRepair):
    """The output channels that cost the worst group most stay in 8 bits."""

    weighting: Weighting = "worst_group"
    drift_metric: Drift = "kl"
    extra_share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.05  # bytes they may take, as a share of all layers'


class SensitiveLayers(PTQRepair):
    """The layers that cost the worst group most keep 8 bits: of their inputs, or of weights and inputs."""

    drift_metric: Drift = "kl"
    sensitivity_samples: PositiveInt = 256  # calibration images that it is measured on
    layer_share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.25  # of layers and summands, at most
    extra_share: Share = 0.0  # bytes more than the uniform model's, as a share of all layers'; 0: no more
    wide_bits: Bits = 8
    widen: Literal["inputs", "weights_and_inputs"] = (
        "inputs"  # inputs take no bytes; for weights other layers pay a bit
    )
    # how many more bit operations inputs of any width may take, as a share; then layer_share does not apply
    extra_operations: Annotated[float, Field(gt=0.0)] | None = None
    worst_share: Annotated[float, Field(gt=0.0, le=1.0)] | None = None  # of the groups whose mean counts; None: worst

    @pydantic.field_validator("extra_operations")
    @classmethod
    def _of_inputs(cls, value, info):
        if value is not None and info.data.get("widen") == "weights_and_inputs":
            raise ValueError("is for inputs: leave it out, or set widen: inputs")
        return value


class FairMixedPrecision(MixedPrecision):
    """Mixed precision whose widths cost the worst group least, or the mean of the worst."""

    method: Literal["mixed_precision"] = "mixed_precision"
    bit_widths: list[int | str] | None = None
    balance: Literal["intersection", "attribute"] = "intersection"
    sensitivity_samples: PositiveInt = 256  # of all groups together
    worst_share: Annotated[float, Field(gt=0.0, le=1.0)] | None = None  # of the groups whose mean counts; None: worst

    @pydantic.field_validator("bit_widths", mode="before")
    @classmethod
    def _one_or_many_widths(cls, value):
        return value if value is None or isinstance(value, list) else [value]

    @pydantic.field_validator("bit_widths")
    @classmethod
    def _widths(cls, value):
        return None if value is None else checked_widths(value)


class ThresholdAdjustment(PTQRepair):
    """A decision threshold for each group, fitted on the validation split; predicting needs the group (fairlearn)."""

    constraint: Literal[
        "demographic_parity", "equalized_odds", "true_positive_rate_parity", "false_positive_rate_parity"
    ] = "equalized_odds"


class Started(Repair):
    """A repair of what another one without training gives."""

    start: Literal["ptq_static", *PTQ_STRATEGIES] = "ptq_static"  # a hybrid, where it is a repair
    start_options: dict[str, pydantic.JsonValue] = {}  # settings of that repair

    @pydantic.model_validator(mode="after")
    def _keys_of_its_start(self):
        known = list(start_keys(self.start))
        for key in self.start_options:
            if key not in known:
                raise ValueError(f"start_options: {self.start} has no key {key!r}{suggest(key, known)}")
        section = PTQStatic if self.start == "ptq_static" else STRATEGY_SECTIONS[self.start]
        section(**self.start_options)
        return self


class OutputCalibration(PTQRepair, Started):
    """The logits' scale and biases, fitted to FP32's predictions on reweighted groups."""

    start: Literal["ptq_static", *(name for name in PTQ_STRATEGIES if name not in NOT_CALIBRATED)] = "ptq_static"
    weighting: Weighting = "balanced"
    drift_metric: Drift = "kl"  # which group is the worst


class TrainedRepair(Started):
    """Short training of a quantized model, from what a repair without training gives. What is left out (None) is as in
    quantization.qat."""

    method: Literal["qat"] = "qat"
    epochs: PositiveInt = 1
    batch_size: PositiveInt | None = None
    learning_rate: PositiveFloat | None = None
    max_train: PositiveInt | None = None  # train on at most so many images
    best_epoch: Literal["worst_group", "accuracy"] = "worst_group"  # of the validation split: which accuracy decides


class BalancedFinetuning(TrainedRepair):
    """Cross entropy on batches in which every group has the same number of images."""


class Reweighing(TrainedRepair):
    """Cross entropy with the weights that make label and group independent (Kamiran & Calders 2012)."""


class FairnessFinetuning(TrainedRepair):
    """Cross entropy and a differentiable gap between the groups, on batches that hold all of them."""

    constraint: Literal["demographic_parity", "equalized_odds"] = "equalized_odds"
    fairness_weight: NonNegativeFloat = 1.0  # of the gap in the loss


class GroupDRO(TrainedRepair):
    """The loss of the groups that do worst (Sagawa et al. 2020)."""

    step_size: PositiveFloat = 0.01  # of the groups' weights


class Distillation(TrainedRepair):
    """FP32's predictions, learned back; the groups that have drifted most count most."""

    temperature: PositiveFloat = 1.0
    step_size: PositiveFloat = 0.01  # of the groups' weights


STRATEGY_SECTIONS: dict[str, type[Section]] = {
    "bias_aware_calibration": BiasAwareCalibration,
    "group_weighted_observers": GroupWeightedObservers,
    "minimax_ranges": MinimaxRanges,
    "fair_bias_correction": FairBiasCorrection,
    "fair_reconstruction": FairReconstruction,
    "sensitive_channels": SensitiveChannels,
    "sensitive_layers": SensitiveLayers,
    "fair_mixed_precision": FairMixedPrecision,
    "output_calibration": OutputCalibration,
    "threshold_adjustment": ThresholdAdjustment,
    "balanced_finetuning": BalancedFinetuning,
    "reweighing": Reweighing,
    "fairness_finetuning": FairnessFinetuning,
    "group_dro": GroupDRO,
    "distillation": Distillation,
}


def start_keys(start: str) -> list[str]:
    """The settings that a training's start has of its own."""
    if start == "ptq_static":
        return [key for key in PTQStatic.model_fields if key not in COMMON_REPAIR_KEYS]
    return [key for key in STRATEGY_SECTIONS[start].model_fields if key not in COMMON_REPAIR_KEYS]


COMMON_REPAIR_KEYS = ("method", "bit_widths", "balance", "calibration_samples", "calibration_split")


class StrategyEntry(Section):
    """A strategy with settings of its own: `{strategy: group_dro, bit_widths: [4], start: minimax_ranges}`."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    strategy: str
    architectures: list[str] | None = None  # None: all

    @pydantic.field_validator("strategy")
    @classmethod
    def _known(cls, value):
        return _strategy_name(value)

    @pydantic.field_validator("architectures", mode="before")
    @classmethod
    def _one_or_many(cls, value):
        return value if value is None or isinstance(value, list) else [value]

    @pydantic.model_validator(mode="after")
    def _keys_of_its_section(self):
        kind = STRATEGY_SECTIONS[self.strategy]
        for key in self.options():
            if key not in kind.model_fields:
                raise ValueError(f"{self.strategy} has no key {key!r}{suggest(key, kind.model_fields)}")
        return self

    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    def section(self, common: Section) -> Section:
        """The strategy's section with this entry's keys over it. ValueError, one line, for a bad one."""
        kind, keys = STRATEGY_SECTIONS[self.strategy], common.model_dump()
        if self.options().get("start", keys.get("start")) != keys.get("start"):
            keys["start_options"] = {}  # those are of another start
        try:
            return kind(**{**keys, **self.options()})
        except pydantic.ValidationError as error:
            detail = error.errors()[0]
            where = "".join(f"{part}: " for part in detail["loc"])
            if detail["type"] == "value_error":
                raise ValueError(f"{self.strategy}: {where}{detail['msg'].removeprefix('Value error, ')}") from None
            message = detail["msg"][0].lower() + detail["msg"][1:]
            raise ValueError(f"{self.strategy}: {where}{message}, got {shortened(detail.get('input'))}") from None


class Diagnostics(Section):
    """Why a group suffers: measured for the cells that a pattern matches (see deployment), into diagnostics.csv."""

    cells: list[str] = []
    samples: PositiveInt = 1024  # images of the validation split
    hessian_samples: PositiveInt = 64  # of each group

    @pydantic.field_validator("cells", mode="before")
    @classmethod
    def _one_or_many(cls, value):
        return value if value is None or isinstance(value, list) else [value]

    @pydantic.field_validator("cells")
    @classmethod
    def _are_patterns(cls, value):
        return checked_patterns(value)


class Mitigation(Section):
    strategies: list[Annotated[str | StrategyEntry, pydantic.BeforeValidator(lambda value: _strategy_item(value))]] = (
        Field(default_factory=lambda: _default_strategies())
    )
    diagnostics: Diagnostics = Diagnostics()
    bias_aware_calibration: BiasAwareCalibration = BiasAwareCalibration()
    group_weighted_observers: GroupWeightedObservers = GroupWeightedObservers()
    minimax_ranges: MinimaxRanges = MinimaxRanges()
    fair_bias_correction: FairBiasCorrection = FairBiasCorrection()
    fair_reconstruction: FairReconstruction = FairReconstruction()
    sensitive_channels: SensitiveChannels = SensitiveChannels()
    sensitive_layers: SensitiveLayers = SensitiveLayers()
    fair_mixed_precision: FairMixedPrecision = FairMixedPrecision()
    output_calibration: OutputCalibration = OutputCalibration()
    threshold_adjustment: ThresholdAdjustment = ThresholdAdjustment()
    balanced_finetuning: BalancedFinetuning = BalancedFinetuning()
    reweighing: Reweighing = Reweighing()
    fairness_finetuning: FairnessFinetuning = FairnessFinetuning()
    group_dro: GroupDRO = GroupDRO()
    distillation: Distillation = Distillation()

    @pydantic.field_validator("strategies", mode="before")
    @classmethod
    def _one_or_many(cls, value):
        return value if isinstance(value, list) else [value]

    def entries(self) -> list[StrategyEntry]:
        return [StrategyEntry(strategy=entry) if isinstance(entry, str) else entry for entry in self.strategies]

    def section(self, entry: StrategyEntry) -> Section:
        """The settings of an entry: its own keys over those of its strategy's section."""
        return entry.section(getattr(self, entry.strategy))


def _strategy_item(value):
    """An item of `mitigation.strategies`: validated here, so that its errors have its own path and not a union's."""
    if isinstance(value, str):
        return _strategy_name(value)
    return StrategyEntry.model_validate(value) if isinstance(value, dict) else value


def _strategy_name(value: str) -> str:
    if value not in STRATEGIES:
        raise ValueError(f"unknown strategy {value!r}{suggest(value, STRATEGIES)}")
    return value


def _default_strategies() -> list[str | StrategyEntry]:
    return [
        "bias_aware_calibration",
        StrategyEntry(strategy="sensitive_layers", bit_widths=[4], architectures=SAMPLED),
        StrategyEntry(strategy="group_dro", bit_widths=[4], architectures=SAMPLED),
    ]
