"""Attempts that misbehave, for the tests of real runs."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field

from stretto.core.clock import Clock
from stretto.core.random import uniform
from stretto.workflow.portfolio.outcome import Outcome
from stretto.workflow.portfolio.problem import Problem
from stretto.workflow.portfolio.simulated import SimulatedAttempts

FAULTS = ("none", "raises", "hangs", "stubborn", "nonsense")


@dataclass
class Attempts:
    """Simulated attempts, of which some raise, hang, refuse to be cancelled or return nonsense; all calls are noted."""

    problem: Problem
    clock: Clock
    seed: int
    share: float = 0.0
    calls: list[tuple[float, str, str, int]] = field(default_factory=list)
    live: set[tuple[str, int]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._inner = SimulatedAttempts(self.problem, self.clock, seed=self.seed)
        self._zero = self.clock.now

    async def __call__(self, node: str, model: str, seed: int) -> Outcome:
        number = len(self.calls)
        self.calls.append((self.clock.now - self._zero, node, model, seed))
        draw = float(uniform(self.seed, 1, number))
        fault = "none" if draw >= self.share else FAULTS[1 + int(draw / self.share * (len(FAULTS) - 1))]
        assert (node, seed) not in self.live
        self.live.add((node, seed))
        try:
            return await self._faulty(fault, node, model, seed)
        finally:
            self.live.discard((node, seed))

    async def _faulty(self, fault: str, node: str, model: str, seed: int) -> Outcome:
        if fault == "raises":
            await self.clock.sleep(0.25)
            raise RuntimeError("the backend\nis gone")
        if fault == "hangs":
            await self.clock.sleep(1e6)
        if fault == "stubborn":
            try:
                await self.clock.sleep(1e6)
            except asyncio.CancelledError:
                await self.clock.sleep(30.0)
        if fault == "nonsense":
            return Outcome(success=True, cost=math.nan)
        return await self._inner(node, model, seed)
