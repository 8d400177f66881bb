"""Plans for machines that one does not have: what shares a device, the slowest one, what a cluster lacks."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import stretto
from stretto.core.errors import UserError
from stretto.files import load_cluster
from stretto.hardware import catalog
from stretto.hardware.cluster import Cluster, Devices, Node
from stretto.hardware.device import Device
from stretto.hardware.link import Link
from stretto.train.check import check
from stretto.train.costs import StepCosts
from stretto.train.domain import TrainDomain
from stretto.train.job import Layout, Optimizer, Shape, TrainJob
from stretto.train.memory import peak_bytes, summed_numels
from stretto.train.plan import TrainPlan, _ranks, balanced, candidates
from stretto.train.predict import play, predict

CLUSTERS = Path(__file__).parents[2] / "clusters"
SHAPE = Shape(layers=4, hidden=512, heads=8, kv_heads=8, ffn=2048)
SPEC = SHAPE.spec(vocab=256, positions=1024)
EXPERTS = replace(SHAPE, experts=8, top_k=2)


def job_of(**fields: Any) -> TrainJob:
    return TrainJob(**{"shape": SHAPE, "tokenizer": "bytes", "sequence": 256, "global_batch": 16, **fields})


def plan_of(*devices: str, **choices: Any) -> TrainPlan:
    stages = choices.get("pp", 1) * choices.get("chunks", 1)
    return TrainPlan(devices=devices, layers=balanced(SPEC, stages), **choices)


def cpu(units: int) -> Devices:
    peaks = {"fp32": 1e11 * units}
    return Devices(
        device=Device(
            name=f"cpu of {units}", kind="cpu", memory_bytes=64e9, bandwidth=1e10, units=units, peak_flops=peaks
        )
    )


def cpus(*units: int) -> Cluster:
    nodes = tuple(Node(name=f"n{i}", devices=(cpu(size),)) for i, size in enumerate(units))
    link = Link(name="ethernet", kind="ethernet", bandwidth=1e9, latency_s=1e-5)
    return Cluster(name="cpus", nodes=nodes, network=link)


def step_s(job: TrainJob, plan: TrainPlan, cluster: Cluster) -> float:
    assert job.shape is not None
    return play(job, plan, job.shape.spec(vocab=256, positions=1024), cluster, steps=1).makespan


def test_a_gpu_runs_one_rank() -> None:
    node = load_cluster(CLUSTERS / "8xa100.yaml")
    (refusal,) = {check(job_of(), p, SPEC, node) for p in candidates(job_of(processes=16), SPEC, node) if p.dp == 16}
    assert refusal is not None
    assert (refusal.reason, refusal.nearest) == ("2 ranks are on node0/gpu0, and a GPU runs one", "processes: 8")


def test_ranks_on_one_cpu_share_it() -> None:
    cluster = cpus(8)
    one, eight, many = (plan_of(*["n0/cpu0"] * n, dp=n, threads=t) for n, t in ((1, 8), (8, 1), (16, 1)))
    job = job_of(global_batch=128)
    whole = step_s(job, one, cluster)
    for plan in (eight, many):
        assert step_s(job, plan, cluster) == pytest.approx(whole, rel=0.2)
        assert step_s(job, plan, cluster) >= whole * 0.95


@pytest.mark.parametrize(
    ("units", "processes", "ranks", "threads"),
    [
        ((8, 4), 2, ["n0", "n0"], 4),
        ((8, 4), 3, ["n0", "n0", "n1"], 4),
        ((8, 4), 12, ["n0"] * 8 + ["n1"] * 4, 1),
        ((8, 4), 24, ["n0"] * 16 + ["n1"] * 8, 1),
        ((2, 2), 2, ["n0", "n1"], 2),
    ],
)
def test_no_machine_has_more_threads_than_cores_where_that_can_be(
    units: tuple[int, ...], processes: int, ranks: list[str], threads: int
) -> None:
    plans = list(candidates(job_of(processes=processes, global_batch=24), SPEC, cpus(*units)))
    assert {(plan.devices, plan.threads) for plan in plans} == {(tuple(f"{name}/cpu0" for name in ranks), threads)}


def test_the_slowest_device_of_a_place_counts_wherever_it_stands() -> None:
    cluster = load_cluster(CLUSTERS / "mixed.yaml")
    fast, slow = "h100/gpu0", "desk/gpu0"
    names = set(cluster.devices())
    assert {fast, slow} <= names
    one, other = (step_s(job_of(), plan_of(*pair, dp=2), cluster) for pair in ((fast, slow), (slow, fast)))
    assert one == pytest.approx(other)
    both = step_s(job_of(), plan_of(fast, dp=1), cluster)
    assert one > both / 2
    domain = TrainDomain()
    assert domain.bound(job_of(), plan_of(fast, slow, dp=2), cluster) == pytest.approx(
        sum(domain.bound(job_of(), plan_of(path), cluster) for path in (fast, slow))
    )


def test_the_smallest_memory_of_a_place_counts() -> None:
    big = catalog.device("a100-sxm-80gb")
    needed = max(peak_bytes(job_of(), plan_of("n/gpu0", "n/gpu1", dp=2), SPEC))
    small = replace(big, memory_bytes=needed * 0.9)
    fitting = replace(big, memory_bytes=needed * 1.1)
    link = catalog.link("nvlink3")
    for first, second in ((big, small), (small, big)):
        node = Node(name="n", devices=(Devices(device=first), Devices(device=second)), link=link)
        refusal = check(job_of(), plan_of("n/gpu0", "n/gpu1", dp=2), SPEC, Cluster(name="two", nodes=(node,)))
        assert refusal is not None
        assert f"a rank on n/gpu{int(second is small)} needs" in refusal.reason
    node = Node(name="n", devices=(Devices(device=fitting), Devices(device=fitting)), link=link)
    assert check(job_of(), plan_of("n/gpu0", "n/gpu1", dp=2), SPEC, Cluster(name="two", nodes=(node,))) is None


def test_what_a_device_cannot_compute_is_refused() -> None:
    cluster = load_cluster(CLUSTERS / "16xv100.yaml")
    path = next(iter(cluster.devices()))
    refusal = check(job_of(dtype="bf16"), plan_of(path), SPEC, cluster)
    assert refusal is not None
    assert "has no peak for bf16 (peak_flops: " in refusal.reason
    assert refusal.nearest == "dtype: fp32"
    with pytest.raises(UserError, match="has no peak for bf16"):
        stretto.plan(job_of(dtype="bf16", layout=Layout(dp=16)), on=cluster)
    none = Devices(device=replace(catalog.device("a100-sxm-80gb"), peak_flops={}))
    with pytest.raises(UserError, match=r"has no peak for fp32 \(peak_flops: none\)"):
        stretto.plan(job_of(), on=Cluster(name="c", nodes=(Node(name="n", devices=(none,)),)))
    assert predict(job_of(dtype="bf16"), plan_of("n0/cpu0", threads=8), SPEC, cpus(8)).metrics  # as in fp32


def test_ranks_without_a_link_are_refused() -> None:
    gpu = Devices(type="a100-sxm-80gb", device=None, count=2)
    cluster = Cluster(name="c", nodes=(Node(name="n", devices=(gpu,)),))
    for choices in ({"dp": 2}, {"pp": 2}, {"tp": 2}):
        refusal = check(job_of(), plan_of("n/gpu0", "n/gpu1", **choices), SPEC, cluster)
        assert refusal is not None
        assert f"ranks of {next(iter(choices))} are on n/gpu0 and n/gpu1" in refusal.reason
    assert check(job_of(), plan_of("n/gpu0"), SPEC, cluster) is None
    assert not cluster.whole
    nodes = [Node(name="n", devices=(Devices(type="a100-sxm-80gb", device=None),), count=2)]
    assert not Cluster(name="c", nodes=tuple(nodes)).whole
    assert Cluster(name="c", nodes=tuple(nodes), network=cpus(1).network).whole
    assert load_cluster(CLUSTERS / "8xa100.yaml").whole
    both = {pair: cluster.joins(*pair) for pair in (("n/gpu0", "n/gpu1"), ("n/gpu0", "n/gpu0"))}
    assert not any(both.values())


def test_ranks_of_a_thousand_machines_are_placed_at_once() -> None:
    cluster = Cluster(name="many", nodes=(Node(name="n", devices=(cpu(64),), count=1000),), network=cpus(1).network)
    began = time.monotonic()
    ((devices, threads),) = _ranks(job_of(processes=64_000), cluster)
    assert time.monotonic() - began < 5
    assert (len(devices), len(set(devices)), threads) == (64_000, 1000, 1)


def test_a_backward_pass_has_the_messages_of_a_forward_pass_once() -> None:
    def passes(bandwidth: float) -> tuple[float, float]:
        link = Link(name="bus", kind="pcie", bandwidth=bandwidth, latency_s=1e-6)
        node = Node(name="n", devices=(Devices(type="a100-sxm-80gb", device=None, count=2),), link=link)
        plan = plan_of("n/gpu0", "n/gpu1", tp=2)
        costs = StepCosts(job_of(), plan, SPEC, Cluster(name="c", nodes=(node,)), plan.order(job_of()))
        return costs._pass_s("layer", True, 0), costs._pass_s("layer", False, 0)

    forward, backward = passes(1e15)
    slow_forward, slow_backward = passes(1e9)
    assert backward == pytest.approx(2 * forward, rel=0.03)
    assert slow_forward - forward == pytest.approx(slow_backward - backward, rel=0.01)


def test_experts_are_summed_over_the_ranks_that_share_them_alone() -> None:
    job = job_of(shape=EXPERTS)
    spec = EXPERTS.spec(vocab=256, positions=1024)
    plan = TrainPlan(devices=tuple(f"node0/gpu{i}" for i in range(8)), layers=(4,), ep=8)
    summed = summed_numels(job, plan, spec, 0)
    experts = 8 * 3 * SHAPE.hidden * SHAPE.ffn * 4 / 8
    assert sum(map(sum, summed.values())) < experts  # the experts' own weights lie on one rank each
    both = replace(plan, ep=4, dp=2)
    groups = {axes: sum(numels) for axes, numels in summed_numels(job, both, spec, 0).items()}
    assert groups[("dp", "cp")] == 2 * experts
    assert groups[("dp", "ep", "cp")] == sum(map(sum, summed.values()))


def test_sums_and_steps_follow_the_optimizer_and_the_type() -> None:
    node = load_cluster(CLUSTERS / "8xa100.yaml")
    plan = plan_of("node0/gpu0", "node0/gpu1", dp=2)

    def costs(**fields: Any) -> StepCosts:
        job = job_of(**fields)
        return StepCosts(job, plan, SPEC, node, plan.order(job))

    adamw, sgd, wide = costs(), costs(optimizer=Optimizer(name="sgd")), costs(dtype="fp64")
    assert sgd.optimizer_s(0) == pytest.approx(adamw.optimizer_s(0) * 3 / 7)
    assert wide.optimizer_s(0) == pytest.approx(2 * adamw.optimizer_s(0))
    assert wide.sum_s(0) == pytest.approx(2 * adamw.sum_s(0), rel=0.2)
    assert wide._pass_s("layer", True, 0) == pytest.approx(2 * adamw._pass_s("layer", True, 0), rel=0.01)


def test_how_a_sequence_is_split_may_be_pinned() -> None:
    node = load_cluster(CLUSTERS / "8xa100.yaml")
    pinned = Layout(cp=2, attention="rsa", cp_layout="contiguous", experts="ep")
    found = {(p.attention, p.cp_layout, p.experts) for p in candidates(job_of(layout=pinned), SPEC, node)}
    assert found == {("rsa", "contiguous", "ep")}
    free = {(p.cp, p.cp_layout) for p in candidates(job_of(sequence=510), SPEC, node)}
    assert free == {(1, "contiguous"), (2, "contiguous"), (4, "contiguous"), (8, "contiguous")}
    even = {(p.cp, p.cp_layout) for p in candidates(job_of(sequence=512), SPEC, node) if p.cp > 1}
    assert even == {(2, "zigzag"), (4, "zigzag"), (8, "zigzag")}
    refused = [p for p in candidates(job_of(sequence=510, layout=Layout(cp=2)), SPEC, node) if p.dp == 4]
    assert all(check(job_of(sequence=510), p, SPEC, node) is None for p in refused)
