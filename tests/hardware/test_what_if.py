"""Clusters with other figures."""

from __future__ import annotations

from dataclasses import replace

import pytest

from stretto.core.errors import UserError
from stretto.hardware import catalog
from stretto.hardware.cluster import Cluster, Devices, Node
from stretto.hardware.probe import is_this_machine, machine_identity
from stretto.hardware.table import Table
from stretto.hardware.what_if import changed

NODES = Cluster(name="two", nodes=(Node(name="n", type="dgx-h100", count=2),), network="ib-ndr400")


def test_each_figure_changes_alone() -> None:
    other = changed(NODES, "link=2x, memory=+16GB,flops=0.5x,bandwidth=-1GB/s,network=3x")
    before, after = NODES.device("n0/gpu0"), other.device("n1/gpu7")
    assert after.memory_bytes == before.memory_bytes + 16e9
    assert after.bandwidth == before.bandwidth - 1e9
    assert after.peak("bf16") == before.peak("bf16") / 2
    assert other.link_between("n0/gpu0", "n0/gpu1").bandwidth == 900e9
    assert other.link_between("n0/gpu0", "n1/gpu1").bandwidth == 150e9
    assert other.name.startswith("two with link=2x")
    assert other.fingerprint() != NODES.fingerprint()


def test_no_change_changes_no_figure() -> None:
    same = changed(NODES, "link=1x")
    assert same.fingerprint() == NODES.fingerprint()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("links=2x", "what-if: there is no 'links' to change; one of link, network, memory, bandwidth, flops"),
        ("link=2", "link cannot become '2'; 2x, \\+16GB/s or -1GB/s"),
        ("memory=+16", "memory cannot become '\\+16'; 2x, \\+16GB or -1GB"),
        ("memory=-90GB", "this change cannot be: memory_bytes is -10000000000.0"),
        ("link=0x", "link cannot become '0x'"),
    ],
)
def test_mistakes_say_what_would_be_right(text: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        changed(NODES, text)


def test_this_machine_with_other_figures_is_another_one() -> None:
    device = replace(
        catalog.device("h100-sxm"),
        citations={"machine": machine_identity()},
        measured={"x": Table.line("rows", [(1, 0.2)])},
    )
    here = Cluster(name="here", nodes=(Node(name="node0", devices=(Devices(device=device),)),))
    assert is_this_machine(here)
    other = changed(here, "memory=+64GB")
    assert not is_this_machine(other)
    assert other.fingerprint() != here.fingerprint()
    assert next(iter(other.devices().values())).measured == {}
