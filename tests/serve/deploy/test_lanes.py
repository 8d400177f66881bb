"""Two lanes on the same devices: the law by which they share, and the play against the engine on virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stretto.core.clock import VirtualClock, simulate_async
from stretto.core.errors import UserError
from stretto.core.record import Recorder
from stretto.core.shared import SharedDevice
from stretto.models.spec import ModelSpec
from stretto.serve.backend import Pass, PassResult
from stretto.serve.deploy import domain
from stretto.serve.deploy.costs import Lane, StepCosts
from stretto.serve.deploy.emit import commands
from stretto.serve.deploy.engines import engine
from stretto.serve.deploy.job import DeploymentJob, LoadSpec
from stretto.serve.deploy.layout import Layout
from stretto.serve.deploy.load import Load
from stretto.serve.deploy.plan import DECODE_SHARES, DeploymentPlan, candidates, check
from stretto.serve.deploy.report import Latencies
from stretto.serve.deploy.sharing import SharedCosts, Work, part, shared_resources
from stretto.serve.deploy.simulate import Served
from stretto.serve.deploy.two_lanes import TwoLanes, play
from stretto.serve.lane_engine import engine_of
from stretto.serve.lanes import LaneScheduler
from stretto.serve.request import Request
from stretto.serve.scheduler_config import SchedulerConfig
from stretto.serve.simulated import END, TOKEN

from .test_plan import cluster
from .worlds import MACHINE, SMALL, TYPES, config, drawn, load, sharing

KERNELS_ALONE = replace(engine("vllm-0.6"), host_step_s=0.0, host_sequence_s=0.0, eager_layer_s=0.0)
QWEN_3B = ModelSpec(
    family="qwen2",
    layers=36,
    hidden=2048,
    heads=16,
    kv_heads=2,
    head_dim=128,
    ffn=11008,
    vocab=151936,
    max_positions=32768,
    tied_embeddings=True,
)
L20 = replace(
    MACHINE.device,
    name="L20",
    memory_bytes=48e9,
    bandwidth=864e9,
    peak_flops={"bf16": 119e12, "fp16": 119e12, "fp32": 59.8e12},
    units=92,
)
PROMPTS = Work(chunks=((2048, 0),), tokens=1)
ROWS = Work(decoders=32, cached=32 * 2000)


def shared(decode_share: float = 0.5, **changes: object) -> SharedCosts:
    of = {"spec": SMALL, "layout": Layout(), "machine": MACHINE, "types": TYPES, "engine": engine("vllm-0.6")}
    return SharedCosts(decode_share=decode_share, most_rows=8192, **{**of, **changes})  # type: ignore[arg-type]


def lanes(**changes: object) -> SchedulerConfig:
    return config(**{"prefill": "lanes", **changes})


# The law.


@pytest.mark.parametrize("spec", [SMALL, QWEN_3B], ids=["small", "qwen"])
def test_a_lane_is_never_slower_with_more_of_the_devices(spec: ModelSpec) -> None:
    by_share = [shared(share, spec=spec) for share in (0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9)]
    decoding = [costs.demand(ROWS).seconds for costs in by_share]
    prompts = [costs.demand(PROMPTS).seconds for costs in by_share]
    assert decoding == sorted(decoding, reverse=True)
    assert prompts == sorted(prompts)


def test_shares_gain_what_was_measured_on_an_l20() -> None:
    """Nexus: prompts gain over 25 % from 30 to 40 % of the device and about 10 % from 70 to 80 %; decoding rows far
    less beyond a half.
    """
    machine = replace(MACHINE, device=L20)

    def gain(work: Work, low: float, high: float) -> float:
        few, many = (
            shared(1 - share if work.chunks else share, machine=machine, spec=QWEN_3B, engine=KERNELS_ALONE)
            for share in (low, high)
        )
        return few.demand(work).seconds / many.demand(work).seconds

    assert 1.25 < gain(PROMPTS, 0.3, 0.4) < 4 / 3
    assert 1.08 < gain(PROMPTS, 0.7, 0.8) < 8 / 7
    assert gain(ROWS, 0.3, 0.4) < 1.25
    assert gain(ROWS, 0.7, 0.8) < 1.04


def test_the_whole_of_a_device_as_a_share_is_the_device() -> None:
    whole, of = part(MACHINE.device, 1.0), shared()
    plain = StepCosts(
        spec=SMALL,
        layout=Layout(),
        machine=replace(MACHINE, device=whole),
        types=TYPES,
        engine=engine("vllm-0.6"),
        most_rows=8192,
    )
    for lane in (Lane(rows=32, tokens=32, sequences=32, decoders=32, cached=9000), Lane(rows=500, eager=True)):
        assert plain.stage([lane]) == of.stage([lane])


def test_memory_is_all_that_a_large_batch_of_decoding_rows_waits_for() -> None:
    rows, prompts = (shared(0.9, spec=QWEN_3B, engine=KERNELS_ALONE).demand(work) for work in (ROWS, PROMPTS))
    assert rows.memory_s / rows.seconds > 0.65
    assert prompts.memory_s / prompts.seconds < 0.2


def together(of: SharedCosts, works: Sequence[Work]) -> list[float]:
    """When each of some passes that begin at once ends."""

    async def main(clock: VirtualClock) -> list[float]:
        device = SharedDevice(clock, shared_resources())

        async def one(work: Work) -> float:
            demand = of.demand(work)
            await device.execute(1.0, demand.use, 1 / demand.seconds)
            return clock.now

        return list(await asyncio.gather(*(one(work) for work in works)))

    return simulate_async(main)


def test_neighbours_slow_each_other_by_what_both_want_and_not_at_all_by_the_rest() -> None:
    of = shared(0.5, spec=QWEN_3B, engine=KERNELS_ALONE)
    short = Work(chunks=((64, 0),), tokens=1)  # which reads the weights for few rows
    pair = [of.demand(work) for work in (ROWS, short)]
    wanted = sum(demand.memory_s / demand.seconds for demand in pair)
    assert wanted > 1.2
    assert min(together(of, [ROWS, short])) == pytest.approx(min(demand.seconds for demand in pair) * wanted)
    assert together(of, [ROWS]) == pytest.approx([of.demand(ROWS).seconds])
    assert sum(of.demand(work).memory_s / of.demand(work).seconds for work in (ROWS, PROMPTS)) < 1
    assert together(of, [ROWS, PROMPTS]) == pytest.approx([of.demand(work).seconds for work in (ROWS, PROMPTS)])


def test_a_longer_context_beside_them_slows_decoding_rows() -> None:
    """Nexus: up to 36 % when the prompt that is computed beside them grows from 2,000 to 10,000 tokens of context."""
    of = shared(0.5, spec=QWEN_3B, machine=replace(MACHINE, device=L20), engine=KERNELS_ALONE)
    alone = of.demand(ROWS).seconds
    short, long = (together(of, [ROWS, Work(chunks=((2048, c),), tokens=1)])[0] / alone for c in (0, 10_000))
    assert 1.0 <= short <= long < 1.4


# The play.


class SharedBackend:
    """A backend whose passes share the devices of `costs`, and whose answers have the load's lengths."""

    steps_at_once = 1

    def __init__(self, costs: SharedCosts, requests: Load, clock: VirtualClock) -> None:
        self._costs, self._clock = costs, clock
        self._device = SharedDevice(clock, shared_resources())
        self._ends: list[int] = (requests.prompt + requests.output).tolist()

    async def run(self, work: Pass, steps: int, news: asyncio.Event) -> PassResult:
        start = self._clock.now
        demand = self._costs.demand(
            Work(
                chunks=tuple((len(row.tokens), row.start) for row in work.prefill),
                tokens=sum(row.sampling is not None for row in work.prefill),
                decoders=len(work.decode),
                cached=sum(row.start + 1 for row in work.decode),
            )
        )
        await self._device.execute(1.0, demand.use, 1.0 / demand.seconds)
        yields = [row for row in (*work.prefill, *work.decode) if row.sampling is not None]
        tokens = {row.id: (END if row.position + 1 == self._ends[row.id] else TOKEN,) for row in yields}
        return PassResult(tokens=tokens, spans_s=((start, self._clock.now),))

    def wipe(self) -> None:
        """Nothing is held."""

    def forget(self, ids: Iterable[int]) -> None:
        """Likewise."""


