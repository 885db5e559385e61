"""Numerics, observers, placement and calibration of the quantizers."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from evaluation import model_size_mb, write_model
from models import MODELS, build_model
from quantizers import calibration, numerics, observers
from quantizers.graph import prepare
from quantizers.modules import ActivationQuantizer, DynamicActivationQuantizer, QuantizedLayer, UncalibratedError
from quantizers.numerics import QuantizationError, affine_parameters, fake_quantize, pack_bits, unpack_bits
from quantizers.ptq import ptq_dynamic, ptq_static

BITS = range(2, 9)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def settled(name: str, size: int = 32, seed: int = 3) -> nn.Module:
    """A model whose BatchNorm statistics are those of random images, so that activations have ordinary ranges."""
    model = build_model(name, 3, size, seed=seed)
    with torch.no_grad():
        for _ in range(2):
            model(images(16, size))
    return model.eval()


def short(name: str, seed: int = 3) -> nn.Module:
    """`settled`, a ViT with three of its twelve blocks, which are alike: the scales of 21 million weights take long."""
    model = settled(name, seed=seed)
    if name.startswith("vit"):
        model.blocks = model.blocks[:3]
    return model


def images(n: int, size: int = 32) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(7))


# ------------------------------------------------------------------------------------------------------------ numerics


@given(bits=st.sampled_from(BITS), low=st.floats(-50, 50), width=st.floats(1e-3, 100), seed=st.integers(0, 999))
def test_activation_error_is_at_most_half_a_step_inside_the_range(bits, low, width, seed):
    x = torch.from_numpy(np.random.default_rng(seed).uniform(min(low, 0), max(low + width, 0), 500)).double()
    scale, zero_point = affine_parameters(torch.tensor(low).double(), torch.tensor(low + width).double(), bits)
    q = fake_quantize(x, scale, zero_point, 0, 2**bits - 1)
    # the zero point is an integer: rounding it moves the range by up to half a step at either end
    assert (q - x).abs().max() <= scale * (1 + 1e-9)
    inside = (x >= scale * (0 - zero_point)) & (x <= scale * (2**bits - 1 - zero_point))
    assert (q - x)[inside].abs().max() <= scale / 2 * (1 + 1e-9)
    assert len(q.unique()) <= 2**bits
    assert fake_quantize(torch.zeros(1).double(), scale, zero_point, 0, 2**bits - 1) == 0


def test_affine_quantization_by_hand():
    # range [-1, 2] at 2 bits: scale 1, zero point 1, levels -1 0 1 2; ties go to even
    scale, zero_point = affine_parameters(torch.tensor(-1.0), torch.tensor(2.0), 2)
    assert (scale.item(), zero_point.item()) == (1.0, 1.0)
    x = torch.tensor([-9.0, -0.6, 0.5, 1.5, 2.4, 9.0])
    assert fake_quantize(x, scale, zero_point, 0, 3).tolist() == [-1.0, -1.0, 0.0, 2.0, 2.0, 2.0]


@pytest.mark.parametrize("bits", BITS)
def test_minmax_weights_are_off_by_at_most_half_a_scale(bits):
    w = (
        torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(bits))
        * torch.tensor(10.0) ** torch.arange(-3, 3)[:, None, None, None]
    )
    scale = observers.WeightObserver("minmax").scales(w, bits, 0, "w")
    q = numerics.quantize_weight(w, scale, bits, 0)
    off = (numerics.dequantize_weight(q, scale, 0) - w).abs().amax(dim=(1, 2, 3))
    assert (off <= scale / 2 * (1 + 1e-4)).all()
    assert int(q.min()) >= -(2 ** (bits - 1)) and int(q.max()) <= 2 ** (bits - 1) - 1


def test_weights_all_zero_stay_zero():
    for observer in observers.WEIGHT_OBSERVERS:
        scale = observers.WeightObserver(observer).scales(torch.zeros(3, 5), 4, 0, "w")
        assert torch.isfinite(scale).all() and (scale > 0).all()
        assert (numerics.quantize_weight(torch.zeros(3, 5), scale, 4, 0) == 0).all()


@given(bits=st.sampled_from(BITS), values=st.lists(st.integers(0, 255), max_size=70))
def test_packing_round_trips_at_b_bits_a_value(bits, values):
    array = (np.array(values, dtype=np.int64) % 2**bits).astype(np.uint8)
    packed = pack_bits(array, bits)
    assert packed.size == -(-len(values) * bits // 8)
    assert (unpack_bits(packed, bits, array.size) == array).all()


def test_packing_by_hand_and_across_chunks(monkeypatch):
    assert pack_bits(np.array([1, 2, 3]), 4).tolist() == [0x12, 0x30]
    assert pack_bits(np.array([0b101, 0b011, 0b110]), 3).tolist() == [0b10101111, 0b00000000]
    monkeypatch.setattr(numerics, "PACK_CHUNK", 16)
    array = np.arange(1000, dtype=np.int64).astype(np.uint8) % 8
    assert (unpack_bits(pack_bits(array, 3), 3, 1000) == array).all()
    with pytest.raises(QuantizationError, match="do not hold"):
        unpack_bits(np.zeros(3, np.uint8), 4, 100)


@pytest.mark.parametrize("bits", [1, 9, 0, -3, 4.0, True, "8"])
def test_widths_outside_2_to_8_are_refused(bits):
    with pytest.raises(QuantizationError, match="from 2 to 8"):
        numerics.check_bits(bits, "bit_width")


# ----------------------------------------------------------------------------------------------------------- observers


def statistics_of(x_NK: torch.Tensor, batch: int = 64) -> observers.ActivationStatistics:
    statistics = observers.ActivationStatistics("x")
    for part in x_NK.split(batch):
        statistics.observe(part)
    return statistics


def test_statistics_do_not_depend_on_the_batch_size():
    x = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    whole, parts = statistics_of(x, 300), statistics_of(x, 7)
    assert whole.bounds() == parts.bounds() == (float(x.min()), float(x.max()))
    assert whole.images == parts.images == 300
    for is_relative in (False, True):
        a, b = whole.histogram(is_relative)[3], parts.histogram(is_relative)[3]
        assert np.allclose(a, b, rtol=1e-6)
    assert whole.histogram()[3].sum() == x.numel()
    for observer in observers.OBSERVERS:
        assert whole.range(observer, 4, 99.0) == pytest.approx(parts.range(observer, 4, 99.0), rel=1e-6)


@pytest.mark.parametrize("factor", [1e-30, 1e-6, 1.0, 3e7, 1e30])
def test_the_histogram_holds_every_value_within_its_bin_whatever_the_scale(factor):
    x = torch.randn(4, 500, generator=torch.Generator().manual_seed(0)) * factor
    lower, upper, values, counts = statistics_of(x).histogram()
    assert counts.sum() == x.numel()
    assert (lower <= values).all() and (values <= upper).all()
    assert (upper[:-1] <= lower[1:] + 1e-9 * factor).all()
    ordered = np.sort(x.numpy().astype(np.float64), axis=None)
    seen = np.repeat(values, counts.astype(int))
    assert np.abs(seen - ordered).max() <= 2**-7 * np.abs(ordered).max()  # one of 256 to the octave
    big = np.abs(ordered) > 1e-3 * np.abs(ordered).max()
    assert np.abs(seen[big] / ordered[big] - 1).max() < 2**-7


def test_later_images_may_be_larger_than_the_first():
    x = torch.cat([torch.full((1, 10), 1e-3), torch.zeros(1, 10), torch.linspace(-1, 1, 10)[None]])
    *_, values, counts = statistics_of(x, 1).histogram()
    assert counts.sum() == 30
    assert values[[0, -1]] == pytest.approx([-1, 1], rel=1e-2)


def test_minmax_clips_nothing_and_holds_zero():
    assert statistics_of(torch.tensor([[2.0, 5.0]])).range("minmax", 8, 99.0) == (0.0, 5.0)
    assert statistics_of(torch.tensor([[-2.0, -1.0]])).range("minmax", 8, 99.0) == (-2.0, 0.0)
    assert statistics_of(torch.tensor([[-2.0, 1.0]])).range("minmax", 8, 99.0, is_symmetric=True) == (-2.0, 2.0)


def test_moving_average_by_hand():
    x = torch.zeros(40, 2)  # three terms: 16, 16 and 8 images
    x[3, 0], x[20, 0], x[39, 1] = 1.0, 10.0, -2.0
    weights = np.array([0.81, 0.9, 1.0]) / 2.71
    low, high = statistics_of(x, 7).range("moving_average", 8, 99.0)
    assert high == pytest.approx(weights @ [1, 10, 0]) and low == pytest.approx(-2 * weights[2])


def test_percentile_leaves_out_the_tails():
    x = torch.linspace(-1, 1, 100_000).reshape(100, -1)
    low, high = statistics_of(x).range("percentile", 8, 90.0)
    assert low == pytest.approx(-0.8, abs=1e-3) and high == pytest.approx(0.8, abs=1e-3)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("kind", ["normal", "relu", "outlier", "skewed"])
@pytest.mark.parametrize("is_symmetric", [False, True])
def test_mse_range_beats_minmax_and_a_grid(bits, kind, is_symmetric):
    x = torch.randn(1, 20_000, generator=torch.Generator().manual_seed(1))
    x = {"normal": x, "relu": x.relu(), "outlier": torch.cat([x, torch.tensor([[60.0]])], 1), "skewed": x.exp() - 1}[
        kind
    ]
    statistics = statistics_of(x)

    def error(bounds) -> float:
        ends = torch.tensor(bounds[0]), torch.tensor(bounds[1])
        scale, zero_point = numerics.activation_parameters(*ends, bits, is_symmetric)
        bounds = numerics.activation_range(bits, is_symmetric)
        return float((fake_quantize(x, scale, zero_point, *bounds) - x).square().mean())

    low, high = statistics.bounds()
    found = error(statistics.range("mse", bits, 99.0, is_symmetric))
    shares = [0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0]
    grid = min(error((min(low, 0) * a, max(high, 0) * b)) for a, b in itertools.product(shares, shares))
    assert found <= error((low, high)) * 1.001
    assert found <= grid * 1.03


def test_one_image_with_huge_activations_does_not_set_the_mse_range_of_all():
    usual = torch.randn(63, 400, generator=torch.Generator().manual_seed(3)).relu()
    odd = 40 * torch.randn(1, 400, generator=torch.Generator().manual_seed(4)).relu()
    statistics = statistics_of(torch.cat([usual, odd]))
    *_, values, counts = statistics.histogram()
    plain = observers.mse_range(values, counts, *statistics.bounds(), 4)  # of whose squares the odd one's are 96 %
    assert plain[1] > 5 * statistics_of(usual).range("mse", 4, 99.0)[1]
    assert statistics.range("mse", 4, 99.0)[1] < 2 * statistics_of(usual).range("mse", 4, 99.0)[1]


def test_entropy_clips_a_lone_outlier_and_keeps_a_uniform_range():
    x = torch.cat([torch.randn(49_999, generator=torch.Generator().manual_seed(2)).abs(), torch.tensor([100.0])])
    low, high = statistics_of(x[None]).range("entropy", 4, 99.0)
    assert low == 0.0 and 1.0 < high < 20.0
    _, high = statistics_of(torch.linspace(0, 1, 100_000)[None]).range("entropy", 8, 99.0)
    assert high > 0.9


def test_16_bit_ranges_are_the_extremes():
    x = torch.randn(2, 500, generator=torch.Generator().manual_seed(0))
    assert statistics_of(x).range("mse", 16, 99.0) == (float(x.min()), float(x.max()))


def test_histogram_mass_is_kept_when_spread_over_other_bins():
    x = torch.randn(3, 400, generator=torch.Generator().manual_seed(0))
    lower, upper, _, counts = statistics_of(x).histogram()
    edges = np.linspace(float(x.min()), float(x.max()), 33)
    spread = observers.spread(lower, upper, counts, edges)
    exact = np.histogram(x.numpy(), edges)[0]
    assert spread.sum() == pytest.approx(x.numel())
    assert np.abs(spread - exact).max() <= 3


def test_statistics_that_are_empty_or_not_finite_are_refused_by_name():
    with pytest.raises(QuantizationError, match="features: no calibration image"):
        observers.ActivationStatistics("features").bounds()
    statistics = observers.ActivationStatistics("features")
    statistics.observe(torch.tensor([[1.0, torch.nan]]))
    with pytest.raises(QuantizationError, match=r"features: .* not finite"):
        statistics.bounds()


@pytest.mark.parametrize("observer", observers.WEIGHT_OBSERVERS)
def test_one_scale_for_the_whole_tensor(observer):
    w = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.01, 1, 1, 1, 2, 3])[:, None]
    scale = observers.WeightObserver(observer, granularity="per_tensor").scales(w, 4, 0, "w")
    assert scale.shape == (1,)
    assert torch.equal(scale, observers.WeightObserver(observer).scales(w.reshape(1, -1), 4, 0, "w"))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_mse_weight_scales_beat_minmax_in_every_channel(bits):
    w = torch.randn(16, 60, generator=torch.Generator().manual_seed(bits)) ** 3
    error = {}
    for observer in ("minmax", "mse"):
        scale = observers.WeightObserver(observer).scales(w, bits, 0, "w")
        q = numerics.dequantize_weight(numerics.quantize_weight(w, scale, bits, 0), scale, 0)
        error[observer] = (q - w).square().sum(dim=1)
    assert (error["mse"] <= error["minmax"] * 1.0001).all()
    if bits <= 4:
        assert error["mse"].sum() < 0.9 * error["minmax"].sum()


def test_percentile_weights_ignore_the_largest():
    w = torch.cat([torch.ones(1, 999), torch.full((1, 1), 50.0)], dim=1)
    scale = observers.WeightObserver("percentile", 99.0).scales(w, 8, 0, "w")
    assert scale.item() == pytest.approx(1 / 127.5)


def test_channels_are_independent():
    w = torch.randn(4, 30, generator=torch.Generator().manual_seed(0))
    for observer in observers.WEIGHT_OBSERVERS:
        choose = observers.WeightObserver(observer).scales
        together = choose(w, 4, 0, "w")
        alone = torch.cat([choose(w[i : i + 1], 4, 0, "w") for i in range(4)])
        assert torch.equal(together, alone), observer


# ----------------------------------------------------------------------------------------------------------- placement


# layers, products (for hardware that has integer ones), additions, norms folded: by hand from the papers' tables
EXPECTED = {
    "resnet50": (54, 0, 16, 53),  # 1 + 3 * 16 convolutions + 4 projections + classifier
    "mobilenet_v2": (53, 0, 10, 52),
    "squeezenet1_1": (26, 0, 0, 0),  # 1 + 3 * 8 fire + classifier
    "efficientnet_b0": (82, 0, 9, 49),  # 16 blocks' SE have two convolutions each
    "vit_small_patch16_224": (50, 24, 0, 0),  # patches + 4 * 12 + head; two products a block; norms read its sums
}


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_product_and_addition_is_quantized(name):
    model = settled(name).double()  # so that folding is exact but for float64 rounding
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    network, placement = prepare(model, 8, lambda name, is_edge: nn.Identity(), has_integer_products=True)
    counts = (len(placement.layers), len(placement.matmuls), len(placement.additions), len(placement.folded_norms))
    assert counts == EXPECTED[name]
    assert not placement.opaque and not placement.float_layers
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    # folding and writing attention out change the function by rounding only
    with torch.no_grad():
        reference, prepared = model(images(4).double()), network(images(4).double())
    assert (reference - prepared).abs().max() <= 1e-9 * reference.abs().max()
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_and_product_reads_quantized_values(name):
    """Walk the graph: each operand of a layer, product or residual addition comes out of a quantizer."""
    network, placement = prepare(
        settled(name), 8, lambda name, is_edge: ActivationQuantizer(name, 8), has_integer_products=True
    )
    modules = dict(network.named_modules())
    checked = 0
    for node in network.graph.nodes:
        if isinstance(modules.get(node.target), QuantizedLayer):
            operands = node.args[:1]
        elif node.name in placement.matmuls or node.name in placement.additions:
            operands = node.args[:2]
        else:
            continue
        assert all(isinstance(modules.get(operand.target), ActivationQuantizer) for operand in operands), node
        checked += 1
    assert checked == sum(EXPECTED[name][:3])


class Attention(nn.Module):
    """Fused attention as users write it, with an optional mask."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.out = nn.Linear(8, 2)

    def forward(self, x, mask=None):
        x = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if mask is not None:
            q = q * mask
        return self.out(F.scaled_dot_product_attention(q, k, v)).mean(1)


