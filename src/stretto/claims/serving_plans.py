"""What APEX (2025) states of plans for serving, played on the catalog's H100 by the engine's own scheduler.

The measured latencies are of the very runs whose other plans and loads fitted the engine's constants, so where they are
compared with those, they are consistent and not held. The publication's ratios hold for loads that it does not give
request by request: lengths are drawn with its means and deviations.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from stretto.claims.registry import Figure, claim

if TYPE_CHECKING:
    from stretto.hardware.cluster import Cluster
    from stretto.serve.deploy.job import DeploymentJob
    from stretto.serve.deploy.load import Load
    from stretto.serve.deploy.plan import DeploymentPlan
    from stretto.serve.deploy.simulate import Served

CONSTANTS = {
    "bandwidth, FLOP/s, links": "catalog h100-sxm and dgx-h100: NVIDIA H100 and DGX H100 data sheets (2023)",
    "kernel model, collectives": "hardware/fitted.yaml",
    "engine": "serve/deploy/engines.yaml: vllm-0.6",
}
FITTED = "mean latencies of Llama-3.1-70B under vLLM 0.6.0 on 2, 4 and 8 H100 at the creation loads"
CREATION = "Llama-3-70B on H100, vLLM, creation trace (307 +- 81 in, 1,128 +- 420 out) at 0.5 requests a second"
CHAT = "Llama-3-70B on 8 H100, vLLM, chat trace (73 +- 149 in, 189 +- 174 out) at 0.5 requests a second"


def _cluster(devices: int) -> Cluster:
    from stretto.hardware.cluster import Cluster, Devices, Node

    held = (Devices(type="h100-sxm", count=min(devices, 8)),)
    nodes = max(1, devices // 8)
    node = Node(name="node", devices=held, link="nvlink4" if devices > 1 else None, count=nodes)
    return Cluster(name=f"{devices} H100", nodes=(node,), network="ib-ndr400" if nodes > 1 else None)


def _job(*, prompt: tuple[int, int], output: tuple[int, int], requests: int, rate: float) -> DeploymentJob:
    from stretto.serve.deploy.job import DeploymentJob, LoadSpec

    return DeploymentJob(
        model="llama-3-70b",
        load=LoadSpec(
            requests=requests,
            rate_per_s=rate,
            prompt_tokens=prompt[0],
            output_tokens=output[0],
            spread=round((prompt[1] / prompt[0] + output[1] / output[0]) / 2, 2),
            seed=1,
        ),
        memory_share=0.97,
    )


@lru_cache(maxsize=32)
def _served(job: DeploymentJob, plan: DeploymentPlan, devices: int) -> tuple[Load, Served]:
    from stretto.serve.deploy.drawn import load_of
    from stretto.serve.deploy.plan import costs_of, scheduler_config
    from stretto.serve.deploy.simulate import serve

    cluster, load = _cluster(devices), load_of(job.load)
    return load, serve(load, costs_of(job, plan, cluster), scheduler_config(job, plan, cluster))


def _creation(devices: int, quick: bool) -> tuple[float, float]:
    """Mean seconds to the first token and per token of one replica on so many devices, with its part of the load."""
    share = devices / 8
    job = _job(prompt=(307, 81), output=(1128, 420), requests=100 if quick else 512, rate=0.5 * share)
    return _latency(job, devices)


def _latency(job: DeploymentJob, devices: int) -> tuple[float, float]:
    from stretto.serve.deploy.plan import DeploymentPlan

    load, served = _served(job, DeploymentPlan(devices=devices, memory_share=0.97), devices)
    first = float(np.mean(served.first_s - load.arrival_s))
    whole = float(np.sum(served.finished_s - load.arrival_s))
    return first, (whole - len(load) * first) / float(load.output.sum())


def _sheet_s(devices: int) -> float:
    """Weights once a step at the data sheet's bandwidth."""
    from stretto.hardware import catalog
    from stretto.serve.deploy.planned import planned_spec

    return planned_spec("llama-3-70b").weight_bytes("bf16") / devices / catalog.device("h100-sxm").bandwidth


