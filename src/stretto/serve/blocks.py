"""Bookkeeping of KV pages: who holds which page of the pool. No tensors; the engine and its simulated twin both use it.

A page holds `page_tokens` consecutive positions of one request. A contiguous slot is the case in which one
page is as long as the longest request.
"""

from __future__ import annotations

from collections import deque

from stretto.core.errors import require


class BlockPool:
    """Pages 0 .. pages-1, each free or held by exactly one request.

    The lowest pages of a fresh pool are given out first and freed pages are taken up in the order of their
    freeing, so the same events always lead to the same tables.
    """

    def __init__(self, *, pages: int, page_tokens: int) -> None:
        require(pages >= 1, "pages", pages, ">= 1")
        require(page_tokens >= 1, "page_tokens", page_tokens, ">= 1")
        self.pages = pages
        self.page_tokens = page_tokens
        self._free: deque[int] = deque(range(pages))
        self._tables: dict[int, list[int]] = {}

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def held(self) -> int:
        return self.pages - len(self._free)

    def table(self, request: int) -> tuple[int, ...]:
        """The pages of `request` in the order of its positions; empty if it holds none."""
        return tuple(self._tables.get(request, ()))

    def fits(self, tokens: int) -> bool:
        """Whether the empty pool can hold a request of so many positions."""
        return -(-tokens // self.page_tokens) <= self.pages

    def missing(self, request: int, tokens: int) -> int:
        """How many more pages `request` needs to hold `tokens` positions."""
        return max(0, -(-tokens // self.page_tokens) - len(self._tables.get(request, ())))

    def can_allocate(self, request: int, tokens: int) -> bool:
        return self.missing(request, tokens) <= len(self._free)

    def allocate(self, request: int, tokens: int) -> tuple[int, ...]:
        """Give `request` the pages it lacks to hold `tokens` positions; returns the new ones."""
        count = self.missing(request, tokens)
        assert count <= len(self._free), f"request {request} wants {count} pages, {len(self._free)} are free"
        new = tuple(self._free.popleft() for _ in range(count))
        if new:
            self._tables.setdefault(request, []).extend(new)
        return new

    def release(self, request: int) -> None:
        """Take back every page of `request`; none is fine."""
        self._free.extend(self._tables.pop(request, ()))

    def release_all(self) -> None:
        for request in list(self._tables):
            self.release(request)

    def audit(self) -> None:
        """Check that each page is free or held exactly once."""
        seen = sorted([*self._free, *(page for table in self._tables.values() for page in table)])
        assert seen == list(range(self.pages)), "pages were lost or doubled"
