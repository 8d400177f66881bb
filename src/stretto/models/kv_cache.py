"""The keys and values of all sequences, in pages.

Each layer is one tensor [pages, 2 * kv_heads, page_tokens, head_dim]: the key heads of a page, then its
value heads. Heads come before tokens because CPU attention then reads each head's context as one run of
memory (1.2 to 1.8 times the speed of tokens first at 16 rows). With one page a request, the page is a slot
and attention reads it in place; a sequence over several pages is gathered for each layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from stretto.core.errors import require
from stretto.models.spec import ModelSpec

if TYPE_CHECKING:
    import torch

    Rows = np.ndarray[Any, np.dtype[np.int64]]


PAGE_TOKENS = 32
"""Tokens of a page where whoever reads it follows block tables: the fused decoder's attention."""


class KVCache:
    """Room for `pages * page_tokens` tokens; memory is touched when it is first written.

    Args:
        spec: the model whose keys and values these are.
        pages: how many pages there are, at least 1.
        page_tokens: tokens a page holds, at least 1.
        dtype: the torch type stored.

    Attributes:
        layers: a layer's tensor [pages, 2 * kv_heads, page_tokens, head_dim].
        addresses: of the layers.
        flat: the same memory as rows [pages * 2 * kv_heads * page_tokens, head_dim].
    """

    def __init__(self, spec: ModelSpec, *, pages: int, page_tokens: int, dtype: torch.dtype) -> None:
        require(pages >= 1, "pages", pages, "at least 1")
        require(page_tokens >= 1, "page_tokens", page_tokens, "at least 1")
        self.spec = spec
        self.pages = pages
        self.page_tokens = page_tokens
        self.dtype = dtype
        self.heads = 2 * spec.kv_heads
        whole = lazy_zeros((spec.layers, pages, self.heads, page_tokens, spec.head_dim), dtype)
        self.layers = list(whole.unbind(0))
        self.flat = [layer.view(-1, spec.head_dim) for layer in self.layers]
        self.addresses = [layer.data_ptr() for layer in self.layers]
        self._head_offsets = np.arange(self.heads, dtype=np.int64) * page_tokens

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in one layer."""
        return self.heads * self.spec.head_dim * self.dtype.itemsize

    def release(self, pages: Iterable[int]) -> None:
        """Nobody will read on in these pages: nothing to do."""

    def rows(self, pages: Rows, offsets: Rows) -> Rows:
        """Rows of `flat` for tokens at `offsets` in `pages`: [tokens, 2 * kv_heads]."""
        first = pages * (self.heads * self.page_tokens) + offsets
        return first[:, None] + self._head_offsets

    def locate(self, table: Rows, positions: Rows) -> tuple[Rows, Rows]:
        """Page and offset of each position of a sequence whose block table is `table`."""
        return table[positions // self.page_tokens], positions % self.page_tokens


def require_cache_of(cache: Any, spec: ModelSpec, dtype: torch.dtype) -> None:
    """`ValueError` unless a cache has this model's layers, KV heads and type: its memory is written without a look."""
    shapes = [(held.layers, held.kv_heads, held.head_dim) for held in (cache.spec, spec)]
    if shapes[0] != shapes[1] or cache.dtype != dtype:
        raise ValueError("the cache is of another model or type; make one by new_cache")


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros from the operating system: not touched yet, and never NaN where attention masks them."""
    import torch

    count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    return torch.from_numpy(np.zeros(count, dtype=np.uint8)).view(dtype).view(shape)
