"""Every product of a model calibrated for mixed activations, and the blocks that get 8 bits for a given share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from stretto.core.errors import require
from stretto.models.quantize.gptq import gptq
from stretto.models.quantize.grid import Grid, round_to_nearest
from stretto.models.quantize.layerwise import (
    Progress,
    Recorder,
    Stream,
    products_of,
)
from stretto.models.quantize.mixed import (
    GROUP,
    MixedPlan,
    block_errors,
    fake_rows,
    outliers_first,
    permuted,
    restored,
)
from stretto.models.quantized import Quantised
from stretto.models.spec import ModelSpec
from stretto.models.weights import Weights

_SAMPLE_EVERY = 32
POWERS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Of a channel's peak, by which its inputs may be divided."""


@dataclass(frozen=True, kw_only=True)
class MixedProduct:
    """One product, calibrated.

    Attributes:
        order: of its plan.
        divisor: fp32 [k], what its inputs are divided by, which whatever makes them can take over: a norm's weights, or
            the rows of the product before.
        weight: 4 bits, [n, k] with the columns in that order, each times its divisor.
        errors: of all blocks in 4 and in 8 bits, [2, blocks]: what each adds to the squared outputs, as a share.
    """

    order: torch.Tensor
    divisor: torch.Tensor
    weight: Quantised
    errors: torch.Tensor

    def in_own_order(self) -> torch.Tensor:
        """What the weight stands for, fp32 [n, k], columns as the model has them."""
        channels = self.order[self.order >= 0]
        return self.weight.dequantize()[:, channels.argsort()] / self.divisor


@dataclass(frozen=True, kw_only=True)
class ProductReport:
    """One product under a plan: blocks in 8 bits, the error of rounded activations, bytes of weights and of a row."""

    name: str
    int8_share: float
    error: float
    weight_bytes: int
    row_bytes: float


@dataclass(frozen=True, kw_only=True)
class MixedModel:
    """All products of a model's layers by name.

    Attributes:
        shapes: the matrices of each product.
    """

    products: Mapping[str, MixedProduct]
    shapes: Mapping[str, Mapping[str, tuple[int, int]]]
    group: int

    def plans(self, max_int8: float) -> dict[str, MixedPlan]:
        """The plans in which at most this share of all blocks has 8 bits: those where that saves most error."""
        require(0 <= max_int8 <= 1, "max_int8", max_int8, "a share from 0 to 1")
        gains = {name: product.errors[0] - product.errors[1] for name, product in self.products.items()}
        places = [(float(gain), name, block) for name, all_of in gains.items() for block, gain in enumerate(all_of)]
        places.sort(key=lambda place: -place[0])
        bits = {name: torch.full((len(gain),), 4, dtype=torch.uint8) for name, gain in gains.items()}
        for _, name, block in places[: int(max_int8 * len(places) + 1e-9)]:
            bits[name][block] = 8
        return {
            name: MixedPlan(order=product.order, bits=bits[name], group=self.group)
            for name, product in self.products.items()
        }

    @property
    def divisors(self) -> dict[str, torch.Tensor]:
        return {name: product.divisor for name, product in self.products.items()}

    def weights(self, weights: Weights) -> Weights:
        """The model's weights with the matrices of all products as their 4 bits have them."""
        sources = dict(weights.sources)
        for product, shapes in self.shapes.items():
            whole = self.products[product].in_own_order()
            parts = torch.split(whole, [rows for rows, _ in shapes.values()])
            sources.update({name: part.clone for name, part in zip(shapes, parts, strict=True)})
        return replace(weights, sources=sources)

    def report(self, plans: Mapping[str, MixedPlan]) -> list[ProductReport]:
        """What each product's plan costs and loses."""
        return [
            ProductReport(
                name=name,
                int8_share=plan.int8_share,
                error=_error(self.products[name].errors, plan),
                weight_bytes=self.products[name].weight.nbytes,
                row_bytes=plan.row_bytes,
            )
            for name, plan in plans.items()
        ]


def _error(errors: torch.Tensor, plan: MixedPlan) -> float:
    four, eight = errors
    return float(torch.where(plan.bits == 8, eight, four).sum())


