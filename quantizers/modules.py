"""The modules that a quantized model is made of. All state is in buffers, NaN until calibrated."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from quantizers.numerics import (
    QuantizationError,
    affine_parameters,
    along,
    check_bits,
    dequantize_weight,
    fake_quantize,
    pack_bits,
    quantize_weight,
    unpack_bits,
    weight_range,
)


class UncalibratedError(RuntimeError):
    """A quantizer without ranges was used."""


class ActivationQuantizer(nn.Module):
    """Affine, per tensor, with a range fixed by calibration. While `observer` is set it watches and changes nothing."""

    def __init__(self, name: str, bits: int):
        super().__init__()
        self.name = name
        self.bits = check_bits(bits, name)
        self.register_buffer("scale", torch.tensor(torch.nan))
        self.register_buffer("zero_point", torch.tensor(torch.nan))
        self.observer: Callable[[torch.Tensor], None] | None = None
        self._is_calibrated = False

    def set_range(self, low: float, high: float) -> None:
        """Calibrate to [low, high], widened to hold 0."""
        scale, zero_point = affine_parameters(torch.tensor(low), torch.tensor(high), self.bits)
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)
        self._is_calibrated = False  # looked at again by the next forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.observer is not None:
            self.observer(x)
            return x
        if not self._is_calibrated:  # once, not in every pass: on CUDA the look costs a synchronisation
            if bool(torch.isnan(self.scale)):
                raise UncalibratedError(f"{self.name}: used before calibration; pass calibration_data")
            self._is_calibrated = True
        return fake_quantize(x, self.scale, self.zero_point, 0, 2**self.bits - 1)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._is_calibrated = False
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        return f"{self.name}, bits={self.bits}, scale={float(self.scale):.4g}"


class DynamicActivationQuantizer(nn.Module):
    """Affine, with the extremes of each image (dimension 0) as its range: a prediction never depends on its batch."""

    def __init__(self, name: str, bits: int):
        super().__init__()
        self.name = name
        self.bits = check_bits(bits, name)
        self.observer: Callable[[torch.Tensor], None] | None = None  # as in ActivationQuantizer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.observer is not None:
            self.observer(x)
            return x
        flat_NK = x.reshape(x.shape[0], -1)
        low_N, high_N = flat_NK.amin(dim=1), flat_NK.amax(dim=1)
        scale_N, zero_point_N = affine_parameters(low_N, high_N, self.bits)
        scale, zero_point = along(scale_N, 0, x.ndim), along(zero_point_N, 0, x.ndim)
        return fake_quantize(x, scale, zero_point, 0, 2**self.bits - 1)

    def extra_repr(self) -> str:
        return f"{self.name}, bits={self.bits}, per image"


class QuantizedLayer(nn.Module):
    """A convolution or linear layer whose weights are integers, symmetric and per output channel.

    `weight_integer` and `weight_scale` are the state; `layer.weight` holds the same values dequantized, made once by
    `quantize_weights`, so that a forward pass costs what the float one costs. Biases stay in float (int32 in an
    engine).
    """

    def __init__(self, name: str, layer: nn.Module, bits: int):
        super().__init__()
        self.name = name
        self.bits = check_bits(bits, name)
        self.layer = layer
        self.axis = 1 if isinstance(layer, TRANSPOSED) else 0
        if self.axis == 1 and layer.groups > 1:
            raise QuantizationError(f"{name}: grouped transposed convolutions cannot be quantized per channel")
        channels = layer.weight.shape[self.axis]
        self.register_buffer("weight_scale", torch.full((channels,), torch.nan, device=layer.weight.device))
        self.register_buffer("weight_integer", torch.zeros_like(layer.weight, dtype=torch.int8))

    def quantize_weights(self, choose_scales: Callable[[torch.Tensor, int, int, str], torch.Tensor]) -> None:
        """Round the weights onto the grid of the scales that `choose_scales(w, bits, axis, name)` gives."""
        with torch.no_grad():
            weight = self.layer.weight
            self.weight_scale.copy_(choose_scales(weight, self.bits, self.axis, self.name))
            self.weight_integer.copy_(quantize_weight(weight, self.weight_scale, self.bits, self.axis))
            weight.copy_(dequantize_weight(self.weight_integer, self.weight_scale, self.axis))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)

    def extra_repr(self) -> str:
        return f"{self.name}, bits={self.bits}"


class QuantizedInputLayer(nn.Sequential):
    """A quantizer and the layer behind it, where the code around them cannot be traced; it may read the weights."""

    @property
    def weight(self) -> torch.Tensor:
        return self[1].layer.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self[1].layer.bias


TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
ACTIVATION_QUANTIZERS = (ActivationQuantizer, DynamicActivationQuantizer)


class QuantizedModel(nn.Module):
    """A quantized copy of a float model: images (N, 3, H, W) -> logits (N, K).

    `placement` tells what is quantized and what is left in float (see quantizers.graph.Placement).
    """

    def __init__(self, network: fx.GraphModule | nn.Module, placement: Any, description: dict[str, Any]):
        super().__init__()
        self.network = network
        self.placement = placement
        self.description = description

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x)

    def layers(self) -> dict[str, QuantizedLayer]:
        return {module.name: module for module in self.modules() if isinstance(module, QuantizedLayer)}

    def activation_quantizers(self) -> dict[str, nn.Module]:
        return {module.name: module for module in self.modules() if isinstance(module, ACTIVATION_QUANTIZERS)}

    @contextlib.contextmanager
    def observing(self, observers: dict[str, Callable[[torch.Tensor], None]]) -> Iterator[None]:
        """Every named activation quantizer shows what passes to its observer, and changes nothing meanwhile."""
        quantizers = self.activation_quantizers()
        try:
            for name, observer in observers.items():
                quantizers[name].observer = observer
            yield
        finally:
            for name in observers:
                quantizers[name].observer = None

    # ---------------------------------------------------------------------------------------------------------- file

    def packed_tensors(self) -> dict[str, torch.Tensor]:
        """What the model's file holds: weights packed at their own width, everything else as it is."""
        state = self.state_dict()
        packed = {}
        for path, module in self.named_modules():
            if isinstance(module, QuantizedLayer):
                if bool(torch.isnan(module.weight_scale).any()):
                    raise UncalibratedError(f"{module.name}: its weights are not quantized yet")
                del state[f"{path}.layer.weight"]
                offset = (
                    state.pop(f"{path}.weight_integer").cpu().numpy().astype(np.int16) - weight_range(module.bits)[0]
                )
                packed[f"{path}.weight_packed"] = torch.from_numpy(pack_bits(offset, module.bits))
        rest = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
        return {**packed, **{name: tensor.detach().cpu().contiguous() for name, tensor in rest.items()}}

    def packed_metadata(self) -> dict[str, str]:
        layers = {
            path: {"bits": module.bits, "axis": module.axis, "shape": list(module.weight_integer.shape)}
            for path, module in self.named_modules()
            if isinstance(module, QuantizedLayer)
        }
        return {
            "format": PACKED_FORMAT,
            "description": json.dumps({**self.description, "layers": layers}, sort_keys=True),
        }

    def load_packed(self, tensors: dict[str, torch.Tensor]) -> None:
        """The inverse of `packed_tensors`, into a model of the same structure. QuantizationError otherwise."""
        state = dict(tensors)
        own = self.state_dict()
        for path, module in self.named_modules():
            if not isinstance(module, QuantizedLayer):
                continue
            if f"{path}.weight_packed" not in state:
                raise QuantizationError(f"{path}: no packed weights in the file: it is of another model")
            shape = module.weight_integer.shape
            values = unpack_bits(state.pop(f"{path}.weight_packed").numpy(), module.bits, shape.numel())
            integer = (
                torch.from_numpy(values.astype(np.int16) + weight_range(module.bits)[0]).to(torch.int8).reshape(shape)
            )
            state[f"{path}.weight_integer"] = integer
            state[f"{path}.layer.weight"] = dequantize_weight(integer, state[f"{path}.weight_scale"], module.axis)
        state |= {name: tensor for name, tensor in own.items() if name.endswith("num_batches_tracked")}
        if set(state) != set(own):
            raise QuantizationError(f"the file is of another model: {sorted(set(state) ^ set(own))[0]} does not match")
        self.load_state_dict(state)


PACKED_FORMAT = "beyond-naive-quantization/packed/1"
