"""Measures each pass on its way to the backend: progress, speed, and what the tables say it should have taken."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from stretto.core.clock import Clock
from stretto.core.faults import BackendCrash
from stretto.serve.backend import Backend, Pass, PassResult
from stretto.serve.predict import PassCosts

log = logging.getLogger("stretto.serve")

HISTORY_S = 60
STEPS_KEPT = 60


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One pass that was carried out.

    Attributes:
        seconds: how long it took.
        chunks: of prompts: (new tokens, cached positions).
        contexts: cached positions of each row that decoded.
    """

    seconds: float
    chunks: tuple[tuple[int, int], ...]
    contexts: tuple[int, ...]


@dataclass(slots=True)
class Second:
    """What was done in one second of the clock."""

    at: int
    prompt_tokens: int = 0
    new_tokens: int = 0


class Meter:
    """A `Backend` in front of another one, which it watches.

    Whatever a pass raises becomes a `BackendCrash`, from which the engine recovers: one bad pass does not end it all.

    Args:
        inner: who computes.
        clock: the engine's.
        costs: the tables of this machine, to predict passes; None predicts nothing.
        on_step: called after each pass with the prompt tokens it took in and the tokens it gave out.

    Attributes:
        progressed_s: when a pass last ended, or when work last began after an idle time.
    """

    def __init__(
        self,
        inner: Backend,
        clock: Clock,
        *,
        costs: PassCosts | None = None,
        on_step: Callable[[int, int], None] = lambda prompt_tokens, new_tokens: None,
    ) -> None:
        self.steps_at_once = inner.steps_at_once
        self.progressed_s = clock.now
        self.steps_done = 0
        self._inner = inner
        self._clock = clock
        self._costs = costs
        self._on_step = on_step
        self._steps: deque[Step] = deque(maxlen=STEPS_KEPT)
        self._predicted: dict[Step, float] = {}
        self._seconds: deque[Second] = deque(maxlen=HISTORY_S + 1)

    def begin(self) -> None:
        """Work begins now; the time before was idle."""
        self.progressed_s = self._clock.now

    async def run(self, work: Pass, steps: int, news: asyncio.Event) -> PassResult:
        try:
            result = await self._inner.run(work, steps, news)
        except BackendCrash:
            raise
        except Exception as error:
            log.exception("a pass has failed; the live requests are started over")
            raise BackendCrash(str(error)) from error
        self.progressed_s = self._clock.now
        prompt_tokens = sum(len(row.tokens) for row in work.prefill)
        new_tokens = sum(map(len, result.tokens.values()))
        chunks = tuple((len(row.tokens), row.start) for row in work.prefill)
        for number, (start, finish) in enumerate(result.spans_s):
            self.steps_done += 1
            contexts = tuple(row.start + number for row in work.decode)
            self._steps.append(Step(seconds=finish - start, chunks=() if number else chunks, contexts=contexts))
        second = self._second()
        second.prompt_tokens += prompt_tokens
        second.new_tokens += new_tokens
        self._on_step(prompt_tokens, new_tokens)
        return result

    def wipe(self) -> None:
        self._inner.wipe()

    def forget(self, ids: Iterable[int]) -> None:
        self._inner.forget(ids)

    def _second(self) -> Second:
        now = int(self._clock.now)
        if not self._seconds or self._seconds[-1].at != now:
            self._seconds.append(Second(now))
        return self._seconds[-1]

    def history(self) -> list[tuple[int, int]]:
        """(prompt tokens, new tokens) of each of the last 60 whole seconds, the latest last."""
        now = int(self._clock.now)
        seen = {second.at: (second.prompt_tokens, second.new_tokens) for second in self._seconds}
        return [seen.get(at, (0, 0)) for at in range(now - HISTORY_S, now)]

    def rates(self, seconds: int = 10) -> tuple[float, float]:
        """(prompt tokens, new tokens) a second, over the last whole `seconds`."""
        last = self.history()[-seconds:]
        return sum(prompt for prompt, _ in last) / seconds, sum(new for _, new in last) / seconds

    def recent(self) -> list[tuple[Step, float | None]]:
        """The last passes, each with its predicted seconds, or None where this machine has no tables."""
        steps = list(self._steps)
        if self._costs is None:
            return [(step, None) for step in steps]
        self._predicted = {step: self._predicted.get(step) or self._predict(self._costs, step) for step in steps}
        return [(step, self._predicted[step]) for step in steps]

    @staticmethod
    def _predict(costs: PassCosts, step: Step) -> float:
        if step.chunks:
            return costs.prefill_s(step.chunks, step.contexts)
        return costs.decode_s(step.contexts, 1)[0]
