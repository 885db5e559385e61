"""The table of methods, and `apply_quantization`, which every notebook, phase and ladder of repairs calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pydantic
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

from evaluation import as_batch
from fairness_losses import (
    FairnessPenalty,
    GroupBalancedLoader,
    GroupDistillation,
    GroupError,
    Groups,
    Reweighed,
    worst_group_accuracy_score,
)
from fairness_losses import GroupDRO as DROLoss
from quantizers import fair_ptq, ptq
from quantizers.calibration import gather_images
from quantizers.finetuning import fine_tune
from quantizers.groups import GroupedImages, gather_groups
from quantizers.mixed_precision import mixed_precision
from quantizers.modules import QuantizedModel
from quantizers.numerics import QuantizationError, check_bits
from quantizers.output_calibration import calibrate_output
from quantizers.qat import quantization_aware_training
from quantizers.thresholds import GroupThresholds, adjust_thresholds
from sections.base import Section, suggest
from sections.mitigation import (
    BalancedFinetuning,
    BiasAwareCalibration,
    Distillation,
    FairBiasCorrection,
    FairMixedPrecision,
    FairnessFinetuning,
    FairReconstruction,
    GroupDRO,
    GroupWeightedObservers,
    MinimaxRanges,
    OutputCalibration,
    Reweighing,
    SensitiveChannels,
    SensitiveLayers,
    ThresholdAdjustment,
)
from sections.quantization import QAT, QUANTIZATION_METHODS, SHORTHANDS, MixedPrecision, PTQDynamic, PTQStatic
from sections.training import Training
from store import seed_for
from training import Loss, cross_entropy


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
        keep_float=True,
        **_recipe(options),
    )


def _bias_aware(model: nn.Module, data: Data, weight_bits: int, activation_bits: int, options: dict) -> QuantizedModel:
    grouped = _grouped(data, options)
    quantized = ptq.ptq_static(
        model,
        grouped.images,
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        progress=data.progress,
        keep_float=True,
        **_recipe(options),
    )
    return _with_groups(quantized, grouped)


def _grouped(data: Data, options: dict, is_balanced: bool = True) -> GroupedImages:
    generator = np.random.default_rng(seed_for(options["seed"], "groups"))
    return gather_groups(
        data.calibration, options["calibration_samples"], generator, options["attributes"], is_balanced=is_balanced
    )


def _with_groups(quantized: QuantizedModel, grouped: GroupedImages) -> QuantizedModel:
    quantized.description["calibration_groups"] = dict(grouped.distinct)
    return quantized


def _repair(
    apply: Callable[..., QuantizedModel], own: dict[str, str], is_balanced: bool = True, **fixed: Any
) -> Callable[[nn.Module, Data, int, int, dict], QuantizedModel]:
    """An entry of the table for a function of quantizers.fair_ptq; `own` maps its arguments to the config's keys."""

    def run(model: nn.Module, data: Data, weight_bits: int, activation_bits: int, options: dict) -> QuantizedModel:
        grouped = _grouped(data, options, is_balanced)
        quantized = apply(
            model,
            grouped,
            weight_bits=weight_bits,
            activation_bits=activation_bits,
            progress=data.progress,
            **{argument: options[key] for argument, key in own.items()},
            **fixed,
            **_recipe(options),
        )
        return _with_groups(quantized, grouped)

    return run


def _fair_mixed_precision(
    model: nn.Module, data: Data, weight_bits: int, activation_bits: int, options: dict
) -> QuantizedModel:
    grouped = _grouped(data, options)
    grouped.first(options["sensitivity_samples"])  # refused here, by name, where one of the groups is not among them
    own = {key: options[key] for key in MIXED_OPTIONS}
    quantized = mixed_precision(
        model,
        grouped.images,
        grouped.labels,
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        progress=data.progress,
        metric=own.pop("sensitivity_metric"),
        groups=grouped.groups,
        worst_share=options["worst_share"],
        sensitivity=options["sensitivity"],
        keep_float=True,
        **own,
        **_recipe(options),
    )
    return _with_groups(quantized, grouped)


def _output_calibration(
    model: nn.Module, data: Data, weight_bits: int, activation_bits: int, options: dict
) -> QuantizedModel:
    calibration = data.calibration
    if iter(calibration) is calibration:  # it can be read once only, and is read twice
        data = dataclasses.replace(data, calibration=list(calibration))
    quantized = _started(model, data, weight_bits, activation_bits, options)
    grouped = _grouped(data, options, is_balanced=False)  # all of them, with weights
    calibrate_output(quantized, grouped, weighting=options["weighting"], metric=options["drift_metric"])
    quantized.description["start"] = options["start"]
    return _with_groups(quantized, grouped)


