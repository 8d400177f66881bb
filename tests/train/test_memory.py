"""The predicted most bytes of tensors of a rank against those counted while it trains."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from stretto.train.job import Shape, TrainJob
from stretto.train.live import LiveBytes
from stretto.train.memory import peak_bytes
from stretto.train.plan import TrainPlan
from stretto.train.trainer import Trainer
from tests.comm import pool
from tests.train import kit

SHAPE = Shape(layers=4, hidden=96, heads=6, kv_heads=3, head_dim=16, ffn=200)
EXPERTS = replace(SHAPE, experts=4, top_k=2)
VOCAB = 250
WITHIN, BELOW = 0.05, 0.02
"""A prediction is that near to what was counted, and no more than that below it."""

PLANS: dict[str, dict[str, Any]] = {
    "one": {},
    "one, recompute": {"recompute": True},
    "one, pass of 4": {"micro_batch": 4},
    "dp": {"dp": 2},
    "cp": {"cp": 2},
    "cp rsa": {"cp": 2, "attention": "rsa"},
    "cp zigzag": {"cp": 2, "cp_layout": "zigzag", "micro_batch": 2},
    "tp": {"tp": 2},
    "tp, recompute": {"tp": 2, "recompute": True},
    "pp fill-drain": {"pp": 2, "schedule": "fill-drain"},
    "pp 1f1b": {"pp": 2, "schedule": "1f1b"},
    "pp 1f1b, recompute": {"pp": 2, "schedule": "1f1b", "recompute": True},
    "pp interleaved": {"pp": 2, "schedule": "interleaved", "chunks": 2},
    "pp looped": {"pp": 2, "schedule": "looped", "chunks": 2},
}


def counted_bytes(rank: int, start: pool.Start, job: TrainJob, plan: TrainPlan) -> int:
    """Of two steps of a rank."""
    assert job.shape is not None
    spec = job.shape.spec(vocab=VOCAB, positions=job.sequence)
    data, held_out = kit.samples(job.sequence, VOCAB)
    trainer = Trainer(job, plan, spec, None, data, held_out, start(plan.grid))
    live = LiveBytes()
    for _ in range(2):
        live.around(trainer.train_step)
    return live.peak + trainer.weight_bytes


def check(job: TrainJob, **choices: Any) -> None:
    plan = kit.plan_of(job, **choices)
    assert job.shape is not None
    spec = job.shape.spec(vocab=VOCAB, positions=job.sequence)
    counted = pool.run(plan.grid.world, f"{__name__}:counted_bytes", job, plan)
    for stage, predicted in enumerate(peak_bytes(job, plan, spec)):
        ranks = [rank for rank in range(plan.grid.world) if plan.grid.coordinate(rank, "pp") == stage]
        most = max(counted[rank] for rank in ranks)
        assert 1 - BELOW <= predicted / most <= 1 + WITHIN, (stage, predicted, most)


def job_of(**changes: Any) -> TrainJob:
    return replace(kit.job_of(SHAPE), dtype="fp32", sequence=128, global_batch=8, **changes)


@pytest.mark.parametrize("name", PLANS)
def test_bytes_of_a_plan(name: str) -> None:
    check(job_of(), **PLANS[name])


def test_sgd() -> None:
    check(job_of(optimizer=replace(kit.job_of().optimizer, name="sgd")))


@pytest.mark.parametrize("choices", [{}, {"ep": 2}, {"dp": 2}, {"tp": 2}], ids=str)
def test_experts(choices: dict[str, Any]) -> None:
    """Where lending evens out the load; without it the busiest rank is as full as the router will have it."""
    check(replace(job_of(), shape=EXPERTS), **choices)


def test_mixed_precision() -> None:
    check(replace(job_of(), dtype="bf16"))


@pytest.mark.parametrize("name", ["one", "one, recompute", "tp", "cp zigzag", "pp 1f1b, recompute"])
def test_dropout(name: str) -> None:
    check(replace(job_of(), shape=replace(SHAPE, dropout=0.1)), **PLANS[name])


UNET = replace(SHAPE, layers=6, skips="unet")
"""Three skip connections; over two stages, two of them between the stages and one beside the cut."""


@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"recompute": True},
        {"tp": 2},
        {"pp": 2, "schedule": "fill-drain"},
        {"pp": 2, "schedule": "1f1b", "layers": (3, 3)},
        {"pp": 2, "schedule": "1f1b", "layers": (4, 2), "recompute": True},
        {"pp": 2, "schedule": "interleaved", "chunks": 2},
        {"pp": 3, "schedule": "1f1b"},
    ],
    ids=str,
)
def test_skip_connections(choices: dict[str, Any]) -> None:
    check(replace(job_of(), shape=UNET), **choices)
