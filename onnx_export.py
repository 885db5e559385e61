"""ONNX files of float and quantized models: QuantizeLinear / DequantizeLinear, integer weights packed at their width.

PyTorch's exporter writes the graph; the integers are packed afterwards into the narrowest ONNX type that holds them,
INT2 (opset 25), INT4 (opset 21) or INT8, four, two or one to a byte. Widths between go into the next wider type.
Activations of fewer than 8 bits are quantized to 8-bit integers and clipped to theirs. INT2
and INT4 are cast to INT8 before they are dequantized: engines do that once, when they load the file, and then run their
INT8 kernels, which they do not do for a DequantizeLinear of the narrow types. A layer with wide channels has them in a
tensor of their own; behind the casts the two are joined and put into order, which engines do when they load the file,
too. The file holds nothing of the program that wrote it: numpy and onnxruntime are enough to run it.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.version_converter
import torch
from onnx import helper, numpy_helper
from onnxscript import ir
from onnxscript.optimizer import optimize_ir
from torch import nn

from evaluation import eval_mode
from quantizers.deployable import IntegerLayer, StaticPair, deployable, integer_layers
from quantizers.modules import QuantizedModel
from quantizers.numerics import MAX_BITS, QuantizationError

INPUT, OUTPUT, BATCH = "image", "logits", "batch"
OPSET, OPSET_INT2 = 21, 25  # the first with INT4, the first with INT2
IR_VERSION, IR_VERSION_INT2 = 10, 13
PACKED_TYPES = {2: ml_dtypes.int2, 4: ml_dtypes.int4, 8: np.dtype(np.int8)}  # bits of the type -> numpy type
TYPE_NAMES = {2: "INT2", 4: "INT4", 8: "INT8", 16: "FLOAT16", 32: "FLOAT"}
PRODUCER = "beyond-naive-quantization"


class ExportError(QuantizationError):
    """A model that cannot be written as ONNX; the message is one line."""


def type_bits(bits: int) -> int:
    """The width of the ONNX type that holds weights of `bits`: the next wider one there is."""
    return next(width for width in (*PACKED_TYPES, 16, 32) if bits <= width)


def weight_table(model: nn.Module) -> list[dict[str, Any]]:
    """A row for each quantized layer: `layer, bits, type, parameters`, and one more for its wide channels, where it has
    such; none for a float model."""
    if not isinstance(model, QuantizedModel):
        return []
    rows = []
    for name, layer in model.layers().items():
        weight, wide = layer.layer.weight, layer.wide_count()
        wide *= weight.numel() // weight.shape[layer.axis]
        for bits, parameters in ((layer.bits, weight.numel() - wide), (layer.wide_bits, wide)):
            if parameters:
                row = {"layer": name, "bits": bits, "type": TYPE_NAMES[type_bits(bits)], "parameters": parameters}
                rows.append(row)
    return rows


def to_onnx(model: nn.Module, example: torch.Tensor, metadata: Mapping[str, str]) -> onnx.ModelProto:
    """The model, images (N, 3, H, W) -> logits (N, K), as ONNX with a dynamic batch axis. `example` (n, 3, H, W) gives
    the size of an image. ExportError for a model that PyTorch's exporter or the checker of ONNX refuses."""
    if getattr(model, "reads_groups", False):
        raise ExportError("thresholds of groups read the group of each image, which no engine gets: export its .model")
    layers: dict[str, IntegerLayer] = {}
    if isinstance(model, QuantizedModel):
        network = deployable(model, OnnxWriter())
        layers = integer_layers(network)
    else:
        network = model
    widths = {layer.bits for layer in layers.values() if layer.bits <= MAX_BITS}
    has_int2 = any(type_bits(bits) == 2 for bits in widths)
    proto = _export(network, example)
    if has_int2:
        proto = onnx.version_converter.convert_version(proto, OPSET_INT2)
    _pack_weights(proto, layers)
    _finish(proto, IR_VERSION_INT2 if has_int2 else IR_VERSION, metadata)
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the exported model is not valid ONNX: {_line(error)}") from error
    return proto


class OnnxWriter:
    """Quantize / dequantize pairs as ONNX operators (quantizers.deployable.Writer)."""

    def pair(self, x: torch.Tensor, quantizer: StaticPair) -> torch.Tensor:
        parameters, dtype = (quantizer.scale, quantizer.zero_point), quantizer.dtype
        integer = _operator("QuantizeLinear", (x, *parameters), {}, dtype, x.shape)
        if quantizer.bounds is not None:  # on integers: a layer in front still ends in its quantizer
            integer = _operator("Clip", (integer, quantizer.low, quantizer.high), {}, dtype, x.shape)
        return _operator("DequantizeLinear", (integer, *parameters), {}, torch.float32, x.shape)

    def dynamic_pair(self, x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, is_signed: bool):
        dtype = torch.int8 if is_signed else torch.uint8
        parameters, attributes = (scale, zero_point.to(dtype)), {"axis": 0}
        integer = _operator("QuantizeLinear", (x, *parameters), attributes, dtype, x.shape)
        return _operator("DequantizeLinear", (integer, *parameters), attributes, torch.float32, x.shape)

    def weight(self, layer: IntegerLayer) -> torch.Tensor:
        attributes = {} if layer.is_per_tensor else {"axis": layer.axis}
        return _operator(
            "DequantizeLinear",
            (layer.weight_integer, layer.weight_scale),
            attributes,
            torch.float32,
            layer.weight_integer.shape,
        )


def _operator(name: str, inputs: tuple, attributes: dict, dtype: torch.dtype, shape) -> torch.Tensor:
    return torch.onnx.ops.symbolic(name, inputs, attributes, dtype=dtype, shape=shape, version=OPSET)


