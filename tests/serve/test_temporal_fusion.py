"""Temporal fusion (Flover): what must hold of joins, slots, moves, draws and refusals, on virtual and on real time."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stretto.core.clock import RealClock
from stretto.core.record import Recorder
from stretto.models.load import Model
from stretto.models.thread import compute
from stretto.serve.backend import Pass
from stretto.serve.engine import Engine, Handle
from stretto.serve.local import LocalBackend
from stretto.serve.request import Answer, Request
from stretto.serve.sampling import Sampling
from stretto.serve.scheduler import Scheduler
from stretto.serve.scheduler_config import SchedulerConfig

from .worlds import Ask, World, config, play

GREEDY = Sampling()
REORDERS = ["eager", "threshold", "never"]


class SteadyCost:
    """Each step takes exactly a second, whoever is in it."""

    def prefill_s(self, chunks: Sequence[tuple[int, int]], decode_contexts: Sequence[int]) -> float:
        return 1.0

    def decode_s(self, contexts: Sequence[int], steps: int) -> list[float]:
        return [1.0] * steps

    def move_s(self, positions: int) -> float:
        return 0.0


def fused(reorder: str = "eager", **changes: object) -> SchedulerConfig:
    slots = changes.setdefault("slots", 4)
    return config(layout="slots", reorder=reorder, pages=slots, **changes)


def steps_of(world: World) -> int:
    return len(world.trace.spans)


# Joins and steps, on virtual time.


@pytest.mark.parametrize("reorder", REORDERS)
def test_all_at_once_of_equal_length_take_that_many_steps(reorder: str) -> None:
    world = play([Ask(length=9)] * 4, fused(reorder), cost=SteadyCost())
    assert steps_of(world) == 9


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("gap", [1, 3, 9, 10, 14])
def test_steps_are_the_union_of_the_active_intervals_and_never_the_sum(gap: int, count: int) -> None:
    length = 10
    asks = [Ask(at=max(0.0, gap * i - 0.5), length=length, prompt=1) for i in range(count)]
    world = play(asks, fused(), cost=SteadyCost())
    assert steps_of(world) == (length + (count - 1) * gap if gap < length else count * length)


@settings(max_examples=100, deadline=None)
@given(
    arrivals=st.lists(st.integers(0, 30), min_size=1, max_size=4),
    lengths=st.lists(st.integers(1, 20), min_size=4, max_size=4),
    reorder=st.sampled_from(REORDERS),
)
def test_a_request_joins_at_the_boundary_after_it_came_and_nobody_waits_for_anothers_end(
    arrivals: list[int], lengths: list[int], reorder: str
) -> None:
    asks = [Ask(at=at + 0.25, length=n, prompt=1) for at, n in zip(arrivals, lengths, strict=False)]
    world = play(asks, fused(reorder), cost=SteadyCost())
    boundaries = sorted({0.0, *(start for start in world.trace.spans.start), *(f for f in world.trace.spans.finish)})
    for i, ask in enumerate(asks):
        first = world.answers[i].token_times_s[0] - 1.0
        later = [at for at in boundaries if at >= ask.at - 1e-9]
        assert first <= min([*later, first]) + 1e-9
        assert world.answers[i].finished_s == pytest.approx(first + ask.length)
    active = sorted(
        (world.answers[i].finished_s - ask.length, world.answers[i].finished_s) for i, ask in enumerate(asks)
    )
    assert steps_of(world) == pytest.approx(union(active))


def union(intervals: list[tuple[float, float]]) -> float:
    """The length of the union of sorted intervals."""
    total, end = 0.0, 0.0
    for start, finish in intervals:
        total += max(0.0, finish - max(start, end))
        end = max(end, finish)
    return total


def test_several_requests_join_in_one_step() -> None:
    world = play([Ask(length=20), *[Ask(at=4.5, length=5)] * 3], fused(), cost=SteadyCost())
    joined = [len(p.prefill) for p in world.passes if p.prefill]
    assert joined == [1, 3]


def test_more_than_the_slots_wait_in_order_of_arrival() -> None:
    asks = [Ask(at=0.1 * i, length=5 + i, prompt=1) for i in range(9)]
    world = play(asks, fused(slots=2), cost=SteadyCost())
    firsts = [world.answers[i].token_times_s[0] for i in range(9)]
    assert firsts == sorted(firsts)
    assert max(len(p.decode) + len(p.prefill) for p in world.passes) == 2


# Slots, ranges, holes.


def test_the_step_works_on_the_range_and_counts_its_holes() -> None:
    asks = [Ask(length=n, prompt=1) for n in (9, 3, 9, 5)]
    never = play(asks, fused("never"), cost=SteadyCost())
    eager = play(asks, fused("eager"), cost=SteadyCost())
    seen = {(p.slots, p.holes) for p in never.passes}
    assert seen == {((0, 4), 0), ((0, 4), 1), ((0, 3), 1)}  # request 1 left in the middle, then request 3 at the end
    assert all(p.holes == 0 for p in eager.passes)
    assert [move for p in eager.passes for move in p.moves] == [(3, 1, 3), (2, 1, 5)]


def test_a_cancelled_request_leaves_a_hole_that_is_reclaimed() -> None:
    asks = [Ask(length=30), Ask(length=30, cancel_at=5.2), Ask(length=30), Ask(at=9.0, length=5)]
    world = play(asks, fused("never", slots=4), cost=SteadyCost())
    holes = [p.holes for p in world.passes]
    assert 1 in holes
    joined = next(p for p in world.passes for row in p.prefill if row.id == 3)
    assert joined.prefill[0].table == (1,)
    assert world.scheduler.pool.held == 0


def test_a_prompt_pass_stalls_others_by_a_chunk_and_no_more() -> None:
    asks = [Ask(prompt=5, length=60), Ask(at=3.0, prompt=180, length=2, limit=10)]
    whole = play(asks, fused(prefill_tokens=1000))
    chunked = play(asks, fused(prefill_tokens=16))
    assert worst_gap(whole.answers[0]) == pytest.approx(1.0 + 0.180, abs=1e-6)
    assert worst_gap(chunked.answers[0]) <= 1.0 + 0.016 + 1e-6


def worst_gap(answer: Answer) -> float:
    times = answer.token_times_s
    return max(b - a for a, b in pairwise(times))


def test_what_is_longer_than_a_slot_is_refused() -> None:
    def too_long(engine: Engine) -> None:
        with pytest.raises(ValueError, match="do not fit into a slot of 200 tokens"):
            engine.submit(Request(id=9, prompt=(1,) * 190, limit=20))

    play([Ask()], fused(), watch=too_long)


# The model itself, on real time.


@dataclass(frozen=True)
class Asked:
    """A request of a real run, and how many passes have begun when it comes."""

    prompt: tuple[int, ...]
    limit: int
    after: int = 0
    sampling: Sampling = GREEDY
    cancel_after: int | None = None


class Paced(LocalBackend):
    """The real backend; submits and cancels as passes go by, so that a run is the same every time."""

    def __init__(self, model: Model, settings: SchedulerConfig, clock: RealClock) -> None:
        super().__init__(model, pages=settings.pages, page_tokens=settings.page_tokens, clock=clock)
        self.passes: list[Pass] = []
        self.after_pass = lambda number: None

    async def run(self, work, steps, news):  # type: ignore[no-untyped-def]
        self.passes.append(work)
        result = await super().run(work, steps, news)
        self.after_pass(len(self.passes))
        return result


def serve(model: Model, asked: Sequence[Asked], settings: SchedulerConfig) -> tuple[list[Answer], list[Pass]]:
    async def main() -> tuple[list[Answer], list[Pass]]:
        clock = RealClock()
        backend = Paced(model, settings, clock)
        engine = Engine(Scheduler(settings), backend, clock, Recorder("measured"))
        handles: dict[int, Handle] = {}

        def come(number: int) -> None:
            for i, each in enumerate(asked):
                if i not in handles and (each.after <= number or engine.live == 0):
                    handles[i] = engine.submit(
                        Request(id=i, prompt=each.prompt, limit=each.limit, sampling=each.sampling)
                    )
                if each.cancel_after is not None and number >= each.cancel_after:
                    engine.cancel(i)
            if len(handles) == len(asked):
                engine.close()

        async def come_when_idle() -> None:
            while len(handles) < len(asked):
                if engine.live == 0:
                    come(len(backend.passes))
                await asyncio.sleep(0.001)

        backend.after_pass = come
        await asyncio.wait_for(asyncio.gather(engine.run(), come_when_idle()), 20)
        return [handles[i].result() for i in range(len(asked))], backend.passes

    return asyncio.run(main())


def alone(model: Model, each: Asked) -> tuple[int, ...]:
    answers, _ = serve(model, [replace(each, after=0)], fused(slots=1, page_tokens=64))
    return answers[0].tokens


REQUESTS = st.lists(
    st.builds(
        Asked,
        prompt=st.lists(st.integers(1, 90), min_size=1, max_size=20).map(tuple),
        limit=st.integers(1, 25),
        after=st.integers(0, 30),
        sampling=st.sampled_from(
            [Sampling(), Sampling(temperature=0.8, top_k=20, seed=5), Sampling(temperature=1.2, seed=9)]
        ),
    ),
    min_size=2,
    max_size=6,
)


@settings(max_examples=25, deadline=None)
@given(asked=REQUESTS, reorder=st.sampled_from(REORDERS), slots=st.integers(1, 5), chunk=st.sampled_from([4, 512]))
def test_each_answer_is_as_if_alone_for_every_order_mix_and_reordering(
    tiny: Model, asked: list[Asked], reorder: str, slots: int, chunk: int
) -> None:
    """Greedy and drawn answers alike: a draw depends on the request's seed and position, not on who is alive."""
    answers, _ = serve(tiny, asked, fused(reorder, slots=slots, page_tokens=64, prefill_tokens=chunk))
    for each, answer in zip(asked, answers, strict=True):
        assert answer.tokens == alone(tiny, each)


