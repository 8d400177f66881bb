"""A deployment on this machine: the product's engine, tensor ranks and copies as worker processes, a core each.

The model answers made-up tokens of the load's lengths, so that texts do not matter and lengths are exact. `measure`
times whole passes through the same engines, never the load; what it finds is what `simulate.serve` plays.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from itertools import count, pairwise

import numpy as np

from stretto.core.clock import RealClock
from stretto.core.record import Recorder
from stretto.serve.deploy.costs import Lane, Parts
from stretto.serve.deploy.layout import Layout
from stretto.serve.deploy.load import Load
from stretto.serve.deploy.simulate import Served
from stretto.serve.engine import Engine
from stretto.serve.remote import RemoteBackend
from stretto.serve.request import Request
from stretto.serve.scheduler import Scheduler, SchedulerConfig

ROWS = (1, 4, 12)
CONTEXTS = (16, 80)
PROMPTS = (8, 64, 176)
_STEPS = 12
_TOKEN = 100


@dataclass(frozen=True, kw_only=True)
class MeasuredCosts:
    """Seconds of the steps of one copy, as they were measured, host work and waiting for workers included.

    Attributes:
        decode: (rows, seconds without any cached position, seconds a cached position of all rows together).
        prompts: (tokens, seconds) of a lone prompt.
    """

    layout: Layout
    decode: tuple[tuple[int, float, float], ...]
    prompts: tuple[tuple[int, float], ...]

    def prompt_attention_s(self, new: int, cached: int) -> float:
        """What was cached is read again by each new row: as dear as so many rows that decode there."""
        return self._decoding(1)[1] * new * cached

    def copy_s(self, positions: int) -> float:
        """Swaps are not measured here."""
        assert not positions, "swaps are not measured"
        return 0.0

    def stage(self, lanes: Sequence[Lane]) -> Parts:
        """The seconds of one lane's step."""
        (lane,) = lanes
        if not lane.rows:
            return Parts(0.0, 0.0, 0.0)
        if lane.eager:
            xs, ys = zip(*self.prompts, strict=True)
            return Parts(_line(xs, ys, lane.rows) + lane.prompt_s, 0.0, 0.0)
        base, each = self._decoding(lane.decoders)
        return Parts(base + each * lane.cached, 0.0, 0.0)

    def cycle(self, groups: Iterable[Sequence[Lane]]) -> Parts:
        """Copies have no stages here."""
        (lanes,) = groups
        return self.stage(lanes)

    def _decoding(self, rows: int) -> tuple[float, float]:
        xs, bases, slopes = zip(*self.decode, strict=True)
        return _line(xs, bases, rows), _line(xs, slopes, rows)

    def mean(self, other: MeasuredCosts) -> MeasuredCosts:
        """Half way between two measurements of the same points."""
        return MeasuredCosts(
            layout=self.layout,
            decode=tuple(
                (rows, (a + c) / 2, (b + d) / 2)
                for (rows, a, b), (_, c, d) in zip(self.decode, other.decode, strict=True)
            ),
            prompts=tuple((n, (a + b) / 2) for (n, a), (_, b) in zip(self.prompts, other.prompts, strict=True)),
        )


def _line(xs: Sequence[int], ys: Sequence[float], x: float) -> float:
    """Straight lines between points, and the last slope beyond."""
    i = min(max(bisect_left(xs, x), 1), len(xs) - 1)
    return ys[i - 1] + (ys[i] - ys[i - 1]) * (x - xs[i - 1]) / (xs[i] - xs[i - 1])


@dataclass
class Here:
    """Engines that run on this machine, one a copy; made by `started`."""

    layout: Layout
    engines: Sequence[Engine]
    clock: RealClock
    _numbers: count[int] = field(default_factory=count)

    async def measure(self, *, repeats: int = 3) -> MeasuredCosts:
        """Time passes on made-up tokens, on all copies at once, since they share the machine."""
        decode = []
        for rows in ROWS:
            seconds = [await self._step_s(rows, context) for context in CONTEXTS]
            positions = [rows * (context + _STEPS / 2) for context in CONTEXTS]
            slope = max(0.0, (seconds[1] - seconds[0]) / (positions[1] - positions[0]))
            decode.append((rows, seconds[0] - slope * positions[0], slope))
        prompts = []
        for tokens in PROMPTS:
            found = [await self._times([tokens], 1) for _ in range(repeats)]
            prompts.append((tokens, float(np.median([first - begin for run in found for begin, (first, *_) in run]))))
        return MeasuredCosts(layout=self.layout, decode=tuple(decode), prompts=tuple(prompts))

    async def _step_s(self, rows: int, context: int) -> float:
        runs = await self._times([context] * rows, _STEPS)
        return float(np.median([b - a for _, times in runs for a, b in pairwise(times[1:])]))

    async def _times(self, prompts: Sequence[int], output: int) -> list[tuple[float, list[float]]]:
        """For each request on each copy, when it was sent and when its tokens came."""
        begin = self.clock.now
        handles = [engine.submit(self._request(n, output)) for engine in self.engines for n in prompts]
        answers = [await handle.answer() for handle in handles]
        return [(begin, list(answer.token_times_s)) for answer in answers]

    def _request(self, prompt: int, output: int) -> Request:
        return Request(id=next(self._numbers), prompt=(_TOKEN,) * prompt, limit=output)

    async def serve(self, load: Load) -> Served:
        """Serve `load` from now on; requests are dealt to the copies in turn."""
        begin = self.clock.now
        before = [(engine.steps, engine.scheduler.preemptions) for engine in self.engines]
        handles = []
        for i in range(len(load)):
            late = begin + float(load.arrival_s[i]) - self.clock.now
            if late > 0:
                await self.clock.sleep(late)
            engine = self.engines[i % len(self.engines)]
            handles.append(engine.submit(self._request(int(load.prompt[i]), int(load.output[i]))))
        answers = [await handle.answer() for handle in handles]
        finished = np.array([answer.finished_s for answer in answers]) - begin
        after = [(engine.steps, engine.scheduler.preemptions) for engine in self.engines]
        return Served(
            started_s=np.array([handle.started_s or begin for handle in handles]) - begin,
            first_s=np.array([answer.token_times_s[0] for answer in answers]) - begin,
            finished_s=finished,
            parts=Parts(float(finished.max()), 0.0, 0.0),
            makespan_s=float(finished.max()),
            steps=sum(b[0] - a[0] for a, b in zip(before, after, strict=True)),
            preempted=sum(b[1] - a[1] for a, b in zip(before, after, strict=True)),
            most_pages=1.0,
        )


@asynccontextmanager
async def started(model: str, layout: Layout, config: SchedulerConfig) -> AsyncIterator[Here]:
    """Worker processes for `layout`, tensor ranks and copies, one core each; ended on leaving.

    Raises:
        UserError: if the workers do not get ready.
        ValueError: if there are too few cores.
    """
    clock = RealClock()
    async with AsyncExitStack() as stack:
        backends = []
        for copy in range(layout.replicas):
            cpus = [[copy * layout.devices + rank] for rank in range(layout.devices)]
            backend = await RemoteBackend.start(
                model,
                threads=1,
                pages=config.pages,
                page_tokens=config.page_tokens,
                clock=clock,
                ranks=layout.devices,
                cpus=cpus,
            )
            stack.push_async_callback(backend.close)
            backends.append(backend)
        engines = [Engine(Scheduler(config), backend, clock, Recorder("measured")) for backend in backends]
        running = [asyncio.ensure_future(engine.run()) for engine in engines]
        yield Here(layout, engines, clock)
        for engine in engines:
            engine.close()
        await asyncio.gather(*running)
