"""Priorities, deadlines, and requests that are put back to spare memory, on virtual time and with a real model."""

from __future__ import annotations

import pytest

from stretto.core.eventlog import replay
from stretto.models.load import Model
from stretto.serve.backend import Pass
from stretto.serve.joining import JOININGS
from stretto.serve.request import Request
from stretto.serve.scheduler import Scheduler
from stretto.serve.spare import SpareMemory

from .test_engine import assert_lawful, computed
from .worlds import Ask, RoundCost, World, config, play


def in_order_of_first_token(world: World) -> list[int]:
    return sorted(world.answers, key=lambda i: world.answers[i].token_times_s[0])


@pytest.mark.parametrize("joining", sorted(set(JOININGS) - {"static"}))
def test_the_urgent_join_first_and_equals_in_order_of_arrival(joining: str) -> None:
    late = [Ask(at=1.0 + 0.1 * i, length=3, priority=priority) for i, priority in enumerate((0, 5, 0, -2, 5, -2))]
    asks = [Ask(length=9), *late]
    world = play(asks, config(slots=1, pages=1, joining=joining))
    assert_lawful(world, asks)
    assert in_order_of_first_token(world) == [0, 4, 6, 1, 3, 2, 5]


def test_nobody_who_runs_gives_way_to_the_urgent_unless_pages_run_out() -> None:
    asks = [Ask(length=30, priority=9), Ask(at=1.5, length=2, priority=-9)]
    world = play(asks, config(slots=1, pages=1))
    assert world.answers[1].token_times_s[0] > world.answers[0].finished_s


def test_the_least_urgent_is_put_back_and_of_equals_the_last_to_join() -> None:
    asks = [Ask(at=0.1 * i, prompt=8, length=20, limit=20, priority=p, family=i) for i, p in enumerate((1, 0, 0))]
    world = play(asks, config(pages=9, page_tokens=8, slots=3))
    assert_lawful(world, asks)
    victims = [victim for entry in world.log for victim in entry.decision["preempted"]]
    assert victims[0] == 0
    assert set(victims) == {0}
    equal = play(
        [Ask(prompt=8, length=20, limit=20, family=i) for i in range(3)], config(pages=9, page_tokens=8, slots=3)
    )
    assert {victim for entry in equal.log for victim in entry.decision["preempted"]} == {2}


def test_urgent_prompts_are_computed_first() -> None:
    asks = [Ask(prompt=100, length=2, priority=1), Ask(at=0.5, prompt=10, length=2), Ask(at=0.5, prompt=10, priority=2)]
    world = play(asks, config(prefill_tokens=20))
    assert_lawful(world, asks)
    assert in_order_of_first_token(world) == [1, 0, 2]


def test_who_comes_back_to_a_prompt_that_is_all_there_is_in_the_pass_once() -> None:
    asks = [Ask(prompt=8, length=3, limit=3, family=0), Ask(prompt=8, length=9, limit=9, family=1)]
    world = play(asks, config(pages=5, page_tokens=4, slots=2, prefix_cache=True))
    assert_lawful(world, asks)
    (victim,) = (victim for entry in world.log for victim in entry.decision["preempted"])
    back = [chunk for entry in world.log for chunk in entry.decision["prefill"] if chunk[0] == victim][1]
    assert tuple(back[1:3]) == (8, 1)


# Deadlines.


def test_a_deadline_ends_who_waits_and_who_runs_at_the_next_step() -> None:
    asks = [Ask(length=50, deadline=10.5), Ask(length=50, deadline=4.0), Ask(at=1.0, length=3, deadline=1000.0)]
    world = play(asks, config(slots=1, pages=1))
    assert_lawful(world, asks)
    assert [world.answers[i].reason for i in range(3)] == ["deadline", "deadline", "stop"]
    assert world.answers[0].latency_s <= 10.5 + 1.02
    assert len(world.answers[0].tokens) in (10, 11)
    assert world.answers[1].tokens == ()
    assert world.answers[1].latency_s <= 4.0 + 1.02
    assert world.trace.makespan < 20
    assert replay(world.log, Scheduler(world.scheduler.config)).equal


def test_who_waits_for_company_is_ended_too() -> None:
    world = play([Ask(deadline=2.0), Ask(at=50.0)], config(joining="dynamic", max_wait_s=30.0))
    assert world.answers[0].reason == "deadline"
    assert world.answers[0].finished_s == pytest.approx(2.0)


