"""The study's configuration: typed, nested and closed.

Every key, its default and its range is declared here and nowhere else; `configs/config.yaml` lists them all with a
comment. `load_config` merges a YAML file and `--set` overrides over the defaults and refuses what it does not know,
with one line that names the file, the path of the key and the nearest valid choice.
"""

from __future__ import annotations

import copy
import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pydantic
import yaml
from pydantic import ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

DATASETS = ("celeba", "utkface", "fairface", "synthetic")
MODELS = ("resnet50", "mobilenet_v2", "squeezenet1_1", "efficientnet_b0", "vit_small_patch16_224")

Observer = Literal["minmax", "moving_average", "percentile", "mse", "entropy"]  # of activations
WeightObserver = Literal["minmax", "percentile", "mse", "entropy"]
Granularity = Literal["per_channel", "per_tensor"]
BackendName = Literal["x86", "arm", "tensorrt"]
Engine = Literal["onnxruntime", "openvino", "inductor"]
Bits = Annotated[int, Field(ge=2, le=8)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
WIDTH = re.compile(r"W([2-8])A([2-8])")

# shorthand -> (method, strategy, weight bits, activation bits); None bits: swept over quantization.bit_widths
SHORTHANDS: dict[str, tuple[str, str | None, int | None, int | None]] = {
    "PTQ_INT8": ("ptq_static", None, 8, 8),
    "PTQ_INT4": ("ptq_static", None, 4, 4),
    "PTQ_INT2": ("ptq_static", None, 2, 2),
    "PTQ_W4A8": ("ptq_static", None, 4, 8),
    "QAT_INT8": ("qat", None, 8, 8),
    "QAT_INT4": ("qat", None, 4, 4),
    "dynamic": ("ptq_dynamic", None, None, None),
    "bias_aware": ("ptq_static", "bias_aware_calibration", None, None),
}
QUANTIZATION_METHODS = ("ptq_static", "ptq_dynamic", "qat", "mixed_precision")
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


class ConfigError(ValueError):
    """Bad configuration; the message is one line for the person at the keyboard."""


class Section(pydantic.BaseModel):
    """A closed, immutable group of keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


# ---------------------------------------------------------------------------------------------------------------- data


class DatasetSection(Section):
    """What all data sets share."""

    root: str | None = None  # folder of the data set; None: data/datasets/<name>
    target: str
    sensitive: list[str] = Field(min_length=1)
    image_size: Annotated[int, Field(ge=32, le=512)] = 64  # pixels a side, after decoding
    max_train: PositiveInt | None = None  # at most so many training images (a seeded stratified subset); None: all
    max_test: PositiveInt | None = None  # likewise for the test split
    validation_share: Annotated[float, Field(gt=0.0, lt=0.5)] = (
        0.1  # of train, where the set has no official validation
    )


class CelebA(DatasetSection):
    target: str = "Smiling"
    sensitive: list[str] = ["Male", "Young"]


class UTKFace(DatasetSection):
    target: Literal["gender", "race", "age_group"] = "gender"
    sensitive: list[Literal["gender", "race", "age_group"]] = Field(default=["race", "age_group"], min_length=1)
    test_share: Annotated[float, Field(gt=0.0, lt=0.9)] = 0.2  # the set has no official split


class FairFace(DatasetSection):
    target: Literal["gender", "race", "age", "age_group"] = "gender"
    sensitive: list[Literal["gender", "race", "age", "age_group"]] = Field(default=["race", "age_group"], min_length=1)


class Synthetic(DatasetSection):
    target: Literal["smile", "gender", "age", "skin"] = "gender"
    sensitive: list[Literal["smile", "gender", "age", "skin"]] = Field(default=["skin", "age"], min_length=1)
    image_size: Annotated[int, Field(ge=32, le=512)] = 32
    train_images: PositiveInt = 2500
    validation_images: PositiveInt = 1000
    test_images: PositiveInt = 2000
    seed: NonNegativeInt = 0
    minority_share: Annotated[float, Field(gt=0.0, le=0.5)] = 0.3  # share of dark-skin faces; 0.5 is neutral
    label_correlation: Annotated[float, Field(ge=-1.0, le=1.0)] = 0.0  # of smile with gender; 0 is neutral
    group_noise: Share = 0.08  # SD of the extra sensor noise of dark-skin women (intensities: 0 to 1); 0 is neutral
    group_contrast: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.35  # share of contrast that they lose; 0 is neutral


class Data(Section):
    dataset: list[Literal["celeba", "utkface", "fairface", "synthetic"]] = Field(default=["synthetic"], min_length=1)
    cache: str = "data/cache"  # decoded images, uint8, memory-mapped
    workers: PositiveInt = 2  # threads that decode
    min_group_size: PositiveInt = 20  # smaller groups are reported, flagged and left out of the gaps
    celeba: CelebA = CelebA()
    utkface: UTKFace = UTKFace()
    fairface: FairFace = FairFace()
    synthetic: Synthetic = Synthetic()

    @pydantic.field_validator("dataset", mode="before")
    @classmethod
    def _one_or_many(cls, value):
        return [value] if isinstance(value, str) else value

    @pydantic.field_validator("dataset")
    @classmethod
    def _no_twins(cls, value):
        return _distinct(value)


# -------------------------------------------------------------------------------------------------- models and training


class Models(Section):
    architectures: list[str] = Field(default=list(MODELS), min_length=1)
    pretrained: bool = False  # ImageNet weights (torchvision, timm); needs the network once
    weights: dict[str, str] = {}  # architecture -> a checkpoint of yours; a file alone is that of the only architecture
    options: dict[str, dict[str, pydantic.JsonValue]] = {}  # architecture -> arguments for its constructor (patch_size)

    @pydantic.field_validator("architectures", mode="before")
    @classmethod
    def _one_or_many(cls, value):
        return [value] if isinstance(value, str) else value

    @pydantic.field_validator("architectures")
    @classmethod
    def _no_twins(cls, value):
        return _distinct(value)

    @pydantic.field_validator("weights", mode="before")
    @classmethod
    def _of_the_only_architecture(cls, value, info: pydantic.ValidationInfo):
        architectures = info.data.get("architectures", [])
        if not isinstance(value, str):
            return value
        if len(architectures) != 1:
            raise ValueError("with several architectures give {architecture: file}, not one file")
        return {architectures[0]: value}


class TrainingOverrides(Section):
    """Keys of `training` that one architecture has otherwise."""

    epochs: PositiveInt | None = None
    batch_size: PositiveInt | None = None
    learning_rate: PositiveFloat | None = None
    weight_decay: NonNegativeFloat | None = None
    warmup_epochs: NonNegativeFloat | None = None
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    patience: PositiveInt | None = None
    precision: Literal["auto", "fp32", "bf16"] | None = None
    gradient_clip: PositiveFloat | None = None
    max_train: PositiveInt | None = None


PER_MODEL: dict[str, dict[str, Any]] = {
    "squeezenet1_1": {"learning_rate": 5e-4},  # from scratch it dies at ordinary learning rates
    "vit_small_patch16_224": {"learning_rate": 5e-4},
}


class Training(Section):
    epochs: PositiveInt = 4
    batch_size: PositiveInt = 32
    learning_rate: PositiveFloat = 1e-3  # AdamW's peak, after warm-up; then cosine to zero
    weight_decay: NonNegativeFloat = 0.01
    warmup_epochs: NonNegativeFloat = 1.0
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    patience: PositiveInt | None = None  # stop after so many epochs without a better validation accuracy; None: never
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on CUDA, and on a CPU that has it where it pays
    gradient_clip: PositiveFloat | None = 1.0  # largest gradient norm
    max_train: PositiveInt | None = None  # train on at most so many images
    flip: bool = True  # augmentation: mirror half of the images
    shift: NonNegativeInt = 0  # augmentation: shift by up to so many pixels
    brightness: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0  # augmentation: scale the pixels by 1 ± so much
    per_model: dict[str, TrainingOverrides] = {  # merged, key by key, with what a file or --set gives
        name: TrainingOverrides(**keys) for name, keys in PER_MODEL.items()
    }

    @pydantic.field_validator("per_model", mode="before")
    @classmethod
    def _merged(cls, value):
        if not isinstance(value, dict) or not all(isinstance(keys, dict) for keys in value.values()):
            return value
        return {name: {**PER_MODEL.get(name, {}), **value.get(name, {})} for name in {**PER_MODEL, **value}}

    def for_model(self, architecture: str) -> Training:
        """The settings of one architecture: its entry in `per_model` over the common ones."""
        overrides = self.per_model.get(architecture)
        update = {} if overrides is None else overrides.model_dump(exclude_none=True)
        return self.model_copy(update={**update, "per_model": {}})


# -------------------------------------------------------------------------------------------------------- quantization


class Calibrated(Section):
    """What all methods share that calibrate on images: how ranges and scales are chosen. A list is swept."""

    observer: list[Observer] = Field(default=["mse"], min_length=1)  # how ranges are chosen (activations)
    weight_observer: WeightObserver = "mse"  # how weight scales are chosen
    percentile: Annotated[float, Field(gt=50.0, le=100.0)] = 99.99  # for observer percentile
    calibration_samples: PositiveInt = 256
    calibration_split: Literal["train", "validation"] = "train"
    weight_granularity: Granularity = "per_channel"  # a weight scale for each output channel, or one a layer
    activation_scheme: Literal["affine", "symmetric"] | None = None  # with a zero point or around zero; None: backend's
    equalize: bool = False  # cross-layer equalization before anything else (Nagel et al. 2019)

    @pydantic.field_validator("observer", mode="before")
    @classmethod
    def _one_or_many(cls, value):
        return [value] if isinstance(value, str) else value


class Rounded(Calibrated):
    """What is done after calibration, without labels: learned rounding and bias correction."""

    bias_correction: bool = False  # take back each channel's mean error (Nagel et al. 2019)
    rounding: Literal["nearest", "adaround"] = "nearest"  # adaround: learned (Nagel et al. 2020, Li et al. 2021)
    reconstruction_unit: Literal["block", "layer"] = "block"  # for rounding adaround: what is learned together
    reconstruction_iterations: PositiveInt = 300  # for rounding adaround: optimizer steps for each unit
    learn_activation_scales: bool = True  # for rounding adaround: the activations' scales with it


class PTQStatic(Rounded):
    """Post-training static quantization."""

    first_last_bits: Bits | None = None  # width of the first and last layer; None: as the others


class PTQDynamic(Section):
    """Post-training dynamic quantization: activation ranges per image at run time, no calibration data."""

    weight_observer: WeightObserver = "mse"
    percentile: Annotated[float, Field(gt=50.0, le=100.0)] = 99.99
    weight_granularity: Granularity = "per_channel"
    equalize: bool = False
    first_last_bits: Bits | None = None


class QAT(Calibrated):
    """Quantization-aware training from the FP32 checkpoint, calibrated first. Augmentation is that of `training`."""

    first_last_bits: Bits | None = None
    epochs: PositiveInt = 2
    batch_size: PositiveInt = 32
    learning_rate: PositiveFloat = 3e-4  # AdamW's peak; of weights in units of their channel's largest
    weight_decay: NonNegativeFloat = 0.0
    warmup_epochs: NonNegativeFloat = 0.1
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    gradient_clip: PositiveFloat | None = 1.0
    max_train: PositiveInt | None = None  # train on at most so many images


class MixedPrecision(Rounded):
    """Each layer's width chosen by its sensitivity, within a budget; the budget of a width is its uniform size."""

    widths: list[Literal[2, 3, 4, 5, 6, 7, 8, 16]] = Field(default=[2, 3, 4, 6, 8, 16], min_length=1)  # to choose from
    size_budget_bytes: PositiveInt | None = None  # of the whole model; None: of the model with bit_widths everywhere
    bit_operations_budget: PositiveInt | None = None  # multiply-accumulates x bits of both factors, one image
    sensitivity_metric: Literal["kl", "loss"] = "kl"  # divergence from FP32's predictions, or rise of the loss
    sensitivity_samples: PositiveInt = 128  # calibration images that it is measured on
    classifier_bits: Literal[2, 3, 4, 5, 6, 7, 8, 16, 32] | None = 32  # of the last layer; 32: FP32, None: chosen too


class _Entry(Section):
    """A method with settings of its own: `{method: ptq_static, bit_widths: [8, 4], observer: [minmax, entropy]}`."""

    method: str
    bit_widths: list[int | str] | None = None
    architectures: list[str] | None = None  # None: all

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def _one_or_many(cls, value, info: pydantic.ValidationInfo):
        if info.field_name not in LIST_KEYS:
            return value
        return value if value is None or isinstance(value, list) else [value]

    @pydantic.field_validator("method")
    @classmethod
    def _known(cls, value):
        return _method_name(value)

    @pydantic.field_validator("bit_widths")
    @classmethod
    def _widths(cls, value):
        return None if value is None else _widths(value)

    @pydantic.model_validator(mode="after")
    def _keys_of_its_method(self):
        method, _, weight_bits, _ = SHORTHANDS.get(self.method, (self.method, None, None, None))
        section = METHOD_SECTIONS[method]
        for key, value in self.options().items():
            if key not in section.model_fields:
                raise ValueError(
                    f"{key} = {value!r} does not apply to {self.method}; it has {', '.join(section.model_fields)}"
                )
        if weight_bits is not None and self.bit_widths is not None:
            raise ValueError(f"bit_widths does not apply to {self.method}, whose width is fixed")
        return self

    def options(self) -> dict[str, Any]:
        """The settings that this entry has otherwise than its method's section."""
        return self.model_dump(exclude={"method", "bit_widths", "architectures"})

    @pydantic.model_serializer(mode="wrap")
    def _without_missing(self, handler):
        return {key: value for key, value in handler(self).items() if value is not None}


METHOD_SECTIONS = {"ptq_static": PTQStatic, "ptq_dynamic": PTQDynamic, "qat": QAT, "mixed_precision": MixedPrecision}
LIST_KEYS = ("bit_widths", "observer", "widths", "architectures")
RECONSTRUCTION_KEYS = ("reconstruction_unit", "reconstruction_iterations", "learn_activation_scales")

# every key of every method's section, none of them set
_ENTRY_KEYS = {name: field for section in METHOD_SECTIONS.values() for name, field in section.model_fields.items()}
MethodEntry = pydantic.create_model(
    "MethodEntry",
    __base__=_Entry,
    __doc__=_Entry.__doc__,
    **{
        name: (Annotated[field.annotation, *field.metadata] | None if field.metadata else field.annotation | None, None)
        for name, field in _ENTRY_KEYS.items()
    },
)


def _method_item(value):
    """An item of `quantization.methods`: validated here, so that its errors have its own path and not a union's."""
    if isinstance(value, str):
        return _method_name(value)
    return MethodEntry.model_validate(value) if isinstance(value, dict) else value


class Quantization(Section):
    methods: list[Annotated[str | MethodEntry, pydantic.BeforeValidator(_method_item)]] = Field(
        default_factory=lambda: _default_methods()
    )
    bit_widths: list[int | str] = Field(default=[8, 4, 2, "W4A8"], min_length=1)  # 4: W4A4
    backend: list[BackendName] = Field(default=["x86"], min_length=1)  # the hardware's integer scheme; a list is swept
    reduce_range: bool = False  # 8-bit weights keep to 7 bits: for x86 CPUs without VNNI
    ptq_static: PTQStatic = PTQStatic()
    ptq_dynamic: PTQDynamic = PTQDynamic()
    qat: QAT = QAT()
    mixed_precision: MixedPrecision = MixedPrecision()

    def settings(self, entry: MethodEntry) -> dict[str, Any]:
        """The settings of an entry: its own keys over those of its method's section."""
        method = SHORTHANDS.get(entry.method, (entry.method,))[0]
        return {**getattr(self, method).model_dump(), **entry.options()}

    @pydantic.field_validator("methods", "backend", mode="before")
    @classmethod
    def _one_or_many_methods(cls, value):
        return value if isinstance(value, list) else [value]

    @pydantic.field_validator("backend")
    @classmethod
    def _no_twins(cls, value):
        return _distinct(value)

    @pydantic.field_validator("bit_widths", mode="before")
    @classmethod
    def _one_or_many(cls, value):
        return value if isinstance(value, list) else [value]

    @pydantic.field_validator("bit_widths")
    @classmethod
    def _widths(cls, value):
        return _widths(value)


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
        return None if value is None else _widths(value)


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
    layer_share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.25  # of the layers, at most
    extra_share: Share = 0.0  # bytes more than the uniform model's, as a share of all layers'; 0: no more
    wide_bits: Bits = 8
    widen: Literal["inputs", "weights_and_inputs"] = (
        "inputs"  # inputs take no bytes; for weights other layers pay a bit
    )
    worst_share: Annotated[float, Field(gt=0.0, le=1.0)] | None = None  # of the groups whose mean counts; None: worst


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
        return None if value is None else _widths(value)


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
            raise ValueError(f"{self.strategy}: {where}{message}, got {_short(detail.get('input'))}") from None


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
        return _patterns(value)


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


# -------------------------------------------------------------------------------------------- analysis, deployment, run


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
        return None if value is None else _widths(value)

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
        _distinct([hypothesis.id for hypothesis in value])
        return value

    bounds: ReportBounds = ReportBounds()

    # what a setting must not be beaten in to be on the Pareto front
    pareto: list[ParetoDimension] = Field(default=["accuracy", "accuracy_gap", "size_mb"], min_length=2)
    vector_format: Literal["pdf", "svg"] = "pdf"  # of the figures, beside PNG

    @pydantic.field_validator("pareto")
    @classmethod
    def _no_twins(cls, value):
        return _distinct(value)


class Deployment(Section):
    """Which cells become ONNX files, which of them are run and measured, and by what. A pattern is MODEL:METHOD:BITS
    with shell wildcards; METHOD is the cell's, or its strategy where it has one; BITS such as W8A8, or FP32; parts left
    out are any."""

    cells: list[str] = ["*:none:FP32", "*:ptq_static:W8A8"]  # run by each engine: its predictions, size and latency
    export: list[str] = ["*:ptq_static:W8A8"]  # kept in models/<cell>.onnx
    engines: list[Engine] = Field(default=["onnxruntime"], min_length=1)  # the first one is the row's
    provider: Literal["cpu", "cuda", "tensorrt"] = "cpu"  # of ONNX Runtime
    float_precision: Literal["f32", "bf16"] = "f32"  # of what OpenVINO computes between the integers
    latency: bool = True  # measure latencies
    latency_repeats: PositiveInt = 5  # timed passes of batch 32 (after warm-up); of batch 1 four times as many

    @pydantic.field_validator("cells", "export", "engines", mode="before")
    @classmethod
    def _one_or_many(cls, value):
        return value if value is None or isinstance(value, list) else [value]

    @pydantic.field_validator("engines")
    @classmethod
    def _no_twins(cls, value):
        return _distinct(value)

    @pydantic.model_validator(mode="after")
    def _of_their_engines(self):
        for key, default, engine in (("provider", "cpu", "onnxruntime"), ("float_precision", "f32", "openvino")):
            if getattr(self, key) != default and engine not in self.engines:
                raise ValueError(f"{key} = {getattr(self, key)} is of engine {engine}, which is not among the engines")
        return self

    @pydantic.field_validator("cells", "export")
    @classmethod
    def _are_patterns(cls, value):
        return _patterns(value)


class AttributeNames(Section):
    """How a data set calls a common attribute, and the common names of its values; several values may share one."""

    attribute: str
    names: dict[str, str] = Field(min_length=1)  # value of the data set -> common name


AGE_BANDS = {name: name for name in ("under 20", "20-39", "40 and over")}
RACES = {name: name for name in ("White", "Black", "Asian", "Indian", "Others")}
# common attribute -> data set -> its names for it
COMMON_ATTRIBUTES: dict[str, dict[str, dict[str, Any]]] = {
    "gender": {
        "celeba": {"attribute": "Male", "names": {"female": "female", "male": "male"}},
        "utkface": {"attribute": "gender", "names": {"male": "male", "female": "female"}},
        "fairface": {"attribute": "gender", "names": {"Male": "male", "Female": "female"}},
        "synthetic": {"attribute": "gender", "names": {"female": "female", "male": "male"}},
    },
    "race": {
        "utkface": {"attribute": "race", "names": RACES},
        "fairface": {
            "attribute": "race",
            "names": {
                "White": "White",
                "Black": "Black",
                "East Asian": "Asian",
                "Southeast Asian": "Asian",
                "Indian": "Indian",
                "Latino_Hispanic": "Others",
                "Middle Eastern": "Others",
            },
        },
    },
    "age_group": {
        "utkface": {"attribute": "age_group", "names": AGE_BANDS},
        "fairface": {"attribute": "age_group", "names": AGE_BANDS},
    },
}


class Evaluation(Section):
    """Other data sets whose test images every model of the study predicts too."""

    also_on: list[Literal["celeba", "utkface", "fairface", "synthetic"]] = []
    # what corresponds to what; an entry of yours is beside these or, for the same attribute and data set, instead
    mappings: dict[str, dict[Literal["celeba", "utkface", "fairface", "synthetic"], AttributeNames]] = {
        common: {dataset: AttributeNames(**names) for dataset, names in sets.items()}
        for common, sets in COMMON_ATTRIBUTES.items()
    }

    @pydantic.field_validator("also_on", mode="before")
    @classmethod
    def _one_or_many(cls, value):
        return [value] if isinstance(value, str) else value

    @pydantic.field_validator("also_on")
    @classmethod
    def _no_twins(cls, value):
        return _distinct(value)

    @pydantic.field_validator("mappings", mode="before")
    @classmethod
    def _merged(cls, value):
        if not isinstance(value, dict) or not all(isinstance(sets, dict) for sets in value.values()):
            return value
        return {
            common: {**COMMON_ATTRIBUTES.get(common, {}), **value.get(common, {})}
            for common in {**COMMON_ATTRIBUTES, **value}
        }


class Run(Section):
    seeds: list[NonNegativeInt] = Field(default=[0], min_length=1)
    executor: Literal["serial", "processes", "ray"] = "serial"  # see executors.py
    jobs: PositiveInt = 1  # cells at once: worker processes, or the size of a local Ray
    gpus_per_cell: NonNegativeFloat = 1.0  # on CUDA; 0.5: two cells share one
    address: str | None = None  # of a Ray cluster; None: a local one
    cell_timeout: PositiveFloat | None = None  # seconds after which a cell is stopped and has failed
    retries: NonNegativeInt = 1  # of a cell whose worker died
    threads_per_cell: PositiveInt = 2  # part of the result: sums in another order train another model
    evaluation_batch_size: PositiveInt = 128

    @pydantic.field_validator("seeds", mode="before")
    @classmethod
    def _one_or_many(cls, value):
        return value if isinstance(value, list) else [value]

    @pydantic.field_validator("seeds")
    @classmethod
    def _no_twins(cls, value):
        return _distinct(value)

    @pydantic.model_validator(mode="after")
    def _something_runs_them(self):
        if self.jobs > 1 and self.executor == "serial":
            raise ValueError(f"jobs: {self.jobs} at once need executor: processes or ray")
        if self.address is not None and self.executor != "ray":
            raise ValueError("address: is that of a Ray cluster; add executor: ray")
        return self


class Config(Section):
    data: Data = Data()
    models: Models = Models()
    training: Training = Training()
    quantization: Quantization = Field(default_factory=Quantization)
    mitigation: Mitigation = Field(default_factory=Mitigation)
    analysis: Analysis = Field(default_factory=Analysis)
    deployment: Deployment = Deployment()
    evaluation: Evaluation = Evaluation()
    tracking: Literal["none", "tensorboard", "wandb", "mlflow"] = "none"  # where each cell is logged too
    run: Run = Run()
    results_dir: str = "results"

    @pydantic.model_validator(mode="after")
    def _entries(self):
        known = list(dict.fromkeys((*self.models.architectures, *MODELS)))
        for place, entry in enumerate(self.mitigation.entries()):
            try:
                section = self.mitigation.section(entry)
            except ValueError as error:
                raise ValueError(f"mitigation.strategies[{place}]: {error}") from None
            self._check_repair(f"mitigation.strategies[{place}]: {entry.strategy}", section)
            if entry.architectures:
                for name in entry.architectures:
                    if name not in known:
                        raise ValueError(
                            f"mitigation.strategies[{place}].architectures: {name!r} is none of the models"
                            f"{suggest(name, known)}"
                        )
        for place, entry in enumerate(self.quantization.methods):
            if isinstance(entry, str):
                continue
            where = f"quantization.methods[{place}]"
            for name in entry.architectures or []:
                if name not in known:
                    raise ValueError(f"{where}.architectures: {name!r} is none of the models{suggest(name, known)}")
            idle = [key for key in RECONSTRUCTION_KEYS if key in entry.options()]
            if idle and self.quantization.settings(entry)["rounding"] == "nearest":
                raise ValueError(f"{where}: {idle[0]} does nothing with rounding nearest; add rounding: adaround")
        return self

    def _check_repair(self, where: str, section: Section) -> None:
        """ValueError for settings of a repair that would do nothing."""
        rounding = getattr(section, "rounding", None) or self.quantization.ptq_static.rounding
        learns = isinstance(section, FairReconstruction) or rounding != "nearest"
        if isinstance(section, PTQRepair) and section.reconstruction_iterations is not None and not learns:
            raise ValueError(
                f"{where}: reconstruction_iterations does nothing with rounding nearest; add rounding: adaround"
            )
        if isinstance(section, FairMixedPrecision) and section.bit_operations_budget is not None:
            raise ValueError(f"{where}: its budget is one of bytes; leave out bit_operations_budget")

    @pydantic.model_validator(mode="after")
    def _models_of_hypotheses(self):
        known = list(dict.fromkeys((*self.models.architectures, *MODELS)))
        for place, hypothesis in enumerate(self.analysis.hypotheses):
            for claim in hypothesis.claims:
                for cells in (claim.cells, claim.against):
                    for name in (isinstance(cells, Cells) and cells.model) or ():
                        if name not in known:
                            raise ValueError(
                                f"analysis.hypotheses[{place}]: {hypothesis.id}: {name!r} is none of the models"
                                f"{suggest(name, known)}"
                            )
        return self

    @pydantic.model_validator(mode="after")
    def _schemes(self):
        quantization = self.quantization
        if quantization.reduce_range and "x86" not in quantization.backend:
            backends = ", ".join(quantization.backend)
            raise ValueError(f"quantization.reduce_range: for x86 CPUs; it does nothing with backend {backends}")
        if "tensorrt" in quantization.backend:
            places = {name: getattr(quantization, name) for name in METHOD_SECTIONS}
            places |= {f"methods[{place}]": entry for place, entry in enumerate(quantization.methods)}
            for place, section in places.items():
                if getattr(section, "activation_scheme", None) == "affine":
                    raise ValueError(
                        f"quantization.{place}.activation_scheme: affine needs zero points, which backend tensorrt has "
                        "not; leave it out"
                    )
        return self

    @pydantic.model_validator(mode="after")
    def _attributes(self):
        for name in self.evaluation.also_on:
            if self.data.dataset == [name]:
                raise ValueError(
                    f"evaluation.also_on: {name} is the data set that the models are trained on; name another one"
                )
        for name in dict.fromkeys((*self.data.dataset, *self.evaluation.also_on)):
            section = getattr(self.data, name)
            if section.target in section.sensitive:
                raise ValueError(
                    f"data.{name}.sensitive: the target {section.target!r} cannot be a sensitive attribute too"
                )
            try:
                _distinct(section.sensitive)
            except ValueError as error:
                raise ValueError(f"data.{name}.sensitive: {error}") from None
            is_trained_on = name in self.data.dataset
            if is_trained_on and self.analysis.attribute not in (None, *section.sensitive):
                raise ValueError(
                    f"analysis.attribute: {self.analysis.attribute!r} is not a sensitive attribute of {name}"
                    f"{suggest(self.analysis.attribute, section.sensitive)}"
                )
        return self

    def dataset(self, name: str) -> DatasetSection:
        return getattr(self.data, name)

    def group_attribute(self, dataset: str) -> str:
        """The sensitive attribute whose groups the row's metrics are over."""
        return self.analysis.attribute or self.dataset(dataset).sensitive[0]


# ------------------------------------------------------------------------------------------------------------- loading


def load_config(path: str | Path | None, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Defaults, then the YAML file, then `KEY=VALUE` overrides (values are YAML). Raises ConfigError, one line."""
    values: dict[str, Any] = {}
    source = "defaults"
    if path is not None:
        source = str(path)
        try:
            text = Path(path).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise ConfigError(f"{source}: no such config file") from None
        except (OSError, ValueError) as error:  # ValueError: not UTF-8
            raise ConfigError(f"{source}: cannot be read: {error}") from None
        values = _parse_yaml(text, f"{source}: not valid YAML")
        values = {} if values is None else values  # an empty file
        if not isinstance(values, dict):
            raise ConfigError(f"{source}: expected a mapping of sections, got {type(values).__name__}")
        _validate(values, source)
    steps = [(copy.deepcopy(values), source)]
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key.strip():
            raise ConfigError(f"--set {override}: expected KEY=VALUE, such as training.epochs=2")
        value = _parse_yaml(text, f"--set {override}: the value is not valid YAML")
        _assign(values, key.strip().split("."), value, f"--set {override}")
        steps.append((copy.deepcopy(values), f"--set {override}"))
    try:
        return _validate(*steps[-1])
    except ConfigError:
        for step in steps:  # the order of overrides does not matter; the first that breaks it is named
            _validate(*step)
        raise


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML; loading it gives the same configuration."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def suggest(name: str, choices) -> str:
    """' (did you mean X?)' where one choice is near, else '; choose from …'."""
    choices = [str(choice) for choice in choices]
    near = difflib.get_close_matches(str(name), choices, n=1, cutoff=0.6)
    return f" (did you mean {near[0]}?)" if near else f"; choose from {', '.join(choices)}"


def parse_width(width: int | str) -> tuple[int, int]:
    """8 -> (8, 8); 'W4A8' -> (4, 8): bits of weights and activations."""
    if isinstance(width, bool) or not isinstance(width, (int, str)):
        raise ValueError(f"bit width {width!r}: expected 2 to 8 or a string such as W4A8")
    if isinstance(width, int):
        if not 2 <= width <= 8:
            raise ValueError(f"bit width {width}: expected 2 to 8 or a string such as W4A8")
        return width, width
    match = WIDTH.fullmatch(width)
    if match is None:
        raise ValueError(f"bit width {width!r}: expected 2 to 8 or a string such as W4A8")
    return int(match[1]), int(match[2])


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-3 as a number and refuses a key written twice."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # <<: *anchor
                continue
            key = self.construct_object(key_node, deep=deep)
            if isinstance(key, (str, int, float)) and key in seen:
                raise yaml.YAMLError(f"key {key!r} is there twice, line {key_node.start_mark.line + 1}")
            seen.add(key if isinstance(key, (str, int, float)) else str(key))
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes the strings that _Loader would read as numbers."""


for _yaml in (_Loader, _Dumper):
    _yaml.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)$"), list("-+0123456789.")
    )


