"""Wide channels inside narrow layers: their levels, their bytes in every file, what engines make of them; and which
channels are chosen, for whom."""

import copy
import math

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from test_deployable import MINMAX, SIZE, ByHand, Odd, both, pictures, trained
from test_engines import operators, run_literally
from test_onnx_export import assert_same, initializers, run, simulated, unpacked
from torch import nn
from torch.nn import functional as F

from engines import OnnxRuntimeEngine, OpenVinoEngine, for_openvino
from evaluation import write_model
from onnx_export import to_onnx, weight_table
from quantizers import ptq, sensitive_channels
from quantizers.deployable import DecomposedWriter
from quantizers.modules import QuantizedLayer, QuantizedModel
from quantizers.numerics import QuantizationError, along
from quantizers.observers import WeightObserver
from quantizers.ptq import Recipe
from quantizers.qat import LearnedLayer, learnable
from quantizers.sensitive_channels import choose_channels, preserve_channels

LAYERS = {
    "convolution": lambda: nn.Conv2d(6, 10, 3, padding=1),
    "depthwise": lambda: nn.Conv2d(10, 10, 3, groups=10),
    "linear": lambda: nn.Linear(7, 10),
    "transposed": lambda: nn.ConvTranspose2d(5, 10, 3),
}
MARKED = torch.tensor([True, False, False, True, False, False, False, True, False, False])


def every_third(model: QuantizedModel) -> dict[str, torch.Tensor]:
    """Of every layer but the last."""
    layers = list(model.layers().items())[:-1]
    return {name: torch.arange(layer.layer.weight.shape[layer.axis]) % 3 == 1 for name, layer in layers}


def with_wide(model: nn.Module, x: torch.Tensor, bits: int = 4, activation_bits: int = 8, chosen=every_third, **recipe):
    """Quantized, with wide channels where `chosen` says."""
    recipe = Recipe(**MINMAX | recipe)
    quantized = ptq.attach(model, x, "ptq_static", bits, activation_bits, recipe)
    preserve_channels(quantized, chosen(quantized))
    ptq.quantize(quantized, ptq.observe_activations(quantized, x, recipe), x, recipe)
    return quantized


