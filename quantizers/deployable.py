"""The graph that an integer engine runs: a quantized model with its quantizers written out as quantize / dequantize
(Q/DQ) pairs, its weights as integers with a dequantize, and quantizers where engines fuse them.

What is computed stays the same: rounding is monotone, so a quantizer commutes with a concatenation and a
maximum, and quantizing twice on one grid is quantizing once. So

- a ReLU or ReLU6 that the clipping of the quantizer behind it implies is dropped;
- a quantizer behind a concatenation or a maximum pooling is repeated before it, so that the layer in front ends in a
  quantizer and the operation between runs on integers.

How a pair is written is the caller's choice (`Writer`): as ONNX operators, or as PyTorch's `quantized_decomposed`
operators, which Inductor fuses.
"""

from __future__ import annotations

import copy
from typing import Protocol

import torch
from torch import fx, nn
from torch.nn import functional as F

from quantizers.graph import is_rectifier
from quantizers.modules import (
    ActivationQuantizer,
    DynamicActivationQuantizer,
    QuantizedLayer,
    QuantizedModel,
    UncalibratedError,
)
from quantizers.numerics import FLOAT_BITS, HALF_BITS, MAX_BITS, QuantizationError, activation_range, along

SIX = 6.0  # where ReLU6 ends
INTEGER_TYPES = {  # (has it more than 8 bits, is it signed)
    (False, False): torch.uint8,
    (False, True): torch.int8,
    (True, False): torch.uint16,
    (True, True): torch.int16,
}
# before these a quantizer is repeated: engines run them on integers, which a layer in front can then end in
INTEGER_MODULES = (nn.MaxPool2d, nn.AdaptiveMaxPool2d)
INTEGER_FUNCTIONS = {torch.cat, torch.concat, F.max_pool2d}


class Writer(Protocol):
    """How quantize / dequantize pairs and integer weights are written."""

    def pair(self, x: torch.Tensor, quantizer: StaticPair) -> torch.Tensor:
        """dequantize(quantize(x)) of a static quantizer."""

    def dynamic_pair(self, x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, is_signed: bool):
        """dequantize(quantize(x)) with a scale and a zero point for each image, (N,)."""

    def weight(self, layer: IntegerLayer) -> torch.Tensor:
        """The weights of a layer in float."""


def deployable(model: QuantizedModel, writer: Writer) -> nn.Module:
    """A copy of the model's network as `writer` writes it; the model is not changed.

    QuantizationError for a model that is not quantized yet.
    """
    network = copy.deepcopy(model.network).cpu().eval()
    if isinstance(network, fx.GraphModule):
        _move_quantizers(network)
    replacements: dict[nn.Module, nn.Module | None] = {}  # a module that stands in several places stays one
    for path, module in list(network.named_modules(remove_duplicate=False)):
        try:
            if module not in replacements:
                replacements[module] = _replacement(module, writer)
        except UncalibratedError as error:
            raise QuantizationError(str(error)) from None
        if replacements[module] is not None:
            network.set_submodule(path, replacements[module])
    if isinstance(network, fx.GraphModule):
        network.delete_all_unused_submodules()
        network.recompile()
    return network


def integer_layers(network: nn.Module) -> dict[str, IntegerLayer]:
    """The layers of a deployable network, by their path."""
    return {path: module for path, module in network.named_modules() if isinstance(module, IntegerLayer)}


def _replacement(module: nn.Module, writer: Writer) -> nn.Module | None:
    if isinstance(module, ActivationQuantizer):
        return nn.Identity() if module.bits >= FLOAT_BITS else StaticPair(module, writer)
    if isinstance(module, DynamicActivationQuantizer):
        return DynamicPair(module, writer)
    if isinstance(module, QuantizedLayer):
        return IntegerLayer(module, writer)
    return None


# ------------------------------------------------------------------------------------------------------------- modules


