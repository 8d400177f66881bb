"""The devices of a cluster as a tree, and into how many equal groups it falls apart along its branches.

Groups that follow the tree keep their messages on its shorter links: nodes are its branches, and within a node on a
shared bus the devices are halved again and again (2 x 2 x 2), while a switch such as NVLink's makes all of them alike.
"""

from __future__ import annotations

from dataclasses import dataclass

from stretto.core.errors import UserError
from stretto.hardware import catalog
from stretto.hardware.cluster import Cluster, node_of
from stretto.hardware.device import Device
from stretto.serve.deploy.curves import Machine

HOST_LINK = "pcie5"
"""What joins a device to its host where the cluster does not say: 16 lanes of PCIe 5."""


@dataclass(frozen=True, slots=True)
class Tree:
    """A group of devices: its children are alike; a device has none."""

    children: tuple[Tree, ...] = ()

    @property
    def size(self) -> int:
        """Devices below."""
        return sum(child.size for child in self.children) if self.children else 1

    def is_partitionable(self, groups: int) -> bool:
        """Whether so many equal groups follow the branches."""
        count = len(self.children)
        if groups == 1:
            return True
        if count == 0:
            return False
        if groups <= count:
            return count % groups == 0
        return groups % count == 0 and all(child.is_partitionable(groups // count) for child in self.children)


def flat(devices: int) -> Tree:
    """Devices that are all joined alike."""
    return Tree((Tree(),) * devices) if devices > 1 else Tree()


def halved(devices: int) -> Tree:
    """Devices on a bus: halves of halves, as far as they go."""
    if devices % 2 or devices == 2:
        return flat(devices)
    return Tree((halved(devices // 2),) * 2)


def machine_of(cluster: Cluster, devices: int | None = None) -> tuple[Machine, Tree]:
    """The first `devices` of a cluster (None: all), which must be alike and lie in equal numbers on its nodes.

    Raises:
        UserError: if they do not, naming what differs.
    """
    listed = list(cluster.devices().items())
    count = len(listed) if devices is None else devices
    if count > len(listed):
        raise UserError(
            f"{count} devices are asked for, the cluster has {len(listed)}",
            field="devices",
            right=f"at most {len(listed)}",
        )
    taken = listed[:count]
    kinds = {device.name for _, device in taken}
    if len(kinds) > 1:
        raise UserError(
            f"the devices of cluster {cluster.name} are {', '.join(sorted(kinds))}",
            right="a deployment runs on devices of one type: plan for each type by a cluster file of its own",
        )
    by_node: dict[str, list[str]] = {}
    for path, _ in taken:
        by_node.setdefault(node_of(path), []).append(path)
    sizes = {len(paths) for paths in by_node.values()}
    if len(sizes) > 1:
        raise UserError(
            f"the nodes of cluster {cluster.name} give {', '.join(map(str, sorted(sizes)))} devices",
            field="devices",
            right="as many of each node",
        )
    each = sizes.pop()
    paths = list(by_node.values())
    device: Device = taken[0][1]
    near = cluster.link_between(paths[0][0], paths[0][1]) if each > 1 else None
    far = cluster.link_between(paths[0][0], paths[1][0]) if len(paths) > 1 else None
    inside = halved(each) if near is not None and near.kind == "pcie" else flat(each)
    tree = Tree((inside,) * len(paths)) if len(paths) > 1 else inside
    machine = Machine(device=device, near=near, far=far, node_devices=each, host=catalog.link(HOST_LINK))
    return machine, tree
