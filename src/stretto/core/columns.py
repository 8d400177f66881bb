"""How a schedule stores its tasks: columns that users hand in, blocks of rows in its own numbering, and their table."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stretto.core.timed import Floats, Ints, Longs, Ragged


@dataclass(frozen=True, kw_only=True, eq=False)
class Columns:
    """Tasks for `Schedule.extend`, one row a task; a missing column is as the default of `Schedule.add`.

    Attributes:
        lanes: lanes of each task; an array for one lane a task.
        seconds: of each task; NaN where `work` says it instead.
        after: ids in the schedule (the first row gets id `len(schedule)`), which may point forward.
        works, work: distinct works, and of each task the index of its own (-1: none).
        ops, op: likewise for the executor's operations.
        phases, phase: names, and of each task the index of its own; `step` to `rank` as in `Key`.
        memory_row, memory_space, memory_bytes, memory_gives: one row a change of memory, ordered by
            `memory_row` (a row of
            these columns); taken at the task's start, or given back at its finish where `memory_gives`.
    """

    lanes: Ragged | ArrayLike
    seconds: ArrayLike | None = None
    after: Ragged | None = None
    works: Sequence[Any] = ()
    work: ArrayLike | None = None
    ops: Sequence[Any] = ()
    op: ArrayLike | None = None
    phases: Sequence[str] = ("task",)
    phase: ArrayLike | None = None
    step: ArrayLike | None = None
    micro_batch: ArrayLike | None = None
    stage: ArrayLike | None = None
    rank: ArrayLike | None = None
    priority: ArrayLike | None = None
    memory_row: ArrayLike = ()
    memory_space: ArrayLike = ()
    memory_bytes: ArrayLike = ()
    memory_gives: ArrayLike = ()


class Distinct:
    """Values by number; those that hash and are equal (and of one type) share a number."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._number: dict[Any, int] = {}

    def number(self, value: Any) -> int:
        try:
            number = self._number.setdefault((type(value), value), len(self.values))
        except TypeError:
            number = len(self.values)
        if number == len(self.values):
            self.values.append(value)
        return number


# One number a task. The ends of ragged rows are columns too: where the row of the task stops in its flat
# column.
PLAIN: dict[str, Literal["i", "d"]] = {
    "seconds": "d",
    "work": "i",
    "op": "i",
    "phase": "i",
    "step": "i",
    "micro_batch": "i",
    "stage": "i",
    "rank": "i",
    "priority": "d",
}
FLAT: dict[str, Literal["i", "d", "b"]] = {
    "lanes": "i",
    "after": "i",
    "memory_space": "i",
    "memory_bytes": "d",
    "memory_gives": "b",
}
ENDS = ("lanes_end", "after_end", "memory_end")


class Block(NamedTuple):
    """Columns in the schedule's own numbering, ready to be appended."""

    plain: dict[str, NDArray[Any]]
    lanes: Ragged
    after: Ragged
    memory_ptr: Longs
    memory_space: Ints
    memory_bytes: Floats
    memory_gives: NDArray[np.int8]


class TaskTable:
    """The tasks of a schedule, a column a property; `columns` are by the names of `PLAIN`, `FLAT` and `ENDS`."""

    def __init__(self) -> None:
        self.columns: dict[str, array[Any]] = {name: array(code) for name, code in (PLAIN | FLAT).items()}
        self.columns |= {name: array("q") for name in ENDS}
        self._seconds = self.columns["seconds"]

    def __len__(self) -> int:
        return len(self._seconds)

    def append(self, block: Block) -> range:
        """Add rows. Returns their ids."""
        first = len(self)
        flat: dict[str, NDArray[Any]] = {
            "lanes": block.lanes.values,
            "after": block.after.values,
            "memory_space": block.memory_space,
            "memory_bytes": block.memory_bytes,
            "memory_gives": block.memory_gives,
        }
        ends = (block.lanes.ptr, block.after.ptr, block.memory_ptr)
        for name, ptr, beside in zip(ENDS, ends, ("lanes", "after", "memory_space"), strict=True):
            self.columns[name].frombytes((ptr[1:] + len(self.columns[beside])).tobytes())
        for name, values in (block.plain | flat).items():
            self.columns[name].frombytes(values.tobytes())
        return range(first, len(self))

    def column(self, name: str) -> NDArray[Any]:
        """A column, copied."""
        column = self.columns[name]
        return np.array(np.frombuffer(column, dtype=column.typecode))

    def ptr(self, name: str) -> Longs:
        """Where the ragged rows begin of which column `name` holds the ends, and where the last one ends."""
        return np.concatenate([np.zeros(1, np.int64), self.column(name)])

    def ragged(self, name: str) -> Ragged:
        """The rows of "lanes" or of "after"."""
        return Ragged(self.ptr(f"{name}_end"), self.column(name))

    def block(self, ids: range) -> Block:
        """The rows of `ids`, copied."""

        def rows(name: str, first: int, stop: int) -> NDArray[Any]:
            part = self.columns[name][first:stop]
            return np.array(np.frombuffer(part, dtype=part.typecode))

        def ptr(name: str) -> tuple[int, int, Longs]:
            ends = self.columns[name]
            begin = ends[ids.start - 1] if ids.start else 0
            bounds = np.concatenate([[begin], rows(name, ids.start, ids.stop)]).astype(np.int64)
            return begin, int(bounds[-1]), bounds - begin

        lanes, after, memory = (ptr(name) for name in ENDS)
        return Block(
            {name: rows(name, ids.start, ids.stop) for name in PLAIN},
            Ragged(lanes[2], rows("lanes", *lanes[:2])),
            Ragged(after[2], rows("after", *after[:2])),
            memory[2],
            rows("memory_space", *memory[:2]),
            rows("memory_bytes", *memory[:2]),
            rows("memory_gives", *memory[:2]),
        )
