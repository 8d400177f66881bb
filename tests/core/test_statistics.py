"""Intervals cover what they claim to cover; degenerate input is refused."""

from __future__ import annotations

import numpy as np
import pytest

from stretto.core.random import uniform
from stretto.core.statistics import (
    Interval,
    bootstrap,
    interleave,
    paired_ratio,
    runs_test,
    trimean,
    wilson,
)


def test_trimean_of_known_samples() -> None:
    assert trimean([1, 2, 3, 4, 5]) == 3.0
    assert trimean([1, 1, 1, 1, 100]) == 1.0


def test_wilson_against_published_values() -> None:
    """Newcombe 1998, Statistics in Medicine 17, table I: 81 of 263 and 15 of 148."""
    a, b = wilson(81, 263), wilson(15, 148)
    assert (round(a.low, 4), round(a.high, 4)) == (0.2553, 0.3662)
    assert (round(b.low, 4), round(b.high, 4)) == (0.0624, 0.1605)
    with pytest.raises(ValueError, match="3 successes of 2 trials"):
        wilson(3, 2)


def test_bootstrap_covers_the_median_about_as_often_as_it_says() -> None:
    hits = sum(0.5 in bootstrap(uniform(7, i, np.arange(40)), resamples=400, seed=i) for i in range(200))
    assert 0.88 <= hits / 200 <= 0.99


def test_paired_ratio_needs_pairs() -> None:
    assert paired_ratio([1.0, 2.0, 4.0], [2.0, 4.0, 8.0]).value == 2.0
    with pytest.raises(ValueError, match="differ in number"):
        paired_ratio([1.0], [1.0, 2.0])


def test_runs_test_finds_drift_and_lets_noise_pass() -> None:
    assert abs(runs_test(uniform(1, 1, np.arange(200)))) < 1.96
    assert runs_test(np.arange(200)) < -1.96
    assert runs_test([0, 1] * 100) > 1.96
    assert runs_test([1, 2, 3]) == 0.0


def test_intervals_refuse_disorder_and_scale() -> None:
    with pytest.raises(ValueError, match="does not hold"):
        Interval(value=3, low=4, high=5)
    half = Interval(value=4, low=2, high=8).reciprocal(2.0)
    assert (half.low, half.value, half.high) == (0.25, 0.5, 1.0)
    assert 3 in Interval(value=4, low=2, high=8)


def test_interleave_takes_turns() -> None:
    calls: list[str] = []
    timings = interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2, warmups=1)
    assert calls == ["a", "b", "a", "b", "b", "a"]
    assert len(timings["a"].seconds) == 2
    assert timings["a"].spread >= 0
