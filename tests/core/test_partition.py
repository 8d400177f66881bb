"""The partition is the best there is, by brute force."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto.core.errors import FieldError
from stretto.core.partition import contiguous


def dearest(costs: list[int], sizes: list[int]) -> int:
    bounds = [0]
    for size in sizes:
        bounds.append(bounds[-1] + size)
    return max(sum(costs[a:b]) for a, b in pairwise(bounds))


@given(st.lists(st.integers(0, 20), min_size=1, max_size=9), st.data())
def test_no_other_cut_is_better(costs: list[int], data: st.DataObject) -> None:
    parts = data.draw(st.integers(1, len(costs)))
    sizes = contiguous(costs, parts)
    assert len(sizes) == parts
    assert sum(sizes) == len(costs)
    assert min(sizes) >= 1
    cuts = combinations(range(1, len(costs)), parts - 1)
    best = min(dearest(costs, [b - a for a, b in pairwise([0, *cut, len(costs)])]) for cut in cuts)
    assert dearest(costs, sizes) == best


def test_mistakes_are_named() -> None:
    with pytest.raises(FieldError, match="parts is 3; it must be from 1 to the 2"):
        contiguous([1, 2], 3)
    with pytest.raises(FieldError, match="costs is -1"):
        contiguous([1, -1], 1)
