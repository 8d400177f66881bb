"""Bookkeeping of KV pages: who holds which page of the pool, and what each full page holds.

No tensors; the engine and its simulated twin both use it. A page holds `page_tokens` consecutive positions of one
request, or of several whose texts begin alike: full pages are known by a hash of all tokens up to their end, so a
later request finds them (vLLM's automatic prefix caching; Kwon et al., SOSP 2023). A contiguous slot is the case in
which one page is as long as the longest request.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Mapping, Sequence

from stretto.core.errors import require

REMEMBERED = 4
"""Contents whose pages were given to others are remembered, this many for each page of the pool."""


class BlockPool:
    """Pages 0 .. pages-1, each free, held by one request or more, or kept for its content though nobody holds it.

    The lowest pages of a fresh pool are given out first and freed pages are taken up in the order of their freeing,
    pages that are kept last, oldest first; so the same events always lead to the same tables.
    """

    def __init__(self, *, pages: int, page_tokens: int) -> None:
        require(pages >= 1, "pages", pages, ">= 1")
        require(page_tokens >= 1, "page_tokens", page_tokens, ">= 1")
        self.pages = pages
        self.page_tokens = page_tokens
        self._free: deque[int] = deque(range(pages))
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._tables: dict[int, list[int]] = {}
        self._holders: dict[int, int] = {}
        self._content: dict[int, str] = {}
        self._page_of: dict[str, int] = {}
        self._given_up: OrderedDict[str, None] = OrderedDict()

    @property
    def free(self) -> int:
        """Pages that can be given out, those that are kept for their content included."""
        return len(self._free) + len(self._kept)

    @property
    def held(self) -> int:
        return self.pages - self.free

    def table(self, request: int) -> tuple[int, ...]:
        """The pages of `request` in the order of its positions; empty if it holds none."""
        return tuple(self._tables.get(request, ()))

    @property
    def tables(self) -> Mapping[int, Sequence[int]]:
        """The pages of all requests that hold any, to be read and not kept."""
        return self._tables

    @property
    def unused(self) -> int:
        """Free pages that are not kept for their content."""
        return len(self._free)

    def fits(self, tokens: int) -> bool:
        """Whether the empty pool can hold a request of so many positions."""
        return -(-tokens // self.page_tokens) <= self.pages

    def missing(self, request: int, tokens: int) -> int:
        """How many more pages `request` needs to hold `tokens` positions."""
        return max(0, -(-tokens // self.page_tokens) - len(self._tables.get(request, ())))

    def can_allocate(self, request: int, tokens: int) -> bool:
        return self.missing(request, tokens) <= self.free

    def allocate(self, request: int, tokens: int) -> tuple[int, ...]:
        """Give `request` the pages it lacks to hold `tokens` positions; returns the new ones."""
        count = self.missing(request, tokens)
        assert count <= self.free, f"request {request} wants {count} pages, {self.free} are free"
        new = tuple(self._take() for _ in range(count))
        if new:
            self._tables.setdefault(request, []).extend(new)
            self._holders.update(dict.fromkeys(new, 1))
        return new

    def lend(self, requests: Sequence[int]) -> list[int]:
        """Give each of `requests`, which hold pages, one more page, in this order; a request may come twice."""
        assert len(requests) <= len(self._free), f"{len(requests)} pages are lent, {len(self._free)} are unused"
        pages = [self._free.popleft() for _ in requests]
        for request, page in zip(requests, pages, strict=True):
            self._tables[request].append(page)
        self._holders.update(dict.fromkeys(pages, 1))
        return pages

    def hand_back(self, requests: Sequence[int]) -> None:
        """Undo the last loans, which went to `requests` in this order, as if they had never been made."""
        pages = [self._tables[request].pop() for request in reversed(requests)]
        for page in pages:
            del self._holders[page]
        self._free.extendleft(pages)

    def knows(self, content: str) -> bool:
        """Whether a page is full of `content`."""
        return content in self._page_of

    def gave_up(self, content: str) -> bool:
        """Whether a page with this content was lately given to another."""
        return content in self._given_up

    def adopt(self, request: int, contents: Sequence[str]) -> tuple[int, ...]:
        """Let `request`, which holds nothing, share pages with these contents, up to the first that is not there."""
        assert request not in self._tables, f"request {request} holds pages already"
        found: list[int] = []
        for content in contents:
            page = self._page_of.get(content)
            if page is None:
                break
            found.append(page)
        for page in found:
            self._kept.pop(page, None)
            self._holders[page] = self._holders.get(page, 0) + 1
        if found:
            self._tables[request] = found
        return tuple(found)

    def fill(self, request: int, index: int, content: str) -> None:
        """The page at `index` of the request's table is full of `content`; kept unless another page has the same."""
        page = self._tables[request][index]
        if content not in self._page_of and page not in self._content:
            self._page_of[content] = page
            self._content[page] = content
            self._given_up.pop(content, None)

    def release(self, request: int) -> None:
        """Take back every page of `request`; none is fine."""
        for page in reversed(
            self._tables.pop(request, [])
        ):  # so that the end of a text is given up before its beginning
            others = self._holders.pop(page) - 1
            if others:
                self._holders[page] = others
                continue
            if page in self._content:
                self._kept[page] = None
            else:
                self._free.append(page)

    def release_all(self) -> None:
        """Take back every page, and forget what they hold."""
        for request in list(self._tables):
            self.release(request)
        self._free.extend(self._kept)
        self._kept.clear()
        self._content.clear()
        self._page_of.clear()

    def audit(self) -> None:
        """Check that each page is free, kept or held, and that holders and contents agree with the tables."""
        held = Counter(page for table in self._tables.values() for page in table)
        assert held == self._holders, "holders were miscounted"
        assert sorted([*self._free, *self._kept, *held]) == list(range(self.pages)), "pages were lost or doubled"
        assert set(self._kept) <= set(self._content), "a page is kept for nothing"
        assert {page: content for content, page in self._page_of.items()} == self._content, "contents disagree"

    def _take(self) -> int:
        if self._free:
            return self._free.popleft()
        page, _ = self._kept.popitem(last=False)
        content = self._content.pop(page)
        del self._page_of[content]
        self._given_up[content] = None
        if len(self._given_up) > REMEMBERED * self.pages:
            self._given_up.popitem(last=False)
        return page
