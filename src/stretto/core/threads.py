"""Plain functions called from coroutines, each on a thread of its own.

`asyncio.to_thread` shares a few threads, so that a call waits for one while its time-out runs, and the loop's end joins
them all. Here how many run at once is what a graph's limits say, and a call that nobody waits for any more keeps
neither the loop nor the process from ending.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import suppress
from functools import partial
from typing import Any


def plainly(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `function`; what ends iterations or the process is a failure of the call, as futures cannot hold it.

    Raises:
        RuntimeError: in place of StopIteration and SystemExit.
    """
    try:
        return function(*args, **kwargs)
    except (StopIteration, SystemExit) as problem:
        raise RuntimeError(f"{type(problem).__name__}: {problem}") from problem


async def on_thread(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What `function` gives, called on a thread of its own in the caller's context.

    Cancelled, it returns at once; the thread runs to its end, and what it gives is dropped.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()
    call = partial(contextvars.copy_context().run, plainly, function, *args, **kwargs)

    def settle(value: Any, problem: BaseException | None) -> None:
        if future.done():
            return
        if problem is None:
            future.set_result(value)
        else:
            future.set_exception(problem)

    def work() -> None:
        value, problem = None, None
        try:
            value = call()
        except BaseException as raised:  # noqa: BLE001 - it is the call's outcome
            problem = raised
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(settle, value, problem)

    threading.Thread(target=work, name=getattr(function, "__name__", "call"), daemon=True).start()
    return await future


async def on_executor(executor: Executor, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What `function` gives, called on any `concurrent.futures` executor."""
    return await asyncio.wrap_future(executor.submit(plainly, function, *args, **kwargs))
