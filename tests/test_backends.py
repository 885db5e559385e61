"""The integer schemes of hardware: what x86, arm and tensorrt do to the numbers; every method under each of them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from models import build_model
from quantization import METHODS, QuantizationError, apply_quantization
from quantizers.inference import FastQuantizer
from quantizers.methods import options_of
from quantizers.modules import ActivationQuantizer, DynamicActivationQuantizer, QuantizedModel
from quantizers.numerics import (
    BACKENDS,
    INT8_RANGE,
    activation_range,
    affine_parameters,
    dequantize_weight,
    fake_quantize,
    quantize_weight,
    weight_range,
)
from quantizers.observers import WEIGHT_OBSERVERS
from quantizers.ptq import Recipe, attach
from sections.quantization import BackendName

BITS = range(2, 9)
WEIGHT_RANGES = {"x86": (-128, 127), "arm": (-127, 127), "tensorrt": (-128, 127)}  # of 8 bits
REDUCED = {"backend": "x86", "reduce_range": True}


class Attentive(nn.Module):
    """For 12-pixel images: a folded norm, a grouped convolution, a residual addition, attention, a classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU())
        self.inner = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=4), nn.ReLU6())
        self.outer = nn.Conv2d(8, 8, 1)
        self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = self.stem(x)
        x = (x + self.outer(self.inner(x))).flatten(2).transpose(1, 2)
        query, key, value = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.out(F.scaled_dot_product_attention(query, key, value))
        return self.head(x.mean(1))


