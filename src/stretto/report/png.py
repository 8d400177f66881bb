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
    phases = list(dict.fromkeys(phase for trace in traces for phase in trace.phases))
    lanes = sum(min(len(trace.lanes), MAX_LANES) for trace in traces)
    figure = Figure(figsize=(12, 1.6 + 0.32 * lanes + 0.6 * len(traces)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(
        len(traces),
        1,
        sharex=True,
        squeeze=False,
        height_ratios=[1 + min(len(t.lanes), MAX_LANES) for t in traces],
    )
    for trace, axis in zip(traces, axes[:, 0], strict=True):
        shown = trace.lanes[:MAX_LANES]
        for lane in range(len(shown)):
            rows = np.flatnonzero(trace.spans.lane == lane)
            bars = np.stack([trace.spans.start[rows], (trace.spans.finish - trace.spans.start)[rows]], axis=1)
            colours = [COLOURS[phases.index(trace.phases[p]) % len(COLOURS)] for p in trace.spans.phase[rows]]
            axis.broken_barh(bars, (lane - 0.4, 0.8), facecolors=colours)
        axis.set_yticks(range(len(shown)), shown, fontsize=8)
        axis.invert_yaxis()
        axis.set_title(f"{trace.source}: {trace.makespan:.4g} s", loc="left", fontsize=10)
    axes[-1, 0].set_xlabel("seconds")
    figure.suptitle(title, fontsize=12)
    handles = [Patch(color=COLOURS[i % len(COLOURS)], label=phase) for i, phase in enumerate(phases)]
    figure.legend(handles=handles, loc="outside lower center", ncols=max(1, min(8, len(handles))), fontsize=8)
    figure.savefig(path, dpi=110)
