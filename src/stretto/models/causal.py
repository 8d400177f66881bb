"""A decoder of the Llama family that can be trained, cut into stages, and each stage split over ranks.

A stage holds neighbouring layers, the first one the embedding and the last one the final norm and the head. Inside a
stage three axes of ranks may share the work: `tp` splits heads (by KV groups), MLP columns and the vocabulary, as
Megatron-LM does (Shoeybi et al., 2019); `cp` splits the sequence; `ep` the experts. An axis of one rank costs nothing
and changes no bit. Parameters carry Hugging Face's names and layout; `placements` says which part of each whole tensor
is held here, so that checkpoints, norms and gradient sums need to know nothing of layers.

Shapes: B sequences, L tokens of each that lie here, H hidden, Q and K local query and KV heads, D head width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.functional import embedding, linear, rms_norm, silu
from torch.utils.checkpoint import checkpoint

from stretto.comm.transport import Axis, alone
from stretto.models.parallel.experts import MoE
from stretto.models.parallel.sequence import positions, seq_attention
from stretto.models.parallel.tensor import copy_in, share, sum_out, vocab_cross_entropy, vocab_embedding
from stretto.models.spec import ModelSpec
from stretto.models.transformer import rope_frequencies
from stretto.models.weights import ROPE_DIVISORS, Weights, query_key_order

IGNORED = -100
"""A target that counts for nothing."""
_INIT_STD = 0.02


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
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


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
    """x W^T (+ b), with an adapter beside it where one is asked for; `dim` is the dim of W that `tp` cuts."""

    def __init__(self, whole: tuple[int, int], part: range, dim: int, tp: Axis, *, bias: bool, lora: Lora | None):
        super().__init__()
        self.dim, self.part, self.whole, self.tp = dim, part, whole, tp
        rows, columns = (len(part) if d == dim else size for d, size in enumerate(whole))
        self.weight = nn.Parameter(torch.empty(rows, columns))
        self.bias = nn.Parameter(torch.empty(rows)) if bias else None
        self.scale = lora.alpha / lora.rank if lora else 0.0
        self.lora_A = nn.Parameter(torch.empty(lora.rank, columns)) if lora else None
        self.lora_B = nn.Parameter(torch.empty(rows, lora.rank)) if lora else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = linear(x, self.weight, self.bias)
        if self.lora_A is None or self.lora_B is None:
            return y
        return y + self.scale * linear(linear(x, self.lora_A), self.lora_B)

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

    def __init__(self, spec: ModelSpec, split: Split, lora: Lora | None):
        super().__init__()
        self.spec, self.split = spec, split
        tp, dim, per = split.tp, spec.head_dim, spec.heads // spec.kv_heads
        groups = share(spec.kv_heads, tp.rank, tp.size)

        def rows(width: int) -> range:
            return range(groups.start * width, groups.stop * width)

        def projection(name: str, whole: tuple[int, int], part: range, cut: int, bias: bool) -> Projection:
            return Projection(whole, part, cut, tp, bias=bias, lora=lora if lora and name in lora.targets else None)

        q, kv = (spec.q_width, spec.hidden), (spec.kv_width, spec.hidden)
        self.q_proj = projection("q_proj", q, rows(per * dim), 0, spec.qkv_bias)
        self.k_proj = projection("k_proj", kv, rows(dim), 0, spec.qkv_bias)
        self.v_proj = projection("v_proj", kv, rows(dim), 0, spec.qkv_bias)
        self.o_proj = projection("o_proj", q[::-1], rows(per * dim), 1, False)
        self.q_norm = Norm(dim, spec.norm_eps, tp) if spec.qk_norm else None
        self.k_norm = Norm(dim, spec.norm_eps, tp) if spec.qk_norm else None

    def forward(self, x: torch.Tensor, turns: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        batch, length = x.shape[:2]
        x = copy_in(x, self.split.tp)
        q, k, v = (
            projection(x).view(batch, length, -1, self.spec.head_dim).transpose(1, 2)
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
        out: torch.Tensor = self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))
        return out


class MLP(nn.Module):
    """down(silu(gate x) * up x), `tp` holding stretches of the inner columns."""

    def __init__(self, spec: ModelSpec, split: Split, lora: Lora | None):
        super().__init__()
        self.tp = split.tp
        inner = share(spec.ffn, split.tp.rank, split.tp.size)

        def projection(name: str, whole: tuple[int, int], cut: int) -> Projection:
            return Projection(
                whole, inner, cut, split.tp, bias=False, lora=lora if lora and name in lora.targets else None
            )

        self.gate_proj = projection("gate_proj", (spec.ffn, spec.hidden), 0)
        self.up_proj = projection("up_proj", (spec.ffn, spec.hidden), 0)
        self.down_proj = projection("down_proj", (spec.hidden, spec.ffn), 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = copy_in(x, self.tp)
        out: torch.Tensor = self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Experts(nn.Module):
    """The expert MLPs of a layer: whole experts shared by `ep`, the inner columns of each by `tp`."""

    def __init__(self, spec: ModelSpec, split: Split):
        super().__init__()
        self.spec, self.tp, self.ep = spec, split.tp, split.ep
        self.inner = share(spec.ffn, split.tp.rank, split.tp.size)
        self.local = share(spec.experts, split.ep.rank, split.ep.size)
        self.moe = MoE(spec.hidden, len(self.inner), spec.experts, spec.top_k, split.ep, policy=split.experts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
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


class Layer(nn.Module):
    """One decoder layer over x [B, L, H]."""

    def __init__(self, spec: ModelSpec, split: Split, lora: Lora | None):
        super().__init__()
        self.tp = split.tp
        self.input_layernorm = Norm(spec.hidden, spec.norm_eps)
        self.self_attn = Attention(spec, split, lora)
        self.post_attention_layernorm = Norm(spec.hidden, spec.norm_eps)
        self.mlp: nn.Module = Experts(spec, split) if spec.experts else MLP(spec, split, lora)

    def forward(self, x: torch.Tensor, turns: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        x = x + sum_out(self.self_attn(self.input_layernorm(x), turns).to(x.dtype), self.tp)
        return x + sum_out(self.mlp(self.post_attention_layernorm(x)).to(x.dtype), self.tp)


class _Decoder(nn.Module):
    """What Hugging Face calls `model`: the embedding, the layers by their numbers, the final norm."""

    def __init__(self, spec: ModelSpec, layers: range, first: bool, last: bool, split: Split, lora: Lora | None):
        super().__init__()
        self.embed_tokens = Table(spec, split.tp) if first else None
        self.layers = nn.ModuleDict({str(index): Layer(spec, split, lora) for index in layers})
        self.norm = Norm(spec.hidden, spec.norm_eps) if last else None


class CausalStage(nn.Module):
    """Some layers of a model; with all of them, the model.

    Args:
        layers: the numbers of the layers that lie here.
        first, last: whether the embedding, and the norm with the head, lie here too.
        split: the axes that share it.
        lora: adapters, beside which nothing is trained.
        dtype: of the parameters.
        compute: type of the products where it is not that of the parameters ("bf16": under autocast).

    A head that is tied to the embedding is the same tensor where both lie here, and a copy where they do not: its name
    is `lm_head.weight` then, and the two gradients have to be added.
    """

    frequencies: torch.Tensor

    def __init__(
        self,
        spec: ModelSpec,
        layers: range | None = None,
        *,
        first: bool = True,
        last: bool = True,
        split: Split | None = None,
        lora: Lora | None = None,
        dtype: torch.dtype = torch.float32,
        compute: torch.dtype | None = None,
    ):
        super().__init__()
        self.spec, self.split, self.lora = spec, split or Split(), lora
        self.first, self.last = first, last
        self.compute = compute
        self.model = _Decoder(spec, range(spec.layers) if layers is None else layers, first, last, self.split, lora)
        own_head = last and not (spec.tied_embeddings and first)
        self.lm_head = Table(spec, self.split.tp) if own_head else None
        if dtype != torch.float32:
            self.to(dtype)
        self.register_buffer("frequencies", rope_frequencies(spec).to(dtype), persistent=False)
        self._turns: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        if lora is not None:
            for name, parameter in self.named_parameters():
                parameter.requires_grad_("lora_" in name)

    def forward(
        self,
        x: torch.Tensor,
        targets: torch.Tensor | None = None,
        *,
        length: int,
        recompute: bool = False,
    ) -> torch.Tensor:
        """The stage's result.

        Args:
            x: tokens [B, L] where the embedding lies here, else the stage before's result [B, L, H].
            targets: the tokens that come next [B, L], for the last stage; `IGNORED` ones count for nothing.
            length: of the whole sequence, of which `cp` may hold parts.
            recompute: keep the inputs of layers only, and compute the rest again when gradients ask for it.

        Returns:
            [B, L, H]; of the last stage, the sum of the token losses that lie here.
        """
        with torch.autocast("cpu", self.compute, enabled=self.compute is not None):
            if self.model.embed_tokens is not None:
                x = self.model.embed_tokens.embed(x)
            turns = self._turn(length)
            for layer in self.model.layers.values():
                x = checkpoint(layer, x, turns, use_reentrant=False) if recompute else layer(x, turns)
            if self.model.norm is None:
                return x
            assert targets is not None
            rows = self.model.norm(x).flatten(0, 1)
            return self.head.losses(rows, targets.flatten()).sum()

    @property
    def dtype(self) -> torch.dtype:
        """The type of the parameters, and of what goes from stage to stage."""
        return self.frequencies.dtype

    @property
    def head(self) -> Table:
        """The output projection of the last stage."""
        found = self.lm_head or self.model.embed_tokens
        assert found is not None
        return found

    @property
    def tied_pair(self) -> nn.Parameter | None:
        """The tensor whose other copy lies on another stage, if this is the first or the last of several."""
        if not self.spec.tied_embeddings or self.first == self.last:
            return None
        table = self.model.embed_tokens if self.first else self.lm_head
        assert table is not None
        return table.weight

    def placements(self) -> dict[str, Placement]:
        """The place of every parameter, by its name, in the order of `named_parameters`."""
        found = {
            f"{path}.{name}": place
            for path, module in self.named_modules()
            if isinstance(module, Projection | Norm | Table | Experts)
            for name, place in module.placements()
        }
        return {name: found[name] for name, _ in self.named_parameters()}

    def _turn(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine of the rotary angles of the tokens that lie here, [L, D]."""
        if length not in self._turns:
            where = positions(length, self.split.cp, self.split.layout).to(self.frequencies.dtype)
            angles = where[:, None] * torch.cat([self.frequencies, self.frequencies])
            self._turns[length] = (angles.cos(), angles.sin())
        return self._turns[length]


