"""A portfolio carried out: samples are launched as a policy says, checked, paid for, and planned anew at each event.

The same lines run in the world (a `RealClock`, attempts that call models) and on virtual time. A launch reserves the
most that its samples may cost, and each return settles; nothing is launched that could overspend, nor at or after the
deadline. A sample that raises is a failed one and is charged at its bound, as is one that is cancelled, unless it
catches the cancellation and returns what it has cost so far.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from stretto.core.clock import Clock
from stretto.core.errors import require
from stretto.workflow.portfolio.ledger import Ledger
from stretto.workflow.portfolio.outcome import Attempt, How, Outcome, Run, RunEnd, SampleRecord, sample_seed
from stretto.workflow.portfolio.planner import Policy
from stretto.workflow.portfolio.problem import MAX_LAUNCHES, Action, Launch, Problem
from stretto.workflow.portfolio.simulate import check_limits
from stretto.workflow.portfolio.state import Flight, State


async def run(
    problem: Problem,
    policy: Policy,
    attempt: Attempt,
    *,
    budget: float,
    deadline_s: float,
    clock: Clock,
    seed: int = 0,
    plan_s: float = 0.0,
    grace_s: float = 0.5,
    stop: asyncio.Event | None = None,
) -> Run:
    """Carry out a workflow.

    Args:
        policy: asked in the loop itself: an `MCPP` keeps it for some milliseconds.
        attempt: one sample; checks its own output.
        budget: in the unit of the costs.
        deadline_s: counted from now.
        seed: of the attempts' seeds.
        plan_s: modelled seconds of one planning, for virtual time.
        grace_s: how long a cancelled attempt may take to end; then it is left to itself and charged at its bound.
        stop: once it is set, all that runs is cancelled and the run ends with what is done.

    Raises:
        ValueError: for a budget, deadline or grace that is negative or not a number, a budget without end, or rules
            that only a simulator can keep ("realised").
    """
    check_limits(budget, deadline_s)
    require(budget < math.inf, "budget", budget, "a finite number")
    require(grace_s >= 0, "grace_s", grace_s, "a number >= 0")
    charge = problem.rules.charge
    require(charge == "reserved", "rules.charge", charge, "reserved: nobody knows a sample's cost at its launch")
    driver = _Driver(problem, policy, attempt, Ledger(budget), deadline_s, clock, seed, grace_s, stop)
    try:
        end = await driver.drive(plan_s)
    finally:
        await driver.cancel(list(driver.flying.values()))
    return Run(
        end=end,
        seconds=deadline_s if end == "deadline_exhausted" else driver.ended_s,
        spent=driver.ledger.spent,
        outputs=driver.outputs,
        samples=tuple(driver.records),
        plans=driver.plans,
    )


@dataclass
class _Batch:
    """The samples of one launch; `tasks` are those that run, with their seeds."""

    launch: Launch
    start_s: float
    bound: float
    tasks: dict[asyncio.Task[Outcome], int]
    succeeded: bool = False


@dataclass
class _Driver:
    problem: Problem
    policy: Policy
    attempt: Attempt
    ledger: Ledger
    deadline_s: float
    clock: Clock
    seed: int
    grace_s: float
    stop: asyncio.Event | None
    flying: dict[str, _Batch] = field(default_factory=dict)
    outputs: dict[str, object] = field(default_factory=dict)
    records: list[SampleRecord] = field(default_factory=list)
    plans: int = 0
    ended_s: float = 0.0

    def __post_init__(self) -> None:
        self._zero = self.clock.now
        self._done: set[str] = set()
        self._launches = dict.fromkeys(self.problem.workflow.nodes, 0)

    @property
    def now(self) -> float:
        return self.clock.now - self._zero

    async def drive(self, plan_s: float) -> RunEnd:
        stopped = None if self.stop is None else asyncio.ensure_future(self.stop.wait())
        try:
            return await self._drive(plan_s, stopped)
        finally:
            if stopped is not None:
                stopped.cancel()

    async def _drive(self, plan_s: float, stopped: asyncio.Future[Any] | None) -> RunEnd:
        while True:
            if len(self._done) == len(self.problem.workflow.nodes):
                return "completed"
            fits = True
            if ready := self.problem.workflow.ready(self._done, self.flying):
                if self.now >= self.deadline_s:
                    return "deadline_exhausted"
                if sum(self._launches.values()) >= MAX_LAUNCHES:
                    return "stalled"
                with self.clock.spend("plan", plan_s):
                    action = self.policy.plan(self._state())
                self.plans += 1
                if self.now >= self.deadline_s:
                    return "deadline_exhausted"
                fits = self._launch(action, ready)
            if not self.flying:
                self.ended_s = self.now
                return "stalled" if fits else "budget_exhausted"
            if (end := await self._event(stopped)) is not None:
                return end

    def _state(self) -> State:
        now = self.now
        flights = (
            Flight(
                node=node,
                model=batch.launch.model,
                elapsed_s=max(0.0, now - batch.start_s),
                running=len(batch.tasks),
                succeeded=batch.succeeded,
            )
            for node, batch in self.flying.items()
        )
        return State(
            done=frozenset(self._done),
            time_left_s=max(0.0, self.deadline_s - now),
            money_left=self.ledger.free,
            flights=tuple(flights),
        )

    def _launch(self, action: Action, ready: Iterable[str]) -> bool:
        """Launch what fits, in the action's order; whether all did."""
        fits, waiting = True, set(ready)
        for each in action:
            if each.node not in waiting:
                raise ValueError(f"{each.node} is not ready: it is done, in flight or waits for its parents")
            waiting.discard(each.node)
            bound = self.problem.estimates.law(each.node, each.model).bound
            if not self.ledger.can_reserve(bound, each.count):
                fits = False
                continue
            self.ledger.reserve(bound, each.count)
            tasks = dict[asyncio.Task[Outcome], int]()
            for number in range(each.count):
                seed = sample_seed(self.seed, self._launches[each.node], number)
                tasks[asyncio.ensure_future(self._sample(each, seed))] = seed
            self._launches[each.node] += 1
            self.flying[each.node] = _Batch(launch=each, start_s=self.now, bound=bound, tasks=tasks)
        return fits

    async def _sample(self, launch: Launch, seed: int) -> Outcome:
        outcome = await self.attempt(launch.node, launch.model, seed)
        if not 0 <= outcome.cost < math.inf:
            raise ValueError(f"the cost is {outcome.cost}; it must be a finite number >= 0")
        return outcome

    async def _event(self, stopped: asyncio.Future[Any] | None) -> RunEnd | None:
        """Wait until a batch ends; what ends the run, if that comes first."""
        while True:
            left = self.deadline_s - self.now
            tasks = [task for batch in self.flying.values() for task in batch.tasks]
            label = f"portfolio waits for samples of {', '.join(self.flying)}"
            events = [*tasks, *([] if stopped is None else [stopped])]
            waiting = asyncio.ensure_future(_ends(events, left if left < math.inf else None, asyncio.FIRST_COMPLETED))
            await self.clock.wait(waiting, label)
            if stopped is not None and stopped.done():
                self.ended_s = self.now
                return "cancelled"
            if self.now > self.deadline_s or not any(task.done() for task in tasks):
                return "deadline_exhausted"
            self.ended_s = self.now
            ended = [batch for batch in self.flying.values() if self._settle_returned(batch)]
            for batch in ended:
                await self.cancel([batch])
                if batch.succeeded:
                    self._done.add(batch.launch.node)
            if ended:
                return None

    def _settle_returned(self, batch: _Batch) -> bool:
        """Settle the samples of a batch that have returned; whether the batch has ended by that."""
        for task in [task for task in batch.tasks if task.done()]:
            self._settle(batch, task, "returned")
        return not batch.tasks or (batch.succeeded and self.problem.rules.ends == "first")

    def _settle(self, batch: _Batch, task: asyncio.Task[Outcome], how: How) -> None:
        seed, outcome, error = batch.tasks.pop(task), Outcome(success=False, cost=batch.bound), ""
        if not task.done():
            how = "abandoned"
        elif task.cancelled():
            how = "cancelled"
        elif problem := task.exception():
            how, error = "raised", " ".join(f"{type(problem).__name__}: {problem}".split())
        else:
            outcome = task.result()
        self.ledger.settle(batch.bound, outcome.cost)
        if outcome.success and how == "returned":
            batch.succeeded = True
            self.outputs.setdefault(batch.launch.node, outcome.output)
        self.records.append(
            SampleRecord(
                node=batch.launch.node,
                model=batch.launch.model,
                seed=seed,
                start_s=batch.start_s,
                end_s=self.now,
                success=outcome.success,
                cost=outcome.cost,
                how=how,
                error=error,
            )
        )

    async def cancel(self, batches: list[_Batch]) -> None:
        """Take batches out of the air: what still runs of them is cancelled and settled."""
        tasks = [task for batch in batches for task in batch.tasks]
        for task in tasks:
            task.cancel()
        if tasks:
            await _ends(tasks, self.grace_s, asyncio.ALL_COMPLETED)
        for batch in batches:
            for task in list(batch.tasks):
                self._settle(batch, task, "cancelled")
            del self.flying[batch.launch.node]


async def _ends(tasks: Sequence[asyncio.Future[Any]], seconds: float | None, which: str) -> None:
    """Wait until the first or all of the tasks ended, as asyncio names it, or the seconds have passed."""
    await asyncio.wait(tasks, timeout=seconds, return_when=which)
