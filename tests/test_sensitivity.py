"""Sensitivity of each layer to its width: against the plain way of measuring it, and leaving the model as it was."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models import MODELS, build_model
from quantizers import ptq, sensitivity
from quantizers.modules import QuantizedModel
from quantizers.numerics import QuantizationError
from quantizers.sensitivity import measure_sensitivity, multiply_accumulates


def images(n: int = 6, size: int = 32) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(7))


def attached(model: nn.Module, x: torch.Tensor) -> QuantizedModel:
    quantized = ptq.attach(model, x, "mixed_precision", 4, 8, ptq.Recipe())
    ptq.quantize(quantized, ptq.observe_activations(quantized, x, ptq.Recipe()), x, ptq.Recipe())
    return quantized


class Small(nn.Module):
    """A residual addition, a layer that is used twice, and a size that is read from the activations."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.again = nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = x + self.again(F.relu(self.again(x)))
        return self.head(x.flatten(2).sum(2) / x.shape[2])


@pytest.fixture
def small() -> nn.Module:
    torch.manual_seed(0)
    return Small().eval()


def naive(model: nn.Module, x: torch.Tensor, name: str, bits: int) -> np.ndarray:
    """KL per image of a deep copy in which one layer's weights alone are quantized, by the definition."""
    changed = copy.deepcopy(model)
    layer = changed.get_submodule(name)
    with torch.no_grad():
        if bits == 16:
            layer.weight.copy_(layer.weight.half())
        else:
            flat = layer.weight.flatten(1)
            scale = sensitivity.WeightObserver().scales(layer.weight, bits, 0, name)[:, None]
            q = (flat / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            layer.weight.copy_((q * scale).view_as(layer.weight))
        p, q = F.softmax(model(x).double(), 1), F.softmax(changed(x).double(), 1)
    return (p * (p / q).log()).sum(1).numpy()


def test_it_is_the_divergence_when_one_layer_alone_is_quantized(small):
    x = images()
    found = measure_sensitivity(attached(small, x), x)
    assert found.layers == ("stem", "again", "head") and found.widths == (2, 3, 4, 6, 8, 16)
    for row, name in enumerate(found.layers):
        for column, bits in enumerate(found.widths):
            expected = naive(small, x, name, bits)
            np.testing.assert_allclose(found.values_LWN[row, column], expected, rtol=2e-3, atol=1e-9)
    assert (found.values_LW[:, 0] > 10 * found.values_LW[:, 4]).all()


@pytest.mark.parametrize("name", MODELS)
def test_reusing_the_prefix_gives_the_same_numbers_and_leaves_the_model_as_it_was(name):
    torch.manual_seed(0)
    x = images(3)
    model = build_model(name, 3, 32, seed=3)
    with torch.no_grad():
        model(images(16))  # BatchNorm statistics, so that logits have ordinary magnitudes
    quantized = attached(model.eval(), x)
    before = {key: value.clone() for key, value in quantized.state_dict().items()}
    logits = quantized(x)
    layers = list(quantized.layers())
    chosen = [layers[0], layers[len(layers) // 2], layers[-1]]
    fast = measure_sensitivity(quantized, x, widths=(2, 4, 8), layers=chosen)
    slow = measure_sensitivity(quantized, x, widths=(2, 4, 8), layers=chosen, reuse_prefix=False)
    np.testing.assert_allclose(fast.values_LWN, slow.values_LWN, rtol=1e-3, atol=1e-9)
    assert float(fast.values_LWN.max()) > 1e-6
    after = quantized.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(quantized(x), logits)


def test_neither_the_batch_size_nor_the_memory_changes_it(small):
    x = images(7)
    quantized = attached(small, x)
    whole = measure_sensitivity(quantized, x).values_LWN
    np.testing.assert_allclose(measure_sensitivity(quantized, x, batch_size=3).values_LWN, whole, rtol=1e-3, atol=1e-9)
    np.testing.assert_allclose(
        measure_sensitivity(quantized, x, memory_bytes=1).values_LWN, whole, rtol=1e-3, atol=1e-9
    )


def test_the_loss_metric_is_the_rise_of_the_cross_entropy(small):
    x = images()
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    found = measure_sensitivity(attached(small, x), x, labels, widths=(2,), layers=["head"], metric="loss")
    changed = copy.deepcopy(small)
    with torch.no_grad():
        scale = sensitivity.WeightObserver().scales(small.head.weight, 2, 0, "head")[:, None]
        changed.head.weight.copy_((small.head.weight / scale).round().clamp(-2, 1) * scale)
        expected = F.cross_entropy(changed(x), labels, reduction="none") - F.cross_entropy(
            small(x), labels, reduction="none"
        )
    np.testing.assert_allclose(found.values_LWN[0, 0], expected.numpy(), rtol=1e-3, atol=1e-6)


def test_float_is_not_sensitive(small):
    x = images()
    found = measure_sensitivity(attached(small, x), x, widths=(8, 32))
    assert (found.values_LW[:, 1] < 1e-12).all() and (found.values_LW[:, 0] > 1e-12).all()


def test_the_table_has_the_mean_and_its_interval(small):
    x = images()
    found = measure_sensitivity(attached(small, x), x, widths=(2, 8))
    table = found.table()
    assert list(table.columns) == ["layer", "bits", "sensitivity", "sensitivity_low", "sensitivity_high", "bytes"]
    row = table[(table.layer == "again") & (table.bits == 2)].iloc[0]
    values = found.values_LWN[1, 0]
    assert row.sensitivity == pytest.approx(values.mean())
    assert row.sensitivity_high - row.sensitivity == pytest.approx(1.96 * values.std(ddof=1) / 6**0.5, rel=1e-4)
    assert row.bytes == 6 * 3 * 9 * 2 // 8 + 1 + 6 * 4  # 162 weights of 2 bits: 40.5 bytes; 6 scales


def test_an_exception_on_the_way_leaves_the_model_as_it_was(small):
    x = images()
    quantized = attached(small, x)
    expected = quantized(x)

    def stop(line: str, share: float) -> None:
        if "again" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_sensitivity(quantized, x, progress=stop)
    assert torch.equal(quantized(x), expected)
    assert not any(layer.is_float for layer in quantized.layers().values())


def test_bad_questions_are_refused(small):
    x = images()
    quantized = attached(small, x)
    with pytest.raises(QuantizationError, match="unknown sensitivity metric 'mse'; choose from kl, loss"):
        measure_sensitivity(quantized, x, metric="mse")
    with pytest.raises(QuantizationError, match="needs the labels"):
        measure_sensitivity(quantized, x, metric="loss")


def test_multiply_accumulates_by_hand():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=4),
        nn.ConvTranspose2d(8, 4, 2, stride=2), nn.Flatten(), nn.Linear(4 * 8 * 8, 5)
    )  # fmt: skip
    counts = multiply_accumulates(attached(model, images(2, 8)), images(2, 8))
    # 4x4 outputs x 8 channels x 27; grouped: 2 input channels each; each of 4x4x8 inputs into 4 channels of 2x2
    assert list(counts.values()) == [16 * 8 * 27, 16 * 8 * 18, 16 * 8 * 16, 256 * 5]