class Convolutional(nn.Module):
    """Without a product of two activations."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU())
        self.inner, self.head = nn.Conv2d(8, 8, 3, padding=1, groups=4), nn.Linear(8, 2)

    def forward(self, x):
        x = self.stem(x)
        return self.head((x + F.relu6(self.inner(x))).mean((2, 3)))


def settled(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = kind()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(64, 3, 12, 12))
    return model.eval()


@pytest.fixture
def model() -> nn.Module:
    return settled(Attentive)


@pytest.fixture
def loader() -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "image": torch.randn(32, 3, 12, 12, generator=generator),
            "label": torch.randint(0, 2, (32,), generator=generator),
            "sensitive": {"gender": torch.randint(0, 2, (32,), generator=generator)},
        }
        for _ in range(2)
    ]


WIDENING = ("sensitive_channels", "sensitive_layers")  # they keep parts of a narrower model in 8 bits


def quantize(model, loader, method="ptq_static", bits=8, **options) -> QuantizedModel:
    """By the public API, quickly: few images, one epoch."""
    known = options_of(METHODS[method])
    quick = {"calibration_samples": 32, "sensitivity_samples": 8, "epochs": 1, "learning_rate": 1e-2}
    quick = {key: value for key, value in quick.items() if key in known}
    if method == "fair_mixed_precision":
        quick["sensitivity_samples"] = 32  # every group among them
    if METHODS[method].needs_train_data:
        quick["train_data"] = loader
    if method in WIDENING and bits == 8:
        bits = 4
    if method == "sensitive_layers":
        quick |= {"widen": "weights_and_inputs", "layer_share": 1.0, "extra_share": 1.0}  # some layers of many weights
    return apply_quantization(model, method, bits, loader, **quick | options)


def logits(quantized: nn.Module, loader) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([quantized(batch["image"]) for batch in loader])


def integers(quantized: QuantizedModel, bits: int = 8) -> torch.Tensor:
    """All weights of the layers of this width, or with channels of it."""
    layers = [
        layer.weight_integer.flatten()
        for layer in quantized.layers().values()
        if layer.bits == bits or (layer.wide_count() and layer.wide_bits == bits)
    ]
    return torch.cat(layers).int()


def weights() -> torch.Tensor:
    """(5, 40), from tiny to large; in each row the value of the largest size is negative, so that -2^(b-1) is near."""
    w = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-2, 3)[:, None]
    w[:, 0] = -1.001 * w.abs().amax(dim=1)
    return w


def test_the_config_has_the_backends_that_there_are():
    assert set(BACKENDS) == set(BackendName.__args__) == set(WEIGHT_RANGES)


# ---------------------------------------------------------------------------------------------------------- activations


@settings(deadline=None)
@given(bits=st.sampled_from(BITS), low=st.floats(-50, 50), width=st.floats(1e-3, 100), seed=st.integers(0, 999))
def test_signed_activations_have_the_values_of_unsigned_ones(bits, low, width, seed):
    """The integers are shifted by 2^(b-1), to the int8 that arm has; no value is another one."""
    low, high = torch.tensor(low), torch.tensor(low + width)
    (scale, zero_point), (signed_scale, signed_zero_point) = (
        affine_parameters(low, high, bits, s) for s in (False, True)
    )
    assert torch.equal(scale, signed_scale) and torch.equal(signed_zero_point, zero_point - 2 ** (bits - 1))
    assert -(2 ** (bits - 1)) <= signed_zero_point <= 2 ** (bits - 1) - 1
    span = 1.5 * torch.maximum(low.abs(), high.abs())
    x = (torch.rand(3, 200, generator=torch.Generator().manual_seed(seed)) * 2 - 1) * span
    unsigned = fake_quantize(x, scale, zero_point, 0, 2**bits - 1)
    assert torch.equal(
        fake_quantize(x, scale, signed_zero_point, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1).add(0.0), unsigned.add(0.0)
    )
    quantizers = [ActivationQuantizer("q", bits, is_signed=is_signed) for is_signed in (False, True)]
    for quantizer in quantizers:
        quantizer.set_range(float(low), float(high))
    assert torch.equal(quantizers[0](x), unsigned) and torch.equal(quantizers[1](x), unsigned)
    dynamic = [DynamicActivationQuantizer("q", bits, is_signed=is_signed)(x) for is_signed in (False, True)]
    assert torch.equal(*dynamic)


def test_a_signed_range_by_hand():
    # [-1, 2] at 2 bits: scale 1, levels -1 0 1 2; unsigned they are 0 … 3 with zero point 1, signed -2 … 1 with -1
    quantizer = ActivationQuantizer("q", 2, is_signed=True)
    quantizer.set_range(-1.0, 2.0)
    assert (quantizer.scale.item(), quantizer.zero_point.item(), quantizer.bounds()) == (1.0, -1.0, (-2, 1))
    assert quantizer(torch.tensor([-9.0, -0.6, 0.5, 1.5, 2.4, 9.0])).tolist() == [-1.0, -1.0, 0.0, 2.0, 2.0, 2.0]


@settings(deadline=None)
@given(bits=st.sampled_from(BITS), low=st.floats(-50, 0), high=st.floats(1e-3, 50))
def test_symmetric_activations_have_no_zero_point_and_mirror(bits, low, high):
    """tensorrt's: zero point 0, and inside the range -x is quantized to -q(x)."""
    for quantizer in (ActivationQuantizer("q", bits, True, True), DynamicActivationQuantizer("q", bits, True, True)):
        x = torch.tensor([[low, high, *torch.linspace(low, high, 50).tolist()]])
        if isinstance(quantizer, ActivationQuantizer):
            quantizer.set_range(low, high)
            scale, zero_point = quantizer.scale, quantizer.zero_point
        else:
            (scale,), (zero_point,) = quantizer.parameters_of(x)
        assert zero_point == 0 and quantizer.is_signed
        q = quantizer(x)
        assert (q - x).abs().max() <= scale / 2 * (1 + 1e-4)  # nothing is clipped by more than is rounded
        inside = q.abs() < activation_range(bits, is_signed=True)[1] * scale
        assert torch.equal(quantizer(-torch.cat([x, -x], 1))[:, : x.shape[1]][inside], -q[inside])


@pytest.mark.parametrize("name", ["vit_small_patch16_224"])
def test_products_are_on_integers_for_tensorrt_alone(name):
    """Two products a block of attention, both factors of each out of a quantizer; elsewhere attention is left whole."""
    model = build_model(name, 2, 32, seed=0).eval()
    for backend in BACKENDS:
        quantized = attach(model, None, "ptq_static", 8, 8, Recipe(backend=backend))
        placement, modules = quantized.placement, dict(quantized.network.named_modules())
        products = [node for node in quantized.network.graph.nodes if node.name in placement.matmuls]
        assert len(products) == len(placement.matmuls) == (24 if backend == "tensorrt" else 0)
        for node in products:
            factors = [modules[factor.target] for factor in node.args]
            assert len({id(factor) for factor in factors}) == 2
            assert all(isinstance(factor, ActivationQuantizer) and factor.is_symmetric for factor in factors)
        whole = placement.float_operations["scaled_dot_product_attention"]
        assert whole == (0 if backend == "tensorrt" else 12)


