"""How one ragged pass is laid out: which rows attend to what, where new keys go, whose logits are wanted.

All of it is worked out once a pass, outside the layers. Rows that decode come first and share one call of the
decode kernel, which reads their block tables as they are; each prompt, or chunk of one, is a call of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from stretto.models.kv_cache import KVCache
from stretto.models.segment import Segment, check_segments

if TYPE_CHECKING:
    import torch

    Ints = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class Context:
    """What the rows of a chunk attend to: keys and values [1, 2 * kv_heads, length, head_dim].

    Attributes:
        page: the page it lies on when it is one alone; else `gather` is set.
        gather: rows of the flat cache, head by head.
        mask: additive [rows, length].
    """

    length: int
    page: int | None
    gather: torch.Tensor | None
    mask: torch.Tensor

    def read(self, cache: KVCache, layer: int) -> torch.Tensor:
        """One page as a view, several as a copy."""
        if self.page is not None:
            return cache.layers[layer][self.page : self.page + 1, :, : self.length]
        assert self.gather is not None
        rows = cache.flat[layer].index_select(0, self.gather)
        return rows.view(1, cache.heads, self.length, -1)


@dataclass(frozen=True, slots=True)
class Decode:
    """The rows [0, rows) that decode: their block tables, int64 [rows, most pages], and contexts, int64 [rows]."""

    rows: int
    tables: torch.Tensor
    lengths: torch.Tensor


@dataclass(frozen=True, slots=True)
class Prefill:
    """Rows [first, last) of one prompt, against a context, or against themselves alone if it is None."""

    first: int
    last: int
    context: Context | None


@dataclass(frozen=True, slots=True)
class PassPlan:
    """A pass, laid out.

    Attributes:
        order: the pass's rows in the order they are computed; None when that is as given.
        positions: fp32 position of each computed row.
        writes: rows of the flat cache for each computed row's key and value heads.
        decode, prefill: the attention calls; together they cover every row. None: no row decodes.
        logits: computed rows whose logits are wanted, in the order of the segments; None for all as they are.
    """

    order: torch.Tensor | None
    positions: torch.Tensor
    writes: torch.Tensor
    decode: Decode | None
    prefill: tuple[Prefill, ...]
    logits: torch.Tensor | None


def plan_pass(segments: Sequence[Segment], cache: KVCache) -> PassPlan:
    """Lay out a pass over `segments`; `ValueError` when rows or pages do not fit together."""
    import torch

    check_segments(segments, cache)
    decode = [s for s in segments if s.new_tokens == 1]
    prefill = [s for s in segments if s.new_tokens > 1]
    ordered = [*decode, *prefill]
    starts = dict(zip(map(id, ordered), np.cumsum([0, *(s.new_tokens for s in ordered)]).tolist(), strict=False))

    positions = _positions(ordered)
    return PassPlan(
        order=_order(ordered),
        positions=torch.from_numpy(positions.astype(np.float32)),
        writes=torch.from_numpy(_writes(ordered, positions, cache).reshape(-1)),
        decode=_decode(decode, cache) if decode else None,
        prefill=tuple(_prefill_call(s, starts[id(s)], cache) for s in prefill),
        logits=_logit_rows(segments, starts, len(positions)),
    )


def _order(ordered: Sequence[Segment]) -> torch.Tensor | None:
    import torch

    firsts = [s.first_row for s in ordered]
    if firsts == sorted(firsts):
        return None
    return torch.from_numpy(np.concatenate([np.arange(s.first_row, s.first_row + s.new_tokens) for s in ordered]))


def _positions(ordered: Sequence[Segment]) -> Ints:
    if all(s.new_tokens == 1 for s in ordered):
        return np.array([s.cached for s in ordered], dtype=np.int64)
    return np.concatenate([np.arange(s.cached, s.context, dtype=np.int64) for s in ordered])


def _writes(ordered: Sequence[Segment], positions: Ints, cache: KVCache) -> Ints:
    """Flat cache rows of every computed row: [rows, 2 * kv_heads]."""
    page_of = np.array([s.pages[p // cache.page_tokens] for s in ordered for p in range(s.cached, s.context)], np.int64)
    return cache.rows(page_of, positions % cache.page_tokens)


def _logit_rows(segments: Sequence[Segment], starts: dict[int, int], rows: int) -> torch.Tensor | None:
    import torch

    wanted: list[int] = []
    for segment in segments:
        end = starts[id(segment)] + segment.new_tokens
        wanted.extend(range(end - segment.logit_rows, end))
    return None if wanted == list(range(rows)) else torch.tensor(wanted, dtype=torch.int64)


def _decode(decode: Sequence[Segment], cache: KVCache) -> Decode:
    import torch

    lengths = np.array([s.context for s in decode], dtype=np.int64)
    used = -(-lengths // cache.page_tokens)
    tables = np.zeros((len(decode), int(used.max())), dtype=np.int64)
    for row, (segment, count) in enumerate(zip(decode, used.tolist(), strict=True)):
        tables[row, :count] = segment.pages[:count]
    return Decode(len(decode), torch.from_numpy(tables), torch.from_numpy(lengths))


def _prefill_call(segment: Segment, first: int, cache: KVCache) -> Prefill:
    import torch

    last = first + segment.new_tokens
    if segment.cached == 0:
        return Prefill(first, last, None)
    shape = (segment.new_tokens, segment.context)
    later = torch.ones(shape, dtype=torch.bool).triu_(segment.cached + 1)
    mask = torch.zeros(shape, dtype=cache.dtype).masked_fill_(later, float("-inf"))
    alone = segment.context <= cache.page_tokens
    gather = None if alone else _gather(segment, cache)
    return Prefill(first, last, Context(segment.context, segment.pages[0] if alone else None, gather, mask))


def _gather(segment: Segment, cache: KVCache) -> torch.Tensor:
    """Flat rows of the context, head by head: [2 * kv_heads * length]."""
    import torch

    pages, offsets = cache.locate(np.asarray(segment.pages, np.int64), np.arange(segment.context, dtype=np.int64))
    return torch.from_numpy(cache.rows(pages, offsets).T.reshape(-1))
