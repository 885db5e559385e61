"""The integer program over groups: as good as trying every choice, within the budget, and for the groups asked for."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantizers.group_allocation import allocate_for_groups, conditional_value_at_risk
from quantizers.numerics import QuantizationError


@pytest.mark.parametrize(
    ("share", "expected"), [(0.01, 4.0), (0.25, 4.0), (0.5, 3.5), (0.375, (4 + 3 / 2) / 1.5), (1.0, 2.5)]
)
def test_the_mean_of_the_worst_groups_by_hand(share, expected):
    assert conditional_value_at_risk(np.array([1.0, 4.0, 2.0, 3.0]), share) == pytest.approx(expected)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), share=st.sampled_from([0.1, 0.5, 1.0]), room=st.floats(0, 1))
def test_no_choice_within_the_budget_is_better(seed, share, room):
    generator = np.random.default_rng(seed)
    costs = generator.normal(size=(3, 4, 3))
    sizes = generator.integers(1, 100, size=(4, 3))
    least, most = sizes.min(axis=1).sum(), sizes.max(axis=1).sum()
    budget, base = int(least + room * (most - least)) + 7, generator.exponential(size=3)
    found = allocate_for_groups(costs, sizes, size_budget=budget, share=share, base_G=base, fixed_bytes=7)
    every = [c for c in itertools.product(range(3), repeat=4) if 7 + sizes[range(4), c].sum() <= budget]
    best = min(conditional_value_at_risk(base + costs[:, range(4), c].sum(axis=1), share) for c in every)
    assert found.choices in every and found.bytes == 7 + sizes[range(4), found.choices].sum()
    assert found.objective <= best + 2e-4 * max(1.0, abs(best))
    assert found.totals_G == pytest.approx(base + costs[:, range(4), found.choices].sum(axis=1))


def test_the_worst_group_decides_and_not_the_mean():
    """One layer, two precisions of one size: better in the mean, or better for the group that loses most."""
    costs = np.array([[[0.0, 3.0]], [[4.0, 3.5]], [[0.0, 3.0]]])
    sizes = np.array([[5, 5]])
    assert allocate_for_groups(costs, sizes, size_budget=5, share=1.0).choices == (0,)
    assert allocate_for_groups(costs, sizes, size_budget=5, share=0.1).choices == (1,)


def test_at_most_so_many_marked_choices_are_taken():
    costs = -np.arange(10, dtype=float).reshape(1, 5, 2)
    marked = np.array([[False, True]] * 5)
    sizes = np.ones((5, 2), dtype=int)
    for most in (0, 2, 5):
        found = allocate_for_groups(costs, sizes, size_budget=5, share=1.0, marked_LC=marked, most_marked=most)
        assert sum(found.choices) == most


def test_what_cannot_be_is_refused():
    costs, sizes = np.zeros((2, 3, 2)), np.full((3, 2), 10)
    with pytest.raises(QuantizationError, match="29 bytes is below the smallest possible model, 30 bytes"):
        allocate_for_groups(costs, sizes, size_budget=29, share=1.0)
    costs[0, 0, 0] = np.nan
    with pytest.raises(QuantizationError, match="not a number"):
        allocate_for_groups(costs, sizes, size_budget=30, share=1.0)
    with pytest.raises(QuantizationError, match="share"):
        allocate_for_groups(np.zeros((2, 3, 2)), sizes, size_budget=30, share=0.0)
    forbidden = np.zeros((2, 3, 2))
    forbidden[:, :, 0] = np.inf
    assert allocate_for_groups(forbidden, sizes, size_budget=30, share=1.0).choices == (1, 1, 1)