def odd() -> nn.Module:
    """A transposed convolution among others."""
    torch.manual_seed(0)
    model = Odd().eval()
    model.opaque = nn.Identity()
    return model


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def by_channel(layer: QuantizedLayer, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.movedim(layer.axis, 0).flatten(1)


# -------------------------------------------------------------------------------------------------------------- levels


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("bits", [2, 4, 7])
@pytest.mark.parametrize("int8_range", [(-128, 127), (-127, 127), (-64, 63)])
def test_wide_channels_have_8_bits_and_the_others_the_layers(kind, bits, int8_range):
    torch.manual_seed(1)
    layer = QuantizedLayer("layer", LAYERS[kind](), bits, int8_range=int8_range)
    plain = QuantizedLayer("layer", copy.deepcopy(layer.layer), bits, int8_range=int8_range)
    wide = QuantizedLayer("layer", copy.deepcopy(layer.layer), 8, int8_range=int8_range)
    layer.set_wide_channels(MARKED)
    scales = WeightObserver("minmax", int8_range=int8_range).scales
    for each in (layer, plain, wide):
        each.quantize_weights(scales)
    expected = torch.where(MARKED, wide.weight_scale, plain.weight_scale)
    assert torch.equal(layer.weight_scale, expected)
    parts = [by_channel(each, each.weight_integer) for each in (layer, plain, wide)]
    assert torch.equal(parts[0], torch.where(MARKED[:, None], parts[2], parts[1]))
    off = by_channel(layer, (layer.layer.weight - layer.float_weight).abs()).amax(dim=1)
    assert bool((off <= expected / 2 * (1 + 1e-4)).all())  # minmax clips nothing
    assert max(len(row.unique()) for row in parts[0][~MARKED]) <= 2**bits
    if bits == 2:
        assert bool((off[MARKED] < 0.1 * off[~MARKED].min()).all())
    low, high = layer.bounds()
    assert bool((low <= layer.weight_integer).all()) and bool((layer.weight_integer <= high).all())
    assert by_channel(layer, low.expand_as(layer.weight_integer))[:2, 0].tolist() == [int8_range[0], -(2 ** (bits - 1))]
    assert by_channel(layer, high.expand_as(layer.weight_integer))[:2, 0].tolist() == [
        int8_range[1],
        2 ** (bits - 1) - 1,
    ]
    assert layer.wide_count() == 3 and "3 channels of 8" in layer.extra_repr()


@pytest.mark.parametrize("observer", ["mse", "percentile", "entropy"])
def test_integers_beyond_the_wide_range_are_clipped(observer):
    torch.manual_seed(1)
    layer = QuantizedLayer("layer", nn.Linear(40, 10), 3)
    layer.set_wide_channels(MARKED)
    layer.quantize_weights(WeightObserver(observer).scales)
    layer.quantize_weights(lambda *arguments: 0.25 * WeightObserver(observer).scales(*arguments))
    integer = layer.weight_integer
    assert integer[MARKED].min() == -128 and integer[MARKED].max() == 127
    assert integer[~MARKED].min() == -4 and integer[~MARKED].max() == 3


def test_no_wide_channels_are_none():
    """Every number, name and byte is what it was."""
    x, _ = pictures(64)
    plain = with_wide(trained(), x, chosen=lambda model: {})
    none = with_wide(
        trained(), x, chosen=lambda model: {name: mask & False for name, mask in every_third(model).items()}
    )
    assert same(plain.state_dict(), none.state_dict()) and same(plain.packed_tensors(), none.packed_tensors())
    assert not any("wide" in name for name in (*plain.state_dict(), *plain.packed_tensors()))
    assert plain.packed_metadata() == none.packed_metadata() and "wide" not in str(plain.packed_metadata())
    assert to_onnx(plain, x, {}).SerializeToString() == to_onnx(none, x, {}).SerializeToString()
    layer = plain.layers()["last"]
    assert layer.bounds() == (-8, 7)
    integer = layer.weight_integer.clone()
    layer.set_wide_channels(torch.zeros(16, dtype=torch.bool))  # nothing to do anew
    assert torch.equal(layer.weight_integer, integer) and not layer.weight_scale.isnan().any()


def test_other_wide_channels_have_to_be_quantized_anew():
    layer = QuantizedLayer("layer", nn.Linear(4, 10), 4)
    layer.set_wide_channels(MARKED)
    layer.quantize_weights(WeightObserver().scales)
    layer.set_wide_channels(MARKED.clone())
    assert not layer.weight_scale.isnan().any()
    layer.set_wide_channels(~MARKED)
    assert layer.weight_scale.isnan().all() and torch.equal(layer.wide_channels, ~MARKED)
    layer.set_bits(3)
    assert layer.wide_channels is None and layer.bounds() == (-4, 3)


def test_what_cannot_be_wide_is_refused():
    for layer, marks, wide_bits, message in (
        (
            QuantizedLayer("one", nn.Linear(4, 10), 4, "per_tensor"),
            MARKED,
            8,
            "^one: .* weight_granularity per_channel$",
        ),
        (QuantizedLayer("one", nn.Linear(4, 10), 8), MARKED, 8, "^one: it has 8 bits, its wide channels need more"),
        (QuantizedLayer("one", nn.Linear(4, 10), 16), MARKED, 8, "^one: it has 16 bits"),
        (QuantizedLayer("one", nn.Linear(4, 10), 4), MARKED, 4, "^one: it has 4 bits"),
        (QuantizedLayer("one", nn.Linear(4, 10), 4), MARKED, 9, "^one: wide_bits: 9 bits"),
        (QuantizedLayer("one", nn.Linear(4, 10), 4), MARKED[:4], 8, r"^one: wide channels are 10 booleans, got \(4,\)"),
        (QuantizedLayer("one", nn.Linear(4, 10), 4), MARKED.float(), 8, "^one: wide channels are 10 booleans"),
    ):
        with pytest.raises(QuantizationError, match=message) as refused:
            layer.set_wide_channels(marks, wide_bits)
        assert "\n" not in str(refused.value) and layer.wide_channels is None
    x, _ = pictures(8)
    quantized = ptq.attach(trained(), x, "ptq_static", 4, 8, Recipe())
    with pytest.raises(QuantizationError, match="no layer 'lst' whose channels"):
        preserve_channels(quantized, {"lst": torch.ones(16, dtype=torch.bool)})


# ------------------------------------------------------------------------------------------- whatever sets the integers


def test_a_bias_beyond_int32_leaves_wide_channels_in_their_range():
    layer = QuantizedLayer("layer", nn.Linear(4, 10), 4)
    layer.set_wide_channels(MARKED)
    layer.quantize_weights(WeightObserver("minmax").scales)
    before, integer = layer.weight_scale.clone(), layer.weight_integer.clone()
    with torch.no_grad():
        layer.layer.bias.zero_()[:2] = 1e9 * before[:2]  # of a wide channel and of another
    layer.round_bias(torch.tensor(0.5))  # 2^30 steps hold about half of it
    factor = 1e9 / (0.5 * 2**30)
    torch.testing.assert_close(layer.weight_scale[:2], before[:2] * factor)
    assert torch.equal(layer.weight_integer[2:], integer[2:])
    torch.testing.assert_close(layer.weight_integer[0].float(), (integer[0] / factor), atol=0.51, rtol=0)
    assert layer.weight_integer[0].abs().max() > 8 >= layer.weight_integer[1].abs().max()


@pytest.mark.parametrize("bits", [2, 4])
def test_learned_rounding(bits):
    """Up or down within the range that each channel has."""
    x, _ = pictures(32)
    nearest = with_wide(trained(), x, bits)
    learned = with_wide(trained(), x, bits, rounding="adaround", reconstruction_iterations=20)
    changed = 0
    for name, layer in learned.layers().items():
        low, high = layer.bounds()
        assert bool((low <= layer.weight_integer).all()) and bool((layer.weight_integer <= high).all())
        steps = layer.float_weight / along(layer.weight_scale, layer.axis, layer.float_weight.ndim)
        assert bool(((layer.weight_integer - steps).abs() <= 1 + 1e-4).all())  # minmax clips nothing
        changed += int((layer.weight_integer != nearest.layers()[name].weight_integer).sum())
    assert changed > 20
    assert max(int(layer.weight_integer.max()) for layer in learned.layers().values()) > 100


@pytest.mark.parametrize("keep_rounding", [True, False])
def test_training_keeps_each_channel_in_its_range(keep_rounding):
    x, labels = pictures(32)
    quantized = with_wide(trained(), x)
    before = {name: layer.weight_integer.clone() for name, layer in quantized.layers().items()}
    with learnable(quantized, keep_rounding=keep_rounding):
        pass
    assert all(torch.equal(layer.weight_integer, before[name]) for name, layer in quantized.layers().items())
    with learnable(quantized, keep_rounding=keep_rounding):
        F.cross_entropy(quantized(x), labels).backward()
        learned = [module for module in quantized.modules() if isinstance(module, LearnedLayer)]
        assert len(learned) == 8 and all(bool(module.theta.grad.abs().sum() > 0) for module in learned)
        with torch.no_grad():
            for module in learned:
                module.weight.mul_(5)  # beyond every range
    for layer in quantized.layers().values():
        low, high = layer.bounds()
        assert bool((low <= layer.weight_integer).all()) and bool((layer.weight_integer <= high).all())
    integer = quantized.layers()["last"].weight_integer
    assert integer[1::3].abs().max() >= 127 and integer[0::3].max() == 7


# --------------------------------------------------------------------------------------------------------- packed files


@pytest.mark.parametrize("bits", [2, 3, 4, 7])
@pytest.mark.parametrize("make", [trained, odd])
def test_the_packed_file_holds_the_model(bits, make, tmp_path):
    from safetensors.torch import load_file

    x, _ = pictures(32)
    quantized, plain = with_wide(make(), x, bits), with_wide(make(), x, bits, chosen=lambda model: {})
    for part, sized in (("wide", quantized), ("plain", plain)):
        write_model(sized, tmp_path / part)
    stored = load_file(tmp_path / "wide")
    assert sum(tensor.numel() * tensor.element_size() for tensor in stored.values()) - sum(
        tensor.numel() * tensor.element_size() for tensor in load_file(tmp_path / "plain").values()
    ) == sum(layer.weight_bytes() for layer in quantized.layers().values()) - sum(
        layer.weight_bytes() for layer in plain.layers().values()
    )
    for path, layer in quantized.named_modules():
        if isinstance(layer, QuantizedLayer):
            channels, wide = layer.layer.weight.shape[layer.axis], layer.wide_count()
            each = layer.layer.weight.numel() // channels
            parts = {"weight_packed": math.ceil((channels - wide) * each * bits / 8)}
            if wide:
                parts |= {"wide_weight_packed": wide * each, "wide_channels_packed": math.ceil(channels / 8)}
            names = {name for name in stored if name.startswith(f"{path}.") and "packed" in name}
            assert names == {f"{path}.{name}" for name in parts}
            assert all(stored[f"{path}.{name}"].numel() == size for name, size in parts.items())
            assert layer.weight_bytes() == sum(parts.values()) + 4 * channels
            assert layer.weight_bytes() == layer.bytes_at(bits, wide) >= layer.bytes_at(bits)
    sources = (  # the file knows which channels are wide, whatever those of the model it is loaded into
        ptq.attach(make(), x, "ptq_static", bits, 8, Recipe(**MINMAX)),
        with_wide(make(), x, bits, chosen=lambda model: {name: ~mask for name, mask in every_third(model).items()}),
    )
    for other in sources:
        other.load_packed(stored)
        assert same(other.state_dict(), quantized.state_dict())
        assert torch.equal(other(x), quantized(x))
        assert same(other.packed_tensors(), quantized.packed_tensors())
    other.load_packed(plain.packed_tensors())
    assert same(other.state_dict(), plain.state_dict()) and other.layers().keys() == plain.layers().keys()


def test_all_channels_may_be_wide():
    x, _ = pictures(32)
    quantized = with_wide(
        trained(), x, chosen=lambda model: {name: mask | True for name, mask in every_third(model).items()}
    )
    other = ptq.attach(trained(), x, "ptq_static", 4, 8, Recipe(**MINMAX))
    other.load_packed(quantized.packed_tensors())
    assert same(other.state_dict(), quantized.state_dict())
    content = to_onnx(quantized, x, {}).SerializeToString()
    assert_same(run(content, x), simulated(quantized, x))
    assert not {"Gather", "Concat"} & {node.op_type for node in onnx.load_from_string(content).graph.node[:10]}


def test_the_state_round_trips_and_a_file_that_does_not_fit_changes_nothing():
    x, _ = pictures(32)
    quantized, plain = with_wide(trained(), x), with_wide(trained(), x, chosen=lambda model: {})
    state, before = quantized.state_dict(), copy.deepcopy(plain.state_dict())
    assert torch.equal(state["network.last.wide_channels"], torch.arange(16) % 3 == 1)
    other = with_wide(trained(), x, chosen=lambda model: {})
    other.load_state_dict(state)
    assert same(other.state_dict(), state) and torch.equal(other(x), quantized(x))
    other.load_state_dict(before)
    assert same(other.state_dict(), before) and torch.equal(other(x), plain(x))
    broken = quantized.packed_tensors()
    del broken["network.head.weight_packed"]
    with pytest.raises(QuantizationError, match="no packed weights"):
        plain.load_packed(broken)
    broken = quantized.packed_tensors()
    broken["network.last.wide_channels_packed"] = torch.tensor([255, 255], dtype=torch.uint8)
    with pytest.raises(QuantizationError, match="do not hold"):
        plain.load_packed(broken)
    del broken["network.last.wide_weight_packed"]
    with pytest.raises(QuantizationError, match=r"^last: wide channels without weights in the file"):
        plain.load_packed(broken)
    assert same(plain.state_dict(), before)
    assert copy.deepcopy(quantized).layers()["last"].wide_count() == 5


# ---------------------------------------------------------------------------------------------------------------- ONNX


@pytest.mark.parametrize("bits", [2, 4])
def test_the_onnx_file_has_both_parts_at_their_width(bits):
    """Integers unpacked here by hand, and put into order by the indices."""
    x, _ = pictures(32)
    quantized = with_wide(odd(), x, bits)
    proto = to_onnx(quantized, x, {})
    onnx.checker.check_model(proto, full_check=True)
    tensors = initializers(proto)
    narrow_type = {2: TensorProto.INT2, 4: TensorProto.INT4}[bits]
    found = 0
    for path, layer in quantized.network.named_modules():
        if not isinstance(layer, QuantizedLayer):
            continue
        name, axis = f"{path}.weight_integer", layer.axis
        channels, wide = layer.layer.weight.shape[axis], layer.wide_count()
        each = layer.layer.weight.numel() // channels
        narrow = tensors[name]
        assert narrow.data_type == narrow_type and len(narrow.raw_data) == math.ceil(
            (channels - wide) * each * bits / 8
        )
        if not wide:
            assert f"{name}_wide" not in tensors
            continue
        found += 1
        wide_part, order = tensors[f"{name}_wide"], numpy_helper.to_array(tensors[f"{name}_order"])
        assert wide_part.data_type == TensorProto.INT8 and len(wide_part.raw_data) == wide * each
        assert order.dtype == np.uint8 and order.shape == (channels,)
        joined = np.concatenate([unpacked(narrow), numpy_helper.to_array(wide_part)], axis=axis)
        assert np.array_equal(joined.take(order, axis=axis), layer.weight_integer.numpy())
        assert np.array_equal(order >= channels - wide, layer.wide_channels.numpy())
    assert found == 3
    readers = [node for node in proto.graph.node if any(name.endswith("_ordered") for name in node.input)]
    assert [node.op_type for node in readers] == ["DequantizeLinear"] * 3
    assert_same(run(proto.SerializeToString(), x), simulated(quantized, x))
    rows = [(row["layer"], row["bits"], row["type"]) for row in weight_table(quantized)]
    types = {2: "INT2", 4: "INT4"}
    assert rows[:2] == [("one", bits, types[bits]), ("one", 8, "INT8")] and rows[-1] == ("head", bits, types[bits])
    parameters = sum(row["parameters"] for row in weight_table(quantized))
    assert parameters == sum(layer.layer.weight.numel() for layer in quantized.layers().values())


def test_wide_and_narrow_integers_of_one_type_are_one_tensor():
    x, _ = pictures(32)
    quantized = with_wide(trained(), x, 6)
    proto = to_onnx(quantized, x, {})
    assert not any("wide" in tensor.name or "order" in tensor.name for tensor in proto.graph.initializer)
    assert_same(run(proto.SerializeToString(), x), simulated(quantized, x))


@pytest.mark.parametrize(("bits", "activation_bits"), [(2, 8), (4, 8), (4, 4)])
@pytest.mark.parametrize("backend", ["x86", "arm"])
def test_engines_run_wide_channels_on_integers(bits, activation_bits, backend, tmp_path):
    """The same operators as without wide channels, and the simulation's numbers."""
    x, unseen = pictures(64)[0], pictures(64, 7)[0]
    quantized = with_wide(trained(), x, bits, activation_bits, backend=backend)
    plain = with_wide(trained(), x, bits, activation_bits, chosen=lambda model: {}, backend=backend)
    content, plain_content = (to_onnx(model, x, {}).SerializeToString() for model in (quantized, plain))
    (tmp_path / "plain").mkdir()
    found = operators(content, tmp_path)
    assert found == operators(plain_content, tmp_path / "plain")
    if backend == "x86":
        assert found["QLinearConv"] == 7 and not {"Gather", "Concat", "Cast", "Conv"} & set(found)
    expected = simulated(quantized, unseen)
    assert not torch.allclose(expected, simulated(plain, unseen), rtol=0.01)
    assert_same(torch.from_numpy(OnnxRuntimeEngine(content, 1).predict(unseen.numpy())), expected)
    pytest.importorskip("openvino")
    literal = torch.from_numpy(run_literally(for_openvino(content), unseen))
    assert (literal - expected).abs().max() <= 0.2 * expected.std()
    engine = OpenVinoEngine(content, 1)
    off = torch.from_numpy(engine.predict(unseen.numpy())) - expected
    assert off.pow(2).mean().sqrt() < (0.02 if activation_bits == 8 else 0.2) * expected.std()
    kernels = [
        sorted(
            (info["layerType"].astype(str), info["runtimePrecision"].astype(str))
            for info in (op.get_rt_info() for op in each.compiled.get_runtime_model().get_ops())
        )
        for each in (engine, OpenVinoEngine(plain_content, 1))
    ]
    assert kernels[0] == kernels[1]


def test_more_channels_than_a_byte_counts():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE**2, 300), nn.ReLU(), nn.Linear(300, 2)).eval()
    x, _ = pictures(32)
    quantized = with_wide(model, x)
    proto = to_onnx(quantized, x, {})
    (order,) = (tensor for tensor in proto.graph.initializer if tensor.name.endswith("_order"))
    assert order.data_type == TensorProto.UINT16 and order.dims == [300]
    content, expected = proto.SerializeToString(), simulated(quantized, x)
    assert_same(run(content, x), expected)
    assert_same(torch.from_numpy(OnnxRuntimeEngine(content, 1).predict(x.numpy())), expected)
    pytest.importorskip("openvino")
    assert_same(torch.from_numpy(OpenVinoEngine(content, 1).predict(x.numpy())), expected)


