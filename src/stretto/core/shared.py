"""A device on virtual time whose resources are shared: lanes that run side by side slow each other down between awaits.

`await device.execute(...)` starts a task in the fluid engine; whoever starts or ends changes everybody's
rates, so the device keeps one timer, at the engine's next completion, and arms it anew after each change.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from stretto.core.clock import VirtualClock
from stretto.core.fluid import Fluid


class SharedDevice:
    """Joins a fluid engine to a virtual clock.

    Args:
        clock: the virtual clock whose time work takes.
        fluid: the engine that holds the capacities; used by this device alone.
    """

    def __init__(self, clock: VirtualClock, fluid: Fluid) -> None:
        self._clock = clock
        self._fluid = fluid
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self._timer: Any = None

    async def execute(
        self,
        work: float,
        use: Mapping[str, float],
        peak: float,
        *,
        weight: float = 1.0,
        label: str = "device",
    ) -> None:
        """Do `work` units at up to `peak` units a second, each unit taking `use[r]` of resource r.

        Cancelling the await takes the work off the device at once.
        """
        self._catch_up()
        task = self._fluid.start(work, dict(use), peak, weight)
        done = self._clock.loop.create_future()
        self._waiting[task] = done
        self._arm()
        try:
            await self._clock.wait(done, f"{label} executes")
        except asyncio.CancelledError:
            self._catch_up()
            if self._waiting.pop(task, None) is not None:
                self._fluid.cancel(task)
            self._arm()
            raise

    def _catch_up(self) -> None:
        for task in self._fluid.advance(self._clock.now):
            done = self._waiting.pop(task, None)
            if done is not None and not done.done():
                done.set_result(None)

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        upcoming = self._fluid.next_completion()
        if upcoming is not None:
            self._timer = self._clock.loop.call_at(upcoming[0], self._fire)

    def _fire(self) -> None:
        self._timer = None
        self._catch_up()
        self._arm()
