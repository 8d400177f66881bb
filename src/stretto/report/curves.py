"""Curves that a run left in its trace ("curves": name to [x, y] pairs), such as losses by step, as a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stretto.core.errors import UserError
from stretto.core.trace import Trace


def curves(traces: Sequence[Trace], path: Path, *, title: str) -> None:
    """Draw the curves of all traces into one picture.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("a PNG needs matplotlib", right="pip install 'stretto[pictures]'") from None
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for trace in traces:
        for name, points in trace.attributes.get("curves", {}).items():
            if points:
                xs, ys = zip(*points, strict=True)
                axes.plot(xs, ys, marker="o" if len(xs) < 40 else None, markersize=3, label=name)
    axes.set_xlabel("step")
    axes.set_title(title.partition(":")[0], loc="left")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