# -------------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
@pytest.mark.parametrize("observer", WEIGHT_OBSERVERS)
@pytest.mark.parametrize("scheme", [{"backend": backend} for backend in BACKENDS] + [REDUCED], ids=str)
def test_weights_keep_to_the_range_that_the_backend_has(scheme, observer, granularity):
    """Of 8 bits; at other widths they are what they are under x86."""
    w = weights()
    recipe = Recipe(weight_observer=observer, weight_granularity=granularity, percentile=99.0, **scheme)
    plain = Recipe(weight_observer=observer, weight_granularity=granularity, percentile=99.0)
    for bits in BITS:
        scale = recipe.weight_scales().scales(w, bits, 0, "w")
        q = quantize_weight(w, scale, bits, 0, recipe.int8_range()).int()
        if bits < 8:
            same = plain.weight_scales().scales(w, bits, 0, "w")
            assert torch.equal(scale, same) and torch.equal(q, quantize_weight(w, same, bits, 0).int())
            continue
        low, high = (-64, 63) if "reduce_range" in scheme else WEIGHT_RANGES[scheme["backend"]]
        assert low <= q.min() and q.max() <= high and len(q.unique()) <= high - low + 1
        off = (dequantize_weight(q, scale, 0) - w).abs()
        if observer == "minmax":
            assert (off <= scale[:, None] / 2 * (1 + 1e-4)).all()
        clipped = (q == low) | (q == high)
        assert (off <= scale[:, None] / 2 * (1 + 1e-4))[~clipped].all()


@pytest.mark.parametrize("observer", WEIGHT_OBSERVERS)
def test_scales_are_for_the_range_that_there_is(observer):
    """Half as many integers need twice the scale to clip at the same weight; -127 or -128 makes no difference to that.
    mse, which may clip elsewhere, is never worse than clipping nothing."""
    w = weights()

    def scales(observer, scheme):
        return Recipe(weight_observer=observer, percentile=99.0, **scheme).weight_scales().scales(w, 8, 0, "w")

    def errors(scale, scheme):
        q = quantize_weight(w, scale, 8, 0, Recipe(**scheme).int8_range())
        return (dequantize_weight(q, scale, 0) - w).square().sum(dim=1)

    for scheme, factor in (({"backend": "arm"}, 1.0), (REDUCED, 127.5 / 63.5)):
        if observer != "mse":
            torch.testing.assert_close(scales(observer, scheme), factor * scales(observer, {}))
        else:
            found = errors(scales("mse", scheme), scheme)
            assert (found <= errors(scales("minmax", scheme), scheme)).all()


@pytest.mark.parametrize(
    ("scheme", "limit", "expected"),
    [
        ({"backend": "x86"}, 127.5, [-128, 127, 0, -2, 100]),
        ({"backend": "tensorrt"}, 127.5, [-128, 127, 0, -2, 100]),
        ({"backend": "arm"}, 127.5, [-127, 127, 0, -2, 100]),
        (REDUCED, 63.5, [-64, 63, 0, -2, 63]),
    ],
    ids=str,
)
def test_weights_by_hand(scheme, limit, expected):
    """A scale of exactly 1; ties go to even. The last weight is beyond the largest only where the range is reduced."""
    recipe = Recipe(weight_observer="minmax", **scheme)
    w = torch.tensor([[-limit, limit, 0.5, -1.5]])
    scale = recipe.weight_scales().scales(w, 8, 0, "w")
    assert scale.tolist() == [1.0]
    w = torch.cat([w, torch.tensor([[100.0]])], dim=1)
    assert quantize_weight(w, scale, 8, 0, recipe.int8_range()).tolist() == [expected]


def test_a_reduced_range_cannot_saturate_16_bits():
    """vpmaddubsw adds two products of uint8 and int8 into int16: what reduce_range is there for."""
    low, high = Recipe(**REDUCED).int8_range()
    assert 2 * 255 * max(-low, high) <= 2**15 - 1 < 2 * 255 * max(-INT8_RANGE[0], INT8_RANGE[1])
    assert high - low + 1 == 128


@pytest.mark.parametrize("bits", BITS)
def test_only_8_bits_have_another_range(bits):
    far, one = torch.tensor([[-1000.0, 1000.0]]), torch.ones(1)
    for scheme, int8_range in (({"backend": "arm"}, (-127, 127)), (REDUCED, (-64, 63))):
        expected = int8_range if bits == 8 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        assert Recipe(**scheme).int8_range() == int8_range
        assert weight_range(bits, int8_range) == expected
        assert quantize_weight(far, one, bits, 0, int8_range).tolist() == [list(expected)]


# -------------------------------------------------------------------------------------------------------------- methods