def calibrate_mixed(
    spec: ModelSpec,
    weights: Weights,
    windows: torch.Tensor,
    *,
    group: int = GROUP,
    threshold: float | None = None,
    balance: bool = True,
    progress: Progress = lambda what, done, total: None,
) -> MixedModel:
    """Find each product's order, its weights in 4 bits (GPTQ in that order) and its blocks' errors, layer by layer.

    Channels are put in the order of their peaks, and large ones are made smaller at the weights' cost (SmoothQuant,
    Xiao et al., 2023), by the power of the peaks that errs least in all 4 bits, as AWQ searches it (Lin et al., 2024):
    the publication leaves that to OmniQuant.

    Args:
        windows: token ids of real text, int64 [windows, tokens].
        threshold: the publication's order, such as `mixed.THRESHOLD`.
        balance: whether channels are divided at all.
    """
    table = weights.tensor("model.embed_tokens.weight", (spec.vocab, spec.hidden))
    stream = Stream(spec, lambda tokens: table[tokens], windows)
    products: dict[str, MixedProduct] = {}
    shapes: dict[str, Mapping[str, tuple[int, int]]] = {}
    for index in range(spec.layers):
        progress("layers", index, spec.layers)
        recorder = Recorder(every=_SAMPLE_EVERY)
        stream.watch(weights, index, recorder.product)
        found: dict[str, torch.Tensor] = {}
        for name, parts in products_of(spec, index).items():
            stacked = torch.cat([weights.tensor(matrix, shape) for matrix, shape in parts.items()])
            products[name] = _calibrated(stacked, recorder, name, group, threshold, balance)
            shapes[name] = parts
            rows = [shape[0] for shape in parts.values()]
            found.update(zip(parts, torch.split(products[name].in_own_order(), rows), strict=True))
        if index + 1 < spec.layers:
            quantised = {name: part.clone for name, part in found.items()}
            stream.advance(replace(weights, sources={**weights.sources, **quantised}), index)
    progress("layers", spec.layers, spec.layers)
    return MixedModel(products=products, shapes=shapes, group=group)


def _calibrated(
    weight: torch.Tensor, recorder: Recorder, name: str, group: int, threshold: float | None, balance: bool
) -> MixedProduct:
    peaks, sample = recorder.peaks[name], recorder.sample(name)
    order = outliers_first(peaks, threshold=threshold, group=group)
    divisor = _balanced(sample, weight, peaks, order, group) if balance else torch.ones(len(peaks))
    channels = order[order >= 0]
    hessian = (recorder.hessian(name) / divisor / divisor[:, None])[channels][:, channels]
    found = gptq((weight * divisor)[:, channels], hessian, Grid(bits=4, group=group))
    product = MixedProduct(order=order, divisor=divisor, weight=found, errors=torch.empty(0))
    meant = product.in_own_order() * divisor
    power = (sample / divisor @ meant.T).square().sum().clamp(min=1e-30)
    errors = [block_errors(sample / divisor, meant, order, bits, group) for bits in (4, 8)]
    return replace(product, errors=torch.stack(errors) / power)


def _balanced(
    sample: torch.Tensor, weight: torch.Tensor, peaks: torch.Tensor, order: torch.Tensor, group: int
) -> torch.Tensor:
    """The divisor of channels, a power of their peaks, with which outputs err least when all is rounded to 4 bits."""
    wanted = sample @ weight.T
    plan = MixedPlan(order=order, bits=torch.full((len(order) // group,), 4, dtype=torch.uint8), group=group)
    typical = peaks.clamp(min=1e-4 * float(peaks.mean()) + 1e-30)
    typical = typical / typical.log().mean().exp()
    best, least = torch.ones(len(peaks)), torch.inf
    for power in POWERS:
        divisor = typical**power
        rounded = restored(round_to_nearest(permuted(weight * divisor, plan), Grid(group=group)).dequantize(), plan)
        error = float((fake_rows(sample / divisor, plan) @ rounded.T - wanted).square().sum())
        if error < least:
            best, least = divisor, error
    return best
