"""Quantization-aware training with learned step sizes (LSQ: Esser et al., "Learned Step Size Quantization", ICLR 2020).

From the FP32 checkpoint, BatchNorm folded, ranges and weight scales initialised by calibration as in post-training
quantization. Then weights and scales are trained together through the rounding: its gradient is that of the identity
(straight-through, Bengio et al. 2013) inside the range and zero outside, and a scale's is eq. 3 of the paper times
g = 1 / sqrt(n qmax), n the number of values that share the scale (section 2.2).

Three things differ from the paper. A scale is trained as s0 exp(t): it cannot become negative, and a step of the
optimizer changes it by a share of itself. Weights are trained in units of their channel's largest, for the same reason:
folding a BatchNorm leaves channels whose weights differ by orders of magnitude. And zero points of affine activations
stay where calibration put them, so that zero stays a level. The result is an ordinary quantized model.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from config import Training
from quantizers import ptq
from quantizers.calibration import check_images, set_ranges
from quantizers.learned import SCALE_RATE, LearnedActivation, LearnedStep, replaced
from quantizers.modules import ActivationQuantizer, QuantizedLayer, QuantizedModel
from quantizers.numerics import FLOAT_BITS, MAX_BITS, QuantizationError, along, quantize_weight
from training import Loss, TrainingResult, train


def quantization_aware_training(
    model: nn.Module,
    images: torch.Tensor,
    train_loader: Iterable,
    validation_loader: Iterable | None,
    settings: Training,
    *,
    weight_bits: int,
    activation_bits: int,
    loss: Loss | None = None,
    progress: ptq.Progress | None = None,
    on_epoch: Callable[[dict], None] | None = None,
    **recipe,
) -> tuple[QuantizedModel, TrainingResult]:
    """A quantized copy of `model`, calibrated on `images` (n, 3, H, W) and trained in the shared training loop.

    It has the weights and scales of the epoch of the best validation accuracy, of the last one without a validation
    loader. `recipe` holds fields of `ptq.Recipe`; learned rounding and bias correction, which the training would
    undo, are refused. Raises QuantizationError, or TrainingError where the loss is not finite.
    """
    recipe = ptq.Recipe(**recipe)
    if recipe.rounding != "nearest" or recipe.bias_correction:
        raise QuantizationError("qat trains the weights and biases: leave out rounding and bias_correction")
    check_images(images)
    quantized = ptq.attach(model, images, "qat", weight_bits, activation_bits, recipe)
    statistics = ptq.observe_activations(quantized, images, recipe)
    set_ranges(quantized, statistics, recipe.observer, recipe.percentile)
    ptq.quantize_weights(quantized, recipe)
    with learnable(quantized):
        result = train(
            quantized, train_loader, validation_loader, settings, loss=loss, progress=progress, on_epoch=on_epoch
        )
    quantized.round_biases()
    quantized.forget_float()
    quantized.description |= {"epochs": len(result.log), "best_epoch": result.best_epoch}
    return quantized, result


@contextlib.contextmanager
def learnable(model: QuantizedModel) -> Iterator[None]:
    """Meanwhile the model's float weights and its scales are parameters, and gradients pass through its rounding.

    Afterwards it is an ordinary quantized model of what they have become. Weights and ranges must be set before.
    """

    def learned(module: nn.Module) -> nn.Module | None:
        if isinstance(module, QuantizedLayer) and module.bits <= MAX_BITS:
            return LearnedLayer(module)
        if isinstance(module, ActivationQuantizer) and module.bits < FLOAT_BITS:
            return LearnedActivation(module)
        return None

    inputs = list(model.inputs())
    with replaced(model, learned) as replacements:
        for quantizer, layer in inputs:
            if layer in replacements:
                replacements[layer].inputs.append(replacements.get(quantizer))
        try:
            yield
        finally:
            for module in replacements.values():
                module.freeze()


class LearnedLayer(nn.Module):
    """A layer with weights in float that computes with their quantized values; `theta` (O,) trains the scales."""

    def __init__(self, quantized: QuantizedLayer):
        super().__init__()
        self._quantized = [quantized]  # in a list: not a submodule
        self.inputs: list[LearnedActivation | None] = []  # likewise: what quantizes its input, once for each call
        self.axis, self.bounds = quantized.axis, quantized.bounds()
        weight = quantized.float_weight
        others = [dim for dim in range(weight.ndim) if dim != self.axis]
        largest = weight.abs().amax(dim=others, keepdim=True)
        self.register_buffer("unit", torch.where(largest > 0, largest, torch.ones_like(largest)))
        self.register_buffer("scale", quantized.weight_scale.clone())
        self.weight = nn.Parameter(weight / self.unit)
        self.theta = nn.Parameter(torch.zeros_like(self.scale))
        self.bias = None if quantized.layer.bias is None else nn.Parameter(quantized.layer.bias.detach().clone())
        self.gradient_scale = 1 / math.sqrt(weight.numel() / self.scale.numel() * self.bounds[1])

    @property
    def layer(self) -> nn.Module:
        return self._quantized[0].layer

    def current_scale(self) -> torch.Tensor:
        return self.scale * torch.exp(SCALE_RATE * self.theta)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = along(self.current_scale(), self.axis, self.weight.ndim)
        weight = LearnedStep.apply(self.weight * self.unit, scale, *self.bounds, self.gradient_scale)
        return torch.func.functional_call(self.layer, {"weight": weight, "bias": self.rounded_bias()}, (x,))

    def rounded_bias(self) -> torch.Tensor | None:
        """As `QuantizedLayer.round_bias` will round it, with the gradient of the identity."""
        (source,) = set(self.inputs) if len(set(self.inputs)) == 1 else (None,)
        if self.bias is None or source is None or source.bits > MAX_BITS:
            return self.bias
        step = (source.current_scale() * self.current_scale()).detach()
        return self.bias + ((self.bias / step).round() * step - self.bias).detach()

    @torch.no_grad()
    def freeze(self) -> None:
        (quantized,) = self._quantized
        scale = self.current_scale()
        integer = quantize_weight(self.weight * self.unit, scale, quantized.bits, self.axis, quantized.int8_range)
        quantized.set_weights(integer, scale)
        if self.bias is not None:
            quantized.set_bias(self.rounded_bias())
