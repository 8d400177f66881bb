"""Task libraries drawn from the statistics of the published rollouts: 5,000 pairs of a node and a model.

Quartiles over those pairs: success .38/.53/.67 (least .03, most .99), mean latency 3.1/5.7/10.6 s (most 52), its
standard deviation 0.9/2.1/4.8 s, output tokens 1.0k/1.8k/3.3k. Between them values are interpolated; ends that are not
published continue the quartiles' own ratios. Assumed: how hard a node is, is half common to its models; latency and
tokens of a sample share one lognormal factor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import special

from stretto.core.errors import require
from stretto.core.random import uniform
from stretto.workflow.portfolio.estimates import Estimates, Rollout, Workflow
from stretto.workflow.portfolio.problem import Problem, Rules

PRICES: Mapping[str, float] = {
    "30b-instruct": 0.8,
    "30b-think": 2.4,
    "4b-instruct": 0.42,
    "4b-think": 1.26,
}
"""Dollars a million output tokens, as the publication has them."""

_AT = (0.0, 0.25, 0.5, 0.75, 1.0)
_SUCCESS = (0.03, 0.38, 0.53, 0.67, 0.99)
_LATENCY_S = (3.1 * 3.1 / 5.7, 3.1, 5.7, 10.6, 52.0)
_STD_S = (0.9 * 0.9 / 2.1, 0.9, 2.1, 4.8, 4.8 * 4.8 / 2.1)
_TOKENS = (1000 * 1000 / 1800, 1000.0, 1800.0, 3300.0, 3300 * 3300 / 1800)

Numbers = NDArray[np.float64]


def draw_problem(
    seed: int,
    *,
    nodes: int | None = None,
    models: Sequence[str] = ("30b-instruct", "4b-instruct"),
    rows: int = 100,
    rules: Rules | None = None,
) -> Problem:
    """A workflow of 6 to 12 nodes (or `nodes`) with `rows` rollouts of each node on each model, costs in dollars.

    Each node but the first waits for one or two of the three nodes before it.
    """
    require(1 <= rows <= 10_000, "rows", rows, "in 1 .. 10000")
    for model in models:
        require(model in PRICES, "models", model, f"one of {', '.join(PRICES)}")
    count = 6 + int(uniform(seed, 0, 0) * 7) if nodes is None else nodes
    names = tuple(f"step-{at + 1}" for at in range(count))
    edges = {(names[parent], names[at]) for at in range(1, count) for parent in _parents(seed, at)}
    observed = [row for at, node in enumerate(names) for row in _rollouts(seed, at, node, models, rows)]
    return Problem(
        workflow=Workflow(nodes=names, edges=tuple(sorted(edges, key=lambda edge: (names.index(edge[1]), edge)))),
        estimates=Estimates.from_rollouts(observed, cost="money", prices=PRICES),
        rules=rules or Rules(),
    )


def _parents(seed: int, at: int) -> list[int]:
    nearest = min(at, 3)
    draws = uniform(seed, 1, np.arange(3 * at, 3 * at + 3))
    count = 1 + int(draws[0] * 2)
    return [at - 1 - int(draw * nearest) for draw in draws[1 : 1 + count]]


def _rollouts(seed: int, at: int, node: str, models: Sequence[str], rows: int) -> list[Rollout]:
    found = list[Rollout]()
    hard = uniform(seed, 2, np.arange(2 * at, 2 * at + 2))
    for number, model in enumerate(models):
        first = (at * len(PRICES) + number) * 4
        own = uniform(seed, 3, np.arange(first, first + 4))
        success = float(np.interp(_blend(hard[0], own[0]), _AT, _SUCCESS))
        mean = _between(_blend(hard[1], own[1]), _LATENCY_S)
        std = _between(_blend(_blend(hard[1], own[1]), own[2]), _STD_S)
        tokens = _between(_blend(_blend(hard[1], own[1]), own[3]), _TOKENS)
        stream = 4 + at * len(PRICES) + number
        factor = _lognormal(uniform(seed, stream, np.arange(rows)), std / mean)
        passed = uniform(seed, stream, np.arange(rows, 2 * rows)) < success
        found += [
            Rollout(
                node=node,
                model=model,
                latency_s=mean * float(times),
                success=bool(good),
                tokens=max(1, round(tokens * float(times))),
            )
            for times, good in zip(factor, passed, strict=True)
        ]
    return found


def _blend(common: float, own: float) -> float:
    """A quantile, uniform again, whose normal score shares half of its variance with `common`."""
    scores = special.ndtri(np.clip([common, own], 1e-9, 1 - 1e-9))
    return float(special.ndtr(scores.sum() / math.sqrt(2)))


def _between(at: float, values: Sequence[float]) -> float:
    return math.exp(float(np.interp(at, _AT, np.log(values))))


def _lognormal(at: Numbers, variation: float) -> Numbers:
    """Factors of mean 1 with this coefficient of variation."""
    variance = math.log1p(variation**2)
    scores = special.ndtri(np.clip(at, 1e-9, 1 - 1e-9))
    factors: Numbers = np.exp(math.sqrt(variance) * scores - variance / 2)
    return factors
