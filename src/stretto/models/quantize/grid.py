"""Grids of 4 and 8 bits for groups of a row: rounding to nearest, and the search for scales that clip.

A weight w of a group becomes q = clamp(round(w / s) + z, 0, 2**bits - 1) and stands for s * (q - z). Symmetric grids
have z = 2**(bits - 1) and s = 2 max|w| / (2**bits - 1), as MARLIN's quantiser (Frantar et al., 2024); asymmetric ones
have a whole z and span min to max. s is rounded to what is stored before q is computed. An asymmetric scale of a 4-bit
grid is rounded to 7 significant bits, so that the minimum -z * s is an fp16 number as it stands: packed kernels that
take minima then compute with the very same weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stretto.core.errors import require
from stretto.models.quantized import Quantised

if TYPE_CHECKING:
    import torch

GROUPS = (32, 64, 128, -1)
SHRINKS = 76
"""Fractions 1, 0.99, ..., 0.25 of the full range that a search tries."""
_ALIGN = 32  # packed kernels take whole multiples of this, so the group of a whole row is rounded up to one
_MOST = 65504.0  # of fp16


@dataclass(frozen=True, kw_only=True)
class Grid:
    """How groups are quantised.

    Attributes:
        bits: 4 or 8.
        group: neighbours in a row that share a scale: 32, 64, 128, or -1 for the whole row.
        symmetric: whether zero lies in the middle; else each group has a zero point.
    """

    bits: int = 4
    group: int = 64
    symmetric: bool = True

    def __post_init__(self) -> None:
        require(self.bits in (4, 8), "bits", self.bits, "4 or 8")
        require(self.group in GROUPS, "group", self.group, "32, 64, 128, or -1 for whole columns")

    @property
    def top(self) -> int:
        """The largest stored value."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The stored value of zero where the grid is symmetric."""
        return 1 << (self.bits - 1)

    def width(self, length: int) -> int:
        """Values of a group in rows of `length`."""
        return -(-length // _ALIGN) * _ALIGN if self.group == -1 else self.group

    def padded(self, length: int) -> int:
        """`length` rounded up to whole groups."""
        width = self.width(length)
        return -(-length // width) * width

    def extent(self, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The lowest and the highest value that the grids of fp32 groups [..., width] must reach."""
        if self.symmetric:
            most = groups.abs().amax(-1)
            return -most, most
        return groups.amin(-1).clamp_(max=0), groups.amax(-1).clamp_(min=0)

    def scales(self, extent: tuple[torch.Tensor, torch.Tensor], shrink: float = 1.0) -> Scales:
        """Scales of groups that span `shrink` of an extent."""
        import torch

        low, high = extent
        if self.symmetric:
            return Scales(_half(high * (2 * shrink / self.top)), None)
        scale = (high - low).mul_(shrink / self.top)
        if self.bits == 4:
            part, exponent = torch.frexp(scale)
            scale = torch.ldexp(part.mul_(128).round_().div_(128), exponent)
        scale = _half(scale)
        zero = (low * -shrink / torch.where(scale > 0, scale, torch.inf)).round_().clamp_(0, self.top)
        return Scales(scale, zero)

    def encode(self, groups: torch.Tensor, scales: Scales) -> torch.Tensor:
        """The nearest values, as fp32 whole numbers in the shape of `groups`; all at zero where the scale is 0."""
        import torch

        zero = self.middle if scales.zero is None else scales.zero[..., None]
        steps = torch.where(scales.scale > 0, scales.scale, torch.inf)[..., None]
        return (groups / steps).round_().add_(zero).clamp_(0, self.top)

    def decode(self, values: torch.Tensor, scales: Scales) -> torch.Tensor:
        """What whole numbers stand for."""
        zero = self.middle if scales.zero is None else scales.zero[..., None]
        return (values - zero).mul_(scales.scale[..., None])


@dataclass(frozen=True)
class Scales:
    """fp32 scales of groups [...], each an fp16 number, and whole zero points (None: the middle)."""

    scale: torch.Tensor
    zero: torch.Tensor | None


def padded_groups(weight: torch.Tensor, grid: Grid) -> torch.Tensor:
    """fp32 [rows, groups, width] of a weight [rows, length], zeros behind the end.

    Raises:
        FieldError: the weight is no matrix, is empty, or holds NaN or infinity.
    """
    import torch

    require(weight.ndim == 2 and weight.numel() > 0, "weight", tuple(weight.shape), "a matrix with rows and columns")
    wide = weight.float()
    require(bool(torch.isfinite(wide).all()), "weight", "NaN or infinite somewhere", "finite")
    length = weight.shape[1]
    padded = torch.nn.functional.pad(wide, (0, grid.padded(length) - length))
    return padded.reshape(len(weight), -1, grid.width(length))


def assemble(
    values: torch.Tensor, scales: Scales, grid: Grid, length: int, *, kept: torch.Tensor | None = None, method: str
) -> Quantised:
    """Whole numbers [rows, groups, width] with their scales [rows, groups] as they are stored."""
    import torch

    rows = len(values)
    return Quantised(
        values.reshape(rows, -1).to(torch.uint8).contiguous(),
        scales.scale.to(torch.float16).contiguous(),
        None if scales.zero is None else scales.zero.to(torch.uint8).contiguous(),
        grid.bits,
        length,
        kept,
        method,
    )


def round_to_nearest(weight: torch.Tensor, grid: Grid, *, kept: torch.Tensor | None = None) -> Quantised:
    """Each weight to the nearest point of its group's grid.

    Args:
        weight: [rows, length].
        kept: bool [rows, length]; the others become exactly zero.
    """
    groups, mask = _masked(weight, grid, kept)
    scales = grid.scales(grid.extent(groups))
    return assemble(grid.encode(groups, scales), scales, grid, weight.shape[1], kept=_flat(mask), method="rtn")


def clip(
    weight: torch.Tensor,
    grid: Grid,
    *,
    hessian: torch.Tensor | None = None,
    kept: torch.Tensor | None = None,
    shrinks: int = SHRINKS,
) -> Quantised:
    """Rounding, each group with the scale that errs least over a grid of shrinks.

    Args:
        weight, kept: as for `round_to_nearest`.
        hessian: fp32 [length, length]; a group's error is then weighted by its block of it, else all weights alike.
        shrinks: how many hundredths of the range may be cut off, and none.
    """
    import torch

    groups, mask = _masked(weight, grid, kept)
    width = groups.shape[-1]
    factors: list[torch.Tensor | None] = [None] * groups.shape[1]
    if hessian is not None:
        square = _padded_square(hessian, grid.padded(weight.shape[1]))
        factors = [block_factors(square[i : i + width, i : i + width]) for i in range(0, len(square), width)]
    found = [search(groups[:, i], factors[i], grid, shrinks) for i in range(groups.shape[1])]
    scale = torch.stack([each.scale for each in found], dim=1)
    zero = None if grid.symmetric else torch.stack([each.zero for each in found if each.zero is not None], dim=1)
    scales = Scales(scale, zero)
    return assemble(grid.encode(groups, scales), scales, grid, weight.shape[1], kept=_flat(mask), method="clip")


def search(groups: torch.Tensor, factors: torch.Tensor | None, grid: Grid, shrinks: int = SHRINKS) -> Scales:
    """The scales of groups [rows, width] whose errors e make the sum of |e_b F_b|**2 least.

    Args:
        factors: F [blocks, size, size] for neighbouring blocks b of a group; None weighs all errors alike.
    """
    import torch

    extent = grid.extent(groups)
    best = grid.scales(extent)
    least: torch.Tensor | None = None
    for step in range(shrinks):
        scales = grid.scales(extent, 1 - step / 100)
        error = grid.decode(grid.encode(groups, scales), scales).sub_(groups)
        size = _weighted(error, factors).square_().sum(-1)
        if least is None:
            best, least = scales, size
            continue
        better = size < least
        least = torch.where(better, size, least)
        zero = None if best.zero is None or scales.zero is None else torch.where(better, scales.zero, best.zero)
        best = Scales(torch.where(better, scales.scale, best.scale), zero)
    return best


def _weighted(error: torch.Tensor, factors: torch.Tensor | None) -> torch.Tensor:
    if factors is None:
        return error
    if len(factors) == 1:
        return error @ factors[0]
    parts = error.view(len(error), len(factors), -1).transpose(0, 1) @ factors
    return parts.transpose(0, 1).reshape(error.shape)


def block_factors(hessian: torch.Tensor, most: int = 128) -> torch.Tensor:
    """F [blocks, size, size] with e H e = |e F|**2 for each block on the diagonal; size is at most `most`.

    Cholesky factors; a block that has none gets the roots of its diagonal.
    """
    import torch

    size = math.gcd(len(hessian), most)
    found = []
    for i in range(0, len(hessian), size):
        block = hessian[i : i + size, i : i + size]
        diagonal = block.diagonal()
        ridge = 1e-6 * float(diagonal.mean())
        factor, info = torch.linalg.cholesky_ex(block + ridge * torch.eye(size))
        whole = int(info) == 0 and bool(torch.isfinite(factor).all())
        found.append(factor if whole else diagonal.nan_to_num().clamp(min=0).sqrt().diag())
    return torch.stack(found)


def _padded_square(hessian: torch.Tensor, size: int) -> torch.Tensor:
    import torch

    spare = size - len(hessian)
    return torch.nn.functional.pad(hessian, (0, spare, 0, spare))


def _masked(weight: torch.Tensor, grid: Grid, kept: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The groups with zeros where weights are not kept, and the mask in their shape."""
    import torch

    groups = padded_groups(weight, grid)
    if kept is None:
        return groups, None
    spare = grid.padded(weight.shape[1]) - weight.shape[1]
    mask = torch.nn.functional.pad(kept, (0, spare)).view(groups.shape)
    return groups * mask, mask


def _flat(mask: torch.Tensor | None) -> torch.Tensor | None:
    return None if mask is None else mask.reshape(len(mask), -1)


def _half(scale: torch.Tensor) -> torch.Tensor:
    """Rounded to fp16, in fp32; what is too large for it stays at its largest."""
    import torch

    return scale.clamp(max=_MOST).to(torch.float16).float()
