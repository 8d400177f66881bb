"""Money of a run: reserved at a launch, settled on return, exact to the last bit."""

from __future__ import annotations

from fractions import Fraction


class Ledger:
    """A budget, of which a part is spent and a part reserved; what is left is free.

    Sums are exact, so as long as no sample costs more than was reserved for it, spent <= budget holds without slack.
    """

    def __init__(self, budget: float) -> None:
        self._free = Fraction(budget)
        self._spent = Fraction(0)

    @property
    def free(self) -> float:
        """What may still be reserved; 0 if samples broke their bounds by more than was left."""
        return float(max(self._free, Fraction(0)))

    @property
    def spent(self) -> float:
        """What has been settled."""
        return float(self._spent)

    def can_reserve(self, bounds: list[float]) -> bool:
        """Whether all of these fit into what is free."""
        return sum(map(Fraction, bounds), Fraction(0)) <= self._free

    def reserve(self, bound: float) -> None:
        """Set money aside for one sample."""
        self._free -= Fraction(bound)

    def settle(self, bound: float, cost: float) -> None:
        """A sample for which `bound` was reserved has cost `cost`."""
        self._free += Fraction(bound) - Fraction(cost)
        self._spent += Fraction(cost)
