"""The laws of the striped partition, over any number of tiles, slices and workers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stretto.kernels.stripes import Launch, Piece, Stripes, launches, plan_stripes, striped_sum, tile_shape


@st.composite
def stripes(draw: st.DrawFn, most: int = 40) -> Stripes:
    group_tiles = draw(st.sampled_from([1, 1, 2, 3, 8]))
    return Stripes(
        inner_tiles=group_tiles * draw(st.integers(1, max(1, most // group_tiles))),
        slices=draw(st.integers(0, most)),
        workers=draw(st.integers(1, 2 * most)),
        group_tiles=group_tiles,
    )


def tiles_of(piece: Piece, how: Stripes) -> range:
    start = piece.slice * how.inner_tiles + piece.first
    return range(start, start + piece.count)


@given(stripes())
def test_every_tile_is_owned_once_and_in_order(how: Stripes) -> None:
    owned = [tile for worker in range(how.workers) for tile in how.stripe(worker)]
    assert owned == list(range(how.tiles))
    for worker in range(how.workers):
        pieces = how.pieces(worker)
        assert [tile for piece in pieces for tile in tiles_of(piece, how)] == list(how.stripe(worker))
        assert all(piece.worker == worker and piece.count > 0 for piece in pieces)


@given(stripes())
def test_loads_are_equal_but_for_the_rounding(how: Stripes) -> None:
    loads = [len(how.stripe(worker)) for worker in range(how.workers)]
    assert max(loads) <= how.length < how.tiles / how.workers + how.group_tiles + 1
    full = [load for load in loads if load == how.length]
    cut = [load for load in loads if 0 < load < how.length]
    assert len(cut) <= 1
    assert loads == [*full, *cut, *[0] * (how.workers - len(full) - len(cut))]


@given(stripes())
def test_no_stripe_begins_inside_a_group(how: Stripes) -> None:
    for worker in range(how.workers):
        for piece in how.pieces(worker):
            assert piece.first % how.group_tiles == 0
            assert piece.count % how.group_tiles == 0


@given(stripes())
def test_parts_of_a_slice_are_added_bottom_first_and_the_exchanges_counted(how: Stripes) -> None:
    exchanges = 0
    for slice_ in range(how.slices):
        parts = how.parts(slice_)
        assert [part.place for part in parts] == list(range(len(parts)))
        assert {part.parts for part in parts} == {len(parts)}
        assert sorted(tile for part in parts for tile in tiles_of(part, how)) == list(
            range(slice_ * how.inner_tiles, (slice_ + 1) * how.inner_tiles)
        )
        assert [part.first for part in parts] == sorted((part.first for part in parts), reverse=True)
        assert list(parts) == [how.pieces(part.worker)[_index(how, part)] for part in parts]
        # All but the last to add begin their stripe in this slice, so waiting never goes in a circle.
        assert all(how.pieces(part.worker)[0] == part for part in parts[:-1])
        exchanges += len(parts) - 1
    assert how.exchanges == exchanges
    starts = [how.stripe(worker).start for worker in range(1, how.workers) if how.stripe(worker)]
    assert exchanges == sum(start % how.inner_tiles != 0 for start in starts) <= how.workers - 1


def _index(how: Stripes, piece: Piece) -> int:
    return [each.slice for each in how.pieces(piece.worker)].index(piece.slice)


@settings(max_examples=60)
@given(stripes(most=12), st.randoms(use_true_random=False), st.integers(0, 2**32 - 1))
def test_sums_are_the_same_bits_in_any_order_of_turns(how: Stripes, random: object, seed: int) -> None:
    values = np.random.default_rng(seed).standard_normal((how.tiles, 3)).astype(np.float32)

    def partial(piece: Piece) -> np.ndarray:
        return values[tiles_of(piece, how)].sum(axis=0, dtype=np.float32)

    counters = np.zeros(max(1, how.slices), np.int32)
    first = striped_sum(how, partial, counters)
    assert not counters.any()
    for pick in (max, min, random.choice):  # type: ignore[attr-defined]
        again = striped_sum(how, partial, counters, next_worker=pick)
        assert not counters.any()
        assert all(np.array_equal(first[s], again[s]) for s in range(how.slices))
    for slice_ in range(how.slices):
        parts = [partial(piece) for piece in how.parts(slice_)]
        total = parts[0]
        for part in parts[1:]:
            total = part + total
        assert np.array_equal(first[slice_], total)
        whole = values[slice_ * how.inner_tiles : (slice_ + 1) * how.inner_tiles]
        np.testing.assert_allclose(first[slice_], whole.sum(axis=0, dtype=np.float64), rtol=1e-5, atol=1e-4)


@given(stripes(most=12).filter(lambda how: how.tiles > 0), st.data())
def test_the_counters_are_zero_again_after_a_failure(how: Stripes, data: st.DataObject) -> None:
    fails = data.draw(st.integers(0, sum(len(how.pieces(w)) for w in range(how.workers)) - 1))
    seen: list[Piece] = []

    def partial(piece: Piece) -> np.ndarray:
        seen.append(piece)
        if len(seen) > fails:
            raise RuntimeError("out of memory")
        return np.ones(1, np.float32)

    counters = np.zeros(how.slices, np.int32)
    with pytest.raises(RuntimeError, match="out of memory"):
        striped_sum(how, partial, counters)
    assert not counters.any()
    whole = striped_sum(how, lambda piece: np.full(1, piece.count, np.float32), counters)
    assert all(whole[s] == how.inner_tiles for s in range(how.slices))


def test_a_small_example() -> None:
    """Five workers over three slices of four tiles: the last has nothing to do, since three tiles each are enough."""
    how = Stripes(inner_tiles=4, slices=3, workers=5)
    assert how.length == 3
    assert [list(how.stripe(worker)) for worker in range(5)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11], []]
    assert [[(p.worker, p.first, p.count) for p in how.parts(s)] for s in range(3)] == [
        [(1, 3, 1), (0, 0, 3)],
        [(2, 2, 2), (1, 0, 2)],
        [(3, 1, 3), (2, 0, 1)],
    ]
    assert how.exchanges == 3


def test_rounding_to_groups() -> None:
    """72 workers over a product of 4096 by 4096 in tiles of 128: 15 tiles each, or 16 where four tiles make a group."""
    assert plan_stripes(16, 4096, 4096, workers=72, group=128).length == 15
    assert plan_stripes(16, 4096, 4096, workers=72, group=512).length == 16
    assert plan_stripes(16, 4096, 4096, workers=72).length == 15
    assert plan_stripes(64, 4096, 4096, workers=72, group=128) == Stripes(
        inner_tiles=64, slices=16, workers=72, group_tiles=2
    )


@given(st.integers(0, 5000))
def test_launches_cover_all_rows_once(rows: int) -> None:
    cut = launches(rows)
    assert [row for each in cut for row in range(each.first, each.first + each.rows)] == list(range(rows))
    assert all(1 <= each.parallel <= 16 and each.rows <= 64 * each.parallel for each in cut)
    assert all(each.rows == 64 * each.parallel for each in cut[:-1])
    assert sum(each.rows % 64 != 0 for each in cut) <= 1


def test_launches_and_tiles_of_known_sizes() -> None:
    assert launches(0) == ()
    assert launches(118) == (Launch(first=0, rows=64, parallel=1), Launch(first=64, rows=54, parallel=1))
    assert [(each.rows, each.parallel) for each in launches(1030)] == [(1024, 16), (6, 1)]
    assert tile_shape(1) == tile_shape(16) == (128, 128)
    assert tile_shape(17) == (64, 256)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"workers": 0}, "workers is 0"),
        ({"slices": -1}, "slices is -1"),
        ({"group_tiles": 3}, "group_tiles is 3; it must be a divisor of the 8 tiles"),
        ({"group_tiles": 0}, "group_tiles is 0"),
    ],
)
def test_what_makes_no_sense_is_refused(fields: dict[str, int], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Stripes(**{"inner_tiles": 8, "slices": 2, "workers": 3, **fields})


def test_mistakes_in_a_plan_or_a_sum_are_told() -> None:
    with pytest.raises(ValueError, match="rows is 1025"):
        plan_stripes(1025, 128, 128, workers=1)
    with pytest.raises(ValueError, match="group is 96"):
        plan_stripes(1, 128, 128, workers=1, group=96)
    with pytest.raises(ValueError, match="group is 192"):
        plan_stripes(1, 384, 128, workers=1, group=192)
    how = Stripes(inner_tiles=2, slices=3, workers=2)
    with pytest.raises(ValueError, match="at least 3"):
        striped_sum(how, _ones, np.zeros(2, np.int32))
    with pytest.raises(ValueError, match="not zero"):
        striped_sum(how, _ones, np.array([0, 1, 0], np.int32))


def _ones(piece: Piece) -> np.ndarray:
    return np.ones(1, np.float32)
