"""Ring self-attention as first published (Li et al., "Sequence Parallelism", 2021): complete rows of scores.

Keys go round and fill each rank's rows of scores, which are normed there; values go round and are mixed. Backward
sends values round, then keys, each with the sums of their gradients, so that no rank holds more than its rows: the
publication's all-reduce of whole gradients would. Scores are scaled by the root of the head's width.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from stretto.comm.transport import Axis
from stretto.models.parallel.layout import Layout, order, positions
from stretto.models.parallel.ring import Homing, visiting


class RingSelfAttention(torch.autograd.Function):
    """See `sequence.seq_attention`. Heads are [B, K, per, L/N, D] inside: `per` queries share keys and values."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        axis: Axis,
        causal: bool,
        layout: Layout,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        grouped = q.unflatten(1, (k.shape[1], -1))
        local = q.shape[2]
        scores = grouped.new_empty(*grouped.shape[:-1], local * axis.size)
        for source, (keys,) in visiting(axis, (k,)):
            scores[..., source * local : (source + 1) * local] = grouped @ keys[:, :, None].mT
        weights = _normed(scores.mul_(1 / math.sqrt(q.shape[-1])), _hidden(local, axis, causal, layout, mask))
        out = torch.zeros_like(grouped)
        for source, (values,) in visiting(axis, (v,)):
            out += weights[..., source * local : (source + 1) * local] @ values[:, :, None]
        ctx.save_for_backward(grouped, k, v, weights)
        ctx.axis = axis
        return out.flatten(1, 2)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        axis: Axis = ctx.axis
        local = q.shape[3]
        gradient = gradient.unflatten(1, (k.shape[1], -1))
        back = torch.empty_like(weights)
        homing = Homing(axis)
        for source, (values,) in visiting(axis, (v,)):
            block = slice(source * local, (source + 1) * local)
            back[..., block] = gradient @ values[:, :, None].mT
            homing.add([(weights[..., block].mT @ gradient).sum(2)])
        (dv,) = homing.home()
        back.sub_((back * weights).sum(-1, keepdim=True)).mul_(weights).mul_(1 / math.sqrt(q.shape[-1]))
        dq = torch.zeros_like(q)
        homing = Homing(axis)
        for source, (keys,) in visiting(axis, (k,)):
            block = slice(source * local, (source + 1) * local)
            dq += back[..., block] @ keys[:, :, None]
            homing.add([(back[..., block].mT @ q).sum(2)])
        (dk,) = homing.home()
        return dq.flatten(1, 2), dk, dv, None, None, None, None


def _normed(scores: torch.Tensor, hidden: torch.Tensor | None) -> torch.Tensor:
    """Softmax over the last dim, in place where it can be; rows that see nothing give zeros."""
    if hidden is None:
        return scores.softmax(-1)
    return scores.masked_fill_(hidden, -math.inf).softmax(-1).masked_fill_(hidden, 0.0)


def _hidden(local: int, axis: Axis, causal: bool, layout: Layout, mask: torch.Tensor | None) -> torch.Tensor | None:
    """True where a row [L/N] must not see a key [L] (in the order of the places), broadcast over heads."""
    if not causal and mask is None:
        return None
    length = local * axis.size
    keys = order(length, axis.size, layout)
    hidden = torch.zeros(1, local, length, dtype=torch.bool)
    if causal:
        hidden = hidden | (keys > positions(length, axis, layout)[:, None])
    if mask is not None:
        hidden = hidden | ~mask[:, None, keys]
    return hidden[:, None, None]
