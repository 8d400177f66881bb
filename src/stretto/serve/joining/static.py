"""Static batches: a batch is filled, then runs until its longest member is done; the baseline that others are
held against.
"""

from __future__ import annotations

from collections.abc import Sequence

from stretto.serve.joining.base import Joining, Waiting


class Static(Joining):
    """Waits for a full batch, or for the news that no more will come."""

    def join(self, waiting: Sequence[Waiting], running: int, now_s: float, closed: bool) -> Sequence[int]:
        if running or (len(waiting) < self.slots and not closed):
            return []
        return [request.id for request in waiting[: self.slots]]
