"""The striped partition of a matrix product over workers, and the sums that it leaves to be made.

MARLIN (Frantar et al., 2024): the tiles of a product are numbered with the inner dimension fastest, and each worker
takes an equal stripe of that line, whatever columns it crosses. All workers end together, however few columns there
are; the price is that a column slice may be cut, and its parts must be added. They are added one after another, the
bottom (the last inner elements) first: the worker that owns a slice's top has the bottom of the slice before to
finish, and comes last. Any worker but a slice's last one thus begins with that slice, so none waits for one that
waits for it.

Everything here is a pure function of a few numbers. The GPU kernels in `kernels.triton` compute the same from the same
numbers, and `striped_sum` plays what their workers do, in any order of turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stretto.core.errors import require

MAX_PARALLEL = 16
"""How many blocks of rows one launch takes at most."""
BLOCK_ROWS = 64
FEW_ROWS = 16

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What one worker owns of one column slice.

    Attributes:
        first, count: its tiles, counted along the inner dimension of the slice.
        place: its turn in the slice's sum, from 0 for the bottom.
        parts: how many workers share the slice.
    """

    worker: int
    slice: int
    first: int
    count: int
    place: int
    parts: int


@dataclass(frozen=True, kw_only=True)
class Stripes:
    """`slices` columns of `inner_tiles` tiles each over `workers`.

    Attributes:
        inner_tiles: tiles along the inner dimension.
        slices: column slices: tiles across the columns, times blocks of rows.
        workers: streaming multiprocessors, or threads.
        group_tiles: tiles that share their scales; no stripe begins inside such a group.
    """

    inner_tiles: int
    slices: int
    workers: int
    group_tiles: int = 1

    def __post_init__(self) -> None:
        for name in ("inner_tiles", "slices"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "not negative")
        require(self.workers >= 1, "workers", self.workers, "at least 1")
        right = f"a divisor of the {self.inner_tiles} tiles along the inner dimension"
        whole = self.group_tiles >= 1 and self.inner_tiles % self.group_tiles == 0
        require(whole, "group_tiles", self.group_tiles, right)

    @property
    def tiles(self) -> int:
        return self.inner_tiles * self.slices

    @property
    def length(self) -> int:
        """Tiles of a whole stripe: an equal share, rounded up to whole groups."""
        share = -(-self.tiles // self.workers)
        return -(-share // self.group_tiles) * self.group_tiles

    def stripe(self, worker: int) -> range:
        """The worker's tiles; none for the last workers where the rounding has used all up."""
        return range(min(worker * self.length, self.tiles), min((worker + 1) * self.length, self.tiles))

    def pieces(self, worker: int) -> tuple[Piece, ...]:
        """The worker's stripe cut at the slices, in the order in which it is worked through."""
        own = self.stripe(worker)
        if not own:
            return ()
        return tuple(self._piece(worker, s) for s in range(own[0] // self.inner_tiles, own[-1] // self.inner_tiles + 1))

    def parts(self, slice_: int) -> tuple[Piece, ...]:
        """The pieces of a slice in the order in which they are added: bottom first."""
        if not self.inner_tiles:
            return ()
        top, bottom = self._owners(slice_)
        return tuple(self._piece(worker, slice_) for worker in range(bottom, top - 1, -1))

    @property
    def exchanges(self) -> int:
        """Partial sums that go from one worker to the next; never more than the workers less one."""
        return sum(len(self.parts(s)) - 1 for s in range(self.slices)) if self.inner_tiles else 0

    def _owners(self, slice_: int) -> tuple[int, int]:
        """The workers that own the slice's first and last tile; all between them own the rest."""
        start = slice_ * self.inner_tiles
        return start // self.length, (start + self.inner_tiles - 1) // self.length

    def _piece(self, worker: int, slice_: int) -> Piece:
        start = slice_ * self.inner_tiles
        own = self.stripe(worker)
        first, last = max(own.start, start), min(own.stop, start + self.inner_tiles)
        top, bottom = self._owners(slice_)
        return Piece(
            worker=worker,
            slice=slice_,
            first=first - start,
            count=last - first,
            place=bottom - worker,
            parts=bottom - top + 1,
        )


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Rows that one launch computes: `parallel` blocks of up to `BLOCK_ROWS` rows, from row `first`."""

    first: int
    rows: int
    parallel: int


def tile_shape(rows: int) -> tuple[int, int]:
    """Inner elements and columns of a tile: deep for up to 16 rows, wide for more.

    >>> tile_shape(16), tile_shape(17)
    ((128, 128), (64, 256))
    """
    return (128, 128) if rows <= FEW_ROWS else (64, 256)


def launches(rows: int) -> tuple[Launch, ...]:
    """How `rows` are cut: as many whole blocks at once as a launch takes, then what is left.

    >>> [(each.rows, each.parallel) for each in launches(152)]
    [(128, 2), (24, 1)]
    """
    require(rows >= 0, "rows", rows, "not negative")
    cut, first = [], 0
    while first < rows:
        parallel = max(1, min((rows - first) // BLOCK_ROWS, MAX_PARALLEL))
        count = min(rows - first, parallel * BLOCK_ROWS)
        cut.append(Launch(first=first, rows=count, parallel=parallel))
        first += count
    return tuple(cut)


def plan_stripes(rows: int, inner: int, columns: int, *, workers: int, group: int | None = None) -> Stripes:
    """The stripes of one launch of up to `MAX_PARALLEL` blocks of rows.

    Args:
        rows: of one launch; see `launches`.
        inner: elements of the inner dimension, whole groups of them; they are padded to whole tiles.
        columns: padded to whole tiles.
        group: inner elements that share a scale, None for one scale a column (which is applied to the sum).
    """
    require(0 <= rows <= MAX_PARALLEL * BLOCK_ROWS, "rows", rows, f"0 to {MAX_PARALLEL * BLOCK_ROWS} in one launch")
    require(group is None or (group >= 1 and inner % group == 0), "group", group, f"a divisor of {inner}")
    deep, wide = tile_shape(rows)
    group_tiles = -(-group // deep) if group else 1
    require(group is None or group < deep or group % deep == 0, "group", group, f"below or a multiple of {deep}")
    blocks = -(-rows // BLOCK_ROWS)
    tiles = -(-inner // deep)
    return Stripes(inner_tiles=tiles, slices=blocks * -(-columns // wide), workers=workers, group_tiles=group_tiles)


def striped_sum(
    stripes: Stripes,
    partial: Callable[[Piece], Floats],
    counters: NDArray[np.int32],
    *,
    next_worker: Callable[[Sequence[int]], int] = min,
) -> dict[int, Floats]:
    """Each slice's sum, made as the workers of the GPU kernel make it: each adds its part when its turn has come.

    Args:
        partial: a piece's own sum.
        counters: one for each slice, all zero; they tell whose turn it is, and are zero again afterwards, whether this
            returns or raises.
        next_worker: picks which of the workers that need not wait moves next; the result does not depend on it.

    Returns:
        by slice, for all slices that have tiles.
    """
    require(len(counters) >= stripes.slices, "counters", len(counters), f"at least {stripes.slices}")
    require(not counters.any(), "counters", "not zero", "zero before the first turn")
    sums: dict[int, Floats] = {}
    workers = {worker: _work(stripes.pieces(worker), partial, counters, sums) for worker in range(stripes.workers)}
    waiting: dict[int, Piece] = {}
    try:
        while workers:
            free = [w for w in workers if w not in waiting or counters[waiting[w].slice] == waiting[w].place]
            turn = next_worker(free)
            piece = next(workers[turn], None)
            if piece is None:
                del workers[turn]
            else:
                waiting[turn] = piece
    finally:
        counters[:] = 0
    return sums


def _work(
    pieces: Sequence[Piece],
    partial: Callable[[Piece], Floats],
    counters: NDArray[np.int32],
    sums: dict[int, Floats],
) -> Iterator[Piece]:
    """One worker; it yields a piece that it has computed and goes on when that piece's turn has come."""
    for piece in pieces:
        own = partial(piece)
        yield piece
        sums[piece.slice] = own + sums[piece.slice] if piece.place else own
        last = piece.place == piece.parts - 1
        counters[piece.slice] = 0 if last else piece.place + 1
