"""Two ranks of one thread against one, on the same model, mini-batch and data: pipelines, data ranks, and their peers.

A small decoder (8 layers of 320, sequences of 256) takes one optimizer step over M micro-batches in each way, in turn,
in one set of processes. Ideal for a pipeline of two is 2 M / (M + 1) times one rank. Goals: 0.92 of it with 1F1B, 0.87
with fill-drain (above 1.02 the baseline is broken and the row void); 1.55 times plain accumulation at M = 8. Beside
them torch.distributed.pipelining on the same stages, and DDP. Recompute may cost 1.40 times.
Of interleaved against plain 1F1B at M = 2 the card's aim is 1.12 (ideal 1.20).

Usage: python benchmarks/train_pipeline.py [--json] [--quick]
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import harness
import ranks
from stretto.comm.transport import Transport
from stretto.models.causal import CausalStage
from stretto.train.data import Samples
from stretto.train.job import Optimizer, Shape, TrainJob
from stretto.train.plan import TrainPlan
from stretto.train.trainer import Trainer

SHAPE = Shape(layers=8, hidden=320, heads=5, kv_heads=5, ffn=960)
LENGTH, VOCABULARY = 256, 256
ROUNDS, WARM_UP, SEEDS = 4, 2, (0, 1, 2)
GOAL_1F1B, GOAL_FILL_DRAIN, GOAL_PLAIN, GOAL_RECOMPUTE, GOAL_INTERLEAVED = 0.92, 0.87, 1.55, 1.40, 1.12
VOID = 1.02


@dataclass(frozen=True)
class Way:
    """How a step is taken; `ranks` take part, the other waits."""

    name: str
    micro_batches: int
    ranks: int = 2
    schedule: str = "1f1b"
    chunks: int = 1
    recompute: bool = False
    peer: str = ""


def ways(count: int) -> list[Way]:
    return [
        Way("one rank", count, ranks=1),
        Way("1f1b", count),
        Way("fill-drain", count, schedule="fill-drain"),
        Way("torch 1f1b", count, peer="1f1b"),
        Way("torch gpipe", count, peer="gpipe"),
        Way("data ranks", count, schedule="data"),
        Way("ddp", count, peer="ddp"),
    ]


FEW = [Way("one rank", 2, ranks=1), Way("1f1b", 2), Way("interleaved", 2, schedule="interleaved", chunks=2)]
AGAIN = [Way("one rank", 8, ranks=1), Way("one rank, recompute", 8, ranks=1, recompute=True)]


def job_of(count: int, seed: int) -> TrainJob:
    return TrainJob(
        shape=SHAPE,
        tokenizer="bytes",
        sequence=LENGTH,
        global_batch=count,
        optimizer=Optimizer(learning_rate=1e-3, clip_norm=None),
        held_out=0.0,
        seed=seed,
    )


def plan_of(way: Way) -> TrainPlan:
    data = way.schedule == "data"
    stages = 1 if data or way.ranks == 1 else way.ranks * way.chunks
    return TrainPlan(
        devices=("cpu",) * way.ranks,
        threads=1,
        pp=1 if data else way.ranks,
        dp=way.ranks if data else 1,
        schedule="1f1b" if data else way.schedule,
        chunks=way.chunks,
        layers=(SHAPE.layers // stages,) * stages,
        recompute=way.recompute,
    )


def samples(seed: int) -> Samples:
    tokens = np.random.default_rng(seed).integers(0, VOCABULARY, 64 * LENGTH + 1).astype(np.int32)
    return Samples(tokens=tokens, length=LENGTH, seed=seed)


def measure_rank(rank: int, transport: Transport, listed: Sequence[Way], seed: int, rounds: int) -> list[list[float]]:
    """Seconds of each round of each way; all ranks begin and end a step together."""
    everyone = transport.axis("rank")
    steps = [_step(way, rank, transport, seed) for way in listed]
    found: list[list[float]] = [[] for _ in listed]
    for turn in range(WARM_UP + rounds):
        for place in [(turn + shift) % len(listed) for shift in range(len(listed))]:
            everyone.barrier()
            begun = time.perf_counter()
            steps[place]()
            everyone.barrier()
            if turn >= WARM_UP:
                found[place].append(time.perf_counter() - begun)
    return found


def _step(way: Way, rank: int, transport: Transport, seed: int) -> Callable[[], Any]:
    if rank >= way.ranks:
        return lambda: None
    if way.peer:
        return _peer(way, rank, seed)
    plan = plan_of(way)
    axes = plan.grid
    own = Transport(axes, rank, transport._line) if way.ranks > 1 else Transport.start(axes, rank=0, timeout_s=60.0)
    job = job_of(way.micro_batches, seed)
    spec = SHAPE.spec(vocab=VOCABULARY, positions=LENGTH)
    return Trainer(job, plan, spec, None, samples(seed), samples(seed), own).train_step


def _batch(way: Way, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    data = samples(seed)
    tokens, targets = data.at(data.batch(0, way.micro_batches))
    return torch.from_numpy(tokens), torch.from_numpy(targets)


class _Piece(torch.nn.Module):
    """The same layers for torch's pipelines: tokens or rows in, rows or logits out."""

    def __init__(self, stage: CausalStage):
        super().__init__()
        self.stage = stage

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        stage = self.stage
        if stage.model.norm is None:
            return stage(x, length=LENGTH)  # type: ignore[no-any-return]
        if stage.model.embed_tokens is not None:
            x = stage.model.embed_tokens.embed(x)
        turns = stage._turn(LENGTH)
        for layer in stage.model.layers.values():
            x = layer(x, turns)
        return stage.model.norm(x) @ stage.head.weight.T  # type: ignore[no-any-return]


