"""Collects what happens, one call at a time, into the columns of a `Trace`; the simulated and the real run
both write here.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np

from stretto.core.trace import KEY_FIELDS, Curve, Key, Spans, Trace


class _Rows:
    def __init__(self) -> None:
        self.columns: dict[str, list[Any]] = {name: [] for name in ("lane", "start", "finish", "phase", *KEY_FIELDS)}

    def append(self, *values: float) -> None:
        for column, value in zip(self.columns.values(), values, strict=True):
            column.append(value)

    def spans(self) -> Spans:
        return Spans.of(**self.columns)


class Recorder:
    """Append-only; `trace()` may be called at any time and gives what was seen so far."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.attributes: dict[str, Any] = {}
        self._lanes: dict[str, int] = {}
        self._phases: dict[str, int] = {}
        self._spans = _Rows()
        self._requests = _Rows()
        self._counters: dict[str, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
        self._memory: dict[str, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))

    def span(self, lane: str, start: float, finish: float, key: Key) -> None:
        """A stretch in which `lane` did one thing and nothing else."""
        self._append(self._spans, lane, start, finish, key)

    def request(self, lane: str, start: float, finish: float, key: Key) -> None:
        """A stretch that may overlap others on its lane: the life of a request."""
        self._append(self._requests, lane, start, finish, key)

    def counter(self, name: str, at: float, value: float) -> None:
        """From `at` on, `name` has `value`."""
        self._note(self._counters[name], at, value)

    def memory(self, space: str, at: float, held_bytes: float) -> None:
        """From `at` on, `space` holds `held_bytes`."""
        self._note(self._memory[space], at, held_bytes)

    def trace(self) -> Trace:
        return Trace(
            source=self.source,
            lanes=tuple(self._lanes),
            phases=tuple(self._phases),
            spans=self._spans.spans(),
            requests=self._requests.spans(),
            counters={name: _curve(*points) for name, points in self._counters.items()},
            memory={name: _curve(*points) for name, points in self._memory.items()},
            critical=self._critical(),
            attributes=dict(self.attributes),
        )

    def _append(self, rows: _Rows, lane: str, start: float, finish: float, key: Key) -> None:
        lane_id = self._lanes.setdefault(lane, len(self._lanes))
        phase_id = self._phases.setdefault(key.phase, len(self._phases))
        rows.append(lane_id, start, finish, phase_id, key.step, key.micro_batch, key.stage, key.rank)

    def _note(self, points: tuple[list[float], list[float]], at: float, value: float) -> None:
        times, values = points
        if not values or values[-1] != value:
            times.append(at)
            values.append(value)

    def _critical(self) -> np.ndarray[Any, np.dtype[np.int32]]:
        """The chain that ends last, walked back through whichever span ended latest before each one began."""
        finish = np.asarray(self._spans.columns["finish"])
        if not len(finish):
            return np.zeros(0, np.int32)
        start = np.asarray(self._spans.columns["start"])
        order = np.argsort(finish, kind="stable")
        ends = finish[order]
        chain = [int(order[-1])]
        while True:
            row = chain[-1]
            before = int(np.searchsorted(ends, start[row], side="right")) - 1
            while before >= 0 and (order[before] == row or start[order[before]] >= start[row]):
                before -= 1
            if before < 0:
                return np.asarray(chain[::-1], np.int32)
            chain.append(int(order[before]))


def _curve(times: list[float], values: list[float]) -> Curve:
    return Curve(times=np.asarray(times, np.float64), values=np.asarray(values, np.float64))
