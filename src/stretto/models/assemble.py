"""From a checkpoint's weights to a `Transformer`: unpacked, fused, folded and laid out, or a rank's part of that."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from stretto.core.errors import UserError
from stretto.models.linear import linear_map
from stretto.models.packable import unexpected_bias
from stretto.models.quantized import PackedTensor
from stretto.models.rope import rope_frequencies
from stretto.models.shard import Shard
from stretto.models.spec import ModelSpec
from stretto.models.transformer import Layer, Transformer
from stretto.models.weights import ROPE_DIVISORS, Weights, query_key_order

if TYPE_CHECKING:
    from stretto.models.linear import LinearMap

Product = Callable[[str, torch.Tensor, torch.Tensor | None, torch.Tensor | None], "LinearMap"]
"""Makes the product of one place of the model, from its name ("model.layers.3.self_attn.qkv"; out: "self_attn.o_proj",
"mlp.gate_up", "mlp.down_proj"; "lm_head"), its weight [n, k] and bias in fp32, and what is still to be multiplied into
the inputs [k] (a norm's weights; None: nothing). `folded` is what a model runs with."""


def folded(dtype: torch.dtype) -> Product:
    """Norm weights folded into the columns of the product; weights in `dtype`."""

    def product(name: str, weight: torch.Tensor, bias: torch.Tensor | None, fold: torch.Tensor | None) -> LinearMap:
        whole = weight if fold is None else weight.mul_(fold)
        return linear_map(whole.to(dtype), None if bias is None else bias.to(dtype))

    return product


def one_layer(spec: ModelSpec, weights: Weights, index: int, embed: LinearMap, product: Product) -> Transformer:
    """Layer `index` alone in fp32, over rows that `embed` makes; its head is never asked for.

    The rows are changed in place, so that what `embed` hands out holds the layer's outputs after a pass.
    """
    builder = _Builder(spec, weights, torch.float32, None, product)
    return Transformer(
        replace(spec, layers=1),
        torch.float32,
        embed=embed,
        layers=[builder.layer(index)],
        head=lambda x: x,
        frequencies=builder.frequencies(),
    )


def build(
    spec: ModelSpec,
    weights: Weights,
    *,
    dtype: torch.dtype,
    threads: int,
    shard: Shard | None = None,
    product: Product | None = None,
) -> Transformer:
    """Unpack, fuse, fold and lay out the weights, or `shard`'s part of them; `product` makes products of another kind.

    Raises:
        UserError: a tensor is missing or misshapen, or the model has not enough KV heads for the ranks.
    """
    strange = unexpected_bias(spec, weights)
    if strange is not None:
        raise UserError(f"has {strange}, which its configuration does not mention", file=weights.file)
    builder = _Builder(spec, weights, dtype, shard, product or folded(dtype))
    builder.norm(f"model.layers.{spec.layers - 1}.input_layernorm.weight")  # as many layers as are claimed
    # Layers are independent, so each thread packs its own: no barrier inside an operation, none lost to a
    # busy neighbour.
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        head = pool.submit(builder.head)
        layers = list(pool.map(builder.layer, range(spec.layers)))
    torch.set_num_threads(threads)
    return Transformer(
        spec,
        dtype,
        embed=builder.embed(),
        layers=layers,
        head=head.result(),
        frequencies=builder.frequencies(),
        shard=shard,
    )


class _Builder:
    def __init__(
        self, spec: ModelSpec, weights: Weights, dtype: torch.dtype, shard: Shard | None, product: Product
    ) -> None:
        self.spec = spec
        self.product = product
        self.part = spec if shard is None else shard.part(spec)
        self.shard = shard
        self.weights = weights
        self.dtype = dtype

    @torch.inference_mode()
    def layer(self, index: int) -> Layer:
        spec, at = self.spec, f"model.layers.{index}."
        attention = self.norm(at + "input_layernorm.weight")
        mlp = self.norm(at + "post_attention_layernorm.weight")
        inner = (spec.ffn, spec.hidden)
        gates = [self.held(f"{at}mlp.{name}_proj.weight", inner, spec.ffn) for name in ("gate", "up")]
        return Layer(
            qkv=self.product(at + "self_attn.qkv", self.qkv(at, "weight", (spec.hidden,)), self.bias(at), attention),
            out=self.product(
                at + "self_attn.o_proj",
                self.held(at + "self_attn.o_proj.weight", (spec.hidden, spec.q_width), spec.kv_heads, dim=1),
                None,
                None,
            ),
            gate_up=self.product(at + "mlp.gate_up", torch.cat(gates), None, mlp),
            down=self.product(
                at + "mlp.down_proj",
                self.held(at + "mlp.down_proj.weight", inner[::-1], spec.ffn, dim=1),
                None,
                None,
            ),
            qk_norm=self.qk_norm(at) if spec.qk_norm else None,
        )

    @torch.inference_mode()
    def head(self) -> LinearMap:
        name = "model.embed_tokens.weight" if self.spec.tied_embeddings else "lm_head.weight"
        table = self.held(name, (self.spec.vocab, self.spec.hidden), self.spec.vocab)
        return self.product("lm_head", table, None, self.norm("model.norm.weight"))

    def embed(self) -> LinearMap:
        """Token ids [T] to fp32 rows [T, H]; a packed table stays packed."""
        name = "model.embed_tokens.weight"
        source = self.weights.sources.get(name)
        if isinstance(source, PackedTensor):
            expected = (self.spec.vocab, self.spec.hidden)
            if tuple(source.shape) != expected:
                told = f"tensor {name} has shape {tuple(source.shape)}"
                raise UserError(told, file=self.weights.file, right=f"expected {expected}")
            return source.rows
        table = self.weights.tensor(name, (self.spec.vocab, self.spec.hidden)).to(self.dtype)
        return lambda tokens: table[tokens].float()

    def frequencies(self) -> torch.Tensor:
        divisors = None
        if ROPE_DIVISORS in self.weights:
            divisors = self.weights.tensor(ROPE_DIVISORS, (self.spec.head_dim // 2,))
        return rope_frequencies(self.spec, divisors)

    def held(self, name: str, shape: tuple[int, ...], units: int, dim: int = 0) -> torch.Tensor:
        """What is held here of a tensor of `shape`, whose `dim` holds `units` units of equal width."""
        whole = self.weights.tensor(name, shape)
        return whole if self.shard is None else self.shard.cut(whole, units, dim)

    def norm(self, name: str) -> torch.Tensor:
        return self.weights.tensor(name, (self.spec.hidden,)) * math.sqrt(self.spec.hidden)

    def qkv(self, at: str, kind: str, inner: tuple[int, ...]) -> torch.Tensor:
        """The three projections' rows that are held here, one below the other, rotary partners adjacent."""
        spec = self.spec
        parts = []
        for name, width in (("q", spec.q_width), ("k", spec.kv_width), ("v", spec.kv_width)):
            part = self.held(f"{at}self_attn.{name}_proj.{kind}", (width, *inner), spec.kv_heads)
            parts.append(part if name == "v" else self.adjacent(part))
        return torch.cat(parts)

    def bias(self, at: str) -> torch.Tensor | None:
        if self.spec.qkv_bias:
            return self.qkv(at, "bias", ())
        return None

    def qk_norm(self, at: str) -> torch.Tensor:
        part = self.part
        query, key = (
            self.adjacent(self.weights.tensor(f"{at}self_attn.{name}_norm.weight", (part.head_dim,))) for name in "qk"
        )
        rows = torch.cat([query.expand(part.heads, -1), key.expand(part.kv_heads, -1)])
        return rows * math.sqrt(part.head_dim)

    def adjacent(self, rows: torch.Tensor) -> torch.Tensor:
        return query_key_order(rows, self.spec.head_dim, have=self.weights.rotary, want="adjacent")
