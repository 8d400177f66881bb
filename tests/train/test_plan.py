"""Which plans are weighed, and why the others cannot run: the numbers, and a change that does help."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stretto.core.errors import FieldError, UserError
from stretto.files import load_cluster
from stretto.hardware import catalog
from stretto.hardware.cluster import Cluster, Devices, Node
from stretto.train.check import check
from stretto.train.domain import TrainDomain
from stretto.train.job import Adapters, Layout, Limits, Shape, TrainJob
from stretto.train.plan import TrainPlan, balanced, candidates
from tests.train import kit

CLUSTERS = Path(__file__).parents[2] / "clusters"
SPEC = kit.DENSE.spec(vocab=kit.VOCAB, positions=kit.LENGTH)


@pytest.fixture(scope="module")
def node() -> Cluster:
    return load_cluster(CLUSTERS / "8xa100.yaml")


def plan_of(**choices: Any) -> TrainPlan:
    plan = kit.plan_of(kit.job_of(), **choices)
    return replace(plan, devices=tuple(f"node0/gpu{rank}" for rank in range(plan.grid.world)), threads=None)


def test_every_factoring_of_the_devices_is_weighed_once(node: Cluster) -> None:
    job = kit.job_of(kit.MIXED, recompute="never", layout=Layout(micro_batch=1, schedule="1f1b"))
    spec = kit.MIXED.spec(vocab=kit.VOCAB, positions=kit.LENGTH)
    found = [(p.pp, p.dp, p.ep, p.cp, p.tp) for p in candidates(job, spec, node)]
    assert len(found) == len(set(found))
    divisors = (1, 2, 4, 8)
    every = {
        (pp, dp, ep, cp, 8 // (pp * dp * ep * cp))
        for pp in divisors
        for dp in divisors
        for ep in divisors
        for cp in divisors
        if 8 % (pp * dp * ep * cp) == 0 and pp <= spec.layers
    }
    assert set(found) == every


def test_what_a_job_pins_stays(node: Cluster) -> None:
    job = kit.job_of(layout=Layout(tp=2, schedule="fill-drain"), recompute="always", processes=4)
    plans = list(candidates(job, SPEC, node))
    assert plans
    assert {(p.tp, p.schedule, p.recompute, p.grid.world) for p in plans} == {(2, "fill-drain", True, 4)}


def test_a_legal_plan_is_not_refused(node: Cluster) -> None:
    legal = [p for p in candidates(kit.job_of(), SPEC, node) if check(kit.job_of(), p, SPEC, node) is None]
    assert {axis for p in legal for axis in ("dp", "cp", "tp", "pp") if getattr(p, axis) > 1} == {
        "dp",
        "cp",
        "tp",
        "pp",
    }


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str, str]] = [
    ({"global_batch": 9}, {"dp": 4}, "a batch of 9 sequences does not divide by 4 data ranks x 1", "global_batch of 8"),
    ({}, {"tp": 4}, "tp is 4, but the model has 3 KV heads", "tp 3 would do"),
    ({}, {"pp": 2, "layers": (1, 1)}, "the stages have 2 layers, the model 4", "layers"),
    ({}, {"ep": 2}, "ep is 2, but the model has 0 experts", "ep 1"),
    ({}, {"cp": 4, "attention": "all_to_all"}, "cp is 4, but a rank of tp 1 has 3 KV heads", "blockwise"),
    ({"sequence": 9}, {"cp": 2}, "9", "a sequence of 10"),
    ({}, {"pp": 2, "schedule": "interleaved", "chunks": 2, "micro_batch": 8}, "1", "1f1b takes any number"),
    ({}, {"pp": 2, "chunks": 2}, "chunks is 2; it must be 1 for 1f1b", "chunks 1"),
    ({}, {"pp": 2, "schedule": "interleaved"}, "chunks is 1; it must be at least 2", "chunks 2"),
    ({}, {"chunks": 2, "schedule": "interleaved"}, "2 chunks on one pipeline rank", "chunks 1, or pp 2"),
]


@pytest.mark.parametrize(("changes", "choices", "reason", "nearest"), REFUSED)
def test_refusals_name_the_numbers_and_a_change_that_helps(
    changes: dict[str, Any], choices: dict[str, Any], reason: str, nearest: str, node: Cluster
) -> None:
    job = replace(kit.job_of(), **changes)
    refusal = check(job, plan_of(**choices), SPEC, node)
    assert refusal is not None
    assert reason in refusal.reason
    assert nearest in refusal.nearest


def test_devices_of_other_machines_are_refused(node: Cluster) -> None:
    refusal = check(kit.job_of(), replace(plan_of(), devices=("node9/gpu0",)), SPEC, node)
    assert refusal is not None
    assert refusal.reason == "there is no device node9/gpu0"
    assert refusal.nearest.startswith("it has node0/gpu0, ")


@pytest.mark.parametrize(
    ("layout", "processes", "says"),
    [
        (
            Layout(pp=2),
            3,
            r"layout: pp 2 takes 2 ranks or a multiple, there are 3; degrees that divide 3, or `processes: 2`",
        ),
        (Layout(tp=2, dp=3), 4, r"layout: dp 3 x tp 2 takes 6 ranks or a multiple, there are 4; .*`processes: 6`"),
        (Layout(pp=8), 8, r"layout: asks for 8 stages of 4 layers; at most 4, one layer each"),
    ],
)
def test_degrees_that_no_number_of_ranks_has_are_told(layout: Layout, processes: int, says: str, node: Cluster) -> None:
    with pytest.raises(UserError, match=says):
        list(candidates(kit.job_of(layout=layout, processes=processes), SPEC, node))


def test_the_bound_counts_every_machine() -> None:
    cpu = Devices(device=replace(catalog.device("h100-sxm"), name="cpu", kind="cpu", units=4))
    many = Cluster(name="many", nodes=(Node(name="n", devices=(cpu,), count=4),))
    paths = tuple(many.devices())
    job, domain = kit.job_of(), TrainDomain()
    one, four = (replace(plan_of(dp=n), devices=paths[:n]) for n in (1, 4))
    assert domain.bound(job, four, many) == 4 * domain.bound(job, one, many)


def test_the_nearest_batch_and_sequence_are_legal(node: Cluster) -> None:
    plan = plan_of(dp=4)
    assert check(replace(kit.job_of(), global_batch=8), plan, SPEC, node) is None
    assert check(replace(kit.job_of(), sequence=10), plan_of(cp=2), SPEC, node) is None
    assert check(kit.job_of(), plan_of(tp=3), SPEC, node) is None


def test_too_little_memory_is_refused_with_both_figures(node: Cluster) -> None:
    job = kit.job_of(limits=Limits(memory_gb=0.0001))
    refusal = check(job, plan_of(), SPEC, node)
    assert refusal is not None
    assert "may have 0.00 GB" in refusal.reason
    assert "recompute needs less" in refusal.nearest


@pytest.mark.parametrize(
    ("choices", "field"),
    [
        ({"dp": 0}, "dp"),
        ({"schedule": "zigzag"}, "schedule"),
        ({"layers": ()}, "layers"),
        ({"layers": (0,)}, "layers"),
        ({"threads": 0}, "threads"),
        ({"devices": ("a",) * 3}, "devices"),
    ],
)
def test_a_plan_that_makes_no_sense(choices: dict[str, Any], field: str) -> None:
    with pytest.raises(FieldError) as raised:
        TrainPlan(**{"devices": ("a",), "layers": (4,), **choices})
    assert raised.value.field == field


def test_stages_are_balanced_with_the_head_counted() -> None:
    heavy = Shape(layers=6, hidden=32, heads=2, kv_heads=2, ffn=64).spec(vocab=4000, positions=8)
    assert balanced(heavy, 2) == (5, 1)
    light = replace(heavy, vocab=10)
    assert balanced(light, 2) == (3, 3)


JOBS: list[tuple[dict[str, Any], str]] = [
    ({"model": "smollm2", "shape": kit.DENSE}, "model"),
    ({}, "model"),
    ({"shape": kit.DENSE, "adapters": Adapters()}, "adapters"),
    ({"model": "smollm2", "tokenizer": "bytes"}, "tokenizer"),
    ({"shape": kit.DENSE, "data": ()}, "data"),
    ({"shape": kit.DENSE, "sequence": 4}, "sequence"),
    ({"shape": kit.DENSE, "global_batch": 0}, "global_batch"),
    ({"shape": kit.DENSE, "steps": 0}, "steps"),
    ({"shape": kit.DENSE, "processes": 0}, "processes"),
    ({"shape": kit.DENSE, "save_every": 5}, "checkpoint"),
    ({"shape": kit.DENSE, "export": "out"}, "checkpoint"),
    ({"shape": kit.UNET, "export": "out", "checkpoint": "kept"}, "export"),
    ({"shape": kit.DENSE, "held_out": 0.7}, "held_out"),
    ({"shape": kit.DENSE, "keep": 0}, "keep"),
    ({"shape": kit.DENSE, "timeout_s": 0}, "timeout_s"),
    ({"shape": kit.DENSE, "evaluate_every": 0}, "evaluate_every"),
]


@pytest.mark.parametrize(("fields", "wrong"), JOBS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_job_that_makes_no_sense(fields: dict[str, Any], wrong: str) -> None:
    with pytest.raises(FieldError) as raised:
        TrainJob(**fields)
    assert raised.value.field == wrong


@pytest.mark.parametrize(
    ("wrong", "make"),
    [
        ("dropout", lambda: replace(kit.DENSE, dropout=1.0)),
        ("dropout", lambda: Adapters(dropout=-0.1)),
        ("layers", lambda: replace(kit.DENSE, layers=1, skips="unet")),
        ("skips", lambda: replace(kit.DENSE, skips="ladder")),
    ],
)
def test_a_shape_that_makes_no_sense(wrong: str, make: Callable[[], object]) -> None:
    with pytest.raises(FieldError) as raised:
        make()
    assert raised.value.field == wrong


@pytest.mark.parametrize(
    ("layers", "skips"),
    [
        ((5,), ((0, 0), (0, 0))),
        ((3, 2), ((0, 1), (0, 1))),
        ((2, 3), ((0, 1), (1, 1))),  # what layer 1 makes enters stage 1 anyway
        ((1, 4), ((1, 1), (1, 1))),
        ((1, 1, 1, 2), ((0, 3), (1, 3))),
    ],
)
def test_skip_connections_lead_from_stage_to_stage(layers: tuple[int, ...], skips: tuple[tuple[int, int], ...]) -> None:
    job = kit.job_of(kit.UNET)
    order = kit.plan_of(job, pp=len(layers), layers=layers).order(job)
    assert order.skips == skips
    order.check()
