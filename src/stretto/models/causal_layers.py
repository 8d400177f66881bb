"""The layers of a decoder of the Llama family that can be trained, each split over the ranks that share it.

Three axes of ranks may share a layer: `tp` splits heads (by KV groups), MLP columns and the vocabulary, as Megatron-LM
does (Shoeybi et al., 2019); `cp` splits the sequence; `ep` the experts. An axis of one rank costs nothing and changes
no bit. Parameters carry Hugging Face's names and layout; each module's `placements` says which part of each whole
tensor it holds, so that checkpoints, norms and gradient sums need to know nothing of layers.

Shapes: B sequences, L tokens of each that lie here, H hidden, N local heads, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn
from torch.nn.functional import embedding, linear, rms_norm, silu

from stretto.comm.transport import Axis, alone
from stretto.models.dropout import Dropout
from stretto.models.parallel.experts import MoE
from stretto.models.parallel.sequence import seq_attention
from stretto.models.parallel.tensor import copy_in, share, sum_out, vocab_cross_entropy, vocab_embedding
from stretto.models.spec import ModelSpec

IGNORED = -100
"""A target that counts for nothing."""
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_PLACES = ("attention", "mlp", *PROJECTIONS)
"""Of a layer, where numbers may be dropped: what is added to the residual stream, and what enters adapters."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """The axes of ranks that share a stage, and how.

    Attributes:
        tp, cp, ep: tensor, sequence and expert axis.
        attention: how attention over a split sequence goes: a mode of `models.parallel.sequence`.
        layout: which tokens of a sequence a rank of `cp` holds.
        experts: "llep" evens out the experts' load in each layer, "ep" leaves every token with its expert's rank.
    """

    tp: Axis = field(default_factory=lambda: alone("tp"))
    cp: Axis = field(default_factory=lambda: alone("cp"))
    ep: Axis = field(default_factory=lambda: alone("ep"))
    attention: Literal["rsa", "blockwise", "all_to_all"] = "blockwise"
    layout: Literal["contiguous", "zigzag"] = "contiguous"
    experts: Literal["llep", "ep"] = "llep"


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters beside the matrices (Hu et al., 2021): only they are trained.

    Attributes:
        rank: columns of each adapter's first matrix.
        alpha: its output is scaled by alpha / rank.
        targets: the last names of the projections that get one.
        dropout: chance of each number that enters an adapter to be dropped.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = PROJECTIONS
    dropout: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Which part of a whole tensor a rank holds.

    Attributes:
        shape: of the whole tensor.
        start: where the part begins, a number a dim; its lengths are the parameter's own shape.
        split: axes over which the tensor is cut; on all other axes each rank holds the same part.
        partial: axes, beside those of the data, on which each rank's gradient is a part of a sum.
    """

    shape: tuple[int, ...]
    start: tuple[int, ...]
    split: tuple[str, ...] = ()
    partial: tuple[str, ...] = ()


class Projection(nn.Module):
    """x W^T (+ b), with an adapter beside it where one is asked for; `dim` is the dim of W that `tp` cuts.

    What enters an adapter is dropped by `place`.
    """

    def __init__(
        self,
        whole: tuple[int, int],
        part: range,
        dim: int,
        tp: Axis,
        *,
        bias: bool,
        lora: Lora | None,
        place: int,
    ):
        super().__init__()
        self.dim, self.part, self.whole, self.tp = dim, part, whole, tp
        rows, columns = (len(part) if d == dim else size for d, size in enumerate(whole))
        self.weight = nn.Parameter(torch.empty(rows, columns))
        self.bias = nn.Parameter(torch.empty(rows)) if bias else None
        self.scale = lora.alpha / lora.rank if lora else 0.0
        self.lora_A = nn.Parameter(torch.empty(lora.rank, columns)) if lora else None
        self.lora_B = nn.Parameter(torch.empty(rows, lora.rank)) if lora else None

        self.dropout = Dropout(lora.dropout if lora else 0.0, place, part.start if dim == 1 else 0)

    def forward(self, x: torch.Tensor, keys: torch.Tensor | None) -> torch.Tensor:
        y = linear(x, self.weight, self.bias)
        if self.lora_A is None or self.lora_B is None:
            return y
        return y + self.scale * linear(linear(self.dropout(x, keys), self.lora_A), self.lora_B)

    def placements(self) -> Iterator[tuple[str, Placement]]:
        split = ("tp",) if self.tp.size > 1 else ()
        start = [0, 0]
        start[self.dim] = self.part.start
        yield "weight", Placement(shape=self.whole, start=(start[0], start[1]), split=split)
        if self.bias is not None:
            yield "bias", Placement(shape=self.whole[:1], start=(start[0],), split=split)
        if self.lora_A is not None:
            rank = len(self.lora_A)
            cut_a, cut_b = (split, ()) if self.dim == 1 else ((), split)
            # Of the two, the one that is whole meets a part of the inputs or of the sum only.
            yield (
                "lora_A",
                Placement(
                    shape=(rank, self.whole[1]), start=(0, start[1]), split=cut_a, partial=() if cut_a else split
                ),
            )
            yield (
                "lora_B",
                Placement(
                    shape=(self.whole[0], rank), start=(start[0], 0), split=cut_b, partial=() if cut_b else split
                ),
            )