def engine_on_virtual_time(requests: Load, of: SharedCosts, settings_: SchedulerConfig) -> Served:
    """The product's engine, which knows no leaps, in front of a backend whose passes share the devices."""

    async def main(clock: VirtualClock) -> Served:
        running = engine_of(settings_, SharedBackend(of, requests, clock), clock, Recorder("simulated"))
        task = asyncio.ensure_future(running.run())
        handles = []
        for i in range(len(requests)):
            if requests.arrival_s[i] > clock.now:
                await clock.sleep(float(requests.arrival_s[i]) - clock.now)
            prompt, limit = requests.tokens(i, range(100, 1100)), int(requests.output[i])
            handles.append(running.submit(Request(id=i, prompt=prompt, limit=limit, stop_tokens=frozenset({END}))))
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
            preempted=running.scheduler.preemptions,
            most_pages=0.0,
        )

    return simulate_async(main)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    gap=st.sampled_from([0.0, 0.0005, 0.01, 0.1]),
    pages=st.sampled_from([30, 120, 2000]),
    slots=st.integers(1, 12),
    joining=st.sampled_from(["continuous", "static", "dynamic", "shortest"]),
    prefill_tokens=st.sampled_from([50, 400, 4096]),
    decode_share=st.sampled_from([0.25, 0.5, 0.75]),
    block=st.sampled_from([None, 16, 40]),
)
def test_it_is_the_engine_on_virtual_time(
    seed: int, gap: float, decode_share: float, block: int | None, **changes: object
) -> None:
    """Same instants, evictions and steps, and with a prefix cache the same tokens in it."""
    plain = drawn(seed, 30, gap_s=gap, prompt=120, output=40)
    requests = plain if block is None else sharing(seed, 30, gap_s=gap, block=block)
    of, chosen = shared(decode_share), lanes(prefix_cache=block is not None, **changes)
    mine, engines = play(requests, of, chosen), engine_on_virtual_time(requests, of, chosen)
    assert mine.cached.tolist() == engines.cached.tolist()
    assert (mine.preempted, mine.steps) == (engines.preempted, engines.steps)
    for name in ("started_s", "first_s", "finished_s"):
        np.testing.assert_allclose(getattr(mine, name), getattr(engines, name), rtol=1e-6)
    assert mine.parts.total <= mine.makespan_s * (1 + 1e-9)


