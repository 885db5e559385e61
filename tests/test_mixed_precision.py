"""Mixed precision: within its budget by what the file holds, better than uniform, and what it reports."""

import pytest
import torch
from torch import nn

from models import MODELS, build_model
from quantizers.mixed_precision import mixed_precision
from quantizers.modules import QuantizedModel
from quantizers.numerics import QuantizationError
from quantizers.ptq import ptq_static


def images(n: int = 8, size: int = 32) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(7))


def network(name: str) -> nn.Module:
    model = build_model(name, 3, 32, seed=3)
    with torch.no_grad():
        for _ in range(2):
            model(images(16))
    return model.eval()


def file_bytes(model: QuantizedModel) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in model.packed_tensors().values())


def divergence(model: nn.Module, quantized: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        p, q = torch.log_softmax(model(x).double(), 1), torch.log_softmax(quantized(x).double(), 1)
    return float((p.exp() * (p - q)).sum(1).mean())


class Chain(nn.Module):
    """Small enough to look at: a sensitive first layer, a wide one that hardly matters, a classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.wide = nn.Conv2d(8, 64, 3, padding=1)
        self.narrow = nn.Conv2d(64, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.narrow(torch.relu(self.wide(torch.relu(self.stem(x))))))
        return self.head(x.mean((2, 3)) * 5)


@pytest.fixture
def chain() -> nn.Module:
    torch.manual_seed(0)
    return Chain().eval()


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_keeps_within_the_size_of_uniform_4_bits(name):
    model, x = network(name), images(4)
    mixed = mixed_precision(model, x, weight_bits=4, activation_bits=8, sensitivity_samples=1, widths=(2, 4, 8))
    assert file_bytes(mixed) <= file_bytes(ptq_static(model, x, weight_bits=4, activation_bits=8))
    assert len(set(mixed.widths().values())) > 1
    assert bool(torch.isfinite(mixed(x)).all())


@pytest.mark.parametrize("name", ["mobilenet_v2", "squeezenet1_1"])
def test_at_the_size_of_uniform_4_bits_it_is_nearer_to_fp32(name):
    model, x = network(name), images(16)
    mixed = mixed_precision(model, x, weight_bits=4, activation_bits=8)
    uniform = ptq_static(model, x, weight_bits=4, activation_bits=8)
    test = images(48)[16:]
    assert divergence(model, mixed, test) < 0.8 * divergence(model, uniform, test)


def test_the_budget_is_what_the_file_holds(chain):
    x = images()
    mixed = mixed_precision(chain, x, weight_bits=3, activation_bits=8)
    budgets = mixed.reports["budgets"]
    assert budgets["size_bytes"] == file_bytes(mixed) <= budgets["size_budget_bytes"]
    assert budgets["size_budget_bytes"] == file_bytes(ptq_static(chain, x, weight_bits=3, activation_bits=8))
    assert budgets["is_optimal"]


def test_a_bias_correction_is_within_the_budget_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, bias=False), nn.ReLU(), nn.Conv2d(16, 8, 3, bias=False), nn.Flatten(),
                          nn.Linear(8 * 28 * 28, 2))  # fmt: skip
    mixed = mixed_precision(model, images(), weight_bits=4, activation_bits=8, classifier_bits=8, bias_correction=True,
                            size_budget_bytes=14_000)  # fmt: skip
    assert file_bytes(mixed) == mixed.reports["budgets"]["size_bytes"] <= 14_000


@pytest.mark.parametrize("budget", [50_000_000, 100_000_000, 200_000_000])
def test_bit_operations_are_within_their_budget(chain, budget):
    mixed = mixed_precision(
        chain, images(), weight_bits=8, activation_bits=4, classifier_bits=None, bit_operations_budget=budget
    )
    table = mixed.reports["widths"]
    macs = {"stem": 32 * 32 * 8 * 27, "wide": 32 * 32 * 64 * 72, "narrow": 32 * 32 * 8 * 64, "head": 32}
    assert dict(zip(table.layer, table.multiply_accumulates, strict=True)) == macs
    used = sum(macs[row.layer] * row.bits * row.activation_bits for row in table.itertuples())
    assert used == mixed.reports["budgets"]["bit_operations"] <= budget
    assert mixed.reports["budgets"]["size_budget_bytes"] is None


def test_the_classifier_stays_in_float_unless_told_otherwise(chain):
    x = images()
    mixed = mixed_precision(chain, x, weight_bits=4, activation_bits=8)
    assert mixed.widths()["head"] == 32 and torch.equal(mixed.layers()["head"].layer.weight, chain.head.weight)
    assert mixed_precision(chain, x, weight_bits=4, activation_bits=8, classifier_bits=8).widths()["head"] == 8
    chosen = mixed_precision(chain, x, weight_bits=2, activation_bits=8, classifier_bits=None)
    assert "head" in set(chosen.reports["sensitivity"]["layer"])
    assert "head" not in set(mixed.reports["sensitivity"]["layer"])


def test_activations_are_as_wide_as_their_only_readers(chain):
    mixed = mixed_precision(chain, images(), weight_bits=8, activation_bits=4, widths=(16,), size_budget_bytes=10**6)
    widths = {name: quantizer.bits for name, quantizer in mixed.activation_quantizers().items()}
    assert set(mixed.widths().values()) == {16, 32}
    assert sorted(widths.values()) == [16, 16, 16, 16, 32]  # inputs, what the average reads, the classifier's input
    assert set(mixed.reports["widths"].activation_bits) == {16, 32}


def test_an_activation_that_an_addition_reads_keeps_its_width():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.body, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Linear(4, 2)

        def forward(self, x):
            x = torch.relu(self.stem(x))
            return self.head((x + self.body(x)).mean((2, 3)))

    torch.manual_seed(0)
    mixed = mixed_precision(
        Residual(), images(), weight_bits=8, activation_bits=5, widths=(16,), size_budget_bytes=10**6
    )
    table = mixed.reports["widths"].set_index("layer")
    assert table.activation_bits.to_dict() == {"stem": 16, "body": 5, "head": 32}
    assert int(table.bit_operations["body"]) == int(table.multiply_accumulates["body"]) * 16 * 5


def test_the_packed_file_of_mixed_widths_holds_the_model(chain):
    x = images()
    mixed = mixed_precision(chain, x, weight_bits=4, activation_bits=8)
    other = mixed_precision(chain, x * 2, weight_bits=4, activation_bits=8)
    for name, bits in mixed.widths().items():
        other.layers()[name].set_bits(bits)
    other.load_packed(mixed.packed_tensors())
    torch.testing.assert_close(other(x), mixed(x))


def test_it_composes_with_the_other_methods(chain):
    x = images(16)
    plain = mixed_precision(chain, x, weight_bits=3, activation_bits=8)
    learned = mixed_precision(
        chain, x, weight_bits=3, activation_bits=8, equalize=True, bias_correction=True, rounding="adaround",
        reconstruction_iterations=60
    )  # fmt: skip
    assert len(learned.reports["reconstruction"]) > 0
    assert divergence(chain, learned, x) < divergence(chain, plain, x)


def test_a_budget_that_nothing_fits_names_the_smallest_model(chain):
    x = images()
    smallest = mixed_precision(chain, x, weight_bits=2, activation_bits=8, widths=(2,), size_budget_bytes=10**6)
    size = file_bytes(smallest)
    with pytest.raises(QuantizationError, match=f"budget of {size - 1:,} bytes is below the smallest.* {size:,} bytes"):
        mixed_precision(chain, x, weight_bits=4, activation_bits=8, size_budget_bytes=size - 1)
    exact = mixed_precision(chain, x, weight_bits=4, activation_bits=8, size_budget_bytes=size)
    assert set(exact.widths().values()) == {2, 32}


def test_a_width_of_the_edges_is_refused(chain):
    with pytest.raises(QuantizationError, match="leave out first_last_bits"):
        mixed_precision(chain, images(), weight_bits=4, activation_bits=8, first_last_bits=8)


def test_sensitivities_are_measured_once_for_all_budgets(chain, monkeypatch):
    x = images()
    first = mixed_precision(chain, x, weight_bits=4, activation_bits=8)
    alone = mixed_precision(chain, x, weight_bits=3, activation_bits=6)
    monkeypatch.setattr("quantizers.mixed_precision.measure_sensitivity", None)
    again = mixed_precision(chain, x, weight_bits=3, activation_bits=6, sensitivity=first.reports["measurement"])
    assert torch.equal(again(x), alone(x)) and again.widths() == alone.widths()
    with pytest.raises(QuantizationError, match="of another model"):
        mixed_precision(
            chain, x, weight_bits=3, activation_bits=6, sensitivity=first.reports["measurement"], classifier_bits=None
        )
