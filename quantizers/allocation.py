"""Which layer gets how many bits: exact integer programming under a size budget, a bit-operations budget, or both.

One choice a layer, the sum of the layers' costs least, the budgets kept: a multiple-choice knapsack, solved by branch
and bound to a gap of zero (HiGHS, scipy.optimize.milp), as HAWQ-V3 does (Yao et al., ICML 2021, section 3.4). A solver
computes in floating point; budgets are kept in exact integers, and a choice that its rounding let pass one by a few
bytes is cut off and the solver asked again.

Shapes: L layers, W widths; a table (L, W) has a row for each layer and a column for each width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from quantizers.numerics import QuantizationError

MOST_CUTS = 200  # choices that a solver's rounding let pass a budget, each cut off in turn
TIME_LIMIT = 60.0  # seconds for one solve; the models of this study take milliseconds
SAME_COST = 1e-9  # costs above the least possible that differ by less than this share are a tie, which fewer bytes win


@dataclass(frozen=True)
class Allocation:
    """`choices` (L,): the column of each layer. `cost` is the sum of theirs, `bytes` and `operations` those of the
    whole model. `is_optimal` is False where the solver ran out of time; the budgets are kept all the same."""

    choices: tuple[int, ...]
    cost: float
    bytes: int
    operations: int
    is_optimal: bool = True


def allocate(
    costs_LW: np.ndarray,
    bytes_LW: np.ndarray,
    operations_LW: np.ndarray | None = None,
    *,
    size_budget: int | None = None,
    operations_budget: int | None = None,
    fixed_bytes: int = 0,
    fixed_operations: int = 0,
    names: Sequence[str] | None = None,
) -> Allocation:
    """The choice of least cost within the budgets (None: no limit); of equal costs the one of fewer bytes.

    `costs_LW` may be negative; +inf forbids a width. `bytes_LW` and `operations_LW` are integers >= 0; `fixed_` is what
    the rest of the model takes. Raises QuantizationError for costs that are NaN, a layer without a width, and budgets
    that no choice keeps; the message names the smallest model.
    """
    problem = _Problem.of(
        costs_LW,
        bytes_LW,
        operations_LW,
        size_budget=size_budget,
        operations_budget=operations_budget,
        fixed_bytes=fixed_bytes,
        fixed_operations=fixed_operations,
        names=names,
    )
    problem.check_budgets()
    known = [choices for choices in (greedy_choices(problem), *problem.uniform_choices()) if choices is not None]
    bound = min((problem.excess(choices) for choices in known), default=math.inf)
    solved, is_optimal = problem.least_cost(bound)
    candidates = [*known, *([] if solved is None else [solved])]
    if not candidates:
        raise QuantizationError(problem.why_infeasible())
    best = min(candidates, key=lambda choices: (problem.cost(choices), problem.bytes(choices)))
    smaller = problem.least_bytes(problem.excess(best))
    slack = SAME_COST * problem.excess(best)
    if smaller is not None and problem.excess(smaller) <= problem.excess(best) + slack:
        best = min(best, smaller, key=problem.bytes)
    return problem.allocation(best, is_optimal)


def greedy_allocation(costs_LW: np.ndarray, bytes_LW: np.ndarray, *tables: np.ndarray, **limits) -> Allocation | None:
    """From the smallest model, again and again the change that saves most cost for what it takes of the budgets: what
    `allocate`, whose arguments it has, is compared with. None where the smallest layers do not keep both budgets."""
    problem = _Problem.of(costs_LW, bytes_LW, *tables, **limits)
    choices = greedy_choices(problem)
    return None if choices is None else problem.allocation(choices, False)


def uniform_allocation(costs_LW: np.ndarray, bytes_LW: np.ndarray, *tables: np.ndarray, **limits) -> Allocation | None:
    """The width of least cost that all layers can have within the budgets; None where no width can. Arguments as in
    `allocate`."""
    problem = _Problem.of(costs_LW, bytes_LW, *tables, **limits)
    candidates = problem.uniform_choices()
    return problem.allocation(min(candidates, key=problem.cost), False) if candidates else None


@dataclass(frozen=True)
class _Problem:
    costs_LW: np.ndarray
    bytes_LW: np.ndarray  # Python integers (dtype object)
    operations_LW: np.ndarray
    size_budget: int | None
    operations_budget: int | None
    fixed_bytes: int
    fixed_operations: int

    @classmethod
    def of(
        cls,
        costs_LW,
        bytes_LW,
        operations_LW=None,
        *,
        size_budget=None,
        operations_budget=None,
        fixed_bytes=0,
        fixed_operations=0,
        names=None,
    ) -> _Problem:
        costs_LW = np.asarray(costs_LW, dtype=np.float64)
        if costs_LW.ndim != 2 or not costs_LW.size:
            raise QuantizationError(f"costs of shape {costs_LW.shape}; expected (layers, widths), not empty")
        names = list(names) if names is not None else [f"layer {place}" for place in range(len(costs_LW))]
        if operations_LW is None:
            operations_LW = np.zeros(costs_LW.shape, dtype=np.int64)
        tables = []
        for table, what in ((bytes_LW, "bytes"), (operations_LW, "operations")):
            table = np.asarray(table)
            if table.shape != costs_LW.shape:
                raise QuantizationError(f"{what} of shape {table.shape}, costs of shape {costs_LW.shape}")
            tables.append(np.array([[int(value) for value in row] for row in table], dtype=object))
            if (tables[-1] < 0).any():
                raise QuantizationError(f"{what} below zero")
        for name, row in zip(names, costs_LW, strict=True):
            if np.isnan(row).any() or (row == -np.inf).any():
                raise QuantizationError(f"{name}: its sensitivity is not a number ({row.tolist()})")
            if np.isinf(row).all():
                raise QuantizationError(f"{name}: no width is allowed for it")
        return cls(costs_LW, *tables, size_budget, operations_budget, int(fixed_bytes), int(fixed_operations))

    # ------------------------------------------------------------------------------------------------------ what it is

    def cost(self, choices: Sequence[int]) -> float:
        return math.fsum(self.costs_LW[layer, choice] for layer, choice in enumerate(choices))

    def bytes(self, choices: Sequence[int]) -> int:
        return self.fixed_bytes + sum(self.bytes_LW[layer, choice] for layer, choice in enumerate(choices))

    def operations(self, choices: Sequence[int]) -> int:
        return self.fixed_operations + sum(self.operations_LW[layer, choice] for layer, choice in enumerate(choices))

    def allocation(self, choices: Sequence[int], is_optimal: bool) -> Allocation:
        choices = tuple(int(choice) for choice in choices)
        return Allocation(
            choices, self.cost(choices), self.bytes(choices), self.operations(choices), is_optimal=is_optimal
        )

    def limits(self) -> list[tuple[np.ndarray, int]]:
        """(uses_LW, what of the budget is left for them) of each budget."""
        found = []
        if self.size_budget is not None:
            found.append((self.bytes_LW, self.size_budget - self.fixed_bytes))
        if self.operations_budget is not None:
            found.append((self.operations_LW, self.operations_budget - self.fixed_operations))
        return found

    def is_within(self, choices: Sequence[int]) -> bool:
        return all(sum(uses[layer, c] for layer, c in enumerate(choices)) <= left for uses, left in self.limits())

    def is_allowed(self) -> np.ndarray:
        return np.isfinite(self.costs_LW)

    def smallest(self, uses_LW: np.ndarray) -> int:
        allowed = self.is_allowed()
        return sum(
            min(use for use, is_in in zip(row, ins, strict=True) if is_in)
            for row, ins in zip(uses_LW, allowed, strict=True)
        )

    def check_budgets(self) -> None:
        least_bytes = self.fixed_bytes + self.smallest(self.bytes_LW)
        least_operations = self.fixed_operations + self.smallest(self.operations_LW)
        if self.size_budget is not None and self.size_budget < least_bytes:
            raise QuantizationError(
                f"a size budget of {self.size_budget:,} bytes is below the smallest possible model, "
                f"{least_bytes:,} bytes"
            )
        if self.operations_budget is not None and self.operations_budget < least_operations:
            raise QuantizationError(
                f"a budget of {self.operations_budget:,} bit operations is below those of the smallest possible model, "
                f"{least_operations:,}"
            )

    def uniform_choices(self) -> list[tuple[int, ...]]:
        """The uniform widths that are allowed everywhere and within the budgets."""
        layers, widths = self.costs_LW.shape
        candidates = [(width,) * layers for width in range(widths) if self.is_allowed()[:, width].all()]
        return [choices for choices in candidates if self.is_within(choices)]

    # ------------------------------------------------------------------------------------------------------- solving it

    def excess_LW(self) -> np.ndarray:
        """Costs above the least of their layer, >= 0: what the solver minimises."""
        return self.costs_LW - self.costs_LW.min(axis=1, keepdims=True)

    def excess(self, choices: Sequence[int]) -> float:
        excess_LW = self.excess_LW()
        return math.fsum(excess_LW[layer, choice] for layer, choice in enumerate(choices))

    def least_cost(self, bound: float) -> tuple[tuple[int, ...] | None, bool]:
        """The choices of least cost, and whether that is proved; `bound` is the excess of a known choice."""
        if bound == 0:
            return None, True  # what is known is already the least of every layer
        excess_LW = self.excess_LW()
        # a choice that alone exceeds a known solution is in no optimum; and the known solution sets the unit, as the
        # solver stops at an absolute gap of 1e-6
        allowed_LW = self.is_allowed() & (excess_LW <= bound)
        unit = bound if math.isfinite(bound) else max(float(excess_LW[allowed_LW].max()), np.finfo(float).tiny)
        return self._solve(excess_LW / unit * 1e3, allowed_LW, [])

    def least_bytes(self, most_excess: float) -> tuple[int, ...] | None:
        """The choices of fewest bytes whose excess is `most_excess` at most."""
        excess_LW = self.excess_LW()
        allowed_LW = self.is_allowed() & (excess_LW <= most_excess)
        constraints = []
        if most_excess > 0:
            row = np.where(allowed_LW, excess_LW, 0.0).ravel() / most_excess
            constraints.append(LinearConstraint(row, -np.inf, 1 + SAME_COST))
        bytes_LW = (self.bytes_LW - self.bytes_LW.min()).astype(float)
        return self._solve(bytes_LW / max(1.0, bytes_LW.max()) * 1e3, allowed_LW, constraints)[0]

    def why_infeasible(self) -> str:
        if self.size_budget is None or self.operations_budget is None:
            return "the solver found no allocation within its time"
        alone = dataclasses.replace(self, size_budget=None)
        bytes_LW = self.bytes_LW.astype(float)
        smallest, _ = alone._solve(bytes_LW / max(1.0, bytes_LW.max()) * 1e3, self.is_allowed(), [])
        return (
            f"no model keeps both a size budget of {self.size_budget:,} bytes and a budget of "
            f"{self.operations_budget:,} bit operations; the smallest of so few operations has "
            f"{self.bytes(smallest):,} bytes"
        )

    def _solve(
        self, objective_LW: np.ndarray, allowed_LW: np.ndarray, more: list[LinearConstraint]
    ) -> tuple[tuple[int, ...] | None, bool]:
        """The choices of the least objective within the budgets, None if there are none; and whether that is proved."""
        layers, widths = self.costs_LW.shape
        objective = np.where(allowed_LW, objective_LW, 0.0).ravel()
        one_each = LinearConstraint(sparse.kron(sparse.eye(layers), np.ones((1, widths))).tocsr(), 1, 1)
        budgets = []
        for uses_LW, left in self.limits():
            # above each layer's least use, as a share of what is left beyond it: numbers that a solver likes
            least_L1 = np.array([[min(row)] for row in uses_LW], dtype=object)
            beyond = max(1, int(left - least_L1.sum()))
            row = (uses_LW - least_L1).ravel().astype(float) / beyond
            budgets.append(LinearConstraint(row, -np.inf, int(left - least_L1.sum()) / beyond))
        cuts: list[LinearConstraint] = []
        while len(cuts) < MOST_CUTS:
            solution = milp(
                objective,
                constraints=[one_each, *budgets, *more, *cuts],
                integrality=np.ones(layers * widths),
                bounds=Bounds(0, allowed_LW.ravel().astype(float)),
                options={"mip_rel_gap": 0.0, "time_limit": TIME_LIMIT},
            )
            if solution.x is None:
                return None, False
            choices = tuple(int(choice) for choice in solution.x.reshape(layers, widths).argmax(axis=1))
            if self.is_within(choices):
                return choices, solution.status == 0
            # over by less than the solver's tolerance: it, and whatever takes as much in every layer, is cut off
            for uses_LW, left in self.limits():
                taken_L1 = np.array([[uses_LW[layer, choice]] for layer, choice in enumerate(choices)], dtype=object)
                if taken_L1.sum() > left:
                    cuts.append(LinearConstraint((uses_LW >= taken_L1).ravel().astype(float), -np.inf, layers - 1))
        return None, False


def greedy_choices(problem: _Problem) -> tuple[int, ...] | None:
    allowed, limits = problem.is_allowed(), problem.limits()
    layers, widths = problem.costs_LW.shape
    # a use as a share of its budget; without a budget the bytes alone, so that a smallest model is defined
    weights = [(uses, 1 / max(1, left)) for uses, left in limits] or [(problem.bytes_LW, 1.0)]
    use_LW = sum(uses.astype(float) * share for uses, share in weights)
    use_LW = np.where(allowed, use_LW, np.inf)
    choices = use_LW.argmin(axis=1)
    if not problem.is_within(choices):
        return None
    used = [sum(uses[layer, choices[layer]] for layer in range(layers)) for uses, _ in limits]
    while True:
        best, best_rate = None, 0.0
        for layer in range(layers):
            now = choices[layer]
            for width in range(widths):
                saved = problem.costs_LW[layer, now] - problem.costs_LW[layer, width]
                if not allowed[layer, width] or saved <= 0:
                    continue
                fits = all(
                    used[place] + uses[layer, width] - uses[layer, now] <= left
                    for place, (uses, left) in enumerate(limits)
                )
                taken = use_LW[layer, width] - use_LW[layer, now]
                rate = saved / taken if taken > 0 else np.inf
                if fits and rate > best_rate:
                    best, best_rate = (layer, width), rate
        if best is None:
            return tuple(int(choice) for choice in choices)
        layer, width = best
        for place, (uses, _) in enumerate(limits):
            used[place] += uses[layer, width] - uses[layer, choices[layer]]
        choices[layer] = width