@pytest.mark.parametrize("scheme", [{"backend": backend} for backend in BACKENDS] + [REDUCED], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_works_under_every_backend(method, scheme, model, loader):
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    options = {"widths": [2, 8, 16]} if method in ("mixed_precision", "fair_mixed_precision") else {}
    options |= {"extra_share": 0.6} if method in WIDENING else {}
    quantized = quantize(model, loader, method, **scheme, **options)
    quantized = getattr(quantized, "model", quantized)  # with thresholds around it
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    result = logits(quantized, loader)
    assert torch.isfinite(result).all() and not torch.equal(result, logits(model, loader))
    assert quantized.description["backend"] == scheme["backend"]
    low, high = (-64, 63) if "reduce_range" in scheme else WEIGHT_RANGES[scheme["backend"]]
    found = integers(quantized)
    assert low <= found.min() and found.max() <= high
    assert found.min() < -60 and found.max() > 60  # so that the bounds above say something
    for layer in quantized.layers().values():
        if not layer.wide_count():
            assert layer.bounds() == weight_range(layer.bits, (low, high))
    assert len(quantized.placement.matmuls) == (2 if scheme["backend"] == "tensorrt" else 0)
    for quantizer in quantized.activation_quantizers().values():
        assert quantizer.is_signed is (scheme["backend"] != "x86")
        assert quantizer.is_symmetric is (scheme["backend"] == "tensorrt")
        if method == "ptq_dynamic" or quantizer.bits == 32:
            continue
        low, high = quantizer.bounds()
        assert (low, high) == activation_range(quantizer.bits, scheme["backend"] != "x86")
        assert low <= quantizer.zero_point <= high and (quantizer.zero_point == 0 or scheme["backend"] != "tensorrt")


LEARNED = {"rounding": "adaround", "reconstruction_iterations": 5}


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("ptq_static", {}),
        ("ptq_static", {"activation_scheme": "symmetric"}),
        ("ptq_static", {"observer": "entropy", "equalize": True, "bias_correction": True}),
        ("ptq_static", LEARNED),
        ("ptq_dynamic", {}),
        ("qat", {}),
        ("bias_aware_calibration", {"observer": "percentile", "percentile": 99.0}),
    ],
    ids=str,
)
def test_arm_predicts_what_x86_does(method, options, model, loader):
    """To the bit, unless the weights have 8 bits, whose range is another; tensorrt predicts something else."""
    x86, arm, tensorrt = (
        quantize(model, loader, method, 4, activation_bits=8, backend=backend, **options) for backend in BACKENDS
    )
    assert torch.equal(logits(x86, loader), logits(arm, loader))
    assert not torch.equal(logits(x86, loader), logits(tensorrt, loader))
    shift = 0 if options.get("activation_scheme") == "symmetric" else 2**7
    for name, quantizer in arm.activation_quantizers().items():
        if isinstance(quantizer, ActivationQuantizer):
            other = x86.activation_quantizers()[name]
            assert torch.equal(quantizer.scale, other.scale) and quantizer.zero_point == other.zero_point - shift
    for name, layer in arm.layers().items():
        assert torch.equal(layer.weight_integer, x86.layers()[name].weight_integer)


@pytest.mark.parametrize("scheme", [{"backend": "arm"}, REDUCED], ids=str)
def test_learned_rounding_keeps_to_the_range(scheme, model, loader):
    """Where many weights are clipped, so that an integer beyond the range would be less wrong."""
    clipped = {"weight_observer": "percentile", "percentile": 80.0}
    quantized = quantize(model, loader, **clipped, **LEARNED, **scheme)
    low, high = Recipe(**scheme).int8_range()
    found = integers(quantized)
    assert found.min() == low and found.max() == high
    assert not torch.equal(found, integers(quantize(model, loader, **clipped, **scheme)))  # something was learned


def test_8_bit_weights_tell_the_backends_apart(model, loader):
    x86, arm, reduced = (
        logits(quantize(model, loader, **scheme), loader) for scheme in ({}, {"backend": "arm"}, REDUCED)
    )
    assert not torch.equal(x86, arm) and not torch.equal(x86, reduced)
    assert torch.equal(x86, logits(quantize(model, loader, backend="x86", reduce_range=False), loader))  # the defaults


def test_a_reduced_range_is_of_the_8_bit_layers(model, loader):
    plain, reduced = (quantize(model, loader, bits=4, reduce_range=r, first_last_bits=8) for r in (False, True))
    for name, layer in reduced.layers().items():
        is_same = torch.equal(layer.weight_integer, plain.layers()[name].weight_integer)
        assert is_same is (layer.bits == 4)
    assert integers(reduced).min() >= -64 and integers(reduced).max() <= 63
    assert sorted(layer.bits for layer in reduced.layers().values()) == [4, 4, 4, 4, 8, 8]


