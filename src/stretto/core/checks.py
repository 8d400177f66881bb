"""What can be wrong with a schedule, told by the task at fault; the native pass finds cycles."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stretto.core import _native
from stretto.core.timed import Floats, Ints, Longs, Ragged


@dataclass(frozen=True, kw_only=True, eq=False)
class Checks:
    """The columns to check, as in `Timed`; `spaces` runs beside `memory_bytes`; `name` names a task."""

    held: Ragged
    after: Ragged
    spaces: Ragged
    memory_bytes: Floats
    seconds: Floats
    work: Ints
    widths: Ints
    num_spaces: int
    name: Callable[[int], str]

    def run(self) -> None:
        """Raise ValueError for the first mistake; see `Schedule.validate`."""
        size, num_lanes = len(self.seconds), len(self.widths)
        held, after, spaces = self.held, self.after, self.spaces
        self._refuse(_outside(held.values, num_lanes), held.ptr, held.values, "holds unknown lane {}")
        self._refuse(_outside(after.values, size), after.ptr, after.values, "waits for unknown task {}")
        self._refuse(_outside(spaces.values, self.num_spaces), spaces.ptr, spaces.values, "uses unknown space {}")
        self._refuse(_repeated(held, num_lanes), held.ptr, held.values, "holds lane {} more than once")
        sizes, each = self.memory_bytes, np.arange(size + 1)
        self._refuse(~(sizes >= 0), spaces.ptr, sizes, "takes or gives {} bytes")
        self._refuse(self.seconds < 0, each, self.seconds, "takes {} seconds")
        missing = np.isnan(self.seconds) & (self.work < 0)
        self._refuse(missing, each, self.seconds, "has neither seconds nor work")
        *_, waits_for, played = _native.play_static(np.zeros(size), *held, *after, self.widths)
        if len(played) < size:
            cycle = self._cycle(waits_for, played)
            names = [self.name(task) for task in cycle]
            raise ValueError("cycle: " + " waits for ".join([*names, f"task {cycle[0]}"]))

    def _refuse(self, wrong: NDArray[np.bool_], ptr: Longs, values: NDArray[Any], problem: str) -> None:
        """Raise for the first wrong value of a ragged column, naming the task whose row it stands in."""
        if bool(wrong.any()):
            at = int(np.argmax(wrong))
            task = int(np.searchsorted(ptr, at, side="right")) - 1
            raise ValueError(f"{self.name(task)} {problem.format(values[at].item())}")

    def _cycle(self, waits_for: Ints, played: Ints) -> list[int]:
        """A shortest cycle through one of the stuck tasks, each task waiting for the next."""
        stuck = np.ones(len(self.seconds), bool)
        stuck[played] = False
        seen: set[int] = set()
        root = int(np.argmax(stuck))
        while root not in seen:
            seen.add(root)
            root = int(waits_for[root])

        previous = self._lane_predecessors()
        came_from: dict[int, int] = {}
        queue = deque([root])
        while True:
            task = queue.popleft()
            for before in [*self.after.row(task), *previous.get(task, ())]:
                if before == root:
                    path = [task]
                    while path[-1] != root:
                        path.append(came_from[path[-1]])
                    return path[::-1]
                if stuck[before] and before not in came_from:
                    came_from[before] = task
                    queue.append(before)

    def _lane_predecessors(self) -> dict[int, list[int]]:
        last: dict[int, int] = {}
        previous: dict[int, list[int]] = {}
        for task, lane in zip(self.held.owner.tolist(), self.held.values.tolist(), strict=True):
            if self.widths[lane] == 0:
                if lane in last:
                    previous.setdefault(task, []).append(last[lane])
                last[lane] = task
        return previous


def _outside(values: Ints, limit: int) -> NDArray[np.bool_]:
    return (values < 0) | (values >= limit)


def _repeated(rows: Ragged, limit: int) -> NDArray[np.bool_]:
    """Which values stand in their row more than once (marking the later one)."""
    wrong = np.zeros(len(rows.values), bool)
    if bool((np.diff(rows.ptr) > 1).any()):
        _, first = np.unique(rows.owner * limit + rows.values, return_index=True)
        wrong[:] = True
        wrong[first] = False
    return wrong
