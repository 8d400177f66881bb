"""Clusters: paths, links, files, fingerprints, and mistakes that are named; the catalog and its citations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from stretto import files
from stretto.hardware import catalog
from stretto.hardware.cluster import Cluster, Devices, Node
from stretto.hardware.device import Cache, Device
from stretto.hardware.link import Link
from stretto.hardware.table import Table

CLUSTERS = sorted((Path(__file__).parents[2] / "clusters").glob("*.yaml"))
SMALL = Device(
    name="small",
    kind="cpu",
    memory_bytes=1e9,
    bandwidth=1e10,
    peak_flops={"fp32": 1e11, "bf16": 2e11},
    caches=(Cache(bytes=3e4, bandwidth=1e11),),
    efficiency={"bandwidth@threads": Table.line("threads", [(1, 0.5), (2, 1.0)])},
    measured={"norm/fp32": Table.line("rows", [(1, 0.1)])},
    citations={"figures": "made up"},
)


def mixed() -> Cluster:
    bridge = Link(name="bridge", kind="nvlink", bandwidth=9e11, ends=("a0/gpu0", "a1/gpu0"))
    return Cluster(
        name="mixed",
        nodes=(
            Node(name="a", count=2, type="dgx-a100"),
            Node(name="b", devices=(Devices(type="a40", count=2), Devices(device=SMALL)), link="pcie4"),
        ),
        network="ethernet-25g",
        links=(bridge, Link(name="host", kind="pcie", bandwidth=1e12, ends=("b/cpu0", "b/gpu1"))),
    )


def test_paths_and_links() -> None:
    cluster = mixed()
    assert list(cluster.devices())[:2] == ["a0/gpu0", "a0/gpu1"]
    assert list(cluster.devices())[-3:] == ["b/gpu0", "b/gpu1", "b/cpu0"]
    assert cluster.device("a1/gpu7").name == "a100-sxm-80gb"
    for a, b, expected in (
        ("a0/gpu0", "a0/gpu5", "nvlink3"),
        ("a0/gpu0", "a1/gpu0", "bridge"),
        ("a1/gpu0", "a0/gpu0", "bridge"),
        ("a0/gpu1", "a1/gpu0", "ethernet-25g"),
        ("b/gpu0", "b/gpu1", "pcie4"),
        ("b/gpu1", "b/cpu0", "host"),
    ):
        assert cluster.link_between(a, b).name == expected


@pytest.mark.parametrize("cluster", [mixed(), *map(files.load_cluster, CLUSTERS)], ids=lambda c: c.name)
def test_what_is_written_is_read_back_equal(cluster: Cluster, tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(files.cluster_text(cluster))
    again = files.load_cluster(file)
    assert again == cluster
    assert again.fingerprint() == cluster.fingerprint()


def test_example_clusters_hold_what_their_names_say() -> None:
    held = {file.stem: files.load_cluster(file).devices() for file in CLUSTERS}
    assert [d.name for d in held["8xa100"].values()] == ["a100-sxm-80gb"] * 8
    assert [d.name for d in held["8xh100"].values()] == ["h100-sxm"] * 8
    assert len({d.name for d in held["mixed"].values()}) == 3


def test_fingerprint_changes_with_figures_and_with_nothing_else() -> None:
    cluster = mixed()
    own = cluster.fingerprint()
    b = cluster.nodes[1]
    assert len(own) == 12
    assert replace(cluster, name="other").fingerprint() == own
    peaks = dict(reversed(list(SMALL.peak_flops.items())))
    same = replace(SMALL, peak_flops=peaks, citations={}, name="renamed")
    assert replace(cluster, nodes=(cluster.nodes[0], _with(b, same))).fingerprint() == own
    assert cluster.with_measured("b/cpu0", {"x": Table.line("rows", [(1, 0.2)])}).fingerprint() == own
    assert replace(cluster, links=cluster.links[::-1]).fingerprint() == own
    for changed in (
        replace(cluster, nodes=(cluster.nodes[0], _with(b, replace(SMALL, bandwidth=1.1e10)))),
        replace(cluster, nodes=(replace(cluster.nodes[0], count=3), b)),
        replace(cluster, nodes=(cluster.nodes[0], replace(b, link="pcie3"))),
        replace(cluster, network="ethernet-100g"),
        replace(cluster, links=cluster.links[:1]),
    ):
        assert changed.fingerprint() != own


def _with(node: Node, device: Device) -> Node:
    return replace(node, devices=(node.devices[0], Devices(device=device)))


def test_a_written_out_catalog_type_has_the_same_fingerprint() -> None:
    named = Cluster(name="x", nodes=(Node(name="n", type="dgx-h100"),))
    device, link = catalog.device("h100-sxm"), catalog.link("nvlink4")
    written = Cluster(name="x", nodes=(Node(name="n", devices=(Devices(device=device, count=8),), link=link),))
    assert written.fingerprint() == named.fingerprint()


def test_a_probed_machine_is_known_by_its_identity() -> None:
    """Measuring it again, with other noise, does not void its plans."""
    probed = replace(SMALL, citations={"machine": "abc"})

    def alone(device: Device) -> str:
        return Cluster(name="x", nodes=(Node(name="n", devices=(Devices(device=device),)),)).fingerprint()

    assert alone(probed) == alone(replace(probed, bandwidth=2e10))
    assert alone(probed) != alone(replace(probed, citations={"machine": "def"})) != alone(SMALL)


def test_measured_tables_reach_the_device_and_keep_the_rest() -> None:
    table = Table.line("rows", [(1, 0.2)])
    changed = mixed().with_measured("a0/gpu3", {"x": table})
    assert changed.device("a0/gpu3").measured == {"x": table}
    assert changed.link_between("a0/gpu0", "a0/gpu1").name == "nvlink3"
    assert changed.device("b/gpu0") == mixed().device("b/gpu0")
    kinds = (Devices(type="a40", count=2), Devices(type="h100-pcie", count=2))
    two_kinds = Cluster(name="x", nodes=(Node(name="n", devices=kinds),)).with_measured("n/gpu3", {"x": table})
    assert [bool(device.measured) for device in two_kinds.devices().values()] == [False, False, True, True]
    with pytest.raises(ValueError, match="no device 'a9/gpu0'"):
        mixed().with_measured("a9/gpu0", {"x": table})


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("links: [{name: wire, kind: pcie, bandwidth: 1e9, ends: [n/gpu0, m]}]", "link wire does not dangle"),
        ("links: [{name: wire, kind: pcie, bandwidth: 1e9}]", "link wire joins two ends"),
        ("links: [{name: wire, kind: string, bandwidth: 1e9, ends: [n, n]}]", "kind"),
        ("links: [{name: wire, kind: pcie, bandwidth: -1.0, ends: [n, n]}]", "positive, in bytes/s"),
        ("network: carrier-pigeon", "ethernet-10g"),
        ("speed: 5", "no such field"),
    ],
)
def test_mistakes_in_a_file_are_told_with_their_place(text: str, told: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    nodes = "nodes: [{name: n, devices: [{type: a40, count: 2}]}]"
    file.write_text(f"name: bad\n{nodes}\n{text.replace('1e9', '1.0e+9')}\n")
    with pytest.raises(Exception, match=told) as caught:
        files.load_cluster(file)
    assert f"{file}:3" in str(caught.value)


@pytest.mark.parametrize(
    ("node", "told"),
    [
        ("{name: n, devices: [{type: gtx-9999}]}", "a100-sxm-80gb"),
        ("{name: n, devices: [{count: 2}]}", "given where `device` is not"),
        ("{name: n}", "given where `type` is not"),
        ("{name: n/m, type: dgx-a100}", "without a slash"),
        ("{name: n, count: 0, type: dgx-a100}", "from 1"),
    ],
)
def test_mistakes_in_nodes_are_told(node: str, told: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(f"name: bad\nnodes:\n  - {node}\n")
    with pytest.raises(Exception, match=told):
        files.load_cluster(file)


def test_twice_the_same_name_is_refused() -> None:
    with pytest.raises(ValueError, match="'n0'"):
        Cluster(name="x", nodes=(Node(name="n", count=2, type="dgx-a100"), Node(name="n0", type="dgx-a100")))


def test_every_constant_of_the_catalog_is_cited() -> None:
    assert len(catalog.devices()) >= 8
    for name, device in catalog.devices().items():
        wanted = {
            "memory_bytes",
            "bandwidth",
            "units",
            *(f"peak_flops.{dtype}" for dtype in device.peak_flops),
        }
        wanted |= {"caches"} if device.caches else set()
        assert wanted == set(device.citations), name
        assert device.launch_s is None
        assert not device.efficiency
        assert not device.measured
    for name, link in catalog.links().items():
        assert set(link.citations) == {"bandwidth"}, name
        assert link.latency_s is None
    for node in catalog.nodes().values():
        assert node.source
        assert all(type_ in catalog.devices() for type_, _ in node.devices)
        assert node.link in catalog.links()
        assert node.network is None or node.network in catalog.links()


def test_citations_name_a_source_and_a_year() -> None:
    for device in catalog.devices().values():
        assert all(any(f"({year})" in text for year in range(2010, 2030)) for text in device.citations.values())


def test_a_constant_without_a_source_is_refused() -> None:
    sources = catalog._Sources("devices.yaml: x", {"a": "A"})
    assert sources.value("bandwidth", {"value": 1, "source": "a"}) == 1
    for wrong in (1, {"value": 1}, {"value": 1, "source": "b"}):
        with pytest.raises(ValueError, match="with a known source"):
            sources.value("bandwidth", wrong)


def test_dense_peaks() -> None:
    """The figures of the data sheets without structured sparsity."""
    found = {
        name: catalog.device(name).peak("bf16") / 1e12 for name in ("a100-sxm-80gb", "h100-sxm", "h100-pcie", "a40")
    }
    assert found == {"a100-sxm-80gb": 312, "h100-sxm": 989, "h100-pcie": 756, "a40": 149.7}


def test_plain_yaml_is_all_a_cluster_needs() -> None:
    text = yaml.safe_dump(mixed().to_dict())
    assert "!!" not in text
