"""Lowering: each work costed once, work conserved, ports shared only where tasks may meet."""

from __future__ import annotations

import numpy as np
import pytest

from stretto.core.schedule import Schedule
from stretto.core.simulate import simulate
from stretto.hardware import collective, cost
from stretto.hardware.cluster import Cluster, Devices, Node
from stretto.hardware.link import Link
from stretto.hardware.lower import Collective, Compute, Transfer, lower, of_work
from stretto.hardware.operation import Operation

MATMUL = Operation(name="m", kind="matmul", dtype="bf16", flops=2e12, bytes=1e9, shape=(1000, 1000, 1000000))


def cluster() -> Cluster:
    box = Node(name="box", count=2, devices=(Devices(type="a100-sxm-80gb", count=4),), link="nvlink3")
    return Cluster(name="two", nodes=(box,), network="ethernet-25g")


def test_compute_takes_what_cost_says_and_own_seconds_are_kept() -> None:
    schedule = Schedule()
    lane = schedule.lane("gpu")
    schedule.add([lane], work=Compute(device="box0/gpu0", operations=(MATMUL, MATMUL)))
    schedule.add([lane], seconds=0.25)
    timed = lower(schedule, cluster())
    expected = cost.total((MATMUL, MATMUL), cluster().device("box0/gpu0")).seconds
    np.testing.assert_allclose(timed.seconds, [expected, 0.25])
    assert simulate(timed).makespan == pytest.approx(expected + 0.25)


def test_two_messages_through_one_port_take_turns() -> None:
    """Through one Ethernet port a node two messages take twice as long; on NVLink, ports are apart."""
    for second, factor in ((("box0/gpu1", "box1/gpu1"), 2.0), (("box0/gpu2", "box0/gpu3"), 1.0)):
        schedule = Schedule()
        work = Transfer(source="box0/gpu0", target="box1/gpu0", bytes=1e9)
        schedule.add([schedule.lane("a")], work=work)
        schedule.add([schedule.lane("b")], work=Transfer(source=second[0], target=second[1], bytes=1e9))
        alone = of_work(work, cluster()).estimate.seconds
        assert simulate(lower(schedule, cluster())).makespan == pytest.approx(factor * alone, rel=0.01)


def test_bytes_drawn_are_bytes_sent() -> None:
    schedule = Schedule()
    for lane in ("a", "b"):
        schedule.add([schedule.lane(lane)], work=Transfer(source="box0/gpu0", target="box1/gpu0", bytes=3e6))
    timed = lower(schedule, cluster())
    drawn = np.bincount(timed.use.values, weights=timed.use_amount)
    assert sorted(timed.resources) == ["ethernet-25g into box1", "ethernet-25g out of box0"]
    np.testing.assert_allclose(drawn, 6e6)


def test_a_port_whose_users_hold_one_lane_is_not_shared() -> None:
    schedule = Schedule()
    lane = schedule.lane("nic")
    for _ in range(3):
        schedule.add([lane], work=Transfer(source="box0/gpu0", target="box1/gpu0", bytes=3e6))
    assert lower(schedule, cluster()).resources == ()


def test_ring_draws_from_each_port_what_the_formula_says() -> None:
    devices = tuple(f"box0/gpu{i}" for i in range(4))
    found = of_work(Collective(kind="all_reduce", devices=devices, bytes=8e6), cluster())
    assert len(found.draws) == 8
    assert set(found.draws.values()) == {1.5 * 8e6}
    assert found.estimate.seconds >= 1.5 * 8e6 / collective.effective_bandwidth(cluster().link_between(*devices[:2]))


def test_all_to_all_is_bound_by_the_busiest_port() -> None:
    devices = tuple(f"box{n}/gpu{i}" for n in range(2) for i in range(4))
    found = of_work(Collective(kind="all_to_all", devices=devices, bytes=8e8), cluster())
    out = found.draws["ethernet-25g out of box0"]
    assert out == pytest.approx(16 * 1e8)
    assert found.estimate.seconds >= 0.999 * out / found.capacity["ethernet-25g out of box0"]


def test_a_collective_of_one_is_free() -> None:
    found = of_work(Collective(kind="all_reduce", devices=("box0/gpu0",), bytes=8e6), cluster())
    assert found.estimate.seconds == 0


def test_mistakes_are_named() -> None:
    lonely = Cluster(name="lonely", nodes=(Node(name="a", devices=(Devices(type="a40", count=2),)),))
    with pytest.raises(ValueError, match=r"no link between a/gpu0 and a/gpu1"):
        of_work(Transfer(source="a/gpu0", target="a/gpu1", bytes=1), lonely)
    with pytest.raises(ValueError, match="no device 'b/gpu0'"):
        of_work(Compute(device="b/gpu0", operations=(MATMUL,)), lonely)
    with pytest.raises(ValueError, match="not a Compute"):
        of_work("sing", lonely)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="two for send_recv"):
        Collective(kind="send_recv", devices=("a", "b", "c"), bytes=1)


def test_a_bus_is_shared_by_all() -> None:
    """Of one node, that is: the bus of another node is another bus."""
    bus = Link(name="bus", kind="pcie", bandwidth=16e9, per="link")
    box = Cluster(name="box", nodes=(Node(name="n", count=2, devices=(Devices(type="a40", count=4),), link=bus),))
    for other, factor in (("n0", 2.0), ("n1", 1.0)):
        schedule = Schedule()
        for lane, node, pair in (("a", "n0", (0, 1)), ("b", other, (2, 3))):
            work = Transfer(source=f"{node}/gpu{pair[0]}", target=f"{node}/gpu{pair[1]}", bytes=1e9)
            schedule.add([schedule.lane(lane)], work=work)
        alone = of_work(work, box).estimate.seconds
        assert simulate(lower(schedule, box)).makespan == pytest.approx(factor * alone, rel=0.01)
