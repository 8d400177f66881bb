"""Which worker computes which tile of a product when tiles differ in cost: the four schedules of COMET.

COMET (Liu et al., 2024) multiplies blocks of 4-bit and of 8-bit activations; an 8-bit tile costs about two 4-bit ones.
"naive" deals tiles out in turn with a barrier after each round; "barrier_min" drops the barriers; "remap" gives the
longest tile left to the worker that is free first; "steal" does so too, and a worker that finds none left takes half of
what a running tile has not begun. A tile's sum runs over its slices in their order whoever computed them, so that
results do not depend on the schedule. Pure: costs in, pieces out; simulators and executors ask the same function.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from stretto.core.errors import require

Policy = Literal["naive", "barrier_min", "remap", "steal"]
POLICIES: tuple[Policy, ...] = ("naive", "barrier_min", "remap", "steal")


@dataclass(frozen=True, slots=True)
class Piece:
    """Slices [first, last) of a tile on one worker, from `start` to `end` in the unit of the costs."""

    tile: int
    first: int
    last: int
    worker: int
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class TileSchedule:
    """All pieces in the order in which they start, and when the last one ends."""

    policy: Policy
    workers: int
    pieces: tuple[Piece, ...]
    makespan: float

    @property
    def shared(self) -> int:
        """Partial sums that are handed over: pieces beyond the first of each tile."""
        return len(self.pieces) - len({piece.tile for piece in self.pieces})


def schedule(
    tiles: int, costs: Sequence[float], workers: int, policy: Policy = "remap", *, slices: int = 4
) -> TileSchedule:
    """Give every slice of every tile to a worker.

    Args:
        tiles: how many there are, numbered from 0.
        costs: of each tile, in any unit; not negative.
        workers: at least 1.
        slices: equal parts along the inner dimension into which "steal" may cut a tile.

    >>> [schedule(5, [2, 1, 1, 1, 1], 2, policy).makespan for policy in POLICIES]
    [4.0, 4.0, 3.0, 3.0]
    >>> schedule(3, [2, 2, 2], 2, "steal").makespan
    3.0
    """
    require(tiles == len(costs), "costs", len(costs), f"{tiles} numbers, one a tile")
    require(all(cost >= 0 for cost in costs), "costs", costs, "not negative")
    require(workers >= 1, "workers", workers, "at least 1")
    require(slices >= 1, "slices", slices, "at least 1")
    require(policy in POLICIES, "policy", policy, f"one of {', '.join(POLICIES)}")
    if policy == "steal":
        pieces = _Stealing(costs, workers, slices).run()
    elif policy == "remap":
        pieces = _longest_first(costs, workers, slices)
    else:
        pieces = _in_turn(costs, workers, slices, barriers=policy == "naive")
    ordered = sorted(pieces, key=lambda piece: (piece.start, piece.worker))
    return TileSchedule(policy, workers, tuple(ordered), max((piece.end for piece in pieces), default=0.0))


def _in_turn(costs: Sequence[float], workers: int, slices: int, *, barriers: bool) -> list[Piece]:
    free = [0.0] * workers
    pieces = []
    for tile, cost in enumerate(costs):
        worker = tile % workers
        if barriers and worker == 0:
            free = [max(free)] * workers
        pieces.append(Piece(tile, 0, slices, worker, free[worker], free[worker] + cost))
        free[worker] += cost
    return pieces


def _longest_first(costs: Sequence[float], workers: int, slices: int) -> list[Piece]:
    free = [(0.0, worker) for worker in range(workers)]
    pieces = []
    for tile in _by_cost(costs):
        start, worker = heapq.heappop(free)
        pieces.append(Piece(tile, 0, slices, worker, start, start + costs[tile]))
        heapq.heappush(free, (start + costs[tile], worker))
    return pieces


def _by_cost(costs: Sequence[float]) -> list[int]:
    return sorted(range(len(costs)), key=lambda tile: (-costs[tile], tile))


@dataclass(slots=True)
class _Work:
    """Slices [next, last) of a tile that a worker holds; those before `next` are done or being done since `start`."""

    tile: int
    first: int
    next: int
    last: int
    start: float


class _Stealing:
    """Slice by slice: each worker at the end of one takes its next, a new tile, or half of another's rest."""

    def __init__(self, costs: Sequence[float], workers: int, slices: int) -> None:
        self.costs = costs
        self.slices = slices
        self.queue = _by_cost(costs)[::-1]
        self.held: list[_Work | None] = [None] * workers
        self.pieces: list[Piece] = []

    def run(self) -> list[Piece]:
        ready = [(0.0, worker) for worker in range(len(self.held))]
        while ready:
            now, worker = heapq.heappop(ready)
            work = self.held[worker]
            if work is not None and work.next == work.last:
                self._done(work, worker, now)
                work = None
            if work is None:
                work = self.held[worker] = self._take(now)
            if work is not None:
                work.next += 1
                heapq.heappush(ready, (now + self._slice(work), worker))
        return self.pieces

    def _slice(self, work: _Work) -> float:
        return self.costs[work.tile] / self.slices

    def _done(self, work: _Work, worker: int, now: float) -> None:
        self.held[worker] = None
        self.pieces.append(Piece(work.tile, work.first, work.last, worker, work.start, now))

    def _take(self, now: float) -> _Work | None:
        if self.queue:
            return _Work(self.queue.pop(), 0, 0, self.slices, now)
        richest = max(
            (work for work in self.held if work is not None and work.next < work.last),
            key=lambda work: (work.last - work.next) * self._slice(work),
            default=None,
        )
        if richest is None:
            return None
        cut = richest.last - (richest.last - richest.next + 1) // 2
        taken = _Work(richest.tile, cut, cut, richest.last, now)
        richest.last = cut
        return taken
