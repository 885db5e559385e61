"""Post-training quantization, static and dynamic."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from evaluation import device_of, eval_mode
from quantizers.bias_correction import correct_biases
from quantizers.calibration import Statistics, check_images, observe, set_ranges
from quantizers.equalization import equalize
from quantizers.graph import prepare
from quantizers.groups import ImageWeights
from quantizers.modules import ActivationQuantizer, DynamicActivationQuantizer, QuantizedModel
from quantizers.numerics import BACKENDS, REDUCED_INT8_RANGE, QuantizationError, QuantizationWarning
from quantizers.observers import HISTOGRAM_OBSERVERS, WeightObserver

SAME_FUNCTION = 0.01  # the most that tracing and folding may change the logits by, relatively; rounding changes 1e-5

Progress = Callable[[str, float], None]  # what is being done, and the share that is


@dataclass(frozen=True)
class Recipe:
    """How a model is quantized, beside its widths; the keys of the config's ptq_static section."""

    observer: str = "mse"
    weight_observer: str = "mse"
    percentile: float = 99.99
    first_last_bits: int | None = None
    weight_granularity: str = "per_channel"
    activation_scheme: str | None = None  # None: the backend's
    backend: str = "x86"
    reduce_range: bool = False
    equalize: bool = False
    bias_correction: bool = False
    rounding: str = "nearest"
    reconstruction_unit: str = "block"
    reconstruction_iterations: int = 300
    learn_activation_scales: bool = True
    seed: int = 0

    def weight_scales(self) -> WeightObserver:
        return WeightObserver(self.weight_observer, self.percentile, self.weight_granularity, self.int8_range())

    def int8_range(self) -> tuple[int, int]:
        """Of weights of 8 bits."""
        return REDUCED_INT8_RANGE if self.reduce_range else BACKENDS[self.backend].int8_range

    def is_symmetric(self) -> bool:
        """Of activations. QuantizationError for a scheme that the backend has not."""
        backend = BACKENDS[self.backend]
        if backend.is_symmetric and self.activation_scheme == "affine":
            raise QuantizationError(f"backend {self.backend} has no zero points: leave out activation_scheme affine")
        return backend.is_symmetric or self.activation_scheme == "symmetric"

    def __post_init__(self) -> None:
        if not isinstance(self.backend, str) or self.backend not in BACKENDS:
            raise QuantizationError(f"unknown backend {self.backend!r}; choose from {', '.join(BACKENDS)}")
        if self.reduce_range and self.backend != "x86":
            raise QuantizationError(f"reduce_range is for x86 CPUs without VNNI; it does not apply to {self.backend}")
        self.is_symmetric()


def ptq_static(
    model: nn.Module,
    images: torch.Tensor,
    *,
    weight_bits: int,
    activation_bits: int,
    progress: Progress | None = None,
    keep_float: bool = False,
    **recipe,
) -> QuantizedModel:
    """Integer weights and fixed activation ranges, chosen from calibration `images` (n, 3, H, W) as `Recipe` says.
    `keep_float` leaves the float parameters in place, for training to start from."""
    recipe = Recipe(**recipe)
    check_images(images)
    quantized = attach(model, images, "ptq_static", weight_bits, activation_bits, recipe)
    statistics = observe_activations(quantized, images, recipe)
    quantize(quantized, statistics, images, recipe, progress)
    if not keep_float:
        quantized.forget_float()
    return quantized


def ptq_dynamic(
    model: nn.Module,
    images: torch.Tensor | None = None,
    *,
    weight_bits: int,
    activation_bits: int,
    **recipe,
) -> QuantizedModel:
    """Integer weights; activation ranges are each image's own extremes (dimension 0), found at run time.

    Needs no data; where `images` are given, the traced network is checked against the model on two of them.
    """
    recipe = Recipe(**recipe)
    quantized = attach(model, images, "ptq_dynamic", weight_bits, activation_bits, recipe, is_dynamic=True)
    quantize_weights(quantized, recipe)
    quantized.forget_float()
    return quantized


