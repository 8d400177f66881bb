"""Compiling what clients ask their answers to look like, in a thread of its own: the engine goes on meanwhile."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from stretto.core.errors import UserError
from stretto.serve.constraint import Grammar
from stretto.serve.grammar import MOST_SECONDS, STACK_BYTES, Grammars
from stretto.serve.http.errors import ApiError
from stretto.serve.http.structured import Wanted

PATIENCE_S = 3.0
"""Longest time that a request waits for its grammar."""


class Compiler:
    """The one thread in which grammars are compiled, one after another.

    Args:
        grammars: of the model.
    """

    def __init__(self, grammars: Grammars) -> None:
        self._grammars = grammars
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="stretto-grammar")

    async def grammar(self, wanted: Wanted | None) -> Grammar | None:
        """The grammar that a field asks for.

        Raises:
            ApiError: 400, naming the field, if it cannot be followed; 503 if others are compiled for too long.
        """
        if wanted is None:
            return None
        field, source = wanted
        began_s: list[float] = []

        def compiled() -> Grammar:
            began_s.append(time.perf_counter())
            return self._grammars.compile(source)

        before = threading.stack_size(STACK_BYTES)  # for the thread, which `submit` starts when there is none yet
        work = self._thread.submit(compiled)
        threading.stack_size(before)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(work), PATIENCE_S)
        except UserError as problem:
            right = f"; {problem.right}" if problem.right else ""
            raise ApiError(400, f"{field}: {problem.problem}{right}", param=field, code="invalid_value") from None
        except TimeoutError:
            if began_s and time.perf_counter() - began_s[0] > MOST_SECONDS:
                late = f"{field}: takes too long to compile; repeat less, or nest less"
                raise ApiError(400, late, param=field, code="invalid_value") from None
            busy = "grammars of other requests are being compiled; try again"
            raise ApiError(503, busy, param=field, code="busy", retry_after_s=1) from None

    def close(self) -> None:
        """Compile nothing more."""
        self._thread.shutdown(wait=False, cancel_futures=True)
