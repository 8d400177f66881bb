"""A load played by the engine's scheduler: what is conserved, what is exact, what grows with what."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stretto.core.clock import VirtualClock, simulate_async
from stretto.core.record import Recorder
from stretto.serve.deploy import simulate
from stretto.serve.deploy.costs import Lane, StepCosts
from stretto.serve.deploy.engines import engine
from stretto.serve.deploy.layout import Layout
from stretto.serve.deploy.load import Load
from stretto.serve.deploy.report import Latencies
from stretto.serve.deploy.simulate import Served, serve
from stretto.serve.engine import Engine
from stretto.serve.request import Request
from stretto.serve.scheduler import Scheduler
from stretto.serve.scheduler_config import SchedulerConfig
from stretto.serve.simulated import END, SimulatedBackend

from .worlds import MACHINE, config, costs, drawn, load, sharing

LAYOUTS = [
    Layout(),
    Layout(replicas=2, devices=2),
    Layout(stages=2),
    Layout(devices=4, attention_replicas=2),
    Layout(replicas=2, stages=2, devices=2, attention_replicas=2),
]


def test_a_lone_request_is_its_prompt_and_its_steps() -> None:
    of, prompt, output = costs(), 300, 50
    served = serve(load([1.5], [prompt], [output]), of, config())
    first = of.stage(
        [Lane(rows=prompt, tokens=1, sequences=1, prompt_s=of.prompt_attention_s(prompt, 0), eager=True)]
    ).total
    steps = [
        of.stage([Lane(rows=1, tokens=1, sequences=1, decoders=1, cached=prompt + k)]).total for k in range(1, output)
    ]
    assert served.started_s[0] == 1.5
    assert served.first_s[0] - 1.5 == pytest.approx(first, rel=1e-12)
    assert served.finished_s[0] - served.first_s[0] == pytest.approx(sum(steps), rel=1e-6)
    assert served.steps == output


@pytest.mark.parametrize("stages", [2, 4])
@pytest.mark.parametrize("attention", [1, 2])
def test_a_lone_request_passes_every_stage(stages: int, attention: int) -> None:
    """Lanes without a request neither vanish nor shift the others."""
    layout = Layout(stages=stages, devices=2, attention_replicas=attention)
    of, load_ = costs(layout), load([0.0], [300], [20])
    idle = [Lane()] * (attention - 1)
    first = Lane(rows=300, tokens=1, sequences=1, prompt_s=of.prompt_attention_s(300, 0), eager=True)
    steps = [Lane(rows=1, tokens=1, sequences=1, decoders=1, cached=300 + k) for k in range(1, 20)]
    served = serve(load_, of, config())
    assert served.first_s[0] == pytest.approx(stages * of.stage([first, *idle]).total)
    assert served.finished_s[0] - served.first_s[0] == pytest.approx(
        sum(stages * of.stage([lane, *idle]).total for lane in steps), rel=1e-6
    )


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("policy", ["whole", "mixed"])
def test_tokens_are_conserved_and_pages_come_back(layout: Layout, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Scheduler] = []
    given_out: list[int] = []

    class Watched(Scheduler):
        def __post_init__(self) -> None:
            super().__post_init__()
            made.append(self)

        def apply(self, event: dict[str, object]) -> None:
            if event["type"] == "ran":
                assert self.pool.held <= self.pool.pages
                rows = len(self._last.decode) * event["steps"]  # type: ignore[operator]
                given_out.append(rows + sum(chunk.last for chunk in self._last.prefill))
            super().apply(event)

    monkeypatch.setattr(simulate, "Scheduler", Watched)
    requests = drawn(1, 120)
    before = [column.copy() for column in (requests.arrival_s, requests.prompt, requests.output)]
    served = serve(requests, costs(layout), config(prefill=policy, prefill_tokens=512, pages=300, slots=8))
    assert sum(given_out) == requests.output.sum()
    assert len(made) == layout.replicas * layout.lanes
    for scheduler in made:
        scheduler.audit()
        assert scheduler.pool.held == 0
        assert not [*scheduler.running, *scheduler.waiting]
    for column, same in zip((requests.arrival_s, requests.prompt, requests.output), before, strict=True):
        assert np.array_equal(column, same)
    assert not np.isnan([served.started_s, served.first_s, served.finished_s]).any()
    assert (served.started_s >= requests.arrival_s).all()
    assert (served.first_s > served.started_s).all()
    assert (served.finished_s >= served.first_s).all()


def test_requests_start_in_order_of_arrival() -> None:
    served = serve(drawn(2, 200, gap_s=0.001), costs(), config(slots=4))
    assert (np.diff(served.started_s) >= 0).all()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_same_load_has_the_same_answer(layout: Layout) -> None:
    requests, of = drawn(3, 150, gap_s=0.001), costs(layout)
    one, two = (serve(requests, of, config(pages=300, slots=16)) for _ in range(2))
    assert np.array_equal(one.finished_s, two.finished_s)
    assert (one.preempted, one.steps, one.parts) == (two.preempted, two.steps, two.parts)


def test_every_request_keeps_its_own_figures() -> None:
    """Trap: numbers of replicas, stages and cells that are multiplied, so that requests overwrite each other."""
    requests = drawn(4, 97)
    for layout in LAYOUTS:
        seconds = Latencies.of(requests, serve(requests, costs(layout), config()))
        assert len(seconds.first) == 97
        assert len(np.unique(seconds.whole)) > 90


def engine_on_virtual_time(requests: Load, of: StepCosts, settings_: SchedulerConfig) -> Served:
    """The product's engine in front of a backend of these seconds: one step at a time where something may come."""

    class Cost:
        def prefill_s(self, chunks: Sequence[tuple[int, int]], contexts: Sequence[int]) -> float:
            positions = [context + 1 for context in contexts]
            lane = Lane(
                rows=len(positions) + sum(new for new, _ in chunks),
                tokens=len(positions) + len(chunks),
                sequences=len(positions) + len(chunks),
                decoders=len(positions),
                cached=sum(positions),
                prompt_s=sum(of.prompt_attention_s(new, cached) for new, cached in chunks),
                eager=True,
            )
            return of.stage([lane]).total

        def decode_s(self, contexts: Sequence[int], steps: int) -> list[float]:
            count, cached = len(contexts), sum(contexts) + len(contexts)
            lanes = [
                Lane(rows=count, tokens=count, sequences=count, decoders=count, cached=cached + k * count)
                for k in range(steps)
            ]
            return [of.stage([lane]).total for lane in lanes]

        def move_s(self, positions: int) -> float:
            return 0.0

    async def main(clock: VirtualClock) -> Served:
        count = range(len(requests))
        lengths, prompts = requests.output.tolist(), requests.prompt.tolist()
        backend = SimulatedBackend(Cost(), clock, dict(enumerate(lengths)), dict(enumerate(prompts)))
        scheduler = Scheduler(settings_)
        running = Engine(scheduler, backend, clock, Recorder("simulated"))
        task = asyncio.ensure_future(running.run())
        handles = []
        for i in count:
            if requests.arrival_s[i] > clock.now:
                await clock.sleep(float(requests.arrival_s[i]) - clock.now)
            handles.append(
                running.submit(
                    Request(
                        id=i,
                        prompt=requests.tokens(i, range(100, 1100)),
                        limit=lengths[i],
                        stop_tokens=frozenset({END}),
                    )
                )
            )
        running.close()
        await clock.wait(task, "the engine")
        answers = [await handle.answer() for handle in handles]
        return Served(
            started_s=np.array([handle.started_s for handle in handles]),
            first_s=np.array([answer.first_token_s for answer in answers]),
            finished_s=np.array([answer.finished_s for answer in answers]),
            cached=np.array([answer.cached_tokens for answer in answers]),
            parts=of.stage([Lane()]),
            makespan_s=clock.now,
            steps=running.steps,
            preempted=scheduler.preemptions,
            most_pages=0.0,
        )

    return simulate_async(main)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    gap=st.sampled_from([0.0, 0.0005, 0.01, 0.1]),
    pages=st.sampled_from([30, 120, 2000]),
    prefill=st.sampled_from(["whole", "mixed"]),
    slots=st.integers(1, 12),
    joining=st.sampled_from(["continuous", "static"]),
)
def test_it_is_the_engine_on_virtual_time(
    seed: int, gap: float, pages: int, prefill: str, slots: int, joining: str
) -> None:
    """Same instants, evictions and steps, within what chunks without a token cost; the engine knows no leaps."""
    requests, of = drawn(seed, 30, gap_s=gap, prompt=120, output=40), costs()
    chosen = config(pages=pages, prefill=prefill, slots=slots, joining=joining, prefill_tokens=4096)
    mine, engines = serve(requests, of, chosen), engine_on_virtual_time(requests, of, chosen)
    assert (mine.preempted, mine.steps) == (engines.preempted, engines.steps)
    for name in ("started_s", "first_s", "finished_s"):
        np.testing.assert_allclose(getattr(mine, name), getattr(engines, name), rtol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    gap=st.sampled_from([0.0, 0.0005, 0.01, 0.1]),
    pages=st.sampled_from([30, 120, 2000]),
    prefill=st.sampled_from(["whole", "mixed"]),
    slots=st.integers(1, 12),
    block=st.sampled_from([16, 40, 64]),
)
def test_with_a_prefix_cache_it_is_the_engine_too(
    seed: int, gap: float, pages: int, prefill: str, slots: int, block: int
) -> None:
    """The engine hashes the made-up tokens themselves; the simulation knows their blocks alone."""
    requests, of = sharing(seed, 30, gap_s=gap, block=block), costs()
    chosen = config(pages=pages, prefill=prefill, slots=slots, prefill_tokens=4096, prefix_cache=True)
    mine, engines = serve(requests, of, chosen), engine_on_virtual_time(requests, of, chosen)
    assert mine.cached.tolist() == engines.cached.tolist()
    assert (mine.preempted, mine.steps) == (engines.preempted, engines.steps)
    for name in ("started_s", "first_s", "finished_s"):
        np.testing.assert_allclose(getattr(mine, name), getattr(engines, name), rtol=1e-6)


