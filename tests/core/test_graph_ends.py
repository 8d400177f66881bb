"""Calls of the graph executor that end otherwise than well: time-outs, retries, cancelling."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from stretto.core.clock import Clock, VirtualClock, simulate_async
from stretto.core.eventlog import EventLog
from stretto.core.graph import Graph, Terms
from tests.core.graph_calls import both_clocks, sleeper


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
