"""Post-training quantization, static and dynamic."""

from __future__ import annotations

import torch
from torch import nn

from evaluation import device_of, eval_mode
from quantizers.calibration import calibrate
from quantizers.graph import prepare
from quantizers.modules import ActivationQuantizer, DynamicActivationQuantizer, QuantizedModel
from quantizers.numerics import QuantizationError
from quantizers.observers import WeightObserver

SAME_FUNCTION = 0.01  # the most that tracing and folding may change the logits by, relatively; rounding changes 1e-5


def ptq_static(
    model: nn.Module,
    images: torch.Tensor,
    *,
    weight_bits: int,
    activation_bits: int,
    observer: str = "mse",
    weight_observer: str = "mse",
    percentile: float = 99.99,
    first_last_bits: int | None = None,
) -> QuantizedModel:
    """Integer weights and fixed activation ranges, chosen by `observer` from calibration `images` (n, 3, H, W)."""

    def new_quantizer(name: str, is_edge: bool) -> nn.Module:
        return ActivationQuantizer(name, first_last_bits if is_edge and first_last_bits else activation_bits)

    quantized = _attach(model, "ptq_static", weight_bits, activation_bits, new_quantizer, first_last_bits)
    _check_same_function(model, quantized, images[:2])
    calibrate(quantized, images, observer, percentile)
    _quantize_weights(quantized, WeightObserver(weight_observer, percentile))
    return quantized


def ptq_dynamic(
    model: nn.Module,
    images: torch.Tensor | None = None,
    *,
    weight_bits: int,
    activation_bits: int,
    weight_observer: str = "mse",
    percentile: float = 99.99,
    first_last_bits: int | None = None,
) -> QuantizedModel:
    """Integer weights; activation ranges are each image's own extremes (dimension 0), found at run time.

    Needs no data; where `images` are given, the traced network is checked against the model on two of them.
    """

    def new_quantizer(name: str, is_edge: bool) -> nn.Module:
        return DynamicActivationQuantizer(name, first_last_bits if is_edge and first_last_bits else activation_bits)

    quantized = _attach(model, "ptq_dynamic", weight_bits, activation_bits, new_quantizer, first_last_bits)
    if images is not None:
        _check_same_function(model, quantized, images[:2])
    _quantize_weights(quantized, WeightObserver(weight_observer, percentile))
    return quantized


def _attach(model, method, weight_bits, activation_bits, new_quantizer, first_last_bits) -> QuantizedModel:
    network, placement = prepare(model, weight_bits, new_quantizer, first_last_bits)
    description = {"method": method, "weight_bits": weight_bits, "activation_bits": activation_bits}
    return QuantizedModel(network, placement, description).to(device_of(model)).eval()


def _check_same_function(model: nn.Module, quantized: QuantizedModel, images: torch.Tensor) -> None:
    """QuantizationError unless the traced, folded, not yet quantized network does what the model does."""
    images = images.to(device_of(model))
    silent = {name: _ignore for name in quantized.activation_quantizers()}  # they change nothing meanwhile
    try:
        with torch.no_grad(), eval_mode(model), quantized.observing(silent):
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


def _ignore(x: torch.Tensor) -> None:
    pass


def _quantize_weights(quantized: QuantizedModel, observer: WeightObserver) -> None:
    for layer in quantized.layers().values():
        layer.quantize_weights(observer.scales)
