"""Cross-layer equalization: the same function, equal ranges, found from the graph, and nothing touched where it cannot
be exact."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models import MODELS, build_model
from quantizers import graph
from quantizers.equalization import ChannelClip, equalize, equalizing_scale
from quantizers.numerics import QuantizationError
from quantizers.ptq import ptq_static


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def images(n: int = 8, size: int = 32) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(7))


def traced(model: nn.Module):
    network, placement = graph.trace(model.eval())
    graph.fold_batch_norms(network, placement)
    return network


def uneven(model: nn.Module) -> nn.Module:
    """Gains and biases of every norm drawn over an order of magnitude, statistics to match, as in trained networks."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
            with torch.no_grad():
                module.weight.copy_(torch.exp(torch.randn(module.weight.shape, generator=generator)))
                module.bias.copy_(torch.randn(module.bias.shape, generator=generator))
                module.momentum = None  # of a BatchNorm: the mean over what follows
    with torch.no_grad():
        model.train()(images(16))
    return model.eval()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / a.abs().max())


def per_channel(weight: torch.Tensor, axis: int) -> torch.Tensor:
    return weight.detach().abs().movedim(axis, 0).flatten(1).amax(dim=1)


# ------------------------------------------------------------------------------------------------------- the function


@pytest.mark.parametrize("with_sample", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_computes_the_same(name, with_sample):
    x = images().double()
    network = traced(uneven(build_model(name, 5, 32, seed=3)).double())  # so that no rounding hides what is not exact
    with torch.no_grad():
        expected = network(x)
        rounding = relative(expected, copy.deepcopy(network).float()(x.float()))  # float32's own
        found = equalize(network, x[:2] if with_sample else None)
        assert relative(expected, network(x)) < 1e-9
        assert relative(expected, network.float()(x.float())) < max(1e-4, 2 * rounding)
    # nearly all of EfficientNet's channels pass a SiLU
    least = {"vit_small_patch16_224": 12, "squeezenet1_1": 8, "efficientnet_b0": 2}.get(name, 15)
    assert len(found) >= least
    assert any(entry.largest_scale > 1.2 for entry in found)


def test_ranges_are_equal_afterwards():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 1))
    with torch.no_grad():
        model[0].weight.mul_(torch.logspace(-1, 1, 16).view(-1, 1, 1, 1))
    network = traced(model)
    (found,) = equalize(network)
    assert (found.producer, found.consumers, found.through) == ("0", ("2",), ("ReLU",))
    made, read = per_channel(network.get_submodule("0").weight, 0), per_channel(network.get_submodule("2").weight, 1)
    torch.testing.assert_close(made, read, rtol=1e-4, atol=0)


def test_the_scale_is_equation_11():
    made, read = torch.tensor([4.0, 1.0]), torch.tensor([1.0, 4.0])
    torch.testing.assert_close(equalizing_scale(made, read), torch.tensor([2.0, 0.5]))  # sqrt(r1 r2) / r2


def test_a_depthwise_chain_of_three_is_equalized_to_the_end():
    model = nn.Sequential(
        nn.Conv2d(3, 12, 1), nn.ReLU(), nn.Conv2d(12, 12, 3, groups=12, padding=1), nn.ReLU(), nn.Conv2d(12, 6, 1)
    )
    with torch.no_grad():
        for place in (0, 2):
            model[place].weight.mul_(torch.exp(torch.randn(12)).view(-1, 1, 1, 1))
    network, x = traced(model), images()
    expected = network(x)
    equalize(network)
    assert relative(expected, network(x)) < 1e-5
    one, two, three = (network.get_submodule(name).weight for name in ("0", "2", "4"))
    torch.testing.assert_close(per_channel(one, 0), per_channel(two, 0), rtol=1e-2, atol=0)
    torch.testing.assert_close(per_channel(two, 0), per_channel(three, 1), rtol=1e-2, atol=0)


def test_equalizing_twice_changes_nothing():
    network = traced(uneven(build_model("mobilenet_v2", 5, 32, seed=3)))
    equalize(network)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    again = equalize(network)
    assert all(entry.smallest_scale > 0.98 and entry.largest_scale < 1.02 for entry in again)
    for key, value in network.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0.03, atol=1e-6)


# --------------------------------------------------------------------------------------------------- what is on the way


def test_relu6_clips_each_channel_at_its_own_bound():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.Conv2d(8, 4, 1))
    with torch.no_grad():
        model[0].weight.mul_(torch.logspace(0, 2, 8).view(-1, 1, 1, 1))
    network, x = traced(model), images()
    expected = network(x)
    (found,) = equalize(network)
    (clip,) = (module for module in network.modules() if isinstance(module, ChannelClip))
    assert clip.bound.shape == (8, 1, 1)
    assert float(clip.bound.max()) == pytest.approx(6 / found.smallest_scale, rel=1e-5)
    assert bool((F.relu6(model[0](x)) == 6).any())  # it does clip
    assert relative(expected, network(x)) < 1e-5


