"""Machines that one does not have: devices, links and nodes from data sheets, each figure with its source.

The YAML files in `catalog/` give every constant as `{value, source}`, where the source is a key of the file's
`sources`; a constant without one is refused when the file is read. What no vendor states (latencies, achieved
shares of a bandwidth) is not here: it is fitted, in `fitted.yaml`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, TypeVar

import yaml

from stretto.core.errors import FieldError
from stretto.hardware.device import Cache, Device
from stretto.hardware.link import Link

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class NodeType:
    """A computer as sold.

    Attributes:
        devices: names of device types and how many of each.
        link: the link type between its devices.
        network: the link type of its network ports, None where the vendor leaves it open.
        source: where this is from.
    """

    name: str
    devices: tuple[tuple[str, int], ...]
    link: str
    network: str | None
    source: str


def devices() -> Mapping[str, Device]:
    """Device types by name."""
    return _read("devices.yaml", _device)


def links() -> Mapping[str, Link]:
    """Link types by name, without ends."""
    return _read("links.yaml", _link)


def nodes() -> Mapping[str, NodeType]:
    """Node types by name."""
    return _read("nodes.yaml", _node)


def device(name: str) -> Device:
    """The device type of that name; a `FieldError` lists the known ones."""
    return _find(devices(), name)


def link(name: str) -> Link:
    """The link type of that name; a `FieldError` lists the known ones."""
    return _find(links(), name)


def node(name: str) -> NodeType:
    """The node type of that name; a `FieldError` lists the known ones."""
    return _find(nodes(), name)


def _find(known: Mapping[str, T], name: str) -> T:
    if name not in known:
        raise FieldError("type", name, f"one of {', '.join(sorted(known))}")
    return known[name]


@cache
def _read(file: str, build: Callable[[str, Mapping[str, Any], _Sources], T]) -> Mapping[str, T]:
    document = yaml.safe_load((files("stretto.hardware") / "catalog" / file).read_text(encoding="utf-8"))
    entries = document["entries"].items()
    return {name: build(name, fields, _Sources(f"{file}: {name}", document["sources"])) for name, fields in entries}


class _Sources:
    """Takes `{value, source}` apart and keeps what each field cites."""

    def __init__(self, where: str, known: Mapping[str, str]) -> None:
        self._where = where
        self._known = known
        self.citations: dict[str, str] = {}

    def value(self, field: str, entry: Any) -> Any:
        if not (isinstance(entry, dict) and set(entry) == {"value", "source"} and entry["source"] in self._known):
            raise ValueError(f"{self._where}: {field} is {entry!r}; it must be {{value, source}} with a known source")
        self.citations[field] = self._known[entry["source"]]
        return entry["value"]


def _device(name: str, fields: Mapping[str, Any], sources: _Sources) -> Device:
    peaks = {dtype: float(sources.value(f"peak_flops.{dtype}", entry)) for dtype, entry in fields["peak_flops"].items()}
    caches = sources.value("caches", fields["caches"]) if "caches" in fields else ()
    return Device(
        name=name,
        kind=fields["kind"],
        vendor=fields["vendor"],
        memory_bytes=float(sources.value("memory_bytes", fields["memory_bytes"])),
        bandwidth=float(sources.value("bandwidth", fields["bandwidth"])),
        peak_flops=peaks,
        units=int(sources.value("units", fields["units"])),
        caches=tuple(Cache(bytes=float(size)) for size in caches),
        citations=sources.citations,
    )


def _link(name: str, fields: Mapping[str, Any], sources: _Sources) -> Link:
    bandwidth = float(sources.value("bandwidth", fields["bandwidth"]))
    return Link(name=name, kind=fields["kind"], bandwidth=bandwidth, per=fields["per"], citations=sources.citations)


def _node(name: str, fields: Mapping[str, Any], sources: _Sources) -> NodeType:
    held = sources.value("devices", fields["devices"])
    return NodeType(
        name=name,
        devices=tuple((type_, int(count)) for type_, count in held.items()),
        link=fields["link"],
        network=fields.get("network"),
        source=sources.citations["devices"],
    )
