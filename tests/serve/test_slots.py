"""Slots: the range, the holes, and the fewest moves that close them."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stretto.serve.slots import MOST_HOLES, SlotPool, fewest_moves

ALIVE = st.lists(st.booleans(), min_size=1, max_size=12)


def contiguous(alive: list[bool]) -> bool:
    used = [slot for slot, held in enumerate(alive) if held]
    return not used or used[-1] - used[0] + 1 == len(used)


@settings(max_examples=300, deadline=None)
@given(ALIVE)
def test_moves_are_lawful_and_no_fewer_would_do(alive: list[bool]) -> None:
    moves = fewest_moves(alive)
    after = list(alive)
    for source, target in moves:
        assert after[source]
        assert not after[target]
        after[source], after[target] = False, True
    assert sum(after) == sum(alive)
    assert contiguous(after)
    assert len(moves) <= max(0, sum(alive) - 1)
    assert len(moves) == brute_force(alive)
    assert [source for source, _ in moves] == sorted(source for source, _ in moves)
    assert [target for _, target in moves] == sorted(target for _, target in moves)


def brute_force(alive: list[bool]) -> int:
    """The least number of true entries whose removal lets the others fit into one window with room for all."""
    used = [slot for slot, held in enumerate(alive) if held]
    for moved in range(len(used) + 1):
        for kept in combinations(used, len(used) - moved):
            if not kept or (kept[-1] - kept[0] < len(used) and len(used) <= len(alive)):
                return moved
    raise AssertionError


def test_the_first_of_equal_windows_is_taken() -> None:
    assert fewest_moves([True, False, True, True, False, True]) == [(5, 1)]
    assert fewest_moves([True, True, False, True, True]) == [(4, 2)]
    assert fewest_moves([False, True, True, False]) == []
    assert fewest_moves([False, False]) == []


@settings(max_examples=200, deadline=None)
@given(
    events=st.lists(st.integers(0, 11), max_size=60),
    reorder=st.sampled_from(["eager", "threshold", "never"]),
)
def test_a_pool_keeps_its_books_whoever_comes_and_goes(events: list[int], reorder: str) -> None:
    pool = SlotPool(slots=8, slot_tokens=10, reorder=reorder)  # type: ignore[arg-type]
    alive: set[int] = set()
    for request in events:
        if request in alive:
            pool.release(request)
            alive.remove(request)
        elif len(alive) < 8:
            low, high = pool.range
            (slot,) = pool.allocate(request, 1)
            assert not (low <= slot < high) or pool.holder(slot) == request
            assert pool.allocate(request, 10) == ()
            alive.add(request)
        before = {r: pool.table(r)[0] for r in alive}
        moves = dict(pool.close_holes())
        pool.audit()
        assert {r: pool.table(r)[0] for r in alive} == {r: moves.get(slot, slot) for r, slot in before.items()}
        low, high = pool.range
        used = sorted(pool.table(r)[0] for r in alive)
        assert (low, high) == ((used[0], used[-1] + 1) if used else (0, 0))
        assert pool.holes == high - low - len(alive)
        if reorder == "eager":
            assert pool.holes == 0
        elif reorder == "threshold":
            assert pool.holes <= MOST_HOLES * max(1, high - low)
        else:
            assert not moves


def test_newcomers_fill_holes_before_the_range_grows() -> None:
    pool = SlotPool(slots=5, slot_tokens=10, reorder="never")
    assert [pool.allocate(r, 1)[0] for r in range(4)] == [0, 1, 2, 3]
    pool.release(1)
    pool.release(0)
    assert pool.range == (2, 4)
    assert pool.allocate(7, 1) == (4,)
    pool.release(3)
    assert (pool.range, pool.holes) == ((2, 5), 1)
    assert pool.allocate(8, 1) == (3,)
    assert pool.allocate(9, 1) == (1,)  # nothing above is free: the slot just below, so that no hole appears
    assert pool.range == (1, 5)


def test_a_slot_holds_no_more_than_its_length() -> None:
    pool = SlotPool(slots=3, slot_tokens=10)
    assert pool.fits(10)
    assert not pool.fits(11)
    assert not pool.can_allocate(0, 11)
    with pytest.raises(ValueError, match="at most 10"):
        pool.allocate(0, 11)
