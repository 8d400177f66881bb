"""Dynamic batches: a batch starts when it is full or its oldest member has waited long enough (Triton's
dynamic batcher).
"""

from __future__ import annotations

from collections.abc import Sequence

from stretto.serve.joining.base import Joining, Waiting


class Dynamic(Joining):
    """Like static batches, but nobody waits for company longer than `max_wait_s`."""

    def join(self, waiting: Sequence[Waiting], running: int, now_s: float, closed: bool) -> Sequence[int]:
        if running or not waiting:
            return []
        overdue = now_s >= self._oldest_s(waiting) + self.max_wait_s
        if len(waiting) < self.slots and not overdue and not closed:
            return []
        return [request.id for request in waiting[: self.slots]]

    def wake_s(self, waiting: Sequence[Waiting], running: int) -> float | None:
        if running or not waiting:
            return None
        return self._oldest_s(waiting) + self.max_wait_s

    @staticmethod
    def _oldest_s(waiting: Sequence[Waiting]) -> float:
        return min(request.arrived_s for request in waiting)
