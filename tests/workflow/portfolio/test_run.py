"""Portfolios carried out, on virtual and on real time: money, deadlines, faults, cancellation, equal to simulation."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest

from stretto.core.clock import Clock, RealClock, VirtualClock, simulate_async
from stretto.core.errors import FieldError
from stretto.workflow.portfolio.baselines import Seq
from stretto.workflow.portfolio.estimates import Estimates, Workflow
from stretto.workflow.portfolio.laws import Moments
from stretto.workflow.portfolio.ledger import Ledger
from stretto.workflow.portfolio.library import draw_problem
from stretto.workflow.portfolio.outcome import Attempt, Outcome, Run, sample_seed
from stretto.workflow.portfolio.planner import MCPP, Policy
from stretto.workflow.portfolio.problem import Action, Launch, Problem, Rules
from stretto.workflow.portfolio.run import run
from stretto.workflow.portfolio.simulate import simulate
from stretto.workflow.portfolio.simulated import SimulatedAttempts
from stretto.workflow.portfolio.state import State

from .kit import chain, diamond, law, random_problem, start
from .worlds import Attempts


def on_virtual_time(
    problem: Problem, policy: Policy, attempt: Any, budget: float, deadline_s: float, **how: Any
) -> Run:
    async def main(clock: VirtualClock) -> Run:
        return await run(problem, policy, attempt(clock), budget=budget, deadline_s=deadline_s, clock=clock, **how)

    return simulate_async(main)


def seq(problem: Problem, count: int = 1) -> Seq:
    return Seq(problem=problem, model=problem.estimates.models[0], count=count)


def check(found: Run, problem: Problem, budget: float, deadline_s: float) -> None:
    """What holds of every run."""
    assert found.spent <= budget
    assert float(sum(Fraction(repr(sample.cost)) for sample in found.samples)) == found.spent
    assert found.seconds <= deadline_s
    assert all(sample.start_s < deadline_s for sample in found.samples)
    first = dict[str, float]()
    for sample in found.samples:
        if sample.success and sample.how == "returned":
            first.setdefault(sample.node, sample.end_s)
    if found.completed:
        assert set(found.outputs) == set(first) == set(problem.workflow.nodes)
    for sample in found.samples:
        for parent in problem.workflow.parents(sample.node):
            assert first[parent] <= sample.start_s


RULES = [Rules(), Rules(ends="first"), Rules(ends="first", refund=0.75)]


@pytest.mark.parametrize("part", range(10))
def test_five_hundred_random_workflows_with_faults(part: int) -> None:
    """Never overspent, nothing launched at or after the deadline, no sample twice, none left running."""
    ends = Counter[str]()
    for seed in range(50 * part, 50 * part + 50):
        problem = random_problem(seed, RULES[seed % 3])
        budget, deadline_s = 10.0 + seed % 90, 2.0 + seed % 23
        policy: Policy = seq(problem, 1 + seed % 5)
        if seed % 2:
            policy = MCPP(problem, levels=(1, 4), samples=16, first=4, seed=seed)
        worlds = list[Attempts]()

        async def main(
            clock: VirtualClock,
            problem: Problem = problem,
            policy: Policy = policy,
            limits: tuple[float, float] = (budget, deadline_s),
            seed: int = seed,
            worlds: list[Attempts] = worlds,
        ) -> Run:
            world = Attempts(problem=problem, clock=clock, seed=seed, share=(0.0, 0.05, 0.3)[seed % 3])
            worlds.append(world)
            await clock.sleep(3.25)
            found = await run(
                problem, policy, world, budget=limits[0], deadline_s=limits[1], clock=clock, grace_s=0.125
            )
            assert len(world.live) == sum(sample.how == "abandoned" for sample in found.samples)
            return found

        found = simulate_async(main)
        check(found, problem, budget, deadline_s)
        calls = worlds[0].calls
        assert Counter((node, seed) for _, node, _, seed in calls) == Counter((s.node, s.seed) for s in found.samples)
        assert max(Counter((node, seed) for _, node, _, seed in calls).values(), default=1) == 1
        assert all(at - 3.25 < deadline_s for at, *_ in calls)
        ends[found.end] += 1
    assert set(ends) >= {"completed", "deadline_exhausted", "budget_exhausted"}


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_a_run_on_virtual_time_is_the_simulated_one(rules: Rules) -> None:
    for number in range(4):
        problem = draw_problem(number, rules=rules, nodes=6)
        policy: Policy = seq(problem, 4) if number % 2 else MCPP(problem, samples=64, first=16)
        simulated = simulate(problem, policy, 0.05, 60.0, trials=3, seed=5)
        for trial in range(3):
            found = on_virtual_time(
                problem, policy, lambda clock, p=problem: SimulatedAttempts(p, clock, seed=5), 0.05, 60.0, seed=trial
            )
            assert found.completed == simulated.completed[trial]
            assert found.seconds == pytest.approx(simulated.seconds[trial])
            assert found.spent == pytest.approx(simulated.spent[trial])


def test_the_same_lines_run_on_real_time() -> None:
    problem = diamond(Rules(ends="first", refund=1.0))
    policy = MCPP(problem, levels=(1, 4), samples=64, first=16)

    async def main(clock: Clock, pace: float) -> Run:
        attempts = SimulatedAttempts(problem, clock, seed=2, pace=pace)
        return await run(problem, policy, attempts, budget=80.0, deadline_s=30.0, clock=clock)

    found = asyncio.run(main(RealClock(), 0.01))
    check(found, problem, 80.0, 30.0)
    assert found.completed
    assert found.outputs.keys() == set("abcd")
    assert found.plans >= 3
    assert 0 < found.seconds < 5


def test_the_deadline_holds_on_real_time() -> None:
    async def attempt(node: str, model: str, seed: int) -> Outcome:
        await asyncio.sleep(60)
        return Outcome(success=True, cost=1.0)

    async def main() -> tuple[Run, float]:
        clock, problem = RealClock(), chain(2)
        found = await run(problem, seq(problem, 3), attempt, budget=9.0, deadline_s=0.05, clock=clock)
        return found, clock.now

    found, seconds = asyncio.run(main())
    assert (found.end, found.seconds, found.spent) == ("deadline_exhausted", 0.05, 3.0)
    assert {sample.how for sample in found.samples} == {"cancelled"}
    assert seconds < 2


def always(outcome: Outcome | Exception, seconds: float = 1.0) -> Any:
    def made(clock: Clock) -> Attempt:
        async def attempt(node: str, model: str, seed: int) -> Outcome:
            await clock.sleep(seconds)
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        return attempt

    return made


def test_an_attempt_that_raises_is_a_failed_sample_charged_at_its_bound() -> None:
    problem = chain(1)
    found = on_virtual_time(problem, seq(problem, 2), always(OSError("no\nroute")), 5.0, 10.0)
    assert (found.end, found.spent, found.seconds) == ("budget_exhausted", 4.0, 2.0)
    assert {(sample.how, sample.success, sample.error) for sample in found.samples} == {
        ("raised", False, "OSError: no route")
    }


@pytest.mark.parametrize("cost", [math.nan, math.inf, -1.0])
def test_a_cost_that_is_no_number_is_a_failed_sample(cost: float) -> None:
    found = on_virtual_time(chain(1), seq(chain(1)), always(Outcome(success=True, cost=cost)), 2.0, 10.0)
    assert (found.end, found.spent) == ("budget_exhausted", 2.0)
    assert "it must be a finite number" in found.samples[0].error


def test_a_sample_that_never_returns_is_cancelled_at_the_deadline() -> None:
    found = on_virtual_time(chain(1), seq(chain(1), 2), always(Outcome(success=True, cost=1.0), 1e9), 5.0, 10.0)
    assert (found.end, found.seconds, found.spent) == ("deadline_exhausted", 10.0, 2.0)
    assert [sample.how for sample in found.samples] == ["cancelled"] * 2


def test_a_sample_that_does_not_let_itself_be_cancelled_is_abandoned() -> None:
    def stubborn(clock: Clock) -> Attempt:
        async def attempt(node: str, model: str, seed: int) -> Outcome:
            try:
                await clock.sleep(50.0)
            except asyncio.CancelledError:
                await clock.sleep(50.0)
            return Outcome(success=True, cost=0.0)

        return attempt

    found = on_virtual_time(chain(1), seq(chain(1)), stubborn, 5.0, 10.0, grace_s=2.0)
    assert (found.end, found.seconds, found.spent) == ("deadline_exhausted", 10.0, 1.0)
    assert found.samples[0].how == "abandoned"


def test_what_comes_after_the_deadline_does_not_count() -> None:
    problem = chain(1)
    attempt = always(Outcome(success=True, cost=1.0), 10.0)
    assert on_virtual_time(problem, seq(problem), attempt, 5.0, 9.999).end == "deadline_exhausted"
    assert on_virtual_time(problem, seq(problem), attempt, 5.0, 10.001).seconds == 10.0


def test_a_success_that_is_seen_too_late_does_not_count() -> None:
    """The host is busy from 8 s to 13 s: the sample of 9 s and the deadline of 10 s are both seen at 13 s."""

    async def main(clock: VirtualClock) -> Run:
        problem = chain(1)
        attempt = always(Outcome(success=True, cost=1.0), 9.0)(clock)
        work = run(problem, seq(problem), attempt, budget=5.0, deadline_s=10.0, clock=clock)
        task = asyncio.ensure_future(work)
        await clock.sleep(8.0)
        with clock.spend("host", 5.0):
            pass
        return await task

    found = simulate_async(main)
    assert (found.end, found.seconds, found.outputs) == ("deadline_exhausted", 10.0, {})


def test_a_completed_run_is_over_before_stubborn_losers_are_given_up() -> None:
    """A cancelled loser may take its grace beyond the deadline; the success was in time."""
    problem = Problem(
        workflow=Workflow(nodes=("a",)),
        estimates=Estimates(laws={"a": {"m": law([(1.0, 1.0, 1.0)])}}),
        rules=Rules(ends="first"),
    )

    def attempts(clock: Clock) -> Attempt:
        async def attempt(node: str, model: str, seed: int) -> Outcome:
            if seed % 2:
                try:
                    await clock.sleep(50.0)
                except asyncio.CancelledError:
                    await clock.sleep(50.0)
            await clock.sleep(1.0)
            return Outcome(success=True, cost=0.5, output=seed)

        return attempt

    found = on_virtual_time(problem, seq(problem, 2), attempts, 5.0, 1.5, grace_s=5.0)
    assert (found.end, found.seconds, found.spent) == ("completed", 1.0, 1.5)
    assert found.outputs == {"a": 0}


def test_reservations_settle_on_return() -> None:
    """Two samples may cost 4 each and do cost 1: with 5 a second launch is possible only because of that."""
    problem = Problem(
        workflow=Workflow(nodes=("a", "b"), edges=(("a", "b"),)),
        estimates=Estimates(laws={node: {"m": law([(1.0, 1.0, 1.0)], bound=4.0)} for node in "ab"}),
    )
    found = on_virtual_time(problem, seq(problem), always(Outcome(success=True, cost=1.0)), 5.0, 9.0)
    assert (found.end, found.spent) == ("completed", 2.0)
    dear = on_virtual_time(problem, seq(problem), always(Outcome(success=True, cost=1.5)), 5.0, 9.0)
    assert (dear.end, dear.spent) == ("budget_exhausted", 1.5)


def test_the_ledger_is_exact() -> None:
    ledger = Ledger(0.3)
    assert ledger.can_reserve(0.1, 3)
    assert not ledger.can_reserve(0.1, 4)
    for _ in range(3):
        ledger.reserve(0.1, 1)
    assert (ledger.free, ledger.can_reserve(1e-300, 1)) == (0.0, False)
    ledger.settle(0.1, 0.05)
    assert (ledger.spent, ledger.free) == (0.05, 0.05)
    broken = Ledger(1.0)
    broken.reserve(1.0, 1)
    broken.settle(1.0, 3.0)
    assert (broken.free, broken.spent) == (0.0, 3.0)


def test_money_that_just_suffices_suffices_everywhere() -> None:
    moments = {node: {"m": Moments(success=1.0, latency_s=1.0, cost=0.1)} for node in "abc"}
    problem = Problem(
        workflow=Workflow(nodes=("a", "b", "c"), edges=(("a", "b"), ("b", "c"))),
        estimates=Estimates.from_moments(moments),
    )
    assert MCPP(problem, levels=(1,)).weigh(start(9.0, 0.3)).probability.value == 1.0
    assert simulate(problem, seq(problem), 0.3, 9.0, trials=1).ends == {"completed": 1}
    found = on_virtual_time(problem, seq(problem), always(Outcome(success=True, cost=0.1)), 0.3, 9.0)
    assert (found.end, found.spent) == ("completed", 0.3)


class Wrong:
    def plan(self, state: State) -> Action:
        return (Launch(node="n1", model="m", count=1),)


class Silent:
    def plan(self, state: State) -> Action:
        return ()


def test_wrong_policies_are_told_and_silent_ones_stall() -> None:
    attempt = always(Outcome(success=True, cost=1.0))
    with pytest.raises(ValueError, match="n1 is not ready"):
        on_virtual_time(chain(2), Wrong(), attempt, 5.0, 5.0)
    assert on_virtual_time(chain(2), Silent(), attempt, 5.0, 5.0).end == "stalled"


def test_planning_takes_time_and_nothing_is_launched_too_late() -> None:
    problem, attempt = chain(3, success=1.0), always(Outcome(success=True, cost=1.0))
    assert on_virtual_time(problem, seq(problem), attempt, 9.0, 9.0, plan_s=0.5).seconds == pytest.approx(4.5)
    late = on_virtual_time(problem, seq(problem), attempt, 9.0, 3.25, plan_s=0.5)
    assert (late.end, len(late.samples)) == ("deadline_exhausted", 2)


def test_samples_that_fail_for_nothing_in_no_time_do_not_go_on_for_ever() -> None:
    problem = Problem(workflow=Workflow(nodes=("a",)), estimates=Estimates(laws={"a": {"m": law([(0.0, 0.0, 0.0)])}}))

    def attempts(clock: Clock) -> Attempt:
        async def attempt(node: str, model: str, seed: int) -> Outcome:
            return Outcome(success=False, cost=0.0)

        return attempt

    found = on_virtual_time(problem, seq(problem), attempts, 1.0, 1.0)
    assert (found.end, found.spent, len(found.samples)) == ("stalled", 0.0, 10_000)


def test_a_run_that_is_cancelled_leaves_nothing_behind() -> None:
    async def main(clock: VirtualClock) -> tuple[int, int]:
        problem = diamond()
        world = Attempts(problem=problem, clock=clock, seed=1)
        work = run(problem, seq(problem, 4), world, budget=90.0, deadline_s=90.0, clock=clock)
        task = asyncio.ensure_future(work)
        await clock.sleep(0.5)
        before = len(world.live)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return before, len(world.live)

    assert simulate_async(main) == (4, 0)


def test_seeds_differ_from_sample_to_sample_and_run_to_run() -> None:
    seeds = {sample_seed(run, launch, sample) for run in range(4) for launch in range(4) for sample in range(64)}
    assert len(seeds) == 4 * 4 * 64


@pytest.mark.parametrize(
    "fields",
    [{"budget": -1.0}, {"budget": math.inf}, {"deadline_s": math.nan}, {"grace_s": -0.5}, {"grace_s": math.nan}],
)
def test_bad_limits_are_refused(fields: dict[str, float]) -> None:
    options = {"budget": 1.0, "deadline_s": 1.0, **fields}
    with pytest.raises(FieldError, match=next(iter(fields))):
        on_virtual_time(chain(1), Silent(), always(Outcome(success=True, cost=1.0)), **options)


def test_rules_that_only_a_simulator_can_keep_are_refused() -> None:
    problem = replace(chain(1), rules=Rules(charge="realised"))
    with pytest.raises(FieldError, match=r"rules\.charge is 'realised'"):
        on_virtual_time(problem, Silent(), always(Outcome(success=True, cost=1.0)), 1.0, 1.0)