def test_tensorrt_without_products_is_x86_symmetric(loader):
    model = settled(Convolutional)
    one = quantize(model, loader, backend="tensorrt")
    other = quantize(model, loader, activation_scheme="symmetric")
    assert torch.equal(logits(one, loader), logits(other, loader))
    assert torch.equal(logits(one, loader), logits(quantize(model, loader, backend="tensorrt",
                                                            activation_scheme="symmetric"), loader))  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "amr"}, "unknown backend 'amr'; choose from x86, arm, tensorrt"),
        ({"backend": ["arm"]}, "unknown backend ['arm']; choose from x86, arm, tensorrt"),
        ({"backend": None}, "unknown backend None; choose from x86, arm, tensorrt"),
        (
            {"backend": "arm", "reduce_range": True},
            "reduce_range is for x86 CPUs without VNNI; it does not apply to arm",
        ),
        (
            {"backend": "tensorrt", "reduce_range": True},
            "reduce_range is for x86 CPUs without VNNI; it does not apply to tensorrt",
        ),
        (
            {"backend": "tensorrt", "activation_scheme": "affine"},
            "backend tensorrt has no zero points: leave out activation_scheme affine",
        ),
        ({"bakend": "arm"}, "{method} has no option 'bakend' (did you mean backend?)"),
    ],
    ids=str,
)
def test_a_scheme_that_there_is_not_is_refused(method, options, message, model, loader):
    if method == "ptq_dynamic" and "activation_scheme" in options:
        message = "ptq_dynamic has no option 'activation_scheme'"
    with pytest.raises(QuantizationError) as refused:
        quantize(model, loader, method, **options)
    assert str(refused.value).startswith(message.format(method=method)) and "\n" not in str(refused.value)


# ----------------------------------------------------------------------------------------------------- files and speed


@pytest.mark.parametrize("bits", [8, 3])
@pytest.mark.parametrize("scheme", [{"backend": "arm"}, {"backend": "tensorrt"}, REDUCED], ids=str)
def test_the_file_holds_the_model(scheme, bits, model, loader):
    quantized = quantize(model, loader, bits=bits, **scheme)
    twin = attach(model, None, "ptq_static", bits, bits, Recipe(**scheme))
    twin.load_packed(quantized.packed_tensors())
    assert torch.equal(logits(quantized, loader), logits(twin, loader))
    state, other = quantized.state_dict(), twin.state_dict()
    assert set(state) == set(other) and all(torch.equal(state[key], other[key]) for key in state)
    for key, packed in quantized.packed_tensors().items():
        if key.endswith(".weight_packed"):
            layer = quantized.get_submodule(key.removesuffix(".weight_packed"))
            assert packed.numel() == -(-layer.weight_integer.numel() * bits // 8)


@pytest.mark.parametrize("backend", ["arm", "tensorrt"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_fast_pass_is_the_plain_one(bits, backend, model, loader):
    quantized = quantize(model, loader, bits=8, activation_bits=bits, backend=backend)
    x = loader[0]["image"]
    with torch.no_grad():
        plain, fast = quantized.network(x.clone()), quantized(x.clone())
    assert quantized._plan is not None and torch.equal(plain, fast)


@pytest.mark.parametrize("zero_point", [-8.0, -5.0, 0.0, 4.0, 7.0])
@pytest.mark.parametrize("scale", [0.05, 0.3, 0.731, 2.0])
@pytest.mark.parametrize("high", [None, 6.0])
def test_clipping_before_is_clipping_signed_integers(zero_point, scale, high):
    """Around every tie and bound of a signed 4-bit range, for ranges that hold less and more than the ReLU does."""
    quantizer = ActivationQuantizer("q", 4, is_signed=True)
    quantizer.set_parameters(torch.tensor(scale), torch.tensor(zero_point))
    ties = (torch.arange(-40, 41) / 2) * scale
    x = torch.cat([ties, ties.nextafter(torch.tensor(9e9)), ties.nextafter(torch.tensor(-9e9)),
                   torch.tensor([-1e9, -0.0, 0.0, 5.999, 6.0, 6.001, 1e9])])  # fmt: skip
    assert torch.equal(FastQuantizer(quantizer, None, None, False)(x), quantizer(x))
    expected = quantizer(x.relu() if high is None else F.relu6(x))
    assert torch.equal(FastQuantizer(quantizer, 0.0, high, False)(x), expected)
