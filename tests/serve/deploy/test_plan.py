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
from stretto.hardware import catalog
from stretto.hardware.cluster import Cluster, Devices, Node
from stretto.serve.deploy import domain
from stretto.serve.deploy.job import DeploymentJob, Slo
from stretto.serve.deploy.plan import DeploymentPlan, candidates, check
from stretto.serve.deploy.planned import planned_spec, shipped

from .planning import JOB, LOAD, cluster

BIG = replace(JOB, model="llama-3-70b")


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
        chats = replace(LOAD, turns=10, arrivals="at_once", think_s=0.0, prompt_tokens=2000, output_tokens=2)
        long = replace(LOAD, prompt_tokens=4000, output_tokens=3)
        for load in (LOAD, replace(LOAD, arrivals="at_once"), long, chats):
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


def test_energy_needs_known_watts() -> None:
    unknown = Cluster(
        name="own",
        nodes=(Node(name="a", devices=(Devices(device=replace(catalog.device("h100-sxm"), name="own-card")),)),),
    )
    with pytest.raises(UserError, match="objective: the watts of own-card are not known; throughput, latency, cost"):
        stretto.plan(replace(JOB, objective="energy"), on=unknown)
