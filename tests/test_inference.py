"""The fast forward pass gives every bit of the plain one, and is taken only where nobody could tell."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models import MODELS, build_model
from quantizers import inference, ptq
from quantizers.modules import ActivationQuantizer, UncalibratedError
from quantizers.ptq import ptq_dynamic, ptq_static


def images(n: int = 4, size: int = 32) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(7))


class Small(nn.Module):
    """Every kind of place that the plan treats in its own way."""

    def __init__(self):
        super().__init__()
        self.stem, self.relu6 = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU6(inplace=True)
        self.one, self.two, self.three, self.four = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(4))
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.relu6(4 * self.stem(x))
        y = self.one(x)
        x = self.relu(x + self.two(F.relu(y)) * y.sigmoid())  # what the ReLU reads has another reader
        r = self.three(x).relu()
        x = self.four(r) * r.tanh()  # and here what it gives
        return self.head(x.mean((2, 3)))


@pytest.fixture
def small() -> nn.Module:
    torch.manual_seed(0)
    return Small().eval()


def both(quantized, x) -> tuple[torch.Tensor, torch.Tensor]:
    """(the plain pass, the fast one)"""
    with torch.no_grad():
        plain = quantized.network(x.clone())
        return plain, quantized(x.clone())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", MODELS)
def test_every_bit_is_the_same(name, memory_format):
    model = build_model(name, 3, 32, seed=3)
    with torch.no_grad():
        model(images(16))
    model = model.eval().to(memory_format=memory_format)
    x = images(4).to(memory_format=memory_format)
    quantized = ptq_static(model, x, weight_bits=4, activation_bits=4)
    plain, fast = both(quantized, x)
    assert quantized._plan is not None and torch.equal(plain, fast)


@pytest.mark.parametrize("scheme", ["affine", "symmetric"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_kind_of_place(small, scheme, bits):
    x = images(16)
    quantized = ptq_static(small, x, weight_bits=8, activation_bits=bits, activation_scheme=scheme)
    plain, fast = both(quantized, x)
    assert torch.equal(plain, fast)
    assert len(quantized._plan[0].bypassed) > len(quantized.activation_quantizers())  # ReLUs are among them


class ByKeyword(nn.Module):
    """Rectifiers that are called by keyword."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three, self.four = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))
        self.relu = nn.ReLU6()

    def forward(self, x):
        x = self.two(self.relu(input=self.one(x)))
        return self.four(F.relu6(inplace=False, input=self.three(F.relu(input=x)))).mean((2, 3))


@pytest.mark.parametrize("bits", [4, 8])
def test_rectifiers_called_by_keyword(bits):
    torch.manual_seed(0)
    quantized = ptq_static(ByKeyword().eval(), images(16), weight_bits=8, activation_bits=bits)
    plain, fast = both(quantized, images())
    assert torch.equal(plain, fast)
    assert len(quantized._plan[0].bypassed) == len(quantized.activation_quantizers()) + 1  # the module among them


@pytest.mark.parametrize("zero_point", [0.0, 3.0, 12.0])
@pytest.mark.parametrize("scale", [0.05, 0.3, 0.731, 2.0])
@pytest.mark.parametrize("high", [None, 6.0])
def test_clipping_before_is_clipping_the_integers(zero_point, scale, high):
    """Around every tie and bound, for ranges that hold less and more than the ReLU does."""
    quantizer = ActivationQuantizer("q", 4)
    quantizer.set_parameters(torch.tensor(scale), torch.tensor(zero_point))
    ties = (torch.arange(-40, 41) / 2) * scale
    x = torch.cat([ties, ties.nextafter(torch.tensor(9e9)), ties.nextafter(torch.tensor(-9e9)),
                   torch.tensor([-1e9, -0.0, 0.0, 5.999, 6.0, 6.001, 1e9])])  # fmt: skip
    expected = quantizer(x.relu() if high is None else F.relu6(x))
    assert torch.equal(inference.FastQuantizer(quantizer, 0.0, high, False)(x), expected)


def test_pieces_cover_the_tensor(monkeypatch, small):
    monkeypatch.setattr(inference, "CHUNK", 1000)
    x = images(3)
    plain, fast = both(ptq_static(small, x, weight_bits=8, activation_bits=4), x)
    assert torch.equal(plain, fast)


def test_tensors_with_gaps_are_quantized_too():
    quantizer = ActivationQuantizer("q", 4)
    quantizer.set_range(-1.0, 2.0)
    x = torch.randn(4, 6, 10)[:, ::2].transpose(1, 2)
    assert torch.equal(inference.FastQuantizer(quantizer, None, None, False)(x), quantizer(x))


