"""Portfolios of real processes: a success ends its rivals, and a deadline kills what runs."""

from __future__ import annotations

import asyncio
import os
import sys

from stretto.core.clock import RealClock
from stretto.workflow.portfolio.baselines import Seq
from stretto.workflow.portfolio.estimates import Estimates, Workflow
from stretto.workflow.portfolio.laws import Moments
from stretto.workflow.portfolio.outcome import Outcome, Run
from stretto.workflow.portfolio.problem import Problem, Rules
from stretto.workflow.portfolio.run import run

NODES = ("read", "check")
PROBLEM = Problem(
    workflow=Workflow(nodes=NODES, edges=(NODES,)),
    estimates=Estimates.from_moments({node: {"python": Moments(success=0.5, latency_s=0.1)} for node in NODES}),
    rules=Rules(ends="first"),
)
WORK = "import sys, time; time.sleep(float(sys.argv[1])); sys.exit(int(sys.argv[2]))"


class Processes:
    """Each attempt is a process; the slow ones would run for a minute."""

    def __init__(self, quick: bool) -> None:
        self.quick = quick
        self.started: list[int] = []

    async def __call__(self, node: str, model: str, seed: int) -> Outcome:
        seconds = 0.0 if self.quick and seed % 2 else 60.0
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", WORK, str(seconds), "0")
        self.started.append(process.pid)
        try:
            code = await process.wait()
        except asyncio.CancelledError:
            process.kill()
            await process.wait()
            raise
        return Outcome(success=code == 0, cost=0.5, output=node)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def carried_out(attempts: Processes, deadline_s: float) -> Run:
    async def main() -> Run:
        policy = Seq(problem=PROBLEM, model="python", count=3)
        return await run(PROBLEM, policy, attempts, budget=8.0, deadline_s=deadline_s, clock=RealClock(), grace_s=20.0)

    return asyncio.run(main())


def test_the_first_success_kills_the_other_processes() -> None:
    attempts = Processes(quick=True)
    found = carried_out(attempts, 50.0)
    assert (found.end, found.outputs) == ("completed", {"read": "read", "check": "check"})
    assert found.spent == 2 * (0.5 + 2 * 1.0)
    assert len(attempts.started) == 6
    assert not any(map(alive, attempts.started))


def test_the_deadline_kills_all_processes() -> None:
    attempts = Processes(quick=False)
    found = carried_out(attempts, 0.5)
    assert (found.end, found.spent) == ("deadline_exhausted", 3.0)
    assert not any(map(alive, attempts.started))
