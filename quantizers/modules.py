"""The modules that a quantized model is made of. All state is in buffers, NaN until calibrated."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from quantizers.numerics import (
    FLOAT_BITS,
    HALF_BITS,
    INT8_RANGE,
    MAX_BITS,
    QuantizationError,
    activation_parameters,
    activation_range,
    along,
    check_bits,
    dequantize_weight,
    fake_quantize,
    pack_bits,
    round_weight,
    unpack_bits,
    weight_range,
)


class UncalibratedError(RuntimeError):
    """A quantizer without ranges was used."""


class ActivationQuantizer(nn.Module):
    """Per tensor, with a range fixed by calibration; of 2 to 8 bits, 16, or 32, which leaves its input as it is.

    While `observer` is set it watches and changes nothing.
    """

    def __init__(self, name: str, bits: int, is_symmetric: bool = False, is_signed: bool = False):
        super().__init__()
        self.name = name
        self.bits = _check_wide_bits(bits, name)
        self.is_symmetric = is_symmetric
        self.is_signed = is_signed or is_symmetric
        self.register_buffer("scale", torch.tensor(torch.nan))
        self.register_buffer("zero_point", torch.tensor(torch.nan))
        self.observer: Callable[[torch.Tensor], None] | None = None
        self._is_calibrated = False

    def set_bits(self, bits: int) -> None:
        """Another width; the range has to be set anew."""
        self.bits = _check_wide_bits(bits, self.name)
        self.scale.fill_(torch.nan)
        self.zero_point.fill_(torch.nan)
        self._is_calibrated = False

    def set_range(self, low: float, high: float) -> None:
        """Calibrate to [low, high], widened to hold 0; symmetric: to the least range around 0 that holds both."""
        ends = torch.tensor(low), torch.tensor(high)
        scale, zero_point = activation_parameters(*ends, self.bits, self.is_symmetric, self.is_signed)
        self.set_parameters(scale, zero_point)

    def set_parameters(self, scale: torch.Tensor, zero_point: torch.Tensor) -> None:
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)
        self._is_calibrated = False  # looked at again by the next forward

    def check_calibrated(self) -> None:
        """UncalibratedError without a range; looks once, not in every pass: on CUDA it costs a synchronisation."""
        if not self._is_calibrated:
            if bool(torch.isnan(self.scale)):
                raise UncalibratedError(f"{self.name}: used before calibration; pass calibration_data")
            self._is_calibrated = True

    def bounds(self) -> tuple[int, int]:
        """The smallest and the largest integer."""
        return activation_range(self.bits, self.is_signed)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.observer is not None:
            self.observer(x)
            return x
        if self.bits >= FLOAT_BITS:
            return x
        self.check_calibrated()
        return fake_quantize(x, self.scale, self.zero_point, *self.bounds())

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._is_calibrated = False
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        return f"{self.name}, bits={self.bits}, scale={float(self.scale):.4g}"


class DynamicActivationQuantizer(nn.Module):
    """With the extremes of each image (dimension 0) as its range: a prediction never depends on its batch."""

    def __init__(self, name: str, bits: int, is_symmetric: bool = False, is_signed: bool = False):
        super().__init__()
        self.name = name
        self.bits = check_bits(bits, name)
        self.is_symmetric = is_symmetric
        self.is_signed = is_signed or is_symmetric
        self.observer: Callable[[torch.Tensor], None] | None = None  # as in ActivationQuantizer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.observer is not None:
            self.observer(x)
            return x
        scale_N, zero_point_N = self.parameters_of(x)
        scale, zero_point = along(scale_N, 0, x.ndim), along(zero_point_N, 0, x.ndim)
        return fake_quantize(x, scale, zero_point, *activation_range(self.bits, self.is_signed))

    def parameters_of(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(scale, zero_point) of each image, (N,)."""
        flat_NK = x.reshape(x.shape[0], -1)
        ends = flat_NK.amin(dim=1), flat_NK.amax(dim=1)
        return activation_parameters(*ends, self.bits, self.is_symmetric, self.is_signed)

    def extra_repr(self) -> str:
        return f"{self.name}, bits={self.bits}, per image"


