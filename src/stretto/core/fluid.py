"""The only sharing engine: tasks that draw on common resources, as fluids, driven a change at a time.

A task runs at x_i <= peak_i units of work a second, and sum of use_ir x_i <= C_r holds on each resource. Its
*rate alone* is alone_i = min(peak_i, min_r C_r / use_ir). The law "max-min" maximises the smallest x_i /
(weight_i alone_i), then the next smallest, and so on: tasks of equal weight on one bottleneck are slowed by
one factor, whatever units they count in. (For max-min of the rates themselves, as flows in a network, pass
weight = 1 / alone.) A `CoRunTable` replaces the law by measured slowdowns. Rates are exact to about 1e-13; a
change touches only the tasks that it reaches through saturated resources.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from stretto.core import _native


@dataclass(frozen=True, kw_only=True)
class CoRunTable:
    """Measured slowdowns: for the sorted kinds that run on one resource, the share of its rate alone that
    each one keeps.

    A kind that runs alone keeps all unless the table says otherwise; a task on several resources keeps the
    least of its
    shares; weights and capacities then play no part beyond the rate alone. A set that was not measured is an
    error.

    >>> CoRunTable(shares={("decode", "prefill"): (0.6, 0.8)}).kinds
    ('decode', 'prefill')
    """

    shares: Mapping[tuple[str, ...], tuple[float, ...]]

    def __post_init__(self) -> None:
        for kinds, shares in self.shares.items():
            if tuple(sorted(kinds)) != kinds or len(kinds) != len(shares):
                raise ValueError(f"co-run table: {kinds} must be sorted, with one share a kind, not {shares}")
            if len(set(zip(kinds, shares, strict=True))) != len(set(kinds)):
                raise ValueError(f"co-run table: {kinds} gives one kind two shares: {shares}")
            if not all(0 < share <= 1 for share in shares):
                raise ValueError(f"co-run table: shares {shares} of {kinds} must lie in (0, 1]")

    @property
    def kinds(self) -> tuple[str, ...]:
        """All kinds that were measured, sorted."""
        return tuple(sorted({kind for kinds in self.shares for kind in kinds}))


Law = Literal["max-min"] | CoRunTable


def native_fluid(capacities: Iterable[float], law: Law) -> _native.Fluid:
    """The native engine under `law`; kinds are numbered as in `CoRunTable.kinds`."""
    if not isinstance(law, CoRunTable):
        return _native.Fluid(list(capacities), None, [])
    number = {kind: at for at, kind in enumerate(law.kinds)}
    rows = [([number[kind] for kind in kinds], list(shares)) for kinds, shares in law.shares.items()]
    return _native.Fluid(list(capacities), rows, list(law.kinds))


class Fluid:
    """Running tasks and their rates. Time is in seconds from 0 and moves only by `advance`.

    >>> fluid = Fluid({"memory": 100.0})
    >>> copies = [fluid.start(10.0, {"memory": 10.0}, peak=10.0) for _ in range(2)]
    >>> fluid.next_completion()
    (2.0, 0)
    >>> fluid.advance(2.0)
    [0, 1]

    Args:
        capacities: units a second of each shared resource, by name; positive, may be infinite.
        law: "max-min" (see the module) or a `CoRunTable`.

    Raises:
        ValueError: if a capacity is not positive, or the law is unknown.
    """

    def __init__(self, capacities: Mapping[str, float], law: Law = "max-min") -> None:
        check_law(law)
        for name, capacity in capacities.items():
            if not capacity > 0:
                raise ValueError(f"fluid: capacity {capacity} of {name} must be positive")
        self._number = {name: at for at, name in enumerate(capacities)}
        self._kinds = {kind: at for at, kind in enumerate(law.kinds)} if isinstance(law, CoRunTable) else None
        self._native = native_fluid(capacities.values(), law)

    def __len__(self) -> int:
        return len(self._native)

    @property
    def now(self) -> float:
        """Seconds since the start."""
        return self._native.now

    def start(
        self,
        work: float,
        use: Mapping[str, float],
        peak: float = float("inf"),
        weight: float = 1.0,
        kind: str = "",
    ) -> int:
        """Start a task now.

        Args:
            work: units of work.
            use: amount of each resource that a unit of work draws.
            peak: most units of work a second.
            weight: its share under max-min, against 1.
            kind: its class in the `CoRunTable`; ignored under max-min.

        Returns:
            Its id; ids count up from 0 in the order of starts.

        Raises:
            ValueError: for an unknown resource or kind, a negative use, work or weight, or a rate alone that
                is not finite.
        """
        draws = []
        for name, amount in use.items():
            if name not in self._number:
                raise ValueError(f"fluid: unknown resource {name}; known are {', '.join(self._number)}")
            if not amount >= 0:
                raise ValueError(f"fluid: use {amount} of {name} must not be negative")
            if amount > 0:
                draws.append((self._number[name], amount))
        return self._native.start(work, draws, peak, weight, self._kind(kind))

    def _kind(self, kind: str) -> int:
        if self._kinds is None:
            return 0
        if kind not in self._kinds:
            raise ValueError(f"fluid: kind {kind!r} is not in the co-run table; known are {', '.join(self._kinds)}")
        return self._kinds[kind]

    def next_completion(self) -> tuple[float, int] | None:
        """When a task finishes next if nothing changes, and which (of equals the lowest id), or None."""
        return self._native.next_completion()

    def advance(self, to: float) -> list[int]:
        """Move time to `to` (seconds). Returns the tasks that finished, in the order of (time, id).

        Raises:
            ValueError: if `to` lies in the past.
        """
        if not to >= self.now:
            raise ValueError(f"fluid: cannot advance to {to}, it is {self.now} already")
        return self._native.advance(to)

    def cancel(self, task: int) -> float:
        """Stop a running task. Returns the units of work that it had left."""
        return self._native.cancel(task)

    def rate(self, task: int) -> float:
        """Units of work a second at which a running task proceeds now."""
        return self._native.rate(task)

    def in_use(self, resource: str) -> float:
        """Units a second drawn from `resource` now."""
        return self._native.in_use(self._number[resource])


def check_law(law: object) -> None:
    """Raises ValueError unless `law` is one of `Law`."""
    if law != "max-min" and not isinstance(law, CoRunTable):
        raise ValueError(f"law {law!r} must be 'max-min' or a CoRunTable")
