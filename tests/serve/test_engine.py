"""The engine and its scheduler on virtual time: joins, lengths, cancels, preemption, replay, and five hundred
bad days.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stretto.core.eventlog import replay
from stretto.core.faults import draw_faults
from stretto.core.random import integers
from stretto.serve.joining import JOININGS
from stretto.serve.request import Request
from stretto.serve.scheduler import Scheduler

from .worlds import Ask, World, config, play


def assert_lawful(world: World, asks: list[Ask]) -> None:
    """Nothing lost, doubled or leaked; the trace has no lane that does two things at once."""
    assert set(world.answers) == set(range(len(asks)))
    for i, ask in enumerate(asks):
        answer = world.answers[i]
        if answer.reason in ("stop", "length"):
            assert len(answer.tokens) == min(ask.length, ask.limit)
        else:
            assert answer.reason == ("cancelled" if ask.deadline is None else "deadline")
            assert len(answer.tokens) < min(ask.length, ask.limit)
        if answer.reason == "deadline":
            assert answer.latency_s >= (ask.deadline or 0.0) - 1e-9
        assert list(answer.token_times_s) == sorted(answer.token_times_s)
    world.scheduler.audit()
    assert world.scheduler.pool.held == 0
    assert world.scheduler.spare is None or world.scheduler.spare.held == 0
    assert not world.scheduler.running
    assert not world.scheduler.waiting
    assert world.trace.overlaps() == []
    for entry in world.log:
        rows = [chunk[0] for chunk in entry.decision["prefill"]] + entry.decision["decode"]
        assert len(rows) == len(set(rows)), "a request is in one pass twice"


def test_all_at_once_take_as_many_steps_as_the_longest() -> None:
    asks = [Ask(length=n) for n in (3, 7, 5)]
    world = play(asks, config())
    assert_lawful(world, asks)
    assert len(world.trace.spans) == 7


@pytest.mark.parametrize(("gap", "steps"), [(2, 10 + 2 * 2), (9, 10 + 2 * 9), (20, 30)])
def test_fused_steps_are_the_union_of_the_active_intervals(gap: int, steps: int) -> None:
    """Arrivals k steps apart: T + (n-1)k steps while k < T, else nT; never the sum (Flover's invariant)."""
    asks = [Ask(at=gap * 1.02 * i + (0.01 if i else 0.0), length=10, prompt=1) for i in range(3)]
    world = play(asks, config())
    assert_lawful(world, asks)
    assert abs(len(world.trace.spans) - steps) <= 2


def test_a_request_joins_at_the_next_step_boundary() -> None:
    asks = [Ask(length=50), Ask(at=10.3, length=3)]
    world = play(asks, config())
    assert world.answers[1].first_token_s is not None
    assert world.answers[1].first_token_s - 10.3 < 2.1


def test_static_batches_wait_for_their_longest_member() -> None:
    asks = [Ask(length=2), Ask(length=9), Ask(length=2)]
    world = play(asks, config(joining="static", slots=2, pages=2))
    assert_lawful(world, asks)
    assert world.answers[2].token_times_s[0] > world.answers[1].finished_s
    continuous = play(asks, config(slots=2, pages=2))
    assert continuous.trace.makespan < world.trace.makespan


def test_dynamic_batches_start_when_the_oldest_has_waited_long_enough() -> None:
    asks = [Ask(length=2), Ask(at=100.0, length=2)]
    world = play(asks, config(joining="dynamic", max_wait_s=3.0))
    assert_lawful(world, asks)
    first = world.answers[0].first_token_s
    assert first is not None
    assert first == pytest.approx(3.0 + 1.01)


def test_cancel_frees_the_slot_and_keeps_what_was_said() -> None:
    asks = [Ask(length=50, cancel_at=5.5), Ask(length=3, at=1.0)]
    world = play(asks, config(slots=1, pages=1))
    assert_lawful(world, asks)
    assert world.answers[0].reason == "cancelled"
    assert 4 <= len(world.answers[0].tokens) <= 6
    assert world.answers[1].first_token_s < 8.2  # type: ignore[operator]


def test_pages_run_out_and_the_last_joined_is_recomputed() -> None:
    asks = [Ask(prompt=8, length=20, limit=20), Ask(prompt=8, length=20, limit=20)]
    world = play(asks, config(pages=6, page_tokens=8, slots=2))
    assert_lawful(world, asks)
    assert world.scheduler.preemptions > 0


def test_long_prompts_come_in_chunks_and_others_decode_meanwhile() -> None:
    asks = [Ask(prompt=5, length=30), Ask(at=3.0, prompt=150, length=2)]
    world = play(asks, config(prefill_tokens=16))
    assert_lawful(world, asks)
    phases = world.trace.phase_seconds
    assert phases["mixed"] > 9
    gaps = [b - a for a, b in zip(world.answers[0].token_times_s, world.answers[0].token_times_s[1:], strict=False)]
    assert max(gaps) < 1.0 + 16 * 0.001 + 1e-9


def test_a_prompt_that_others_began_with_is_computed_from_where_they_differ() -> None:
    asks = [Ask(prompt=50, length=30), Ask(at=5.0, prompt=45, length=5), Ask(at=6.0, prompt=45, length=5, family=8)]
    settings = config(page_tokens=10, pages=40, prefix_cache=True)
    world = play(asks, settings)
    assert_lawful(world, asks)
    assert [world.answers[i].cached_tokens for i in range(3)] == [0, 40, 0]
    chunks = {row.id: len(row.tokens) for p in world.passes for row in p.prefill}
    assert chunks == {0: 50, 1: 5, 2: 45}
    again = play([*asks, Ask(at=60.0, prompt=50, length=5)], settings)  # nobody runs, but the pages are kept
    assert again.answers[3].cached_tokens == 40  # the last token is always computed


def computed(world: World) -> dict[int, list[int]]:
    """The lengths of each request's prompt chunks."""
    chunks: dict[int, list[int]] = {}
    for work in world.passes:
        for row in work.prefill:
            chunks.setdefault(row.id, []).append(len(row.tokens))
    return chunks


SHARING = {"page_tokens": 10, "pages": 40, "prefix_cache": True}


def test_equal_prompts_that_come_at_once_are_computed_once() -> None:
    asks = [Ask(prompt=50, length=5)] * 4
    world = play(asks, config(**SHARING))
    assert_lawful(world, asks)
    assert computed(world) == {0: [50], 1: [10], 2: [10], 3: [10]}
    assert [world.answers[i].cached_tokens for i in range(4)] == [0, 40, 40, 40]
    assert world.answers[0].not_cached == "no prompt kept here begins with the same 10 tokens"
    assert world.answers[3].not_cached is None


def test_newcomers_wait_for_the_chunks_of_the_one_ahead_and_for_nobody_else() -> None:
    asks = [Ask(prompt=50, length=9), Ask(prompt=48, length=5), Ask(prompt=12, length=5, family=8)]
    world = play(asks, config(**SHARING, prefill_tokens=30))
    assert_lawful(world, asks)
    assert computed(world) == {0: [30, 20], 2: [10, 2], 1: [8]}
    assert [world.answers[i].cached_tokens for i in range(3)] == [0, 40, 0]


def test_who_waits_for_one_that_is_cancelled_computes_the_rest_itself() -> None:
    asks = [Ask(prompt=90, length=9, cancel_at=1.5), Ask(prompt=90, length=5)]
    world = play(asks, config(**SHARING, prefill_tokens=20))
    assert_lawful(world, asks)
    assert computed(world) == {0: [20, 20], 1: [20, 20, 10]}
    assert world.answers[1].cached_tokens == 40


def test_it_is_told_why_nothing_was_cached() -> None:
    asks = [Ask(at=20.0 * i, prompt=40, length=2, limit=10, family=i % 3) for i in range(4)]
    asks.append(Ask(at=80, prompt=10, length=2, limit=10))
    tight = play(asks, config(page_tokens=10, pages=6, prefix_cache=True))
    why = [tight.answers[i].not_cached for i in range(5)]
    assert why[:3] == ["no prompt kept here begins with the same 10 tokens"] * 3
    assert why[3:] == [
        "the pages of its beginning were given to other requests meanwhile",
        "pages of 10 tokens are shared, and the prompt goes beyond none",
    ]
    assert play(asks[:1], config()).answers[0].not_cached == "the prefix cache is off"


def test_pages_that_are_kept_give_way_oldest_first() -> None:
    asks = [Ask(at=20.0 * i, prompt=40, length=2, limit=10, family=i % 3) for i in range(6)]
    roomy = play(asks, config(page_tokens=10, pages=20, prefix_cache=True))
    tight = play(asks, config(page_tokens=10, pages=6, prefix_cache=True))
    assert [roomy.answers[i].cached_tokens for i in range(6)] == [0, 0, 0, 30, 30, 30]
    assert [tight.answers[i].cached_tokens for i in range(6)] == [0, 0, 0, 0, 0, 0]
    for world in (roomy, tight):
        assert_lawful(world, asks)


def test_preempted_requests_find_their_pages_again() -> None:
    asks = [Ask(prompt=24, length=20, limit=20, family=i) for i in range(2)]
    cached = play(asks, config(pages=8, page_tokens=8, slots=2, prefix_cache=True))
    plain = play(asks, config(pages=8, page_tokens=8, slots=2))
    for world in (cached, plain):
        assert_lawful(world, asks)
        assert world.scheduler.preemptions > 0
    rows = [sum(len(row.tokens) for p in world.passes for row in p.prefill) for world in (cached, plain)]
    assert rows[0] < rows[1]


def test_what_can_never_fit_is_refused_at_the_door() -> None:
    def too_long(engine: object) -> None:
        with pytest.raises(ValueError, match="do not fit into the KV pool of 800 tokens"):
            engine.submit(Request(id=9, prompt=(1,) * 790, limit=20))  # type: ignore[attr-defined]

    play([Ask()], config(), watch=too_long)


def test_a_backend_that_dies_for_good_fails_the_requests_and_ends() -> None:
    faults = draw_faults(1, count=40, calls=40, seconds=1.0, kinds=("loss",))
    world = play([Ask(length=30)], config(), faults=faults, step_timeout_s=5.0)
    assert world.answers[0].reason == "failed"


asks_strategy = st.lists(
    st.builds(
        Ask,
        at=st.floats(0, 30),
        prompt=st.integers(1, 60),
        length=st.integers(1, 40),
        limit=st.integers(1, 40),
        cancel_at=st.none() | st.floats(30, 60),
        family=st.integers(1, 2),
        priority=st.integers(-1, 1),
    )
    | st.builds(Ask, at=st.floats(0, 30), prompt=st.integers(1, 60), limit=st.just(40), deadline=st.floats(0.1, 40)),
    min_size=1,
    max_size=12,
)


@settings(max_examples=150, deadline=None)
@given(
    asks=asks_strategy,
    joining=st.sampled_from(sorted(JOININGS)),
    reorder=st.sampled_from([None, None, None, "eager", "threshold", "never"]),
    prefix_cache=st.booleans(),
    spare_pages=st.integers(0, 30),
    slots=st.integers(1, 5),
    page_tokens=st.sampled_from([1, 7, 100]),
    spare=st.integers(0, 40),
    prefill_tokens=st.integers(1, 64),
    prefill=st.sampled_from(["mixed", "mixed", "whole"]),
    horizon=st.sampled_from(["page", "shortage"]),
)
def test_any_load_under_any_policy_is_served_whole_and_replays(
    asks: list[Ask],
    joining: str,
    reorder: str | None,
    prefix_cache: bool,
    spare_pages: int,
    slots: int,
    page_tokens: int,
    spare: int,
    prefill_tokens: int,
    prefill: str,
    horizon: str,
) -> None:
    changes: dict[str, object] = {"joining": joining, "slots": slots, "prefill_tokens": prefill_tokens}
    changes |= {"prefill": prefill, "horizon": horizon}
    if reorder is None:
        changes |= {"pages": -(-100 // page_tokens) + spare, "page_tokens": page_tokens, "prefix_cache": prefix_cache}
        changes |= {"preemption": "swap", "spare_pages": spare_pages}
    else:
        changes |= {"layout": "slots", "reorder": reorder, "pages": slots, "page_tokens": 100}
    world = play(asks, config(**changes))
    assert_lawful(world, asks)
    again = replay(world.log, Scheduler(world.scheduler.config))
    assert again.equal, again.different[:1]


def test_replay_notices_a_policy_that_decides_otherwise() -> None:
    world = play([Ask(length=9), Ask(length=9)], config())
    changed = replay(world.log, Scheduler(config(slots=1)))
    assert not changed.equal


def bad_day(seed: int) -> tuple[list[Ask], World]:
    draws = integers(seed, 9, range(200), 1000)
    asks = [
        Ask(
            at=float(draws[i]) / 3,
            prompt=1 + int(draws[20 + i]) % 50,
            length=35 + int(draws[40 + i]) % 40,
            cancel_at=250.0 if draws[60 + i] % 10 == 0 else None,
            family=1 + int(draws[80 + i]) % 3,
        )
        for i in range(20)
    ]
    slots = 1 + seed % 4
    settings_ = config(slots=slots, pages=40, page_tokens=(1, 8, 16)[seed % 3] * 8, prefill_tokens=24)
    if seed % 3 == 1:
        settings_ = replace(settings_, prefix_cache=True)
    elif seed % 2:
        reorder = ("eager", "threshold", "never")[seed % 3]
        settings_ = replace(settings_, layout="slots", reorder=reorder, pages=slots, page_tokens=256)
    faults = draw_faults(seed, count=3, calls=30, seconds=2.0)
    return asks, play(asks, settings_, faults=faults, step_timeout_s=60.0)


def tight_day(seed: int) -> tuple[list[Ask], World]:
    """Few pages, so that requests are put back; some urgent, some with deadlines; crashes while pages are away."""
    draws = integers(seed, 10, range(200), 1000)
    asks = [
        Ask(
            at=float(draws[i]) / 10,
            prompt=1 + int(draws[20 + i]) % 50,
            length=35 + int(draws[40 + i]) % 40,
            limit=70,
            deadline=60.0 + float(draws[60 + i]) / 4 if draws[80 + i] % 5 == 0 else None,
            priority=int(draws[100 + i]) % 3 - 1,
            family=1 + int(draws[120 + i]) % 3,
        )
        for i in range(20)
    ]
    changes = {"preemption": "swap" if seed % 4 else "recompute", "spare_pages": 5 + seed % 30}
    settings_ = config(slots=5, pages=20, page_tokens=8, prefill_tokens=24, prefix_cache=seed % 2 == 0, **changes)
    faults = draw_faults(seed, count=3, calls=90, seconds=2.0)
    return asks, play(asks, settings_, faults=faults, step_timeout_s=60.0)


def assert_survived(asks: list[Ask], world: World) -> None:
    assert_lawful(world, asks)
    assert len(world.trace.spans) >= 200
    assert len({(f.kind, f.call) for f in world.injected}) == 3
    assert replay(world.log, Scheduler(world.scheduler.config)).equal


def test_a_backend_that_fails_whenever_it_should_decode_is_given_up() -> None:
    """Prompt passes that succeed in between are no progress."""
    faults = tuple(f for f in draw_faults(1, count=40, calls=40, seconds=1.0, kinds=("loss",)) if f.call % 2)
    world = play([Ask(prompt=10, length=30)], config(prefill_tokens=5), faults=faults, step_timeout_s=5.0)
    assert world.answers[0].reason == "failed"


@pytest.mark.parametrize("block", range(10))
def test_five_hundred_bad_days_lose_double_and_leak_nothing(block: int) -> None:
    for seed in range(50 * block, 50 * block + 50):
        assert_survived(*bad_day(seed))


@pytest.mark.parametrize("block", range(4))
def test_two_hundred_tight_days_lose_double_and_leak_nothing(block: int) -> None:
    away = 0
    for seed in range(50 * block, 50 * block + 50):
        asks, world = tight_day(seed)
        assert_survived(asks, world)
        assert world.scheduler.preemptions > 0
        away += sum(bool(work.swap_in) for work in world.passes)
    assert away > 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("block", range(20))
def test_ten_thousand_bad_days(block: int) -> None:
    for seed in range(500 + 400 * block, 500 + 400 * (block + 1)):
        assert_survived(*bad_day(seed))
    for seed in range(200 + 100 * block, 200 + 100 * (block + 1)):
        assert_survived(*tight_day(seed))
