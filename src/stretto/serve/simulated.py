"""The backend's simulated twin: takes modelled seconds on the clock and ends each answer at a length that is
known beforehand.

The engine and the scheduler in front of it are the product's own.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from itertools import pairwise
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

    def move_s(self, positions: int) -> float:
        """Copying the keys and values of so many positions from slot to slot."""


SharedPass = Callable[[float, Sequence[tuple[int, int]], Sequence[int]], Awaitable[None]]


class SimulatedBackend:
    """A `Backend` of seconds alone.

    Args:
        cost: what a pass takes.
        clock: on which it takes it.
        lengths: for each request, how many tokens its answer has, the ending one included.
        prompts: for each request, the length of its prompt.
        host_s: what the host takes between two steps with so many rows; the engine itself spends the first one.
        on_host: told of each such stretch.
        shared: carries out a pass on a device that others use too: (seconds alone, chunks, contexts); None: it takes
            its seconds. Passes of many steps are then taken one by one, since a neighbour may come at any time.
    """

    def __init__(
        self,
        cost: PassCost,
        clock: Clock,
        lengths: Mapping[int, int],
        prompts: Mapping[int, int],
        *,
        host_s: Callable[[int], float] = lambda rows: 0.0,
        on_host: Callable[[float, float], None] = lambda start, finish: None,
        shared: SharedPass | None = None,
    ) -> None:
        self.steps_at_once = 1 << 30 if shared is None else 1
        self._shared = shared
        self._cost = cost
        self._clock = clock
        self._lengths = lengths
        self._prompts = prompts
        self._host_s = host_s
        self._on_host = on_host

    async def run(self, work: Pass, steps: int, news: asyncio.Event) -> PassResult:
        steps = min(steps, self.steps_at_once)
        holes = [0] * work.holes
        yields = [row for row in (*work.prefill, *work.decode) if row.sampling is not None]
        contexts = [row.start for row in work.decode] + holes
        chunks = [(len(row.tokens), row.start) for row in work.prefill]
        if chunks:
            seconds = [self._cost.prefill_s(chunks, contexts)]
        else:
            seconds = self._cost.decode_s(contexts, min(steps, min(map(self._left, yields))))
        seconds[0] += self._cost.move_s(work.copied)
        if self._shared is None:
            spans = await self._take_time(self._spans(seconds, self._host_s(len(contexts))), news)
        else:
            start = self._clock.now
            await self._shared(seconds[0], chunks, contexts)
            spans = [(start, self._clock.now)]
        for (_, finish), (start, _) in pairwise(spans):
            if start > finish:
                self._on_host(finish, start)
        tokens = {row.id: self._tokens(row, len(spans)) for row in yields}
        return PassResult(tokens=tokens, spans_s=tuple(spans))

    def _spans(self, seconds: Sequence[float], gap: float) -> list[tuple[float, float]]:
        """Start and finish of successive steps with a gap between them, from now on."""
        spans, start = [], self._clock.now
        for s in seconds:
            spans.append((start, start + s))
            start = start + s + gap
        return spans

    async def _take_time(self, spans: list[tuple[float, float]], news: asyncio.Event) -> list[tuple[float, float]]:
        """Wait until the last span ends, or until the first one that ends after `news`; returns those that ended."""
        if len(spans) > 1:
            hear = asyncio.ensure_future(news.wait())
            try:
                async with self._clock.timeout(spans[-1][1] - self._clock.now):
                    await self._clock.wait(hear, "the simulated backend computes")
            except TimeoutError:
                return spans
            finally:
                hear.cancel()
            ends = [finish for _, finish in spans]
            spans = spans[: bisect_left(ends, self._clock.now) + 1]
        await self._clock.sleep(max(0.0, spans[-1][1] - self._clock.now))
        return spans

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
