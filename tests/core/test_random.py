"""Counter-based random numbers: the authors' known answers, independence of order, plausible uniformity."""

from __future__ import annotations

import numpy as np
import pytest

from stretto.core.random import integers, philox, uniform

# Known answers of philox4x32-10 as published with Random123 (kat_vectors).
KNOWN = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers(counter: list[int], key: list[int], answer: list[int]) -> None:
    assert philox(counter, key).tolist() == answer


def test_a_draw_depends_on_its_index_alone() -> None:
    together = uniform(3, 5, np.arange(1000))
    backwards = [float(uniform(3, 5, i)) for i in reversed(range(1000))][::-1]
    assert together.tolist() == backwards


def test_seeds_and_streams_differ() -> None:
    draws = {tuple(uniform(seed, stream, np.arange(4))) for seed in range(5) for stream in range(5)}
    assert len(draws) == 25
    assert uniform(2**40, 0, 1) != uniform(0, 0, 1)
    assert uniform(0, 2**40, 1) != uniform(0, 0, 1)


def test_uniform_is_uniform() -> None:
    draws = uniform(1, 2, np.arange(100_000))
    counts = np.histogram(draws, bins=100, range=(0, 1))[0]
    chi_square = float(((counts - 1000) ** 2 / 1000).sum())
    assert 60 < chi_square < 150
    assert draws.min() >= 0
    assert draws.max() < 1


def test_integers_cover_their_range_and_refuse_nonsense() -> None:
    assert set(integers(1, 1, np.arange(1000), 7).tolist()) == set(range(7))
    with pytest.raises(ValueError, match="below is 0"):
        integers(1, 1, 0, 0)
