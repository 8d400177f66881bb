"""Attempts that only take time: what a run calls instead of models, on virtual or on real time."""

from __future__ import annotations

import asyncio

from stretto.core.clock import Clock
from stretto.workflow.portfolio.draws import Draws, samples
from stretto.workflow.portfolio.outcome import Outcome
from stretto.workflow.portfolio.problem import MAX_SAMPLES, Problem


class SimulatedAttempts:
    """`attempt` for `run`: each sample sleeps for its latency, and its outcome follows from its law.

    A run with seed t meets the luck of trial t of `simulate` with this object's seed. A sample that is cancelled
    returns what it has cost until then, as far as the problem's rules refund the rest.

    Args:
        clock: whose time passes.
        seed: of all draws.
        pace: seconds of the clock for a second of a law.
    """

    def __init__(self, problem: Problem, clock: Clock, *, seed: int = 0, pace: float = 1.0) -> None:
        self._problem = problem
        self._clock = clock
        self._seed = seed
        self._pace = pace
        self._draws: dict[int, Draws] = {}

    async def __call__(self, node: str, model: str, seed: int) -> Outcome:
        problem, (trial, number) = self._problem, divmod(seed, 2**32)
        launch, sample = divmod(number, MAX_SAMPLES)
        draws = self._draws.setdefault(trial, Draws(self._seed, start=trial))
        words = draws.words(trial, problem.workflow.index[node], launch, sample + 1)
        (drawn,) = samples(problem.estimates.law(node, model), words[-1:])
        seconds, start = drawn.latency_s * self._pace, self._clock.now
        try:
            await self._clock.sleep(seconds)
        except asyncio.CancelledError:
            unused = 1 - min(1.0, (self._clock.now - start) / seconds)
            return Outcome(success=False, cost=drawn.cost * (1 - problem.rules.refund * unused))
        return Outcome(success=drawn.success, cost=drawn.cost, output=f"{node} by {model}")
