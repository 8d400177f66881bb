"""How often workflows finish inside a budget and a deadline: MCPP against fixed policies chosen in hindsight.

Instances are drawn task libraries of 6 to 12 nodes. A grid of budgets and deadlines lies around each instance's
nominal ones, and every policy meets the same luck in the same 200 runs. The rival is the best Seq-(model, k), k in 1,
2, 4, ..., 64, chosen for that very cell by those very runs; the other is the uniform split on its better model. Runs
are real ones (`portfolio.run`) on virtual time, and, for one cell, on the real clock at a twentieth of the time, ten
side by side. One row has the publication's own accounting, which charges at the launch what samples will cost, and one
its clairvoyance.

The last rows play four samples a node whose latencies have a coefficient of variation of 0.5: ended by their first
success against the wait for all four, refunded by the time that was not used.

Usage: python benchmarks/portfolio_completion.py [--json] [--quick]
"""

from __future__ import annotations

import asyncio
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

import harness
from stretto.core.clock import Clock, RealClock, VirtualClock, simulate_async
from stretto.workflow.portfolio import (
    MCPP,
    Estimates,
    Moments,
    Policy,
    Problem,
    Rules,
    Seq,
    SimulatedAttempts,
    Split,
    State,
    Workflow,
    draw_problem,
    nominal_limits,
    run,
    simulate,
)
from stretto.workflow.portfolio.rollouts import Rollouts

FACTORS = (0.5, 1.0, 2.0)
HINDSIGHT = (1, 2, 4, 8, 16, 32, 64)
GOAL_MIDDLE, GOAL_WORST, GOAL_SPLIT = 5.0, -2.0, 15.0
GOAL_CANCEL = 1.3
RUNS, QUICK_RUNS = 200, 40
INSTANCES, QUICK_INSTANCES = (1, 2, 3, 4), (3, 4)
PACE = 0.05
"""Seconds of the real clock for a second of a workflow."""


@dataclass(frozen=True)
class Cell:
    """Completion rates, in percent, at one budget and deadline of an instance."""

    instance: int
    budget: float
    deadline_s: float
    middle: bool
    ours: float
    fixed: float
    split: float


def measure(quick: bool) -> list[harness.Row]:
    runs = QUICK_RUNS if quick else RUNS
    instances = QUICK_INSTANCES if quick else INSTANCES
    cells = [cell for number in instances for cell in _grid(number, runs)]
    return [*_completion(cells), *_variants(instances, runs), _real(runs), *_early_cancel(runs)]


def _grid(number: int, runs: int) -> list[Cell]:
    problem = draw_problem(number)
    planner, fixed = MCPP(problem), Rollouts(problem, HINDSIGHT)
    money, time_s = nominal_limits(problem)
    cells = list[Cell]()
    for more, longer in itertools.product(FACTORS, FACTORS):
        budget, deadline_s = more * money, longer * time_s
        cell = Cell(
            number,
            budget,
            deadline_s,
            more == longer == 1.0,
            ours=_rate([_on_virtual_time(problem, planner, budget, deadline_s, seed) for seed in range(runs)]),
            fixed=_best_fixed(fixed, budget, deadline_s, runs),
            split=_split(problem, budget, deadline_s, runs),
        )
        sys.stderr.write(f"{cell}\n")
        cells.append(cell)
    return cells


def _rate(completed: list[bool]) -> float:
    return 100.0 * float(np.mean(completed))


def _on_virtual_time(problem: Problem, policy: Policy, budget: float, deadline_s: float, seed: int) -> bool:
    async def main(clock: VirtualClock) -> bool:
        attempts = SimulatedAttempts(problem, clock)
        return (
            await run(problem, policy, attempts, budget=budget, deadline_s=deadline_s, clock=clock, seed=seed)
        ).completed

    return simulate_async(main)


def _best_fixed(rollouts: Rollouts, budget: float, deadline_s: float, runs: int) -> float:
    state = State(done=frozenset(), time_left_s=deadline_s, money_left=budget)
    models = rollouts.problem.estimates.models
    return max(
        _rate(rollouts.outcomes(state, model, count, seed=0, rollouts=runs)[0].tolist())
        for model, count in itertools.product(models, HINDSIGHT)
    )


def _split(problem: Problem, budget: float, deadline_s: float, runs: int) -> float:
    policies = [Split(problem=problem, model=model, budget=budget) for model in problem.estimates.models]
    return max(_rate(simulate(problem, each, budget, deadline_s, trials=runs).completed.tolist()) for each in policies)


def _completion(cells: list[Cell]) -> list[harness.Row]:
    middle = [cell for cell in cells if cell.middle]
    worst = min(cells, key=lambda cell: cell.ours - cell.fixed)
    ours, fixed, split = (float(np.mean([getattr(c, name) for c in middle])) for name in ("ours", "fixed", "split"))
    everywhere = float(np.mean([cell.ours - cell.fixed for cell in cells]))
    return [
        harness.Row(
            name="points over the best fixed policy in hindsight, mid-grid",
            ours=ours - fixed,
            unit="points",
            goal=GOAL_MIDDLE,
            note=f"{ours:.1f} % against {fixed:.1f} %, {len(middle)} instances; mean over all {len(cells)} cells "
            f"{everywhere:+.1f}; least mid-grid {min(c.ours - c.fixed for c in middle):+.1f}",
        ),
        harness.Row(
            name="points over the best fixed policy in hindsight, worst cell",
            ours=worst.ours - worst.fixed,
            unit="points",
            goal=GOAL_WORST,
            note=f"{worst}",
        ),
        harness.Row(
            name="points over the uniform split, mid-grid",
            ours=ours - split,
            unit="points",
            goal=GOAL_SPLIT,
            note=f"{ours:.1f} % against {split:.1f} %",
        ),
    ]


