"""GPTQ (Frantar et al., 2023) as MARLIN's quantiser has it, and SparseGPT's 2:4 masks (Frantar and Alistarh, 2023).

Columns are rounded one after another; what a column loses is made up by those not rounded yet, through the Cholesky
factor U of the inverse Hessian: err = (w - q) / U[j, j], W[:, j:] -= err * U[j, j:]. Columns go in blocks of 128, so
that most of the update is one product. A group's scale is searched just before its first column, with the error
weighted by the block of U^-1. Where the Hessian has no factor, weights are rounded plainly.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from stretto.core.errors import require
from stretto.models.quantize.grid import (
    SHRINKS,
    Grid,
    Scales,
    assemble,
    padded_groups,
    round_to_nearest,
    search,
)
from stretto.models.quantized import Quantised

if TYPE_CHECKING:
    import torch

BLOCK = 128
DAMPING = 0.1
Sparse = Literal["2:4"]


def gptq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    grid: Grid,
    *,
    damping: float = DAMPING,
    act_order: bool = False,
    sparse: Sparse | None = None,
    shrinks: int = SHRINKS,
) -> Quantised:
    """Quantise weight [rows, length] so that its products with the inputs behind `hessian` change little.

    Args:
        hessian: fp32 [length, length], 2 / N times the sum of x x^T.
        damping: this share of the mean of the diagonal is added to it.
        act_order: round the columns with the largest inputs first; scales are then fixed beforehand, so the order
            need not be stored.
        sparse: "2:4" keeps two of four neighbours, those with the largest w**2 / U[j, j]**2.
        shrinks: of the scale search; 1 for none.

    Raises:
        FieldError: shapes do not fit, the weight is not finite, or `act_order` and `sparse` are both asked for.
    """
    import torch

    rows, length = weight.shape
    require(tuple(hessian.shape) == (length, length), "hessian", tuple(hessian.shape), f"[{length}, {length}]")
    require(not (act_order and sparse), "act_order", act_order, "False where neighbours are pruned")
    groups = padded_groups(weight, grid)
    columns = groups.shape[1] * groups.shape[2]
    spare = columns - length
    padded = torch.nn.functional.pad(hessian.float(), (0, spare, 0, spare))
    upper = inverse_factor(padded, damping)
    if upper is None:
        return round_to_nearest(weight, grid, kept=magnitude_mask(weight) if sparse else None)

    fixed = act_order or groups.shape[2] > BLOCK
    state = _State(groups.reshape(rows, columns).T.contiguous(), grid, groups.shape[2], shrinks, sparse is not None)
    if fixed:
        state.fix_scales(upper)
    order = None
    if act_order:
        order = padded.diagonal().argsort(descending=True, stable=True)
        upper = inverse_factor(padded[order][:, order], damping)
        if upper is None:
            return round_to_nearest(weight, grid)
    state.run(upper, order)
    values = state.values.T.reshape(rows, -1, groups.shape[2])
    kept = state.kept.T.contiguous() if state.kept is not None else None
    return assemble(values, state.scales(), grid, length, kept=kept, method="gptq")


def inverse_factor(hessian: torch.Tensor, damping: float) -> torch.Tensor | None:
    """Upper U with U^T U the inverse of the damped Hessian, or None where there is none.

    Inputs that are always zero get a diagonal as large as the mean, so that they stand apart from all others.
    """
    import torch

    diagonal = hessian.diagonal()
    mean = float(diagonal.mean())
    if not mean > 0:
        return None
    added = torch.where(diagonal == 0, mean, 0.0) + damping * mean
    lower, info = torch.linalg.cholesky_ex(hessian + added.diag())
    if int(info):
        return None
    upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return upper if int(info) == 0 and bool(torch.isfinite(upper).all()) else None


def magnitude_mask(weight: torch.Tensor) -> torch.Tensor:
    """bool [rows, length]: the two largest magnitudes of each four neighbours, the earlier of equals; tails count as
    padded with zeros.
    """
    return two_of_four(weight.float().abs())


def two_of_four(scores: torch.Tensor) -> torch.Tensor:
    """bool as scores [rows, length]: the two largest of each four neighbours of a row."""
    import torch

    rows, length = scores.shape
    fours = torch.nn.functional.pad(scores, (0, -length % 4), value=-1.0).view(rows, -1, 4)
    best = fours.sort(dim=-1, descending=True, stable=True).indices[..., :2]
    kept = torch.zeros(fours.shape, dtype=torch.bool).scatter_(-1, best, True)
    return kept.view(rows, -1)[:, :length]


class _State:
    """Weights, one column of the matrix a row here (so that a column is one run of memory), while they are rounded.

    Attributes:
        weights: fp32 [columns, rows]; those not rounded yet carry what the others lost.
        values: whole numbers, as they are found.
        kept: which weights stay, where a matrix is pruned.
    """

    def __init__(self, weights: torch.Tensor, grid: Grid, width: int, shrinks: int, sparse: bool) -> None:
        import torch

        self.weights = weights
        self.grid = grid
        self.width = width
        self.shrinks = shrinks
        self.values = torch.empty_like(weights)
        self.kept = torch.zeros_like(weights, dtype=torch.bool) if sparse else None
        groups, rows = len(weights) // width, weights.shape[1]
        self.scale = torch.zeros(groups, rows)
        self.zero = None if grid.symmetric else torch.zeros(groups, rows)
        self.fixed = False

    def scales(self) -> Scales:
        """Of all groups, [rows, groups]."""
        return Scales(self.scale.T, None if self.zero is None else self.zero.T)

    def fix_scales(self, upper: torch.Tensor) -> None:
        """Search all scales on the weights as they are, in their own order."""
        self.fixed = True
        for group in range(len(self.scale)):
            part = slice(group * self.width, (group + 1) * self.width)
            self._find(group, upper[part, part], self.weights[part])

    def run(self, upper: torch.Tensor, order: torch.Tensor | None) -> None:
        """Round all columns; `upper` is in the order of `order`."""
        import torch

        places = torch.arange(len(self.weights)) if order is None else order
        work = self.weights if order is None else self.weights[order]
        for first in range(0, len(work), BLOCK):
            last = min(first + BLOCK, len(work))
            lost = self._block(work[first:last], upper[first:last, first:last], places[first:last].tolist())
            work[last:] -= upper[first:last, last:].T @ lost

    def _block(self, work: torch.Tensor, upper: torch.Tensor, places: list[int]) -> torch.Tensor:
        """Round the columns `places`; returns what each lost over U[j, j]."""
        import torch

        lost = torch.empty_like(work)
        for j, place in enumerate(places):
            if not self.fixed and place % self.width == 0:
                end = j + self.width
                self._find(place // self.width, upper[j:end, j:end], work[j:end])
            if self.kept is not None and place % 4 == 0:
                self.kept[place : place + 4] = _best(work[j : j + 4], upper.diagonal()[j : j + 4])
            value, meant = self._round(work[j], place)
            self.values[place] = value
            lost[j] = (work[j] - meant).div_(upper[j, j])
            work[j + 1 :].addr_(upper[j, j + 1 :], lost[j], alpha=-1)
        return lost

    def _find(self, group: int, upper: torch.Tensor, work: torch.Tensor) -> None:
        """Search the scales of one group from its columns of weights [width, rows] and their part of the factor."""
        import torch

        if self.kept is not None:
            marks = [_best(work[i : i + 4], upper.diagonal()[i : i + 4]) for i in range(0, len(work), 4)]
            work = work * torch.cat(marks)
        size = math.gcd(self.width, BLOCK)
        blocks = torch.stack([upper[i : i + size, i : i + size] for i in range(0, self.width, size)])
        factors = torch.linalg.solve_triangular(blocks, torch.eye(size).expand_as(blocks), upper=True)
        found = search(work.T.contiguous(), factors, self.grid, self.shrinks)
        self.scale[group] = found.scale
        if self.zero is not None and found.zero is not None:
            self.zero[group] = found.zero

    def _round(self, column: torch.Tensor, place: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The values of a column, and what they stand for."""
        group = place // self.width
        scales = Scales(self.scale[group], None if self.zero is None else self.zero[group])
        wanted = column if self.kept is None else column * self.kept[place]
        value = self.grid.encode(wanted[:, None], scales)
        return value[:, 0], self.grid.decode(value, scales)[:, 0]


def _best(work: torch.Tensor, diagonal: torch.Tensor) -> torch.Tensor:
    """bool [4, rows]: which two of four neighbouring columns [4, rows] cost most to lose."""
    return two_of_four((work / diagonal[:, None]).square().T).T