class Branches(nn.Module):
    """One set with two readers, and a concatenation with a reader of two sets."""

    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 1), nn.Conv2d(8, 4, 1)
        self.both = nn.Conv2d(10, 5, 1)

    def forward(self, x):
        x = F.relu(self.stem(x))
        return self.both(torch.cat([F.relu(self.left(x)), F.relu(self.right(x))], dim=1))


def test_several_readers_and_concatenations():
    network, x = traced(Branches()), images()
    with torch.no_grad():
        network.get_submodule("stem").weight.mul_(torch.exp(2 * torch.randn(8)).view(-1, 1, 1, 1))
        network.get_submodule("right").weight.mul_(torch.exp(2 * torch.randn(4)).view(-1, 1, 1, 1))
    expected = network(x)
    found = {entry.producer: entry for entry in equalize(network)}
    assert set(found) == {"stem", "left", "right"} and set(found["stem"].consumers) == {"left", "right"}
    assert found["right"].consumers == ("both",)
    assert relative(expected, network(x)) < 1e-5
    readers = torch.maximum(*(per_channel(network.get_submodule(name).weight, 1) for name in ("left", "right")))
    torch.testing.assert_close(per_channel(network.get_submodule("stem").weight, 0), readers, rtol=1e-2, atol=0)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.one, self.two, self.head = (
            nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, 2)
        )  # fmt: skip

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = x + self.two(F.relu(self.one(x)))
        return self.head(F.silu(x).mean((2, 3)))


def test_what_additions_and_other_functions_read_is_left_as_it_is():
    network = traced(Residual())
    stem, two = network.get_submodule("stem").weight.clone(), network.get_submodule("two").weight.clone()
    (found,) = equalize(network)
    assert (found.producer, found.consumers) == ("one", ("two",))
    assert torch.equal(network.get_submodule("stem").weight, stem)
    assert not torch.equal(network.get_submodule("two").weight, two)


def test_shared_and_hooked_layers_are_left_as_they_are():
    def chain() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1))

    assert len(equalize(traced(chain()))) == 2
    twice = chain()
    twice.append(nn.Conv2d(2, 3, 1)).append(twice[0])  # the first layer runs again at the end
    assert "0" not in {entry.producer for entry in equalize(traced(twice))}
    tied = chain()
    tied[2].weight = nn.Parameter(torch.randn(8, 8, 1, 1))
    tied.append(nn.ReLU()).append(nn.Conv2d(2, 8, 1)).append(nn.ReLU()).append(nn.Conv2d(8, 8, 1))
    tied[8].weight = tied[2].weight
    touched = {name for entry in equalize(traced(tied)) for name in (entry.producer, *entry.consumers)}
    assert {"2", "8"}.isdisjoint(touched)
    hooked = chain()
    hooked[2].register_forward_hook(lambda module, inputs, output: output)
    assert "2" not in {n for entry in equalize(traced(hooked)) for n in (entry.producer, *entry.consumers)}


def test_dead_channels_stay_finite():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1))
    with torch.no_grad():
        model[0].weight[0], model[2].weight[:, 1] = 0, 0
    network, x = traced(model), images()
    expected = network(x)
    (found,) = equalize(network)
    assert relative(expected, network(x)) < 1e-5 and found.largest_scale < 1e3
    assert bool((network.get_submodule("0").weight[0] == 0).all())


def test_norms_only_where_asked():
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 4))
    with torch.no_grad():
        model[1].weight.copy_(torch.logspace(-1, 1, 6))
    assert [entry.producer for entry in equalize(traced(model))] == ["1"]
    assert equalize(traced(model), with_norms=False) == []


def test_a_sample_that_does_not_fit_is_refused():
    with pytest.raises(QuantizationError, match=r"\S"):
        equalize(traced(Branches()), torch.randn(2, 7, 16, 16))


# ----------------------------------------------------------------------------------------------------- what it is for


def test_it_recovers_what_per_tensor_weights_lose():
    """The paper's case: per-tensor weights whose channels differ by orders of magnitude."""
    model, x = build_model("mobilenet_v2", 5, 32, seed=3), images(32)
    with torch.no_grad():
        for _ in range(3):
            model(x)
        for block in model.features[1:-1]:  # MobileNetV2's own: the depthwise layer's channels
            norms = [module for module in block.modules() if isinstance(module, nn.BatchNorm2d)]
            norms[0].weight.mul_(torch.exp(torch.randn_like(norms[0].weight)))
    model.eval()

    def off(**options) -> float:
        quantized = ptq_static(
            model, x, weight_bits=8, activation_bits=8, weight_granularity="per_tensor",
            weight_observer="minmax", observer="minmax", **options,
        )  # fmt: skip
        with torch.no_grad():
            return float((quantized(x) - model(x)).pow(2).mean())

    plain = off()
    assert off(equalize=True) < 0.6 * plain
    assert off(equalize=True, bias_correction=True) < 0.6 * plain


def test_the_callers_model_is_untouched():
    model = build_model("mobilenet_v2", 5, 32, seed=3).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    ptq_static(model, images(), weight_bits=8, activation_bits=8, equalize=True)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
