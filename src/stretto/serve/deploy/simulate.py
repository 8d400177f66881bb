"""A deployment's load played iteration by iteration: the engine's own scheduler decides, `StepCosts` says the seconds.

One scheduler a lane (a batch of one pipeline stage and attention replica); the lanes of a replica are in lock step, and
a step of one lane is the plain engine. Requests are dealt round robin to replicas and lanes. While no batch changes,
which the decisions themselves say, any number of steps is taken at once, whose seconds grow evenly. Exact: who is in
which step, every length, every page. Approximate: seconds; stages follow each other in full cycles.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from stretto.core.record import Recorder
from stretto.core.trace import Key
from stretto.serve.decision import Decision
from stretto.serve.deploy.costs import Lane, Parts
from stretto.serve.deploy.layout import Layout
from stretto.serve.deploy.load import Floats, Ints, Load
from stretto.serve.scheduler import Scheduler
from stretto.serve.scheduler_config import SchedulerConfig


@dataclass(frozen=True, eq=False)
class Served:
    """What became of each request, in the load's order, and what the machines did.

    Attributes:
        started_s: start of the step in which its prompt was begun.
        cached: tokens of its prompt whose keys and values were there by then.
        first_s, finished_s: end of the steps of its first and of its last token.
        parts: seconds by cause, summed over replicas.
        makespan_s: when the last request was done.
        steps: iterations, summed over replicas.
        preempted: times that a request was put back.
        most_pages: most KV pages in use at once in any lane, as a share of the lane's pages.
    """

    started_s: Floats
    first_s: Floats
    finished_s: Floats
    cached: Ints
    parts: Parts
    makespan_s: float
    steps: int
    preempted: int
    most_pages: float


class Costs(Protocol):
    """Seconds of the steps of one replica; see `StepCosts`, which has them for machines that are not here."""

    @property
    def layout(self) -> Layout:
        """How the model is laid out."""

    def prompt_attention_s(self, new: int, cached: int) -> float:
        """What `Lane.prompt_s` is for a chunk of `new` rows behind `cached` positions."""

    def copy_s(self, positions: int) -> float:
        """Copying the keys and values of so many positions to or from the host's memory."""

    def stage(self, lanes: Sequence[Lane]) -> Parts:
        """One stage's part of a step of its attention replicas' lanes."""

    def cycle(self, groups: Iterable[Sequence[Lane]]) -> Parts:
        """A step of every group of a pipeline."""


class LaneState:
    """One scheduler, the requests that it is given, and its decision as long as that holds.

    `taken` of the decision's steps have been carried out and `left` are to come; `shape` is the next one.
    """

    def __init__(self, scheduler: Scheduler, load: Load, mine: Ints) -> None:
        self.scheduler = scheduler
        self.load = load
        self.ids: list[int] = mine.tolist()
        self.arrivals: list[float] = load.arrival_s[mine].tolist()
        self.came = 0
        self.live = 0
        self.most_pages = 0
        self.decision: Decision | None = None
        self.shape = Lane()
        self.taken = self.left = 0
        self.idle_until = math.inf

    @property
    def next_arrival_s(self) -> float:
        return self.arrivals[self.came] if self.came < len(self.arrivals) else math.inf

    def take_arrivals(self, now_s: float, prompt: Sequence[int], output: Sequence[int]) -> None:
        while self.came < len(self.ids) and self.arrivals[self.came] <= now_s:
            request, settings = self.ids[self.came], self.scheduler.config
            prefix = self.load.page_hashes(request, settings.page_tokens) if settings.prefix_cache else ()
            self.scheduler.apply(
                {
                    "type": "arrive",
                    "id": request,
                    "at": self.arrivals[self.came],
                    "prompt": prompt[request],
                    "limit": output[request],
                    "prefix": prefix,
                }
            )
            self.came += 1
            self.live += 1
            if self.came == len(self.ids):
                self.scheduler.apply({"type": "close"})


@dataclass
class RunClock:
    """Instants and sums that the replicas of one run write to."""

    started_s: Floats
    first_s: Floats
    finished_s: Floats
    cached: Ints
    parts: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    steps: int = 0


