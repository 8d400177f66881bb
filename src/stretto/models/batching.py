"""How one ragged pass is laid out: which rows attend to what, where new keys go, whose logits are wanted.

All of it is worked out once a pass, outside the layers. Rows are reordered so that decode rows come first,
in the order of their pages: neighbours in neighbouring pages then share one attention call over a view of
the cache. A call is split where padding to the longest context would cost more than another call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from stretto.core.errors import require
from stretto.models.kv_cache import KVCache

if TYPE_CHECKING:
    import torch

    Ints = np.ndarray[Any, np.dtype[np.int64]]

# Padding that costs as much as one more attention call: 20 us at 16 GB/s, both measured on Zen 4 with two
# threads.
_CALL_WORTH_BYTES = 320_000


@dataclass(frozen=True, slots=True)
class Segment:
    """The part of a pass that belongs to one sequence.

    Attributes:
        first_row: where its tokens start in the pass.
        new_tokens: how many it has there, at least 1.
        cached: tokens of the sequence that are in the cache already.
        pages: its block table; page i holds positions i * page_tokens and on. Pages past the end are ignored.
        logit_rows: how many of its last rows want logits; 1 (or True) for the last alone, 0 for none.
    """

    first_row: int
    new_tokens: int
    cached: int
    pages: Sequence[int]
    logit_rows: int = 1

    @property
    def context(self) -> int:
        """Tokens in the cache once this pass has written its own."""
        return self.cached + self.new_tokens


@dataclass(frozen=True, slots=True)
class Context:
    """The keys and values that some rows attend to, [sequences, 2 * kv_heads, length, head_dim].

    Attributes:
        slots: first and last-plus-one page when each sequence is one page, in a row; else `gather` is set.
        gather: rows of the flat cache.
        mask: additive, broadcast over heads; None when every sequence has the full length.
    """

    sequences: int
    length: int
    slots: tuple[int, int] | None
    gather: torch.Tensor | None
    mask: torch.Tensor | None

    def read(self, cache: KVCache, layer: int) -> torch.Tensor:
        """Slots as a view, other tables as a copy."""
        if self.slots is not None:
            return cache.layers[layer][self.slots[0] : self.slots[1], :, : self.length]
        assert self.gather is not None
        rows = cache.flat[layer].index_select(0, self.gather)
        return rows.view(self.sequences, cache.heads, self.length, -1)


@dataclass(frozen=True, slots=True)
class Attend:
    """One attention call: rows [first, last) against a context, or against themselves alone if it is None."""

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
        decode, prefill: the attention calls; together they cover every row.
        logits: computed rows whose logits are wanted, in the order of the segments; None for all as they are.
    """

    order: torch.Tensor | None
    positions: torch.Tensor
    writes: torch.Tensor
    decode: tuple[Attend, ...]
    prefill: tuple[Attend, ...]
    logits: torch.Tensor | None


def plan_pass(segments: Sequence[Segment], cache: KVCache) -> PassPlan:
    """Lay out a pass over `segments`; `ValueError` when rows or pages do not fit together."""
    import torch

    _check(segments, cache)
    decode = sorted((s for s in segments if s.new_tokens == 1), key=lambda s: (_paged(s, cache), s.pages[0]))
    prefill = [s for s in segments if s.new_tokens > 1]
    ordered = [*decode, *prefill]
    starts = dict(zip(map(id, ordered), np.cumsum([0, *(s.new_tokens for s in ordered)]).tolist(), strict=False))

    positions = _positions(ordered)
    return PassPlan(
        order=_order(ordered),
        positions=torch.from_numpy(positions.astype(np.float32)),
        writes=torch.from_numpy(_writes(ordered, positions, cache).reshape(-1)),
        decode=tuple(_decode_calls(decode, cache)),
        prefill=tuple(_prefill_call(s, starts[id(s)], cache) for s in prefill),
        logits=_logit_rows(segments, starts, len(positions)),
    )