def _export(network: nn.Module, example: torch.Tensor) -> onnx.ModelProto:
    images = torch.cat([example, example])[:2].float().cpu()  # two: a batch of one would be taken for a constant
    device = next((tensor.device for tensor in (*network.parameters(), *network.buffers())), torch.device("cpu"))
    try:
        with eval_mode(network), torch.no_grad(), _quiet():
            program = torch.onnx.export(
                network,
                (images.to(device),),
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: BATCH},),
                optimize=False,
                verbose=False,
            )
            optimize_ir(program.model, should_fold=_may_fold)  # as the exporter does, but for _may_fold
            return program.model_proto
    except Exception as error:  # the exporter's errors have no common base class
        raise ExportError(f"the model cannot be exported to ONNX: {_line(error)}") from error


def _may_fold(node: ir.Node) -> bool | None:
    """No for the cast of float16 weights, which would be stored as float32; None: as the optimizer does."""
    constant = node.inputs[0].const_value if node.op_type == "Cast" and node.inputs[0] is not None else None
    return False if constant is not None and constant.dtype == ir.DataType.FLOAT16 else None


def _pack_weights(proto: onnx.ModelProto, layers: Mapping[str, IntegerLayer]) -> None:
    """Give each integer weight the narrowest type that holds its width, with a cast to INT8 behind the narrow ones."""
    own = {f"{path}.weight_integer": layer for path, layer in layers.items() if layer.bits <= MAX_BITS}
    found: set[str] = set()
    nodes, tensors, renamed = [], [], {}
    for tensor in proto.graph.initializer:
        if tensor.name in own:
            found.add(tensor.name)
            stored, behind = _packed(tensor.name, numpy_helper.to_array(tensor), own[tensor.name])
            tensors += stored
            nodes += behind
            if behind:
                renamed[tensor.name] = behind[-1].output[0]
        else:
            tensors.append(tensor)
    for node in proto.graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = renamed.get(name, name)
    nodes += list(proto.graph.node)
    del proto.graph.initializer[:], proto.graph.node[:]
    proto.graph.initializer.extend(tensors)
    proto.graph.node.extend(nodes)
    for name in sorted(set(own) - found):  # of equal small tensors the exporter keeps one
        if not any(torch.equal(own[name].weight_integer, own[other].weight_integer) for other in found):
            raise ExportError(f"{name}: the exporter did not keep these weights as integers")


def _packed(
    name: str, integers: np.ndarray, layer: IntegerLayer
) -> tuple[list[onnx.TensorProto], list[onnx.NodeProto]]:
    """The tensors that hold a layer's integers, and the nodes that make INT8 weights of them, the last of which gives
    these; none where the tensor itself is INT8."""
    width, wide_width = type_bits(layer.bits), type_bits(layer.wide_bits)
    if layer.wide_channels is None or bool(layer.wide_channels.all()) or width == wide_width:
        width = width if layer.wide_channels is None else wide_width
        tensor = numpy_helper.from_array(integers.astype(PACKED_TYPES[width]), name)
        return [tensor], [_cast(name, onnx.TensorProto.INT8)] if width < MAX_BITS else []
    wide, tensors, nodes, joined = layer.wide_channels.cpu().numpy(), [], [], []
    for part, channels, bits in ((name, ~wide, width), (f"{name}_wide", wide, wide_width)):
        values = integers.compress(channels, axis=layer.axis)
        tensors.append(numpy_helper.from_array(values.astype(PACKED_TYPES[bits]), part))
        if bits < MAX_BITS:
            nodes.append(_cast(part, onnx.TensorProto.INT8))
        joined.append(nodes[-1].output[0] if bits < MAX_BITS else part)
    # where each channel stands among the narrow ones and, behind them, the wide ones
    place_O = np.argsort(np.argsort(wide, kind="stable"), kind="stable")
    order = f"{name}_order"
    tensors.append(numpy_helper.from_array(place_O.astype(np.min_scalar_type(len(wide) - 1)), order))
    nodes += [
        helper.make_node("Concat", joined, [f"{name}_joined"], axis=layer.axis),
        _cast(order, onnx.TensorProto.INT32),
        helper.make_node("Gather", [f"{name}_joined", f"{order}_int32"], [f"{name}_int8_ordered"], axis=layer.axis),
    ]
    return tensors, nodes


def _cast(name: str, to: int) -> onnx.NodeProto:
    suffix = onnx.TensorProto.DataType.Name(to).lower()
    return helper.make_node("Cast", [name], [f"{name}_{suffix}"], to=to)


def _finish(proto: onnx.ModelProto, ir_version: int, metadata: Mapping[str, str]) -> None:
    """Set version and metadata; leave out what only tells how the file was made, and types that have changed."""
    proto.ir_version = ir_version
    proto.producer_name, proto.producer_version, proto.doc_string = PRODUCER, "", ""
    del proto.metadata_props[:], proto.graph.value_info[:], proto.graph.metadata_props[:]
    for part in (proto.graph, *proto.graph.node, *proto.graph.initializer, *proto.graph.input, *proto.graph.output):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")
    for key, value in metadata.items():
        proto.metadata_props.add(key=key, value=value)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's progress, hints and warnings about its own code, and what it logs of models it refuses."""
    disabled, nowhere = logging.root.manager.disable, io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        warnings.simplefilter("ignore")
        try:
            logging.disable(logging.CRITICAL)
            yield
        finally:
            logging.disable(disabled)


def _line(error: BaseException) -> str:
    """The first line that says something, of an error and of what caused it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:200] or type(error).__name__