def _turned(heads: torch.Tensor, turns: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Heads [B, N, L, D] with rotary partners half a head apart, turned to their positions."""
    cosine, sine = (part.to(heads.dtype) for part in turns)
    low, high = heads.chunk(2, dim=-1)
    return heads * cosine + torch.cat([-high, low], dim=-1) * sine


def load_weights(stage: CausalStage, weights: Weights) -> None:
    """Fill the stage from a model's files; adapters begin as `initialise` makes them.

    Raises:
        UserError: a tensor is missing or has another shape than the model's spec says.
    """
    if ROPE_DIVISORS in weights:
        pairs = stage.spec.head_dim // 2
        divisors = weights.tensor(ROPE_DIVISORS, (pairs,))
        stage.frequencies.copy_(rope_frequencies(stage.spec, divisors))
    initialise(stage, seed=0, only="lora_")
    with torch.no_grad():
        for name, parameter, place in _placed(stage):
            if "lora_" not in name:
                parameter.copy_(part_of(_whole(name, place, stage.spec, weights), place, parameter))


def initialise(stage: CausalStage, *, seed: int, only: str = "") -> None:
    """Fill the parameters whose names hold `only` with what a new model begins with, whoever holds which part.

    Matrices are normal with a deviation of 0.02 (those that write to the residual stream smaller by the root of twice
    the layers), norms 1, biases 0; an adapter's second matrix is 0, so that it begins as nothing.
    """
    with torch.no_grad():
        for name, parameter, place in _placed(stage):
            if only in name:
                whole = _initial(name, place.shape, stage.spec, seed, parameter.dtype)
                parameter.copy_(part_of(whole, place, parameter))


def part_of(whole: torch.Tensor, place: Placement, part: torch.Tensor) -> torch.Tensor:
    """The stretch of `whole` that `place` says, of the shape of `part`."""
    for dim, (start, size) in enumerate(zip(place.start, part.shape, strict=True)):
        whole = whole.narrow(dim, start, size)
    return whole


def _placed(stage: CausalStage) -> Iterator[tuple[str, nn.Parameter, Placement]]:
    places = stage.placements()
    for name, parameter in stage.named_parameters():
        yield name, parameter, places[name]


def _whole(name: str, place: Placement, spec: ModelSpec, weights: Weights) -> torch.Tensor:
    if name == "lm_head.weight" and spec.tied_embeddings:
        name = "model.embed_tokens.weight"
    whole = weights.tensor(name, place.shape)
    if any(f".{part}_{kind}." in name for part in "qk" for kind in ("proj", "norm")):
        return query_key_order(whole, spec.head_dim, have=weights.rotary, want="halves")
    return whole


def _initial(name: str, shape: tuple[int, ...], spec: ModelSpec, seed: int, dtype: torch.dtype) -> torch.Tensor:
    if name.endswith("norm.weight"):
        return torch.ones(shape, dtype=dtype)
    if name.endswith((".bias", "lora_B")):
        return torch.zeros(shape, dtype=dtype)
    if name == "lm_head.weight" and spec.tied_embeddings:
        name = "model.embed_tokens.weight"
    deviation = _INIT_STD
    if name.endswith(("o_proj.weight", "down_proj.weight", "moe.down")):
        deviation /= (2 * spec.layers) ** 0.5
    drawn = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") >> 1
    generator: Any = torch.Generator().manual_seed(drawn)
    return torch.empty(shape).normal_(0.0, deviation, generator=generator).to(dtype)
