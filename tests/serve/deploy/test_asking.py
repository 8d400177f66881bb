"""Jobs asked otherwise, and the fewest devices that keep a promise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import stretto
from stretto.core.errors import UserError
from stretto.core.search import Ranking
from stretto.serve.deploy.asking import adjusted, fewest_devices
from stretto.serve.deploy.job import Slo

from .planning import JOB, LOAD, ROOT, cluster


def test_the_fewest_devices_keep_the_promise() -> None:
    job = replace(JOB, load=replace(LOAD, rate_per_s=30.0, requests=80), slo=Slo(token_s=0.011))
    count, ranking = fewest_devices(job, cluster(8), lambda one: stretto.plan(one, on=cluster(8)))
    assert ranking.weighed[0].prediction.metrics["slo"].value.value >= 0.9
    assert 1 < count < 8
    fewer = stretto.plan(replace(job, objective="slo", devices=count - 1), on=cluster(8))
    assert fewer.weighed[0].prediction.metrics["slo"].value.value < 0.9
    hopeless = replace(job, slo=Slo(token_s=1e-6))
    with pytest.raises(UserError, match=r"8 devices serve 0\.0% of the requests as promised, 90\.0% are asked for"):
        fewest_devices(hopeless, cluster(8), lambda one: stretto.plan(one, on=cluster(8)))


def test_numbers_that_divide_nothing_are_tried_for_the_fewest() -> None:
    tried = []

    def plan(one: Any) -> Ranking:
        tried.append(one.devices)
        return stretto.plan(one, on=cluster(8, nodes=3))

    with pytest.raises(UserError, match="24 devices serve"):
        fewest_devices(replace(JOB, slo=Slo(token_s=1e-6)), cluster(8, nodes=3), plan)
    assert tried == [*range(1, 9), 16, 24]


def test_mistakes_of_a_search_for_the_fewest_are_told_as_they_are() -> None:
    def plan(one: Any) -> Ranking:
        return stretto.plan(one, on=cluster(8))

    with pytest.raises(UserError, match="a promise, where it is the objective"):
        fewest_devices(JOB, cluster(8), plan)
    promised = replace(JOB, slo=Slo(token_s=0.1))
    with pytest.raises(UserError, match="there is no model 'llama-9'"):
        fewest_devices(replace(promised, model="llama-9"), cluster(8), plan)
    with pytest.raises(UserError, match="no plan can run this job"):
        fewest_devices(replace(promised, model="llama-3.1-405b"), cluster(1), plan)


def test_jobs_can_be_asked_otherwise(tmp_path: Path) -> None:
    trace = tmp_path / "own.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n0,10,5\n1,20,5\n")
    job = adjusted(JOB, trace=str(trace), objective="latency")
    assert job.objective == "latency"
    assert (
        stretto.plan(job, on=cluster(1)).weighed[0].prediction.assumed.startswith("2 requests, 15 prompt and 5 output")
    )
    with pytest.raises(UserError, match="there is no objective 'speed'"):
        adjusted(JOB, trace=None, objective="speed")
    with pytest.raises(UserError, match="objective: a train job has one objective; leave it out"):
        adjusted(stretto.load(ROOT / "jobs" / "finetune.yaml"), trace=None, objective="latency")
    other = stretto.load(ROOT / "jobs" / "quickstart.yaml")
    with pytest.raises(UserError, match=r"there is no objective 'energy'; throughput, latency$"):
        adjusted(other, trace=None, objective="energy")
    with pytest.raises(UserError, match="a trace is for jobs of kind deployment"):
        adjusted(other, trace=str(trace), objective=None)