def test_fused_attention_is_written_out():
    model = Attention().eval()
    x = torch.randn(3, 8, 4, 4)
    network, placement = prepare(model, 8, lambda name, is_edge: nn.Identity(), has_integer_products=True)
    assert len(placement.matmuls) == 2 and len(placement.layers) == 2
    torch.testing.assert_close(network(x), model(x))


def test_attention_stays_whole_where_products_are_in_float():
    _, placement = prepare(Attention().eval(), 8, lambda name, is_edge: nn.Identity())
    assert not placement.matmuls and placement.float_operations["scaled_dot_product_attention"] == 1
    assert placement.activation_quantizers == ["transpose", "scaled_dot_product_attention"]


class Pooled(nn.Module):
    """A sum and a layer that only averages over the image read; a sum that a norm reads."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.norm, self.head = nn.GroupNorm(1, 4), nn.Linear(8, 2)

    def forward(self, x):
        x = self.a(x).relu()
        x = x + self.b(x)
        x = self.c(self.norm(x + F.relu(x)))
        y = F.relu6(x + x.abs())
        return self.head(torch.cat([y.mean((-2, -1)), F.adaptive_avg_pool2d(self.c(x), 1).flatten(1)], 1))


def test_what_an_average_reads_is_quantized_and_a_sum_for_norms_is_not():
    network, placement = prepare(Pooled().eval(), 8, lambda name, is_edge: nn.Identity())
    # of the sums only the last is read, past a ReLU6, by an average; the others end in a norm
    assert placement.additions == ["add_2"]
    nodes = {node.name: node for node in network.graph.nodes}
    assert nodes["mean"].args[0].target == "quantizer_relu6"
    assert nodes["adaptive_avg_pool2d"].args[0].target == "quantizer_c_1"


class InPlace(nn.Module):
    """An alias that sees what is done to it later, and a transposition by attribute."""

    def __init__(self):
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 3, 1), nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.conv(x)
        alias = x
        x.add_(1.0)
        x = self.relu(x)
        x.add_(self.conv(alias))
        rows = alias.mean(1)
        return (rows @ rows.mT).flatten(1)


def test_what_is_changed_in_place_is_read_changed():
    model, x = InPlace().eval(), images(5, 8)
    network, placement = prepare(model, 8, lambda name, is_edge: nn.Identity(), has_integer_products=True)
    torch.testing.assert_close(network(x.clone()), model(x.clone()))
    assert (len(placement.layers), len(placement.additions), len(placement.matmuls)) == (1, 0, 1)
    quantized = ptq_static(model, x, weight_bits=8, activation_bits=8)
    reference = model(x.clone())
    assert (quantized(x) - reference).norm() < 0.05 * reference.norm()


class Alias(nn.Module):
    """What torch.fx cannot see: += on one name changes what another name reads."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        x = self.conv(x)
        alias = x
        x += 100.0
        return (x + alias).mean((2, 3))


