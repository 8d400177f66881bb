"""Money of the graph executor: what calls reserve, cost and give back, and watchers who see it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto.core.budget import Budget, units
from stretto.core.clock import VirtualClock, simulate_async
from stretto.core.graph import Graph, Paid, PaidError, Terms
from tests.core.graph_calls import sleeper


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