def _check(segments: Sequence[Segment], cache: KVCache) -> None:
    row = 0
    for segment in segments:
        require(segment.first_row == row, "first_row", segment.first_row, f"{row}, as rows follow one another")
        require(segment.new_tokens >= 1, "new_tokens", segment.new_tokens, "at least 1")
        require(segment.cached >= 0, "cached", segment.cached, "not negative")
        require(
            0 <= segment.logit_rows <= segment.new_tokens,
            "logit_rows",
            segment.logit_rows,
            "from 0 to new_tokens",
        )
        needed = -(-segment.context // cache.page_tokens)
        require(
            len(segment.pages) >= needed,
            "pages",
            segment.pages,
            f"{needed} pages for {segment.context} tokens",
        )
        used = segment.pages[:needed]
        require(min(used) >= 0 and max(used) < cache.pages, "pages", segment.pages, f"from 0 to {cache.pages - 1}")
        row += segment.new_tokens
    require(row > 0, "segments", segments, "at least one segment")


def _paged(segment: Segment, cache: KVCache) -> bool:
    """Whether the sequence lies on more than one page."""
    return segment.context > cache.page_tokens


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


def _decode_calls(decode: Sequence[Segment], cache: KVCache) -> Iterator[Attend]:
    first = 0
    for group in _groups(decode, cache):
        yield Attend(first, first + len(group), _context(group, cache))
        first += len(group)


def _groups(decode: Sequence[Segment], cache: KVCache) -> Iterator[list[Segment]]:
    """Runs that one call can serve: neighbouring slots, or all gathered, and lengths not too far apart."""
    group: list[Segment] = []
    longest = 0
    for segment in decode:
        length = segment.context
        if group:
            joined = max(longest, length)
            padding = (joined - longest) * len(group) + joined - length
            neighbours = _paged(segment, cache) == _paged(group[-1], cache) and (
                _paged(segment, cache) or segment.pages[0] == group[-1].pages[0] + 1
            )
            if not neighbours or padding * cache.token_bytes > _CALL_WORTH_BYTES:
                yield group
                group, longest = [], 0
        group.append(segment)
        longest = max(longest, length)
    if group:
        yield group


def _context(group: Sequence[Segment], cache: KVCache) -> Context:
    lengths = [s.context for s in group]
    longest = max(lengths)
    mask = None if min(lengths) == longest else _length_mask(lengths, longest, cache.dtype)
    if not _paged(group[0], cache):
        first = group[0].pages[0]
        return Context(len(group), longest, (first, first + len(group)), None, mask)
    return Context(len(group), longest, None, _gather(group, longest, cache), mask)


def _length_mask(lengths: Sequence[int], longest: int, dtype: torch.dtype) -> torch.Tensor:
    """[sequences, 1, 1, longest]: zero within each length, minus infinity after it."""
    import torch

    beyond = torch.arange(longest) >= torch.tensor(lengths).view(-1, 1)
    return torch.zeros(beyond.shape, dtype=dtype).masked_fill_(beyond, float("-inf")).view(len(lengths), 1, 1, longest)


def _gather(group: Sequence[Segment], longest: int, cache: KVCache) -> torch.Tensor:
    """Flat rows of each context, head by head: [sequences * 2 * kv_heads * longest], padded by repeats."""
    import torch

    positions = np.arange(longest, dtype=np.int64)
    rows = np.empty((len(group), cache.heads, longest), dtype=np.int64)
    for index, segment in enumerate(group):
        inside = np.minimum(positions, segment.context - 1)
        rows[index] = cache.rows(*cache.locate(np.asarray(segment.pages, dtype=np.int64), inside)).T
    return torch.from_numpy(rows.reshape(-1))


def _prefill_call(segment: Segment, first: int, cache: KVCache) -> Attend:
    import torch

    last = first + segment.new_tokens
    if segment.cached == 0:
        return Attend(first, last, None)
    shape = (segment.new_tokens, segment.context)
    later = torch.ones(shape, dtype=torch.bool).triu_(segment.cached + 1)
    mask = torch.zeros(shape, dtype=cache.dtype).masked_fill_(later, float("-inf"))
    found = _context([segment], cache)
    return Attend(first, last, Context(1, found.length, found.slots, found.gather, mask))
