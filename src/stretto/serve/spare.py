"""Spare memory for the pages of requests that were put back: a copy out, a copy back, the same bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stretto.serve.backend import Pass

if TYPE_CHECKING:
    from stretto.models.kv_packed import Cache


class SpareMemory:
    """As much memory on the host as its pages hold; touched when first written.

    Args:
        cache: whose pages are copied.
        spare: a cache of the same kind, model and length of page.
    """

    def __init__(self, cache: Cache, spare: Cache) -> None:
        self._cache = cache
        self._spare = spare
        self._last: Pass | None = None

    def copy(self, work: Pass) -> None:
        """Carry out the swaps of a pass; those of a pass that comes twice in a row once."""
        if work == self._last:
            return
        self._last = work
        for inner, outer in zip(self._cache.layers, self._spare.layers, strict=True):
            for page, away, positions in work.swap_out:
                outer[away, :, :positions] = inner[page, :, :positions]
            for away, page, positions in work.swap_in:
                inner[page, :, :positions] = outer[away, :, :positions]
