"""The actions that are weighed in a state: always the uniform ones, then mixtures.

Uniform: every ready node gets the same model and the same number of samples. Mixtures: the full product of (model,
count) over the ready nodes where it is small; else a full product over a few nodes drawn at random, the others sharing
one count on their first models. Where that is too many, a random part of it is weighed. An action gives every ready
node something: nothing is held back on purpose. Cheaper models come first, since of equally good actions the earlier
one is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from stretto.core.random import uniform
from stretto.workflow.portfolio.problem import Problem

Codes = NDArray[np.int32]
_FREE, _PICKED = 1, 2
"""Streams of the draws."""
_SHUFFLED = 2**14
"""Up to so many mixtures are shuffled; of more, some are drawn."""


def candidates(
    problem: Problem, ready: Sequence[str], levels: int, *, free_nodes: int, max_actions: int, seed: int
) -> Codes:
    """The actions for these ready nodes, one a row: for each node of the workflow the code model * levels + level.

    Args:
        ready: the nodes that may start, at least one.
        levels: the number of sample counts.
        free_nodes: nodes that get the full product where not all can.
        max_actions: at most so many rows, but never fewer than the uniform ones.

    Returns:
        Distinct rows, uniform actions first; -1 for nodes that are not ready.
    """
    nodes = [problem.workflow.index[node] for node in ready]
    choices = [problem.cheapest_first[node] for node in nodes]
    models = sorted({m for own in choices for m in own}, key=lambda m: sum(own.index(m) for own in choices if m in own))
    firsts = [min(own) for own in choices]
    base = [
        [(m if m in own else first) * levels + level for own, first in zip(choices, firsts, strict=True)]
        for m in models
        for level in range(levels)
    ]
    base += [[first * levels + level for first in firsts] for level in range(levels)]

    sizes = [len(own) * levels for own in choices]
    small = len(nodes) <= free_nodes and math.prod(sizes) <= levels**free_nodes
    free = list(range(len(nodes))) if small else _drawn(len(nodes), free_nodes, seed)
    shared = 1 if len(free) == len(nodes) else levels
    total = math.prod(sizes[at] for at in free) * shared
    room = max(0, max_actions - len(base))
    mixed = _mixtures(free, firsts, choices, levels, shared, _some(total, room, seed))

    rows = list(dict.fromkeys(map(tuple, [*base, *mixed.tolist()])))
    table = np.full((len(rows), len(problem.workflow.nodes)), -1, dtype=np.int32)
    table[:, nodes] = rows
    return table


def _mixtures(
    free: list[int],
    firsts: list[int],
    choices: list[tuple[int, ...]],
    levels: int,
    shared: int,
    picked: NDArray[np.int64],
) -> NDArray[np.int64]:
    """The mixtures of these numbers: mixed-radix digits, one a free node, and the level that the others share."""
    rest, level = np.divmod(picked, shared)
    rows = np.array(firsts) * levels + level[:, None]
    for at in reversed(free):
        rest, digit = np.divmod(rest, len(choices[at]) * levels)
        rows[:, at] = np.array(choices[at])[digit // levels] * levels + digit % levels
    return rows


def _drawn(count: int, of: int, seed: int) -> list[int]:
    """`of` of the numbers below `count` (or all), at random, ascending."""
    order = np.argsort(uniform(seed, _FREE, np.arange(count)), kind="stable")
    return sorted(order[:of].tolist())


def _some(total: int, room: int, seed: int) -> NDArray[np.int64]:
    """The numbers below `total`, or distinct ones of them at random, ascending: `room`, or a little fewer where a large
    range has given some twice.
    """
    if total <= room:
        return np.arange(total)
    if total <= _SHUFFLED:
        order = np.argsort(uniform(seed, _PICKED, np.arange(total)), kind="stable")
        return np.sort(order[:room])
    return np.unique((uniform(seed, _PICKED, np.arange(room)) * total).astype(np.int64))