def test_what_is_cached_is_neither_computed_nor_held_twice() -> None:
    of, same = costs(), replace(load([0.0, 1.0], [1600, 1600], [5, 400]), prefixes=((1,), (1,)))
    cold, warm = (serve(same, of, config(prefix_cache=cache)) for cache in (False, True))
    assert cold.cached.tolist() == [0, 0]
    assert warm.cached.tolist() == [0, 1584]  # the last token is always computed, and its page with it
    rest = Lane(rows=16, tokens=1, sequences=1, prompt_s=of.prompt_attention_s(16, 1584), eager=True)
    assert warm.first_s[1] - 1.0 == pytest.approx(of.stage([rest]).total)
    assert warm.first_s[1] < cold.first_s[1]
    together = replace(same, arrival_s=np.array([0.0, 0.001]), output=np.array([400, 400]))
    apart, shared = (serve(together, of, config(prefix_cache=cache)).most_pages for cache in (False, True))
    assert shared < 0.7 * apart


def test_replicas_know_nothing_of_each_others_prefixes() -> None:
    requests = replace(load([0.0, 1.0, 2.0], [800] * 3, [5] * 3), prefixes=((1,),) * 3)
    served = serve(requests, costs(Layout(replicas=2)), config(prefix_cache=True))
    assert served.cached.tolist() == [0, 0, 784]


