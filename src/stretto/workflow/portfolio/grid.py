"""Will this workflow finish? The probability of completing over a grid of budgets and deadlines."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stretto.core.errors import require
from stretto.core.statistics import Interval
from stretto.workflow.portfolio.planner import MCPP, Policy
from stretto.workflow.portfolio.problem import Problem
from stretto.workflow.portfolio.simulate import check_limits, simulate
from stretto.workflow.portfolio.state import State

MAX_CELLS = 10_000
_NOMINAL = 0.95
"""A node's nominal budget makes it succeed this probably."""


@dataclass(frozen=True, kw_only=True)
class Surface:
    """Probabilities of completing: `cells[b][d]` is that of budget b within deadline d."""

    budgets: tuple[float, ...]
    deadlines_s: tuple[float, ...]
    cells: tuple[tuple[Interval, ...], ...]

    def table(self, unit: str = "") -> str:
        """The grid as text: a row a budget, a column a deadline, in percent."""
        heads = ["budget", *(f"{deadline:g} s" for deadline in self.deadlines_s)]
        rows = [
            [f"{budget:g} {unit}".strip(), *(f"{100 * cell.value:.0f} %" for cell in row)]
            for budget, row in zip(self.budgets, self.cells, strict=True)
        ]
        lines = [heads, *rows]
        widths = [max(len(line[at]) for line in lines) for at in range(len(heads))]
        return "\n".join(
            "  ".join(f"{text:>{width}}" for text, width in zip(line, widths, strict=True)) for line in lines
        )


def nominal_limits(problem: Problem) -> tuple[float, float]:
    """A budget and a deadline in seconds of the order that the workflow asks for: the middle of a sensible grid.

    The budget pays, for each node, the samples that make it succeed with 95 %; the deadline is the longest path of
    mean latency over success rate. Of a node's models the one that needs least counts; infinite if one cannot succeed.
    """
    workflow, laws = problem.workflow, problem.estimates.laws
    budget, ends = 0.0, dict[str, float]()
    for node in workflow.order:
        known = laws[node].values()
        budget += min(_samples_needed(law.success_rate) * law.mean_cost for law in known)
        own = min(law.mean_latency_s / law.success_rate if law.success_rate else math.inf for law in known)
        ends[node] = own + max((ends[parent] for parent in workflow.parents(node)), default=0.0)
    return budget, max(ends.values())


def _samples_needed(success_rate: float) -> float:
    if success_rate == 0:
        return math.inf
    return 1.0 if success_rate >= _NOMINAL else math.ceil(math.log(1 - _NOMINAL) / math.log(1 - success_rate))


def forecast(planner: MCPP, budgets: Sequence[float], deadlines_s: Sequence[float]) -> Surface:
    """At least this probability, at once: that of the first action and the best fixed continuation.

    A run is planned anew at each event and does better; `completion_surface` plays it.

    Raises:
        ValueError: for limits that are not ascending numbers >= 0, or more than 10,000 cells.
    """

    def cell(budget: float, deadline_s: float) -> Interval:
        state = State(done=frozenset(), time_left_s=deadline_s, money_left=budget)
        return planner.weigh(state).probability

    return _surface(budgets, deadlines_s, cell)


def completion_surface(
    planner: MCPP,
    budgets: Sequence[float],
    deadlines_s: Sequence[float],
    *,
    trials: int = 100,
    seed: int = 0,
    policy: Callable[[float], Policy] | None = None,
) -> Surface:
    """The probability of completing, by whole runs in the simulated world, the same luck in each cell.

    Args:
        trials: runs a cell.
        policy: another policy for a budget; the planner itself if none is given.

    Raises:
        ValueError: as `forecast`.
    """

    def cell(budget: float, deadline_s: float) -> Interval:
        chosen = planner if policy is None else policy(budget)
        return simulate(planner.problem, chosen, budget, deadline_s, trials=trials, seed=seed).probability

    return _surface(budgets, deadlines_s, cell)


def _surface(
    budgets: Sequence[float], deadlines_s: Sequence[float], cell: Callable[[float, float], Interval]
) -> Surface:
    for name, values in (("budgets", budgets), ("deadlines_s", deadlines_s)):
        require(bool(values) and list(values) == sorted(set(values)), name, tuple(values), "ascending numbers >= 0")
    check_limits(budgets[0], deadlines_s[0])
    cells = len(budgets) * len(deadlines_s)
    require(cells <= MAX_CELLS, "cells", cells, f"at most {MAX_CELLS}")
    return Surface(
        budgets=tuple(budgets),
        deadlines_s=tuple(deadlines_s),
        cells=tuple(tuple(cell(budget, deadline_s) for deadline_s in deadlines_s) for budget in budgets),
    )
