"""Slots: one contiguous range of rows that all requests join and leave, the layout of temporal fusion.

Temporal fusion (Flover, HiPC 2023) keeps all that belongs to a request in one slot of arrays whose outermost axis
is the slot, and has each step compute the range from the lowest to the highest slot in use as it lies. Nothing is
gathered, but whoever leaves in the middle of the range leaves a hole that is computed all the same. So holes are closed
by moving rows. In terms of pages, a slot is the case in which one page holds a whole request.

No tensors: the engine and its simulated twin both use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from stretto.core.errors import require
from stretto.serve.blocks import BlockPool

Reorder = Literal["eager", "threshold", "never"]
MOST_HOLES = 0.25
"""Share of the range that may be holes before "threshold" closes them."""

Move = tuple[int, int]


def fewest_moves(alive: Sequence[bool]) -> list[Move]:
    """The moves (from, to) that make the true entries contiguous, as few as any, in ascending order of both.

    A window as long as there are true entries slides over them all; the first position that already holds the most of
    them stays, the others move in. Time is linear in the number of slots.

    >>> fewest_moves([True, False, True, True, False, True])
    [(5, 1)]
    """
    count = sum(alive)
    inside = sum(alive[:count])
    start, most = 0, inside
    for first in range(1, len(alive) - count + 1):
        inside += alive[first + count - 1] - alive[first - 1]
        if inside > most:
            start, most = first, inside
    window = range(start, start + count)
    outside = [slot for slot, held in enumerate(alive) if held and slot not in window]
    holes = [slot for slot in window if not alive[slot]]
    return list(zip(outside, holes, strict=True))


class SlotPool(BlockPool):
    """A pool whose pages are slots: each request holds one, from its first token to its last.

    Args:
        slots: how many there are.
        slot_tokens: positions that a slot holds.
        reorder: when holes are closed: "eager" at the next step, "threshold" when they are more than a quarter of the
            range, "never".
    """

    def __init__(self, *, slots: int, slot_tokens: int, reorder: Reorder = "eager") -> None:
        super().__init__(pages=slots, page_tokens=slot_tokens)
        self.reorder = reorder
        self.moved = 0
        self._holder: list[int | None] = [None] * slots

    @property
    def range(self) -> tuple[int, int]:
        """The slots [low, high) that a step computes: from the lowest in use to the highest; (0, 0) when none is."""
        used = [slot for slot, holder in enumerate(self._holder) if holder is not None]
        return (used[0], used[-1] + 1) if used else (0, 0)

    @property
    def holes(self) -> int:
        low, high = self.range
        return high - low - self.held

    def holder(self, slot: int) -> int | None:
        """The request in `slot`."""
        return self._holder[slot]

    def fits(self, tokens: int) -> bool:
        return tokens <= self.page_tokens

    def can_allocate(self, request: int, tokens: int) -> bool:
        return tokens <= self.page_tokens and super().can_allocate(request, tokens)

    def allocate(self, request: int, tokens: int) -> tuple[int, ...]:
        """The slot nearest to growing nothing: a hole of the range first, else the one beside it."""
        require(tokens <= self.page_tokens, "tokens", tokens, f"at most {self.page_tokens}, the length of a slot")
        if request in self._tables:
            return ()
        slot = self._best_free()
        self._free.remove(slot)
        self._tables[request] = [slot]
        self._holders[slot] = 1
        self._holder[slot] = request
        return (slot,)

    def release(self, request: int) -> None:
        for slot in self._tables.get(request, ()):
            self._holder[slot] = None
        super().release(request)

    def close_holes(self) -> tuple[Move, ...]:
        """Make the slots in use contiguous if the policy says so; the moves, to be carried out in this order."""
        low, high = self.range
        if not self._due(low, high):
            return ()
        moves = fewest_moves([holder is not None for holder in self._holder])
        for source, target in moves:
            request = self._holder[source]
            assert request is not None
            self._holder[source], self._holder[target] = None, request
            self._tables[request] = [target]
            self._holders[target] = self._holders.pop(source)
            self._free.remove(target)
            self._free.append(source)
        self.moved += len(moves)
        return tuple(moves)

    def audit(self) -> None:
        super().audit()
        held = {slot: request for request, table in self._tables.items() for slot in table}
        assert self._holder == [held.get(slot) for slot in range(self.pages)], "a slot and its holder disagree"

    def _due(self, low: int, high: int) -> bool:
        holes = high - low - self.held
        if self.reorder == "threshold":
            return holes > MOST_HOLES * (high - low)
        return self.reorder == "eager" and holes > 0

    def _best_free(self) -> int:
        assert self._free, "no slot is free"
        low, high = self.range
        inside = [slot for slot in self._free if low <= slot < high]
        if inside:
            return min(inside)
        above = [slot for slot in self._free if slot >= high]
        return min(above) if above else max(self._free)
