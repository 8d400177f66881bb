"""What a joining policy sees and says. It is pure: the same state, the same answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Waiting:
    """A request that waits: its number, when it arrived (seconds), its prompt's length, its limit of new tokens, and
    its priority: the lower, the more urgent.
    """

    id: int
    arrived_s: float
    prompt: int
    limit: int
    priority: int = 0


class Joining(ABC):
    """Chooses among the waiting whenever a step boundary is reached.

    `steady`: time alone never changes whom it would admit while somebody runs.
    """

    steady = True

    def __init__(self, *, slots: int, max_wait_s: float) -> None:
        self.slots = slots
        self.max_wait_s = max_wait_s

    @abstractmethod
    def join(self, waiting: Sequence[Waiting], running: int, now_s: float, closed: bool) -> Sequence[int]:
        """The ids to admit now, in order, at most `slots - running` of them.

        Args:
            waiting: who waits, the urgent first, equals in order of arrival.
            running: how many run.
            now_s: seconds on the engine's clock.
            closed: whether no further request will arrive.
        """

    def wake_s(self, waiting: Sequence[Waiting], running: int) -> float | None:
        """When to be asked again though nothing has happened; None if never."""
        return None
