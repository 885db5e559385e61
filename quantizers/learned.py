"""What training through rounding is built on: the gradients of LSQ, a learned activation scale, modules swapped for a
while. quantizers.qat trains a whole network with it, quantizers.reconstruction a piece at a time.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn

from quantizers.modules import ActivationQuantizer

SCALE_RATE = 10.0  # a scale is s0 exp(SCALE_RATE theta): how much faster it moves, relatively, than the learning rate


@contextlib.contextmanager
def replaced(root: nn.Module, make: Callable[[nn.Module], nn.Module | None]) -> Iterator[dict[nn.Module, nn.Module]]:
    """Meanwhile every module below `root` for which `make` gives another one is replaced by that; yields which by
    which. A module that stands in several places is replaced by one."""
    replacements: dict[nn.Module, nn.Module | None] = {}
    places: list[tuple[nn.Module, str, nn.Module]] = []
    for parent in list(root.modules()):
        for name, child in parent._modules.items():
            if child is None:
                continue
            if child not in replacements:
                replacements[child] = make(child)
            if replacements[child] is not None:
                places.append((parent, name, child))
    try:
        for parent, name, child in places:
            parent._modules[name] = replacements[child]
        yield {old: new for old, new in replacements.items() if new is not None}
    finally:
        for parent, name, child in places:
            parent._modules[name] = child


def mixed(x: torch.Tensor, y: torch.Tensor, share: float, generator: torch.Generator | None) -> torch.Tensor:
    """A `share` of x's values, drawn anew, and y's elsewhere (QDrop: Wei et al. 2022), laid out in memory like x: a
    mask of another layout would make the convolutions behind it several times slower."""
    is_kept = torch.empty_like(x, dtype=torch.float32, device="cpu").uniform_(generator=generator) < share
    return torch.where(is_kept.to(x.device), x, y)


class LearnedActivation(nn.Module):
    """A quantizer whose scale is trained by `theta`; its zero point stays."""

    def __init__(self, quantizer: ActivationQuantizer):
        super().__init__()
        self._quantizer = [quantizer]
        self.bits = quantizer.bits
        self.register_buffer("scale", quantizer.scale.clone())
        self.theta = nn.Parameter(torch.zeros_like(self.scale))
        zero_point = float(quantizer.zero_point)
        self.bounds = tuple(bound - zero_point for bound in quantizer.bounds())
        low, high = quantizer.bounds()
        self.levels = high if quantizer.is_symmetric else high - low  # on either side of zero, or in all
        self.drop = 0.0  # the share of values that pass as they are, drawn from `generator` (QDrop: Wei et al. 2022)
        self.generator: torch.Generator | None = None

    def current_scale(self) -> torch.Tensor:
        return self.scale * torch.exp(SCALE_RATE * self.theta)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gradient_scale = 1 / math.sqrt(max(1, x.numel() // max(1, len(x))) * self.levels)
        y = LearnedStep.apply(x.float(), self.current_scale(), *self.bounds, gradient_scale)
        return y if self.drop == 0 else mixed(x, y, self.drop, self.generator)

    @torch.no_grad()
    def freeze(self) -> None:
        (quantizer,) = self._quantizer
        quantizer.set_parameters(self.current_scale(), quantizer.zero_point.clone())


class LearnedStep(torch.autograd.Function):
    """clamp(round(x / s), low, high) s, with the gradients of LSQ; `scale` broadcasts against x, all float32.

    Of x: the identity where low <= x / s <= high, else zero. Of s: round(x / s) - x / s inside, low or high outside
    (Esser et al. 2020, eq. 3), times `gradient_scale`.
    """

    @staticmethod
    def forward(ctx, x, scale, low, high, gradient_scale):
        ctx.save_for_backward(x, scale)
        ctx.bounds, ctx.gradient_scale = (low, high), gradient_scale
        return x.div(scale).round_().clamp_(low, high).mul_(scale)

    @staticmethod
    def backward(ctx, gradient):
        x, scale = ctx.saved_tensors
        low, high = ctx.bounds
        steps = x / scale
        if isinstance(low, torch.Tensor) or isinstance(high, torch.Tensor):
            gradient_x = torch.where((steps >= low) & (steps <= high), gradient, 0)
        else:  # one pass over the memory; it leaves out the ends, so they are moved by the least there is
            gradient_x = torch.ops.aten.hardtanh_backward(gradient, steps, *_just_outside(low, high))
        gradient_s = None
        if ctx.needs_input_grad[1]:
            products = steps.round().clamp_(low, high).mul_(gradient).addcmul_(steps, gradient_x, value=-1)
            gradient_s = products.sum_to_size(scale.shape) * ctx.gradient_scale
        return gradient_x, gradient_s, None, None, None


def _just_outside(low: float, high: float) -> tuple[float, float]:
    """The float32 numbers next to an interval."""
    infinity = np.float32(np.inf)
    return float(np.nextafter(np.float32(low), -infinity)), float(np.nextafter(np.float32(high), infinity))
