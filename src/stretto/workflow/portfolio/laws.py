"""What one sample of a node on a model may do: a table of rows (latency, success, cost), each as likely.

One row is drawn, so latency, success and cost stay correlated. Laws given by moments become tables too: each row is
the mean of one of 512 equally likely stretches of the law. So the mean is that of the law (but for a gaussian that is
cut off at 1 ms), and the standard deviation is short by what lies within the stretches, under 3 % for a coefficient of
variation up to 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import special

from stretto.core.errors import require

Shape = Literal["lognormal", "gamma", "gaussian"]

MAX_ROWS = 10_000
TABLE_ROWS = 512
_WITHIN = 16
"""So many quantiles are averaged into a row."""
LEAST_LATENCY_S = 0.001
"""No sample of a law given by moments is shorter."""


Quantiles = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Law:
    """A table of equally likely rows, sorted by latency.

    Attributes:
        latency_s: seconds from the launch to the return, ascending, finite, >= 0.
        success: the probability that the sample passes its check: 0 or 1 where it was observed.
        cost: what the sample costs when it returns, in the unit of the budget, finite, >= 0.
        bound: the most that a sample may cost; it is reserved at the launch.
    """

    latency_s: tuple[float, ...]
    success: tuple[float, ...]
    cost: tuple[float, ...]
    bound: float

    def __post_init__(self) -> None:
        rows = len(self.latency_s)
        require(1 <= rows <= MAX_ROWS, "rows", rows, f"1 to {MAX_ROWS}")
        require(len(self.success) == rows, "success", f"{len(self.success)} values", f"one a row, {rows}")
        require(len(self.cost) == rows, "cost", f"{len(self.cost)} values", f"one a row, {rows}")
        for name, most in (("latency_s", math.inf), ("success", 1.0), ("cost", math.inf)):
            for value in getattr(self, name):
                sound = 0 <= value <= most and math.isfinite(value)
                require(sound, name, value, "in 0 .. 1" if most == 1.0 else "a finite number >= 0")
        ascending = all(a <= b for a, b in zip(self.latency_s, self.latency_s[1:], strict=False))
        require(ascending, "latency_s", self.latency_s, "in ascending order")
        dearest = max(self.cost)
        sound = math.isfinite(self.bound) and self.bound >= dearest
        require(sound, "bound", self.bound, f"a finite number of at least {dearest:g}, the dearest sample's cost")

    @cached_property
    def success_rate(self) -> float:
        """The probability that a sample succeeds."""
        return math.fsum(self.success) / len(self.success)

    @cached_property
    def mean_latency_s(self) -> float:
        """Mean seconds of a sample."""
        return math.fsum(self.latency_s) / len(self.latency_s)

    @cached_property
    def mean_cost(self) -> float:
        """Mean cost of a sample."""
        return math.fsum(self.cost) / len(self.cost)


@dataclass(frozen=True, kw_only=True)
class Moments:
    """A law known by its moments: success is independent of latency, and all samples cost the same.

    Attributes:
        success: the probability that a sample passes its check, 0 .. 1.
        latency_s: mean seconds of a sample, > 0.
        latency_std_s: their standard deviation, >= 0.
        cost: of a sample, in the unit of the budget.
        shape: of the latency's law.
    """

    success: float
    latency_s: float
    latency_std_s: float = 0.0
    cost: float = 1.0
    shape: Shape = "lognormal"

    def __post_init__(self) -> None:
        require(0 <= self.success <= 1, "success", self.success, "in 0 .. 1")
        require(0 < self.latency_s < math.inf, "latency_s", self.latency_s, "a finite number > 0")
        require(0 <= self.latency_std_s < math.inf, "latency_std_s", self.latency_std_s, "a finite number >= 0")
        require(0 <= self.cost < math.inf, "cost", self.cost, "a finite number >= 0")
        require(self.shape in _QUANTILES, "shape", self.shape, f"one of {', '.join(_QUANTILES)}")

    def law(self) -> Law:
        """The table of this law."""
        rows = TABLE_ROWS if self.latency_std_s > 0 else 1
        latency = [self.latency_s]
        if self.latency_std_s > 0:
            at = (np.arange(rows * _WITHIN) + 0.5) / (rows * _WITHIN)
            latency_s = _QUANTILES[self.shape](at, self.latency_s, self.latency_std_s)
            latency_s = np.maximum(latency_s, LEAST_LATENCY_S).reshape(rows, _WITHIN).mean(axis=1)
            scale = 1.0 if self.shape == "gaussian" else self.latency_s / float(latency_s.mean())
            latency = [scale * value for value in latency_s.tolist()]
        return Law(latency_s=tuple(latency), success=(self.success,) * rows, cost=(self.cost,) * rows, bound=self.cost)


def _lognormal(at: Quantiles, mean: float, std: float) -> Quantiles:
    variance = math.log1p((std / mean) ** 2)
    return np.asarray(np.exp(math.log(mean) - variance / 2 + math.sqrt(variance) * special.ndtri(at)), np.float64)


def _gamma(at: Quantiles, mean: float, std: float) -> Quantiles:
    shape = (mean / std) ** 2
    return np.asarray(special.gammaincinv(shape, at) * (mean / shape), np.float64)


def _gaussian(at: Quantiles, mean: float, std: float) -> Quantiles:
    return np.asarray(mean + std * special.ndtri(at), np.float64)


_QUANTILES = {"lognormal": _lognormal, "gamma": _gamma, "gaussian": _gaussian}
