"""Passing tensors around the ranks of an axis, each rank computing on what has come while the next is under way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from stretto.comm.transport import Axis, Pending


def visiting(axis: Axis, own: Sequence[torch.Tensor]) -> Iterator[tuple[int, list[torch.Tensor]]]:
    """(place, its tensors) of every rank, this one's first: N - 1 shifts to the next place.

    The next tensors are asked for before these are handed out. They must stay as they are.
    """
    current = list(own)
    for step in range(axis.size):
        pending = _shift(axis, current) if step < axis.size - 1 else None
        yield (axis.rank - step) % axis.size, current
        if pending is not None:
            current = pending.wait()


class Homing:
    """Sums of what the ranks add to each other's tensors, which travel with them and come home after N - 1 shifts.

    The first `add` is this rank's own part; the next ones belong to the places in the order of `visiting`.
    """

    def __init__(self, axis: Axis):
        self._axis = axis
        self._own: list[torch.Tensor] = []
        self._pending: Pending[list[torch.Tensor]] | None = None

    def add(self, parts: Sequence[torch.Tensor]) -> None:
        """Add to the tensors of the place that is visiting."""
        if not self._own:
            self._own = list(parts)
            return
        travelling = list(parts) if self._pending is None else self._joined(self._pending.wait(), parts)
        self._pending = _shift(self._axis, travelling)

    def home(self) -> list[torch.Tensor]:
        """The whole sums of this rank's tensors."""
        return self._own if self._pending is None else self._joined(self._own, self._pending.wait())

    def _joined(self, first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [a + b for a, b in zip(first, second, strict=True)]


def _shift(axis: Axis, tensors: Sequence[torch.Tensor]) -> Pending[list[torch.Tensor]]:
    return axis.exchange(tensors, to=(axis.rank + 1) % axis.size, source=(axis.rank - 1) % axis.size)