def test_a_graph_that_is_not_the_model_is_refused():
    with pytest.raises(QuantizationError, match="other outputs than the model"):
        ptq_static(Alias().eval(), images(4, 8), weight_bits=8, activation_bits=8)


class DataDependent(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.conv(x) if x.sum() > 0 else -self.conv(x)


def test_an_untraceable_submodule_is_named_and_its_layers_are_quantized():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), DataDependent(), nn.Flatten(), nn.LazyLinear(2)).eval()
    x = images(8, 8)
    model(x)
    quantized = ptq_static(model, x, weight_bits=8, activation_bits=8, observer="minmax")
    assert list(quantized.placement.opaque) == ["1"] and "TraceError" in quantized.placement.opaque["1"]
    assert sorted(quantized.placement.layers) == ["0", "1.conv", "3"]
    assert (quantized(x) - model(x)).norm() < 0.05 * model(x).norm()
    assert (quantized(-x) - model(-x)).norm() < 0.2 * model(-x).norm()  # the control flow still runs


def test_a_model_whose_own_forward_cannot_be_traced():
    model = DataDependent().eval()
    x = torch.randn(4, 4, 6, 6)
    quantized = ptq_dynamic(model, weight_bits=8, activation_bits=8)
    assert list(quantized.placement.opaque) == ["model"]
    assert (quantized(x) - model(x)).norm() < 0.05 * model(x).norm()


