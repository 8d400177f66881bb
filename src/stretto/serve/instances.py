"""Several engines as one: copies of a model that run side by side, each with a queue of its own.

Concurrent instances are what serving systems did before they batched (one copy of the weights, and one read of
them, for each request in flight), and still the way to fill cores that one copy cannot.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from stretto.serve.engine import Engine
from stretto.serve.handle import Handle, TextStream
from stretto.serve.request import Request


class Instances:
    """What callers see of an `Engine`, over one or more of them; a request goes to the one with the fewest live ones.

    Args:
        engines: at least one; each owns its scheduler and its backend.
    """

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.engines = tuple(engines)

    @property
    def finished(self) -> int:
        return sum(engine.finished for engine in self.engines)

    def submit(self, request: Request, stream: TextStream | None = None) -> Handle:
        """See `Engine.submit`."""
        return min(self.engines, key=lambda engine: engine.live).submit(request, stream)

    def cancel_all(self) -> None:
        for engine in self.engines:
            engine.cancel_all()

    def close(self) -> None:
        for engine in self.engines:
            engine.close()

    async def run(self) -> None:
        """Serve until closed and empty; the first engine that fails ends them all."""
        async with asyncio.TaskGroup() as group:
            for engine in self.engines:
                group.create_task(engine.run())
