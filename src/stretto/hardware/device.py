"""A device as a cost model sees it: what it holds, how fast it computes and moves, what was measured on it.

Data-sheet figures and measured tables stand side by side in one value. `cost` uses a table where there is one
and a model of the figures elsewhere, so that upper rooms sharpen predictions by adding tables
(`with_measured`) and by nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from stretto.core.errors import require
from stretto.hardware.table import Table

DTYPES = ("fp64", "tf32", "fp32", "bf16", "fp16", "fp8", "int8")
"""Types of arithmetic that a peak may be given for."""

CURVES = ("bandwidth@threads", "compute@threads")
"""Efficiency curves: the share of `bandwidth` or of the peaks that a number of threads reaches."""


@dataclass(frozen=True, kw_only=True)
class Cache:
    """A memory between units and main memory: its bytes in all, and bytes/s that all units read together."""

    bytes: float
    bandwidth: float | None = None

    def __post_init__(self) -> None:
        require(0 < self.bytes < math.inf, "bytes", self.bytes, "positive")
        if self.bandwidth is not None:
            require(0 < self.bandwidth < math.inf, "bandwidth", self.bandwidth, "positive, in bytes/s")


@dataclass(frozen=True, kw_only=True)
class Device:
    """One processor with its memory.

    Attributes:
        name: what people call it, e.g. "NVIDIA A100 SXM 80 GB".
        memory_bytes: what it holds.
        bandwidth: bytes/s of its main memory.
        peak_flops: by type of arithmetic, dense operations/s of the whole device; a multiply-add counts two.
        units: streaming multiprocessors or cores, the grain of wave quantisation.
        launch_s: overhead of starting one operation; None takes the fitted constant of its kind of device.
        caches: from the smallest to the largest.
        efficiency: curves named in `CURVES`, each over threads, of shares in (0, 1].
        measured: seconds of operations by `Operation.signature` (with "@threads" behind it where threads were
            set).
        citations: where each figure is from, by field name.
    """

    name: str
    kind: Literal["cpu", "gpu"]
    vendor: str = ""
    memory_bytes: float
    bandwidth: float
    peak_flops: Mapping[str, float]
    units: int = 1
    launch_s: float | None = None
    caches: tuple[Cache, ...] = ()
    efficiency: Mapping[str, Table] = field(default_factory=dict)
    measured: Mapping[str, Table] = field(default_factory=dict)
    citations: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(bool(self.name), "name", self.name, "a name")
        require(self.kind in ("cpu", "gpu"), "kind", self.kind, "cpu or gpu")
        require(0 < self.memory_bytes < math.inf, "memory_bytes", self.memory_bytes, "positive")
        require(0 < self.bandwidth < math.inf, "bandwidth", self.bandwidth, "positive, in bytes/s")
        require(self.units >= 1, "units", self.units, "at least 1")
        if self.launch_s is not None:
            require(0 <= self.launch_s < 1, "launch_s", self.launch_s, "seconds from 0 to 1")
        for dtype, peak in self.peak_flops.items():
            require(dtype in DTYPES, "peak_flops", dtype, f"of {', '.join(DTYPES)}")
            require(0 < peak < math.inf, f"peak_flops.{dtype}", peak, "positive, in operations/s")
        for curve, table in self.efficiency.items():
            require(curve in CURVES, "efficiency", curve, f"of {', '.join(CURVES)}")
            require(len(table.axes) == 1, f"efficiency.{curve}.axes", table.axes, "one axis, the threads")
            require(all(0 < v <= 1 for v in table.values), f"efficiency.{curve}.values", table.values, "in (0, 1]")

    def __hash__(self) -> int:
        # Dicts do not hash; these fields tell devices apart well enough, and equality settles the rest.
        return hash((self.name, self.memory_bytes, self.bandwidth, self.units, len(self.measured)))

    def peak(self, dtype: str) -> float:
        """Operations/s in `dtype`.

        Raises:
            ValueError: if the device has no peak for it, naming both.
        """
        try:
            return self.peak_flops[dtype]
        except KeyError:
            known = ", ".join(self.peak_flops) or "none"
            raise ValueError(f"{self.name} has no peak_flops for {dtype!r}; known are {known}") from None

    def with_measured(self, tables: Mapping[str, Table]) -> Device:
        """The same device with `tables` added by signature, in place of older ones."""
        return replace(self, measured={**self.measured, **tables})

    def at_pace(self, pace: float) -> Device:
        """The same device where all that was measured takes `pace` times as long."""
        return replace(self, measured={name: table.scaled(pace) for name, table in self.measured.items()})

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a YAML file; fields that hold their default are left out."""
        plain: dict[str, Any] = {"name": self.name, "kind": self.kind}
        if self.vendor:
            plain["vendor"] = self.vendor
        plain |= {"memory_bytes": self.memory_bytes, "bandwidth": self.bandwidth}
        plain |= {"peak_flops": dict(sorted(self.peak_flops.items())), "units": self.units}
        if self.launch_s is not None:
            plain["launch_s"] = self.launch_s
        if self.caches:
            plain["caches"] = [
                {"bytes": cache.bytes} | ({"bandwidth": cache.bandwidth} if cache.bandwidth else {})
                for cache in self.caches
            ]
        for name, tables in (("efficiency", self.efficiency), ("measured", self.measured)):
            if tables:
                plain[name] = {key: table.to_dict() for key, table in sorted(tables.items())}
        return plain | ({"citations": dict(sorted(self.citations.items()))} if self.citations else {})