def _sheet_prompt_s(devices: int, tokens: int) -> float:
    """A prompt's FLOPs at the data sheet's peak, or its weights once if that takes longer."""
    from stretto.hardware import catalog
    from stretto.serve.deploy.planned import planned_spec

    flops = 2.0 * planned_spec("llama-3-70b").parameters() * tokens / devices
    return max(flops / catalog.device("h100-sxm").peak("bf16"), _sheet_s(devices))


def _token(devices: int, quick: bool) -> Figure:
    return Figure(
        ours=_creation(devices, quick)[1] * 1e3, null=_sheet_s(devices) * 1e3, note="null: weights once a step"
    )


def _first(devices: int, quick: bool) -> Figure:
    null = _sheet_prompt_s(devices, 307) * 1e3
    return Figure(ours=_creation(devices, quick)[0] * 1e3, null=null, note="null: the prompt at the sheet's peak")


@claim(
    system="apex",
    says="8TP takes 17.7 ms a token",
    kind="simulated",
    published=17.7,
    unit="ms",
    setting=CREATION,
    constants=CONSTANTS,
    fitted_on=FITTED,
    tolerance=0.11,
)
def token_of_eight(quick: bool) -> Figure:
    return _token(8, quick)


@claim(
    system="apex",
    says="a replica of 2DPx4TP takes 21.5 ms a token",
    kind="simulated",
    published=21.5,
    unit="ms",
    setting=CREATION,
    constants=CONSTANTS,
    fitted_on=FITTED,
    tolerance=0.11,
)
def token_of_four(quick: bool) -> Figure:
    return _token(4, quick)


@claim(
    system="apex",
    says="a replica of 4DPx2TP takes 33.3 ms a token",
    kind="simulated",
    published=33.3,
    unit="ms",
    setting=CREATION,
    constants=CONSTANTS,
    fitted_on=FITTED,
    tolerance=0.11,
)
def token_of_two(quick: bool) -> Figure:
    return _token(2, quick)


@claim(
    system="apex",
    says="8TP takes 48.3 ms to the first token",
    kind="simulated",
    published=48.3,
    unit="ms",
    setting=CREATION,
    constants=CONSTANTS,
    fitted_on=FITTED,
    tolerance=0.2,
)
def first_of_eight(quick: bool) -> Figure:
    return _first(8, quick)


@claim(
    system="apex",
    says="a replica of 4DPx2TP takes 78.0 ms to the first token",
    kind="simulated",
    published=78.0,
    unit="ms",
    setting=CREATION,
    constants=CONSTANTS,
    fitted_on=FITTED,
    tolerance=0.2,
)
def first_of_two(quick: bool) -> Figure:
    return _first(2, quick)


def _chat() -> DeploymentJob:
    return _job(prompt=(73, 149), output=(189, 174), requests=1024, rate=0.5)


@claim(
    system="apex",
    says="chat on 8TP takes 14.1 ms a token",
    kind="simulated",
    published=14.1,
    unit="ms",
    setting=CHAT,
    constants=CONSTANTS,
    tolerance=0.15,
)
def chat_token(quick: bool) -> Figure:
    return Figure(ours=_latency(_chat(), 8)[1] * 1e3, null=_sheet_s(8) * 1e3, note="null: weights once a step")


@claim(
    system="apex",
    says="chat on 8TP takes 38.0 ms to the first token",
    kind="simulated",
    published=38.0,
    unit="ms",
    setting=CHAT,
    constants=CONSTANTS,
    tolerance=0.25,
)
def chat_first(quick: bool) -> Figure:
    null = _sheet_prompt_s(8, 73) * 1e3
    return Figure(ours=_latency(_chat(), 8)[0] * 1e3, null=null, note="null: the prompt at the sheet's peak")


