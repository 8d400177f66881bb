"""A whole model quantised layer by layer, each layer on what the quantised ones before it make of real text.

The text runs through one layer at a time, in fp32: once to gather for each product the Hessian of its inputs,
H = 2 / N * sum x x^T, then, with the weights now quantised, once more for the inputs of the next layer (GPTQ, Frantar
et al., 2023). In memory are one layer, its Hessians and the residual stream of all windows, whatever the model's depth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch.nn.functional import linear

from stretto.core.errors import UserError, require
from stretto.models.assemble import Product, folded, one_layer
from stretto.models.kv_cache import KVCache
from stretto.models.quantize.gptq import DAMPING, Sparse, gptq, magnitude_mask
from stretto.models.quantize.grid import Grid, clip, round_to_nearest
from stretto.models.quantized import BlockTensor, Quantised
from stretto.models.segment import Segment
from stretto.models.spec import ModelSpec
from stretto.models.weights import Weights

if TYPE_CHECKING:
    from stretto.models.linear import LinearMap

Method = Literal["rtn", "clip", "gptq"]
METHODS: tuple[Method, ...] = ("rtn", "clip", "gptq")
HEAD_GRID = Grid(bits=8, group=32)
"""Of embedding and head. A table's rows are looked up one at a time and every logit is one of them, so that no sum over
several evens its errors out, and every token of a text meets it twice where it is tied."""
_PASS_TOKENS = 4096
"""Rows of one pass through a layer, which bound the memory of its activations."""

Progress = Callable[[str, float, float], None]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is quantised.

    Attributes:
        method: "rtn" rounds, "clip" searches scales, "gptq" lets later columns make up for earlier ones.
        grid: of the matrices inside the layers.
        sparse: "2:4" keeps two of each four weights of a row: by GPTQ's errors, else by magnitude.
        act_order, damping: of GPTQ.
        head: "8" puts embedding and head in 8 bits, "keep" leaves them as they are.
    """

    method: Method = "gptq"
    grid: Grid = field(default_factory=Grid)
    sparse: Sparse | None = None
    act_order: bool = False
    damping: float = DAMPING
    head: Literal["8", "keep"] = "8"

    def __post_init__(self) -> None:
        require(self.method in METHODS, "method", self.method, f"one of {', '.join(METHODS)}")
        require(self.sparse in (None, "2:4"), "sparse", self.sparse, "2:4 or nothing")
        require(self.head in ("8", "keep"), "head", self.head, "8 or keep")
        require(0 < self.damping < 1, "damping", self.damping, "in (0, 1)")
        require(not (self.act_order and self.sparse), "act_order", self.act_order, "False where neighbours are pruned")


class Recorder:
    """Products that gather what enters them.

    Attributes:
        peaks: the largest magnitude of each input channel, fp32 [k].

    Args:
        every: keep each so many-th row of inputs for `sample`; 0 keeps none.
    """

    def __init__(self, *, every: int = 0) -> None:
        self.peaks: dict[str, torch.Tensor] = {}
        self._every = every
        self._samples: dict[str, list[torch.Tensor]] = {}
        self._sums: dict[str, torch.Tensor] = {}
        self._rows: dict[str, int] = {}

    def hessian(self, name: str) -> torch.Tensor:
        """2 / N * sum x x^T of a product's inputs, fp32 [k, k]."""
        return self._sums[name] * (2 / self._rows[name])

    def sample(self, name: str) -> torch.Tensor:
        """Some rows of a product's inputs, fp32 [rows, k]."""
        return torch.cat(self._samples[name])

    def product(
        self, name: str, weight: torch.Tensor, bias: torch.Tensor | None, fold: torch.Tensor | None
    ) -> LinearMap:
        """See `transformer.Product`. What the last product of a layer gives is not needed: it is left out."""
        last = name.endswith("down_proj")

        def run(x: torch.Tensor) -> torch.Tensor:
            inputs = x if fold is None else x * fold
            self._add(name, inputs)
            return x.new_zeros(len(x), len(weight)) if last else linear(inputs, weight, bias)

        return run

    def _add(self, name: str, inputs: torch.Tensor) -> None:
        peak = inputs.abs().amax(0)
        if name in self.peaks:
            peak = torch.maximum(peak, self.peaks[name])
        self.peaks[name] = peak
        self._rows[name] = self._rows.get(name, 0) + len(inputs)
        width = inputs.shape[1]
        self._sums.setdefault(name, torch.zeros(width, width)).addmm_(inputs.T, inputs)
        if self._every:
            self._samples.setdefault(name, []).append(inputs[:: self._every].clone())