def _started(model: nn.Module, data: Data, weight_bits: int, activation_bits: int, options: dict) -> QuantizedModel:
    """What `start` and `start_options` give."""
    start = options["start"]
    entry = METHODS[start]
    shared = {key: options[key] for key in options_of(entry) if key in COMMON_OPTIONS and key in options}
    settings = _settings(start, entry, {**shared, **options["start_options"]})
    return entry.apply(model, data, weight_bits, activation_bits, settings)


def _threshold_adjustment(
    model: nn.Module, data: Data, weight_bits: int, activation_bits: int, options: dict
) -> GroupThresholds:
    quantized = _ptq_static(model, data, weight_bits, activation_bits, options)
    quantized.forget_float()
    fitted_on = data.calibration if data.validation is None else data.validation
    return adjust_thresholds(quantized, fitted_on, attributes=options["attributes"], constraint=options["constraint"])


def _trained(make_loss: Callable[[nn.Module, Groups, dict], Loss], has_balanced_batches: bool):
    """An entry of the table for short training with a loss, from what `start` gives."""

    def run(model: nn.Module, data: Data, weight_bits: int, activation_bits: int, options: dict) -> QuantizedModel:
        train_data = _training_data(data, options)
        groups = Groups.of(_whole(train_data), options["attributes"])
        quantized = _started(model, data, weight_bits, activation_bits, options)
        loader = train_data
        if has_balanced_batches:
            loader = GroupBalancedLoader(train_data, groups, seed_for(options["seed"], "balanced batches"))
        score = None
        if options["best_epoch"] == "worst_group" and data.validation is not None:
            try:
                counts_G = Groups.of(data.validation, options["attributes"]).counts
            except GroupError as error:
                raise QuantizationError(f"validation_data: {error}") from None
            score = worst_group_accuracy_score(groups, LEAST_GROUP if (counts_G >= LEAST_GROUP).sum() > 1 else 1)
        loss = make_loss(model, groups, options)
        fine_tune(
            quantized, loader, data.validation, _training_settings(options), loss=loss, score=score,
            progress=data.progress,
        )  # fmt: skip
        quantized.description |= {"method": "qat", "start": options["start"]}
        return quantized

    return run


LEAST_GROUP = 20  # validation images of a group whose accuracy may choose the best epoch, where two have so many


def _whole(train_data: Iterable) -> Iterable:
    """What its groups are counted in: all images, where an epoch leaves the last, smaller batch out."""
    if hasattr(train_data, "annotations"):
        return train_data.annotations()
    if not isinstance(train_data, DataLoader) or not train_data.drop_last:
        return train_data
    if not isinstance(train_data.sampler, (RandomSampler, SequentialSampler)):  # which chooses its images
        return train_data
    return DataLoader(
        train_data.dataset,
        batch_size=train_data.batch_size,
        collate_fn=train_data.collate_fn,
        num_workers=train_data.num_workers,
    )


def _training_data(data: Data, options: dict) -> Iterable:
    if data.train is None:
        raise QuantizationError("short training needs train_data: batches with images, labels and groups")
    if not hasattr(data.train, "__len__"):
        raise QuantizationError(
            "train_data must have a length and be iterable again: a DataLoader or a list of batches"
        )
    return _first_images(data.train, options["max_train"])


def _training_settings(options: dict) -> Training:
    return Training(
        **{key: options[key] for key in QAT.model_fields if key in Training.model_fields and key != "max_train"}
    )


def _ptq_dynamic(model: nn.Module, data: Data, weight_bits: int, activation_bits: int, options: dict) -> QuantizedModel:
    images = None if data.calibration is None else gather_images(data.calibration, 2)  # to check the traced network
    return ptq.ptq_dynamic(model, images, weight_bits=weight_bits, activation_bits=activation_bits, **_recipe(options))


