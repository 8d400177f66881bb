"""Continuous batching: whoever waits joins at the next step boundary while a slot is free (Orca, Yu et al.,
OSDI 2022).
"""

from __future__ import annotations

from collections.abc import Sequence

from stretto.serve.joining.base import Joining, Waiting


class Continuous(Joining):
    """First come, first served among the equally urgent, at every step."""

    def join(self, waiting: Sequence[Waiting], running: int, now_s: float, closed: bool) -> Sequence[int]:
        return [request.id for request in waiting[: self.slots - running]]