class StaticPair(nn.Module):
    """A quantizer of a fixed range. A width between the integer types goes into the next wider one, `dtype`, and its
    integers are clipped to `bounds`, which is None where those are the type's own."""

    def __init__(self, quantizer: ActivationQuantizer, writer: Writer):
        super().__init__()
        quantizer.check_calibrated()
        self._writer = [writer]
        self.dtype = INTEGER_TYPES[quantizer.bits > MAX_BITS, quantizer.is_signed]
        qmin, qmax = quantizer.bounds()
        zero_point = int(quantizer.zero_point)
        self.register_buffer("scale", quantizer.scale.detach().clone().float())
        self.register_buffer("zero_point", torch.tensor(zero_point).to(self.dtype))
        self.numbers = (float(self.scale), zero_point)  # the same, for writers that need constants
        self.bounds = None
        if quantizer.bits not in (MAX_BITS, HALF_BITS) and not getattr(quantizer, "is_repeated", False):
            self.bounds = (qmin, qmax)
            self.register_buffer("low", torch.tensor(qmin).to(self.dtype))
            self.register_buffer("high", torch.tensor(qmax).to(self.dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._writer[0].pair(x, self)


class DynamicPair(nn.Module):
    """A quantizer whose range is each image's own."""

    def __init__(self, quantizer: DynamicActivationQuantizer, writer: Writer):
        super().__init__()
        if quantizer.bits != MAX_BITS:
            raise QuantizationError(
                f"{quantizer.name}: dynamic quantization is exported with 8-bit activations, not {quantizer.bits}; "
                "quantize with activation_bits=8"
            )
        self._writer, self._quantizer = [writer], [quantizer]
        self.is_signed = quantizer.is_signed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale_N, zero_point_N = self._quantizer[0].parameters_of(x)
        return self._writer[0].dynamic_pair(x, scale_N, zero_point_N, self.is_signed)


class IntegerLayer(nn.Module):
    """A convolution or linear layer whose weights are dequantized from integers; of 16 bits from float16."""

    def __init__(self, quantized: QuantizedLayer, writer: Writer):
        super().__init__()
        self._writer, self._layer = [writer], [quantized.layer]  # in lists: not submodules
        self.name, self.bits, self.axis = quantized.name, quantized.bits, quantized.axis
        self.is_per_tensor = quantized.granularity == "per_tensor"
        self.wide_bits = quantized.wide_bits
        self.wide_channels = quantized.wide_channels  # (O,) bool or None: those with wide_bits instead of bits
        bias = quantized.layer.bias
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        if self.bits <= MAX_BITS:
            if bool(torch.isnan(quantized.weight_scale).any()):
                raise QuantizationError(f"{quantized.name}: its weights are not quantized yet")
            self.register_buffer("weight_integer", quantized.weight_integer.detach().clone())
            scale = quantized.weight_scale.detach().clone().float()
            self.register_buffer("weight_scale", scale.reshape(()) if self.is_per_tensor else scale)
        else:
            dtype = torch.float16 if self.bits == HALF_BITS else torch.float32
            self.register_buffer("weight_float", quantized.layer.weight.detach().to(dtype))

    @property
    def layer(self) -> nn.Module:
        """The layer as it is simulated, for code that looks at its weights: x.to(self.conv.weight.dtype)."""
        return self._layer[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (layer,) = self._layer
        weight = self._writer[0].weight(self) if self.bits <= MAX_BITS else self.weight_float.float()
        if isinstance(layer, nn.Linear):
            return F.linear(x, weight, self.bias)
        return torch.func.functional_call(layer, {"weight": weight, "bias": self.bias}, (x,))


# ------------------------------------------------------------------------------------------------- moving quantizers


def _move_quantizers(network: fx.GraphModule) -> None:
    """Repeat quantizers before what moves values, and drop the rectifiers that they imply."""
    modules = dict(network.named_modules())
    pending = [
        node
        for node in network.graph.nodes
        if node.op == "call_module" and isinstance(modules[node.target], ActivationQuantizer)
    ]
    for node in pending:
        _push(network, node, modules)
    network.graph.eliminate_dead_code()
    network.graph.lint()
    network.recompile()


def _push(network: fx.GraphModule, node: fx.Node, modules: dict[str, nn.Module]) -> None:
    quantizer = modules[node.target]
    if quantizer.bits >= FLOAT_BITS:
        return
    source = node.args[0]
    while len(source.users) == 1 and is_rectifier(source, modules) and _implies(quantizer, source, modules):
        before = source.all_input_nodes[0]
        source.replace_all_uses_with(before)
        network.graph.erase_node(source)
        source = before
    if len(source.users) != 1 or not source.args or not _runs_on_integers(source, modules):
        return
    for operand in _operands(source):
        with network.graph.inserting_before(source):
            inserted = network.graph.call_module(node.target, (operand,))
        source.replace_input_with(operand, inserted)
        _push(network, inserted, modules)
    again = copy.copy(quantizer)  # what it reads is on its grid already: nothing is left to clip
    again.is_repeated = True
    node.target = f"{node.target}_repeated"
    network.add_submodule(node.target, again)
    modules[node.target] = again


def _runs_on_integers(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return isinstance(modules[node.target], INTEGER_MODULES)
    return node.op == "call_function" and node.target in INTEGER_FUNCTIONS


def _operands(node: fx.Node) -> list[fx.Node]:
    """The tensors whose values a node hands on."""
    first = node.args[0]
    operands = list(first) if isinstance(first, (list, tuple)) else [first]
    return list(dict.fromkeys(operand for operand in operands if isinstance(operand, fx.Node)))


def _implies(quantizer: ActivationQuantizer, node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether the quantizer clips all that the rectifier clips."""
    qmin, qmax = quantizer.bounds()
    zero_point = float(quantizer.zero_point)
    if zero_point != qmin:
        return False
    is_six = node.target is F.relu6 or isinstance(modules.get(str(node.target)), nn.ReLU6)
    return not is_six or float((SIX / quantizer.scale).round()) >= qmax - zero_point


# --------------------------------------------------------------------------------------------------- PyTorch operators


class DecomposedWriter:
    """`torch.ops.quantized_decomposed`: what PT2E gives and Inductor's oneDNN passes recognise."""

    def __init__(self) -> None:
        import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer  # noqa: F401  registers operators and passes

    def pair(self, x: torch.Tensor, quantizer: StaticPair) -> torch.Tensor:
        ops, (scale, zero_point) = torch.ops.quantized_decomposed, quantizer.numbers
        if quantizer.bounds is not None:  # before: kernels saturate at the ends of the type whatever the operator says
            x = torch.clamp(x, *((bound - zero_point) * scale for bound in quantizer.bounds))
        info = torch.iinfo(quantizer.dtype)
        arguments = (scale, zero_point, info.min, info.max, quantizer.dtype)
        return ops.dequantize_per_tensor.default(ops.quantize_per_tensor.default(x, *arguments), *arguments)

    def dynamic_pair(self, x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, is_signed: bool):
        low, high = activation_range(MAX_BITS, is_signed)
        scale, zero_point = along(scale, 0, x.ndim), along(zero_point, 0, x.ndim)
        return x.div(scale).round().clamp(low - zero_point, high - zero_point).mul(scale)

    def weight(self, layer: IntegerLayer) -> torch.Tensor:
        channels = layer.weight_integer.shape[layer.axis]
        scale = layer.weight_scale.expand(channels).contiguous() if layer.is_per_tensor else layer.weight_scale
        zero_point = torch.zeros(channels, dtype=torch.int64)
        return torch.ops.quantized_decomposed.dequantize_per_channel.default(
            layer.weight_integer, scale, zero_point, layer.axis, -128, 127, torch.int8
        )
