"""The metrics of a trace against hand-made figures, and the recorder that makes traces a call at a time."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto.core.record import Recorder
from stretto.core.trace import Curve, Key, Span, Spans, Trace


def curve(*points: tuple[float, float]) -> Curve:
    return Curve(times=np.array([t for t, _ in points]), values=np.array([v for _, v in points]))


def two_steps(scale: float = 1.0, steps: tuple[int, int] = (0, 1)) -> Trace:
    """Two ranks compute, exchange in one task on both lanes, and rank 0 computes again; one request lasts longer."""
    first, second = steps
    spans = Spans.of(
        lane=[0, 1, 0, 1, 0],
        start=np.array([0, 0, 3, 3, 4]) * scale,
        finish=np.array([2, 3, 4, 4, 6]) * scale,
        phase=[0, 0, 1, 1, 0],
        step=[first, first, first, first, second],
        rank=[0, 1, -1, -1, 0],
        task=[-1, -1, 7, 7, -1],
    )
    return Trace(
        source="simulated",
        lanes=("gpu0", "gpu1", "net"),
        phases=("forward", "exchange", "never"),
        spans=spans,
        requests=Spans.of(lane=[0], start=[0.5 * scale], finish=[6.5 * scale], phase=[0]),
        counters={"queue": curve((0.0, 3.0), (1.5, 1.0))},
        memory={"gpu0": curve((0.0, 10.0), (1.0, 40.0), (5.0, 20.0)), "gpu1": curve()},
        critical=np.array([1, 3, 4], np.int32),
        attributes={"seed": 3},
    )


def lane_of(*intervals: tuple[float, float]) -> Trace:
    starts, finishes = zip(*intervals, strict=True)
    spans = Spans.of(lane=[0] * len(starts), start=starts, finish=finishes, phase=[0] * len(starts))
    return Trace(source="simulated", lanes=("a",), phases=("p",), spans=spans)


def test_makespan_counts_requests_and_starts_at_zero() -> None:
    assert two_steps().makespan == 6.5
    assert lane_of((2.0, 3.0)).makespan == 3.0


def test_busy_and_bubble_of_each_lane() -> None:
    trace = two_steps()
    assert trace.busy == {"gpu0": 5.0, "gpu1": 4.0, "net": 0.0}
    assert trace.bubble == pytest.approx({"gpu0": 1 - 5 / 6.5, "gpu1": 1 - 4 / 6.5, "net": 1.0})


def test_a_task_on_two_lanes_counts_once_in_its_phase() -> None:
    assert two_steps().phase_seconds == {"forward": 7.0, "exchange": 1.0, "never": 0.0}


def test_critical_path_and_its_seconds() -> None:
    trace = two_steps()
    assert trace.critical_path == [
        Span("gpu1", 0.0, 3.0, Key("forward", step=0, rank=1)),
        Span("gpu1", 3.0, 4.0, Key("exchange", step=0)),
        Span("gpu0", 4.0, 6.0, Key("forward", step=1, rank=0)),
    ]
    assert trace.critical_seconds == {"forward": 5.0, "exchange": 1.0}


def test_peak_memory_of_each_space() -> None:
    assert two_steps().peak_memory == {"gpu0": 40.0, "gpu1": 0.0}


def test_an_empty_trace_has_metrics_too() -> None:
    empty = Trace(source="measured", lanes=("a",), phases=("p",), spans=Spans.empty())
    assert (empty.makespan, empty.busy, empty.bubble, empty.phase_seconds) == (0.0, {"a": 0.0}, {"a": 0.0}, {"p": 0.0})
    assert list(empty) == []
    assert empty.overlaps() == []
    assert empty.compare(empty).phases == ()
    assert empty.compare(empty).error == 0.0


def test_equal_runs_compare_without_error() -> None:
    comparison = two_steps().compare(two_steps())
    assert [(row.phase, row.error, row.count, row.matched) for row in comparison.phases] == [
        ("forward", 0.0, 3, 3),
        ("exchange", 0.0, 1, 1),
    ]
    assert (comparison.error, comparison.unmatched_predicted, comparison.unmatched_measured) == (0.0, 0, 0)


def test_errors_are_signed_and_relative_to_the_measured() -> None:
    slow, fast = two_steps(2.0), two_steps(1.0)
    assert slow.compare(fast).error == pytest.approx(1.0)
    assert fast.compare(slow).error == pytest.approx(-0.5)
    assert [row.error for row in fast.compare(slow).phases] == pytest.approx([-0.5, -0.5])
    row = fast.compare(slow).phases[0]
    assert (row.predicted_s, row.measured_s) == (7.0, 14.0)


def test_keys_without_a_partner_are_counted_on_their_side() -> None:
    comparison = two_steps(steps=(0, 1)).compare(two_steps(steps=(0, 2)))
    forward = comparison.phases[0]
    assert (forward.count, forward.matched) == (3, 2)
    assert (comparison.unmatched_predicted, comparison.unmatched_measured) == (1, 1)


def test_phases_match_by_name_not_by_number() -> None:
    a, b = Recorder("simulated"), Recorder("measured")
    for recorder, order in ((a, ("decode", "prefill")), (b, ("prefill", "decode"))):
        for at, phase in enumerate(order):
            recorder.span("lane", at, at + 1, Key(phase, step=0))
    b.span("lane", 2, 5, Key("host"))
    rows = {row.phase: row for row in a.trace().compare(b.trace()).phases}
    assert {phase: (row.matched, row.count) for phase, row in rows.items()} == {
        "decode": (1, 1),
        "prefill": (1, 1),
        "host": (0, 1),
    }
    assert rows["host"].error == -1.0
    backwards = {row.phase: row for row in b.trace().compare(a.trace()).phases}
    assert backwards["host"].error == float("inf")


def test_overlaps_names_the_rows() -> None:
    assert lane_of((4.0, 6.0), (0.0, 2.0), (1.0, 3.0), (3.0, 4.0)).overlaps() == [(1, 2)]
    assert two_steps().overlaps() == []


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 5)), min_size=1, max_size=8))
def test_overlaps_is_empty_only_in_a_lawful_trace(rows: list[tuple[int, int]]) -> None:
    intervals = [(float(at), float(at + size)) for at, size in rows]
    pairs = [(a, b) for i, a in enumerate(intervals) for b in intervals[i + 1 :]]
    clash = any(a[0] < b[1] and b[0] < a[1] for a, b in pairs)
    assert bool(lane_of(*intervals).overlaps()) == clash


def test_chrome_events_are_json_in_microseconds() -> None:
    data = json.loads(json.dumps(two_steps().to_chrome(), allow_nan=False))
    events = data["traceEvents"]
    spans = [e for e in events if e["ph"] == "X"]
    assert [(e["name"], e["tid"], e["ts"], e["dur"]) for e in spans[:2]] == [
        ("forward", 0, 0.0, 2e6),
        ("forward", 1, 0.0, 3e6),
    ]
    assert len(spans) == 5
    assert spans[4]["args"] == {"step": 1, "rank": 0}
    assert spans[2]["args"] == {"step": 0}
    assert [(e["name"], e["ts"], e["args"]["value"]) for e in events if e["ph"] == "C"] == [
        ("queue", 0.0, 3.0),
        ("queue", 1.5e6, 1.0),
        ("gpu0", 0.0, 10.0),
        ("gpu0", 1e6, 40.0),
        ("gpu0", 5e6, 20.0),
    ]
    begin, end = (next(e for e in events if e["ph"] == ph) for ph in "be")
    assert (begin["ts"], end["ts"], begin["id"]) == (0.5e6, 6.5e6, end["id"])
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert names == {0: "gpu0", 1: "gpu1", 2: "net"}
    assert data["otherData"] == {"seed": 3}


def test_columns_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="column phase has 1 rows, start has 2"):
        Spans.of(lane=[0, 0], start=[0, 1], finish=[1, 2], phase=[0])
    with pytest.raises(ValueError, match="column finish has 1 rows, start has 2"):
        Spans.of(lane=[0, 0], start=[0, 1], finish=[1], phase=[0, 0])


def test_a_span_that_ends_before_it_starts_is_refused() -> None:
    with pytest.raises(ValueError, match=r"row 1 ends at 1\.0 before it starts at 2\.0"):
        Spans.of(lane=[0, 0], start=[0, 2], finish=[1, 1], phase=[0, 0])


def test_take_keeps_rows_together() -> None:
    spans = two_steps().spans.take(np.array([4, 1]))
    assert (spans.start.tolist(), spans.lane.tolist(), spans.step.tolist()) == ([4.0, 0.0], [0, 1], [1, 0])


def test_recorder_finds_the_chain_that_ends_last() -> None:
    recorder = Recorder("measured")
    recorder.span("a", 0.0, 1.0, Key("short", step=0))
    recorder.span("b", 0.0, 3.0, Key("long", step=0))
    recorder.span("a", 1.0, 2.0, Key("short", step=1))
    recorder.span("a", 3.0, 5.0, Key("last", step=2))
    recorder.span("b", 3.0, 4.0, Key("beside", step=3))
    trace = recorder.trace()
    assert [span.key.phase for span in trace.critical_path] == ["long", "last"]
    assert trace.critical_seconds == {"long": 3.0, "last": 2.0}


def test_recorder_drops_repeated_values() -> None:
    recorder = Recorder("measured")
    for at, value in enumerate([1, 1, 2, 2, 1, 1]):
        recorder.counter("queue", at, value)
        recorder.memory("ram", at, 10.0 * value)
    trace = recorder.trace()
    assert (trace.counters["queue"].times.tolist(), trace.counters["queue"].values.tolist()) == ([0, 2, 4], [1, 2, 1])
    assert trace.memory["ram"].times.tolist() == [0, 2, 4]
    assert trace.peak_memory == {"ram": 20.0}


def test_recorder_shows_what_was_seen_so_far() -> None:
    recorder = Recorder("measured")
    assert len(recorder.trace()) == 0
    recorder.span("a", 0.0, 1.0, Key("p", step=0))
    before = recorder.trace()
    recorder.request("a", 0.0, 9.0, Key("answer"))
    assert (before.makespan, recorder.trace().makespan) == (1.0, 9.0)
    assert list(before) == [Span("a", 0.0, 1.0, Key("p", step=0))]
