"""A self-contained HTML page of one trace or of several, one above the other on one time axis.

No network, no library: the columns travel as base64 typed arrays and a canvas draws what is in view, so that
a hundred thousand spans open at once. The page's script is `timeline.js`, its frame `timeline.html`, both
beside this file.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import numpy as np

from stretto.core.trace import KEY_FIELDS, Comparison, Curve, Spans, Trace


def page(
    traces: Sequence[Trace], *, title: str, comparison: Comparison | None = None, notes: Sequence[str] = ()
) -> str:
    """The page as text.

    Args:
        traces: drawn one above the other, on one time axis; named by their `source`.
        comparison: shown as a table of phases, predicted beside measured.
        notes: sentences shown above the timelines.
    """
    data = json.dumps([_pack(trace) for trace in traces], separators=(",", ":"))
    parts = {
        "TITLE": html.escape(title),
        "NOTES": "".join(f"<p>{html.escape(note)}</p>" for note in notes),
        "TABLE": _table(comparison) if comparison else "",
        "METRICS": _metrics(traces),
        "DATA": data.replace("<", "\\u003c"),
        "SCRIPT": _asset("timeline.js"),
    }
    text = _asset("timeline.html")
    for name, value in parts.items():
        text = text.replace(f"<!--{name}-->", value)
    return text


def _asset(name: str) -> str:
    return files("stretto.report").joinpath(name).read_text(encoding="utf-8")


def _column(values: np.ndarray[Any, Any], kind: str) -> str:
    return base64.b64encode(np.ascontiguousarray(values, dtype=kind).tobytes()).decode("ascii")


def _pack_spans(spans: Spans) -> dict[str, Any]:
    order = np.lexsort((spans.start, spans.lane))
    packed: dict[str, Any] = {"count": len(spans)}
    packed["start"] = _column(spans.start[order], "<f8")
    packed["finish"] = _column(spans.finish[order], "<f8")
    for name in ("lane", "phase", *KEY_FIELDS):
        packed[name] = _column(getattr(spans, name)[order], "<i4")
    return packed


def _pack(trace: Trace) -> dict[str, Any]:
    return {
        "source": trace.source,
        "lanes": trace.lanes,
        "phases": trace.phases,
        "makespan": trace.makespan,
        "busy": trace.busy,
        "spans": _pack_spans(trace.spans),
        "requests": _pack_spans(trace.requests),
        "curves": {name: _pack_curve(curve) for name, curve in [*trace.counters.items(), *trace.memory.items()]},
    }


def _pack_curve(curve: Curve) -> dict[str, str]:
    return {"times": _column(curve.times, "<f8"), "values": _column(curve.values, "<f8")}


def _table(comparison: Comparison) -> str:
    rows = [(row.phase, f"{row.count}", row.predicted_s, row.measured_s, row.error) for row in comparison.phases] + [
        ("total", "", comparison.predicted_s, comparison.measured_s, comparison.error)
    ]
    cells = "".join(
        f"<tr><td>{html.escape(phase)}<td>{count}<td>{predicted:.4g}<td>{measured:.4g}<td>{error:+.1%}"
        for phase, count, predicted, measured, error in rows
    )
    return f"<table><tr><th>phase<th>spans<th>predicted s<th>measured s<th>error{cells}</table>"


def _metrics(traces: Sequence[Trace]) -> str:
    rows = []
    for trace in traces:
        for lane, seconds in trace.busy.items():
            bubble = trace.bubble[lane]
            rows.append(
                f"<tr><td>{html.escape(trace.source)}<td>{html.escape(lane)}<td>{trace.makespan:.4g}"
                f"<td>{seconds:.4g}<td>{bubble:.1%}"
            )
        if len(rows) > 200:
            rows.append("<tr><td colspan=5>more lanes are in the timeline")
            break
    return f"<table><tr><th>trace<th>lane<th>makespan s<th>busy s<th>bubble{''.join(rows)}</table>"
