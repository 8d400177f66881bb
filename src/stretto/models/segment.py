"""The part of a ragged pass that belongs to one sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from stretto.core.errors import require


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


class Paged(Protocol):
    """A cache of so many pages, which hold so many positions each."""

    pages: int
    page_tokens: int


def check_segments(segments: Sequence[Segment], cache: Paged) -> None:
    """`ValueError` when rows or pages do not fit together."""
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
