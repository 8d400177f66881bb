"""Bad days on demand: a seeded plan of faults, injected between a policy and its backend and nowhere else.

A `Faulty` backend call may crash (an error), stall (no answer for long), be delayed, be lost (no answer, the
work not done), be done twice, or be slow for a while. Which call is hit is drawn from counter-based streams,
so the plan of a seed is the same whatever else is random.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from stretto.core.clock import Clock
from stretto.core.random import integers, uniform

T = TypeVar("T")

KINDS = ("crash", "stall", "delay", "loss", "duplicate", "slow")


class BackendCrash(RuntimeError):
    """The backend died in a call: what it held is gone, and it has been restarted empty."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """One fault: it hits call number `call` (counted from 0), and `seconds` is its length where it has one.

    For "slow", calls `call .. call + span - 1` each take `seconds` longer.
    """

    kind: str
    call: int
    seconds: float = 0.0
    span: int = 1

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"fault: kind is {self.kind!r}; it must be one of {', '.join(KINDS)}")
        if self.call < 0 or self.seconds < 0 or self.span < 1:
            raise ValueError(f"fault: call {self.call}, seconds {self.seconds}, span {self.span} out of range")


def draw_faults(
    seed: int, *, count: int, calls: int, seconds: float, kinds: tuple[str, ...] = KINDS
) -> tuple[Fault, ...]:
    """`count` faults on distinct calls among the first `calls`, each up to `seconds` long, from `seed` alone."""
    if count > calls:
        raise ValueError(f"count is {count}; at most one fault a call, so it must be <= calls = {calls}")
    chosen: dict[int, Fault] = {}
    draw = 0
    while len(chosen) < count:
        call = int(integers(seed, 1, draw, calls))
        kind = kinds[int(integers(seed, 2, draw, len(kinds)))]
        length = float(uniform(seed, 3, draw)) * seconds
        span = 1 + int(integers(seed, 4, draw, 8)) if kind == "slow" else 1
        draw += 1
        chosen.setdefault(call, Fault(kind=kind, call=call, seconds=length, span=span))
    return tuple(sorted(chosen.values(), key=lambda fault: fault.call))


class FaultInjector:
    """Puts faults into calls: `await injector.call(work, wipe)` does `await work()` as well, as badly or as
    often as planned.

    Args:
        faults: the plan; two faults never hit the same call.
        clock: whose time a stall or a delay takes.
    """

    def __init__(self, faults: tuple[Fault, ...], clock: Clock) -> None:
        self._by_call: Mapping[int, Fault] = {f.call: f for f in faults if f.kind != "slow"}
        self._slow = tuple(f for f in faults if f.kind == "slow")
        self._clock = clock
        self.calls = 0
        self.injected: list[Fault] = []

    async def call(self, work: Callable[[], Awaitable[T]], wipe: Callable[[], None]) -> T:
        """Run one backend call under the plan.

        `wipe()` makes the backend forget what it holds, as a restart does.

        Raises:
            BackendCrash: when the plan says so.
        """
        number = self.calls
        self.calls += 1
        for slow in self._slow:
            if slow.call <= number < slow.call + slow.span:
                self.injected.append(slow)
                await self._clock.sleep(slow.seconds)
        fault = self._by_call.get(number)
        if fault is None:
            return await work()
        self.injected.append(fault)
        return await self._suffer(fault, work, wipe)

    async def _suffer(self, fault: Fault, work: Callable[[], Awaitable[T]], wipe: Callable[[], None]) -> T:
        if fault.kind == "crash":
            await self._clock.sleep(fault.seconds)
            wipe()
            raise BackendCrash(f"the backend crashed in call {fault.call}")
        if fault.kind == "loss":
            await self._clock.wait(asyncio.get_running_loop().create_future(), f"lost call {fault.call}")
        if fault.kind == "stall":
            result = await work()
            await self._clock.wait(asyncio.get_running_loop().create_future(), f"stalled call {fault.call}")
            return result
        if fault.kind == "duplicate":
            await work()
            return await work()
        await self._clock.sleep(fault.seconds)
        return await work()
