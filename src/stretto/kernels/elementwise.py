"""What a decoder layer does between its products, on the CPU: one native pass over the data each.

torch takes three to six passes for each of these, with a temporary tensor between any two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stretto.kernels import _native
from stretto.kernels.levels import BEST_LEVEL

if TYPE_CHECKING:
    import torch


def rotate(heads: torch.Tensor, turns: torch.Tensor, *, threads: int = 1, level: str = BEST_LEVEL) -> None:
    """Turn each pair of neighbours of every head by its angle, in place.

    Args:
        heads: fp32 or bf16 [rows, heads, head_dim], the last two dims contiguous, head_dim even.
        turns: contiguous complex64 [rows, head_dim / 2] (or [rows, 1, head_dim / 2]), e^(i angle) of each pair.
        threads: how many of torch's threads share the rows.
        level: the instructions to use.
    """
    rows, count, dim = heads.shape
    _native.rotate(
        level,
        threads,
        heads.data_ptr(),
        heads.stride(0),
        turns.data_ptr(),
        rows,
        count,
        dim,
        heads.element_size() == 2,
    )


def gated_silu(both: torch.Tensor, *, threads: int = 1, level: str = BEST_LEVEL) -> torch.Tensor:
    """silu(gate) * up for `both` = [gate, up], contiguous fp32 or bf16 [rows, 2 * width]: [rows, width]."""
    rows, width = both.shape[0], both.shape[1] // 2
    out = both.new_empty(rows, width)
    _native.gated_silu(level, threads, both.data_ptr(), out.data_ptr(), rows, width, both.element_size() == 2)
    return out


def scatter(runs: torch.Tensor, cache: torch.Tensor, places: torch.Tensor, *, threads: int = 1) -> None:
    """Copy runs [rows, count, width] to rows `places` (int64, [rows * count]) of `cache` [any, width], same type.

    The last two dims of `runs` are contiguous; places must lie in the cache, which is not checked here.
    """
    rows, count, width = runs.shape
    size = runs.element_size()
    _native.scatter(
        threads,
        runs.data_ptr(),
        runs.stride(0) * size,
        cache.data_ptr(),
        places.data_ptr(),
        rows,
        count,
        width * size,
    )
