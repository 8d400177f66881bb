"""Collectives: bounds that no algorithm beats, monotonicity, tables, refusals."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto.hardware import catalog, collective
from stretto.hardware.table import Table

LINKS = [catalog.link(name) for name in ("nvlink4", "pcie3", "ib-ndr400", "ethernet-10g")]
kinds = st.sampled_from([kind for kind in collective.COLLECTIVES if kind != "send_recv"])


@given(kinds, st.integers(2, 512), st.floats(0, 1e10), st.sampled_from(LINKS))
def test_no_collective_beats_its_bytes_and_the_interval_holds_it(
    kind: str, ranks: int, bytes_: float, link: object
) -> None:
    assert isinstance(link, collective.Link)
    found = collective.estimate(kind, bytes_, ranks, link)
    least = collective.port_share(kind, ranks) * bytes_ / link.bandwidth
    assert found.seconds >= least
    assert found.low <= found.seconds <= found.high


@given(kinds, st.integers(2, 64), st.floats(0, 1e9), st.floats(0, 1e9))
def test_more_bytes_never_take_less(kind: str, ranks: int, bytes_: float, more: float) -> None:
    a, b = (collective.estimate(kind, size, ranks, LINKS[0]).seconds for size in (bytes_, bytes_ + more))
    assert a <= b


def test_small_messages_take_the_tree_and_large_ones_the_ring() -> None:
    """With 64 ranks a ring has 126 rounds and a tree 12, but the ring moves fewer bytes."""
    link, constants = LINKS[0], collective.fitted("nvlink")
    small = collective.estimate("all_reduce", 8, 64, link).seconds - constants.start_s
    assert small == pytest.approx(12 * constants.latency_s, rel=1e-3)
    large = collective.estimate("all_reduce", 1e12, 64, link).seconds
    assert large == pytest.approx(2 * 63 / 64 * 1e12 / collective.effective_bandwidth(link), rel=1e-2)


def test_a_table_goes_before_the_model_and_one_rank_is_free() -> None:
    points = ((1e3, 2.0), (1e6, 2.0), (1e3, 4.0), (1e6, 4.0))
    table = Table(axes=("bytes", "ranks"), points=points, values=(1e-5, 1e-3, 2e-5, 2e-3))
    found = collective.estimate("all_reduce", 1e3, 4, LINKS[0], table=table)
    assert (found.seconds, found.basis) == (2e-5, "measured")
    assert collective.estimate("broadcast", 1e9, 1, LINKS[0]).seconds == 0


def test_mistakes_are_named() -> None:
    for arguments, told in (
        (("gossip", 1, 2), "all_reduce"),
        (("broadcast", -1, 2), "bytes"),
        (("broadcast", 1, 0), "ranks"),
    ):
        with pytest.raises(ValueError, match=told):
            collective.estimate(*arguments, LINKS[0])  # type: ignore[arg-type]
