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

from quantizers import ptq
from quantizers.calibration import check_images, set_ranges
from quantizers.learned import SCALE_RATE, LearnedActivation, LearnedStep, replaced
from quantizers.modules import ActivationQuantizer, DynamicActivationQuantizer, QuantizedLayer, QuantizedModel
from quantizers.numerics import FLOAT_BITS, HALF_BITS, MAX_BITS, QuantizationError, activation_range, along
from sections.training import Training
from training import Loss, TrainingResult, train

CELL_MARGIN = 0.25  # in steps: how far inside its rounding cell a weight starts at least, lest the first steps undo it


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
def learnable(model: QuantizedModel, keep_rounding: bool = False) -> Iterator[None]:
    """Meanwhile the model's float weights and its scales are parameters, and gradients pass through its rounding.

    Afterwards it is an ordinary quantized model of what they have become. Weights and ranges must be set before.
    Training starts at the float weights, which round to the nearest integers; with `keep_rounding` at the weights next
    to them that round to the integers the model has, however these were chosen: see `weights_that_round_to`.
    """

    def learned(module: nn.Module) -> nn.Module | None:
        if isinstance(module, QuantizedLayer) and module.bits <= MAX_BITS:
            return LearnedLayer(module, weights_that_round_to(module) if keep_rounding else module.float_weight)
        if isinstance(module, QuantizedLayer) and module.bits == HALF_BITS:
            return LearnedHalfLayer(module)
        if isinstance(module, ActivationQuantizer) and module.bits < FLOAT_BITS:
            return LearnedActivation(module)
        if isinstance(module, DynamicActivationQuantizer):
            return PassedActivation(module)
        return None

    inputs = list(model.inputs())
    with replaced(model, learned) as replacements:
        for quantizer, layer in inputs:
            if isinstance(replacements.get(layer), LearnedLayer):
                replacements[layer].inputs.append(replacements.get(quantizer))
        try:
            yield
        finally:
            for module in replacements.values():
                module.freeze()


@torch.no_grad()
def weights_that_round_to(quantized: QuantizedLayer) -> torch.Tensor:
    """The weights nearest to the float ones that round to the layer's integers, and do not leave them at once.

    Each is moved into the middle half of its integer's cell, (q - 1/4) s … (q + 1/4) s, open towards the outside at the
    ends of the range, where clipping has made the integer. At the edge itself, next to which learned rounding
    leaves many of the float weights, the first steps of a training would undo its choices. Without float weights (a
    model that was loaded) they are the middle of their cells.
    """
    integer = quantized.weight_integer.to(quantized.weight_scale.dtype)
    scale = along(quantized.weight_scale, quantized.axis, integer.ndim)
    if quantized.float_weight is None:
        return integer * scale
    low, high = _bounds(quantized)
    reach = 0.5 - CELL_MARGIN
    lowest = torch.where(integer <= low, -torch.inf, integer - reach)
    highest = torch.where(integer >= high, torch.inf, integer + reach)
    return (quantized.float_weight / scale).clamp(lowest, highest) * scale


class LearnedLayer(nn.Module):
    """A layer with weights in float that computes with their quantized values; `theta` (O,) trains the scales."""

    def __init__(self, quantized: QuantizedLayer, weight: torch.Tensor):
        super().__init__()
        self._quantized = [quantized]  # in a list: not a submodule
        self.inputs: list[nn.Module | None] = []  # likewise: what quantizes its input, once for each call
        self.axis, self.bounds = quantized.axis, _bounds(quantized)
        others = [dim for dim in range(weight.ndim) if dim != self.axis]
        largest = weight.abs().amax(dim=others, keepdim=True)
        self.register_buffer("unit", torch.where(largest > 0, largest, torch.ones_like(largest)))
        self.register_buffer("scale", quantized.weight_scale.clone())
        self.weight = nn.Parameter(weight / self.unit)
        self.theta = nn.Parameter(torch.zeros_like(self.scale))
        self.bias = None if quantized.layer.bias is None else nn.Parameter(quantized.layer.bias.detach().clone())
        self.gradient_scale = _gradient_scale(weight.numel(), self.scale.numel(), self.bounds[1])

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
        if self.bias is None or not isinstance(source, LearnedActivation) or source.bits > MAX_BITS:
            return self.bias
        step = (source.current_scale() * self.current_scale()).detach()
        return self.bias + ((self.bias / step).round() * step - self.bias).detach()

    @torch.no_grad()
    def freeze(self) -> None:
        (quantized,) = self._quantized
        scale = self.current_scale()
        steps = (self.weight * self.unit).div_(along(scale, self.axis, self.weight.ndim))
        quantized.set_weights(steps.round_().clamp_(*self.bounds).to(torch.int8), scale)
        if self.bias is not None:
            quantized.set_bias(self.rounded_bias())


class LearnedHalfLayer(nn.Module):
    """A layer of 16 bits with weights in float32 that computes with their float16 values."""

    def __init__(self, quantized: QuantizedLayer):
        super().__init__()
        self._quantized = [quantized]  # in a list: not a submodule
        self.weight = nn.Parameter(quantized.layer.weight.detach().clone())
        self.bias = None if quantized.layer.bias is None else nn.Parameter(quantized.layer.bias.detach().clone())

    @property
    def layer(self) -> nn.Module:
        return self._quantized[0].layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight + (self.weight.half().float() - self.weight).detach()
        return torch.func.functional_call(self.layer, {"weight": weight, "bias": self.bias}, (x,))

    @torch.no_grad()
    def freeze(self) -> None:
        (quantized,) = self._quantized
        quantized.layer.weight.copy_(self.weight.half())
        if self.bias is not None:
            quantized.set_bias(self.bias)


class PassedActivation(nn.Module):
    """A quantizer with each image's own range, whose gradient is that of the identity inside the range."""

    def __init__(self, quantizer: DynamicActivationQuantizer):
        super().__init__()
        self._quantizer = [quantizer]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (quantizer,) = self._quantizer
        x = x.float()
        scale_N, zero_point_N = quantizer.parameters_of(x.detach())
        bounds = (
            along(bound - zero_point_N, 0, x.ndim) for bound in activation_range(quantizer.bits, quantizer.is_signed)
        )
        return LearnedStep.apply(x, along(scale_N, 0, x.ndim), *bounds, 1.0)

    def freeze(self) -> None:
        pass


Bounds = tuple[float | torch.Tensor, float | torch.Tensor]


def _bounds(quantized: QuantizedLayer) -> Bounds:
    """The least and the largest integer of the weights: numbers or, where channels differ, tensors that broadcast."""

    def broadcast(bound: float | torch.Tensor) -> float | torch.Tensor:
        if not isinstance(bound, torch.Tensor) or bound.ndim == 0:
            return float(bound)
        bound = bound.to(quantized.weight_scale)
        return along(bound, quantized.axis, quantized.weight_integer.ndim) if bound.ndim == 1 else bound

    low, high = quantized.bounds()
    return broadcast(low), broadcast(high)


def _gradient_scale(weights: int, scales: int, high: float | torch.Tensor) -> float | torch.Tensor:
    """1 / sqrt(n qmax), n the weights that share a scale (Esser et al. 2020, section 2.2)."""
    if not isinstance(high, torch.Tensor):
        return 1 / math.sqrt(weights / scales * high)
    return (weights / scales * (high if scales > 1 else high.mean())).rsqrt()
