"""What the engine asks of whoever computes: one narrow interface, behind which stand the real model and its
simulated twin.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from stretto.serve.logprobs import Logprob
from stretto.serve.sampling import Sampling


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One request's part of a pass.

    Attributes:
        id: the request.
        tokens: the ids to feed: a chunk of its prompt, or its last token; the simulated twin looks at their
            number only.
        start: the position of the first of them, which is also how many positions are cached.
        table: the KV pages of the request, in order.
        sampling: how its next token is drawn; None if this chunk yields none.
        position: the position that the drawn token will have.
        ends: tokens that end its answer.
        logprobs: how many alternatives to tell the logprobs of beside the drawn token's own; None for no logprobs.
        mask: the tokens that may be drawn, a bit each, the lowest bit of a byte first; None for all.
    """

    id: int
    tokens: tuple[int, ...]
    start: int
    table: tuple[int, ...]
    sampling: Sampling | None
    position: int
    ends: frozenset[int] = frozenset()
    logprobs: int | None = None
    mask: bytes | None = None

    @property
    def plain(self) -> bool:
        """Whether the number of the largest logit is all that is wanted of this row."""
        greedy = self.sampling is not None and self.sampling.greedy
        return greedy and self.logprobs is None and self.mask is None


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """All rows of one pass; `prefill` rows first, then the ones that decode.

    Attributes:
        step: its number.
        moves: slots to copy before anything else, one after another: (from, to, positions).
        slots: the contiguous range [low, high) of slots whose every row is computed, holes included; None: the
            pass computes its own rows alone, by their block tables.
        swap_out: pages to copy to spare memory before anything else, even moves: (page, spare page, positions).
        swap_in: spare pages to copy back after that: (spare page, page, positions). A pass that comes twice is copied
            once: the pages it has given to others hold other texts by then.
    """

    step: int
    prefill: tuple[Row, ...]
    decode: tuple[Row, ...]
    moves: tuple[tuple[int, int, int], ...] = ()
    slots: tuple[int, int] | None = None
    swap_out: tuple[tuple[int, int, int], ...] = ()
    swap_in: tuple[tuple[int, int, int], ...] = ()

    @property
    def holes(self) -> int:
        """Rows of the range that belong to nobody."""
        if self.slots is None:
            return 0
        low, high = self.slots
        return high - low - len({row.table[0] for row in (*self.prefill, *self.decode)})

    @property
    def copied(self) -> int:
        """Positions that are copied from place to place."""
        return sum(positions for _, _, positions in (*self.moves, *self.swap_out, *self.swap_in))

    @property
    def phase(self) -> str:
        if self.prefill and self.decode:
            return "mixed"
        return "prefill" if self.prefill else "decode"


@dataclass(frozen=True, kw_only=True, slots=True)
class PassResult:
    """What came out.

    Attributes:
        tokens: for each row that yields tokens, its new ids: one for each step taken.
        spans_s: start and finish of each step, on the engine's clock.
        logprobs: for each row that asks for them, those of its new tokens.
    """

    tokens: Mapping[int, tuple[int, ...]]
    spans_s: tuple[tuple[float, float], ...]
    logprobs: Mapping[int, tuple[Logprob, ...]] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        return len(self.spans_s)


class Backend(Protocol):
    """Computes passes. A call may fail or never answer; the engine then calls `wipe` and starts over from the tokens.

    Attributes:
        steps_at_once: most steps that one call takes.
    """

    steps_at_once: int

    async def run(self, work: Pass, steps: int, news: asyncio.Event) -> PassResult:
        """Carry out `work`, and up to `steps` - 1 further steps of the same decode rows. The engine of two lanes has a
        pass of prompts and one of decoding rows carried out at once, each step by step.

        When `news` is set, something has arrived that the scheduler should see: end at the next step boundary.
        """

    def wipe(self) -> None:
        """Forget all KV and give up what is under way."""

    def forget(self, ids: Iterable[int]) -> None:
        """These requests are gone, or have lost their pages; whatever is kept for them may be dropped."""
