"""The graph executor on real and on virtual time: order, limits, growth, watchers, speed."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto.core.clock import Clock, RealClock, VirtualClock, simulate_async
from stretto.core.errors import FieldError
from stretto.core.eventlog import EventLog, replay
from stretto.core.graph import Failure, Graph, Terms, on_executor
from stretto.core.graph_policy import GraphPolicy
from stretto.core.record import Recorder
from stretto.core.virtual_loop import Deadlock
from tests.core.graph_calls import both_clocks, sleeper
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
