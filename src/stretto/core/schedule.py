"""Static work as data: tasks on lanes, with dependencies, work and memory, that one interpreter simulates and
another runs.

A task holds one or more lanes or pools *together*. A lane is exclusive and runs its tasks in the order of
insertion; a pool picks among those that are ready. Dependencies may point forward, so tasks can be inserted
lane by lane; `validate` finds the cycles. Tasks live in columns, so that `extend` and `repeat` cost no Python
a task.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stretto.core.checks import Checks
from stretto.core.columns import ENDS, FLAT, PLAIN, Block, Columns, Distinct
from stretto.core.timed import Floats, Ints, Longs, Ragged, Timed, Use, offsets, task_name
from stretto.core.trace import Key

_TASK = Key("task")


class Task(NamedTuple):
    """One task, unpacked from the columns for reading; `seconds` is None where `work` says it."""

    id: int
    lanes: tuple[int, ...]
    seconds: float | None
    work: Any
    after: tuple[int, ...]
    key: Key
    op: Any
    takes: dict[int, float]
    gives: dict[int, float]
    priority: float


_ADVANCING = Literal["step", "micro_batch"]


class Schedule:
    """Tasks on lanes, as data."""

    def __init__(self) -> None:
        self._lanes: list[tuple[str, int, bool]] = []
        self._spaces: list[tuple[str, float]] = []
        self._works, self._ops, self._phases = Distinct(), Distinct(), Distinct()
        self._columns: dict[str, array[Any]] = {name: array(code) for name, code in (PLAIN | FLAT).items()}
        self._columns |= {name: array("q") for name in ENDS}
        self._seconds = self._columns["seconds"]

    def __len__(self) -> int:
        return len(self._seconds)

    # --- what tasks hold

    def lane(self, name: str) -> int:
        """An exclusive lane that runs its tasks in the order of insertion. Returns its number."""
        return self._add_lane(name, 0, by_priority=False)

    def pool(self, name: str, width: int = 1, by_priority: bool = False) -> int:
        """A lane of `width` slots that picks among ready tasks: first ready first, or highest priority first.

        Ties go to the task that became ready first, then to the lower id.

        Raises:
            ValueError: if the width is below 1.
        """
        if width < 1:
            raise ValueError(f"pool {name}: width {width} must be at least 1")
        return self._add_lane(name, width, by_priority=by_priority)

    def space(self, name: str, capacity: float = float("inf")) -> int:
        """A memory of `capacity` bytes. Returns its number, the key of `takes` and `gives`."""
        if not capacity >= 0:
            raise ValueError(f"space {name}: capacity {capacity} must not be negative")
        self._spaces.append((name, float(capacity)))
        return len(self._spaces) - 1

    def _add_lane(self, name: str, width: int, *, by_priority: bool) -> int:
        self._lanes.append((name, width, by_priority))
        return len(self._lanes) - 1

    # --- tasks in

    def add(
        self,
        lanes: Iterable[int] = (),
        *,
        seconds: float | None = None,
        work: Any = None,
        after: Iterable[int] = (),
        key: Key = _TASK,
        op: Any = None,
        takes: Mapping[int, float] | None = None,
        gives: Mapping[int, float] | None = None,
        priority: float = 0.0,
    ) -> int:
        """Append a task. Returns its id, which counts from 0.

        Args:
            lanes: lanes and pools that it holds together; none for a pure delay.
            seconds: how long it takes; or
            work: what `hardware.lower` turns into seconds.
            after: ids of tasks that finish before it starts; they may be yet to come.
            key: what it is, by which predicted and measured spans are matched.
            op: what an executor does for it.
            takes: bytes taken of each space at its start.
            gives: bytes given back to each space at its finish.
            priority: pools by priority pick the highest first.

        Raises:
            ValueError: if it has both seconds and work. All else is found by `validate`.
        """
        if seconds is not None and work is not None:
            raise ValueError(f"{task_name(len(self), key)} has both seconds and work; give one of them")
        c = self._columns
        phase, step, micro_batch, stage, rank = key
        c["seconds"].append(np.nan if seconds is None else seconds)
        c["work"].append(-1 if work is None else self._works.number(work))
        c["op"].append(-1 if op is None else self._ops.number(op))
        c["phase"].append(self._phases.number(phase))
        c["step"].append(step)
        c["micro_batch"].append(micro_batch)
        c["stage"].append(stage)
        c["rank"].append(rank)
        c["priority"].append(priority)
        c["lanes"].extend(lanes)
        c["lanes_end"].append(len(c["lanes"]))
        c["after"].extend(after)
        c["after_end"].append(len(c["after"]))
        for changes, given in ((takes, 0), (gives, 1)):
            for space, size in (changes or {}).items():
                c["memory_space"].append(space)
                c["memory_bytes"].append(size)
                c["memory_gives"].append(given)
        c["memory_end"].append(len(c["memory_space"]))
        return len(c["seconds"]) - 1

    def extend(self, columns: Columns) -> range:
        """Append many tasks at once.

        Returns:
            Their ids.

        Raises:
            ValueError: if the columns differ in length.
        """
        lanes = columns.lanes if isinstance(columns.lanes, Ragged) else Ragged.singles(columns.lanes)
        size = len(lanes.ptr) - 1
        after = columns.after or Ragged.empty(size)

        def column(
            name: str, default: float, table: Distinct | None = None, values: Sequence[Any] = ()
        ) -> NDArray[Any]:
            given = getattr(columns, name)
            kind = np.float64 if PLAIN[name] == "d" else np.int32
            numbers = np.full(size, default, kind) if given is None else np.ascontiguousarray(given, kind)
            if len(numbers) != size:
                raise ValueError(f"columns: {name} has {len(numbers)} rows, lanes has {size}")
            if table is None:
                return numbers
            # The last number stands for -1, none.
            known: Ints = np.array([*(table.number(value) for value in values), -1], np.int32)
            return known[numbers.astype(np.int64)]

        plain = {name: column(name, -1) for name in ("step", "micro_batch", "stage", "rank")}
        plain["seconds"] = column("seconds", np.nan)
        plain["priority"] = column("priority", 0.0)
        plain["work"] = column("work", -1, self._works, columns.works)
        plain["op"] = column("op", -1, self._ops, columns.ops)
        plain["phase"] = column("phase", 0, self._phases, columns.phases)
        if len(after.ptr) != size + 1:
            raise ValueError(f"columns: after has {len(after.ptr) - 1} rows, lanes has {size}")
        rows = np.ascontiguousarray(columns.memory_row, np.int64)
        if bool((np.diff(rows) < 0).any()) or (len(rows) and not 0 <= rows[0] <= rows[-1] < size):
            raise ValueError(f"columns: memory_row must rise and lie in 0 to {size - 1}")
        return self._append(
            Block(
                plain,
                lanes,
                after,
                offsets(np.bincount(rows, minlength=size)),
                np.ascontiguousarray(columns.memory_space, np.int32),
                np.ascontiguousarray(columns.memory_bytes, np.float64),
                np.ascontiguousarray(columns.memory_gives, np.int8),
            )
        )

    def repeat(
        self,
        template: range,
        times: int,
        *,
        carried: Iterable[tuple[int, int]] = (),
        advance: _ADVANCING | None = None,
    ) -> range:
        """Append `times` further copies of the tasks of `template`, which is copy 0.

        Dependencies inside the template stay inside each copy; those on tasks outside of it stay as they are.

        Args:
            template: a run of ids, as `extend` returns it.
            times: how many copies to append.
            carried: pairs (a, b) of template ids: b of each copy also waits for a of the copy before it.
            advance: the part of the key that counts the copies (where it is not -1).

        Raises:
            ValueError: if the template is not a run of ids here, or a carried pair lies outside of it.
        """
        if template.step != 1 or not 0 <= template.start <= template.stop <= len(self):
            raise ValueError(f"template {template} must be a run of ids in 0 to {len(self) - 1}")
        if times < 0:
            raise ValueError(f"times {times} must not be negative")
        pairs = list(carried)
        for pair in pairs:
            if pair[0] not in template or pair[1] not in template:
                raise ValueError(f"carried pair {pair} must lie in the template {template}")
        block = self._block(template)
        plain = {name: np.tile(values, times) for name, values in block.plain.items()}
        if advance is not None:
            copy = np.repeat(np.arange(1, times + 1, dtype=np.int32), len(template))
            plain[advance] = np.where(plain[advance] >= 0, plain[advance] + copy, plain[advance])
        return self._append(
            Block(
                plain,
                _tiled(block.lanes, times),
                self._repeated_after(block.after, template, times, pairs),
                offsets(np.tile(np.diff(block.memory_ptr), times)),
                np.tile(block.memory_space, times),
                np.tile(block.memory_bytes, times),
                np.tile(block.memory_gives, times),
            )
        )

    def _repeated_after(self, after: Ragged, template: range, times: int, carried: list[tuple[int, int]]) -> Ragged:
        pairs = np.array(carried, np.int64).reshape(-1, 2)
        owner = np.concatenate([after.owner, pairs[:, 1] - template.start])
        target = np.concatenate([after.values.astype(np.int64), pairs[:, 0]])
        inside = (target >= template.start) & (target < template.stop)
        back = np.arange(len(owner)) >= len(after.values)
        order = np.argsort(owner, kind="stable")
        owner, target, inside, back = owner[order], target[order], inside[order], back[order]

        size = len(template)
        first = len(self) + size * np.arange(-1, times, dtype=np.int64) - template.start  # shift of copy k, from k = 0
        first[0] = 0
        shift = np.where(back, first[:-1, None], first[1:, None])
        index = (target + np.where(inside, shift, 0)).astype(np.int32)
        counts = np.tile(np.bincount(owner, minlength=size), times)
        return Ragged(offsets(counts), index.ravel())

    def _append(self, block: Block) -> range:
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
            self._columns[name].frombytes((ptr[1:] + len(self._columns[beside])).tobytes())
        for name, values in (block.plain | flat).items():
            self._columns[name].frombytes(values.tobytes())
        return range(first, len(self))

    # --- tasks out

    @property
    def works(self) -> list[Any]:
        """Distinct works, so that lowering computes each one once; `work_column` refers to it."""
        return self._works.values

    @property
    def work_column(self) -> Ints:
        """Of each task, the number of its work in `works`; -1 where it has seconds instead."""
        return self._column("work")

    @property
    def seconds_column(self) -> Floats:
        """Of each task, its seconds; NaN where it has work instead."""
        return self._column("seconds")

    @property
    def lane_names(self) -> tuple[str, ...]:
        """Names of lanes and pools, by number."""
        return tuple(name for name, _, _ in self._lanes)

    def task(self, id: int) -> Task:  # noqa: A002 - the word of the contract
        """Task number `id`, unpacked."""
        if not 0 <= id < len(self):
            raise ValueError(f"task {id} is not in 0 to {len(self) - 1}")
        block = self._block(range(id, id + 1))
        value = {name: column[0].item() for name, column in block.plain.items()}
        given = block.memory_gives.astype(bool)
        changes = [
            dict(zip(block.memory_space[rows].tolist(), block.memory_bytes[rows].tolist(), strict=True))
            for rows in (~given, given)
        ]
        return Task(
            id=id,
            lanes=tuple(block.lanes.values.tolist()),
            seconds=None if np.isnan(value["seconds"]) else value["seconds"],
            work=None if value["work"] < 0 else self.works[value["work"]],
            after=tuple(block.after.values.tolist()),
            key=self._key(id),
            op=None if value["op"] < 0 else self._ops.values[value["op"]],
            takes=changes[0],
            gives=changes[1],
            priority=value["priority"],
        )

    def program(self, lane: int) -> list[int]:
        """Ids of the tasks that hold `lane`, in the order in which they were inserted."""
        held = self._ragged("lanes")
        return [int(task) for task in held.owner[held.values == lane]]

    def timed(
        self,
        seconds: ArrayLike | None = None,
        use: Use | None = None,
        capacity: Mapping[str, float] | None = None,
        weight: ArrayLike | None = None,
    ) -> Timed:
        """The schedule in numbers.

        Args:
            seconds: of each task, in place of its own; NaN keeps its own.
            use: what tasks draw of shared resources; resources are numbered in the order of `capacity`.
            capacity: units a second of each shared resource.
            weight: of each task in the sharing law; 1 by default.

        Raises:
            ValueError: if a task has no seconds (its work was not lowered), or a column has another length.
        """
        own = self.seconds_column
        if seconds is not None:
            given = self._sized("seconds", seconds)
            own = np.where(np.isnan(given), own, given)
        if bool(np.isnan(own).any()):
            task = int(np.argmax(np.isnan(own)))
            work = self.work_column[task]
            why = f"its work {self.works[work]!r} was not lowered" if work >= 0 else "nor work"
            raise ValueError(f"{self._name(task)} has no seconds; {why}")
        resources = dict(capacity or {})
        draws, amounts = self._draws(use, len(resources))
        after, held = self._ragged("after"), self._ragged("lanes")
        sizes, gives = self._column("memory_bytes"), self._column("memory_gives").astype(bool)
        memory = Ragged(self._ptr("memory_end"), self._column("memory_space"))
        return Timed(
            lanes=self.lane_names,
            widths=np.array([width for _, width, _ in self._lanes], np.int32),
            by_priority=np.array([by_priority for _, _, by_priority in self._lanes], np.uint8),
            seconds=own,
            holds=held,
            after=after,
            resources=tuple(resources),
            capacity=np.array(list(resources.values()), np.float64),
            use=draws,
            use_amount=amounts,
            weight=np.ones(len(self)) if weight is None else self._sized("weight", weight),
            spaces=tuple(name for name, _ in self._spaces),
            space_capacity=np.array([size for _, size in self._spaces], np.float64),
            memory_task=memory.owner.astype(np.int32),
            memory_space=memory.values,
            memory_bytes=np.where(gives, -sizes, sizes),
            memory_finish=gives,
            phases=tuple(self._phases.values),
            **{name: self._column(name) for name in ("phase", "step", "micro_batch", "stage", "rank", "priority")},
        )

    def _draws(self, use: Use | None, num_resources: int) -> tuple[Ragged, Floats]:
        if use is None:
            return Ragged.empty(len(self)), np.zeros(0)
        task, resource = np.asarray(use.task, np.int64), np.asarray(use.resource, np.int64)
        amount = np.asarray(use.amount, np.float64)
        for name, column, limit in (("task", task, len(self)), ("resource", resource, num_resources)):
            if len(column) and (column.min() < 0 or column.max() >= limit):
                raise ValueError(f"use: {name} must lie in 0 to {limit - 1}")
        if not bool((amount >= 0).all()):
            row = int(np.argmin(amount >= 0))
            raise ValueError(f"{self._name(int(task[row]))} draws {amount[row]} of a shared resource")
        drawn = amount > 0
        cell, place = np.unique(task[drawn] * max(num_resources, 1) + resource[drawn], return_inverse=True)
        sums = np.bincount(place, weights=amount[drawn], minlength=len(cell))
        owner, index = np.divmod(cell, max(num_resources, 1))
        rows = Ragged(offsets(np.bincount(owner, minlength=len(self))), index.astype(np.int32))
        return rows, sums.astype(np.float64)

    def _sized(self, name: str, values: ArrayLike) -> Floats:
        column = np.ascontiguousarray(values, np.float64)
        if column.shape != (len(self),):
            raise ValueError(f"{name} has shape {column.shape}, the schedule has {len(self)} tasks")
        return column

    # --- checks

    def validate(self) -> None:
        """Check all that `add` did not.

        Raises:
            ValueError: naming the task, for an unknown lane, space or dependency, a lane held twice, negative
                or missing
                seconds, negative memory, or a cycle over dependencies and lane order.
        """
        Checks(
            held=self._ragged("lanes"),
            after=self._ragged("after"),
            spaces=Ragged(self._ptr("memory_end"), self._column("memory_space")),
            memory_bytes=self._column("memory_bytes"),
            seconds=self.seconds_column,
            work=self.work_column,
            widths=np.array([width for _, width, _ in self._lanes], np.int32),
            num_spaces=len(self._spaces),
            name=self._name,
        ).run()

    # --- columns

    def _column(self, name: str) -> NDArray[Any]:
        column = self._columns[name]
        return np.array(np.frombuffer(column, dtype=column.typecode))

    def _ptr(self, name: str) -> Longs:
        return np.concatenate([np.zeros(1, np.int64), self._column(name)])

    def _ragged(self, name: str) -> Ragged:
        return Ragged(self._ptr(f"{name}_end"), self._column(name))

    def _block(self, ids: range) -> Block:
        """The rows of `ids`, copied."""

        def rows(name: str, first: int, stop: int) -> NDArray[Any]:
            part = self._columns[name][first:stop]
            return np.array(np.frombuffer(part, dtype=part.typecode))

        def ptr(name: str) -> tuple[int, int, Longs]:
            ends = self._columns[name]
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

    def _key(self, task: int) -> Key:
        c = self._columns
        numbers = (c[name][task] for name in ("step", "micro_batch", "stage", "rank"))
        return Key(self._phases.values[c["phase"][task]], *numbers)

    def _name(self, task: int) -> str:
        return task_name(task, self._key(task))


def _tiled(rows: Ragged, times: int) -> Ragged:
    return Ragged(offsets(np.tile(np.diff(rows.ptr), times)), np.tile(rows.values, times))
