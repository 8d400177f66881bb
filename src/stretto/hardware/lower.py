"""Work and machines into numbers: from here on nobody knows what a matrix product or a link is.

Each distinct work of a schedule is costed once. Messages also draw on the ports of their links, so that two
that share a port slow each other down in `core.simulate`; a port whose users all hold one exclusive lane
cannot be contended and is left out, which keeps schedules without sharing on the fast path. A collective is
charged as flows between ring neighbours (between all pairs for all_to_all), and takes at least what its
busiest port needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from stretto.core.errors import require
from stretto.core.schedule import Schedule
from stretto.core.timed import Ints, Longs, Ragged, Timed, Use
from stretto.hardware import collective, cost
from stretto.hardware.cluster import Cluster, node_of
from stretto.hardware.cost import Estimate
from stretto.hardware.link import Link
from stretto.hardware.operation import Operation


@dataclass(frozen=True, kw_only=True)
class Compute:
    """Operations one after another on one device; `threads` as in `cost.estimate`."""

    device: str
    operations: tuple[Operation, ...]
    threads: int | None = None


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """A message from one device to another."""

    source: str
    target: str
    bytes: float

    def __post_init__(self) -> None:
        require(self.bytes >= 0, "bytes", self.bytes, "not negative")


@dataclass(frozen=True, kw_only=True)
class Collective:
    """A collective over devices in the order of its ring; `bytes` as in `collective`."""

    kind: str
    devices: tuple[str, ...]
    bytes: float

    def __post_init__(self) -> None:
        known = collective.COLLECTIVES
        require(self.kind in known, "kind", self.kind, f"one of {', '.join(known)}")
        require(len(set(self.devices)) == len(self.devices) >= 1, "devices", self.devices, "different paths")
        require(self.kind != "send_recv" or len(self.devices) == 2, "devices", self.devices, "two for send_recv")
        require(self.bytes >= 0, "bytes", self.bytes, "not negative")


Work = Compute | Transfer | Collective


@dataclass(frozen=True, kw_only=True)
class Costed:
    """What one work takes: seconds alone, bytes through each port, and each port's bytes/s."""

    estimate: Estimate
    draws: Mapping[str, float]
    capacity: Mapping[str, float]


def lower(schedule: Schedule, cluster: Cluster) -> Timed:
    """The schedule in numbers.

    Args:
        schedule: tasks whose works are `Compute`, `Transfer` or `Collective`, or that have seconds of their
            own.
        cluster: the machines that the works' paths name.

    Raises:
        ValueError: if a path is unknown, nothing joins two devices, or a device lacks what an operation
            needs.
    """
    costed = [of_work(work, cluster) for work in schedule.works]
    work = schedule.work_column
    of_works = np.array([one.estimate.seconds for one in costed] + [np.nan])
    use, capacity = _shared(schedule, costed)
    return schedule.timed(seconds=of_works[work], use=use, capacity=capacity)


def of_work(work: Work, cluster: Cluster) -> Costed:
    """The cost of one work on its own.

    Raises:
        ValueError: as `lower`, or if `work` is none of the three types.
    """
    if isinstance(work, Compute):
        estimate = cost.total(work.operations, cluster.device(work.device), threads=work.threads)
        return Costed(estimate=estimate, draws={}, capacity={})
    if isinstance(work, Transfer):
        return _messages("send_recv", (work.source, work.target), work.bytes, cluster)
    if isinstance(work, Collective):
        return _messages(work.kind, work.devices, work.bytes, cluster)
    raise ValueError(f"work {work!r} is not a Compute, a Transfer or a Collective")


