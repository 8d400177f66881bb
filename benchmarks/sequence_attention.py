"""Attention over a sequence that two ranks of one thread share, against one rank with all of it.

One sequence of 4096 tokens, 8 heads of 64, fp32, forward and backward, in turn in one set of processes. RSA is held
against attention that keeps its scores (goal 1.6), blockwise rings against torch's fused attention of the whole
sequence (goal 1.7). Under a causal mask the zigzag layout evens out what the contiguous one leaves to the last rank
(ideal 1.5, goal 1.3). A link of 20 ms a message is hidden behind a block's computing, which takes as long (forward of
1792 tokens, goal 1.3 over waiting for each).
Counted bytes: RSA's live tensors are at most 0.55 of one rank's, blockwise at least 4 times less than RSA's at 8192.

Usage: python benchmarks/sequence_attention.py [--json] [--quick]
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

import harness
import ranks
from stretto.comm.transport import Axis, Disturbance, Transport
from stretto.models.parallel.layout import Layout
from stretto.models.parallel.sequence import Mode, seq_attention
from stretto.train.live import LiveBytes

SHORT, LENGTH, LONG, HEADS, WIDTH = 1792, 4096, 8192, 8, 64
ROUNDS, SEEDS = 7, (0, 1, 2)
DELAY_S = 0.020
GOAL_RSA, GOAL_BLOCKWISE, GOAL_ZIGZAG, GOAL_OVERLAP, GOAL_RSA_BYTES, GOAL_BYTES = 1.6, 1.7, 1.3, 1.3, 0.55, 4.0

Call = Callable[[], None]


def _heads(length: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, HEADS, length, WIDTH, generator=generator).requires_grad_() for _ in range(3)]


def _through(attend: Callable[..., torch.Tensor], heads: Sequence[torch.Tensor]) -> Call:
    gradient = torch.ones_like(heads[0])

    def call() -> None:
        for each in heads:
            each.grad = None
        attend(*heads).backward(gradient)

    return call


def _forward(attend: Callable[..., torch.Tensor], heads: Sequence[torch.Tensor]) -> Call:
    def call() -> None:
        with torch.no_grad():
            attend(*heads)

    return call


def materialised(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ k.mT / math.sqrt(WIDTH)).softmax(-1) @ v


def fused(causal: bool) -> Callable[..., torch.Tensor]:
    return lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=causal)


def split(
    axis: Axis, mode: Mode, *, causal: bool = False, layout: Layout = "contiguous"
) -> Callable[..., torch.Tensor]:
    return lambda q, k, v: seq_attention(q, k, v, axis, causal=causal, mode=mode, layout=layout)


def measure_rank(rank: int, transport: Transport, seed: int, rounds: int) -> dict[str, Any]:
    """Seconds of each way in each round, and counted bytes."""
    axis = transport.axis("rank")
    whole, part = _heads(LENGTH, seed), _heads(LENGTH // axis.size, seed + 10 + rank)
    calls: dict[str, Call] = {
        "materialised": _through(materialised, whole) if rank == 0 else _nothing,
        "fused": _through(fused(False), whole) if rank == 0 else _nothing,
        "rsa": _through(split(axis, "rsa"), part),
        "blockwise": _through(split(axis, "blockwise"), part),
        "contiguous": _through(split(axis, "blockwise", causal=True), part),
        "zigzag": _through(split(axis, "blockwise", causal=True, layout="zigzag"), part),
    }
    seconds = _timed(calls, axis, rounds)
    slow = replace(transport._line, disturbance=Disturbance(delay_s=DELAY_S))  # type: ignore[type-var]
    beside, waiting = Axis("slow", axis.ranks, rank, slow), _Waiting("waiting", axis.ranks, rank, slow)
    short = _heads(SHORT // axis.size, seed)
    links = {
        name: _forward(split(line, "blockwise"), short)
        for name, line in (("overlapped", beside), ("waited for", waiting))
    }
    seconds |= _timed(links, axis, 3 * rounds)
    return {"seconds": seconds, "bytes": _bytes(axis, seed)}


def _nothing() -> None:
    """The other rank's part of what one rank does."""


def _timed(calls: dict[str, Call], axis: Axis, rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, in turn, round by round; both ranks begin and end together."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            axis.barrier()
            begun = time.perf_counter()
            call()
            axis.barrier()
            if turn:
                found[name].append(time.perf_counter() - begun)
    return found


class _Waiting(Axis):
    """An axis on which every exchange is over before the caller goes on."""

    def exchange(self, tensors: Sequence[torch.Tensor], *, to: int, source: int) -> Any:
        from stretto.comm.transport import done

        return done(super().exchange(tensors, to=to, source=source).wait())


def _bytes(axis: Axis, seed: int) -> dict[str, int]:
    """Most bytes of live tensors of one forward and backward."""

    def peak(attend: Callable[..., torch.Tensor], length: int) -> int:
        live = LiveBytes()
        live.around(_through(attend, _heads(length, seed)))
        return live.peak

    found = {
        "rsa": peak(split(axis, "rsa"), LENGTH // axis.size),
        "rsa, long": peak(split(axis, "rsa"), LONG // axis.size),
        "blockwise, long": peak(split(axis, "blockwise"), LONG // axis.size),
    }
    return found | ({"materialised": peak(materialised, LENGTH)} if axis.rank == 0 else {})


def measure(quick: bool) -> list[harness.Row]:
    rounds, seeds = (3, SEEDS[:1]) if quick else (ROUNDS, SEEDS)
    runs = [ranks.run(2, measure_rank, seed, rounds) for seed in seeds]

    def faster(ours: str, peer: str, goal: float, name: str, note: str = "") -> harness.Row:
        def taken(way: str) -> list[float]:
            return [max(pair) for run in runs for pair in zip(*(one["seconds"][way] for one in run), strict=True)]

        mine, theirs = taken(ours), taken(peer)
        quarters = statistics.quantiles(mine, n=4)
        middle = statistics.median(mine)
        return harness.Row(
            name=name,
            ours=middle,
            peer=statistics.median(theirs),
            unit="s",
            goal=goal,
            ratio=statistics.median(theirs) / middle,
            spread=(quarters[2] - quarters[0]) / middle,
            note=note,
        )

    counted = runs[0][0]["bytes"]
    return [
        faster("rsa", "materialised", GOAL_RSA, f"RSA over materialised attention, {LENGTH} tokens"),
        faster("blockwise", "fused", GOAL_BLOCKWISE, f"blockwise over torch's fused attention, {LENGTH} tokens"),
        faster("zigzag", "contiguous", GOAL_ZIGZAG, "zigzag over contiguous, causal", "ideal 1.5"),
        faster("overlapped", "waited for", GOAL_OVERLAP, f"messages of {DELAY_S * 1e3:.0f} ms beside the computing"),
        harness.Row(
            name="RSA's bytes over one rank's",
            ours=counted["rsa"] / counted["materialised"],
            unit="x",
            goal=GOAL_RSA_BYTES,
            at_most=True,
            note=f"{counted['rsa'] / 1e6:.0f} and {counted['materialised'] / 1e6:.0f} MB, {LENGTH} tokens",
        ),
        harness.Row(
            name="RSA's bytes over blockwise",
            ours=counted["rsa, long"] / counted["blockwise, long"],
            unit="x",
            goal=GOAL_BYTES,
            note=f"{counted['rsa, long'] / 1e6:.0f} and {counted['blockwise, long'] / 1e6:.0f} MB, {LONG} tokens",
        ),
    ]


if __name__ == "__main__":
    sys.exit(harness.main(measure, __doc__))