@claim(
    system="apex",
    says="two H100 have three decoder plans",
    kind="exact",
    published=3,
    setting="the README's sample: Llama-3-70B, without the plans of whole model replicas, which do not fit",
)
def plans_of_two(quick: bool) -> Figure:
    from stretto.serve.deploy.layouts import layouts
    from stretto.serve.deploy.planned import planned_spec
    from stretto.serve.deploy.tree import flat

    spec = planned_spec("llama-3-70b")
    found = [layout for layout in layouts(spec, flat(2)) if layout.replicas == 1 and layout.mlp_replicas == 1]
    return Figure(ours=len(found))


@claim(
    system="apex",
    says="pipeline stages take 2.06 times as long as tensor parallelism on two H100",
    kind="simulated",
    published=128 / 62.1,
    unit="x",
    setting="the README's sample: PP2 128 s, TP2 62.1 s; lengths not stated, taken: 32 requests of 512 and 128 tokens",
    constants=CONSTANTS,
    tolerance=0.25,
    doubtful=True,
)
def stages_against_tensors(quick: bool) -> Figure:
    from stretto.serve.deploy.plan import DeploymentPlan

    job = _job(prompt=(512, 0), output=(128, 0), requests=32, rate=1000.0)
    plans = [DeploymentPlan(stages=2, memory_share=0.97), DeploymentPlan(devices=2, memory_share=0.97)]
    seconds = [_served(job, plan, 2)[1].makespan_s for plan in plans]
    return Figure(ours=seconds[0] / seconds[1], null=1.0, note="null: as many bytes and FLOPs a device either way")


def _best_over_heuristic(jobs: Sequence[DeploymentJob], devices: int) -> list[float]:
    """Makespan of tensor parallelism in a node with pipelines across, over that of the best plan."""
    from stretto.serve.deploy import domain
    from stretto.serve.deploy.plan import DeploymentPlan, candidates, check

    cluster, ratios = _cluster(devices), []
    for job in jobs:
        able = [p for p in candidates(replace(job, policy="whole"), cluster) if check(job, p, cluster) is None]
        heuristic = DeploymentPlan(devices=min(8, devices), stages=max(1, devices // 8), memory_share=0.97)
        found = [
            1 / domain.simulate(job, plan, cluster).metrics["throughput"].value.value for plan in (heuristic, *able)
        ]
        ratios.append(found[0] / min(found))
    return ratios


@claim(
    system="apex",
    says="the best plan is up to 3.37 times as fast as the usual one",
    kind="simulated",
    published=3.37,
    unit="x",
    setting="over models, loads and clusters of 8 and 16 H100; here Llama-3-70B, three loads, 8 and 16 H100",
    constants=CONSTANTS,
    tolerance=0.5,
    doubtful=True,
)
def best_over_heuristic(quick: bool) -> Figure:
    loads = [((2742, 944), (172, 73)), ((307, 81), (1128, 420)), ((73, 149), (189, 174))]
    count = 64 if quick else 400
    jobs = [_job(prompt=p, output=o, requests=count, rate=1000.0) for p, o in loads]
    ratios = _best_over_heuristic(jobs, 8) + ([] if quick else _best_over_heuristic(jobs, 16))
    note = f"from {min(ratios):.2f} to {max(ratios):.2f}; null: the usual plan is the best"
    return Figure(ours=max(ratios), null=1.0, note=note)


@claim(
    system="apex",
    says="all plans of Llama-3-70B are found and simulated within 15 minutes",
    kind="measured",
    published=900.0,
    unit="s",
    setting="a search on CPUs; here 16 H100, a trace of 1,000 requests (100 with --quick), one core",
    lower_is_better=True,
)
def search_seconds(quick: bool) -> Figure:
    from stretto.core.search import search
    from stretto.serve.deploy import domain

    job = _job(prompt=(512, 256), output=(192, 96), requests=100 if quick else 1000, rate=8.0)
    began = time.perf_counter()
    ranking = search(domain, replace(job, policy="whole"), _cluster(16))
    seconds = time.perf_counter() - began
    return Figure(ours=seconds, note=f"{len(ranking.weighed)} plans simulated, {len(ranking.pruned)} by bounds alone")
