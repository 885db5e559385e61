"""Which layer gets which precision when groups are looked at: the worst group's cost least, or the mean of the worst.

The multiple-choice knapsack of quantizers.allocation with another objective. A choice costs every group something of
its own; the groups' totals over the layers are brought down at their top:

    minimise  t + 1 / (share G) sum_g max(0, total_g - t)

which is the conditional value at risk (Rockafellar & Uryasev, 2000): the mean of the worst `share` of the groups.
With a share of 1 / G or less it is the worst total alone, with 1 the mean of all. Linear in t, the excesses and the
binary choices: branch and bound (HiGHS, scipy.optimize.milp). Budgets are exact integers, checked after the solver.

Shapes: G groups, L layers, C choices of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from quantizers.numerics import QuantizationError

TIME_LIMIT = 60.0  # seconds
RELATIVE_GAP = 1e-4  # of the objective: the costs are estimates from some hundred images
MOST_CUTS = 50


@dataclass(frozen=True)
class GroupAllocation:
    """`choices` (L,): the choice of each layer. `totals_G`: what they cost each group, `base_G` included; `objective`
    the mean of the worst of them; `bytes` what the model takes."""

    choices: tuple[int, ...]
    totals_G: np.ndarray
    objective: float
    bytes: int
    is_optimal: bool


def conditional_value_at_risk(totals_G: np.ndarray, share: float) -> float:
    """The mean of the worst `share` of the groups, the last one in part; the worst alone where that is less than 1."""
    count = max(1.0, share * len(totals_G))
    ordered = np.sort(np.asarray(totals_G, dtype=float))[::-1]
    weights = np.clip(count - np.arange(len(ordered)), 0.0, 1.0)
    return float((ordered * weights).sum() / count)


def allocate_for_groups(
    costs_GLC: np.ndarray,
    bytes_LC: np.ndarray,
    *,
    size_budget: int,
    share: float,
    base_G: np.ndarray | None = None,
    fixed_bytes: int = 0,
    marked_LC: np.ndarray | None = None,
    most_marked: int | None = None,
) -> GroupAllocation:
    """The choices of the least conditional value at risk over the groups within `size_budget` bytes.

    `costs_GLC` (G, L, C) may be negative; +inf forbids a choice. `base_G` (G,) is what each group has lost anyway.
    Of the choices that `marked_LC` marks at most `most_marked` are taken, over all the layers. Raises QuantizationError
    for costs that are NaN, and for a budget that no choice keeps, naming the smallest model.
    """
    costs_GLC = np.asarray(costs_GLC, dtype=np.float64)
    groups, layers, options = costs_GLC.shape
    if np.isnan(costs_GLC).any():
        raise QuantizationError("a sensitivity is not a number")
    if not 0 < share <= 1:
        raise QuantizationError(f"the share of the groups that count must lie in (0, 1], got {share}")
    allowed_LC = np.isfinite(costs_GLC).all(axis=0)
    bytes_LC = np.asarray(bytes_LC, dtype=np.int64)
    base_G = np.zeros(groups) if base_G is None else np.asarray(base_G, dtype=float)
    least = fixed_bytes + int(np.where(allowed_LC, bytes_LC, np.iinfo(np.int64).max).min(axis=1).sum())
    if size_budget < least:
        raise QuantizationError(
            f"a size budget of {size_budget:,} bytes is below the smallest possible model, {least:,} bytes"
        )
    costs = np.where(allowed_LC, costs_GLC, 0.0)
    unit = max(float(np.abs(costs).max()), float(np.abs(base_G).max()), np.finfo(float).tiny)
    count = max(1.0, share * groups)
    # variables: the choices, t, the groups' excess over t
    binaries = layers * options
    objective = np.concatenate([np.zeros(binaries), [1.0], np.full(groups, 1 / count)])
    per_group = np.hstack([costs.reshape(groups, -1) / unit, -np.ones((groups, 1)), -np.eye(groups)])
    one_each = sparse.hstack([sparse.kron(sparse.eye(layers), np.ones((1, options))), np.zeros((layers, 1 + groups))])
    rest = np.zeros(1 + groups)
    over = bytes_LC - np.where(allowed_LC, bytes_LC, np.iinfo(np.int64).max).min(axis=1, keepdims=True)
    room = size_budget - least
    constraints = [
        LinearConstraint(per_group, -np.inf, -base_G / unit),
        LinearConstraint(one_each.tocsr(), 1, 1),
        LinearConstraint(np.concatenate([over.ravel() / max(1, room), rest])[None], -np.inf, 1.0 if room else 0.0),
    ]
    if marked_LC is not None and most_marked is not None:
        marked = np.concatenate([np.asarray(marked_LC, dtype=float).ravel(), rest])
        constraints.append(LinearConstraint(marked[None], -np.inf, most_marked))
    upper = np.concatenate([allowed_LC.ravel().astype(float), [np.inf], np.full(groups, np.inf)])
    lower = np.concatenate([np.zeros(binaries), [-np.inf], np.zeros(groups)])
    for _ in range(MOST_CUTS):
        solution = milp(
            objective,
            constraints=constraints,
            integrality=np.concatenate([np.ones(binaries), np.zeros(1 + groups)]),
            bounds=Bounds(lower, upper),
            options={"mip_rel_gap": RELATIVE_GAP, "time_limit": TIME_LIMIT},
        )
        if solution.x is None:
            raise QuantizationError("the solver found no allocation within its time and budget")
        choices = solution.x[:binaries].reshape(layers, options).argmax(axis=1)
        taken_L = np.take_along_axis(bytes_LC, choices[:, None], axis=1)
        if fixed_bytes + int(taken_L.sum()) <= size_budget:
            totals_G = base_G + costs[:, np.arange(layers), choices].sum(axis=1)
            return GroupAllocation(
                tuple(int(choice) for choice in choices),
                totals_G,
                conditional_value_at_risk(totals_G, share),
                fixed_bytes + int(taken_L.sum()),
                solution.status == 0,
            )
        # over by less than the solver's tolerance: it, and whatever takes as much in every layer, is cut off
        cut = np.concatenate([(bytes_LC >= taken_L).ravel().astype(float), rest])
        constraints.append(LinearConstraint(cut[None], -np.inf, layers - 1))
    raise QuantizationError("the solver found no allocation that keeps the size budget exactly")
