"""Tensor parallelism as in Megatron-LM (Shoeybi et al., 2019; Narayanan et al., 2021), as differentiable operators.

A matrix that is cut by columns needs its inputs' gradients summed (`copy_in`), one cut by rows its outputs
(`sum_out`). The vocabulary is cut by rows of the table: looking up is a masked look-up and a sum, the cross-entropy
needs two small reductions and never the logits of another rank. Shares may be uneven: the unit of attention is the
KV group.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import embedding

from stretto.comm.transport import Axis


def share(units: int, rank: int, size: int) -> range:
    """Which of so many units place `rank` of `size` holds: neighbours; if uneven, the first places one more.

    >>> [len(share(3, rank, 2)) for rank in range(2)]
    [2, 1]
    """
    each, over = divmod(units, size)
    start = rank * each + min(rank, over)
    return range(start, start + each + (rank < over))


class _CopyIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.axis.all_reduce_(gradient.clone(memory_format=torch.contiguous_format)), None


class _SumOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis) -> torch.Tensor:
        return axis.all_reduce_(x.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


class _GatherBoundary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, axis: Axis, shape: torch.Size) -> torch.Tensor:
        ctx.axis = axis
        return axis.all_gather(part, sizes=_sizes(shape.numel(), axis)).view(shape)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return scatter_boundary(gradient, ctx.axis), None, None


def copy_in(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """`x` itself, the same on every rank; its gradient is the sum of the ranks'."""
    return x if axis.size == 1 else _CopyIn.apply(x, axis)  # type: ignore[no-untyped-call]


def sum_out(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """The sum of the ranks' `x`; the gradient of each is that of the sum."""
    return x if axis.size == 1 else _SumOut.apply(x, axis)  # type: ignore[no-untyped-call]


def scatter_boundary(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """This rank's stretch of the elements of `x`, which is the same on every rank: what it sends to the next stage."""
    flat = x.reshape(-1)
    return flat if axis.size == 1 else flat.split(_sizes(flat.numel(), axis))[axis.rank]


def gather_boundary(part: torch.Tensor, axis: Axis, shape: torch.Size) -> torch.Tensor:
    """The whole of which each rank has a stretch; the gradient of a stretch is its part of the whole's."""
    if axis.size == 1:
        return part.view(shape)
    return _GatherBoundary.apply(part, axis, shape)  # type: ignore[no-any-return, no-untyped-call]


def boundary_numel(numel: int, axis: Axis) -> int:
    """Elements of a boundary tensor that this rank sends."""
    return _sizes(numel, axis)[axis.rank]


def _sizes(numel: int, axis: Axis) -> list[int]:
    return [len(share(numel, place, axis.size)) for place in range(axis.size)]


def vocab_embedding(tokens: torch.Tensor, weight: torch.Tensor, axis: Axis, first: int) -> torch.Tensor:
    """Rows of a table of which this rank holds `weight` [part, H], from row `first`; tokens of any shape."""
    local = tokens - first
    absent = (local < 0) | (local >= len(weight))
    rows = embedding(local.masked_fill(absent, 0), weight)
    return sum_out(rows.masked_fill(absent[..., None], 0.0), axis)


class _VocabCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, targets: torch.Tensor, axis: Axis, first: int, ignore: int
    ) -> torch.Tensor:
        counted = targets != ignore
        local = targets - first
        here = counted & (local >= 0) & (local < logits.shape[1])
        index = local.masked_fill(~here, 0)[:, None]
        largest = axis.maximum_(logits.amax(1))
        weights = (logits - largest[:, None]).exp_()
        both = torch.stack([weights.sum(1), logits.gather(1, index)[:, 0].masked_fill(~here, 0.0)])
        total, chosen = axis.all_reduce_(both)
        weights.div_(total[:, None])
        ctx.save_for_backward(weights, index, here, counted)
        losses: torch.Tensor = (total.log() + largest - chosen).masked_fill(~counted, 0.0)
        return losses

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        weights, index, here, counted = ctx.saved_tensors
        scale = gradient.masked_fill(~counted, 0.0)[:, None]
        found = weights * scale
        found.scatter_add_(1, index, -scale.masked_fill(~here[:, None], 0.0))
        return found, None, None, None, None


def vocab_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, axis: Axis, first: int, *, ignore: int = -100
) -> torch.Tensor:
    """Loss of each row where this rank holds the logits of some columns.

    Args:
        logits: [rows, part], from column `first` of the vocabulary; their type is that of the losses.
        targets: int64 [rows], columns of the whole vocabulary; rows with `ignore` lose nothing.
    """
    losses: torch.Tensor = _VocabCrossEntropy.apply(logits, targets, axis, first, ignore)  # type: ignore[no-untyped-call]
    return losses
