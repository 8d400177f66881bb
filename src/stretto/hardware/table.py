"""The one type of table for what was measured: figures at points, read between and beyond them.

Points lie on a ragged grid: for each value of the first coordinate there are points along the second, and so
on, each row with coordinates of its own. Reading interpolates along the last axis first and then between the
two neighbouring rows, in logarithms or linearly. A reading says whether it was measured, interpolated or
extrapolated, and its interval comes from the table's relative spread, which widens beyond the points.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

from stretto.core.errors import FieldError, require

Basis = Literal["measured", "interpolated", "modelled", "extrapolated"]
"""How an estimate came about, from the most to the least certain."""

BASES: tuple[Basis, ...] = ("measured", "interpolated", "modelled", "extrapolated")
_BEYOND_PER_OCTAVE = 0.1
"""Relative uncertainty added for each doubling beyond the points: an exponent that is off by 0.14."""


class Reading(NamedTuple):
    """A value read from a table, its interval, and how it came about."""

    value: float
    low: float
    high: float
    basis: Basis


@dataclass(frozen=True)
class _Row:
    """The points along one axis: at each coordinate a value, or the row of the remaining axes."""

    at: tuple[float, ...]
    below: tuple[_Row | float, ...]


@dataclass(frozen=True, kw_only=True)
class Table:
    """Values at points.

    Attributes:
        axes: what each coordinate is, e.g. ("rows", "mean_context").
        points: the coordinates of each value, one number an axis; no point twice.
        values: one value a point.
        scale: "log" interpolates the logarithm of the value over the logarithms of the coordinates, which
            makes every power law exact (all numbers must be positive); "linear" interpolates the numbers
            themselves.
        beyond: the law outside the points, axis by axis. "proportional": constant below the first point, in
            proportion to the coordinate above the last. "slope": the line through the two outermost points.
            "constant": the outermost value. "refuse": a ValueError.
        spread: relative uncertainty of a value: the interval is [value / (1 + spread), value * (1 + spread)].
        source: where the values are from.
    """

    axes: tuple[str, ...]
    points: tuple[tuple[float, ...], ...]
    values: tuple[float, ...]
    scale: Literal["log", "linear"] = "log"
    beyond: Literal["proportional", "slope", "constant", "refuse"] = "proportional"
    spread: float = 0.0
    source: str = ""

    def __post_init__(self) -> None:
        require(len(self.axes) >= 1, "axes", self.axes, "at least one name")
        require(len(self.points) >= 1, "points", self.points, "at least one point")
        require(
            len(self.values) == len(self.points),
            "values",
            len(self.values),
            f"{len(self.points)}, one a point",
        )
        require(self.scale in ("log", "linear"), "scale", self.scale, "log or linear")
        laws = ("proportional", "slope", "constant", "refuse")
        require(self.beyond in laws, "beyond", self.beyond, f"one of {', '.join(laws)}")
        require(0 <= self.spread < math.inf, "spread", self.spread, "a finite number, not negative")
        lowest = 0.0 if self.scale == "log" else -math.inf
        right = "finite" + (" and positive on a logarithmic scale" if self.scale == "log" else "")
        for number, (point, value) in enumerate(zip(self.points, self.values, strict=True)):
            require(len(point) == len(self.axes), f"points.{number}", point, f"{len(self.axes)} numbers long")
            for figure in (*point, value):
                require(lowest < figure < math.inf, f"points.{number}", (*point, value), right)
        require(len(set(self.points)) == len(self.points), "points", "with one twice", "all different")

    @classmethod
    def line(cls, axis: str, values: Iterable[tuple[float, float]], **fields: Any) -> Table:
        """A table over one axis from (coordinate, value) pairs.

        >>> Table.line("rows", [(1, 2.0), (4, 8.0)]).at(2.0).value
        4.0
        """
        pairs = [(float(x), float(y)) for x, y in values]
        return cls(axes=(axis,), points=tuple((x,) for x, _ in pairs), values=tuple(y for _, y in pairs), **fields)

    def at(self, *where: float) -> Reading:
        """Read the table.

        Args:
            where: one coordinate an axis.

        Raises:
            FieldError: if there are too many or too few coordinates, or the law beyond the points is
                "refuse".
        """
        if len(where) != len(self.axes):
            raise FieldError("at", where, f"one number for each of {', '.join(self.axes)}")
        value, octaves, exact = self._read(self._tree, where)
        if octaves > 0 and self.beyond == "refuse":
            raise FieldError("at", where, "within the measured points")
        basis: Basis = "extrapolated" if octaves > 0 else "measured" if exact else "interpolated"
        wide = (1 + self.spread) * (1 + _BEYOND_PER_OCTAVE) ** octaves
        ends = sorted((value / wide, value * wide))
        return Reading(value, ends[0], ends[1], basis)

    def scaled(self, factor: float) -> Table:
        """The same table with every value times `factor`, which is positive."""
        require(0 < factor < math.inf, "factor", factor, "positive")
        return replace(self, values=tuple(value * factor for value in self.values))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, from which `Table(**...)` or a file reader makes an equal table."""
        plain: dict[str, Any] = {
            "axes": list(self.axes),
            "points": [list(point) for point in self.points],
            "values": list(self.values),
            "scale": self.scale,
            "beyond": self.beyond,
            "spread": self.spread,
        }
        return plain | ({"source": self.source} if self.source else {})

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Table:
        """The table that `to_dict` told of."""
        lists = {
            "axes": tuple(plain["axes"]),
            "points": tuple(tuple(float(x) for x in point) for point in plain["points"]),
            "values": tuple(float(value) for value in plain["values"]),
        }
        return cls(**{**plain, **lists})

    @cached_property
    def _tree(self) -> _Row:
        return _row(sorted(zip(self.points, self.values, strict=True)))

    def _read(self, row: _Row, where: Sequence[float]) -> tuple[float, float, bool]:
        """Value at `where`, how many octaves beyond the points it lies, and whether it is a point."""
        x, rest = float(where[0]), where[1:]
        if self.scale == "log" and x <= 0:
            raise FieldError("at", where, "positive, as the table is logarithmic")
        right = bisect_left(row.at, x)
        if right < len(row.at) and row.at[right] == x:
            return self._inner(row.below[right], rest)

        outside = right in (0, len(row.at))
        if outside and (self.beyond != "slope" or len(row.at) == 1):
            nearest = 0 if right == 0 else -1
            value, octaves, _ = self._inner(row.below[nearest], rest)
            grown = x / row.at[-1] if right and self.beyond == "proportional" else 1.0
            return value * grown, max(octaves, _octaves(x, row.at[nearest], row.at)), False

        left = min(max(right - 1, 0), len(row.at) - 2)
        a, b = row.at[left], row.at[left + 1]
        value_a, beyond_a, _ = self._inner(row.below[left], rest)
        value_b, beyond_b, _ = self._inner(row.below[left + 1], rest)
        octaves = max(beyond_a, beyond_b, _octaves(x, a if right == 0 else b, row.at) if outside else 0.0)
        return self._between(x, a, b, value_a, value_b), octaves, False

    def _inner(self, below: _Row | float, rest: Sequence[float]) -> tuple[float, float, bool]:
        return self._read(below, rest) if isinstance(below, _Row) else (below, 0.0, True)

    def _between(self, x: float, a: float, b: float, value_a: float, value_b: float) -> float:
        if self.scale == "linear":
            return value_a + (value_b - value_a) * (x - a) / (b - a)
        share = math.log(x / a) / math.log(b / a)
        return value_a * math.exp(share * math.log(value_b / value_a))


def _octaves(x: float, nearest: float, points: Sequence[float]) -> float:
    """How far outside `x` lies, in doublings, or in widths of the table where signs forbid that."""
    if x > 0 and nearest > 0:
        return abs(math.log2(x / nearest))
    return abs(x - nearest) / ((points[-1] - points[0]) or 1.0)


def _row(sorted_points: list[tuple[tuple[float, ...], float]]) -> _Row:
    groups: dict[float, list[tuple[tuple[float, ...], float]]] = {}
    for point, value in sorted_points:
        groups.setdefault(point[0], []).append((point[1:], value))
    below = tuple(_row(group) if group[0][0] else group[0][1] for group in groups.values())
    return _Row(tuple(groups), below)
