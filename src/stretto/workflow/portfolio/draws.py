"""The luck of a rollout: each sample's draw follows from (seed, rollout, node, number of the launch, sample) alone.

So every policy that launches the same samples meets the same luck, models of a node are compared by the same luck, and
native code, the plain twin and the simulated world agree bit for bit. A sample's 32-bit word picks its row, and what
the word says within the row decides a success that is a probability.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from stretto.core.random import Words, philox
from stretto.workflow.portfolio.laws import Law
from stretto.workflow.portfolio.problem import Rules

IN_FLIGHT = 1 << 31
"""Set in the stream of samples that run when a rollout starts."""
_WORD = 2**32


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """What one sample does: seconds, check and cost."""

    latency_s: float
    success: bool
    cost: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """How all samples of a launch end.

    Attributes:
        seconds: until the batch ends.
        taken: money that the launch takes.
        back: money that comes back at the end.
        success: whether one sample succeeded.
    """

    seconds: float
    taken: float
    back: float
    success: bool


class Draws:
    """The words of some rollouts of one seed; blocks of rollouts are drawn at once and kept."""

    def __init__(self, seed: int, *, start: int = 0, count: int = 1) -> None:
        self._seed = seed
        self._start = start
        self._count = count
        self._words = lru_cache(maxsize=1024)(self._draw)

    def words(self, rollout: int, node: int, launch: int, count: int, *, in_flight: bool = False) -> list[int]:
        """`count` words of a rollout for the samples of launch number `launch` of node number `node`."""
        table = self._words(node, launch, -(-count // 4), IN_FLIGHT if in_flight else 0)
        found: list[int] = table[rollout - self._start, :count].tolist()
        return found

    def _draw(self, node: int, launch: int, blocks: int, flag: int) -> Words:
        counter = np.empty((self._count, blocks, 4), dtype=np.uint32)
        counter[..., 0] = np.arange(self._start, self._start + self._count)[:, None]
        counter[..., 1] = launch
        counter[..., 2] = node
        counter[..., 3] = np.arange(blocks) | flag
        key = np.array([self._seed & 0xFFFFFFFF, self._seed >> 32 & 0xFFFFFFFF], dtype=np.uint32)
        return philox(counter, key).reshape(self._count, -1)


def samples(law: Law, words: Sequence[int]) -> list[Sample]:
    """Fresh samples, a word each."""
    rows = len(law.latency_s)
    return [_sample(law, word * rows) for word in words]


def remainders(law: Law, words: Sequence[int], elapsed_s: float) -> list[Sample]:
    """Samples that have run for `elapsed_s`, drawn among the rows that are longer.

    Past the slowest row, a sample is taken to need as long again as it has had, with that row's check and cost.
    """
    rows = len(law.latency_s)
    from_row = bisect_right(law.latency_s, elapsed_s)
    if from_row < rows:
        return [_sample(law, word * (rows - from_row), from_row) for word in words]
    late = [_sample(law, word, rows - 1) for word in words]
    return [Sample(latency_s=2 * elapsed_s, success=each.success, cost=each.cost) for each in late]


def _sample(law: Law, at: int, from_row: int = 0) -> Sample:
    row = from_row + at // _WORD
    success = at % _WORD < int(law.success[row] * _WORD)
    return Sample(latency_s=law.latency_s[row], success=success, cost=law.cost[row])


def settle(
    rules: Rules, bound: float, drawn: Sequence[Sample], *, elapsed_s: float = 0.0, succeeded: bool = False
) -> Batch:
    """How a batch with these samples ends; those in flight have run for `elapsed_s`.

    Args:
        bound: the most that one sample may cost.
        succeeded: whether a sample that has returned before was a success.
    """
    successes = [each.latency_s for each in drawn if each.success]
    first = rules.ends == "first" and bool(successes)
    end = min(successes) if first else max(each.latency_s for each in drawn)
    spent = cost = 0.0
    for each in drawn:
        unused = 0.0 if each.latency_s <= end else 1 - end / each.latency_s
        spent += each.cost * (1 - rules.refund * unused)
        cost += each.cost
    taken = cost if rules.charge == "realised" else len(drawn) * bound
    return Batch(seconds=end - elapsed_s, taken=taken, back=taken - spent, success=bool(successes) or succeeded)
