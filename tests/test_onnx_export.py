"""The ONNX file: integers packed at their width, numbers that are the simulation's, nothing else in it."""

import functools
import logging
import math
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper
from test_deployable import CLASSES, MINMAX, SIZE, Odd, Small, pictures, trained, with_widths
from torch import nn

from onnx_export import PACKED_TYPES, PRODUCER, ExportError, to_onnx, type_bits, weight_table
from quantizers.modules import QuantizedModel
from quantizers.numerics import HALF_BITS, MAX_BITS, activation_range
from quantizers.ptq import Recipe, attach, ptq_dynamic

TYPES = {2: "INT2", 3: "INT4", 4: "INT4", 5: "INT8", 6: "INT8", 7: "INT8", 8: "INT8", 16: "FLOAT16", 32: "FLOAT"}
TYPE_BITS = {"INT2": 2, "INT4": 4, "INT8": 8, "FLOAT16": 16, "FLOAT": 32}
EVERY_WIDTH = (range(2, 10), [8, *range(2, 8), 16, 8])  # of the eight layers, of the nine activations
BACKENDS = ("x86", "arm", "tensorrt")


@functools.cache
def quantized_small(kind: str) -> QuantizedModel:
    """`kind`: a backend with every width of weights and activations, W4A4, dynamic, or odd layers."""
    x, _ = pictures(64)
    if kind in BACKENDS:
        weights = [bits if bits <= MAX_BITS else HALF_BITS for bits in EVERY_WIDTH[0]]
        return with_widths(trained(), x, weights, EVERY_WIDTH[1], backend=kind)
    if kind == "dynamic":
        return ptq_dynamic(trained(), weight_bits=4, activation_bits=8)
    if kind.startswith("odd"):
        torch.manual_seed(0)
        model = Odd().eval()
        model.opaque = nn.Identity()  # its control flow cannot be exported
        return with_widths(model, x, [3, 8], [8], weight_granularity=kind.removeprefix("odd "))
    weight_bits, activation_bits = kind[1:].split("A")
    return with_widths(trained(), x, [int(weight_bits)], [int(activation_bits)])


KINDS = [*BACKENDS, "W4A4", "dynamic", "odd per_channel", "odd per_tensor"]


@functools.cache
def exported(kind: str) -> bytes:
    """The file; shared: not to be changed."""
    return to_onnx(quantized_small(kind), pictures(1)[0], {"key": "välue"}).SerializeToString()


def proto_of(kind: str) -> onnx.ModelProto:
    return onnx.load_from_string(exported(kind))


