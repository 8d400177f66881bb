"""Playing a `Timed` schedule: a `Trace` of what would happen, the same on every run.

Lanes in order and dependencies alone need one native pass over the graph. Pools and shared resources need an
event loop; resources are shared by `core.fluid`. Work is conserved: a task's span is its seconds alone, or,
where it shares, as long as the fluid takes for them. Memory never delays a task: the schedule is played
first, and its curves are judged afterwards; within an instant memory is given back before it is taken.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from stretto.core import _native
from stretto.core.fluid import CoRunTable, Law, check_law, native_fluid
from stretto.core.timed import Floats, Ints, Timed
from stretto.core.trace import Curve, Spans, Trace

DELAY = "-"


class OutOfMemory(ValueError):
    """A space was asked for more than it has; names the first task in time that does not fit.

    Attributes:
        task: its id.
        space: the name of the memory.
        need: bytes that it takes.
        room: bytes that were left.
    """

    def __init__(self, name: str, task: int, space: str, need: float, room: float) -> None:
        super().__init__(f"{name} does not fit in {space}: it takes {need:.0f} bytes, {room:.0f} are left")
        self.task = task
        self.space = space
        self.need = need
        self.room = room


def simulate(timed: Timed, *, law: Law | None = None, memory: Literal["raise", "record"] = "raise") -> Trace:
    """Play `timed` from time 0.

    The trace has a span for each task and lane. A pool of several slots shows as a lane for each slot,
    "name[0]" and on; a
    task without lanes (a delay) shows on lanes "-[0]" and on, as many as run at once. `critical` holds one
    row a task of
    the chain that fixes the makespan: each starts as the one before it finishes, so its seconds add up to the
        makespan.

    Args:
        timed: the schedule in numbers.
        law: how resources are shared: "max-min" (where None), or a `CoRunTable` whose kinds are the tasks'
            phases.
        memory: "raise" `OutOfMemory`, or only "record" the curves.

    Raises:
        OutOfMemory: naming the first task that does not fit.
        ValueError: naming a task with an unlawful number, or one on a cycle.
    """
    law = "max-min" if law is None else law
    check_law(law)
    _check(timed)
    start, finish, cause, order = _play(timed, law)
    if len(order) < len(timed):
        stuck = int(np.setdiff1d(np.arange(len(timed)), order)[0])
        raise ValueError(f"{timed.name(stuck)} waits on a cycle; Schedule.validate() prints it")
    lanes, spans, row = _spans(timed, start, finish)
    return Trace(
        source="simulated",
        lanes=lanes,
        phases=timed.phases,
        spans=spans,
        memory=_memory(timed, start, finish, order, refuse=memory == "raise"),
        critical=row[_critical(finish, cause)],
    )


def _check(timed: Timed) -> None:
    """The native code trusts what passes here."""
    size = len(timed)
    columns: list[tuple[str, Any, NDArray[np.bool_]]] = [
        ("seconds", np.arange(size), ~(np.isfinite(timed.seconds) & (timed.seconds >= 0))),
        ("weight", np.arange(size), ~(np.isfinite(timed.weight) & (timed.weight > 0))),
        ("lane", timed.holds, (timed.holds.values < 0) | (timed.holds.values >= len(timed.lanes))),
        ("dependency", timed.after, (timed.after.values < 0) | (timed.after.values >= size)),
    ]
    for what, rows, wrong in columns:
        if bool(wrong.any()):
            task = int((rows.owner if hasattr(rows, "owner") else rows)[np.argmax(wrong)])
            raise ValueError(f"{timed.name(task)} has an unlawful {what}")
    for name, capacity in zip(timed.resources, timed.capacity.tolist(), strict=True):
        if not capacity > 0:
            raise ValueError(f"resource {name}: capacity {capacity} must be positive")


def _play(timed: Timed, law: Law) -> tuple[Floats, Floats, Ints, Ints]:
    graph = (timed.seconds, *timed.holds, *timed.after, timed.widths)
    if not timed.widths.any() and not len(timed.use.values):
        return _native.play_static(*graph)
    fluid = native_fluid(timed.capacity.tolist(), law)
    return _native.play_events(
        *graph,
        timed.by_priority,
        timed.priority,
        *timed.use,
        timed.use_amount,
        timed.weight,
        _kinds(timed, law),
        fluid,
    )


def _kinds(timed: Timed, law: Law) -> Ints:
    if not isinstance(law, CoRunTable):
        return np.zeros(len(timed), np.int32)
    number = {kind: at for at, kind in enumerate(law.kinds)}
    kinds = np.array([number.get(phase, -1) for phase in timed.phases], np.int32)[timed.phase]
    unknown = (kinds < 0) & (np.diff(timed.use.ptr) > 0)
    if bool(unknown.any()):
        raise ValueError(
            f"{timed.name(int(np.argmax(unknown)))} shares resources, but the co-run table lacks its phase"
        )
    return kinds


def _spans(timed: Timed, start: Floats, finish: Floats) -> tuple[tuple[str, ...], Spans, Ints]:
    """Names of lanes, spans, and the first row of each task."""
    count = np.diff(timed.holds.ptr)
    delays = np.flatnonzero(count == 0)
    task = np.concatenate([timed.holds.owner, delays])
    lane = np.concatenate([timed.holds.values, np.full(len(delays), len(timed.lanes))])
    names: list[tuple[str, ...]] = [(name,) for name in timed.lanes]
    for pool in np.flatnonzero(timed.widths > 1):
        names[pool] = tuple(f"{timed.lanes[pool]}[{slot}]" for slot in range(timed.widths[pool]))
    first_row = timed.holds.ptr[:-1].astype(np.int32)
    if len(delays):
        first_row[delays] = len(timed.holds.values) + np.arange(len(delays))
        names.append((DELAY,))

    slot = np.zeros(len(task), np.int32)
    for number in [*np.flatnonzero(timed.widths > 1), *([len(timed.lanes)] if len(delays) else [])]:
        rows = np.flatnonzero(lane == number)
        rows = rows[np.lexsort((task[rows], finish[task[rows]], start[task[rows]]))]
        slot[rows] = _native.slots(start[task[rows]], finish[task[rows]])
    if len(delays):
        names[-1] = tuple(f"{DELAY}[{at}]" for at in range(int(slot[len(timed.holds.values) :].max()) + 1))
    base = np.cumsum([0, *map(len, names)])
    tied = np.where(count > 1, np.arange(len(timed)), -1)
    spans = Spans.of(
        lane=base[lane] + slot,
        start=start[task],
        finish=finish[task],
        phase=timed.phase[task],
        step=timed.step[task],
        micro_batch=timed.micro_batch[task],
        stage=timed.stage[task],
        rank=timed.rank[task],
        task=tied[task],
    )
    return tuple(name for group in names for name in group), spans, first_row


def _critical(finish: Floats, cause: Ints) -> Ints:
    """The tasks of the chain that ends last, in order of time."""
    if not len(finish):
        return np.zeros(0, np.int32)
    causes, chain = cause.tolist(), [int(np.argmax(finish))]
    while causes[chain[-1]] >= 0:
        chain.append(causes[chain[-1]])
    return np.array(chain[::-1], np.int32)


def _memory(timed: Timed, start: Floats, finish: Floats, order: Ints, *, refuse: bool) -> dict[str, Curve]:
    """The curve of each space; within an instant nothing is held longer than it must be.

    What ended gives back first; then tasks of no length take and give, in the order in which they were
    played; then what starts takes, by id.
    """
    task, at_finish = timed.memory_task, timed.memory_finish
    time = np.where(at_finish, finish[task], start[task])
    instantaneous = start[task] == finish[task]
    turn = np.where(instantaneous, 1, np.where(at_finish, 0, 2))
    rank = np.empty(len(timed), np.int64)
    rank[order] = np.arange(len(timed))
    among = np.where(instantaneous, rank[task], task)
    sequence = np.lexsort((at_finish, among, turn, time))

    curves, worst = {}, (len(sequence), -1, 0.0)
    place = np.empty(len(sequence), np.int64)
    place[sequence] = np.arange(len(sequence))
    for space, name in enumerate(timed.spaces):
        rows = sequence[timed.memory_space[sequence] == space]
        held = np.cumsum(timed.memory_bytes[rows])
        over = (held > timed.space_capacity[space]) & (timed.memory_bytes[rows] > 0)
        if bool(over.any()):
            at = int(np.argmax(over))
            worst = min(worst, (int(place[rows[at]]), space, float(held[at])))
        shown = np.append(np.diff(time[rows]) > 0, [True] * min(len(rows), 1)).astype(bool) | instantaneous[rows]
        curves[name] = Curve(times=time[rows][shown], values=held[shown])
    if refuse and worst[1] >= 0:
        at, space, after = int(sequence[worst[0]]), worst[1], worst[2]
        need = float(timed.memory_bytes[at])
        room = float(timed.space_capacity[space]) - (after - need)
        raise OutOfMemory(timed.name(int(task[at])), int(task[at]), timed.spaces[space], need, room)
    return curves
