"""A cache whose keys and values are kept in 4 bits, page by page.

A page holds 64 positions. While it fills it is open, in the type that the model computes; when its last position is
written it is packed, each channel of each head with a scale and a minimum of its own (the channel-wise 4-bit KV of
COMET, Liu et al., ASPLOS 2025; layout in `native/kernels/kv_pages.hpp`). A query reads the page of its own position as
it was written and all before it packed: what it sees depends on its position alone, however the text was cut
into passes. The bytes of a packed page depend on its own 64 positions alone, so pages can be shared.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from stretto.core.errors import require
from stretto.models.kv_cache import KVCache, lazy_zeros
from stretto.models.segment import Segment
from stretto.models.spec import ModelSpec

if TYPE_CHECKING:
    import torch

    Ints = np.ndarray[Any, np.dtype[np.int64]]

PAGE_TOKENS = 64
_FIRST_OPEN = 16
_SHARE = PAGE_TOKENS // 2
"""Bytes of the codes of one channel, or of 64 channels, of a page."""


def page_bytes(head_dim: int) -> int:
    """Bytes of one KV head's part of a page: codes, scales and minima of keys and of values."""
    return 2 * (_SHARE * head_dim + 4 * head_dim)


class PackedKVCache:
    """Room for `pages` packed pages, and for as many open ones as are asked for at once.

    Args:
        spec: the model whose keys and values these are; its heads' width must be a multiple of 32.
        pages: how many pages there are, at least 1.
        dtype: the torch type of open pages.

    Attributes:
        layers: a layer's packed pages, uint8 [pages, kv_heads, page_bytes].
        addresses: of the layers.
    """

    def __init__(self, spec: ModelSpec, *, pages: int, dtype: torch.dtype) -> None:
        import torch

        require(pages >= 1, "pages", pages, "at least 1")
        require(spec.head_dim % 32 == 0, "head_dim", spec.head_dim, "a multiple of 32 for keys and values in 4 bits")
        self.spec = spec
        self.pages = pages
        self.page_tokens = PAGE_TOKENS
        self.dtype = dtype
        whole = lazy_zeros((spec.layers, pages, spec.kv_heads, page_bytes(spec.head_dim)), torch.uint8)
        self.layers = list(whole.unbind(0))
        self.addresses = [layer.data_ptr() for layer in self.layers]
        self._open = KVCache(spec, pages=_FIRST_OPEN, page_tokens=PAGE_TOKENS, dtype=dtype)
        self._place: dict[int, int] = {}
        self._free = list(range(_FIRST_OPEN))
        self._released: deque[int] = deque()

    @property
    def token_bytes(self) -> float:
        """Bytes of one token of a packed page in one layer."""
        return self.spec.kv_heads * page_bytes(self.spec.head_dim) / PAGE_TOKENS

    @property
    def open_pages(self) -> int:
        """Pages that are open now."""
        return len(self._place)

    @property
    def open_addresses(self) -> list[int]:
        """Of the layers' open pages; good until pages are opened."""
        return self._open.addresses

    def open_tables(self, segments: Sequence[Segment], width: int) -> Ints:
        """Open the pages that a pass writes to: int64 [rows, width], the open page of each row's own position there.

        Pages that lie wholly before the new tokens of a segment are closed for good.
        """
        while self._released:
            self._close(self._released.popleft())
        rows = sum(segment.new_tokens for segment in segments)
        tables = np.zeros((rows, width), np.int64)
        for segment in segments:
            first, last = segment.cached // PAGE_TOKENS, (segment.context - 1) // PAGE_TOKENS
            for page in reversed(segment.pages[:first]):
                if page not in self._place:
                    break
                self._close(page)
            for index in range(first, last + 1):
                place = self._opened(segment.pages[index])
                begin = max(segment.cached, index * PAGE_TOKENS) - segment.cached
                end = min(segment.context, (index + 1) * PAGE_TOKENS) - segment.cached
                tables[segment.first_row + begin : segment.first_row + end, index] = place
        return tables

    def release(self, pages: Iterable[int]) -> None:
        """Nobody will read on in these pages where they are open; may be called from any thread."""
        self._released.extend(pages)

    def dequantize(self, layer: int, page: int) -> torch.Tensor:
        """What a packed page stands for: fp32 [2 * kv_heads, 64, head_dim], its keys and then its values."""
        import torch

        dim = self.spec.head_dim
        halves = self.layers[layer][page].view(self.spec.kv_heads, 2, -1)
        codes, numbers = halves[..., : _SHARE * dim], halves[..., _SHARE * dim :].contiguous().view(torch.float16)
        nibbles = torch.stack([codes & 15, codes >> 4], dim=-2).float()
        keys = nibbles[:, 0].view(-1, 2, dim, _SHARE).permute(0, 1, 3, 2).reshape(-1, PAGE_TOKENS, dim)
        values = nibbles[:, 1].view(-1, 2, PAGE_TOKENS, dim // 2).permute(0, 2, 1, 3).reshape(-1, PAGE_TOKENS, dim)
        scale, minimum = numbers.float().view(-1, 2, 2, 1, dim).unbind(2)
        return torch.cat([keys * scale[:, 0] + minimum[:, 0], values * scale[:, 1] + minimum[:, 1]])

    def opened(self, layer: int, page: int) -> torch.Tensor:
        """An open page as it was written: [2 * kv_heads, 64, head_dim]."""
        return self._open.layers[layer][self._place[page]]

    def _opened(self, page: int) -> int:
        place = self._place.get(page)
        if place is None:
            if not self._free:
                self._grow()
            place = self._place[page] = self._free.pop()
        return place

    def _close(self, page: int) -> None:
        place = self._place.pop(page, None)
        if place is not None:
            self._free.append(place)

    def _grow(self) -> None:
        old = self._open
        self._open = KVCache(self.spec, pages=2 * old.pages, page_tokens=PAGE_TOKENS, dtype=self.dtype)
        for new, before in zip(self._open.layers, old.layers, strict=True):
            new[: old.pages] = before
        self._free = list(range(old.pages, 2 * old.pages))


Cache = KVCache | PackedKVCache
