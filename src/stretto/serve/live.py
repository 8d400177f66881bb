"""A request as the scheduler knows it, from its arrival to its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter

from stretto.serve.joining import Waiting


@dataclass(slots=True)
class LiveRequest:
    """One live request. `computed` positions have their KV, in its pages or in spare ones; `produced` tokens are out;
    its text is `prompt + produced` long; `prefix` has a hash for each full page of its prompt; `seen` is what joining
    policies see of it.
    """

    id: int
    arrived_s: float
    prompt: int
    limit: int
    prefix: tuple[str, ...] = ()
    priority: int = 0
    produced: int = 0
    computed: int = 0
    seen: Waiting = field(init=False)

    def __post_init__(self) -> None:
        self.seen = Waiting(
            id=self.id, arrived_s=self.arrived_s, prompt=self.prompt, limit=self.limit, priority=self.priority
        )

    @property
    def length(self) -> int:
        return self.prompt + self.produced

    @property
    def decoding(self) -> bool:
        return self.produced > 0 and self.computed == self.length - 1


def by_urgency(requests: Sequence[LiveRequest]) -> list[LiveRequest]:
    """The urgent ones first, equals in the order given."""
    return sorted(requests, key=attrgetter("priority"))
