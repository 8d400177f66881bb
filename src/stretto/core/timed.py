"""A schedule in numbers: what `core.simulate` plays, with no work, no machine and no Python object a task in
it.

`hardware.lower` makes one from a `Schedule` and a cluster. Ragged columns are held as CSR: row i of a
`Ragged` is `values[ptr[i]:ptr[i + 1]]`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stretto.core.trace import Key

Ints = NDArray[np.int32]
Longs = NDArray[np.int64]
Floats = NDArray[np.float64]


class Ragged(NamedTuple):
    """Rows of unequal length: row i is `values[ptr[i]:ptr[i + 1]]`."""

    ptr: Longs
    values: Ints

    @classmethod
    def of(cls, rows: Iterable[Sequence[int]]) -> Ragged:
        """One row a sequence.

        >>> Ragged.of([[1, 2], [], [0]]).ptr.tolist()
        [0, 2, 2, 3]
        """
        held = list(rows)
        flat = [value for row in held for value in row]
        return cls(offsets(np.fromiter(map(len, held), np.int64, len(held))), np.array(flat, np.int32))

    @classmethod
    def singles(cls, values: ArrayLike) -> Ragged:
        """One value a row."""
        index = np.ascontiguousarray(values, np.int32)
        return cls(np.arange(len(index) + 1, dtype=np.int64), index)

    @classmethod
    def empty(cls, rows: int) -> Ragged:
        """`rows` rows without values."""
        return cls(np.zeros(rows + 1, np.int64), np.zeros(0, np.int32))

    @property
    def owner(self) -> Longs:
        """The row of each value."""
        return np.repeat(np.arange(len(self.ptr) - 1), np.diff(self.ptr))

    def row(self, at: int) -> list[int]:
        """Row `at`, as a list."""
        return [int(value) for value in self.values[self.ptr[at] : self.ptr[at + 1]]]


def offsets(counts: NDArray[np.integer]) -> Longs:
    """Where rows of these lengths begin, and where the last one ends."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


@dataclass(frozen=True, kw_only=True, eq=False)
class Use:
    """What tasks draw of shared resources: `amount[i]` units (e.g. bytes) over the life of `task[i]`."""

    task: ArrayLike
    resource: ArrayLike
    amount: ArrayLike


def draws(use: Use | None, tasks: int, resources: int, name: Callable[[int], str]) -> tuple[Ragged, Floats]:
    """The resources of each of so many tasks, and the units it draws of each, several draws added up.

    Raises:
        ValueError: an unknown task or resource, or an amount that is negative or no number; `name` names the task.
    """
    if use is None:
        return Ragged.empty(tasks), np.zeros(0)
    task, resource = np.asarray(use.task, np.int64), np.asarray(use.resource, np.int64)
    amount = np.asarray(use.amount, np.float64)
    for what, column, limit in (("task", task, tasks), ("resource", resource, resources)):
        if len(column) and (column.min() < 0 or column.max() >= limit):
            raise ValueError(f"use: {what} must lie in 0 to {limit - 1}")
    if not bool((amount >= 0).all()):
        row = int(np.argmin(amount >= 0))
        raise ValueError(f"{name(int(task[row]))} draws {amount[row]} of a shared resource")
    drawn = amount > 0
    cell, place = np.unique(task[drawn] * max(resources, 1) + resource[drawn], return_inverse=True)
    sums = np.bincount(place, weights=amount[drawn], minlength=len(cell))
    owner, index = np.divmod(cell, max(resources, 1))
    rows = Ragged(offsets(np.bincount(owner, minlength=tasks)), index.astype(np.int32))
    return rows, sums.astype(np.float64)


@dataclass(frozen=True, kw_only=True, eq=False)
class Timed:
    """Columns of a schedule whose seconds are known.

    Attributes:
        lanes: names of lanes and pools, in order of insertion.
        widths: of each lane: 0 for an ordered lane, else how many tasks the pool runs at once.
        by_priority: of each pool: whether it picks by priority before readiness.
        seconds: of each task, when it shares nothing.
        holds: task -> lanes, taken together.
        after: task -> tasks that must finish before it starts.
        resources: names of what is shared; `capacity` is each one's units a second.
        use: task -> resources; `use_amount` runs beside `use.values`: units drawn over the task's life.
        weight: of each task in the sharing law.
        spaces: names of memories; `space_capacity` is each one's bytes.
        memory_task, memory_space, memory_bytes, memory_finish: one row a change of memory; bytes are positive
            where taken;
            the change happens at the task's finish where `memory_finish`, else at its start.
        phases: names that `phase` refers to; the other key columns are as in `Key`.
        priority: of each task; pools by priority pick the highest first.
    """

    lanes: tuple[str, ...]
    widths: Ints
    by_priority: NDArray[np.uint8]
    seconds: Floats
    holds: Ragged
    after: Ragged
    resources: tuple[str, ...]
    capacity: Floats
    use: Ragged
    use_amount: Floats
    weight: Floats
    spaces: tuple[str, ...]
    space_capacity: Floats
    memory_task: Ints
    memory_space: Ints
    memory_bytes: Floats
    memory_finish: NDArray[np.bool_]
    phases: tuple[str, ...]
    phase: Ints
    step: Ints
    micro_batch: Ints
    stage: Ints
    rank: Ints
    priority: Floats

    def __len__(self) -> int:
        return len(self.seconds)

    def key(self, task: int) -> Key:
        """What task number `task` is."""
        numbers = (int(column[task]) for column in (self.step, self.micro_batch, self.stage, self.rank))
        return Key(self.phases[self.phase[task]], *numbers)

    def name(self, task: int) -> str:
        """The task as error messages call it: its id and its key."""
        return task_name(task, self.key(task))


def task_name(task: int, key: Key) -> str:
    """A task's id and what is known of its key.

    >>> task_name(7, Key("forward", stage=2))
    'task 7 (forward, stage 2)'
    """
    known = [
        f"{name.replace('_', '-')} {value}" for name, value in key._asdict().items() if name != "phase" and value >= 0
    ]
    return f"task {task} ({', '.join([key.phase, *known])})"