def serve(
    load: Load,
    costs: Costs,
    config: SchedulerConfig,
    *,
    recorder: Recorder | None = None,
    kind: type[Replica] | None = None,
) -> Served:
    """Play `load` on all replicas.

    Args:
        config: of each lane's scheduler; its pages are those of one lane.
        recorder: where spans go: of each replica, one for each stretch of steps without a change.
        kind: of replicas: `Replica` unless said otherwise.

    Raises:
        ValueError: if a request can never fit into a lane's pages.
    """
    layout = costs.layout
    config = replace(config, horizon="shortage")
    longest = int(np.argmax(load.prompt + load.output))
    positions = int(load.prompt[longest] + load.output[longest]) - 1
    if positions > config.pages * config.page_tokens:
        raise ValueError(
            f"request {longest}: {positions} positions do not fit into {config.pages} pages of {config.page_tokens}"
        )
    blank = np.full(len(load), np.nan)
    clock = RunClock(blank, blank.copy(), blank.copy(), np.zeros(len(load), np.int64))
    kind = kind or Replica
    lanes: list[LaneState] = []
    for number, mine in enumerate(load.dealt(layout.replicas)):
        inside = [mine[first :: layout.lanes] for first in range(layout.lanes)]
        replica = [LaneState(kind.scheduler(config), load, own) for own in inside]
        kind(lane_name(number), replica, costs, load, clock, recorder).run()
        lanes += replica
    return Served(
        started_s=clock.started_s,
        first_s=clock.first_s,
        finished_s=clock.finished_s,
        cached=clock.cached,
        parts=Parts(*clock.parts),
        makespan_s=float(clock.finished_s.max()),
        steps=clock.steps,
        preempted=sum(lane.scheduler.preemptions for lane in lanes),
        most_pages=max(lane.most_pages for lane in lanes) / config.pages,
    )


class Replica:
    """The lanes of one model replica in lock step."""

    def __init__(
        self,
        name: str,
        lanes: Sequence[LaneState],
        costs: Costs,
        load: Load,
        clock: RunClock,
        recorder: Recorder | None,
    ) -> None:
        self.name = name
        self.recorder = recorder
        self.lanes = lanes
        self.costs = costs
        self.clock = clock
        self.prompt: list[int] = load.prompt.tolist()
        self.output: list[int] = load.output.tolist()
        self.length = list(self.prompt)
        self.left = list(self.output)
        self.ended_s = -math.inf  # the last step

    @staticmethod
    def scheduler(config: SchedulerConfig) -> Scheduler:
        """A lane's scheduler."""
        return Scheduler(config)

    def run(self) -> None:
        now = 0.0
        while True:
            for lane in self.lanes:
                if lane.next_arrival_s <= now or lane.idle_until <= now:
                    self._settle(lane, now)
                    lane.take_arrivals(now, self.prompt, self.output)
                if lane.decision is None and lane.live:
                    self._decide(lane, now)
            working = [lane for lane in self.lanes if lane.decision is not None]
            arrival = min([lane.next_arrival_s for lane in self.lanes])
            if working:
                now = self._step(working, now, arrival)
                continue
            wake = min([arrival, *(lane.idle_until for lane in self.lanes)])
            if math.isinf(wake):
                return
            now = max(now, wake)

    def _decide(self, lane: LaneState, now: float) -> None:
        """Ask the lane's scheduler what to do from now on."""
        lane.scheduler.apply({"type": "tick", "at": now})
        decision = lane.scheduler.next_decision()
        lane.idle_until = math.inf if decision.idle_until is None else decision.idle_until
        if decision.idle_until is None:
            lane.decision, lane.shape = decision, self._shape(decision)._replace(pause_s=now - self.ended_s)
            lane.taken, lane.left = 0, decision.steps
            lane.most_pages = max(lane.most_pages, lane.scheduler.pool.held)

    def _step(self, working: Sequence[LaneState], now: float, arrival: float) -> float:
        """Take as many steps as all decisions hold for, or until something arrives; returns when the last one ended."""
        steps = min([lane.left for lane in working])
        first = last = self._cycle(0)
        if steps > 1:
            last = self._cycle(steps - 1)
        slope = (last.total - first.total) / (steps - 1) if steps > 1 else 0.0
        begin = now + self.costs.copy_s(sum(_copied(lane.decision) for lane in working if not lane.taken))
        done = steps_until(arrival - begin, first.total, slope, steps)
        end = begin + done * first.total + slope * done * (done - 1) / 2
        self.ended_s = end
        self._add_up(first, last, done, steps, begin - now)
        if self.recorder is not None:
            self.recorder.span(self.name, now, end, Key(_phase(working), step=self.clock.steps))
        for lane in working:
            lane.taken += done
            lane.left -= done
            lane.shape = _later(lane.shape, done)
            if lane.decision is not None and lane.decision.prefill:
                self._start(lane.decision, now)
            if not lane.left:
                self._settle(lane, end)
        return end

    def _add_up(self, first: Parts, last: Parts, done: int, steps: int, copying_s: float) -> None:
        middle = (done - 1) / 2 / max(1, steps - 1)
        for index in range(3):
            self.clock.parts[index] += done * (first[index] + (last[index] - first[index]) * middle)
        self.clock.parts[1] += copying_s
        self.clock.steps += done

    def _shape(self, decision: Decision) -> Lane:
        decoders = len(decision.decode)
        cached = sum(map(self.length.__getitem__, decision.decode))
        if not decision.prefill:
            return Lane(rows=decoders, tokens=decoders, sequences=decoders, decoders=decoders, cached=cached)
        return Lane(
            rows=decoders + sum(chunk.count for chunk in decision.prefill),
            tokens=decoders + sum(chunk.last for chunk in decision.prefill),
            sequences=decoders + len(decision.prefill),
            decoders=decoders,
            cached=cached,
            prompt_s=sum(self.costs.prompt_attention_s(chunk.count, chunk.start) for chunk in decision.prefill),
            eager=True,
        )

    def _cycle(self, later: int) -> Parts:
        """The step that comes so many steps later. Lanes side by side are attention replicas of one group; groups are
        the batches of a pipeline.
        """
        shapes = [_later(lane.shape, later) if lane.decision is not None else _IDLE for lane in self.lanes]
        if len(shapes) == 1:
            return self.costs.stage(shapes)
        each = self.costs.layout.attention_replicas
        return self.costs.cycle([shapes[first : first + each] for first in range(0, len(shapes), each)])

    def _start(self, decision: Decision, now: float) -> None:
        for chunk in decision.prefill:
            if math.isnan(self.clock.started_s[chunk.id]):
                self.clock.started_s[chunk.id] = now
                self.clock.cached[chunk.id] = chunk.start

    def _settle(self, lane: LaneState, end: float) -> None:
        """The lane's decision ends here, after the steps that were taken: note who got what, tell the scheduler."""
        decision, taken = lane.decision, lane.taken
        lane.decision = None
        if decision is None:
            return
        self._credit(lane, decision, taken, end)
        lane.scheduler.apply({"type": "ran", "at": end, "steps": taken, "finished": ()})

    def _credit(self, lane: LaneState, decision: Decision, taken: int, end: float) -> None:
        """Note who got what of so many steps of a decision."""
        for chunk in decision.prefill:
            if chunk.last:
                if math.isnan(self.clock.first_s[chunk.id]):
                    self.clock.first_s[chunk.id] = end
                self._advance(lane, chunk.id, 1, end)
        for request in decision.decode:
            self._advance(lane, request, taken, end)

    def _advance(self, lane: LaneState, request: int, tokens: int, end: float) -> None:
        self.length[request] += tokens
        self.left[request] -= tokens
        if not self.left[request]:
            self.clock.finished_s[request] = end
            lane.live -= 1


