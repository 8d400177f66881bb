"""Counts what a rank says: calls and bytes exactly, and the seconds it waited."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(kw_only=True)
class Count:
    """Of one kind of call over one axis.

    Attributes:
        calls: how often it was made.
        bytes: sent by this rank to others, contents alone.
        seconds: in which this rank waited for it.
    """

    calls: int = 0
    bytes: int = 0
    seconds: float = 0.0


@dataclass(kw_only=True)
class Meter:
    """Counts by (kind of call, axis)."""

    counts: dict[tuple[str, str], Count] = field(default_factory=dict)

    def of(self, kind: str, axis: str) -> Count:
        """The count of one kind of call, made if need be."""
        return self.counts.setdefault((kind, axis), Count())

    @property
    def bytes(self) -> int:
        """All bytes that this rank sent."""
        return sum(count.bytes for count in self.counts.values())

    @property
    def seconds(self) -> float:
        """All seconds in which this rank waited."""
        return sum(count.seconds for count in self.counts.values())

    def reset(self) -> None:
        """Begin anew."""
        self.counts.clear()

    def rows(self) -> list[Mapping[str, object]]:
        """Plain values, one row a kind and axis."""
        return [
            {"kind": kind, "axis": axis, "calls": count.calls, "bytes": count.bytes, "seconds": count.seconds}
            for (kind, axis), count in sorted(self.counts.items())
        ]
