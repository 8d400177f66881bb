"""Attention of single new tokens over a paged KV cache, on the CPU.

An online softmax (Milakov and Gimelshein, 2018) for each row and KV head runs over the block table as it is: nothing is
gathered, padded or masked, and the order of every sum depends on the row's own length alone, so a row's
result is the same in any batch. Keys and values are read once for up to four query heads.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from stretto.kernels import _native
from stretto.kernels.levels import BEST_LEVEL

if TYPE_CHECKING:
    import torch

HEAD_DIMS = (16, 32, 64, 80, 96, 128)


def decode_attention(
    query: torch.Tensor,
    layer: torch.Tensor,
    tables: torch.Tensor,
    lengths: torch.Tensor,
    *,
    threads: int = 1,
    level: str = BEST_LEVEL,
) -> torch.Tensor:
    """Mix the values of each row's context.

    Args:
        query: fp32 or bf16 [rows, heads, head_dim], the last two dims contiguous; head_dim one of `HEAD_DIMS`.
        layer: one layer of a KV cache, of the same type, contiguous [pages, 2 * kv_heads, page_tokens, head_dim].
        tables: int64 [rows, most pages], each row's pages in order; entries past its length are ignored.
        lengths: int64 [rows], at least 1: tokens of the context, the new one included.
        threads: how many of torch's threads share the rows; the result does not depend on it.
        level: the instructions to use; the best of this machine by default.

    Returns:
        [rows, heads * head_dim] of the query's type.
    """
    rows, heads, dim = query.shape
    _, both, page_tokens, _ = layer.shape
    out = query.new_empty(rows, heads * dim)
    _native.decode_attention(
        level,
        threads,
        query.data_ptr(),
        query.stride(0),
        layer.data_ptr(),
        tables.data_ptr(),
        tables.shape[1],
        lengths.data_ptr(),
        out.data_ptr(),
        rows,
        both // 2,
        heads // (both // 2),
        page_tokens,
        dim,
        query.element_size() == 2,
    )
    return out


def decode_attention_reference(
    query: torch.Tensor, layer: torch.Tensor, tables: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """The same in plain torch and fp64, row by row; the oracle."""
    import torch

    rows, heads, dim = query.shape
    kv_heads, page_tokens = layer.shape[1] // 2, layer.shape[2]
    mixed = []
    for row in range(rows):
        length = int(lengths[row])
        pages = tables[row, : -(-length // page_tokens)]
        found = layer[pages].double().transpose(0, 1).reshape(2 * kv_heads, -1, dim)[:, :length]
        halves = (found[:kv_heads], found[kv_heads:])
        keys, values = (half.repeat_interleave(heads // kv_heads, dim=0) for half in halves)
        scores = (keys @ query[row].double()[:, :, None])[..., 0] / math.sqrt(dim)
        mixed.append((scores.softmax(-1)[:, None] @ values)[:, 0].reshape(-1))
    return torch.stack(mixed).to(query.dtype)
