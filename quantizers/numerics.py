"""Uniform affine quantization, q = clamp(round(x / scale) + zero_point, qmin, qmax), at any width from 2 to 8 bits.

Weights: signed, symmetric (zero_point 0), the whole range -2^(b-1) … 2^(b-1) - 1, but at 8 bits the range that the
backend has. Activations: affine, zero always a level (Jacob et al., CVPR 2018), unsigned 0 … 2^b - 1 or signed
-2^(b-1) … 2^(b-1) - 1, which are the same values; or symmetric, signed like the weights; of layers that stay wide in a
mixed-precision model also 16 bits. Rounding is to the nearest, ties to even, as in ONNX.

What a backend has (`BACKENDS`) is the integer scheme of the hardware's kernels:

x86       unsigned affine activations, weights of the whole range (oneDNN, FBGEMM, MLAS; ONNX Runtime's default). With
          `reduce_range` 8-bit weights keep to -64 … 63: without VNNI a product of uint8 and int8 pairs saturates int16
arm       signed affine activations, 8-bit weights -127 … 127 (XNNPACK, QNNPACK; the TensorFlow Lite quantization spec)
tensorrt  signed symmetric activations and weights, no zero points (TensorRT's explicit quantization), which has fused
          attention on integers: both factors of its products are quantized too
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

MIN_BITS, MAX_BITS = 2, 8
HALF_BITS, FLOAT_BITS = 16, 32  # what a layer keeps that is not quantized: float16 weights, or all of it in float
PACK_CHUNK = 1 << 20  # values packed at a time
INT8_RANGE = (-128, 127)
REDUCED_INT8_RANGE = (-64, 63)


@dataclass(frozen=True)
class Backend:
    """The integer scheme of one kind of hardware."""

    is_signed: bool  # activations
    is_symmetric: bool  # activations
    has_integer_products: bool = False  # of two activations (attention)
    int8_range: tuple[int, int] = INT8_RANGE  # of weights of 8 bits


BACKENDS = {
    "x86": Backend(is_signed=False, is_symmetric=False),
    "arm": Backend(is_signed=True, is_symmetric=False, int8_range=(-127, 127)),
    "tensorrt": Backend(is_signed=True, is_symmetric=True, has_integer_products=True),
}


class QuantizationError(ValueError):
    """Quantization that cannot be done as asked; the message is one line."""


class QuantizationWarning(UserWarning):
    """A quantization that was done as asked, but that may not be what was meant; one line."""


def check_bits(bits: int, what: str) -> int:
    if isinstance(bits, bool) or not isinstance(bits, int) or not MIN_BITS <= bits <= MAX_BITS:
        raise QuantizationError(f"{what}: {bits!r} bits; expected an integer from {MIN_BITS} to {MAX_BITS}")
    return bits


def weight_range(bits: int, int8_range: tuple[int, int] = INT8_RANGE) -> tuple[int, int]:
    """The smallest and the largest integer; `int8_range` is that of 8 bits."""
    return int8_range if bits == 8 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def activation_range(bits: int, is_signed: bool = False) -> tuple[int, int]:
    return weight_range(bits) if is_signed else (0, 2**bits - 1)


def symmetric_scale(max_abs: torch.Tensor, qmax: int) -> torch.Tensor:
    """The scale at which no |w| <= max_abs is off by more than scale / 2; 1 where max_abs is 0 (all weights zero)."""
    scale = max_abs / (qmax + 0.5)
    return torch.where(scale > torch.finfo(scale.dtype).tiny, scale, torch.ones_like(scale))


def activation_parameters(
    low: torch.Tensor, high: torch.Tensor, bits: int, is_symmetric: bool = False, is_signed: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, zero_point) of the range [low, high]; symmetric, which is signed: of the least range around zero that
    holds both."""
    if not is_symmetric:
        return affine_parameters(low, high, bits, is_signed)
    scale = symmetric_scale(torch.maximum(low.abs(), high.abs()), weight_range(bits)[1])
    return scale, torch.zeros_like(scale)


def affine_parameters(
    low: torch.Tensor, high: torch.Tensor, bits: int, is_signed: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, zero_point) of the range [low, high], widened to hold 0; any shape. The range [0, 0] has scale 1."""
    levels = 2**bits - 1
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    scale = (high - low) / levels
    scale = torch.where(scale > torch.finfo(scale.dtype).tiny, scale, torch.ones_like(scale))
    zero_point = (-low / scale).round().clamp(0, levels)
    return scale, zero_point + activation_range(bits, is_signed)[0]


def fake_quantize(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, qmin: int, qmax: int) -> torch.Tensor:
    """dequantize(quantize(x)) in the dtype of x. The zero point moves into the bounds: same values, fewer passes."""
    return x.div(scale).round_().clamp_(qmin - zero_point, qmax - zero_point).mul_(scale)


def quantize_weight(
    w: torch.Tensor, scale_O: torch.Tensor, bits: int, axis: int, int8_range: tuple[int, int] = INT8_RANGE
) -> torch.Tensor:
    """int8 tensor of the shape of w; `axis` is the output-channel dimension."""
    return round_weight(w, scale_O, axis, weight_range(bits, int8_range))


def round_weight(w: torch.Tensor, scale_O: torch.Tensor, axis: int, bounds: tuple) -> torch.Tensor:
    """The same between `bounds`: two integers, or tensors that broadcast against w."""
    return w.div(along(scale_O, axis, w.ndim)).round_().clamp_(*bounds).to(torch.int8)


def dequantize_weight(q: torch.Tensor, scale_O: torch.Tensor, axis: int) -> torch.Tensor:
    return q.to(scale_O.dtype) * along(scale_O, axis, q.ndim)


def along(values_O: torch.Tensor, axis: int, ndim: int) -> torch.Tensor:
    """A vector as a tensor of `ndim` dimensions that broadcasts along `axis`."""
    shape = [1] * ndim
    shape[axis] = -1
    return values_O.reshape(shape)


# ------------------------------------------------------------------------------------------------------------- packing


def pack_bits(values: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned values < 2^bits, flattened, as uint8: `bits` bits each, most significant first, without padding."""
    flat = np.ascontiguousarray(values, dtype=np.uint8).reshape(-1)
    assert flat.size == 0 or int(flat.max()) < 2**bits
    if bits == 8:
        return flat.copy()
    chunk = PACK_CHUNK  # a multiple of 8: every chunk but the last ends on a byte
    parts = [
        np.packbits(np.unpackbits(flat[start : start + chunk, None], axis=1)[:, 8 - bits :])
        for start in range(0, flat.size, chunk)
    ]
    return np.concatenate(parts) if parts else np.zeros(0, np.uint8)


def unpack_bits(packed: np.ndarray, bits: int, size: int) -> np.ndarray:
    """The `size` uint8 values that `pack_bits` packed."""
    if packed.size != (size * bits + 7) // 8:
        raise QuantizationError(f"{packed.size} packed bytes do not hold {size} values of {bits} bits")
    if bits == 8:
        return packed.copy()
    step = PACK_CHUNK * bits // 8
    parts = []
    for start in range(0, packed.size, step):
        count = min(PACK_CHUNK, size - start // step * PACK_CHUNK)
        flags = np.unpackbits(packed[start : start + step])[: count * bits].reshape(count, bits)
        parts.append(np.packbits(flags, axis=1)[:, 0] >> (8 - bits))
    return np.concatenate(parts) if parts else np.zeros(0, np.uint8)
