"""How a rank tells apart what comes from other stages."""

from __future__ import annotations

from dataclasses import replace

import pytest

from stretto.comm.transport import alone
from stretto.core.orders import order_of
from stretto.train.pipeline import Pipeline


@pytest.mark.parametrize(
    ("name", "chunks"), [("fill-drain", 1), ("1f1b", 1), ("interleaved", 2), ("looped", 2), ("looped", 3)]
)
@pytest.mark.parametrize("skips", [(), ((0, 1),), ((0, 1), (0, 0))])
def test_no_two_messages_of_a_step_have_one_number(name: str, chunks: int, skips: tuple[tuple[int, int], ...]) -> None:
    """So that one that overtakes another, on whatever transport, is not taken for it."""
    order = replace(order_of(name, 2, 4, chunks), skips=skips)
    pipeline = Pipeline(order, {}, alone("pp"), alone("tp"), recompute=False)
    messages = {message for program in order.programs for action in program for message in order.outputs(action)}
    assert len(messages) == 2 * 4 * (order.stages - 1 + sum(source < target for source, target in skips))
    assert len({pipeline.number(message) for message in messages}) == len(messages)
