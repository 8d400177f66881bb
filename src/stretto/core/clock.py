"""One clock, two kinds: `RealClock` on asyncio's own loop, `VirtualClock` on a loop where waiting costs nothing.

Product code awaits only its backend and these methods, so the same lines run in production and, ten thousand
days of them a minute, in simulation. `spend` is host work: measured when real; when virtual the modelled seconds pass,
and, as on a real loop that is kept busy, nothing else runs meanwhile.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from stretto.core.virtual_loop import VirtualLoop, run

T = TypeVar("T")


class Clock(ABC):
    """What product code may know about time. Seconds since the clock was made."""

    @property
    @abstractmethod
    def now(self) -> float:
        """Seconds since the start of this clock."""

    @abstractmethod
    def sleep(self, seconds: float) -> Awaitable[None]:
        """Wait for `seconds`."""

    @abstractmethod
    async def wait(self, future: asyncio.Future[T], label: str) -> T:
        """Await `future`; `label` says who waits for what, in case it never comes."""

    @abstractmethod
    def spend(self, what: str, seconds: float) -> Any:
        """A context in which the host works on `what`: timed when real, `seconds` when virtual."""

    def timeout(self, seconds: float) -> asyncio.Timeout:
        """A scope that cancels what it holds after `seconds` and raises `TimeoutError`, as asyncio's own."""
        return asyncio.timeout(seconds)

    @property
    @abstractmethod
    def is_virtual(self) -> bool:
        """Whether time is only counted."""


SpendObserver = Callable[[str, float, float], None]


def _ignore(what: str, start: float, finish: float) -> None:
    return None


class RealClock(Clock):
    """Wall-clock time, from `time.perf_counter`. `on_spend(what, start, finish)` sees each stretch of host work."""

    def __init__(self, on_spend: SpendObserver = _ignore) -> None:
        self._start = time.perf_counter()
        self.on_spend = on_spend
        self.waits: dict[asyncio.Future[Any], str] = {}

    @property
    def now(self) -> float:
        return time.perf_counter() - self._start

    def restart(self) -> None:
        """From here on, this instant is 0."""
        self._start = time.perf_counter()

    @property
    def is_virtual(self) -> bool:
        return False

    def sleep(self, seconds: float) -> Awaitable[None]:
        return asyncio.sleep(seconds)

    async def wait(self, future: asyncio.Future[T], label: str) -> T:
        self.waits[future] = label
        try:
            return await future
        finally:
            self.waits.pop(future, None)

    @contextmanager
    def spend(self, what: str, seconds: float) -> Iterator[None]:
        start = self.now
        yield
        self.on_spend(what, start, self.now)


class VirtualClock(Clock):
    """Counted time. Made by `simulate_async`, or around a `VirtualLoop` of one's own."""

    def __init__(self, loop: VirtualLoop, on_spend: SpendObserver = _ignore) -> None:
        self.loop = loop
        self.on_spend = on_spend
        self.sleep = loop.sleeper  # type: ignore[method-assign]

    @property
    def now(self) -> float:
        return self.loop._now

    @property
    def is_virtual(self) -> bool:
        return True

    def sleep(self, seconds: float) -> Awaitable[None]:  # replaced by the loop's own in __init__
        return self.loop.sleeper(seconds)

    async def wait(self, future: asyncio.Future[T], label: str) -> T:
        self.loop.waits[future] = label
        try:
            return await future
        finally:
            self.loop.waits.pop(future, None)

    @contextmanager
    def spend(self, what: str, seconds: float) -> Iterator[None]:
        start = self.now
        yield
        self.loop.skip(seconds)
        self.on_spend(what, start, self.now)


def simulate_async(main: Callable[[VirtualClock], Coroutine[Any, Any, T]]) -> T:
    """Run `await main(clock)` on virtual time and return its result.

    >>> async def two_seconds(clock):
    ...     await clock.sleep(2.0)
    ...     return clock.now
    >>> simulate_async(two_seconds)
    2.0

    Raises:
        Deadlock: if nothing can ever happen again; the message names each labelled wait.
        RealWorld: if code on virtual time touched a thread, a socket or the wall clock.
    """
    return run(lambda loop: main(VirtualClock(loop)))
