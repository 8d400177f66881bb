"""How far a decision of decoding rows alone may reach, in terms of pages.

Decoding rows need a page each time they cross a page's end, and nothing else until one of them is done. So a decision
holds until the free pages run out, if it hands out those of all its steps in the order in which the steps need them.
"""

from __future__ import annotations

from collections.abc import Sequence

Need = tuple[int, int]
"""(step, counted from 1, that needs one more page; index of the row that needs it)."""


def page_needs(rooms: Sequence[int], page_tokens: int, steps: int) -> list[Need]:
    """Every page that `steps` steps need beyond those held, in the order of need.

    Args:
        rooms: for each row, how many steps it can take in the pages that it holds.
        page_tokens: positions of a page.
        steps: steps to look ahead.

    >>> page_needs([1, 4], 2, 4)
    [(2, 0), (4, 0)]
    """
    return sorted((step, index) for index, room in enumerate(rooms) for step in range(room + 1, steps + 1, page_tokens))


def within(needs: Sequence[Need], free: int, steps: int) -> tuple[int, Sequence[Need]]:
    """How many of `steps` steps `free` pages allow, and the needs that are met then.

    >>> within([(2, 0), (4, 0), (4, 1)], 2, 9)
    (3, [(2, 0)])
    """
    if len(needs) <= free:
        return steps, needs
    steps = needs[free][0] - 1
    return steps, [need for need in needs[:free] if need[0] <= steps]
