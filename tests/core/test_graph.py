"""The graph executor on real and on virtual time: order, limits, money, failures, growth, cancellation, speed."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto.core.budget import Budget, units
from stretto.core.clock import Clock, RealClock, VirtualClock, simulate_async
from stretto.core.errors import FieldError
from stretto.core.eventlog import EventLog, replay
from stretto.core.graph import Failure, Graph, Paid, PaidError, Terms, on_executor
from stretto.core.graph_policy import GraphPolicy
from stretto.core.record import Recorder
from stretto.core.virtual_loop import Deadlock
from tests.core.graphs import World

SEEDS = 2000


@pytest.mark.parametrize("block", range(10))
def test_two_thousand_random_graphs_on_virtual_time(block: int) -> None:
    seen = set()
    for seed in range(block * SEEDS // 10, (block + 1) * SEEDS // 10):
        world = World(seed)
        outcomes, *rest = simulate_async(world.run)
        try:
            world.check(outcomes, *rest)
        except AssertionError as problem:
            raise AssertionError(f"seed {seed}: {problem}") from problem
        seen |= {outcome.why for outcome in outcomes if isinstance(outcome, Failure)}
    assert seen == {"raised", "timeout", "cancelled", "skipped", "no budget"}


@pytest.mark.parametrize("seed", range(0, 40, 2))
def test_the_same_graphs_on_real_time(seed: int) -> None:
    world = World(seed, scale=0.02)
    outcomes, *rest = asyncio.run(world.run(RealClock()))
    world.check(outcomes, *rest)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(20))
def test_all_of_the_graphs_on_real_time(block: int) -> None:
    """A hundred at once, each on a clock of its own."""

    async def one(seed: int) -> None:
        world = World(seed, scale=0.02)
        outcomes, *rest = await world.run(RealClock())
        world.check(outcomes, *rest)

    async def main() -> None:
        await asyncio.gather(*(one(seed) for seed in range(block * SEEDS // 20, (block + 1) * SEEDS // 20)))

    asyncio.run(main())


@given(st.integers(0, 10**6))
def test_the_same_seed_gives_the_same_run(seed: int) -> None:
    def outcome() -> tuple[Any, Any]:
        world = World(seed)
        outcomes, *_ = simulate_async(world.run)
        return outcomes, world.starts

    assert outcome() == outcome()


def test_decisions_replay_from_a_file(tmp_path: Path) -> None:
    world = World(7)
    *_, events = simulate_async(world.run)
    events.save(tmp_path / "events.jsonl")
    loaded = EventLog.load(tmp_path / "events.jsonl")
    header = loaded.header
    assert len(loaded) > 5
    assert replay(loaded, GraphPolicy(header["limits"], header["budget"], header["seed"])).equal
    other = replay(loaded, GraphPolicy({"search": 1, "compute": 1, "write": 1}, 0.0, header["seed"]))
    assert not other.equal


def both_clocks(main: Any) -> list[Any]:
    """What `main(clock, seconds)` gives on virtual time in seconds, and on real time in fiftieths."""
    return [simulate_async(lambda clock: main(clock, 1.0)), asyncio.run(main(RealClock(), 0.02))]


def sleeper(clock: Clock, seconds: float, value: Any = None) -> Any:
    async def call(*values: Any) -> Any:
        await clock.sleep(seconds)
        return value if value is not None else values

    return call


def test_a_fast_branch_runs_ahead() -> None:
    """There are no levels: 0.05 + 0.40 beside 0.40 + 0.05 takes 0.45."""

    async def main(clock: VirtualClock) -> float:
        graph = Graph(clock)
        for first, second in ((0.05, 0.40), (0.40, 0.05)):
            graph.add(sleeper(clock, second), after=[graph.add(sleeper(clock, first))])
        graph.close()
        await graph.run()
        return clock.now

    assert simulate_async(main) == pytest.approx(0.45, abs=1e-12)


def test_values_come_in_the_order_of_after() -> None:
    async def main(clock: Clock, unit: float) -> Any:
        graph = Graph(clock)
        a, b = graph.add(sleeper(clock, 2 * unit, "a")), graph.add(sleeper(clock, unit, "b"))
        graph.add(sleeper(clock, 0), after=(b, a, b))
        graph.close()
        return (await graph.run())[-1]

    assert both_clocks(main) == [("b", "a", "b")] * 2


def test_nodes_add_nodes() -> None:
    async def main(clock: Clock, unit: float) -> Any:
        graph = Graph(clock)

        async def fan_out() -> list[int]:
            return [graph.add(sleeper(clock, unit, width)) for width in range(5)]

        async def plan() -> int:
            parts = await fan_out()
            last = graph.add(sleeper(clock, 0), after=parts)
            graph.close()
            return last

        graph.add(plan)
        outcomes = await graph.run()
        return outcomes[outcomes[0]]

    assert both_clocks(main) == [(0, 1, 2, 3, 4)] * 2


def test_a_dependent_starts_while_nobody_adds() -> None:
    async def main(clock: VirtualClock) -> list[float]:
        graph, started = Graph(clock), []

        async def note(*_: Any) -> None:
            started.append(clock.now)

        async def planner() -> None:
            first = graph.add(sleeper(clock, 1.0))
            graph.add(note, after=[first])
            await clock.sleep(100.0)
            graph.close()

        planning = asyncio.create_task(planner())
        await graph.run()
        await planning
        return started

    assert simulate_async(main) == [1.0]


def test_time_outs_retries_and_pauses() -> None:
    async def main(clock: VirtualClock) -> tuple[Any, list[float]]:
        graph, starts = Graph(clock, seed=3), []

        async def third_time_lucky() -> str:
            starts.append(clock.now)
            if len(starts) == 1:
                await clock.sleep(1e9)
            if len(starts) == 2:
                raise OSError("gone")
            return "ok"

        graph.add(third_time_lucky, terms=Terms(timeout_s=2.0, attempts=3, backoff_s=1.0, jitter=0.5))
        graph.close()
        return (await graph.run())[0], starts

    value, starts = simulate_async(main)
    assert value == "ok"
    assert 0.5 <= starts[1] - 2.0 <= 1.0
    assert 1.0 <= starts[2] - starts[1] <= 2.0
    assert simulate_async(main) == (value, starts), "pauses are drawn from the seed alone"


def test_a_time_out_of_the_calls_own_is_a_failure_not_a_time_out() -> None:
    async def main(clock: VirtualClock) -> Any:
        async def impatient() -> None:
            raise TimeoutError("its own")

        graph = Graph(clock)
        graph.add(impatient, terms=Terms(timeout_s=5.0))
        graph.close()
        return (await graph.run())[0]

    failure = simulate_async(main)
    assert (failure.why, failure.message) == ("raised", "TimeoutError: its own")


def test_a_call_that_swallows_its_time_out_is_late_all_the_same() -> None:
    async def main(clock: VirtualClock) -> Any:
        async def stubborn() -> str:
            try:
                await clock.sleep(10)
            except asyncio.CancelledError:
                await clock.sleep(1)
            return "late"

        graph = Graph(clock)
        graph.add(stubborn, terms=Terms(timeout_s=1.0))
        graph.close()
        return (await graph.run())[0]

    assert simulate_async(main).why == "timeout"


@pytest.mark.parametrize("begun", [False, True])
def test_a_node_cancelled_before_or_after_its_first_line_ends(begun: bool) -> None:
    async def main(clock: VirtualClock) -> list[Any]:
        graph = Graph(clock)
        first = graph.add(sleeper(clock, 5.0))
        graph.add(sleeper(clock, 1.0, "fed"), after=[first], terms=Terms(on_error="feed"))
        graph.close()
        running = asyncio.create_task(graph.run())
        await clock.sleep(0.5) if begun else await asyncio.sleep(0)
        graph.cancel(first)
        return await running

    failure, fed = simulate_async(main)
    assert failure.why == "cancelled"
    assert fed == "fed"


def test_a_cancelled_node_is_not_tried_again_whatever_it_raises() -> None:
    async def main(clock: VirtualClock) -> tuple[Any, float]:
        async def spiteful() -> None:
            try:
                await clock.sleep(5.0)
            except asyncio.CancelledError:
                raise ValueError("no") from None

        graph = Graph(clock)
        graph.add(spiteful, terms=Terms(attempts=3))
        graph.close()
        running = asyncio.create_task(graph.run())
        await clock.sleep(1.0)
        graph.cancel(0)
        return (await running)[0].why, clock.now

    assert simulate_async(main) == ("raised", 1.0)


def test_cancelling_the_run_cancels_and_awaits_every_node() -> None:
    async def main(clock: Clock, unit: float) -> tuple[int, int]:
        cleaned = 0

        async def careful() -> None:
            nonlocal cleaned
            try:
                await clock.sleep(1000 * unit)
            finally:
                await clock.sleep(unit)
                cleaned += 1

        graph = Graph(clock)
        for _ in range(8):
            graph.add(careful)
        running = asyncio.create_task(graph.run())
        await clock.sleep(unit)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        return cleaned, graph.live

    assert both_clocks(main) == [(8, 0)] * 2


def test_a_cancelled_run_starts_nothing_more() -> None:
    async def main(clock: VirtualClock) -> list[str]:
        begun: list[str] = []

        def call(name: str) -> Any:
            async def run(*_: Any) -> None:
                begun.append(name)
                await clock.sleep(1.0)

            return run

        events, last = EventLog(), list[int]()
        graph = Graph(clock, events=events)
        for name in "abcd":
            last = [graph.add(call(name), after=last, terms=Terms(on_error="feed"))]
        running = asyncio.create_task(graph.run())
        await clock.sleep(0.5)
        graph.cancel()
        await running
        starts = [node for entry in events for node in entry.decision["start"]]
        assert starts == [0]
        return begun

    assert simulate_async(main) == ["a"]


def test_money_that_comes_back_is_spent_again() -> None:
    """Each reserves 6 of 10 and costs 1: they run one after another, and all ten run."""

    async def main(clock: VirtualClock) -> tuple[float, float, int]:
        graph = Graph(clock, budget=10.0)

        async def cheap() -> Paid:
            await clock.sleep(1.0)
            return Paid("done", 1.0)

        for _ in range(10):
            graph.add(cheap, terms=Terms(bound=6.0))
        graph.close()
        outcomes = await graph.run()
        return graph.spent, clock.now, outcomes.count("done")

    assert simulate_async(main) == (5.0, 5.0, 5)


def test_who_can_never_pay_is_told_at_once_and_free_nodes_run() -> None:
    async def main(clock: VirtualClock) -> tuple[list[Any], float]:
        graph = Graph(clock, budget=1.0)
        ended: dict[int, float] = {}
        graph._watch = lambda node, outcome: ended.setdefault(node, clock.now)
        graph.add(sleeper(clock, 3.0, "paid"), terms=Terms(bound=1.0))
        graph.add(sleeper(clock, 1.0), terms=Terms(bound=2.0))
        graph.add(sleeper(clock, 1.0, "free"))
        graph.close()
        return await graph.run(), ended[1]

    (paid, dear, free), at = simulate_async(main)
    assert (paid, free) == ("paid", "free")
    assert (dear.why, at) == ("no budget", 0.0)


def test_a_keyed_call_is_reserved_and_charged_once_over_its_attempts() -> None:
    async def main(clock: VirtualClock) -> tuple[float, list[str]]:
        graph, keys = Graph(clock, budget=1.0), []

        async def flaky(key: str) -> Paid:
            keys.append(key)
            if len(keys) < 3:
                raise OSError("lost")
            return Paid("ok", 0.75)

        graph.add(flaky, terms=Terms(bound=1.0, keyed=True, attempts=3))
        graph.close()
        assert await graph.run() == ["ok"]
        return graph.spent, keys

    spent, keys = simulate_async(main)
    assert spent == 0.75
    assert len(keys) == 3
    assert len(set(keys)) == 1


def test_failures_cost_what_they_say_or_their_bound() -> None:
    async def main(clock: VirtualClock) -> float:
        graph = Graph(clock, budget=10.0)

        async def tells() -> None:
            raise PaidError("refused", 0.25, again=False)

        async def silent() -> None:
            raise OSError

        graph.add(tells, terms=Terms(bound=2.0, attempts=5))
        graph.add(silent, terms=Terms(bound=2.0))
        graph.close()
        await graph.run()
        return graph.spent

    assert simulate_async(main) == 2.25


@pytest.mark.parametrize("cost", [-1.0, float("nan"), float("inf")])
def test_a_cost_that_is_none_is_a_failure_and_costs_the_bound(cost: float) -> None:
    async def main(clock: VirtualClock) -> tuple[list[str], float]:
        graph = Graph(clock, budget=10.0)

        async def odd() -> Paid:
            return Paid("x", cost)

        async def odder() -> None:
            raise PaidError("no", cost)

        for call in (odd, odder):
            graph.add(call, terms=Terms(bound=1.0))
        graph.close()
        return [outcome.why for outcome in await graph.run()], graph.spent

    assert simulate_async(main) == (["raised", "raised"], 2.0)


@pytest.mark.parametrize("when", ["skipped", "paused"])
def test_a_watcher_that_fails_late_ends_the_run_too(when: str) -> None:
    async def main(clock: VirtualClock) -> None:
        def watch(node: int, outcome: Any) -> None:
            if node == 1:
                raise RuntimeError("the watcher is broken")

        async def fails() -> None:
            raise OSError

        graph = Graph(clock, watch=watch, budget=1.0)
        graph.add(fails, terms=Terms(attempts=2, bound=1.0, keyed=when == "paused"))
        graph.add(sleeper(clock, 0), after=[0] if when == "skipped" else [], terms=Terms(bound=0.5))
        await graph.run()

    with pytest.raises(RuntimeError, match="the watcher is broken"):
        simulate_async(main)


def test_a_backend_that_breaks_its_bound_is_told_and_the_budget_stays() -> None:
    async def main(clock: VirtualClock) -> tuple[float, float]:
        graph = Graph(clock, budget=1.0)

        async def greedy() -> Paid:
            return Paid(None, 5.0)

        graph.add(greedy, terms=Terms(bound=1.0))
        graph.close()
        await graph.run()
        return graph.spent, graph.overrun

    assert simulate_async(main) == (1.0, 4.0)


@given(st.lists(st.tuples(st.floats(0, 5), st.floats(0, 1)), max_size=40), st.floats(0, 20))
def test_sums_of_any_amounts_stay_within_the_budget(payments: list[tuple[float, float]], limit: float) -> None:
    budget = Budget(limit)
    for bound, share in payments:
        if budget.can_reserve(units(bound)):
            budget.reserve(units(bound))
            budget.settle(units(bound), units(min(bound, bound * share)))
    assert budget.reserved == budget.overrun == 0
    assert budget.spent <= limit * 1e9


@pytest.mark.parametrize("executor", [ThreadPoolExecutor, ProcessPoolExecutor])
def test_calls_run_on_executors(executor: Any) -> None:
    async def main(pool: Any) -> list[Any]:
        graph = Graph(RealClock())
        a = graph.add(on_executor(pool, int))
        graph.add(on_executor(pool, pow), after=[a, a])
        b = graph.add(on_executor(pool, divmod), after=[a, a])
        graph.add(sleeper(RealClock(), 0, "fed"), after=[b], terms=Terms(on_error="feed"))
        graph.close()
        return await graph.run()

    with executor(2) as pool:
        zero, one, failure, fed = asyncio.run(main(pool))
    assert (zero, one, fed) == (0, 1, "fed")
    assert failure.message.startswith("ZeroDivisionError")


def test_what_cannot_be_added() -> None:
    async def main(clock: VirtualClock) -> None:
        graph = Graph(clock)
        with pytest.raises(ValueError, match="node 0 comes after node 0, which does not exist"):
            graph.add(sleeper(clock, 0), after=[0])
        with pytest.raises(ValueError, match="comes after node -1"):
            graph.add(sleeper(clock, 0), after=[-1])
        graph.close()
        with pytest.raises(ValueError, match="closed"):
            graph.add(sleeper(clock, 0))
        assert await graph.run() == []

    simulate_async(main)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("timeout_s", 0.0),
        ("attempts", 0),
        ("backoff_s", -1.0),
        ("jitter", 1.5),
        ("bound", -1.0),
        ("bound", float("nan")),
    ],
)
def test_terms_are_checked_where_they_are_built(field: str, value: float) -> None:
    with pytest.raises(FieldError, match=field):
        Terms(**{field: value})  # type: ignore[arg-type]


def test_a_graph_that_is_never_closed_says_so() -> None:
    async def main(clock: VirtualClock) -> None:
        await Graph(clock).run()

    with pytest.raises(Deadlock, match="a graph waits for its nodes, or to be closed"):
        simulate_async(main)


def test_a_watcher_that_fails_ends_the_run() -> None:
    async def main(clock: VirtualClock) -> None:
        def watch(node: int, outcome: Any) -> None:
            raise RuntimeError("the watcher is broken")

        graph = Graph(clock, watch=watch)
        graph.add(sleeper(clock, 1.0))
        graph.add(sleeper(clock, 1e9))
        await graph.run()

    with pytest.raises(RuntimeError, match="the watcher is broken"):
        simulate_async(main)


def test_spans_say_kind_node_and_attempt() -> None:
    async def main(clock: VirtualClock) -> Any:
        recorder = Recorder("simulated")
        graph = Graph(clock, recorder, limits={"search": 2})
        for _ in range(3):
            graph.add(sleeper(clock, 1.0), terms=Terms(kind="search"))
        graph.close()
        await graph.run()
        return recorder.trace()

    trace = simulate_async(main)
    assert trace.lanes == ("search 0", "search 1")
    assert [(span.start, span.finish, span.key.step, span.key.micro_batch) for span in trace] == [
        (0.0, 1.0, 0, 1),
        (0.0, 1.0, 1, 1),
        (1.0, 2.0, 2, 1),
    ]


def test_a_chain_of_a_hundred_calls_takes_under_fifty_milliseconds() -> None:
    async def nothing(*_: Any) -> None:
        return None

    async def main() -> float:
        graph, last = Graph(RealClock(), Recorder("measured")), []
        for _ in range(100):
            last = [graph.add(nothing, after=last)]
        graph.close()
        start = time.perf_counter()
        await graph.run()
        return time.perf_counter() - start

    assert min(asyncio.run(main()) for _ in range(3)) < 0.05
