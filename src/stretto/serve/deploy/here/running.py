"""Engines on this machine that serve a deployment's load: worker processes, made-up tokens, exact lengths.

Texts do not matter, but what they share does: prompts of a load with prefixes hold the same tokens where its hashes are
the same, and all others differ. `measure` times whole passes through the same engines, never the load.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import count, pairwise

import numpy as np

from stretto.core.clock import RealClock
from stretto.core.errors import UserError
from stretto.core.eventlog import EventLog
from stretto.core.record import Recorder
from stretto.serve.backend import Backend
from stretto.serve.deploy.costs import Parts
from stretto.serve.deploy.here.measured import PAUSE_S, STEPS, MeasuredCosts, Points, spread_of
from stretto.serve.deploy.layout import Layout
from stretto.serve.deploy.load import Load
from stretto.serve.deploy.simulate import Served, lane_name, serve
from stretto.serve.engine import Engine, Handle
from stretto.serve.remote import RemoteBackend
from stretto.serve.request import Request
from stretto.serve.scheduler import Scheduler
from stretto.serve.scheduler_config import SchedulerConfig

POLL_S = 0.05
"""Seconds between two looks at whether a run is to end early."""
_IN_A_ROW = 2
"""Lone prompts that follow one that was timed after a pause."""
_TOKENS = range(100, 1100)
"""Ids that made-up prompts are drawn from: every vocabulary has them, and none of them is special."""


@dataclass
class Here:
    """Backends on this machine, one a copy, and what their engines decide by; made by `started`."""

    layout: Layout
    backends: Sequence[Backend]
    config: SchedulerConfig
    clock: RealClock
    _seeds: count[int] = field(default_factory=lambda: count(1))

    @asynccontextmanager
    async def engines(
        self,
        recorder: Recorder | None = None,
        logs: Sequence[EventLog | None] | None = None,
        config: SchedulerConfig | None = None,
    ) -> AsyncIterator[list[Engine]]:
        """Fresh engines on the backends, whose time begins now; on leaving they serve what they have and end."""
        self.clock.restart()
        recorder = recorder or Recorder("measured")
        engines = [
            Engine(Scheduler(config or self.config), backend, self.clock, recorder, log=log, lane=lane_name(copy))
            for copy, (backend, log) in enumerate(zip(self.backends, logs or [None] * len(self.backends), strict=True))
        ]
        async with asyncio.TaskGroup() as group:
            for engine in engines:
                group.create_task(engine.run())
            yield engines
            for engine in engines:
                engine.close()

    async def measure(self, points: Points | None = None, *, repeats: int = 3) -> MeasuredCosts:
        """Time passes on made-up tokens, on all copies at once, since they share the machine."""
        points = points or Points()
        decode, prompts, spreads = [], [], []
        for rows in points.rows:
            timed = [await self._steps_s(rows, context) for context in points.contexts]
            seconds = [float(np.median(steps)) for steps in timed]
            spreads += [spread_of(steps) for steps in timed]
            positions = [rows * (context + STEPS / 2) for context in points.contexts]
            slope = max(0.0, (seconds[1] - seconds[0]) / (positions[1] - positions[0]))
            decode.append((rows, max(0.0, seconds[0] - slope * positions[0]), slope))
        for tokens in points.prompts:
            paused, in_a_row = [], []
            for _ in range(repeats):
                await asyncio.sleep(PAUSE_S)
                for first, *later in await self._prompts_s(tokens):
                    paused.append(first)
                    in_a_row += later
            spreads += [spread_of(paused), spread_of(in_a_row)]
            prompts.append((tokens, float(np.median(in_a_row)), float(np.median(paused))))
        return MeasuredCosts(
            layout=self.layout, decode=tuple(decode), prompts=tuple(prompts), spread=float(np.median(spreads))
        )

    async def pace(self, costs: MeasuredCosts, trial: Load) -> float:
        """How many times as long as `costs` say the passes of `trial` take now."""
        recorder = Recorder("measured")
        await self.serve(trial, recorder=recorder)
        return sum(recorder.trace().busy.values()) / serve(trial, costs, self.config).parts.total

    async def _steps_s(self, rows: int, context: int) -> list[float]:
        """Seconds of the steps in which `rows` requests decode, on every copy."""
        found = await self._times([context] * rows, STEPS)
        return [b - a for times in found for a, b in pairwise(times[1:])]

    async def _prompts_s(self, tokens: int) -> list[list[float]]:
        """Seconds of lone prompts in passes of their own, one after the other, on each copy."""
        count = 1 + _IN_A_ROW
        found = await self._times([tokens] * count, 1, replace(self.config, prefill_tokens=tokens))
        ends = [end for (end,) in found]
        return [np.diff(ends[first : first + count], prepend=0.0).tolist() for first in range(0, len(ends), count)]

    async def _times(
        self, prompts: Sequence[int], output: int, config: SchedulerConfig | None = None
    ) -> list[list[float]]:
        """When the tokens of each request came that all copies got at second 0."""
        async with self.engines(config=config) as engines:
            handles = [
                engine.submit(Request(id=i, prompt=self._fresh(length), limit=output))
                for engine in engines
                for i, length in enumerate(prompts)
            ]
        _require_whole(handles)
        return [handle.times_s for handle in handles]

    def _fresh(self, length: int) -> tuple[int, ...]:
        """A prompt that no other one begins like."""
        draw = np.random.default_rng(next(self._seeds))
        return tuple(draw.integers(_TOKENS.start, _TOKENS.stop, length).tolist())

    async def serve(
        self,
        load: Load,
        *,
        recorder: Recorder | None = None,
        logs: Sequence[EventLog] | None = None,
        told: Callable[[int], None] = lambda finished: None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> tuple[Load, Served]:
        """Serve `load` from now on; requests are dealt to the copies in turn.

        Args:
            told: how many requests are finished, again and again.
            cancelled: asked again and again; true ends the run.

        Returns:
            What was served wholly, which is all of it unless the run was cancelled, and how.

        Raises:
            UserError: if the workers failed, or it was cancelled before any request was served.
        """
        prompts = [load.tokens(i, _TOKENS) for i in range(len(load))]
        handles: list[Handle] = []
        stop = asyncio.Event()
        async with self.engines(recorder, logs) as engines:
            sending = asyncio.ensure_future(self._send(load, prompts, engines, handles, stop))
            while not sending.done():
                await asyncio.wait([sending], timeout=POLL_S)
                told(sum(engine.finished for engine in engines))
                if cancelled() and not stop.is_set():
                    stop.set()
                    for engine in engines:
                        engine.cancel_all()
            sending.result()
        whole = [i for i, handle in enumerate(handles) if handle.reason != "cancelled"]
        if not whole:
            raise UserError("the run ended before a request was served", right="let it go on for longer")
        _require_whole([handles[i] for i in whole])
        return load.only(whole), _served([handles[i] for i in whole], engines)

    async def _send(
        self,
        load: Load,
        prompts: Sequence[tuple[int, ...]],
        engines: Sequence[Engine],
        handles: list[Handle],
        stop: asyncio.Event,
    ) -> None:
        """Submit each request when it is due, and wait for all answers."""
        for i, (arrival, output) in enumerate(zip(load.arrival_s.tolist(), load.output.tolist(), strict=True)):
            while not stop.is_set() and arrival > self.clock.now:
                await self.clock.sleep(min(POLL_S, arrival - self.clock.now))
            if stop.is_set():
                break
            handles.append(engines[i % len(engines)].submit(Request(id=i, prompt=prompts[i], limit=output)))
        for handle in handles:
            await handle.answer()


def _require_whole(handles: Sequence[Handle]) -> None:
    """Every answer as long as it was to be, or a `UserError`."""
    failed = sum(handle.reason != "length" for handle in handles)
    if failed:
        problem = f"{failed} of {len(handles)} requests failed: workers died again and again"
        raise UserError(problem, right="more memory")


def _served(handles: Sequence[Handle], engines: Sequence[Engine]) -> Served:
    finished = np.array([handle.finished_s for handle in handles])
    return Served(
        started_s=np.array([handle.started_s for handle in handles]),
        first_s=np.array([handle.times_s[0] for handle in handles]),
        finished_s=finished,
        cached=np.array([handle.cached_tokens for handle in handles]),
        parts=Parts(float(finished.max()), 0.0, 0.0),
        makespan_s=float(finished.max()),
        steps=sum(engine.steps for engine in engines),
        preempted=sum(engine.scheduler.preemptions for engine in engines),
        most_pages=1.0,
    )


@asynccontextmanager
async def started(
    model: str, layout: Layout, config: SchedulerConfig, *, dtype: str = "fp32", path: str = "torch"
) -> AsyncIterator[Here]:
    """Worker processes for `layout`, tensor ranks and copies, one core each; ended on leaving.

    Args:
        dtype, path: as `models.load.load_model` takes them.

    Raises:
        UserError: if the workers do not get ready.
        ValueError: if there are too few cores.
    """
    clock, cores = RealClock(), sorted(os.sched_getaffinity(0))
    if layout.total > len(cores):
        raise ValueError(f"{layout} takes {layout.total} cores, there are {len(cores)}")

    def start(copy: int) -> asyncio.Future[RemoteBackend]:
        first = copy * layout.devices
        return asyncio.ensure_future(
            RemoteBackend.start(
                model,
                dtype=dtype,
                path=path,
                threads=1,
                pages=config.pages,
                page_tokens=config.page_tokens,
                clock=clock,
                ranks=layout.devices,
                cpus=[[cores[first + rank]] for rank in range(layout.devices)],
            )
        )

    async with AsyncExitStack() as stack:
        backends = await asyncio.gather(*map(start, range(layout.replicas)), return_exceptions=True)
        ready = [backend for backend in backends if isinstance(backend, RemoteBackend)]
        for backend in ready:
            stack.push_async_callback(backend.close)
        for problem in backends:
            if isinstance(problem, BaseException):
                raise problem
        yield Here(layout, ready, config, clock)