class QuantizedLayer(nn.Module):
    """A convolution or linear layer whose weights are integers, symmetric, with a scale each output channel or one.

    `weight_integer` and `weight_scale` are the state; `layer.weight` holds the same values dequantized, made once by
    `quantize_weights`, so that a forward pass costs what the float one costs. Biases are floats that `round_bias` puts
    onto the grid of an engine's int32 accumulator. Of 16 bits the weights are float16, of 32 what they were; both then
    have no integers and no scale.

    `wide_channels` (O,) bool says which output channels have `wide_bits` instead of `bits`; None: none of them.

    `float_weight` and `float_bias` are the parameters as they were before, kept from the first quantization until
    `QuantizedModel.forget_float`, for whatever chooses the rounding, the bias or the width.
    """

    def __init__(
        self,
        name: str,
        layer: nn.Module,
        bits: int,
        granularity: str = "per_channel",
        int8_range: tuple[int, int] = INT8_RANGE,
    ):
        super().__init__()
        self.name = name
        self.layer = layer
        self.granularity = granularity
        self.int8_range = int8_range
        self.axis = 1 if isinstance(layer, TRANSPOSED) else 0
        if self.axis == 1 and layer.groups > 1:
            raise QuantizationError(f"{name}: grouped transposed convolutions cannot be quantized per channel")
        self.float_weight: torch.Tensor | None = None
        self.float_bias: torch.Tensor | None = None
        self.is_float = False  # compute with the float parameters: see QuantizedModel.as_float
        self.set_bits(bits)

    def set_bits(self, bits: int) -> None:
        """Another width, of all channels; the weights have to be quantized anew."""
        self.bits = _check_wide_bits(bits, self.name)
        self.wide_bits = MAX_BITS
        self.register_buffer("wide_channels", None)
        weight = self.layer.weight
        channels = 1 if self.granularity == "per_tensor" else weight.shape[self.axis]
        is_integer = bits <= MAX_BITS
        scale = torch.full((channels if is_integer else 0,), torch.nan, device=weight.device)
        integer = torch.zeros_like(weight, dtype=torch.int8) if is_integer else weight.new_zeros(0, dtype=torch.int8)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("weight_integer", integer)

    def set_wide_channels(self, wide_O: torch.Tensor, wide_bits: int = MAX_BITS) -> None:
        """Give the output channels that `wide_O` (O,) marks `wide_bits` of weights, the others the layer's; where that
        changes anything, the weights have to be quantized anew. QuantizationError for a layer with one scale for all
        channels, or that is as wide already."""
        weight = self.layer.weight
        wide_O = torch.as_tensor(wide_O, device=weight.device)
        channels = weight.shape[self.axis]
        if wide_O.dtype != torch.bool or wide_O.shape != (channels,):
            raise QuantizationError(
                f"{self.name}: wide channels are {channels} booleans, got {tuple(wide_O.shape)} {wide_O.dtype}"
            )
        if not bool(wide_O.any()):
            if self.wide_channels is not None:
                self.set_bits(self.bits)
            return
        check_bits(wide_bits, f"{self.name}: wide_bits")
        if self.granularity != "per_channel":
            raise QuantizationError(f"{self.name}: wide channels need a scale each: set weight_granularity per_channel")
        if self.bits >= wide_bits:
            raise QuantizationError(f"{self.name}: it has {self.bits} bits, its wide channels need more than that")
        if self.wide_channels is not None and self.wide_bits == wide_bits and torch.equal(self.wide_channels, wide_O):
            return
        self.set_bits(self.bits)
        self.wide_bits = wide_bits
        self.wide_channels = wide_O.clone()

    @torch.no_grad()
    def quantize_weights(self, choose_scales: Callable[[torch.Tensor, int, int, str], torch.Tensor]) -> None:
        """Round the float weights onto the grid of the scales that `choose_scales(w, bits, axis, name)` gives."""
        self.keep_float()
        if self.bits <= MAX_BITS:
            scale = choose_scales(self.float_weight, self.bits, self.axis, self.name)
            if self.wide_channels is not None:
                (wide,) = self.wide_channels.nonzero(as_tuple=True)
                wide_weight = self.float_weight.index_select(self.axis, wide)
                scale[wide] = choose_scales(wide_weight, self.wide_bits, self.axis, self.name)
            self.set_weights(round_weight(self.float_weight, scale, self.axis, self.bounds()), scale)
        else:
            self.layer.weight.copy_(self.float_weight.half() if self.bits == HALF_BITS else self.float_weight)
            if not bool(torch.isfinite(self.layer.weight).all()):
                raise QuantizationError(f"{self.name}: its weights are not finite in float16")

    def bounds(self) -> tuple[int, int] | tuple[torch.Tensor, torch.Tensor]:
        """The smallest and the largest integer of the weights; where some channels are wide, tensors that broadcast
        against the weights."""
        narrow = weight_range(self.bits, self.int8_range)
        if self.wide_channels is None:
            return narrow
        weight, wide = self.layer.weight, weight_range(self.wide_bits, self.int8_range)
        is_wide = along(self.wide_channels, self.axis, weight.ndim)
        low, high = (torch.where(is_wide, *ends).to(weight.dtype) for ends in zip(wide, narrow, strict=True))
        return low, high

    def keep_float(self) -> None:
        if self.float_weight is None:
            self.float_weight = self.layer.weight.detach().clone()
            self.float_bias = None if self.layer.bias is None else self.layer.bias.detach().clone()

    @torch.no_grad()
    def set_weights(self, integer: torch.Tensor, scale: torch.Tensor) -> None:
        """The weights that these integers and scales mean."""
        self.weight_scale.copy_(scale)
        self.weight_integer.copy_(integer)
        self.layer.weight.copy_(dequantize_weight(self.weight_integer, self.weight_scale, self.axis))

    @torch.no_grad()
    def set_bias(self, bias: torch.Tensor) -> None:
        """Give the layer this bias (O,), whether it had one or not."""
        if self.layer.bias is None:
            self.layer.bias = nn.Parameter(torch.zeros_like(bias))
        self.layer.bias.copy_(bias)

    @torch.no_grad()
    def round_bias(self, input_scale: torch.Tensor) -> None:
        """Round the bias to multiples of input scale x weight scale, as engines do, whose accumulators are integers
        (Jacob et al. 2018, eq. 11): left out, it moves 4-bit activations by a percent of a level.

        A channel of almost no weight (a BatchNorm that training has switched off) may have a bias beyond int32: its
        weights get the larger scale at which the bias fits, with which they are rounded again."""
        bias = self.layer.bias
        if bias is None or self.bits > MAX_BITS:
            return
        least = bias.abs() / (input_scale * LARGEST_BIAS)
        least = least.amax(dim=0, keepdim=True) if self.granularity == "per_tensor" else least
        scale = torch.maximum(self.weight_scale, least)
        if not torch.equal(scale, self.weight_scale):
            weight = dequantize_weight(self.weight_integer, self.weight_scale, self.axis)
            self.set_weights(round_weight(weight, scale, self.axis, self.bounds()), scale)
        step = input_scale * self.weight_scale
        bias.copy_((bias / step).round_() * step)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.is_float and self.float_weight is not None:
            parameters = {"weight": self.float_weight, "bias": self.float_bias}
            return torch.func.functional_call(self.layer, parameters, (x,))
        return self.layer(x)

    def weight_bytes(self) -> int:
        """What the weights and scales take in the model's file."""
        return self.bytes_at(self.bits, self.wide_count(), self.wide_bits)

    def bytes_at(self, bits: int, wide_channels: int = 0, wide_bits: int = MAX_BITS) -> int:
        """What they would take with `bits` bits, and with `wide_bits` in so many channels; where there are such, a bit
        for each channel marks them."""
        weight = self.layer.weight
        if bits > MAX_BITS:
            return weight.numel() * bits // 8
        channels = weight.shape[self.axis]
        wide = wide_channels * (weight.numel() // channels)
        marks = -(-channels // 8) if wide_channels else 0
        scales = 1 if self.granularity == "per_tensor" else channels
        return -(-(weight.numel() - wide) * bits // 8) - (-wide * wide_bits // 8) + marks + 4 * scales

    def wide_count(self) -> int:
        return 0 if self.wide_channels is None else int(self.wide_channels.sum())

    def extra_repr(self) -> str:
        wide = "" if self.wide_channels is None else f", {self.wide_count()} channels of {self.wide_bits}"
        return f"{self.name}, bits={self.bits}{wide}"

    # ----------------------------------------------------------------------------------------------------------- files

    def pack(self) -> dict[str, torch.Tensor]:
        """The integers in as many bits as they have, uint8: of the narrow channels and, where there are some, of the
        wide ones, and which these are."""
        wide = self.wide_channels
        if wide is None:
            return {"weight_packed": _packed(self.weight_integer, self.bits)}
        integer_OK = self.weight_integer.movedim(self.axis, 0)
        return {
            "weight_packed": _packed(integer_OK[~wide], self.bits),
            "wide_weight_packed": _packed(integer_OK[wide], self.wide_bits),
            "wide_channels_packed": torch.from_numpy(pack_bits(wide.cpu().numpy(), 1)),
        }

    def unpack(self, packed: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The inverse of `pack`: the integers, and which channels are wide. The layer stays as it is."""
        shape = self.weight_integer.shape
        if "wide_channels_packed" not in packed:
            return _unpacked(packed["weight_packed"], self.bits, shape), None
        if "wide_weight_packed" not in packed:
            raise QuantizationError(f"{self.name}: wide channels without weights in the file")
        wide = torch.from_numpy(unpack_bits(packed["wide_channels_packed"].numpy(), 1, shape[self.axis])).bool()
        integer_OK = self.weight_integer.movedim(self.axis, 0).cpu().clone()
        for name, bits, channels in (("weight_packed", self.bits, ~wide), ("wide_weight_packed", self.wide_bits, wide)):
            integer_OK[channels] = _unpacked(packed[name], bits, (int(channels.sum()), *integer_OK.shape[1:]))
        return integer_OK.movedim(0, self.axis).contiguous(), wide

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if f"{prefix}weight_integer" in state_dict:
            wide = state_dict.get(f"{prefix}wide_channels")  # there where some channels are wide
            self.wide_channels = None if wide is None else wide.to(self.layer.weight.device, copy=True)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _packed(integer: torch.Tensor, bits: int) -> torch.Tensor:
    offset = integer.cpu().numpy().astype(np.int16) - weight_range(bits)[0]
    return torch.from_numpy(pack_bits(offset, bits))


def _unpacked(packed: torch.Tensor, bits: int, shape: tuple[int, ...]) -> torch.Tensor:
    values = unpack_bits(packed.numpy(), bits, math.prod(shape))
    return torch.from_numpy(values.astype(np.int16) + weight_range(bits)[0]).to(torch.int8).reshape(shape)


def _check_wide_bits(bits: int, what: str) -> int:
    return bits if bits in (HALF_BITS, FLOAT_BITS) else check_bits(bits, what)


class QuantizedInputLayer(nn.Sequential):
    """A quantizer and the layer behind it, where the code around them cannot be traced; it may read the weights."""

    @property
    def weight(self) -> torch.Tensor:
        return self[1].layer.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self[1].layer.bias


LARGEST_BIAS = 2**30  # multiples of its step: half of what an int32 accumulator holds
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
ACTIVATION_QUANTIZERS = (ActivationQuantizer, DynamicActivationQuantizer)


class QuantizedModel(nn.Module):
    """A quantized copy of a float model: images (N, 3, H, W) -> logits (N, K).

    `placement` tells what is quantized and what is left in float (see quantizers.graph.Placement), `description` what
    was asked for (it goes into the file), `reports` what was measured meanwhile: tables, by name.
    """

    def __init__(self, network: fx.GraphModule | nn.Module, placement: Any, description: dict[str, Any]):
        super().__init__()
        self.network = network
        self.placement = placement
        self.description = description
        self.reports: dict[str, Any] = {}
        self._plan: Any = None  # see quantizers.inference; no state: made anew where it is missing or out of date

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from quantizers import inference  # which is built on this module

        if self.training or not isinstance(self.network, fx.GraphModule) or not inference.can_run(x):
            return self.network(x)
        if self._plan is None or not self._plan[0].is_current(self.network):
            self._plan = (inference.make_plan(self.network),)  # in a tuple: not a submodule
        plan = self._plan[0]
        return self.network(x) if plan.is_watched() else plan.graph(x)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plan": None}

    def layers(self) -> dict[str, QuantizedLayer]:
        return {module.name: module for module in self.modules() if isinstance(module, QuantizedLayer)}

    def activation_quantizers(self) -> dict[str, nn.Module]:
        return {module.name: module for module in self.modules() if isinstance(module, ACTIVATION_QUANTIZERS)}

    @contextlib.contextmanager
    def as_float(self, but: Collection[nn.Module] = ()) -> Iterator[None]:
        """Meanwhile it computes what the float model did: no quantizer, float weights and biases. The layers and
        quantizers in `but` go on as they are."""
        layers = self.layers().values()
        was_float = {layer: layer.is_float for layer in layers}
        quantizers = self.activation_quantizers().items()
        with self.observing({name: _ignore for name, quantizer in quantizers if quantizer not in but}):
            try:
                for layer in layers:
                    layer.is_float = was_float[layer] if layer in but else True
                yield
            finally:
                for layer in layers:
                    layer.is_float = was_float[layer]

    def round_biases(self) -> None:
        """Put every bias onto the grid of its layer's accumulator, where the layer has one input, of 8 bits or fewer,
        whose scale is known."""
        scales: dict[QuantizedLayer, list[ActivationQuantizer]] = {}
        for quantizer, layer in self.inputs():
            scales.setdefault(layer, []).append(quantizer)
        for layer, quantizers in scales.items():
            (quantizer,) = quantizers if len(set(quantizers)) == 1 else (None,)
            if isinstance(quantizer, ActivationQuantizer) and quantizer.bits <= MAX_BITS:
                layer.round_bias(quantizer.scale)

    def inputs(self) -> Iterator[tuple[nn.Module, QuantizedLayer]]:
        """Each layer with a quantizer that it reads."""
        if isinstance(self.network, fx.GraphModule):
            modules = dict(self.network.named_modules())
            for node in self.network.graph.nodes:
                if node.op == "call_module" and isinstance(modules[node.target], QuantizedLayer):
                    yield modules[node.args[0].target], modules[node.target]
        for module in self.modules():
            if isinstance(module, QuantizedInputLayer):
                yield module[0], module[1]

    def forget_float(self) -> None:
        """Free the float parameters that the layers keep while the model is made."""
        for layer in self.layers().values():
            layer.float_weight = layer.float_bias = None

    def widths(self) -> dict[str, int]:
        """Bits of the weights of each layer."""
        return {name: layer.bits for name, layer in self.layers().items()}

    @contextlib.contextmanager
    def observing(self, observers: dict[str, Callable[[torch.Tensor], None]]) -> Iterator[None]:
        """Every named activation quantizer shows what passes to its observer, and changes nothing meanwhile."""
        quantizers = self.activation_quantizers()
        before = {name: quantizers[name].observer for name in observers}
        try:
            for name, observer in observers.items():
                quantizers[name].observer = observer
            yield
        finally:
            for name in observers:
                quantizers[name].observer = before[name]

    # ---------------------------------------------------------------------------------------------------------- file

    def packed_tensors(self) -> dict[str, torch.Tensor]:
        """What the model's file holds: weights packed at their own width, everything else as it is."""
        state = self.state_dict()
        packed = {}
        for path, module in self.named_modules():
            if isinstance(module, QuantizedLayer):
                if bool(torch.isnan(module.weight_scale).any()):
                    raise UncalibratedError(f"{module.name}: its weights are not quantized yet")
                if module.bits > MAX_BITS:
                    del state[f"{path}.weight_integer"], state[f"{path}.weight_scale"]
                    if module.bits == HALF_BITS:
                        state[f"{path}.layer.weight"] = state[f"{path}.layer.weight"].half()
                    continue
                del state[f"{path}.layer.weight"], state[f"{path}.weight_integer"]
                state.pop(f"{path}.wide_channels", None)
                packed |= {f"{path}.{name}": tensor for name, tensor in module.pack().items()}
        rest = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
        return {**packed, **{name: tensor.detach().cpu().contiguous() for name, tensor in rest.items()}}

    def packed_metadata(self) -> dict[str, str]:
        layers = {
            path: {"bits": module.bits, "axis": module.axis, "shape": list(module.layer.weight.shape)}
            | ({} if module.wide_channels is None else {"wide_bits": module.wide_bits})
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
        wide_channels = {}
        for path, module in self.named_modules():
            if not isinstance(module, QuantizedLayer):
                continue
            own.pop(f"{path}.wide_channels", None)
            bias = state.get(f"{path}.layer.bias")
            if bias is not None and module.layer.bias is None:  # what a bias correction gave it
                module.set_bias(bias)
                own[f"{path}.layer.bias"] = bias
            if module.bits > MAX_BITS:
                state |= {f"{path}.{name}": own[f"{path}.{name}"] for name in ("weight_integer", "weight_scale")}
                continue
            if f"{path}.weight_packed" not in state:
                raise QuantizationError(f"{path}: no packed weights in the file: it is of another model")
            packed = {name: state.pop(f"{path}.{name}") for name in PACKED_PARTS if f"{path}.{name}" in state}
            integer, wide = module.unpack(packed)
            if wide is not None:
                wide_channels[f"{path}.wide_channels"] = wide
            state[f"{path}.weight_integer"] = integer
            state[f"{path}.layer.weight"] = dequantize_weight(integer, state[f"{path}.weight_scale"], module.axis)
        state |= {name: tensor for name, tensor in own.items() if name.endswith("num_batches_tracked")}
        if set(state) != set(own):
            raise QuantizationError(f"the file is of another model: {sorted(set(state) ^ set(own))[0]} does not match")
        self.load_state_dict(state | wide_channels)


def _ignore(x: torch.Tensor) -> None:
    pass


PACKED_PARTS = ("weight_packed", "wide_weight_packed", "wide_channels_packed")  # what QuantizedLayer.pack gives
PACKED_FORMAT = "beyond-naive-quantization/packed/1"
