"""The engine of two lanes: as the plain one, with a pass of prompts and one of decoding rows under way at once."""

from __future__ import annotations

import asyncio
from typing import Any

from stretto.core.clock import Clock
from stretto.core.record import Recorder
from stretto.serve.backend import Backend, Pass, PassResult
from stretto.serve.decision import Decision, Lane
from stretto.serve.engine import Course, Engine
from stretto.serve.lanes import LaneScheduler
from stretto.serve.scheduler import Scheduler
from stretto.serve.scheduler_config import SchedulerConfig


def engine_of(config: SchedulerConfig, backend: Backend, clock: Clock, recorder: Recorder, **more: Any) -> Engine:
    """The engine that keeps `config`'s way with prompts; `more` as `Engine` takes it."""
    if config.prefill == "lanes":
        return LaneEngine(LaneScheduler(config), backend, clock, recorder, **more)
    return Engine(Scheduler(config), backend, clock, recorder, **more)


class LaneEngine(Engine):
    """See `Engine`; its scheduler is a `LaneScheduler`.

    Its backend is asked for one step at a time, and for a pass of each lane at once: who shares a device is seen at
    every step. If a pass fails, the other lane's is waited for, since it may still write somewhere; what that gives is
    not taken, since what it read may be lost.
    """

    def __init__(self, scheduler: LaneScheduler, backend: Backend, clock: Clock, recorder: Recorder, **more: Any):
        super().__init__(scheduler, backend, clock, recorder, **more)
        self._under_way: dict[Lane, tuple[Course, asyncio.Task[bool]]] = {}
        self._failing = False

    async def run(self) -> None:
        """Serve until closed and empty."""
        try:
            while True:
                self._take_inbox()
                self._gather()
                if self._failing and not self._under_way:
                    self._lost()
                    self._failing = False
                if self._closed and not self._live and not self._under_way:
                    return
                await self._sleep_until(float("inf") if self._failing or not self._live else self._begin())
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

    def _gather(self) -> None:
        """Take note of the passes that have ended; an error in one of them is raised here."""
        for lane in [lane for lane, (_, task) in self._under_way.items() if task.done()]:
            self._under_way.pop(lane)[1].result()

    def _cut(self) -> None:
        """Something has happened: the decoding rows' decision ends with the step that is under way."""
        if "tokens" not in self._under_way:
            return
        course, task = self._under_way["tokens"]
        if not task.done() and course.done + 1 < course.steps:
            course.steps = course.done + 1
            self._tell({"type": "cut", "steps": course.steps})

    async def _ask(self, work: Pass, steps: int) -> PassResult | None:
        result = await super()._ask(work, 1)
        self._failing |= result is None
        return None if self._failing else result

    def _lane_of(self, work: Pass) -> str:
        return f"{self._lane}, {'prompts' if work.prefill else 'tokens'}"
