"""An asyncio event loop on virtual time: nothing sleeps, and the order of events is (time, sequence),
whatever the hash seed.

asyncio's own C tasks and futures run on it, so code under test is the code that ships. What would bring back
the real world raises: sockets, threads, executors, `time.*` and `socket` called from product code. When nothing
is ready and no timer is left, the run is stuck, and `Deadlock` names every labelled wait.
"""

from __future__ import annotations

import asyncio
import contextvars
import socket
import sys
import threading
import time
from asyncio import events
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from heapq import heappop, heappush
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")

MAX_TIMERS_AT_ONE_INSTANT = 1_000_000


class Deadlock(RuntimeError):
    """Everybody waits and nothing will ever happen; the message says who waits for what."""


class Livelock(RuntimeError):
    """Events follow each other without end while time stands still."""


class RealWorld(RuntimeError):
    """Code on virtual time reached for a thread, a socket or the wall clock."""


class _Handle(list):  # type: ignore[type-arg]
    """[callback, args, context]; a list subclass because one is made for each step of each task."""

    __slots__ = ()

    def cancel(self) -> None:
        self[0] = None

    def cancelled(self) -> bool:
        return self[0] is None


class _Timer(_Handle):
    __slots__ = ("_when",)
    _when: float

    def when(self) -> float:
        return self._when


# To the type checker an unknown class: the real base is abstract in forty methods; most are refused here.
_Loop: Any = asyncio.AbstractEventLoop


def _refuse(what: str) -> Callable[..., NoReturn]:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise RealWorld(f"{what} is not available on virtual time; await the clock or the backend instead")

    return refuse


