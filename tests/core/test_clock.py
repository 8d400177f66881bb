"""The virtual loop: order, time-outs, cancellation, deadlocks named by their labels, and no way out to the
real world.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto.core import virtual_loop
from stretto.core.clock import Clock, RealClock, VirtualClock, simulate_async
from stretto.core.virtual_loop import Deadlock, Livelock, RealWorld


@given(st.lists(st.floats(0, 100), min_size=1, max_size=30))
def test_sleepers_wake_in_order_of_time_then_of_call(delays: list[float]) -> None:
    woken: list[tuple[float, int]] = []

    async def main(clock: VirtualClock) -> None:
        async def sleeper(number: int, delay: float) -> None:
            await clock.sleep(delay)
            assert clock.now == delay
            woken.append((delay, number))

        await asyncio.gather(*(sleeper(i, d) for i, d in enumerate(delays)))

    simulate_async(main)
    assert woken == sorted((d, i) for i, d in enumerate(delays))


def test_time_out_cancels_what_it_holds() -> None:
    async def main(clock: VirtualClock) -> tuple[float, bool]:
        cancelled = False

        async def endless() -> None:
            nonlocal cancelled
            try:
                await clock.sleep(1e9)
            except asyncio.CancelledError:
                cancelled = True
                raise

        with pytest.raises(TimeoutError):
            async with clock.timeout(2.5):
                await endless()
        return clock.now, cancelled

    assert simulate_async(main) == (2.5, True)


def test_a_time_out_that_is_not_reached_leaves_no_trace() -> None:
    async def main(clock: VirtualClock) -> float:
        async with clock.timeout(100.0):
            await clock.sleep(1.0)
        return clock.now

    assert simulate_async(main) == 1.0


def test_deadlock_names_every_wait() -> None:
    async def main(clock: VirtualClock) -> None:
        loop = asyncio.get_running_loop()
        a, b = loop.create_future(), loop.create_future()
        await asyncio.gather(clock.wait(a, "rank 0 waits for rank 1"), clock.wait(b, "rank 1 waits for rank 0"))

    with pytest.raises(Deadlock, match="rank 0 waits for rank 1; rank 1 waits for rank 0"):
        simulate_async(main)


def test_livelock_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(virtual_loop, "MAX_TIMERS_AT_ONE_INSTANT", 1000)

    async def main(clock: VirtualClock) -> None:
        while True:
            await clock.sleep(0.0)

    with pytest.raises(Livelock, match="time stands still at 0 s"):
        simulate_async(main)


@pytest.mark.parametrize(
    "touch",
    [
        lambda: time.sleep(0.0),
        lambda: time.monotonic(),
        lambda: threading.Thread(target=print).start(),
        lambda: asyncio.get_running_loop().run_in_executor(None, print),
    ],
)
def test_the_real_world_is_out_of_reach_on_virtual_time(touch: Any) -> None:
    async def main(clock: VirtualClock) -> None:
        touch()

    with pytest.raises(RealWorld, match="not available on virtual time"):
        simulate_async(main)
    time.sleep(0.0)
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()


def test_two_worlds_in_two_threads_do_not_disturb_each_other() -> None:
    ends: dict[int, float] = {}

    async def main(clock: VirtualClock) -> float:
        for _ in range(200):
            await clock.sleep(0.5)
        return clock.now

    def live(number: int) -> None:
        ends[number] = simulate_async(main)

    threads = [threading.Thread(target=live, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.0)
    for thread in threads:
        thread.join()
    assert ends == dict.fromkeys(range(4), 100.0)


def test_host_work_keeps_everybody_else_waiting() -> None:
    seen: list[tuple[str, float]] = []

    async def main(clock: VirtualClock) -> None:
        async def other() -> None:
            await clock.sleep(1.0)
            seen.append(("other", clock.now))

        task = asyncio.ensure_future(other())
        await clock.sleep(0.5)
        with clock.spend("host", 2.0):
            seen.append(("host", clock.now))
        await task

    simulate_async(main)
    assert seen == [("host", 0.5), ("other", 2.5)]


def test_tasks_left_over_are_cancelled_at_the_end_of_the_world() -> None:
    ended = []

    async def main(clock: VirtualClock) -> None:
        async def lingering() -> None:
            try:
                await clock.sleep(100)
            finally:
                ended.append(True)

        clock.task = asyncio.ensure_future(lingering())  # type: ignore[attr-defined]
        await clock.sleep(1)

    simulate_async(main)
    assert ended == [True]


def exercise(clock: Clock) -> Any:
    """The same lines on either clock: queues, events, gather, time-outs, spend."""

    async def main() -> list[str]:
        log: list[str] = []
        queue: asyncio.Queue[int] = asyncio.Queue(maxsize=1)

        async def producer() -> None:
            for i in range(3):
                await clock.sleep(0.002)
                await queue.put(i)

        async def consumer() -> None:
            for _ in range(3):
                log.append(f"got {await queue.get()}")

        await asyncio.gather(producer(), consumer())
        try:
            async with clock.timeout(0.001):
                await clock.wait(asyncio.get_running_loop().create_future(), "nothing")
        except TimeoutError:
            log.append("timed out")
        with clock.spend("work", 0.001):
            log.append("worked")
        return log

    return main()


def test_both_clocks_run_the_same_lines_alike() -> None:
    async def real() -> Any:
        return await exercise(RealClock())

    virtual = simulate_async(exercise)
    assert asyncio.run(real()) == virtual == ["got 0", "got 1", "got 2", "timed out", "worked"]


def test_same_program_same_order_however_often() -> None:
    async def main(clock: VirtualClock) -> list[int]:
        order: list[int] = []
        lock = asyncio.Lock()

        async def worker(number: int) -> None:
            for k in range(5):
                await clock.sleep(((number * 7 + k * 3) % 5) * 0.1)
                async with lock:
                    order.append(number)

        await asyncio.gather(*(worker(i) for i in range(20)))
        return order

    random.seed(1)
    assert simulate_async(main) == simulate_async(main)
