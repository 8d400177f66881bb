"""How fast deployments are planned: single simulations of a 70B model, every plan of 16 devices, a closed form.

Goals are those that were set beside published simulators: LLMServingSim 2.0 takes 10 to 37 s for 300 requests, APEX
plans within 15 minutes, AIConfigurator sweeps in 2 to 7 s.

Usage: python benchmarks/plan_speed.py [--json] [--quick]
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import harness
from harness import Row
from stretto.core.search import search
from stretto.hardware.cluster import Cluster, Node
from stretto.serve.deploy import domain
from stretto.serve.deploy.analytic import rank
from stretto.serve.deploy.drawn import load_of
from stretto.serve.deploy.job import DeploymentJob, LoadSpec
from stretto.serve.deploy.plan import DeploymentPlan, candidates, check, costs_of, scheduler_config
from stretto.serve.deploy.simulate import serve

CLUSTER = Cluster(name="16 H100", nodes=(Node(name="node", type="dgx-h100", count=2),), network="ib-ndr400")
LOAD = LoadSpec(requests=1000, rate_per_s=8.0, prompt_tokens=512, output_tokens=256, spread=0.6)
JOB = DeploymentJob(model="llama-3-70b", load=LOAD, policy="whole")


def seconds_of(work: Callable[[], object], rounds: int) -> float:
    """The fastest of some rounds."""
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return min(found)


def one(load: LoadSpec, rounds: int) -> float:
    """Seconds of one simulation of 300 requests on 8 devices."""
    lone, plan = replace(JOB, load=load, devices=8), DeploymentPlan(devices=8)
    costs, config, requests = costs_of(lone, plan, CLUSTER), scheduler_config(lone, plan, CLUSTER), load_of(load)
    return seconds_of(lambda: serve(requests, costs, config), rounds)


def every_plan(count: int) -> tuple[float, int]:
    """Seconds of a search on both cores in which no bound spares a simulation, and how many plans there were."""
    job = replace(JOB, load=replace(LOAD, requests=count))
    began = time.perf_counter()
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as executor:
        able = [plan for plan in candidates(job, CLUSTER) if check(job, plan, CLUSTER) is None]
        ranking = search(domain, job, CLUSTER, executor=executor, wave=len(able))
    return time.perf_counter() - began, len(ranking.weighed)


def closed_form() -> tuple[float, int]:
    """Seconds to rank 1,000 plans without simulating."""
    job = replace(JOB, policy="auto")
    able = [plan for plan in candidates(job, CLUSTER) if check(job, plan, CLUSTER) is None]
    slots = itertools.cycle((32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384))
    plans = [replace(plan, slots=next(slots)) for plan in itertools.islice(itertools.cycle(able), 1000)]
    began = time.perf_counter()
    found = rank(job, CLUSTER, plans)
    return time.perf_counter() - began, len(found)


def measure(quick: bool) -> list[Row]:
    light = replace(LOAD, requests=300, rate_per_s=0.5)
    rounds = 2 if quick else 5
    plans_s, plans = every_plan(100 if quick else 1000)
    analytic_s, ranked = closed_form()
    heavy_s = one(replace(light, arrivals="at_once"), rounds)
    return [
        Row(name="300 requests, lightly loaded", ours=one(light, rounds), unit="s", goal=0.1, at_most=True),
        Row(name="300 requests at once", ours=heavy_s, unit="s", goal=0.5, at_most=True),
        Row(name=f"all {plans} plans of 16 devices", ours=plans_s, unit="s", goal=20.0, at_most=True),
        Row(name=f"{ranked} plans by a closed form", ours=analytic_s, unit="s", goal=5.0, at_most=True),
    ]


if __name__ == "__main__":
    sys.exit(harness.main(measure, __doc__ or ""))
