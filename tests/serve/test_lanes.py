"""Two lanes: who is in which pass, whose pages are whose while passes overlap, and what the engine makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stretto.core.eventlog import replay
from stretto.core.faults import draw_faults
from stretto.core.random import integers
from stretto.serve.decision import Lane
from stretto.serve.joining import JOININGS
from stretto.serve.lanes import LaneScheduler, scheduler_of
from stretto.serve.scheduler import Scheduler

from .lane_driver import Sent, decide, drive, lanes, ran
from .test_engine import asks_strategy, assert_lawful
from .worlds import Ask, World, config, play


def arrive(scheduler: Scheduler, number: int, prompt: int, limit: int, *, priority: int = 0) -> None:
    event = {"type": "arrive", "id": number, "at": 0.0, "prompt": prompt, "limit": limit, "priority": priority}
    scheduler.apply(event)


def test_a_prompt_is_computed_beside_those_who_decode() -> None:
    scheduler = LaneScheduler(lanes(prefill_tokens=16))
    arrive(scheduler, 0, 10, 50)
    assert list(decide(scheduler)) == ["prompts", None]
    ran(scheduler, "prompts")
    arrive(scheduler, 1, 40, 50)
    found = decide(scheduler)
    assert found["tokens"].decode == (0,)
    assert [chunk.count for chunk in found["prompts"].prefill] == [16]
    assert decide(scheduler)[None].idle_until == float("inf")


def test_whose_prompt_is_done_joins_at_the_next_decision() -> None:
    scheduler = LaneScheduler(lanes())
    for number in (0, 1):
        arrive(scheduler, number, 10, 50)
        decide(scheduler)
        ran(scheduler, "prompts")
        assert scheduler.members("tokens") == ({0} if number else set())
    scheduler.apply({"type": "cut", "steps": 1})
    assert list(decide(scheduler)) == [None]
    ran(scheduler, "tokens")
    assert decide(scheduler)["tokens"].decode == (0, 1)


def test_a_long_prompt_does_not_lengthen_the_steps_of_others() -> None:
    asks = [Ask(prompt=5, length=30), Ask(at=3.3, prompt=900, length=2)]
    gaps = {}
    for prefill in ("mixed", "lanes"):
        world = play(asks, config(prefill=prefill, page_tokens=1000))
        assert_lawful(world, asks)
        times = world.answers[0].token_times_s
        gaps[prefill] = max(b - a for a, b in pairwise(times))
    assert gaps["lanes"] == pytest.approx(1.0)
    assert gaps["mixed"] == pytest.approx(1.9)


def decoders(prompts: Sequence[int], *, priorities: Sequence[int] = (), **changes: object) -> LaneScheduler:
    """Requests whose prompts are done, and who have taken no step in lane tokens yet."""
    scheduler = LaneScheduler(lanes(page_tokens=8, **changes))
    for number, prompt in enumerate(prompts):
        arrive(scheduler, number, prompt, 20, priority=priorities[number] if priorities else 0)
    decide(scheduler)
    ran(scheduler, "prompts")
    return scheduler


def test_a_row_without_a_page_takes_it_from_the_least_urgent_that_is_in_no_pass() -> None:
    scheduler = decoders([15, 15], pages=7)
    arrive(scheduler, 2, 20, 20)
    found = decide(scheduler)
    assert (found["tokens"].decode, found["prompts"].prefill[0].id) == ((0, 1), 2)
    ran(scheduler, "tokens")
    found = decide(scheduler)
    assert found["tokens"].preempted == (1,)
    assert found["tokens"].decode == (0,)
    assert [r.id for r in scheduler.running] == [0, 2]


def test_a_row_waits_for_the_pass_of_one_less_urgent_and_gets_its_pages() -> None:
    scheduler = decoders([15], pages=5)
    arrive(scheduler, 1, 20, 20)
    decide(scheduler)
    ran(scheduler, "tokens")
    found = decide(scheduler)
    assert list(found) == [None]
    assert found[None].preempted == ()
    ran(scheduler, "prompts")
    found = decide(scheduler)
    assert found["tokens"].decode == (0,)
    assert found["tokens"].preempted == (1,)


def test_no_prompt_begins_while_a_row_waits_for_a_page() -> None:
    scheduler = decoders([9, 15], pages=6, prefill_tokens=24)
    arrive(scheduler, 2, 12, 4)
    assert decide(scheduler)["tokens"].decode == (0, 1)
    ran(scheduler, "tokens")
    assert decide(scheduler)["tokens"].decode == (0,)  # 1 is the least urgent outside the pass of prompts
    ran(scheduler, "prompts")
    arrive(scheduler, 3, 4, 4)
    scheduler.apply({"type": "cancel", "id": 2})
    assert list(decide(scheduler)) == [None]  # though two pages are free
    ran(scheduler, "tokens")
    found = decide(scheduler)
    assert found["tokens"].decode == (0, 1)
    assert [chunk.id for chunk in found["prompts"].prefill] == [3]


@pytest.mark.parametrize("ends", ["cancel", "expire"])
@pytest.mark.parametrize("lane", ["prompts", "tokens"])
def test_who_goes_while_in_a_pass_keeps_its_pages_until_it_ends(ends: str, lane: Lane) -> None:
    scheduler = decoders([10], pages=12)
    arrive(scheduler, 1, 40, 5)
    assert set(decide(scheduler)) == {"prompts", "tokens", None}
    gone = 1 if lane == "prompts" else 0
    held = scheduler.pool.table(gone)
    scheduler.apply({"type": ends, "id": gone})
    scheduler.apply({"type": "close"})
    assert list(decide(scheduler)) == [None]
    assert scheduler.pool.table(gone)[: len(held)] == held
    ran(scheduler, lane)
    assert not scheduler.pool.table(gone)
    assert [r.id for r in scheduler.running] == [1 - gone]
    ran(scheduler, "tokens" if lane == "prompts" else "prompts")
    assert decide(scheduler)["tokens"].decode == (1 - gone,)


def test_what_is_lost_is_lost_in_both_lanes() -> None:
    scheduler = decoders([10, 12], pages=20, horizon="shortage")
    arrive(scheduler, 2, 40, 5)
    decide(scheduler)
    scheduler.apply({"type": "cancel", "id": 1})
    scheduler.apply({"type": "lost", "at": 1.0})
    scheduler.audit()
    assert scheduler.pool.held == 0
    assert [(r.id, r.computed, r.produced) for r in scheduler.waiting] == [(0, 0, 1), (2, 0, 0)]
    assert [(chunk.id, chunk.count) for chunk in decide(scheduler)["prompts"].prefill] == [(0, 11), (2, 40)]


def test_a_decision_that_is_cut_gives_its_later_pages_back() -> None:
    scheduler = decoders([7], pages=5, horizon="shortage")
    found = decide(scheduler)
    assert found["tokens"].steps == 19
    assert scheduler.pool.held == 4
    scheduler.apply({"type": "cut", "steps": 10})
    assert scheduler.pool.held == 3  # 7 of the prompt and 10 more
    arrive(scheduler, 1, 16, 5)
    assert [chunk.id for chunk in decide(scheduler)["prompts"].prefill] == [1]
    ran(scheduler, "tokens", 10)
    scheduler.audit()


@pytest.mark.parametrize("refused", [{"layout": "slots"}, {"preemption": "swap", "spare_pages": 5}])
def test_what_lanes_cannot_do_is_refused(refused: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="where prompts have lanes"):
        scheduler_of(lanes(**refused))
    with pytest.raises(ValueError, match="prefill"):
        Scheduler(lanes())


@settings(max_examples=300, deadline=None)
@given(
    sent=st.lists(
        st.tuples(st.integers(0, 60), st.integers(1, 40), st.integers(1, 60), st.integers(-1, 1)),
        min_size=1,
        max_size=10,
    ),
    ends=st.lists(st.tuples(st.integers(0, 90), st.integers(0, 9)), max_size=4),
    lost=st.lists(st.integers(1, 90), max_size=1),
    joining=st.sampled_from(sorted(JOININGS)),
    slots=st.integers(1, 6),
    page_tokens=st.sampled_from([1, 3, 16]),
    spare=st.integers(0, 60),
    prefill_tokens=st.integers(1, 64),
)
def test_nobody_starves_and_far_decisions_are_the_near_ones_run_together(
    sent: list[Sent],
    ends: list[tuple[int, int]],
    lost: list[int],
    joining: str,
    slots: int,
    page_tokens: int,
    spare: int,
    prefill_tokens: int,
) -> None:
    near = lanes(
        joining=joining,
        slots=slots,
        page_tokens=page_tokens,
        pages=-(-100 // page_tokens) + spare // page_tokens,
        prefill_tokens=prefill_tokens,
        max_wait_s=3.0,
    )
    by_page, by_shortage = (drive(sent, replace(near, horizon=h), ends, lost) for h in ("page", "shortage"))
    assert sorted(by_page.steps, key=str) == sorted(by_shortage.steps, key=str)
    assert by_page.scheduler.preemptions == by_shortage.scheduler.preemptions
    assert by_page.now == by_shortage.now


@settings(max_examples=100, deadline=None)
@given(
    asks=asks_strategy,
    joining=st.sampled_from(sorted(JOININGS)),
    prefix_cache=st.booleans(),
    slots=st.integers(1, 5),
    page_tokens=st.sampled_from([1, 7, 100]),
    spare=st.integers(0, 40),
    prefill_tokens=st.integers(1, 64),
    horizon=st.sampled_from(["page", "shortage"]),
)
def test_any_load_is_served_whole_and_replays(asks: list[Ask], page_tokens: int, spare: int, **changes: object) -> None:
    settings_ = lanes(page_tokens=page_tokens, pages=-(-100 // page_tokens) + spare, **changes)
    world = play(asks, settings_)
    assert_lawful(world, asks)
    again = replay(world.log, scheduler_of(settings_))
    assert again.equal, again.different[:1]


def bad_day(seed: int) -> tuple[list[Ask], World]:
    """Few pages, some urgent, some with deadlines, some cancelled; passes that crash, stall or are done twice."""
    draws = integers(seed, 11, range(200), 1000)
    asks = [
        Ask(
            at=float(draws[i]) / 10,
            prompt=1 + int(draws[20 + i]) % 50,
            length=35 + int(draws[40 + i]) % 40,
            limit=70,
            deadline=60.0 + float(draws[60 + i]) / 4 if draws[80 + i] % 5 == 0 else None,
            cancel_at=100.0 + float(draws[60 + i]) / 10 if draws[80 + i] % 5 == 1 else None,
            priority=int(draws[100 + i]) % 3 - 1,
            family=1 + int(draws[120 + i]) % 3,
        )
        for i in range(20)
    ]
    horizon = ("page", "shortage")[seed % 2]
    settings_ = lanes(slots=5, pages=20, page_tokens=8, prefill_tokens=24, prefix_cache=seed % 3 == 0, horizon=horizon)
    faults = draw_faults(seed, count=3, calls=90, seconds=2.0)
    return asks, play(asks, settings_, faults=faults, step_timeout_s=60.0)


@pytest.mark.parametrize("block", range(4))
def test_two_hundred_bad_days_lose_double_and_leak_nothing(block: int) -> None:
    for seed in range(50 * block, 50 * block + 50):
        asks, world = bad_day(seed)
        assert_lawful(world, asks)
        assert len({(fault.kind, fault.call) for fault in world.injected}) == 3
        assert world.scheduler.preemptions > 0
        assert replay(world.log, scheduler_of(world.scheduler.config)).equal


def test_a_backend_that_dies_for_good_fails_the_requests_and_ends() -> None:
    faults = draw_faults(1, count=40, calls=40, seconds=1.0, kinds=("loss",))
    world = play([Ask(length=30), Ask(length=30, at=2.0)], lanes(), faults=faults, step_timeout_s=5.0)
    assert [answer.reason for answer in world.answers.values()] == ["failed", "failed"]
