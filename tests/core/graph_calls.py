"""What tests of the graph executor share: both clocks, and calls that sleep."""

from __future__ import annotations

import asyncio
from typing import Any

from stretto.core.clock import Clock, RealClock, simulate_async


def both_clocks(main: Any) -> list[Any]:
    """What `main(clock, seconds)` gives on virtual time in seconds, and on real time in fiftieths."""
    return [simulate_async(lambda clock: main(clock, 1.0)), asyncio.run(main(RealClock(), 0.02))]


def sleeper(clock: Clock, seconds: float, value: Any = None) -> Any:
    async def call(*values: Any) -> Any:
        await clock.sleep(seconds)
        return value if value is not None else values

    return call