@pytest.mark.parametrize("make", [trained, odd])
def test_the_deployable_graph_is_the_simulation(make):
    x, _ = pictures(16)
    assert torch.equal(*both(with_wide(make(), x), x, ByHand()))


def test_so_it_is_in_pytorchs_operators():
    pytest.importorskip("torchao")
    x, _ = pictures(64)
    assert_same(*both(with_wide(trained(), x), x, DecomposedWriter()))


# -------------------------------------------------------------------------------------------------------------- choice


class Plain(nn.Module):
    """Layers of every kind, rectifiers in place, one layer called twice; no norms, so that its gradients are simple."""

    def __init__(self, classes: int = 3):
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.twice, self.up = nn.Conv2d(6, 6, 1, bias=False), nn.ConvTranspose2d(6, 4, 2, 2)
        self.relu = nn.ReLU(inplace=True)
        self.middle, self.head = nn.Linear(4, 8), nn.Linear(8, classes)

    def forward(self, x):
        x = self.relu(self.depthwise(self.relu(self.stem(x))))
        x = self.up(self.twice(self.relu(self.twice(x))))
        return self.head(self.relu(self.middle(x.mean((2, 3)))))


def plain_model(classes: int = 3) -> nn.Module:
    torch.manual_seed(3)
    return Plain(classes).eval()