def _messages(kind: str, devices: Sequence[str], bytes_: float, cluster: Cluster) -> Costed:
    draws: dict[str, float] = {}
    capacity: dict[str, float] = {}
    joining: list[Link] = []
    for source, target, amount in _flows(kind, devices, bytes_):
        link = cluster.link_between(source, target)
        joining.append(link)
        for port in _ports(link, source, target):
            draws[port] = draws.get(port, 0.0) + amount
            capacity[port] = collective.effective_bandwidth(link)
    if not joining:
        cluster.device(devices[0])
        return Costed(estimate=Estimate(0.0, 0.0, 0.0, "modelled"), draws={}, capacity={})
    slowest = min(joining, key=collective.effective_bandwidth)
    alone = collective.estimate(kind, bytes_, len(devices), slowest)
    busiest = max(draws[port] / capacity[port] for port in draws)
    stretched = max(1.0, busiest / alone.seconds) if alone.seconds else 1.0
    return Costed(estimate=alone.times(stretched), draws=draws, capacity=capacity)


def _flows(kind: str, devices: Sequence[str], bytes_: float) -> list[tuple[str, str, float]]:
    """Who sends how much to whom."""
    ranks = len(devices)
    if ranks == 1:
        return []
    if kind == "all_to_all":
        return [(a, b, bytes_ / ranks) for a in devices for b in devices if a != b]
    onward = list(pairwise(devices))
    ring = onward if kind in ("send_recv", "broadcast") else [*onward, (devices[-1], devices[0])]
    return [(a, b, collective.port_share(kind, ranks) * bytes_) for a, b in ring]


def _ports(link: Link, source: str, target: str) -> tuple[str, ...]:
    if link.per == "link":
        inside = node_of(source) if node_of(source) == node_of(target) else "all nodes"
        return (f"{link.name} of {'-'.join(link.ends) or inside}",)
    owners = (source, target) if link.per == "device" else (node_of(source), node_of(target))
    return tuple(f"{link.name} {way} {owner}" for way, owner in zip(("out of", "into"), owners, strict=True))


def _shared(schedule: Schedule, costed: Sequence[Costed]) -> tuple[Use, dict[str, float]]:
    """What tasks draw of ports that may be contended."""
    capacity = {port: rate for one in costed for port, rate in one.capacity.items()}
    number = {port: i for i, port in enumerate(capacity)}
    drawn = Ragged.of([[number[port] for port in one.draws] for one in costed])
    amounts = np.array([amount for one in costed for amount in one.draws.values()])

    work = schedule.work_column
    tasks = np.flatnonzero(work >= 0)
    row, at = _rows(drawn, work[tasks])
    task, port = tasks[row], drawn.values[at]
    kept = np.flatnonzero(_contended(schedule, task, port, len(capacity)))
    renumbered = np.full(len(capacity), -1)
    renumbered[kept] = np.arange(len(kept))
    chosen = renumbered[port] >= 0
    use = Use(task=task[chosen], resource=renumbered[port[chosen]], amount=amounts[at[chosen]])
    names = list(capacity)
    return use, {names[i]: capacity[names[i]] for i in kept}


def _contended(schedule: Schedule, task: Longs, port: Ints, num_ports: int) -> NDArray[np.bool_]:
    """Of each port, whether two of its users may run at once, as no exclusive lane is held by all of them."""
    users = np.bincount(port, minlength=num_ports)
    alone = schedule.timed(seconds=np.zeros(len(schedule)))
    row, at = _rows(alone.holds, task)
    lane = alone.holds.values[at]
    exclusive = alone.widths[lane] == 0
    cell = port[row][exclusive].astype(np.int64) * len(alone.widths) + lane[exclusive]
    held, counts = np.unique(cell, return_counts=True)
    of_port = held // max(len(alone.widths), 1)
    serial = np.zeros(num_ports, bool)
    serial[of_port[counts == users[of_port]]] = True
    return (users > 1) & ~serial


def _rows(ragged: Ragged, rows: NDArray[np.integer]) -> tuple[Longs, Longs]:
    """The values of some rows, one after another: for each, which of `rows` it is in, and its place in `values`."""
    first = ragged.ptr[rows]
    counts = ragged.ptr[rows + 1] - first
    row = np.repeat(np.arange(len(rows)), counts)
    within = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    return row, first[row] + within
