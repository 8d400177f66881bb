"""Attention over a split sequence equals attention over the whole one, with its gradients and the formulas' bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stretto.comm.grid import RankGrid
from stretto.comm.transport import alone
from stretto.core.errors import FieldError
from stretto.models.parallel.head_exchange import whole_attention
from stretto.models.parallel.layout import order, pieces
from stretto.models.parallel.sequence import LAYOUTS, MODES, join_sequence, seq_attention, split_sequence
from tests.comm import pool

HERE = __name__
B, D = 2, 8


def heads(name: str, count: int, length: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return (torch.randn(B, count, length, D, generator=generator, dtype=torch.float64) * scale).to(dtype)


def padding(length: int) -> torch.Tensor:
    mask = torch.ones(B, length, dtype=torch.bool)
    mask[0, length - 3 :] = False
    mask[1, :2] = False  # under a causal mask the first rows of sequence 1 see nothing
    return mask


def whole(case: dict[str, Any]) -> list[torch.Tensor]:
    q, k, v = (
        heads(name, case[name], case["length"], case["dtype"], case["scale"] if name != "v" else 1.0).requires_grad_()
        for name in "qkv"
    )
    out = whole_attention(q, k, v, case["causal"], padding(case["length"]) if case["mask"] else None)
    out.backward(heads("out", case["q"], case["length"], case["dtype"]))
    return [out.detach(), *(x.grad for x in (q, k, v) if x.grad is not None)]


def parts(rank: int, start: pool.Start, world: int, cases: list[dict[str, Any]]) -> list[Any]:
    transport = start(RankGrid(axes=(("cp", world),)))
    axis = transport.axis("cp")
    found = []
    for case in cases:
        local = [
            split_sequence(
                heads(name, case[name], case["length"], case["dtype"], case["scale"] if name != "v" else 1.0),
                axis,
                2,
                case["layout"],
            ).requires_grad_()
            for name in "qkv"
        ]
        transport.meter.reset()
        mask = padding(case["length"]) if case["mask"] else None
        out = seq_attention(*local, axis, causal=case["causal"], mode=case["mode"], layout=case["layout"], mask=mask)
        forward = (transport.meter.of("exchange", "cp").bytes, transport.meter.of("exchange", "cp").calls)
        out.backward(split_sequence(heads("out", case["q"], case["length"], case["dtype"]), axis, 2, case["layout"]))
        sent = transport.meter.bytes
        transport.meter.reset()
        joined = [join_sequence(x, axis, 2, case["layout"]) for x in (out.detach(), *(x.grad for x in local))]
        found.append((joined, forward, sent))
    return found


def cases(world: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    return [
        {
            "mode": mode,
            "layout": layout,
            "causal": causal,
            "mask": mask,
            "q": q,
            "k": k,
            "v": k,
            "length": 4 * world,
            "dtype": dtype,
            "scale": 1.0,
        }
        for mode in MODES
        for layout in LAYOUTS
        for causal in (False, True)
        for mask in (False, True)
        for q, k in ((4, 4), (9, 3))
        if not (mode == "all_to_all" and k < world)
    ]


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_mode_and_layout_equals_the_whole(world: int, dtype: torch.dtype) -> None:
    listed = cases(world, dtype)
    found = pool.run(world, f"{HERE}:parts", world, listed)
    tight = 1e-12 if dtype == torch.float64 else 1e-5
    for number, case in enumerate(listed):
        for rank in range(world):
            for ours, reference in zip(found[rank][number][0], whole(case), strict=True):
                torch.testing.assert_close(ours, reference, rtol=tight, atol=tight, msg=lambda m, c=case: f"{c}\n{m}")


@pytest.mark.parametrize("world", [2, 4])
def test_bytes_and_shifts_are_those_of_the_formulas(world: int) -> None:
    listed = [c for c in cases(world, torch.float32) if not c["mask"] and c["mode"] != "all_to_all"]
    for case, found in zip(listed, pool.run(world, f"{HERE}:parts", world, listed)[0], strict=True):
        block = B * case["k"] * (case["length"] // world) * D * 4
        (forward_bytes, calls), sent = found[1], found[2]
        assert forward_bytes == 2 * (world - 1) * block
        assert calls == (world - 1) * (2 if case["mode"] == "rsa" else 1)
        assert sent == 6 * (world - 1) * block


def test_same_bits_on_every_run() -> None:
    listed = [c for c in cases(3, torch.float32) if c["causal"]]
    first, second = (pool.run(3, f"{HERE}:parts", 3, listed) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        for one, other in zip(a, b, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(one[0], other[0], strict=True))


@pytest.mark.parametrize("mode", ["rsa", "blockwise"])
def test_very_large_scores_do_not_overflow(mode: str) -> None:
    case = {"mode": mode, "layout": "contiguous", "causal": True, "mask": False, "q": 2, "k": 2, "v": 2}
    case |= {"length": 8, "dtype": torch.float32, "scale": 100.0}
    joined = pool.run(2, f"{HERE}:parts", 2, [case])[0][0][0]
    assert all(bool(x.isfinite().all()) for x in joined)
    torch.testing.assert_close(joined[0], whole(case)[0], rtol=1e-4, atol=1e-4)


def largest(rank: int, start: pool.Start, mode: str, length: int) -> int:
    """Elements of the largest tensor that an operation of forward and backward makes."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else [out]:
                if isinstance(x, torch.Tensor):
                    self.most = max(self.most, x.untyped_storage().nbytes() // x.element_size())
            return out

    axis = start(RankGrid(axes=(("cp", 2),))).axis("cp")
    local = [split_sequence(heads(n, 2, length, torch.float32), axis, 2, "contiguous").requires_grad_() for n in "qkv"]
    with Largest() as seen:
        seq_attention(*local, axis, causal=True, mode=mode).sum().backward()  # type: ignore[arg-type]
    return seen.most


def test_scores_are_held_in_rows_by_rsa_and_not_at_all_blockwise() -> None:
    length = 512
    assert set(pool.run(2, f"{HERE}:largest", "rsa", length)) == {B * 2 * (length // 2) * length}
    assert max(pool.run(2, f"{HERE}:largest", "blockwise", length)) <= B * 2 * (length // 2) * D


def test_one_rank_is_torchs_own_attention() -> None:
    q, k, v = (heads(name, 4, 12, torch.float32) for name in "qkv")
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    for mode in MODES:
        assert torch.equal(seq_attention(q, k, v, alone("cp"), causal=True, mode=mode), expected)  # type: ignore[arg-type]


def test_zigzag_gives_every_rank_the_same_work() -> None:
    def pairs(size: int, layout: str) -> list[int]:
        held = [[i for piece in pieces(48, place, size, layout) for i in piece] for place in range(size)]  # type: ignore[arg-type]
        return [sum(i + 1 for i in own) for own in held]

    assert len(set(pairs(4, "zigzag"))) == 1
    assert len(set(pairs(4, "contiguous"))) == 4
    assert sorted(order(48, 4, "zigzag").tolist()) == list(range(48))


def test_lengths_that_do_not_divide_and_too_many_ranks_are_refused() -> None:
    with pytest.raises(FieldError, match="length is 10; it must be a multiple of 4"):
        pieces(10, 0, 2, "zigzag")
    q = heads("q", 2, 4, torch.float32)
    with pytest.raises(FieldError, match="attention is 'flash'"):
        seq_attention(q, q, q, alone("cp"), causal=True, mode="flash")  # type: ignore[arg-type]
    with pytest.raises(pool.RankFailed, match="cp is 2; it must be at most the 1 KV heads"):
        pool.run(2, f"{HERE}:parts", 2, [{**cases(2, torch.float32)[0], "mode": "all_to_all", "q": 2, "k": 1, "v": 1}])
