"""Static work as data: tasks on lanes, with dependencies, work and memory, that one interpreter simulates and
another runs.

A task holds one or more lanes or pools *together*. A lane is exclusive and runs its tasks in the order of
insertion; a pool picks among those that are ready. Dependencies may point forward, so tasks can be inserted
lane by lane; `validate` finds the cycles. Tasks live in columns, so that `extend` and `repeat` cost no Python
a task.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stretto.core.checks import Checks
from stretto.core.columns import PLAIN, Block, Columns, Distinct, TaskTable
from stretto.core.repeat import Advancing, repeated
from stretto.core.timed import Floats, Ints, Ragged, Timed, Use, draws, offsets, task_name
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


class Schedule:
    """Tasks on lanes, as data."""

    def __init__(self) -> None:
        self._lanes: list[tuple[str, int, bool]] = []
        self._spaces: list[tuple[str, float]] = []
        self._works, self._ops, self._phases = Distinct(), Distinct(), Distinct()
        self._table = TaskTable()

    def __len__(self) -> int:
        return len(self._table)

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
        c = self._table.columns
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
        return self._table.append(
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
        advance: Advancing | None = None,
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
        return self._table.append(repeated(self._table.block(template), template, times, pairs, advance, len(self)))

    # --- tasks out

    @property
    def works(self) -> list[Any]:
        """Distinct works, so that lowering computes each one once; `work_column` refers to it."""
        return self._works.values

    @property
    def work_column(self) -> Ints:
        """Of each task, the number of its work in `works`; -1 where it has seconds instead."""
        return self._table.column("work")

    @property
    def seconds_column(self) -> Floats:
        """Of each task, its seconds; NaN where it has work instead."""
        return self._table.column("seconds")

    @property
    def lane_names(self) -> tuple[str, ...]:
        """Names of lanes and pools, by number."""
        return tuple(name for name, _, _ in self._lanes)

    def task(self, id: int) -> Task:  # noqa: A002 - the word of the contract
        """Task number `id`, unpacked."""
        if not 0 <= id < len(self):
            raise ValueError(f"task {id} is not in 0 to {len(self) - 1}")
        block = self._table.block(range(id, id + 1))
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
        held = self._table.ragged("lanes")
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
        table, resources = self._table, dict(capacity or {})
        rows, amounts = draws(use, len(self), len(resources), self._name)
        after, held = table.ragged("after"), table.ragged("lanes")
        sizes, gives = table.column("memory_bytes"), table.column("memory_gives").astype(bool)
        memory = Ragged(table.ptr("memory_end"), table.column("memory_space"))
        return Timed(
            lanes=self.lane_names,
            widths=np.array([width for _, width, _ in self._lanes], np.int32),
            by_priority=np.array([by_priority for _, _, by_priority in self._lanes], np.uint8),
            seconds=own,
            holds=held,
            after=after,
            resources=tuple(resources),
            capacity=np.array(list(resources.values()), np.float64),
            use=rows,
            use_amount=amounts,
            weight=np.ones(len(self)) if weight is None else self._sized("weight", weight),
            spaces=tuple(name for name, _ in self._spaces),
            space_capacity=np.array([size for _, size in self._spaces], np.float64),
            memory_task=memory.owner.astype(np.int32),
            memory_space=memory.values,
            memory_bytes=np.where(gives, -sizes, sizes),
            memory_finish=gives,
            phases=tuple(self._phases.values),
            **{name: table.column(name) for name in ("phase", "step", "micro_batch", "stage", "rank", "priority")},
        )

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
            held=self._table.ragged("lanes"),
            after=self._table.ragged("after"),
            spaces=Ragged(self._table.ptr("memory_end"), self._table.column("memory_space")),
            memory_bytes=self._table.column("memory_bytes"),
            seconds=self.seconds_column,
            work=self.work_column,
            widths=np.array([width for _, width, _ in self._lanes], np.int32),
            num_spaces=len(self._spaces),
            name=self._name,
        ).run()

    def _key(self, task: int) -> Key:
        c = self._table.columns
        numbers = (c[name][task] for name in ("step", "micro_batch", "stage", "rank"))
        return Key(self._phases.values[c["phase"][task]], *numbers)

    def _name(self, task: int) -> str:
        return task_name(task, self._key(task))
