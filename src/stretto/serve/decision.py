"""What the scheduler says to do next: plain values, the same in the log, on virtual time and on real time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Lane = Literal["prompts", "tokens"]
"""Passes that run side by side: one of prompt chunks, one of decoding rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """Prompt positions start .. start+count-1 of one request; `last` if its next token comes out of this pass."""

    id: int
    start: int
    count: int
    last: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """What to do next.

    Attributes:
        prefill: prompt chunks of this step.
        decode: requests that each get one token a step.
        pages: page tables that grew: (id, new pages).
        preempted: requests whose pages were taken back before this step.
        moves: requests that change their slot before this step: (id, from, to, positions to copy).
        slots: the range of slots this step works on, in that layout.
        steps: for how many steps this holds unless something arrives, finishes or is cancelled.
        idle_until: nothing to do before this time (seconds); infinity: until an event. None: there is work.
        swap_out: pages to copy to spare memory before anything else: (page, spare page, positions).
        swap_in: pages to copy back after that: (spare page, page, positions).
        lane: where it is carried out, if there are lanes.
    """

    prefill: tuple[Chunk, ...] = ()
    decode: tuple[int, ...] = ()
    pages: tuple[tuple[int, tuple[int, ...]], ...] = ()
    preempted: tuple[int, ...] = ()
    moves: tuple[tuple[int, int, int, int], ...] = ()
    slots: tuple[int, int] | None = None
    steps: int = 1
    idle_until: float | None = None
    swap_out: tuple[tuple[int, int, int], ...] = ()
    swap_in: tuple[tuple[int, int, int], ...] = ()
    lane: Lane | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values; swaps and lanes are left out where there are none."""
        swaps = {"swap_out": self.swap_out, "swap_in": self.swap_in}
        return {
            "prefill": [[c.id, c.start, c.count, int(c.last)] for c in self.prefill],
            "decode": list(self.decode),
            "pages": [[i, list(new)] for i, new in self.pages],
            "preempted": list(self.preempted),
            "moves": [list(move) for move in self.moves],
            "slots": self.slots and list(self.slots),
            "steps": self.steps,
            "idle_until": self.idle_until if self.idle_until != float("inf") else "event",
            **{name: [list(copy) for copy in copies] for name, copies in swaps.items() if copies},
            **({"lane": self.lane} if self.lane else {}),
        }
