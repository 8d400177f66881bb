"""What a decoder-only transformer of the Llama family is, as numbers: its shapes, its parameters, its bytes.

One value describes Llama, Qwen2 (biased QKV), Qwen3 (normed query and key heads), Mistral and SmolLM:
grouped KV heads, a gated SiLU MLP, RMS norms and rotary positions. It is read from a Hugging Face
`config.json` or from GGUF metadata and needs no torch, so a planner can ask about models whose weights are
not here. Anything that would change the result and is not known (other rope scalings, other activations) is
refused and never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from stretto.core.errors import UserError, require
from stretto.hardware.operation import Operation
from stretto.models.passes import PassShape, operations_of

DTYPE_BYTES: Mapping[str, float] = {
    "fp32": 4.0,
    "bf16": 2.0,
    "fp16": 2.0,
    "fp8": 1.0,
    "int8": 1.0,
    "int4": 0.5 + 4 / 64,
    "q8_0": 34 / 32,
    "q4_1": 20 / 32,
    "q4_0": 18 / 32,
}
"""Bytes an element; the block formats, and keys and values in int4 by pages of 64, include their scales."""

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def unet_pairs(layers: int) -> tuple[tuple[int, int], ...]:
    """Each layer of the first half with its like of the second; one in the middle stays alone.

    >>> unet_pairs(5)
    ((0, 4), (1, 3))
    """
    return tuple((layer, layers - 1 - layer) for layer in range(layers // 2))


def bytes_of(dtype: str) -> float:
    """Bytes an element of `dtype`; a `UserError` names the known types."""
    try:
        return DTYPE_BYTES[dtype]
    except KeyError:
        raise UserError(f"unknown number type {dtype!r}", right=f"one of {', '.join(DTYPE_BYTES)}") from None


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context.

    Attributes:
        kind: "linear" divides every frequency by `factor`; "llama3" leaves fast ones alone and blends in
        between. low_frequency, high_frequency, original_positions: the edges of llama3's blend; unused by
        "linear".
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    original_positions: int = 8192

    def __post_init__(self) -> None:
        require(self.kind in ("linear", "llama3"), "kind", self.kind, "linear or llama3")
        require(self.factor >= 1, "factor", self.factor, "at least 1")
        require(
            0 < self.low_frequency < self.high_frequency,
            "low_frequency",
            self.low_frequency,
            "in (0, high_frequency)",
        )
        require(self.original_positions > 0, "original_positions", self.original_positions, "positive")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """The shape of one model; all counts are positive, `heads` is a multiple of `kv_heads`.

    Attributes:
        hidden, ffn: width of the residual stream and of the MLP.
        heads, kv_heads, head_dim: query heads, key/value heads, their width (need not multiply to `hidden`).
        tied_embeddings: the output projection is the embedding table.
        qkv_bias: query, key and value projections add a bias (Qwen2).
        qk_norm: each query and key head is RMS-normed before the rotation (Qwen3).
        max_positions: tokens a sequence may have. A sliding window caps it: within the window attention is
        exact.
        experts, top_k: experts of each MLP, each of width `ffn`, and how many of them a token goes to; 0 and 0 for
        a dense model.
        skips: "unet": the result of layer i of L, times a weight that is learned, is added to what enters layer
        L-1-i, as in U-shaped transformers (Bao et al., "All are worth words", CVPR 2023; decoders of this kind: the
        speed runs of KellerJordan/modded-nanogpt, 2024).
    """

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    tied_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_positions: int = 2048
    experts: int = 0
    top_k: int = 0
    skips: Literal["none", "unet"] = "none"

    def __post_init__(self) -> None:
        require(self.family in FAMILIES, "family", self.family, f"one of {', '.join(FAMILIES)}")
        for field in ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocab", "max_positions"):
            require(0 < getattr(self, field) <= 2**31, field, getattr(self, field), "a count from 1 to 2**31")
        require(self.heads % self.kv_heads == 0, "heads", self.heads, f"a multiple of kv_heads ({self.kv_heads})")
        require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "even, as rotary positions turn pairs")
        require(0 < self.norm_eps < 1, "norm_eps", self.norm_eps, "in (0, 1)")
        require(self.rope_theta > 0, "rope_theta", self.rope_theta, "positive")
        require(0 <= self.experts <= 4096, "experts", self.experts, "from 0, none, to 4096")
        top = (1 if self.experts else 0, self.experts)
        require(top[0] <= self.top_k <= top[1], "top_k", self.top_k, f"from {top[0]} to {top[1]}")
        require(self.skips in ("none", "unet"), "skips", self.skips, "none or unet")

    @property
    def q_width(self) -> int:
        """Columns of the query projection."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Columns of the key projection, and of the value projection."""
        return self.kv_heads * self.head_dim

    @property
    def qkv_width(self) -> int:
        return self.q_width + 2 * self.kv_width

    def parameters(self) -> int:
        """Weights that are stored, a tied table counting once.

        >>> tiny = ModelSpec(family="llama", layers=1, hidden=4, heads=2, kv_heads=1, head_dim=2, ffn=8, vocab=10)
        >>> tiny.parameters()
        236
        """
        attention = self.hidden * (self.qkv_width + self.q_width)
        extra = (self.qkv_width if self.qkv_bias else 0) + (2 * self.head_dim if self.qk_norm else 0)
        router = self.experts * self.hidden
        layer = attention + extra + router + 3 * self.hidden * self.ffn * max(1, self.experts) + 2 * self.hidden
        tables = self.vocab * self.hidden * (1 if self.tied_embeddings else 2)
        return self.layers * layer + tables + self.hidden + len(self.skip_pairs)

    @property
    def skip_pairs(self) -> tuple[tuple[int, int], ...]:
        """Of each skip connection, the layer that makes its tensor and the one before which it is added."""
        return unet_pairs(self.layers) if self.skips == "unet" else ()

    def weight_bytes(self, dtype: str) -> float:
        """Bytes of all weights stored as `dtype`."""
        return self.parameters() * bytes_of(dtype)

    def kv_bytes_per_token(self, dtype: str) -> float:
        """Bytes of the keys and values of one token over all layers."""
        return 2 * self.kv_width * self.layers * bytes_of(dtype)

    def operations(
        self,
        batch: PassShape,
        *,
        dtype: str,
        kv_dtype: str | None = None,
        weight_dtype: str | None = None,
        tp: int = 1,
    ) -> tuple[Operation, ...]:
        """Every operation of one forward pass over `batch`, in order, with FLOPs and bytes.

        Args:
            batch: the new and cached tokens of each sequence.
            dtype: the type of arithmetic and activations.
            kv_dtype, weight_dtype: how the KV cache and the matrices are stored; as `dtype` when None.
            tp: ranks that share each layer by KV groups; the largest share is listed, without the
            collectives.
        """
        require(1 <= tp <= self.kv_heads, "tp", tp, f"from 1 to the {self.kv_heads} KV heads")
        return operations_of(
            self,
            batch,
            dtype=dtype,
            activation_bytes=bytes_of(dtype),
            kv_bytes=bytes_of(kv_dtype or dtype),
            weight_bytes=bytes_of(weight_dtype or dtype),
            tp=tp,
        )
