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


def _scale(value: float) -> tuple[float, str]:
    return next(((scale, prefix) for scale, prefix in _PREFIXES if abs(value) >= scale), (1.0, ""))


def _digits(value: float) -> str:
    """Three digits, or all of a whole number that has more."""
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def quantity(value: float, unit: str) -> str:
    """Three digits and an SI prefix.

    >>> quantity(0.00123, "s")
    '1.23 ms'
    """
    scale, prefix = _scale(value)
    return f"{_digits(value / scale)} {prefix}{unit}"


def cell(metric: Metric) -> str:
    """The value, and below it the range in the same unit where there is one.

    >>> cell(Metric(value=Interval(value=0.0012, low=0.001, high=0.0016), unit="s"))
    '1.2 ms\\n1 .. 1.6'
    """
    value, unit = metric.value, "B" if metric.unit == "bytes" else metric.unit
    if value.low == value.high:
        return quantity(value.value, unit)
    scale = _scale(value.value)[0]
    return f"{quantity(value.value, unit)}\n{_digits(value.low / scale)} .. {_digits(value.high / scale)}"


def interval(value: Interval, unit: str) -> str:
    """The value with its range: '310 tokens/s (280 .. 340)'."""
    if unit in ("s", "bytes"):
        short = "B" if unit == "bytes" else unit
        return f"{quantity(value.value, short)} ({quantity(value.low, short)} .. {quantity(value.high, short)})"
    return f"{value.value:.4g} {unit} ({value.low:.4g} .. {value.high:.4g})"


def metric(value: Metric) -> str:
    return interval(value.value, value.unit)
