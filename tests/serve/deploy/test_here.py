"""Deployments on this machine: what is measured is what is played, a load is served as it was asked for, and a job is
planned, run and compared.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import stretto
from stretto.core.clock import RealClock
from stretto.core.errors import UserError
from stretto.core.eventlog import EventLog, replay
from stretto.core.plan import Context, Plan
from stretto.core.record import Recorder
from stretto.hardware import catalog
from stretto.hardware.cluster import Cluster, Devices, Node
from stretto.hardware.probe import machine_identity
from stretto.serve.backend import Pass, PassResult
from stretto.serve.deploy import domain
from stretto.serve.deploy.costs import Lane
from stretto.serve.deploy.drawn import load_of
from stretto.serve.deploy.here import Here, MeasuredCosts, Points, choices, started
from stretto.serve.deploy.here import prepare as preparing
from stretto.serve.deploy.here import run as running
from stretto.serve.deploy.here.measured import STEPS
from stretto.serve.deploy.job import DeploymentJob, LoadSpec
from stretto.serve.deploy.layout import Layout
from stretto.serve.deploy.plan import DeploymentPlan
from stretto.serve.deploy.simulate import serve
from stretto.serve.scheduler import Scheduler
from stretto.serve.scheduler_config import SchedulerConfig

from .worlds import config, drawn, load

ROOT = Path(__file__).parents[3]
MODEL = "smollm2-135m-instruct"
COSTS = MeasuredCosts(
    layout=Layout(),
    decode=((1, 0.010, 1e-6), (5, 0.014, 2e-6)),
    prompts=((10, 0.020, 0.030), (110, 0.120, 0.170)),
)
SETTINGS = config(pages=80, slots=12, prefill_tokens=512)
LOAD = LoadSpec(requests=12, rate_per_s=100.0, prompt_tokens=30, output_tokens=6, spread=0.3, seed=2)
JOB = DeploymentJob(model=MODEL, load=LOAD)


def this_machine(cores: int = 2) -> Cluster:
    """A cluster that is this machine, with so many cores."""
    device = replace(
        catalog.device("h100-sxm"), name="two cores", kind="cpu", units=cores, citations={"machine": machine_identity()}
    )
    return Cluster(name="here", nodes=(Node(name="node0", devices=(Devices(device=device),)),))


class Sleeping:
    """A backend that takes 2 ms a pass and a tenth of one for each row, so many times as long."""

    steps_at_once = 1
    pace = 1.0

    def __init__(self, clock: RealClock) -> None:
        self._clock = clock

    async def run(self, work: Pass, steps: int, news: asyncio.Event) -> PassResult:
        start = self._clock.now
        rows = len(work.decode) + sum(len(row.tokens) for row in work.prefill)
        await asyncio.sleep((0.002 + 1e-4 * rows) * self.pace)
        yields = [row for row in (*work.prefill, *work.decode) if row.sampling is not None]
        return PassResult(tokens={row.id: (7,) for row in yields}, spans_s=((start, self._clock.now),))

    def wipe(self) -> None:
        """Nothing is held."""

    def forget(self, ids: Iterable[int]) -> None:
        """Likewise."""


def sleepers(copies: int, settings: SchedulerConfig = SETTINGS) -> Here:
    clock = RealClock()
    return Here(Layout(replicas=copies), [Sleeping(clock) for _ in range(copies)], settings, clock)


@pytest.fixture
def without_workers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Layout]:
    """Backends that sleep in place of worker processes; returns the layouts that were started."""
    layouts: list[Layout] = []

    @asynccontextmanager
    async def instead(model: str, layout: Layout, settings: SchedulerConfig, **_: str) -> AsyncIterator[Here]:
        layouts.append(layout)
        here = sleepers(layout.replicas, settings)
        yield replace(here, layout=layout)

    monkeypatch.setattr(preparing, "started", instead)
    monkeypatch.setattr(running, "started", instead)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return layouts


# --- what is measured


def test_tables_are_read_between_their_points_and_beyond() -> None:
    def seconds(**fields: int | float | bool) -> float:
        return COSTS.stage([Lane(**fields)]).total  # type: ignore[arg-type]

    assert seconds(rows=3, decoders=3, cached=1000) == pytest.approx(0.012 + 1000 * 1.5e-6)
    assert seconds(rows=60, eager=True) == pytest.approx(0.070)
    assert seconds(rows=210, eager=True) == pytest.approx(0.220)
    assert seconds(rows=60, eager=True, pause_s=0.05) == pytest.approx((0.070 + 0.100) / 2)
    assert seconds(rows=60, eager=True, pause_s=3.0) == pytest.approx(0.100)
    assert seconds(rows=60, eager=True, prompt_s=0.5) == pytest.approx(0.570)
    assert seconds(rows=60, eager=True, decoders=5, cached=1000) == pytest.approx(0.065 + 0.014 - 0.009 + 1000 * 2e-6)
    assert seconds() == 0.0
    assert COSTS.prompt_attention_s(10, 100) == pytest.approx(1e-3)
    assert COSTS.copy_s(0) == 0.0


def test_costs_are_scaled_averaged_and_kept_in_tables() -> None:
    mean = COSTS.mean(COSTS.at_pace(3.0))
    assert [base for _, base, _ in mean.decode] == pytest.approx([0.020, 0.028])
    assert [each for *_, each in COSTS.mean(COSTS.at_pace(3.0), COSTS.at_pace(5.0)).decode] == pytest.approx(
        [3 * each for *_, each in COSTS.decode]
    )
    assert [seconds for _, *both in mean.prompts for seconds in both] == pytest.approx([0.040, 0.060, 0.240, 0.340])
    assert MeasuredCosts.from_tables(COSTS.to_tables("a"), "a", Layout()) == COSTS
    assert MeasuredCosts.from_tables(COSTS.to_tables("a"), "b", Layout()) is None


@pytest.mark.parametrize("slots", [1, 2, 8, 32])
@pytest.mark.parametrize("longest", [1, 20, 90, 500, 4000])
def test_points_fit_into_the_pages(slots: int, longest: int) -> None:
    settings = config(slots=slots, pages=slots * -(-max(64, longest) // 16), page_tokens=16, prefill_tokens=512)
    points = Points.of(settings, longest)
    scheduler = Scheduler(settings)
    for rows in points.rows:
        assert 1 <= rows <= slots
        pages = -(-(points.contexts[1] + STEPS - 1) // 16)
        assert rows * pages <= settings.pages
    assert points.contexts[0] < points.contexts[1]
    assert all(scheduler.can_ever_fit(tokens, 1) for tokens in points.prompts)
    assert list(points.rows) == sorted(set(points.rows))


def test_measured_costs_are_played_like_modelled_ones() -> None:
    requests = load([0.0], [60], [11])
    served = serve(requests, COSTS, SETTINGS)
    assert served.first_s[0] == pytest.approx(0.100)
    steps = sum(0.010 + (61 + k) * 1e-6 for k in range(10))
    assert served.finished_s[0] - served.first_s[0] == pytest.approx(steps)


def test_a_prompt_after_a_pause_takes_longer_than_one_in_a_row() -> None:
    requests = load([0.0, 0.01, 0.2, 10.0], [60, 60, 60, 60], [1, 1, 1, 1])
    served = serve(requests, COSTS, SETTINGS)
    assert served.first_s == pytest.approx([0.100, 0.170, 0.200 + 0.070 + 0.3 * 0.030, 10.100])


@pytest.mark.parametrize("copies", [1, 2])
def test_passes_are_timed_on_all_copies(copies: int) -> None:
    points = Points(rows=(1, 4, 12), contexts=(16, 40), prompts=(8, 64, 176))

    async def main() -> tuple[MeasuredCosts, float]:
        here = sleepers(copies)
        found = await here.measure(points, repeats=1)
        return found, await here.pace(found.at_pace(0.5), points.trial(copies))

    found, pace = asyncio.run(main())
    assert [rows for rows, _, _ in found.decode] == [1, 4, 12]
    assert all(seconds > 0.002 + 1e-4 * tokens for tokens, *both in found.prompts for seconds in both)
    assert all(base + each * rows * 16 > 0.002 for rows, base, each in found.decode)
    assert 0.1 <= found.spread < 1
    assert 1.3 < pace < 3.5


def test_texts_that_are_timed_share_nothing() -> None:
    starts: set[int] = set()

    class Watching(Sleeping):
        async def run(self, work: Pass, steps: int, news: asyncio.Event) -> PassResult:
            starts.update(row.start for row in work.prefill)
            return await super().run(work, steps, news)

    clock = RealClock()
    here = Here(Layout(), [Watching(clock)], replace(SETTINGS, prefix_cache=True), clock)
    asyncio.run(here.measure(Points(rows=(4,), contexts=(20, 40), prompts=(8, 64)), repeats=2))
    assert starts == {0}


# --- what is served


@pytest.mark.parametrize("copies", [1, 2])
def test_a_load_is_served_on_all_copies(copies: int) -> None:
    requests = drawn(1, 12, gap_s=0.01, prompt=30, output=6)
    logs = [EventLog() for _ in range(copies)]
    recorder, told = Recorder("measured"), list[int]()
    part, served = asyncio.run(sleepers(copies).serve(requests, recorder=recorder, logs=logs, told=told.append))
    assert part is requests
    assert (served.first_s > requests.arrival_s).all()
    assert (served.finished_s >= served.first_s).all()
    assert served.cached.tolist() == [0] * 12
    assert told[-1] == 12
    trace = recorder.trace()
    assert set(trace.lanes) == {f"replica {copy}" for copy in range(copies)} | {"requests"}
    assert trace.overlaps() == []
    came = [[e["id"] for entry in log for e in entry.events if e["type"] == "arrive"] for log in logs]
    assert came == [list(range(copy, 12, copies)) for copy in range(copies)]
    assert all(replay(log, Scheduler(SETTINGS)).equal for log in logs)


def test_what_prompts_share_is_found_and_nothing_else() -> None:
    settings = replace(SETTINGS, prefix_cache=True)
    chat = load_of(LoadSpec(requests=6, turns=3, arrivals="at_once", prompt_tokens=40, output_tokens=4, think_s=0.15))
    _, served = asyncio.run(sleepers(1, settings).serve(chat))
    said = serve(chat, COSTS, settings)
    assert served.cached.tolist() == said.cached.tolist() == [0, 0, 32, 32, 80, 80]
    apart = load([0.0, 0.1], [40, 40], [4, 4])
    assert asyncio.run(sleepers(1, settings).serve(apart))[1].cached.tolist() == [0, 0]


def after(polls: int) -> Callable[[], bool]:
    """False for so many times, then true."""
    left = iter(range(polls))
    return lambda: next(left, None) is None


def test_a_cancelled_run_keeps_what_was_served_wholly() -> None:
    requests = drawn(1, 400, gap_s=0.01, prompt=30, output=6)
    part, served = asyncio.run(sleepers(1).serve(requests, cancelled=after(6)))
    assert 0 < len(part) < 400
    assert len(served.first_s) == len(part)
    with pytest.raises(UserError, match="the run ended before a request was served"):
        asyncio.run(sleepers(1).serve(load([100.0], [5], [5]), cancelled=after(0)))


def test_workers_that_fail_are_told() -> None:
    class Failing(Sleeping):
        async def run(self, work: Pass, steps: int, news: asyncio.Event) -> PassResult:
            from stretto.core.faults import BackendCrash

            raise BackendCrash("gone")

    clock = RealClock()
    here = Here(Layout(), [Failing(clock)], SETTINGS, clock)
    with pytest.raises(UserError, match="2 of 2 requests failed: workers died again and again"):
        asyncio.run(here.serve(load([0.0, 0.0], [5, 5], [5, 5])))


# --- the domain


def test_layouts_over_cores_are_weighed_and_the_rest_is_refused() -> None:
    where = this_machine(4)
    verdicts = {str(p.layout): domain.check(JOB, p, where) for p in domain.candidates(JOB, where)}
    assert {name for name, refusal in verdicts.items() if refusal is None} == {"1TP", "2TP", "2DP2TP", "4DP"}
    assert "pipeline stages do not run on this machine; stages: 1" in {str(r) for r in verdicts.values()}
    assert "cells of unlike replicas and whole experts do not run on this machine" in str(
        verdicts["1DP4TP, attention x4"]
    )


@pytest.mark.parametrize(
    ("job", "plan", "expected"),
    [
        ({}, {"replicas": 3}, "the plan takes 3 cores, there are 2: 1 too few; replicas: 2"),
        ({}, {"devices": 2, "kv": "fp8"}, "this machine does not compute in fp8; weights: bf16 and kv: bf16"),
        ({}, {"policy": "lanes"}, "worker processes have one lane"),
        ({"preemption": "swap"}, {}, "copies to spare memory are not measured here; preemption: recompute"),
        (
            {"load": replace(LOAD, prompt_tokens=9000, spread=0.0)},
            {},
            "12 of 12 requests are longer than the model's 8192",
        ),
        ({}, {"memory_share": 1e-6}, "GB for weights and the longest request of each copy, of which 0.0 GB are given"),
    ],
)
def test_what_cannot_run_here_is_refused(job: dict[str, Any], plan: dict[str, Any], expected: str) -> None:
    refusal = domain.check(replace(JOB, **job), DeploymentPlan(**plan), this_machine())
    assert refusal is not None
    assert expected in str(refusal)


def test_more_ranks_than_kv_heads_are_refused() -> None:
    refusal = domain.check(JOB, DeploymentPlan(devices=9), this_machine(9))
    assert str(refusal) == "9 ranks share 3 KV heads, which are not repeated here; devices: 3"


def test_what_is_not_known_of_this_machine_is_told(without_workers: list[Layout]) -> None:
    for objective in ("energy", "cost"):
        with pytest.raises(UserError, match=f"objective: the {objective} of this machine is not known; throughput"):
            stretto.plan(replace(JOB, objective=objective), on=this_machine())  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"model: there is no model 'llama-3\.1-8b'"):
        stretto.plan(replace(JOB, model="llama-3.1-8b"), on=this_machine())
    with pytest.raises(UserError, match="devices: 3 cores are asked for, there are 2; at most 2"):
        stretto.plan(replace(JOB, devices=3), on=this_machine())
    with pytest.raises(UserError, match="nothing is measured of 1TP"):
        domain.simulate(JOB, DeploymentPlan(), this_machine())


def test_the_engine_decides_where_a_job_runs() -> None:
    abroad = ROOT / "clusters" / "8xh100.yaml"
    with pytest.raises(UserError, match="engine: stretto is measured on this machine and knows nothing of"):
        stretto.plan(replace(JOB, engine="stretto"), on=abroad)
    best = stretto.plan(JOB, on=abroad).best
    with pytest.raises(UserError, match="is planned for 8xh100 and not started from here; `stretto plan --emit"):
        stretto.run(best)
    strange = Plan(kind="deployment", job=replace(JOB, engine="vllm-0.6"), choices=best.choices, cluster=this_machine())
    with pytest.raises(UserError, match=r"engine: vllm-0\.6 is planned for and not started from here; stretto, which"):
        stretto.run(strange)


@pytest.mark.parametrize("engine", [None, "stretto"])
def test_a_job_is_planned_run_and_compared(engine: str | None, without_workers: list[Layout], tmp_path: Path) -> None:
    job = replace(JOB, engine=engine, policy="chunked", slots=2, load=replace(LOAD, rate_per_s=1000.0))
    told: list[str] = []
    ranking = stretto.plan(job, on=this_machine(), progress=lambda what, done, total: told.append(what))
    assert without_workers == [Layout(devices=2), Layout(replicas=2), Layout()]  # each is measured once
    assert ranking.best.choices.layout == Layout(replicas=2)  # sleepers do not share a core
    assert "timing passes: 2DP" in told
    ctx = Context(output=tmp_path, progress=lambda what, done, total: told.append(f"{what} {done}/{total}"))
    result = stretto.run(ranking.best, ctx=ctx)
    assert not result.interrupted
    assert told[-1] == "requests 12/12"
    assert sum(output["tokens"] for output in result.outputs) == load_of(job.load).output.sum()
    lines = [line for _, line in result.said]
    assert [line[:22].strip() for line in lines[1:]] == [
        "first token p50",
        "first token p95",
        "per token",
        "end to end p50",
        "end to end p95",
        "throughput",
        "put back",
    ]
    assert set(result.predicted.phases) == set(result.measured.phases) - {"queue", "answer"}
    assert {"html", "events-0", "events-1", "perfetto_measured"} <= set(result.files)
    log = EventLog.load(Path(result.files["events-1"]))
    assert replay(log, Scheduler(SchedulerConfig(**log.header))).equal


def test_a_run_is_judged_at_the_pace_that_it_had(
    without_workers: list[Layout], monkeypatch: pytest.MonkeyPatch
) -> None:
    best = stretto.plan(replace(JOB, load=replace(LOAD, arrivals="at_once")), on=this_machine()).best
    monkeypatch.setattr(Sleeping, "pace", 10.0)
    forecast, result = stretto.simulate(best).makespan, stretto.run(best)
    assert result.comparison.measured_s > 2 * forecast
    assert result.comparison.predicted_s > 2 * forecast
    assert "times what was timed for the plan; the prediction plays at" in result.remarks[0]


def test_a_run_that_is_cancelled_says_so(without_workers: list[Layout]) -> None:
    job = replace(JOB, load=replace(LOAD, requests=300, rate_per_s=50.0))
    best = stretto.plan(job, on=this_machine()).best
    result = stretto.run(best, ctx=Context(cancelled=after(8)))
    assert result.interrupted
    assert 0 < len(result.outputs) < 300


def test_what_was_timed_lately_is_believed(without_workers: list[Layout], monkeypatch: pytest.MonkeyPatch) -> None:
    first = stretto.plan(JOB, on=this_machine())
    again = stretto.plan(JOB, on=this_machine())
    assert len(without_workers) == 3
    assert first.weighed[0].prediction.metrics == again.weighed[0].prediction.metrics
    monkeypatch.setattr(preparing, "FRESH_S", -1.0)
    stretto.plan(JOB, on=this_machine())
    assert len(without_workers) == 6


def test_what_was_timed_at_one_level_of_instructions_is_not_believed_at_another(
    without_workers: list[Layout], monkeypatch: pytest.MonkeyPatch
) -> None:
    stretto.plan(JOB, on=this_machine())
    monkeypatch.setattr(preparing, "BEST_LEVEL", "another")
    stretto.plan(JOB, on=this_machine())
    assert len(without_workers) == 6


def test_paths_and_types_are_what_runs_fastest_here() -> None:
    assert choices.path_of(MODEL, 1) == "bf16"
    assert choices.path_of(MODEL, 2) == "torch"
    assert choices.dtype_of(this_machine()) == "bf16"


@pytest.mark.slow
def test_two_ranks_serve_a_load() -> None:
    async def main() -> int:
        async with started(MODEL, Layout(devices=2), SETTINGS) as here:
            requests = drawn(2, 4, gap_s=0.1, prompt=20, output=5)
            part, served = await here.serve(requests)
            assert (served.finished_s >= served.first_s).all()
            return len(part)

    assert asyncio.run(main()) == 4


def test_too_few_cores_are_told() -> None:
    async def main() -> None:
        async with started(MODEL, Layout(replicas=4096), SETTINGS):
            pass

    with pytest.raises(ValueError, match="4096DP takes 4096 cores, there are"):
        asyncio.run(main())
