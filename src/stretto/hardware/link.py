"""A link: what carries bytes between devices, and who owns one port of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from stretto.core.errors import require

LinkKind = Literal["nvlink", "pcie", "ethernet", "infiniband", "memory"]
KINDS: tuple[LinkKind, ...] = ("nvlink", "pcie", "ethernet", "infiniband", "memory")


@dataclass(frozen=True, kw_only=True)
class Link:
    """A connection, as sold or between two ends.

    Attributes:
        bandwidth: bytes/s in one direction through one port.
        latency_s: of a message of no bytes; None takes the fitted constant of its kind.
        per: whose port has that bandwidth. "device": each device has one (NVLink, one network card a GPU);
            "node": the devices of a node share one; "link": all users of the link share it (a bus).
        ends: the two devices, or nodes (meaning any of their devices), that it joins, by path; empty for a
            type.
        citations: where each figure is from, by field name.
    """

    name: str
    kind: LinkKind
    bandwidth: float
    latency_s: float | None = None
    per: Literal["device", "node", "link"] = "device"
    ends: tuple[str, ...] = ()
    citations: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(bool(self.name), "name", self.name, "a name")
        require(self.kind in KINDS, "kind", self.kind, f"one of {', '.join(KINDS)}")
        require(0 < self.bandwidth < math.inf, "bandwidth", self.bandwidth, "positive, in bytes/s")
        if self.latency_s is not None:
            require(0 <= self.latency_s < 10, "latency_s", self.latency_s, "seconds from 0 to 10")
        require(self.per in ("device", "node", "link"), "per", self.per, "device, node or link")
        require(len(self.ends) in (0, 2), "ends", self.ends, "two paths")

    def __hash__(self) -> int:
        return hash((self.name, self.kind, self.bandwidth, self.latency_s, self.per, self.ends))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a YAML file; fields that hold their default are left out."""
        plain: dict[str, Any] = {"name": self.name, "kind": self.kind, "bandwidth": self.bandwidth}
        if self.latency_s is not None:
            plain["latency_s"] = self.latency_s
        if self.per != "device":
            plain["per"] = self.per
        if self.ends:
            plain["ends"] = list(self.ends)
        return plain | ({"citations": dict(sorted(self.citations.items()))} if self.citations else {})
