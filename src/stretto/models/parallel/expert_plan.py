"""Where the tokens of each expert are computed: with the expert, or on ranks that have least to do.

Least-loaded expert parallelism (arXiv 2601.17111, 2026): a rank that would be over its capacity gives tokens, and the
weights of their expert, to the ranks with the least load, counting what those still have to do of their own. The plan
is a function of the counts alone, so that every rank makes the same one. It is exact: routing is not touched.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stretto.core.errors import require


class Stretch(NamedTuple):
    """The copies [start, stop) of an expert's tokens, numbered over all ranks, and the place that computes them."""

    place: int
    start: int
    stop: int


class Loan(NamedTuple):
    """An expert whose weights go from their owner to a helper."""

    expert: int
    owner: int
    helper: int


@dataclass(frozen=True, kw_only=True)
class ExpertPlan:
    """Who computes what.

    Attributes:
        stretches: of each expert, in order; together they are all of its copies.
        loans: one for each expert and place that computes it and does not own it.
        native_loads, loads: copies by place, with the experts and as planned.
    """

    stretches: tuple[tuple[Stretch, ...], ...]
    loans: tuple[Loan, ...]
    native_loads: tuple[int, ...]
    loads: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "stretches": [[list(stretch) for stretch in each] for each in self.stretches],
            "loans": [list(loan) for loan in self.loans],
            "native_loads": list(self.native_loads),
            "loads": list(self.loads),
        }


def imbalance(counts: Sequence[int] | NDArray[np.int64], world: int) -> float:
    """The greatest load of a place over the mean, every token computed with its expert; 1 where there are none."""
    loads = _native(_checked(counts, world), world)
    total = int(loads.sum())
    return float(loads.max() * world / total) if total else 1.0