def test_rows_that_moved_go_on_as_if_they_had_not(tiny: Model) -> None:
    asked = [Asked((5 + i, 9, 13), limit) for i, limit in enumerate((30, 4, 8, 30, 30))]
    answers, passes = serve(tiny, asked, fused(slots=5, page_tokens=64))
    assert sum(len(p.moves) for p in passes) >= 2
    for each, answer in zip(asked, answers, strict=True):
        assert answer.tokens == alone(tiny, each)


def test_rows_of_holes_touch_nobody(tiny: Model) -> None:
    asked = [Asked((5 + i, 9, 13), limit) for i, limit in enumerate((30, 4, 30, 6, 30))]
    answers, passes = serve(tiny, asked, fused("never", slots=5, page_tokens=64))
    assert max(p.holes for p in passes) == 2
    for each, answer in zip(asked, answers, strict=True):
        assert answer.tokens == alone(tiny, each)


def test_a_moved_row_equals_its_source_to_the_last_bit(tiny: Model) -> None:
    import torch

    backend = LocalBackend(tiny, pages=4, page_tokens=32, clock=RealClock())
    for layer in backend._cache.layers:
        layer.copy_(torch.randn(layer.shape))
    before = [layer.clone() for layer in backend._cache.layers]
    compute(backend.move, ((3, 1, 32),))
    for old, new in zip(before, backend._cache.layers, strict=True):
        assert torch.equal(new[1], old[3])
        assert torch.equal(new[0], old[0])
        assert torch.equal(new[2], old[2])


