"""Plans of deployments: what is refused and why, what is ranked, and that searching is honest."""

from __future__ import annotations

import math
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import stretto
from stretto.core.errors import UserError
from stretto.core.plan import domain_of
from stretto.core.search import Ranking, search
from stretto.hardware.cluster import Cluster, Devices, Node
from stretto.serve.deploy import domain
from stretto.serve.deploy.asking import adjusted, fewest_devices
from stretto.serve.deploy.emit import commands
from stretto.serve.deploy.job import DeploymentJob, LoadSpec, Slo
from stretto.serve.deploy.plan import DeploymentPlan, candidates, check
from stretto.serve.deploy.planned import planned_spec, shipped

ROOT = Path(__file__).parents[3]
LOAD = LoadSpec(requests=60, rate_per_s=4.0, prompt_tokens=400, output_tokens=60, spread=0.5)
JOB = DeploymentJob(model="llama-3.1-8b", load=LOAD)


def cluster(count: int = 2, kind: str = "h100-sxm", *, nodes: int = 1, link: str = "nvlink4") -> Cluster:
    held = (Devices(type=kind, count=count),)
    network = "ib-ndr400" if nodes > 1 else None
    return Cluster(
        name="test",
        nodes=(Node(name="n", devices=held, link=link if count > 1 else None, count=nodes),),
        network=network,
    )


def test_the_domain_is_found() -> None:
    assert domain_of("deployment") is domain
    assert domain.job_type is DeploymentJob


def test_the_best_is_the_best_of_all_that_were_simulated() -> None:
    for objective in ("throughput", "latency", "energy", "slo"):
        job = replace(JOB, objective=objective, slo=Slo(first_token_s=0.05, token_s=0.01))  # type: ignore[arg-type]
        everything = [plan for plan in candidates(job, cluster()) if check(job, plan, cluster()) is None]
        values = [domain.simulate(job, plan, cluster()).metrics[objective].value.value for plan in everything]
        best = (max if domain.higher_is_better(job) else min)(values)
        ranking = search(domain, job, cluster())
        assert ranking.weighed[0].prediction.metrics[objective].value.value == best
        assert len(ranking.weighed) + len(ranking.pruned) == len(everything)


def test_cost_needs_a_price() -> None:
    job = replace(JOB, objective="cost")
    with pytest.raises(UserError, match=r"prices\.h100-sxm: there is no price of h100-sxm; dollars an hour"):
        stretto.plan(job, on=cluster())
    priced = stretto.plan(replace(job, prices={"h100-sxm": 3.6}), on=cluster())
    found = priced.weighed[0].prediction.metrics
    dollars = 1e6 * 2 * 3.6 / 3600 / found["throughput"].value.value
    assert found["cost"].value.value == pytest.approx(dollars)


def test_bounds_are_never_worse_than_what_is_simulated() -> None:
    for objective in ("throughput", "latency", "energy", "cost"):
        job = replace(JOB, objective=objective, prices={"h100-sxm": 3.0})  # type: ignore[arg-type]
        for load in (LOAD, replace(LOAD, arrivals="at_once"), replace(LOAD, prompt_tokens=4000, output_tokens=3)):
            asked = replace(job, load=load)
            for plan in candidates(asked, cluster(2)):
                if check(asked, plan, cluster(2)) is None:
                    value = domain.simulate(asked, plan, cluster(2)).metrics[objective].value.value
                    bound = domain.bound(asked, plan, cluster(2))
                    assert bound >= value if objective == "throughput" else bound <= value, str(plan)


def test_bounds_hold_for_uneven_pipelines() -> None:
    deep = replace(JOB, model="llama-3.1-405b", weights="fp8", load=replace(LOAD, requests=10))
    for objective in ("throughput", "latency"):
        job, where = replace(deep, objective=objective), cluster(16, "h200-sxm")  # type: ignore[arg-type]
        uneven = [p for p in candidates(job, where) if 126 % p.stages and check(job, p, where) is None]
        assert {p.stages for p in uneven} >= {4, 8}
        for plan in uneven[::4]:
            value = domain.simulate(job, plan, where).metrics[objective].value.value
            bound = domain.bound(job, plan, where)
            assert bound >= value if objective == "throughput" else bound <= value, str(plan)