class Idioms(nn.Module):
    """What users write: layers called by keyword, a weight's dtype read, one weight in two layers before two norms."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 1, bias=False), nn.Conv2d(3, 3, 1, bias=False)
        self.second.weight = self.first.weight
        self.norm1, self.norm2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.inner = DataDependent()
        self.inner.conv = nn.Conv2d(3, 2, 1)

    def forward(self, x):
        x = self.norm1(self.first(input=x.to(self.first.weight.dtype)))
        return self.inner(self.norm2(self.second(x))).mean((2, 3))


def test_idioms_of_users_models():
    model, x = Idioms(), images(16, 8) + 0.5
    for _ in range(20):
        model(x)
    model.eval()
    for quantized in (
        ptq_static(model, x, weight_bits=8, activation_bits=8, observer="minmax"),
        ptq_dynamic(model, x, weight_bits=8, activation_bits=8),
    ):
        assert sorted(quantized.layers()) == ["first", "inner.conv", "second"]
        assert (quantized(x) - model(x)).norm() < 0.1 * model(x).norm()
    assert model.second.weight is model.first.weight
    assert model_size_mb(model) > 0


def test_weights_that_are_computed_anew_stay_float_or_are_refused():
    spectral = nn.Sequential(torch.nn.utils.spectral_norm(nn.Conv2d(3, 8, 1)), nn.Conv2d(8, 2, 1), nn.Flatten()).eval()
    quantized = ptq_dynamic(spectral, weight_bits=2, activation_bits=8)
    assert quantized.placement.layers == ["1"] and quantized.placement.float_layers == ["0"]
    pruned = nn.Sequential(nn.Conv2d(3, 8, 1))
    prune.random_unstructured(pruned[0], "weight", amount=0.5)
    pruned(images(2, 8))
    with pytest.raises(QuantizationError, match="remove its reparametrisations"):
        ptq_dynamic(pruned, weight_bits=4, activation_bits=8)


def test_a_model_that_returns_no_logits_or_takes_no_such_images_is_refused():
    with pytest.raises(QuantizationError, match="returns tuple"):
        ptq_static(Twice().eval(), images(4, 8), weight_bits=8, activation_bits=8)
    with pytest.raises(QuantizationError, match="cannot be run on the images"):
        ptq_static(nn.Sequential(nn.Conv2d(1, 2, 3)).eval(), images(4, 8), weight_bits=8, activation_bits=8)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1)

    def forward(self, x):
        return self.conv(x), x


def test_histograms_count_past_what_float32_counts():
    statistics = statistics_of(torch.zeros(1, 1 << 24))
    statistics.observe(torch.ones(1, 1))
    statistics.observe(torch.zeros(1, 1))
    *_, counts = statistics.histogram()
    assert counts.tolist() == [(1 << 24) + 1, 1]  # float32 has no 2^24 + 1


def test_a_model_without_layers_is_refused():
    with pytest.raises(QuantizationError, match="no convolution or linear layer"):
        prepare(nn.Sequential(nn.ReLU()), 8, lambda name, is_edge: nn.Identity())


class Preactivation(nn.Module):
    """BatchNorm that cannot be folded: before the convolution, and after one whose output is read twice."""

    def __init__(self):
        super().__init__()
        self.norm, self.conv, self.norm2 = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.conv(F.relu(self.norm(x)))
        return (self.norm2(y) + y).mean((2, 3))


def test_only_norms_that_can_be_folded_are():
    model = Preactivation()
    model(images(32, 8) * 3 + 1)
    model.eval()
    network, placement = prepare(model, 8, lambda name, is_edge: nn.Identity())
    assert placement.folded_norms == []
    torch.testing.assert_close(network(images(4, 8)), model(images(4, 8)))


def test_first_and_last_layers_can_be_wider():
    quantized = ptq_dynamic(settled("mobilenet_v2"), weight_bits=3, activation_bits=3, first_last_bits=8)
    bits = {name: layer.bits for name, layer in quantized.layers().items()}
    assert [name for name, width in bits.items() if width == 8] == ["features.0.0", "classifier.1"]
    assert sum(q.bits == 8 for q in quantized.activation_quantizers().values()) == 2


# ----------------------------------------------------------------------------------------------------------------- ptq


def recorded(quantized, x) -> dict[str, torch.Tensor]:
    """What leaves each activation quantizer."""
    seen, hooks = {}, []
    for name, module in quantized.activation_quantizers().items():
        hooks.append(module.register_forward_hook(lambda _, __, out, name=name: seen.__setitem__(name, out.detach())))
    try:
        with torch.no_grad():
            quantized(x)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(8, 8), (4, 4), (2, 2), (4, 8), (3, 5)])
def test_widths_are_real_and_the_model_is_untouched(name, weight_bits, activation_bits):
    model = short(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    was_training = [module.training for module in model.modules()]
    x = images(8)
    quantized = ptq_static(
        model, x, weight_bits=weight_bits, activation_bits=activation_bits, observer="minmax", weight_observer="minmax"
    )
    for layer in quantized.layers().values():
        weight = layer.layer.weight.detach().movedim(layer.axis, 0).flatten(1)
        assert max(len(channel.unique()) for channel in weight) <= 2**weight_bits
        torch.testing.assert_close(
            layer.layer.weight.detach(),
            numerics.dequantize_weight(layer.weight_integer, layer.weight_scale, layer.axis),
            rtol=0,
            atol=0,
        )
    seen = recorded(quantized, x)
    assert len(seen) == len(quantized.placement.activation_quantizers)
    for tensor in seen.values():
        assert len(tensor.unique()) <= 2**activation_bits
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == was_training


@pytest.mark.parametrize("name", MODELS)
def test_more_bits_are_nearer_to_fp32(name):
    model, x = short(name), images(48)
    with torch.no_grad():
        reference = model(x)
        error = {
            bits: float((ptq_static(model, x, weight_bits=bits, activation_bits=bits)(x) - reference).norm())
            for bits in (8, 6, 4)
        }
    assert error[8] < error[6] < error[4]
    assert error[8] < 0.2 * float(reference.norm())


@pytest.mark.parametrize("name", MODELS)
def test_dynamic_predictions_do_not_depend_on_the_batch(name):
    """In float64, where a sum in another order does not cross a rounding threshold; but for a ViT's attention, whose
    sums of grid values lie on thresholds exactly: there one level of 8 bits may differ, not what 40 times the range
    does."""
    is_exact = not name.startswith("vit")
    quantized = ptq_dynamic(short(name), weight_bits=8, activation_bits=4 if is_exact else 8).double()
    x = images(6).double()
    x[3] *= 40  # an image with a far wider range beside the others
    with torch.no_grad():
        together = quantized(x)
        alone = torch.cat([quantized(x[i : i + 1]) for i in range(len(x))])
    if is_exact:
        torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)
    else:
        assert (together - alone).norm() < 0.02 * alone.norm()


def test_a_dynamic_quantizer_treats_each_image_as_if_alone():
    x = torch.randn(5, 7, 4, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [0.01, 1.0, 30.0, 1.0, 5.0]
    ).reshape(-1, 1, 1, 1)
    quantizer = DynamicActivationQuantizer("x", 4)
    assert torch.equal(quantizer(x), torch.cat([quantizer(x[i : i + 1]) for i in range(5)]))


def test_dynamic_activations_have_at_most_16_levels_an_image():
    quantized = ptq_dynamic(settled("squeezenet1_1"), weight_bits=4, activation_bits=4)
    for tensor in recorded(quantized, images(5)).values():
        assert all(len(image.unique()) <= 16 for image in tensor)


def test_dynamic_quantizer_by_hand():
    x = torch.tensor([[-1.0, 0.4, 2.0], [0.0, 10.0, 30.0]])
    # image 1: scale 1, levels -1 0 1 2; image 2: scale 10, levels 0 10 20 30
    assert DynamicActivationQuantizer("x", 2)(x).tolist() == [[-1.0, 0.0, 2.0], [0.0, 10.0, 30.0]]


def test_an_uncalibrated_quantizer_is_an_error_and_calibration_is_state():
    quantizer = ActivationQuantizer("conv1", 8)
    assert torch.isnan(quantizer.scale)
    with pytest.raises(UncalibratedError, match="conv1"):
        quantizer(torch.ones(2))
    quantizer.set_range(0.0, 1.0)
    other = ActivationQuantizer("conv1", 8)
    other.load_state_dict(quantizer.state_dict())
    x = torch.rand(50)
    assert torch.equal(other(x), quantizer(x)) and not torch.equal(other(x), x)


def test_state_dict_round_trips_and_refuses_uncalibrated_again():
    model, x = settled("squeezenet1_1"), images(8)
    first = ptq_static(model, x, weight_bits=4, activation_bits=4)
    second = ptq_static(model, x * 2, weight_bits=4, activation_bits=4)
    assert not torch.equal(first(x), second(x))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x), second(x))


@pytest.mark.parametrize("name", ["mobilenet_v2", "vit_small_patch16_224"])
@pytest.mark.parametrize("bits", [8, 5, 4, 2])
def test_the_packed_file_holds_the_model(name, bits, tmp_path):
    from safetensors.torch import load_file

    model, x = short(name), images(6)
    quantized = ptq_static(model, x, weight_bits=bits, activation_bits=8, observer="minmax", weight_observer="minmax")
    size = write_model(quantized, tmp_path / "model.safetensors")
    assert size == (tmp_path / "model.safetensors").stat().st_size / 1e6 == model_size_mb(quantized)
    weights = sum(layer.layer.weight.numel() for layer in quantized.layers().values())
    rest = sum(p.numel() for p in model.parameters()) - weights
    # b bits a weight; the rest, scales and a header in float32
    assert weights * bits / 8 < size * 1e6 < weights * bits / 8 + 4 * rest + 350_000
    other = ptq_static(short(name, seed=9), x, weight_bits=bits, activation_bits=8, observer="minmax")
    other.load_packed(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(other(x), quantized(x))


def test_a_packed_file_of_another_model_is_refused():
    x = images(4)
    one = ptq_dynamic(settled("squeezenet1_1"), weight_bits=4, activation_bits=4)
    two = ptq_dynamic(settled("mobilenet_v2"), weight_bits=4, activation_bits=4)
    with pytest.raises(QuantizationError, match="another model"):
        two.load_packed(one.packed_tensors())
    wider = ptq_dynamic(settled("squeezenet1_1"), weight_bits=8, activation_bits=4)
    before = wider(x)
    with pytest.raises(QuantizationError, match="do not hold"):
        wider.load_packed(one.packed_tensors())
    assert torch.equal(wider(x), before)


def test_observers_give_different_models():
    model, x = settled("mobilenet_v2"), images(32)
    outputs = [ptq_static(model, x, weight_bits=4, activation_bits=4, observer=o)(x) for o in observers.OBSERVERS]
    for one, other in itertools.combinations(outputs, 2):
        assert not torch.equal(one, other)


def test_calibration_images_matter_and_their_batching_does_not(monkeypatch):
    model, x = settled("squeezenet1_1"), images(40)

    def ranges(sample):
        quantized = ptq_static(model, sample, weight_bits=8, activation_bits=8)
        return torch.stack([q.scale for q in quantized.activation_quantizers().values()])

    whole = ranges(x)
    assert not torch.allclose(whole, ranges(3 * x))
    monkeypatch.setattr(calibration, "CALIBRATION_BATCH", 7)
    torch.testing.assert_close(whole, ranges(x), rtol=3e-3, atol=1e-6)  # a bin: 1/256 of an octave


def test_a_model_that_writes_into_its_input_leaves_the_calibration_images_alone():
    class Scaled(nn.Sequential):
        def forward(self, x):
            return super().forward(x.mul_(2.0))

    x = images(6)
    before = x.clone()
    ptq_static(Scaled(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 30 * 30, 2)), x, weight_bits=8, activation_bits=8)
    assert torch.equal(x, before)


# --------------------------------------------------------------------------------------------------- calibration images


def test_calibration_data_without_images_is_refused():
    with pytest.raises(QuantizationError, match="empty"):
        calibration.gather_images([], 8)
    batch = {"image": torch.zeros(6, 1, 2, 2), "label": torch.zeros(6), "sensitive": {}}
    assert len(calibration.gather_images([batch], 4)) == 4


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", MODELS)
def test_cuda_gives_what_the_cpu_gives(name):
    model, x = settled(name), images(16)
    on_cpu = ptq_static(model, x, weight_bits=8, activation_bits=8)
    on_gpu = ptq_static(model.cuda(), x, weight_bits=8, activation_bits=8)
    for one, other in zip(on_cpu.layers().values(), on_gpu.layers().values(), strict=True):
        assert (one.weight_integer == other.weight_integer.cpu()).float().mean() > 0.999
    reference, result = on_cpu(x), on_gpu(x.cuda()).cpu()
    assert (reference - result).norm() < 0.05 * reference.norm()
    dynamic = ptq_dynamic(model, weight_bits=8, activation_bits=8)
    assert (dynamic(x.cuda()).cpu() - ptq_dynamic(model.cpu(), weight_bits=8, activation_bits=8)(x)).norm() < (
        0.05 * reference.norm()
    )


def test_the_bias_of_a_channel_without_weights_survives():
    """A BatchNorm with a gain of almost 0 leaves a bias that is no int32 multiple of its step."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2)).eval()
    with torch.no_grad():
        model[1].weight[0], model[1].bias[0] = 1e-9, 0.7
    x = images(8, 8)
    for granularity in ("per_channel", "per_tensor"):
        quantized = ptq_static(model, x, weight_bits=8, activation_bits=8, weight_granularity=granularity)
        layer = quantized.layers()["0"]
        assert layer.layer.bias[0].item() == pytest.approx(0.7, rel=1e-4)
        step = quantized.activation_quantizers()["x" if "x" in quantized.activation_quantizers() else "input_1"].scale
        multiples = layer.layer.bias / (step * layer.weight_scale)
        assert (multiples.abs() <= 2**30 * 1.001).all()
        assert (multiples - multiples.round()).abs().max() <= 1e-6 * multiples.abs().max()
        with torch.no_grad():
            assert (quantized(x) - model(x)).abs().max() < 0.05 * model(x).abs().max()


def test_biases_are_multiples_of_what_an_accumulator_counts_in():
    quantized = ptq_static(settled("mobilenet_v2"), images(16), weight_bits=4, activation_bits=4)
    modules = dict(quantized.network.named_modules())
    checked = 0
    for node in quantized.network.graph.nodes:
        layer = modules.get(node.target)
        if isinstance(layer, QuantizedLayer):
            multiples = layer.layer.bias / (modules[node.args[0].target].scale * layer.weight_scale)
            assert (multiples - multiples.round()).abs().max() < 0.01  # float32: up to 10^5 of them
            checked += 1
    assert checked == 53
