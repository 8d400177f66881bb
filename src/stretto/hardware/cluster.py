"""A cluster as a file tells it: nodes with devices and links, counted or written out, catalogued or measured.

Devices have paths such as "node0/gpu3". Two devices are joined by every link whose ends cover them: the
node's own link between devices of one node, the cluster's network between nodes, and links of their own in
`links`. The fingerprint is a hash of the machines' figures: names of types, sources, the order of fields and
tables that calibration added do not change it, so a plan stays valid when its machine is calibrated anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from stretto.core.errors import FieldError, require
from stretto.hardware import catalog
from stretto.hardware.device import Device
from stretto.hardware.link import Link
from stretto.hardware.table import Table


@dataclass(frozen=True, kw_only=True)
class Devices:
    """Some devices of one type: a name from the catalog, or the device itself.

    Attributes:
        type: a device type of the catalog; or
        device: a device written out, as `probe` does.
        count: how many.
    """

    type: str | None = None
    device: Device | None = None
    count: int = 1

    def __post_init__(self) -> None:
        require((self.type is None) != (self.device is None), "type", self.type, "given where `device` is not")
        require(1 <= self.count <= 1024, "count", self.count, "from 1 to 1024")
        if self.type is not None:
            catalog.device(self.type)

    @property
    def resolved(self) -> Device:
        """The device, from the catalog if need be."""
        return self.device or catalog.device(self.type or "")


@dataclass(frozen=True, kw_only=True)
class Node:
    """One computer, or several alike.

    Attributes:
        name: the path of its devices starts with it; where `count` is given, with the name and a number from
            0.
        type: a node type of the catalog, which says its devices and its link; or
        devices: what it holds, numbered by kind ("gpu0", "gpu1", "cpu0") in this order.
        link: what joins its devices: a link type of the catalog or a link written out; None where nothing
            does.
        count: how many alike.
    """

    name: str
    type: str | None = None
    devices: tuple[Devices, ...] = ()
    link: str | Link | None = None
    count: int | None = None

    def __post_init__(self) -> None:
        require(bool(self.name) and "/" not in self.name, "name", self.name, "a name without a slash")
        require(self.count is None or 1 <= self.count <= 65536, "count", self.count, "from 1 to 65536")
        require((self.type is None) != (not self.devices), "devices", self.devices, "given where `type` is not")
        if self.type is not None:
            catalog.node(self.type)
        if isinstance(self.link, str):
            _known_link("link", self.link)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the nodes that this entry stands for."""
        return (self.name,) if self.count is None else tuple(f"{self.name}{i}" for i in range(self.count))

    @property
    def held(self) -> tuple[Devices, ...]:
        """The devices, of its type if need be."""
        if self.type is None:
            return self.devices
        return tuple(Devices(type=kind, count=count) for kind, count in catalog.node(self.type).devices)

    @property
    def fabric(self) -> Link | None:
        """What joins its devices."""
        own = self.link if self.link is not None or self.type is None else catalog.node(self.type).link
        return catalog.link(own) if isinstance(own, str) else own

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a YAML file."""
        plain: dict[str, Any] = {"name": self.name}
        if self.count is not None:
            plain["count"] = self.count
        if self.type is not None:
            plain["type"] = self.type
        if self.devices:
            plain["devices"] = [
                ({"type": held.type} if held.device is None else {"device": held.device.to_dict()})
                | ({"count": held.count} if held.count > 1 else {})
                for held in self.devices
            ]
        return plain | _link_dict("link", self.link)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Machines and what joins them.

    Attributes:
        name: what people call it.
        nodes: computers; their names must differ.
        network: what joins devices of different nodes: a link type of the catalog or a link written out.
        links: further links with ends of their own.
    """

    name: str
    nodes: tuple[Node, ...]
    network: str | Link | None = None
    links: tuple[Link, ...] = ()

    def __post_init__(self) -> None:
        require(bool(self.nodes), "nodes", self.nodes, "at least one")
        names = [name for node in self.nodes for name in node.names]
        twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
        require(twice is None, "nodes", twice, "names that differ; give this one another")
        if isinstance(self.network, str):
            _known_link("network", self.network)
        for number, link in enumerate(self.links):
            require(
                len(link.ends) == 2,
                f"links.{number}.ends",
                link.ends,
                f"two paths, as link {link.name} joins two ends",
            )
            for end in link.ends:
                known = end in self._devices or end in self._fabrics
                right = f"a node or a device of the cluster, so that link {link.name} does not dangle"
                require(known, f"links.{number}.ends", end, right)

    def __hash__(self) -> int:
        return hash((self.name, self.nodes, self.links))

    def devices(self) -> Mapping[str, Device]:
        """All devices by path, in the order of the nodes."""
        return self._devices

    def device(self, path: str) -> Device:
        """The device at `path`.

        Raises:
            ValueError: if there is none, naming the path.
        """
        try:
            return self._devices[path]
        except KeyError:
            known = list(self._devices)
            shown = ", ".join(known[:4]) + (f", ... {known[-1]}" if len(known) > 4 else "")
            raise ValueError(f"cluster {self.name} has no device {path!r}; it has {shown}") from None

    def link_between(self, a: str, b: str) -> Link:
        """The fastest link that joins two devices.

        Raises:
            ValueError: if a path is unknown or nothing joins them, naming both.
        """
        joining = self._joining(a, b)
        if not joining or a == b:
            raise ValueError(f"cluster {self.name} has no link between {a} and {b}")
        return max(joining, key=lambda link: link.bandwidth)

    def _joining(self, a: str, b: str) -> list[Link]:
        for path in (a, b):
            self.device(path)
        node_a, node_b = node_of(a), node_of(b)
        shared = self._fabrics[node_a] if node_a == node_b else self._network
        return [link for link in self.links if _covers(link, a, b)] + ([shared] if shared else [])

    @cached_property
    def whole(self) -> bool:
        """Whether any two devices are joined by what their nodes and the network say, without `links`."""
        alone = all(sum(held.count for held in node.held) == 1 for node in self.nodes if node.fabric is None)
        return alone and (self._network is not None or sum(len(node.names) for node in self.nodes) == 1)

    def joins(self, a: str, b: str) -> bool:
        """Whether there is a link between two devices.

        Raises:
            ValueError: if a path is unknown.
        """
        return a != b and bool(self._joining(a, b))

    def fingerprint(self) -> str:
        """Twelve hexadecimal digits that change with every figure of the machines and their links."""
        return self._fingerprint

    def with_measured(self, path: str, tables: Mapping[str, Table]) -> Cluster:
        """The same cluster with `tables` added to the device at `path` and to those of the same entry.

        Raises:
            ValueError: if there is no such device.
        """
        self.device(path)
        nodes = []
        for node in self.nodes:
            if node_of(path) in node.names:
                node = replace(node, type=None, devices=_measured(node, path, tables), link=node.fabric)
            nodes.append(node)
        return replace(self, nodes=tuple(nodes))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a YAML file, from which an equal cluster is read."""
        plain: dict[str, Any] = {"name": self.name, "nodes": [node.to_dict() for node in self.nodes]}
        plain |= _link_dict("network", self.network)
        return plain | ({"links": [link.to_dict() for link in self.links]} if self.links else {})

    @cached_property
    def _devices(self) -> Mapping[str, Device]:
        return {
            f"{name}/{inner}": device
            for node in self.nodes
            for inside in [_numbered(node)]
            for name in node.names
            for inner, device in inside
        }

    @cached_property
    def _fabrics(self) -> Mapping[str, Link | None]:
        return {name: fabric for node in self.nodes for fabric in [node.fabric] for name in node.names}

    @cached_property
    def _network(self) -> Link | None:
        return catalog.link(self.network) if isinstance(self.network, str) else self.network

    @cached_property
    def _fingerprint(self) -> str:
        figures = {
            "devices": [
                [list(node.names), [[at, _device_figures(d)] for at, d in _numbered(node)]] for node in self.nodes
            ],
            "fabrics": [_link_figures(node.fabric) for node in self.nodes],
            "network": _link_figures(self._network),
            "links": sorted(json.dumps(_link_figures(link)) for link in self.links),
        }
        text = json.dumps(figures, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def node_of(path: str) -> str:
    """The node's name in a device's path."""
    return path.partition("/")[0]


def _numbered(node: Node) -> list[tuple[str, Device]]:
    numbered: list[tuple[str, Device]] = []
    seen = {"cpu": 0, "gpu": 0}
    for held in node.held:
        device = held.resolved
        for _ in range(held.count):
            numbered.append((f"{device.kind}{seen[device.kind]}", device))
            seen[device.kind] += 1
    return numbered


def _measured(node: Node, path: str, tables: Mapping[str, Table]) -> tuple[Devices, ...]:
    """The node's devices, with `tables` added to the entry that the device at `path` belongs to."""
    inner, changed, seen = path.partition("/")[2], [], {"cpu": 0, "gpu": 0}
    for held in node.held:
        device = held.resolved
        first = seen[device.kind]
        seen[device.kind] += held.count
        if inner in {f"{device.kind}{i}" for i in range(first, first + held.count)}:
            held = Devices(device=device.with_measured(tables), count=held.count)
        changed.append(held)
    return tuple(changed)


