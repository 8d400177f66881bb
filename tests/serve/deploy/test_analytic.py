"""The closed form: as good as the simulation where nothing waits, and blind where much does."""

from __future__ import annotations

from dataclasses import replace

import pytest

from stretto.serve.deploy import domain
from stretto.serve.deploy.analytic import estimate, rank
from stretto.serve.deploy.drawn import load_of
from stretto.serve.deploy.job import DeploymentJob, LoadSpec
from stretto.serve.deploy.plan import DeploymentPlan, candidates, check

from .test_plan import cluster

LIGHT = LoadSpec(requests=80, rate_per_s=2.0, prompt_tokens=300, output_tokens=120, spread=0.3)
JOB = DeploymentJob(model="llama-3.1-8b", load=LIGHT, policy="whole")


@pytest.mark.parametrize(
    "plan", [DeploymentPlan(), DeploymentPlan(devices=4), DeploymentPlan(replicas=2, devices=2)], ids=str
)
def test_where_nothing_waits_it_is_the_simulation(plan: DeploymentPlan) -> None:
    said = estimate(JOB, plan, cluster(4))
    played = domain.simulate(JOB, plan, cluster(4)).metrics
    assert said.token_s == pytest.approx(played["token"].value.value, rel=0.08)
    assert said.first_token_s == pytest.approx(played["first_token"].value.value, rel=0.15)
    assert said.latency_s == pytest.approx(played["latency"].value.value, rel=0.12)
    load = load_of(LIGHT)
    assert said.throughput == pytest.approx(load.output.sum() / load.arrival_s[-1])


def test_it_does_not_see_the_queue_that_the_simulation_sees() -> None:
    job = replace(JOB, load=replace(LIGHT, arrivals="at_once", requests=600))
    said, played = estimate(job, DeploymentPlan(), cluster(1)), domain.simulate(job, DeploymentPlan(), cluster(1))
    assert played.metrics["first_token"].value.value > 3 * said.first_token_s


def test_plans_are_ranked_for_the_objective() -> None:
    able = [plan for plan in candidates(JOB, cluster(4)) if check(JOB, plan, cluster(4)) is None]
    by_latency = rank(replace(JOB, objective="latency"), cluster(4), able)
    assert [one.latency_s for one in by_latency] == sorted(one.latency_s for one in by_latency)
    by_throughput = rank(replace(JOB, load=replace(LIGHT, arrivals="at_once")), cluster(4), able)
    assert [-one.throughput for one in by_throughput] == sorted(-one.throughput for one in by_throughput)
    best = domain.simulate(replace(JOB, objective="latency"), by_latency[0].plan, cluster(4))
    worst = domain.simulate(replace(JOB, objective="latency"), by_latency[-1].plan, cluster(4))
    assert best.metrics["latency"].value.value < worst.metrics["latency"].value.value