def test_tokens_are_conserved_and_pages_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[LaneScheduler] = []
    given_out: list[int] = []

    class Watched(LaneScheduler):
        def apply(self, event: dict[str, Any]) -> None:
            if event["type"] == "ran":
                decision = self._under_way[event["lane"]]
                rows = len(decision.decode) * event["steps"]
                given_out.append(rows + sum(chunk.last for chunk in decision.prefill))
            super().apply(event)
            self.audit()

    def watched(settings_: SchedulerConfig) -> LaneScheduler:
        made.append(Watched(settings_))
        return made[-1]

    monkeypatch.setattr(TwoLanes, "scheduler", staticmethod(watched))
    requests = drawn(1, 120)
    of = shared(layout=Layout(replicas=2, devices=2))
    served = play(requests, of, lanes(prefill_tokens=512, pages=300, slots=8))
    assert sum(given_out) == requests.output.sum()
    assert len(made) == 2
    for scheduler in made:
        assert scheduler.pool.held == 0
        assert not [*scheduler.running, *scheduler.waiting]
    assert not np.isnan([served.started_s, served.first_s, served.finished_s]).any()
    assert (served.started_s >= requests.arrival_s).all()
    assert (served.first_s > served.started_s).all()
    assert (served.finished_s >= served.first_s).all()


def test_a_lone_request_is_its_prompt_and_its_steps() -> None:
    of, prompt, output = shared(0.25), 300, 50
    served = play(load([1.5], [prompt], [output]), of, lanes())
    first = of.demand(Work(chunks=((prompt, 0),), tokens=1)).seconds
    steps = [of.demand(Work(decoders=1, cached=prompt + k)).seconds for k in range(1, output)]
    assert served.started_s[0] == 1.5
    assert served.first_s[0] - 1.5 == pytest.approx(first, rel=1e-12)
    assert served.finished_s[0] - served.first_s[0] == pytest.approx(sum(steps), rel=1e-6)
    assert served.steps == output
    assert served.parts.total == pytest.approx(served.makespan_s - 1.5)


