"""Cutting a row of costs into neighbouring parts so that the dearest part is as cheap as can be."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from stretto.core.errors import require


def contiguous(costs: Sequence[float], parts: int) -> list[int]:
    """How many neighbours go into each part; none is empty. Exact, by dynamic programming.

    Raises:
        FieldError: a cost is negative, or there are fewer costs than parts.

    >>> contiguous([1, 1, 1, 3], 2)
    [3, 1]
    """
    require(1 <= parts <= len(costs), "parts", parts, f"from 1 to the {len(costs)} costs")
    require(all(cost >= 0 for cost in costs), "costs", min(costs), "not negative")
    sums = [0.0, *accumulate(float(cost) for cost in costs)]
    best = list(sums)  # the dearest part when the first i costs make up the parts so far
    cuts: list[list[int]] = []
    for part in range(2, parts + 1):
        found, where = [float("inf")] * len(sums), [0] * len(sums)
        for end in range(part, len(sums)):
            for start in range(end - 1, part - 2, -1):
                last = sums[end] - sums[start]
                if last >= found[end]:
                    break
                dearest = max(best[start], last)
                if dearest < found[end]:
                    found[end], where[end] = dearest, start
        best = found
        cuts.append(where)
    ends = [len(costs)]
    for where in reversed(cuts):
        ends.append(where[ends[-1]])
    return [end - start for start, end in pairwise([0, *reversed(ends)])]
