"""A load played on replicas whose prompts and decoding rows have passes at once; `simulate` is for one pass at a time.

The scheduler is the engine's, and so is the protocol: it is asked whenever something has come or a decision has ended.
Passes that overlap share the devices as fluids (`sharing`), step by step; while rows decode with nobody beside them,
any number of steps is taken at once, as in `simulate`. Exact: who is in which pass, every length, every page.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from stretto.core.record import Recorder
from stretto.core.trace import Key
from stretto.serve.decision import Decision, Lane
from stretto.serve.deploy.costs import Parts
from stretto.serve.deploy.load import Load
from stretto.serve.deploy.sharing import Demand, SharedCosts, Work, shared_resources
from stretto.serve.deploy.simulate import Costs, Replica, Served, serve, steps_until
from stretto.serve.lanes import LaneScheduler
from stretto.serve.scheduler import Scheduler
from stretto.serve.scheduler_config import SchedulerConfig


def play(load: Load, costs: Costs, config: SchedulerConfig, *, recorder: Recorder | None = None) -> Served:
    """`simulate.serve` on the replicas that keep `config`'s way with prompts."""
    kind = TwoLanes if config.prefill == "lanes" else Replica
    return serve(load, costs, config, recorder=recorder, kind=kind)


@dataclass(slots=True)
class _Course:
    """A decision on its way.

    Attributes:
        work, demand: the step that is under way, or is to begin.
        left: steps to come, that one included; taken: those that have ended.
        task: the step's number on the shared devices; None before it begins.
    """

    decision: Decision
    began_s: float
    work: Work
    demand: Demand
    left: int
    taken: int = 0
    task: int | None = None


class TwoLanes(Replica):
    """One model replica; its pool of pages is one, so it has no pipeline and no attention replicas."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        assert isinstance(self.costs, SharedCosts), "lanes share their devices"
        (self.state,) = self.lanes
        self.shared = self.costs
        self.fluid = shared_resources()
        self.courses: dict[Lane, _Course] = {}

    @staticmethod
    def scheduler(config: SchedulerConfig) -> Scheduler:
        return LaneScheduler(config)

    def run(self) -> None:
        state, now = self.state, 0.0
        heard = True
        while True:
            if state.next_arrival_s <= now:
                state.take_arrivals(now, self.prompt, self.output)
            if heard:
                self._ask(now)
            coming = min(state.next_arrival_s, state.idle_until)
            if self.courses:
                now, heard = self._advance_to(now, coming)
                continue
            if math.isinf(coming):
                return
            now, heard = max(now, coming), True

    def _ask(self, now: float) -> None:
        """Begin a pass in each lane that is free and has something to do."""
        if not self.state.live:
            self.state.idle_until = math.inf
            return
        scheduler = self.state.scheduler
        scheduler.apply({"type": "tick", "at": now})
        while (decision := scheduler.next_decision()).lane is not None:
            work = self._work(decision)
            self.courses[decision.lane] = _Course(decision, now, work, self.shared.demand(work), decision.steps)
            self._start(decision, now)
            self.state.most_pages = max(self.state.most_pages, scheduler.pool.held)
        assert decision.idle_until is not None
        self.state.idle_until = decision.idle_until

    def _work(self, decision: Decision) -> Work:
        return Work(
            chunks=tuple((chunk.count, chunk.start) for chunk in decision.prefill),
            tokens=sum(chunk.last for chunk in decision.prefill),
            decoders=len(decision.decode),
            cached=sum(self.length[request] for request in decision.decode),
        )

    def _cut(self) -> None:
        """Something has happened: the decoding rows' decision ends with the step that is under way."""
        course = self.courses.get("tokens")
        if course is not None and course.left > 1:
            course.left = 1
            self.state.scheduler.apply({"type": "cut", "steps": course.taken + 1})

    def _advance_to(self, now: float, coming: float) -> tuple[float, bool]:
        """On to when a step ends or something comes; that instant, and whether the scheduler is to be asked then."""
        tokens = self.courses.get("tokens")
        if tokens is not None and len(self.courses) == 1 and tokens.task is None:
            now = self._leap(tokens, now, coming)
        self.fluid.advance(now)
        for course in self.courses.values():
            if course.task is None:
                course.task = self.fluid.start(1.0, course.demand.use, 1.0 / course.demand.seconds)
        upcoming = self.fluid.next_completion()
        assert upcoming is not None
        until = max(now, min(upcoming[0], coming))
        ended = self.fluid.advance(until)
        for course in self.courses.values():
            self._spend(course.demand.parts, (until - now) / len(self.courses) / course.demand.seconds)
        heard = until >= coming
        for lane, course in sorted(self.courses.items(), reverse=True):  # decoding rows first
            if course.task in ended:
                heard |= self._end_step(lane, course, until)
        if until >= coming:
            self._cut()
        return until, heard

    def _leap(self, course: _Course, now: float, coming: float) -> float:
        """Take all steps that end before the one in which something comes, or the decision ends; when they have."""
        if course.left == 1:
            return now
        first, steps = course.demand, course.left
        last = self.shared.demand(course.work.later(steps - 1))
        slope = (last.seconds - first.seconds) / (steps - 1)
        done = steps_until(coming - now, first.seconds, slope, steps) - 1
        middle = (done - 1) / 2 / (steps - 1)
        mean = Parts(*(a + (b - a) * middle for a, b in zip(first.parts, last.parts, strict=True)))
        self._spend(mean, done)
        self._taken(course, done)
        return now + done * first.seconds + slope * done * (done - 1) / 2

    def _end_step(self, lane: Lane, course: _Course, end: float) -> bool:
        """A step has ended; whether its decision has."""
        course.task = None
        self._taken(course, 1)
        if course.left:
            return False
        del self.courses[lane]
        self._credit(self.state, course.decision, course.taken, end)
        self.state.scheduler.apply({"type": "ran", "lane": lane, "at": end, "steps": course.taken, "finished": ()})
        if self.recorder is not None:
            phase = "prefill" if lane == "prompts" else "decode"
            key = Key(phase, step=self.clock.steps)
            self.recorder.span(f"{self.name}, {lane}", course.began_s, end, key)
        self._cut()
        return True

    def _taken(self, course: _Course, steps: int) -> None:
        course.taken += steps
        course.left -= steps
        self.clock.steps += steps
        if course.left:
            course.work = course.work.later(steps)
            course.demand = self.shared.demand(course.work)

    def _spend(self, parts: Parts, times: float) -> None:
        for index, seconds in enumerate(parts):
            self.clock.parts[index] += times * seconds
