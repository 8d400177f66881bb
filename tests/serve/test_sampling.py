"""Sampling: the distribution that was asked for, and draws that depend on seed and position alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto.core.random import uniform
from stretto.serve.sampling import Sampling, distribution, sample

LOGITS = np.log(np.array([0.1, 0.4, 0.2, 0.25, 0.05], dtype=np.float32))


def test_greedy_takes_the_first_of_the_most_likely() -> None:
    logits = np.array([[1.0, 3.0, 3.0, 2.0]], dtype=np.float32)
    assert sample(logits, [Sampling()], [7]) == [1]


@pytest.mark.parametrize(
    ("how", "kept", "probabilities"),
    [
        (Sampling(temperature=1.0), [1, 3, 2, 0, 4], [0.4, 0.25, 0.2, 0.1, 0.05]),
        (Sampling(temperature=1.0, top_k=2), [1, 3], [0.4 / 0.65, 0.25 / 0.65]),
        (Sampling(temperature=1.0, top_p=0.6), [1, 3], [0.4 / 0.65, 0.25 / 0.65]),
        (Sampling(temperature=1.0, top_p=0.66), [1, 3, 2], [0.4 / 0.85, 0.25 / 0.85, 0.2 / 0.85]),
        (Sampling(temperature=1.0, min_p=0.45), [1, 3, 2], [0.4 / 0.85, 0.25 / 0.85, 0.2 / 0.85]),
        (Sampling(temperature=0.5, top_k=2), [1, 3], [0.16 / 0.2225, 0.0625 / 0.2225]),
    ],
)
def test_what_is_kept_and_how_likely_it_is(how: Sampling, kept: list[int], probabilities: list[float]) -> None:
    tokens, p = distribution(LOGITS, how)
    assert tokens.tolist() == kept
    np.testing.assert_allclose(p, probabilities, rtol=1e-6)


def test_draws_follow_the_distribution() -> None:
    how = Sampling(temperature=1.0, seed=3)
    draws = [sample(LOGITS[None], [how], [position])[0] for position in range(4000)]
    shares = np.bincount(draws, minlength=5) / 4000
    np.testing.assert_allclose(shares, [0.1, 0.4, 0.2, 0.25, 0.05], atol=0.025)


@given(st.integers(0, 2**32), st.integers(0, 1000), st.integers(1, 6), st.data())
def test_a_draw_does_not_know_its_neighbours(seed: int, position: int, rows: int, data: st.DataObject) -> None:
    how = Sampling(temperature=1.3, top_p=0.9, seed=seed)
    alone = sample(LOGITS[None], [how], [position])
    slot = data.draw(st.integers(0, rows - 1))
    others = [Sampling(temperature=0.7, seed=i) for i in range(rows)]
    others[slot] = how
    positions = [5] * rows
    positions[slot] = position
    together = sample(np.repeat(LOGITS[None], rows, axis=0), others, positions)
    assert together[slot] == alone[0]


def test_two_seeds_draw_differently() -> None:
    logits = np.zeros((1, 50), dtype=np.float32)
    drawn = [[sample(logits, [Sampling(temperature=1.0, seed=seed)], [at])[0] for at in range(40)] for seed in (1, 2)]
    assert drawn[0] != drawn[1]


def test_ties_at_the_edge_of_top_k_keep_k_tokens() -> None:
    logits = np.zeros(10, dtype=np.float32)
    tokens, p = distribution(logits, Sampling(temperature=1.0, top_k=3))
    assert tokens.tolist() == [0, 1, 2]
    assert p.sum() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("field", "value"), [("temperature", -0.1), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.5), ("min_p", 1.0)]
)
def test_values_out_of_range_name_their_field(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field} is {value}"):
        Sampling(**{field: value})


@pytest.mark.parametrize("spread", [0.3, 2.0, 6.0])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"temperature": 3.0},
        {"temperature": 0.2},
        {"top_p": 0.5},
        {"top_p": 0.99, "min_p": 0.01},
        {"min_p": 0.2},
        {"min_p": 1e-6},
    ],
)
def test_a_draw_from_the_head_is_the_draw_from_the_whole(spread: float, how: dict[str, float]) -> None:
    """Flat and steep distributions, so that draws fall into the head and behind it."""
    logits = (np.random.default_rng(3).standard_normal(5000) * spread).astype(np.float32)
    sampling = Sampling(**{"temperature": 1.0, "seed": 8, **how})  # type: ignore[arg-type]
    kept, probabilities = distribution(logits, sampling)
    points = uniform(8, 0x73616D70, range(150))
    whole = kept[np.minimum(np.searchsorted(np.cumsum(probabilities), points, side="right"), len(kept) - 1)]
    assert [sample(logits[None], [sampling], [i])[0] for i in range(150)] == whole.tolist()
