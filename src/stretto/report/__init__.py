"""Pictures of traces: a self-contained HTML page, a PNG, and the file that Perfetto opens."""

from __future__ import annotations

from stretto.report.curves import curves
from stretto.report.html import page
from stretto.report.png import png

__all__ = ["curves", "page", "png"]
