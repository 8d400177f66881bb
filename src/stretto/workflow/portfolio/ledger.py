"""Money of a run: reserved at a launch, settled on return, exact to the last bit."""

from __future__ import annotations

from fractions import Fraction


class Ledger:
    """A budget, of which a part is spent and a part reserved; what is left is free.

    Amounts count as the decimal numbers that they print as, and sums are exact: three times 0.1 fits into 0.3, and as
    long as no sample costs more than was reserved for it, spent <= budget holds without slack.
    """

    def __init__(self, budget: float) -> None:
        self._free = _exact(budget)
        self._spent = Fraction(0)

    @property
    def free(self) -> float:
        """What may still be reserved; 0 if samples broke their bounds by more than was left."""
        return float(max(self._free, Fraction(0)))

    @property
    def spent(self) -> float:
        """What has been settled."""
        return float(self._spent)

    def can_reserve(self, bound: float, count: int) -> bool:
        """Whether `bound` for each of so many samples fits into what is free."""
        return count * _exact(bound) <= self._free

    def reserve(self, bound: float, count: int) -> None:
        """Set `bound` aside for each of so many samples."""
        self._free -= count * _exact(bound)

    def settle(self, bound: float, cost: float) -> None:
        """One sample for which `bound` was reserved has cost `cost`."""
        charged = _exact(cost)
        self._free += _exact(bound) - charged
        self._spent += charged


def _exact(amount: float) -> Fraction:
    return Fraction(repr(float(amount)))
