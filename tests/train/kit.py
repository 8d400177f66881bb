"""The equivalence kit: any layout against one process in fp64: losses, gradients' norms, weights after some steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from stretto.comm.grid import RankGrid
from stretto.comm.transport import Disturbance, Transport
from stretto.models.causal_weights import part_of
from stretto.train.data import Samples
from stretto.train.job import Adapters, Optimizer, Shape, TrainJob
from stretto.train.plan import AXES, TrainPlan, balanced
from stretto.train.trainer import Trainer
from tests.comm import pool

DENSE = Shape(layers=4, hidden=24, heads=6, kv_heads=3, head_dim=4, ffn=20)
MIXED = Shape(layers=4, hidden=24, heads=4, kv_heads=2, head_dim=4, ffn=12, experts=4, top_k=2)
DROPPED = replace(DENSE, dropout=0.2)
UNET = replace(DENSE, layers=5, skips="unet", dropout=0.2)
MIXED_UNET = replace(MIXED, skips="unet")
VOCAB, LENGTH = 31, 8


def job_of(shape: Shape = DENSE, **changes: Any) -> TrainJob:
    optimizer = changes.pop("optimizer", Optimizer(learning_rate=0.01, clip_norm=0.5, weight_decay=0.1))
    return TrainJob(
        shape=shape,
        dtype="fp64",
        sequence=LENGTH,
        global_batch=8,
        steps=3,
        optimizer=optimizer,
        held_out=0.1,
        **changes,
    )


def plan_of(job: TrainJob, **choices: Any) -> TrainPlan:
    world = int(np.prod([choices.get(axis, 1) for axis in AXES]))
    stages = choices.get("pp", 1) * choices.get("chunks", 1)
    assert job.shape is not None
    spec = job.shape.spec(vocab=VOCAB, positions=LENGTH)
    choices.setdefault("layers", balanced(spec, stages))
    return TrainPlan(devices=("node0/cpu0",) * world, threads=1, **choices)


def samples(length: int = LENGTH, vocab: int = VOCAB) -> tuple[Samples, Samples]:
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, vocab, 60 * length + 1).astype(np.int32)
    kept = rng.integers(0, vocab, 11 * length + 1).astype(np.int32)
    return Samples(tokens=tokens, length=length, seed=1), Samples(tokens=kept, length=length)


def one_rank(
    rank: int, start: pool.Start, job: TrainJob, plan: TrainPlan, jitter_s: float = 0.0, steps: int = 2
) -> dict[str, Any]:
    """Some steps of a rank: losses and norms, its parts of gradients and weights with their places, bytes."""
    transport = start(plan.grid, disturbance=Disturbance(jitter_s=jitter_s, seed=rank))
    assert job.shape is not None
    spec = job.shape.spec(vocab=VOCAB, positions=LENGTH)
    trainer = Trainer(job, plan, spec, None, *samples(), transport)
    seen: dict[str, torch.Tensor] = {}

    class Keep:
        def before(self, step: int, parameters: Any) -> None:
            if step == 0:
                for name, parameter in zip(trainer.trained.names, trainer.trained.parameters, strict=True):
                    assert parameter.grad is not None
                    seen[name] = parameter.grad.clone()

        def after(self, step: int, parameters: Any) -> None: ...

        def flush(self) -> None: ...

    trainer.hooks.append(Keep())
    first = trainer.evaluate()
    reports = [trainer.train_step() for _ in range(steps)]
    places = dict(zip(trainer.trained.names, trainer.trained.places, strict=True))
    return {
        "losses": [report.loss for report in reports],
        "sent_bytes": [report.sent_bytes for report in reports],
        "norms": [report.gradient_norm for report in reports],
        "evaluated": [first, trainer.evaluate()],
        "gradients": {name: (places[name], value) for name, value in seen.items()},
        "weights": {
            name: (places[name], p.detach())
            for name, p in zip(trainer.trained.names, trainer.trained.parameters, strict=True)
        },
        "meter": transport.meter.rows(),
    }


def assembled(found: list[dict[str, Any]], what: str) -> dict[str, torch.Tensor]:
    """Whole tensors from the ranks' parts; where ranks hold the same part, they must agree bit by bit."""
    whole: dict[str, torch.Tensor] = {}
    for one in found:
        for name, (place, part) in one[what].items():
            target = whole.setdefault(name, torch.full(place.shape, float("nan"), dtype=part.dtype))
            here = part_of(target, place, part)
            assert bool(here.isnan().all()) or torch.equal(here, part), f"ranks disagree on {name}"
            here.copy_(part)
    return whole


def run(job: TrainJob, plan: TrainPlan, *, jitter_s: float = 0.0) -> list[dict[str, Any]]:
    return pool.run(plan.grid.world, f"{__name__}:one_rank", job, plan, jitter_s)


def reference(job: TrainJob) -> dict[str, Any]:
    """One process, the whole batch in one pass."""
    return one_process(job, plan_of(job, micro_batch=job.global_batch))


def one_process(job: TrainJob, plan: TrainPlan) -> dict[str, Any]:
    """A plan of one rank, in this process."""

    def start(grid: RankGrid, **_: Any) -> Transport:
        return Transport.start(grid, rank=0, timeout_s=5.0)

    return one_rank(0, start, job, plan)  # type: ignore[arg-type]


def compare(job: TrainJob, plan: TrainPlan, expected: dict[str, Any], *, tight: float = 1e-10) -> list[dict[str, Any]]:
    """Raise unless the plan has the numbers of the reference."""
    found = run(job, plan)
    for one in found:
        for what in ("losses", "norms", "evaluated"):
            np.testing.assert_allclose(one[what], expected[what], rtol=tight, err_msg=f"{what} of {plan}")
    for what in ("gradients", "weights"):
        whole = assembled(found, what)
        tied = whole.pop("lm_head.weight", None)
        names = {name: value for name, (_, value) in expected[what].items()}
        if tied is not None and "lm_head.weight" in names:
            whole["lm_head.weight"] = tied
        elif tied is not None:
            torch.testing.assert_close(
                tied, whole["model.embed_tokens.weight"], rtol=0, atol=0, msg="tied copies differ"
            )
        assert whole.keys() == names.keys()
        for name, value in names.items():
            torch.testing.assert_close(
                whole[name],
                value,
                rtol=tight,
                atol=tight if what == "weights" else tight * 1e-2,
                msg=lambda m, w=what, n=name: f"{w} {n} of {plan}\n{m}",
            )
    return found


def untied(shape: Shape) -> Shape:
    return replace(shape, tied_embeddings=False)


ADAPTERS = Adapters(rank=2, alpha=4.0)
DROPPING_ADAPTERS = replace(ADAPTERS, dropout=0.3)
