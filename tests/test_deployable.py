"""The graph that engines run computes what the simulation does, to the bit; and a small network for all tests of
deployment."""

import functools
import itertools
import operator
from collections.abc import Sequence

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from models import MODELS, build_model
from quantizers import ptq
from quantizers.deployable import DecomposedWriter, IntegerLayer, StaticPair, deployable, integer_layers
from quantizers.graph import is_rectifier
from quantizers.modules import QuantizedModel
from quantizers.numerics import FLOAT_BITS, HALF_BITS, QuantizationError
from quantizers.ptq import Recipe

CLASSES, SIZE = 4, 16
MINMAX = {"observer": "minmax", "weight_observer": "minmax"}
CONVOLUTIONAL = {"resnet50": 53, "mobilenet_v2": 52, "squeezenet1_1": 26}  # -> convolutions


class Small(nn.Module):
    """For 16-pixel images: rectifiers of both kinds, a concatenation, a pooling, a depthwise convolution, a residual
    addition and an average; eight layers and nine activations with a quantizer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, 2, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU6())
        self.left, self.right = nn.Conv2d(12, 8, 1), nn.Conv2d(12, 8, 3, padding=1)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.expand = nn.Sequential(nn.Conv2d(16, 24, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU6())
        self.depthwise = nn.Sequential(nn.Conv2d(24, 24, 3, 1, 1, groups=24), nn.BatchNorm2d(24), nn.ReLU6())
        self.project = nn.Sequential(nn.Conv2d(24, 16, 1, bias=False), nn.BatchNorm2d(16))
        self.last, self.head = nn.Conv2d(16, 16, 1), nn.Linear(16, CLASSES)

    def forward(self, x):
        x = self.stem(x)
        x = self.pool(torch.cat([F.relu(self.left(x)), self.right(x).relu()], 1))
        x = x + self.project(self.depthwise(self.expand(x)))
        return self.head(F.relu(self.last(x)).mean((2, 3)))


def pictures(n: int, seed: int = 0, size: int = SIZE) -> tuple[torch.Tensor, torch.Tensor]:
    """(images, labels): each class has a coarse pattern, and each image noise of its own."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(CLASSES, 3, 4, 4, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(0, CLASSES, (n,), generator=generator)
    coarse = 0.7 * patterns[labels] + torch.randn(n, 3, 4, 4, generator=generator)
    images = F.interpolate(coarse, size=(size, size), mode="bilinear")
    return images + 0.2 * torch.randn(n, 3, size, size, generator=generator), labels


