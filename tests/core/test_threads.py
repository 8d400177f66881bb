"""Plain functions called from coroutines: each on a thread of its own, whatever it raises and however long it takes."""

from __future__ import annotations

import asyncio
import contextvars
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from stretto.core.threads import on_executor, on_thread, plainly

WHO: contextvars.ContextVar[str] = contextvars.ContextVar("who", default="nobody")


def test_values_errors_and_the_context_come_through() -> None:
    async def main() -> None:
        WHO.set("somebody")
        assert await on_thread(lambda a, *, b: (a, b, WHO.get()), 1, b=2) == (1, 2, "somebody")
        with pytest.raises(KeyError, match="x"):
            await on_thread({}.__getitem__, "x")

    asyncio.run(main())


@pytest.mark.parametrize("raised", [StopIteration(7), SystemExit(3)])
def test_what_futures_cannot_hold_is_a_failure(raised: BaseException) -> None:
    def bad() -> None:
        raise raised

    async def main() -> None:
        said = f"{type(raised).__name__}: "
        with ThreadPoolExecutor(1) as pool:
            for call in (on_thread(bad), on_executor(pool, bad)):
                with pytest.raises(RuntimeError, match=said):
                    await asyncio.wait_for(call, 10)
        with pytest.raises(RuntimeError, match=said):
            plainly(bad)

    asyncio.run(main())


def test_as_many_run_at_once_as_are_called() -> None:
    meeting = threading.Barrier(40)

    async def main() -> list[Any]:
        return await asyncio.gather(*(on_thread(meeting.wait, 10) for _ in range(40)))

    assert sorted(asyncio.run(main())) == list(range(40))


def test_a_call_that_nobody_waits_for_keeps_nobody() -> None:
    hold = threading.Event()

    async def main() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(on_thread(hold.wait, 30), 0.1)

    began = time.monotonic()
    asyncio.run(main())
    assert time.monotonic() - began < 5
    hold.set()
    code = """
import asyncio, time
from stretto.core.threads import on_thread

async def main():
    asyncio.ensure_future(on_thread(time.sleep, 60))
    await asyncio.sleep(0.1)

asyncio.run(main())
"""
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert time.monotonic() - began < 30
