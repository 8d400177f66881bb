"""What both GPU twins share: stripes over persistent programs, and the sum of the slices that stripes cut.

Each program walks its stripe (`kernels.stripes`); a slice that it owns whole goes straight to the result, the rest
into a partial sum in fp32. A second launch adds the partial sums of each cut slice, the bottom first: the order of
the publication's serial reduction, without its waiting. So results are the same bits in every run with as many
workers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from stretto.core.errors import require
from stretto.kernels.stripes import Stripes
from stretto.kernels.triton.layout import TILE_COLUMNS, TiledMatrix

ROWS_OF_TILES = (16, 32, 64)
STAGES_NVIDIA, STAGES_AMD = 4, 2
"""Tiles under way at once; AMD's loads go through registers, which two stages fill."""


@dataclass(frozen=True, kw_only=True)
class Striped:
    """How one product is cut: its stripes, rows of a tile, blocks of rows."""

    stripes: Stripes
    tile_rows: int
    rows: int
    column_tiles: int

    def partials(self, like: torch.Tensor) -> torch.Tensor:
        """Room for the two partial sums that a worker may leave: of its first slice and of its last."""
        shape = (self.stripes.workers, 2, TILE_COLUMNS, self.tile_rows)
        return torch.empty(shape, dtype=torch.float32, device=like.device)


def warps_of(tile_rows: int) -> int:
    """Warps of a program: few enough that each has matrix instructions of its own, many enough that nothing spills."""
    return 4 if tile_rows < 64 else 8


def launch_options(tile_rows: int) -> dict[str, int]:
    """What a launch of a product is given beside its arguments."""
    stages = STAGES_NVIDIA if torch.version.hip is None else STAGES_AMD
    return {"num_warps": warps_of(tile_rows), "num_stages": stages}


def cut(rows: int, matrix: TiledMatrix, workers: int | None) -> Striped:
    """Stripes over `workers`, or over all of the device's multiprocessors."""
    if workers is None:
        require(matrix.weights.is_cuda, "workers", None, "given where the matrix is not on a GPU")
        workers = torch.cuda.get_device_properties(matrix.weights.device).multi_processor_count
    tile_rows = next((size for size in ROWS_OF_TILES if rows <= size), ROWS_OF_TILES[-1])
    column_tiles, inner_tiles = matrix.weights.shape[:2]
    one_scale = matrix.group == matrix.inner
    stripes = Stripes(
        inner_tiles=inner_tiles,
        slices=-(-rows // tile_rows) * column_tiles,
        workers=workers,
        group_tiles=1 if one_scale else matrix.group // matrix.deep,
    )
    return Striped(stripes=stripes, tile_rows=tile_rows, rows=rows, column_tiles=column_tiles)


def check(x: torch.Tensor, matrix: TiledMatrix, types: tuple[torch.dtype, ...]) -> None:
    """Everything that kernels, which see addresses alone, rely on."""
    require(x.ndim == 2 and x.shape[1] == matrix.length, "x", tuple(x.shape), f"[rows, {matrix.length}]")
    require(x.dtype in types, "x", x.dtype, f"one of {', '.join(map(str, types))}")
    require(x.device == matrix.weights.device, "x", x.device, f"on {matrix.weights.device}, where the matrix is")


def padded(x: torch.Tensor, matrix: TiledMatrix) -> torch.Tensor:
    """x with zeros up to whole groups, contiguous."""
    missing = matrix.inner - matrix.length
    return torch.nn.functional.pad(x, (0, missing)) if missing else x.contiguous()


def finish(how: Striped, partials: torch.Tensor, out: torch.Tensor) -> None:
    """Add up the slices that were cut."""
    if how.stripes.exchanges:
        sum_slices[(how.stripes.slices,)](
            partials,
            out,
            how.rows,
            out.shape[1],
            how.stripes.inner_tiles,
            how.column_tiles,
            how.stripes.length,
            TILE_ROWS=how.tile_rows,
            TILE_COLUMNS=TILE_COLUMNS,
        )


@triton.jit
def store_tile(out, tile, slice_, rows, columns, column_tiles, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr):
    """A slice's sum [TILE_COLUMNS, TILE_ROWS] into the result [rows, columns]."""
    column = (slice_ % column_tiles) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    row = (slice_ // column_tiles) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    at = out + row[None, :].to(tl.int64) * columns + column[:, None]
    tl.store(at, tile.to(out.dtype.element_ty), mask=(row[None, :] < rows) & (column[:, None] < columns))


@triton.jit
def partial_tile(partials, worker, place, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr):
    """Where a worker's partial sum lies: place 1 if it begins at the top of its slice, else 0."""
    column, row = tl.arange(0, TILE_COLUMNS), tl.arange(0, TILE_ROWS)
    start = (worker * 2 + place) * TILE_COLUMNS * TILE_ROWS
    return partials + start + column[:, None] * TILE_ROWS + row[None, :]


@triton.jit
def store_piece(
    out, partials, tile, worker, slice_, first, stop, rows, columns, inner_tiles, column_tiles,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
):  # fmt: skip
    """The sum over inner tiles [first, stop) of a slice, to where it belongs."""
    if stop - first == inner_tiles:
        store_tile(out, tile, slice_, rows, columns, column_tiles, TILE_ROWS, TILE_COLUMNS)
    else:
        place = (first == 0).to(tl.int32)
        tl.store(partial_tile(partials, worker, place, TILE_ROWS, TILE_COLUMNS), tile)


@triton.jit
def sum_slices(
    partials, out, rows, columns, inner_tiles, column_tiles, length,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program a slice: its parts, the bottom first."""
    slice_ = tl.program_id(0)
    start = slice_ * inner_tiles
    top = start // length
    bottom = (start + inner_tiles - 1) // length
    if top != bottom:
        total = tl.zeros((TILE_COLUMNS, TILE_ROWS), tl.float32)
        for turn in range(bottom - top + 1):
            worker = bottom - turn
            place = (worker * length <= start).to(tl.int32)
            total = tl.load(partial_tile(partials, worker, place, TILE_ROWS, TILE_COLUMNS)) + total
        store_tile(out, total, slice_, rows, columns, column_tiles, TILE_ROWS, TILE_COLUMNS)