@functools.cache
def trained() -> nn.Module:
    """A Small that tells the classes apart. Shared: not to be changed."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Small()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    torch.set_num_threads(1)  # so small a network is no faster on more, and so it is the same one everywhere
    for step in range(60):
        images, labels = pictures(64, step + 1)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    torch.set_num_threads(threads)
    return model.eval()


def with_widths(
    model: nn.Module, images: torch.Tensor, weight_bits: Sequence[int], activation_bits: Sequence[int], **recipe
) -> QuantizedModel:
    """Quantized; the widths go round over its layers and its activations."""
    recipe = Recipe(**MINMAX | recipe)
    quantized = ptq.attach(model, None, "ptq_static", 8, 8, recipe)
    statistics = ptq.observe_activations(quantized, images, recipe)
    return set_widths(quantized, statistics, images, recipe, weight_bits, activation_bits)


def set_widths(quantized, statistics, images, recipe, weight_bits, activation_bits) -> QuantizedModel:
    for modules, widths in (
        (quantized.layers(), weight_bits),
        (quantized.activation_quantizers(), activation_bits),
    ):
        for module, bits in zip(modules.values(), itertools.cycle(widths), strict=False):
            module.set_bits(bits)
    ptq.quantize(quantized, statistics, images, recipe)
    return quantized


class ByHand:
    """Quantize / dequantize as the definition says, through the integer type that is stored."""

    def pair(self, x: torch.Tensor, quantizer: StaticPair) -> torch.Tensor:
        info = torch.iinfo(quantizer.dtype)
        zero_point = float(quantizer.zero_point)
        integer = (torch.round(x / quantizer.scale) + zero_point).clamp(info.min, info.max).to(quantizer.dtype).float()
        if quantizer.bounds is not None:
            integer = integer.clamp(float(quantizer.low), float(quantizer.high))
        return (integer - zero_point) * quantizer.scale

    def dynamic_pair(self, x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, is_signed: bool):
        result = []
        for image, s, z in zip(x, scale, zero_point, strict=True):
            low, high = (-128, 127) if is_signed else (0, 255)
            result.append((((image / s).round() + z).clamp(low, high) - z) * s)
        return torch.stack(result)

    def weight(self, layer: IntegerLayer) -> torch.Tensor:
        if layer.is_per_tensor:
            return layer.weight_integer.float() * layer.weight_scale
        channels = layer.weight_integer.float().unbind(layer.axis)
        return torch.stack([w * s for w, s in zip(channels, layer.weight_scale, strict=True)], layer.axis)


def both(quantized: QuantizedModel, x: torch.Tensor, writer=None) -> tuple[torch.Tensor, torch.Tensor]:
    """(the simulation, the deployable network)"""
    network = deployable(quantized, writer or ByHand())
    with torch.no_grad():
        return quantized.network(x.clone()), network(x.clone())


def rectifiers(network: fx.GraphModule) -> list[fx.Node]:
    modules = dict(network.named_modules())
    return [node for node in network.graph.nodes if is_rectifier(node, modules)]


# ------------------------------------------------------------------------------------------------------ to the bit


WIDTHS = {
    "W8A8": ([8], [8]),
    "W4A4": ([4], [4]),
    "W3A5": ([3], [5]),
    "mixed": ([2, 16, 5, 8, 32, 4], [16, 8, 3, 16, 6, 32, 2]),
}


@functools.cache
def calibrated(name: str):
    """A network of the study with statistics for every width, and the images they are of."""
    recipe = Recipe(**MINMAX)
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(8, 3, 32, 32, generator=generator)
    model = build_model(name, 3, 32, seed=3)
    with torch.no_grad():
        for _ in range(2):
            model(images)
    quantized = ptq.attach(model.eval(), None, "ptq_static", 8, 8, recipe)
    return quantized, ptq.observe_activations(quantized, images, recipe), images, recipe


@pytest.mark.parametrize("name", MODELS)
def test_it_computes_what_the_simulation_does(name):
    for label, widths in WIDTHS.items():
        quantized = set_widths(*calibrated(name), *widths)
        simulated, deployed = both(quantized, calibrated(name)[2][:3])
        assert torch.equal(simulated, deployed), label
        assert len(simulated.unique()) > 1


@pytest.mark.parametrize("backend", ["x86", "arm", "tensorrt"])
@pytest.mark.parametrize("widths", [*WIDTHS.values(), (range(2, 9), range(2, 9)), ([8], [2])], ids=str)
def test_under_every_backend(widths, backend):
    x, _ = pictures(64)
    quantized = with_widths(trained(), x, *widths, backend=backend)
    assert torch.equal(*both(quantized, x))


@pytest.mark.parametrize("backend", ["x86", "arm", "tensorrt"])
def test_dynamic_quantization(backend):
    x, _ = pictures(16)
    assert torch.equal(*both(ptq.ptq_dynamic(trained(), weight_bits=3, activation_bits=8, backend=backend), x))


class Odd(nn.Module):
    """A reflected border, a transposed convolution, "same" padding, a layer without a bias, and code that cannot be
    traced."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(3, 6, 3, 2, 1, padding_mode="reflect", bias=False)
        self.two = nn.ConvTranspose2d(6, 4, 2, 2)
        self.three = nn.Conv2d(4, 4, (1, 3), padding="same")
        self.opaque, self.head = Opaque(), nn.Linear(4, 2, bias=False)

    def forward(self, x):
        x = self.two(self.one(x).relu())
        return self.head(self.opaque(x + self.three(x)).mean((2, 3)))


class Opaque(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.inner(x) if bool(x.sum() > -1e9) else x


@pytest.mark.filterwarnings("ignore:opaque cannot be traced")
@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_layers_of_every_kind(granularity):
    torch.manual_seed(0)
    x, _ = pictures(16)
    quantized = with_widths(Odd().eval(), x, [4, 8, 3], [8, 5], weight_granularity=granularity)
    assert len(quantized.layers()) == 5
    assert torch.equal(*both(quantized, x))


# ------------------------------------------------------------------------------------------------- where quantizers go


@pytest.mark.parametrize("widths", [WIDTHS["W8A8"], WIDTHS["W4A4"]], ids=str)
@pytest.mark.parametrize(("name", "convolutions"), CONVOLUTIONAL.items())
def test_everything_between_image_and_classifier_is_between_quantizers(name, convolutions, widths):
    """No rectifier is left; every convolution, sum, concatenation, pooling and average reads quantized values, and a
    quantizer alone reads every convolution: what an engine needs to run them on integers."""
    network = deployable(set_widths(*calibrated(name), *widths), ByHand())
    modules = dict(network.named_modules())

    def is_pair(node: fx.Node) -> bool:
        return node.op == "call_module" and isinstance(modules[node.target], StaticPair)

    assert rectifiers(network) == []
    found = 0
    for node in network.graph.nodes:
        module = modules.get(node.target) if node.op == "call_module" else None
        is_convolution = isinstance(module, IntegerLayer) and module.weight_integer.ndim == 4
        found += is_convolution
        if is_convolution:
            assert node.users and all(is_pair(user) for user in node.users), node
        moves = isinstance(module, (nn.MaxPool2d, nn.AdaptiveAvgPool2d)) or node.target in (torch.cat, operator.add)
        if moves or isinstance(module, IntegerLayer) or node.target == F.adaptive_avg_pool2d:
            assert all(is_pair(source) for source in node.all_input_nodes), node
    assert found == convolutions
    assert len(integer_layers(network)) == convolutions + (name != "squeezenet1_1")  # whose classifier is a convolution


class Rectified(nn.Module):
    """Shows the quantizer behind a rectifier: layers and quantizers beside it change nothing."""

    def __init__(self, rectifier):
        super().__init__()
        self.first, self.rectifier, self.second = nn.Conv2d(1, 1, 1), rectifier, nn.Conv2d(1, 1, 1)
        for layer in (self.first, self.second):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x):
        return self.second(self.rectifier(self.first(x)))