def test_weights_are_read_once_a_step_whoever_is_alive(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrix products: four a layer (queries, keys and values are one; so are gate and up) and the head's."""
    calls = []
    transformer = tiny.transformer

    def counted(product):  # type: ignore[no-untyped-def]
        def call(x):  # type: ignore[no-untyped-def]
            calls.append(len(x))
            return product(x)

        return call

    layers = [
        replace(layer, **{n: counted(getattr(layer, n)) for n in ("qkv", "out", "gate_up", "down")})
        for layer in transformer._layers
    ]
    monkeypatch.setattr(transformer, "_layers", layers)
    monkeypatch.setattr(transformer, "_head", counted(transformer._head))
    for count in (1, 5):
        calls.clear()
        _, passes = serve(tiny, [Asked((3, 4), 12)] * count, fused(slots=5, page_tokens=64))
        assert len(passes) == 12
        assert len(calls) == len(passes) * (4 * tiny.spec.layers + 1)


def test_kv_memory_is_constant_and_slots_are_used_again(tiny: Model) -> None:
    settings_ = fused(slots=2, page_tokens=64)
    _, passes = serve(tiny, [Asked((7,), 10)] * 6, settings_)
    assert {row.table[0] for p in passes for row in (*p.prefill, *p.decode)} == {0, 1}
    backend = LocalBackend(tiny, pages=2, page_tokens=64, clock=RealClock())
    held = sum(layer.numel() * layer.element_size() for layer in backend._cache.layers)
    spec = tiny.spec
    spare = 1  # the page that rows of holes write to
    assert held == (2 + spare) * 64 * 2 * spec.layers * spec.kv_heads * spec.head_dim * 4


def test_cancel_in_mid_run_leaves_the_others_as_they_would_be(tiny: Model) -> None:
    asked = [Asked((5 + i, 9), 25, cancel_after=6 if i == 1 else None) for i in range(4)]
    answers, passes = serve(tiny, asked, fused(slots=4, page_tokens=64))
    assert answers[1].reason == "cancelled"
    assert 0 < len(answers[1].tokens) < 25
    assert any(p.moves for p in passes)
    for i in (0, 2, 3):
        assert answers[i].tokens == alone(tiny, asked[i])
