"""Learned rounding: up or down and nothing else, nearer to the float network, the same each time, and undone where it
does not help."""

import itertools

import pytest
import torch
from torch import nn

from models import MODELS, build_model
from quantizers import ptq, reconstruction
from quantizers.execution import segments
from quantizers.modules import QuantizedModel
from quantizers.numerics import QuantizationError, along, quantize_weight
from quantizers.reconstruction import SoftLayer, reconstruct


def images(n: int = 32, size: int = 16) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(7))


class Residual(nn.Module):
    """A stem, a residual block with a depthwise layer, two layers one after the other, a classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.one = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.ReLU(), nn.Conv2d(16, 16, 1))
        self.two = nn.Sequential(nn.Conv2d(16, 24, 3, stride=2), nn.ReLU6(), nn.Conv2d(24, 16, 1), nn.ReLU())
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.one(x))
        return self.head(self.two(x).mean((2, 3)))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Residual().eval()


def attached(model: nn.Module, x: torch.Tensor, weight_bits: int = 3, activation_bits: int = 8) -> QuantizedModel:
    quantized = ptq.attach(model, x, "ptq_static", weight_bits, activation_bits, ptq.Recipe())
    ptq.quantize(quantized, ptq.observe_activations(quantized, x, ptq.Recipe()), x, ptq.Recipe())
    return quantized


def off(model: nn.Module, quantized: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        return float((model(x) - quantized(x)).pow(2).mean())


@pytest.mark.parametrize("unit", ["block", "layer"])
def test_every_weight_goes_up_or_down_and_the_output_comes_nearer(model, unit):
    x, unseen = images(64), images(200)[64:]
    quantized = attached(model, x)
    nearest = {name: layer.weight_integer.clone() for name, layer in quantized.layers().items()}
    before = off(model, quantized, unseen)
    report = reconstruct(quantized, x, unit=unit, iterations=200)
    assert off(model, quantized, unseen) < 0.6 * before
    changed = 0
    for name, layer in quantized.layers().items():
        steps = layer.float_weight / along(layer.weight_scale, layer.axis, layer.float_weight.ndim)
        assert bool(((layer.weight_integer >= steps.floor()) | (layer.weight_integer == 3)).all())
        assert bool(((layer.weight_integer <= steps.ceil()) | (layer.weight_integer == -4)).all())
        assert torch.equal(layer.layer.weight, layer.weight_integer * along(layer.weight_scale, 0, steps.ndim))
        changed += int((layer.weight_integer != nearest[name]).sum())
    assert changed > 50
    table = report.table()
    assert (table["error_learned"] <= table["error_nearest"]).all()
    assert sorted(" ".join(table["layers"]).split()) == sorted(quantized.layers())
    assert len(table) == {"block": 3, "layer": 6}[unit]


def test_the_errors_are_those_of_the_pieces(model):
    """The last piece's error is that of the network's output, each image's as a share of its energy."""
    x = images(40)
    quantized = attached(model, x)
    report = reconstruct(quantized, x, iterations=30)
    with torch.no_grad():
        share = float(((quantized(x) - model(x)).pow(2).mean(1) / model(x).pow(2).mean(1)).mean())
    assert report.pieces[-1]["error_learned"] == pytest.approx(share, rel=1e-4)
    assert report.images == 40


@pytest.mark.parametrize("name", MODELS)
def test_blocks_hold_every_layer_once(name):
    quantized = ptq.attach(build_model(name, 3, 32, seed=3).eval(), images(2, 32), "x", 4, 8, ptq.Recipe())
    for pieces in (reconstruction._blocks(quantized), reconstruction._layers(quantized)):
        layers = [layer for piece in pieces for layer in piece.layers]
        assert sorted(layers) == sorted(quantized.layers())
    blocks, single = reconstruction._blocks(quantized), segments(quantized)
    assert len(blocks) <= len(single) and blocks[0].source is single[0].source
    assert all(first.result is second.source for first, second in itertools.pairwise(blocks))


def test_it_works_on_a_network_of_attention_blocks():
    x = images(8, 32)
    vit = build_model("vit_small_patch16_224", 3, 32, seed=3).eval()
    vit.blocks = vit.blocks[:3]  # of twelve that are alike
    quantized = attached(vit, x)
    before = off(vit, quantized, x)
    report = reconstruct(quantized, x, iterations=8, batch_size=8)
    assert off(vit, quantized, x) < before
    assert len(report.pieces) >= 6  # attention and MLP of each