def _loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return cross_entropy(logits.flatten(0, 1), targets.flatten())


def _peer(way: Way, rank: int, seed: int) -> Callable[[], Any]:
    torch.manual_seed(seed)
    spec = SHAPE.spec(vocab=VOCABULARY, positions=LENGTH)
    tokens, targets = _batch(way, seed)
    if way.peer == "ddp":
        model = DistributedDataParallel(_Piece(_initialised(CausalStage(spec))))
        mine = slice(rank * len(tokens) // 2, (rank + 1) * len(tokens) // 2)
        return _ddp_step(model, tokens[mine].split(1), targets[mine].split(1))
    half = SHAPE.layers // 2
    layers = range(half) if rank == 0 else range(half, SHAPE.layers)
    module = _Piece(_initialised(CausalStage(spec, layers, first=rank == 0, last=rank == 1)))
    stage = PipelineStage(module, rank, 2, torch.device("cpu"))
    kind = Schedule1F1B if way.peer == "1f1b" else ScheduleGPipe
    schedule = kind(stage, way.micro_batches, loss_fn=_loss)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, foreach=True)

    def step() -> None:
        optimizer.zero_grad()
        schedule.step(tokens) if rank == 0 else schedule.step(target=targets)
        optimizer.step()

    return step


def _ddp_step(
    model: DistributedDataParallel, tokens: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]
) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=True)

    def step() -> None:
        optimizer.zero_grad()
        with model.no_sync():
            for x, y in zip(tokens[:-1], targets[:-1], strict=True):
                (_loss(model(x), y) / len(tokens)).backward()
        (_loss(model(tokens[-1]), targets[-1]) / len(tokens)).backward()
        optimizer.step()

    return step


def _initialised(stage: CausalStage) -> CausalStage:
    from stretto.models.causal_weights import initialise

    initialise(stage, seed=0)
    return stage


def ratios(listed: Sequence[Way], base: str, rounds: int, seeds: Sequence[int]) -> dict[str, list[float]]:
    """Of each way, how many times as fast as `base` it is, round by round, over all seeds."""
    found: dict[str, list[float]] = {}
    for seed in seeds:
        by_rank = ranks.run(2, measure_rank, listed, seed, rounds)
        seconds = [[max(pair) for pair in zip(*each, strict=True)] for each in zip(*by_rank, strict=True)]
        at = next(i for i, way in enumerate(listed) if way.name == base)
        for way, taken in zip(listed, seconds, strict=True):
            found.setdefault(way.name, []).extend(b / t for b, t in zip(seconds[at], taken, strict=True))
    return found


def _row(
    name: str, values: Sequence[float], goal: float | None, ideal: float | None = None, **fields: Any
) -> harness.Row:
    quarters = statistics.quantiles(values, n=4)
    middle = statistics.median(values)
    judged = middle if ideal is None else middle / ideal
    note = f"ideal {ideal:.3f}" if ideal else ""
    if ideal and judged > VOID:
        note += "; VOID: above what can be, the baseline is broken"
    return harness.Row(
        name=name,
        ours=middle,
        unit="x one rank",
        goal=goal,
        ratio=judged,
        spread=(quarters[2] - quarters[0]) / middle,
        note=note,
        **fields,
    )


def measure(quick: bool) -> list[harness.Row]:
    rounds, seeds = (3, SEEDS[:1]) if quick else (ROUNDS, SEEDS)
    rows = []
    for count in (8, 16):
        ideal = 2 * count / (count + 1)
        found = ratios(ways(count), "one rank", rounds, seeds)
        for name, goal in (("1f1b", GOAL_1F1B), ("fill-drain", GOAL_FILL_DRAIN)):
            peer = statistics.median(found["torch 1f1b" if name == "1f1b" else "torch gpipe"])
            rows.append(_row(f"{name}, {count} micro-batches", found[name], goal, ideal, peer=peer))
        rows.append(_row(f"torch's 1f1b, {count} micro-batches", found["torch 1f1b"], None, ideal))
        rows.append(_row(f"torch's fill-drain, {count} micro-batches", found["torch gpipe"], None, ideal))
        if count == 8:
            rows.append(_row("1f1b over plain accumulation, 8 micro-batches", found["1f1b"], GOAL_PLAIN))
        peer = statistics.median(found["ddp"])
        rows.append(_row(f"two data ranks, {count} micro-batches", found["data ranks"], None, 2.0, peer=peer))
        rows.append(_row(f"DDP, {count} micro-batches", found["ddp"], None, 2.0))
    found = ratios(FEW, "1f1b", rounds, seeds)
    rows.append(
        replace(_row("interleaved over 1f1b, 2 micro-batches", found["interleaved"], GOAL_INTERLEAVED), unit="x")
    )
    found = ratios(AGAIN, "one rank", rounds, seeds)
    cost = [1 / value for value in found["one rank, recompute"]]
    rows.append(replace(_row("recompute", cost, GOAL_RECOMPUTE), unit="x the seconds", at_most=True))
    return rows


if __name__ == "__main__":
    sys.exit(harness.main(measure, __doc__))
