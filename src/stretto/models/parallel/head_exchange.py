"""Attention over a split sequence by exchanging heads for tokens (DeepSpeed-Ulysses, Jacobs et al., 2023).

Before attention each rank gives away the tokens of other ranks' heads and gets the whole sequence of its own; after it
the way back. Heads go in KV groups, shared out as evenly as they can be: with more ranks than groups there is no way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from stretto.comm.transport import Axis
from stretto.core.errors import require
from stretto.models.parallel.layout import Layout, order
from stretto.models.parallel.tensor import share

Local = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, bool, torch.Tensor | None], torch.Tensor]


class _Swap(torch.autograd.Function):
    """[B, heads, part, D] to [B, own heads, all, D], or back; `counts` of the heads by place."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis, counts: list[int], back: bool) -> torch.Tensor:
        ctx.how = (axis, counts, not back)
        return _swapped(x, axis, counts, back)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return _swapped(gradient, *ctx.how), None, None, None


def _swapped(x: torch.Tensor, axis: Axis, counts: list[int], back: bool) -> torch.Tensor:
    own = counts[axis.rank]
    if back:
        parts = x.unflatten(2, (axis.size, -1)).permute(2, 1, 0, 3, 4)
        came = axis.all_to_all(parts.flatten(0, 1), [own] * axis.size, counts)
        return came.movedim(0, 1)
    came = axis.all_to_all(x.movedim(1, 0), counts, [own] * axis.size)
    joined: torch.Tensor = came.unflatten(0, (axis.size, own)).permute(2, 1, 0, 3, 4).flatten(2, 3)
    return joined


def exchanged(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    axis: Axis,
    causal: bool,
    layout: Layout,
    mask: torch.Tensor | None,
    local: Local,
) -> torch.Tensor:
    """See `sequence.seq_attention`; `local` computes whole sequences on one rank.

    Raises:
        FieldError: there are fewer KV heads than ranks.
    """
    require(k.shape[1] >= axis.size, "cp", axis.size, f"at most the {k.shape[1]} KV heads for all_to_all")
    groups = [len(share(k.shape[1], place, axis.size)) for place in range(axis.size)]
    heads = [n * (q.shape[1] // k.shape[1]) for n in groups]
    where = order(q.shape[2] * axis.size, axis.size, layout)
    back = where.argsort()

    def whole(x: torch.Tensor, counts: list[int]) -> torch.Tensor:
        swapped: torch.Tensor = _Swap.apply(x, axis, counts, False)  # type: ignore[no-untyped-call]
        return swapped if layout == "contiguous" else swapped.index_select(2, back)

    mixed = local(whole(q, heads), whole(k, groups), whole(v, groups), causal, mask)
    if layout != "contiguous":
        mixed = mixed.index_select(2, where)
    return _Swap.apply(mixed, axis, heads, True)  # type: ignore[no-any-return, no-untyped-call]


def whole_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, mask: torch.Tensor | None
) -> torch.Tensor:
    """Attention [B, Q, L, D] of whole sequences on one rank; `mask` [B, L] is true for keys that count."""
    if mask is None:
        return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    seen = mask[:, None, None, :]
    if causal:
        seen = seen & torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    mixed = scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
    return mixed.masked_fill(~seen.any(-1, keepdim=True), 0.0)
