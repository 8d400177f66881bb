"""Tensor-parallel operators equal a single rank's, forward and backward, with the bytes that the formula says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, embedding, gelu, linear

from stretto.comm.grid import RankGrid
from stretto.comm.transport import alone
from stretto.models.parallel.tensor import (
    boundary_numel,
    copy_in,
    gather_boundary,
    scatter_boundary,
    share,
    sum_out,
    vocab_cross_entropy,
    vocab_embedding,
)
from tests.comm import pool

HERE = __name__
ROWS, H, F, V = 6, 8, 15, 13


def drawn(name: str, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def mlp(rank: int, start: pool.Start, world: int, dtype: torch.dtype) -> dict[str, Any]:
    transport = start(RankGrid(axes=(("tp", world),)))
    axis = transport.axis("tp")
    mine = share(F, rank, world)
    x = drawn("x", ROWS, H, dtype=dtype).requires_grad_()
    first = drawn("first", F, H, dtype=dtype)[mine.start : mine.stop].clone().requires_grad_()
    second = drawn("second", H, F, dtype=dtype)[:, mine.start : mine.stop].clone().requires_grad_()
    y = sum_out(linear(gelu(linear(copy_in(x, axis), first)), second), axis)
    y.backward(drawn("out", ROWS, H, dtype=dtype))
    return {
        "y": y.detach(),
        "x": x.grad,
        "first": first.grad,
        "second": second.grad,
        "bytes": transport.meter.of("all_reduce", "tp").bytes,
    }


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_mlp_split_by_columns_and_rows(world: int, dtype: torch.dtype) -> None:
    found = pool.run(world, f"{HERE}:mlp", world, dtype)
    x, first, second = (
        drawn(name, *shape, dtype=dtype).requires_grad_()
        for name, shape in (("x", (ROWS, H)), ("first", (F, H)), ("second", (H, F)))
    )
    y = linear(gelu(linear(x, first)), second)
    y.backward(drawn("out", ROWS, H, dtype=dtype))
    tight = 1e-12 if dtype == torch.float64 else 1e-5
    for one in found:
        torch.testing.assert_close(one["y"], y.detach(), rtol=tight, atol=tight)
        torch.testing.assert_close(one["x"], x.grad, rtol=tight, atol=tight)
        assert torch.equal(one["x"], found[0]["x"]), "the same bits on every rank"
        assert one["bytes"] == 2 * (world - 1) * ROWS * H * dtype.itemsize
    for name, reference, dim in (("first", first, 0), ("second", second, 1)):
        torch.testing.assert_close(torch.cat([one[name] for one in found], dim), reference.grad, rtol=tight, atol=tight)


def vocabulary(rank: int, start: pool.Start, world: int, dtype: torch.dtype) -> dict[str, Any]:
    axis = start(RankGrid(axes=(("tp", world),))).axis("tp")
    mine = share(V, rank, world)
    table = drawn("table", V, H, dtype=dtype)[mine.start : mine.stop].clone().requires_grad_()
    tokens = torch.arange(ROWS * 2).view(ROWS, 2) % V
    x = vocab_embedding(tokens, table, axis, mine.start)
    x.backward(drawn("out", ROWS, 2, H, dtype=dtype))
    logits = (drawn("logits", ROWS, V, dtype=dtype) * 1e3)[:, mine.start : mine.stop].clone().requires_grad_()
    losses = vocab_cross_entropy(logits, targets(), axis, mine.start)
    losses.backward(drawn("weights", ROWS, dtype=dtype))
    return {
        "x": x.detach(),
        "table": table.grad,
        "losses": losses.detach(),
        "logits": logits.grad,
    }


def targets() -> torch.Tensor:
    return torch.tensor([0, V - 1, 5, -100, 7, 12])


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_split_vocabulary(world: int, dtype: torch.dtype) -> None:
    found = pool.run(world, f"{HERE}:vocabulary", world, dtype)
    table = drawn("table", V, H, dtype=dtype).requires_grad_()
    x = embedding(torch.arange(ROWS * 2).view(ROWS, 2) % V, table)
    x.backward(drawn("out", ROWS, 2, H, dtype=dtype))
    logits = (drawn("logits", ROWS, V, dtype=dtype) * 1e3).requires_grad_()
    losses = cross_entropy(logits, targets(), reduction="none")
    losses.backward(drawn("weights", ROWS, dtype=dtype))
    tight = 1e-12 if dtype == torch.float64 else 1e-5
    for one in found:
        torch.testing.assert_close(one["x"], x.detach(), rtol=tight, atol=tight)
        torch.testing.assert_close(one["losses"], losses.detach(), rtol=tight, atol=tight)
    torch.testing.assert_close(torch.cat([one["table"] for one in found]), table.grad, rtol=tight, atol=tight)
    torch.testing.assert_close(torch.cat([one["logits"] for one in found], 1), logits.grad, rtol=tight, atol=tight)


def boundary(rank: int, start: pool.Start, world: int) -> tuple[torch.Tensor, torch.Tensor | None, int]:
    axis = start(RankGrid(axes=(("tp", world),))).axis("tp")
    x = drawn("x", 3, 5, dtype=torch.float32)
    part = scatter_boundary(x, axis).clone().requires_grad_()
    whole = gather_boundary(part, axis, x.shape)
    whole.backward(x * 2)
    return whole.detach(), part.grad, boundary_numel(x.numel(), axis)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_boundary_tensor_goes_in_parts_and_comes_out_bit_equal(world: int) -> None:
    x = drawn("x", 3, 5, dtype=torch.float32)
    found = pool.run(world, f"{HERE}:boundary", world)
    assert all(torch.equal(whole, x) for whole, _, _ in found)
    assert torch.equal(torch.cat([gradient for _, gradient, _ in found if gradient is not None]), x.flatten() * 2)
    assert sum(numel for _, _, numel in found) == 15
    assert max(numel for _, _, numel in found) == -(-15 // world)


def test_shares_are_neighbours_and_differ_by_one_at_most() -> None:
    for units in range(1, 12):
        for size in range(1, units + 1):
            shares = [share(units, rank, size) for rank in range(size)]
            assert [unit for each in shares for unit in each] == list(range(units))
            assert {len(each) for each in shares} <= {units // size, -(-units // size)}


def test_one_rank_touches_nothing() -> None:
    x = torch.ones(2, 3, requires_grad=True)
    assert copy_in(x, alone("tp")) is x
    assert sum_out(x, alone("tp")) is x
