"""The record of a run, predicted or measured: one type for both, so that the two can be laid side by side.

A `Trace` holds columns, not objects: exclusive spans (a lane does one thing at a time), overlapping request
spans, counters and memory curves. Each span carries a `Key` (phase, step, micro-batch, stage, rank) by which
predicted and measured spans are matched. The metrics are defined from these instants in docs/metrics.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Ints = NDArray[np.int32]
Floats = NDArray[np.float64]

KEY_FIELDS = ("step", "micro_batch", "stage", "rank")


class Key(NamedTuple):
    """What a span is, independent of when it ran; -1 where a part does not apply."""

    phase: str
    step: int = -1
    micro_batch: int = -1
    stage: int = -1
    rank: int = -1


class Span(NamedTuple):
    """One span, unpacked from the columns for reading."""

    lane: str
    start: float
    finish: float
    key: Key


def _ints(values: ArrayLike) -> Ints:
    return np.ascontiguousarray(values, dtype=np.int32)


def _floats(values: ArrayLike) -> Floats:
    return np.ascontiguousarray(values, dtype=np.float64)


@dataclass(frozen=True, kw_only=True, eq=False)
class Spans:
    """Columns of spans, one row a span. `task` ties together the spans of one task that held several lanes
    (-1: none).
    """

    lane: Ints
    start: Floats
    finish: Floats
    phase: Ints
    step: Ints
    micro_batch: Ints
    stage: Ints
    rank: Ints
    task: Ints

    @classmethod
    def of(
        cls,
        *,
        lane: ArrayLike,
        start: ArrayLike,
        finish: ArrayLike,
        phase: ArrayLike,
        step: ArrayLike | None = None,
        micro_batch: ArrayLike | None = None,
        stage: ArrayLike | None = None,
        rank: ArrayLike | None = None,
        task: ArrayLike | None = None,
    ) -> Spans:
        """Build columns; a missing column is -1 throughout.

        Raises:
            ValueError: if columns differ in length, or a span ends before it starts.
        """
        begin, end = _floats(start), _floats(finish)
        size = len(begin)

        def column(values: ArrayLike | None) -> Ints:
            return np.full(size, -1, np.int32) if values is None else _ints(values)

        columns = {
            "lane": _ints(lane),
            "phase": _ints(phase),
            "step": column(step),
            "micro_batch": column(micro_batch),
            "stage": column(stage),
            "rank": column(rank),
            "task": column(task),
        }
        lengths = {"finish": len(end), **{name: len(values) for name, values in columns.items()}}
        for name, length in lengths.items():
            if length != size:
                raise ValueError(f"spans: column {name} has {length} rows, start has {size}")
        if size and bool((end < begin).any()):
            row = int(np.argmax(end < begin))
            raise ValueError(f"spans: row {row} ends at {end[row]} before it starts at {begin[row]}")
        return cls(start=begin, finish=end, **columns)

    @classmethod
    def empty(cls) -> Spans:
        return cls.of(lane=[], start=[], finish=[], phase=[])

    def __len__(self) -> int:
        return len(self.start)

    def take(self, rows: NDArray[Any]) -> Spans:
        """The chosen rows, in the given order."""
        return replace(self, **{name: getattr(self, name)[rows] for name in self.__dataclass_fields__})


@dataclass(frozen=True, kw_only=True, eq=False)
class Curve:
    """A step function of time: `values[i]` holds from `times[i]` until the next time."""

    times: Floats
    values: Floats

    @property
    def peak(self) -> float:
        return float(self.values.max()) if len(self.values) else 0.0


@dataclass(frozen=True, kw_only=True)
class PhaseError:
    """Predicted against measured seconds of one phase; `error` is signed, relative to the measured seconds."""

    phase: str
    predicted_s: float
    measured_s: float
    count: int
    matched: int

    @property
    def error(self) -> float:
        if self.measured_s > 0:
            return self.predicted_s / self.measured_s - 1.0
        return 0.0 if self.predicted_s == 0 else float("inf")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What `Trace.compare` returns: the total, each phase, and the spans that had no partner."""

    predicted_s: float
    measured_s: float
    phases: tuple[PhaseError, ...]
    unmatched_predicted: int
    unmatched_measured: int

    @property
    def error(self) -> float:
        """Signed relative error of the makespan."""
        return self.predicted_s / self.measured_s - 1.0 if self.measured_s > 0 else 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Trace:
    """What happened (or would happen), in seconds from the start of the run.

    `source` is "simulated" or "measured". `critical` lists rows of `spans` on the critical path in order of time.
    `requests` may overlap on a lane; `spans` may not. `clock_offset_s` names each process's clock against the
    first one's.
    """

    source: str
    lanes: tuple[str, ...]
    phases: tuple[str, ...]
    spans: Spans
    requests: Spans = field(default_factory=Spans.empty)
    counters: Mapping[str, Curve] = field(default_factory=dict)
    memory: Mapping[str, Curve] = field(default_factory=dict)
    critical: Ints = field(default_factory=lambda: np.zeros(0, np.int32))
    clock_offset_s: Mapping[str, float] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.spans)

    def __iter__(self) -> Iterator[Span]:
        for row in range(len(self.spans)):
            yield self.span(row)

    def span(self, row: int) -> Span:
        """Row `row` of the exclusive spans, unpacked."""
        s = self.spans
        key = Key(self.phases[s.phase[row]], *(int(getattr(s, name)[row]) for name in KEY_FIELDS))
        return Span(self.lanes[s.lane[row]], float(s.start[row]), float(s.finish[row]), key)

    @cached_property
    def makespan(self) -> float:
        """Seconds from the first instant of the run (0) to the last finish of any span."""
        ends = [float(s.finish.max()) for s in (self.spans, self.requests) if len(s)]
        return max(ends, default=0.0)

    @cached_property
    def busy(self) -> dict[str, float]:
        """Seconds in which each lane holds a span."""
        seconds = np.bincount(self.spans.lane, weights=self.spans.finish - self.spans.start, minlength=len(self.lanes))
        return {lane: float(s) for lane, s in zip(self.lanes, seconds, strict=True)}

    @cached_property
    def bubble(self) -> dict[str, float]:
        """Share of the makespan in which each lane holds no span (0 to 1)."""
        total = self.makespan
        return {lane: (1.0 - s / total if total > 0 else 0.0) for lane, s in self.busy.items()}

    @cached_property
    def phase_seconds(self) -> dict[str, float]:
        """Seconds of each phase, summed over lanes; a task that holds several lanes counts once."""
        s = self.spans
        rows = np.arange(len(s))
        if len(s) and bool((s.task >= 0).any()):
            tied = np.flatnonzero(s.task >= 0)
            _, first = np.unique(s.task[tied], return_index=True)
            rows = np.concatenate([np.flatnonzero(s.task < 0), tied[first]])
        sums = np.bincount(s.phase[rows], weights=(s.finish - s.start)[rows], minlength=len(self.phases))
        return {phase: float(x) for phase, x in zip(self.phases, sums, strict=True)}

    @cached_property
    def critical_path(self) -> list[Span]:
        """The spans that fix the makespan, first to last."""
        return [self.span(int(row)) for row in self.critical]

    @cached_property
    def critical_seconds(self) -> dict[str, float]:
        """Seconds that each phase contributes to the critical path."""
        s = self.spans
        sums = np.bincount(
            s.phase[self.critical],
            weights=(s.finish - s.start)[self.critical],
            minlength=len(self.phases),
        )
        return {phase: float(x) for phase, x in zip(self.phases, sums, strict=True) if x > 0}

    @property
    def peak_memory(self) -> dict[str, float]:
        """Most bytes held at once in each memory space."""
        return {space: curve.peak for space, curve in self.memory.items()}

    def compare(self, measured: Trace) -> Comparison:
        """Lay this trace (predicted) beside `measured`, by phase, matching spans by key.

        A phase's seconds are summed over all of its spans; `matched` counts the keys that both sides have.
        """
        mine, theirs = self._by_key(), measured._by_key()
        phases = list(dict.fromkeys([*self.phases, *measured.phases]))
        predicted, actual = self.phase_seconds, measured.phase_seconds
        rows = []
        for phase in phases:
            a, b = mine.get(phase, set()), theirs.get(phase, set())
            if not a and not b:
                continue
            rows.append(
                PhaseError(
                    phase=phase,
                    predicted_s=predicted.get(phase, 0.0),
                    measured_s=actual.get(phase, 0.0),
                    count=len(b),
                    matched=len(a & b),
                )
            )
        matched = sum(row.matched for row in rows)
        return Comparison(
            predicted_s=self.makespan,
            measured_s=measured.makespan,
            phases=tuple(rows),
            unmatched_predicted=sum(len(keys) for keys in mine.values()) - matched,
            unmatched_measured=sum(len(keys) for keys in theirs.values()) - matched,
        )

    def _by_key(self) -> dict[str, set[tuple[int, ...]]]:
        s = self.spans
        found: dict[str, set[tuple[int, ...]]] = {}
        columns = np.stack([s.phase, *(getattr(s, name) for name in KEY_FIELDS)], axis=1)
        for phase, *rest in np.unique(columns, axis=0).tolist():
            found.setdefault(self.phases[phase], set()).add(tuple(rest))
        return found

    def overlaps(self) -> list[tuple[int, int]]:
        """Pairs of rows, neighbours by start on one lane, that hold it at the same time; none in a lawful trace."""
        s = self.spans
        order = np.lexsort((s.finish, s.start, s.lane))
        before, after = order[:-1], order[1:]
        clash = (s.lane[before] == s.lane[after]) & (s.start[after] < s.finish[before])
        return list(zip(before[clash].tolist(), after[clash].tolist(), strict=True))

    def to_chrome(self) -> dict[str, Any]:
        """Chrome's trace-event format, which Perfetto opens: microseconds, one thread a lane, counters beside."""
        events: list[dict[str, Any]] = [
            {"ph": "M", "name": "process_name", "pid": 1, "tid": 0, "args": {"name": self.source}}
        ]
        for tid, lane in enumerate(self.lanes):
            events.append({"ph": "M", "name": "thread_name", "pid": 1, "tid": tid, "args": {"name": lane}})
        events += self._chrome_spans(self.spans, exclusive=True)
        events += self._chrome_spans(self.requests, exclusive=False)
        for name, curve in [*self.counters.items(), *self.memory.items()]:
            for at, value in zip(curve.times.tolist(), curve.values.tolist(), strict=True):
                events.append({"ph": "C", "name": name, "pid": 1, "ts": at * 1e6, "args": {"value": value}})
        return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": dict(self.attributes)}

    def _chrome_spans(self, spans: Spans, *, exclusive: bool) -> list[dict[str, Any]]:
        columns: Sequence[list[Any]] = [
            getattr(spans, name).tolist() for name in ("lane", "phase", "start", "finish", *KEY_FIELDS)
        ]
        events: list[dict[str, Any]] = []
        for row, (lane, phase, start, finish, *key) in enumerate(zip(*columns, strict=True)):
            args = {name: value for name, value in zip(KEY_FIELDS, key, strict=True) if value >= 0}
            event = {"name": self.phases[phase], "cat": self.source, "pid": 1, "tid": lane, "args": args}
            if exclusive:
                events.append({**event, "ph": "X", "ts": start * 1e6, "dur": (finish - start) * 1e6})
            else:
                events.append({**event, "ph": "b", "id": row, "ts": start * 1e6})
                events.append({**event, "ph": "e", "id": row, "ts": finish * 1e6})
        return events
