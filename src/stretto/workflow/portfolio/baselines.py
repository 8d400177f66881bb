"""What the planner is held against: the same samples for every node, or a budget that is split beforehand."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

import numpy as np

from stretto.core.errors import require
from stretto.core.random import uniform
from stretto.workflow.portfolio.problem import Action, Launch, Problem
from stretto.workflow.portfolio.state import State


@dataclass(frozen=True, kw_only=True)
class Seq:
    """Seq-(model, count): every ready node gets `count` samples on `model` (its first one where it lacks it)."""

    problem: Problem
    model: str
    count: int

    def plan(self, state: State) -> Action:
        ready = self.problem.workflow.ready(state.done, [flight.node for flight in state.flights])
        return tuple(Launch(node=node, model=self.model, count=self.count) for node in ready)


@dataclass(frozen=True, kw_only=True)
class Split:
    """A budget that is split over the nodes before the run.

    A node gets as many samples as its share pays for at their mean cost, and at least one; if all fail, the same again
    while there is money (the publication gives each node one launch only). Where the money left does not cover what
    the samples may cost, it gets fewer.

    Attributes:
        model: of every node (its first one where it lacks it).
        by: how the budget is split, a name in `SPLITS`.
        seed: of the random split.
    """

    problem: Problem
    model: str
    budget: float
    by: str = "uniform"
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.by in SPLITS, "by", self.by, f"one of {', '.join(SPLITS)}")

    @cached_property
    def counts(self) -> Mapping[str, int]:
        """Samples of each node."""
        weights = SPLITS[self.by](self.problem, self.model, self.seed)
        total = math.fsum(weights.values())
        estimates = self.problem.estimates
        shares = {node: self.budget * weight / total if total else 0.0 for node, weight in weights.items()}
        costs = {node: estimates.law(node, self.model).mean_cost for node in shares}
        counts = {node: _times(share, costs[node]) for node, share in shares.items()}
        return MappingProxyType(counts)

    def plan(self, state: State) -> Action:
        money, action = state.money_left, list[Launch]()
        for node in self.problem.workflow.ready(state.done, [flight.node for flight in state.flights]):
            bound = self.problem.estimates.law(node, self.model).bound
            count = max(1, min(self.counts[node], _times(money, bound)))
            money -= count * bound
            action.append(Launch(node=node, model=self.model, count=count))
        return tuple(action)


_MOST = 1024


def _times(money: float, price: float) -> int:
    """How often `money` pays `price`: 1 to 1024."""
    return max(1, min(_MOST, int(max(0.0, money) / price))) if price > 0 else _MOST


Weights = Mapping[str, float]


def _uniform(problem: Problem, model: str, seed: int) -> Weights:
    return dict.fromkeys(problem.workflow.nodes, 1.0)


def _dirichlet(problem: Problem, model: str, seed: int) -> Weights:
    draws = -np.log1p(-uniform(seed, 0, np.arange(len(problem.workflow.nodes))))
    return dict(zip(problem.workflow.nodes, draws.tolist(), strict=True))


def _latency(problem: Problem, model: str, seed: int) -> Weights:
    return {node: problem.estimates.law(node, model).mean_latency_s for node in problem.workflow.nodes}


def _failure(problem: Problem, model: str, seed: int) -> Weights:
    return {node: 1 - problem.estimates.law(node, model).success_rate for node in problem.workflow.nodes}


def _critical_path(problem: Problem, model: str, seed: int) -> Weights:
    """Seconds of the longest path from a node to the end."""
    workflow, own = problem.workflow, _latency(problem, model, seed)
    path = dict(own)
    for node in reversed(workflow.order):
        for parent in workflow.parents(node):
            path[parent] = max(path[parent], own[parent] + path[node])
    return path


SPLITS: Mapping[str, Callable[[Problem, str, int], Weights]] = MappingProxyType(
    {
        "uniform": _uniform,
        "dirichlet": _dirichlet,
        "latency": _latency,
        "failure": _failure,
        "critical-path": _critical_path,
    }
)
"""Ways to split a budget: alike, at random, by mean latency, by 1 - success rate, by the longest path to the end."""
