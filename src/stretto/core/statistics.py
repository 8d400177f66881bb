"""Measuring and comparing: intervals are never improvised, and a baseline is measured in the same minutes as
what it is held against.

Wilson's interval for proportions, percentile bootstrap for medians, Tukey's trimean, the runs test of Wald
and Wolfowitz for independence, and `interleave`, which times rivals in turns so that drift of a shared
machine hits all of them alike.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stretto.core.random import integers


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A value with the range it is believed to lie in; `low <= value <= high`."""

    value: float
    low: float
    high: float

    def __post_init__(self) -> None:
        if not self.low <= self.value <= self.high:
            raise ValueError(f"interval: {self.low} <= {self.value} <= {self.high} does not hold")

    @classmethod
    def exact(cls, value: float) -> Interval:
        return cls(value=value, low=value, high=value)

    def scaled(self, factor: float) -> Interval:
        """The interval of `factor` times the value; `factor` must not be negative."""
        return Interval(value=self.value * factor, low=self.low * factor, high=self.high * factor)

    def reciprocal(self, numerator: float = 1.0) -> Interval:
        """The interval of `numerator / value`; all bounds must be positive."""
        return Interval(value=numerator / self.value, low=numerator / self.high, high=numerator / self.low)

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


def _values(samples: ArrayLike) -> NDArray[np.float64]:
    values = np.asarray(samples, dtype=np.float64).ravel()
    if not len(values):
        raise ValueError("no samples")
    if not np.isfinite(values).all():
        raise ValueError("samples must be finite numbers")
    return values


def trimean(samples: ArrayLike) -> float:
    """Tukey's trimean: (lower quartile + 2 median + upper quartile) / 4; robust, yet uses more than the middle."""
    low, middle, high = np.quantile(_values(samples), [0.25, 0.5, 0.75])
    return float(low + 2 * middle + high) / 4


def wilson(successes: int, trials: int, z: float = 1.96) -> Interval:
    """Wilson's score interval of a proportion (Wilson 1927); `z` is the normal quantile, 1.96 for 95 %.

    >>> wilson(0, 10).high < 0.28
    True
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes of {trials} trials: need 0 <= successes <= trials, trials >= 1")
    p = successes / trials
    scale = 1 + z * z / trials
    centre = (p + z * z / (2 * trials)) / scale
    half = z / scale * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    return Interval(value=p, low=max(0.0, min(p, centre - half)), high=min(1.0, max(p, centre + half)))


def bootstrap(
    samples: ArrayLike,
    statistic: Callable[..., NDArray[np.float64]] = np.median,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap of `statistic(samples, axis=-1)`, drawn from a counter-based stream of `seed`."""
    values = _values(samples)
    picks = integers(seed, len(values), np.arange(resamples * len(values)), len(values))
    draws = statistic(values[picks].reshape(resamples, len(values)), axis=-1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    value = float(statistic(values, axis=-1))
    return Interval(value=value, low=min(float(low), value), high=max(float(high), value))


def paired_ratio(ours: ArrayLike, theirs: ArrayLike, *, seed: int = 0) -> Interval:
    """The median of theirs/ours over rounds that were measured side by side, with its bootstrap interval."""
    a, b = _values(ours), _values(theirs)
    if len(a) != len(b):
        raise ValueError(f"paired samples differ in number: {len(a)} and {len(b)}")
    return bootstrap(b / a, seed=seed)


def runs_test(samples: ArrayLike) -> float:
    """The z score of the runs test about the median: beyond +-1.96 the samples are not independent (drift or ringing).

    Returns 0 when fewer than 8 samples differ from the median, which is too few to tell.
    """
    values = _values(samples)
    signs = np.sign(values - np.median(values))
    signs = signs[signs != 0]
    above, below = int((signs > 0).sum()), int((signs < 0).sum())
    total = above + below
    if total < 8 or not above or not below:
        return 0.0
    runs = 1 + int((signs[1:] != signs[:-1]).sum())
    mean = 1 + 2 * above * below / total
    variance = (mean - 1) * (mean - 2) / (total - 1)
    return float((runs - mean) / math.sqrt(variance)) if variance > 0 else 0.0


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of each round of one rival."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def spread(self) -> float:
        """Interquartile range over the median."""
        low, high = np.quantile(self.seconds, [0.25, 0.75])
        return float((high - low) / self.median)


def interleave(rivals: Mapping[str, Callable[[], object]], *, rounds: int = 5, warmups: int = 1) -> dict[str, Timing]:
    """Time each rival once a round, in an order that turns by one each round, after `warmups` untimed rounds."""
    names = list(rivals)
    for _ in range(warmups):
        for name in names:
            rivals[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in _rotated(names, turn):
            start = time.perf_counter()
            rivals[name]()
            seconds[name].append(time.perf_counter() - start)
    return {name: Timing(seconds=tuple(s)) for name, s in seconds.items()}


def _rotated(names: Sequence[str], turn: int) -> list[str]:
    shift = turn % len(names)
    return [*names[shift:], *names[:shift]]
