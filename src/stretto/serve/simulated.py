"""The backend's simulated twin: takes modelled seconds on the clock and ends each answer at a length that is known beforehand.

The engine and the scheduler in front of it are the product's own.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Protocol

from stretto.core.clock import Clock
from stretto.serve.backend import Pass, PassResult, Row

TOKEN, END = 0, 1
"""The ids that the twin yields: any token, and the one that ends an answer."""


class PassCost(Protocol):
    """Seconds of passes on a machine."""

    def prefill_s(self, chunks: Sequence[tuple[int, int]], decode_contexts: Sequence[int]) -> float:
        """One pass with prompt chunks (new tokens, cached tokens) and rows that decode at these contexts."""

    def decode_s(self, contexts: Sequence[int], steps: int) -> list[float]:
        """Each of `steps` successive passes of rows that decode, at these contexts in the first of them."""


class SimulatedBackend:
    """A `Backend` of seconds alone.

    Args:
        cost: what a pass takes.
        clock: on which it takes it.
        lengths: for each request, how many tokens its answer has, the ending one included.
        prompts: for each request, the length of its prompt.
    """

    steps_at_once = 1 << 30

    def __init__(
        self, cost: PassCost, clock: Clock, lengths: Mapping[int, int], prompts: Mapping[int, int]
    ) -> None:
        self._cost = cost
        self._clock = clock
        self._lengths = lengths
        self._prompts = prompts

    async def run(self, work: Pass, steps: int, news: asyncio.Event) -> PassResult:
        yields = [row for row in (*work.prefill, *work.decode) if row.sampling is not None]
        contexts = [row.start for row in work.decode]
        if work.prefill:
            chunks = [(len(row.tokens), row.start) for row in work.prefill]
            seconds = [self._cost.prefill_s(chunks, contexts)]
        else:
            seconds = self._cost.decode_s(contexts, min(steps, min(map(self._left, yields))))
        edges = list(accumulate(seconds, initial=self._clock.now))
        edges = await self._pass_time(edges, news)
        tokens = {row.id: self._tokens(row, len(edges) - 1) for row in yields}
        return PassResult(tokens=tokens, boundaries_s=tuple(edges))

    async def _pass_time(self, edges: list[float], news: asyncio.Event) -> list[float]:
        """Wait until the last of `edges`, or until the first one after `news`; returns the edges that were reached."""
        if len(edges) > 2:
            hear = asyncio.ensure_future(news.wait())
            try:
                async with self._clock.timeout(edges[-1] - edges[0]):
                    await self._clock.wait(hear, "the simulated backend computes")
            except TimeoutError:
                return edges
            finally:
                hear.cancel()
            reached = max(1, bisect_left(edges, self._clock.now))
            edges = edges[: reached + 1]
        await self._clock.sleep(max(0.0, edges[-1] - self._clock.now))
        return edges

    def wipe(self) -> None:
        """Nothing is held, so there is nothing to forget."""

    def forget(self, ids: Iterable[int]) -> None:
        """Likewise."""

    def _left(self, row: Row) -> int:
        """Tokens that the row's answer still lacks."""
        return self._lengths[row.id] - (row.position - self._prompts[row.id])

    def _tokens(self, row: Row, steps: int) -> tuple[int, ...]:
        left = self._left(row)
        return (TOKEN,) * (steps - 1) + (END if left == steps else TOKEN,)