class VirtualLoop(_Loop):  # type: ignore[misc]
    """The loop itself. Use `run`, which also closes it and guards against the real world."""

    def __init__(self) -> None:
        self._now = 0.0
        self._sequence = 0
        self._ready: deque[_Handle] = deque()
        self._timers: list[tuple[float, int, Any]] = []
        self._closed = False
        self._running = False
        self._stopping = False
        self._failure: BaseException | None = None
        self.waits: dict[asyncio.Future[Any], str] = {}

    # What asyncio's tasks, futures and time-outs ask of a loop.

    def time(self) -> float:
        return self._now

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return self._running

    def is_closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        self._closed = True
        self._ready.clear()
        self._timers.clear()

    def stop(self) -> None:
        self._stopping = True

    def call_soon(self, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None) -> Any:
        handle = _Handle((callback, args, context))
        self._ready.append(handle)
        return handle

    def call_at(
        self,
        when: float,
        callback: Callable[..., Any],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> Any:
        timer = _Timer((callback, args, context))
        timer._when = when
        self._sequence = sequence = self._sequence + 1
        heappush(self._timers, (when, sequence, timer))
        return timer

    def call_later(
        self,
        delay: float,
        callback: Callable[..., Any],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> Any:
        return self.call_at(self._now + delay, callback, *args, context=context)

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, *, name: str | None = None, context: Any = None) -> asyncio.Task[Any]:
        return asyncio.Task(coro, loop=self, name=name, context=context)

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self._failure = context.get("exception") or RuntimeError(context.get("message", "failure in a callback"))

    async def shutdown_asyncgens(self) -> None:
        return None

    # What virtual time adds.

    def sleeper(self, seconds: float) -> asyncio.Future[None]:
        """A future that is done `seconds` from now: the quick way to sleep."""
        future: asyncio.Future[None] = asyncio.Future(loop=self)
        self._sequence = sequence = self._sequence + 1
        heappush(self._timers, (self._now + seconds, sequence, future))
        return future

    def skip(self, seconds: float) -> None:
        """Let virtual time pass while the caller keeps the loop busy: timers that fall due in between fire late."""
        self._now += seconds

    def run_forever(self) -> None:
        """Play events until `stop` is called; time jumps to the next timer whenever nothing is ready.

        Raises:
            Deadlock: when neither a ready callback nor a timer is left.
            Livelock: when a million timers fire at one instant.
        """
        if self._closed:
            raise RuntimeError("the loop is closed")
        ready, timers, future_type = self._ready, self._timers, asyncio.Future
        self._running, self._stopping = True, False
        still = 0
        events._set_running_loop(self)
        try:
            while not self._stopping:
                if ready:
                    callback, args, context = ready.popleft()
                    if callback is not None:
                        if context is None:
                            callback(*args)
                        else:
                            context.run(callback, *args)
                    continue
                if self._failure is not None:
                    raise self._failure
                if not timers:
                    raise Deadlock(self._who_waits())
                when, _, item = heappop(timers)
                if type(item) is _Timer:
                    if item[0] is None:
                        continue
                    ready.append(item)
                elif item.done():
                    continue
                elif isinstance(item, future_type):
                    item.set_result(None)
                if when > self._now:
                    self._now = when
                    still = 0
                else:
                    still += 1
                    if still > MAX_TIMERS_AT_ONE_INSTANT:
                        raise Livelock(f"time stands still at {self._now:.6g} s: {self._who_waits()}")
        finally:
            self._running = False
            events._set_running_loop(None)

    def run_until_complete(self, future: Any) -> Any:
        """Run until `future` is done; returns its result or raises its exception."""
        task = future if isinstance(future, asyncio.Future) else self.create_task(future)

        def stop(_: asyncio.Future[Any]) -> None:
            self.stop()

        task.add_done_callback(stop)
        try:
            self.run_forever()
        finally:
            task.remove_done_callback(stop)
        return task.result()

    def pending(self) -> list[asyncio.Task[Any]]:
        """The unfinished tasks of this loop, oldest first."""
        return sorted(asyncio.all_tasks(self), key=lambda task: (len(task.get_name()), task.get_name()))

    def _who_waits(self) -> str:
        labels = sorted(label for future, label in self.waits.items() if not future.done())
        unnamed = sum(not task.done() for task in asyncio.all_tasks(self)) - len(labels)
        lines = labels + ([f"{unnamed} unlabelled"] if unnamed > 0 else [])
        return f"deadlock at {self._now:.6g} s: " + ("; ".join(lines) or "nothing is scheduled")

    run_in_executor = _refuse("run_in_executor")
    call_soon_threadsafe = _refuse("call_soon_threadsafe")
    create_connection = _refuse("a socket")
    create_server = _refuse("a socket")
    create_datagram_endpoint = _refuse("a socket")
    sock_recv = _refuse("a socket")
    sock_sendall = _refuse("a socket")
    sock_connect = _refuse("a socket")
    sock_accept = _refuse("a socket")
    subprocess_exec = _refuse("a subprocess")
    subprocess_shell = _refuse("a subprocess")
    add_reader = _refuse("a file descriptor")
    add_writer = _refuse("a file descriptor")


_guard_lock = threading.Lock()
_guarded_threads: set[int] = set()
_originals: dict[tuple[Any, str], Any] = {}
_FORBIDDEN = (
    (time, ("sleep", "time", "monotonic", "perf_counter", "time_ns", "monotonic_ns", "perf_counter_ns")),
    (threading.Thread, ("start",)),
    (socket.socket, ("connect", "bind", "listen")),
)


def _guarded(original: Callable[..., Any], what: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() in _guarded_threads:
            caller = sys._getframe(1).f_globals.get("__name__", "").partition(".")[0]
            if caller not in sys.stdlib_module_names:
                raise RealWorld(f"{what} is not available on virtual time; await the clock or the backend instead")
        return original(*args, **kwargs)

    return call


@contextmanager
def _no_real_world() -> Iterator[None]:
    """Make the wall clock, threads and sockets raise in this thread; the standard library's own calls pass."""
    me = threading.get_ident()
    with _guard_lock:
        if not _guarded_threads:
            for owner, names in _FORBIDDEN:
                for name in names:
                    original = getattr(owner, name)
                    _originals[owner, name] = original
                    setattr(owner, name, _guarded(original, f"{owner.__name__}.{name}"))
        _guarded_threads.add(me)
    try:
        yield
    finally:
        with _guard_lock:
            _guarded_threads.discard(me)
            if not _guarded_threads:
                for (owner, name), original in _originals.items():
                    setattr(owner, name, original)
                _originals.clear()


def run(main: Callable[[VirtualLoop], Coroutine[Any, Any, T]]) -> T:
    """Run `main(loop)` on a fresh virtual loop to its end and return its result.

    What `main` leaves unfinished is cancelled, so that no task outlives its world.

    Raises:
        Deadlock: if `main` can never finish.
        RealWorld: if code on the loop touched threads, sockets or the wall clock.
    """
    loop = VirtualLoop()
    with _no_real_world():
        try:
            return loop.run_until_complete(main(loop))  # type: ignore[no-any-return]
        finally:
            left = loop.pending()
            for task in left:
                task.cancel()
            if left:
                gathered = asyncio.gather(*left, return_exceptions=True)
                loop.run_until_complete(gathered)
            loop.close()
