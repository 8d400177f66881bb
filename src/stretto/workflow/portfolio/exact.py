"""Exact answers for small cases: every way that samples may come out is followed, with its probability.

Laws must have few distinct rows and launches few samples: more than 100,000 ways in one launch are refused.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations_with_replacement, product

from stretto.core.errors import require
from stretto.workflow.portfolio.course import Course, Luck, begin, launch, next_event, observe
from stretto.workflow.portfolio.draws import Sample
from stretto.workflow.portfolio.laws import Law
from stretto.workflow.portfolio.planner import Policy
from stretto.workflow.portfolio.problem import Action, Launch, Problem, check_levels
from stretto.workflow.portfolio.state import State

MAX_WAYS = 100_000


def completion(problem: Problem, policy: Policy, budget: float, deadline_s: float) -> float:
    """The exact probability that a policy completes."""
    value = _Value(problem, lambda state: (policy.plan(state),))
    return value(begin(budget, deadline_s))


def first_then(problem: Problem, first: Action, policy: Policy, budget: float, deadline_s: float) -> float:
    """The exact probability of completing if `first` is launched at the start, and `policy` decides from then on."""
    value = _Value(problem, lambda state: (policy.plan(state),))
    return value.of(begin(budget, deadline_s), first)


def optimum(problem: Problem, levels: Sequence[int], budget: float, deadline_s: float) -> float:
    """The best that any policy can do on a chain, by backward induction.

    Raises:
        ValueError: if two nodes could be in flight at once: what a policy knows of one would then matter.
    """
    check_levels(levels)
    workflow = problem.workflow
    chain = all(
        parent in workflow.parents(node) for parent, node in zip(workflow.order, workflow.order[1:], strict=False)
    )
    require(chain, "workflow", workflow.edges, "a chain")
    models = problem.estimates.models

    def actions(state: State) -> Iterator[Action]:
        (node,) = workflow.ready(state.done, ())
        for model, count in product(models, levels):
            yield (Launch(node=node, model=model, count=count),)

    return _Value(problem, actions)(begin(budget, deadline_s))


class _Value:
    """The probability of completing from a course on, if of the actions that `choices` offers the best is taken."""

    def __init__(self, problem: Problem, choices: Callable[[State], Iterator[Action] | Sequence[Action]]) -> None:
        self._problem = problem
        self._choices = choices
        self._known: dict[tuple[object, ...], float] = {}

    def __call__(self, course: Course) -> float:
        if course.end is not None:
            return float(course.end == "completed")
        if course.now_s >= course.deadline_s:
            return 0.0
        key = (course.done, course.now_s, course.money, course.running)
        if key not in self._known:
            self._known[key] = self._best(course)
        return self._known[key]

    def of(self, course: Course, action: Action) -> float:
        """The same if `action` is launched now."""
        workflow, total = self._problem.workflow, 0.0
        laws = [self._problem.law_index(workflow.index[e.node], self._problem.model_index[e.model]) for e in action]
        ways = [_ways(self._problem.laws[law], each.count) for law, each in zip(laws, action, strict=True)]
        require(math.prod(map(len, ways)) <= MAX_WAYS, "action", action, f"one with at most {MAX_WAYS} outcomes")
        for outcomes in product(*ways):
            drawn = {law: samples for law, (samples, _) in zip(laws, outcomes, strict=True)}
            after = launch(self._problem, course, action, _as_drawn(drawn))
            share = math.prod(probability for _, probability in outcomes)
            total += share * self(_plain(next_event(self._problem, after)))
        return total

    def _best(self, course: Course) -> float:
        busy = [batch.node for batch in course.running]
        if not self._problem.workflow.ready(course.done, busy):
            return self(_plain(next_event(self._problem, course)))
        return max(self.of(course, action) for action in self._choices(observe(course)))


def _plain(course: Course) -> Course:
    """The course without its history: what was spent and launched does not change what may come."""
    return replace(course, spent=0.0, launches={})


def _as_drawn(drawn: Mapping[int, Sequence[Sample]]) -> Luck:
    return lambda law, launch, count: drawn[law]


def _ways(law: Law | None, count: int) -> list[tuple[tuple[Sample, ...], float]]:
    """All outcomes of `count` samples, whose order does not matter, each with its probability."""
    assert law is not None
    single: dict[Sample, float] = {}
    for latency_s, success, cost in zip(law.latency_s, law.success, law.cost, strict=True):
        for passed, share in ((True, success), (False, 1 - success)):
            if share > 0:
                sample = Sample(latency_s=latency_s, success=passed, cost=cost)
                single[sample] = single.get(sample, 0.0) + share / len(law.latency_s)
    number = math.comb(len(single) + count - 1, count)
    require(number <= MAX_WAYS, "count", count, f"one with at most {MAX_WAYS} outcomes, not {number}")
    ways = list[tuple[tuple[Sample, ...], float]]()
    for samples in combinations_with_replacement(single, count):
        orders = math.factorial(count)
        for times in Counter(samples).values():
            orders //= math.factorial(times)
        ways.append((samples, orders * math.prod(single[sample] for sample in samples)))
    return ways