def test_the_queue_is_in_the_time_to_first_token() -> None:
    """Trap: only the first iteration's seconds."""
    requests = load([0.0] * 40, [2000] * 40, [100] * 40)
    served = serve(requests, costs(), config(slots=4))
    seconds = Latencies.of(requests, served)
    assert seconds.first.max() > 5 * seconds.first.min()
    assert np.allclose(seconds.first - seconds.queue, served.first_s - served.started_s)


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_an_eviction_costs_what_is_computed_again_or_copied(preemption: str) -> None:
    """Trap: an evicted request that comes back for nothing."""
    requests, of = load([0.0] * 6, [500] * 6, [400] * 6), costs(constants=SLOW_PROMPTS)
    tight = config(pages=240, preemption=preemption, spare_pages=1000)
    served = serve(requests, of, tight)
    assert served.preempted > 0
    free = serve(requests, _free_copies(of) if preemption == "swap" else _free_prompts(of, beyond=500), tight)
    assert served.makespan_s > free.makespan_s * 1.0005


SLOW_PROMPTS = replace(engine("vllm-0.6"), eager_layer_s=5e-3, host_sequence_s=0.0)


def _free_copies(of: StepCosts) -> StepCosts:
    free = costs(machine=replace(MACHINE, host=replace(MACHINE.host, bandwidth=1e18)), constants=SLOW_PROMPTS)
    assert free.copy_s(10_000) < of.copy_s(10_000)
    return free