def native_plan(counts: Sequence[int] | NDArray[np.int64], world: int) -> ExpertPlan:
    """Every token with its expert."""
    known = _checked(counts, world)
    each = len(known) // world
    stretches = tuple((Stretch(e // each, 0, n),) if n else () for e, n in enumerate(known.tolist()))
    loads = tuple(_native(known, world).tolist())
    return ExpertPlan(stretches=stretches, loans=(), native_loads=loads, loads=loads)


def lla_plan(
    counts: Sequence[int] | NDArray[np.int64], world: int, *, alpha: float = 1.0, min_tokens: int = 1024
) -> ExpertPlan:
    """The least-loaded assignment.

    Args:
        counts: of each expert, its tokens' copies over all ranks; expert e belongs to place e // (experts / world).
        world: places.
        alpha: a place's capacity, as a multiple of the mean load.
        min_tokens: a helper takes no fewer than this, unless it takes all that is left.

    Raises:
        FieldError: experts do not divide by places, a count is negative, or alpha is not positive.
    """
    require(alpha > 0, "alpha", alpha, "positive")
    require(min_tokens >= 0, "min_tokens", min_tokens, "not negative")
    known = _checked(counts, world)
    return _Planner(known.tolist(), world, alpha, min_tokens).plan()


class _Planner:
    def __init__(self, counts: list[int], world: int, alpha: float, min_tokens: int):
        self.counts, self.world, self.min_tokens = counts, world, min_tokens
        self.each = len(counts) // world
        self.capacity = max(1, int(alpha * (sum(counts) // world)))
        self.native = [sum(counts[place * self.each : (place + 1) * self.each]) for place in range(world)]
        self.load: list[float] = list(self.native)  # given, and of its own to come
        self.assigned = [0] * world
        self.stretches: list[list[Stretch]] = [[] for _ in counts]

    def plan(self) -> ExpertPlan:
        for expert in sorted(range(len(self.counts)), key=self.counts.__getitem__, reverse=True):  # ties by number
            count = self.counts[expert]
            if count:
                self._place(expert, expert // self.each, count)
        merged = tuple(tuple(_merged(each)) if len(each) > 1 else tuple(each) for each in self.stretches)
        loans = [
            Loan(expert, expert // self.each, place)
            for expert, each in enumerate(merged)
            if len(each) > 1 or (each and each[0].place != expert // self.each)
            for place in sorted({stretch.place for stretch in each} - {expert // self.each})
        ]
        return ExpertPlan(
            stretches=merged, loans=tuple(loans), native_loads=tuple(self.native), loads=tuple(self.assigned)
        )

    def _place(self, expert: int, owner: int, count: int) -> None:
        over = int(self.load[owner]) - self.capacity  # with this expert, which its owner's load counts already
        stays = count if over <= 0 or self.world == 1 else max(count - over, 0)
        if stays:
            self._give(expert, owner, 0, stays)
        if stays == count:
            return
        held = self.load[owner] - (count - stays)
        start, self.load[owner] = stays, math.inf  # no helper of its own
        while start < count:
            helper, part = self._helper(count - start)
            self.load[helper] += part
            self._give(expert, helper, start, start + part)
            start += part
        self.load[owner] = held

    def _helper(self, left: int) -> tuple[int, int]:
        """Who takes how many: the least loaded what it has room for, or all that is left if that is not enough.

        Others have no more room than the least loaded, so where it has not enough, nobody has.
        """
        least = min(range(self.world), key=self.load.__getitem__)
        part = min(left, self.capacity - int(self.load[least]))
        enough = part > 0 and (part >= self.min_tokens or part == left)
        return least, part if enough else left

    def _give(self, expert: int, place: int, start: int, stop: int) -> None:
        self.assigned[place] += stop - start
        self.stretches[expert].append(Stretch(place, start, stop))


def _merged(stretches: list[Stretch]) -> list[Stretch]:
    """Neighbours on one place as one; two apart on one place are still one loan."""
    found: list[Stretch] = []
    for stretch in stretches:
        if found and found[-1].place == stretch.place and found[-1].stop == stretch.start:
            found[-1] = Stretch(stretch.place, found[-1].start, stretch.stop)
        else:
            found.append(stretch)
    return found


def _checked(counts: Sequence[int] | NDArray[np.int64], world: int) -> NDArray[np.int64]:
    known = np.asarray(counts, np.int64)
    require(world >= 1, "world", world, "at least 1")
    require(len(known) % world == 0 and len(known) > 0, "experts", len(known), f"a multiple of the {world} ranks")
    require(not len(known) or int(known.min()) >= 0, "counts", int(known.min()), "not negative")
    return known


def _native(counts: NDArray[np.int64], world: int) -> NDArray[np.int64]:
    loads: NDArray[np.int64] = counts.reshape(world, -1).sum(1)
    return loads


@dataclass(frozen=True, kw_only=True)
class Routes:
    """How many rows go from each rank to each place, expert by expert.

    Attributes:
        send: int64 [experts, world]: of this rank's copies of each expert, how many each place computes.
        arrive: int64 [world, experts]: of each rank's copies of each expert, how many this place computes.
    """

    send: NDArray[np.int64]
    arrive: NDArray[np.int64]


def routes(plan: ExpertPlan, counts: NDArray[np.int64], place: int) -> Routes:
    """The plan as rank `place` sees it.

    Args:
        counts: int64 [world, experts]: the copies of each expert that each rank has; numbered rank after rank.
    """
    world, experts = counts.shape
    ends = np.cumsum(counts, axis=0)
    begins = ends - counts
    send = np.zeros((experts, world), np.int64)
    arrive = np.zeros((world, experts), np.int64)
    for expert, stretches in enumerate(plan.stretches):
        for stretch in stretches:
            low = np.maximum(begins[:, expert], stretch.start)
            shared = np.maximum(np.minimum(ends[:, expert], stretch.stop) - low, 0)
            send[expert, stretch.place] += shared[place]
            if stretch.place == place:
                arrive[:, expert] += shared
    return Routes(send=send, arrive=arrive)


def hot_experts(tokens: int, experts: int, top_k: int, *, share: float, hot: int) -> NDArray[np.int64]:
    """Routing int64 [tokens, top_k] in which the first `share` of the tokens go to the first `hot` experts alone.

    All copies of a token go to experts of its kind, in turn, so one expert may have a token twice. `share` 0 with
    `hot` 0 is balanced.
    """
    require(0 <= share <= 1, "share", share, "from 0 to 1")
    require(0 <= hot < experts, "hot", hot, f"from 0 to {experts - 1}")
    number = np.arange(tokens * top_k).reshape(tokens, top_k)
    first = round(share * tokens) if hot else 0
    cold = hot + (number - first * top_k) % (experts - hot)
    return np.where(np.arange(tokens)[:, None] < first, number % max(hot, 1), cold)
