"""Awaited sleeps a second on the virtual clock, 1,000 tasks at once, beside asyncio's own loop on a virtual selector.

The peer is the usual way to have virtual time: a stock `BaseEventLoop` whose `time` is advanced by a selector
that never blocks.

Usage: python benchmarks/clock.py [--json] [--quick]
"""

from __future__ import annotations

import asyncio
import selectors
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np

import harness
from stretto.core.clock import VirtualClock, simulate_async

TASKS = 1000
GOAL_SLEEPS_PER_SECOND = 200_000.0


async def work(sleep: Callable[[float], Awaitable[Any]], sleeps: int) -> None:
    async def worker(number: int) -> None:
        for k in range(sleeps):
            await sleep(0.001 * ((number * 7 + k * 13) % 97 + 1))

    await asyncio.gather(*(worker(i) for i in range(TASKS)))


def ours(sleeps: int) -> float:
    async def main(clock: VirtualClock) -> float:
        await work(clock.sleep, sleeps)
        return clock.now

    return simulate_async(main)


class _VirtualSelector(selectors.SelectSelector):
    """Never blocks: adds the time that it was asked to wait to the loop's clock."""

    loop: _StockLoop

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout:
            self.loop.virtual += timeout
        return super().select(0)


class _StockLoop(asyncio.SelectorEventLoop):
    virtual = 0.0

    def time(self) -> float:
        return self.virtual


def stock(sleeps: int) -> float:
    selector = _VirtualSelector()
    loop = _StockLoop(selector)
    selector.loop = loop
    try:
        loop.run_until_complete(work(asyncio.sleep, sleeps))
        return loop.time()
    finally:
        loop.close()


def measure(quick: bool) -> Sequence[harness.Row]:
    sleeps, rounds = (100, 3) if quick else (300, 9)
    assert abs(ours(sleeps) - stock(sleeps)) < 1e-6, "both must end at the same virtual time"
    seconds: dict[str, list[float]] = {"ours": [], "stock": []}
    for _ in range(rounds):
        for name, run in (("ours", ours), ("stock", stock)):
            start = time.perf_counter()
            run(sleeps)
            seconds[name].append(time.perf_counter() - start)
    rate = TASKS * sleeps / np.array(seconds["ours"])
    peer = float(np.median(TASKS * sleeps / np.array(seconds["stock"])))
    low, middle, high = np.quantile(rate, [0.25, 0.5, 0.75])
    spread = float((high - low) / middle)
    return [
        harness.Row(
            name="awaited sleeps",
            ours=float(middle),
            unit="sleeps/s",
            goal=GOAL_SLEEPS_PER_SECOND,
            spread=spread,
        ),
        harness.Row(
            name="against stock asyncio",
            ours=float(middle),
            unit="sleeps/s",
            peer=peer,
            ratio=float(middle) / peer,
            goal=1.0,
            spread=spread,
        ),
    ]


if __name__ == "__main__":
    sys.exit(harness.main(measure, __doc__))