def _free_prompts(of: StepCosts, *, beyond: int) -> StepCosts:
    """Costs in which prompts longer than any that was asked for, so those computed again, take no time."""
    free = costs(constants=SLOW_PROMPTS)
    plain = free.stage
    free.stage = lambda lanes: plain(  # type: ignore[method-assign]
        [
            lane._replace(rows=1, eager=False) if lane.eager and lane.rows > beyond * lane.sequences else lane
            for lane in lanes
        ]
    )
    return free


def test_evictions_change_which_plan_is_best() -> None:
    """A closed form ranks by the seconds of a step: it cannot see that a batch does not fit."""
    requests = load([0.0] * 40, [400] * 40, [600] * 40)
    of = costs(constants=replace(SLOW_PROMPTS, eager_layer_s=4e-2))
    many, few = (serve(requests, of, config(slots=slots, pages=500)) for slots in (32, 6))
    assert many.preempted > 0 == few.preempted
    assert many.makespan_s > few.makespan_s
    many, few = (serve(requests, of, config(slots=slots)) for slots in (32, 6))
    assert many.makespan_s < few.makespan_s


def test_throughput_is_monotone_in_the_link() -> None:
    requests = load([0.0] * 64, [256] * 64, [128] * 64)
    layout = Layout(devices=4)

    def makespan(bandwidth: float, latency: float) -> float:
        link = replace(MACHINE.near, bandwidth=bandwidth, latency_s=latency)  # type: ignore[type-var]
        return serve(requests, costs(layout, machine=replace(MACHINE, near=link)), config()).makespan_s

    by_bandwidth = [makespan(b, 1e-6) for b in (1e10, 1e11, 1e12)]
    by_latency = [makespan(4e11, s) for s in (1e-6, 1e-5, 1e-4)]
    assert by_bandwidth == sorted(by_bandwidth, reverse=True)
    assert by_latency == sorted(by_latency)


def test_more_pages_never_lower_the_mean_batch() -> None:
    requests = load([0.0] * 60, [300] * 60, [200] * 60)
    batches = [60 * 200 / serve(requests, costs(), config(pages=p, slots=64)).steps for p in (100, 200, 400, 800, 1600)]
    assert batches == sorted(batches)


def test_devices_that_are_faster_win_for_every_plan() -> None:
    requests = drawn(5, 60)
    faster = replace(MACHINE, device=replace(MACHINE.device, bandwidth=2 * MACHINE.device.bandwidth))
    for layout in LAYOUTS:
        slow = serve(requests, costs(layout), config())
        fast = serve(requests, costs(layout, machine=faster), config())
        assert fast.finished_s.sum() <= slow.finished_s.sum()


def test_twice_the_layers_cost_no_more_search() -> None:
    """Layers that are alike are costed once: as many steps are simulated, at as many decisions."""
    requests = load([0.0] * 30, [300] * 30, [200] * 30)
    shallow = costs(constants=replace(engine("vllm-0.6"), host_step_s=0.0, host_sequence_s=0.0))
    deep = costs(spec=replace(shallow.spec, layers=16), constants=shallow.engine)
    one, two = (serve(requests, of, config()) for of in (shallow, deep))
    assert one.steps == two.steps
    assert 1.7 < two.makespan_s / one.makespan_s < 2.0  # the head stays


def test_a_request_that_never_fits_is_refused() -> None:
    with pytest.raises(ValueError, match="request 1: 900 positions do not fit into 50 pages of 16"):
        serve(load([0, 0], [10, 800], [10, 101]), costs(), config(pages=50))


def test_spans_do_not_overlap() -> None:
    recorder = Recorder("simulated")
    served = serve(drawn(6, 50), costs(Layout(replicas=2)), config(), recorder=recorder)
    trace = recorder.trace()
    assert trace.overlaps() == []
    assert trace.makespan == pytest.approx(served.makespan_s)
    assert set(trace.lanes) == {"replica 0", "replica 1"}