def test_the_same_seed_gives_the_same_model(model):
    def once(seed: int) -> torch.Tensor:
        quantized = attached(model, images())
        reconstruct(quantized, images(), iterations=20, seed=seed)
        return quantized(images())

    assert torch.equal(once(1), once(1)) and not torch.equal(once(1), once(2))


def test_what_does_not_help_is_undone(model):
    """With a learning rate that wrecks everything, every piece keeps its rounding to nearest."""
    x = images()
    quantized = attached(model, x)
    expected = quantized(x)
    report = reconstruct(quantized, x, iterations=3, learning_rate=1e4, scale_learning_rate=10.0)
    assert torch.equal(quantized(x), expected)
    assert all(piece["error_learned"] == piece["error_nearest"] for piece in report.pieces)


def test_activation_scales_are_learned_only_where_asked(model):
    x = images()
    for learn in (True, False):
        quantized = attached(model, x, 4, 3)
        before = {name: quantizer.scale.clone() for name, quantizer in quantized.activation_quantizers().items()}
        zero_points = {name: q.zero_point.clone() for name, q in quantized.activation_quantizers().items()}
        reconstruct(quantized, x, iterations=20, learn_activation_scales=learn)
        changed = [not torch.equal(before[name], q.scale) for name, q in quantized.activation_quantizers().items()]
        assert any(changed) == learn
        assert all(torch.equal(zero_points[n], q.zero_point) for n, q in quantized.activation_quantizers().items())


def test_layers_that_are_not_integers_stay_as_they_are(model):
    x = images()
    quantized = attached(model, x)
    for name, bits in (("head", 32), ("stem", 16)):
        quantized.layers()[name].set_bits(bits)
        quantized.layers()[name].quantize_weights(ptq.Recipe().weight_scales().scales)
    report = reconstruct(quantized, x, iterations=5)
    assert torch.equal(quantized.layers()["head"].layer.weight, model.head.weight)
    assert torch.equal(quantized.layers()["stem"].layer.weight, model.stem.weight.half().float())
    assert {"head", "stem"}.isdisjoint(" ".join(piece["layers"] for piece in report.pieces).split())


def test_a_soft_layer_starts_at_the_float_weights_and_ends_on_the_grid(model):
    quantized = attached(model, images(), 8, 8)
    layer = quantized.layers()["two.0"]
    soft, x = SoftLayer(layer), torch.randn(2, 16, 8, 8)
    expected = nn.functional.conv2d(x, layer.float_weight, model.two[0].bias, stride=2)
    torch.testing.assert_close(soft(x), expected, rtol=1e-3, atol=1e-3)
    assert soft.undecided(2.0).item() > 0
    soft.freeze()
    nearest = quantize_weight(layer.float_weight, layer.weight_scale, 8, 0)
    differ = layer.weight_integer != nearest
    steps = layer.float_weight / along(layer.weight_scale, 0, 4)
    assert bool(((steps - steps.floor())[differ] - 0.5).abs().lt(1e-4).all())  # halfway between two integers
    with torch.no_grad():
        soft.up.copy_(torch.where(soft.up > 0, 50.0, -50.0))
    soft(x)
    assert soft.undecided(2.0).item() == 0


def test_memory_bounds_the_number_of_images(model):
    quantized = attached(model, images())
    assert reconstruct(quantized, images(), iterations=1, memory_bytes=600_000).images < 32
    assert reconstruct(quantized, images(), iterations=1, memory_bytes=1).images == 1


def test_interrupted_it_leaves_a_model_that_runs(model):
    x = images()
    quantized = attached(model, x)
    kinds = [type(module) for module in quantized.modules()]
    said = []

    def stop(line: str, share: float) -> None:
        said.append((line, share))
        if len(said) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reconstruct(quantized, x, iterations=5, progress=stop)
    assert [type(module) for module in quantized.modules()] == kinds
    assert said[0] == ("reconstructing stem", 0.0) and said[2][1] > said[1][1]
    assert bool(torch.isfinite(quantized(x)).all())


def test_an_unknown_unit_is_refused(model):
    with pytest.raises(QuantizationError, match="unknown reconstruction unit 'network'; choose from block, layer"):
        reconstruct(attached(model, images()), images(), unit="network")