class Stream:
    """The residual stream of all windows, carried from layer to layer.

    Args:
        embed: token ids [T] to fp32 rows [T, hidden].
        windows: int64 [windows, tokens], at least two tokens each.
    """

    def __init__(self, spec: ModelSpec, embed: LinearMap, windows: torch.Tensor) -> None:
        require(windows.ndim == 2 and windows.numel() > 0, "windows", tuple(windows.shape), "[windows, tokens]")
        tokens = windows.shape[1]
        require(2 <= tokens <= spec.max_positions, "windows", tokens, f"of 2 to {spec.max_positions} tokens")
        self._rows = embed(windows.reshape(-1)).view(*windows.shape, -1)
        self._spec = replace(spec, layers=1)
        self._batch = max(1, _PASS_TOKENS // tokens)

    def watch(self, weights: Weights, index: int, product: Product) -> None:
        """Run the windows through layer `index` and forget what comes out."""
        self._run(weights, index, product, keep=False)

    def advance(self, weights: Weights, index: int, product: Product | None = None) -> None:
        """Run them through it for good."""
        self._run(weights, index, product or folded(torch.float32), keep=True)

    def _run(self, weights: Weights, index: int, product: Product, *, keep: bool) -> None:
        rows = self._rows[:0]

        def embed(tokens: torch.Tensor) -> torch.Tensor:
            return rows

        layer = one_layer(self._spec, weights, index, embed, product)
        tokens = self._rows.shape[1]
        cache = KVCache(self._spec, pages=self._batch, page_tokens=tokens, dtype=torch.float32)
        for first in range(0, len(self._rows), self._batch):
            part = self._rows[first : first + self._batch]
            rows = part.view(-1, part.shape[-1]) if keep else part.reshape(-1, part.shape[-1]).clone()
            segments = [Segment(i * tokens, tokens, 0, (i,), 0) for i in range(len(part))]
            layer.forward(torch.zeros(len(rows), dtype=torch.int64), segments, cache)


def quantise_model(
    spec: ModelSpec,
    weights: Weights,
    recipe: Recipe,
    windows: torch.Tensor | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Iterator[tuple[str, Quantised]]:
    """Every matrix of a model by name, quantised; embedding and head first, then layer after layer.

    Rows of query and key projections stay in the order of `weights`.

    Args:
        windows: token ids of real text, int64 [windows, tokens]; what "gptq" needs and "clip" weighs errors by.

    Raises:
        UserError: a tensor is missing or misshapen, or the method needs a text.
    """
    if recipe.method == "gptq" and windows is None:
        raise UserError("gptq needs a text to calibrate on", field="text", right="give one, or use rtn or clip")
    tables: dict[str, Quantised] = {}
    if recipe.head == "8":
        tables = dict(_tables(spec, weights))
        yield from tables.items()
    stream = None
    if windows is not None and recipe.method != "rtn":
        stream = Stream(spec, _embedding(spec, weights, tables), windows)
    for index in range(spec.layers):
        progress("layers", index, spec.layers)
        found = dict(_layer(spec, weights, recipe, index, stream))
        if stream is not None and index + 1 < spec.layers:
            stream.advance(with_quantised(weights, found), index)
        yield from found.items()
    progress("layers", spec.layers, spec.layers)


def quantise(weight: torch.Tensor, recipe: Recipe, hessian: torch.Tensor | None) -> Quantised:
    """One matrix [rows, length] by the recipe."""
    if recipe.method == "gptq" and hessian is not None:
        return gptq(
            weight, hessian, recipe.grid, damping=recipe.damping, act_order=recipe.act_order, sparse=recipe.sparse
        )
    kept = magnitude_mask(weight) if recipe.sparse else None
    if recipe.method == "clip":
        return clip(weight, recipe.grid, hessian=hessian, kept=kept)
    return round_to_nearest(weight, recipe.grid, kept=kept)


def with_quantised(weights: Weights, found: Mapping[str, Quantised]) -> Weights:
    """The same weights with some of them replaced by what their quantised form stands for."""
    return replace(weights, sources={**weights.sources, **{name: each.dequantize for name, each in found.items()}})


def products_of(spec: ModelSpec, index: int) -> dict[str, dict[str, tuple[int, int]]]:
    """Each product of layer `index` by name, with its matrices' names and their rows and length.

    The matrices of one product have the same inputs.
    """
    at, hidden = f"model.layers.{index}.", spec.hidden
    attention = {"q": spec.q_width, "k": spec.kv_width, "v": spec.kv_width}
    return {
        at + "self_attn.qkv": {f"{at}self_attn.{x}_proj.weight": (rows, hidden) for x, rows in attention.items()},
        at + "self_attn.o_proj": {f"{at}self_attn.o_proj.weight": (hidden, spec.q_width)},
        at + "mlp.gate_up": {f"{at}mlp.{x}_proj.weight": (spec.ffn, hidden) for x in ("gate", "up")},
        at + "mlp.down_proj": {f"{at}mlp.down_proj.weight": (hidden, spec.ffn)},
    }


def split(whole: Quantised, shapes: Mapping[str, tuple[int, int]]) -> Iterator[tuple[str, Quantised]]:
    """The matrices that were stacked into one."""
    first = 0
    for name, (rows, _) in shapes.items():
        yield name, whole.rows(torch.arange(first, first + rows))
        first += rows


def _layer(
    spec: ModelSpec, weights: Weights, recipe: Recipe, index: int, stream: Stream | None
) -> Iterator[tuple[str, Quantised]]:
    recorder = None
    if stream is not None:
        recorder = Recorder()
        stream.watch(weights, index, recorder.product)
    for product, shapes in products_of(spec, index).items():
        stacked = torch.cat([weights.tensor(name, shape) for name, shape in shapes.items()])
        hessian = None if recorder is None else recorder.hessian(product)
        yield from split(quantise(stacked, recipe, hessian), shapes)


def _tables(spec: ModelSpec, weights: Weights) -> Iterator[tuple[str, Quantised]]:
    names = ["model.embed_tokens.weight"] + ([] if spec.tied_embeddings else ["lm_head.weight"])
    for name in names:
        source = weights.sources.get(name)
        if isinstance(source, BlockTensor) and source.format.name == "Q8_0":
            yield name, from_q8_0(source)  # in 8 bits already: rounding it again would only lose
        else:
            yield name, round_to_nearest(weights.tensor(name, (spec.vocab, spec.hidden)), HEAD_GRID)


def from_q8_0(source: BlockTensor) -> Quantised:
    """A GGUF matrix in blocks of 8 bits, to the last bit."""
    rows, length = source.shape
    blocks = torch.frombuffer(source.blocks, dtype=torch.uint8).view(rows, -1, 34)
    scales = blocks[..., :2].contiguous().view(torch.float16)[..., 0]
    values = (blocks[..., 2:] ^ 128).reshape(rows, -1)  # signed, with 128 added
    return Quantised(values, scales, None, 8, length, method="as it was")


def _embedding(spec: ModelSpec, weights: Weights, tables: Mapping[str, Quantised]) -> LinearMap:
    name = "model.embed_tokens.weight"
    table = tables[name].dequantize() if name in tables else weights.tensor(name, (spec.vocab, spec.hidden))
    return lambda tokens: table[tokens]
