"""Money (or tokens, or joules) that is reserved before it is spent, so that what is spent never passes the budget.

Amounts are held as whole numbers of billionths of the unit: bounds and costs are rounded up, the budget down, and no
sum ever drifts. Whoever starts something reserves its upper bound; what is not used comes back when it settles.
"""

from __future__ import annotations

import math

from stretto.core.errors import require

UNITS = 10**9
_MOST = 1e9


def units(amount: float, field: str = "cost") -> int:
    """`amount` in billionths, rounded up.

    Raises:
        FieldError: for a negative, endless or undefined amount.
    """
    require(0 <= amount <= _MOST, field, amount, f"a number in 0 .. {_MOST:g}")
    return math.ceil(amount * UNITS)


class Budget:
    """A budget with its reservations; all amounts in units of `units`.

    Attributes:
        limit: None for a budget without end, which only counts.
        spent: never above `limit`.
        reserved: held for what runs now.
        overrun: what backends charged beyond the bounds they had promised, told but not counted as spent.
    """

    __slots__ = ("limit", "overrun", "reserved", "spent")

    def __init__(self, limit: float | None) -> None:
        if limit is not None:
            require(0 <= limit <= _MOST, "budget", limit, f"a number in 0 .. {_MOST:g}, or left out")
        self.limit = None if limit is None else math.floor(limit * UNITS)
        self.spent = self.reserved = self.overrun = 0

    def can_reserve(self, bound: int) -> bool:
        """Whether `bound` is free now."""
        return self.limit is None or self.spent + self.reserved + bound <= self.limit

    def may_ever_reserve(self, bound: int) -> bool:
        """Whether `bound` would be free if all that is reserved came back."""
        return self.limit is None or self.spent + bound <= self.limit

    def reserve(self, bound: int) -> None:
        self.reserved += bound

    def settle(self, bound: int, cost: int) -> None:
        """Give a reservation back, less what it cost."""
        self.reserved -= bound
        most = cost if self.limit is None else bound
        self.spent += min(cost, most)
        self.overrun += max(0, cost - most)

    def charge(self, cost: int) -> None:
        """Count what was spent before, without a reservation; what the limit does not hold is an overrun."""
        room = cost if self.limit is None else max(0, self.limit - self.spent - self.reserved)
        self.spent += min(cost, room)
        self.overrun += max(0, cost - room)
