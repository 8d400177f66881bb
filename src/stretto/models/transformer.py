"""The forward pass of a Llama-family decoder over a ragged batch and a paged KV cache, for a CPU.

What differs from the textbook, each for fewer or faster operations and none for the result beyond rounding:
queries, keys and values are one product, and so are gate and up; norm weights are folded into the columns
of the product that follows; an RMS norm is x / hypot(|x|, sqrt(width * eps)), with sqrt(width) folded too;
rotary partners lie next to each other, so that a rotation is one complex product; the residual stream is
fp32 whatever the type of the products.

Split over ranks (`shard`), each computes its own heads, MLP columns and vocabulary with the embeddings and norms
whole, and the ranks' sums are added onto the residual stream of each.

Shapes: T rows of the pass, H hidden, Q and K query and KV heads, D head width, F MLP width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import scaled_dot_product_attention

from stretto.core.errors import UserError
from stretto.kernels.attention import HEAD_DIMS, decode_attention, decode_attention_reference
from stretto.kernels.elementwise import gated_silu, rotate, scatter
from stretto.models.batching import Decode, PassPlan, Prefill, plan_pass
from stretto.models.kv_cache import KVCache
from stretto.models.linear import linear_map
from stretto.models.quantized import PackedTensor
from stretto.models.segment import Segment
from stretto.models.shard import Shard
from stretto.models.spec import ModelSpec
from stretto.models.weights import ROPE_DIVISORS, Weights, query_key_order

if TYPE_CHECKING:
    from stretto.models.linear import LinearMap

Timer = Callable[[str], None]
"""Called at the end of each section with its name, as `ModelSpec.operations` names it; "plan" comes first,
and "reduce" is the sum over the ranks, where there are several."""
Product = Callable[[str, torch.Tensor, torch.Tensor | None, torch.Tensor | None], "LinearMap"]
"""Makes the product of one place of the model, from its name ("model.layers.3.self_attn.qkv"; out: "self_attn.o_proj",
"mlp.gate_up", "mlp.down_proj"; "lm_head"), its weight [n, k] and bias in fp32, and what is still to be multiplied into
the inputs [k] (a norm's weights; None: nothing). `folded` is what a model runs with."""


@dataclass(frozen=True, slots=True)
class _Layer:
    qkv: LinearMap
    out: LinearMap
    gate_up: LinearMap
    down: LinearMap
    qk_norm: torch.Tensor | None
    """[Q + K, D] weights of Qwen3's head norms, sqrt(D) included."""


class Transformer:
    """A model ready to run; made by `build`, used through `forward`."""

    def __init__(
        self,
        spec: ModelSpec,
        dtype: torch.dtype,
        *,
        embed: LinearMap,
        layers: Sequence[_Layer],
        head: LinearMap,
        frequencies: torch.Tensor,
        shard: Shard | None = None,
    ) -> None:
        self.spec = spec
        self._shard = shard
        self._part = _part(spec, shard)
        self.dtype = dtype
        self._embed = embed
        self._layers = layers
        self._head = head
        self._frequencies = frequencies
        self._norm_floor = torch.tensor(math.sqrt(spec.hidden * spec.norm_eps))
        self._head_norm_floor = torch.tensor(math.sqrt(spec.head_dim * spec.norm_eps))

    def new_cache(self, *, pages: int, page_tokens: int) -> KVCache:
        """An empty cache of this model's type, for the KV heads that are held here."""
        return KVCache(self._part, pages=pages, page_tokens=page_tokens, dtype=self.dtype)

    @torch.inference_mode()
    def forward(
        self, tokens: torch.Tensor, segments: Sequence[Segment], cache: KVCache, timer: Timer | None = None
    ) -> torch.Tensor:
        """Run one pass; keys and values of the new tokens are in `cache` afterwards.

        Args:
            tokens: int64 [T], the segments' new tokens one after another.
            segments: which rows belong to which sequence; prompts, chunks of prompts and single tokens may mix.
            cache: where each sequence's earlier tokens are, of the model's type.
            timer: called after every section.

        Returns:
            fp32 logits [wanted rows, vocab], in the order of the segments. Split over ranks, rank 0 has them, and
            any other the columns of its own part of the vocabulary.

        Raises:
            ValueError: rows, lengths or pages do not fit together.
            RuntimeError: another rank is gone or silent.
        """
        plan = plan_pass(segments, cache)
        if len(tokens) != len(plan.positions):
            raise ValueError(f"tokens has {len(tokens)} rows; the segments have {len(plan.positions)}")
        turns = torch.polar(torch.tensor(1.0), plan.positions[:, None, None] * self._frequencies)
        if timer:
            timer("plan")

        x = self._embed(tokens if plan.order is None else tokens[plan.order])
        if timer:
            timer("embed")
        for index, layer in enumerate(self._layers):
            self._layer(index, layer, x, turns, plan, cache, timer)

        if plan.logits is not None:
            x = x.index_select(0, plan.logits)
        if not len(x):
            return torch.empty(0, self.spec.vocab)
        normed = self._norm(x)
        if timer:
            timer("norm_final")
        logits = self._head(normed).float()
        if timer:
            timer("lm_head")
        if self._shard is None:
            return logits
        return self._shard.gather(logits, self.spec.vocab)

    def _layer(
        self,
        index: int,
        layer: _Layer,
        x: torch.Tensor,
        turns: torch.Tensor,
        plan: PassPlan,
        cache: KVCache,
        timer: Timer | None,
    ) -> None:
        """One layer, added onto the residual stream x [T, H] in place."""
        spec = self._part
        turned = spec.heads + spec.kv_heads

        normed = self._norm(x)
        if timer:
            timer("norm_attention")
        heads = layer.qkv(normed).view(len(x), -1, spec.head_dim)
        if timer:
            timer("qkv")
        if layer.qk_norm is not None:
            self._norm_heads(heads[:, :turned], layer.qk_norm)
            if timer:
                timer("norm_qk")
        threads = torch.get_num_threads()
        rotate(heads[:, :turned], turns, threads=threads)
        if timer:
            timer("rope")
        scatter(heads[:, spec.heads :], cache.flat[index], plan.writes, threads=threads)
        if timer:
            timer("kv_write")
        mixed = self._attention(index, heads, plan, cache, timer)
        added = layer.out(mixed)
        if timer:
            timer("out")
        x.add_(self._sum(added, timer))
        if timer:
            timer("add_attention")

        normed = self._norm(x)
        if timer:
            timer("norm_mlp")
        both = layer.gate_up(normed)
        if timer:
            timer("gate_up")
        active = gated_silu(both, threads=threads)
        if timer:
            timer("activation")
        added = layer.down(active)
        if timer:
            timer("down")
        x.add_(self._sum(added, timer))
        if timer:
            timer("add_mlp")

    def _sum(self, partial: torch.Tensor, timer: Timer | None) -> torch.Tensor:
        """What all ranks add onto the residual stream: fp32, or `partial` as it is where there is one rank."""
        if self._shard is None:
            return partial
        total = self._shard.reduce_(partial.float())
        if timer:
            timer("reduce")
        return total

    def _norm(self, x: torch.Tensor) -> torch.Tensor:
        """x / RMS(x) / sqrt(H), in the type of the products; what is left of the norm is in the weights."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x.div(length.hypot_(self._norm_floor)).to(self.dtype)

    def _norm_heads(self, heads: torch.Tensor, weight: torch.Tensor) -> None:
        """Norm each head of [T, Q + K, D] in place."""
        wide = heads.float()
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        heads.copy_(wide.div(length.hypot_(self._head_norm_floor)).mul_(weight))

    def _attention(
        self, index: int, heads: torch.Tensor, plan: PassPlan, cache: KVCache, timer: Timer | None
    ) -> torch.Tensor:
        """Every attention call of the pass for heads [T, Q + 2K, D]: [T, Q * D]."""
        rows = plan.decode.rows if plan.decode else 0
        mixed = heads.new_empty(len(heads), self._part.q_width) if plan.prefill else None
        if plan.decode:
            found = self._decode(heads[:rows, : self._part.heads], cache.layers[index], plan.decode)
            if timer:
                timer("attention_decode")
            if mixed is None:
                return found
            mixed[:rows] = found
        assert mixed is not None
        for call in plan.prefill:
            mixed[call.first : call.last] = self._prefill(index, heads, call, cache)
            if timer:
                timer("attention_prefill")
        return mixed

    def _decode(self, rows: torch.Tensor, layer: torch.Tensor, call: Decode) -> torch.Tensor:
        """One row a sequence, [rows, Q, D]: by the kernel, or where it has none for this width, by its reference."""
        if self.spec.head_dim in HEAD_DIMS:
            return decode_attention(rows, layer, call.tables, call.lengths, threads=torch.get_num_threads())
        return decode_attention_reference(rows, layer, call.tables, call.lengths)

    def _prefill(self, index: int, heads: torch.Tensor, call: Prefill, cache: KVCache) -> torch.Tensor:
        """The rows of one prompt: against each other, or as a chunk against what is cached and each other."""
        spec, context = self._part, call.context
        rows = heads[call.first : call.last].transpose(0, 1)[None]
        if context is None:
            stored = rows[:, spec.heads :]
            mask = None
        else:
            stored = context.read(cache, index)
            mask = context.mask
        mixed = scaled_dot_product_attention(
            rows[:, : spec.heads],
            stored[:, : spec.kv_heads],
            stored[:, spec.kv_heads :],
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=True,
        )
        return mixed[0].transpose(0, 1).reshape(call.last - call.first, spec.q_width)


def rope_frequencies(spec: ModelSpec, divisors: torch.Tensor | None = None) -> torch.Tensor:
    """Radians a position of each rotary pair, fp32 [D / 2], with the spec's scaling or explicit divisors."""
    pairs = torch.arange(0, spec.head_dim, 2, dtype=torch.int64).float() / spec.head_dim
    frequencies = 1.0 / (spec.rope_theta**pairs)
    if divisors is not None:
        return frequencies / divisors
    scaling = spec.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    turns = scaling.original_positions * frequencies / (2 * math.pi)
    fast = ((turns - scaling.low_frequency) / (scaling.high_frequency - scaling.low_frequency)).clamp(0, 1)
    return frequencies * (fast + (1 - fast) / scaling.factor)


def _part(spec: ModelSpec, shard: Shard | None) -> ModelSpec:
    return spec if shard is None else shard.part(spec)


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
    builder = _Builder(spec, weights, dtype, shard, product or folded(dtype))
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
        self.part = _part(spec, shard)
        self.shard = shard
        self.weights = weights
        self.dtype = dtype

    @torch.inference_mode()
    def layer(self, index: int) -> _Layer:
        spec, at = self.spec, f"model.layers.{index}."
        attention = self.norm(at + "input_layernorm.weight")
        mlp = self.norm(at + "post_attention_layernorm.weight")
        inner = (spec.ffn, spec.hidden)
        gates = [self.held(f"{at}mlp.{name}_proj.weight", inner, spec.ffn) for name in ("gate", "up")]
        return _Layer(
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
        if f"{at}self_attn.q_proj.bias" in self.weights:
            raise UserError("has biased projections its configuration does not mention", file=self.weights.file)
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
