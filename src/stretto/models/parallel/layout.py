"""Which tokens of a sequence each rank holds, and how two stretches of it stand to each other under a causal mask.

"contiguous" gives rank r the r-th of N stretches. "zigzag" cuts 2 N stretches and gives rank r the r-th from the front
and the r-th from the back, so that under a causal mask every rank has as much to do (Brandon et al., "Striped
attention", 2023, and the trainers since).
"""

from __future__ import annotations

from typing import Literal

import torch

from stretto.comm.transport import Axis
from stretto.core.errors import require

Layout = Literal["contiguous", "zigzag"]
LAYOUTS = ("contiguous", "zigzag")


def pieces(length: int, place: int, size: int, layout: Layout) -> list[range]:
    """The positions that a place holds, as stretches.

    Raises:
        FieldError: the sequence does not divide.
    """
    require(layout in LAYOUTS, "layout", layout, f"one of {', '.join(LAYOUTS)}")
    if size == 1:
        return [range(length)]
    count = size if layout == "contiguous" else 2 * size
    require(length % count == 0, "length", length, f"a multiple of {count}, to be split over {size} ranks ({layout})")
    step = length // count
    numbers = [place] if layout == "contiguous" else [place, count - 1 - place]
    return [range(number * step, (number + 1) * step) for number in numbers]


def positions(length: int, axis: Axis, layout: Layout) -> torch.Tensor:
    """int64 [length / N]: where in the whole sequence this rank's tokens stand."""
    return torch.cat([_range(piece) for piece in pieces(length, axis.rank, axis.size, layout)])


def split_sequence(x: torch.Tensor, axis: Axis, dim: int, layout: Layout) -> torch.Tensor:
    """This rank's part of `x` along `dim`."""
    return x if axis.size == 1 else x.index_select(dim, positions(x.shape[dim], axis, layout))


def join_sequence(part: torch.Tensor, axis: Axis, dim: int, layout: Layout) -> torch.Tensor:
    """The whole of which each rank has a part along `dim`, on every rank."""
    if axis.size == 1:
        return part
    together = axis.all_gather(part, dim)
    return together.index_select(dim, order(together.shape[dim], axis.size, layout).argsort())


def order(length: int, size: int, layout: Layout) -> torch.Tensor:
    """The positions of all places' tokens, one place after another."""
    held = [_range(piece) for place in range(size) for piece in pieces(length, place, size, layout)]
    return torch.cat(held)


def _range(piece: range) -> torch.Tensor:
    return torch.arange(piece.start, piece.stop)