_IDLE = Lane()


def lane_name(replica: int) -> str:
    """The lane of a replica in a trace."""
    return f"replica {replica}"


def _phase(working: Sequence[LaneState]) -> str:
    """What lanes do in a step, as the engine's `Pass` says it."""
    if not any(lane.shape.eager for lane in working):
        return "decode"
    return "mixed" if any(lane.shape.decoders for lane in working) else "prefill"


def _copied(decision: Decision | None) -> int:
    """Positions that a decision's swaps copy."""
    return 0 if decision is None else sum(count for _, _, count in (*decision.swap_out, *decision.swap_in))


def _later(lane: Lane, steps: int) -> Lane:
    """The same rows so many steps later."""
    return lane._replace(cached=lane.cached + steps * lane.decoders)


def steps_until(left_s: float, first_s: float, slope_s: float, most: int) -> int:
    """The fewest steps, from 1 to `most`, that end no earlier than `left_s`; steps take first_s, first_s + slope_s, ...

    >>> [steps_until(left, 1.0, 0.5, 9) for left in (-1.0, 1.0, 1.1, 2.5, 1e9)]
    [1, 1, 2, 2, 9]
    """
    if most == 1 or left_s <= first_s:
        return 1
    whole = most * first_s + slope_s * most * (most - 1) / 2
    if whole <= left_s:
        return most
    linear = first_s - slope_s / 2
    if abs(slope_s) < 1e-15 * first_s:
        found = left_s / first_s
    else:
        found = (math.sqrt(linear * linear + 2 * slope_s * left_s) - linear) / slope_s
    return min(max(1, math.ceil(found - 1e-9)), most)