def test_a_prefix_cache_is_weighed_where_requests_share_anything() -> None:
    assert not any(plan.prefix_cache for plan in candidates(JOB, cluster()))
    chat = replace(JOB, load=replace(LOAD, turns=3, think_s=1.0), policy="whole", objective="latency", devices=1)
    both = list(candidates(chat, cluster()))
    assert [plan.prefix_cache for plan in both] == [False, True]
    assert [plan.prefix_cache for plan in candidates(replace(chat, prefix_cache=True), cluster())] == [True]
    best, other = stretto.plan(chat, on=cluster()).weighed
    assert best.plan.choices.prefix_cache
    assert best.prediction.metrics["cached"].value.value > 0 == other.prediction.metrics["cached"].value.value
    assert str(best.plan.choices).endswith("a batch, shared prefixes")


def plain(ranking: Ranking) -> list[Any]:
    return [(str(w.plan.choices), w.prediction.metrics[ranking.objective].value.value) for w in ranking.weighed]


def test_any_number_of_workers_gives_the_same_answer() -> None:
    alone = search(domain, JOB, cluster(4))
    for workers in (1, 3):
        with ThreadPoolExecutor(workers) as executor:
            assert plain(search(domain, JOB, cluster(4), executor=executor)) == plain(alone)


def test_a_budget_gives_the_best_so_far() -> None:
    ranking = search(domain, JOB, cluster(8), wave=2, budget_s=0.0)
    assert len(ranking.weighed) == 2
    assert ranking.untried > 0
    assert search(domain, JOB, cluster(4)).untried == 0


@pytest.mark.parametrize("model", sorted(shipped()))
def test_shipped_models_can_be_planned_for(model: str) -> None:
    spec = planned_spec(model)
    named = re.findall(r"(\d+)x(\d+)b|(\d+)b", model)
    if named and named[0][2]:
        assert spec.parameters() / 1e9 == pytest.approx(int(named[0][2]), rel=0.08)
    assert list(candidates(replace(JOB, model=model), cluster(8)))


def test_models_that_are_not_there_are_told() -> None:
    with pytest.raises(
        UserError, match=r"model: there is no model 'llama-9'; a config\.json, its folder, or llama-3-70b"
    ):
        stretto.plan(replace(JOB, model="llama-9"), on=cluster())


def test_a_model_from_its_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "mixtral", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, '
        '"num_attention_heads": 4, "vocab_size": 100, "num_local_experts": 4, "num_experts_per_tok": 2}'
    )
    assert planned_spec(str(tmp_path)) == planned_spec(str(tmp_path / "config.json"))
    assert (planned_spec(str(tmp_path)).experts, planned_spec(str(tmp_path)).top_k) == (4, 2)
    (tmp_path / "config.json").write_text('{"model_type": "mixtral", "num_local_experts": true}')
    planned_spec.cache_clear()
    with pytest.raises(UserError, match=r"config\.json: "):
        planned_spec(str(tmp_path))


BIG = replace(JOB, model="llama-3-70b")


@pytest.mark.parametrize(
    ("changes", "where", "reason", "nearest"),
    [
        ({}, cluster(1), r"142\.5 GB for weights, of which 72\.0 GB are given: 70\.5 GB too few", "weights: fp8 with"),
        (
            {"devices": 2, "memory_share": 0.85},
            cluster(2),
            r"a device needs 71\.8 GB for weights.* 68\.0 GB are given: 3\.8 GB too few",
            r"memory_share: 0\.97",
        ),
        ({"devices": 16}, cluster(8), "the plan takes 16 devices, there are 8: 8 too few", "replicas: 1"),
        ({"stages": 96}, cluster(96), "80 layers leave 16 of 96 stages without any", "stages: 80"),
        ({"stages": 3, "memory_share": 0.97}, cluster(3), None, ""),
        ({"devices": 6}, cluster(6), None, ""),
        ({"devices": 8, "mlp_split": "expert"}, cluster(8), "0 experts on 8 devices", "mlp_split: tensor"),
        ({"devices": 24}, cluster(8, nodes=3), None, ""),
        ({"devices": 12}, cluster(12), r"12 ranks share 64 heads in 8 KV groups", "at most 64 ranks, and a multiple"),
    ],
)
def test_a_refusal_says_which_limit_by_how_much_and_what_would_fit(
    changes: dict[str, Any], where: Cluster, reason: str | None, nearest: str
) -> None:
    refusal = check(BIG, DeploymentPlan(**changes), where)
    if reason is None:
        assert refusal is None
        return
    assert refusal is not None
    assert re.search(reason, refusal.reason), refusal
    assert re.search(nearest, refusal.nearest), refusal


