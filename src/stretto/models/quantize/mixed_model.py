"""Every product of a model calibrated for mixed activations, and the blocks that get 8 bits for a given share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from stretto.core.errors import require
from stretto.models.quantize.gptq import gptq
from stretto.models.quantize.grid import Grid
from stretto.models.quantize.layerwise import (
    Progress,
    Recorder,
    Stream,
    products_of,
)
from stretto.models.quantize.mixed import (
    GROUP,
    THRESHOLD,
    MixedPlan,
    block_errors,
    outliers_first,
)
from stretto.models.quantized import Quantised
from stretto.models.spec import ModelSpec
from stretto.models.weights import Weights

_SAMPLE_EVERY = 32


@dataclass(frozen=True, kw_only=True)
class MixedProduct:
    """One product, calibrated.

    Attributes:
        order: of its plan.
        weight: 4 bits, [n, k] with the columns in that order.
        errors: of all blocks in 4 and in 8 bits, [2, blocks]: what each adds to the squared outputs, as a share.
    """

    order: torch.Tensor
    weight: Quantised
    errors: torch.Tensor

    def in_own_order(self) -> torch.Tensor:
        """What the weight stands for, fp32 [n, k], columns as the model has them."""
        channels = self.order[self.order >= 0]
        return self.weight.dequantize()[:, channels.argsort()]


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
    threshold: float = THRESHOLD,
    progress: Progress = lambda what, done, total: None,
) -> MixedModel:
    """Find each product's order, its weights in 4 bits (GPTQ in that order) and its blocks' errors, layer by layer.

    Args:
        windows: token ids of real text, int64 [windows, tokens].
        threshold: see `mixed.THRESHOLD`.
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
            products[name] = _calibrated(stacked, recorder, name, group, threshold)
            shapes[name] = parts
            rows = [shape[0] for shape in parts.values()]
            found.update(zip(parts, torch.split(products[name].in_own_order(), rows), strict=True))
        if index + 1 < spec.layers:
            quantised = {name: part.clone for name, part in found.items()}
            stream.advance(replace(weights, sources={**weights.sources, **quantised}), index)
    progress("layers", spec.layers, spec.layers)
    return MixedModel(products=products, shapes=shapes, group=group)


def _calibrated(weight: torch.Tensor, recorder: Recorder, name: str, group: int, threshold: float) -> MixedProduct:
    order = outliers_first(recorder.peaks[name], threshold=threshold, group=group)
    channels = order[order >= 0]
    hessian = recorder.hessian(name)[channels][:, channels]
    found = gptq(weight[:, channels], hessian, Grid(bits=4, group=group))
    product = MixedProduct(order=order, weight=found, errors=torch.empty(0))
    sample, meant = recorder.sample(name), product.in_own_order()
    power = (sample @ meant.T).square().sum().clamp(min=1e-30)
    errors = torch.stack([block_errors(sample, meant, order, bits, group) for bits in (4, 8)]) / power
    return replace(product, errors=errors)