def _covers(link: Link, a: str, b: str) -> bool:
    """Whether one end holds `a` and the other `b`; a node holds its devices."""

    def holds(end: str, path: str) -> bool:
        return end in (path, node_of(path))

    left, right = link.ends
    return (holds(left, a) and holds(right, b)) or (holds(left, b) and holds(right, a))


def _known_link(where: str, name: str) -> None:
    try:
        catalog.link(name)
    except FieldError as problem:
        raise FieldError(where, name, problem.right) from None


def _link_dict(where: str, link: str | Link | None) -> dict[str, Any]:
    if link is None:
        return {}
    return {where: link if isinstance(link, str) else link.to_dict()}


_NOT_FIGURES = ("name", "vendor", "citations", "source", "axes", "measured")


def _figures(plain: Any) -> Any:
    """`plain` without what no prediction depends on, with every number a float (files may say 8 or 8.0)."""
    if isinstance(plain, dict):
        return {key: _figures(value) for key, value in plain.items() if key not in _NOT_FIGURES}
    if isinstance(plain, list):
        return [_figures(value) for value in plain]
    return float(plain) if isinstance(plain, int) else plain


def _device_figures(device: Device) -> Any:
    """A machine that was probed is known by its identity: measuring it again does not make it another one."""
    identity = device.citations.get("machine")
    return {"machine": identity} if identity else _figures(device.to_dict())


def _link_figures(link: Link | None) -> Any:
    return None if link is None else _figures(link.to_dict())
