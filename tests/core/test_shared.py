"""Lanes that slow each other down between awaits, against times computed by hand and against conservation."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto.core.clock import VirtualClock, simulate_async
from stretto.core.fluid import Fluid
from stretto.core.shared import SharedDevice
from stretto.core.virtual_loop import Deadlock

BANDWIDTH = 100.0
USE = {"memory": 10.0}
"""Alone, a lane does 10 units a second and takes all the bandwidth."""


async def lane(clock: VirtualClock, device: SharedDevice, at: float, *works: float) -> list[float]:
    """Sleep until `at`, then do `works` one after another; when each was done."""
    await clock.sleep(at)
    ends = []
    for work in works:
        await device.execute(work, USE, 10.0)
        ends.append(clock.now)
    return ends


def test_two_lanes_compete_between_awaits() -> None:
    async def main(clock: VirtualClock) -> list[list[float]]:
        device = SharedDevice(clock, Fluid({"memory": BANDWIDTH}))
        return await asyncio.gather(lane(clock, device, 0.0, 10.0), lane(clock, device, 0.5, 10.0))

    # 0 .. 0.5: the first alone, 5 left; 0.5 .. 1.5: half the rate each; 1.5 .. 2: the second alone.
    first, second = simulate_async(main)
    assert first == pytest.approx([1.5])
    assert second == pytest.approx([2.0])


def test_a_lane_that_starts_again_competes_again() -> None:
    async def main(clock: VirtualClock) -> list[list[float]]:
        device = SharedDevice(clock, Fluid({"memory": BANDWIDTH}))
        return await asyncio.gather(lane(clock, device, 0.0, 5.0, 5.0), lane(clock, device, 0.0, 20.0))

    first, second = simulate_async(main)
    assert first == pytest.approx([1.0, 2.0])
    assert second == pytest.approx([3.0])


def test_what_is_cancelled_gives_its_share_back() -> None:
    async def main(clock: VirtualClock) -> tuple[list[float], list[float], float]:
        device = SharedDevice(clock, Fluid({"memory": BANDWIDTH}))
        first = asyncio.ensure_future(lane(clock, device, 0.0, 20.0))
        second = asyncio.ensure_future(lane(clock, device, 0.0, 10.0))
        await clock.sleep(1.0)
        with pytest.raises(TimeoutError):
            async with clock.timeout(0.6):
                await device.execute(10.0, USE, 10.0)
        cancelled = clock.now
        return await first, await second, cancelled

    # 0 .. 1: 5 a second each (15, 5 left); 1 .. 1.6: a third each (13, 3 left); the second needs 0.6 s more at half.
    first, second, cancelled = simulate_async(main)
    assert cancelled == pytest.approx(1.6)
    assert second == pytest.approx([2.2])
    assert first == pytest.approx([3.2])


def test_a_time_out_after_the_end_does_no_harm() -> None:
    async def main(clock: VirtualClock) -> float:
        device = SharedDevice(clock, Fluid({"memory": BANDWIDTH}))
        async with clock.timeout(1.5):
            await device.execute(10.0, USE, 10.0)
        await device.execute(10.0, USE, 10.0)
        return clock.now

    assert simulate_async(main) == pytest.approx(2.0)


def test_lanes_on_different_resources_do_not_meet() -> None:
    async def main(clock: VirtualClock) -> list[float]:
        device = SharedDevice(clock, Fluid({"memory": 100.0, "network": 1.0}))

        async def one(use: dict[str, float], peak: float) -> float:
            await device.execute(10.0, use, peak)
            return clock.now

        return await asyncio.gather(one({"memory": 10.0}, 10.0), one({"network": 1.0}, 10.0), one({}, 4.0))

    assert simulate_async(main) == pytest.approx([1.0, 10.0, 2.5])


def test_weights_divide_the_bandwidth() -> None:
    async def main(clock: VirtualClock) -> list[float]:
        device = SharedDevice(clock, Fluid({"memory": BANDWIDTH}))

        async def one(weight: float) -> float:
            await device.execute(6.0, USE, 10.0, weight=weight)
            return clock.now

        return await asyncio.gather(one(2.0), one(1.0))

    # The heavier one runs at 20/3 and ends at 0.9; the other has 3 left and 10 a second.
    assert simulate_async(main) == pytest.approx([0.9, 1.2])


def test_a_stuck_lane_is_named_by_its_label() -> None:
    async def main(clock: VirtualClock) -> None:
        device = SharedDevice(clock, Fluid({"memory": BANDWIDTH}))
        await device.execute(1.0, USE, 10.0, label="gpu0")
        await clock.wait(asyncio.get_running_loop().create_future(), "gpu1 executes")

    with pytest.raises(Deadlock, match="gpu1 executes"):
        simulate_async(main)


TASKS = st.lists(
    st.tuples(st.integers(0, 8), st.integers(1, 40), st.sampled_from([0.5, 1.0, 3.0, 10.0])), min_size=1, max_size=12
)


@given(TASKS)
def test_work_is_neither_made_nor_lost(tasks: list[tuple[int, int, float]]) -> None:
    capacity = 4.0

    async def main(clock: VirtualClock) -> list[float]:
        device = SharedDevice(clock, Fluid({"memory": capacity}))

        async def one(at: int, work: int, peak: float) -> float:
            await clock.sleep(float(at))
            await device.execute(float(work), {"memory": 1.0}, peak)
            return clock.now

        return await asyncio.gather(*(one(*task) for task in tasks))

    ends = simulate_async(main)
    alone = [work / min(peak, capacity) for _, work, peak in tasks]
    for (at, _, _), end, seconds in zip(tasks, ends, alone, strict=True):
        assert end >= at + seconds - 1e-9
    first = min(at for at, _, _ in tasks)
    last = max(at for at, _, _ in tasks)
    assert max(ends) >= first + sum(work for _, work, _ in tasks) / capacity - 1e-9
    assert max(ends) <= last + sum(alone) + 1e-9


def test_a_time_out_at_the_instant_the_work_ends_is_a_time_out() -> None:
    async def main(clock: VirtualClock) -> float:
        device = SharedDevice(clock, Fluid({"memory": 100.0}))
        with pytest.raises(TimeoutError):
            async with clock.timeout(1.0):
                await device.execute(10.0, {"memory": 10.0}, 10.0)
        await device.execute(10.0, {"memory": 10.0}, 10.0)
        return clock.now

    assert simulate_async(main) == 2.0