def _qat(model: nn.Module, data: Data, weight_bits: int, activation_bits: int, options: dict) -> QuantizedModel:
    if data.train is None:
        raise QuantizationError("qat needs train_data: an iterable of batches of images and labels")
    train_data = _training_data(data, options)
    images = gather_images(data.train if data.calibration is None else data.calibration, options["calibration_samples"])
    quantized, result = quantization_aware_training(
        model,
        images,
        train_data,
        data.validation,
        _training_settings(options),
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
    needs_train_data: bool = False


SCHEME = (("backend", "x86"), ("reduce_range", False))  # the hardware's integers: quantizers.numerics.BACKENDS
GROUPS = (*SCHEME, ("seed", 0), ("attributes", None))  # of the repairs: by which attributes there are groups; None: all
WEIGHTED = {"weighting": "weighting", "metric": "drift_metric"}
# what a training's start has like the training itself
COMMON_OPTIONS = (*PTQStatic.model_fields, *(key for key, _ in GROUPS))


def _ptq_repair(section: type[Section], apply) -> Method:
    return Method(apply, (PTQStatic, section), True, GROUPS)


def _trained_repair(section: type[Section], apply) -> Method:
    return Method(apply, (QAT, PTQStatic, section), True, GROUPS, needs_train_data=True)


METHODS: dict[str, Method] = {
    "ptq_static": Method(_ptq_static, (PTQStatic,), True, (*SCHEME, ("seed", 0))),
    "ptq_dynamic": Method(_ptq_dynamic, (PTQDynamic,), False, SCHEME),
    "qat": Method(_qat, (QAT,), False, SCHEME, needs_train_data=True),
    "mixed_precision": Method(_mixed_precision, (MixedPrecision,), True, (*SCHEME, ("seed", 0), ("sensitivity", None))),
    "bias_aware_calibration": _ptq_repair(BiasAwareCalibration, _bias_aware),
    "group_weighted_observers": _ptq_repair(
        GroupWeightedObservers, _repair(fair_ptq.group_ranges, {}, is_balanced=False, kind="weighted")
    ),
    "minimax_ranges": _ptq_repair(MinimaxRanges, _repair(fair_ptq.group_ranges, {}, kind="minimax")),
    "fair_bias_correction": _ptq_repair(FairBiasCorrection, _repair(fair_ptq.fair_bias_correction, WEIGHTED)),
    "fair_reconstruction": _ptq_repair(FairReconstruction, _repair(fair_ptq.fair_reconstruction, WEIGHTED)),
    "sensitive_channels": _ptq_repair(
        SensitiveChannels, _repair(fair_ptq.sensitive_channels, {**WEIGHTED, "extra_share": "extra_share"})
    ),
    "sensitive_layers": _ptq_repair(
        SensitiveLayers,
        _repair(
            fair_ptq.sensitive_layers,
            {"metric": "drift_metric"}
            | {
                key: key
                for key in (
                    "sensitivity_samples",
                    "layer_share",
                    "extra_share",
                    "extra_operations",
                    "wide_bits",
                    "widen",
                    "worst_share",
                )
            },
        ),
    ),
    "fair_mixed_precision": Method(
        _fair_mixed_precision, (FairMixedPrecision,), True, (*GROUPS, ("sensitivity", None))
    ),
    "output_calibration": _ptq_repair(OutputCalibration, _output_calibration),
    "threshold_adjustment": _ptq_repair(ThresholdAdjustment, _threshold_adjustment),
    "balanced_finetuning": _trained_repair(
        BalancedFinetuning,
        _trained(lambda model, groups, options: cross_entropy(options["label_smoothing"]), True),
    ),
    "reweighing": _trained_repair(
        Reweighing,
        _trained(lambda model, groups, options: Reweighed(groups, label_smoothing=options["label_smoothing"]), False),
    ),
    "fairness_finetuning": _trained_repair(
        FairnessFinetuning,
        _trained(
            lambda model, groups, options: FairnessPenalty(
                groups, options["constraint"], options["fairness_weight"], options["label_smoothing"]
            ),
            True,
        ),
    ),
    "group_dro": _trained_repair(
        GroupDRO,
        _trained(
            lambda model, groups, options: DROLoss(groups, options["step_size"], options["label_smoothing"]), True
        ),
    ),
    "distillation": _trained_repair(
        Distillation,
        _trained(
            lambda model, groups, options: GroupDistillation(
                groups, model, options["temperature"], options["step_size"]
            ),
            True,
        ),
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
    try:
        quantized = entry.apply(model, data, weight_bits, activation_bits, settings)
    except GroupError as error:  # of the training data: the same kind of mistake
        raise QuantizationError(f"train_data: {error}") from None
    if isinstance(quantized, QuantizedModel):
        quantized.forget_float()
    quantized.description["strategy"] = None if name in QUANTIZATION_METHODS else name
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
    if settings.get("attributes") is not None and isinstance(settings["attributes"], str):
        settings["attributes"] = [settings["attributes"]]
    observer = settings.get("observer")
    if isinstance(observer, list):
        if len(observer) != 1:
            raise QuantizationError(f"{name}: option observer: one of them, got {observer}")
        settings["observer"] = observer[0]
    return settings
