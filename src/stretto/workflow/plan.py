"""The choice of a workflow plan: how many steps may run at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from stretto.core.errors import require
from stretto.core.trace import Trace


@dataclass(frozen=True, kw_only=True)
class WorkflowPlan:
    """How a graph of steps is run.

    Attributes:
        max_parallel: most steps at once.
    """

    max_parallel: int

    def __post_init__(self) -> None:
        require(1 <= self.max_parallel <= 10_000, "max_parallel", self.max_parallel, "in 1 .. 10000")

    def __str__(self) -> str:
        return f"{self.max_parallel} at once"


def candidates(widest: int, pinned: int | None) -> Iterator[WorkflowPlan]:
    """As many as ever run at once, and halves of it down to one; or the one that the job asks for."""
    if pinned is not None:
        yield WorkflowPlan(max_parallel=pinned)
        return
    yield WorkflowPlan(max_parallel=widest)
    most = 1 << (widest - 1).bit_length() >> 1
    while most >= 1 and widest > 1:
        yield WorkflowPlan(max_parallel=most)
        most >>= 1


def width(trace: Trace) -> int:
    """Most spans at one instant."""
    starts, ends = np.sort(trace.spans.start), np.sort(trace.spans.finish)
    running = np.arange(1, len(starts) + 1) - np.searchsorted(ends, starts, side="right")
    return int(running.max(initial=1))