RECTIFIERS = {
    "nn.ReLU": nn.ReLU(),
    "nn.ReLU6": nn.ReLU6(),
    "nn.ReLU6(inplace)": nn.ReLU6(inplace=True),
    "F.relu": F.relu,
    "F.relu6": F.relu6,
    "method": lambda x: x.relu(),
    "both": nn.Sequential(nn.ReLU(), nn.ReLU6()),
}
# scales at which 6 is the last level of 8 bits, half a level before it (a tie) and behind it, far inside and outside
SCALES = [6 / 255, 6 / 254.4, 6 / 254.5, 6 / 254.6, 6 / 15, 6 / 14.4, 0.01, 0.1, 1.0]


@pytest.mark.parametrize("backend", ["x86", "arm", "tensorrt"])
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("rectifier", RECTIFIERS.values(), ids=RECTIFIERS)
def test_a_rectifier_is_dropped_exactly_where_the_quantizer_implies_it(rectifier, bits, backend):
    quantized = ptq.attach(Rectified(rectifier), None, "ptq_static", FLOAT_BITS, bits, Recipe(backend=backend))
    ptq.quantize_weights(quantized, Recipe())
    (first, quantizer) = quantized.activation_quantizers().values()
    first.set_bits(FLOAT_BITS)
    qmin, qmax = quantizer.bounds()
    for scale, shift in itertools.product(SCALES, (0, 1)):
        zero_point = 0 if backend == "tensorrt" else qmin + shift
        quantizer.set_parameters(torch.tensor(scale), torch.tensor(float(zero_point)))
        ends = torch.tensor([6.0, (qmax - zero_point) * scale, (qmin - zero_point) * scale])
        near = torch.cat([ends + step * scale / 2 for step in range(-3, 4)])
        x = torch.cat([torch.linspace(-9, 9, 301), near, torch.tensor([-1e6, 1e6])]).reshape(1, 1, 1, -1)
        network = deployable(quantized, ByHand())
        with torch.no_grad():
            expected = quantizer(rectifier(x.clone()))
            assert torch.equal(network(x.clone()), expected), (scale, zero_point)
            is_implied = torch.equal(quantizer(x.clone()), expected)
        assert (rectifiers(network) == []) is is_implied, (scale, zero_point)


class ByKeyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.three(F.relu(inplace=True, input=self.two(self.relu(input=self.one(x))))).mean((2, 3))


@pytest.mark.parametrize("widths", [WIDTHS["W8A8"], WIDTHS["W4A4"]], ids=str)
def test_rectifiers_called_by_keyword_are_dropped_too(widths):
    torch.manual_seed(0)
    x, _ = pictures(16)
    quantized = with_widths(ByKeyword().eval(), x, *widths)
    assert torch.equal(*both(quantized, x))
    assert rectifiers(deployable(quantized, ByHand())) == []


