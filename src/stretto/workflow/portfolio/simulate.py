"""Policies in the simulated world, trial by trial, all of them with the same luck."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from stretto.core.errors import require
from stretto.core.statistics import Interval, wilson
from stretto.workflow.portfolio.course import Course, Luck, begin, launch, luck, next_event, observe
from stretto.workflow.portfolio.draws import Draws
from stretto.workflow.portfolio.planner import Policy
from stretto.workflow.portfolio.problem import Problem

Watch = Callable[[Course], None]

_TOGETHER = 64
"""Trials whose luck is drawn at once."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Simulated:
    """What became of each trial.

    Attributes:
        completed: whether all nodes succeeded in time and money.
        seconds: when it ended.
        spent: money, samples cancelled at the end included.
        ends: how many trials ended how.
    """

    completed: NDArray[np.bool_]
    seconds: NDArray[np.float64]
    spent: NDArray[np.float64]
    ends: Counter[str]

    @property
    def probability(self) -> Interval:
        """Of completing, with Wilson's interval."""
        return wilson(int(self.completed.sum()), len(self.completed))


def simulate(
    problem: Problem,
    policy: Policy,
    budget: float,
    deadline_s: float,
    *,
    trials: int,
    start: int = 0,
    seed: int = 0,
    clairvoyant: bool = False,
) -> Simulated:
    """Play a policy in trials `start .. start + trials - 1` of a seed.

    Args:
        clairvoyant: let the policy see when samples in flight return (never how), as the publication does.

    Raises:
        ValueError: for a budget or deadline that is negative or not a number, or no trials.
    """
    check_limits(budget, deadline_s)
    require(trials >= 1, "trials", trials, ">= 1")
    courses = list[Course]()
    for first in range(start, start + trials, _TOGETHER):
        some = range(first, min(first + _TOGETHER, start + trials))
        draws = Draws(seed, start=first, count=len(some))
        fresh = begin(budget, deadline_s)
        courses += [play(problem, policy, fresh, luck(problem, draws, t), clairvoyant=clairvoyant) for t in some]
    return Simulated(
        completed=np.array([course.end == "completed" for course in courses]),
        seconds=np.array([course.now_s for course in courses]),
        spent=np.array([course.spent for course in courses]),
        ends=Counter(str(course.end) for course in courses),
    )


def play(
    problem: Problem,
    policy: Policy,
    course: Course,
    luck: Luck,
    *,
    clairvoyant: bool = False,
    watch: Watch = lambda course: None,
) -> Course:
    """One run from `course` to its end; `watch` sees it at each event, before the policy is asked."""
    while course.end is None:
        watch(course)
        if course.now_s >= course.deadline_s:
            return replace(course, end="deadline_exhausted")
        if problem.workflow.ready(course.done, [batch.node for batch in course.running]):
            action = policy.plan(observe(course, clairvoyant=clairvoyant))
            course = launch(problem, course, action, luck)
        course = next_event(problem, course)
    return course


def check_limits(budget: float, deadline_s: float) -> None:
    """Raise ValueError unless both are numbers >= 0."""
    require(budget >= 0, "budget", budget, "a number >= 0")
    require(deadline_s >= 0, "deadline_s", deadline_s, "a number >= 0")