def test_the_input_and_what_others_read_is_not_overwritten(small):
    x = images()
    before = x.clone()
    quantized = ptq_static(small, x, weight_bits=8, activation_bits=4)
    with torch.no_grad():
        assert torch.equal(quantized(x), quantized(x)) and torch.equal(x, before)


def test_changes_after_the_first_pass_are_followed(small):
    x = images()
    quantized = ptq_static(small, x, weight_bits=8, activation_bits=8)
    other = ptq_static(small, 3 * x, weight_bits=3, activation_bits=8)
    first = both(quantized, x)[1]
    quantizer = next(iter(quantized.activation_quantizers().values()))
    for change in (
        lambda: quantizer.set_range(-0.3, 0.2),
        lambda: quantizer.scale.mul_(1.5),
        lambda: next(iter(quantized.layers().values())).layer.weight.data.mul_(0.5),
        lambda: quantized.load_state_dict(other.state_dict()),
        lambda: (quantizer.set_bits(3), quantizer.set_range(-1.0, 1.0)),
        lambda: setattr(quantized.network, "relu", nn.Tanh()),
    ):
        change()
        plain, fast = both(quantized, x)
        assert torch.equal(plain, fast) and not torch.equal(fast, first)
        first = fast
    quantized.double().float()
    assert torch.equal(*both(quantized, x))
    quantizer.set_bits(4)
    with torch.no_grad(), pytest.raises(UncalibratedError):
        quantized(x)


def test_whoever_watches_sees_everything(small):
    x = images()
    quantized = ptq_static(small, x, weight_bits=8, activation_bits=4)
    both(quantized, x)
    seen = []
    watched = [*quantized.activation_quantizers().values(), *quantized.network.modules()]
    relus = [module for module in watched if isinstance(module, (nn.ReLU, nn.ReLU6, ActivationQuantizer))]
    for module in relus:
        hook = module.register_forward_hook(lambda module, inputs, output: seen.append(module))
        with torch.no_grad():
            quantized(x)
        hook.remove()
        assert seen and all(found is module for found in seen)
        seen.clear()
    names = []
    observers = {name: (lambda value, name=name: names.append(name)) for name in quantized.activation_quantizers()}
    with torch.no_grad(), quantized.observing(observers):
        quantized(x)
    assert set(names) == set(observers)
    hook = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: seen.append(module))
    with torch.no_grad():
        quantized(x)
    hook.remove()
    assert set(relus) <= set(seen)


def test_gradients_training_and_float_passes_are_plain(small):
    x = images()
    quantized = ptq_static(small, x, weight_bits=8, activation_bits=4)
    quantized._plan = None
    quantized(x)
    assert quantized._plan is None
    with torch.no_grad():
        quantized.train()(x)
        assert quantized._plan is None
        quantized.eval()(x)
        assert quantized._plan is not None
        with quantized.as_float():
            torch.testing.assert_close(quantized(x), quantized.network(x))


def test_the_plan_is_no_state(small):
    x = images()
    quantized = ptq_static(small, x, weight_bits=8, activation_bits=4)
    keys, names = list(quantized.state_dict()), [name for name, _ in quantized.named_modules()]
    fast = both(quantized, x)[1]
    assert list(quantized.state_dict()) == keys and [name for name, _ in quantized.named_modules()] == names
    twin = copy.deepcopy(quantized)
    next(iter(twin.activation_quantizers().values())).set_range(-0.1, 0.1)
    assert not torch.equal(both(twin, x)[1], fast) and torch.equal(both(quantized, x)[1], fast)
    assert torch.equal(*both(twin, x))
    again = pickle.loads(pickle.dumps(quantized))
    assert torch.equal(both(again, x)[1], fast)


def test_dynamic_models_and_layers_without_quantizers_run_too(small):
    x = images()
    dynamic = ptq_dynamic(small, x, weight_bits=8, activation_bits=4)
    assert torch.equal(*both(dynamic, x))
    recipe = ptq.Recipe()
    attached = ptq.attach(small, x, "ptq_static", 8, 8, recipe)
    for quantizer in attached.activation_quantizers().values():
        quantizer.set_bits(32)
    with torch.no_grad():
        torch.testing.assert_close(attached(x), small(x))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_gives_the_same(small):
    x = images().cuda()
    plain, fast = both(ptq_static(small.cuda(), x, weight_bits=4, activation_bits=4), x)
    assert torch.equal(plain, fast)