def attached(model: nn.Module, x: torch.Tensor, bits: int = 4, **recipe) -> QuantizedModel:
    return ptq.attach(model, x, "ptq_static", bits, 8, Recipe(**recipe))


def scores_by_hand(model: nn.Module, x: torch.Tensor, losses, bits: int = 4) -> dict[str, torch.Tensor]:
    """(N, O) for each layer: for each image and class k, `losses` gives (probability, loss of the logits)."""
    quantized, found = attached(model, x, bits), {}
    for name, layer in quantized.layers().items():
        layer.quantize_weights(WeightObserver().scales)
        found[name] = torch.zeros(len(x), layer.layer.weight.shape[layer.axis], dtype=torch.float64)
    model = copy.deepcopy(model)
    for place, image in enumerate(x):
        for probability, loss in losses(model(image[None]), place):
            weights = {name: model.get_submodule(name).weight for name in found}
            gradients = torch.autograd.grad(loss, list(weights.values()), retain_graph=True)
            for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
                layer = quantized.layers()[name]
                change = (layer.layer.weight - weight).detach().double() * gradient
                found[name][place] += float(probability) * by_channel(layer, change).sum(dim=1) ** 2
    return found


def loss_of(labels):
    return lambda logits, place: [(1.0, F.cross_entropy(logits, labels[place : place + 1]))]


