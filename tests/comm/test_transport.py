"""Messages between real processes: right values, the same bits everywhere, bytes by the formula, and no hangs."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch

from stretto.comm.grid import RankGrid
from stretto.comm.transport import Axis, Disturbance, alone
from tests.comm import pool

HERE = __name__


def grid(world: int) -> RankGrid:
    return RankGrid(axes=(("x", world),))


def drawn(rank: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(rank), dtype=torch.float64).to(dtype)


def sums(rank: int, start: pool.Start, world: int, numel: int, jitter_s: float) -> tuple[list[float], int, list[float]]:
    bad = Disturbance(jitter_s=jitter_s, seed=rank)
    transport = start(grid(world), disturbance=bad)
    axis = transport.axis("x")
    total = axis.all_reduce_(drawn(rank, numel))
    sent = transport.meter.of("all_reduce", "x").bytes
    part = axis.reduce_scatter(drawn(rank, numel))
    return total.tolist(), sent, part.tolist()


@pytest.mark.parametrize(("world", "numel"), [(2, 7), (2, 50_001), (3, 10), (3, 50_001), (4, 40_000)])
def test_sums_are_taken_in_rank_order_with_the_bytes_of_a_ring(world: int, numel: int) -> None:
    expected = drawn(0, numel)
    for rank in range(1, world):
        expected = expected + drawn(rank, numel)
    steady = pool.run(world, f"{HERE}:sums", world, numel, 0.0)
    assert pool.run(world, f"{HERE}:sums", world, numel, 0.02) == steady, "delays change no bit"
    for total, _, _ in steady:
        assert torch.equal(torch.tensor(total), expected)
    assert torch.equal(torch.tensor([x for _, _, part in steady for x in part]), expected)
    sent = sum(bytes_ for _, bytes_, _ in steady)
    if world == 2 or numel * 4 <= 16384:
        assert sent == world * (world - 1) * 4 * numel
    else:
        assert sent == 2 * (world - 1) * 4 * numel


def rounds(rank: int, start: pool.Start, world: int) -> dict[str, Any]:
    transport = start(grid(world))
    axis = transport.axis("x")
    own = torch.full((rank + 1, 2), float(rank))
    everybody = axis.all_gather(own, sizes=[place + 1 for place in range(world)])
    across = axis.all_gather(own.T.contiguous(), dim=1, sizes=[place + 1 for place in range(world)])
    send = [to + rank for to in range(world)]
    rows = torch.cat([torch.full((n,), 10.0 * rank + to) for to, n in enumerate(send)])
    dealt = axis.all_to_all(rows, send, [rank + source for source in range(world)])
    passed = axis.exchange([own[:1], own[:1] + 0.5], to=(rank + 1) % world, source=(rank - 1) % world).wait()
    largest = axis.maximum_(torch.tensor([float(rank), -float(rank)]))
    told = axis.broadcast_(torch.full((3,), float(rank)), root=world - 1)
    axis.barrier()
    return {
        "everybody": everybody.tolist(),
        "across": across.T.tolist(),
        "dealt": dealt.tolist(),
        "passed": [float(t[0, 0]) for t in passed],
        "largest": largest.tolist(),
        "told": told.tolist(),
        "bytes": transport.meter.of("all_gather", "x").bytes,
    }


@pytest.mark.parametrize("world", [2, 3])
def test_rounds_bring_everything_to_its_place(world: int) -> None:
    found = pool.run(world, f"{HERE}:rounds", world)
    gathered = [[float(place)] * 2 for place in range(world) for _ in range(place + 1)]
    for rank, one in enumerate(found):
        assert one["everybody"] == one["across"] == gathered
        assert one["dealt"] == [10.0 * source + rank for source in range(world) for _ in range(source + rank)]
        assert one["passed"] == [(rank - 1) % world, (rank - 1) % world + 0.5]
        assert one["largest"] == [world - 1.0, 0.0]
        assert one["told"] == [world - 1.0] * 3
        assert one["bytes"] == 2 * (world - 1) * (rank + 1) * 8


def large_both_ways(rank: int, start: pool.Start) -> float:
    axis = start(grid(2)).axis("x")
    (came,) = axis.exchange([torch.full((4_000_000,), float(rank))], to=1 - rank, source=1 - rank).wait()
    return float(came.mean())


def test_large_messages_both_ways_do_not_wait_for_each_other() -> None:
    assert pool.run(2, f"{HERE}:large_both_ways") == [1.0, 0.0]


def overtaking(rank: int, start: pool.Start) -> list[float]:
    axis = start(grid(2)).axis("x")
    aside = axis.apart("weights")
    if rank == 0:
        pending = [aside.send(torch.ones(1), 1), axis.send(torch.zeros(1), 1)]
        return [float(each.wait()) for each in pending]
    return [float(axis.receive(torch.empty(1), 0).wait()), float(aside.receive(torch.empty(1), 0).wait())]


def test_a_line_apart_does_not_mix_with_the_axis() -> None:
    assert pool.run(2, f"{HERE}:overtaking") == [[1.0, 0.0], [0.0, 1.0]]


def delayed(rank: int, start: pool.Start, disturbance: Disturbance) -> tuple[float, float]:
    axis = start(grid(2), disturbance=disturbance).axis("x")
    axis.barrier()
    begun = time.perf_counter()
    pending = axis.exchange([torch.zeros(25_000)], to=1 - rank, source=1 - rank)
    posted = time.perf_counter() - begun
    pending.wait()
    return posted, time.perf_counter() - begun


@pytest.mark.parametrize("bad", [Disturbance(delay_s=0.2), Disturbance(bytes_per_s=5e5)])
def test_a_slow_link_delays_what_comes_and_not_who_asks(bad: Disturbance) -> None:
    for posted, waited in pool.run(2, f"{HERE}:delayed", bad):
        assert posted < 0.15
        assert 0.2 <= waited < 0.6


def lost(rank: int, start: pool.Start, how: str) -> str:
    bad = Disturbance(silent_after=1) if how == "silent" and rank == 1 else None
    axis = start(grid(2), timeout_s=3.0, disturbance=bad).axis("x")
    axis.barrier()
    if how == "dead" and rank == 1:
        os._exit(1)
    begun = time.perf_counter()
    try:
        axis.all_reduce_(torch.ones(10))
    except RuntimeError as problem:
        assert time.perf_counter() - begun < 8.0
        return f"{type(problem).__name__}: {problem}"
    return "nothing"


def test_a_silent_rank_ends_the_call_in_time_and_is_named() -> None:
    waiting, silent = pool.outcomes(2, f"{HERE}:lost", "silent")
    assert "RankLost: rank 0: all_reduce over axis x with rank 1 failed (limit 3 s)" in waiting
    assert "made to fall silent" in silent


def test_a_dead_rank_fails_the_others_soon() -> None:
    with pytest.raises(pool.RankFailed, match="rank 1: died"):
        pool.run(2, f"{HERE}:lost", "dead")


def test_an_axis_of_one_rank_moves_nothing() -> None:
    axis = alone("tp")
    x = torch.arange(6.0)
    assert axis.all_reduce_(x) is x
    assert axis.all_gather(x) is x
    assert axis.all_to_all(x, [6], [6]) is x
    assert axis.exchange([x], to=0, source=0).wait() == [x]
    axis.barrier()
    assert isinstance(axis, Axis)
    assert (axis.rank, axis.size) == (0, 1)
