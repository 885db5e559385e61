"""Exact allocation of bit widths: budgets kept to the byte, optimal, never worse than greedy or uniform."""

import itertools

import numpy as np
import pytest

from quantizers.allocation import allocate, greedy_allocation, uniform_allocation
from quantizers.numerics import QuantizationError

WIDTHS = np.array([2, 3, 4, 6, 8, 16])


def instance(seed: int, layers: int | None = None, widths: int = 6):
    """Costs, bytes and bit operations of a made-up network; its costs fall with the width, mostly."""
    generator = np.random.default_rng(seed)
    layers = layers or int(generator.integers(2, 40))
    sizes_L = (10 ** generator.uniform(1, 7, layers)).astype(np.int64)
    macs_L = (10 ** generator.uniform(2, 9, layers)).astype(np.int64)
    bits_W = WIDTHS[:widths]
    costs_LW = 10 ** generator.uniform(-5, 1, (layers, 1)) * 0.3**bits_W * generator.uniform(0.5, 2, (layers, widths))
    costs_LW -= generator.random(costs_LW.shape) < 0.02  # now and then a width that does better than the float model
    bytes_LW = -(-sizes_L[:, None] * bits_W // 8) + 4
    operations_LW = macs_L[:, None] * bits_W * 8
    return costs_LW, bytes_LW, operations_LW


def budgets(seed: int, bytes_LW, operations_LW) -> dict[str, int | None]:
    """Every third instance has a size budget, every third an operations budget, the others both, never too small."""
    generator = np.random.default_rng(seed + 10_000)
    share = generator.uniform(0, 1.1, 2)
    found = {}
    for name, table, part in (("size_budget", bytes_LW, share[0]), ("operations_budget", operations_LW, share[1])):
        least, most = table.min(axis=1).sum(), table.max(axis=1).sum()
        found[name] = int(least + part * (most - least))
    if seed % 3 == 0:
        found["operations_budget"] = None
    elif seed % 3 == 1:
        found["size_budget"] = None
    return found


@pytest.mark.parametrize("chunk", range(8))
def test_it_keeps_its_budgets_and_is_never_worse_than_greedy_or_uniform(chunk):
    for seed in range(chunk * 50, chunk * 50 + 50):
        costs_LW, bytes_LW, operations_LW = instance(seed)
        limits = budgets(seed, bytes_LW, operations_LW)
        found = allocate(costs_LW, bytes_LW, operations_LW, **limits)
        rows = range(len(costs_LW))
        assert found.bytes == bytes_LW[rows, found.choices].sum()
        assert found.operations == operations_LW[rows, found.choices].sum()
        assert found.cost == pytest.approx(costs_LW[rows, found.choices].sum(), rel=1e-12, abs=1e-12)
        assert limits["size_budget"] is None or found.bytes <= limits["size_budget"]
        assert limits["operations_budget"] is None or found.operations <= limits["operations_budget"]
        assert found.is_optimal
        for other in (
            greedy_allocation(costs_LW, bytes_LW, operations_LW, **limits),
            uniform_allocation(costs_LW, bytes_LW, operations_LW, **limits),
        ):
            assert other is None or found.cost <= other.cost + 1e-9 * abs(other.cost)


@pytest.mark.parametrize("seed", range(60))
def test_it_is_optimal_against_brute_force(seed):
    costs_LW, bytes_LW, operations_LW = instance(seed, layers=5, widths=4)
    limits = budgets(seed, bytes_LW, operations_LW)
    rows = range(5)
    best = min(
        costs_LW[rows, choices].sum()
        for choices in itertools.product(range(4), repeat=5)
        if (limits["size_budget"] is None or bytes_LW[rows, choices].sum() <= limits["size_budget"])
        and (limits["operations_budget"] is None or operations_LW[rows, choices].sum() <= limits["operations_budget"])
    )
    assert allocate(costs_LW, bytes_LW, operations_LW, **limits).cost == pytest.approx(best, rel=1e-6, abs=1e-15)


def test_it_beats_greedy_where_greedy_is_known_to_fail():
    """The best rate of the first step leaves no room for the large gain: greedy saves 2, the optimum 10."""
    costs_LW, bytes_LW = [[12, 10], [10, 0]], [[0, 1], [0, 10]]
    assert greedy_allocation(costs_LW, bytes_LW, size_budget=10).cost == 20
    assert allocate(costs_LW, bytes_LW, size_budget=10).cost == 12


@pytest.mark.parametrize("seed", range(10))
def test_the_unit_of_the_costs_does_not_matter(seed):
    costs_LW, bytes_LW, operations_LW = instance(seed)
    limits = budgets(seed, bytes_LW, operations_LW)
    found = [allocate(costs_LW * unit, bytes_LW, operations_LW, **limits) for unit in (1, 2.0**-40, 2.0**30)]
    assert found[0].choices == found[1].choices == found[2].choices


def test_of_equal_costs_the_smaller_model_is_chosen():
    found = allocate([[1, 0, 0], [1, 0, 0]], [[1, 2, 3], [1, 2, 3]], size_budget=100)
    assert found.choices == (1, 1)
    # within a budget that binds: the second layer gains nothing from its bits
    assert allocate([[3, 1, 0.5], [0, 0, 0]], [[1, 4, 9], [1, 2, 3]], size_budget=7).choices == (1, 0)


@pytest.mark.parametrize("seed", range(120))
def test_among_equal_costs_it_has_the_fewest_bytes_of_all(seed):
    """Costs of few distinct values, so that many allocations tie; against brute force."""
    generator = np.random.default_rng(seed)
    costs_LW = generator.integers(0, 3, (8, 4)).astype(float)
    bytes_LW = generator.integers(1, 50, (8, 4))
    budget = int(0.7 * bytes_LW.mean(axis=1).sum())
    choices_CL = np.array(list(itertools.product(range(4), repeat=8)))
    sums = list(
        zip(costs_LW[range(8), choices_CL].sum(axis=1), bytes_LW[range(8), choices_CL].sum(axis=1), strict=True)
    )
    found = allocate(costs_LW, bytes_LW, size_budget=budget)
    assert (found.cost, found.bytes) == min(pair for pair in sums if pair[1] <= budget)


def test_the_smallest_budget_is_kept_and_one_byte_less_is_refused():
    costs_LW, bytes_LW, operations_LW = instance(1)
    least = int(bytes_LW.min(axis=1).sum())
    assert allocate(costs_LW, bytes_LW, size_budget=least + 100, fixed_bytes=100).bytes == least + 100
    with pytest.raises(QuantizationError, match=f"smallest possible model, {least + 100:,} bytes"):
        allocate(costs_LW, bytes_LW, size_budget=least + 99, fixed_bytes=100)
    least_operations = int(operations_LW.min(axis=1).sum())
    with pytest.raises(QuantizationError, match=f"{least_operations:,}"):
        allocate(costs_LW, bytes_LW, operations_LW, operations_budget=least_operations - 1)


def test_budgets_that_can_only_be_kept_one_at_a_time_are_refused_with_the_smallest_model():
    """Fewer operations cost more bytes here: 4 operations need 10 bytes."""
    tables = [[0, 0], [0, 0]], [[1, 5], [1, 5]], [[9, 2], [9, 2]]
    with pytest.raises(QuantizationError, match="the smallest of so few operations has 10 bytes"):
        allocate(*tables, size_budget=9, operations_budget=4)
    assert allocate(*tables, size_budget=10, operations_budget=4).choices == (1, 1)


def test_forbidden_widths_are_not_chosen():
    costs = [[np.inf, 5.0], [0.0, np.inf]]
    assert allocate(costs, [[1, 2], [3, 4]], size_budget=5).choices == (1, 0)
    with pytest.raises(QuantizationError, match="smallest possible model, 5 bytes"):
        allocate(costs, [[1, 2], [3, 4]], size_budget=4)


@pytest.mark.parametrize(
    ("costs", "message"),
    [
        ([[0.0, np.nan]], "stem: its sensitivity is not a number"),
        ([[0.0, -np.inf]], "stem: its sensitivity is not a number"),
        ([[np.inf, np.inf]], "stem: no width is allowed"),
    ],
)
def test_costs_that_mean_nothing_are_refused_by_the_layers_name(costs, message):
    with pytest.raises(QuantizationError, match=message):
        allocate(costs, [[1, 2]], size_budget=5, names=["stem"])


def test_shapes_must_agree():
    with pytest.raises(QuantizationError, match="bytes of shape"):
        allocate([[0.0, 1.0]], [[1, 2], [3, 4]], size_budget=5)


def test_budgets_are_kept_in_exact_integers():
    """Byte counts that a float32 cannot tell apart: 2^40 + 1 is over a budget of 2^40."""
    big = 2**40
    assert allocate([[1.0, 0.0]], [[big, big + 1]], size_budget=big).choices == (0,)
    # one byte over in 10^9: less than what a solver takes for rounding
    assert allocate([[1.0, 0.0], [1e-3, 0.0]], [[0, 10**9], [0, 1]], size_budget=10**9).choices == (1, 0)
    many = allocate([[1.0, 0.0]] * 8, [[big, big + 1]] * 8, size_budget=8 * big + 3)
    assert sum(many.choices) == 3
