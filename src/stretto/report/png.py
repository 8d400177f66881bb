"""A still picture of one trace or of several, one above the other on one time axis (needs matplotlib)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from stretto.core.errors import UserError
from stretto.core.trace import Trace

MAX_LANES = 64
COLOURS = (
    "#4e79a7",
    "#f28e2b",
    "#59a14f",
    "#e15759",
    "#b07aa1",
    "#76b7b2",
    "#edc948",
    "#ff9da7",
    "#9c755f",
    "#7f8fa6",
)


def png(traces: Sequence[Trace], path: Path, *, title: str) -> None:
    """Draw the exclusive lanes of `traces` (at most 64 lanes each) into a PNG file.

    Raises:
        UserError: if matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError:
        raise UserError("a PNG needs matplotlib", right="pip install 'stretto[pictures]'") from None
    shown = [np.unique(trace.spans.lane)[:MAX_LANES] for trace in traces]
    phases = list(dict.fromkeys(t.phases[p] for t in traces for p in np.unique(t.spans.phase)))
    figure = Figure(figsize=(12, 1.6 + sum(0.32 * len(lanes) + 0.6 for lanes in shown)), layout="constrained")
    FigureCanvasAgg(figure)
    heights = [1 + len(lanes) for lanes in shown]
    axes = figure.subplots(len(traces), 1, sharex=True, squeeze=False, height_ratios=heights)
    for trace, lanes, axis in zip(traces, shown, axes[:, 0], strict=True):
        for place, lane in enumerate(lanes):
            rows = np.flatnonzero(trace.spans.lane == lane)
            bars = np.stack([trace.spans.start[rows], (trace.spans.finish - trace.spans.start)[rows]], axis=1)
            colours = [COLOURS[phases.index(trace.phases[p]) % len(COLOURS)] for p in trace.spans.phase[rows]]
            axis.broken_barh(bars, (place - 0.4, 0.8), facecolors=colours, antialiased=False)
        axis.set_yticks(range(len(lanes)), [trace.lanes[lane] for lane in lanes], fontsize=8, parse_math=False)
        axis.invert_yaxis()
        axis.set_title(f"{trace.source}: {trace.makespan:.4g} s", loc="left", fontsize=10)
    axes[-1, 0].set_xlabel("seconds")
    figure.suptitle(title, fontsize=12, parse_math=False)
    handles = [Patch(color=COLOURS[i % len(COLOURS)], label=phase) for i, phase in enumerate(phases)]
    legend = figure.legend(handles=handles, loc="outside lower center", ncols=max(1, min(8, len(handles))), fontsize=8)
    for text in legend.get_texts():
        text.set_parse_math(False)  # names are the user's
    figure.savefig(path, dpi=110)
