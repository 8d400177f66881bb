"""Decode attention against its plain reference, at every level of instructions this machine has."""

from __future__ import annotations

import pytest
import torch

from stretto.kernels import _native
from stretto.kernels.attention import HEAD_DIMS, decode_attention, decode_attention_reference
from stretto.kernels.levels import LEVELS

AVAILABLE = LEVELS[LEVELS.index(_native.best_level()) :]
BOUND = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2}


def case(
    rows: int, kv_heads: int, group: int, dim: int, page_tokens: int, dtype: torch.dtype, longest: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A query within a wider tensor (as the transformer has it), a cache, shuffled tables, ragged lengths."""
    torch.manual_seed(rows * 1000 + dim + page_tokens)
    most = -(-longest // page_tokens)
    layer = torch.randn(rows * most + 1, 2 * kv_heads, page_tokens, dim).to(dtype)
    wide = torch.randn(rows, kv_heads * (group + 2), dim).to(dtype)
    tables = torch.randperm(rows * most + 1)[: rows * most].view(rows, most)
    lengths = torch.randint(1, longest + 1, (rows,))
    lengths[0] = longest
    return wide[:, : kv_heads * group], layer, tables, lengths


@pytest.mark.parametrize("level", AVAILABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_every_level_type_and_width(level: str, dtype: torch.dtype, dim: int) -> None:
    arguments = case(3, 2, 3, dim, 16, dtype, 100)
    found = decode_attention(*arguments, level=level)
    wanted = decode_attention_reference(*arguments)
    torch.testing.assert_close(found, wanted, atol=BOUND[dtype], rtol=BOUND[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [1, 2, 4, 5, 7, 8, 17, 70])
@pytest.mark.parametrize("page_tokens", [1, 7, 64, 200])
def test_any_group_and_page_size(dtype: torch.dtype, group: int, page_tokens: int) -> None:
    arguments = case(4, 2, group, 64, page_tokens, dtype, 200)
    found, wanted = decode_attention(*arguments), decode_attention_reference(*arguments)
    torch.testing.assert_close(found, wanted, atol=BOUND[dtype], rtol=BOUND[dtype])


@pytest.mark.parametrize("level", AVAILABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [*range(1, 66), 127, 128, 129])
def test_every_length_and_what_lies_beyond_it_does_not_count(level: str, dtype: torch.dtype, length: int) -> None:
    query, layer, tables, _ = case(1, 2, 3, 64, 32, dtype, 160)
    lengths = torch.tensor([length])
    found = decode_attention(query, layer, tables, lengths, level=level)
    wanted = decode_attention_reference(query, layer, tables, lengths)
    torch.testing.assert_close(found, wanted, atol=BOUND[dtype], rtol=BOUND[dtype])
    for position in range(length, 160):
        layer[tables[0, position // 32], :, position % 32] = torch.nan
    assert torch.equal(decode_attention(query, layer, tables, lengths, level=level), found)


@pytest.mark.parametrize("level", AVAILABLE)
def test_large_scores_do_not_overflow(level: str) -> None:
    query, layer, tables, lengths = case(2, 1, 3, 64, 32, torch.float32, 90)
    arguments = (query * 40, layer * 10, tables, lengths)
    found = decode_attention(*arguments, level=level)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found, decode_attention_reference(*arguments), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_the_same_in_any_batch(dtype: torch.dtype) -> None:
    query, layer, tables, lengths = case(6, 3, 3, 64, 16, dtype, 150)
    together = decode_attention(query, layer, tables, lengths)
    for row in range(6):
        alone = decode_attention(query[row : row + 1], layer, tables[row : row + 1], lengths[row : row + 1])
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_threads_do_not_change_a_bit(rows: int) -> None:
    torch.set_num_threads(max(2, torch.get_num_threads()))
    query, layer, tables, lengths = case(rows, 3, 3, 64, 64, torch.bfloat16, 400)
    alone = decode_attention(query, layer, tables, lengths, threads=1)
    for threads in (2, 3):
        assert torch.equal(decode_attention(query, layer, tables, lengths, threads=threads), alone)


def test_what_has_no_kernel_is_refused() -> None:
    query, layer, tables, lengths = case(1, 1, 1, 48, 8, torch.float32, 8)
    with pytest.raises(ValueError, match="head_dim 48"):
        decode_attention(query, layer, tables, lengths)
    query, layer, tables, lengths = case(1, 1, 1, 64, 8, torch.float32, 8)
    with pytest.raises(ValueError, match="level is mmx"):
        decode_attention(query, layer, tables, lengths, level="mmx")
