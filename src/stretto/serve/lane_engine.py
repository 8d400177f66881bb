"""The engine of two lanes: as the plain one, with a pass of prompts and one of decoding rows under way at once."""

from __future__ import annotations

import asyncio
from typing import Any

from stretto.core.clock import Clock
from stretto.core.record import Recorder
from stretto.serve.backend import Backend, Pass, PassResult
from stretto.serve.decision import Decision, Lane
from stretto.serve.engine import Course, Engine
from stretto.serve.lanes import LaneScheduler, scheduler_of
from stretto.serve.scheduler import SchedulerConfig


def engine_of(config: SchedulerConfig, backend: Backend, clock: Clock, recorder: Recorder, **more: Any) -> Engine:
    """The engine that keeps `config`'s way with prompts; `more` as `Engine` takes it."""
    scheduler = scheduler_of(config)
    kind = LaneEngine if isinstance(scheduler, LaneScheduler) else Engine
    return kind(scheduler, backend, clock, recorder, **more)


class LaneEngine(Engine):
    """See `Engine`; its scheduler is a `LaneScheduler`.

    Its backend is asked for one step at a time, and for a pass of each lane at once: who shares a device is seen at
    every step. If a pass fails, the other lane's is waited for before everything starts over.
    """

    def __init__(self, scheduler: LaneScheduler, backend: Backend, clock: Clock, recorder: Recorder, **more: Any):
        super().__init__(scheduler, backend, clock, recorder, **more)
        self._under_way: dict[Lane, tuple[Course, asyncio.Task[bool]]] = {}

    async def run(self) -> None:
        """Serve until closed and empty."""
        failed = False
        try:
            while True:
                self._take_inbox()
                failed |= self._gather()
                if failed and not self._under_way:
                    self._lost()
                    failed = False
                if self._closed and not self._live and not self._under_way:
                    return
                await self._sleep_until(float("inf") if failed or not self._live else self._begin())
                self._tell({"type": "tick", "at": self.clock.now})
                self._cut()
        finally:
            for _, task in self._under_way.values():
                task.cancel()

    def _begin(self) -> float:
        """Start a pass in each lane that is free and has something to do; until when there is nothing more (s)."""
        with self.clock.spend("host", self._host_seconds(len(self._live))):
            while True:
                decision = self.scheduler.next_decision()
                if self._log is not None:
                    self._log.decided(self.clock.now, decision.to_json())
                work = self._pass(decision)
                if decision.lane is None:
                    assert decision.idle_until is not None
                    return decision.idle_until
                self._start(decision.lane, decision, work)

    def _start(self, lane: Lane, decision: Decision, work: Pass) -> None:
        course = Course(decision, decision.steps)
        task = asyncio.ensure_future(self._carry_out(work, course))
        task.add_done_callback(lambda _: self._news.set())
        self._under_way[lane] = course, task

    def _gather(self) -> bool:
        """Take note of the passes that have ended; whether one has failed."""
        ended = [lane for lane, (_, task) in self._under_way.items() if task.done()]
        failed = [self._under_way.pop(lane)[1].result() for lane in ended]
        return any(failed)

    def _cut(self) -> None:
        """Something has happened: the decoding rows' decision ends with the step that is under way."""
        if "tokens" not in self._under_way:
            return
        course, task = self._under_way["tokens"]
        if not task.done() and course.done + 1 < course.steps:
            course.steps = course.done + 1
            self._tell({"type": "cut", "steps": course.steps})

    async def _ask(self, work: Pass, steps: int) -> PassResult | None:
        return await super()._ask(work, 1)

    def _lane_of(self, work: Pass) -> str:
        return f"{self._lane}, {'prompts' if work.prefill else 'tokens'}"
