"""The Monte Carlo portfolio planner: how long a plan takes, and how good its choice is.

States are met by runs of drawn task libraries with 10 nodes and 2 models, at budgets and deadlines around the nominal
ones. In each, one plan is timed beside the same choice made by our own native code with all rollouts for all pairs, and
beside the published sampling (64 rollouts of every pair) in a plain Python loop, which meets draws made beforehand.
A choice is judged on 4,096 fresh rollouts of every pair: how far it is behind the best of them. States in which no pair
reaches 2 % are left out of that.

Usage: python benchmarks/portfolio_planner.py [--json] [--quick]
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import dataclass

import numpy as np

import harness
from stretto.core.random import integers, uniform
from stretto.core.statistics import interleave
from stretto.workflow.portfolio import MCPP, Seq, State, draw_problem, nominal_limits, plain
from stretto.workflow.portfolio.course import Course, begin, luck, observe
from stretto.workflow.portfolio.draws import Draws
from stretto.workflow.portfolio.planner import Weighed
from stretto.workflow.portfolio.problem import Action, Launch
from stretto.workflow.portfolio.rollouts import Pairs
from stretto.workflow.portfolio.simulate import play

NODES, FRESH, PUBLISHED = 10, 4096, 64
GOAL_PLAIN, GOAL_FULL, GOAL_ROLLOUTS = 20.0, 4.0, 0.25
GOAL_POINT, GOAL_SHARE = 0.01, 0.95
GOAL_S = 0.05
STATES, QUICK_STATES = 160, 40
PLAIN_STATES = 5
"""So many states are also played in plain Python: seconds each."""


@dataclass(frozen=True)
class Met:
    """A state and the planner of its problem."""

    planner: MCPP
    state: State
    number: int


def met(number: int) -> Met | None:
    """A state of a run of one drawn problem, after a drawn number of events; None if the run is over by then."""
    problem = draw_problem(number, nodes=NODES)
    money, time_s = nominal_limits(problem)
    budget, deadline_s = money * 4 ** (uniform(number, 9, 0) - 0.5), time_s * 4 ** (uniform(number, 9, 1) - 0.5)
    model = problem.estimates.models[int(integers(number, 9, 2, 2))]
    policy = Seq(problem=problem, model=model, count=(1, 4)[int(integers(number, 9, 3, 2))])
    seen = list[Course]()
    start = begin(float(budget), float(deadline_s))
    play(problem, policy, start, luck(problem, Draws(number), 0), watch=seen.append)
    course = seen[int(integers(number, 9, 4, 8)) % len(seen)]
    if not problem.workflow.ready(course.done, [batch.node for batch in course.running]):
        return None
    return Met(MCPP(problem, seed=number), observe(course), number)


def measure(quick: bool) -> list[harness.Row]:
    wanted, states, number = QUICK_STATES if quick else STATES, list[Met](), 0
    while len(states) < wanted:
        if (found := met(number)) is not None:
            states.append(found)
        number += 1
    return [*_times(states[: 20 if quick else 60]), *_choices(states), *_plain_loop(states)]


def _full(each: Met, samples: int) -> MCPP:
    return MCPP(each.planner.problem, samples=samples, first=samples, seed=each.number)


def _times(states: list[Met]) -> list[harness.Row]:
    ours, ratios = list[float](), list[float]()
    pairs = [len(each.planner.pairs(each.state)) for each in states]
    for each in states:
        full = _full(each, 1024)
        times = interleave(
            {"ours": lambda e=each: e.planner.plan(e.state), "full": lambda e=each, f=full: f.plan(e.state)}, rounds=5
        )
        ours.append(times["ours"].median)
        ratios.append(times["full"].median / times["ours"].median)
    low, high = np.quantile(ours, [0.25, 0.75])
    return [
        harness.Row(
            name="slowest plan of 10 nodes and 2 models",
            ours=max(ours),
            unit="s",
            goal=GOAL_S,
            at_most=True,
            note=f"median {statistics.median(ours) * 1e3:.2f} ms, quartiles {low * 1e3:.2f} and {high * 1e3:.2f} ms; "
            f"{min(pairs)} to {max(pairs)} pairs",
        ),
        harness.Row(
            name="plan against all 1,024 rollouts for all pairs, native",
            ours=statistics.median(ours),
            unit="s",
            peer=statistics.median(ours) * statistics.median(ratios),
            ratio=statistics.median(ratios),
            goal=GOAL_FULL,
            note=f"least ratio {min(ratios):.1f}",
        ),
    ]


def _choices(states: list[Met]) -> list[harness.Row]:
    behind: dict[str, list[float]] = {"ours": [], "published": [], "full": []}
    shares = list[float]()
    for each in states:
        pairs = each.planner.pairs(each.state)
        reference = each.planner.rollouts.wins(each.state, pairs, seed=2**40 + each.number, count=FRESH) / FRESH
        if reference.max() < 0.02:
            continue
        for name, planner in (
            ("ours", each.planner),
            ("published", _full(each, PUBLISHED)),
            ("full", _full(each, 1024)),
        ):
            weighed = planner.weigh(each.state)
            behind[name].append(float(reference.max() - reference[_row(each, pairs, weighed)]))
            if name == "ours":
                shares.append((weighed.rollouts - 256) / (1024 * weighed.pairs))
    within = {name: float(np.mean([gap <= GOAL_POINT for gap in gaps])) for name, gaps in behind.items()}
    gap = {name: f"{100 * statistics.fmean(gaps):.2f}" for name, gaps in behind.items()}
    return [
        harness.Row(
            name="choices within 1 point of the best",
            ours=within["ours"],
            unit="of states",
            goal=GOAL_SHARE,
            note=f"{len(shares)} states; mean gap {gap['ours']} points; all 1,024 for all pairs: {within['full']:.3f}, "
            f"{gap['full']}; published, 64 for all pairs: {within['published']:.3f}, {gap['published']}",
        ),
        harness.Row(
            name="rollouts against all 1,024 for all pairs",
            ours=statistics.fmean(shares),
            unit="of them",
            goal=GOAL_ROLLOUTS,
            at_most=True,
            note=f"{1024 * statistics.fmean(shares):.0f} a pair; the publication has 64",
        ),
    ]


def _row(each: Met, pairs: Pairs, weighed: Weighed) -> int:
    """The row of the chosen pair."""
    rollouts = each.planner.rollouts
    action = (pairs.actions == np.array(rollouts.codes(weighed.action))).all(axis=1).argmax()
    code = rollouts.code(weighed.model, weighed.count)
    return int(((pairs.action == action) & (pairs.continuation == code)).argmax())


def _plain_loop(states: list[Met]) -> list[harness.Row]:
    few = [each for each in states if len(each.planner.pairs(each.state)) <= 64][:PLAIN_STATES]
    ratios, seconds = list[float](), list[float]()
    for each in few:
        problem, rollouts = each.planner.problem, each.planner.rollouts
        pairs = each.planner.pairs(each.state)
        models, levels = problem.estimates.models, rollouts.levels
        actions = [
            tuple(
                Launch(node=node, model=models[code // len(levels)], count=levels[code % len(levels)])
                for node, code in zip(problem.workflow.nodes, row, strict=True)
                if code >= 0
            )
            for row in pairs.actions.tolist()
        ]
        named = [
            (actions[action], models[code // len(levels)], levels[code % len(levels)])
            for action, code in zip(pairs.action, pairs.continuation, strict=True)
        ]
        draws = Draws(each.number, count=PUBLISHED)

        def loop(each: Met = each, named: list[tuple[Action, str, int]] = named, draws: Draws = draws) -> list[int]:
            problem = each.planner.problem
            return [
                sum(plain.wins(problem, each.state, *pair, draws, rollout) for rollout in range(PUBLISHED))
                for pair in named
            ]

        expected = rollouts.wins(each.state, pairs, seed=each.number, count=PUBLISHED).tolist()
        assert loop() == expected, "the plain loop and native code disagree"
        start = time.perf_counter()
        loop()
        middle = time.perf_counter()
        each.planner.plan(each.state)
        ours = time.perf_counter() - middle
        seconds.append(middle - start)
        ratios.append((middle - start) / ours)
    return [
        harness.Row(
            name="plan against the published sampling in a plain Python loop",
            ours=statistics.median(seconds) / statistics.median(ratios),
            unit="s",
            peer=statistics.median(seconds),
            ratio=statistics.median(ratios),
            goal=GOAL_PLAIN,
            note=f"{len(few)} states with 64 pairs, the same wins pair by pair; least ratio {min(ratios):.0f}",
        )
    ]


if __name__ == "__main__":
    sys.exit(harness.main(measure, __doc__))
