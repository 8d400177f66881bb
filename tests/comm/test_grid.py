"""Ranks on a grid: Megatron-LM's numbering, groups that part the world."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stretto.comm.grid import RankGrid
from stretto.core.errors import FieldError

GRIDS = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(
    lambda sizes: RankGrid(axes=tuple(zip("abcd", sizes, strict=False)))
)


def test_ranks_are_numbered_tensor_first_then_data_then_pipeline() -> None:
    grid = RankGrid(axes=(("pp", 2), ("dp", 3), ("tp", 4)))
    for pp in range(2):
        for dp in range(3):
            for tp in range(4):
                assert grid.rank(pp=pp, dp=dp, tp=tp) == ((pp * 3) + dp) * 4 + tp
    assert grid.group(0, "tp") == (0, 1, 2, 3)
    assert grid.group(5, "dp") == (1, 5, 9)
    assert grid.group(13, "pp") == (1, 13)


@given(GRIDS, st.data())
@settings(deadline=None)
def test_groups_part_the_world_and_coordinates_lead_back(grid: RankGrid, data: st.DataObject) -> None:
    names = [name for name, _ in grid.axes]
    chosen = data.draw(st.lists(st.sampled_from(names), unique=True))
    groups = grid.groups(*chosen)
    assert sorted(rank for group in groups for rank in group) == list(range(grid.world))
    assert {len(group) for group in groups} == {grid.size(*chosen)}
    for rank in range(grid.world):
        assert grid.rank(**grid.coordinates(rank)) == rank
        assert grid.group(rank, *chosen) in groups


def test_mistakes_are_named() -> None:
    grid = RankGrid(axes=(("pp", 2), ("tp", 2)))
    with pytest.raises(FieldError, match="axis is 'dp'; it must be one of pp, tp"):
        grid.group(0, "dp")
    with pytest.raises(FieldError, match="rank is 4; it must be from 0 to 3"):
        grid.coordinates(4)
    with pytest.raises(FieldError, match="tp is 2; it must be from 0 to 1"):
        grid.rank(tp=2)
    with pytest.raises(FieldError, match="tp is 0; it must be at least 1"):
        RankGrid(axes=(("tp", 0),))
    with pytest.raises(FieldError, match="different names"):
        RankGrid(axes=(("tp", 1), ("tp", 2)))
