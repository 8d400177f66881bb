"""Small problems for the tests of portfolios."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

from stretto.workflow.portfolio.estimates import Estimates, Rollout, Workflow
from stretto.workflow.portfolio.laws import Law, Moments
from stretto.workflow.portfolio.problem import Problem, Rules
from stretto.workflow.portfolio.state import State

ALL_RULES = [
    Rules(charge=charge, ends=ends, refund=refund)
    for charge in ("reserved", "realised")
    for ends, refund in (("batch", 0.0), ("first", 0.0), ("first", 0.75))
]


def chain(nodes: int, success: float = 0.5, rules: Rules | None = None) -> Problem:
    """Nodes one after the other, of one second and one unit each."""
    names = tuple(f"n{at}" for at in range(nodes))
    moments = {name: {"m": Moments(success=success, latency_s=1.0)} for name in names}
    return Problem(
        workflow=Workflow(nodes=names, edges=tuple(pairwise(names))),
        estimates=Estimates.from_moments(moments),
        rules=rules or Rules(),
    )


def random_problem(seed: int, rules: Rules | None = None, *, nodes: int | None = None, rows: int = 8) -> Problem:
    """A random graph whose models have correlated rows; costs are whole numbers, so that sums are exact."""
    rng = random.Random(seed)
    count = nodes or rng.randint(1, 7)
    names = tuple(f"n{at}" for at in range(count))
    edges = {(names[rng.randrange(at)], names[at]) for at in range(1, count) for _ in range(rng.randint(0, 2))}
    observed = []
    for name in names:
        for model in ("small", "large")[: rng.randint(1, 2)]:
            rate = rng.choice((0.0, 0.3, 0.6, 0.9, 1.0))
            for _ in range(rows):
                latency_s = rng.choice((0.5, 1.0, 2.0, 4.0)) * rng.choice((1.0, 1.0, 1.25))
                passed = rng.random() < rate
                observed.append(
                    Rollout(node=name, model=model, latency_s=latency_s, success=passed, cost=float(rng.randint(1, 4)))
                )
    return Problem(
        workflow=Workflow(nodes=names, edges=tuple(sorted(edges))),
        estimates=Estimates.from_rollouts(observed),
        rules=rules or Rules(),
    )


def law(rows: Sequence[tuple[float, float, float]], bound: float | None = None) -> Law:
    """A law of rows (latency, success, cost)."""
    latency_s, success, cost = zip(*sorted(rows), strict=True)
    return Law(latency_s=latency_s, success=success, cost=cost, bound=max(cost) if bound is None else bound)


def diamond(rules: Rules | None = None) -> Problem:
    """A node, two beside each other, and one that needs both; few outcomes, so that exact answers are quick."""
    quick, slow = law([(1.0, 0.5, 1.0), (2.0, 0.5, 2.0)]), law([(1.0, 0.75, 2.0), (3.0, 1.0, 3.0)])
    return Problem(
        workflow=Workflow(nodes=("a", "b", "c", "d"), edges=(("a", "b"), ("a", "c"), ("b", "d"), ("c", "d"))),
        estimates=Estimates(laws={node: {"quick": quick, "slow": slow} for node in "abcd"}),
        rules=rules or Rules(),
    )


def start(time_left_s: float, money_left: float) -> State:
    return State(done=frozenset(), time_left_s=time_left_s, money_left=money_left)