class Norm(nn.Module):
    """RMS norm over the last dim; `partial` where each rank of `tp` norms other heads with the same weights."""

    def __init__(self, width: int, eps: float, tp: Axis | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps
        self.partial = ("tp",) if tp is not None and tp.size > 1 else ()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight.shape, self.weight, self.eps)

    def placements(self) -> Iterator[tuple[str, Placement]]:
        yield "weight", Placement(shape=tuple(self.weight.shape), start=(0,), partial=self.partial)


class Table(nn.Module):
    """A matrix [vocabulary, H] of which `tp` holds stretches of rows: the embedding, or the head."""

    def __init__(self, spec: ModelSpec, tp: Axis):
        super().__init__()
        self.rows, self.tp = share(spec.vocab, tp.rank, tp.size), tp
        self.whole = (spec.vocab, spec.hidden)
        self.weight = nn.Parameter(torch.empty(len(self.rows), spec.hidden))

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.tp.size == 1:
            return embedding(tokens, self.weight)
        return vocab_embedding(tokens, self.weight, self.tp, self.rows.start)

    def losses(self, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of each row of x [rows, H]; 0 where the target is `IGNORED`."""
        logits = linear(copy_in(x, self.tp), self.weight)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return vocab_cross_entropy(wide, targets, self.tp, self.rows.start, ignore=IGNORED)

    def placements(self) -> Iterator[tuple[str, Placement]]:
        split = ("tp",) if self.tp.size > 1 else ()
        yield "weight", Placement(shape=self.whole, start=(self.rows.start, 0), split=split)


class Attention(nn.Module):
    """Grouped-query attention of the local KV groups over the whole sequence."""

    def __init__(self, spec: ModelSpec, split: Split, lora: Lora | None, index: int):
        super().__init__()
        self.spec, self.split = spec, split
        tp, dim, per = split.tp, spec.head_dim, spec.heads // spec.kv_heads
        groups = share(spec.kv_heads, tp.rank, tp.size)

        def rows(width: int) -> range:
            return range(groups.start * width, groups.stop * width)

        def projection(name: str, whole: tuple[int, int], part: range, cut: int, bias: bool) -> Projection:
            own = lora if lora and name in lora.targets else None
            return Projection(whole, part, cut, tp, bias=bias, lora=own, place=_place(index, name))

        q, kv = (spec.q_width, spec.hidden), (spec.kv_width, spec.hidden)
        self.q_proj = projection("q_proj", q, rows(per * dim), 0, spec.qkv_bias)
        self.k_proj = projection("k_proj", kv, rows(dim), 0, spec.qkv_bias)
        self.v_proj = projection("v_proj", kv, rows(dim), 0, spec.qkv_bias)
        self.o_proj = projection("o_proj", q[::-1], rows(per * dim), 1, False)
        self.q_norm = Norm(dim, spec.norm_eps, tp) if spec.qk_norm else None
        self.k_norm = Norm(dim, spec.norm_eps, tp) if spec.qk_norm else None

    def forward(
        self, x: torch.Tensor, turns: tuple[torch.Tensor, torch.Tensor], keys: torch.Tensor | None
    ) -> torch.Tensor:
        batch, length = x.shape[:2]
        x = copy_in(x, self.split.tp)
        q, k, v = (
            projection(x, keys).view(batch, length, -1, self.spec.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        mixed = seq_attention(
            _turned(q, turns),
            _turned(k, turns),
            v,
            self.split.cp,
            causal=True,
            mode=self.split.attention,
            layout=self.split.layout,
        )
        out: torch.Tensor = self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1), keys)
        return out


class MLP(nn.Module):
    """down(silu(gate x) * up x), `tp` holding stretches of the inner columns."""

    def __init__(self, spec: ModelSpec, split: Split, lora: Lora | None, index: int):
        super().__init__()
        self.tp = split.tp
        inner = share(spec.ffn, split.tp.rank, split.tp.size)

        def projection(name: str, whole: tuple[int, int], cut: int) -> Projection:
            own = lora if lora and name in lora.targets else None
            return Projection(whole, inner, cut, split.tp, bias=False, lora=own, place=_place(index, name))

        self.gate_proj = projection("gate_proj", (spec.ffn, spec.hidden), 0)
        self.up_proj = projection("up_proj", (spec.ffn, spec.hidden), 0)
        self.down_proj = projection("down_proj", (spec.hidden, spec.ffn), 1)

    def forward(self, x: torch.Tensor, keys: torch.Tensor | None) -> torch.Tensor:
        x = copy_in(x, self.tp)
        out: torch.Tensor = self.down_proj(silu(self.gate_proj(x, keys)) * self.up_proj(x, keys), keys)
        return out


class Experts(nn.Module):
    """The expert MLPs of a layer: whole experts shared by `ep`, the inner columns of each by `tp`; without adapters."""

    def __init__(self, spec: ModelSpec, split: Split):
        super().__init__()
        self.spec, self.tp, self.ep = spec, split.tp, split.ep
        self.inner = share(spec.ffn, split.tp.rank, split.tp.size)
        self.local = share(spec.experts, split.ep.rank, split.ep.size)
        self.moe = MoE(spec.hidden, len(self.inner), spec.experts, spec.top_k, split.ep, policy=split.experts)

    def forward(self, x: torch.Tensor, keys: torch.Tensor | None) -> torch.Tensor:
        out: torch.Tensor = self.moe(copy_in(x, self.tp))
        return out

    def placements(self) -> Iterator[tuple[str, Placement]]:
        experts, hidden, ffn = self.spec.experts, self.spec.hidden, self.spec.ffn
        tp = ("tp",) if self.tp.size > 1 else ()
        split = (*tp, *(("ep",) if self.ep.size > 1 else ()))
        first, column = self.local.start, self.inner.start
        yield "moe.router", Placement(shape=(experts, hidden), start=(0, 0), partial=tp)
        for name in ("gate", "up"):
            yield f"moe.{name}", Placement(shape=(experts, ffn, hidden), start=(first, column, 0), split=split)
        yield "moe.down", Placement(shape=(experts, hidden, ffn), start=(first, 0, column), split=split)


class Skip(nn.Module):
    """x + w * skip, with the one number w of a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1))

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        return x + self.weight * skip

    def placements(self) -> Iterator[tuple[str, Placement]]:
        yield "weight", Placement(shape=(1,), start=(0,))


