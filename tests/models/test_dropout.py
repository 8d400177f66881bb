"""Dropout by counters: the published mixing function, the right share and scale, and no draw that two places share."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stretto.models.dropout import Dropout, draws, token_keys

WORD = 2**64 - 1
STRIDE = 0x9E3779B97F4A7C15


def split_mix(state: int) -> int:
    """SplitMix64's output for a state, in Python's whole numbers."""
    z = state & WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


def keys(count: int = 64, length: int = 32, *, step: int = 3, seed: int = 5, first: int = 0) -> torch.Tensor:
    return token_keys(seed, step, range(first, first + count), torch.arange(length))


def test_the_mixing_function_has_its_published_outputs() -> None:
    # Vigna's splitmix64.c from the state 1234567.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [split_mix(1234567 + (i + 1) * STRIDE) for i in range(4)] == published


@pytest.mark.parametrize(("place", "first", "channels"), [(0, 0, 8), (7, 3, 6), (2**20, 2, 1)])
def test_a_draw_is_what_the_definition_says(place: int, first: int, channels: int) -> None:
    rows = keys(2, 3)
    found = draws(rows, place, first, channels)
    for at in np.ndindex(2, 3):
        own = split_mix(int(rows[at]) + (place + 1) * STRIDE)
        for channel in range(channels):
            word = split_mix(own + ((first + channel) // 4 + 1) * STRIDE)
            bits = (word >> 16 * ((first + channel) % 4)) & 0xFFFF
            assert int(found[(*at, channel)]) % 2**16 == bits


@pytest.mark.parametrize("chance", [0.1, 0.5, 0.9])
def test_the_share_that_is_dropped_and_the_mean_that_stays(chance: float) -> None:
    x = torch.ones(64, 32, 100, dtype=torch.float64)
    out = Dropout(chance, place=1)(x, keys())
    count = x.numel()
    deviation = (chance * (1 - chance) / count) ** 0.5
    assert abs(float((out == 0).double().mean()) - chance) < 4 * deviation
    assert abs(float(out.mean()) - 1) < 4 * deviation / (1 - chance)
    assert out.unique().tolist() == pytest.approx([0.0, 1 / (1 - chance)], rel=1e-3)


def test_gradients_take_the_same_way() -> None:
    x = torch.randn(4, 8, 16, dtype=torch.float64, requires_grad=True)
    out = Dropout(0.25, place=0)(x, keys(4, 8))
    out.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad * x.detach(), out.detach(), rtol=1e-14, atol=0)


def test_a_part_has_its_part_of_the_mask() -> None:
    x = torch.randn(4, 8, 23)
    whole = Dropout(0.3, place=2)(x, keys(4, 8))
    for start, stop in ((0, 9), (9, 17), (17, 23)):
        part = Dropout(0.3, place=2, first=start)(x[..., start:stop], keys(4, 8))
        assert torch.equal(part, whole[..., start:stop])


def test_nothing_is_dropped_without_keys_or_chance() -> None:
    x = torch.randn(2, 3, 4)
    assert Dropout(0.5, place=0)(x, None) is x
    assert Dropout(0.0, place=0)(x, keys(2, 3)) is x


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("step", keys(step=4)),
        ("seed", keys(seed=6)),
        ("a seed's high word", keys(seed=5 + 2**32)),
        ("sequence", keys(first=64)),
        ("a sequence's high word", keys(first=2**32)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_all_that_a_mask_depends_on_changes_it(name: str, other: torch.Tensor) -> None:
    assert agreement(draws(keys(), 1, 0, 64), draws(other, 1, 0, 64)) < 4.5


def test_places_positions_and_channels_are_drawn_apart() -> None:
    one = draws(keys(), 1, 0, 64)
    assert agreement(one, draws(keys(), 2, 0, 64)) < 4.5
    assert agreement(one[:, 1:], one[:, :-1]) < 4.5
    for shift in (1, 2, 3, 4):
        assert agreement(one[..., shift:], one[..., :-shift]) < 4.5


def agreement(one: torch.Tensor, other: torch.Tensor) -> float:
    """How far two sets of draws agree by their signs beyond chance, in standard deviations."""
    same = ((one < 0) == (other < 0)).double()
    return abs(float(same.mean()) - 0.5) * 2 * same.numel() ** 0.5
