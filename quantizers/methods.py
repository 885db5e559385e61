"""The table of methods, and `apply_quantization`, which every notebook, phase and ladder of repairs calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pydantic
from torch import nn

from config import (
    QAT,
    QUANTIZATION_METHODS,
    SHORTHANDS,
    BiasAwareCalibration,
    MixedPrecision,
    PTQDynamic,
    PTQStatic,
    Section,
    Training,
    suggest,
)
from evaluation import as_batch
from quantizers import ptq
from quantizers.calibration import gather_balanced_images, gather_images
from quantizers.mixed_precision import mixed_precision
from quantizers.modules import QuantizedModel
from quantizers.numerics import QuantizationError, check_bits
from quantizers.qat import quantization_aware_training
from store import seed_for


@dataclass(frozen=True)
class Data:
    """What a method may draw on."""

    calibration: Iterable | None = None
    train: Iterable | None = None
    validation: Iterable | None = None
    progress: Callable[[str, float], None] | None = None


def _ptq_static(model: nn.Module, data: Data, weight_bits: int, activation_bits: int, options: dict) -> QuantizedModel:
    images = gather_images(data.calibration, options["calibration_samples"])
    return ptq.ptq_static(
        model,
        images,
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        progress=data.progress,
        **_recipe(options),
    )


def _bias_aware(model: nn.Module, data: Data, weight_bits: int, activation_bits: int, options: dict) -> QuantizedModel:
    generator = np.random.default_rng(seed_for(options["seed"], "bias_aware_calibration"))
    images, distinct = gather_balanced_images(
        data.calibration, options["calibration_samples"], generator, options["attributes"]
    )
    quantized = ptq.ptq_static(
        model,
        images,
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        progress=data.progress,
        **_recipe(options),
    )
    quantized.description["calibration_groups"] = {str(group): count for group, count in distinct.items()}
    return quantized


def _ptq_dynamic(model: nn.Module, data: Data, weight_bits: int, activation_bits: int, options: dict) -> QuantizedModel:
    images = None if data.calibration is None else gather_images(data.calibration, 2)  # to check the traced network
    return ptq.ptq_dynamic(model, images, weight_bits=weight_bits, activation_bits=activation_bits, **_recipe(options))


def _qat(model: nn.Module, data: Data, weight_bits: int, activation_bits: int, options: dict) -> QuantizedModel:
    if data.train is None:
        raise QuantizationError("qat needs train_data: an iterable of batches of images and labels")
    if not hasattr(data.train, "__len__"):
        raise QuantizationError(
            "train_data must have a length and be iterable again: a DataLoader or a list of batches"
        )
    images = gather_images(data.train if data.calibration is None else data.calibration, options["calibration_samples"])
    settings = Training(
        **{key: options[key] for key in QAT.model_fields if key in Training.model_fields and key != "max_train"}
    )
    quantized, result = quantization_aware_training(
        model,
        images,
        _first_images(data.train, options["max_train"]),
        data.validation,
        settings,
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        progress=data.progress,
        **_recipe(options),
    )
    quantized.reports["training"] = {
        "seconds": result.seconds,
        "log": [{"precision": result.precision, **epoch} for epoch in result.log],
    }
    return quantized


def _mixed_precision(
    model: nn.Module, data: Data, weight_bits: int, activation_bits: int, options: dict
) -> QuantizedModel:
    images, labels = gather_images(data.calibration, options["calibration_samples"], with_labels=True)
    own = {key: options[key] for key in MIXED_OPTIONS}
    return mixed_precision(
        model,
        images,
        labels,
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        progress=data.progress,
        metric=own.pop("sensitivity_metric"),
        sensitivity=options["sensitivity"],
        **own,
        **_recipe(options),
    )


def _recipe(options: dict) -> dict:
    """The options that say how ranges and roundings are chosen."""
    return {key: options[key] for key in RECIPE_OPTIONS if key in options}


def _first_images(loader: Iterable, count: int | None) -> Iterable:
    """At most `count` images of a loader that has a length."""
    if count is None:
        return loader
    batches, taken = [], 0
    for batch in map(as_batch, loader):
        keep = min(len(batch["label"]), count - taken)
        sensitive = {name: values[:keep] for name, values in batch["sensitive"].items()}
        batches.append(
            {**batch, "image": batch["image"][:keep], "label": batch["label"][:keep], "sensitive": sensitive}
        )
        taken += keep
        if taken >= count:
            break
    return batches


RECIPE_OPTIONS = tuple(field.name for field in dataclasses.fields(ptq.Recipe))
MIXED_OPTIONS = (
    "widths", "size_budget_bytes", "bit_operations_budget", "sensitivity_metric", "sensitivity_samples",
    "classifier_bits",
)  # fmt: skip
NOT_FOR_NOTEBOOKS = ("calibration_split", "method", "bit_widths", "balance")  # which split, which widths: the config's


@dataclass(frozen=True)
class Method:
    """One entry of the table: how it is done, which config sections hold its options, and what it needs."""

    apply: Callable[[nn.Module, Data, int, int, dict], QuantizedModel]
    sections: tuple[type[Section], ...]
    needs_calibration_data: bool
    extra_options: tuple[tuple[str, Any], ...] = ()


SCHEME = (("backend", "x86"), ("reduce_range", False))  # the hardware's integers: quantizers.numerics.BACKENDS
METHODS: dict[str, Method] = {
    "ptq_static": Method(_ptq_static, (PTQStatic,), True, (*SCHEME, ("seed", 0))),
    "ptq_dynamic": Method(_ptq_dynamic, (PTQDynamic,), False, SCHEME),
    "qat": Method(_qat, (QAT,), False, SCHEME),
    "mixed_precision": Method(_mixed_precision, (MixedPrecision,), True, (*SCHEME, ("seed", 0), ("sensitivity", None))),
    "bias_aware_calibration": Method(
        _bias_aware, (PTQStatic, BiasAwareCalibration), True, (*SCHEME, ("seed", 0), ("attributes", None))
    ),
}


def apply_quantization(
    model: nn.Module,
    method: str = "ptq_static",
    bit_width: int | None = None,
    calibration_data: Iterable | None = None,
    *,
    activation_bits: int | None = None,
    train_data: Iterable | None = None,
    validation_data: Iterable | None = None,
    progress: Callable[[str, float], None] | None = None,
    **options: Any,
) -> QuantizedModel:
    """A quantized copy of `model`, in eval mode and on its device.

    `method` is a name of METHODS or a shorthand (PTQ_INT8, PTQ_INT4, PTQ_INT2, PTQ_W4A8, QAT_INT8, QAT_INT4, dynamic,
    bias_aware).
    `bit_width`, 2 to 8 (default 8), is the width of weights and activations, unless `activation_bits` says otherwise
    for the activations. `calibration_data` is an iterable of batches `{"image": (N, 3, H, W) float, "label": (N,),
    "sensitive": {name: (N,)}}` or of (image, label, sensitive) tuples; images must be normalised as in training.
    `train_data`, batches of the same kind with a length (a DataLoader, a list), is what qat trains on;
    `validation_data` chooses its best epoch, without which the last one counts. `progress(what, share done)` is called
    now and then. `options` are keys of the method's config section, such as observer="percentile", rounding="adaround",
    and the hardware's integer scheme: `backend` "x86", "arm" or "tensorrt"; `reduce_range` for x86 CPUs without VNNI.

    What was measured meanwhile is in `reports` of the result: `reconstruction`, `sensitivity`, `widths`, `budgets`,
    `training`. Raises QuantizationError, one line, for an unknown method or option, a width outside 2 to 8, missing or
    empty data, a budget below the smallest model, or a model without a layer that can be quantized; TrainingError
    where the loss of qat is not finite.
    """
    name, weight_bits, shorthand_activation_bits = resolve(method, bit_width)
    entry = METHODS[name]
    activation_bits = activation_bits if activation_bits is not None else shorthand_activation_bits
    check_bits(weight_bits, "bit_width")
    check_bits(activation_bits, "activation_bits")
    settings = _settings(name, entry, options)
    if entry.needs_calibration_data and calibration_data is None:
        raise QuantizationError(f"{method} needs calibration_data: an iterable of batches of images")
    data = Data(calibration_data, train_data, validation_data, progress)
    quantized = entry.apply(model, data, weight_bits, activation_bits, settings)
    quantized.description |= {"strategy": None if name in QUANTIZATION_METHODS else name}
    return quantized


def resolve(method: str, bit_width: int | None) -> tuple[str, int, int]:
    """(name in METHODS, weight bits, activation bits) of a name or shorthand."""
    if method in METHODS:
        bits = 8 if bit_width is None else bit_width
        return method, bits, bits
    if method not in SHORTHANDS:
        raise QuantizationError(f"unknown method {method!r}{suggest(method, (*METHODS, *SHORTHANDS))}")
    name, strategy, weight_bits, activation_bits = SHORTHANDS[method]
    if weight_bits is None:
        bits = 8 if bit_width is None else bit_width
        return strategy or name, bits, bits
    if bit_width not in (None, weight_bits):
        raise QuantizationError(f"{method} has {weight_bits}-bit weights; leave out bit_width={bit_width}")
    return strategy or name, weight_bits, activation_bits


def options_of(entry: Method) -> list[str]:
    """The config keys that mean something for a model and a loader (not which split, or which widths to sweep)."""
    keys = dict.fromkeys(key for section in entry.sections for key in section.model_fields)
    return [key for key in keys if key not in NOT_FOR_NOTEBOOKS] + [key for key, _ in entry.extra_options]


def _settings(name: str, entry: Method, options: dict[str, Any]) -> dict[str, Any]:
    """The defaults of the method's config sections with `options` over them, checked as the config checks them."""
    extra = dict(entry.extra_options)
    known = options_of(entry)
    for key in options:
        if key not in known:
            raise QuantizationError(f"{name} has no option {key!r}{suggest(key, known)}")
    settings: dict[str, Any] = dict(extra)
    for section in entry.sections:
        try:
            given = section(**{key: value for key, value in options.items() if key in section.model_fields})
        except pydantic.ValidationError as error:
            detail = error.errors()[0]
            key = ".".join(map(str, detail["loc"]))
            raise QuantizationError(f"{name}: option {key}: {detail['msg']}, got {detail['input']!r}") from None
        settings |= {
            key: value for key, value in given.model_dump().items() if value is not None or key not in settings
        }
    settings |= {key: value for key, value in options.items() if key in extra}
    observer = settings.get("observer")
    if isinstance(observer, list):
        if len(observer) != 1:
            raise QuantizationError(f"{name}: option observer: one of them, got {observer}")
        settings["observer"] = observer[0]
    return settings
