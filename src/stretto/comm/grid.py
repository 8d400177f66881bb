"""Ranks on a grid of named axes, and the groups of ranks that differ in some axes alone.

Axes are written slowest first: of `pp, dp, tp` the ranks of one `tp` group are neighbours, as Megatron-LM numbers
them, so that the axis that talks most stays inside a node.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

from stretto.core.errors import require


@dataclass(frozen=True, kw_only=True)
class RankGrid:
    """Named axes and their sizes, slowest first.

    >>> grid = RankGrid(axes=(("pp", 2), ("tp", 2)))
    >>> grid.group(1, "pp"), grid.coordinates(2)
    ((1, 3), {'pp': 1, 'tp': 0})
    """

    axes: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        names = [name for name, _ in self.axes]
        require(len(set(names)) == len(names), "axes", names, "different names")
        for name, size in self.axes:
            require(size >= 1, name, size, "at least 1")

    @property
    def world(self) -> int:
        """How many ranks there are."""
        return math.prod(size for _, size in self.axes)

    def size(self, *axes: str) -> int:
        """Ranks that differ in these axes alone."""
        sizes = dict(self.axes)
        for axis in axes:
            require(axis in sizes, "axis", axis, f"one of {', '.join(sizes)}")
        return math.prod(sizes[axis] for axis in axes)

    def coordinates(self, rank: int) -> dict[str, int]:
        """Where a rank stands on each axis."""
        require(0 <= rank < self.world, "rank", rank, f"from 0 to {self.world - 1}")
        found: dict[str, int] = {}
        for name, size in reversed(self.axes):
            rank, found[name] = divmod(rank, size)
        return {name: found[name] for name, _ in self.axes}

    def coordinate(self, rank: int, axis: str) -> int:
        """Where a rank stands on one axis."""
        self.size(axis)
        return self.coordinates(rank)[axis]

    def rank(self, **coordinates: int) -> int:
        """The rank that stands there; axes left out are 0."""
        number = 0
        for name, size in self.axes:
            at = coordinates.pop(name, 0)
            require(0 <= at < size, name, at, f"from 0 to {size - 1}")
            number = number * size + at
        require(not coordinates, "axis", next(iter(coordinates), ""), f"one of {', '.join(n for n, _ in self.axes)}")
        return number

    def group(self, rank: int, *axes: str) -> tuple[int, ...]:
        """The ranks, `rank` among them, that differ from it in these axes alone, in the order of their numbers."""
        self.size(*axes)
        own = self.coordinates(rank)
        chosen = [name for name, _ in self.axes if name in axes]
        places = product(*(range(self.size(name)) for name in chosen))
        return tuple(self.rank(**(own | dict(zip(chosen, at, strict=True)))) for at in places)

    def groups(self, *axes: str) -> tuple[tuple[int, ...], ...]:
        """All groups of these axes; each rank is in one of them."""
        self.size(*axes)
        others = [(name, size) for name, size in self.axes if name not in axes]
        places = product(*(range(size) for _, size in others))
        names = [name for name, _ in others]
        return tuple(self.group(self.rank(**dict(zip(names, at, strict=True))), *axes) for at in places)
