"""Bias correction: channel means that are those of the float network, and nothing but biases changed."""

import pytest
import torch
from torch import nn

from quantizers import ptq
from quantizers.bias_correction import correct_biases
from quantizers.modules import QuantizedModel
from quantizers.ptq import ptq_static


def images(n: int = 32) -> torch.Tensor:
    return 0.5 + torch.randn(n, 3, 12, 12, generator=torch.Generator().manual_seed(7))


class Net(nn.Module):
    """With a bias and without, a residual addition, a transposed convolution, a linear layer on tokens."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, bias=False)
        self.body = nn.Conv2d(12, 12, 3, padding=1, groups=3)
        self.up = nn.ConvTranspose2d(12, 6, 2, stride=2)
        self.tokens, self.head = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu(self.up(torch.relu(x + self.body(x))))
        return self.head(torch.relu(self.tokens(x.flatten(2).transpose(1, 2))).mean(1))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def attached(model: nn.Module, weight_bits: int = 3) -> QuantizedModel:
    x = images()
    quantized = ptq.attach(model, x, "ptq_static", weight_bits, 8, ptq.Recipe())
    ptq.quantize(quantized, ptq.observe_activations(quantized, x, ptq.Recipe()), x, ptq.Recipe())
    return quantized


def means(model: nn.Module, modules: dict[str, nn.Module], x: torch.Tensor) -> dict[str, torch.Tensor]:
    found, hooks = {}, []
    for name, module in modules.items():

        def note(module, inputs, output, name=name):
            axis = output.ndim - 1 if name in ("tokens", "head") else 1
            found[name] = output.movedim(axis, 0).flatten(1).mean(1)

        hooks.append(module.register_forward_hook(note))
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return found


def test_channel_means_are_those_of_the_float_network(model):
    quantized, x = attached(model), images()
    expected = means(model, {name: model.get_submodule(name) for name in quantized.layers()}, x)
    before = means(quantized, quantized.layers(), x)
    assert correct_biases(quantized, x) == len(x)
    after = means(quantized, quantized.layers(), x)
    for name in expected:
        torch.testing.assert_close(after[name], expected[name], rtol=1e-3, atol=1e-4)
    assert max(float((before[name] - expected[name]).abs().max()) for name in expected) > 0.02


def test_only_biases_change(model):
    quantized = attached(model)
    before = {key: value.clone() for key, value in quantized.state_dict().items()}
    correct_biases(quantized, images())
    after = quantized.state_dict()
    changed = {key for key in after if key not in before or not torch.equal(before[key], after[key])}
    assert changed and all(key.endswith("layer.bias") for key in changed)
    assert "network.stem.layer.bias" in changed  # which had none


def test_a_bias_that_was_not_there_is_in_the_packed_file(model):
    x = images()
    options = {"weight_bits": 4, "activation_bits": 8, "bias_correction": True}
    quantized, other = ptq_static(model, x, **options), ptq_static(model, 2 * x, **options)
    plain = ptq_static(model, x, weight_bits=4, activation_bits=8)
    for target in (other, plain):
        target.load_packed(quantized.packed_tensors())
        torch.testing.assert_close(target(x), quantized(x))


def test_memory_bounds_the_number_of_images(model):
    assert correct_biases(attached(model), images(), memory_bytes=500_000) < 32
    assert correct_biases(attached(model), images(), memory_bytes=1) == 1


def test_it_brings_the_output_nearer(model):
    x, unseen = images(64), images(300)[64:]
    off = []
    for correct in (False, True):
        quantized = ptq_static(model, x, weight_bits=2, activation_bits=8, bias_correction=correct)
        with torch.no_grad():
            off.append(float((quantized(unseen) - model(unseen)).pow(2).mean()))
    assert off[1] < 0.7 * off[0]


def test_progress_names_the_layers(model):
    said = []
    correct_biases(attached(model), images(), progress=lambda what, share: said.append((what, share)))
    assert [what for what, _ in said] == [f"bias of {name}" for name in ("stem", "body", "up", "tokens", "head")]
    assert [share for _, share in said] == sorted(share for _, share in said)
