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
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import scaled_dot_product_attention

from stretto.kernels.attention import HEAD_DIMS, decode_attention, decode_attention_reference
from stretto.kernels.elementwise import gated_silu, rotate, scatter
from stretto.models.batching import Decode, PassPlan, Prefill, plan_pass
from stretto.models.kv_cache import KVCache, require_cache_of
from stretto.models.segment import Segment
from stretto.models.shard import Shard
from stretto.models.spec import ModelSpec

if TYPE_CHECKING:
    from stretto.models.linear import LinearMap

Timer = Callable[[str], None]
"""Called at the end of each section with its name, as `ModelSpec.operations` names it; "plan" comes first,
and "reduce" is the sum over the ranks, where there are several."""


@dataclass(frozen=True, slots=True)
class Layer:
    """The products of one layer."""

    qkv: LinearMap
    out: LinearMap
    gate_up: LinearMap
    down: LinearMap
    qk_norm: torch.Tensor | None
    """[Q + K, D] weights of Qwen3's head norms, sqrt(D) included."""


class Transformer:
    """A model ready to run; made by `assemble.build`, used through `forward`."""

    def __init__(
        self,
        spec: ModelSpec,
        dtype: torch.dtype,
        *,
        embed: LinearMap,
        layers: Sequence[Layer],
        head: LinearMap,
        frequencies: torch.Tensor,
        shard: Shard | None = None,
    ) -> None:
        self.spec = spec
        self._shard = shard
        self._part = spec if shard is None else shard.part(spec)
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
        require_cache_of(cache, self._part, self.dtype)
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
        layer: Layer,
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