def test_a_deadline_that_is_no_time_is_refused() -> None:
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"deadline_s .* > 0"):
            Request(id=0, prompt=(1,), limit=1, deadline_s=wrong)


# Spare memory.

TIGHT = {"pages": 6, "page_tokens": 8, "slots": 2}
PAIR = [Ask(prompt=8, length=20, limit=20), Ask(prompt=9, length=20, limit=20, family=8)]


def swapped(world: World) -> tuple[int, int]:
    """Positions that went out, and that came back."""
    out = sum(positions for work in world.passes for *_, positions in work.swap_out)
    back = sum(positions for work in world.passes for *_, positions in work.swap_in)
    return out, back


def test_pages_that_are_away_come_back_and_nothing_is_computed_again() -> None:
    world = play(PAIR, config(**TIGHT, preemption="swap", spare_pages=6))
    assert_lawful(world, PAIR)
    assert world.scheduler.preemptions == world.scheduler.swaps > 0
    assert computed(world) == {0: [8], 1: [9]}
    out, back = swapped(world)
    assert out == back > 0
    assert replay(world.log, Scheduler(world.scheduler.config)).equal


@pytest.mark.parametrize("spare_pages", [0, 1])
def test_where_spare_memory_is_full_pages_are_computed_again(spare_pages: int) -> None:
    world = play(PAIR, config(**TIGHT, preemption="swap", spare_pages=spare_pages))
    assert_lawful(world, PAIR)
    assert world.scheduler.preemptions > world.scheduler.swaps == 0
    assert len(computed(world)[1]) == 2
    assert swapped(world) == (0, 0)


def test_the_twin_charges_for_the_copies() -> None:
    class Dear(RoundCost):
        def move_s(self, positions: int) -> float:
            return 3.0 * positions

    settings = config(**TIGHT, preemption="swap", spare_pages=6)
    cheap, dear = play(PAIR, settings), play(PAIR, settings, cost=Dear())
    copied = sum(swapped(dear))
    assert swapped(cheap) == swapped(dear)
    assert dear.trace.makespan - cheap.trace.makespan == pytest.approx((3.0 - 1e-6) * copied)


def test_who_is_cancelled_while_away_leaves_nothing_there() -> None:
    for ending in ({"cancel_at": 18.5}, {"deadline": 18.5}):
        asks = [PAIR[0], Ask(prompt=9, length=20, limit=20, family=8, **ending)]  # type: ignore[arg-type]
        world = play(asks, config(**TIGHT, preemption="swap", spare_pages=6))
        assert_lawful(world, asks)
        out, back = swapped(world)
        assert out > back == 0


def test_pages_that_the_pool_still_has_are_not_copied_back() -> None:
    asks = [Ask(prompt=33, length=30, limit=30, family=i) for i in range(2)]
    settings = config(pages=13, page_tokens=8, slots=2, preemption="swap", spare_pages=13, prefix_cache=True)
    world = play(asks, settings)
    assert_lawful(world, asks)
    out, back = swapped(world)
    assert out > back > 0


def test_who_is_put_back_comes_before_its_peers() -> None:
    asks = [*PAIR, Ask(at=1.0, prompt=8, length=5, limit=20, family=9)]
    world = play(asks, config(**TIGHT))
    assert_lawful(world, asks)
    assert world.scheduler.preemptions > 0
    assert world.answers[2].token_times_s[0] > world.answers[0].finished_s


def test_a_pass_that_comes_twice_is_copied_once(tiny: Model) -> None:
    import torch

    cache = tiny.transformer.new_cache(pages=4, page_tokens=8)
    memory = SpareMemory(cache, tiny.transformer.new_cache(pages=2, page_tokens=8))
    for layer in cache.layers:
        layer.copy_(torch.randn(layer.shape))
    before = [layer[2].clone() for layer in cache.layers]
    out = Pass(step=7, prefill=(), decode=(), swap_out=((2, 1, 5),))
    memory.copy(out)
    for layer in cache.layers:
        layer[2].zero_()  # the page is given to another request
    memory.copy(out)
    memory.copy(Pass(step=8, prefill=(), decode=(), swap_in=((1, 3, 5),)))
    for layer, held in zip(cache.layers, before, strict=True):
        assert torch.equal(layer[3, :, :5], held[:, :5])
        assert not torch.equal(layer[3, :, 5:], held[:, 5:])