def applied(plan: DeploymentPlan, nearest: str) -> DeploymentPlan:
    """`plan` with the change that a refusal proposes."""
    for part in nearest.split(" with "):
        name, _, value = part.partition(": ")
        if name == "memory_share":
            plan = replace(plan, memory_share=float(value))
        elif name in ("weights", "kv"):
            plan = replace(plan, **{name: value})  # type: ignore[arg-type]
        else:
            found = re.match(r"(\d+) devices a stage", part)
            assert found, nearest
            factor = int(found[1]) // plan.devices
            plan = replace(plan, devices=int(found[1]), replicas=max(1, plan.replicas // factor))
    return plan


@pytest.mark.parametrize("model", ["llama-3-70b", "llama-3.1-405b", "mixtral-8x22b", "llama-3.1-8b"])
@pytest.mark.parametrize("kind", ["h100-sxm", "a100-sxm-40gb", "l4"])
@pytest.mark.parametrize("devices", [1, 2, 4])
@pytest.mark.parametrize("output", [60, 6000])
def test_the_nearest_change_fits(model: str, kind: str, devices: int, output: int) -> None:
    job = replace(JOB, model=model, load=replace(LOAD, output_tokens=output, requests=5, spread=0.0))
    roomy, plan = cluster(64, kind), DeploymentPlan(devices=devices)
    refusal = check(job, plan, roomy)
    if refusal is not None and "devices of" not in refusal.nearest:
        assert "too few" in refusal.reason
        assert check(job, applied(plan, refusal.nearest), roomy) is None, refusal


def test_requests_beyond_the_model_are_counted() -> None:
    job = replace(BIG, load=replace(LOAD, prompt_tokens=8000, output_tokens=400, spread=0.0))
    refusal = check(job, DeploymentPlan(devices=8), cluster(8))
    assert refusal is not None
    assert refusal.reason.startswith(
        "60 of 60 requests are longer than the model's 8192 positions, the longest has 8400"
    )
    assert "208 too many" in refusal.reason


def test_nodes_without_a_network_hold_no_replica() -> None:
    apart = replace(cluster(4, nodes=2), network=None)
    with pytest.raises(ValueError, match="has no link between"):
        stretto.plan(BIG, on=apart)


def test_devices_that_differ_are_refused() -> None:
    mixed = Cluster(
        name="mixed", nodes=(Node(name="n", devices=(Devices(type="h100-sxm"), Devices(type="l4")), link="pcie4"),)
    )
    with pytest.raises(
        UserError, match="the devices of cluster mixed are h100-sxm, l4; a deployment runs on devices of"
    ):
        stretto.plan(JOB, on=mixed)
    assert stretto.plan(replace(JOB, devices=1), on=mixed).best.choices.layout.total == 1


def test_nothing_fits_is_one_line_with_sizes() -> None:
    with pytest.raises(UserError, match=r"no plan can run this job on test: 1TP: a device needs 142\.5 GB for weights"):
        stretto.plan(BIG, on=cluster(1))


def test_every_figure_has_an_interval_and_strangers_are_marked() -> None:
    at_home = domain.simulate(BIG, DeploymentPlan(devices=8), cluster(8))
    abroad = domain.simulate(replace(BIG), DeploymentPlan(devices=8), cluster(8, "h200-sxm"))
    for prediction in (at_home, abroad):
        for name, metric in prediction.metrics.items():
            assert math.isfinite(metric.value.low)
            assert metric.value.low < metric.value.high or name in ("memory", "slo")
    assert "extrapolated" not in at_home.assumed
    assert "extrapolated beyond what vllm-0.6 was measured on: h200-sxm" in abroad.assumed

    def width(prediction: Any) -> float:
        value = prediction.metrics["token"].value
        return float(value.high / value.value)

    assert width(abroad) > width(at_home)


def test_percentiles_and_promises_count_every_request() -> None:
    job = replace(JOB, slo=Slo(first_token_s=1e-9))
    found = domain.simulate(job, DeploymentPlan(), cluster(1)).metrics
    assert found["slo"].value.value == 0.0
    assert found["first_token_p50"].value.value <= found["first_token_p90"].value.value
    assert found["first_token_p90"].value.value <= found["first_token_p99"].value.value
    ones = replace(job, slo=Slo(latency_s=1e5), load=replace(LOAD, output_tokens=1, spread=0.0))
    single = domain.simulate(ones, DeploymentPlan(), cluster(1)).metrics
    assert single["slo"].value.value == 1.0
    assert "token" not in single  # no request has a second token


def test_the_fewest_devices_keep_the_promise() -> None:
    job = replace(JOB, load=replace(LOAD, rate_per_s=30.0, requests=80), slo=Slo(token_s=0.011))
    count, ranking = fewest_devices(job, cluster(8), lambda one: stretto.plan(one, on=cluster(8)))
    assert ranking.weighed[0].prediction.metrics["slo"].value.value >= 0.9
    assert 1 < count < 8
    fewer = stretto.plan(replace(job, objective="slo", devices=count // 2), on=cluster(8))
    assert fewer.weighed[0].prediction.metrics["slo"].value.value < 0.9
    hopeless = replace(job, slo=Slo(token_s=1e-6))
    with pytest.raises(UserError, match=r"8 devices serve 0\.0% of the requests as promised, 90\.0% are asked for"):
        fewest_devices(hopeless, cluster(8), lambda one: stretto.plan(one, on=cluster(8)))


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
    other = stretto.load(ROOT / "jobs" / "quickstart.yaml")
    with pytest.raises(UserError, match="a trace is for jobs of kind deployment"):
        adjusted(other, trace=str(trace), objective=None)


@pytest.mark.parametrize(
    ("engine", "plan", "expected"),
    [
        ("vllm", {"devices": 8}, ["--tensor-parallel-size 8", "--max-num-seqs 256", "--gpu-memory-utilization 0.9"]),
        ("vllm", {"devices": 2, "stages": 2, "weights": "fp8"}, ["--pipeline-parallel-size 2", "--quantization fp8"]),
        (
            "vllm",
            {"policy": "chunked", "prefill_tokens": 2048},
            ["--enable-chunked-prefill", "--max-num-batched-tokens 2048"],
        ),
        ("sglang", {"replicas": 2, "devices": 4}, ["--tp-size 4", "--dp-size 2", "--chunked-prefill-size -1"]),
        ("sglang", {"devices": 4, "attention_replicas": 4}, ["--enable-dp-attention", "--dp-size 4"]),
        ("sglang", {"prefix_cache": False}, ["--disable-radix-cache"]),
        ("vllm", {"prefix_cache": True}, [" --enable-prefix-caching"]),
        ("vllm", {}, ["--no-enable-prefix-caching"]),
        ("vllm", {"stages": 3}, ["VLLM_PP_LAYER_PARTITION=11,11,10 vllm serve", "--pipeline-parallel-size 3"]),
        ("sglang", {"stages": 3}, ["SGLANG_PP_LAYER_PARTITION=11,11,10 python -m sglang", "--pp-size 3"]),
        ("llama.cpp", {"policy": "chunked", "devices": 2}, ["--split-mode row", "--tensor-split 1,1", "-np 256"]),
        ("llama.cpp", {"policy": "chunked", "stages": 3}, ["--split-mode layer", "--tensor-split 11,11,10"]),
    ],
)
def test_flags_of_other_engines(engine: str, plan: dict[str, Any], expected: list[str]) -> None:
    (line,) = commands(engine, JOB, DeploymentPlan(**plan))
    assert [flag for flag in expected if flag not in line] == []


def test_copies_are_commands_on_devices_of_their_own() -> None:
    lines = commands("vllm", JOB, DeploymentPlan(replicas=2, devices=2))
    assert [line.split()[0] for line in lines] == ["CUDA_VISIBLE_DEVICES=0,1", "CUDA_VISIBLE_DEVICES=2,3"]
    assert "--port 8001" in lines[1]


def test_even_stages_are_not_told_and_radix_trees_are_kept() -> None:
    (line,) = commands("vllm", JOB, DeploymentPlan(stages=2))
    assert line.startswith("vllm serve")
    (line,) = commands("sglang", JOB, DeploymentPlan(prefix_cache=True))
    assert "radix" not in line


@pytest.mark.parametrize(
    ("engine", "plan", "expected"),
    [
        ("vllm", {"policy": "static"}, "vllm cannot do static batches; policy: whole or chunked"),
        (
            "vllm",
            {"devices": 2, "attention_replicas": 2},
            "vllm cannot do data parallel attention over split dense MLPs",
        ),
        ("sglang", {"devices": 2, "mlp_replicas": 2}, "sglang cannot do MLPs in more copies"),
        ("llama.cpp", {}, "llama.cpp cannot do whole prompts; policy: chunked"),
        ("llama.cpp", {"policy": "chunked", "prefix_cache": True}, "llama.cpp cannot do prefixes that all slots share"),
        ("exo", {}, "emit: there are no flags for 'exo'; one of vllm, sglang, llama.cpp"),
    ],
)
def test_what_an_engine_cannot_do_is_refused(engine: str, plan: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=re.escape(expected)):
        commands(engine, JOB, DeploymentPlan(**plan))
