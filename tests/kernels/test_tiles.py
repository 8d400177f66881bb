"""Schedules of tiles: every slice once, nobody twice at a time, and each policy no worse than the one before it."""

from __future__ import annotations

import itertools
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stretto.kernels.tiles import POLICIES, Policy, TileSchedule, schedule

COSTS = st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.5]), max_size=40)


def check(found: TileSchedule, costs: list[float], slices: int) -> None:
    """Every slice of every tile once, pieces as long as they cost, no worker on two at once."""
    by_tile, by_worker = defaultdict(list), defaultdict(list)
    for piece in found.pieces:
        assert piece.end - piece.start == pytest.approx(costs[piece.tile] * (piece.last - piece.first) / slices)
        by_tile[piece.tile].append((piece.first, piece.last))
        by_worker[piece.worker].append((piece.start, piece.end))
    assert sorted(by_tile) == list(range(len(costs)))
    for parts in by_tile.values():
        parts.sort()
        assert (parts[0][0], parts[-1][1]) == (0, slices)
        assert all(before[1] == after[0] for before, after in itertools.pairwise(parts))
    for spans in by_worker.values():
        spans.sort()
        assert all(before[1] <= after[0] + 1e-9 for before, after in itertools.pairwise(spans))
    assert found.makespan == max((piece.end for piece in found.pieces), default=0.0)


@settings(max_examples=150, deadline=None)
@given(costs=COSTS, workers=st.integers(1, 9), slices=st.integers(1, 6))
def test_work_is_conserved_and_policies_improve(costs: list[float], workers: int, slices: int) -> None:
    found = {policy: schedule(len(costs), costs, workers, policy, slices=slices) for policy in POLICIES}
    for each in found.values():
        check(each, costs, slices)
        assert each.makespan >= sum(costs) / workers - 1e-9
    assert found["barrier_min"].makespan <= found["naive"].makespan + 1e-9
    assert found["steal"].makespan <= found["remap"].makespan + 1e-9
    longest = max(costs, default=0.0)
    assert found["remap"].makespan <= sum(costs) / workers + longest * (1 - 1 / workers) + 1e-9
    assert found["steal"].makespan <= sum(costs) / workers + longest / slices + 1e-9
    assert all(found[policy].shared == 0 for policy in POLICIES[:3])


def test_rounds_with_barriers_take_as_long_as_their_longest_tile() -> None:
    costs = [2.0, 1.0, 1.0, 1.0, 1.0, 2.0]
    assert schedule(6, costs, 3, "naive").makespan == 4.0
    assert schedule(6, costs, 3, "barrier_min").makespan == 3.0
    assert schedule(6, costs, 2, "remap").makespan == 4.0


def test_an_odd_tile_is_shared() -> None:
    """One tile of 8-bit activations over on two workers: the case the publication draws."""
    costs = [2.0] * 5
    naive, steal = schedule(5, costs, 2, "naive"), schedule(5, costs, 2, "steal")
    assert naive.makespan == 6.0
    assert steal.makespan == 5.0
    assert steal.shared == 1


def test_the_same_costs_give_the_same_pieces() -> None:
    costs = [1.0, 2.0, 2.0, 1.0, 1.0, 2.0, 1.0]
    for policy in POLICIES:
        assert schedule(7, costs, 3, policy) == schedule(7, costs, 3, policy)


@pytest.mark.parametrize(
    ("tiles", "costs", "workers", "policy", "slices", "field"),
    [
        (2, [1.0], 1, "naive", 4, "costs"),
        (1, [-1.0], 1, "naive", 4, "costs"),
        (1, [float("nan")], 1, "naive", 4, "costs"),
        (1, [1.0], 0, "naive", 4, "workers"),
        (1, [1.0], 1, "fair", 4, "policy"),
        (1, [1.0], 1, "steal", 0, "slices"),
    ],
)
def test_mistakes_are_named(
    tiles: int, costs: list[float], workers: int, policy: Policy, slices: int, field: str
) -> None:
    with pytest.raises(ValueError, match=field):
        schedule(tiles, costs, workers, policy, slices=slices)
