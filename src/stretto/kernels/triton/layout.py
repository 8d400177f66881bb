"""The GPU twins' own layout of a packed matrix, and the way back.

Weights are cut into tiles of `TILE_COLUMNS` columns by `deep` inner elements. A tile is one run of bytes: for each
column, deep / 2 bytes, of which byte j holds inner element j in its low half and element deep / 2 + j in its high
half. So a thread loads 16 bytes at once, and each half of a tile is a product of its own with half of the
activations: nothing is shuffled. Tiles follow each other along the inner dimension, as stripes do.

In *fragments* (MARLIN's reshuffle, for Hopper's matrix instructions on 16-bit numbers), the bytes of a column lie in
the order in which the four lanes that share it need them: all of the first lane's, then the second's. Of every sixteen
elements a lane takes two neighbours and the two that come eight later; what it loads at once is thus just what its
instructions want, and bytes go from memory to the matrix unit without passing between lanes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from stretto.core.errors import require
from stretto.kernels.packed import PackedMatrix, pack

if TYPE_CHECKING:
    import torch

TILE_COLUMNS = 128
_DEEPEST = 128


@dataclass(frozen=True, kw_only=True)
class TiledMatrix:
    """A 4-bit matrix [columns, length] in tiles.

    Attributes:
        weights: uint8 [column tiles, inner tiles, TILE_COLUMNS, deep / 2].
        scales, minima: fp16 [column tiles, groups, TILE_COLUMNS]; without minima, 8 is subtracted from values.
        group: inner elements that share a scale; a tile is never deeper.
        fragments: whether the bytes of a column of a tile lie lane by lane.
    """

    weights: torch.Tensor
    scales: torch.Tensor
    minima: torch.Tensor | None
    columns: int
    length: int
    group: int
    fragments: bool = False

    @property
    def deep(self) -> int:
        """Inner elements of a tile."""
        return self.weights.shape[3] * 2

    @property
    def inner(self) -> int:
        """Inner elements with the padding to whole groups."""
        return self.weights.shape[1] * self.deep

    def to(self, device: torch.device | str) -> TiledMatrix:
        """The same on another device."""
        minima = None if self.minima is None else self.minima.to(device)
        return TiledMatrix(
            weights=self.weights.to(device),
            scales=self.scales.to(device),
            minima=minima,
            columns=self.columns,
            length=self.length,
            group=self.group,
            fragments=self.fragments,
        )


def tile_depth(group: int) -> int:
    """The deepest tile, a power of two, of which a group holds whole ones.

    >>> tile_depth(32), tile_depth(96), tile_depth(4096)
    (32, 32, 128)
    """
    return min(_DEEPEST, group & -group)


def repack(matrix: PackedMatrix, *, fragments: bool = False) -> TiledMatrix:
    """A 4-bit matrix of the CPU's layout in this one, to the last bit.

    Args:
        fragments: put bytes in the order of Hopper's lanes, for `w4a16` alone.
    """
    import torch

    require(matrix.bits == 4, "bits", matrix.bits, "4")
    values, scales, minima = matrix.unpack()
    deep = tile_depth(matrix.group)
    wide = -(-matrix.columns // TILE_COLUMNS) * TILE_COLUMNS

    def whole(part: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(part, (0, 0, 0, wide - matrix.columns))

    def of_groups(part: torch.Tensor) -> torch.Tensor:
        return whole(part).view(-1, TILE_COLUMNS, part.shape[1]).transpose(1, 2).contiguous()

    tiles = whole(values).view(wide // TILE_COLUMNS, TILE_COLUMNS, -1, 2, deep // 2).permute(3, 0, 2, 1, 4)
    weights = (tiles[0] | tiles[1] << 4).contiguous()
    if fragments:
        lanes = weights.unflatten(3, (-1, 2, 4, 2)).permute(0, 1, 2, 5, 3, 4, 6)
        weights = lanes.reshape(weights.shape)
    return TiledMatrix(
        weights=weights,
        scales=of_groups(scales),
        minima=None if minima is None else of_groups(minima),
        columns=matrix.columns,
        length=matrix.length,
        group=matrix.group,
        fragments=fragments,
    )


def unrepack(tiled: TiledMatrix) -> PackedMatrix:
    """The way back: what `repack` was given, to the last bit."""
    import torch

    weights = tiled.weights
    if tiled.fragments:
        lanes = weights.unflatten(3, (4, -1, 2, 2)).permute(0, 1, 2, 4, 5, 3, 6)
        weights = lanes.reshape(weights.shape)
    halves = torch.stack([weights & 15, weights >> 4], dim=3)
    values = halves.permute(0, 2, 1, 3, 4).reshape(-1, tiled.inner)[: tiled.columns]

    def of_groups(part: torch.Tensor) -> torch.Tensor:
        return part.transpose(1, 2).reshape(-1, part.shape[1])[: tiled.columns]

    minima = None if tiled.minima is None else of_groups(tiled.minima)
    return pack(values, of_groups(tiled.scales), minima, bits=4, length=tiled.length)