def attach(
    model: nn.Module,
    images: torch.Tensor | None,
    method: str,
    weight_bits: int,
    activation_bits: int,
    recipe: Recipe,
    is_dynamic: bool = False,
) -> QuantizedModel:
    """A copy of the model with layers and quantizers in place, nothing quantized yet; it computes what the model does,
    of which `images`, where there are some, are the proof."""

    def new_quantizer(name: str, is_edge: bool) -> nn.Module:
        bits = recipe.first_last_bits if is_edge and recipe.first_last_bits else activation_bits
        kind = DynamicActivationQuantizer if is_dynamic else ActivationQuantizer
        return kind(name, bits, recipe.is_symmetric(), BACKENDS[recipe.backend].is_signed)

    sample = None if images is None else images[:2].to(device_of(model))
    network, placement = prepare(
        model,
        weight_bits,
        new_quantizer,
        recipe.first_last_bits,
        weight_granularity=recipe.weight_granularity,
        int8_range=recipe.int8_range(),
        has_integer_products=BACKENDS[recipe.backend].has_integer_products,
        equalize=functools.partial(equalize, sample=sample) if recipe.equalize else None,
    )
    for name, reason in placement.opaque.items():
        warnings.warn(
            f"{name} cannot be traced ({reason[:120]}): it is kept whole; the convolutions and linear layers inside "
            "are quantized, everything else in it stays in float",
            QuantizationWarning,
            stacklevel=3,
        )
    description = {
        "method": method,
        "weight_bits": weight_bits,
        "activation_bits": activation_bits,
        "backend": recipe.backend,
    }
    quantized = QuantizedModel(network, placement, description).to(device_of(model)).eval()
    if images is not None:
        _check_same_function(model, quantized, images[:2])
    return quantized


def observe_activations(quantized: QuantizedModel, images: torch.Tensor, recipe: Recipe) -> Statistics:
    statistics = observe(quantized, images, recipe.observer in HISTOGRAM_OBSERVERS)
    silent = [name for name, seen in statistics.items() if seen.is_silent()]
    if silent:
        warnings.warn(
            f"{len(silent)} of {len(statistics)} activations are zero on all {len(images)} calibration images "
            f"({', '.join(silent[:3])}{', …' if len(silent) > 3 else ''}): their scale is 1, which means nothing; "
            "calibrate on other or more images if they matter",
            QuantizationWarning,
            stacklevel=2,
        )
    return statistics


def quantize(
    quantized: QuantizedModel,
    statistics: Statistics,
    images: torch.Tensor,
    recipe: Recipe,
    progress: Progress | None = None,
    *,
    rounding_weights: ImageWeights | None = None,
    bias_weights: ImageWeights | None = None,
) -> None:
    """Set the ranges, then the weights, then what is learned or corrected on top of them; there each image counts as
    its weight (n,) says, all the same where there is none."""
    set_ranges(quantized, statistics, recipe.observer, recipe.percentile)
    quantize_weights(quantized, recipe)
    if recipe.rounding == "adaround":
        from quantizers.reconstruction import reconstruct

        report = reconstruct(
            quantized,
            images,
            unit=recipe.reconstruction_unit,
            iterations=recipe.reconstruction_iterations,
            learn_activation_scales=recipe.learn_activation_scales,
            seed=recipe.seed,
            progress=progress,
            image_weights=rounding_weights,
        )
        quantized.reports["reconstruction"] = report.table()
        quantized.description["reconstruction_images"] = report.images
    if recipe.bias_correction:
        quantized.description["bias_correction_images"] = correct_biases(
            quantized, images, progress=progress, image_weights=bias_weights
        )
    quantized.round_biases()


def quantize_weights(quantized: QuantizedModel, recipe: Recipe) -> None:
    choose_scales = recipe.weight_scales().scales
    for layer in quantized.layers().values():
        layer.quantize_weights(choose_scales)


def _check_same_function(model: nn.Module, quantized: QuantizedModel, images: torch.Tensor) -> None:
    """QuantizationError unless the traced, folded, not yet quantized network does what the model does."""
    images = images.to(device_of(model))
    try:
        with torch.no_grad(), eval_mode(model), quantized.as_float():
            expected, traced = model(images.clone()), quantized(images.clone())
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise QuantizationError(
            f"the model cannot be run on the images: {' '.join(str(error).split())[:200]}"
        ) from error
    if not isinstance(expected, torch.Tensor):
        raise QuantizationError(f"the model must return logits, a tensor (N, K); it returns {type(expected).__name__}")
    if not bool(torch.isfinite(expected).all()):
        return  # calibration names the layer
    off = float((expected - traced).norm() / expected.norm().clamp(min=1e-6))
    if off > SAME_FUNCTION:
        raise QuantizationError(
            f"the traced model gives other outputs than the model (off by {off:.1%}): it changes a tensor in place "
            "through another name, or depends on something beside its input; write such operations out of place"
        )
