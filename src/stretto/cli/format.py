"""Numbers as people read them."""

from __future__ import annotations

from stretto.core.plan import Metric
from stretto.core.statistics import Interval

_PREFIXES = (
    (1e15, "P"),
    (1e12, "T"),
    (1e9, "G"),
    (1e6, "M"),
    (1e3, "k"),
    (1.0, ""),
    (1e-3, "m"),
    (1e-6, "µ"),
    (1e-9, "n"),
)


def quantity(value: float, unit: str) -> str:
    """Three digits and an SI prefix.

    >>> quantity(0.00123, "s")
    '1.23 ms'
    """
    for scale, prefix in _PREFIXES:
        if abs(value) >= scale:
            return f"{value / scale:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def interval(value: Interval, unit: str) -> str:
    """The value with its range: '310 tokens/s (280 .. 340)'."""
    if unit in ("s", "bytes"):
        short = "B" if unit == "bytes" else unit
        return f"{quantity(value.value, short)} ({quantity(value.low, short)} .. {quantity(value.high, short)})"
    return f"{value.value:.4g} {unit} ({value.low:.4g} .. {value.high:.4g})"


def metric(value: Metric) -> str:
    return interval(value.value, value.unit)
