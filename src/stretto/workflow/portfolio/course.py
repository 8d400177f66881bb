"""A run in a simulated world, as pure functions: `launch` and `advance` take a course and give the next one.

A course knows how each sample in flight will end; `observe` gives the part that a planner may see. `simulate` plays
policies: outcomes follow from (seed, trial) as in `draws`, so all that launch the same samples meet the same luck.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from stretto.workflow.portfolio.draws import Draws, Sample, samples
from stretto.workflow.portfolio.problem import MAX_LAUNCHES, MONEY_SLACK, Action, Problem
from stretto.workflow.portfolio.state import Flight, State

End = Literal["completed", "budget_exhausted", "deadline_exhausted", "stalled"]

Luck = Callable[[int, int, int], Sequence[Sample]]
"""From (number of the law, number of the launch of the node, count) to what those samples will do."""


@dataclass(frozen=True, kw_only=True)
class Running:
    """The samples of one launch that have not returned, and, hidden from planners, how they will.

    Attributes:
        start_s: when they were launched.
        samples: latencies counted from then.
        taken: what the launch took for each of them.
    """

    node: str
    model: str
    start_s: float
    samples: tuple[Sample, ...]
    taken: tuple[float, ...]
    succeeded: bool = False

    @property
    def next_s(self) -> float:
        """When the next sample returns."""
        return self.start_s + min(each.latency_s for each in self.samples)


@dataclass(frozen=True, kw_only=True)
class Course:
    """A run at an instant.

    Attributes:
        now_s: seconds since the start.
        money: neither spent nor reserved.
        spent: by samples that have returned or were cancelled.
        launches: launches so far of each node that had one.
        end: why the run is over; None while it is not.
    """

    budget: float
    deadline_s: float
    money: float
    now_s: float = 0.0
    spent: float = 0.0
    done: frozenset[str] = frozenset()
    running: tuple[Running, ...] = ()
    launches: Mapping[str, int] = field(default_factory=dict)
    end: End | None = None

    @property
    def reserved(self) -> float:
        """What the samples in flight have taken."""
        return math.fsum(taken for batch in self.running for taken in batch.taken)


def begin(budget: float, deadline_s: float) -> Course:
    """A run before its first launch."""
    return Course(budget=budget, deadline_s=deadline_s, money=budget)


def observe(course: Course, *, clairvoyant: bool = False) -> State:
    """What a planner may see. With `clairvoyant`, when samples in flight return as well, as the publication has it."""
    flights = (
        Flight(
            node=batch.node,
            model=batch.model,
            elapsed_s=course.now_s - batch.start_s,
            running=len(batch.samples),
            succeeded=batch.succeeded,
            remaining_s=tuple(batch.start_s + each.latency_s - course.now_s for each in batch.samples)
            if clairvoyant
            else None,
        )
        for batch in course.running
    )
    return State(
        done=course.done,
        time_left_s=course.deadline_s - course.now_s,
        money_left=max(0.0, course.money),
        flights=tuple(flights),
    )


def luck(problem: Problem, draws: Draws, trial: int) -> Luck:
    """The luck of one trial."""

    models = len(problem.estimates.models)

    def of(law: int, launch: int, count: int) -> Sequence[Sample]:
        known = problem.laws[law]
        assert known is not None
        return samples(known, draws.words(trial, law // models, launch, count))

    return of


def launch(problem: Problem, course: Course, action: Action, luck: Luck) -> Course:
    """The course after `action`: nodes are launched in the action's order, as far as the money goes.

    A node that does not fit stays ready. If nothing is in flight then, the run is over: "budget_exhausted" if some
    launch did not fit, else "stalled", as it is after 10,000 launches.

    Raises:
        ValueError: if a node of the action is not ready.
    """
    ready = set(problem.workflow.ready(course.done, [batch.node for batch in course.running]))
    money, running, launches = course.money, list(course.running), dict(course.launches)
    fits = True
    for each in action:
        if each.node not in ready:
            raise ValueError(f"{each.node} is not ready: it is done, in flight or waits for its parents")
        at = problem.law_index(problem.workflow.index[each.node], problem.model_index[each.model])
        law = problem.laws[at]
        assert law is not None
        drawn = luck(at, launches.get(each.node, 0), each.count)
        realised = problem.rules.charge == "realised"
        taken = tuple(sample.cost if realised else law.bound for sample in drawn)
        total = math.fsum(taken)
        if not total <= money + course.budget * MONEY_SLACK:
            fits = False
            continue
        money -= total
        launches[each.node] = launches.get(each.node, 0) + 1
        running.append(
            Running(node=each.node, model=each.model, start_s=course.now_s, samples=tuple(drawn), taken=taken)
        )
        ready.discard(each.node)
    end: End | None = None
    if sum(launches.values()) > MAX_LAUNCHES:
        end = "stalled"
    elif not running:
        end = "stalled" if fits else "budget_exhausted"
    return replace(course, money=money, running=tuple(running), launches=launches, end=end)


def advance(problem: Problem, course: Course) -> Course:
    """The course after the next instant at which samples return, or, past the deadline, its end."""
    now = min(batch.next_s for batch in course.running)
    if now > course.deadline_s:
        return _stop(problem, course)
    money, spent, done, running = course.money, course.spent, set(course.done), list[Running]()
    for batch in course.running:
        left = list[tuple[Sample, float]]()
        succeeded = batch.succeeded
        for sample, taken in zip(batch.samples, batch.taken, strict=True):
            if batch.start_s + sample.latency_s > now:
                left.append((sample, taken))
                continue
            spent += sample.cost
            money += taken - sample.cost
            succeeded |= sample.success
        if succeeded and problem.rules.ends == "first":
            for sample, taken in left:
                cost = _cancelled(problem, sample, now - batch.start_s)
                spent += cost
                money += taken - cost
            left = []
        if left:
            kept, paid = zip(*left, strict=True)
            running.append(replace(batch, samples=kept, taken=paid, succeeded=succeeded))
        elif succeeded:
            done.add(batch.node)
    end: End | None = "completed" if len(done) == len(problem.workflow.nodes) else None
    return replace(course, now_s=now, money=money, spent=spent, done=frozenset(done), running=tuple(running), end=end)


def next_event(problem: Problem, course: Course) -> Course:
    """The course when next a batch has ended, or at its end."""
    flying = len(course.running)
    while course.end is None and len(course.running) == flying:
        course = advance(problem, course)
    return course


def _stop(problem: Problem, course: Course) -> Course:
    """At the deadline all that runs is cancelled."""
    money, spent = course.money, course.spent
    for batch in course.running:
        for sample, taken in zip(batch.samples, batch.taken, strict=True):
            cost = _cancelled(problem, sample, course.deadline_s - batch.start_s)
            spent += cost
            money += taken - cost
    return replace(course, now_s=course.deadline_s, money=money, spent=spent, running=(), end="deadline_exhausted")


def _cancelled(problem: Problem, sample: Sample, elapsed_s: float) -> float:
    """What a cancelled sample costs."""
    return sample.cost * (1 - problem.rules.refund * (1 - elapsed_s / sample.latency_s))