class Layer(nn.Module):
    """One decoder layer over x [B, L, H]; what attention and MLP add to x is dropped by chance `dropout`."""

    def __init__(self, spec: ModelSpec, split: Split, lora: Lora | None, index: int, dropout: float):
        super().__init__()
        self.tp = split.tp
        self.input_layernorm = Norm(spec.hidden, spec.norm_eps)
        self.self_attn = Attention(spec, split, lora, index)
        self.post_attention_layernorm = Norm(spec.hidden, spec.norm_eps)
        self.mlp: nn.Module = Experts(spec, split) if spec.experts else MLP(spec, split, lora, index)
        self.drop_attention = Dropout(dropout, _place(index, "attention"))
        self.drop_mlp = Dropout(dropout, _place(index, "mlp"))
        self.skip = Skip() if any(taken == index for _, taken in spec.skip_pairs) else None

    def forward(
        self,
        x: torch.Tensor,
        turns: tuple[torch.Tensor, torch.Tensor],
        keys: torch.Tensor | None = None,
        skip: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x after the layer.

        Args:
            keys: int64 [B, L] as of `dropout.token_keys`; None: nothing is dropped.
            skip: [B, L, H], the tensor of the skip connection that ends here, if one does.
        """
        if self.skip is not None and skip is not None:
            x = self.skip(x, skip)
        more = sum_out(self.self_attn(self.input_layernorm(x), turns, keys).to(x.dtype), self.tp)
        x = x + self.drop_attention(more, keys)
        more = sum_out(self.mlp(self.post_attention_layernorm(x), keys).to(x.dtype), self.tp)
        out: torch.Tensor = x + self.drop_mlp(more, keys)
        return out


def _place(layer: int, name: str) -> int:
    """A number of its own for each place of each layer where numbers may be dropped."""
    return layer * len(_PLACES) + _PLACES.index(name)


def _turned(heads: torch.Tensor, turns: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Heads [B, N, L, D] with rotary partners half a head apart, turned to their positions."""
    cosine, sine = (part.to(heads.dtype) for part in turns)
    low, high = heads.chunk(2, dim=-1)
    return heads * cosine + torch.cat([-high, low], dim=-1) * sine
