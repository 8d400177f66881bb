"""Attention over a split sequence block by block, what later work calls ring attention (Liu et al., 2023).

Keys and values go round once. Each visiting block is met by torch's tiled CPU kernel, which returns the log-sum-exp of
each row, so that blocks are joined exactly and no score matrix is ever held. Backward goes round again; the gradients
of keys and values travel with them. Running sums are fp32 at least.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from stretto.comm.transport import Axis
from stretto.models.parallel.layout import Layout, pieces
from stretto.models.parallel.ring import Homing, visiting

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Meeting:
    """Rows of local queries that meet rows of a visiting block: all of them, or as a triangle."""

    rows: slice
    keys: slice
    triangle: bool
    columns: slice
    """Of the keys in the whole sequence, for a mask."""


def meetings(axis: Axis, source: int, length: int, layout: Layout, causal: bool) -> Iterator[Meeting]:
    """What of this rank's queries meets what of place `source`, leaving out what the mask hides wholly."""
    for rows, at in _local(pieces(length, axis.rank, axis.size, layout)):
        for keys, other in _local(pieces(length, source, axis.size, layout)):
            if not causal or other.start <= at.start:
                columns = slice(other.start, other.stop)
                yield Meeting(rows, keys, causal and other.start == at.start, columns)


def _local(stretches: list[range]) -> Iterator[tuple[slice, range]]:
    first = 0
    for stretch in stretches:
        yield slice(first, first + len(stretch)), stretch
        first += len(stretch)


class BlockwiseAttention(torch.autograd.Function):
    """See `sequence.seq_attention`."""

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
        length = q.shape[2] * axis.size
        wide = torch.promote_types(q.dtype, torch.float32)
        out = q.new_zeros(q.shape, dtype=wide)
        logs = q.new_full(q.shape[:3], -math.inf, dtype=wide)
        for source, (keys, values) in visiting(axis, (k, v)):
            for meeting in meetings(axis, source, length, layout, causal):
                rows, there = meeting.rows, meeting.keys
                hidden = _hidden(mask, meeting, wide)
                part, log = _forward(
                    q[:, :, rows],
                    keys[:, :, there],
                    values[:, :, there],
                    0.0,
                    meeting.triangle and hidden is None,
                    attn_mask=hidden if hidden is None else hidden.to(q.dtype),
                )
                if hidden is not None:
                    log = log.masked_fill((hidden == -math.inf).all(-1), -math.inf)
                _join(out[:, :, rows], logs[:, :, rows], part, log)
        result = out.to(q.dtype)
        # A row that sees nothing has no log; any finite one keeps its gradients 0.
        ctx.save_for_backward(q, k, v, result, logs.masked_fill(logs == -math.inf, 0.0))
        ctx.how = (axis, causal, layout, mask)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, logs = ctx.saved_tensors
        axis, causal, layout, mask = ctx.how
        length = q.shape[2] * axis.size
        gradient = gradient.contiguous()
        dq = torch.zeros_like(q)
        homing = Homing(axis)
        for source, (keys, values) in visiting(axis, (k, v)):
            dk, dv = torch.zeros_like(keys), torch.zeros_like(values)
            for meeting in meetings(axis, source, length, layout, causal):
                rows, there = meeting.rows, meeting.keys
                hidden = _hidden(mask, meeting, logs.dtype)
                parts = _backward(
                    gradient[:, :, rows],
                    q[:, :, rows],
                    keys[:, :, there],
                    values[:, :, there],
                    out[:, :, rows],
                    logs[:, :, rows],
                    0.0,
                    meeting.triangle and hidden is None,
                    attn_mask=hidden if hidden is None else hidden.to(q.dtype),
                )
                dq[:, :, rows] += parts[0]
                dk[:, :, there] += parts[1]
                dv[:, :, there] += parts[2]
            homing.add((dk, dv))
        home = homing.home()
        return dq, home[0], home[1], None, None, None, None


def _join(out: torch.Tensor, logs: torch.Tensor, part: torch.Tensor, log: torch.Tensor) -> None:
    """Add a block's rows to what was found before, in place: both weighed by what they hold of the whole sum."""
    both = torch.logaddexp(logs, log)
    finite = both.masked_fill(both == -math.inf, 0.0)
    out.mul_((logs - finite).exp_()[..., None]).add_(part * (log - finite).exp_()[..., None])
    logs.copy_(both)


def _hidden(mask: torch.Tensor | None, meeting: Meeting, dtype: torch.dtype) -> torch.Tensor | None:
    """The additive mask [B, 1, rows, keys] of keys that do not count, with the triangle; None: nothing is hidden."""
    if mask is None:
        return None
    keys = mask[:, meeting.columns]
    rows = meeting.rows.stop - meeting.rows.start
    seen = keys[:, None, None, :].expand(-1, 1, rows, -1)
    if meeting.triangle:
        seen = seen & torch.ones(rows, keys.shape[1], dtype=torch.bool).tril()
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -math.inf)