def test_a_long_prompt_holds_nobody_up() -> None:
    """What lanes are for: the worst gap between tokens, which a whole prompt lengthens by all of its seconds."""
    requests = load([0.0, 0.0, 0.3], [200, 200, 16_000], [400, 400, 5])
    of = shared(0.5)
    worst = {}
    for prefill in ("whole", "lanes"):
        served = play(requests, of, config(prefill=prefill, prefill_tokens=32_000))
        worst[prefill] = Latencies.of(requests, served).token[0]
    assert worst["lanes"] < worst["whole"] < 2 * worst["lanes"]


def test_the_same_load_has_the_same_answer() -> None:
    requests, of = drawn(3, 150, gap_s=0.001), shared()
    one, two = (play(requests, of, lanes(pages=300, slots=16)) for _ in range(2))
    assert np.array_equal(one.finished_s, two.finished_s)
    assert (one.preempted, one.steps, one.parts) == (two.preempted, two.steps, two.parts)


def test_spans_of_a_lane_do_not_overlap_and_those_of_two_do() -> None:
    recorder = Recorder("simulated")
    served = play(drawn(6, 50), shared(layout=Layout(replicas=2)), lanes(), recorder=recorder)
    trace = recorder.trace()
    assert trace.overlaps() == []
    assert trace.makespan == pytest.approx(served.makespan_s)
    assert set(trace.lanes) == {f"replica {n}, {lane}" for n in (0, 1) for lane in ("prompts", "tokens")}


# The plan.

JOB = DeploymentJob(
    model="llama-3.1-8b",
    load=LoadSpec(requests=60, rate_per_s=20.0, prompt_tokens=2000, output_tokens=60, spread=0.5),
    policy="lanes",
)


def test_every_layout_is_weighed_with_every_share_and_pipelines_are_refused() -> None:
    plans = list(candidates(JOB, cluster()))
    assert {plan.decode_share for plan in plans} == set(DECODE_SHARES)
    assert (
        len(set(plans))
        == len(plans)
        == len(DECODE_SHARES) * len(list(candidates(replace(JOB, policy="whole"), cluster())))
    )
    refused = {plan: check(JOB, plan, cluster()) for plan in plans}
    assert {plan.stages for plan, why in refused.items() if why is None} == {1}
    assert {plan.layout.lanes for plan, why in refused.items() if why is None} == {1}
    assert "lanes" not in {plan.policy for plan in candidates(replace(JOB, policy="auto"), cluster())}


@pytest.mark.parametrize(
    ("job", "plan", "reason", "nearest"),
    [
        ({}, {"stages": 2}, "two lanes in a pipeline: 2 stages keep their batches in step", "stages: 1"),
        (
            {},
            {"devices": 2, "attention_replicas": 2},
            "two lanes in each of several replicas: 2 attention replicas keep in step",
            "attention_replicas: 1",
        ),
        ({"preemption": "swap"}, {}, "two lanes copy no pages to spare memory", "preemption: recompute"),
    ],
)
def test_what_lanes_cannot_do_is_refused(job: dict[str, Any], plan: dict[str, Any], reason: str, nearest: str) -> None:
    refusal = check(replace(JOB, **job), DeploymentPlan(policy="lanes", **plan), cluster())
    assert refusal is not None
    assert refusal.reason.startswith(reason)
    assert refusal.nearest == nearest


@pytest.mark.parametrize("name", ["vllm", "sglang", "llama.cpp"])
def test_no_engine_has_flags_for_lanes(name: str) -> None:
    with pytest.raises(UserError, match=f"emit: {name} cannot do two lanes on one device; policy: chunked"):
        commands(name, JOB, DeploymentPlan(policy="lanes"), cluster())


def test_a_share_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="decode_share"):
        DeploymentPlan(policy="lanes", decode_share=1.0)


def test_a_plan_of_lanes_is_simulated_and_marked_as_extrapolated() -> None:
    found = domain.simulate(JOB, DeploymentPlan(policy="lanes"), cluster())
    assert "two lanes" in found.assumed
    whole = domain.simulate(replace(JOB, policy="whole"), DeploymentPlan(policy="whole"), cluster())
    assert found.metrics["token_p99"].value.value < whole.metrics["token_p99"].value.value
    assert set(found.trace.lanes) == {"replica 0, prompts", "replica 0, tokens"}
