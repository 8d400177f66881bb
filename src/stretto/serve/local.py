"""The real backend: passes on a model loaded in this process, computed in one worker thread so that the event
loop stays free.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from stretto.core.clock import RealClock
from stretto.models.batching import Segment
from stretto.models.thread import submit
from stretto.serve.backend import Pass, PassResult, Row
from stretto.serve.choosing import choose
from stretto.serve.spare import SpareMemory

if TYPE_CHECKING:
    import torch

    from stretto.models.kv_cache import KVCache
    from stretto.models.load import Model


class LocalBackend:
    """A `Backend` on `model`, with a KV cache of its own.

    Args:
        model: loaded, ready to run.
        pages, page_tokens: size of the KV cache.
        clock: the engine's.
        spare_pages: size of the spare memory for requests that are put back.
    """

    steps_at_once = 1

    def __init__(self, model: Model, *, pages: int, page_tokens: int, clock: RealClock, spare_pages: int = 0) -> None:
        self._model = model
        self._cache: KVCache = model.transformer.new_cache(pages=pages + 1, page_tokens=page_tokens)
        self._clock = clock
        self._spare: SpareMemory | None = None
        if spare_pages:
            away = model.transformer.new_cache(pages=spare_pages, page_tokens=page_tokens)
            self._spare = SpareMemory(self._cache, away)

    async def run(self, work: Pass, steps: int, news: asyncio.Event) -> PassResult:
        return await asyncio.wrap_future(submit(self.compute, work))

    def compute(self, work: Pass) -> PassResult:
        """Carry out one pass here and now, in the thread of the caller."""
        start = self._clock.now
        if self._spare is not None:
            self._spare.copy(work)
        self.move(work.moves)
        rows = (*work.prefill, *work.decode)
        logits = forward_rows(self._model, self._cache, rows, holes=work.holes)
        drawn = [row for row in rows if row.sampling is not None]
        tokens, logprobs = choose(logits.numpy(), drawn)
        return PassResult(tokens=tokens, spans_s=((start, self._clock.now),), logprobs=logprobs)

    def move(self, moves: Sequence[tuple[int, int, int]]) -> None:
        """Copy the keys and values of whole slots, one after another: (from, to, positions)."""
        for source, target, positions in moves:
            for layer in self._cache.layers:
                layer[target, :, :positions] = layer[source, :, :positions]

    def wipe(self) -> None:
        """Nothing to do: the next pass over a position writes its keys and values anew."""

    def forget(self, ids: Iterable[int]) -> None:
        """Likewise."""


def forward_rows(model: Model, cache: KVCache, rows: Sequence[Row], *, holes: int = 0) -> torch.Tensor:
    """Logits [rows that draw, vocabulary] of one pass over `rows`, and over `holes` rows whose results nobody wants.

    Rows of holes write to the cache's last page, which must belong to nobody.
    """
    import torch

    segments: list[Segment] = []
    tokens: list[int] = []
    for row in rows:
        yields = int(row.sampling is not None)
        segments.append(Segment(len(tokens), len(row.tokens), row.start, row.table, yields))
        tokens.extend(row.tokens)
    for _ in range(holes):
        segments.append(Segment(len(tokens), 1, 0, (cache.pages - 1,)))
        tokens.append(0)
    logits = model.transformer.forward(torch.tensor(tokens, dtype=torch.int64), segments, cache)
    return logits[: len(logits) - holes]
