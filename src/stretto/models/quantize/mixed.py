"""Weights in 4 bits, activations in 4 and, where outliers sit, in 8: COMET's FMPQ (Liu et al., 2024), plain.

Input channels go in blocks of 128. Calibration finds each channel's largest magnitude; channels far above the median
are gathered in the first blocks by a permutation, which the weights' columns share. A block's activations are whole
numbers of 4 or 8 bits with one scale a row and block, s = max|x| / 7 or / 127; weights are whole numbers of 4 bits with
one scale a row and the same block, so that sums inside a block are exact: O = sum over blocks of s_w s_a (Q_w Q_a).
Which blocks get 8 bits is chosen over all products of a model at once: those where it takes away most of the outputs'
error (this is ours; the paper sets a threshold a product).

This is the reference that the packed kernels are held against, and the form in which perplexities are measured
without one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import linear, pad

from stretto.core.errors import require
from stretto.kernels.packed import PackedMatrix, pack
from stretto.models.quantized import Quantised

if TYPE_CHECKING:
    from stretto.models.assemble import Product
    from stretto.models.linear import LinearMap

GROUP = 128
THRESHOLD = 8.0
"""A channel is an outlier when its largest magnitude is this many times the median channel's."""


@dataclass(frozen=True, kw_only=True)
class MixedPlan:
    """How the inputs of a product are laid out and in how many bits.

    Attributes:
        order: int64 [k_padded]; which input channel each place holds, -1 for those that are added and zero: only at the
            end.
        bits: uint8 [blocks], 4 or 8.
        group: channels of a block.
    """

    order: torch.Tensor
    bits: torch.Tensor
    group: int = GROUP

    def __post_init__(self) -> None:
        places, length = len(self.order), self.length
        require(places % self.group == 0, "order", places, f"whole blocks of {self.group}")
        require(len(self.bits) == places // self.group, "bits", len(self.bits), f"{places // self.group}, one a block")
        require(bool(((self.bits == 4) | (self.bits == 8)).all()), "bits", self.bits.tolist(), "4 or 8 each")
        whole = torch.equal(self.order[:length].sort().values, torch.arange(length)) and bool(
            (self.order[length:] == -1).all()
        )
        require(whole, "order", self.order.tolist(), "every channel once, then -1")

    @property
    def length(self) -> int:
        """Input channels."""
        return int((self.order >= 0).sum())

    @property
    def int8_share(self) -> float:
        return float((self.bits == 8).float().mean())

    @property
    def row_bytes(self) -> float:
        """Bytes of one row of activations, without scales."""
        return float((self.bits.double() / 8 * self.group).sum())


def outliers_first(peaks: torch.Tensor, *, threshold: float | None = THRESHOLD, group: int = GROUP) -> torch.Tensor:
    """The order of a `MixedPlan`: channels above `threshold` medians, the largest first, then the rest as they are.

    Args:
        peaks: the largest magnitude of each channel, [k].
        threshold: None puts all channels in the order of their peaks.
    """
    require(bool(torch.isfinite(peaks).all()) and len(peaks) > 0, "peaks", tuple(peaks.shape), "finite numbers")
    outlier = peaks > (-1.0 if threshold is None else threshold * peaks.median())
    by_size = peaks.argsort(descending=True, stable=True)
    order = torch.cat([by_size[: int(outlier.sum())], (~outlier).nonzero()[:, 0]])
    return pad(order, (0, -len(order) % group), value=-1)


def permuted(x: torch.Tensor, plan: MixedPlan) -> torch.Tensor:
    """The last dim of x in the plan's order, zeros in places that hold no channel."""
    return pad(x, (0, 1))[..., plan.order]


def restored(x: torch.Tensor, plan: MixedPlan) -> torch.Tensor:
    """The inverse of `permuted`."""
    return x[..., plan.order[: plan.length].argsort()]


def quantise_rows(x: torch.Tensor, plan: MixedPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations [m, k] as whole numbers int8 [m, k_padded] in the plan's order, and fp32 scales [m, blocks].

    A block that holds NaN or infinity gets the scale NaN: what is not finite stays in its row.
    """
    blocks = permuted(x, plan).view(len(x), -1, plan.group)
    top = torch.where(plan.bits == 8, 127.0, 7.0)
    scales = blocks.abs().amax(-1) / top
    scales = torch.where(torch.isfinite(scales), scales, torch.nan)
    steps = torch.where(scales > 0, scales, torch.inf)[..., None]
    values = (blocks / steps).nan_to_num(0.0).round_()
    return values.to(torch.int8).view(len(x), -1), scales


def product(values: torch.Tensor, scales: torch.Tensor, weight: Quantised, plan: MixedPlan) -> torch.Tensor:
    """fp32 [m, n] of quantised rows and a weight [n, k_padded] in the plan's order; whole numbers inside a block.

    The blocks are added up in their order, in fp32.
    """
    require(weight.bits == 4 and weight.zeros is None, "weight", weight.bits, "4 bits on a symmetric grid")
    require(weight.group == plan.group, "weight", weight.group, f"groups of {plan.group}")
    rows, columns, size = len(values), len(weight.values), plan.group
    out = torch.zeros(rows, columns)
    for block in range(len(plan.bits)):
        part = slice(block * size, (block + 1) * size)
        whole = values[:, part].long() @ (weight.values[:, part].long() - 8).T
        out += whole.float() * (scales[:, block, None] * weight.scales[:, block].float())
    return out


def packed(weight: Quantised, plan: MixedPlan) -> PackedMatrix:
    """A weight [n, k_padded] in the plan's order for the CPU kernels: path "fast" multiplies as `product` does."""
    require(weight.group == plan.group, "weight", weight.group, f"groups of {plan.group}")
    matrix = pack(weight.values, weight.scales.half(), None, bits=weight.bits)
    return matrix.mixed(plan.order, torch.where(plan.bits == 8, 127, 7), plan.length)


def fake_rows(x: torch.Tensor, plan: MixedPlan) -> torch.Tensor:
    """What quantised activations stand for, fp32 [m, k] in the channels' own order."""
    values, scales = quantise_rows(x, plan)
    blocks = values.view(len(x), -1, plan.group).float() * scales[..., None]
    return restored(blocks.view(len(x), -1), plan)


def fake_product(plans: Mapping[str, MixedPlan], divisors: Mapping[str, torch.Tensor] | None = None) -> Product:
    """A `transformer.Product` whose activations are quantised by the plan of their product's name, if it has one.

    Args:
        divisors: what inputs [k] are divided by before they are rounded; their weights are as before.
    """

    def made(name: str, weight: torch.Tensor, bias: torch.Tensor | None, fold: torch.Tensor | None) -> LinearMap:
        plan, divisor = plans.get(name), (divisors or {}).get(name)

        def run(x: torch.Tensor) -> torch.Tensor:
            inputs = x if fold is None else x * fold
            if plan is None:
                return linear(inputs, weight, bias)
            if divisor is None:
                return linear(fake_rows(inputs, plan), weight, bias)
            return linear(fake_rows(inputs / divisor, plan) * divisor, weight, bias)

        return run

    return made


def block_errors(x: torch.Tensor, weight: torch.Tensor, order: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """The squared error that each block's rounding puts into the outputs of rows x [m, k]: [blocks].

    Args:
        weight: fp32 [n, k], in the channels' own order.
        bits: of the activations of all blocks.
    """
    plan = MixedPlan(order=order, bits=torch.full((len(order) // group,), bits, dtype=torch.uint8), group=group)
    lost = permuted(x - fake_rows(x, plan), plan)
    columns = permuted(weight, plan)
    return torch.stack(
        [linear(lost[:, i : i + group], columns[:, i : i + group]).square().sum() for i in range(0, len(order), group)]
    )