def run(content: bytes, x: torch.Tensor, is_optimised: bool = False) -> torch.Tensor:
    """By ONNX Runtime, operator by operator unless `is_optimised`: as the file says."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    if not is_optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"image": x.numpy()})[0])


def simulated(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x.clone())


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """But for single values at a tie, which sums in another order may round the other way."""
    assert found.shape == expected.shape and expected.std() > 1e-3
    assert torch.isclose(found, expected, rtol=1e-4, atol=1e-4).all(dim=1).float().mean() >= 0.95
    assert (found - expected).abs().max() <= 0.2 * expected.std()


def initializers(proto: onnx.ModelProto) -> dict[str, TensorProto]:
    return {tensor.name: tensor for tensor in proto.graph.initializer}


def unpacked(tensor: TensorProto) -> np.ndarray:
    """Integers of a packed tensor, as the ONNX specification says: the first value in the lowest bits of a byte."""
    bits = TYPE_BITS[TensorProto.DataType.Name(tensor.data_type)]
    raw = np.frombuffer(tensor.raw_data, np.uint8).astype(int)
    parts = np.stack([raw >> shift & (2**bits - 1) for shift in range(0, 8, bits)], axis=1).reshape(-1)
    signed = np.where(parts >= 2 ** (bits - 1), parts - 2**bits, parts)
    return signed[: math.prod(tensor.dims)].reshape(tensor.dims)


def quantizer_chains(proto: onnx.ModelProto) -> list[tuple]:
    """(QuantizeLinear, Clip or None, DequantizeLinear) of each static activation quantizer."""
    readers: dict[str, list] = {}
    for node in proto.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    chains = []
    for node in proto.graph.node:
        if node.op_type == "QuantizeLinear":
            (reader,) = readers[node.output[0]]
            clip = reader if reader.op_type == "Clip" else None
            (last,) = readers[clip.output[0]] if clip else [reader]
            assert last.op_type == "DequantizeLinear" and last.input[1:] == node.input[1:]
            chains.append((node, clip, last))
    return chains


# ------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_is_valid_and_means_what_the_simulation_computes(kind):
    proto = proto_of(kind)
    onnx.checker.check_model(proto, full_check=True)
    x, _ = pictures(64, seed=5)
    assert_same(run(exported(kind), x), simulated(quantized_small(kind), x))


@pytest.mark.parametrize("kind", KINDS)
def test_any_batch_size(kind):
    """And what is predicted of an image does not depend on its batch; under dynamic quantization too, whose ranges are
    each image's own."""
    x, _ = pictures(64, seed=5)
    x = x * torch.linspace(0.2, 3, 64).view(-1, 1, 1, 1)
    for is_optimised in (False, True):
        whole = run(exported(kind), x, is_optimised)
        parts = [run(exported(kind), x[part], is_optimised) for part in (slice(0, 1), slice(1, 4), slice(4, 64))]
        assert_same(torch.cat(parts), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_names_shapes_and_versions(kind):
    proto = proto_of(kind)
    (image,), (logits,) = proto.graph.input, proto.graph.output
    shapes = [[dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in (image, logits)]
    assert (image.name, logits.name) == ("image", "logits")
    assert shapes == [["batch", 3, SIZE, SIZE], ["batch", 2 if kind.startswith("odd") else CLASSES]]
    assert image.type.tensor_type.elem_type == logits.type.tensor_type.elem_type == TensorProto.FLOAT
    has_int2 = any(tensor.data_type == TensorProto.INT2 for tensor in proto.graph.initializer)
    assert has_int2 is (kind in BACKENDS)
    versions = {entry.domain: entry.version for entry in proto.opset_import}
    assert versions[""] == (25 if has_int2 else 21)
    assert {node.domain for node in proto.graph.node} == {""}


# ------------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_packed_at_their_width(kind):
    """Types, bytes, integers and scales, unpacked here by hand."""
    quantized, proto = quantized_small(kind), proto_of(kind)
    tensors = initializers(proto)
    sources = {node.output[0]: node for node in proto.graph.node}
    dequantized = {}
    for node in proto.graph.node:
        if node.op_type == "DequantizeLinear":
            source = sources.get(node.input[0])
            name = source.input[0] if source is not None and source.op_type == "Cast" else node.input[0]
            dequantized[name] = node
    paths = {module: path for path, module in quantized.network.named_modules()}
    for layer in quantized.layers().values():
        path, weight = paths[layer], layer.layer.weight
        if layer.bits > MAX_BITS:
            tensor = tensors[f"{path}.weight_float"]
            assert tensor.data_type == TensorProto.FLOAT16
            assert np.array_equal(numpy_helper.to_array(tensor), weight.detach().half().numpy())
            continue
        tensor = tensors[f"{path}.weight_integer"]
        name = TensorProto.DataType.Name(tensor.data_type)
        assert name == TYPES[layer.bits]
        assert len(tensor.raw_data) == math.ceil(weight.numel() * TYPE_BITS[name] / 8)
        assert np.array_equal(unpacked(tensor), layer.weight_integer.numpy())
        node = dequantized[tensor.name]
        scale = numpy_helper.to_array(tensors[node.input[1]])
        axis = [attribute.i for attribute in node.attribute if attribute.name == "axis"]
        if kind == "odd per_tensor":
            assert scale.shape == () and scale == layer.weight_scale.item()
        else:
            assert np.array_equal(scale, layer.weight_scale.numpy()) and axis == [layer.axis]
    kept = [tensor for tensor in tensors.values() if tensor.name.endswith(("weight_integer", "weight_float"))]
    assert len(kept) == len(quantized.layers())


def test_no_other_tensor_is_as_large_as_the_weights():
    """Nothing is stored twice, and no weight in float."""
    for kind in ("W4A4", "arm"):
        rest = [tensor for tensor in proto_of(kind).graph.initializer if ".weight_" not in tensor.name]
        assert max(math.prod(tensor.dims) for tensor in rest) <= 24  # a bias
        assert {tensor.data_type for tensor in rest} <= {
            TensorProto.FLOAT, TensorProto.INT64, TensorProto.UINT8, TensorProto.INT8, TensorProto.UINT16,
            TensorProto.INT16,
        }  # fmt: skip


def test_the_table_tells_what_is_stored():
    quantized = quantized_small("x86")
    rows = weight_table(quantized)
    assert [row["layer"] for row in rows] == list(quantized.layers())
    assert [(row["bits"], row["type"]) for row in rows] == [(bits, TYPES[bits]) for bits in (*range(2, 9), 16)]
    assert [row["parameters"] for row in rows] == [layer.layer.weight.numel() for layer in quantized.layers().values()]
    assert weight_table(trained()) == []
    assert [type_bits(bits) for bits in (*range(2, 9), 16, 32)] == [2, 4, 4, 8, 8, 8, 8, 16, 32]
    assert all(np.dtype(kind).itemsize == 1 for kind in PACKED_TYPES.values())


def test_layers_with_the_same_weights():
    """Of equal small tensors the exporter keeps one; here those of layers of 2 and of 8 bits too."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(4)), nn.Flatten(), nn.Linear(3 * SIZE**2, 2)).eval()
    model[1].load_state_dict(model[0].state_dict())
    with torch.no_grad():
        model[2].weight.zero_()
        model[3].weight.zero_()
    x, _ = pictures(8)
    quantized = with_widths(model, x, [8, 8, 2, 8, 4], [8])
    assert torch.equal(quantized.layers()["0"].weight_integer, quantized.layers()["1"].weight_integer)
    content = to_onnx(quantized, x, {}).SerializeToString()
    assert_same(run(content, x), simulated(quantized, x))


# --------------------------------------------------------------------------------------------------------- activations


@pytest.mark.parametrize("backend", BACKENDS)
def test_activations_between_the_integer_types_are_clipped_as_integers(backend):
    """In the type that the hardware has; nothing is clipped where the type has as many values."""
    tensors = initializers(proto_of(backend))
    values = {name: numpy_helper.to_array(tensor) for name, tensor in tensors.items()}
    is_signed = backend != "x86"
    quantizers = {float(q.scale): q for q in quantized_small(backend).activation_quantizers().values()}
    assert len(quantizers) == 9
    clipped, seen = {}, Counter()
    for node, clip, _ in quantizer_chains(proto_of(backend)):
        scale, zero_point = values[node.input[1]], values[node.input[2]]
        quantizer = quantizers[float(scale)]
        wide = quantizer.bits > MAX_BITS
        assert zero_point.dtype == np.dtype(("int" if is_signed else "uint") + ("16" if wide else "8"))
        assert scale.shape == zero_point.shape == () and zero_point == int(quantizer.zero_point)
        assert zero_point == 0 or backend != "tensorrt"
        seen[quantizer] += 1
        if clip is not None:
            ends = [values[name] for name in clip.input[1:]]
            assert all(end.dtype == zero_point.dtype and end.shape == () for end in ends)
            clipped[quantizer] = tuple(int(end) for end in ends)
    assert set(seen) == set(quantizers.values())
    expected = {
        quantizer: activation_range(quantizer.bits, is_signed)
        for quantizer in quantizers.values()
        if quantizer.bits not in (8, 16)
    }
    assert clipped == expected and sorted(q.bits for q in clipped) == [2, 3, 4, 5, 6, 7]


def test_dynamic_quantization_has_a_scale_for_each_image():
    proto = proto_of("dynamic")
    tensors = initializers(proto)
    nodes = [node for node in proto.graph.node if node.op_type == "QuantizeLinear"]
    assert len(nodes) == 9 and all(node.input[1] not in tensors and node.input[2] not in tensors for node in nodes)
    assert all([a.i for a in node.attribute if a.name == "axis"] == [0] for node in nodes)
    assert not any(node.op_type == "Clip" and node.input[0] == nodes[0].output[0] for node in proto.graph.node)


# --------------------------------------------------------------------------------------------------- what else it holds


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_tells_where_or_by_what_code_it_was_made(kind):
    content = exported(kind)
    for trace in (str(Path.cwd()), "/work", "/home", str(Path(torch.__file__).parent), ".py", "site-packages", "fx."):
        assert trace.encode() not in content, trace
    proto = proto_of(kind)
    assert (proto.producer_name, proto.producer_version) == (PRODUCER, "")
    assert {entry.key: entry.value for entry in proto.metadata_props} == {"key": "välue"}
    for part in (proto, proto.graph, *proto.graph.node, *proto.graph.initializer, *proto.graph.input):
        assert not part.doc_string
    for part in (proto.graph, *proto.graph.node, *proto.graph.initializer):
        assert not part.metadata_props
    assert not proto.graph.value_info


def test_exporting_again_gives_the_same_bytes():
    again = to_onnx(quantized_small("x86"), pictures(5, seed=3)[0], {"key": "välue"})
    assert again.SerializeToString() == exported("x86")


# ------------------------------------------------------------------------------------------------------------- FP32


def test_a_float_model_is_exported_too_and_is_not_changed():
    model = Small()
    model.load_state_dict(trained().state_dict())
    model.train()
    model.head.eval()  # a mode of its own
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    proto = to_onnx(model, pictures(2)[0], {})
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    x, _ = pictures(7, seed=2)
    assert torch.allclose(run(proto.SerializeToString(), x), simulated(trained(), x), rtol=1e-4, atol=1e-4)
    assert not any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in proto.graph.node)


def test_a_quantized_model_is_not_changed():
    quantized = quantized_small("W4A4").train()
    try:
        state = {name: tensor.clone() for name, tensor in quantized.state_dict().items()}
        graph, modes = str(quantized.network.graph), [module.training for module in quantized.modules()]
        assert to_onnx(quantized, pictures(2)[0], {"key": "välue"}).SerializeToString() == exported("W4A4")
        assert [module.training for module in quantized.modules()] == modes
        assert str(quantized.network.graph) == graph
        assert all(torch.equal(quantized.state_dict()[name], tensor) for name, tensor in state.items())
    finally:
        quantized.eval()


# ------------------------------------------------------------------------------------------------------------ refusals


class Undecided(nn.Module):
    """Control flow on values."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 2, SIZE)

    def forward(self, x):
        x = self.layer(x).flatten(1)
        return 2 * x if x.mean() > 0 else x


@pytest.mark.filterwarnings("ignore:model cannot be traced")
@pytest.mark.parametrize("is_quantized", [False, True])
def test_control_flow_on_values_is_refused_in_one_line(is_quantized, capfd):
    model = Undecided().train()
    if is_quantized:
        model = with_widths(model, pictures(8)[0], [8], [8]).train()
    disabled, level = logging.root.manager.disable, logging.getLogger("torch.onnx").level
    capfd.readouterr()
    with pytest.raises(ExportError, match=r"^the model cannot be exported to ONNX: .*data-dependent") as refused:
        to_onnx(model, pictures(2)[0], {})
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 300
    assert capfd.readouterr() == ("", "")  # the exporter would print the graph
    assert model.training and model.get_submodule("network" if is_quantized else "layer").training
    assert (logging.root.manager.disable, logging.getLogger("torch.onnx").level) == (disabled, level)


def test_images_of_another_shape_are_refused_in_one_line():
    with pytest.raises(ExportError, match=r"^the model cannot be exported to ONNX: .*channels") as refused:
        to_onnx(trained(), torch.zeros(1, 1, SIZE, SIZE), {})
    assert "\n" not in str(refused.value)


def test_a_file_that_the_checker_refuses_is_not_given(monkeypatch):
    def refuse(*_, **__):
        raise onnx.checker.ValidationError("first line\nsecond line")

    monkeypatch.setattr(onnx.checker, "check_model", refuse)
    with pytest.raises(ExportError, match=r"^the exported model is not valid ONNX: first line second line$"):
        to_onnx(nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE**2, 2)), pictures(1)[0], {})


def test_a_weight_that_the_exporter_loses_is_an_error(monkeypatch):
    """Rather than a file with weights in float."""
    import onnx_export

    def export(network, example):
        proto = real(network, example)
        for tensor in proto.graph.initializer:
            tensor.name = tensor.name.replace("1.weight_integer", "lost")
        return proto

    real = onnx_export._export
    monkeypatch.setattr(onnx_export, "_export", export)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE**2, 2))
    with pytest.raises(ExportError, match=r"^1\.weight_integer: the exporter did not keep these weights as integers"):
        to_onnx(with_widths(model, pictures(4)[0], [8], [8]), pictures(1)[0], {})


def test_dynamic_quantization_of_fewer_bits_is_refused():
    with pytest.raises(ValueError, match=r"^x: dynamic quantization is exported with 8-bit") as refused:
        to_onnx(ptq_dynamic(trained(), weight_bits=4, activation_bits=4), pictures(1)[0], {})
    assert "\n" not in str(refused.value)


def test_what_is_not_quantized_yet_is_refused():
    with pytest.raises(ValueError, match="not quantized yet"):
        to_onnx(attach(trained(), None, "ptq_static", 8, 8, Recipe(**MINMAX)), pictures(1)[0], {})
