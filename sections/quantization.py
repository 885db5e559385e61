"""`quantization`: the methods, their settings, and the entries that sweep them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from sections.base import Bits, Section, checked_widths, distinct, suggest

Observer = Literal["minmax", "moving_average", "percentile", "mse", "entropy"]  # of activations
WeightObserver = Literal["minmax", "percentile", "mse", "entropy"]
Granularity = Literal["per_channel", "per_tensor"]
BackendName = Literal["x86", "arm", "tensorrt"]

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
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on CUDA, and on a CPU that has it where it pays
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
        return None if value is None else checked_widths(value)

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
        return distinct(value)

    @pydantic.field_validator("bit_widths", mode="before")
    @classmethod
    def _one_or_many(cls, value):
        return value if isinstance(value, list) else [value]

    @pydantic.field_validator("bit_widths")
    @classmethod
    def _widths(cls, value):
        return checked_widths(value)


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


def _method_name(value: str) -> str:
    choices = (*QUANTIZATION_METHODS, *(name for name, (_, strategy, _, _) in SHORTHANDS.items() if strategy is None))
    if value not in choices:
        raise ValueError(f"unknown method {value!r}{suggest(value, choices)}")
    return value
