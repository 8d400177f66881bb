"""Weights of 4 bits times activations of 8, on the integer matrix units of a GPU: the twin of path "fast".

Each row's activations become whole numbers of -127 to 127 with a scale for each group, as in
`native/kernels/packed.cpp`; products inside a group are exact in 32 bits. COMET (2024) computes its
blocks of 8-bit activations in this way. Tiles and stripes are those of `w4a16`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from stretto.core.errors import require
from stretto.kernels.triton.layout import TiledMatrix
from stretto.kernels.triton.striped import check, cut, finish, launch_options, padded, store_piece
from stretto.kernels.triton.w4a16 import constants

TYPES = (torch.bfloat16, torch.float16, torch.float32)
QUANTIZE_OPTIONS = {"enable_fp_fusion": False}
"""A fused multiply-add would round quotients that the CPU rounds twice, and so differ from it at ties."""


def matmul(x: torch.Tensor, matrix: TiledMatrix, *, workers: int | None = None) -> torch.Tensor:
    """x [rows, length], rounded to 8 bits for each row and group, times the matrix: [rows, columns] in x's type.

    Args:
        workers: programs that share the tiles; the device's multiprocessors if None. The order of sums depends on it.

    Raises:
        ValueError: also where a group is no multiple of 64, since half a tile must fill an integer matrix instruction.
    """
    check(x, matrix, TYPES)
    require(matrix.deep >= 64, "group", matrix.group, "a multiple of 64")
    require(not matrix.fragments, "fragments", True, "False; they are for `w4a16` alone")
    out = x.new_empty(len(x), matrix.columns)
    if not len(x):
        return out
    values, numbers = quantize(padded(x, matrix), matrix.group)
    how = cut(len(x), matrix, workers)
    partials = how.partials(x)
    multiply[(how.stripes.workers,)](
        values,
        numbers,
        matrix.weights,
        matrix.scales,
        matrix.minima,
        out,
        partials,
        len(x),
        matrix.columns,
        matrix.inner,
        how.column_tiles,
        how.stripes.slices,
        how.stripes.length,
        **constants(matrix.group, matrix.deep, matrix.inner, how.tile_rows, matrix.minima is not None),
        **launch_options(how.tile_rows),
    )
    finish(how, partials, out)
    return out


def quantize(x: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 values of x [rows, inner], and fp32 [2, groups, rows]: scales, and sums of what the values stand for."""
    rows, inner = x.shape
    values = torch.empty(rows, inner, dtype=torch.int8, device=x.device)
    numbers = torch.empty(2, inner // group, rows, dtype=torch.float32, device=x.device)
    quantize_group[(rows, inner // group)](
        x, values, numbers, rows, inner, GROUP=group, WIDTH=triton.next_power_of_2(group), **QUANTIZE_OPTIONS
    )
    return values, numbers


@triton.jit
def quantize_group(x, values, numbers, rows, inner, GROUP: tl.constexpr, WIDTH: tl.constexpr):
    """One program a row and group. What is not finite makes the whole group NaN; a group below all scales is zero."""
    row, group = tl.program_id(0), tl.program_id(1)
    element = tl.arange(0, WIDTH)
    at = row.to(tl.int64) * inner + group * GROUP + element
    own = tl.load(x + at, mask=element < GROUP, other=0.0).to(tl.float32)
    size = tl.abs(own)
    finite = tl.min((size < float("inf")).to(tl.int32), axis=0) == 1
    most = tl.max(tl.where(size < float("inf"), size, 0.0), axis=0)
    inverse = tl.div_rn(tl.full((), 127.0, tl.float32), tl.where(most > 0, most, 1.0))
    counts = (most > 0) & (inverse < float("inf"))
    scale = tl.where(counts, tl.div_rn(most, tl.full((), 127.0, tl.float32)), 0.0)
    near = tl.where(finite & counts, own * inverse, 0.0)
    whole = nearest(near)
    tl.store(values + at, whole.to(tl.int8), mask=element < GROUP)
    total = tl.sum(whole.to(tl.int32), axis=0).to(tl.float32)
    scale = tl.where(finite, scale, float("nan"))
    groups = inner // GROUP
    tl.store(numbers + group * rows + row, scale)
    tl.store(numbers + (groups + group) * rows + row, scale * total)


@triton.jit
def nearest(x):
    """To the nearest whole number, ties to even: what is left of a number when 1.5 * 2^23 swallows its fraction."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def multiply(
    x, numbers, weights, scales, minima, out, partials, rows, columns, inner, column_tiles, slices, length,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, DEEP: tl.constexpr, GROUP_TILES: tl.constexpr,
    ONE_SCALE: tl.constexpr, MINIMUM: tl.constexpr,
):  # fmt: skip
    """One program a stripe; `length` tiles each."""
    HALF: tl.constexpr = DEEP // 2
    worker = tl.program_id(0)
    inner_tiles = inner // DEEP
    groups = inner_tiles // GROUP_TILES
    column, row, half = tl.arange(0, TILE_COLUMNS), tl.arange(0, TILE_ROWS), tl.arange(0, HALF)
    tile = worker * length
    end = tl.minimum(tile + length, inner_tiles * slices)
    while tile < end:
        slice_ = tile // inner_tiles
        first = tile - slice_ * inner_tiles
        stop = tl.minimum(end - slice_ * inner_tiles, inner_tiles)
        column_tile = slice_ % column_tiles
        own = (slice_ // column_tiles) * TILE_ROWS + row
        x_at = x + own[None, :].to(tl.int64) * inner + half[:, None]
        bytes_at = weights + column_tile.to(tl.int64) * inner_tiles * (TILE_COLUMNS * HALF)
        bytes_at += column[:, None] * HALF + half[None, :]
        total = tl.zeros((TILE_COLUMNS, TILE_ROWS), tl.float32)
        for k in tl.range(first, stop):
            both = tl.load(bytes_at + k * (TILE_COLUMNS * HALF))
            x_low = tl.load(x_at + k * DEEP, mask=own[None, :] < rows, other=0)
            x_high = tl.load(x_at + k * DEEP + HALF, mask=own[None, :] < rows, other=0)
            low, high = (both & 15).to(tl.int8), (both >> 4).to(tl.int8)
            whole = tl.dot(high, x_high, tl.dot(low, x_low, out_dtype=tl.int32), out_dtype=tl.int32)
            group = k // GROUP_TILES
            at = (column_tile * groups + group) * TILE_COLUMNS + column
            scale = tl.load(scales + at).to(tl.float32)
            minimum = tl.load(minima + at).to(tl.float32) if MINIMUM else scale * -8.0
            x_scale = tl.load(numbers + group * rows + own, mask=own < rows, other=0.0)
            x_sum = tl.load(numbers + (groups + group) * rows + own, mask=own < rows, other=0.0)
            # A group's sum counts once, with the first of its tiles.
            counts = tl.where(k % GROUP_TILES == 0, 1.0, 0.0)
            total += (scale[:, None] * x_scale[None, :]) * whole.to(tl.float32)
            total += minimum[:, None] * (x_sum * counts)[None, :]
        store_piece(
            out, partials, total, worker, slice_, first, stop, rows, columns, inner_tiles, column_tiles,
            TILE_ROWS, TILE_COLUMNS,
        )  # fmt: skip
        tile += stop - first
