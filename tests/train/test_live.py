"""Live bytes against what is known of a few operations."""

from __future__ import annotations

import torch

from stretto.train.live import LiveBytes


def test_what_is_made_and_dropped() -> None:
    live = LiveBytes()
    with live:
        a = torch.zeros(100)
        b = a + 1
        assert live.now == 800
        del a
        assert live.now == 400
        b = b.to(torch.float64)
        assert (live.now, live.peak) == (800, 1200)
    del b
    assert live.now == 0


def test_views_and_what_was_there_before_count_for_nothing() -> None:
    weight = torch.zeros(10, 10)
    live = LiveBytes()
    with live:
        turned = weight.t()
        weight += 1
        part = weight[2:4].view(-1)
        assert (live.now, live.peak) == (0, 0)
        product = weight @ turned
        assert live.now == 400
    del part, product


def test_what_autograd_keeps_is_counted_until_backward() -> None:
    x = torch.ones(1000, requires_grad=True)
    live = LiveBytes()
    y = live.around(lambda: (x.sin() * 2).exp().sum())
    # sin keeps x itself, the product nothing, exp its result
    assert live.now == 4000 + 4
    with live:
        y.backward()
    del y
    assert live.now == 4000
    assert x.grad is not None
