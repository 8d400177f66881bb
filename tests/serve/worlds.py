"""Small worlds on virtual time for the tests of the engine: a cost of round numbers, requests, a run to the end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from stretto.core.clock import VirtualClock, simulate_async
from stretto.core.eventlog import EventLog
from stretto.core.faults import Fault, FaultInjector
from stretto.core.record import Recorder
from stretto.core.trace import Trace
from stretto.serve.backend import Backend, Pass, PassResult, Row
from stretto.serve.engine import Engine
from stretto.serve.lane_engine import engine_of
from stretto.serve.request import Answer, Request
from stretto.serve.sampling import Sampling
from stretto.serve.scheduler import Scheduler
from stretto.serve.scheduler_config import SchedulerConfig
from stretto.serve.simulated import END, PassCost, SimulatedBackend

GARBAGE = 2
"""What a backend gives that has lost what it read."""


class RoundCost:
    """A pass takes 1 s and 1 ms a prompt token, whatever the rows."""

    def prefill_s(self, chunks: Sequence[tuple[int, int]], decode_contexts: Sequence[int]) -> float:
        return 1.0 + 0.001 * sum(new for new, _ in chunks)

    def decode_s(self, contexts: Sequence[int], steps: int) -> list[float]:
        return [1.0] * steps

    def move_s(self, positions: int) -> float:
        return 1e-6 * positions


@dataclass(frozen=True)
class Ask:
    """A request of a world: when it comes, its prompt's length, the length of its answer, its limit, when it
    is cancelled, how urgent it is, and how long it may take.
    """

    at: float = 0.0
    prompt: int = 10
    length: int = 5
    limit: int = 100
    cancel_at: float | None = None
    priority: int = 0
    deadline: float | None = None
    family: int = 7
    """Prompts of one family begin alike."""


@dataclass
class World:
    """What came of a run."""

    answers: dict[int, Answer]
    trace: Trace
    log: EventLog
    scheduler: Scheduler
    failures: int
    injected: list[Fault] = field(default_factory=list)
    passes: list[Pass] = field(default_factory=list)


class FaultyBackend:
    """A backend behind an injector of faults."""

    def __init__(self, inner: Ledger, injector: FaultInjector) -> None:
        self._inner = inner
        self.steps_at_once = inner.steps_at_once
        self._injector = injector

    async def run(self, work: Pass, steps: int, news: asyncio.Event) -> PassResult:
        asked = self._inner.wiped
        return await self._injector.call(lambda: self._inner.run(work, steps, news, asked), self._inner.wipe)

    def wipe(self) -> None:
        self._inner.wipe()

    def forget(self, ids: Iterable[int]) -> None:
        self._inner.forget(ids)


class Ledger:
    """A backend behind books of what each page holds: a row that would read what is not its own is an error, and so is
    a pass whose pages are written to before it has ended. A pass that was under way when all was lost gives garbage.

    Attributes:
        held: what each (page, offset) holds: all that the text up to there depends on.
        away: the same of spare pages.
        passes: all that were asked for.
        wiped: how often all was lost.
    """

    def __init__(self, inner: Backend, page_tokens: int, asks: Sequence[Ask]) -> None:
        self._inner = inner
        self._asks = asks
        self._page_tokens = page_tokens
        self.steps_at_once = inner.steps_at_once
        self.held: dict[tuple[int, int], tuple[int, ...]] = {}
        self.away: dict[tuple[int, int], tuple[int, ...]] = {}
        self.passes: list[Pass] = []
        self._last: Pass | None = None
        self.wiped = 0

    async def run(self, work: Pass, steps: int, news: asyncio.Event, asked: int | None = None) -> PassResult:
        if asked is None:
            asked = self.wiped
        if asked == self.wiped:
            self._read_and_write(work)
        result = await self._inner.run(work, steps, news)
        if asked != self.wiped:
            return replace(result, tokens={row: (GARBAGE,) * len(given) for row, given in result.tokens.items()})
        for row in (*work.prefill, *work.decode):
            for position in range(row.start, row.start + len(row.tokens)):
                found = self.held[self._place(row.table, position)]
                assert found == self._text(row.id, position), "a pass under way has lost its pages"
        if not work.prefill:
            for row in work.decode:
                self._write(row, result.steps)
        return result

    def _read_and_write(self, work: Pass) -> None:
        self.passes.append(work)
        if work != self._last:
            self._swap(work)
        self._last = work
        for source, target, positions in work.moves:
            for offset in range(positions):
                self.held[target, offset] = self.held[source, offset]
        for row in (*work.prefill, *work.decode):
            for position in range(row.start):
                found = self.held[self._place(row.table, position)]
                assert found == self._text(row.id, position), "a row reads what is not its own"
            self._write(row, len(row.tokens))
            if work.slots is not None:
                assert work.slots[0] <= row.table[0] < work.slots[1], "a row lies outside the range"

    def _swap(self, work: Pass) -> None:
        for page, away, positions in work.swap_out:
            for offset in range(positions):
                self.away[away, offset] = self.held[page, offset]
        for away, page, positions in work.swap_in:
            for offset in range(positions):
                self.held[page, offset] = self.away[away, offset]

    def _write(self, row: Row, count: int) -> None:
        for position in range(row.start, row.start + count):
            self.held[self._place(row.table, position)] = self._text(row.id, position)

    def _text(self, request: int, position: int) -> tuple[int, ...]:
        """Everything that the keys and values at a position depend on; answers to equal prompts are equal here."""
        ask = self._asks[request]
        return (ask.family, position) if position < ask.prompt else (ask.family, ask.prompt, position)

    def _place(self, table: tuple[int, ...], position: int) -> tuple[int, int]:
        return table[position // self._page_tokens], position % self._page_tokens

    def wipe(self) -> None:
        self.held.clear()
        self.away.clear()
        self.wiped += 1
        self._inner.wipe()

    def forget(self, ids: Iterable[int]) -> None:
        self._inner.forget(ids)


def config(**changes: object) -> SchedulerConfig:
    values: dict[str, object] = {
        "joining": "continuous",
        "slots": 4,
        "pages": 4,
        "page_tokens": 200,
        "prefill_tokens": 1000,
    }
    return SchedulerConfig(**{**values, **changes})  # type: ignore[arg-type]


def play(
    asks: Sequence[Ask],
    settings: SchedulerConfig,
    *,
    faults: tuple[Fault, ...] = (),
    step_timeout_s: float | None = None,
    watch: Callable[[Engine], None] | None = None,
    cost: PassCost | None = None,
) -> World:
    """Run `asks` to the end on virtual time."""

    async def main(clock: VirtualClock) -> World:
        recorder, log = Recorder("simulated"), EventLog()
        lengths = {i: ask.length for i, ask in enumerate(asks)}
        prompts = {i: ask.prompt for i, ask in enumerate(asks)}
        ledger = Ledger(SimulatedBackend(cost or RoundCost(), clock, lengths, prompts), settings.page_tokens, asks)
        injector = FaultInjector(faults, clock)
        backend: Backend = FaultyBackend(ledger, injector) if faults else ledger
        engine = engine_of(settings, backend, clock, recorder, step_timeout_s=step_timeout_s, log=log)
        running = asyncio.ensure_future(engine.run())
        handles = {}

        async def cancel(request: int, at: float) -> None:
            await clock.sleep(at - clock.now)
            engine.cancel(request)

        cancels = []
        for i, ask in sorted(enumerate(asks), key=lambda pair: pair[1].at):
            if ask.at > clock.now:
                await clock.sleep(ask.at - clock.now)
            handles[i] = engine.submit(_request(i, ask))
            if ask.cancel_at is not None:
                cancels.append(asyncio.ensure_future(cancel(i, ask.cancel_at)))
            if watch is not None:
                watch(engine)
        engine.close()
        await clock.wait(running, "the test waits for the engine")
        answers = {i: await handle.answer() for i, handle in handles.items()}
        assert not any(GARBAGE in answer.tokens for answer in answers.values()), "garbage was handed out"
        trace, scheduler = recorder.trace(), engine.scheduler
        return World(answers, trace, log, scheduler, engine.failures, injector.injected, ledger.passes)

    return simulate_async(main)


def _request(number: int, ask: Ask) -> Request:
    return Request(
        id=number,
        prompt=(ask.family,) * ask.prompt,
        limit=ask.limit,
        sampling=Sampling(),
        stop_tokens=frozenset({END}),
        priority=ask.priority,
        deadline_s=ask.deadline,
    )
