"""A cluster with other figures: what if its links were twice as fast, or its devices held 16 GB more?

A change is written `name=2x` (times) or `name=+16GB`, `name=-1GB/s` (more or less); several are joined by commas.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace

from stretto.core.errors import UserError
from stretto.hardware.cluster import Cluster, Devices, Node
from stretto.hardware.device import Device
from stretto.hardware.link import Link

Change = Callable[[float], float]
NAMES = ("link", "network", "memory", "bandwidth", "flops")
"""What can be changed: links within nodes, the network, devices' memory, its bandwidth, their peaks."""

_TIMES = re.compile(r"(\d+(?:\.\d+)?)x")
_PLUS = re.compile(r"([+-]\d+(?:\.\d+)?)(GB(?:/s)?|TFLOPS)")
_UNITS = {"memory": ("GB", 1e9), "flops": ("TFLOPS", 1e12)}
_RATE = ("GB/s", 1e9)


def parse(text: str) -> Mapping[str, Change]:
    """The changes that `text` tells of, by name.

    Raises:
        UserError: if a name or a change is not known, naming what is.

    >>> changes = parse("link=2x,memory=+16GB")
    >>> changes["link"](450e9), changes["memory"](80e9)
    (900000000000.0, 96000000000.0)
    """
    found: dict[str, Change] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, _, value = part.partition("=")
        if name not in NAMES:
            raise UserError(f"there is no {name!r} to change", field="what-if", right=f"one of {', '.join(NAMES)}")
        found[name] = _change(name, value)
    return found


def _change(name: str, value: str) -> Change:
    unit, scale = _UNITS.get(name, _RATE)
    times, plus = _TIMES.fullmatch(value), _PLUS.fullmatch(value)
    if times and float(times[1]) > 0:
        factor = float(times[1])
        return lambda before: before * factor
    if plus and plus[2] == unit:
        more = float(plus[1]) * scale
        return lambda before: before + more
    raise UserError(f"{name} cannot become {value!r}", field="what-if", right=f"2x, +16{unit} or -1{unit}")


def changed(cluster: Cluster, text: str) -> Cluster:
    """`cluster` with the changes of `text`, under a name that says so; it is known by its figures alone, even if it was
    this machine.

    Raises:
        UserError: if the text is wrong, or a figure would not be positive.
    """
    changes = parse(text)
    try:
        return replace(
            cluster,
            name=f"{cluster.name} with {text}",
            nodes=tuple(_node(node, changes) for node in cluster.nodes),
            network=_link(cluster._network, changes.get("network")),
            links=tuple(link for one in cluster.links if (link := _link(one, changes.get("link"))) is not None),
        )
    except ValueError as problem:
        raise UserError(f"this change cannot be: {problem}", field="what-if", right="figures above 0") from None


def _node(node: Node, changes: Mapping[str, Change]) -> Node:
    devices = tuple(Devices(device=_device(held.resolved, changes), count=held.count) for held in node.held)
    return replace(node, type=None, devices=devices, link=_link(node.fabric, changes.get("link")))


def _device(device: Device, changes: Mapping[str, Change]) -> Device:
    def of(name: str, before: float) -> float:
        return changes[name](before) if name in changes else before

    return replace(
        device,
        measured={},  # of a machine that is not this one any more
        citations={name: source for name, source in device.citations.items() if name != "machine"},
        memory_bytes=of("memory", device.memory_bytes),
        bandwidth=of("bandwidth", device.bandwidth),
        peak_flops={dtype: of("flops", peak) for dtype, peak in device.peak_flops.items()},
    )


def _link(link: Link | None, change: Change | None) -> Link | None:
    return link if link is None or change is None else replace(link, bandwidth=change(link.bandwidth))
