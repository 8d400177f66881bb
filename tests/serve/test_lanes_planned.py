"""Two lanes as a choice of a serving plan: who may have them, and what a forecast knows of them."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from stretto.hardware.cluster import Cluster, Devices, Node
from stretto.hardware.device import Device
from stretto.models.spec import ModelSpec
from stretto.serve import predict
from stretto.serve.job import Limits, ServeJob
from stretto.serve.plan import ServePlan, candidates, check
from stretto.serve.workload import Workload

WORK = Workload(
    spec=ModelSpec(
        family="llama", layers=4, hidden=256, heads=4, kv_heads=2, head_dim=64, ffn=512, vocab=1000, max_positions=4096
    ),
    prompts=(*((0,) * 20,) * 7, (0,) * 1500),
    arrivals_s=(*(0.0,) * 7, 0.02),
    limit=60,
    not_packed=None,
    packed_bytes=5e6,
)
CPU = Device(name="cpu", kind="cpu", memory_bytes=8e9, bandwidth=2e10, peak_flops={"fp32": 2e11, "bf16": 1e12}, units=2)


def serve_plan(**changes: object) -> ServePlan:
    values: dict[str, object] = {"device": "here/cpu0", "dtype": "fp32", "path": "exact", "threads": 1, "slots": 8}
    values |= {"joining": "continuous", "page_tokens": 32, "prefill": "lanes"}
    return ServePlan(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "reason", "nearest"),
    [
        ({}, None, None),
        ({"threads": 2}, "two lanes of 2 threads on 2 cores", "threads: 1"),
        ({"path": "torch"}, "two lanes compute by the fused decoder", "prefill: mixed"),
        ({"layout": "slots", "page_tokens": 1560}, "steps of layout slots work on a range", "layout: pages"),
        ({"dtype": "int4", "page_tokens": 64}, "open pages of a cache in 4 bits", "dtype: bf16"),
        ({"instances": 2}, "instances have no lanes", "instances: 1"),
    ],
)
def test_a_serving_plan_has_lanes_or_says_why_not(
    changes: dict[str, object], reason: str | None, nearest: str | None
) -> None:
    job = ServeJob(prompts=("a",))
    refusal = check(job, serve_plan(**changes), WORK, cluster_of(CPU))
    assert (refusal is None) == (reason is None)
    if refusal is not None:
        assert reason is not None
        assert refusal.reason.startswith(reason)
        assert refusal.nearest == nearest


def test_a_job_may_ask_for_lanes_or_have_them_weighed() -> None:
    found = {
        asked: {plan.prefill for plan in candidates(ServeJob(prompts=("a",), prefill=asked), WORK, cluster_of(CPU))}  # type: ignore[arg-type]
        for asked in ("mixed", "lanes", "auto")
    }
    assert found == {"mixed": {"mixed"}, "lanes": {"lanes"}, "auto": {"mixed", "lanes"}}


@pytest.mark.parametrize(
    ("units", "changes", "threads"),
    [
        (8, {}, {1, 4, 8}),
        (8, {"limits": Limits(threads=6)}, {1, 3, 6}),
        (4, {"prefill": "lanes"}, {1, 2, 4}),
        (8, {"instances": 4}, {1, 2}),
        (2, {}, {1, 2}),
        (8, {"threads": 5}, {5}),
    ],
)
def test_as_many_threads_are_weighed_as_there_can_be(units: int, changes: dict[str, Any], threads: set[int]) -> None:
    job = ServeJob(prompts=("a",), **changes)
    assert {plan.threads for plan in candidates(job, WORK, cluster_of(replace(CPU, units=units)))} == threads


def test_the_nearest_number_of_threads_fits() -> None:
    job = ServeJob(prompts=("a",), instances=2, limits=Limits(threads=3))
    plan = serve_plan(prefill="mixed", instances=2, threads=2)
    refusal = check(job, plan, WORK, cluster_of(replace(CPU, units=8)))
    assert refusal is not None
    assert (refusal.reason, refusal.nearest) == ("4 threads, limits.threads is 3", "threads: 1")


def test_norms_need_fp32() -> None:
    device = replace(CPU, name="card", kind="gpu", peak_flops={"bf16": 1e15})
    plan = serve_plan(device="here/gpu0", prefill="mixed", dtype="bf16", path="torch")
    refusal = check(ServeJob(prompts=("a",)), plan, WORK, cluster_of(device))
    assert refusal is not None
    assert refusal.reason == "card has no peak of fp32, in which norms and sums are computed"


def test_a_forecast_knows_that_a_long_prompt_holds_nobody_up() -> None:
    gaps = {}
    for prefill in ("mixed", "lanes"):
        played = predict.play(serve_plan(prefill=prefill, prefill_tokens=2048), WORK, CPU, [60] * 8)
        assert all(len(answer.tokens) == 60 for answer in played.answers)
        assert played.trace.overlaps() == []
        gaps[prefill] = max(b - a for answer in played.answers[:7] for a, b in pairwise(answer.token_times_s))
    assert gaps["lanes"] < 0.5 * gaps["mixed"]


def cluster_of(device: Device) -> Cluster:
    return Cluster(name="here", nodes=(Node(name="here", devices=(Devices(device=device),)),))
