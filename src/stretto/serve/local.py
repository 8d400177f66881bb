"""The real backend: passes on a model loaded in this process, computed in one worker thread so that the event
loop stays free.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from stretto.core.clock import RealClock
from stretto.core.errors import require
from stretto.models.segment import Segment
from stretto.models.thread import submit
from stretto.serve.backend import Pass, PassResult, Row
from stretto.serve.choosing import choose
from stretto.serve.logprobs import Logprob
from stretto.serve.spare import SpareMemory

if TYPE_CHECKING:
    from stretto.models.kv_packed import Cache
    from stretto.models.load import Model


@dataclass(eq=False)
class _Step:
    """A pass under way: one that the engine has asked for, or one begun ahead of its asking."""

    work: Pass
    steps: int
    news: asyncio.Event
    asked: bool
    result: PassResult | None = None
    future: Future[PassResult] = field(init=False)

    def is_for(self, work: Pass) -> bool:
        return replace(self.work, step=work.step) == work


class LocalBackend:
    """A `Backend` on `model`, with a KV cache of its own.

    While a batch decodes, its next step is begun as soon as one is done, before the engine has seen the tokens: so
    their hand-out costs the model nothing. A step that the engine does not ask for after all is dropped; what it wrote
    lies beyond the end of every text, where nobody reads.

    Args:
        model: loaded, ready to run.
        pages, page_tokens: size of the KV cache.
        clock: the engine's.
        spare_pages: size of the spare memory for requests that are put back.
    """

    steps_at_once = 1

    def __init__(self, model: Model, *, pages: int, page_tokens: int, clock: RealClock, spare_pages: int = 0) -> None:
        self._model = model
        self._cache: Cache = model.transformer.new_cache(pages=pages + 1, page_tokens=page_tokens)
        self._clock = clock
        self._lock = threading.Lock()
        self._ahead: _Step | None = None
        self._tables: dict[int, tuple[int, ...]] = {}
        self._spare: SpareMemory | None = None
        if spare_pages:
            require(model.dtype != "int4", "spare_pages", spare_pages, "0 for keys and values in 4 bits")
            away = model.transformer.new_cache(pages=spare_pages, page_tokens=page_tokens)
            self._spare = SpareMemory(self._cache, away)

    async def run(self, work: Pass, steps: int, news: asyncio.Event) -> PassResult:
        return await asyncio.wrap_future(self._ask(work, steps, news).future)

    def _ask(self, work: Pass, steps: int, news: asyncio.Event) -> _Step:
        with self._lock:
            ahead, self._ahead = self._ahead, None
            if ahead is None or not ahead.is_for(work):
                return self._begin(_Step(work, steps, news, asked=True))
            ahead.steps, ahead.asked = steps, True
            if ahead.result is not None:
                self._go_ahead(ahead, ahead.result)
            return ahead

    def _begin(self, step: _Step) -> _Step:
        step.future = submit(self._take, step)
        return step

    def _take(self, step: _Step) -> PassResult:
        result = self.compute(step.work)
        with self._lock:
            step.result = result
            if step.asked:
                self._go_ahead(step, result)
        return result

    def _go_ahead(self, step: _Step, result: PassResult) -> None:
        """Begin the step after `step` unless it is to be the last, or an answer has ended or come."""
        if step.steps > 1 and not step.news.is_set():
            work = _next(step.work, result.tokens)
            if work is not None:
                self._ahead = self._begin(_Step(work, step.steps - 1, step.news, asked=False))

    def compute(self, work: Pass) -> PassResult:
        """Carry out one pass here and now, in the thread of the caller."""
        start = self._clock.now
        if self._spare is not None:
            self._spare.copy(work)
        self.move(work.moves)
        rows = (*work.prefill, *work.decode)
        self._tables.update((row.id, row.table) for row in rows)
        tokens, logprobs = next_tokens(self._model, self._cache, rows, holes=work.holes)
        return PassResult(tokens=tokens, spans_s=((start, self._clock.now),), logprobs=logprobs)

    def move(self, moves: Sequence[tuple[int, int, int]]) -> None:
        """Copy the keys and values of whole slots, one after another: (from, to, positions)."""
        for source, target, positions in moves:
            for layer in self._cache.layers:
                layer[target, :, :positions] = layer[source, :, :positions]

    def wipe(self) -> None:
        """Drop what went ahead; the next pass over a position writes its keys and values anew."""
        with self._lock:
            self._ahead = None
        self.forget(list(self._tables))

    def forget(self, ids: Iterable[int]) -> None:
        """The open pages of these requests, in a cache that has such, are given back."""
        for request in ids:
            self._cache.release(self._tables.pop(request, ()))


def _next(work: Pass, tokens: Mapping[int, tuple[int, ...]]) -> Pass | None:
    """The same rows one token further; None if one has come to its end, or waits for what its grammar allows."""
    rows = []
    for row in work.decode:
        (token,) = tokens[row.id]
        if token in row.ends or row.mask is not None:
            return None
        rows.append(replace(row, tokens=(token,), start=row.start + 1, position=row.position + 1))
    return Pass(step=work.step + 1, prefill=(), decode=tuple(rows), slots=work.slots)


def next_tokens(
    model: Model, cache: Cache, rows: Sequence[Row], *, holes: int = 0
) -> tuple[dict[int, tuple[int, ...]], dict[int, tuple[Logprob, ...]]]:
    """One pass over `rows`: the next token of each that draws one, and the logprobs that are asked for.

    For `holes`, see `lay_out`.
    """
    import torch

    drawn = [row for row in rows if row.sampling is not None]
    tokens, segments = lay_out(cache, rows, holes)
    if model.path != "torch" and all(row.plain for row in drawn):
        picks = model.transformer.pick(tokens, segments, cache)  # type: ignore[union-attr]
        return {row.id: (picks[i],) for i, row in enumerate(drawn)}, {}
    ids = torch.tensor(tokens, dtype=torch.int64)
    logits = model.transformer.forward(ids, segments, cache)  # type: ignore[arg-type]
    return choose(logits[: len(drawn)].numpy(), drawn)


def lay_out(cache: Cache, rows: Sequence[Row], holes: int = 0) -> tuple[list[int], list[Segment]]:
    """The tokens and segments of a pass over `rows`, and over `holes` rows whose results nobody wants.

    Rows of holes come last and write to the cache's last page, which must belong to nobody.
    """
    segments: list[Segment] = []
    tokens: list[int] = []
    for row in rows:
        yields = int(row.sampling is not None)
        segments.append(Segment(len(tokens), len(row.tokens), row.start, row.table, yields))
        tokens.extend(row.tokens)
    for _ in range(holes):
        segments.append(Segment(len(tokens), 1, 0, (cache.pages - 1,)))
        tokens.append(0)
    return tokens, segments