def _parse_yaml(text: str, what: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: 2001-13-45, which is no date
        raise ConfigError(f"{what}: {' '.join(str(error).split())}") from None


def _validate(values: dict, source: str) -> Config:
    try:
        return Config.model_validate(values)
    except pydantic.ValidationError as error:
        raise ConfigError(f"{source}: {_first_error(error, values)}") from None


def _first_error(error: pydantic.ValidationError, values: dict) -> str:
    errors = error.errors()
    # inside a union (a method's name or entry) pydantic reports each branch: the unknown key is the telling one
    detail = next((item for item in errors if item["type"] == "extra_forbidden"), errors[0])
    location = [part for part in detail["loc"] if not (isinstance(part, str) and part in _UNION_TAGS)]
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    given = detail.get("input")
    if detail["type"] == "extra_forbidden":
        return f"{path}: unknown key{suggest(str(location[-1]), _keys_at(location[:-1]))}"
    if detail["type"] == "literal_error":
        choices = _literal_choices(detail)
        return f"{path}: unknown value {given!r}{suggest(given, choices)}"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error":
        return f"{path}: {message}" if path else message
    return f"{path}: {message[0].lower() + message[1:]}, got {_short(given)}"


_UNION_TAGS = {"str", "int", "MethodEntry", "StrategyEntry", "Cells"}


def _literal_choices(detail: dict) -> list[str]:
    return re.findall(r"'([^']*)'", detail["ctx"]["expected"])


def _keys_at(location: list) -> list[str]:
    """The valid keys of the section at a path such as ['data', 'fairface'] or ['quantization', 'methods', 2]."""
    model: Any = Config
    for part in location:
        if isinstance(part, int) or not (isinstance(model, type) and issubclass(model, Section)):
            continue
        field = model.model_fields.get(part)
        if field is not None:  # else: a key of a mapping such as training.per_model
            model = _section_in(field.annotation)
    if isinstance(model, type) and issubclass(model, Section):
        return list(model.model_fields)
    return []


def _section_in(annotation) -> type | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    for argument in get_args(annotation):
        found = _section_in(argument)
        if found is not None:
            return found
    return None


def _default_methods() -> list[str | MethodEntry]:
    return [
        "ptq_static",
        MethodEntry(method="ptq_dynamic", bit_widths=[8, 4]),
        MethodEntry(method="ptq_static", bit_widths=[4], observer=["minmax", "percentile", "entropy"]),
        # a sample of what takes longer; configs/study.yaml has all of it
        MethodEntry(method="ptq_static", bit_widths=[4], architectures=SAMPLED, rounding="adaround"),
        MethodEntry(method="mixed_precision", bit_widths=["W4A8"], architectures=SAMPLED),
        MethodEntry(method="qat", bit_widths=[4], architectures=SAMPLED, epochs=1),
    ]


SAMPLED = ["mobilenet_v2", "squeezenet1_1"]


def _assign(values: dict, path: list[str], value: Any, source: str) -> None:
    node = values
    for part in path[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise ConfigError(f"{source}: {part} is a value, not a section")
    node[path[-1]] = value


def _distinct(values: list) -> list:
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"{value!r} is there twice")
    return values


def _method_name(value: str) -> str:
    choices = (*QUANTIZATION_METHODS, *(name for name, (_, strategy, _, _) in SHORTHANDS.items() if strategy is None))
    if value not in choices:
        raise ValueError(f"unknown method {value!r}{suggest(value, choices)}")
    return value


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


def _patterns(values: list[str]) -> list[str]:
    for pattern in values:
        parts = pattern.split(":")
        if len(parts) > 3 or not all(parts):
            raise ValueError(f"pattern {pattern!r}: expected MODEL:METHOD:BITS, such as *:ptq_static:W8A8")
    return values


def _widths(values: list) -> list:
    for value in values:
        parse_width(value)
    return _distinct(values)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


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
