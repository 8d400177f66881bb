"""Shortest prompt first, with ageing: short questions do not wait behind long ones, and long ones not for ever."""

from __future__ import annotations

from collections.abc import Sequence

from stretto.serve.joining.base import Joining, Waiting

AGEING = 256.0
"""Prompt tokens by which a request counts as shorter for each second it has waited."""


class Shortest(Joining):
    """At every step, of the most urgent the one whose prompt, less 256 tokens a second waited, is shortest."""

    steady = False

    def join(self, waiting: Sequence[Waiting], running: int, now_s: float, closed: bool) -> Sequence[int]:
        by_length = sorted(waiting, key=lambda r: (r.priority, r.prompt - AGEING * (now_s - r.arrived_s)))
        return [request.id for request in by_length[: self.slots - running]]
