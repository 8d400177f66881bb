"""Weights of 4 bits times activations of 16, on the matrix units of a GPU: the twin of path "bf16".

MARLIN (Frantar et al., 2024). The product is computed transposed: columns are the tall side of each matrix
instruction, so that a few rows of activations do not waste it and unpacked weights go from registers straight into
it. A value is unpacked with one OR and one subtraction: put into the last bits of a 16-bit number whose steps are 1,
it is that number plus the value. It enters as it is, a small whole number without error; its group's scale multiplies
the fp32 sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from stretto.kernels.triton.layout import TILE_COLUMNS, TiledMatrix
from stretto.kernels.triton.striped import check, cut, finish, launch_options, padded, store_piece, warps_of

TYPES = (torch.bfloat16, torch.float16)


def matmul(x: torch.Tensor, matrix: TiledMatrix, *, workers: int | None = None) -> torch.Tensor:
    """x [rows, length], bf16 or fp16, times the matrix: [rows, columns] in x's type.

    Args:
        workers: programs that share the tiles; the device's multiprocessors if None. The order of sums depends on it.
    """
    check(x, matrix, TYPES)
    out = x.new_empty(len(x), matrix.columns)
    if not len(x):
        return out
    how = cut(len(x), matrix, workers)
    partials = how.partials(x)
    multiply[(how.stripes.workers,)](
        padded(x, matrix),
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
        FRAGMENT_WARPS=warps_of(how.tile_rows) if matrix.fragments else 0,
        **launch_options(how.tile_rows),
    )
    finish(how, partials, out)
    return out


def constants(group: int, deep: int, inner: int, tile_rows: int, minimum: bool) -> dict[str, int | bool]:
    """What the kernel is compiled for."""
    return {
        "TILE_ROWS": tile_rows,
        "TILE_COLUMNS": TILE_COLUMNS,
        "DEEP": deep,
        "GROUP_TILES": group // deep,
        "ONE_SCALE": group == inner,
        "MINIMUM": minimum,
    }


@triton.jit
def unpack(nibbles, MIDDLE: tl.constexpr, BF16: tl.constexpr):
    """Values 0 to 15, less MIDDLE, in a 16-bit type: 128 (bf16) or 1024 (fp16) with its last bits replaced."""
    if BF16:
        raised = (nibbles.to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True)
        return raised - tl.full((), 128.0 + MIDDLE, tl.float32).to(tl.bfloat16)
    else:
        raised = (nibbles.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True)
        return raised - tl.full((), 1024.0 + MIDDLE, tl.float32).to(tl.float16)


@triton.jit
def loaded_column(WARPS: tl.constexpr, TILE_COLUMNS: tl.constexpr):
    """The column that each row of a loaded tile holds, where a warp loads eight at a time and computes with sixteen."""
    row = tl.arange(0, TILE_COLUMNS)
    turn = row // (8 * WARPS)
    return row % 8 + 8 * (turn % 2) + 16 * (row // 8 % WARPS) + (turn // 2) * 16 * WARPS


@triton.jit
def in_order(tile, WARPS: tl.constexpr, TILE_COLUMNS: tl.constexpr, HALF: tl.constexpr):
    """A loaded tile of fragments as columns by inner elements; every lane keeps what it holds."""
    lanes = tile.reshape(TILE_COLUMNS, 4, HALF // 16, 2, 2).permute(0, 2, 3, 1, 4).reshape(TILE_COLUMNS, HALF)
    turns = lanes.reshape(TILE_COLUMNS // (16 * WARPS), 2, WARPS, 8, HALF).permute(0, 2, 1, 3, 4)
    return turns.reshape(TILE_COLUMNS, HALF)


@triton.jit
def multiply(
    x, weights, scales, minima, out, partials, rows, columns, inner, column_tiles, slices, length,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, DEEP: tl.constexpr, GROUP_TILES: tl.constexpr,
    ONE_SCALE: tl.constexpr, MINIMUM: tl.constexpr, FRAGMENT_WARPS: tl.constexpr,
):  # fmt: skip
    """One program a stripe; `length` tiles each. FRAGMENT_WARPS is 0, or the warps that load fragments."""
    HALF: tl.constexpr = DEEP // 2
    BF16: tl.constexpr = x.dtype.element_ty == tl.bfloat16
    MIDDLE: tl.constexpr = 0 if MINIMUM else 8
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
        kept = own[None, :] < rows
        x_at = x + own[None, :].to(tl.int64) * inner + half[:, None]
        bytes_at = weights + column_tile.to(tl.int64) * inner_tiles * (TILE_COLUMNS * HALF)
        if FRAGMENT_WARPS:
            bytes_at += loaded_column(FRAGMENT_WARPS, TILE_COLUMNS)[:, None] * HALF + half[None, :]
        else:
            bytes_at += column[:, None] * HALF + half[None, :]
        total = tl.zeros((TILE_COLUMNS, TILE_ROWS), tl.float32)
        x_total = tl.zeros((TILE_ROWS,), tl.float32)
        for k in tl.range(first, stop):
            both = tl.load(bytes_at + k * (TILE_COLUMNS * HALF))
            if FRAGMENT_WARPS:
                both = in_order(both, FRAGMENT_WARPS, TILE_COLUMNS, HALF)
            x_low = tl.load(x_at + k * DEEP, mask=kept, other=0.0)
            x_high = tl.load(x_at + k * DEEP + HALF, mask=kept, other=0.0)
            low, high = unpack(both & 15, MIDDLE, BF16), unpack(both >> 4, MIDDLE, BF16)
            if MINIMUM:
                x_sum = tl.sum(x_low.to(tl.float32) + x_high.to(tl.float32), axis=0)
            if ONE_SCALE:
                total = tl.dot(high, x_high, tl.dot(low, x_low, total))
                if MINIMUM:
                    x_total += x_sum
            else:
                part = tl.dot(high, x_high, tl.dot(low, x_low))
                group = (column_tile * groups + k // GROUP_TILES) * TILE_COLUMNS + column
                total += tl.load(scales + group).to(tl.float32)[:, None] * part
                if MINIMUM:
                    total += tl.load(minima + group).to(tl.float32)[:, None] * x_sum[None, :]
        if ONE_SCALE:
            group = column_tile * TILE_COLUMNS + column
            total = total * tl.load(scales + group).to(tl.float32)[:, None]
            if MINIMUM:
                total += tl.load(minima + group).to(tl.float32)[:, None] * x_total[None, :]
        store_piece(
            out, partials, total, worker, slice_, first, stop, rows, columns, inner_tiles, column_tiles,
            TILE_ROWS, TILE_COLUMNS,
        )  # fmt: skip
        tile += stop - first