class Branching(nn.Module):
    """What a rectifier reads or gives has another reader; a pooling of a concatenation of poolings."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three, self.four = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))
        self.pool, self.head = nn.MaxPool2d(2), nn.Conv2d(9, 2, 1)

    def forward(self, x):
        one, two = self.one(x), self.two(x)
        rectified = two.relu()
        three = self.pool(F.relu(self.three(F.relu(one))))
        four = F.max_pool2d(self.four(rectified).relu(), 2)
        joined = F.max_pool2d(torch.cat([three, torch.cat([four, self.pool(rectified)], 1)], 1), 2)
        return self.head(joined).mean((2, 3)) + one.sigmoid().mean() + rectified.tanh().mean()


@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
def test_what_others_read_too_stays(widths):
    torch.manual_seed(0)
    x, _ = pictures(16)
    quantized = with_widths(Branching().eval(), x, *widths)
    assert torch.equal(*both(quantized, x))


def test_a_quantizer_is_repeated_through_every_concatenation_and_pooling():
    torch.manual_seed(0)
    x, _ = pictures(16)
    network = deployable(with_widths(Branching().eval(), x, [8], [4]), ByHand())
    modules = dict(network.named_modules())
    for name in ("three", "four"):
        (call,) = (node for node in network.graph.nodes if node.target == name)
        (pair,) = call.users
        assert isinstance(modules[pair.target], StaticPair) and modules[pair.target].bounds == (0, 15)
    (call,) = (node for node in network.graph.nodes if node.target == "head")
    assert modules[call.args[0].target].bounds is None  # on the grid already: nothing to clip
    (left,) = rectifiers(network)  # the one that others read too
    assert left.args[0].target == "two" and len(left.users) == 3


# -------------------------------------------------------------------------------------------------------- what it holds


def test_integers_go_into_the_next_wider_type():
    x, _ = pictures(64)
    for backend, types in (
        ("x86", (torch.uint8, torch.uint16)),
        ("arm", (torch.int8, torch.int16)),
        ("tensorrt", (torch.int8, torch.int16)),
    ):
        quantized = with_widths(trained(), x, [8], [*range(2, 9), HALF_BITS], backend=backend)
        pairs = {
            path: module
            for path, module in deployable(quantized, ByHand()).named_modules()
            if isinstance(module, StaticPair) and not path.endswith("_repeated")
        }
        assert len(pairs) == 9
        for path, pair in pairs.items():
            quantizer = quantized.network.get_submodule(path)
            assert pair.dtype == pair.zero_point.dtype == types[quantizer.bits > 8]
            assert pair.bounds == (None if quantizer.bits in (8, 16) else quantizer.bounds())
            assert pair.numbers == (float(quantizer.scale), int(quantizer.zero_point))


def test_the_model_is_not_changed():
    x, _ = pictures(64)
    quantized = with_widths(trained(), x, [4], [4])
    state = {name: tensor.clone() for name, tensor in quantized.state_dict().items()}
    graph, modules = str(quantized.network.graph), list(quantized.named_modules())
    code = quantized.network.code
    network = deployable(quantized, ByHand())
    assert str(network.graph) != graph
    assert str(quantized.network.graph) == graph and quantized.network.code == code
    assert list(quantized.named_modules()) == modules
    after = quantized.state_dict()
    assert set(after) == set(state) and all(torch.equal(after[name], tensor) for name, tensor in state.items())
    with torch.no_grad():
        for tensor in network.state_dict().values():
            tensor.zero_()  # and they share no memory
    assert all(torch.equal(quantized.state_dict()[name], tensor) for name, tensor in state.items())


def test_what_is_not_quantized_yet_is_refused():
    quantized = ptq.attach(trained(), None, "ptq_static", 8, 8, Recipe())
    with pytest.raises(QuantizationError, match=r"stem\.0: its weights are not quantized yet"):
        deployable(quantized, ByHand())
    ptq.quantize_weights(quantized, Recipe())
    with pytest.raises(QuantizationError, match="x: used before calibration"):
        deployable(quantized, ByHand())


def test_dynamic_quantization_of_fewer_bits_is_refused():
    quantized = ptq.ptq_dynamic(trained(), weight_bits=4, activation_bits=4)
    with pytest.raises(QuantizationError, match="8-bit activations, not 4; quantize with activation_bits=8"):
        deployable(quantized, ByHand())


@pytest.mark.parametrize("backend", ["x86", "arm"])
@pytest.mark.parametrize("widths", [([8], [8]), ([2, 5], [3, 6]), ([4, 16, 32], [16, 8, 4])], ids=str)
def test_pytorch_operators_mean_the_same(widths, backend):
    """They multiply by 1 / scale where the simulation divides: of thousands of values one is rounded the other way."""
    pytest.importorskip("torchao")
    x, _ = pictures(64)
    for granularity in ("per_channel", "per_tensor"):
        quantized = with_widths(trained(), x, *widths, backend=backend, weight_granularity=granularity)
        simulated, deployed = both(quantized, x, DecomposedWriter())
        is_same = torch.isclose(simulated, deployed, rtol=1e-4, atol=1e-4).all(dim=1).float().mean()
        assert is_same >= 0.9
        assert (simulated - deployed).abs().max() <= 0.2 * simulated.std()
    dynamic = ptq.ptq_dynamic(trained(), weight_bits=4, activation_bits=8, backend=backend)
    assert torch.allclose(*both(dynamic, x, DecomposedWriter()), atol=1e-4)