def expected_loss(logits, place):
    if logits.shape[1] == 1:
        logits = torch.cat([torch.zeros_like(logits), logits], dim=1)
    log_softmax = logits.log_softmax(dim=1)[0]
    return [(float(log_p.detach().exp()), -log_p) for log_p in log_softmax]


def grouped_means(score_NO: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    return torch.stack([score_NO[groups == group].mean(dim=0) for group in range(int(groups.max()) + 1)])


@pytest.mark.parametrize(("metric", "classes"), [("loss", 3), ("kl", 3), ("kl", 1)])
@pytest.mark.parametrize("weighting", ["balanced", "worst_group"])
def test_scores_are_squared_changes_of_each_images_loss(metric, classes, weighting):
    """Against the gradients of the weights, image by image."""
    model, x = plain_model(classes), pictures(10, 4)[0]
    labels, groups = torch.arange(10) % classes, torch.tensor([0, 0, 0, 0, 0, 0, 2, 2, 1, 1])
    by_hand = scores_by_hand(model, x, loss_of(labels) if metric == "loss" else expected_loss)
    group_scores = {name: grouped_means(score, groups) for name, score in by_hand.items() if name != "head"}
    shares = torch.full((3,), 1 / 3, dtype=torch.float64)
    if weighting == "worst_group":
        shares /= 2
        shares[int(sum(score.sum(dim=1) for score in group_scores.values()).argmax())] += 0.5
    expected = {name: float((shares @ score).sum()) for name, score in group_scores.items()}
    options = {"extra_share": 0.1, "metric": metric, "weighting": weighting, "batch_size": 4}
    _, table = choose_channels(attached(model, x), x, labels, groups, 3, **options)
    assert list(table["layer"]) == list(expected)
    whole = sum(expected.values())
    assert table["score_share"].tolist() == pytest.approx([value / whole for value in expected.values()], rel=1e-4)
    options["weight_observer"] = WeightObserver("minmax")  # whose rounding is another
    _, other = choose_channels(attached(model, x), x, labels, groups, 3, **options)
    assert other["score_share"].tolist() != pytest.approx(table["score_share"].tolist(), rel=0.01)


def test_drawn_labels_are_right_in_the_mean(monkeypatch):
    """Of many classes; the same seed draws the same."""
    model, x = plain_model(), pictures(4, 4)[0]
    groups = torch.tensor([0, 1, 0, 1])
    repeated, codes = x.repeat(200, 1, 1, 1), groups.repeat(200)
    exact = choose_channels(attached(model, x), x, None, groups, 2, extra_share=0.1)[1]
    monkeypatch.setattr(sensitive_channels, "EXACT_CLASSES", 2)
    tables = [
        choose_channels(attached(model, x), repeated, None, codes, 2, extra_share=0.1, seed=seed)[1]
        for seed in (1, 1, 2)
    ]
    assert tables[0].equals(tables[1]) and not tables[0].equals(tables[2])
    assert tables[0]["score_share"].tolist() == pytest.approx(exact["score_share"].tolist(), abs=0.03)


class Planted(nn.Module):
    """Channels 0 and 2 read the first colour, channel 1 the second; the third colour, black in every image, has the
    weight that sets the scale to 1, so that 0.4 is rounded to nothing."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Conv2d(3, 3, 1, bias=False), nn.Linear(3, 2, bias=False)
        with torch.no_grad():
            self.layer.weight.copy_(torch.tensor([[0.4, 0, 7.5], [0, 0.4, 7.5], [0.4, 0, 7.5]]).view(3, 3, 1, 1))
            self.head.weight.copy_(0.01 * torch.tensor([[1.0, 1.3, 1.0], [0, 0, 0]]))

    def forward(self, x):
        return self.head(self.layer(x).mean((2, 3)))


@pytest.mark.parametrize("metric", ["loss", "kl"])
def test_the_worst_groups_channel_is_found(metric):
    """Group 0 shows the first colour, group 1 the second. Channel 1 costs its group 1.69 times what channel 0 costs
    the other; but that one loses twice, through channel 2 too, and is the worst. There is room for one channel."""
    x = torch.zeros(8, 3, 4, 4)
    groups = torch.tensor([0, 1, 1, 1, 0, 1, 1, 1])
    x[groups == 0, 0] = 1
    x[groups == 1, 1] = 1
    labels = torch.zeros(8, dtype=torch.int64)

    def chosen(weighting, n_groups=2, groups=groups):
        quantized = attached(Planted().eval(), x)
        # 9 weights of 4 bits in 3 scales, 6 in 2: 17 + 11 bytes. A wide channel: 3 bytes of 8 bits for 2 of 4, a mark
        found, table = choose_channels(
            quantized, x, labels, groups, n_groups, extra_share=2 / 28 + 1e-9, metric=metric, weighting=weighting,
            weight_observer=WeightObserver("minmax"),
        )  # fmt: skip
        assert table["extra_bytes"].tolist() == [2] and table["wide"].tolist() == [1]
        assert list(found) == ["layer"]  # the classifier stays as it is
        return found["layer"].tolist(), table

    wide, table = chosen("balanced")
    assert wide == [False, True, False]
    assert float(table["wide_score_share"].iloc[0]) == pytest.approx(1.69 / 3.69, rel=0.02)
    wide, table = chosen("worst_group")
    assert wide == [True, False, False]
    assert float(table["wide_score_share"].iloc[0]) == pytest.approx(0.75 / (1.5 + 0.25 * 1.69), rel=0.02)
    # a group counts once, however many images it has: with nobody in a third one nothing changes
    assert chosen("balanced", n_groups=3)[0] == [False, True, False]


@pytest.mark.parametrize("bits", [2, 3, 4, 7])
def test_the_budget_is_never_exceeded_and_used_as_far_as_it_goes(bits):
    x, labels = pictures(16)
    plain = attached(trained(), x, bits)
    narrow = sum(layer.bytes_at(bits) for layer in plain.layers().values())
    most, _ = choose_channels(plain, x, labels, labels % 2, 2, extra_share=4.0)
    # the whole network but for the classifier, and two channels that no image excites
    assert list(most) == list(plain.layers())[:-1] and sum(int((~mask).sum()) for mask in most.values()) == 2
    spent = []
    for share in (0.0, 0.01, 0.05, 0.1, 0.2, 0.4):
        quantized = attached(trained(), x, bits)
        chosen, table = choose_channels(quantized, x, labels, labels % 2, 2, extra_share=share)
        preserve_channels(quantized, chosen)
        ptq.quantize_weights(quantized, Recipe())
        extra = sum(layer.weight_bytes() for layer in quantized.layers().values()) - narrow
        assert extra == table["extra_bytes"].sum() <= share * narrow
        spent.append(extra)
        left = [
            layer.bytes_at(bits, layer.wide_count() + 1) - layer.weight_bytes()
            for name, layer in quantized.layers().items()
            if name in most and layer.wide_count() < int(most[name].sum())
        ]
        assert extra + min(left, default=math.inf) > share * narrow
        assert table["wide"].tolist() == [int(mask.sum()) for mask in chosen.values()]
    assert spent == sorted(spent) and spent[0] == 0 < spent[2]


def test_per_extra_byte():
    """Of two layers whose channels score about the same, those of one weight are wide before those of a hundred."""
    torch.manual_seed(0)
    layers = {
        "small": QuantizedLayer("small", nn.Linear(1, 8), 4),
        "large": QuantizedLayer("large", nn.Linear(100, 8), 4),
    }
    scores = {"small": torch.arange(1.0, 9), "large": torch.arange(2.0, 10)}
    for budget in (5, 51):  # 51 bytes: all of the one, or a single one of the other, which scores most
        found = sensitive_channels._most_score_per_byte(layers, scores, budget)
        assert found["small"].all() and not found["large"].any()
    found = sensitive_channels._most_score_per_byte(layers, scores, 56)
    assert found["small"].all() and found["large"].tolist() == [False] * 7 + [True]
    found = sensitive_channels._most_score_per_byte(layers, {**scores, "small": torch.zeros(8)}, 10_000)
    assert not found["small"].any() and found["large"].all()  # nothing is paid for what costs nothing


def test_the_model_is_not_changed_and_the_choice_is_the_same_each_time():
    x, labels = pictures(24)
    quantized = attached(trained(), x)
    state, description = copy.deepcopy(quantized.state_dict()), dict(quantized.description)
    first, table = choose_channels(quantized, x, labels, labels % 2, 2, extra_share=0.1)
    for batches in ({}, {"batch_size": 5}, {"memory_bytes": 1}):
        again, other = choose_channels(quantized, x, labels, labels % 2, 2, extra_share=0.1, **batches)
        assert same(first, again)
        assert other["score_share"].tolist() == pytest.approx(table["score_share"].tolist(), rel=1e-3)
    assert all(parameter.grad is None for parameter in quantized.parameters())
    assert not any(layer._forward_hooks for layer in quantized.layers().values())
    after = quantized.state_dict()
    assert list(after) == list(state) and quantized.description == description
    assert all(torch.equal(after[name].nan_to_num(7), tensor.nan_to_num(7)) for name, tensor in state.items())
    assert all(parameter.requires_grad for parameter in quantized.parameters())


def test_batches_are_as_large_as_memory_allows(monkeypatch):
    x, labels = pictures(12)
    seen = []
    real = sensitive_channels._scores
    monkeypatch.setattr(
        sensitive_channels, "_scores", lambda *arguments: seen.append(len(arguments[3])) or real(*arguments)
    )
    quantized = attached(trained(), x)
    with quantized.as_float():
        per_image = sensitive_channels._bytes_for_gradients(quantized, x[:1])
    for memory, sizes in ((1, [1] * 12), (5 * per_image, [5, 5, 2]), (10**9, [12])):
        seen.clear()
        choose_channels(quantized, x, labels, labels % 2, 2, extra_share=0.1, memory_bytes=memory)
        assert seen == sizes


def test_wide_layers_and_the_classifier_are_left_alone():
    x, labels = pictures(8)
    quantized = attached(trained(), x, first_last_bits=8)
    quantized.layers()["right"].set_bits(16)
    chosen, _ = choose_channels(quantized, x, labels, labels % 2, 2, extra_share=2.0)
    assert set(chosen) == set(quantized.layers()) - {"stem.0", "right", "head"}
    none, table = choose_channels(
        attached(trained(), x, weight_granularity="per_tensor"), x, labels, labels % 2, 2, extra_share=1.0
    )
    assert none == {} and len(table) == 0 and "wide" in table
    assert choose_channels(attached(trained(), x, 8), x, labels, labels % 2, 2, extra_share=1.0)[0] == {}


def test_the_chosen_channels_bring_the_predictions_nearer():
    """Nearer than as many bytes of the channels that score least."""
    x, unseen, groups = pictures(64)[0], pictures(256, 9)[0], torch.arange(64) % 2
    exact = simulated(trained(), unseen).log_softmax(1)
    recipe = Recipe()

    def drift(order) -> float:
        quantized = attached(trained(), x, 3)
        if order is not None:
            sign = 1 if order == "best" else -1
            real = sensitive_channels._group_scores
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(
                    sensitive_channels,
                    "_group_scores",
                    lambda *a: {k: (v + 1e-12) ** sign for k, v in real(*a).items()},
                )
                chosen, _ = choose_channels(
                    quantized, x, None, groups, 2, extra_share=0.2, weight_observer=recipe.weight_scales()
                )
            preserve_channels(quantized, chosen)
        ptq.quantize(quantized, ptq.observe_activations(quantized, x, recipe), x, recipe)
        return float((exact.exp() * (exact - simulated(quantized, unseen).log_softmax(1))).sum(dim=1).mean())

    plain, best, worst = drift(None), drift("best"), drift("worst")
    assert best < 0.6 * plain and best < 0.7 * worst


def test_what_cannot_be_chosen_from_is_refused():
    x, labels = pictures(8)
    quantized = attached(trained(), x)
    groups = labels % 2
    for options, message in (
        ({"metric": "hessian"}, "unknown metric 'hessian' of channels; choose from kl, loss"),
        ({"weighting": "best"}, "unknown weighting 'best' of groups; choose from balanced, worst_group"),
        ({"metric": "loss", "labels": None}, "metric loss needs the labels"),
        ({"extra_share": -0.1}, "extra_share must not be negative"),
        ({"extra_share": math.nan}, "extra_share must not be negative"),
        ({"n_groups": 1}, "a group of 0 … 0"),
        ({"groups_N": groups[:3]}, "each with a group"),
        ({"images": x[:0], "groups_N": groups[:0]}, "need images"),
        ({"images": x * math.inf}, "stem.0: its gradients are not finite"),
    ):
        arguments = {"images": x, "labels": labels, "groups_N": groups, "n_groups": 2, "extra_share": 0.1} | options
        with pytest.raises(QuantizationError, match=message) as refused:
            choose_channels(quantized, **arguments)
        assert "\n" not in str(refused.value)


def test_every_network_of_tokens_too():
    """A network of attention blocks, whose channels are last."""
    from models import build_model

    torch.manual_seed(0)
    model = build_model("vit_small_patch16_224", 3, 32, seed=3, options={"depth": 2}).eval()
    x, labels = pictures(4, size=32)
    quantized = attached(model, x)
    chosen, table = choose_channels(quantized, x, labels, labels % 2, 2, extra_share=0.02)
    assert len(table) > 8 and table["wide"].sum() > 10
    preserve_channels(quantized, chosen)
    assert quantized.description["wide_channels"] == table["wide"].sum()
    assert all(parameter.grad is None for parameter in quantized.parameters())  # norms stay in float, and have some
