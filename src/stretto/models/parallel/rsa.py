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
        scaled = q.unflatten(1, (k.shape[1], -1)) * (1 / math.sqrt(q.shape[-1]))
        local = q.shape[2]
        scores = scaled.new_empty(*scaled.shape[:-1], local * axis.size)
        for source, (keys,) in visiting(axis, (k,)):
            _multiply_into(scores[..., source * local : (source + 1) * local], scaled, keys[:, :, None].mT)
        weights = _normed(scores, _hidden(local, axis, causal, layout, mask))
        out = torch.zeros_like(scaled)
        for source, (values,) in visiting(axis, (v,)):
            out += weights[..., source * local : (source + 1) * local] @ values[:, :, None]
        ctx.save_for_backward(scaled, k, v, weights)
        ctx.axis = axis
        return out.flatten(1, 2)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scaled, k, v, weights = ctx.saved_tensors
        axis: Axis = ctx.axis
        local = scaled.shape[3]
        gradient = gradient.unflatten(1, (k.shape[1], -1))
        back = torch.empty_like(weights)
        homing = Homing(axis)
        for source, (values,) in visiting(axis, (v,)):
            block = slice(source * local, (source + 1) * local)
            _multiply_into(back[..., block], gradient, values[:, :, None].mT)
            homing.add([(weights[..., block].mT @ gradient).sum(2)])
        (dv,) = homing.home()
        torch._softmax_backward_data(back, weights, -1, weights.dtype, grad_input=back)
        dq = torch.zeros_like(scaled)
        homing = Homing(axis)
        for source, (keys,) in visiting(axis, (k,)):
            block = slice(source * local, (source + 1) * local)
            dq += back[..., block] @ keys[:, :, None]
            homing.add([(back[..., block].mT @ scaled).sum(2)])
        (dk,) = homing.home()
        dq *= 1 / math.sqrt(scaled.shape[-1])
        return dq.flatten(1, 2), dk, dv, None, None, None, None


def _multiply_into(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """out = a @ b, matrix by matrix, with no copy between: `out` may be a block of wider rows."""
    matrices = (each.expand(*out.shape[:-2], -1, -1).flatten(0, -3) for each in (a, b))
    for to, left, right in zip(out.flatten(0, -3), *matrices, strict=True):
        torch.mm(left, right, out=to)


def _normed(scores: torch.Tensor, hidden: torch.Tensor | None) -> torch.Tensor:
    """Softmax over the last dim, in place; rows that see nothing give zeros."""
    if hidden is None:
        return torch.softmax(scores, -1, out=scores)
    torch.softmax(scores.masked_fill_(hidden, -math.inf), -1, out=scores)
    return scores.masked_fill_(hidden, 0.0)


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