def _variants(instances: Sequence[int], runs: int) -> list[harness.Row]:
    """The middle cells in the simulated world: with the publication's accounting, and with its clairvoyance."""
    ours, fixed, plain, clairvoyant = (list[float]() for _ in range(4))
    for number in instances:
        problem = draw_problem(number)
        realised = replace(problem, rules=Rules(charge="realised"))
        limits = nominal_limits(problem)
        ours.append(_simulated(realised, limits, runs))
        fixed.append(_best_fixed(Rollouts(realised, HINDSIGHT), *limits, runs))
        plain.append(_simulated(problem, limits, runs))
        clairvoyant.append(_simulated(problem, limits, runs, clairvoyant=True))
    return [
        harness.Row(
            name="points over the best fixed policy in hindsight, mid-grid, costs known at the launch",
            ours=float(np.mean(ours) - np.mean(fixed)),
            unit="points",
            goal=GOAL_MIDDLE,
            note=f"{np.mean(ours):.1f} % against {np.mean(fixed):.1f} %",
        ),
        harness.Row(
            name="points that knowing when samples return would add, mid-grid",
            ours=float(np.mean(clairvoyant) - np.mean(plain)),
            unit="points",
            goal=None,
            note="the publication's planner is told; ours knows how long they have run",
        ),
    ]


def _simulated(problem: Problem, limits: tuple[float, float], runs: int, *, clairvoyant: bool = False) -> float:
    found = simulate(problem, MCPP(problem), *limits, trials=runs, clairvoyant=clairvoyant)
    return _rate(found.completed.tolist())


def _real(runs: int) -> harness.Row:
    """The middle cell of one instance on the real clock."""
    problem = draw_problem(QUICK_INSTANCES[0])
    budget, time_s = nominal_limits(problem)
    planner = MCPP(_paced(problem))

    async def one(seed: int) -> bool:
        clock: Clock = RealClock()
        attempts = SimulatedAttempts(problem, clock, pace=PACE)
        found = await run(
            planner.problem, planner, attempts, budget=budget, deadline_s=time_s * PACE, clock=clock, seed=seed
        )
        assert found.spent <= budget
        return found.completed

    async def main() -> list[bool]:
        done = list[bool]()
        for start in range(0, runs, 10):
            done += await asyncio.gather(*(one(seed) for seed in range(start, min(runs, start + 10))))
        return done

    ours = _rate(asyncio.run(main()))
    fixed = _best_fixed(Rollouts(problem, HINDSIGHT), budget, time_s, runs)
    return harness.Row(
        name="points over the best fixed policy in hindsight, real clock",
        ours=ours - fixed,
        unit="points",
        goal=GOAL_MIDDLE,
        note=f"{ours:.1f} % against {fixed:.1f} % on the same luck; {time_s * PACE:.1f} s a run at most",
    )


def _paced(problem: Problem) -> Problem:
    """The same problem with all its seconds at the pace of the real clock."""
    laws = {
        node: {
            model: replace(law, latency_s=tuple(PACE * value for value in law.latency_s))
            for model, law in models.items()
        }
        for node, models in problem.estimates.laws.items()
    }
    return replace(problem, estimates=Estimates(laws=laws))


def _early_cancel(runs: int) -> list[harness.Row]:
    nodes = tuple(f"step-{at}" for at in range(8))
    moments = {"m": Moments(success=0.6, latency_s=5.0, latency_std_s=2.5)}
    workflow = Workflow(nodes=nodes, edges=tuple(itertools.pairwise(nodes)))
    estimates = Estimates.from_moments(dict.fromkeys(nodes, moments))
    means = dict[str, tuple[float, float]]()
    for ends in ("batch", "first"):
        problem = Problem(workflow=workflow, estimates=estimates, rules=Rules(ends=ends, refund=1.0))  # type: ignore[arg-type]
        found = simulate(problem, Seq(problem=problem, model="m", count=4), 1e6, 1e6, trials=runs)
        means[ends] = float(found.seconds.mean()), float(found.spent.mean())
    (waited_s, full), (cancelled_s, refunded) = means["batch"], means["first"]
    return [
        harness.Row(
            name="makespan, four samples: ended by the first success",
            ours=cancelled_s,
            unit="s",
            peer=waited_s,
            ratio=waited_s / cancelled_s,
            goal=GOAL_CANCEL,
        ),
        harness.Row(
            name="cost of the same, unused time refunded",
            ours=refunded,
            unit="units",
            peer=full,
            ratio=full / refunded,
            goal=1.0,
        ),
    ]


if __name__ == "__main__":
    sys.exit(harness.main(measure, __doc__))
